/* The decoder, top to bottom. LoRA stands beside each base product: the product is shared by all
 * rows of the batch, and each adapter's rows get their own low-rank addition. */
#include "model/forward.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/profile.h"

/* ---- the pass ------------------------------------------------------------------------------- */

/* Where the linears of a layer read and write. */
struct sites {
    struct lora_site qkv, o, gate_up, down;
};

static struct lora_site site_of(const struct model_config *config, enum lora_linear first,
                                int n_slices)
{
    struct lora_site site = {
        .linear = first, .n_slices = n_slices, .K = linear_inputs(config, first)};
    for (int i = 0; i < n_slices; i++) {
        site.offset[i] = site.N;
        site.width[i] = linear_outputs(config, (enum lora_linear)(first + i));
        site.N += site.width[i];
    }
    return site;
}

static struct sites sites_of(const struct model_config *config)
{
    return (struct sites){
        .qkv = site_of(config, LORA_Q, 3),
        .o = site_of(config, LORA_O, 1),
        .gate_up = site_of(config, LORA_GATE, 2),
        .down = site_of(config, LORA_DOWN, 1),
    };
}

/* h = A x for each row, of its own adapter. It goes before the base product of the same x: there
 * it overlaps with the end of the op that makes x. */
static void shrink(const struct model *model, const struct workspace *ws, const void *x,
                   const struct lora_view *lora, const struct lora_site *site, int layer)
{
    assert(lora->max_rank <= ws->max_rank);
    model->dev->ops->lora_shrink(model->dev, ws->shrunk, x, lora, site, layer, model->dtype);
}

/* y = W x + bias, and what each row's own adapter adds; of product_dtype(). */
static void project(const struct model *model, const struct workspace *ws, void *y, const void *x,
                    const struct matrix *w, const float *bias, int T, const struct lora_view *lora,
                    const struct lora_site *site, int layer)
{
    const struct kernels *op = model->dev->ops;
    const enum dtype y_dtype = product_dtype(model->dev, T, model->dtype);
    struct lora_site here = *site;

    here.bias = bias;
    if (lora->n_segments > 0) shrink(model, ws, x, lora, &here, layer);
    op->matmul(model->dev, y, y_dtype, x, w, bias, T, model->dtype);
    if (lora->n_segments > 0)
        op->lora_expand(model->dev, y, ws->shrunk, lora, &here, layer, y_dtype);
}

/* ws->mlp = silu(gate) up of ws->norm. */
static void project_gate(const struct model *model, const struct workspace *ws,
                         const struct layer_weights *w, int T, const struct lora_view *lora,
                         const struct lora_site *site, int layer)
{
    const struct kernels *op = model->dev->ops;
    struct device *dev = model->dev;
    const enum dtype dtype = model->dtype, between = product_dtype(dev, T, dtype);
    struct lora_site here = *site;

    here.bias = w->gate_up_bias;
    if (lora->n_segments > 0) shrink(model, ws, ws->norm, lora, &here, layer);
    op->matmul(dev, ws->gate_up, between, ws->norm, &w->gate_up, w->gate_up_bias, T, dtype);
    if (lora->n_segments > 0)
        op->lora_expand_silu_mul(dev, ws->mlp, ws->gate_up, between, ws->shrunk, lora, &here, layer,
                                 T, dtype);
    else
        op->silu_mul(dev, ws->mlp, ws->gate_up, between, T, model->config->mlp_size, dtype);
}

/* ws->x = the embedding of each token, as its own adapter has it. */
static void embed(const struct model *model, const struct workspace *ws, const int32_t *ids, int T,
                  const struct lora_view *lora)
{
    const int D = model->config->hidden_size;
    const struct lora_site site = {.linear = LORA_EMBEDDING, .n_slices = 1, .N = D, .width = {D}};
    struct device *dev = model->dev;

    dev->ops->embed(dev, ws->x, &model->weights->embedding, ids, T, DTYPE_F32);
    if (!lora->changes_embedding) return;
    dev->ops->lora_embed(dev, ws->x, ws->shrunk, ids, lora, D, DTYPE_F32);
    dev->ops->lora_expand(dev, ws->x, ws->shrunk, lora, &site, lora->L - 1, DTYPE_F32);
}

/* x += delta, ws->norm = its norm, with the weights of each row's own adapter where it has some. */
static void add_norm(const struct model *model, const struct workspace *ws, const void *delta,
                     const float *weight, int T, const struct lora_view *lora, int layer,
                     enum lora_norm which)
{
    const int D = model->config->hidden_size;
    const float eps = (float)model->config->rms_norm_eps;
    struct device *dev = model->dev;
    const enum dtype dtype = model->dtype, delta_dtype = product_dtype(dev, T, dtype);

    if (lora->changes_norms)
        dev->ops->lora_add_rms_norm(dev, ws->norm, ws->x, delta, delta_dtype, weight, lora, layer,
                                    which, T, D, eps, dtype);
    else
        dev->ops->add_rms_norm(dev, ws->norm, ws->x, delta, delta_dtype, weight, T, D, eps, dtype);
}

