/* Causal attention of packed sequences with many queries each, forward only. Input and output in float32 or bfloat16.
 *
 * Keys are first packed in panels of PANEL_WIDTH keys, values in panels of PANEL_WIDTH dims. Both products then have one
 * form, a few rows times a panel, with sums in registers:
 *
 *     logits[row][key of a panel] += query[row][dim]  * key_panel[dim][key]      over the dims
 *     sums[row][dim of a panel]   += weight[row][key] * value_panel[key][dim]    over the keys of a block
 *
 * With `integers`, queries and keys are int8 with a scale for each row, after the mean of a sequence's keys is subtracted
 * from them. This changes no probability, and the logit of a sink is moved by the query's product with the mean. Values
 * are int8 with one scale for a sequence and KV head, and probabilities are 0 to 127 relative to the running maximum
 * (`integers` is 2), or both are float32 (1). Panels of int8 hold four numbers for each key or dim, see integers.h.
 *
 * A unit of work is up to MAX_ROWS rows: consecutive queries of a sequence at the query heads of one KV head. The unit
 * visits the keys that any of its rows sees in blocks that begin at multiples of BLOCK, with an online softmax (running
 * maximum and running sum per row). The result of a row depends only on its own keys (batch invariance).
 */

#include "integers.h"
#include "scores.h"

#include <math.h>
#include <stdlib.h>

#ifdef __AVX512F__
#define ROWS 12 /* rows of a register tile, which has two vectors per row */
#else
#define ROWS 6
#endif
#define PANEL_WIDTH (2 * WIDTH)
#define MAX_ROWS 96 /* rows of a unit */
#define BLOCK 256   /* keys per update of the running maximum */
#define MIN_PARALLEL_PRODUCTS (1 << 20) /* a smaller call takes less time than waking a second thread */
#define LOWEST -1e30f /* below every logit, and finite, so that the difference of two is not NaN */

/* The call record that attention/native.py packs. */
typedef struct {
    const void *queries, *keys, *values; /* [T, N, K], [S, G, K], [S, G, V] */
    const float *sinks;                  /* [N] or none */
    void *out;                           /* [T, N, V] */
    float *scores;                       /* [T, G, score_blocks], zeros, or none */
    const float *key_means;              /* [sequences, G, K], with integers */
    const float *value_scales;           /* [sequences, G], with integers == 2: the largest magnitude / 127 */
    int64_t sequences, heads, kv_heads, key_dim, value_dim;
    int64_t window; /* longer than any sequence if there is no window */
    int64_t threads, bfloat16;
    int64_t score_block, score_blocks; /* keys of a block, and blocks of the longest sequence */
    int64_t integers;
    double scale; /* of the logits */
} causal_call;

typedef struct {
    int64_t first_query, queries, first_key, keys;
    int64_t first_unit, first_panel;   /* numbered over all sequences and KV heads of the call */
    float *key_panels, *value_panels;  /* of the first KV head; int8 with integers */
    float *key_scales;                 /* [G, keys, padded], with integers */
    int32_t *corrections;              /* likewise, where the sums of products begin */
    int64_t number;
} causal_sequence;

/* The state of one unit. Rows run over the query heads of the KV head, then over the queries. */
typedef struct {
    float weights[MAX_ROWS][BLOCK]; /* logits, then probabilities relative to 2^peak */
    int8_t codes[MAX_ROWS][BLOCK];  /* probabilities times 127, with integers == 2 */
    float *queries;                 /* [row / ROWS][dim][ROWS], times scale and log2(e); [row][dim] of int8 with integers */
    float query_scales[MAX_ROWS];   /* with integers, times scale and log2(e) */
    float *sums;                    /* [row][value dim, padded to panels]: sums of weights times values */
    float *largest;                 /* [row][score block]: largest logits, if there are scores */
    float norms[MAX_ROWS], peaks[MAX_ROWS];
    int64_t rows, first[MAX_ROWS], last[MAX_ROWS]; /* first and last visible key of a row */
} unit;

INLINE int64_t whole(int64_t count, int64_t size) { return (count + size - 1) / size * size; }

