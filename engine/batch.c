#include "engine/batch.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/segments.h"

enum { ALIGNMENT = 16 };

mlora_status batch_open(struct batch *out, struct device *dev, int max_tokens, int max_rows,
                        int max_model_len)
{
    const size_t Q = (size_t)max_rows, T = (size_t)max_tokens;
    const size_t table = Q * (size_t)kvcache_blocks_for(max_model_len);
    struct batch batch = {.dev = dev};
    void *memory = NULL;

    /* ids, slot, order [T]; row_start, kv_len, three of segments, samples, two of histories [Q];
     * sampling [Q]; block table; and padding between them. Histories grow it at need. */
    batch.capacity = (3 * T + 8 * (Q + 1) + table) * sizeof(int32_t) + Q * sizeof(struct sampling) +
                     32 * ALIGNMENT;
    batch.host = malloc(batch.capacity);
    batch.slot_of_row = malloc(Q * sizeof(int32_t));
    batch.scratch = malloc(Q * sizeof(int32_t));
    batch.sampled_row = malloc(Q * sizeof(int));
    mlora_status status = MLORA_OK;
    if (!batch.host || !batch.slot_of_row || !batch.scratch || !batch.sampled_row)
        status = error_set(MLORA_ENOMEM, "out of memory: a batch of %d rows", max_rows);
    if (status == MLORA_OK) status = dev->ops->alloc(dev, batch.capacity, &memory);
    batch.dev_memory = memory;
    if (status == MLORA_OK) {
        memory = NULL;
        status = dev->ops->alloc(dev, 2 * T * sizeof(int32_t), &memory);
        batch.tokens_out = memory;
    }
    if (status != MLORA_OK) batch_close(&batch);
    *out = batch;
    return status;
}

void batch_close(struct batch *batch)
{
    if (batch->dev_memory) batch->dev->ops->free(batch->dev, batch->dev_memory);
    if (batch->tokens_out) batch->dev->ops->free(batch->dev, batch->tokens_out);
    free(batch->host);
    free(batch->slot_of_row);
    free(batch->scratch);
    free(batch->sampled_row);
    *batch = (struct batch){0};
}

/* Take room for `bytes` in the staging memory, and say where it will be on the device. */
static void *place(struct batch *batch, size_t bytes, const void **on_device)
{
    const size_t at = batch->used;

    batch->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *on_device = batch->dev_memory + at;
    return batch->host + at;
}

static int32_t *place_ints(struct batch *batch, int n, const int32_t **on_device)
{
    const void *at;
    int32_t *host = place(batch, (size_t)n * sizeof(int32_t), &at);
    *on_device = at;
    return host;
}

/* Returns row_start [Q + 1] on the host. */
static const int32_t *build_rows(struct batch *batch, const struct plan *plan)
{
    const int Q = plan->n_rows, T = plan->n_tokens;
    struct batch_view *view = &batch->view;

    *view = (struct batch_view){.T = T, .Q = Q};
    view->position = batch->tokens_out;
    view->row = batch->tokens_out + T;
    batch->max_blocks = 0;
    for (int q = 0; q < Q; q++)
        if (plan->rows[q].request->n_blocks > batch->max_blocks)
            batch->max_blocks = plan->rows[q].request->n_blocks;

    int32_t *ids = place_ints(batch, T, &view->ids);
    int32_t *row_start = place_ints(batch, Q + 1, &view->row_start);
    int32_t *kv_len = place_ints(batch, Q, &view->kv_len);
    int32_t *table = place_ints(batch, Q * batch->max_blocks, &batch->block_table);
    int t = 0;
    for (int q = 0; q < Q; q++) {
        const struct plan_row *row = &plan->rows[q];
        const struct request *request = row->request;
        const size_t n = (size_t)row->n_tokens;
        int32_t *blocks = table + (size_t)q * (size_t)batch->max_blocks;

        row_start[q] = t;
        memcpy(ids + t, request->tokens + request->n_computed, n * sizeof *ids);
        t += row->n_tokens;
        kv_len[q] = request->n_computed + row->n_tokens;
        memcpy(blocks, request->blocks, (size_t)request->n_blocks * sizeof *blocks);
        for (int b = request->n_blocks; b < batch->max_blocks; b++) blocks[b] = 0;
        if (row->n_tokens > view->max_row) view->max_row = row->n_tokens;
        if (kv_len[q] > view->max_kv) view->max_kv = kv_len[q];
    }
    row_start[Q] = t;
    return row_start;
}

