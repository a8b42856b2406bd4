/* A few rows times one or more weight matrices. The outputs are concatenated. */

#include "products.h"

#include <stdlib.h>

#define MAX_ROWS 32

typedef struct {
    const void *weight, *bias; /* [outputs, dims], [outputs] or none */
    int64_t outputs;
} linear_part;

/* The call record that linear/native.py packs. Strides count numbers. */
typedef struct {
    const void *x; /* [rows, dims] */
    void *out;
    int64_t rows, dims, x_stride, out_stride, num_parts, threads, bfloat16;
    linear_part parts[];
} linear_call;

static void fill_outputs(const linear_call *call, const linear_part *part, const row_set *rows, int64_t first,
                         int64_t column) {
    float sums[MAX_ROWS][PANEL], bias[PANEL] = {};
    int64_t outputs = part->outputs - first < PANEL ? part->outputs - first : PANEL;
    multiply(rows, part->weight, first, outputs, call->dims, call->bfloat16, sums);
    if (part->bias)
        for (int64_t i = 0; i < outputs; i++) bias[i] = read_number(part->bias, first + i, call->bfloat16);
    for (int64_t row = 0; row < call->rows; row++)
        for (int64_t i = 0; i < outputs; i++)
            write_number(call->out, row * call->out_stride + column + i, sums[row][i] + bias[i], call->bfloat16);
}

static void run_parts(const linear_call *call, const row_set *rows, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (rows->packed) openmimo_begin_tiles();
        int64_t column = 0;
        for (int64_t i = 0; i < call->num_parts; column += call->parts[i].outputs, i++) {
            int64_t panels = (call->parts[i].outputs + PANEL - 1) / PANEL;
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < panels; panel++)
                fill_outputs(call, call->parts + i, rows, panel * PANEL, column + panel * PANEL);
        }
        if (rows->packed) openmimo_end_tiles();
    }
}

/* Returns 2 if memory runs out, else 0. */
int openmimo_linear(const linear_call *call) {
    const void *rows[MAX_ROWS];
    int64_t size = call->bfloat16 ? 2 : 4;
    for (int64_t row = 0; row < call->rows; row++) rows[row] = (const char *)call->x + row * call->x_stride * size;
    uint32_t *packed = NULL;
    if (call->bfloat16 && openmimo_has_tiles()) {
        packed = malloc(openmimo_packed_words(call->rows, call->dims) * sizeof(uint32_t) + 1);
        if (!packed) return 2;
        openmimo_pack_rows(rows, call->rows, call->dims, packed);
    }
    row_set set = {rows, call->rows, packed};
    run_parts(call, &set, call->out_stride * call->dims * size < MIN_PARALLEL_BYTES ? 1 : (int)call->threads);
    free(packed);
    return 0;
}
