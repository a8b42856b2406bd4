/* Vectors in the extension of GCC and Clang, 2^x for softmax, and loads and stores of either dtype.
 *
 * `floats` always has sixteen lanes, for an order of summation that is the same on every processor. `vector` has the width
 * of a register, because compilers split comparisons of longer vectors into scalars.
 */

#ifndef OPENMIMO_VECTORS_H
#define OPENMIMO_VECTORS_H

#include <stdint.h>
#include <string.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define LOG2_E 1.44269504088896341f

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

static inline floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, floats x) { memcpy(to, &x, sizeof x); }

#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif

typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t lanes __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t naturals __attribute__((vector_size(4 * WIDTH)));

#if WIDTH == 16
#define LANE_NUMBERS (lanes){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define LANE_NUMBERS (lanes){0, 1, 2, 3, 4, 5, 6, 7}
#endif

static inline vector load_vector(const float *from) {
    vector x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store_vector(float *to, vector x) { memcpy(to, &x, sizeof x); }

static inline vector all(float x) { return (vector){} + x; }

static inline vector choose(lanes mask, vector yes, vector no) {
    return (vector)(((lanes)yes & mask) | ((lanes)no & ~mask));
}

/* 2^x for x <= 0, with a relative error below 2e-7. Exactly 1 for 0; 0 below 2^-126 and for -inf; NaN stays NaN. */
static inline vector power_of_two(vector x) {
    const float round_to_integer = 12582912.0f; /* 1.5 x 2^23 moves the integer into the low bits */
    vector shifted = x + round_to_integer;
    vector fraction = x - (shifted - round_to_integer);
    vector power = all(1.5403530e-4f);
    power = power * fraction + 1.3333558e-3f;
    power = power * fraction + 9.6181291e-3f;
    power = power * fraction + 5.5504109e-2f;
    power = power * fraction + 2.4022651e-1f;
    power = power * fraction + 6.9314718e-1f;
    power = power * fraction + 1.0f;
    vector scaled = (vector)((naturals)power + ((naturals)shifted << 23));
    return choose(x < -126.0f, all(0.0f), scaled);
}

static inline vector greater(vector a, vector b) {
#if defined(__AVX__) && WIDTH == 8
    return (vector)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

static inline float largest_lane(vector x) {
    float most[WIDTH];
    store_vector(most, x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) most[i] = most[i] > most[half + i] ? most[i] : most[half + i];
    return most[0];
}

static inline float sum_of(vector x) {
    float sum[WIDTH];
    store_vector(sum, x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[half + i];
    return sum[0];
}

static inline float total(floats x) {
    x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return x[0];
}

INLINE float widen(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Rounds to the nearest bfloat16, ties to even. NaN stays NaN. */
INLINE uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

INLINE float read_number(const void *numbers, int64_t index, int64_t bfloat16) {
    return bfloat16 ? widen(((const uint16_t *)numbers)[index]) : ((const float *)numbers)[index];
}

INLINE void write_number(void *numbers, int64_t index, float x, int64_t bfloat16) {
    if (bfloat16) ((uint16_t *)numbers)[index] = narrow(x);
    else ((float *)numbers)[index] = x;
}

#endif