/* sums[row][0 : PANEL_WIDTH] += rows times a panel. Element i of a row is rows[row * row_step + i * step]. */
INLINE void multiply_panel(const float *rows, int64_t row_step, int64_t step, const float *panel, int64_t count,
                           float *sums, int64_t sums_step, int begins) {
    vector low[ROWS], high[ROWS];
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        low[row] = begins ? (vector){} : load_vector(sums + row * sums_step);
        high[row] = begins ? (vector){} : load_vector(sums + row * sums_step + WIDTH);
    }
    for (int64_t i = 0; i < count; i++) {
        vector panel_low = load_vector(panel + i * PANEL_WIDTH), panel_high = load_vector(panel + i * PANEL_WIDTH + WIDTH);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            float number = rows[row * row_step + i * step];
            low[row] += panel_low * number;
            high[row] += panel_high * number;
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        store_vector(sums + row * sums_step, low[row]);
        store_vector(sums + row * sums_step + WIDTH, high[row]);
    }
}

static __attribute__((noinline)) void multiply_keys(const float *queries, const float *panel, int64_t dims,
                                                    float *logits) {
    multiply_panel(queries, 1, ROWS, panel, dims, logits, BLOCK, 1);
}

static __attribute__((noinline)) void add_values(const float *weights, const float *panel, int64_t count, float *sums,
                                                 int64_t sums_step) {
    multiply_panel(weights, BLOCK, 1, panel, count, sums, sums_step, 0);
}

/* sums[row][lane of a panel] += words of rows times words of a panel, `count` each. */
INLINE void multiply_words(const int32_t *rows, int64_t row_step, const int32_t *panel, int64_t count, int is_query,
                           lanes (*sums)[2]) {
    for (int64_t i = 0; i < count; i++) {
        lanes panel_low = load_lanes(panel + i * PANEL_WIDTH), panel_high = load_lanes(panel + i * PANEL_WIDTH + WIDTH);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            int32_t word = rows[row * row_step + i];
            sums[row][0] = add_word(sums[row][0], word, panel_low, is_query);
            sums[row][1] = add_word(sums[row][1], word, panel_high, is_query);
        }
    }
}

INLINE vector as_floats(lanes x) { return __builtin_convertvector(x, vector); }

/* Logits of ROWS rows and a panel of keys. */
static __attribute__((noinline)) void multiply_key_codes(const int32_t *queries, int64_t words, const int32_t *panel,
                                                         const int32_t *corrections, const float *query_scales,
                                                         const float *key_scales, float *logits) {
    lanes sums[ROWS][2];
    for (int row = 0; row < ROWS; row++)
        sums[row][0] = load_lanes(corrections), sums[row][1] = load_lanes(corrections + WIDTH);
    multiply_words(queries, words, panel, words, 1, sums);
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < 2; i++)
            store_vector(logits + row * BLOCK + i * WIDTH,
                         as_floats(sums[row][i]) * query_scales[row] * load_vector(key_scales + i * WIDTH));
}

/* Adds a panel of dims of int8 values times int8 probabilities to the sums of ROWS rows. */
static __attribute__((noinline)) void add_value_codes(const int32_t *weights, const int32_t *panel, int64_t words,
                                                      float *sums, int64_t sums_step) {
    lanes products[ROWS][2] = {};
    multiply_words(weights, BLOCK / 4, panel, words, 0, products);
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < 2; i++) {
            float *sum = sums + row * sums_step + i * WIDTH;
            store_vector(sum, load_vector(sum) + as_floats(products[row][i]));
        }
}

/* The int8 codes of the keys, [dim / 4][PANEL_WIDTH][4] for each panel, or of the values of one KV head. */
INLINE int8_t *key_codes(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from) {
    return (int8_t *)sequence->key_panels + (head * whole(sequence->keys, PANEL_WIDTH) + from) * whole(call->key_dim, 4);
}

INLINE int8_t *value_codes(const causal_call *call, const causal_sequence *sequence, int64_t head) {
    return (int8_t *)sequence->value_panels + head * whole(sequence->keys, 4) * whole(call->value_dim, PANEL_WIDTH);
}

