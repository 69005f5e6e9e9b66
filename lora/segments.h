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

/* slot_of_row [Q] is -1 for the base model; row q owns tokens row_start[q] to row_start[q + 1].
 * `scratch` [Q]. Segments are in order of slot, tokens within one in order of the batch. */
void segments_build(struct segments *out, const int32_t *slot_of_row, const int32_t *row_start,
                    int Q, int32_t *scratch);

#endif
