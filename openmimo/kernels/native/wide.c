/* Products of rows and weights for processors without vectors of 512 bits, in vectors of eight floats.
 *
 * A register tile is three rows by four weight rows, which fits sixteen registers. Every sum has eight lanes that run
 * from the first number to the last, so a row has the same bits in every batch. bfloat16 weights are widened to float32
 * CHUNK numbers at a time and reused for all rows. Widening puts the even numbers of a block of sixteen before the odd
 * ones; packed rows have the same order. For a few rows, which are limited by memory, weights are widened in registers.
 */

#include "wide.h"

#include <string.h>

#if !defined(__AVX512F__)

#ifdef __FMA__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define BLOCK 16 /* numbers that widening permutes */
#define CHUNK 256
#define MAX_ROWS 32 /* rows whose sums are kept across chunks */
#define ROWS 3
#define MAX_FEW 18 /* up to this number of rows, weights are widened in registers, once per three rows */
#define OUTPUTS 4

/* Keeps a vector in a register. Otherwise the compiler reloads it for each use, and loads are the bottleneck. */
#ifdef __AVX__
#define KEEP(x) __asm__("" : "+x"(x))
#else
#define KEEP(x) (void)(x)
#endif

typedef float eight __attribute__((vector_size(32)));
typedef uint32_t eight_words __attribute__((vector_size(32)));

/* sum + a x b, always fused if the processor can. A compiler fuses some sums only, and the bits of a row would
 * then depend on the batch. */
