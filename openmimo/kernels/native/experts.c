/* The expert MLPs of a few tokens. Tokens are grouped by expert, so that the weights of an expert are read once:
 *
 *     tokens x active ids  ->  visits sorted by expert  ->  gate_up, SwiGLU  ->  down  ->  sum over a token's visits
 *
 * Threads share the panels of the experts' weight rows. A token's outputs are added in the order of its ids, so its bits
 * do not depend on the batch.
 */

#include "products.h"

#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
static int this_thread(void) { return omp_get_thread_num(); }
#else
static int this_thread(void) { return 0; }
#endif

/* The call record that experts/native.py packs. A visit is one token at one of its experts. */
typedef struct {
    const void *x;              /* [tokens, dims] */
    const int64_t *ids;         /* [tokens, active] */
    const float *weights;       /* [tokens, active] */
    const void *gate_up, *down; /* [experts, 2 * hidden, dims], [experts, dims, hidden] */
    void *out;                  /* [tokens, dims] */
    int64_t tokens, active, experts, dims, hidden, threads, bfloat16;
} experts_call;

/* The visits sorted by expert (tokens in order), and their intermediate results. */
typedef struct {
    int64_t *first; /* [experts + 1]: index of an expert's first visit */
    int64_t *group; /* [experts]: number of groups of TILE_ROWS visits before an expert's first */
    int64_t *sorted_index; /* [tokens, active]: index of a visit in the sorted order */
    const void **inputs, **activated;           /* [visits]: a visit's token, and its row of `hidden` */
    uint32_t *packed_inputs, *packed_activated; /* both, packed by group for tiles; or NULL */
    char *hidden;                               /* [visits, hidden], in the dtype of x */
    float *outputs;                             /* [visits, dims] */
    float (*sums)[PANEL];                       /* [threads, 2 * visits] */
} visits;

static int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

static void *take(uintptr_t *cursor, int64_t bytes) {
    uintptr_t start = *cursor;
    *cursor += divide_up(bytes, 64) * 64;
    return (void *)start;
}

/* Divides the memory at `start` into arrays. Returns the size that it needs. */
static int64_t lay_out(const experts_call *call, int threads, int tiles, uintptr_t start, visits *sorted) {
    uintptr_t cursor = start;
    int64_t count = call->tokens * call->active, size = call->bfloat16 ? 2 : 4;
    int64_t used = count < call->experts ? count : call->experts, groups = used + count / TILE_ROWS;
    sorted->first = take(&cursor, (call->experts + 1) * sizeof *sorted->first);
    sorted->group = take(&cursor, call->experts * sizeof *sorted->group);
    sorted->sorted_index = take(&cursor, count * sizeof *sorted->sorted_index);
    sorted->inputs = take(&cursor, count * sizeof *sorted->inputs);
    sorted->activated = take(&cursor, count * sizeof *sorted->activated);
    sorted->hidden = take(&cursor, count * call->hidden * size);
    sorted->outputs = take(&cursor, count * call->dims * sizeof *sorted->outputs);
    sorted->sums = take(&cursor, threads * 2 * count * sizeof *sorted->sums);
    sorted->packed_inputs = sorted->packed_activated = NULL;
    if (tiles) {
        sorted->packed_inputs = take(&cursor, groups * openmimo_packed_words(1, call->dims) * sizeof(uint32_t));
        sorted->packed_activated = take(&cursor, groups * openmimo_packed_words(1, call->hidden) * sizeof(uint32_t));
    }
    return cursor - start;
}

/* Returns 0 if an id is out of range. */
static int sort_visits(const experts_call *call, visits *sorted) {
    int64_t count = call->tokens * call->active, size = call->bfloat16 ? 2 : 4, groups = 0;
    memset(sorted->first, 0, (call->experts + 1) * sizeof *sorted->first);
    for (int64_t i = 0; i < count; i++) {
        if (call->ids[i] < 0 || call->ids[i] >= call->experts) return 0;
        sorted->first[call->ids[i] + 1]++;
    }
    for (int64_t expert = 0; expert < call->experts; expert++) {
        sorted->group[expert] = groups;
        groups += divide_up(sorted->first[expert + 1], TILE_ROWS);
        sorted->first[expert + 1] += sorted->first[expert];
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t sorted_index = sorted->first[call->ids[i]]++; /* ends as the start of the next expert */
        sorted->sorted_index[i] = sorted_index;
        sorted->inputs[sorted_index] = (const char *)call->x + i / call->active * call->dims * size;
        sorted->activated[sorted_index] = sorted->hidden + sorted_index * call->hidden * size;
    }
    memmove(sorted->first + 1, sorted->first, call->experts * sizeof *sorted->first);
    sorted->first[0] = 0;
    return 1;
}

/* The inputs or the activations of an expert's visits. */
static row_set set_of(const visits *sorted, int64_t expert, const void **rows, uint32_t *packed, int64_t dims) {
    int64_t first = sorted->first[expert];
    if (packed) packed += sorted->group[expert] * openmimo_packed_words(1, dims);
    return (row_set){rows + first, sorted->first[expert + 1] - first, packed};
}

static row_set inputs_of(const experts_call *call, const visits *sorted, int64_t expert) {
    return set_of(sorted, expert, sorted->inputs, sorted->packed_inputs, call->dims);
}

