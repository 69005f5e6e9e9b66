/* Requests that follow one another, so that the engine always runs the same number of them, and
 * when their tokens came. */
#include <math.h>
#include <stdlib.h>

#include "engine/base/error.h"
#include "tools/bench/bench.h"
#include "tools/io.h"
#include "tools/job.h"

struct run;

struct one_request {
    struct run *run;
    double last; /* when it was submitted, then when its last token came */
};

struct run {
    struct stream_times *times;
    struct one_request *requests;
    uint64_t state; /* of the random lengths */
    int64_t n_tokens;
    int n_ended;
    mlora_finish finish; /* of the last that ended otherwise than by length */
};

static void on_event(void *user, const mlora_event *event)
{
    struct one_request *request = user;
    struct run *run = request->run;
    struct stream_times *times = run->times;
    const double now = seconds();

    if (event->token >= 0) {
        run->n_tokens++;
        if (event->n_completion_tokens == 1)
            times->first[times->n_first++] = now - request->last;
        else
            times->next[times->n_next++] = now - request->last;
        request->last = now;
    }
    if (event->finish == MLORA_RUNNING) return;
    run->n_ended++;
    if (event->finish != MLORA_FINISH_LENGTH) run->finish = event->finish;
}

/* Tokens that the next request generates: evenly spread around max_tokens. */
static int next_length(struct run *run, const struct stream_load *load)
{
    const double at = 2 * random_part(&run->state) - 1; /* [-1, 1) */
    const double n = (double)load->work.max_tokens * (1 + load->vary * at);
    return n < 1 ? 1 : (int)(n + 0.5);
}

static mlora_status submit(struct run *run, mlora_engine *engine, const struct stream_load *load,
                           int i, int32_t *ids)
{
    const struct workload *work = &load->work;
    char name[ADAPTER_NAME] = "";
    mlora_request request;
    mlora_info info;

    run->requests[i] = (struct one_request){run, seconds()};
    mlora_engine_info(engine, &info);
    mlora_status status = load->adapter(load->user, engine, i, name);
    if (status != MLORA_OK) return status;
    workload_request(&request, work, i, ids, info.vocab_size);
    request.max_tokens = next_length(run, load);
    request.adapter = name;
    request.on_event = on_event;
    request.user = &run->requests[i];
    return mlora_submit(engine, &request, NULL);
}

mlora_status stream_run(struct stream_times *out, mlora_engine *engine,
                        const struct stream_load *load)
{
    const size_t n = (size_t)load->n_requests;
    struct run run = {.times = out, .state = (uint64_t)load->draw};
    const int n_full = load->n_running < load->n_requests ? load->n_running : load->n_requests;
    int n_submitted = 0;

    *out = (struct stream_times){0};
    run.requests = calloc(n, sizeof *run.requests);
    out->first = calloc(n, sizeof *out->first);
    const double most = (double)load->work.max_tokens * (1 + load->vary) + 1;
    out->next = calloc(n * (size_t)most, sizeof *out->next);
    int32_t *ids = calloc((size_t)load->work.prompt_tokens, sizeof *ids);
    mlora_status status = run.requests && out->first && out->next && ids
                              ? MLORA_OK
                              : error_set(MLORA_ENOMEM, "out of memory for requests");

    const double start = seconds();
    while (status == MLORA_OK && run.n_ended < load->n_requests) {
        while (status == MLORA_OK && n_submitted < load->n_requests &&
               n_submitted - run.n_ended < load->work.batch)
            status = submit(&run, engine, load, n_submitted++, ids);
        const bool is_full = load->n_requests - run.n_ended >= n_full;
        if (status == MLORA_OK) status = mlora_step(engine, NULL);
        if (!is_full) continue;
        out->n_tokens = run.n_tokens;
        out->seconds = seconds() - start;
        mlora_engine_stats(engine, &out->stats);
    }
    if (status == MLORA_OK && run.finish != MLORA_RUNNING)
        status = error_set(MLORA_EINVAL, "a request ended with \"%s\", not with its last token",
                           job_finish_name(run.finish));
    free(ids);
    free(run.requests);
    return status;
}

void stream_free(struct stream_times *times)
{
    free(times->first);
    free(times->next);
    *times = (struct stream_times){0};
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double percentile(double *values, size_t n, double percent)
{
    if (n == 0) return 0;
    qsort(values, n, sizeof *values, by_value);
    const size_t rank = (size_t)ceil(percent / 100 * (double)n); /* the nearest, counted from 1 */
    return values[rank > 0 ? rank - 1 : 0];
}
