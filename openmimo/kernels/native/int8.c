/* A few rows of float32 times a weight matrix of int8 with a scale for each of its rows. */

#include "products.h"

#define MAX_ROWS 32
#define TOGETHER 4 /* rows, and weight rows, that are multiplied in registers */

/* As openmimo/kernels/linear/_int8.py packs it. */
typedef struct {
    const float *x;       /* [rows, dims] */
    const int8_t *weight; /* [outputs, dims] */
    const float *scale;   /* [outputs] */
    float *out;           /* [rows, outputs] */
    int64_t rows, dims, outputs, threads;
} int8_call;

typedef int8_t bytes __attribute__((vector_size(LANES)));

INLINE floats load_bytes(const int8_t *from, int64_t count) {
    bytes numbers = {};
    if (count >= LANES) memcpy(&numbers, from, LANES);
    else memcpy(&numbers, from, count);
#ifdef __AVX512F__
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)numbers));
#else
    return __builtin_convertvector(__builtin_convertvector(numbers, ints), floats);
#endif
}

/* Four outputs of `count` rows: each a sum of sixteen lanes from first to last, as in products.h. */
INLINE void multiply_bytes(int count, const int8_call *call, int64_t row, const int8_t *const *weights,
                           float (*sums)[TOGETHER]) {
    floats lanes[TOGETHER][TOGETHER] = {};
    int64_t dims = call->dims, dim = 0;
    for (; dim + LANES <= dims; dim += LANES)
        for (int i = 0; i < TOGETHER; i++) {
            floats weight = load_bytes(weights[i] + dim, LANES);
            if (!row) __builtin_prefetch(weights[i] + dim + TOGETHER * dims, 0, 2);
            for (int r = 0; r < count; r++) lanes[r][i] += load(call->x + (row + r) * dims + dim) * weight;
        }
    if (dim < dims)
        for (int i = 0; i < TOGETHER; i++) {
            floats weight = load_bytes(weights[i] + dim, dims - dim);
            for (int r = 0; r < count; r++)
                lanes[r][i] += load_some(call->x + (row + r) * dims + dim, dims - dim) * weight;
        }
    for (int r = 0; r < count; r++) add_lanes(lanes[r][0], lanes[r][1], lanes[r][2], lanes[r][3], sums[r]);
}

static void fill_outputs(const int8_call *call, int64_t first) {
    int64_t outputs = call->outputs - first < TOGETHER ? call->outputs - first : TOGETHER, row = 0;
    const int8_t *weights[TOGETHER];
    float sums[MAX_ROWS][TOGETHER];
    for (int64_t i = 0; i < TOGETHER; i++)
        weights[i] = call->weight + (first + (i < outputs ? i : outputs - 1)) * call->dims;
    for (; row + 4 <= call->rows; row += 4) multiply_bytes(4, call, row, weights, sums + row);
    if (call->rows - row >= 2) multiply_bytes(2, call, row, weights, sums + row), row += 2;
    if (call->rows - row == 1) multiply_bytes(1, call, row, weights, sums + row);
    for (row = 0; row < call->rows; row++)
        for (int64_t i = 0; i < outputs; i++)
            call->out[row * call->outputs + first + i] = sums[row][i] * call->scale[first + i];
}

void openmimo_int8_linear(const int8_call *call) {
    int threads = call->outputs * call->dims < MIN_PARALLEL_BYTES ? 1 : (int)call->threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < call->outputs; first += TOGETHER) fill_outputs(call, first);
}
