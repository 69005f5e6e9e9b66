/* What a step is. */
#include "engine/engine.h"

#include <stdlib.h>
#include <time.h>

#include "engine/base/error.h"
#include "engine/outputs.h"
#include "kernels/profile.h"

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

/* One at a time, as the callback of a last event may cancel others. An id that is not known may be
 * of a request that was submitted and not taken yet: it stays. */
static mlora_status take_cancelled(struct mlora_engine *engine)
{
    mlora_status status = MLORA_OK;

    for (int i = 0; status == MLORA_OK;) {
        pthread_mutex_lock(&engine->lock);
        const uint64_t id = i < engine->n_cancelled ? engine->cancelled[i] : 0;
        struct request *request = id ? scheduler_find(&engine->scheduler, id) : NULL;
        if (id && (request || engine->n_submitted == 0))
            engine->cancelled[i] = engine->cancelled[--engine->n_cancelled];
        else
            i++;
        pthread_mutex_unlock(&engine->lock);
        if (id == 0) break;
        if (request) status = outputs_finish(engine, request, MLORA_FINISH_CANCEL);
    }
    return status;
}

/* What other threads have asked for. New requests have their adapters brought, which takes memory
 * that a step on its way may still use: they wait until there is none. */
static mlora_status take_inbox(struct mlora_engine *engine)
{
    const bool idle = engine->scheduler.plan.n_rows == 0;
    const mlora_status status = idle ? take_submitted(engine) : MLORA_OK;

    return status == MLORA_OK ? take_cancelled(engine) : status;
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
        if (plan->rows[q].first < plan->rows[q].request->n_prompt) n += plan->rows[q].n_tokens;
    return n;
}

/* Start a planned step: build, forward, sample. */
static mlora_status start_pass(struct mlora_engine *engine, const struct plan *plan,
                               struct pass *pass)
{
    const struct batch *batch = &engine->batch;

    pass->n_prompt_tokens = n_prompt_tokens(plan);
    mlora_status status = batch_build(&engine->batch, plan, &engine->registry);
    if (status != MLORA_OK) return status;
    pass->n_adapters = batch->n_adapters;
    forward(&engine->model, &engine->workspace, &engine->kv_cache, &batch->view, batch->block_table,
            batch->max_blocks, &batch->lora);
    if (pass->n_prompt_tokens > 0) status = outputs_score_prompts(engine, plan);
    if (status == MLORA_OK) outputs_sample(engine, plan, pass);
    return status;
}

/* Plan a step, with nothing on its way, and start it. Without rows there is nothing to do. */
static mlora_status start_fresh(struct mlora_engine *engine)
{
    engine->pass.start = seconds_now();
    const struct plan *plan = scheduler_plan(&engine->scheduler, &engine->kvcache);

    scheduler_group_rows(&engine->scheduler);
    scheduler_want_adapters(&engine->scheduler);
    if (plan->n_rows == 0) {
        registry_wait(&engine->registry);
        return MLORA_OK;
    }
    const mlora_status status = speculate_plan(&engine->speculation, &engine->scheduler,
                                               &engine->kvcache, engine->plans_ahead);
    return status == MLORA_OK ? start_pass(engine, plan, &engine->pass) : status;
}

/* Start the step after the one on its way, if nothing that it depends on is still to come. */
static mlora_status start_next(struct mlora_engine *engine)
{
    struct scheduler *scheduler = &engine->scheduler;

    if (!engine->plans_ahead || profile_is_on(engine->dev)) return MLORA_OK;
    pthread_mutex_lock(&engine->lock);
    const bool has_new = engine->n_submitted > 0;
    pthread_mutex_unlock(&engine->lock);
    engine->next.start = seconds_now();
    if (has_new || !speculate_rests(&engine->speculation, &scheduler->plan) ||
        !scheduler_plan_next(scheduler, &engine->kvcache))
        return MLORA_OK;
    speculate_skip(&engine->speculation, &scheduler->next);
    return start_pass(engine, &scheduler->next, &engine->next);
}

static void count_step(struct mlora_engine *engine)
{
    const struct pass *pass = &engine->pass;
    const double now = seconds_now();
    const double seconds = now - (pass->start > engine->last_end ? pass->start : engine->last_end);

    engine->last_end = now;
    engine->stats.n_steps++;
    engine->stats.n_prompt_tokens += pass->n_prompt_tokens;
    engine->stats.n_adapter_turns += pass->n_adapters;
    if (pass->n_prompt_tokens > 0) {
        engine->stats.prompt_seconds += seconds;
    } else {
        engine->stats.decode_seconds += seconds;
        engine->stats.n_decode_steps++;
        speculate_clock(&engine->speculation, seconds);
    }
}

/* Whether all requests of the step on its way have ended. */
static bool is_in_vain(const struct plan *plan)
{
    int q = 0;

    while (q < plan->n_rows && !plan->rows[q].request) q++;
    return q == plan->n_rows;
}

/* Wait for the step on its way and deliver what it has drawn. The one after it, if it was started,
 * is then the one on its way; but if that is in vain it ends here, and the device is idle. */
static mlora_status end_pass(struct mlora_engine *engine)
{
    struct scheduler *scheduler = &engine->scheduler;
    const struct pass over = engine->pass;

    mlora_status status = engine->dev->ops->wait(engine->dev, over.fence);
    if (status != MLORA_OK) return status;
    count_step(engine);
    status = outputs_deliver(engine, &scheduler->plan);
    scheduler_advance(scheduler);
    engine->pass = engine->next;
    engine->next = over;
    if (status != MLORA_OK || scheduler->plan.n_rows == 0 || !is_in_vain(&scheduler->plan))
        return status;
    scheduler_advance(scheduler);
    return engine->dev->ops->wait(engine->dev, engine->pass.fence);
}

void engine_sweep(struct mlora_engine *engine)
{
    if (engine->scheduler.plan.n_rows == 0) registry_sweep(&engine->registry);
}

mlora_status engine_step(struct mlora_engine *engine, int *n_active)
{
    const struct plan *plan = &engine->scheduler.plan;
    const bool idle = plan->n_rows == 0;
    mlora_status status = MLORA_OK;

    if (engine->failed)
        return error_set(MLORA_EDEVICE, "the engine failed before: it can only be closed");

    if (idle) status = begin_adapters(engine);
    if (status == MLORA_OK) status = take_inbox(engine);
    if (status == MLORA_OK && idle) status = start_fresh(engine);
    if (status == MLORA_OK && plan->n_rows > 0) {
        status = start_next(engine);
        if (status == MLORA_OK) status = end_pass(engine);
        if (status == MLORA_OK && !idle) status = take_inbox(engine); /* it may have waited */
    }
    if (status != MLORA_OK) engine->failed = true;
    engine_sweep(engine);

    pthread_mutex_lock(&engine->lock);
    engine->n_scheduled = n_scheduled(&engine->scheduler);
    if (n_active) *n_active = engine->n_scheduled + engine->n_submitted;
    pthread_mutex_unlock(&engine->lock);
    return status;
}
