/* What a step is. */
#include "engine/engine.h"

#include <stdlib.h>
#include <time.h>

#include "engine/base/error.h"
#include "engine/outputs.h"

/* ---- from any thread ------------------------------------------------------------------------ */

mlora_status engine_submit(struct mlora_engine *engine, struct request *request, uint64_t *id)
{
    const int room = engine->scheduler.max_running + engine->max_queue;

    pthread_mutex_lock(&engine->lock);
    const int n = engine->n_scheduled + engine->n_submitted;
    if (n >= room) {
        pthread_mutex_unlock(&engine->lock);
        return error_set(MLORA_EBUSY,
                         "%d requests run or wait, as many as max_num_seqs and max_queue allow "
                         "(%d and %d): try again when some have ended, or raise max_queue",
                         n, engine->scheduler.max_running, engine->max_queue);
    }
    *id = request->id = ++engine->last_id;
    if (engine->last_submitted)
        engine->last_submitted->next = request;
    else
        engine->first_submitted = request;
    engine->last_submitted = request;
    engine->n_submitted++;
    pthread_mutex_unlock(&engine->lock);
    return MLORA_OK; /* the request may be gone already */
}

void engine_cancel(struct mlora_engine *engine, uint64_t id)
{
    pthread_mutex_lock(&engine->lock);
    if (engine->n_cancelled == engine->cancelled_capacity) {
        const int capacity = engine->cancelled_capacity ? 2 * engine->cancelled_capacity : 16;
        uint64_t *ids = realloc(engine->cancelled, (size_t)capacity * sizeof *ids);
        if (!ids) { /* without memory the request runs to its end */
            pthread_mutex_unlock(&engine->lock);
            return;
        }
        engine->cancelled = ids;
        engine->cancelled_capacity = capacity;
    }
    engine->cancelled[engine->n_cancelled++] = id;
    pthread_mutex_unlock(&engine->lock);
}

/* ---- the step ------------------------------------------------------------------------------- */

static int n_scheduled(const struct scheduler *scheduler)
{
    return scheduler->n_running + scheduler->fair.n_waiting;
}

static mlora_status take_submitted(struct mlora_engine *engine)
{
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK) {
        pthread_mutex_lock(&engine->lock);
        struct request *request = engine->first_submitted;
        if (request) {
            engine->first_submitted = request->next;
            if (!request->next) engine->last_submitted = NULL;
            engine->n_submitted--;
            engine->n_scheduled++;
        }
        pthread_mutex_unlock(&engine->lock);
        if (!request) break;

        if (request->adapter) registry_prefetch(request->adapter);
        status = scheduler_add(&engine->scheduler, request);
        if (status != MLORA_OK) engine_free_request(request);
    }
    return status;
}

/* One at a time, as the callback of a last event may cancel others. */
static mlora_status take_cancelled(struct mlora_engine *engine)
{
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK) {
        uint64_t id = 0;
        pthread_mutex_lock(&engine->lock);
        if (engine->n_cancelled > 0) id = engine->cancelled[--engine->n_cancelled];
        pthread_mutex_unlock(&engine->lock);
        if (id == 0) break;

        struct request *request = scheduler_find(&engine->scheduler, id);
        if (request) status = outputs_finish(engine, request, MLORA_FINISH_CANCEL);
    }
    return status;
}

/* What the loader has brought can be used; requests whose adapter it could not bring end. */
static mlora_status begin_adapters(struct mlora_engine *engine)
{
    struct scheduler *scheduler = &engine->scheduler;
    mlora_status status = MLORA_OK;

    registry_begin_step(&engine->registry);
    while (engine->registry.any_failed && status == MLORA_OK) {
        struct request *failed = scheduler_failed(scheduler);
        engine->registry.any_failed = failed != NULL;
        if (failed) status = outputs_finish(engine, failed, MLORA_FINISH_ERROR);
    }
    return status;
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Tokens of the plan that belong to prompts. */
static int n_prompt_tokens(const struct plan *plan)
{
    int n = 0;
    for (int q = 0; q < plan->n_rows; q++)
        if (plan->rows[q].request->n_computed < plan->rows[q].request->n_prompt)
            n += plan->rows[q].n_tokens;
    return n;
}

/* One pass: plan, build, forward, sample, deliver. */
static mlora_status run(struct mlora_engine *engine)
{
    const double start = seconds_now();
    const struct plan *plan = scheduler_plan(&engine->scheduler, &engine->kvcache);
    const struct batch *batch = &engine->batch;

    scheduler_want_adapters(&engine->scheduler);
    if (plan->n_rows == 0) {
        registry_wait(&engine->registry);
        return MLORA_OK;
    }
    const int n_prompt = n_prompt_tokens(plan);

    mlora_status status =
        speculate_plan(&engine->speculation, &engine->scheduler, &engine->kvcache);
    if (status != MLORA_OK) return status;
    status = batch_build(&engine->batch, plan, &engine->registry);
    if (status != MLORA_OK) return status;
    forward(&engine->model, &engine->workspace, &engine->kv_cache, &batch->view, batch->block_table,
            batch->max_blocks, &batch->lora);
    status = outputs_score_prompts(engine, plan);
    if (status != MLORA_OK) return status;
    status = outputs_sample(engine, plan);
    if (status != MLORA_OK) return status;

    const double seconds = seconds_now() - start;
    engine->stats.n_steps++;
    engine->stats.n_prompt_tokens += n_prompt;
    engine->stats.n_adapter_turns += batch->lora.n_segments;
    if (n_prompt > 0) {
        engine->stats.prompt_seconds += seconds;
    } else {
        engine->stats.decode_seconds += seconds;
        engine->stats.n_decode_steps++;
    }
    return outputs_deliver(engine, plan);
}

mlora_status engine_step(struct mlora_engine *engine, int *n_active)
{
    if (engine->failed)
        return error_set(MLORA_EDEVICE, "the engine failed before: it can only be closed");

    mlora_status status = begin_adapters(engine);
    if (status == MLORA_OK) status = take_submitted(engine);
    if (status == MLORA_OK) status = take_cancelled(engine);
    if (status == MLORA_OK) status = run(engine);
    if (status != MLORA_OK) engine->failed = true;
    registry_sweep(&engine->registry);

    pthread_mutex_lock(&engine->lock);
    engine->n_scheduled = n_scheduled(&engine->scheduler);
    if (n_active) *n_active = engine->n_scheduled + engine->n_submitted;
    pthread_mutex_unlock(&engine->lock);
    return status;
}
