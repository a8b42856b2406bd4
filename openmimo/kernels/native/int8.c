/* A few rows of float32 times an int8 weight matrix with one scale per weight row. */

#include "products.h"

#include <math.h>
#include <stdlib.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define MAX_ROWS 32
#define TOGETHER 4 /* rows and weight rows of a register tile */
#define APART 4    /* distance between the weight rows of a tile */

/* The call record of the int8 product. */
typedef struct {
    const float *x;       /* [rows, dims] */
    const int8_t *weight; /* [outputs, dims] */
    const float *scale;   /* [outputs] */
    float *out;           /* [rows, outputs], rows at a distance of out_stride */
    int64_t rows, dims, outputs, out_stride, threads;
} int8_call;

/* Vectors of the width of a register. */
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
typedef float numbers __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));
typedef int8_t bytes __attribute__((vector_size(WIDTH)));

INLINE numbers load_numbers(const float *from) {
    numbers x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE numbers load_bytes(const int8_t *from) {
    bytes x;
    memcpy(&x, from, sizeof x);
#ifdef __AVX512F__
    return (numbers)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
    return (numbers)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)&x)));
#else
    return __builtin_convertvector(__builtin_convertvector(x, integers), numbers);
#endif
}

/* sum + a x b, fused everywhere or nowhere (see wide.c). */
INLINE numbers add_product(numbers sum, numbers a, numbers b) {
#if defined(__AVX512F__)
    return (numbers)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (numbers)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

/* The sum of the lanes plus the numbers after the last whole vector. Not inlined, so that every caller rounds equally. */
static __attribute__((noinline)) float finish(numbers lanes, const float *x, const int8_t *weight, int64_t dim,
                                              int64_t dims) {
    float sum = 0.0f;
    for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
    for (; dim < dims; dim++) sum += x[dim] * (float)weight[dim];
    return sum;
}

/* Four outputs of `count` rows: each a sum of WIDTH lanes that run from the first number to the last. */
INLINE void multiply_bytes(int count, const int8_call *call, int64_t row, const int8_t *const *weights,
                           float (*sums)[TOGETHER]) {
    numbers lanes[TOGETHER][TOGETHER] = {};
    int64_t dims = call->dims, dim = 0;
    for (; dim + WIDTH <= dims; dim += WIDTH)
        for (int i = 0; i < TOGETHER; i++) {
            numbers weight = load_bytes(weights[i] + dim);
            if (!row && dim % 64 == 0) __builtin_prefetch(weights[i] + dim + TOGETHER * APART * dims, 0, 2);
            for (int r = 0; r < count; r++)
                lanes[r][i] = add_product(lanes[r][i], load_numbers(call->x + (row + r) * dims + dim), weight);
        }
    for (int r = 0; r < count; r++)
        for (int i = 0; i < TOGETHER; i++)
            sums[r][i] = finish(lanes[r][i], call->x + (row + r) * dims, weights[i], dim, dims);
}

/* Outputs `first`, `first + APART`, ...: weight rows at a distance are read faster (see wide.c). */
static void fill_outputs(const int8_call *call, int64_t first) {
    const int8_t *weights[TOGETHER];
    float sums[MAX_ROWS][TOGETHER];
    int64_t row = 0;
    for (int64_t i = 0; i < TOGETHER; i++) {
        int64_t output = first + i * APART;
        weights[i] = call->weight + (output < call->outputs ? output : call->outputs - 1) * call->dims;
    }
#ifdef __AVX512F__ /* other processors lack the registers */
    for (; row + 4 <= call->rows; row += 4) multiply_bytes(4, call, row, weights, sums + row);
#endif
    for (; call->rows - row >= 2; row += 2) multiply_bytes(2, call, row, weights, sums + row);
    if (call->rows - row == 1) multiply_bytes(1, call, row, weights, sums + row);
    for (row = 0; row < call->rows; row++)
        for (int64_t i = 0; i < TOGETHER && first + i * APART < call->outputs; i++) {
            int64_t output = first + i * APART;
            call->out[row * call->out_stride + output] = sums[row][i] * call->scale[output];
        }
}

void openmimo_int8_linear(const int8_call *call) {
    int threads = call->outputs * call->dims < MIN_PARALLEL_BYTES ? 1 : (int)call->threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < call->outputs; panel += TOGETHER * APART)
        for (int64_t i = 0; i < APART && panel + i < call->outputs; i++) fill_outputs(call, panel + i);
}

