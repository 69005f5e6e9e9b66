/* The adapters of a step's rows to what the LoRA kernels read: a slot for each token, and the
 * tokens sorted by slot. The counts are rounded up, so that steps whose adapters come and go have
 * few different ones, and a backend finds what it recorded of one of them. */
#ifndef MLORA_LORA_SEGMENTS_H
#define MLORA_LORA_SEGMENTS_H

#include <stdbool.h>
#include <stdint.h>

/* Host arrays that segments_build fills; the caller owns them. */
struct segments {
    int32_t *slot;          /* [T] */
    int32_t *order;         /* [T] */
    int32_t *segment_slot;  /* [Q + 1] */
    int32_t *segment_start; /* [Q + 2] */
    int n_adapters;         /* the first segments; those after them are of the base, or empty */
    int n_segments, n_tokens, max_segment; /* as in struct lora_view, rounded up */
    bool has_base_segments;                /* the same */
};

/* The rows of a step: row q owns tokens start[q] to start[q + 1]. */
struct segment_rows {
    const int32_t *start; /* [Q + 1] */
    const int32_t *slot;  /* [Q] of its adapter, -1: the base model */
    const int32_t *first; /* [Q] the token from which on it counts; those before are the base's */
    int Q;
};

/* `scratch` [Q]. Segments are in order of slot, tokens within one in order of the batch. After them come
 * some tokens of the base as a segment of slot -1, and empty ones of that slot: as many as round the
 * counts up. Without an adapter there are none. */
void segments_build(struct segments *out, const struct segment_rows *rows, int32_t *scratch);

#endif
