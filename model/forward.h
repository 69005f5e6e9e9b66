/* The Llama decoder in motion: one forward pass over the tokens of a step, and the head. */
#ifndef MLORA_MODEL_FORWARD_H
#define MLORA_MODEL_FORWARD_H

#include "kernels/kernels.h"
#include "model/config.h"
#include "model/weights.h"

/* Everything that a forward pass needs of a model; all borrowed. */
struct model {
    struct device *dev;
    const struct model_config *config;
    const struct weights *weights;
    enum dtype dtype; /* of activations and KV cache */
};

/* Activations, sized once for the largest step. */
struct workspace {
    float *x;      /* [T, D] f32, the residual stream        */
    void *norm;    /* [T, D]                                 */
    void *qkv;     /* [T, (H + 2 G) d] product_dtype()       */
    void *heads;   /* [T, H d] attention's output            */
    void *gate_up; /* [T, 2 F] product_dtype()               */
    void *mlp;     /* [T, F]                                 */
    void *delta;   /* [T, D] product_dtype(), is added to x  */
    float *shrunk; /* [T, LORA_SLICES_MAX, rank] f32         */
    int max_tokens;
    int max_rank; /* that `shrunk` has room for */
    int64_t bytes;
};

mlora_status workspace_open(struct workspace *out, const struct model *model, int max_tokens);
void workspace_close(struct workspace *workspace, struct device *dev); /* accepts zeroes */

/* Make room for adapters of rank `rank`. Not called during a step. Returns OK or ENOMEM. */
mlora_status workspace_fit_rank(struct workspace *workspace, struct device *dev, int rank);

/* The KV cache of all layers. What belongs to a block lies together, so that its memory can serve
 * for something else: [n_blocks, L, 2, G, KV_BLOCK, d] dtype, keys and then values. To the ops, which
 * know one layer, that is a cache of its own from the layer's first keys on, in which block b is
 * number b * stride: so block tables are written. */
struct kv_cache {
    char *memory; /* device: bytes for others, then the blocks... */
    char *blocks; /* ... from here on: [bytes] */
    int n_blocks;
    int stride;        /* 2 L */
    size_t part_bytes; /* of the keys, or the values, of a block in one layer */
    int64_t bytes;
};

/* As many blocks as their numbers in block tables allow. */
int64_t kv_blocks_max(const struct model *model);

/* `bytes_before`, a multiple of 256: of its memory, that are for others. Returns OK or ENOMEM. */
mlora_status kv_cache_open(struct kv_cache *out, const struct model *model, int n_blocks,
                           int64_t bytes_before);
void kv_cache_close(struct kv_cache *cache, struct device *dev); /* accepts zeroes */
int64_t kv_block_bytes(const struct model *model);               /* of all layers together */

/* Run the decoder over batch->T tokens; their keys and values are added to the cache.
 * block_table [Q, max_blocks] is on the device. Leaves the normalised hidden states of all tokens
 * in workspace->norm [T, D]. */
void forward(const struct model *model, const struct workspace *workspace,
             const struct kv_cache *cache, const struct batch_view *batch,
             const int32_t *block_table, int max_blocks, const struct lora_view *lora);

/* logits[q, :] = head . norm[rows[q], :]     logits [Q, V] f32    rows [Q] on the device; uses
 * workspace->delta for the gathered rows, so Q <= max_tokens. The tokens of `lora` are these Q. */
void forward_head(const struct model *model, const struct workspace *workspace, float *logits,
                  const int32_t *rows, int Q, const struct lora_view *lora);

#endif