/* The call record of experts with int8 weights. A visit is one token at one of its experts. */
typedef struct {
    const float *x;                            /* [tokens, dims] */
    const int64_t *ids;                        /* [tokens, active] */
    const float *weights;                      /* [tokens, active] */
    const int8_t *gate_up, *down;              /* [experts, 2 * hidden, dims], [experts, dims, hidden] */
    const float *gate_up_scale, *down_scale;   /* [experts, 2 * hidden], [experts, dims] */
    float *out;                                /* [tokens, dims] */
    int64_t tokens, active, experts, dims, hidden, threads;
} int8_experts_call;

/* Computes `count` visits of one expert: `visits` are their indices in ids, `outputs` [tokens * active, dims]. */
static void visit_expert(const int8_experts_call *call, int64_t expert, const int64_t *visits, int64_t count,
                         float *memory, float *outputs) {
    int64_t dims = call->dims, hidden = call->hidden;
    float *rows = memory, *both = rows + MAX_ROWS * dims, *active = both + MAX_ROWS * 2 * hidden;
    for (int64_t i = 0; i < count; i++)
        memcpy(rows + i * dims, call->x + visits[i] / call->active * dims, dims * sizeof *rows);
    openmimo_int8_linear(&(int8_call){rows, call->gate_up + expert * 2 * hidden * dims,
                                      call->gate_up_scale + expert * 2 * hidden, both, count, dims, 2 * hidden,
                                      2 * hidden, call->threads});
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < hidden; j++) {
            float gate = both[i * 2 * hidden + j], up = both[i * 2 * hidden + hidden + j];
            active[i * hidden + j] = gate / (1.0f + expf(-gate)) * up;
        }
    openmimo_int8_linear(&(int8_call){active, call->down + expert * dims * hidden, call->down_scale + expert * dims,
                                      rows, count, hidden, dims, dims, call->threads});
    for (int64_t i = 0; i < count; i++) memcpy(outputs + visits[i] * dims, rows + i * dims, dims * sizeof *rows);
}

/* Reads each expert once for up to MAX_ROWS visits. A token's outputs are added in the order of its ids, so its bits do
 * not depend on the batch. Returns 0 on success, 1 if an id is out of range, 2 if memory runs out. */
int openmimo_int8_experts(const int8_experts_call *call) {
    int64_t count = call->tokens * call->active, dims = call->dims, visits[MAX_ROWS];
    for (int64_t i = 0; i < count; i++)
        if (call->ids[i] < 0 || call->ids[i] >= call->experts) return 1;
    float *memory = malloc((MAX_ROWS * (dims + 3 * call->hidden) + count * dims) * sizeof *memory);
    unsigned char *done = calloc(count, 1);
    if (!memory || !done) {
        free(memory);
        free(done);
        return 2;
    }
    float *outputs = memory + MAX_ROWS * (dims + 3 * call->hidden);
    for (int64_t first = 0; first < count; first++) {
        int64_t found = 0;
        if (done[first]) continue;
        for (int64_t i = first; i < count && found < MAX_ROWS; i++)
            if (!done[i] && call->ids[i] == call->ids[first]) done[visits[found++] = i] = 1;
        visit_expert(call, call->ids[first], visits, found, memory, outputs);
    }
    for (int64_t token = 0; token < call->tokens; token++)
        for (int64_t dim = 0; dim < dims; dim++) {
            float sum = 0.0f;
            for (int64_t i = token * call->active; i < (token + 1) * call->active; i++)
                sum += call->weights[i] * outputs[i * dims + dim];
            call->out[token * dims + dim] = sum;
        }
    free(memory);
    free(done);
    return 0;
}
