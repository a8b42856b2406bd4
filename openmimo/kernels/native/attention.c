/* Attention of a few queries per sequence to a paged KV cache, read in place. Input and output in float32 or bfloat16.
 *
 * A row is one query of one query head. Up to MAX_ROWS rows of one sequence and one KV head form a row group, so that
 * each key and value is read once for all of them. The group visits the positions in blocks that begin at multiples of
 * BLOCK, with an online softmax (running maximum and running sum per row):
 *
 *     positions   0        64       128      192      256
 *                 |  skipped |  block |  block |  block |
 *     row 0       ............xxxxxxxxxxxxxxx..........      x: visible, first[row] to last[row]
 *     row 1       .............xxxxxxxxxxxxxxx.........      (a sliding window; a full layer begins at 0)
 *                 begin (of row 0) ^          ^ end (after the last position of row 1)
 *
 * A fully masked block leaves a row bit-identical, so the result of a row depends only on its own keys, and not on the
 * other queries, sequences, pages or threads of the call (batch invariance).
 *
 * A table has one entry for each run of `page_positions` positions. An entry is a page number times `entry_positions` plus
 * the first position of the run in that page. In a plain call a run is a whole page, and `entry_positions` is 1. Where
 * queries read chosen blocks, every query is a sequence, each KV head has a table of its own, and a run is a block or a
 * part of one: the positions of the sequence are those of the chosen blocks, in order.
 *
 * The cache has the dtype of the queries, or it is int8: a key or a value is `dims` codes and the four bytes of a scale.
 *
 * bfloat16 is computed in float32. A word holds two numbers, and unpacking words puts the even numbers before the odd
 * ones. Keys, queries and sums share that order; the output restores the original one.
 */

#include "rotation.h"
#include "scores.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK 64    /* positions per update of the running maximum */
#define TILE 16     /* positions whose keys or values are unpacked to float32 at once */
#define MAX_ROWS 32 /* rows of a group */
#define MAX_DIM 256
#define LOWEST -1e30f  /* below every logit, and finite, so that the difference of two is not NaN */
#define ROWS 4 /* rows and keys of a register tile */
#define MIN_PARALLEL_PRODUCTS (1 << 20) /* a smaller call takes less time than waking a second thread */

/* The call record that paged_attention/native.py packs. Strides count numbers, not bytes. */
typedef struct {
    const void *queries, *keys, *values; /* [T, N, K], [X, P, G, K], [X, P, G, V] */
    const float *sinks;                  /* [N] or none */
    void *out;                           /* [T, N, V] */
    float *scores;                       /* [T, G, score_blocks], zeros, or none */
    const int32_t *tables;               /* [B, Y] or [B, G, Y] */
    const int32_t *query_lengths, *key_lengths; /* [B]; [B] or [B, G] */
    int64_t sequences, heads, kv_heads, key_dim, value_dim;
    int64_t page_positions, entry_positions, key_page_stride, key_stride, value_page_stride, value_stride;
    int64_t table_stride, table_head_stride, length_stride, length_head_stride;
    int64_t window; /* longer than any sequence if there is no window */
    int64_t threads, bfloat16;
    int64_t score_block, score_blocks; /* keys of a block, and blocks of the longest sequence */
    int64_t int8_cache;
} paged_call;

typedef struct {
    int64_t first_query, queries, keys;
    const int32_t *table;
} paged_sequence;

/* Rows of one sequence that read one KV head. */
typedef struct {
    float queries[MAX_ROWS + ROWS][MAX_DIM]; /* times scale and log2(e) */
    float sums[MAX_ROWS + ROWS][MAX_DIM];    /* sums of weights times values */
    float weights[MAX_ROWS + ROWS][BLOCK];   /* logits, then probabilities relative to 2^peak */
    vector norms[MAX_ROWS];           /* sums of weights */
    float peaks[MAX_ROWS];
    int64_t first[MAX_ROWS], last[MAX_ROWS]; /* first and last visible position of a row */
    int64_t rows, begin, end; /* `begin` to `end`: positions visible to any row */
    float tile[TILE][MAX_DIM];
    float *largest;                   /* [row][score block]: largest logits, if there are scores */
    int64_t score_block, score_blocks;
} row_group;

static const float zeros[MAX_DIM];

