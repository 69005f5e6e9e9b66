#include "engine/batch.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/segments.h"

enum { ALIGNMENT = 16, HEAD_ARRAYS = 4 };

/* Counts that grow with every token are rounded up, so that steps of the same rows have the same
 * shape for long, and a backend can replay what it recorded. */
static int round_blocks(int n_blocks)
{
    int rounded = 16;
    while (rounded < n_blocks) rounded *= 2;
    return rounded;
}

static int round_kv(int n_tokens)
{
    return (n_tokens + 255) / 256 * 256;
}

/* Each of the head's arrays: one of segments has two more than rows. */
static size_t head_pitch(int max_rows)
{
    return (size_t)max_rows + 2;
}

mlora_status batch_open(struct batch *out, struct device *dev, int max_tokens, int max_seqs,
                        int max_rows, int max_model_len)
{
    const size_t Q = (size_t)max_rows, T = (size_t)max_tokens;
    const size_t table = (size_t)max_seqs * (size_t)round_blocks(kvcache_blocks_for(max_model_len));
    const size_t head_bytes = HEAD_ARRAYS * head_pitch(max_rows) * sizeof(int32_t);
    struct batch batch = {.dev = dev, .max_rows = max_rows};
    void *memory = NULL;

    /* ids, slot, order [T]; row_start, kv_len, two of segments, samples, two of histories [Q];
     * sampling [Q]; block table; and padding between them. Histories grow it at need. */
    batch.capacity = (3 * T + 7 * (Q + 2) + table) * sizeof(int32_t) + Q * sizeof(struct sampling) +
                     32 * ALIGNMENT;
    batch.host = malloc(batch.capacity);
    batch.slot_of_row = malloc(Q * sizeof(int32_t));
    batch.first_of_row = malloc(Q * sizeof(int32_t));
    batch.head_host = malloc(head_bytes);
    batch.counting = malloc((Q + 1) * sizeof(int32_t));
    batch.scratch = malloc(Q * sizeof(int32_t));
    mlora_status status = MLORA_OK;
    if (!batch.host || !batch.slot_of_row || !batch.first_of_row || !batch.scratch ||
        !batch.head_host || !batch.counting)
        status = error_set(MLORA_ENOMEM, "out of memory: a batch of %d rows", max_rows);
    for (int q = 0; q <= max_rows && status == MLORA_OK; q++) batch.counting[q] = q;
    if (status == MLORA_OK) status = dev->ops->alloc(dev, batch.capacity, &memory);
    batch.dev_memory = memory;
    if (status == MLORA_OK) {
        memory = NULL;
        status = dev->ops->alloc(dev, 2 * T * sizeof(int32_t), &memory);
        batch.tokens_out = memory;
    }
    if (status == MLORA_OK) {
        memory = NULL;
        status = dev->ops->alloc(dev, head_bytes, &memory);
        batch.head_dev = memory;
    }
    if (status != MLORA_OK) batch_close(&batch);
    *out = batch;
    return status;
}

void batch_close(struct batch *batch)
{
    if (batch->dev_memory) batch->dev->ops->free(batch->dev, batch->dev_memory);
    if (batch->tokens_out) batch->dev->ops->free(batch->dev, batch->tokens_out);
    if (batch->head_dev) batch->dev->ops->free(batch->dev, batch->head_dev);
    free(batch->host);
    free(batch->slot_of_row);
    free(batch->first_of_row);
    free(batch->head_host);
    free(batch->counting);
    free(batch->scratch);
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

/* The one part that an op writes to: it puts in what the step before has drawn. */
static int32_t *place_ids(struct batch *batch, int T)
{
    batch->view.ids = (int32_t *)(void *)(batch->dev_memory + batch->used);
    const int32_t *same;
    return place_ints(batch, T, &same);
}

/* Returns row_start [Q + 1] on the host. */
static const int32_t *build_rows(struct batch *batch, const struct plan *plan)
{
    const int Q = plan->n_rows, T = plan->n_tokens;
    struct batch_view *view = &batch->view;

    *view = (struct batch_view){.T = T, .Q = Q, .drawn = batch->drawn};
    view->position = batch->tokens_out;
    view->row = batch->tokens_out + T;
    batch->max_blocks = 0;
    for (int q = 0; q < Q; q++)
        if (plan->rows[q].request->kv.n_blocks > batch->max_blocks)
            batch->max_blocks = plan->rows[q].request->kv.n_blocks;
    batch->max_blocks = round_blocks(batch->max_blocks);

    int32_t *ids = place_ids(batch, T);
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
        if (row->feed < 0)
            memcpy(ids + t, request->tokens + row->first, n * sizeof *ids);
        else
            ids[t] = -1 - row->feed;
        t += row->n_tokens;
        kv_len[q] = row->first + row->n_tokens;
        for (int b = 0; b < request->kv.n_blocks; b++)
            blocks[b] = request->kv.blocks[b] * batch->kv_stride;
        for (int b = request->kv.n_blocks; b < batch->max_blocks; b++) blocks[b] = 0;
        if (row->n_tokens > view->max_row) view->max_row = row->n_tokens;
        if (kv_len[q] > view->max_kv) view->max_kv = kv_len[q];
    }
    row_start[Q] = t;
    view->max_kv = round_kv(view->max_kv);
    return row_start;
}

static void count_segments(struct lora_view *lora, const struct segments *segments)
{
    lora->n_segments = segments->n_segments;
    lora->n_tokens = segments->n_tokens;
    lora->max_segment = segments->max_segment;
    lora->has_base_segments = segments->has_base_segments;
}

