#include "tools/job.h"

#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "tools/io.h"
#include "tools/text.h"

/* ---- the list ----------------------------------------------------------------------------- */

struct job *jobs_add(struct jobs *jobs, const char *adapter, const char *source)
{
    /* Doubled when full: n is a power of two then. */
    if ((jobs->n & (jobs->n - 1)) == 0) {
        const size_t room = jobs->n ? 2 * (size_t)jobs->n : 1;
        struct job *items = realloc(jobs->items, room * sizeof *items);
        if (!items) return NULL;
        jobs->items = items;
    }
    const bool base = !adapter || !*adapter || strcmp(adapter, "base") == 0;
    struct job job = {.adapter = base ? NULL : strdup(adapter),
                      .source = source ? strdup(source) : NULL};
    if ((!base && !job.adapter) || (source && !job.source)) {
        free(job.adapter);
        free(job.source);
        return NULL;
    }
    sampling_init(&job.sampling);
    jobs->items[jobs->n] = job;
    return &jobs->items[jobs->n++];
}

void jobs_free(struct jobs *jobs)
{
    for (int i = 0; i < jobs->n; i++) {
        struct job *job = &jobs->items[i];
        free(job->source);
        free(job->adapter);
        buffer_free(&job->prompt);
        free(job->ids);
        free(job->messages);
        free(job->error);
        json_decref(job->line);
        sampling_free(&job->sampling);
        buffer_free(&job->text);
        buffer_free(&job->tokens);
        buffer_free(&job->tops);
        buffer_free(&job->scores);
    }
    free(jobs->items);
    *jobs = (struct jobs){0};
}

/* ---- running ------------------------------------------------------------------------------ */

/* A signal handler reaches nothing else: the one mutable global of the program. */
static volatile sig_atomic_t n_interrupts;

static void on_interrupt(int number)
{
    if (n_interrupts++ == 0) return;
    signal(number, SIG_DFL);
    raise(number);
}

bool jobs_interrupted(void)
{
    return n_interrupts > 0;
}

static mlora_status keep_event(struct job *job, const mlora_event *event)
{
    mlora_status status = MLORA_OK;

    if (event->n_prompt_logprobs > 0)
        status = buffer_append(&job->scores, event->prompt_logprobs,
                               (size_t)event->n_prompt_logprobs * sizeof *event->prompt_logprobs);
    if (event->token >= 0 && status == MLORA_OK) {
        const struct job_token token = {event->token, event->logprob, event->n_top};
        if (job->first_token == 0) job->first_token = seconds();
        status = buffer_append(&job->tokens, &token, sizeof token);
        if (status == MLORA_OK && event->n_top > 0)
            status =
                buffer_append(&job->tops, event->top, (size_t)event->n_top * sizeof *event->top);
    }
    if (status == MLORA_OK && event->text_bytes > 0)
        status = buffer_append(&job->text, event->text, event->text_bytes);
    return status;
}

static void on_event(void *user, const mlora_event *event)
{
    struct job *job = user;

    if (job->status == MLORA_OK) job->status = keep_event(job, event);
    job->n_prompt_tokens = event->n_prompt_tokens;
    job->n_cached_tokens = event->n_cached_tokens;
    job->n_drafted_tokens = event->n_drafted_tokens;
    job->n_accepted_tokens = event->n_accepted_tokens;
    job->finish = event->finish;
    if (event->error) job->error = strdup(event->error);
}

/* The ids of a chat, once. */
static mlora_status encode_chat(const mlora_engine *engine, struct job *job,
                                const struct job_settings *settings)
{
    const mlora_message from_text[2] = {{"system", settings->system},
                                        {"user", buffer_text(&job->prompt)}};
    const mlora_message *messages = settings->system ? from_text : from_text + 1;
    int n_messages = settings->system ? 2 : 1;
    int32_t *ids;
    char *text;
    int n_ids;

    if (job->messages) {
        messages = job->messages;
        n_messages = job->n_messages;
    }
    mlora_status status = mlora_chat_encode(mlora_engine_tokenizer(engine), messages, n_messages,
                                            &ids, &n_ids, &text);
    if (status != MLORA_OK) return status;
    job->ids = malloc((size_t)n_ids * sizeof *ids + 1);
    if (!job->ids) {
        status = error_set(MLORA_ENOMEM, "out of memory: a prompt of %d tokens", n_ids);
    } else {
        if (n_ids > 0) memcpy(job->ids, ids, (size_t)n_ids * sizeof *ids);
        job->n_ids = n_ids;
        buffer_free(&job->prompt);
        status = buffer_append(&job->prompt, text, strlen(text));
    }
    mlora_free(ids);
    mlora_free(text);
    return status;
}

