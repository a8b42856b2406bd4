/* Block scores: for each query and KV head, the largest probability that a query head of the KV head gives to a key of a
 * block. An attention kernel keeps the largest logit of each row and block while it visits the keys, and computes the
 * probabilities at the end, when the maximum and the sum of a row are known. The maximum over the heads is one of
 * probabilities: heads have different sums.
 */

#ifndef OPENMIMO_SCORES_H
#define OPENMIMO_SCORES_H

#include "vectors.h"

/* Raises largest[key / block] to the logits of the keys `first` to `first + count - 1`. */
static inline void keep_largest(const float *logits, int64_t first, int64_t count, int64_t block, float *largest) {
    int64_t key = 0;
    while (key < count) {
        int64_t number = (first + key) / block, stop = (number + 1) * block - first;
        float most = largest[number];
        if (stop > count) stop = count;
        if (stop - key >= WIDTH) {
            vector lanes_most = load_vector(logits + key);
            for (key += WIDTH; key + WIDTH <= stop; key += WIDTH) lanes_most = greater(load_vector(logits + key), lanes_most);
            float found = largest_lane(lanes_most);
            most = found > most ? found : most;
        }
        for (; key < stop; key++) most = logits[key] > most ? logits[key] : most;
        largest[number] = most;
    }
}

/* Raises `count` scores to the probabilities 2^(largest - peak) * inverse of one row. */
static inline void raise_scores(const float *largest, int64_t count, float peak, float inverse, float *scores) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        int64_t here = count - i < WIDTH ? count - i : WIDTH;
        float logits[WIDTH] = {}, old[WIDTH] = {};
        memcpy(logits, largest + i, here * sizeof(float));
        memcpy(old, scores + i, here * sizeof(float));
        vector raised = greater(power_of_two(load_vector(logits) - peak) * inverse, load_vector(old));
        store_vector(old, raised);
        memcpy(scores + i, old, here * sizeof(float));
    }
}

#endif
