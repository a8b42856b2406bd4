/* A few rows times a packed weight matrix: signs and axes in bit planes (kernels/weights.py). The inner loop adds and
 * subtracts int8 inputs and multiplies nothing; scales multiply the finished sums.
 *
 * An input x in [-127, 127] is stored as the byte x + 128, and -x is 0 - (x + 128) modulo 256. A sum over lanes of
 * such bytes is exact in 64 bits; 128 for each lane is subtracted afterwards, and lanes that do not count are 128:
 *
 *     columns of a code row    0     1     2     3    ...   one bit each
 *     first plane              0     1     1     0          axis (fairy) or "not zero" (ternary)
 *     last plane               0     0     1     1          sign
 *     all                     +x0   +x1   -x2   -x3         summed for fairy and binary
 *     marked                        +x1   -x2               summed for fairy and ternary
 *
 * For complex codes, "marked" is the sum over the imaginary values and "all" minus "marked" that over the real ones. */

#include "products.h"

#include <math.h>
#include <stdlib.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define MAX_ROWS 32
#define BLOCK 64 /* columns of a step of the inner loop */
#define ZERO 128 /* the byte of 0 */
#define AHEAD 2  /* rows of codes between prefetching and use */
#define MIN_PARALLEL_CODES (1 << 19) /* bytes whose sums take as long as reading MIN_PARALLEL_BYTES */

enum { BINARY, TERNARY, FAIRY, FAIRY2I };

/* The call record that linear/packed.py packs. */
typedef struct {
    const float *x;       /* [rows, dims] */
    const uint8_t *codes; /* [stages, parts, part rows, planes, bytes] */
    const float *scale;   /* [stages, parts, part rows or 1, axes] */
    float *out;           /* [rows, outputs], rows at a distance of out_stride */
    int64_t rows, dims, outputs, out_stride, stages, format, scale_per_row, threads;
} packed_call;

typedef struct {
    int64_t all, marked;
} packed_sums;

INLINE uint64_t load_bits(const uint8_t *from) {
    uint64_t bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
}

INLINE uint64_t load_last_bits(const uint8_t *from, int64_t bytes) {
    uint64_t bits = 0;
    for (int64_t i = bytes - 1; i >= 0; i--) bits = bits << 8 | from[i];
    return bits;
}

#if defined(__AVX512BW__)
typedef __m512i lanes64;
INLINE void add_block(uint64_t first, uint64_t sign, const uint8_t *x, lanes64 *all, lanes64 *marked) {
    __m512i nothing = _mm512_setzero_si512(), zeros = _mm512_set1_epi8((char)ZERO), bytes = _mm512_loadu_si512(x);
    bytes = _mm512_mask_sub_epi8(bytes, sign, nothing, bytes);
    *all = _mm512_add_epi64(*all, _mm512_sad_epu8(bytes, nothing));
    *marked = _mm512_add_epi64(*marked, _mm512_sad_epu8(_mm512_mask_mov_epi8(zeros, first, bytes), nothing));
}
INLINE int64_t sum_lanes(lanes64 x) { return _mm512_reduce_add_epi64(x); }
#elif defined(__AVX2__)
typedef __m256i lanes64;
INLINE __m256i spread(uint32_t bits) { /* bit j to all bits of byte j */
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte), bit), bit);
}
INLINE void add_block(uint64_t first, uint64_t sign, const uint8_t *x, lanes64 *all, lanes64 *marked) {
    for (int half = 0; half < 2; half++, first >>= 32, sign >>= 32) {
        __m256i negative = spread((uint32_t)sign), mark = spread((uint32_t)first), nothing = _mm256_setzero_si256();
        __m256i bytes = _mm256_loadu_si256((const __m256i *)x + half);
        bytes = _mm256_sub_epi8(_mm256_xor_si256(bytes, negative), negative);
        *all = _mm256_add_epi64(*all, _mm256_sad_epu8(bytes, nothing));
        bytes = _mm256_blendv_epi8(_mm256_set1_epi8((char)ZERO), bytes, mark);
        *marked = _mm256_add_epi64(*marked, _mm256_sad_epu8(bytes, nothing));
    }
}
INLINE int64_t sum_lanes(lanes64 x) { return x[0] + x[1] + x[2] + x[3]; }
#else
typedef int64_t lanes64;
INLINE void add_block(uint64_t first, uint64_t sign, const uint8_t *x, lanes64 *all, lanes64 *marked) {
    for (int lane = 0; lane < BLOCK; lane++, first >>= 1, sign >>= 1) {
        uint8_t negative = (uint8_t)-(int)(sign & 1), byte = (uint8_t)((x[lane] ^ negative) - negative);
        *all += byte;
        *marked += first & 1 ? byte : ZERO;
    }
}
INLINE int64_t sum_lanes(lanes64 x) { return x; }
#endif