static void build_lora(struct batch *batch, const struct plan *plan, const int32_t *row_start,
                       const struct registry *registry)
{
    const int Q = plan->n_rows, T = plan->n_tokens;
    struct lora_view *lora = &batch->lora;

    memset(lora, 0, sizeof *lora); /* its bytes are part of a recording's key */
    lora->factors = registry->pool.dev_table;
    lora->own = registry->pool.dev_own;
    lora->L = registry->pool.n_layers + 1;
    lora->mode = batch->lora_mode;
    lora->n_rows = T;
    lora->is_plain = true;
    for (int q = 0; q < Q; q++) {
        const struct request *request = plan->rows[q].request;
        const struct registered *entry = request->adapter;
        const int before = entry ? request->adapter_from - plan->rows[q].first : 0;

        batch->slot_of_row[q] = entry ? entry->resident.slot : -1;
        batch->first_of_row[q] = before >= plan->rows[q].n_tokens
                                     ? row_start[q + 1]
                                     : row_start[q] + (before > 0 ? before : 0);
        if (!entry) continue;
        if (entry->adapter.max_rank > lora->max_rank) lora->max_rank = entry->adapter.max_rank;
        lora->changes_embedding |= entry->adapter.changes_embedding;
        lora->changes_head |= entry->adapter.changes_head;
        lora->changes_norms |= entry->adapter.changes_norms;
        lora->expands_more |= entry->adapter.expands_more;
        lora->is_plain &= entry->adapter.is_plain;
    }
    struct segments segments = {
        .slot = place_ints(batch, T, &lora->slot),
        .order = place_ints(batch, T, &lora->order),
        .segment_slot = place_ints(batch, Q + 1, &lora->segment_slot),
        .segment_start = place_ints(batch, Q + 2, &lora->segment_start),
    };
    const struct segment_rows rows = {row_start, batch->slot_of_row, batch->first_of_row, Q};
    segments_build(&segments, &rows, batch->scratch);
    count_segments(lora, &segments);
    batch->slot_of_token = segments.slot;
    batch->n_adapters = segments.n_adapters;
}

const struct lora_view *batch_head_rows(struct batch *batch, const int32_t *tokens, int n)
{
    const size_t pitch = head_pitch(batch->max_rows);
    struct lora_view *lora = &batch->head_lora;
    int32_t *host = batch->head_host;

    assert(n <= batch->max_rows);
    *lora = batch->lora;
    lora->n_rows = n;
    lora->n_segments = lora->n_tokens = lora->max_segment = 0;
    if (!lora->changes_head) return lora;

    for (int i = 0; i < n; i++) batch->slot_of_row[i] = batch->slot_of_token[tokens[i]];
    const struct segment_rows rows = {batch->counting, batch->slot_of_row, batch->counting, n};
    struct segments segments = {
        .slot = host,
        .order = host + pitch,
        .segment_slot = host + 2 * pitch,
        .segment_start = host + 3 * pitch,
    };
    segments_build(&segments, &rows, batch->scratch); /* rows of one token each */
    batch->dev->ops->upload(batch->dev, batch->head_dev, host, HEAD_ARRAYS * pitch * sizeof *host);
    lora->slot = batch->head_dev;
    lora->order = batch->head_dev + pitch;
    lora->segment_slot = batch->head_dev + 2 * pitch;
    lora->segment_start = batch->head_dev + 3 * pitch;
    count_segments(lora, &segments);
    return lora;
}

/* Tokens of all histories: the row's own, and for each guess those before it, too. */
static size_t history_tokens(const struct plan *plan)
{
    size_t n = 0;
    for (int q = 0; q < plan->n_rows; q++)
        for (int j = 0; j < plan->rows[q].n_draws; j++)
            if (request_has_penalty(plan->rows[q].request))
                n += (size_t)(plan->rows[q].request->n_tokens + j);
    return n;
}

static void build_samples(struct batch *batch, const struct plan *plan)
{
    const int32_t *tokens = NULL, *n_prompt = NULL, *start = NULL, *history = NULL;
    const void *sampling = NULL;
    int n = 0, t = 0, n_history = 0;

    for (int q = 0; q < plan->n_rows; q++) n += plan->rows[q].n_draws;
    assert(n <= batch->max_rows);
    int32_t *host_tokens = place_ints(batch, n, &tokens);
    int32_t *host_prompt = place_ints(batch, n, &n_prompt);
    int32_t *host_start = place_ints(batch, n + 1, &start);
    struct sampling *host_sampling = place(batch, (size_t)n * sizeof *host_sampling, &sampling);
    int32_t *host_history = place_ints(batch, (int)history_tokens(plan), &history);

    batch->n_samples = 0;
    for (int q = 0; q < plan->n_rows; q++) {
        const struct plan_row *row = &plan->rows[q];
        const struct request *request = row->request;
        t += row->n_tokens;
        for (int j = 0; j < row->n_draws; j++) {
            const int i = batch->n_samples++;
            const int n_before = row->first + row->n_tokens - row->n_drafts + j;
            host_tokens[i] = t - 1 - row->n_drafts + j;
            host_prompt[i] = request->n_prompt;
            host_start[i] = n_history;
            host_sampling[i] = request->sampling;
            host_sampling[i].draw = (uint32_t)(n_before - request->n_prompt);
            if (!request_has_penalty(request)) continue;
            memcpy(host_history + n_history, request->tokens,
                   (size_t)n_before * sizeof *host_history);
            n_history += n_before;
        }
    }
    host_start[n] = n_history;
    batch->sample_tokens = tokens;
    batch->sample_tokens_host = host_tokens;
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
