/* mlora score: the log-probability of every token of a prompt, and what would come next. What
 * two programs must agree on to be the same model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/answers.h"
#include "tools/commands.h"
#include "tools/io.h"
#include "tools/setup.h"
#include "tools/text.h"

struct score {
    struct setup setup;
    const char *adapter, *prompt, *prompt_file, *ids;
    int64_t top;
    bool json, escape;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct score, member)
static const struct option_spec score_specs[] = {
    {.name = "adapter", .kind = OPTION_TEXT, AT(adapter), .argument = "NAME",
     .help = "the adapter", .fallback = "base"},
    {.name = "prompt", .letter = 'p', .kind = OPTION_TEXT, AT(prompt), .argument = "TEXT",
     .help = "the text, encoded as generate does"},
    {.name = "prompt-file", .letter = 'f', .kind = OPTION_TEXT, AT(prompt_file),
     .argument = "FILE", .help = "the text of a file; -: stdin"},
    {.name = "ids", .kind = OPTION_TEXT, AT(ids), .argument = "1,5,7",
     .help = "token ids, taken as they are: no begin token is added"},
    {.name = "escape", .letter = 'e', .kind = OPTION_FLAG, AT(escape),
     .help = "\\n, \\t, \\r and \\\\ in --prompt are what C means by them"},
    {.name = "top", .kind = OPTION_INT, AT(top), .argument = "N", .min = 0, .max = 128,
     .help = "how many of the most likely next tokens", .fallback = "5"},
    {.name = "json", .kind = OPTION_FLAG, AT(json), .help = "one JSON object"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to score", score_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

static mlora_status add_job(struct jobs *jobs, const struct score *score)
{
    const int n_given = !!score->prompt + !!score->prompt_file + !!score->ids;

    if (n_given != 1)
        return error_set(MLORA_EINVAL,
                         "%s: give one of --prompt TEXT, --prompt-file FILE and "
                         "--ids 1,5,7",
                         n_given ? "two prompts" : "no prompt");
    struct job *job = jobs_add(jobs, score->adapter, NULL);
    if (!job) return error_set(MLORA_ENOMEM, "out of memory for a request");
    if (score->ids) {
        const mlora_status status = read_ids(&job->ids, &job->n_ids, score->ids, "--ids");
        if (status != MLORA_OK || job->n_ids > 0) return status;
        return error_set(MLORA_EINVAL, "--ids is empty, at least one token id is needed");
    }
    if (score->prompt_file) return read_input(&job->prompt, score->prompt_file);
    const mlora_status status = buffer_append(&job->prompt, score->prompt, strlen(score->prompt));
    if (status == MLORA_OK && score->escape)
        job->prompt.bytes = text_unescape(job->prompt.data, job->prompt.bytes);
    return status;
}

static mlora_status print_object(const mlora_engine *engine, const struct job *job)
{
    const mlora_token_logprob *scores = (const void *)job->scores.data;
    const mlora_token_logprob *tops = (const void *)job->tops.data;

    return print_json(
        stdout,
        json_pack("{s:s?, s:o, s:o}", "adapter", job->adapter, "tokens",
                  logprobs_json(engine, scores, (int)(job->scores.bytes / sizeof *scores)), "next",
                  logprobs_json(engine, tops, (int)(job->tops.bytes / sizeof *tops))));
}

/* "  1234   -0.0213  12.1%   text", a line each. */
static mlora_status print_rows(const mlora_engine *engine, const mlora_token_logprob *items, int n)
{
    for (int i = 0; i < n; i++) {
        char *text;
        size_t bytes;
        const mlora_status status =
            mlora_token_text(mlora_engine_tokenizer(engine), items[i].id, &text, &bytes);
        if (status != MLORA_OK) return status;
        json_t *quoted = json_stringn(text, bytes); /* newlines and control characters escaped */
        char *shown = json_dumps(quoted, JSON_ENCODE_ANY);
        if (isnan(items[i].logprob))
            printf("%8d  %10s  %7s  %s\n", (int)items[i].id, "-", "-", shown ? shown : "");
        else
            printf("%8d  %10.4f  %6.2f%%  %s\n", (int)items[i].id, (double)items[i].logprob,
                   100 * exp((double)items[i].logprob), shown ? shown : "");
        free(shown);
        json_decref(quoted);
        mlora_free(text);
    }
    return MLORA_OK;
}

