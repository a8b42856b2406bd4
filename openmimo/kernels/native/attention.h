/* Vectors of sixteen floats in the vector language of GCC and Clang, and the powers of two of a softmax. */

#ifndef OPENMIMO_ATTENTION_H
#define OPENMIMO_ATTENTION_H

#include <stdint.h>
#include <string.h>

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

static inline floats all(float x) { return (floats){} + x; }

static inline floats choose(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

/* 2^x to 2e-7 of its value, exactly 1 for 0, 0 below 2^-126 and for -inf; NaN stays NaN. For x <= 0. */
static inline floats power_of_two(floats x) {
    const float round_to_integer = 12582912.0f; /* 1.5 x 2^23: the integer ends in the low bits */
    floats shifted = x + round_to_integer;
    floats fraction = x - (shifted - round_to_integer);
    floats power = all(1.5403530e-4f);
    power = power * fraction + 1.3333558e-3f;
    power = power * fraction + 9.6181291e-3f;
    power = power * fraction + 5.5504109e-2f;
    power = power * fraction + 2.4022651e-1f;
    power = power * fraction + 6.9314718e-1f;
    power = power * fraction + 1.0f;
    floats scaled = (floats)((ints)power + ((ints)shifted << 23));
    return choose(x < -126.0f, all(0.0f), scaled);
}

static inline floats greater(floats a, floats b) { return choose(a > b, a, b); }

static inline float largest(floats x) {
    x = greater(x, SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = greater(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = greater(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = greater(x, SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}

static inline float total(floats x) {
    x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return x[0];
}

#endif
