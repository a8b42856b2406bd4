/* Products of a few rows with the rows of a weight matrix, for linear layers, experts and the router.
 *
 * Rows and weights are both float32, or both bfloat16 (as uint16_t). Each product of a row with a weight row is one sum
 * of sixteen lanes, from the first number to the last, independent of the other rows and weights of the call. A row
 * therefore has the same bits in every batch.
 */

#ifndef OPENMIMO_PRODUCTS_H
#define OPENMIMO_PRODUCTS_H

#include "vectors.h"
#include "tiles.h"
#include "wide.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

#define PANEL TILE_ROWS /* weight rows of a unit of work */
#define MAX_SUMS 16 /* sums in registers: 1 row by 16 weight rows, 2 by 8, or 4 by 4 */
#define MIN_PARALLEL_BYTES (1 << 22) /* reading fewer bytes takes less time than waking a second thread */

typedef uint16_t pairs __attribute__((vector_size(64))); /* 32 numbers of bfloat16 */

/* The first `count` lanes, padded with zeros. Memory after them is not read. */
INLINE floats load_some(const float *from, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    floats x = {};
    for (int64_t i = 0; i < count; i++) x[i] = from[i];
    return x;
#endif
}

INLINE pairs load_some_pairs(const uint16_t *from, int64_t count) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (pairs)_mm512_maskz_loadu_epi16((__mmask32)((UINT64_C(1) << count) - 1), from);
#else
    pairs x = {};
    for (int64_t i = 0; i < count; i++) x[i] = from[i];
    return x;
#endif
}

INLINE pairs load_pairs(const uint16_t *from) {
    pairs x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE floats add_pair_products(floats sum, pairs a, pairs b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    words high = {};
    high += 0xffff0000u;
    sum += (floats)((words)a << 16) * (floats)((words)b << 16);
    return sum + (floats)((words)a & high) * (floats)((words)b & high);
#endif
}

/* The lane sums of four vectors, all in the same order of summation. */
INLINE void add_lanes(floats a, floats b, floats c, floats d, float *sums) {
    floats ab = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats cd = SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats abcd = SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    abcd += SHUFFLE(abcd, abcd, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    abcd += SHUFFLE(abcd, abcd, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    memcpy(sums, &abcd, 4 * sizeof(float));
}

/* Products of `count` rows with `outputs` weight rows, count x outputs <= MAX_SUMS: column by column into `sums`.
 * `ahead`: distance in numbers to the weights to prefetch; 0: they are prefetched already.
 */
INLINE void multiply_floats(int count, int outputs, const float *const *rows, const float *const *weights, int64_t dims,
                            int64_t ahead, float (*sums)[PANEL]) {
    floats lanes[MAX_SUMS] = {};
    int64_t dim = 0;
    for (; dim + LANES <= dims; dim += LANES) {
        floats x[4];
        for (int row = 0; row < count; row++) x[row] = load(rows[row] + dim);
#pragma GCC unroll 16
        for (int i = 0; i < outputs; i++) {
            floats weight = load(weights[i] + dim);
            if (ahead) __builtin_prefetch(weights[i] + dim + ahead, 0, 2);
            for (int row = 0; row < count; row++) lanes[row * outputs + i] += x[row] * weight;
        }
    }
    if (dim < dims)
        for (int row = 0; row < count; row++)
            for (int i = 0; i < outputs; i++)
                lanes[row * outputs + i] +=
                    load_some(rows[row] + dim, dims - dim) * load_some(weights[i] + dim, dims - dim);
    for (int row = 0; row < count; row++)
        for (int i = 0; i < outputs; i += 4) {
            floats *first = lanes + row * outputs + i;
            add_lanes(first[0], first[1], first[2], first[3], sums[row] + i);
        }
}

INLINE void multiply_pairs(int count, int outputs, const uint16_t *const *rows, const uint16_t *const *weights,
                           int64_t dims, int64_t ahead, float (*sums)[PANEL]) {
    floats lanes[MAX_SUMS] = {};
    int64_t dim = 0;
    for (; dim + 2 * LANES <= dims; dim += 2 * LANES) {
        pairs x[4];
        for (int row = 0; row < count; row++) x[row] = load_pairs(rows[row] + dim);
#pragma GCC unroll 16
        for (int i = 0; i < outputs; i++) {
            pairs weight = load_pairs(weights[i] + dim);
            if (ahead) __builtin_prefetch(weights[i] + dim + ahead, 0, 2);
            for (int row = 0; row < count; row++) {
                floats *sum = lanes + row * outputs + i;
                *sum = add_pair_products(*sum, x[row], weight);
            }
        }
    }
    if (dim < dims)
        for (int row = 0; row < count; row++)
            for (int i = 0; i < outputs; i++) {
                floats *sum = lanes + row * outputs + i;
                *sum = add_pair_products(*sum, load_some_pairs(rows[row] + dim, dims - dim),
                                         load_some_pairs(weights[i] + dim, dims - dim));
            }
    for (int row = 0; row < count; row++)
        for (int i = 0; i < outputs; i += 4) {
            floats *first = lanes + row * outputs + i;
            add_lanes(first[0], first[1], first[2], first[3], sums[row] + i);
        }
}

/* `count` rows with a whole panel. */
INLINE void multiply_panel(int count, const void *const *rows, const void *const *weights, int64_t dims, int64_t ahead,
                           int64_t bfloat16, float (*sums)[PANEL]) {
    const int outputs = count == 1 ? 8 : MAX_SUMS / count;
    for (int first = 0; first < PANEL; first += outputs) {
        float(*columns)[PANEL] = (float(*)[PANEL])(sums[0] + first);
        if (bfloat16)
            multiply_pairs(count, outputs, (const uint16_t *const *)rows, (const uint16_t *const *)weights + first,
                           dims, ahead, columns);
        else
            multiply_floats(count, outputs, (const float *const *)rows, (const float *const *)weights + first, dims,
                            ahead, columns);
    }
}

/* Rows that are multiplied with the same weights. packed: the rows packed for tiles, or NULL. */
typedef struct {
    const void *const *rows;
    int64_t count;
    const uint32_t *packed;
} row_set;

/* Products of rows with weight rows `first` to `first + outputs - 1` (at most PANEL) of a matrix. */
static __attribute__((noinline)) void multiply(const row_set *x, const void *matrix, int64_t first, int64_t outputs,
                                               int64_t dims, int64_t bfloat16, float (*sums)[PANEL]) {
    if (x->packed) {
        openmimo_multiply_tiles(x->packed, x->count, matrix, first, outputs, dims, sums);
        return;
    }
#ifndef __AVX512F__
    if (!bfloat16) {
        openmimo_multiply_wide((const float *const *)x->rows, x->count, matrix, first, outputs, dims, 0, sums);
        return;
    }
#endif
    const void *weights[PANEL];
    for (int64_t i = 0; i < PANEL; i++) {
        int64_t output = first + (i < outputs ? i : outputs - 1); /* repeats the last row if the panel is partial */
        weights[i] = (const char *)matrix + output * dims * (bfloat16 ? 2 : 4);
    }
    int64_t row = 0, ahead = PANEL * dims;
    for (; row + 4 <= x->count; row += 4, ahead = 0)
        multiply_panel(4, x->rows + row, weights, dims, ahead, bfloat16, sums + row);
    if (x->count - row >= 2) {
        multiply_panel(2, x->rows + row, weights, dims, ahead, bfloat16, sums + row);
        row += 2, ahead = 0;
    }
    if (x->count - row == 1) multiply_panel(1, x->rows + row, weights, dims, ahead, bfloat16, sums + row);
}

#endif