/* The same for the heads of queries and keys (Qwen3). */
static void head_norm(const struct model *model, const struct workspace *ws,
                      const struct layer_weights *w, const struct heads *heads, int T,
                      const struct lora_view *lora, int layer)
{
    const float eps = (float)model->config->rms_norm_eps;
    struct device *dev = model->dev;
    const enum dtype qkv_dtype = product_dtype(dev, T, model->dtype);

    if (lora->changes_norms)
        dev->ops->lora_head_norm(dev, ws->qkv, w->q_norm, w->k_norm, lora, layer, heads, T, eps,
                                 qkv_dtype);
    else
        dev->ops->head_norm(dev, ws->qkv, w->q_norm, w->k_norm, heads, T, eps, qkv_dtype);
}

/* Everything by which two passes of one engine may differ. */
struct pass_key {
    char what[8]; /* "forward": other runs of ops are recorded, too */
    struct batch_view batch;
    struct lora_view lora;
    const void *block_table, *shrunk;
    int max_blocks;
};

static bool replay(const struct model *model, const struct workspace *ws,
                   const struct batch_view *batch, const int32_t *block_table, int max_blocks,
                   const struct lora_view *lora)
{
    struct pass_key key;

    memset(&key, 0, sizeof key); /* the holes between members, too */
    memcpy(key.what, "forward", sizeof key.what);
    memcpy(&key.batch, batch, sizeof key.batch);
    memcpy(&key.lora, lora, sizeof key.lora);
    key.block_table = block_table;
    key.shrunk = ws->shrunk;
    key.max_blocks = max_blocks;
    return model->dev->ops->replay(model->dev, &key, sizeof key);
}

void forward(const struct model *model, const struct workspace *ws, const struct kv_cache *cache,
             const struct batch_view *batch, const int32_t *block_table, int max_blocks,
             const struct lora_view *lora)
{
    const struct model_config *config = model->config;
    const struct weights *weights = model->weights;
    const struct sites sites = sites_of(config);
    const struct rope_view rope = {weights->rope_frequency, (float)config->rope.attention_factor};
    const int T = batch->T, L = config->n_layers;
    struct device *dev = model->dev;
    const enum dtype dtype = model->dtype, qkv_dtype = product_dtype(dev, T, dtype);
    const struct kernels *op = dev->ops;
    const void *delta = NULL; /* what the block before adds to x */

    assert(T <= ws->max_tokens);
    if (replay(model, ws, batch, block_table, max_blocks, lora)) return;
    op->metadata(dev, batch);
    embed(model, ws, batch->ids, T, lora);

    for (int l = 0; l < L; l++) {
        const struct layer_weights *w = &weights->layers[l];
        char *keys = cache->blocks + (size_t)(2 * l) * cache->part_bytes;
        const struct kv_view kv = {keys, keys + cache->part_bytes, block_table, max_blocks, dtype};
        const struct heads heads = {
            .H = config->n_heads,
            .G = config->n_kv_heads,
            .d = config->head_dim,
            .window = config->layer_has_window[l] ? config->window : 0,
            .scale = 1.0f / sqrtf((float)config->head_dim),
        };

        profile_layer(dev, l);
        add_norm(model, ws, delta, w->attention_norm, T, lora, l, NORM_ATTENTION);
        project(model, ws, ws->qkv, ws->norm, &w->qkv, w->qkv_bias, T, lora, &sites.qkv, l);
        if (config->qk_norm) head_norm(model, ws, w, &heads, T, lora, l);
        op->rope(dev, ws->qkv, &rope, &kv, batch, &heads, qkv_dtype);
        op->attention(dev, ws->heads, ws->qkv, qkv_dtype, &kv, batch, &heads, dtype);
        project(model, ws, ws->delta, ws->heads, &w->o, w->o_bias, T, lora, &sites.o, l);

        add_norm(model, ws, ws->delta, w->mlp_norm, T, lora, l, NORM_MLP);
        project_gate(model, ws, w, T, lora, &sites.gate_up, l);
        project(model, ws, ws->delta, ws->mlp, &w->down, w->down_bias, T, lora, &sites.down, l);
        delta = ws->delta;
    }
    profile_layer(dev, -1);
    add_norm(model, ws, delta, weights->final_norm, T, lora, L, NORM_FINAL);
    op->record_end(dev);
}

void forward_head(const struct model *model, const struct workspace *ws, float *logits,
                  const int32_t *rows, int Q, const struct lora_view *lora)
{
    const int D = model->config->hidden_size, V = model->config->vocab_size;
    const struct lora_site site = {
        .linear = LORA_HEAD, .n_slices = 1, .K = D, .N = V, .width = {V}};
    struct device *dev = model->dev;

    assert(Q <= ws->max_tokens);
    dev->ops->gather_rows(dev, ws->delta, ws->norm, rows, Q, D, model->dtype);
    dev->ops->matmul(dev, logits, DTYPE_F32, ws->delta, &model->weights->head, NULL, Q,
                     model->dtype);
    if (!lora->changes_head || lora->n_segments == 0) return;
    dev->ops->lora_head(dev, logits, ws->delta, lora, V, D, model->dtype);
    shrink(model, ws, ws->delta, lora, &site, lora->L - 1);
    dev->ops->lora_expand(dev, logits, ws->shrunk, lora, &site, lora->L - 1, DTYPE_F32);
}

