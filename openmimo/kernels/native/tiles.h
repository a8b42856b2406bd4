/* Products of bfloat16 rows that are packed once per call. There are three cases:
 *
 * - With AMX, sixteen weight rows, as they are in memory, are one operand of a tile product, and up to sixteen packed
 *   rows are the other.
 * - With vectors of 512 bits and no AMX, nothing is packed: the processor multiplies vectors of bfloat16.
 * - With shorter vectors, rows are packed as float32, and weights are widened in chunks (wide.c).
 *
 * An output is one sum from the first number to the last, independent of the other rows of the call.
 */

#ifndef OPENMIMO_TILES_H
#define OPENMIMO_TILES_H

#include <stdint.h>

#define TILE_ROWS 16  /* rows and weight rows of a tile */
#define TILE_PAIRS 16 /* pairs of numbers per row of a tile */

/* Whether bfloat16 rows are packed on this processor. */
int openmimo_has_tiles(void);

/* Every thread that multiplies tiles calls these before and after. */
void openmimo_begin_tiles(void);
void openmimo_end_tiles(void);

/* The number of words of `count` packed rows, and the packing. */
int64_t openmimo_packed_words(int64_t count, int64_t dims);
void openmimo_pack_rows(const void *const *rows, int64_t count, int64_t dims, uint32_t *packed);

/* Products of `count` packed rows with weight rows `first` to `first + outputs - 1`, at most TILE_ROWS. */
void openmimo_multiply_tiles(const uint32_t *packed, int64_t count, const uint16_t *matrix, int64_t first,
                             int64_t outputs, int64_t dims, float (*sums)[TILE_ROWS]);

#endif