/* Quantizes a panel of keys, from key `from`, without their mean. */
static void pack_key_codes(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from) {
    int64_t dims = call->key_dim, count = sequence->keys - from < PANEL_WIDTH ? sequence->keys - from : PANEL_WIDTH;
    int64_t place = head * whole(sequence->keys, PANEL_WIDTH) + from;
    const float *mean = call->key_means + (sequence->number * call->kv_heads + head) * dims;
    int8_t *codes = key_codes(call, sequence, head, from);
    memset(codes, 0, PANEL_WIDTH * whole(dims, 4));
    for (int64_t key = 0; key < PANEL_WIDTH; key++) {
        float row[dims], largest = 0.0f;
        int32_t sum = 0;
        int64_t first = ((sequence->first_key + from + key) * call->kv_heads + head) * dims;
        for (int64_t dim = 0; dim < dims && key < count; dim++) {
            row[dim] = read_number(call->keys, first + dim, call->bfloat16) - mean[dim];
            float magnitude = row[dim] < 0.0f ? -row[dim] : row[dim];
            largest = magnitude > largest ? magnitude : largest;
        }
        float factor = code_factor(largest);
        for (int64_t dim = 0; dim < dims && key < count; dim++) {
            int8_t code = code_of(row[dim] * factor);
            codes[(dim / 4 * PANEL_WIDTH + key) * 4 + dim % 4] = code;
            sum += code;
        }
        sequence->key_scales[place + key] = 1.0f / factor;
        sequence->corrections[place + key] = -QUERY_OFFSET * sum;
    }
}

/* Quantizes all dims of PANEL_WIDTH values, from key `from`: [panel of dims][key / 4][PANEL_WIDTH][4]. */
static void pack_value_codes(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from) {
    int64_t stop = whole(from + PANEL_WIDTH < sequence->keys ? from + PANEL_WIDTH : sequence->keys, 4);
    int64_t dims = whole(call->value_dim, PANEL_WIDTH), rows = whole(sequence->keys, 4);
    float scale = call->value_scales[sequence->number * call->kv_heads + head], factor = scale > 0.0f ? 1.0f / scale : 1.0f;
    int8_t *codes = value_codes(call, sequence, head);
    for (int64_t key = from; key < stop; key++) {
        int64_t first = ((sequence->first_key + key) * call->kv_heads + head) * call->value_dim;
        for (int64_t dim = 0; dim < dims; dim++) {
            int is_number = key < sequence->keys && dim < call->value_dim;
            float number = is_number ? read_number(call->values, first + dim, call->bfloat16) * factor : 0.0f;
            codes[(dim / PANEL_WIDTH * rows + key / 4 * 4) * PANEL_WIDTH + dim % PANEL_WIDTH * 4 + key % 4] = code_of(number);
        }
    }
}

/* Packs one panel of keys, from key `from`: [dim][PANEL_WIDTH], padded with zeros. */
static void pack_keys(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from) {
    int64_t count = sequence->keys - from < PANEL_WIDTH ? sequence->keys - from : PANEL_WIDTH;
    float *panel = sequence->key_panels + (head * whole(sequence->keys, PANEL_WIDTH) + from) * call->key_dim;
    int64_t first = ((sequence->first_key + from) * call->kv_heads + head) * call->key_dim;
    memset(panel, 0, PANEL_WIDTH * call->key_dim * sizeof(float));
    for (int64_t key = 0; key < count; key++, first += call->kv_heads * call->key_dim)
        for (int64_t dim = 0; dim < call->key_dim; dim++)
            panel[dim * PANEL_WIDTH + key] = read_number(call->keys, first + dim, call->bfloat16);
}

