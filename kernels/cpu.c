/* What a sampler does on a CPU: the noise stream; and a network's GroupNorm, scale, shift and SiLU (Wu & He 2018), and 3 x 3 convolutions by Winograd's
   method (Lavin & Gray 2016, F(4 x 4, 3 x 3)), whose images go from one matrix product to the next within the cache; or, of factors in bf16, by tiles,
   where the processor has them. fastdiff/native.py compiles this where there is a C compiler; fastdiff/reference.py says what it computes.

   Images are fp32, channels-last and dense; channels are a multiple of 16, those of a convolution's result of 32. For a convolution height and width
   are multiples of 4, and there is a border of zeros that is not stored. Tiles of 4 x 4 pixels are numbered by image, row and column; place k of 36 of
   all tiles begins `plane` numbers after place k - 1. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* A vector of neighbouring channels is as wide as the processor has them. Of a product of matrices its registers hold the sums of HIGH rows and WIDE
   columns. */
#if defined(__AVX512F__)
enum { LANES = 16, HIGH = 14 };
#elif defined(__AVX__)
enum { LANES = 8, HIGH = 3 };
#else
enum { LANES = 4, HIGH = 2 };
#endif
enum { WIDE = 32, VECTORS = WIDE / LANES };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

/* One of a team of threads. TOGETHER(cores) statement: each of the team does it; in it, TEAM says who one is. */
struct team {
  int me, all;
};
#ifdef _OPENMP
#define PRAGMA(of) _Pragma(#of)
#define TOGETHER(cores) PRAGMA(omp parallel num_threads(cores) if (cores > 1))
#define TEAM {omp_get_thread_num(), omp_get_num_threads()}
#else
#define TOGETHER(cores)
#define TEAM {0, 1}
#endif

/* Nobody goes on until all have come here. */
INLINE void meet(struct team team) {
  if (team.all > 1) {
#ifdef _OPENMP
#pragma omp barrier
#endif
  }
}

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

/* ln v within 2 units in the last place, for positive numbers that are not subnormal (Cephes' logf). */
INLINE vec logarithm(vec v) {
  const int half = 0x3f3504f3; /* sqrt(1/2): what is left after the power of two is between it and its double */
  const ivec bits = (ivec)v - half;
  const vec power = __builtin_convertvector(bits >> 23, vec), r = (vec)((bits & 0x7fffff) + half) - 1, square = r * r;
  vec p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return power * 0.693359375f + (r + (p * r * square - power * 2.12194440e-4f - square * 0.5f));
}

/* Cosine and sine of numbers between -pi and pi, within 1e-7 (Cephes' sincosf: on quarters of the circle). */
INLINE void cosine_sine(vec v, vec *cosine, vec *sine) {
  const float magic = 12582912; /* as in `exponential` */
  const vec shifted = v * 0.636619772f + magic, quarter = shifted - magic;
  const vec r = v - quarter * 1.5703125f - quarter * 4.837512969970703125e-4f - quarter * 7.549789948768648e-8f, z = r * r;
  const vec s = ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const vec c = ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - z * 0.5f + 1;
  const ivec which = (ivec)shifted, odd = -(which & 1), turned = (which & 2) << 30, sign = ((which + 1) & 2) << 30;
  *cosine = (vec)(((odd & (ivec)s) | (~odd & (ivec)c)) ^ sign);
  *sine = (vec)(((odd & (ivec)c) | (~odd & (ivec)s)) ^ turned);
}

enum { QUADS = 64 };

/* Words of QUADS counters (Philox4x32-10, Salmon et al. 2011) of a sample's stream, from counter `quad` on. */
INLINE void philox(uint32_t words[4][QUADS], uint64_t seed, uint64_t id, uint32_t counter, uint32_t quad) {
  for (int q = 0; q < QUADS; q++) {
    uint32_t c0 = quad + q, c1 = counter, c2 = (uint32_t)id, c3 = (uint32_t)(id >> 32), k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
      const uint64_t p0 = (uint64_t)c0 * 0xD2511F53, p1 = (uint64_t)c2 * 0xCD9E8D57;
      c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
      c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    words[0][q] = c0, words[1][q] = c1, words[2][q] = c2, words[3][q] = c3;
  }
}

