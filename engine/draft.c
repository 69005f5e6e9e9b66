#include "engine/draft.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

/* ---- the same vocabulary -------------------------------------------------------------------- */

/* All that tells one token from another: what it adds to a text, and how it is written. */
static mlora_status token_text(const struct tokenizer *tokenizer, struct buffer *out, int32_t id)
{
    out->bytes = 0;
    const mlora_status status = tokenizer_piece(tokenizer, out, id);
    if (status != MLORA_OK || id >= tokenizer_vocab_size(tokenizer)) return status;
    return tokenizer_decode(tokenizer, out, &id, 1, true);
}

static mlora_status compare_tokens(const struct tokenizer *a, const struct tokenizer *b,
                                   const char *directory)
{
    const int n = tokenizer_vocab_size(a);
    struct buffer text_a = {0}, text_b = {0};
    mlora_status status = MLORA_OK;

    if (n != tokenizer_vocab_size(b))
        return error_set(MLORA_EINVAL,
                         "%s: its tokenizer has %d tokens, the model's has %d: a draft model needs "
                         "the same vocabulary",
                         directory, tokenizer_vocab_size(b), n);
    for (int32_t id = 0; id < n && status == MLORA_OK; id++) {
        status = token_text(a, &text_a, id);
        if (status == MLORA_OK) status = token_text(b, &text_b, id);
        if (status == MLORA_OK &&
            (text_a.bytes != text_b.bytes ||
             memcmp(buffer_text(&text_a), buffer_text(&text_b), text_a.bytes) != 0))
            status = error_set(MLORA_EINVAL,
                               "%s: token %d is not what it is in the model's tokenizer: a draft "
                               "model needs the same vocabulary",
                               directory, id);
    }
    buffer_free(&text_a);
    buffer_free(&text_b);
    return status;
}

static mlora_status check_vocabulary(const struct draft_model *draft,
                                     const struct draft_options *options)
{
    const int needed = options->model->config->vocab_size;
    struct tokenizer *tokenizer = NULL;

    if (draft->config.vocab_size != needed)
        return error_set(MLORA_EINVAL,
                         "%s/config.json: vocab_size is %d, the model's is %d: a draft model needs "
                         "the same vocabulary",
                         options->directory, draft->config.vocab_size, needed);
    mlora_status status = tokenizer_open(&tokenizer, options->directory);
    if (status != MLORA_OK) return status;
    status = compare_tokens(options->tokenizer, tokenizer, options->directory);
    tokenizer_close(tokenizer);
    return status;
}

/* ---- opening -------------------------------------------------------------------------------- */

mlora_status draft_load(struct draft_model *draft, const struct draft_options *options)
{
    struct device *dev = options->model->dev;

    draft->registry = options->registry;
    draft->out = options->out;
    draft->host = options->host;
    draft->model = *options->model;
    draft->model.config = &draft->config;
    draft->model.weights = &draft->weights;
    mlora_status status = model_config_read(&draft->config, options->directory);
    if (status == MLORA_OK) status = check_vocabulary(draft, options);
    if (status != MLORA_OK) return status;
    status = options->random_weights ? weights_random(&draft->weights, dev, &draft->config)
                                     : weights_load(&draft->weights, dev, options->directory,
                                                    &draft->config, NULL, NULL);
    draft->max_tokens = options->max_tokens;
    if (status == MLORA_OK)
        status = workspace_open(&draft->workspace, &draft->model, options->max_tokens);
    return status;
}

mlora_status draft_open(struct draft_model *draft, int n_blocks, int max_seqs, int max_model_len)
{
    const size_t per_sequence = (size_t)kvcache_blocks_for(max_model_len);
    const struct hash_key unused = {{0}};

    draft->max_seqs = max_seqs;
    draft->sequences = calloc((size_t)max_seqs, sizeof *draft->sequences);
    draft->blocks = malloc((size_t)max_seqs * per_sequence * sizeof *draft->blocks);
    draft->plan.rows = calloc((size_t)max_seqs, sizeof *draft->plan.rows);
    if (!draft->sequences || !draft->blocks || !draft->plan.rows)
        return error_set(MLORA_ENOMEM, "out of memory: a draft model for %d requests", max_seqs);
    for (int i = 0; i < max_seqs; i++)
        draft->sequences[i].shadow.kv.blocks = draft->blocks + (size_t)i * per_sequence;

    mlora_status status = kv_cache_open(&draft->kv_cache, &draft->model, n_blocks, 0);
    if (status == MLORA_OK) status = kvcache_open(&draft->kvcache, n_blocks, false, unused);
    if (status == MLORA_OK)
        status = batch_open(&draft->batch, draft->model.dev, draft->max_tokens, max_seqs, max_seqs,
                            max_model_len);
    draft->batch.kv_stride = draft->kv_cache.stride;
    return status;
}

void draft_close(struct draft_model *draft)
{
    struct device *dev = draft->model.dev;

    if (dev) {
        batch_close(&draft->batch);
        kv_cache_close(&draft->kv_cache, dev);
        workspace_close(&draft->workspace, dev);
        weights_free(&draft->weights, dev);
    }
    kvcache_close(&draft->kvcache);
    free(draft->sequences);
    free(draft->blocks);
    free(draft->plan.rows);
    *draft = (struct draft_model){0};
}

/* ---- sequences ------------------------------------------------------------------------------ */

/* A request's own; NULL: it has none. */
static struct draft_sequence *find_sequence(struct draft_model *draft,
                                            const struct request *request)
{
    struct draft_sequence *sequence = &draft->sequences[request->draft_sequence];
    return sequence->id == request->id ? sequence : NULL;
}

