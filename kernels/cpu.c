/* What a network does on a CPU between its matrix products, image by image, while an image is in the cache: GroupNorm, scale, shift and SiLU (Wu & He
   2018), and the two transforms of a 3 x 3 convolution by Winograd's method (Lavin & Gray 2016, F(4 x 4, 3 x 3)). fastdiff/native.py compiles this where
   there is a C compiler; fastdiff/reference.py says what it computes.

   Images are fp32, channels-last and dense; channels are a multiple of 16. For a transform height and width are multiples of 4, and there is a border
   of zeros that is not stored. Tiles of 4 x 4 pixels are numbered by image, row and column; place k of 36 of all tiles begins `plane` numbers after
   place k - 1. */
#include <math.h>
#include <string.h>

/* A vector of neighbouring channels, as wide as the processor has them. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE void load(vec *v, const float *from) { memcpy(v, from, sizeof *v); }
INLINE void store(float *to, const vec *v) { memcpy(to, v, sizeof *v); }

INLINE vec at_most(vec v, float most) {
  const ivec over = v > most; /* false for NaN, which stays */
  return (vec)((over & (ivec)((vec){0} + most)) | (~over & (ivec)v));
}

/* e^v within 2 units in the last place, from e^-87 to e^88 (Cephes' expf: a power of two, and a polynomial of what is left); NaN of NaN. */
INLINE vec exponential(vec v) {
  const float magic = 12582912; /* 1.5 2^23: what is added to it is rounded to a whole number, in the last bits */
  v = at_most(-at_most(-v, 87), 88);
  const vec shifted = v * 1.44269504f + magic, whole = shifted - magic;
  const vec r = v - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  return p * (vec)(((ivec)shifted << 23) + 0x3f800000);
}

/* Sums over the pixels, for LANES channels, of x - centre and of its square; even and odd pixels apart, for additions to overlap. */
INLINE void sums(float *one, float *two, const float *x, const float *centre, long pixels, long c) {
  vec from, u, v, first = {0}, second = {0}, odd_first = {0}, odd_second = {0};
  long p = 0;
  load(&from, centre);
  for (; p + 2 <= pixels; p += 2) {
    load(&u, x + p * c);
    load(&v, x + p * c + c);
    u -= from;
    v -= from;
    first += u;
    odd_first += v;
    second += u * u;
    odd_second += v * v;
  }
  if (p < pixels) {
    load(&u, x + p * c);
    u -= from;
    first += u;
    second += u * u;
  }
  first += odd_first;
  second += odd_second;
  store(one, &first);
  store(two, &second);
}

/* A norm and what follows it. scale and shift: of image i their rows i, `stride` numbers apart; NULL for neither. */
struct norm {
  const float *gamma, *beta, *scale, *shift;
  long groups, stride;
  float eps;
  int silu;
};

/* y = silu((norm(x) gamma + beta) (1 + scale) + shift) of one image [pixels, c], which may be y itself. scratch: 4 c numbers. */
static void normalise(const float *x, float *y, const struct norm *norm, long row, long pixels, long c, float *scratch) {
  float *const one = scratch, *const two = one + c, *const centre = two + c, *const plus = centre + c;
  const long size = c / norm->groups;
  const double many = (double)(size * pixels);
  const float *const scale = norm->scale ? norm->scale + row * norm->stride : NULL, *const shift = norm->shift ? norm->shift + row * norm->stride : NULL;
  /* Around a number of the group itself, the squares cancel no more than a few of their digits, however far from 0 the mean is. */
  for (long start = 0; start < c; start += size)
    for (long k = start; k < start + size; k++) centre[k] = x[start];
  for (long k = 0; k < c; k += LANES) sums(one + k, two + k, x + k, centre + k, pixels, c);
  for (long start = 0; start < c; start += size) {
    double first = 0, second = 0;
    for (long k = start; k < start + size; k++) first += one[k], second += two[k];
    const double off = first / many, variance = second / many - off * off;
    const float mean = (float)(centre[start] + off), by = (float)(1 / sqrt((variance < 0 ? 0 : variance) + norm->eps));
    for (long k = start; k < start + size; k++) {
      const float more = scale ? 1 + scale[k] : 1;
      centre[k] = mean;
      one[k] = by * norm->gamma[k] * more;
      plus[k] = norm->beta[k] * more + (shift ? shift[k] : 0);
    }
  }
  for (long k = 0; k < c; k += LANES) {
    vec mean, times, more, v;
    load(&mean, centre + k);
    load(&times, one + k);
    load(&more, plus + k);
    for (long p = 0; p < pixels; p++) {
      load(&v, x + p * c + k);
      v = (v - mean) * times + more;
      if (norm->silu) v = v / (1 + exponential(-v));
      store(y + p * c + k, &v);
    }
  }
}