/* Two normal numbers of two words each (Box & Muller 1958). */
INLINE void box_muller(const uint32_t *one, const uint32_t *two, float *first, float *second) {
  for (int q = 0; q < QUADS; q += LANES) {
    float of[LANES], radius[LANES];
    vec u, theta, cosine, sine, r;
    for (int i = 0; i < LANES; i++) of[i] = (float)one[q + i] * 0x1p-32f + 0x1p-33f;
    load(&u, of);
    u = logarithm(u) * -2;
    store(of, &u);
    for (int i = 0; i < LANES; i++) radius[i] = sqrtf(of[i]);
    for (int i = 0; i < LANES; i++) of[i] = (float)(int32_t)two[q + i] * 1.4629180792671596e-09f;
    load(&r, radius);
    load(&theta, of);
    cosine_sine(theta, &cosine, &sine);
    cosine *= r, sine *= r;
    store(first + q, &cosine);
    store(second + q, &sine);
  }
}

/* What is worked on at a time of a sample: QUADS counters, four words each. */
enum { PIECE = 4 * QUADS };

/* A piece of a sample's noise, from element 4 quad on. */
static void normals(float z[PIECE], uint64_t seed, uint64_t id, uint32_t counter, uint32_t quad) {
  uint32_t words[4][QUADS];
  float parts[4][QUADS];
  philox(words, seed, id, counter, quad);
  box_muller(words[0], words[1], parts[0], parts[1]);
  box_muller(words[2], words[3], parts[2], parts[3]);
  for (int q = 0; q < QUADS; q++)
    for (int k = 0; k < 4; k++) z[4 * q + k] = parts[k][q];
}

/* The noise stream of n samples, z [n, numel], element e from the words of quad e / 4. counters: one for all, or, `step` 1, one for each. */
void fastdiff_normal(const uint64_t *seeds, const uint64_t *ids, const int64_t *counters, long step, float *z, long n, long numel) {
  float piece[PIECE];
  for (long i = 0; i < n; i++)
    for (long start = 0; start < numel; start += PIECE) {
      normals(piece, seeds[i], ids[i], (uint32_t)counters[i * step], (uint32_t)(start / 4));
      memcpy(z + i * numel + start, piece, (numel - start < PIECE ? numel - start : PIECE) * sizeof *z);
    }
}

/* Its words [n, quads, 4]. */
void fastdiff_noise_words(const uint64_t *seeds, const uint64_t *ids, const int64_t *counters, long step, int64_t *words, long n, long quads) {
  uint32_t piece[4][QUADS];
  for (long i = 0; i < n; i++)
    for (long quad = 0; quad < quads; quad += QUADS) {
      philox(piece, seeds[i], ids[i], (uint32_t)counters[i * step], (uint32_t)quad);
      for (long q = 0; q < QUADS && quad + q < quads; q++)
        for (int k = 0; k < 4; k++) words[4 * (i * quads + quad + q) + k] = piece[k][q];
    }
}

/* A row of a solver's table, in the order of reference.COLUMNS. */
struct row {
  float px, pm, clip, a, b, c, d, s, c_next, h[3], slot, save_x, save_x0, log_s;
};

/* reference.solver_step of n samples of `numel` numbers, by row `which` of a table of `rows`; 0, and nothing done, if there is no such row. m: of 2 n
   samples with `halves`, of twice as many numbers with `learned`. history: of three times n samples, or NULL. copies: of what goes into model_input.
   noise: [n, numel], or NULL for the stream's. */
