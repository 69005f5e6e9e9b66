#include "engine/outputs.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

/* ---- memory --------------------------------------------------------------------------------- */

/* Sizes of the parts, for up to Q tokens. */
enum { N_PARTS = 5 };

struct part {
    void **at;
    size_t bytes;
};

static void list_parts(struct part parts[N_PARTS], struct outputs *outputs, int max_rows)
{
    const size_t one = (size_t)max_rows * 4, many = one * TOP_MAX; /* int32_t and float alike */

    parts[0] = (struct part){(void **)&outputs->rows, one};
    parts[1] = (struct part){(void **)&outputs->ids, one};
    parts[2] = (struct part){(void **)&outputs->logprob, one};
    parts[3] = (struct part){(void **)&outputs->top_ids, many};
    parts[4] = (struct part){(void **)&outputs->top_logprobs, many};
}

mlora_status outputs_open(struct mlora_engine *engine, int max_rows)
{
    const struct kernels *op = engine->dev->ops;
    const size_t Q = (size_t)max_rows;
    struct part parts[N_PARTS];
    void *logits = NULL;

    mlora_status status =
        op->alloc(engine->dev, Q * (size_t)engine->config.vocab_size * sizeof(float), &logits);
    engine->out.logits = logits;
    list_parts(parts, &engine->out, max_rows);
    for (int i = 0; i < N_PARTS && status == MLORA_OK; i++)
        status = op->alloc(engine->dev, parts[i].bytes, parts[i].at);
    for (int p = 0; p < 2; p++) {
        struct pass *pass = p == 0 ? &engine->pass : &engine->next;
        pass->fence = p;
        list_parts(parts, &pass->host, max_rows);
        for (int i = 0; i < N_PARTS && status == MLORA_OK; i++)
            status = op->alloc_host(engine->dev, parts[i].bytes, parts[i].at);
    }
    if (status != MLORA_OK) return status;
    engine->scored = malloc((Q > TOP_MAX ? Q : TOP_MAX) * sizeof *engine->scored);
    if (!engine->scored)
        return error_set(MLORA_ENOMEM, "out of memory: outputs of %d rows", max_rows);
    return MLORA_OK;
}

void outputs_close(struct mlora_engine *engine)
{
    const struct kernels *op = engine->dev->ops;
    struct part parts[N_PARTS];

    if (engine->out.logits) op->free(engine->dev, engine->out.logits);
    list_parts(parts, &engine->out, 0);
    for (int i = 0; i < N_PARTS; i++)
        if (*parts[i].at) op->free(engine->dev, *parts[i].at);
    for (int p = 0; p < 2; p++) {
        list_parts(parts, p == 0 ? &engine->pass.host : &engine->next.host, 0);
        for (int i = 0; i < N_PARTS; i++)
            if (*parts[i].at) op->free_host(engine->dev, *parts[i].at);
    }
    free(engine->scored);
}

/* ---- events --------------------------------------------------------------------------------- */

/* Fill in what all events of a request have in common, and call. */
static void send(struct request *request, mlora_event event)
{
    event.id = request->id;
    event.n_prompt_tokens = request->n_prompt;
    event.n_cached_tokens = request->n_cached;
    event.n_completion_tokens = request_n_output(request);
    event.n_drafted_tokens = request->n_drafted;
    event.n_accepted_tokens = request->n_accepted;
    event.text = buffer_text(&request->text);
    event.text_bytes = request->text.bytes;
    if (request->on_event) request->on_event(request->user, &event);
    request->text.bytes = 0;
}

mlora_status outputs_finish(struct mlora_engine *engine, struct request *request,
                            mlora_finish finish)
{
    const mlora_status status = stream_finish(&request->stream, &request->text);
    mlora_event event = {.token = -1, .finish = finish};

    if (finish == MLORA_FINISH_ERROR) {
        const char *failure = request->adapter ? registry_failure(request->adapter) : NULL;
        event.error =
            failure ? failure : "logits were not finite: the model or the adapter is damaged";
    }
    scheduler_remove(&engine->scheduler, request, &engine->kvcache);
    request->finish = finish;
    send(request, event);
    engine_free_request(request);
    return status;
}

/* ---- log-probabilities of prompts ----------------------------------------------------------- */

/* Log-probabilities of n consecutive tokens of the step, the first being `token`, of which the
 * targets are the request's tokens from `position` on. Left in engine->pass.host.logprob. */
