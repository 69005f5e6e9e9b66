/* Planned requests to the flat arrays that kernels read: built on the host in one piece of
 * memory, sent to the device in one upload. */
#ifndef MLORA_ENGINE_BATCH_H
#define MLORA_ENGINE_BATCH_H

#include "engine/scheduler.h"
#include "kernels/kernels.h"
#include "lora/registry.h"

struct batch {
    struct device *dev;
    unsigned char *host; /* [capacity] staging */
    unsigned char *dev_memory;
    size_t capacity, used;
    size_t history_capacity;                       /* bytes of `capacity` that are for histories */
    int32_t *slot_of_row, *first_of_row, *scratch; /* [max_rows] host */
    int32_t *counting;   /* [max_rows + 1] host: 0, 1, 2, ...: rows of one token */
    int32_t *tokens_out; /* device: [T] positions, then [T] rows */

    /* What the step reads; device pointers. */
    struct batch_view view;
    struct lora_view lora;
    int n_adapters;                /* of its tokens */
    const int32_t *slot_of_token;  /* [T] host copy of lora.slot */
    struct lora_view head_lora;    /* of the rows that go through the head: batch_head_rows() */
    int32_t *head_host, *head_dev; /* [HEAD_ARRAYS, max_rows + 2] what head_lora points to */
    int max_rows;                  /* of the head, of which a row of the plan may have many */
    mlora_lora_mode lora_mode;     /* for `lora`, set by the owner... */
    int kv_stride;                 /* ... of struct kv_cache... */
    const int32_t *drawn;          /* ... and what the step before draws: device, or NULL */
    const int32_t *block_table;    /* [Q, max_blocks] */
    int max_blocks;
    const int32_t
        *sample_tokens; /* [n_samples] index in the step of each token after which one is drawn */
    const int32_t *sample_tokens_host; /* the same */
    int n_samples;
    struct sample_view sample;
};

/* Sized for the largest step: T tokens, Q rows of the plan, `max_rows` tokens drawn (at least
 * Q), sequences of max_model_len tokens. */
mlora_status batch_open(struct batch *out, struct device *dev, int max_tokens, int max_seqs,
                        int max_rows, int max_model_len);
void batch_close(struct batch *batch); /* accepts zeroes */

/* Fill everything from the plan. Tokens after which one is drawn come with their sampling parameters, and
 * those with a penalty with their history. Returns OK, or ENOMEM (a history that is larger than
 * any before). */
mlora_status batch_build(struct batch *batch, const struct plan *plan,
                         const struct registry *registry);

/* The adapters of tokens[i], i < n <= max_rows, indices in the step on the host, for the head. Valid
 * until the next call. */
const struct lora_view *batch_head_rows(struct batch *batch, const int32_t *tokens, int n);

#endif
