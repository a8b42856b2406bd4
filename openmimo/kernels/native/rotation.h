/* Rotary position embedding of one head. */

#ifndef OPENMIMO_ROTATION_H
#define OPENMIMO_ROTATION_H

#include "vectors.h"

/* Rotates the first `rotary_dims` numbers of a head by the angles of its token, and copies the others. */
INLINE void rotate_head(const char *x, char *out, const void *cosines, const void *sines, int64_t rotary_dims,
                        int64_t dims, int64_t bfloat16) {
    int64_t size = bfloat16 ? 2 : 4, half = rotary_dims / 2;
    for (int64_t i = 0; i < half; i++) {
        float cosine = read_number(cosines, i, bfloat16), sine = read_number(sines, i, bfloat16);
        float first = read_number(x, i, bfloat16), second = read_number(x, i + half, bfloat16);
        write_number(out, i, first * cosine - second * sine, bfloat16);
        write_number(out, i + half, second * cosine + first * sine, bfloat16);
    }
    memcpy(out + size * rotary_dims, x + size * rotary_dims, size * (dims - rotary_dims));
}

#endif
