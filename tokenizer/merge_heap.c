#include "tokenizer/merge_heap.h"

#include <stdbool.h>
#include <stdlib.h>

#include "engine/base/error.h"

enum { ARITY = 4 }; /* children of a node: half as deep as a binary heap */

static bool before(const struct merge_candidate *a, const struct merge_candidate *b)
{
    return a->order != b->order ? a->order < b->order : a->left < b->left;
}

mlora_status merge_heap_push(struct merge_heap *heap, struct merge_candidate candidate)
{
    if (heap->n == heap->capacity) {
        const size_t capacity = heap->capacity ? 2 * heap->capacity : 64;
        struct merge_candidate *more = realloc(heap->candidates, capacity * sizeof *more);
        if (!more) return error_set(MLORA_ENOMEM, "out of memory: %zu merge candidates", capacity);
        heap->candidates = more;
        heap->capacity = capacity;
    }
    size_t i = heap->n++;
    while (i > 0 && before(&candidate, &heap->candidates[(i - 1) / ARITY])) {
        heap->candidates[i] = heap->candidates[(i - 1) / ARITY];
        i = (i - 1) / ARITY;
    }
    heap->candidates[i] = candidate;
    return MLORA_OK;
}

struct merge_candidate merge_heap_pop(struct merge_heap *heap)
{
    struct merge_candidate *all = heap->candidates;
    const struct merge_candidate top = all[0], last = all[--heap->n];
    size_t i = 0;

    for (;;) {
        size_t child = ARITY * i + 1;
        const size_t end = child + ARITY < heap->n ? child + ARITY : heap->n;
        if (child >= end) break;
        for (size_t c = child + 1; c < end; c++)
            if (before(&all[c], &all[child])) child = c;
        if (!before(&all[child], &last)) break;
        all[i] = all[child];
        i = child;
    }
    all[i] = last;
    return top;
}

void merge_heap_free(struct merge_heap *heap)
{
    free(heap->candidates);
    *heap = (struct merge_heap){0};
}