int fastdiff_solver_step(float *x, float *x0, const float *m, float *model_input, float *history, const struct row *table, long rows,
                         const int64_t *which, const uint64_t *seeds, const uint64_t *ids, const float *guidance, const float *noise, long n,
                         long numel, int halves, int learned, int copies) {
  if (*which < 0 || *which >= rows) return 0;
  const struct row *const row = table + *which;
  const long all = n * numel, of_m = learned ? 2 * numel : numel;
  float *const kept = history && row->slot >= 0 ? history + (long)row->slot * all : NULL;
  for (long i = 0; i < n; i++)
    for (long start = 0; start < numel; start += PIECE) {
      const long many = numel - start < PIECE ? numel - start : PIECE, at = i * numel + start;
      const float *const says = m + i * of_m + start, *const plain = says + n * of_m, w = guidance[i];
      float model[PIECE], guess[PIECE], next[PIECE], z[PIECE];
      if (halves)
        for (long e = 0; e < many; e++) model[e] = plain[e] + w * (says[e] - plain[e]);
      else
        memcpy(model, says, many * sizeof *m);
      for (long e = 0; e < many; e++) {
        const float v = row->px * x[at + e] + row->pm * model[e], high = v > row->clip ? row->clip : v; /* NaN stays */
        guess[e] = high < -row->clip ? -row->clip : high;
      }
      for (long e = 0; e < many; e++) next[e] = row->a * x[at + e] + row->b * guess[e] + row->d * model[e];
      if (row->c != 0)
        for (long e = 0; e < many; e++) next[e] += row->c * x0[at + e];
      for (int k = 0; k < 3; k++)
        if (history && row->h[k] != 0)
          for (long e = 0; e < many; e++) next[e] += row->h[k] * history[k * all + at + e];
      if (kept)
        for (long e = 0; e < many; e++) kept[at + e] = row->save_x * x[at + e] + row->save_x0 * guess[e];
      if (row->s != 0) {
        if (noise)
          memcpy(z, noise + at, many * sizeof *z);
        else
          normals(z, seeds[i], ids[i], (uint32_t)*which, (uint32_t)(start / 4));
        if (learned)
          for (long e = 0; e < many; e++) z[e] *= expf(row->log_s * says[numel + e]);
        for (long e = 0; e < many; e++) next[e] += row->s * z[e];
      }
      memcpy(x + at, next, many * sizeof *x);
      memcpy(x0 + at, guess, many * sizeof *x0);
      for (int copy = 0; copy < copies; copy++)
        for (long e = 0; e < many; e++) model_input[copy * all + at + e] = row->c_next * next[e];
    }
  return 1;
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

/* A norm of `groups` groups, 0 for none, and whether SiLU follows it. */
struct norm {
  const float *gamma, *beta;
  long groups;
  float eps;
  int silu;
};

/* Channels from `start` until `stop`, of so many altogether. */
struct slice {
  long start, stop;
};

/* What a norm is to a slice, of whole groups and vectors, of one image [pixels, c]: of each channel the mean, what the difference from it is multiplied
   by, and what is then added. */
struct affine {
  float *mean, *times, *plus;
};

/* (norm(x) gamma + beta) (1 + scale) + shift. style: scale [c], then shift, or NULL for neither. scratch: 4 c numbers. */
static struct affine measure(const float *x, const struct norm *norm, const float *style, long pixels, long c, struct slice slice, float *scratch) {
  float *const one = scratch, *const two = one + c, *const centre = two + c, *const plus = centre + c;
  const long size = c / norm->groups;
  const double many = (double)(size * pixels);
  /* Around a number of the group itself, the squares cancel no more than a few of their digits, however far from 0 the mean is. */
  for (long start = slice.start; start < slice.stop; start += size)
    for (long k = start; k < start + size; k++) centre[k] = x[start];
  for (long k = slice.start; k < slice.stop; k += LANES) sums(one + k, two + k, x + k, centre + k, pixels, c);
  for (long start = slice.start; start < slice.stop; start += size) {
    double first = 0, second = 0;
    for (long k = start; k < start + size; k++) first += one[k], second += two[k];
    const double off = first / many, variance = second / many - off * off;
    const float mean = (float)(centre[start] + off), by = (float)(1 / sqrt((variance < 0 ? 0 : variance) + norm->eps));
    for (long k = start; k < start + size; k++) {
      const float more = style ? 1 + style[k] : 1;
      centre[k] = mean;
      one[k] = by * norm->gamma[k] * more;
      plus[k] = norm->beta[k] * more + (style ? style[c + k] : 0);
    }
  }
  return (struct affine){centre, one, plus};
}

/* y = silu of what `measure` says, or that itself; y may be x. */
static void normalise(const float *x, float *y, const struct norm *norm, const float *style, long pixels, long c, struct slice slice, float *scratch) {
  const struct affine affine = measure(x, norm, style, pixels, c, slice, scratch);
  for (long k = slice.start; k < slice.stop; k += LANES) {
    vec mean, times, more, v;
    load(&mean, affine.mean + k);
    load(&times, affine.times + k);
    load(&more, affine.plus + k);
    for (long p = 0; p < pixels; p++) {
      load(&v, x + p * c + k);
      v = (v - mean) * times + more;
      if (norm->silu) v = v / (1 + exponential(-v));
      store(y + p * c + k, &v);
    }
  }
}

#define UNROLL _Pragma("GCC unroll 16")

/* c = a b + bias of so many rows, at most HIGH, and WIDE columns: a [rows, k], b [k, WIDE], bias [WIDE] or NULL, c's rows `stride` apart. Meanwhile it
   fetches as many numbers as b has from `next`, if not NULL: that matrix is too large for the caches, and is wanted soon. */
INLINE void product(const int rows, const float *a, const float *b, const float *bias, float *c, long k, long stride, const float *next) {
  vec sum[HIGH][VECTORS], beside[VECTORS] = {{0}};
  if (bias) UNROLL for (int v = 0; v < VECTORS; v++) load(&beside[v], bias + v * LANES);
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = beside[v];
  for (long i = 0; i < k; i++, b += WIDE) {
    UNROLL for (int v = 0; v < VECTORS; v++) load(&beside[v], b + v * LANES);
    if (next) UNROLL for (int line = 0; line < WIDE; line += 16) __builtin_prefetch(next + i * WIDE + line, 0, 2);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] += a[r * k + i] * beside[v];
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) store(c + r * stride + v * LANES, &sum[r][v]);
}