/* Adds `count` rows of inputs, at a distance of `stride` bytes, by one row of codes. `first` may be NULL. */
INLINE void sum_rows(int count, const uint8_t *first, const uint8_t *sign, int64_t bytes, const uint8_t *x,
                     int64_t stride, packed_sums *sums) {
    lanes64 all[4] = {}, marked[4] = {};
    const uint8_t *rows[4] = {x, x, x, x};
    int64_t less = (bytes + 7) / 8 * (BLOCK << 7);
    for (int r = 1; r < count; r++) rows[r] = rows[r - 1] + stride;
    if (first)
        for (; bytes >= 8; bytes -= 8, sign += 8, first += 8) {
            uint64_t signs = load_bits(sign), marks = load_bits(first);
            for (int r = 0; r < count; r++, rows[r - 1] += BLOCK) add_block(marks, signs, rows[r], all + r, marked + r);
        }
    else
        for (; bytes >= 8; bytes -= 8, sign += 8) {
            uint64_t signs = load_bits(sign);
            for (int r = 0; r < count; r++, rows[r - 1] += BLOCK) add_block(0, signs, rows[r], all + r, marked + r);
        }
    if (bytes) {
        uint64_t signs = load_last_bits(sign, bytes), marks = first ? load_last_bits(first, bytes) : 0;
        for (int r = 0; r < count; r++) add_block(marks, signs, rows[r], all + r, marked + r);
    }
    for (int r = 0; r < count; r++) { /* both sums are below 2^32 for fewer than 2^24 columns */
        uint64_t both = (uint64_t)sum_lanes(all[r] + (marked[r] << 32));
        sums[r] = (packed_sums){(int64_t)(both & 0xffffffff) - less, (int64_t)(both >> 32) - less};
    }
}

/* The inner loop, as functions of their own: a test reads their instructions. */
#define NOINLINE __attribute__((noinline))
NOINLINE void openmimo_packed_rows1(const uint8_t *first, const uint8_t *sign, int64_t bytes, const uint8_t *x,
                                    int64_t stride, packed_sums *sums) {
    sum_rows(1, first, sign, bytes, x, stride, sums);
}
NOINLINE void openmimo_packed_rows2(const uint8_t *first, const uint8_t *sign, int64_t bytes, const uint8_t *x,
                                    int64_t stride, packed_sums *sums) {
    sum_rows(2, first, sign, bytes, x, stride, sums);
}
NOINLINE void openmimo_packed_rows4(const uint8_t *first, const uint8_t *sign, int64_t bytes, const uint8_t *x,
                                    int64_t stride, packed_sums *sums) {
    sum_rows(4, first, sign, bytes, x, stride, sums);
}

/* The inputs as bytes. Each row has one or two parts with a scale each, the largest magnitude divided by 127. */
typedef struct {
    uint8_t *bytes; /* [rows, parts, stride] */
    float *scale;   /* [rows, parts] */
    int64_t stride;
} levels;

static void round_part(const float *x, int64_t count, uint8_t *bytes, int64_t stride, float *scale) {
    float largest = 0.0f, not_finite = 0.0f; /* 0, or NaN */
    for (int64_t i = 0; i < count; i++) {
        float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
        not_finite += x[i] - x[i];
    }
    float step = largest == 0.0f || not_finite != 0.0f ? 1.0f : largest / 127.0f;
    for (int64_t i = 0; i < count; i++)
        bytes[i] = not_finite == 0.0f ? (uint8_t)((int)rintf(x[i] / step) + ZERO) : ZERO;
    memset(bytes + count, ZERO, stride - count);
    *scale = step + not_finite;
}

