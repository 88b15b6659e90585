/* The two transforms of a 3 x 3 convolution by Winograd's method on a CPU (Lavin & Gray 2016, F(4 x 4, 3 x 3)); the products between them are a
   batched matrix product of a library. fastdiff/native.py compiles this where there is a C compiler; fastdiff/reference.py says what it computes.

   Images are fp32, channels-last and dense, with a height and width of multiples of 4 and a border of zeros that is not stored; channels are a
   multiple of 16. Tiles of 4 x 4 results are numbered by image, row and column; place k of 36 of all tiles begins `plane` numbers after place k - 1.
   One vector of channels of one tile is in registers at a time. */
#include "vec.h"

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

/* places[k][tile][c] = (B^T x B)[k], of x [n, h, w, c]. */
void fastdiff_winograd_into(const float *x, float *places, long n, long h, long w, long c, long plane) {
  const vec zero = {0};
  for (long image = 0; image < n; image++, x += h * w * c)
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

/* y [n, h, w, c] = A^T places A + bias; bias [c], or NULL for none. */
void fastdiff_winograd_out_of(const float *places, const float *bias, float *y, long n, long h, long w, long c, long plane) {
  for (long image = 0; image < n; image++, y += h * w * c)
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
            vec made[4];
            out_of(made, half[i]);
            for (int j = 0; j < 4; j++) {
              made[j] += shift;
              store(y + ((top + i) * w + left + j) * c + channel, &made[j]);
            }
          }
        }
}