/* c = a b + bias of a panel: a [rows, k], b [k, WIDE], bias [WIDE] or NULL, c's rows `stride` apart. */
static void multiply(const float *a, const float *b, const float *bias, float *c, long rows, long k, long stride) {
  const long blocks = (rows + HIGH - 1) / HIGH;
  for (long block = 0; block < blocks; block++) {
    const long row = rows * block / blocks, high = rows * (block + 1) / blocks - row; /* as even as can be */
    const float *const from = a + row * k, *const next = block ? NULL : b + k * WIDE;
    float *const to = c + row * stride;
    switch (high) {
#define CASE(rows) \
  case rows: product(rows, from, b, bias, to, k, stride, next); break;
      CASE(1) CASE(2)
#if defined(__AVX__)
      CASE(3)
#endif
#if defined(__AVX512F__)
      CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
#undef CASE
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

/* places[k][tile] = (B^T x B)[k], of a slice of one image [h, w, c]. */
static void transform(const float *x, float *places, long h, long w, long c, struct slice slice, long plane) {
  const vec zero = {0};
  for (long top = 0; top < h; top += 4)
    for (long left = 0; left < w; left += 4, places += c)
      for (long channel = slice.start; channel < slice.stop; channel += LANES) {
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

/* y = (A^T places A + bias + skip) times, a slice of one image [h, w, c]; bias [c] and skip [h, w, c], which may be y itself, or NULL for none. */
static void transform_back(const float *places, const float *bias, const float *skip, float times, float *y, long h, long w, long c,
                           struct slice slice, long plane) {
  for (long top = 0; top < h; top += 4)
    for (long left = 0; left < w; left += 4, places += c)
      for (long channel = slice.start; channel < slice.stop; channel += LANES) {
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
            made[j] *= times;
            store(y + at, &made[j]);
          }
        }
      }
}

/* A convolution of what norm makes of the images. weight: 36 places, each as `multiply` takes it; or, of tiles, 9 taps. */
struct layer {
  struct norm norm;
  const void *weight;
  const float *bias;
  long c_in, c_out;
};

/* y = (x' + layers(x)) times. x': x itself, or with `skip`, a matrix as `multiply` or the tiles take it, x skip; or nothing, with `alone`. A style
   is scale and shift of the last layer's norm, or, with `added`, is added to what that norm is of. */
struct block {
  struct layer layers[2];
  long count;
  const void *skip;
  float times;
  int alone, added;
};

/* x and y [n, pixels, c]. style: image i has row which[i] of it, `stride` numbers apart; NULL for row i. scratch: 4 c numbers. */
void fastdiff_group_norm_silu(const float *x, float *y, const struct norm *norm, const float *style, long stride, const long long *which, long n,
                              long pixels, long c, float *scratch) {
  for (long i = 0; i < n; i++)
    normalise(x + i * pixels * c, y + i * pixels * c, norm, style ? style + (which ? which[i] : i) * stride : NULL, pixels, c,
              (struct slice){0, c}, scratch);
}

/* A slice for each of a team, of whole vectors of c channels, and of whole groups of a norm. */
static struct slice channels(struct team team, long c, const struct norm *norm) {
  const long size = norm && norm->groups ? c / norm->groups : 1;
  long unit = LANES;
  while (unit % size) unit += LANES;
  const long units = c / unit;
  return (struct slice){units * team.me / team.all * unit, units * (team.me + 1) / team.all * unit};
}

/* What fastdiff_block says, of one of a team. Between meetings each has channels of its own, or matrices of its own, so bits do not depend on how many
   there are. */
static void share(struct team team, const struct block *block, const float *x, const float *beside, long c_beside, const float *style, long stride,
                  float *y, long n, long h, long w, long part, float *scratch) {
  const struct layer *const first = block->layers, *const last = first + block->count - 1;
  const long pixels = h * w, tiles = pixels / 16, c_in = first->c_in, c_x = c_in - c_beside, c_out = last->c_out;
  long most = c_in;
  for (const struct layer *layer = first; layer <= last; layer++)
    if (layer->c_out > most) most = layer->c_out;
  float *const shift = scratch + 4 * most, *const whole = shift + most, *const image = whole + pixels * most, *const places = image + pixels * most;
  const struct slice comes = channels(team, c_in, &first->norm), goes = channels(team, c_out, NULL);
  const long row = pixels * team.me / team.all, high = pixels * (team.me + 1) / team.all - row;
  const long own_x = comes.stop < c_x ? comes.stop : c_x, own_beside = comes.start > c_x ? comes.start : c_x;
  for (long start = 0; start < n; start += part) {
    const long images = n - start < part ? n - start : part;
    /* One row more than there are tiles, so that the 36 places do not lie powers of two apart and drive each other from the cache. */
    const long rows = images * tiles, plane = rows + 1;
    float *const made = places + 36 * plane * most;
    for (long i = 0; i < images; i++) {
      const float *from = x + (start + i) * pixels * c_x;
      float *const to = y + (start + i) * pixels * c_out;
      if (beside) {
        const float *const more = beside + (start + i) * pixels * c_beside;
        for (long p = 0; p < pixels; p++) {
          if (comes.start < own_x) memcpy(whole + p * c_in + comes.start, from + p * c_x + comes.start, (own_x - comes.start) * sizeof *x);
          if (own_beside < comes.stop)
            memcpy(whole + p * c_in + own_beside, more + p * c_beside + own_beside - c_x, (comes.stop - own_beside) * sizeof *x);
        }
        from = whole;
        meet(team);
      }
      if (block->skip)
        for (long column = 0; column < c_out; column += WIDE)
          multiply(from + row * c_in, (const float *)block->skip + column * c_in, NULL, to + row * c_out + column, high, c_in, c_out);
      else if (beside && !block->alone)
        memcpy(to + row * c_out, whole + row * c_out, high * c_out * sizeof *y);
      if (first->norm.groups) {
        const float *const own = first == last && style && !block->added ? style + (start + i) * stride : NULL;
        normalise(from, image, &first->norm, own, pixels, c_in, comes, scratch);
        from = image;
      }
      transform(from, places + i * tiles * c_in, h, w, c_in, comes, plane * c_in);
      if (beside) meet(team);
    }
    for (const struct layer *layer = first;; layer++) {
      const long c = layer->c_out, panels = c / WIDE, mine = 36 * panels * team.me / team.all, end = 36 * panels * (team.me + 1) / team.all;
      meet(team);
      for (long k = mine; k < end; k++)
        multiply(places + k / panels * plane * layer->c_in, (const float *)layer->weight + k * layer->c_in * WIDE, NULL,
                 made + k / panels * plane * c + k % panels * WIDE, rows, layer->c_in, c);
      meet(team);
      if (layer == last) break;
      const struct slice between = channels(team, c, &layer[1].norm);
      for (long i = 0; i < images; i++) {
        const float *const own = style ? style + (start + i) * stride : NULL;
        for (long k = between.start; k < between.stop; k++) shift[k] = (layer->bias ? layer->bias[k] : 0) + (own && block->added ? own[k] : 0);
        transform_back(made + i * tiles * c, shift, NULL, 1, image, h, w, c, between, plane * c);
        normalise(image, image, &layer[1].norm, own && !block->added ? own : NULL, pixels, c, between, scratch);
        transform(image, places + i * tiles * c, h, w, c, between, plane * c);
      }
    }
    for (long i = 0; i < images; i++) {
      const long at = (start + i) * pixels * c_out;
      const float *const skip = block->alone ? NULL : (block->skip || beside ? y : x) + at;
      transform_back(made + i * tiles * c_out, last->bias, skip, block->times, y + at, h, w, c_out, goes, plane * c_out);
    }
  }
}

/* `part` of n images at a time, of h x w pixels: x [n, h, w, c_in], or, with beside [n, h, w, c_beside], x with its channels after the others'. style:
   row i is image i's, `stride` numbers apart; NULL for none. scratch: (5 + 2 h w) and 36 (1 + part h w / 16) times the most channels there are, and the
   latter again. By `cores` threads, where this is compiled with OpenMP. */
void fastdiff_block(const struct block *block, const float *x, const float *beside, long c_beside, const float *style, long stride, float *y, long n,
                    long h, long w, long part, int cores, float *scratch) {
  TOGETHER(cores) {
    const struct team team = TEAM;
    share(team, block, x, beside, c_beside, style, stride, y, n, h, w, part, scratch);
  }
}

/* Whether the processor has tiles (AMX), and the system lets this process have them. */
int fastdiff_tiles(void) {
#ifdef TILES
  enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return 0;
#endif
}

#ifdef TILES
/* A tile has TILE rows of 64 bytes: of so many sums in fp32, or of twice as many factors in bf16. */
enum { TILE = 16, DEEP = 32, HEIGHT = 2 * TILE };

/* Where one image's pixels are among the rows of a matrix: one after another, a row of zeros after each line, a line of zeros after each image, and
   before the first. So what a pixel's neighbour is of all pixels is the same matrix from some rows earlier or later on. */
struct places {
  long h, w, c;
};
INLINE long lead(struct places at) { return at.w + 2; }
INLINE long each(struct places at) { return (at.h + 1) * (at.w + 1); }
INLINE long rounded(long rows) { return (rows + HEIGHT - 1) / HEIGHT * HEIGHT; }

static void configure(void) {
  struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } tiles = {.palette = 1};
  for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = TILE;
  _tile_loadconfig(&tiles);
}

/* 1 / (1 + e^-v) within 2^-18, of which bf16 keeps 2^-9; NaN of NaN. A power of two, and the best polynomial of what is left. */
INLINE vec logistic(vec v) {
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(126), (__m512)(v * -1.44269504f)); /* NaN is the second */
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT);
  const vec r = (vec)power - (vec)whole;
  const vec p = (((r * 9.5701e-3f + 5.591786e-2f) * r + 2.4024745e-1f) * r + 6.9312181e-1f) * r + 9.9999926e-1f;
  const vec one_more = 1 + (vec)_mm512_scalef_ps((__m512)p, whole), some = (vec)_mm512_rcp14_ps((__m512)one_more);
  return some * (2 - one_more * some); /* a step of Newton's doubles the digits */
}