static void build_lora(struct batch *batch, const struct plan *plan, const int32_t *row_start,
                       const struct registry *registry)
{
    const int Q = plan->n_rows, T = plan->n_tokens;
    struct lora_view *lora = &batch->lora;
    int max_rank = 0;

    *lora = (struct lora_view){.factors = registry->dev_table, .L = registry->n_layers};
    for (int q = 0; q < Q; q++) {
        const struct registered *entry = plan->rows[q].request->adapter;
        batch->slot_of_row[q] = entry ? entry->slot : -1;
        if (entry && entry->adapter.max_rank > max_rank) max_rank = entry->adapter.max_rank;
    }
    struct segments segments = {
        .slot = place_ints(batch, T, &lora->slot),
        .order = place_ints(batch, T, &lora->order),
        .segment_slot = place_ints(batch, Q, &lora->segment_slot),
        .segment_start = place_ints(batch, Q + 1, &lora->segment_start),
    };
    segments_build(&segments, batch->slot_of_row, row_start, Q, batch->scratch);
    lora->n_segments = segments.n_segments;
    lora->n_tokens = segments.n_tokens;
    lora->max_segment = segments.max_segment;
    lora->max_rank = max_rank;
}

static bool draws(const struct plan_row *row)
{
    return row->samples && row->request->n_tokens < row->request->max_total;
}

/* Tokens of the rows that draw with a penalty. */
static size_t history_tokens(const struct plan *plan)
{
    size_t n = 0;
    for (int q = 0; q < plan->n_rows; q++)
        if (draws(&plan->rows[q]) && request_has_penalty(plan->rows[q].request))
            n += (size_t)plan->rows[q].request->n_tokens;
    return n;
}

static void build_samples(struct batch *batch, const struct plan *plan)
{
    const int32_t *last = NULL, *n_prompt = NULL, *start = NULL, *history = NULL;
    const void *sampling = NULL;
    int n = 0, t = 0, n_history = 0;

    for (int q = 0; q < plan->n_rows; q++) n += draws(&plan->rows[q]);
    int32_t *host_last = place_ints(batch, n, &last);
    int32_t *host_prompt = place_ints(batch, n, &n_prompt);
    int32_t *host_start = place_ints(batch, n + 1, &start);
    struct sampling *host_sampling = place(batch, (size_t)n * sizeof *host_sampling, &sampling);
    int32_t *host_history = place_ints(batch, (int)history_tokens(plan), &history);

    batch->n_samples = 0;
    for (int q = 0; q < plan->n_rows; q++) {
        const struct plan_row *row = &plan->rows[q];
        const struct request *request = row->request;
        t += row->n_tokens;
        if (!draws(row)) continue;

        const int i = batch->n_samples++;
        batch->sampled_row[i] = q;
        host_last[i] = t - 1;
        host_prompt[i] = request->n_prompt;
        host_start[i] = n_history;
        host_sampling[i] = request->sampling;
        host_sampling[i].draw = (uint32_t)request_n_output(request);
        if (!request_has_penalty(request)) continue;
        memcpy(host_history + n_history, request->tokens,
               (size_t)request->n_tokens * sizeof *host_history);
        n_history += request->n_tokens;
    }
    host_start[n] = n_history;
    batch->sample_tokens = last;
    batch->sample = (struct sample_view){
        .Q = n,
        .sampling = sampling,
        .history = history,
        .history_start = start,
        .n_prompt = n_prompt,
    };
}

/* Histories are the one part without a bound at open: most requests have none. Grows by more than
 * is asked, so that a long output does not grow it at each step. */
static mlora_status fit_history(struct batch *batch, size_t bytes)
{
    void *memory = NULL;

    if (bytes <= batch->history_capacity) return MLORA_OK;
    const size_t capacity = batch->capacity - batch->history_capacity + 2 * bytes;
    unsigned char *host = realloc(batch->host, capacity);
    if (!host) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes of token history", bytes);
    batch->host = host;
    const mlora_status status = batch->dev->ops->alloc(batch->dev, capacity, &memory);
    if (status != MLORA_OK) return status;
    batch->dev->ops->free(batch->dev, batch->dev_memory);
    batch->dev_memory = memory;
    batch->capacity = capacity;
    batch->history_capacity = 2 * bytes;
    return MLORA_OK;
}

mlora_status batch_build(struct batch *batch, const struct plan *plan,
                         const struct registry *registry)
{
    const mlora_status status = fit_history(batch, history_tokens(plan) * sizeof(int32_t));
    if (status != MLORA_OK) return status;

    batch->used = 0;
    const int32_t *row_start = build_rows(batch, plan);
    build_lora(batch, plan, row_start, registry);
    build_samples(batch, plan);
    assert(batch->used <= batch->capacity);
    batch->dev->ops->upload(batch->dev, batch->dev_memory, batch->host, batch->used);
    return MLORA_OK;
}