/* Packs all dims of PANEL_WIDTH values, from key `from`: [panel of dims][key][PANEL_WIDTH], padded with zeros. */
static void pack_values(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from) {
    int64_t stop = from + PANEL_WIDTH < sequence->keys ? from + PANEL_WIDTH : sequence->keys;
    int64_t dims = whole(call->value_dim, PANEL_WIDTH);
    float *panels = sequence->value_panels + head * sequence->keys * dims;
    for (int64_t key = from; key < stop; key++) {
        int64_t first = ((sequence->first_key + key) * call->kv_heads + head) * call->value_dim;
        for (int64_t dim = 0; dim < dims; dim++)
            panels[(dim / PANEL_WIDTH * sequence->keys + key) * PANEL_WIDTH + dim % PANEL_WIDTH] =
                dim < call->value_dim ? read_number(call->values, first + dim, call->bfloat16) : 0.0f;
    }
}

/* The index [query, head] of a row in the call. */
INLINE int64_t row_index(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t row) {
    int64_t group = call->heads / call->kv_heads;
    return (sequence->first_query + row / group) * call->heads + head * group + row % group;
}

/* Quantizes a query. Returns its product with the mean key, times scale and log2(e). */
static float pack_query_codes(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t number,
                              float scale, unit *unit, int64_t row) {
    int64_t dims = call->key_dim, padded = whole(dims, 4);
    const float *mean = call->key_means + (sequence->number * call->kv_heads + head) * dims;
    int8_t *codes = (int8_t *)unit->queries + row * padded;
    float query[dims], largest = 0.0f, product = 0.0f;
    for (int64_t dim = 0; dim < dims; dim++) {
        query[dim] = read_number(call->queries, number * dims + dim, call->bfloat16);
        float magnitude = query[dim] < 0.0f ? -query[dim] : query[dim];
        largest = magnitude > largest ? magnitude : largest;
        product += query[dim] * mean[dim];
    }
    float factor = code_factor(largest);
    for (int64_t dim = 0; dim < padded; dim++)
        codes[dim] = (int8_t)((dim < dims ? code_of(query[dim] * factor) : 0) + QUERY_OFFSET);
    unit->query_scales[row] = scale / factor;
    return product * scale;
}

/* Initializes the rows from `from`. The padding rows of the last register tile repeat the last row. */
static void start_rows(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from,
                       unit *unit) {
    float scale = LOG2_E / (float)(1.0 / call->scale); /* rounded as in the paged kernel, which decodes later tokens */
    int64_t rows = whole(unit->rows, ROWS);
    memset(unit->sums, 0, rows * whole(call->value_dim, PANEL_WIDTH) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) {
        int64_t number = row_index(call, sequence, head, from + (row < unit->rows ? row : unit->rows - 1));
        float *packed = unit->queries + row / ROWS * ROWS * call->key_dim + row % ROWS, moved = 0.0f;
        if (call->integers) moved = pack_query_codes(call, sequence, head, number, scale, unit, row);
        for (int64_t dim = 0; dim < call->key_dim && !call->integers; dim++)
            packed[dim * ROWS] = scale * read_number(call->queries, number * call->key_dim + dim, call->bfloat16);
        int64_t position = sequence->keys - sequence->queries + number / call->heads - sequence->first_query;
        unit->last[row] = position;
        unit->first[row] = position >= call->window ? position - call->window + 1 : 0;
        unit->peaks[row] = call->sinks ? call->sinks[number % call->heads] * LOG2_E - moved : LOWEST;
        unit->norms[row] = !call->sinks ? 0.0f : call->integers == 2 ? 127.0f : 1.0f;
        if (!call->scores || row >= unit->rows) continue;
        for (int64_t i = 0; i < call->score_blocks; i++) unit->largest[row * call->score_blocks + i] = -INFINITY;
    }
}

/* Sets the logits of hidden keys in columns `begin` to `end` of a block to -inf. */
static void mask_row(unit *unit, int64_t row, int64_t block, int64_t begin, int64_t end) {
    float *weights = unit->weights[row];
    int32_t first = (int32_t)(unit->first[row] > block ? unit->first[row] - block : 0);
    int32_t last = (int32_t)(unit->last[row] < block + BLOCK ? unit->last[row] - block : BLOCK);
    if (begin < first || end - 1 > last)
        for (int64_t column = begin; column < end; column += WIDTH) {
            lanes columns = LANE_NUMBERS + (int32_t)column;
            vector logits = load_vector(weights + column);
            store_vector(weights + column, choose((columns < first) | (columns > last), all(-INFINITY), logits));
        }
}