static mlora_status submit(mlora_engine *engine, struct job *job,
                           const struct job_settings *settings)
{
    mlora_request request;

    if (!job->ids && (job->messages || settings->chat)) {
        const mlora_status status = encode_chat(engine, job, settings);
        if (status != MLORA_OK) return status;
    }
    const size_t valid = text_valid(buffer_text(&job->prompt), job->prompt.bytes);
    if (valid < job->prompt.bytes)
        return error_set(MLORA_EINVAL, "the prompt is not UTF-8 at byte %zu", valid);
    mlora_request_default(engine, &request);
    sampling_apply(settings->sampling, &request);
    sampling_apply(&job->sampling, &request);
    request.adapter = job->adapter;
    request.prompt = buffer_text(&job->prompt);
    request.prompt_bytes = job->prompt.bytes;
    request.ids = job->ids;
    request.n_ids = job->n_ids;
    request.no_special = settings->no_special;
    request.no_parse_special = settings->no_parse_special;
    request.prompt_logprobs = settings->prompt_logprobs;
    request.on_event = on_event;
    request.user = job;
    return mlora_submit(engine, &request, &job->id);
}

mlora_status jobs_submit(mlora_engine *engine, struct jobs *jobs,
                         const struct job_settings *settings)
{
    for (int i = 0; i < jobs->n; i++) {
        struct job *job = &jobs->items[i];
        mlora_status status = submit(engine, job, settings);
        while (status == MLORA_EBUSY) { /* those that were accepted make room */
            status = mlora_step(engine, NULL);
            if (status == MLORA_OK) status = submit(engine, job, settings);
        }
        if (status != MLORA_OK)
            return job->source ? error_prefix(status, "%s", job->source) : status;
    }
    return MLORA_OK;
}

/* Step until nothing is left. */
static mlora_status step_all(mlora_engine *engine, struct jobs *jobs, jobs_show_fn show, void *user)
{
    bool cancelled = false;

    for (int n_active = 1; n_active > 0;) {
        if (n_interrupts > 0 && !cancelled) {
            for (int i = 0; i < jobs->n; i++) mlora_cancel(engine, jobs->items[i].id);
            cancelled = true;
        }
        mlora_status status = mlora_step(engine, &n_active);
        if (status != MLORA_OK) return status;
        for (int i = 0; i < jobs->n; i++)
            if (jobs->items[i].status != MLORA_OK) return jobs->items[i].status;
        status = show ? show(user) : MLORA_OK;
        if (status != MLORA_OK) return status;
    }
    return MLORA_OK;
}

mlora_status jobs_run(mlora_engine *engine, struct jobs *jobs, jobs_show_fn show, void *user)
{
    const struct sigaction ours = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART};
    struct sigaction before;

    n_interrupts = 0;
    sigaction(SIGINT, &ours, &before);
    const mlora_status status = step_all(engine, jobs, show, user);
    sigaction(SIGINT, &before, NULL);
    return status;
}

mlora_status job_prompt_text(struct buffer *out, const mlora_engine *engine, const struct job *job)
{
    char *text;
    size_t bytes;

    if (job->prompt.bytes > 0 || !job->ids)
        return buffer_append(out, buffer_text(&job->prompt), job->prompt.bytes);
    mlora_status status = mlora_decode(mlora_engine_tokenizer(engine), job->ids, job->n_ids,
                                       MLORA_DECODE_KEEP_SPECIAL, &text, &bytes);
    if (status != MLORA_OK) return status;
    status = buffer_append(out, text, bytes);
    mlora_free(text);
    return status;
}

const char *job_finish_name(mlora_finish finish)
{
    switch (finish) {
    case MLORA_RUNNING:
        return "running";
    case MLORA_FINISH_STOP:
        return "stop";
    case MLORA_FINISH_LENGTH:
        return "length";
    case MLORA_FINISH_CANCEL:
        return "cancel";
    case MLORA_FINISH_ERROR:
        return "error";
    }
    return "unknown";
}

const char *job_adapter_name(const struct job *job)
{
    return job->adapter ? job->adapter : "base";
}