INLINE eight add_product(eight sum, eight a, eight b) {
#ifdef __FMA__
    return (eight)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

INLINE float add_one_product(float sum, float a, float b) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

INLINE eight load(const float *from) {
    eight x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, eight x) { memcpy(to, &x, sizeof x); }

INLINE eight_words load_words(const uint16_t *from) {
    eight_words x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE eight even_numbers(eight_words pairs) { return (eight)(pairs << 16); }

INLINE eight odd_numbers(eight_words pairs) { return (eight)(pairs & 0xffff0000u); }

static int64_t padded(int64_t dims) { return (dims + BLOCK - 1) / BLOCK * BLOCK; }

static void widen_block(const uint16_t *from, float *to) {
    eight_words pairs = load_words(from);
    store(to, even_numbers(pairs));
    store(to + LANES, odd_numbers(pairs));
}

/* Widens `count` numbers of bfloat16 to float32 and pads them with zeros to a whole block. */
static void widen_numbers(const uint16_t *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) widen_block(from + i, to + i);
    if (i == count) return;
    uint16_t rest[BLOCK] = {};
    memcpy(rest, from + i, (count - i) * sizeof *from);
    widen_block(rest, to + i);
}

/* Adds the products of `rows` rows with `outputs` weight rows over `dims` numbers, a multiple of LANES. */
INLINE void add_products(int rows, int outputs, const float *const *x, const float *const *weights, int64_t dims,
                         float (*sums)[TILE_ROWS][LANES]) {
    eight lanes[ROWS][OUTPUTS];
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < outputs; i++) lanes[row][i] = load(sums[row][i]);
    for (int64_t dim = 0; dim < dims; dim += LANES) {
        eight number[ROWS];
        for (int row = 0; row < rows; row++) {
            number[row] = load(x[row] + dim);
            KEEP(number[row]);
        }
        for (int i = 0; i < outputs; i++) {
            eight weight = load(weights[i] + dim);
            KEEP(weight);
            for (int row = 0; row < rows; row++) lanes[row][i] = add_product(lanes[row][i], number[row], weight);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < outputs; i++) store(sums[row][i], lanes[row][i]);
}

/* The products of the numbers after the last whole vector. */
static void add_rest(const float *x, const float *weight, int64_t dims, float *sums) {
    for (int64_t dim = dims / LANES * LANES; dim < dims; dim++) sums[dim % LANES] = add_one_product(sums[dim % LANES], x[dim], weight[dim]);
}

static void add_chunk(const float *const *x, int64_t count, const float *const *weights, int64_t dims,
                      float (*sums)[TILE_ROWS][LANES]) {
    int64_t whole = dims / LANES * LANES;
    for (int64_t row = 0; row < count; row += ROWS)
        for (int i = 0; i < TILE_ROWS; i += OUTPUTS) {
            float(*part)[TILE_ROWS][LANES] = (float(*)[TILE_ROWS][LANES])sums[row][i];
            if (count - row >= 3) add_products(3, OUTPUTS, x + row, weights + i, whole, part);
            else if (count - row == 2) add_products(2, OUTPUTS, x + row, weights + i, whole, part);
            else add_products(1, OUTPUTS, x + row, weights + i, whole, part);
        }
    for (int64_t row = 0; row < count && whole < dims; row++)
        for (int i = 0; i < TILE_ROWS; i++) add_rest(x[row], weights[i], dims, sums[row][i]);
}

/* Adds the products of one block of a weight row with `rows` rows. */
INLINE void add_block(int rows, const float *const *x, int64_t dim, const uint16_t *weight, eight *lanes, int step) {
    eight_words pairs = load_words(weight);
    eight even = even_numbers(pairs), odd = odd_numbers(pairs);
    for (int row = 0; row < rows; row++) {
        lanes[row * step] = add_product(lanes[row * step], load(x[row] + dim), even);
        lanes[row * step] = add_product(lanes[row * step], load(x[row] + dim + LANES), odd);
    }
}

/* Products of at most three rows with sixteen weight rows of bfloat16, four at a time to hide the latency of additions.
 * The four are four rows apart, so that each is a sequential stream of its own, which the hardware prefetcher follows.
 * Four adjacent rows share memory pages and reach a quarter less bandwidth (docs/log.md). */
INLINE void multiply_few(int rows, const float *const *x, const uint16_t *const *weights, int64_t dims,
                         float (*sums)[TILE_ROWS][LANES]) {
    const int apart = TILE_ROWS / OUTPUTS;
    for (int first = 0; first < apart; first++) {
        eight lanes[ROWS * OUTPUTS] = {};
        int64_t dim = 0;
        for (; dim + 2 * BLOCK <= dims; dim += 2 * BLOCK)
#pragma GCC unroll 8
            for (int i = 0; i < OUTPUTS; i++) {
                const uint16_t *weight = weights[first + i * apart] + dim;
                __builtin_prefetch(weight + TILE_ROWS * dims, 0, 2);
                add_block(rows, x, dim, weight, lanes + i, OUTPUTS);
                add_block(rows, x, dim + BLOCK, weight + BLOCK, lanes + i, OUTPUTS);
            }
        for (int i = 0; i < OUTPUTS; i++) {
            float rest[2 * BLOCK];
            widen_numbers(weights[first + i * apart] + dim, dims - dim, rest);
            for (int row = 0; row < rows; row++) {
                float *sum = sums[row][first + i * apart];
                store(sum, lanes[row * OUTPUTS + i]);
                for (int j = 0; j < padded(dims - dim); j++)
                    sum[j % LANES] = add_one_product(sum[j % LANES], x[row][dim + j], rest[j]);
            }
        }
    }
}

static void multiply_few_rows(const float *const *x, int64_t count, const uint16_t *const *weights, int64_t dims,
                              float (*sums)[TILE_ROWS][LANES]) {
    for (; count >= 3; count -= 3, x += 3, sums += 3) multiply_few(3, x, weights, dims, sums);
    if (count == 2) multiply_few(2, x, weights, dims, sums);
    if (count == 1) multiply_few(1, x, weights, dims, sums);
}

static float total(const float *lanes) {
    float part[LANES];
    memcpy(part, lanes, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

/* At most MAX_ROWS rows. */
static void multiply_rows(const float *const *rows, int64_t count, const char *const *weights, int64_t dims,
                          int64_t bfloat16, float (*lanes)[TILE_ROWS][LANES]) {
    float widened[TILE_ROWS][CHUNK];
    const float *x[MAX_ROWS], *w[TILE_ROWS];
    memset(lanes, 0, count * sizeof lanes[0]);
    for (int64_t dim = 0; dim < dims; dim += CHUNK) {
        int64_t numbers = dims - dim < CHUNK ? dims - dim : CHUNK;
        for (int64_t row = 0; row < count; row++) x[row] = rows[row] + dim;
        for (int i = 0; i < TILE_ROWS; i++) {
            w[i] = bfloat16 ? widened[i] : (const float *)weights[i] + dim;
            if (!bfloat16) continue;
            widen_numbers((const uint16_t *)weights[i] + dim, numbers, widened[i]);
            for (int64_t next = 0; next < numbers; next += 2 * BLOCK)
                __builtin_prefetch((const uint16_t *)weights[i] + TILE_ROWS * dims + dim + next, 0, 2);
        }
        add_chunk(x, count, w, bfloat16 ? padded(numbers) : numbers, lanes);
    }
}

void openmimo_multiply_wide(const float *const *rows, int64_t count, const void *matrix, int64_t first, int64_t outputs,
                            int64_t dims, int64_t bfloat16, float (*sums)[TILE_ROWS]) {
    float lanes[MAX_ROWS][TILE_ROWS][LANES];
    const char *weights[TILE_ROWS];
    for (int64_t i = 0; i < TILE_ROWS; i++) {
        int64_t output = first + (i < outputs ? i : outputs - 1); /* repeats the last row if there are fewer than sixteen */
        weights[i] = (const char *)matrix + output * dims * (bfloat16 ? 2 : 4);
    }
    for (; count > 0; count -= MAX_ROWS, rows += MAX_ROWS, sums += MAX_ROWS) {
        int64_t together = count < MAX_ROWS ? count : MAX_ROWS;
        if (bfloat16 && together <= MAX_FEW) multiply_few_rows(rows, together, (const void *)weights, dims, lanes);
        else multiply_rows(rows, together, weights, dims, bfloat16, lanes);
        for (int64_t row = 0; row < together; row++)
            for (int i = 0; i < TILE_ROWS; i++) sums[row][i] = total(lanes[row][i]);
    }
}

int openmimo_has_tiles(void) { return 1; }

/* A row is padded to whole blocks. The number of rows is padded to sixteen, which the other packings need. */
int64_t openmimo_packed_words(int64_t count, int64_t dims) {
    return (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * padded(dims);
}

void openmimo_pack_rows(const void *const *rows, int64_t count, int64_t dims, uint32_t *packed) {
    for (int64_t row = 0; row < count; row++) widen_numbers(rows[row], dims, (float *)packed + row * padded(dims));
}

void openmimo_begin_tiles(void) {}

void openmimo_end_tiles(void) {}

void openmimo_multiply_tiles(const uint32_t *packed, int64_t count, const uint16_t *matrix, int64_t first,
                             int64_t outputs, int64_t dims, float (*sums)[TILE_ROWS]) {
    const float *rows[MAX_ROWS];
    for (; count > 0; count -= MAX_ROWS, sums += MAX_ROWS) {
        int64_t together = count < MAX_ROWS ? count : MAX_ROWS;
        for (int64_t row = 0; row < together; row++, packed += padded(dims)) rows[row] = (const float *)packed;
        openmimo_multiply_wide(rows, together, matrix, first, outputs, dims, 1, sums);
    }
}

#endif
