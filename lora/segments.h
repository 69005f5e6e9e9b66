/* The adapters of a step's rows to what the LoRA kernels read: a slot for each token, and the
 * tokens sorted by slot. */
#ifndef MLORA_LORA_SEGMENTS_H
#define MLORA_LORA_SEGMENTS_H

#include <stdint.h>

/* Host arrays that segments_build fills; the caller owns them. */
struct segments {
    int32_t *slot;          /* [T] */
    int32_t *order;         /* [T] */
    int32_t *segment_slot;  /* [Q] */
    int32_t *segment_start; /* [Q + 1] */
    int n_segments;
    int n_tokens;
    int max_segment;
};

/* The rows of a step: row q owns tokens start[q] to start[q + 1]. */
struct segment_rows {
    const int32_t *start; /* [Q + 1] */
    const int32_t *slot;  /* [Q] of its adapter, -1: the base model */
    const int32_t *first; /* [Q] the token from which on it counts; those before are the base's */
    int Q;
};

/* `scratch` [Q]. Segments are in order of slot, tokens within one in order of the batch. */
void segments_build(struct segments *out, const struct segment_rows *rows, int32_t *scratch);

#endif
