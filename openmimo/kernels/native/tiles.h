/* Products of rows of bfloat16 that are packed once, in one of two ways.
 *
 * By the tile unit of the processor (AMX), where there is one: sixteen weight rows are one operand of a tile product, as
 * they lie in memory; up to sixteen packed rows are the other. Where there are no vectors of 512 bits either, rows are
 * packed as float32, and weights are widened a piece at a time (wide.c). In between, where the processor multiplies
 * vectors of bfloat16, nothing is packed. An output is one sum from the first number to the last, whatever other rows
 * are multiplied beside it.
 */

#ifndef OPENMIMO_TILES_H
#define OPENMIMO_TILES_H

#include <stdint.h>

#define TILE_ROWS 16  /* rows, and weight rows, of a tile */
#define TILE_PAIRS 16 /* pairs of numbers that a tile takes of each */

/* Whether rows of bfloat16 are to be packed on this processor. */
int openmimo_has_tiles(void);

/* Every thread that multiplies tiles says so before, and after. */
void openmimo_begin_tiles(void);
void openmimo_end_tiles(void);

/* How many words `count` packed rows take, and packing them. */
int64_t openmimo_packed_words(int64_t count, int64_t dims);
void openmimo_pack_rows(const void *const *rows, int64_t count, int64_t dims, uint32_t *packed);

/* Products of `count` packed rows with weight rows `first` to `first + outputs - 1`, at most TILE_ROWS. */
void openmimo_multiply_tiles(const uint32_t *packed, int64_t count, const uint16_t *matrix, int64_t first,
                             int64_t outputs, int64_t dims, float (*sums)[TILE_ROWS]);

#endif