/* ---- memory --------------------------------------------------------------------------------- */

/* That one element of a product's result takes for up to max_tokens tokens. */
static size_t bytes_of_products(const struct model *model, int max_tokens)
{
    const int n_exact =
        max_tokens < model->dev->exact_tokens ? max_tokens : model->dev->exact_tokens;
    const size_t exact = (size_t)n_exact * sizeof(float);
    const size_t all = (size_t)max_tokens * dtype_bytes(model->dtype);
    return exact > all ? exact : all;
}

mlora_status workspace_open(struct workspace *out, const struct model *model, int max_tokens)
{
    const struct model_config *c = model->config;
    const size_t element = dtype_bytes(model->dtype);
    struct workspace ws = {.max_tokens = max_tokens};
    const size_t D = (size_t)c->hidden_size, F = (size_t)c->mlp_size;
    const size_t q_width = (size_t)c->n_heads * (size_t)c->head_dim;
    const size_t kv_width = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    void *x = NULL;
    const size_t n = (size_t)max_tokens, product_bytes = bytes_of_products(model, max_tokens);
    const struct {
        void **at;
        size_t width, bytes; /* of all tokens, for each of `width` */
    } parts[] = {
        {&x, D, n * sizeof *ws.x},
        {&ws.norm, D, n * element},
        {&ws.qkv, q_width + 2 * kv_width, product_bytes},
        {&ws.heads, q_width, n * element},
        {&ws.gate_up, 2 * F, product_bytes},
        {&ws.mlp, F, n * element},
        {&ws.delta, D, product_bytes},
    };
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < sizeof parts / sizeof parts[0] && status == MLORA_OK; i++) {
        const size_t bytes = parts[i].width * parts[i].bytes;
        status = model->dev->ops->alloc(model->dev, bytes, parts[i].at);
        ws.bytes += (int64_t)bytes;
    }
    ws.x = x;
    if (status != MLORA_OK) workspace_close(&ws, model->dev);
    *out = ws;
    return status;
}

mlora_status workspace_fit_rank(struct workspace *ws, struct device *dev, int rank)
{
    void *shrunk;

    if (rank <= ws->max_rank) return MLORA_OK;
    const size_t bytes = (size_t)ws->max_tokens * LORA_SLICES_MAX * (size_t)rank * sizeof(float);
    const mlora_status status = dev->ops->alloc(dev, bytes, &shrunk);
    if (status != MLORA_OK) return status;
    dev->ops->free(dev, ws->shrunk);
    ws->shrunk = shrunk;
    ws->max_rank = rank;
    return MLORA_OK;
}

void workspace_close(struct workspace *ws, struct device *dev)
{
    void *const parts[] = {ws->x,       ws->norm, ws->qkv,   ws->heads,
                           ws->gate_up, ws->mlp,  ws->delta, ws->shrunk};

    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (parts[i]) dev->ops->free(dev, parts[i]);
    *ws = (struct workspace){0};
}

/* Of one layer's keys, or of its values. */
static size_t block_bytes(const struct model *model)
{
    return (size_t)model->config->n_kv_heads * KV_BLOCK * (size_t)model->config->head_dim *
           dtype_bytes(model->dtype);
}

int64_t kv_block_bytes(const struct model *model)
{
    return (int64_t)(2 * block_bytes(model)) * model->config->n_layers;
}

int64_t kv_blocks_max(const struct model *model)
{
    const struct model_config *c = model->config;
    return INT32_MAX / ((int64_t)2 * c->n_layers * c->n_kv_heads * KV_BLOCK);
}

mlora_status kv_cache_open(struct kv_cache *out, const struct model *model, int n_blocks,
                           int64_t bytes_before)
{
    struct kv_cache cache = {.n_blocks = n_blocks, .stride = 2 * model->config->n_layers};
    void *memory = NULL;

    assert(n_blocks <= kv_blocks_max(model));
    cache.part_bytes = block_bytes(model);
    cache.bytes = (int64_t)n_blocks * kv_block_bytes(model);
    const mlora_status status =
        model->dev->ops->alloc(model->dev, (size_t)(bytes_before + cache.bytes), &memory);
    if (status == MLORA_OK) {
        cache.memory = memory;
        cache.blocks = cache.memory + bytes_before;
    }
    *out = cache;
    return status;
}

void kv_cache_close(struct kv_cache *cache, struct device *dev)
{
    if (cache->memory) dev->ops->free(dev, cache->memory);
    *cache = (struct kv_cache){0};
}