/* B^T of the six numbers d. */
INLINE void into(vec out[6], const vec d[6]) {
  const vec a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
  out[0] = 4 * d[0] - 5 * d[2] + d[4];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + e;
  out[4] = c - e;
  out[5] = 4 * d[1] - 5 * d[3] + d[5];
}

/* A^T of the six numbers m. */
INLINE void out_of(vec out[4], const vec m[6]) {
  const vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
  out[0] = m[0] + a + c;
  out[1] = b + 2 * e;
  out[2] = a + 4 * c;
  out[3] = b + 8 * e + m[5];
}

/* places[k][tile] = (B^T x B)[k], of one image [h, w, c]. */
static void transform(const float *x, float *places, long h, long w, long c, long plane) {
  const vec zero = {0};
  for (long top = 0; top < h; top += 4)
    for (long left = 0; left < w; left += 4, places += c)
      for (long channel = 0; channel < c; channel += LANES) {
        vec half[6][6]; /* B^T x */
        for (int j = 0; j < 6; j++) {
          const long column = left + j - 1;
          vec d[6], made[6];
          for (int i = 0; i < 6; i++) {
            const long row = top + i - 1;
            if (row < 0 || row >= h || column < 0 || column >= w)
              d[i] = zero;
            else
              load(&d[i], x + (row * w + column) * c + channel);
          }
          into(made, d);
          for (int i = 0; i < 6; i++) half[i][j] = made[i];
        }
        for (int i = 0; i < 6; i++) {
          vec made[6];
          into(made, half[i]);
          for (int j = 0; j < 6; j++) store(places + (6 * i + j) * plane + channel, &made[j]);
        }
      }
}

/* y = A^T places A + bias + skip, one image [h, w, c]; bias [c] and skip [h, w, c], or NULL for none. */
static void transform_back(const float *places, const float *bias, const float *skip, float *y, long h, long w, long c, long plane) {
  for (long top = 0; top < h; top += 4)
    for (long left = 0; left < w; left += 4, places += c)
      for (long channel = 0; channel < c; channel += LANES) {
        vec half[4][6], shift = {0}; /* A^T places */
        for (int j = 0; j < 6; j++) {
          vec m[6], made[4];
          for (int i = 0; i < 6; i++) load(&m[i], places + (6 * i + j) * plane + channel);
          out_of(made, m);
          for (int i = 0; i < 4; i++) half[i][j] = made[i];
        }
        if (bias) load(&shift, bias + channel);
        for (int i = 0; i < 4; i++) {
          vec made[4], beside;
          out_of(made, half[i]);
          for (int j = 0; j < 4; j++) {
            const long at = ((top + i) * w + left + j) * c + channel;
            made[j] += shift;
            if (skip) {
              load(&beside, skip + at);
              made[j] += beside;
            }
            store(y + at, &made[j]);
          }
        }
      }
}

/* x and y [n, pixels, c]. which: image i has row which[i] of scale and shift; NULL for row i. scratch: 4 c numbers. */
void fastdiff_group_norm_silu(const float *x, float *y, const struct norm *norm, const long long *which, long n, long pixels, long c, float *scratch) {
  for (long i = 0; i < n; i++) normalise(x + i * pixels * c, y + i * pixels * c, norm, which ? which[i] : i, pixels, c, scratch);
}

/* The places of x [n, h, w, c], or with norm of what it makes of x. scratch: (4 + h w) c numbers. */
void fastdiff_winograd_into(const float *x, float *places, const struct norm *norm, long n, long h, long w, long c, long plane, float *scratch) {
  const long pixels = h * w;
  for (long i = 0; i < n; i++, x += pixels * c, places += pixels / 16 * c) {
    if (norm) normalise(x, scratch + 4 * c, norm, i, pixels, c, scratch);
    transform(norm ? scratch + 4 * c : x, places, h, w, c, plane);
  }
}

/* From the places of one convolution's result to those of what norm makes of it, [n, h, w, c], both `plane` apart. scratch: (4 + h w) c numbers. */
void fastdiff_winograd_between(const float *made, const float *bias, const struct norm *norm, float *places, long n, long h, long w, long c, long plane,
                               float *scratch) {
  const long pixels = h * w, tiles = pixels / 16 * c;
  float *const image = scratch + 4 * c;
  for (long i = 0; i < n; i++) {
    transform_back(made + i * tiles, bias, NULL, image, h, w, c, plane);
    normalise(image, image, norm, i, pixels, c, scratch);
    transform(image, places + i * tiles, h, w, c, plane);
  }
}

/* y = what the places come from + bias + skip, [n, h, w, c]. */
void fastdiff_winograd_out_of(const float *made, const float *bias, const float *skip, float *y, long n, long h, long w, long c, long plane) {
  const long pixels = h * w;
  for (long i = 0; i < n; i++)
    transform_back(made + i * (pixels / 16) * c, bias, skip ? skip + i * pixels * c : NULL, y + i * pixels * c, h, w, c, plane);
}