INLINE void store_codes(int8_t *to, vector weight) {
    typedef int8_t bytes __attribute__((vector_size(WIDTH)));
    bytes codes = __builtin_convertvector(__builtin_convertvector(weight, lanes), bytes);
    memcpy(to, &codes, sizeof codes);
}

/* The online softmax step of one row: turns the logits in columns `begin` to `end` of a block into weights
 * 2^(logit - peak), where peak is the running maximum, and rescales the sums of earlier blocks by 2^(old peak - peak). */
static __attribute__((noinline)) void update_row(unit *unit, int64_t row, int64_t begin, int64_t end, int64_t dims,
                                                 int in_codes) {
    const float round_to_integer = 12582912.0f;
    float *weights = unit->weights[row];
    vector most[2] = {all(LOWEST), all(LOWEST)}, sums_of[2] = {};
    for (int64_t column = begin; column < end; column += 2 * WIDTH)
        for (int i = 0; i < 2; i++) most[i] = greater(load_vector(weights + column + i * WIDTH), most[i]);
    float old = unit->peaks[row], peak = largest_lane(greater(most[0], most[1]));
    peak = peak > old ? peak : old;
    for (int64_t column = begin; column < end; column += 2 * WIDTH)
        for (int i = 0; i < 2; i++) {
            vector weight = power_of_two(load_vector(weights + column + i * WIDTH) - peak);
            if (in_codes) weight = (weight * 127.0f + round_to_integer) - round_to_integer;
            sums_of[i] += weight;
            if (in_codes) store_codes(unit->codes[row] + column + i * WIDTH, weight);
            else store_vector(weights + column + i * WIDTH, weight);
        }
    float shrink = power_of_two(all(old - peak))[0];
    unit->norms[row] = unit->norms[row] * shrink + sum_of(sums_of[0] + sums_of[1]);
    unit->peaks[row] = peak;
    if (shrink == 1.0f) return;
    float *sums = unit->sums + row * dims;
    for (int64_t dim = 0; dim < dims; dim += WIDTH) store_vector(sums + dim, load_vector(sums + dim) * shrink);
}

/* One block for all rows of a unit: logits, the softmax step per row, then the sums. */
static void attend_block(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t block,
                         unit *unit) {
    int64_t rows = whole(unit->rows, ROWS), dims = whole(call->value_dim, PANEL_WIDTH);
    int64_t first = unit->first[0] > block ? unit->first[0] - block : 0;
    int64_t stop = unit->last[rows - 1] < block + BLOCK ? unit->last[rows - 1] + 1 - block : BLOCK;
    int64_t begin = first / PANEL_WIDTH * PANEL_WIDTH, end = whole(stop, PANEL_WIDTH);
    const float *keys = sequence->key_panels + (head * whole(sequence->keys, PANEL_WIDTH) + block) * call->key_dim;
    const float *values = sequence->value_panels + head * sequence->keys * dims + (block + first) * PANEL_WIDTH;
    for (int64_t key = begin; key < end; key += PANEL_WIDTH)
        for (int64_t row = 0; row < rows; row += ROWS) {
            if (call->integers) {
                int64_t place = head * whole(sequence->keys, PANEL_WIDTH) + block + key, words = whole(call->key_dim, 4) / 4;
                multiply_key_codes((int32_t *)unit->queries + row * words, words,
                                   (int32_t *)key_codes(call, sequence, head, block + key), sequence->corrections + place,
                                   unit->query_scales + row, sequence->key_scales + place, unit->weights[row] + key);
                continue;
            }
            const float *panel = keys + key * call->key_dim;
            multiply_keys(unit->queries + row * call->key_dim, panel, call->key_dim, unit->weights[row] + key);
        }
    for (int64_t row = 0; row < rows; row++) {
        mask_row(unit, row, block, begin, end);
        if (call->scores && row < unit->rows)
            keep_largest(unit->weights[row] + first, block + first, stop - first, call->score_block,
                         unit->largest + row * call->score_blocks);
        update_row(unit, row, begin, end, dims, call->integers == 2);
    }
    for (int64_t dim = 0; dim < dims; dim += PANEL_WIDTH)
        for (int64_t row = 0; row < rows; row += ROWS) {
            if (call->integers == 2) {
                int64_t stop_word = whole(stop, 4) / 4, first_word = begin / 4;
                const int8_t *codes = value_codes(call, sequence, head) + dim * whole(sequence->keys, 4);
                add_value_codes((int32_t *)unit->codes[row] + first_word,
                                (int32_t *)codes + (block / 4 + first_word) * PANEL_WIDTH, stop_word - first_word,
                                unit->sums + row * dims + dim, dims);
                continue;
            }
            const float *panel = values + dim * sequence->keys;
            add_values(unit->weights[row] + first, panel, stop - first, unit->sums + row * dims + dim, dims);
        }
}

