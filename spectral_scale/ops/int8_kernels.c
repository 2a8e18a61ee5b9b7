/* Rounding of rows and scaling of sums for ops/int8.py, in one pass over each row.

   The arithmetic is that of the plain form, operation by operation, so that both give the same bits:
   compile without contraction of products and sums (-ffp-contract=off). Compilers turn the inner
   loops into the processor's vector instructions. */

#include <stdint.h>
#include <string.h>
#include <math.h>

static inline float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline float widen(uint16_t bf16) { return from_bits((uint32_t)bf16 << 16); }
static inline float same(float f) { return f; }

static inline uint16_t narrow(float f) {  /* to the nearest, halves to even; NaN stays NaN */
  uint32_t bits = to_bits(f);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (uint16_t)rounded;
}

/* Positive floats are ordered as their bits are, NaN above infinity, so that it is never lost. */
#define QUANTISE_ROWS(NAME, TYPE, LOAD)                                                            \
  void NAME(const TYPE *x, int64_t rows, int64_t width, int64_t stride, const float *columns,      \
            int8_t *q, float *scale, float least, int threads) {                                   \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (int64_t t = 0; t < rows; t++) {                                                           \
      const TYPE *row = x + t * stride;                                                            \
      int8_t *out = q + t * width;                                                                 \
      int32_t top = 0;                                                                             \
      if (columns)                                                                                 \
        for (int64_t j = 0; j < width; j++) {                                                      \
          int32_t bits = (int32_t)(to_bits(LOAD(row[j]) * columns[j]) & 0x7fffffffu);              \
          top = bits > top ? bits : top;                                                           \
        }                                                                                          \
      else                                                                                         \
        for (int64_t j = 0; j < width; j++) {                                                      \
          int32_t bits = (int32_t)(to_bits(LOAD(row[j])) & 0x7fffffffu);                           \
          top = bits > top ? bits : top;                                                           \
        }                                                                                          \
      float largest = from_bits((uint32_t)top);                                                    \
      if (largest < least) largest = least;                                                        \
      scale[t] = largest / 127.0f;                                                                 \
      float inverse = 1.0f / scale[t];                                                             \
      if (columns)                                                                                 \
        for (int64_t j = 0; j < width; j++)                                                        \
          out[j] = (int8_t)(int32_t)rintf(LOAD(row[j]) * columns[j] * inverse);                    \
      else                                                                                         \
        for (int64_t j = 0; j < width; j++)                                                        \
          out[j] = (int8_t)(int32_t)rintf(LOAD(row[j]) * inverse);                                 \
    }                                                                                              \
  }

QUANTISE_ROWS(quantise_rows_bf16, uint16_t, widen)
QUANTISE_ROWS(quantise_rows_fp32, float, same)

/* out = diag(scale) sums diag(columns) + bias; `columns` and `bias` may be null. */
#define SCALE_SUMS(NAME, TYPE, STORE)                                                              \
  void NAME(const int32_t *sums, int64_t rows, int64_t width, const float *scale,                  \
            const float *columns, const float *bias, TYPE *out, int threads) {                     \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                              \
    for (int64_t t = 0; t < rows; t++) {                                                           \
      const int32_t *row = sums + t * width;                                                       \
      TYPE *to = out + t * width;                                                                  \
      float s = scale[t];                                                                          \
      if (columns && bias)                                                                         \
        for (int64_t j = 0; j < width; j++)                                                        \
          to[j] = STORE((float)row[j] * s * columns[j] + bias[j]);                                 \
      else if (columns)                                                                            \
        for (int64_t j = 0; j < width; j++) to[j] = STORE((float)row[j] * s * columns[j]);         \
      else                                                                                         \
        for (int64_t j = 0; j < width; j++) to[j] = STORE((float)row[j] * s);                      \
    }                                                                                              \
  }

SCALE_SUMS(scale_sums_bf16, uint16_t, narrow)
SCALE_SUMS(scale_sums_fp32, float, same)