/* One image [h, w, c] as rows of bf16: what a norm makes of it, if that is not NULL. */
static void lay(const float *x, uint16_t *rows, struct places at, const struct affine *affine, int silu) {
  const __m256i zero = {0};
  for (long k = 0; k < at.c; k += LANES) {
    const float *from = x + k;
    uint16_t *to = rows + k;
    vec mean = {0}, times = mean + 1, plus = mean, v;
    if (affine) {
      load(&mean, affine->mean + k);
      load(&times, affine->times + k);
      load(&plus, affine->plus + k);
    }
    for (long line = 0; line < at.h; line++) {
      for (long column = 0; column < at.w; column++, from += at.c, to += at.c) {
        load(&v, from);
        if (affine) v = (v - mean) * times + plus;
        if (silu) v *= logistic(v);
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
      }
      _mm256_storeu_si256((__m256i *)to, zero);
      to += at.c;
    }
    for (long column = 0; column <= at.w; column++, to += at.c) _mm256_storeu_si256((__m256i *)to, zero);
  }
}

/* y = (sums + bias + skip) times, one image [h, w, c] of its rows; bias [c] and skip [h, w, c], which may be y itself, or NULL for none. */
static void collect(const float *sum, const float *bias, const float *skip, float times, float *y, struct places at) {
  for (long line = 0; line < at.h; line++, sum += at.c)
    for (long column = 0; column < at.w; column++, sum += at.c, y += at.c) {
      for (long k = 0; k < at.c; k += LANES) {
        vec v, beside;
        load(&v, sum + k);
        if (bias) {
          load(&beside, bias + k);
          v += beside;
        }
        if (skip) {
          load(&beside, skip + k);
          v += beside;
        }
        v *= times;
        store(y + k, &v);
      }
      if (skip) skip += at.c;
    }
}