typedef struct {
    const packed_call *call;
    const levels *inputs;
    int64_t parts, part_rows, planes, bytes, axes;
} product;

/* Writes output `row` of the part, for all rows of inputs; for complex codes also the one in the second half. */
static void fill_output(const product *p, int64_t row) {
    const packed_call *call = p->call;
    int complex_codes = call->format >= FAIRY, widely = call->format == FAIRY2I;
    int64_t vectors = call->rows * p->parts;
    float top[MAX_ROWS] = {}, bottom[MAX_ROWS] = {};
    for (int64_t part = 0; part < call->stages * p->parts; part++) {
        const uint8_t *codes = call->codes + (part * p->part_rows + row) * p->planes * p->bytes;
        const uint8_t *first = p->planes == 2 ? codes : NULL, *sign = codes + (p->planes - 1) * p->bytes;
        const float *scale =
            call->scale + (call->scale_per_row ? part * p->part_rows + row : part) * p->axes;
        const uint8_t *x = p->inputs->bytes;
        int64_t stride = p->inputs->stride, done = 0;
        packed_sums sums[2 * MAX_ROWS];
        for (int64_t line = 0; line < p->planes * p->bytes; line += 64)
            __builtin_prefetch(codes + AHEAD * p->planes * p->bytes + line);
        for (; done + 4 <= vectors; done += 4)
            openmimo_packed_rows4(first, sign, p->bytes, x + done * stride, stride, sums + done);
        for (; done + 2 <= vectors; done += 2)
            openmimo_packed_rows2(first, sign, p->bytes, x + done * stride, stride, sums + done);
        if (done < vectors) openmimo_packed_rows1(first, sign, p->bytes, x + done * stride, stride, sums + done);
        for (int64_t r = 0; r < call->rows; r++) {
            const packed_sums *sum = sums + r * p->parts;
            const float *step = p->inputs->scale + r * p->parts;
            if (!complex_codes) {
                top[r] += (float)(call->format == TERNARY ? sum->marked : sum->all) * step[0] * scale[0];
                continue;
            }
            float real = (float)(sum->all - sum->marked) * step[0] * scale[0];
            float imaginary = (float)sum->marked * step[0] * scale[1];
            top[r] += real;
            bottom[r] += imaginary;
            if (!widely) continue;
            sum++; /* of the second half of the input */
            real = (float)(sum->all - sum->marked) * step[1] * scale[0];
            imaginary = (float)sum->marked * step[1] * scale[1];
            int conjugate = part & 1; /* U x, or W conj(x) */
            top[r] += conjugate ? imaginary : -imaginary;
            bottom[r] += conjugate ? -real : real;
        }
    }
    for (int64_t r = 0; r < call->rows; r++) {
        call->out[r * call->out_stride + row] = top[r];
        if (complex_codes && p->part_rows + row < call->outputs)
            call->out[r * call->out_stride + p->part_rows + row] = bottom[r];
    }
}

/* Returns 0 on success, 1 if memory runs out. */
int openmimo_packed_linear(const packed_call *call) {
    int64_t parts = call->format == FAIRY2I ? 2 : 1, width = (call->dims + parts - 1) / parts;
    int64_t stride = (width + BLOCK - 1) / BLOCK * BLOCK;
    uint8_t *memory = malloc(call->rows * parts * (stride + sizeof(float)) + 1);
    if (!memory) return 1;
    levels inputs = {memory + call->rows * parts * sizeof(float), (float *)memory, stride};
    for (int64_t r = 0; r < call->rows; r++)
        for (int64_t part = 0; part < parts; part++) {
            int64_t left = call->dims - part * width;
            round_part(call->x + r * call->dims + part * width, left < width ? left : width,
                       inputs.bytes + (r * parts + part) * stride, stride, inputs.scale + r * parts + part);
        }
    int64_t halves = call->format >= FAIRY ? 2 : 1;
    product p = {call, &inputs, parts, (call->outputs + halves - 1) / halves, call->format == BINARY ? 1 : 2,
                 (width + 7) / 8, call->format >= FAIRY ? 2 : 1};
    int threads = call->stages * parts * p.part_rows * p.planes * p.bytes < MIN_PARALLEL_CODES ? 1 : (int)call->threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < p.part_rows; row++) fill_output(&p, row);
    free(memory);
    return 0;
}