static mlora_status print_table(const mlora_engine *engine, const struct job *job)
{
    const mlora_token_logprob *scores = (const void *)job->scores.data;
    const mlora_token_logprob *tops = (const void *)job->tops.data;
    const int n_scores = (int)(job->scores.bytes / sizeof *scores);
    const int n_tops = (int)(job->tops.bytes / sizeof *tops);
    double sum = 0;

    for (int i = 1; i < n_scores; i++) sum += (double)scores[i].logprob;
    printf("%8s  %10s  %7s  %s\n", "id", "logprob", "prob", "token");
    mlora_status status = print_rows(engine, scores, n_scores);
    if (status != MLORA_OK) return status;
    if (n_scores > 1)
        printf("\n%s: %d tokens, sum %.4f, perplexity %.4f\n", job_adapter_name(job), n_scores, sum,
               exp(-sum / (n_scores - 1)));
    if (n_tops == 0) return MLORA_OK;
    printf("\nnext:\n");
    return print_rows(engine, tops, n_tops);
}

static mlora_status score_run(struct score *score, struct jobs *jobs)
{
    mlora_engine *engine = NULL;
    struct sampling sampling;
    const struct job_settings settings = {.sampling = &sampling, .prompt_logprobs = true};

    sampling_init(&sampling);
    sampling.max_tokens = 1; /* its alternatives are what comes next */
    sampling.temperature = 0;
    sampling.ignore_eos = true;
    sampling.logprobs = score->top;
    mlora_status status = add_job(jobs, score);
    if (status == MLORA_OK) status = setup_open(&engine, &score->setup);
    if (status == MLORA_OK) status = jobs_submit(engine, jobs, &settings);
    if (status == MLORA_OK) status = jobs_run(engine, jobs, NULL, NULL);
    if (status == MLORA_OK) {
        const struct job *job = &jobs->items[0];
        if (job->finish == MLORA_FINISH_STOP || job->finish == MLORA_FINISH_LENGTH)
            status = score->json ? print_object(engine, job) : print_table(engine, job);
    }
    mlora_close(engine);
    return status;
}

static int run(int argc, char **argv)
{
    struct score score = {.top = 5};
    void *const targets[] = {&score, &score.setup};
    struct operands operands;
    struct jobs jobs = {0};
    int result;

    mlora_status status = options_parse(&command_score, targets, argc, argv, &operands);
    if (status == MLORA_OK && operands.help) {
        options_help(stdout, &command_score);
    } else if (status == MLORA_OK && operands.n > 0) {
        status = error_set(MLORA_EINVAL, "unexpected \"%s\"; a prompt is given as --prompt TEXT",
                           operands.values[0]);
    } else if (status == MLORA_OK) {
        status = score_run(&score, &jobs);
    }
    result = fail(status);
    if (result == 0) result = report_failures(&jobs);
    if (finish_output(stdout) != 0) result = 1;
    jobs_free(&jobs);
    setup_free(&score.setup);
    return result;
}

const struct command command_score = {
    .name = "score",
    .summary = "log-probabilities of a prompt's tokens, and of what comes next",
    .usage = "--model DIR [--adapters NAME=DIR,...] [--adapter NAME] (--prompt TEXT | --ids IDS) "
             "[FLAGS]",
    .description = "Print the log-probability of each token of a prompt given those before it, "
                   "and the most likely tokens after the last.",
    .groups = groups,
    .examples = "  mlora score -m llama --adapters adapters/ --adapter sql -p 'How many' --json\n",
    .run = run,
};
