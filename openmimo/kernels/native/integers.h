/* Sums of products of int8 numbers, exact in int32, for attention with int8 queries, keys, probabilities and values.
 *
 * A word holds four numbers. A panel holds one word for each of the lanes of a vector, so that one instruction adds four
 * products to each lane: `vpdpbusd` where the processor has it (VNNI), or `vpmaddubsw` and `vpmaddwd` (AVX2). Both take
 * the first factor unsigned. VNNI therefore gets a query number plus 128, and `correction` is the sum to subtract; the
 * other gets the magnitude of the query number, and its sign moves to the key. Pairs of products of numbers up to 127 do
 * not saturate: 2 x 127 x 127 < 2^15.
 */

#ifndef OPENMIMO_INTEGERS_H
#define OPENMIMO_INTEGERS_H

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define QUERY_OFFSET 128
#else
#define QUERY_OFFSET 0
#endif

INLINE lanes load_lanes(const void *from) {
    lanes x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* sums + the four products of each lane. `is_query`: the word holds query numbers, not probabilities (0 to 127). */
INLINE lanes add_word(lanes sums, int32_t word, lanes panel, int is_query) {
#if QUERY_OFFSET
    (void)is_query;
    return (lanes)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(word), (__m512i)panel);
#elif defined(__AVX2__) && WIDTH == 8
    __m256i numbers = _mm256_set1_epi32(word), others = (__m256i)panel;
    if (is_query) others = _mm256_sign_epi8(others, numbers), numbers = _mm256_abs_epi8(numbers);
    __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(numbers, others), _mm256_set1_epi16(1));
    return (lanes)_mm256_add_epi32((__m256i)sums, pairs);
#else
    (void)is_query;
    for (int byte = 0; byte < 4; byte++)
        sums += ((panel << (24 - 8 * byte)) >> 24) * (int32_t)(int8_t)(word >> (8 * byte));
    return sums;
#endif
}

/* The factor by which numbers up to `largest` fill the range of int8; 1 for zeros, whose codes are 0. */
INLINE float code_factor(float largest) { return largest > 0.0f ? 127.0f / largest : 1.0f; }

/* The nearest integer, ties to even, of a number of at most 127. */
INLINE int8_t code_of(float x) {
    const float round_to_integer = 12582912.0f;
    return (int8_t)((x + round_to_integer) - round_to_integer);
}

#endif