static mlora_status score(struct mlora_engine *engine, const struct request *request, int token,
                          int position, int n)
{
    struct device *dev = engine->dev;
    const struct kernels *op = dev->ops;
    const size_t bytes = (size_t)n * sizeof(int32_t);
    const struct outputs *host = &engine->pass.host;

    for (int i = 0; i < n; i++) host->rows[i] = token + i;
    op->upload(dev, engine->out.rows, host->rows, bytes);
    op->upload(dev, engine->out.ids, request->tokens + position, bytes);
    forward_head(&engine->model, &engine->workspace, engine->out.logits, engine->out.rows, n,
                 batch_head_rows(&engine->batch, host->rows, n));
    op->logprobs(dev, engine->out.logprob, engine->out.top_ids, engine->out.top_logprobs,
                 engine->out.logits, engine->out.ids, n, engine->config.vocab_size, 0);
    op->download(dev, host->logprob, engine->out.logprob, bytes);
    return op->sync(dev);
}

static mlora_status score_row(struct mlora_engine *engine, struct request *request, int first,
                              int n_tokens)
{
    mlora_token_logprob *scored = engine->scored;
    const int end = request->n_computed + n_tokens; /* positions of this step end here */

    if (request->n_prompt_delivered == 0) { /* nothing comes before the first token */
        scored[0] = (mlora_token_logprob){request->tokens[0], NAN};
        request->n_prompt_delivered = 1;
        send(request,
             (mlora_event){.token = -1, .prompt_logprobs = scored, .n_prompt_logprobs = 1});
    }
    /* Position p - 1 tells the probability of token p. */
    while (request->n_prompt_delivered < request->n_prompt && request->n_prompt_delivered <= end) {
        const int p = request->n_prompt_delivered;
        int n = (request->n_prompt < end + 1 ? request->n_prompt : end + 1) - p;
        if (n > engine->scheduler.max_running) n = engine->scheduler.max_running;
        if (n <= 0) break;

        const mlora_status status =
            score(engine, request, first + p - 1 - request->n_computed, p, n);
        if (status != MLORA_OK) return status;
        for (int i = 0; i < n; i++)
            scored[i] = (mlora_token_logprob){request->tokens[p + i], engine->pass.host.logprob[i]};
        request->n_prompt_delivered += n;
        send(request,
             (mlora_event){.token = -1, .prompt_logprobs = scored, .n_prompt_logprobs = n});
    }
    return MLORA_OK;
}

mlora_status outputs_score_prompts(struct mlora_engine *engine, const struct plan *plan)
{
    mlora_status status = MLORA_OK;
    int first = 0; /* of the row's tokens in the step */

    for (int q = 0; q < plan->n_rows && status == MLORA_OK; q++) {
        struct request *request = plan->rows[q].request;
        if (request->prompt_logprobs)
            status = score_row(engine, request, first, plan->rows[q].n_tokens);
        first += plan->rows[q].n_tokens;
    }
    return status;
}

/* ---- the next tokens ------------------------------------------------------------------------ */

/* The most alternatives that a row which draws asks for; -1: none asks for log-probabilities. */
static int wanted_logprobs(const struct plan *plan)
{
    int n = -1;
    for (int q = 0; q < plan->n_rows; q++) {
        const struct plan_row *row = &plan->rows[q];
        if (row->n_draws > 0 && row->request->n_logprobs > n) n = row->request->n_logprobs;
    }
    return n;
}

/* Everything by which the head and the draw may differ from one step to another. */
struct draw_key {
    char what[8]; /* "draw" */
    struct lora_view lora;
    const void *tokens, *shrunk, *sampling, *history, *history_start, *n_prompt;
    int Q;
};

void outputs_draw(const struct model *model, const struct workspace *workspace, struct batch *batch,
                  const struct outputs *out)
{
    struct device *dev = model->dev;
    const struct sample_view *sample = &batch->sample;
    const int Q = batch->n_samples;
    const struct lora_view *lora = batch_head_rows(batch, batch->sample_tokens_host, Q);
    struct draw_key key;

    memset(&key, 0, sizeof key); /* the holes between members, too */
    memcpy(key.what, "draw", 4);
    memcpy(&key.lora, lora, sizeof key.lora);
    key.tokens = batch->sample_tokens;
    key.shrunk = workspace->shrunk;
    key.sampling = sample->sampling;
    key.history = sample->history;
    key.history_start = sample->history_start;
    key.n_prompt = sample->n_prompt;
    key.Q = Q;
    if (dev->ops->replay(dev, &key, sizeof key)) return;
    forward_head(model, workspace, out->logits, batch->sample_tokens, Q, lora);
    dev->ops->sample(dev, out->ids, out->logits, sample, model->config->vocab_size);
    dev->ops->record_end(dev);
}

