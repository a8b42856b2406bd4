/* Products of float32 rows, for processors with vectors shorter than 512 bits. */

#ifndef OPENMIMO_WIDE_H
#define OPENMIMO_WIDE_H

#include <stdint.h>

#include "tiles.h"

/* Products of `count` rows with weight rows `first` to `first + outputs - 1` (at most TILE_ROWS) of a matrix of float32,
 * or of bfloat16; rows for these are as `openmimo_pack_rows` orders them. */
void openmimo_multiply_wide(const float *const *rows, int64_t count, const void *matrix, int64_t first, int64_t outputs,
                            int64_t dims, int64_t bfloat16, float (*sums)[TILE_ROWS]);

#endif