static row_set activated_of(const experts_call *call, const visits *sorted, int64_t expert) {
    return set_of(sorted, expert, sorted->activated, sorted->packed_activated, call->hidden);
}

static void pack(row_set set, int64_t dims) {
    openmimo_pack_rows(set.rows, set.count, dims, (uint32_t *)set.packed);
}

static inline vector swiglu(vector gate, vector up) {
    vector power = power_of_two(choose(gate < 0.0f, gate, -gate) * LOG2_E), part = 1.0f / (1.0f + power);
    return gate * choose(gate < 0.0f, power * part, part) * up;
}

/* Hidden numbers `from` to `from + PANEL - 1` of an expert's visits. */
static void activate(const experts_call *call, const visits *sorted, int64_t expert, int64_t from,
                     float (*sums)[PANEL]) {
    row_set set = inputs_of(call, sorted, expert);
    int64_t outputs = call->hidden - from < PANEL ? call->hidden - from : PANEL;
    const char *matrix = call->gate_up;
    matrix += expert * 2 * call->hidden * call->dims * (call->bfloat16 ? 2 : 4);
    float(*ups)[PANEL] = sums + set.count;
    multiply(&set, matrix, from, outputs, call->dims, call->bfloat16, sums);
    multiply(&set, matrix, call->hidden + from, outputs, call->dims, call->bfloat16, ups);
    for (int64_t visit = 0; visit < set.count; visit++) {
        int64_t row = (sorted->first[expert] + visit) * call->hidden + from;
        float activated[PANEL];
        for (int64_t i = 0; i < PANEL; i += WIDTH)
            store_vector(activated + i, swiglu(load_vector(sums[visit] + i), load_vector(ups[visit] + i)));
        for (int64_t i = 0; i < outputs; i++) write_number(sorted->hidden, row + i, activated[i], call->bfloat16);
    }
}

static void project_down(const experts_call *call, const visits *sorted, int64_t expert, int64_t from,
                         float (*sums)[PANEL]) {
    row_set set = activated_of(call, sorted, expert);
    int64_t outputs = call->dims - from < PANEL ? call->dims - from : PANEL;
    const char *matrix = call->down;
    matrix += expert * call->dims * call->hidden * (call->bfloat16 ? 2 : 4);
    multiply(&set, matrix, from, outputs, call->hidden, call->bfloat16, sums);
    for (int64_t visit = 0; visit < set.count; visit++)
        memcpy(sorted->outputs + (sorted->first[expert] + visit) * call->dims + from, sums[visit],
               outputs * sizeof(float));
}

/* Adds a token's outputs in the order of its ids, so that the sum does not depend on the batch. */
static void combine(const experts_call *call, const visits *sorted, int64_t token) {
    for (int64_t dim = 0; dim < call->dims; dim++) {
        float sum = 0.0f;
        for (int64_t slot = token * call->active; slot < (token + 1) * call->active; slot++)
            sum += call->weights[slot] * sorted->outputs[sorted->sorted_index[slot] * call->dims + dim];
        write_number(call->out, token * call->dims + dim, sum, call->bfloat16);
    }
}

/* The work of one thread. The loops are shared between threads. */
static void run_thread(const experts_call *call, const visits *sorted) {
    float(*sums)[PANEL] = sorted->sums + 2 * call->tokens * call->active * this_thread();
    if (sorted->packed_inputs) {
        openmimo_begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t expert = 0; expert < call->experts; expert++) pack(inputs_of(call, sorted, expert), call->dims);
    }
    for (int64_t expert = 0; expert < call->experts; expert++) {
        if (sorted->first[expert] == sorted->first[expert + 1]) continue;
#pragma omp for schedule(static) nowait
        for (int64_t from = 0; from < call->hidden; from += PANEL) activate(call, sorted, expert, from, sums);
    }
#pragma omp barrier
    if (sorted->packed_inputs) {
#pragma omp for schedule(dynamic)
        for (int64_t expert = 0; expert < call->experts; expert++)
            pack(activated_of(call, sorted, expert), call->hidden);
    }
    for (int64_t expert = 0; expert < call->experts; expert++) {
        if (sorted->first[expert] == sorted->first[expert + 1]) continue;
#pragma omp for schedule(static) nowait
        for (int64_t from = 0; from < call->dims; from += PANEL) project_down(call, sorted, expert, from, sums);
    }
    if (sorted->packed_inputs) openmimo_end_tiles();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t token = 0; token < call->tokens; token++) combine(call, sorted, token);
}

/* Returns 0 on success, 1 if an id is out of range, 2 if memory runs out. */
int openmimo_experts(const experts_call *call) {
    int64_t count = call->tokens * call->active, used = count < call->experts ? count : call->experts;
    int64_t bytes = used * 3 * call->hidden * call->dims * (call->bfloat16 ? 2 : 4);
    int threads = bytes < MIN_PARALLEL_BYTES ? 1 : (int)call->threads;
    int tiles = call->bfloat16 && openmimo_has_tiles();
    visits sorted;
    void *memory = malloc(lay_out(call, threads, tiles, 0, &sorted));
    if (!memory) return 2;
    lay_out(call, threads, tiles, (uintptr_t)memory, &sorted);
    int is_sorted = sort_visits(call, &sorted);
    if (is_sorted) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        run_thread(call, &sorted);
    }
    free(memory);
    return !is_sorted;
}
