#include "tools/answers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/io.h"
#include "tools/text.h"

/* ---- text --------------------------------------------------------------------------------- */

/* "[sql] How many owls live near the bridge?" */
static mlora_status print_heading(const struct answers *answers, const struct job *job)
{
    const char *name = job_adapter_name(job);
    const int width = terminal_columns(answers->out) - text_width(name, strlen(name)) - 4;
    struct buffer prompt = {0}, line = {0};

    mlora_status status = job_prompt_text(&prompt, answers->engine, job);
    if (status == MLORA_OK)
        status = text_shorten(&line, buffer_text(&prompt), prompt.bytes, width > 20 ? width : 20);
    if (status == MLORA_OK) {
        fprintf(answers->out, "%s%s[%s]%s ", answers->at > 0 ? "\n" : "",
                answers->terminal ? "\033[1m" : "", name, answers->terminal ? "\033[0m" : "");
        text_show(answers->out, buffer_text(&line), line.bytes, answers->terminal);
        putc('\n', answers->out);
    }
    buffer_free(&prompt);
    buffer_free(&line);
    return status;
}

/* Print what is new of the job; several jobs each get a heading. */
static mlora_status show_text(struct answers *answers, const struct job *job)
{
    if (!answers->begun && answers->jobs->n > 1) {
        const mlora_status status = print_heading(answers, job);
        if (status != MLORA_OK) return status;
    }
    answers->begun = true;
    text_show(answers->out, buffer_text(&job->text) + answers->printed,
              job->text.bytes - answers->printed, answers->terminal);
    answers->printed = job->text.bytes;
    const bool ended = job->text.bytes > 0 && buffer_text(&job->text)[job->text.bytes - 1] == '\n';
    if (job->finish != MLORA_RUNNING && !ended) putc('\n', answers->out);
    return MLORA_OK;
}

/* ---- JSON --------------------------------------------------------------------------------- */

mlora_status print_json(FILE *out, json_t *value)
{
    char *text = value ? json_dumps(value, JSON_REAL_PRECISION(9) | JSON_ENCODE_ANY) : NULL;

    json_decref(value);
    if (!text) return error_set(MLORA_ENOMEM, "out of memory: the output as JSON");
    fprintf(out, "%s\n", text);
    free(text);
    return MLORA_OK;
}

static json_t *logprob_json(const mlora_engine *engine, int32_t id, float logprob)
{
    char *text;
    size_t bytes;

    if (mlora_token_text(mlora_engine_tokenizer(engine), id, &text, &bytes) != MLORA_OK)
        return NULL;
    json_t *value =
        json_pack("{s:i, s:s#, s:o}", "id", (int)id, "text", text, (int)bytes, "logprob",
                  isfinite(logprob) ? json_real((double)logprob) : json_null());
    mlora_free(text);
    return value;
}

json_t *logprobs_json(const mlora_engine *engine, const mlora_token_logprob *items, int n)
{
    json_t *array = json_array();

    for (int i = 0; i < n; i++) {
        if (json_array_append_new(array, logprob_json(engine, items[i].id, items[i].logprob)) == 0)
            continue;
        json_decref(array);
        return NULL;
    }
    return array;
}

/* [{"id", "text", "logprob", "top": [...]}], one for each generated token. */
static json_t *tokens_json(const mlora_engine *engine, const struct job *job)
{
    const struct job_token *tokens = (const void *)job->tokens.data;
    const mlora_token_logprob *top = (const void *)job->tops.data;
    const size_t n = job->tokens.bytes / sizeof *tokens;
    json_t *array = json_array();

    for (size_t i = 0; i < n; i++) {
        json_t *token = logprob_json(engine, tokens[i].id, tokens[i].logprob);
        if (!token ||
            json_object_set_new(token, "top", logprobs_json(engine, top, tokens[i].n_top)) != 0) {
            json_decref(token);
            json_decref(array);
            return NULL;
        }
        json_array_append_new(array, token);
        top += tokens[i].n_top;
    }
    return array;
}