static void attend_rows(const causal_call *call, const causal_sequence *sequence, int64_t head, int64_t from,
                        unit *unit) {
    int64_t dims = whole(call->value_dim, PANEL_WIDTH);
    start_rows(call, sequence, head, from, unit);
    for (int64_t block = unit->first[0] / BLOCK * BLOCK; block <= unit->last[unit->rows - 1]; block += BLOCK)
        attend_block(call, sequence, head, block, unit);
    for (int64_t row = 0; row < unit->rows; row++) {
        int64_t first = row_index(call, sequence, head, from + row) * call->value_dim;
        float inverse = 1.0f / unit->norms[row];
        if (call->integers == 2) inverse *= call->value_scales[sequence->number * call->kv_heads + head];
        for (int64_t dim = 0; dim < call->value_dim; dim++)
            write_number(call->out, first + dim, unit->sums[row * dims + dim] * inverse, call->bfloat16);
        if (!call->scores) continue;
        int64_t query = row_index(call, sequence, head, from + row) / call->heads;
        raise_scores(unit->largest + row * call->score_blocks, unit->last[row] / call->score_block + 1, unit->peaks[row],
                     inverse, call->scores + (query * call->kv_heads + head) * call->score_blocks);
    }
}

/* Rows of a unit. With block scores, a unit has whole queries, because it writes the maximum over their heads. */
INLINE int64_t unit_rows(const causal_call *call) {
    int64_t group = call->heads / call->kv_heads;
    return call->scores ? MAX_ROWS / group * group : MAX_ROWS;
}

INLINE int64_t rows_of(const causal_call *call, const causal_sequence *sequence) {
    return sequence->queries * (call->heads / call->kv_heads);
}

INLINE int64_t units_of(const causal_call *call, const causal_sequence *sequence) {
    return (rows_of(call, sequence) + unit_rows(call) - 1) / unit_rows(call);
}

INLINE int64_t panels_of(const causal_sequence *sequence) { return whole(sequence->keys, PANEL_WIDTH) / PANEL_WIDTH; }

static void *allocate(int64_t bytes) { return aligned_alloc(64, whole(bytes > 0 ? bytes : 1, 64)); }

/* The sequence of a unit or a panel, by binary search: the last one that does not begin after it. */
static const causal_sequence *find(const causal_sequence *sequences, int64_t count, int64_t number, int panels) {
    int64_t low = 0;
    while (count > 1) {
        const causal_sequence *middle = sequences + low + count / 2;
        int after = number < (panels ? middle->first_panel : middle->first_unit);
        if (!after) low += count / 2;
        count = after ? count / 2 : count - count / 2;
    }
    return sequences + low;
}