void outputs_sample(struct mlora_engine *engine, const struct plan *plan, struct pass *pass)
{
    struct device *dev = engine->dev;
    const struct kernels *op = dev->ops;
    const struct outputs *out = &engine->out, *host = &pass->host;
    const int Q = engine->batch.n_samples, V = engine->config.vocab_size;
    const int n_top = wanted_logprobs(plan);

    if (Q > 0) outputs_draw(&engine->model, &engine->workspace, &engine->batch, out);
    if (Q > 0 && n_top >= 0) {
        const size_t n = (size_t)Q * (size_t)n_top;
        op->logprobs(dev, out->logprob, out->top_ids, out->top_logprobs, out->logits, out->ids, Q,
                     V, n_top);
        op->fetch(dev, host->logprob, out->logprob, (size_t)Q * sizeof *host->logprob, pass->fence);
        op->fetch(dev, host->top_ids, out->top_ids, n * sizeof *host->top_ids, pass->fence);
        op->fetch(dev, host->top_logprobs, out->top_logprobs, n * sizeof *host->top_logprobs,
                  pass->fence);
    }
    op->fetch(dev, host->ids, out->ids, (size_t)Q * sizeof *host->ids, pass->fence);
    pass->n_top = n_top;
}

static bool is_eos(const struct mlora_engine *engine, int32_t id)
{
    for (int i = 0; i < engine->n_eos; i++)
        if (engine->eos[i] == id) return true;
    return false;
}

/* Draw i was of this request: append the token, tell, and end the request if it is done. */
static mlora_status deliver(struct mlora_engine *engine, struct request *request, int i,
                            bool *ended)
{
    const struct outputs *host = &engine->pass.host;
    const int32_t id = host->ids[i];
    mlora_token_logprob *top = engine->scored;
    mlora_event event = {.token = id};
    mlora_finish finish = MLORA_RUNNING;
    mlora_status status = MLORA_OK;

    *ended = id < 0;
    if (id < 0) return outputs_finish(engine, request, MLORA_FINISH_ERROR);
    request->tokens[request->n_tokens++] = id;
    engine->stats.n_generated_tokens++;

    if (is_eos(engine, id) && !request->ignore_eos)
        finish = MLORA_FINISH_STOP;
    else
        status = stream_push(&request->stream, &request->text, id);
    if (request->stream.stopped)
        finish = MLORA_FINISH_STOP;
    else if (finish == MLORA_RUNNING && request->n_tokens == request->max_total)
        finish = MLORA_FINISH_LENGTH;

    if (request->n_logprobs >= 0) {
        event.logprob = host->logprob[i];
        event.top = top;
        event.n_top = request->n_logprobs;
        if (event.n_top > engine->config.vocab_size) event.n_top = engine->config.vocab_size;
        for (int k = 0; k < event.n_top; k++) {
            const int at = i * engine->pass.n_top + k;
            top[k] = (mlora_token_logprob){host->top_ids[at], host->top_logprobs[at]};
        }
    }
    send(request, event);
    *ended = finish != MLORA_RUNNING;
    if (*ended && status == MLORA_OK) status = outputs_finish(engine, request, finish);
    return status;
}

/* The draws of a row begin with number i. What follows the end of a request is dropped. */
static mlora_status deliver_row(struct mlora_engine *engine, const struct plan_row *row, int i)
{
    struct request *request = row->request;
    const int n_accepted = count_accepted(request->tokens + request->n_tokens,
                                          engine->pass.host.ids + i, row->n_drafts);
    mlora_status status = MLORA_OK;
    bool ended = false;

    scheduler_computed(&engine->scheduler, &engine->kvcache, row, n_accepted);
    if (row->n_drafts > 0)
        speculate_learn(&engine->speculation, request, row->n_drafts, n_accepted);
    for (int j = 0; j <= n_accepted && !ended && status == MLORA_OK; j++)
        status = deliver(engine, request, i + j, &ended);
    return status;
}

mlora_status outputs_deliver(struct mlora_engine *engine, const struct plan *plan)
{
    mlora_status status = MLORA_OK;
    int i = 0; /* of the draws */

    for (int q = 0; q < plan->n_rows && status == MLORA_OK; q++) {
        const struct plan_row row = plan->rows[q]; /* as it is before its request may end */
        if (row.request && row.n_draws > 0) {
            status = deliver_row(engine, &row, i);
        } else if (row.request) {
            scheduler_computed(&engine->scheduler, &engine->kvcache, &row, 0);
            if (row.samples) /* there is nothing to generate: it was to be scored */
                status = outputs_finish(engine, row.request, MLORA_FINISH_LENGTH);
        }
        i += row.n_draws;
    }
    return status;
}