static mlora_status show_json(const struct answers *answers, const struct job *job)
{
    const struct job_token *tokens = (const void *)job->tokens.data;
    const size_t n = job->tokens.bytes / sizeof *tokens;
    struct buffer prompt = {0};
    json_t *ids = json_array();

    const mlora_status status = job_prompt_text(&prompt, answers->engine, job);
    if (status != MLORA_OK) {
        json_decref(ids);
        buffer_free(&prompt);
        return status;
    }
    for (size_t i = 0; i < n; i++) json_array_append_new(ids, json_integer(tokens[i].id));
    json_t *line = json_pack(
        "{s:i, s:s?, s:s%, s:s%, s:o, s:s, s:{s:i, s:i, s:i, s:i, s:i}}", "index", answers->at,
        "adapter", job->adapter, "prompt", buffer_text(&prompt), prompt.bytes, "text",
        buffer_text(&job->text), job->text.bytes, "ids", ids, "finish_reason",
        job_finish_name(job->finish), "usage", "prompt_tokens", job->n_prompt_tokens,
        "cached_tokens", job->n_cached_tokens, "completion_tokens", (int)n, "drafted_tokens",
        job->n_drafted_tokens, "accepted_tokens", job->n_accepted_tokens);
    buffer_free(&prompt);
    if (line && (answers->logprobs || job->sampling.logprobs != OPTION_UNSET) &&
        json_object_set_new(line, "logprobs", tokens_json(answers->engine, job)) != 0) {
        json_decref(line);
        line = NULL;
    }
    return print_json(answers->out, line);
}

/* ---- both --------------------------------------------------------------------------------- */

mlora_status answers_show(void *user)
{
    struct answers *answers = user;
    mlora_status status = MLORA_OK;

    while (answers->at < answers->jobs->n && status == MLORA_OK) {
        const struct job *job = &answers->jobs->items[answers->at];
        const bool finished = job->finish != MLORA_RUNNING;
        if (!answers->json)
            status = show_text(answers, job);
        else if (finished)
            status = show_json(answers, job);
        if (!finished) break;
        answers->at++;
        answers->begun = false;
        answers->printed = 0;
    }
    fflush(answers->out);
    return status;
}

struct stopwatch stopwatch_start(const mlora_engine *engine)
{
    struct stopwatch now = {.begin = seconds()};

    mlora_engine_stats(engine, &now.stats);
    return now;
}

void print_timings(const mlora_engine *engine, const struct jobs *jobs,
                   const struct stopwatch *since)
{
    const double begin = since->begin, end = seconds();
    double first = end, last = begin; /* of the jobs' first tokens */
    long n_prompt = 0, n_generated = 0;
    mlora_stats stats;
    char rate[HUMAN_BYTES];

    for (int i = 0; i < jobs->n; i++) {
        const struct job *job = &jobs->items[i];
        n_prompt += job->n_prompt_tokens;
        n_generated += (long)(job->tokens.bytes / sizeof(struct job_token));
        if (job->first_token == 0) continue;
        if (job->first_token < first) first = job->first_token;
        if (job->first_token > last) last = job->first_token;
    }
    mlora_engine_stats(engine, &stats);
    const double prompt_seconds = stats.prompt_seconds - since->stats.prompt_seconds;
    const double computed = (double)(stats.n_prompt_tokens - since->stats.n_prompt_tokens);

    const long long n_drafted = stats.n_drafted_tokens - since->stats.n_drafted_tokens;

    fprintf(stderr, "mlora: ");
    if (jobs->n > 1) fprintf(stderr, "%d requests, ", jobs->n);
    fprintf(stderr, "%ld prompt tokens", n_prompt);
    if (prompt_seconds > 0)
        fprintf(stderr, " (%s tokens/s)", human_rate(rate, computed / prompt_seconds));
    fprintf(stderr, ", %ld generated", n_generated);
    if (n_generated > 1 && end > first) /* the first token belongs to the prompt's time */
        fprintf(stderr, " (%s tokens/s)",
                human_rate(rate, (double)(n_generated - 1) / (end - first)));
    if (n_drafted > 0)
        fprintf(stderr, ", %lld of %lld guesses right",
                (long long)(stats.n_accepted_tokens - since->stats.n_accepted_tokens), n_drafted);
    if (n_generated > 0) fprintf(stderr, ", first token after %.0f", 1e3 * (first - begin));
    if (n_generated > 0 && last - first > 0.001) fprintf(stderr, " to %.0f", 1e3 * (last - begin));
    fprintf(stderr, "%s\n", n_generated > 0 ? " ms" : "");
}

int report_failures(const struct jobs *jobs)
{
    int result = jobs_interrupted() ? 130 : 0;

    for (int i = 0; i < jobs->n; i++) {
        const struct job *job = &jobs->items[i];
        if (job->finish != MLORA_FINISH_ERROR) continue;
        fprintf(stderr, "mlora: request %d, adapter %s: %s\n", i, job_adapter_name(job),
                job->error ? job->error : "failed");
        result = 1;
    }
    return result;
}