static int attend_units(const causal_call *call, const causal_sequence *sequences, int64_t panels, int64_t units,
                        int threads) {
    int64_t dims = whole(call->value_dim, PANEL_WIDTH);
    int64_t numbers = (call->key_dim + dims + (call->scores ? call->score_blocks : 0)) * MAX_ROWS;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unit *state = allocate(sizeof *state);
        float *scratch = state ? allocate(numbers * sizeof(float)) : NULL;
        if (!scratch) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; panel++) {
            const causal_sequence *sequence = find(sequences, call->sequences, panel, 1);
            int64_t number = panel - sequence->first_panel;
            int64_t head = number / panels_of(sequence), from = number % panels_of(sequence) * PANEL_WIDTH;
            if (call->integers) pack_key_codes(call, sequence, head, from);
            else pack_keys(call, sequence, head, from);
            if (call->integers == 2) pack_value_codes(call, sequence, head, from);
            else pack_values(call, sequence, head, from);
        }
        if (scratch) {
            state->queries = scratch;
            state->sums = state->queries + call->key_dim * MAX_ROWS;
            state->largest = state->sums + dims * MAX_ROWS;
        }
        /* later queries see more keys: the longest units come first, which balances the threads */
#pragma omp for schedule(dynamic)
        for (int64_t work = units - 1; work >= 0; work--) {
            if (failed) continue;
            const causal_sequence *sequence = find(sequences, call->sequences, work, 0);
            int64_t number = work - sequence->first_unit;
            int64_t head = number % call->kv_heads, from = number / call->kv_heads * unit_rows(call);
            int64_t left = rows_of(call, sequence) - from;
            state->rows = left < unit_rows(call) ? left : unit_rows(call);
            attend_rows(call, sequence, head, from, state);
        }
        free(scratch), free(state);
    }
    return failed ? -1 : 0;
}

/* `lengths`: the number of queries of each sequence, then the number of keys of each. Returns -1 if memory runs out. */
int openmimo_causal_attention(const causal_call *call, const int64_t *lengths) {
    int64_t dims = whole(call->value_dim, PANEL_WIDTH);
    int64_t queries = 0, keys = 0, padded_keys = 0, units = 0, panels = 0, products = 0;
    causal_sequence *sequences = allocate(call->sequences * sizeof *sequences);
    for (int64_t i = 0; i < call->sequences && sequences; i++) {
        sequences[i] = (causal_sequence){.first_query = queries, .queries = lengths[i], .first_key = keys,
                                         .keys = lengths[call->sequences + i], .first_unit = units, .first_panel = panels, .number = i};
        queries += sequences[i].queries;
        keys += sequences[i].keys;
        padded_keys += whole(sequences[i].keys, PANEL_WIDTH);
        units += units_of(call, sequences + i) * call->kv_heads;
        panels += panels_of(sequences + i) * call->kv_heads;
        products += sequences[i].queries * (sequences[i].keys < call->window ? sequences[i].keys : call->window);
    }
    int64_t panel_numbers = call->kv_heads * (padded_keys * whole(call->key_dim, 4) + (keys + 4 * call->sequences) * dims);
    int64_t scales = call->integers ? call->kv_heads * padded_keys : 0;
    float *memory = allocate((panel_numbers + 2 * scales) * sizeof(float));
    int failed = !sequences || !memory ? -1 : 0;
    if (!failed) {
        float *key_panels = memory, *value_panels = memory + call->kv_heads * padded_keys * whole(call->key_dim, 4);
        float *key_scales = memory + panel_numbers;
        int32_t *corrections = (int32_t *)key_scales + scales;
        for (int64_t i = 0; i < call->sequences; i++) {
            sequences[i].key_scales = key_scales, sequences[i].corrections = corrections;
            if (call->integers) {
                key_scales += call->kv_heads * whole(sequences[i].keys, PANEL_WIDTH);
                corrections += call->kv_heads * whole(sequences[i].keys, PANEL_WIDTH);
            }
            sequences[i].key_panels = key_panels;
            sequences[i].value_panels = value_panels;
            key_panels += call->kv_heads * whole(sequences[i].keys, PANEL_WIDTH) * call->key_dim;
            value_panels += call->kv_heads * whole(sequences[i].keys, 4) * dims;
        }
        int threads = products * call->heads * call->key_dim < MIN_PARALLEL_PRODUCTS ? 1 : (int)call->threads;
        failed = attend_units(call, sequences, panels, units, threads);
    }
    free(memory), free(sequences);
    return failed;
}