/* Sums of HEIGHT rows and WIDE columns over c factors more. */
INLINE const uint16_t *add(const uint16_t *a, const uint16_t *b, long c) {
  for (long k = 0; k < c; k += DEEP, b += 2 * TILE * DEEP) {
    _tile_loadd(4, a + k, 2 * c);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + TILE * DEEP, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + TILE * c + k, 2 * c);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return b;
}

/* A convolution of laid out images, and a matrix product of others, if they are not NULL: HEIGHT rows and WIDE columns of the sum. */
static void convolve_tiles(const uint16_t *a, struct places at, const uint16_t *weight, const uint16_t *other, long c_other, const uint16_t *skip,
                           float *sum, long stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long tap = 0; tap < 9; tap++) weight = add(a + (tap / 3 * (at.w + 1) + tap % 3) * at.c, weight, at.c);
  if (other) add(other + lead(at) * c_other, skip, c_other);
  _tile_stored(0, sum, 4 * stride);
  _tile_stored(1, sum + TILE, 4 * stride);
  _tile_stored(2, sum + TILE * stride, 4 * stride);
  _tile_stored(3, sum + TILE * stride + TILE, 4 * stride);
}

/* What fastdiff_block says, by tiles, for any h and w: what is multiplied is bf16, all else fp32. Weights: panels of WIDE columns, of each 9 taps, or
   one of a skip, of each c_in / DEEP times two tiles. scratch: (5 + 2 h w + r + (r + 2 w + 4) / 2) times the most channels, and (r + 2 w + 4) / 2 times
   c_in, with r = part (h + 1) (w + 1), up to a multiple of HEIGHT. */
