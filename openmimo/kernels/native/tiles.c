#include "tiles.h"

#include <string.h>

#if defined(__AMX_BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_WORDS (TILE_PAIRS * TILE_ROWS)

static int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t openmimo_packed_words(int64_t count, int64_t dims) {
    return divide_up(count, TILE_ROWS) * divide_up(dims, 2 * TILE_PAIRS) * TILE_WORDS;
}

/* Tiles run along the dims, then over groups of sixteen rows. In a tile, words are [pair][row], padded with zeros. */
void openmimo_pack_rows(const void *const *rows, int64_t count, int64_t dims, uint32_t *packed) {
    int64_t group_words = openmimo_packed_words(1, dims);
    memset(packed, 0, openmimo_packed_words(count, dims) * sizeof(uint32_t));
    for (int64_t row = 0; row < count; row++) {
        uint32_t *column = packed + row / TILE_ROWS * group_words + row % TILE_ROWS;
        for (int64_t pair = 0; pair < dims / 2; pair++)
            memcpy(column + pair * TILE_ROWS, (const uint32_t *)rows[row] + pair, sizeof(uint32_t));
        if (dims % 2) memcpy(column + dims / 2 * TILE_ROWS, (const uint16_t *)rows[row] + dims - 1, sizeof(uint16_t));
    }
}

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

int openmimo_has_tiles(void) {
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return known;
}

/* A compiler barrier: the compiler does not see the reads of tile instructions, so all stores must precede them. */
#define STORE_ALL(from) __asm__ volatile("" : : "r"(from) : "memory")

void openmimo_begin_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 4 * TILE_ROWS, config.rows[i] = TILE_ROWS;
    STORE_ALL(&config);
    _tile_loadconfig(&config);
}

void openmimo_end_tiles(void) { _tile_release(); }

/* Loads one tile of weights. Numbers outside the matrix are zero and not read. */
static inline void load_weights(const uint16_t *weights, int64_t outputs, int64_t dims, int64_t dim) {
    int64_t numbers = dims - dim < 2 * TILE_PAIRS ? dims - dim : 2 * TILE_PAIRS;
    if (outputs == TILE_ROWS && numbers == 2 * TILE_PAIRS) {
        for (int64_t i = 0; i < TILE_ROWS; i++) __builtin_prefetch(weights + (TILE_ROWS + i) * dims + dim, 0, 2);
        _tile_loadd(2, weights + dim, dims * sizeof *weights);
        return;
    }
    uint16_t part[TILE_ROWS][2 * TILE_PAIRS] = {};
    for (int64_t i = 0; i < outputs; i++) memcpy(part[i], weights + i * dims + dim, numbers * sizeof *weights);
    STORE_ALL(part);
    _tile_loadd(2, part, sizeof part[0]);
}

static void write_sums(const float (*tile)[TILE_ROWS], int64_t count, float (*sums)[TILE_ROWS]) {
    for (int64_t row = 0; row < count && row < TILE_ROWS; row++)
        for (int64_t i = 0; i < TILE_ROWS; i++) sums[row][i] = tile[i][row];
}

/* Thirty-two rows at a time share one load of the weights. */
void openmimo_multiply_tiles(const uint32_t *packed, int64_t count, const uint16_t *matrix, int64_t first,
                             int64_t outputs, int64_t dims, float (*sums)[TILE_ROWS]) {
    const uint16_t *weights = matrix + first * dims;
    int64_t group_words = openmimo_packed_words(1, dims);
    float tile[TILE_ROWS][TILE_ROWS];
    for (; count > 0; count -= 2 * TILE_ROWS, sums += 2 * TILE_ROWS, packed += 2 * group_words) {
        const uint32_t *rows = packed;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t dim = 0; dim < dims; dim += 2 * TILE_PAIRS, rows += TILE_WORDS) {
            load_weights(weights, outputs, dims, dim);
            _tile_loadd(3, rows, 4 * TILE_ROWS);
            _tile_dpbf16ps(0, 2, 3);
            if (count <= TILE_ROWS) continue;
            _tile_loadd(4, rows + group_words, 4 * TILE_ROWS);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, tile, sizeof tile[0]);
        write_sums(tile, count, sums);
        if (count <= TILE_ROWS) continue;
        _tile_stored(1, tile, sizeof tile[0]);
        write_sums(tile, count - TILE_ROWS, sums + TILE_ROWS);
    }
}

#elif defined(__AVX512F__) /* bfloat16 vector products (see products.h) are as fast */

int openmimo_has_tiles(void) { return 0; }

int64_t openmimo_packed_words(int64_t count, int64_t dims) { return 0 * count * dims; }

void openmimo_pack_rows(const void *const *rows, int64_t count, int64_t dims, uint32_t *packed) {
    (void)rows, (void)count, (void)dims, (void)packed;
}

void openmimo_begin_tiles(void) {}

void openmimo_end_tiles(void) {}

void openmimo_multiply_tiles(const uint32_t *packed, int64_t count, const uint16_t *matrix, int64_t first,
                             int64_t outputs, int64_t dims, float (*sums)[TILE_ROWS]) {
    (void)packed, (void)count, (void)matrix, (void)first, (void)outputs, (void)dims, (void)sums;
}

#endif
