/* The decoder, top to bottom. LoRA stands beside each base product: the product is shared by all
 * rows of the batch, and each adapter's rows get their own low-rank addition. */
#include "model/forward.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

#include "engine/base/error.h"

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

/* y = W x + bias, and for each row s B(A x) of its own adapter. */
static void project(const struct model *model, const struct workspace *ws, void *y, const void *x,
                    const struct matrix *w, const float *bias, int T, const struct lora_view *lora,
                    const struct lora_site *site, int layer)
{
    struct device *dev = model->dev;

    dev->ops->matmul(dev, y, model->dtype, x, w, bias, T, model->dtype);
    if (lora->n_segments == 0) return;
    assert(lora->max_rank <= ws->max_rank);
    dev->ops->lora_shrink(dev, ws->shrunk, x, lora, site, layer, model->dtype);
    dev->ops->lora_expand(dev, y, ws->shrunk, lora, site, layer, model->dtype);
}

void forward(const struct model *model, const struct workspace *ws, const struct kv_cache *cache,
             const struct batch_view *batch, const int32_t *block_table, int max_blocks,
             const struct lora_view *lora)
{
    const struct model_config *config = model->config;
    const struct weights *weights = model->weights;
    const struct sites sites = sites_of(config);
    const struct rope_view rope = {weights->rope_frequency, (float)config->rope.attention_factor};
    const float eps = (float)config->rms_norm_eps;
    const enum dtype dtype = model->dtype;
    const int T = batch->T, D = config->hidden_size, F = config->mlp_size;
    struct device *dev = model->dev;
    const struct kernels *op = dev->ops;
    const void *delta = NULL; /* what the block before adds to x */

    assert(T <= ws->max_tokens);
    op->metadata(dev, batch);
    op->embed(dev, ws->x, &weights->embedding, batch->ids, T, dtype);

    for (int l = 0; l < config->n_layers; l++) {
        const struct layer_weights *w = &weights->layers[l];
        const struct kv_view kv = {cache->k[l], cache->v[l], block_table, max_blocks, dtype};
        const struct heads heads = {
            .H = config->n_heads,
            .G = config->n_kv_heads,
            .d = config->head_dim,
            .window = config->layer_has_window[l] ? config->window : 0,
            .scale = 1.0f / sqrtf((float)config->head_dim),
        };

        op->add_rms_norm(dev, ws->norm, ws->x, delta, w->attention_norm, T, D, eps, dtype);
        project(model, ws, ws->qkv, ws->norm, &w->qkv, w->qkv_bias, T, lora, &sites.qkv, l);
        if (config->qk_norm)
            op->head_norm(dev, ws->qkv, w->q_norm, w->k_norm, &heads, T, eps, dtype);
        op->rope(dev, ws->qkv, &rope, &kv, batch, &heads, dtype);
        op->attention(dev, ws->heads, ws->qkv, &kv, batch, &heads, dtype);
        project(model, ws, ws->delta, ws->heads, &w->o, w->o_bias, T, lora, &sites.o, l);

        op->add_rms_norm(dev, ws->norm, ws->x, ws->delta, w->mlp_norm, T, D, eps, dtype);
        project(model, ws, ws->gate_up, ws->norm, &w->gate_up, w->gate_up_bias, T, lora,
                &sites.gate_up, l);
        op->silu_mul(dev, ws->mlp, ws->gate_up, T, F, dtype);
        project(model, ws, ws->delta, ws->mlp, &w->down, w->down_bias, T, lora, &sites.down, l);
        delta = ws->delta;
    }
    op->add_rms_norm(dev, ws->norm, ws->x, delta, weights->final_norm, T, D, eps, dtype);
}

void forward_head(const struct model *model, const struct workspace *ws, float *logits,
                  const int32_t *rows, int Q)
{
    struct device *dev = model->dev;

    assert(Q <= ws->max_tokens);
    dev->ops->gather_rows(dev, ws->delta, ws->norm, rows, Q, model->config->hidden_size,
                          model->dtype);
    dev->ops->matmul(dev, logits, DTYPE_F32, ws->delta, &model->weights->head, NULL, Q,
                     model->dtype);
}

/* ---- memory --------------------------------------------------------------------------------- */

mlora_status workspace_open(struct workspace *out, const struct model *model, int max_tokens)
{
    const struct model_config *c = model->config;
    const size_t element = dtype_bytes(model->dtype);
    struct workspace ws = {.max_tokens = max_tokens};
    const size_t D = (size_t)c->hidden_size, F = (size_t)c->mlp_size;
    const size_t q_width = (size_t)c->n_heads * (size_t)c->head_dim;
    const size_t kv_width = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const struct {
        void **at;
        size_t width;
    } parts[] = {
        {&ws.x, D},           {&ws.norm, D},        {&ws.qkv, q_width + 2 * kv_width},
        {&ws.heads, q_width}, {&ws.gate_up, 2 * F}, {&ws.mlp, F},
        {&ws.delta, D},
    };
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < sizeof parts / sizeof parts[0] && status == MLORA_OK; i++) {
        const size_t bytes = (size_t)max_tokens * parts[i].width * element;
        status = model->dev->ops->alloc(model->dev, bytes, parts[i].at);
        ws.bytes += (int64_t)bytes;
    }
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

mlora_status kv_cache_open(struct kv_cache *out, const struct model *model, int n_blocks)
{
    const int L = model->config->n_layers;
    struct kv_cache cache = {.n_layers = L, .n_blocks = n_blocks};
    const size_t bytes = (size_t)n_blocks * block_bytes(model);
    mlora_status status = MLORA_OK;

    cache.k = calloc((size_t)L, sizeof *cache.k);
    cache.v = calloc((size_t)L, sizeof *cache.v);
    if (!cache.k || !cache.v) status = error_set(MLORA_ENOMEM, "out of memory: KV cache table");
    for (int l = 0; l < L && status == MLORA_OK; l++) {
        status = model->dev->ops->alloc(model->dev, bytes, &cache.k[l]);
        if (status == MLORA_OK) status = model->dev->ops->alloc(model->dev, bytes, &cache.v[l]);
    }
    cache.bytes = (int64_t)bytes * 2 * L;
    if (status != MLORA_OK) kv_cache_close(&cache, model->dev);
    *out = cache;
    return status;
}

void kv_cache_close(struct kv_cache *cache, struct device *dev)
{
    for (int l = 0; l < cache->n_layers; l++) {
        if (cache->k && cache->k[l]) dev->ops->free(dev, cache->k[l]);
        if (cache->v && cache->v[l]) dev->ops->free(dev, cache->v[l]);
    }
    free(cache->k);
    free(cache->v);
    *cache = (struct kv_cache){0};
}