void fastdiff_block_tiles(const struct block *block, const float *x, const float *beside, long c_beside, const float *style, long stride, float *y,
                          long n, long h, long w, long part, float *scratch) {
  const struct layer *const first = block->layers, *const last = first + block->count - 1;
  const long pixels = h * w, c_in = first->c_in, c_x = c_in - c_beside, c_out = last->c_out;
  struct places at = {h, w, c_in};
  long most = c_in;
  for (const struct layer *layer = first; layer <= last; layer++)
    if (layer->c_out > most) most = layer->c_out;
  float *const shift = scratch + 4 * most, *const whole = shift + most, *const image = whole + pixels * most, *const sum = image + pixels * most;
  const long room = rounded(part * each(at)) + 2 * lead(at);
  uint16_t *const a = (uint16_t *)(sum + rounded(part * each(at)) * most), *const raw = a + room * most;
  configure();
  for (long start = 0; start < n; start += part) {
    const long images = n - start < part ? n - start : part, rows = images * each(at);
    at.c = c_in;
    memset(a, 0, lead(at) * c_in * sizeof *a);
    for (long i = 0; i < images; i++) {
      const long row = (lead(at) + i * each(at)) * c_in;
      const float *from = x + (start + i) * pixels * c_x;
      if (beside) {
        for (long p = 0; p < pixels; p++) {
          memcpy(whole + p * c_in, from + p * c_x, c_x * sizeof *x);
          memcpy(whole + p * c_in + c_x, beside + ((start + i) * pixels + p) * c_beside, c_beside * sizeof *x);
        }
        from = whole;
        if (!block->skip && !block->alone) memcpy(y + (start + i) * pixels * c_out, whole, pixels * c_out * sizeof *y);
      }
      if (block->skip) lay(from, raw + row, at, NULL, 0);
      if (first->norm.groups) {
        const float *const own = first == last && style && !block->added ? style + (start + i) * stride : NULL;
        const struct affine affine = measure(from, &first->norm, own, pixels, c_in, (struct slice){0, c_in}, scratch);
        lay(from, a + row, at, &affine, first->norm.silu);
      } else
        lay(from, a + row, at, NULL, 0);
    }
    for (const struct layer *layer = first;; layer++) {
      const long c = layer->c_out;
      const int skips = layer == last && block->skip;
      for (long panel = 0; panel < c / WIDE; panel++) {
        const uint16_t *const weight = (const uint16_t *)layer->weight + panel * 9 * at.c * WIDE;
        for (long row = 0; row < rows; row += HEIGHT)
          convolve_tiles(a + row * at.c, at, weight, skips ? raw + row * c_in : NULL, c_in, (const uint16_t *)block->skip + panel * c_in * WIDE,
                         sum + row * c + panel * WIDE, c);
      }
      at.c = c;
      if (layer == last) break;
      memset(a, 0, lead(at) * c * sizeof *a);
      for (long i = 0; i < images; i++) {
        const float *const own = style ? style + (start + i) * stride : NULL;
        for (long k = 0; k < c; k++) shift[k] = (layer->bias ? layer->bias[k] : 0) + (own && block->added ? own[k] : 0);
        collect(sum + i * each(at) * c, shift, NULL, 1, image, at);
        const struct affine affine = measure(image, &layer[1].norm, own && !block->added ? own : NULL, pixels, c, (struct slice){0, c}, scratch);
        lay(image, a + (lead(at) + i * each(at)) * c, at, &affine, layer[1].norm.silu);
      }
    }
    for (long i = 0; i < images; i++) {
      const long to = (start + i) * pixels * c_out;
      const float *const skip = block->alone || block->skip ? NULL : (beside ? y : x) + to;
      collect(sum + i * each(at) * c_out, last->bias, skip, block->times, y + to, at);
    }
  }
  _tile_release();
}
#endif

