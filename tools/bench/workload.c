/* Whole batches through an engine. Prompts are random ids and every request runs to its last token,
 * so that all runs do the same work. */
#include <stdlib.h>

#include "engine/base/error.h"
#include "tools/bench/bench.h"
#include "tools/io.h"
#include "tools/job.h"

double random_adapter_bytes(const struct model_config *c, int rank)
{
    const double D = c->hidden_size, F = c->mlp_size;
    const double q = (double)c->n_heads * c->head_dim, kv = (double)c->n_kv_heads * c->head_dim;
    const double widths = (D + q) + 2 * (D + kv) + (q + D) + 3 * (D + F); /* K + N of all seven */
    return 2 * widths * rank * c->n_layers;
}

double decode_step_bytes(const struct model_config *c, const mlora_info *info, double adapter_bytes,
                         double kv_tokens)
{
    const double per_weight = (double)info->weight_bytes / (double)info->n_parameters;
    double weights = (double)info->weight_bytes;

    if (!c->tied) weights -= per_weight * c->vocab_size * c->hidden_size;
    return weights + adapter_bytes + kv_tokens * (double)info->kv_bytes_per_token;
}

void random_name(char out[ADAPTER_NAME], int64_t index)
{
    snprintf(out, ADAPTER_NAME, "random%lld", (long long)index);
}

mlora_status adapters_make(mlora_engine *engine, int first, int n, int rank)
{
    mlora_status status = MLORA_OK;

    for (int i = first; i < n && status == MLORA_OK; i++) {
        char name[ADAPTER_NAME];
        random_name(name, i);
        status = mlora_adapter_random(engine, name, rank, (uint64_t)i + 1);
    }
    return status;
}

mlora_status adapters_drop(mlora_engine *engine, int n)
{
    mlora_status status = MLORA_OK;

    for (int i = 0; i < n && status == MLORA_OK; i++) {
        char name[ADAPTER_NAME];
        random_name(name, i);
        status = mlora_adapter_unload(engine, name);
    }
    return status == MLORA_OK ? mlora_step(engine, NULL) : status; /* which frees their memory */
}

uint64_t random_next(uint64_t *state)
{
    return *state = *state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
}

double random_part(uint64_t *state)
{
    return (double)(random_next(state) >> 11) * 0x1p-53;
}

static void random_ids(int32_t *ids, int64_t n, int vocab_size, uint64_t seed)
{
    uint64_t state = seed * 2 + 1;

    for (int64_t i = 0; i < n; i++) {
        ids[i] = (int32_t)((random_next(&state) >> 33) % (uint64_t)vocab_size);
    }
}

void workload_request(mlora_request *out, const struct workload *work, int64_t i, int32_t *ids,
                      int vocab_size)
{
    mlora_request_default(NULL, out);
    random_ids(ids, work->prompt_tokens, vocab_size, (uint64_t)(work->seed + i));
    out->ids = ids;
    out->n_ids = (int)work->prompt_tokens;
    out->max_tokens = (int)work->max_tokens;
    out->temperature = (float)work->temperature;
    out->top_p = (float)work->top_p;
    out->seed = work->seed + i;
    out->ignore_eos = 1;
}

/* What the events of a run add up to. */
struct run_tally {
    double first_token;
    mlora_finish finish; /* of the last that ended otherwise than by length */
};

static void tally_event(void *user, const mlora_event *event)
{
    struct run_tally *tally = user;

    if (event->n_completion_tokens == 1 && event->token >= 0) tally->first_token = seconds();
    if (event->finish != MLORA_RUNNING && event->finish != MLORA_FINISH_LENGTH)
        tally->finish = event->finish;
}

mlora_status workload_submit(mlora_engine *engine, const struct workload *work,
                             void (*on_event)(void *user, const mlora_event *event), void *user)
{
    mlora_status status = MLORA_OK;
    mlora_info info;

    mlora_engine_info(engine, &info);
    int32_t *ids = malloc((size_t)work->prompt_tokens * sizeof *ids);
    if (!ids) return error_set(MLORA_ENOMEM, "out of memory for a prompt");
    for (int64_t i = 0; i < work->batch && status == MLORA_OK; i++) {
        mlora_request request;
        char name[ADAPTER_NAME];

        workload_request(&request, work, i, ids, info.vocab_size);
        random_name(name, work->n_adapters > 0 ? i % work->n_adapters : 0);
        request.adapter = work->n_adapters > 0 ? name : NULL;
        request.on_event = on_event;
        request.user = user;
        status = mlora_submit(engine, &request, NULL);
    }
    free(ids);
    return status;
}

mlora_status workload_run(struct measure *out, mlora_engine *engine, const struct workload *work)
{
    struct run_tally tally = {0};
    mlora_stats before, after;

    mlora_status status = workload_submit(engine, work, tally_event, &tally);
    mlora_engine_stats(engine, &before);
    const double start = seconds();
    for (int n_active = 1; n_active > 0 && status == MLORA_OK;)
        status = mlora_step(engine, &n_active);
    const double end = seconds();
    mlora_engine_stats(engine, &after);
    if (status == MLORA_OK && tally.finish != MLORA_RUNNING)
        status = error_set(MLORA_EINVAL, "a request ended with \"%s\", not with its last token",
                           job_finish_name(tally.finish));

    const double n_steps = (double)(after.n_decode_steps - before.n_decode_steps);
    *out = (struct measure){
        .seconds = end - start,
        .n_tokens = after.n_generated_tokens - before.n_generated_tokens,
        .n_decode_steps = n_steps,
        .ms_per_step =
            n_steps > 0 ? 1e3 * (after.decode_seconds - before.decode_seconds) / n_steps : 0,
        .first_token_ms = 1e3 * (tally.first_token - start),
    };
    out->tokens_per_second = (double)out->n_tokens / out->seconds;
    return status;
}