/* Running requests have a row in every step once they draw tokens: the others are gone. */
static void release_gone(struct draft_model *draft, const struct plan *plan)
{
    draft->n_steps++;
    for (int q = 0; q < plan->n_rows; q++) {
        struct draft_sequence *sequence = find_sequence(draft, plan->rows[q].request);
        if (sequence) sequence->used_at = draft->n_steps;
    }
    for (int i = 0; i < draft->max_seqs; i++) {
        struct draft_sequence *sequence = &draft->sequences[i];
        if (sequence->id == 0 || sequence->used_at == draft->n_steps) continue;
        kvcache_release(&draft->kvcache, &sequence->shadow.kv);
        sequence->id = 0;
    }
}

/* One that is unused is there: rows of the plan are at most as many. */
static struct draft_sequence *take_sequence(struct draft_model *draft, struct request *request)
{
    int i = 0;

    while (draft->sequences[i].id != 0) i++;
    struct draft_sequence *sequence = &draft->sequences[i];
    const struct kv_run kv = sequence->shadow.kv;
    sequence->shadow = (struct request){
        .tokens = request->tokens,
        .n_prompt = request->n_prompt,
        .max_total = request->max_total,
        .kv = kv,
        .sampling = {.repetition_penalty = 1, .top_p = 1}, /* greedy */
    };
    sequence->id = request->id;
    sequence->used_at = draft->n_steps;
    request->draft_sequence = i;
    return sequence;
}

/* Have blocks for n tokens after the request's; false: there are too few. */
static bool begin_sequence(struct draft_model *draft, struct request *request, int n)
{
    struct draft_sequence *sequence = find_sequence(draft, request);

    if (!sequence) sequence = take_sequence(draft, request);
    sequence->shadow.n_tokens = request->n_tokens;
    return request->n_tokens + n <= draft->config.max_position &&
           kvcache_extend(&draft->kvcache, &sequence->shadow.kv, request->n_tokens + n);
}

void draft_rewind(struct draft_model *draft, const struct request *request)
{
    struct draft_sequence *sequence = find_sequence(draft, request);

    if (sequence && sequence->shadow.n_computed > request->n_computed)
        sequence->shadow.n_computed = request->n_computed;
}

/* ---- passes --------------------------------------------------------------------------------- */

/* Rows for pass `pass`, the first of which is 0: all pending tokens of those that want another
 * guess, as far as a pass goes. */
static void plan_pass(struct draft_model *draft, const struct guess *guesses, int n_guesses,
                      int pass)
{
    struct plan *plan = &draft->plan;

    plan->n_rows = plan->n_tokens = 0;
    for (int i = 0; i < n_guesses; i++) {
        if (guesses[i].n <= pass) continue;
        struct request *shadow = &find_sequence(draft, guesses[i].row->request)->shadow;
        const int pending = shadow->n_tokens - shadow->n_computed;
        const int room = draft->max_tokens - plan->n_tokens;
        const int n = pending < room ? pending : room;
        if (n == 0) continue;
        plan->rows[plan->n_rows++] = (struct plan_row){.request = shadow,
                                                       .first = shadow->n_computed,
                                                       .n_tokens = n,
                                                       .samples = n == pending,
                                                       .n_draws = n == pending,
                                                       .feed = -1};
        plan->n_tokens += n;
    }
}

static mlora_status run_pass(struct draft_model *draft)
{
    struct device *dev = draft->model.dev;
    struct batch *batch = &draft->batch;

    mlora_status status = batch_build(batch, &draft->plan, draft->registry);
    if (status != MLORA_OK) return status;
    forward(&draft->model, &draft->workspace, &draft->kv_cache, &batch->view, batch->block_table,
            batch->max_blocks, &batch->lora);
    if (batch->n_samples > 0) {
        outputs_draw(&draft->model, &draft->workspace, batch, draft->out);
        dev->ops->download(dev, draft->host->ids, draft->out->ids,
                           (size_t)batch->n_samples * sizeof *draft->host->ids);
    }
    return dev->ops->sync(dev);
}

/* Rows of the pass are computed; those that are complete have another guess. */
static void keep_pass(struct draft_model *draft)
{
    int i = 0; /* of the draws */

    for (int q = 0; q < draft->plan.n_rows; q++) {
        const struct plan_row *row = &draft->plan.rows[q];
        row->request->n_computed += row->n_tokens;
        if (!row->samples) continue;
        const int32_t id = draft->host->ids[i++];
        if (id >= 0) row->request->tokens[row->request->n_tokens++] = id;
    }
}

mlora_status draft_run(struct draft_model *draft, const struct plan *plan, struct guess *guesses,
                       int n_guesses)
{
    mlora_status status = MLORA_OK;

    release_gone(draft, plan);
    for (int i = 0; i < n_guesses; i++)
        if (!begin_sequence(draft, guesses[i].row->request, guesses[i].n)) guesses[i].n = 0;
    for (int pass = 0; status == MLORA_OK; pass++) {
        plan_pass(draft, guesses, n_guesses, pass);
        if (draft->plan.n_rows == 0) break;
        status = run_pass(draft);
        if (status != MLORA_OK) break;
        keep_pass(draft);
        for (int i = 0; i < n_guesses; i++) { /* those that got none in this pass get no more */
            const struct request *request = guesses[i].row->request;
            if (guesses[i].n <= pass) continue;
            const int made = find_sequence(draft, request)->shadow.n_tokens - request->n_tokens;
            if (made <= pass) guesses[i].n = made;
        }
    }
    return status;
}