/* A number of so many bytes: of their 32-bit words, as many side by side as a processor has room for, turned and multiplied after each. Without the
   turning the top bit would stay where it is, and two changes of sign would undo each other. */
static int64_t stamp(const unsigned char *from, long bytes) {
  enum { CHAINS = 8 * LANES };
  uint32_t sum[CHAINS] = {0}, word[CHAINS] = {0};
  uint64_t all = bytes;
  for (; bytes > 0; from += sizeof word, bytes -= sizeof word) {
    if (bytes < (long)sizeof word) memset(word, 0, sizeof word);
    memcpy(word, from, bytes < (long)sizeof word ? bytes : (long)sizeof word);
    for (int i = 0; i < CHAINS; i++) sum[i] = (sum[i] << 15 | sum[i] >> 17) * 0x9E3779B1 + word[i];
  }
  for (int i = 0; i < CHAINS; i++) all = (all ^ sum[i]) * 0x9E3779B97F4A7C15;
  return (int64_t)all;
}

/* What pixels `first` until `end` of fastdiff_conv3x3 say. What as many as `product` takes see becomes the rows of a matrix. */
static void convolve(const float *x, const float *weight, const float *bias, float *y, long first, long end, long h, long w, long c_in, long c_out,
                     long step, float *scratch) {
  const long high = (h + step - 1) / step, wide = (w + step - 1) / step, k = 9 * c_in;
  for (long start = first; start < end; start += HIGH) {
    const long rows = end - start < HIGH ? end - start : HIGH;
    float *seen = scratch;
    for (long pixel = start; pixel < start + rows; pixel++) {
      const long top = pixel / wide % high * step - 1, left = pixel % wide * step - 1, outside = left < 0;
      const long columns = (left + 3 > w ? w - left : 3) - outside;
      const float *const image = x + pixel / wide / high * h * w * c_in;
      for (long row = top; row < top + 3; row++, seen += 3 * c_in) {
        const int inside = row >= 0 && row < h;
        if (!inside || columns < 3) memset(seen, 0, 3 * c_in * sizeof *seen);
        if (inside) memcpy(seen + outside * c_in, image + (row * w + left + outside) * c_in, columns * c_in * sizeof *seen);
      }
    }
    for (long column = 0; column < c_out; column += WIDE)
      multiply(scratch, weight + column * k, bias ? bias + column : NULL, y + start * c_out + column, rows, k, c_out);
  }
}

/* A 3 x 3 convolution of every `step`th pixel, with one of zeros around: x [n, h, w, c_in], of any c_in, weight in panels [c_out / WIDE, 9 c_in, WIDE],
   bias [c_out] or NULL. scratch: for each of `cores`, 9 c_in rows of a product. */
void fastdiff_conv3x3(const float *x, const float *weight, const float *bias, float *y, long n, long h, long w, long c_in, long c_out, long step,
                      int cores, float *scratch) {
  const long pixels = n * ((h + step - 1) / step) * ((w + step - 1) / step);
  TOGETHER(cores) {
    const struct team team = TEAM;
    convolve(x, weight, bias, y, pixels * team.me / team.all, pixels * (team.me + 1) / team.all, h, w, c_in, c_out, step,
             scratch + team.me * HIGH * 9 * c_in);
  }
}

/* stamps[i]: a number of the bits of tensor i, which begins at at[i] and has so many bytes: another, but for one chance in 2^32, if any of them is. */
void fastdiff_stamps(const unsigned char *const *at, const long *bytes, int64_t *stamps, long count) {
  for (long i = 0; i < count; i++) stamps[i] = stamp(at[i], bytes[i]);
}
