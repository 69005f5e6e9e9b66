/* The pairs of neighbouring symbols that may merge, the one that merges first on top. */
#ifndef MLORA_TOKENIZER_MERGE_HEAP_H
#define MLORA_TOKENIZER_MERGE_HEAP_H

#include <stddef.h>
#include <stdint.h>

#include "engine/mlora.h" /* mlora_status */

/* A symbol and the one after it. They may have changed when the pair comes to the top: `result`
 * tells. */
struct merge_candidate {
    uint32_t order;  /* the lowest merges first, the leftmost of equals */
    int32_t left;    /* index of the first */
    uint32_t result; /* what they make */
};

/* Zeroes: empty. May be emptied by n = 0 and used again. */
struct merge_heap {
    struct merge_candidate *candidates;
    size_t n, capacity;
};

/* Returns OK or ENOMEM. */
mlora_status merge_heap_push(struct merge_heap *heap, struct merge_candidate candidate);

/* Take the top off a heap that is not empty. */
struct merge_candidate merge_heap_pop(struct merge_heap *heap);

void merge_heap_free(struct merge_heap *heap); /* accepts zeroes */

#endif