static __attribute__((noinline)) void read_numbers(const void *from, float *to, int64_t count, int64_t bfloat16) {
    if (!bfloat16) {
        memcpy(to, from, count * sizeof(float));
        return;
    }
    const uint16_t *numbers = from;
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        words pairs;
        memcpy(&pairs, numbers + i, sizeof pairs);
        store(to + i, (floats)(pairs << 16));
        store(to + i + LANES, (floats)(pairs & 0xffff0000u));
    }
    if (i < count) {
        halves rest;
        memcpy(&rest, numbers + i, sizeof rest);
        store(to + i, (floats)(__builtin_convertvector(rest, words) << 16));
    }
}

/* Rounds to bfloat16 (ties to even), in the upper half of each word. */
static inline words round_numbers(floats x) {
    words bits = (words)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    words is_number = (words)(x == x);
    return (rounded & is_number) | (0x7fc00000u & ~is_number);
}

static void write_numbers(const float *from, void *to, int64_t count, int64_t bfloat16) {
    if (!bfloat16) {
        memcpy(to, from, count * sizeof(float));
        return;
    }
    uint16_t *numbers = to;
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        words pairs = round_numbers(load(from + i)) >> 16 | (round_numbers(load(from + i + LANES)) & 0xffff0000u);
        memcpy(numbers + i, &pairs, sizeof pairs);
    }
    if (i < count) {
        halves rest = __builtin_convertvector(round_numbers(load(from + i)) >> 16, halves);
        memcpy(numbers + i, &rest, sizeof rest);
    }
}

#ifdef __AVX512F__

