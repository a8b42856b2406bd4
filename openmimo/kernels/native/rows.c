/* The row operations of a decoder layer other than its products: RMS norm, RoPE, router. Single-threaded. */

#include "products.h"
#include "rotation.h"

#include <math.h>

/* The call record of the norm. */
typedef struct {
    const void *x, *weight; /* [rows, dims], [dims] */
    void *out;
    int64_t rows, dims, bfloat16;
    double epsilon;
} norm_call;

INLINE void normalize(const norm_call *call, int64_t row, int64_t bfloat16) {
    int64_t first = row * call->dims, dim = 0;
    floats lanes = {};
    for (; dim + LANES <= call->dims; dim += LANES) {
        floats x;
        for (int i = 0; i < LANES; i++) x[i] = read_number(call->x, first + dim + i, bfloat16);
        lanes += x * x;
    }
    float sum = total(lanes);
    for (; dim < call->dims; dim++) {
        float x = read_number(call->x, first + dim, bfloat16);
        sum += x * x;
    }
    float inverse = 1.0f / sqrtf(sum / (float)call->dims + (float)call->epsilon);
    for (dim = 0; dim < call->dims; dim++) {
        float x = read_number(call->x, first + dim, bfloat16) * inverse;
        if (bfloat16) x = widen(narrow(x)); /* the normalized value is rounded to the dtype of x before the weight multiplies it */
        write_number(call->out, first + dim, x * read_number(call->weight, dim, bfloat16), bfloat16);
    }
}

void openmimo_rms_norm(const norm_call *call) {
    for (int64_t row = 0; row < call->rows; row++) {
        if (call->bfloat16) normalize(call, row, 1);
        else normalize(call, row, 0);
    }
}

/* The call record of the rotation. Strides count numbers. */
typedef struct {
    const void *x, *cosines, *sines; /* [rows, heads, dims], [rows, rotary_dims] twice */
    void *out;                       /* [rows, heads, dims] */
    int64_t rows, heads, dims, rotary_dims, row_stride, head_stride, table_stride, bfloat16;
} rotary_call;

INLINE void rotate(const rotary_call *call, int64_t row, int64_t head, int64_t bfloat16) {
    int64_t size = bfloat16 ? 2 : 4, table = size * row * call->table_stride;
    rotate_head((const char *)call->x + size * (row * call->row_stride + head * call->head_stride),
                (char *)call->out + size * (row * call->heads + head) * call->dims, (const char *)call->cosines + table,
                (const char *)call->sines + table, call->rotary_dims, call->dims, bfloat16);
}

void openmimo_rotary(const rotary_call *call) {
    for (int64_t row = 0; row < call->rows; row++)
        for (int64_t head = 0; head < call->heads; head++) {
            if (call->bfloat16) rotate(call, row, head, 1);
            else rotate(call, row, head, 0);
        }
}

/* The call record of the router. */
typedef struct {
    const void *x, *weight, *bias; /* [rows, dims], [experts, dims], [experts] */
    int64_t *ids;                  /* [rows, active] */
    float *weights;                /* [rows, active] */
    int64_t rows, dims, experts, active, normalize;
    int64_t x_bfloat16, weight_bfloat16, bias_bfloat16; /* a bfloat16 weight requires a bfloat16 x */
    double scale;
} router_call;

/* Sigmoid scores of all experts for one row. */
static void score(const router_call *call, int64_t row, float *wide, float *scores) {
    const void *x = (const char *)call->x + row * call->dims * (call->x_bfloat16 ? 2 : 4);
    float sums[1][PANEL];
    row_set set = {&x, 1, NULL};
    if (call->x_bfloat16 && !call->weight_bfloat16) {
        for (int64_t dim = 0; dim < call->dims; dim++) wide[dim] = read_number(x, dim, 1);
        x = wide;
    }
    for (int64_t first = 0; first < call->experts; first += PANEL) {
        int64_t outputs = call->experts - first < PANEL ? call->experts - first : PANEL;
        multiply(&set, call->weight, first, outputs, call->dims, call->weight_bfloat16, sums);
        for (int64_t i = 0; i < outputs; i++) scores[first + i] = 1.0f / (1.0f + expf(-sums[0][i]));
    }
}

/* Selects the experts with the largest score plus bias, in descending order; ties go to the lower id. Weights are
 * scores without the bias. */
static void choose_experts(const router_call *call, int64_t row, const float *scores, const float *biased,
                           char *taken) {
    int64_t *ids = call->ids + row * call->active;
    float *weights = call->weights + row * call->active, sum = 0.0f;
    memset(taken, 0, call->experts);
    for (int64_t slot = 0; slot < call->active; slot++) {
        int64_t best = -1;
        for (int64_t expert = 0; expert < call->experts; expert++)
            if (!taken[expert] && (best < 0 || biased[expert] > biased[best])) best = expert;
        taken[best] = 1;
        ids[slot] = best;
        weights[slot] = scores[best];
        sum += scores[best];
    }
    for (int64_t slot = 0; slot < call->active; slot++) {
        if (call->normalize) weights[slot] /= sum + 1e-20f;
        weights[slot] *= (float)call->scale;
    }
}

void openmimo_router(const router_call *call) {
    float wide[call->dims], scores[call->experts], biased[call->experts];
    char taken[call->experts];
    for (int64_t row = 0; row < call->rows; row++) {
        score(call, row, wide, scores);
        for (int64_t expert = 0; expert < call->experts; expert++)
            biased[expert] = scores[expert] + read_number(call->bias, expert, call->bias_bfloat16);
        choose_experts(call, row, scores, biased, taken);
    }
}
