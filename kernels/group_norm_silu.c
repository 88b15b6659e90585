/* GroupNorm, scale and shift, and SiLU of an image while it is in the cache (Wu & He 2018), on a CPU. fastdiff/native.py compiles this where there is
   a C compiler; fastdiff/reference.py says what it computes. Images are fp32, channels-last and dense; channels are a multiple of 16. */
#include "vec.h"

#include <math.h>

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
  load(&from, centre);
  long p = 0;
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

/* y = silu((norm(x) gamma + beta) (1 + scale) + shift), x and y [n, pixels, c]. scale and shift: rows of `stride` numbers, of which image i has row
   which[i], or row i where which is NULL; NULL for neither. scratch: 4 c numbers. */
void fastdiff_group_norm_silu(const float *x, const float *gamma, const float *beta, const float *scale, const float *shift, const long long *which,
                              float *y, float *scratch, long n, long pixels, long c, long groups, long stride, float eps, int silu) {
  float *const one = scratch, *const two = one + c, *const centre = two + c, *const plus = centre + c;
  const long size = c / groups;
  const double many = (double)(size * pixels);
  for (long image = 0; image < n; image++, x += pixels * c, y += pixels * c) {
    const long row = which ? which[image] : image;
    /* Around a number of the group itself, the squares cancel no more than a few of their digits, however far from 0 the mean is. */
    for (long g = 0; g < groups; g++)
      for (long k = g * size; k < (g + 1) * size; k++) centre[k] = x[g * size];
    for (long k = 0; k < c; k += LANES) sums(one + k, two + k, x + k, centre + k, pixels, c);
    for (long g = 0; g < groups; g++) {
      double first = 0, second = 0;
      for (long k = g * size; k < (g + 1) * size; k++) first += one[k], second += two[k];
      const double off = first / many, variance = second / many - off * off;
      const float mean = (float)(centre[g * size] + off), by = (float)(1 / sqrt((variance < 0 ? 0 : variance) + eps));
      for (long k = g * size; k < (g + 1) * size; k++) {
        const float more = scale ? 1 + scale[row * stride + k] : 1;
        centre[k] = mean;
        one[k] = by * gamma[k] * more;
        plus[k] = beta[k] * more + (scale ? shift[row * stride + k] : 0);
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
        if (silu) v = v / (1 + exponential(-v));
        store(y + p * c + k, &v);
      }
    }
  }
}