/* Partial lane sums: each quarter of the result holds one partial sum of a, b, c and d. */
static inline floats gather_sums(floats a, floats b, floats c, floats d) {
    floats ab = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    floats cd = SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    return SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

/* Products of four rows with four keys: sixteen sums over the dims, all in the same order of summation. */
static __attribute__((noinline)) void multiply_keys(float (*queries)[MAX_DIM], const float *keys[ROWS], int64_t dims,
                                 float (*weights)[BLOCK], int64_t column) {
    floats sums[ROWS][ROWS] = {};
    int64_t dim = 0;
    do {
        for (int row = 0; row < ROWS; row++) {
            floats query = load(queries[row] + dim);
            for (int key = 0; key < ROWS; key++) sums[row][key] += query * load(keys[key] + dim);
        }
    } while ((dim += LANES) < dims);
    floats row[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = gather_sums(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    floats upper = SHUFFLE(row[0], row[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   SHUFFLE(row[0], row[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    floats lower = SHUFFLE(row[2], row[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   SHUFFLE(row[2], row[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    floats logits = SHUFFLE(upper, lower, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                    SHUFFLE(upper, lower, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < ROWS; i++) memcpy(weights[i] + column, (float *)&logits + ROWS * i, ROWS * sizeof(float));
}

/* Adds a tile of values times their weights to four rows. */
static __attribute__((noinline)) void add_values(float (*sums)[MAX_DIM], float (*weights)[BLOCK], int64_t column,
                              const float *values[TILE], int64_t dims) {
    for (int64_t dim = 0; dim < dims; dim += 2 * LANES) {
        floats low[ROWS], high[ROWS];
        for (int row = 0; row < ROWS; row++) low[row] = load(sums[row] + dim), high[row] = load(sums[row] + dim + LANES);
        for (int key = 0; key < TILE; key++) {
            floats value_low = load(values[key] + dim), value_high = load(values[key] + dim + LANES);
            for (int row = 0; row < ROWS; row++) {
                low[row] += value_low * weights[row][column + key];
                high[row] += value_high * weights[row][column + key];
            }
        }
        for (int row = 0; row < ROWS; row++) store(sums[row] + dim, low[row]), store(sums[row] + dim + LANES, high[row]);
    }
}

#else

/* The same two functions for shorter vectors: tiles that fit sixteen registers. */
static inline float total_of_eight(vector x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

static __attribute__((noinline)) void multiply_keys(float (*queries)[MAX_DIM], const float *keys[ROWS], int64_t dims,
                                                    float (*weights)[BLOCK], int64_t column) {
    for (int first = 0; first < ROWS; first += 2) {
        vector sums[2][ROWS] = {};
        for (int64_t dim = 0; dim < dims; dim += 8)
            for (int key = 0; key < ROWS; key++) {
                vector numbers = load_vector(keys[key] + dim);
                for (int row = 0; row < 2; row++) sums[row][key] += load_vector(queries[first + row] + dim) * numbers;
            }
        for (int row = 0; row < 2; row++)
            for (int key = 0; key < ROWS; key++) weights[first + row][column + key] = total_of_eight(sums[row][key]);
    }
}

static __attribute__((noinline)) void add_values(float (*sums)[MAX_DIM], float (*weights)[BLOCK], int64_t column,
                                                 const float *values[TILE], int64_t dims) {
    for (int64_t dim = 0; dim < dims; dim += 16) {
        vector low[ROWS], high[ROWS];
        for (int row = 0; row < ROWS; row++) {
            low[row] = load_vector(sums[row] + dim);
            high[row] = load_vector(sums[row] + dim + 8);
        }
        for (int key = 0; key < TILE; key++) {
            vector value_low = load_vector(values[key] + dim), value_high = load_vector(values[key] + dim + 8);
            for (int row = 0; row < ROWS; row++) {
                low[row] += value_low * weights[row][column + key];
                high[row] += value_high * weights[row][column + key];
            }
        }
        for (int row = 0; row < ROWS; row++) {
            store_vector(sums[row] + dim, low[row]);
            store_vector(sums[row] + dim + 8, high[row]);
        }
    }
}

#endif

/* The online softmax step of one row: turns the logits of a block into weights 2^(logit - peak), where peak is the
 * running maximum, and rescales the sums of earlier blocks by 2^(old peak - peak). Masked logits are -inf, so their
 * weight is exactly 0; if the whole block is masked, the peak stays and the rescaling factor is exactly 1. */
static __attribute__((noinline)) void update_row(row_group *group, int64_t row, int64_t block, int64_t value_dim) {
    float *weights = group->weights[row];
    int32_t first = group->first[row] > block ? (int32_t)(group->first[row] - block) : 0;
    int32_t last = group->last[row] < block + BLOCK ? (int32_t)(group->last[row] - block) : BLOCK;
    vector logits[BLOCK / WIDTH], most = all(-INFINITY);
    for (int i = 0; i < BLOCK / WIDTH; i++) {
        lanes column = LANE_NUMBERS + WIDTH * i;
        logits[i] = choose((column < first) | (column > last), all(-INFINITY), load_vector(weights + WIDTH * i));
        most = greater(logits[i], most);
    }
    if (group->largest) {
        for (int i = 0; i < BLOCK / WIDTH; i++) store_vector(weights + WIDTH * i, logits[i]);
        int64_t seen = last < BLOCK ? last + 1 : BLOCK;
        keep_largest(weights, block, seen, group->score_block, group->largest + row * group->score_blocks);
    }
    float old = group->peaks[row], peak = largest_lane(most);
    peak = peak > old ? peak : old;
    float shrink = power_of_two(all(old - peak))[0];
    vector norm = group->norms[row] * shrink;
    for (int i = 0; i < BLOCK / WIDTH; i++) {
        vector weight = power_of_two(logits[i] - peak);
        norm += weight;
        store_vector(weights + WIDTH * i, weight);
    }
    group->norms[row] = norm;
    group->peaks[row] = peak;
    if (shrink != 1.0f) {
        float *sums = group->sums[row];
        for (int64_t dim = 0; dim < value_dim; dim += WIDTH)
            store_vector(sums + dim, load_vector(sums + dim) * shrink);
    }
}

/* The keys or the values of a sequence at one KV head. */
typedef struct {
    const char *pages;
    const int32_t *table;
    int64_t page_positions, entry_positions, page_bytes, position_bytes, dims, bfloat16, int8;
} stream;

/* Reads `dims` codes and their scale; `dims` is a multiple of 16. */
static void read_codes(const char *from, float *to, int64_t dims) {
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    float scale;
    memcpy(&scale, from + dims, sizeof scale);
    for (int64_t dim = 0; dim < dims; dim += WIDTH) {
        bytes codes;
        memcpy(&codes, from + dim, sizeof codes);
        store_vector(to + dim, __builtin_convertvector(__builtin_convertvector(codes, lanes), vector) * scale);
    }
}

/* The address of the first position of a run. */
static const char *run_address(const stream *stream, int64_t run) {
    int64_t entry = stream->table[run], page = entry, first = 0;
    if (stream->entry_positions > 1) page = entry / stream->entry_positions, first = entry % stream->entry_positions;
    return stream->pages + page * stream->page_bytes + first * stream->position_bytes;
}

/* Sixteen positions as float32, and the addresses one page ahead for prefetching (NULL: none). */
typedef struct {
    const float *numbers[TILE];
    const char *ahead[TILE];
} tile;

/* Positions that are visible to no row are replaced by zeros and not read. */
static void find_tile(const stream *stream, row_group *group, int64_t position, tile *found) {
    int64_t run = position / stream->page_positions, offset = position % stream->page_positions;
    const char *here = NULL, *next = NULL;
    for (int key = 0; key < TILE; key++, position++, offset++) {
        if (offset == stream->page_positions) offset = 0, run++, here = NULL;
        found->ahead[key] = NULL;
        found->numbers[key] = zeros;
        if (position < group->begin || position >= group->end) continue;
        if (!here) {
            here = run_address(stream, run);
            next = (run + 1) * stream->page_positions < group->end ? run_address(stream, run + 1) : NULL;
        }
        if (position + stream->page_positions < group->end) found->ahead[key] = next + offset * stream->position_bytes;
        const char *numbers = here + offset * stream->position_bytes;
        if (stream->int8) read_codes(numbers, group->tile[key], stream->dims);
        else if (stream->bfloat16) read_numbers(numbers, group->tile[key], stream->dims, 1);
        found->numbers[key] = stream->int8 || stream->bfloat16 ? group->tile[key] : (const float *)numbers;
    }
}

/* Prefetches a few positions of the next page per call: more than the core's outstanding misses would stall it. */
static void fetch_ahead(const stream *stream, const tile *found, int from, int count) {
    int64_t bytes = stream->int8 ? stream->dims + 4 : stream->dims * (stream->bfloat16 ? 2 : 4);
    for (int key = from; key < from + count; key++)
        for (int64_t byte = 0; found->ahead[key] && byte < bytes; byte += 64)
            __builtin_prefetch(found->ahead[key] + byte, 0, 2);
}

/* One block for all rows of a group: logits by tiles of keys, the softmax step per row, then sums by tiles of values. */
static void attend_block(const stream *keys, const stream *values, row_group *group, int64_t block) {
    tile found;
    int64_t start = group->begin > block ? (group->begin - block) / TILE * TILE : 0;
    int64_t stop = group->end < block + BLOCK ? group->end - block : BLOCK;
    for (int64_t column = start; column < stop; column += TILE) {
        find_tile(keys, group, block + column, &found);
        for (int key = 0; key < TILE; key += ROWS) {
            fetch_ahead(keys, &found, key, ROWS);
            for (int64_t row = 0; row < group->rows; row += ROWS)
                multiply_keys(group->queries + row, found.numbers + key, keys->dims, group->weights + row,
                              column + key);
        }
    }
    for (int64_t row = 0; row < group->rows; row++) update_row(group, row, block, values->dims);
    for (int64_t column = start; column < stop; column += TILE) {
        find_tile(values, group, block + column, &found);
        for (int64_t row = 0, from = 0; row < group->rows; row += ROWS, from += TILE / 2) {
            if (from < TILE) fetch_ahead(values, &found, from, TILE / 2);
            add_values(group->sums + row, group->weights + row, column, found.numbers, values->dims);
        }
    }
}

/* The index [query, head] of a row in the call. Rows run over the query heads of the KV head, then over the queries. */
static int64_t row_index(const paged_call *call, const paged_sequence *sequence, int64_t kv_head, int64_t row) {
    int64_t group_heads = call->heads / call->kv_heads;
    return (sequence->first_query + row / group_heads) * call->heads + kv_head * group_heads + row % group_heads;
}

static void start_rows(const paged_call *call, const paged_sequence *sequence, int64_t kv_head, int64_t from,
                       row_group *group) {
    int64_t size = call->bfloat16 ? 2 : 4;
    float scale = LOG2_E / sqrtf((float)call->key_dim);
    memset(group->queries, 0, (group->rows + ROWS) * sizeof group->queries[0]); /* including the padding rows */
    memset(group->sums, 0, (group->rows + ROWS) * sizeof group->sums[0]);
    for (int64_t row = 0; row < group->rows; row++) {
        int64_t number = row_index(call, sequence, kv_head, from + row);
        const char *query = (const char *)call->queries + size * number * call->key_dim;
        read_numbers(query, group->queries[row], call->key_dim, call->bfloat16);
        for (int64_t dim = 0; dim < call->key_dim; dim++) group->queries[row][dim] *= scale;
        int64_t position = sequence->keys - sequence->queries + number / call->heads - sequence->first_query;
        group->last[row] = position;
        group->first[row] = position >= call->window ? position - call->window + 1 : 0;
        group->peaks[row] = call->sinks ? call->sinks[number % call->heads] * LOG2_E : LOWEST;
        group->norms[row] = (vector){call->sinks ? 1.0f : 0.0f};
        if (!group->largest) continue;
        for (int64_t i = 0; i < call->score_blocks; i++) group->largest[row * call->score_blocks + i] = -INFINITY;
    }
    group->begin = group->first[0];
    group->end = group->last[group->rows - 1] + 1;
}

static void attend_rows(const paged_call *call, const paged_sequence *sequence, int64_t kv_head, int64_t from,
                        row_group *group) {
    int64_t out_size = call->bfloat16 ? 2 : 4, size = call->int8_cache ? 1 : out_size, scale = call->int8_cache ? 4 : 0;
    stream keys = {(const char *)call->keys + kv_head * (size * call->key_dim + scale), sequence->table, call->page_positions,
                   call->entry_positions, size * call->key_page_stride, size * call->key_stride, call->key_dim, call->bfloat16, call->int8_cache};
    stream values = {(const char *)call->values + kv_head * (size * call->value_dim + scale), sequence->table,
                     call->page_positions, call->entry_positions, size * call->value_page_stride, size * call->value_stride,
                     call->value_dim, call->bfloat16, call->int8_cache};
    start_rows(call, sequence, kv_head, from, group);
    for (int64_t block = group->begin / BLOCK * BLOCK; block < group->end; block += BLOCK)
        attend_block(&keys, &values, group, block);
    for (int64_t row = 0; row < group->rows; row++) {
        float norm = sum_of(group->norms[row]);
        for (int64_t dim = 0; dim < call->value_dim; dim++) group->sums[row][dim] /= norm;
        char *out = (char *)call->out + out_size * row_index(call, sequence, kv_head, from + row) * call->value_dim;
        write_numbers(group->sums[row], out, call->value_dim, call->bfloat16);
        if (!group->largest) continue;
        int64_t query = row_index(call, sequence, kv_head, from + row) / call->heads;
        raise_scores(group->largest + row * call->score_blocks, group->last[row] / call->score_block + 1,
                     group->peaks[row], 1.0f / norm,
                     call->scores + (query * call->kv_heads + kv_head) * call->score_blocks);
    }
}

/* Returns -1 if memory runs out. */
int openmimo_paged_attention(const paged_call *call) {
    paged_sequence sequences[call->sequences];
    int failed = 0;
    int64_t first_query = 0, products = 0;
    for (int64_t i = 0; i < call->sequences; i++) {
        int64_t queries = call->query_lengths[i], keys = call->key_lengths[i * call->length_stride];
        sequences[i] = (paged_sequence){first_query, queries, keys, call->tables + i * call->table_stride};
        first_query += queries;
        products += queries * (keys < call->window ? keys : call->window) * call->heads * call->key_dim;
    }
    int64_t tasks = call->sequences * call->kv_heads;
    int threads = products < MIN_PARALLEL_PRODUCTS ? 1 : (int)call->threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t number = task / call->kv_heads, kv_head = task % call->kv_heads;
        paged_sequence sequence = sequences[number];
        sequence.keys = call->key_lengths[number * call->length_stride + kv_head * call->length_head_stride];
        sequence.table += kv_head * call->table_head_stride;
        int64_t rows = sequence.queries * (call->heads / call->kv_heads);
        row_group group;
        group.score_block = call->score_block, group.score_blocks = call->score_blocks;
        group.largest = call->scores ? malloc(MAX_ROWS * call->score_blocks * sizeof(float)) : NULL;
        if (call->scores && !group.largest) {
#pragma omp atomic write
            failed = -1;
            continue;
        }
        for (int64_t from = 0; from < rows; from += MAX_ROWS) {
            group.rows = rows - from < MAX_ROWS ? rows - from : MAX_ROWS;
            attend_rows(call, &sequence, kv_head, from, &group);
        }
        free(group.largest);
    }
    return failed;
}

/* The call record that the page store packs. Strides count bytes. */
typedef struct {
    const char *keys, *values; /* the new tokens' rows */
    char *key_pages, *value_pages;
    const int64_t *pages, *slots; /* [tokens] */
    int64_t tokens, key_bytes, value_bytes, key_row, value_row;
    int64_t key_page_stride, key_stride, value_page_stride, value_stride;
} store_call;

void openmimo_store_rows(const store_call *call) {
    for (int64_t i = 0; i < call->tokens; i++) {
        int64_t page = call->pages[i], slot = call->slots[i];
        memcpy(call->key_pages + page * call->key_page_stride + slot * call->key_stride, call->keys + i * call->key_row,
               call->key_bytes);
        memcpy(call->value_pages + page * call->value_page_stride + slot * call->value_stride,
               call->values + i * call->value_row, call->value_bytes);
    }
}

/* The call record of the joined update, which paged_attention/update/native.py packs. Strides count numbers. */
typedef struct {
    const void *heads;           /* [T, (N + G) K + G V]: query, key and value heads of each new token */
    const void *cosines, *sines; /* [T, rotary_dims] */
    void *keys, *values;         /* pages, as in `paged_call`; they have the dtype of the heads */
    const int64_t *pages, *slots; /* [T], where the rows of a token are stored */
    const float *sinks;
    void *out;
    const int32_t *tables, *query_lengths, *key_lengths; /* [B, Y], [B], [B] */
    int64_t tokens, row_stride, rotary_dims;
    int64_t sequences, query_heads, kv_heads, key_dim, value_dim;
    int64_t page_positions, key_page_stride, key_stride, value_page_stride, value_stride, table_stride;
    int64_t window, threads, bfloat16;
    double value_scale;
} update_call;

/* Rotates the heads of one token: the queries to `queries`, the keys to their page, with the scaled values. */
INLINE void place_token(const update_call *call, int64_t token, char *queries, int64_t bfloat16) {
    int64_t size = bfloat16 ? 2 : 4, N = call->query_heads, G = call->kv_heads, K = call->key_dim, V = call->value_dim;
    int64_t page = call->pages[token], slot = call->slots[token], table = size * token * call->rotary_dims;
    const char *heads = (const char *)call->heads + size * token * call->row_stride;
    const char *cosines = (const char *)call->cosines + table, *sines = (const char *)call->sines + table;
    char *keys = (char *)call->keys + size * (page * call->key_page_stride + slot * call->key_stride);
    char *values = (char *)call->values + size * (page * call->value_page_stride + slot * call->value_stride);
    for (int64_t head = 0; head < N + G; head++)
        rotate_head(heads + size * head * K, head < N ? queries + size * head * K : keys + size * (head - N) * K, cosines,
                    sines, call->rotary_dims, K, bfloat16);
    for (int64_t i = 0; i < G * V; i++)
        write_number(values, i, read_number(heads, (N + G) * K + i, bfloat16) * (float)call->value_scale, bfloat16);
}

/* Returns -1 if memory runs out. */
int openmimo_update_and_attend(const update_call *call) {
    int64_t row_bytes = (call->bfloat16 ? 2 : 4) * call->query_heads * call->key_dim;
    char *queries = malloc(call->tokens * row_bytes);
    if (!queries) return -1;
    for (int64_t token = 0; token < call->tokens; token++) {
        if (call->bfloat16) place_token(call, token, queries + token * row_bytes, 1);
        else place_token(call, token, queries + token * row_bytes, 0);
    }
    paged_call attention = {
        .queries = queries, .keys = call->keys, .values = call->values, .sinks = call->sinks, .out = call->out,
        .tables = call->tables, .query_lengths = call->query_lengths, .key_lengths = call->key_lengths,
        .sequences = call->sequences, .heads = call->query_heads, .kv_heads = call->kv_heads,
        .key_dim = call->key_dim, .value_dim = call->value_dim,
        .page_positions = call->page_positions, .entry_positions = 1,
        .key_page_stride = call->key_page_stride, .key_stride = call->key_stride,
        .value_page_stride = call->value_page_stride, .value_stride = call->value_stride,
        .table_stride = call->table_stride, .length_stride = 1,
        .window = call->window, .threads = call->threads, .bfloat16 = call->bfloat16,
        .score_block = 1, .score_blocks = 1,
    };
    int failed = openmimo_paged_attention(&attention);
    free(queries);
    return failed;
}
