/* mlora bench generate: tokens/s of whole generations, over batch sizes and numbers of adapters.
 * Prompts are random ids and every request runs to its last token, so that all runs do the same
 * work; the adapters of a batch take turns by row. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/commands.h"
#include "tools/io.h"
#include "tools/job.h"
#include "tools/setup.h"
#include "tools/table.h"

enum { MAX_REPEATS = 101, NAME_BYTES = 32 };

struct bench {
    struct setup setup;
    const char *batch_sizes, *n_adapters; /* lists */
    const char *output;
    int64_t rank, prompt_tokens, max_tokens, repeat, seed;
    double temperature, top_p;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec bench_specs[] = {
    {.name = "batch-size", .kind = OPTION_TEXT, AT(batch_sizes), .argument = "N,...",
     .help = "requests that run together", .fallback = "64"},
    {.name = "num-adapters", .kind = OPTION_TEXT, AT(n_adapters), .argument = "N,...",
     .help = "random adapters on all linears that the requests of a batch take turns with; 0: "
             "the base model", .fallback = "0,1,7"},
    {.name = "rank", .kind = OPTION_INT, AT(rank), .argument = "R", .min = 1, .max = 512,
     .help = "of the adapters", .fallback = "16"},
    {.name = "prompt-tokens", .kind = OPTION_INT, AT(prompt_tokens), .argument = "N", .min = 1,
     .max = 1 << 20, .help = "of a request", .fallback = "32"},
    {.name = "max-new-tokens", .aliases = {"max-tokens"}, .kind = OPTION_INT, AT(max_tokens),
     .argument = "N", .min = 1, .max = 1 << 20, .help = "that each request generates",
     .fallback = "512"},
    {.name = "temperature", .kind = OPTION_NUMBER, AT(temperature), .argument = "T", .min = 0,
     .max = 100, .help = "0: greedy", .fallback = "0.7"},
    {.name = "top-p", .kind = OPTION_NUMBER, AT(top_p), .argument = "P", .min = 0, .max = 1,
     .above_min = true, .help = "keep the most likely tokens that together reach P",
     .fallback = "0.9"},
    {.name = "seed", .kind = OPTION_INT, AT(seed), .argument = "N", .min = 0, .max = 1e9,
     .help = "of prompts and sampling", .fallback = "0"},
    {.name = "repeat", .kind = OPTION_INT, AT(repeat), .argument = "N", .min = 1,
     .max = MAX_REPEATS, .help = "runs of each case; the median counts", .fallback = "3"},
    {.name = "json", .kind = OPTION_TEXT, AT(output), .argument = "FILE",
     .help = "also write the table as JSON; -: stdout"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", bench_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

/* ---- one case ------------------------------------------------------------------------------- */

struct measure {
    double tokens_per_second; /* generated, over all of the run: prompts, too */
    double ms_per_step;       /* of steps without prompt tokens */
    double first_token_ms;    /* from the start to the first token of the last request to get one */
};

/* What the events of a run add up to. */
struct run_tally {
    double first_token;
    mlora_finish finish; /* of the last that ended otherwise than by length */
};

static void on_event(void *user, const mlora_event *event)
{
    struct run_tally *tally = user;

    if (event->n_completion_tokens == 1 && event->token >= 0) tally->first_token = seconds();
    if (event->finish != MLORA_RUNNING && event->finish != MLORA_FINISH_LENGTH)
        tally->finish = event->finish;
}

/* Ids of a prompt that no other request has. */
static void random_ids(int32_t *ids, int64_t n, int vocab_size, uint64_t seed)
{
    uint64_t state = seed * 2 + 1;

    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        ids[i] = (int32_t)((state >> 33) % (uint64_t)vocab_size);
    }
}

static void adapter_name(char out[NAME_BYTES], int64_t index)
{
    snprintf(out, NAME_BYTES, "random%lld", (long long)index);
}

/* Run one batch to its end. */
static mlora_status run_batch(struct measure *out, mlora_engine *engine, const struct bench *bench,
                              int64_t batch_size, int64_t n_adapters)
{
    struct run_tally tally = {0};
    mlora_info info;
    mlora_stats before, after;
    mlora_status status = MLORA_OK;

    mlora_engine_info(engine, &info);
    int32_t *ids = malloc((size_t)bench->prompt_tokens * sizeof *ids);
    if (!ids) return error_set(MLORA_ENOMEM, "out of memory for a prompt");
    for (int64_t i = 0; i < batch_size && status == MLORA_OK; i++) {
        mlora_request request;
        char name[NAME_BYTES];

        mlora_request_default(NULL, &request);
        adapter_name(name, n_adapters > 0 ? i % n_adapters : 0);
        request.adapter = n_adapters > 0 ? name : NULL;
        random_ids(ids, bench->prompt_tokens, info.vocab_size, (uint64_t)(bench->seed + i));
        request.ids = ids;
        request.n_ids = (int)bench->prompt_tokens;
        request.max_tokens = (int)bench->max_tokens;
        request.temperature = (float)bench->temperature;
        request.top_p = (float)bench->top_p;
        request.seed = bench->seed + i;
        request.ignore_eos = 1;
        request.on_event = on_event;
        request.user = &tally;
        status = mlora_submit(engine, &request, NULL);
    }
    free(ids);

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
    const double n_tokens = (double)(after.n_generated_tokens - before.n_generated_tokens);
    out->tokens_per_second = n_tokens / (end - start);
    out->ms_per_step =
        n_steps > 0 ? 1e3 * (after.decode_seconds - before.decode_seconds) / n_steps : 0;
    out->first_token_ms = 1e3 * (tally.first_token - start);
    return status;
}

static int by_speed(const void *a, const void *b)
{
    const double x = ((const struct measure *)a)->tokens_per_second;
    const double y = ((const struct measure *)b)->tokens_per_second;
    return (x > y) - (x < y);
}

/* Warm up, repeat, and make a row of the table. `*base` is the speed without adapters at the same
 * batch size, 0: not measured (yet). */
static mlora_status run_case(json_t *rows, mlora_engine *engine, const struct bench *bench,
                             int64_t batch_size, int64_t n_adapters, double *base)
{
    struct measure runs[MAX_REPEATS] = {{0}};
    mlora_status status = MLORA_OK;

    for (int64_t i = -1; i < bench->repeat && status == MLORA_OK; i++)
        status = run_batch(&runs[i < 0 ? 0 : i], engine, bench, batch_size, n_adapters);
    if (status != MLORA_OK) return status;

    const size_t n = (size_t)bench->repeat;
    qsort(runs, n, sizeof *runs, by_speed);
    const struct measure *median = &runs[n / 2];
    if (n_adapters == 0) *base = median->tokens_per_second;
    json_t *share = *base > 0 ? json_real(100 * (median->tokens_per_second / *base)) : json_null();
    json_t *row = json_pack("{s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:o}", "batch",
                            (json_int_t)batch_size, "adapters", (json_int_t)n_adapters, "tokens",
                            (json_int_t)(batch_size * bench->max_tokens), "tokens/s",
                            median->tokens_per_second, "min", runs[0].tokens_per_second, "max",
                            runs[n - 1].tokens_per_second, "ms/step", median->ms_per_step,
                            "first ms", median->first_token_ms, "% of base", share);
    if (!row || json_array_append_new(rows, row) != 0)
        return error_set(MLORA_ENOMEM, "out of memory for a result");
    return MLORA_OK;
}

/* ---- all cases ------------------------------------------------------------------------------ */

static int32_t largest(const int32_t *values, int n)
{
    int32_t most = 0;
    for (int i = 0; i < n; i++)
        if (values[i] > most) most = values[i];
    return most;
}

static mlora_status check_list(const int32_t *values, int n, int min, int max, const char *where)
{
    if (n == 0) return error_set(MLORA_EINVAL, "%s is empty, at least one number is needed", where);
    for (int i = 0; i < n; i++)
        if (values[i] < min || values[i] > max)
            return error_set(MLORA_EINVAL, "%s holds %d, must be from %d to %d", where,
                             (int)values[i], min, max);
    return MLORA_OK;
}

static mlora_status run_cases(json_t *rows, const struct bench *bench, mlora_engine *engine,
                              const int32_t *batches, int n_batches, const int32_t *counts,
                              int n_counts)
{
    mlora_status status = MLORA_OK;

    for (int32_t i = 0; i < largest(counts, n_counts) && status == MLORA_OK; i++) {
        char name[NAME_BYTES];
        adapter_name(name, i);
        status = mlora_adapter_random(engine, name, (int)bench->rank, (uint64_t)i + 1);
    }
    for (int b = 0; b < n_batches && status == MLORA_OK; b++) {
        double base = 0;
        for (int c = 0; c < n_counts && status == MLORA_OK; c++)
            status = run_case(rows, engine, bench, batches[b], counts[c], &base);
    }
    return status;
}

static mlora_status print_results(const struct bench *bench, const mlora_engine *engine,
                                  json_t *rows)
{
    mlora_info info;

    mlora_engine_info(engine, &info);
    printf("%s, %.2f billion parameters, %s on %s; rank %lld, prompts of %lld tokens\n\n",
           info.architecture, 1e-9 * (double)info.n_parameters, info.dtype, info.device,
           (long long)bench->rank, (long long)bench->prompt_tokens);
    table_print(stdout, rows);
    if (!bench->output) return MLORA_OK;

    json_t *result =
        json_pack("{s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:O}", "version", mlora_version(),
                  "backend", info.backend, "device", info.device, "dtype", info.dtype,
                  "weight_bytes", (json_int_t)info.weight_bytes, "kv_bytes_per_token",
                  (json_int_t)info.kv_bytes_per_token, "rank", (json_int_t)bench->rank,
                  "prompt_tokens", (json_int_t)bench->prompt_tokens, "cases", rows);
    FILE *out = strcmp(bench->output, "-") == 0 ? stdout : fopen(bench->output, "w");
    if (!out) {
        json_decref(result);
        return error_set(MLORA_EIO, "%s: cannot be written", bench->output);
    }
    const int failed = !result || json_dumpf(result, out, JSON_INDENT(1)) != 0;
    if (!failed) fputc('\n', out);
    json_decref(result);
    const int closed = out == stdout ? 0 : fclose(out);
    return failed || closed ? error_set(MLORA_EIO, "%s: cannot be written", bench->output)
                            : MLORA_OK;
}

static mlora_status bench_run(struct bench *bench)
{
    mlora_engine *engine = NULL;
    json_t *rows = json_array();
    int32_t *batches = NULL, *counts = NULL;
    int n_batches = 0, n_counts = 0;

    mlora_status status = read_ids(&batches, &n_batches, bench->batch_sizes, "--batch-size");
    if (status == MLORA_OK) status = check_list(batches, n_batches, 1, 4096, "--batch-size");
    if (status == MLORA_OK)
        status = read_ids(&counts, &n_counts, bench->n_adapters, "--num-adapters");
    if (status == MLORA_OK) status = check_list(counts, n_counts, 0, 65536, "--num-adapters");
    if (status == MLORA_OK && !rows) status = error_set(MLORA_ENOMEM, "out of memory");
    if (status != MLORA_OK) goto done;

    bench->setup.no_prefix_cache = true; /* every prompt is computed, and measured */
    if (bench->setup.max_num_seqs == 0) bench->setup.max_num_seqs = largest(batches, n_batches);
    status = setup_open(&engine, &bench->setup);
    if (status == MLORA_OK)
        status = run_cases(rows, bench, engine, batches, n_batches, counts, n_counts);
    if (status == MLORA_OK) status = print_results(bench, engine, rows);

done:
    mlora_close(engine);
    json_decref(rows);
    free(batches);
    free(counts);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.batch_sizes = "64",
                          .n_adapters = "0,1,7",
                          .rank = 16,
                          .prompt_tokens = 32,
                          .max_tokens = 512,
                          .temperature = 0.7,
                          .top_p = 0.9,
                          .repeat = 3};
    void *const targets[] = {&bench, &bench.setup};
    struct operands operands;

    mlora_status status = options_parse(&command_bench, targets, argc, argv, &operands);
    if (status == MLORA_OK && operands.help)
        options_help(stdout, &command_bench);
    else if (status == MLORA_OK && (operands.n != 1 || strcmp(operands.values[0], "generate") != 0))
        status = error_set(MLORA_EINVAL, "bench needs to know what to measure: mlora bench "
                                         "generate --model DIR");
    else if (status == MLORA_OK)
        status = bench_run(&bench);
    int result = fail(status);
    if (finish_output(stdout) != 0) result = 1;
    setup_free(&bench.setup);
    return result;
}

const struct command command_bench = {
    .name = "bench",
    .summary = "tokens/s over batch sizes and numbers of adapters",
    .usage = "generate --model DIR [FLAGS]",
    .description = "Generate whole batches and measure them. Every request runs to its last "
                   "token; each case is warmed up once, then repeated, and the median counts.",
    .groups = groups,
    .examples = "  mlora bench generate -m llama --batch-size 1,64 --num-adapters 0,1,7\n"
                "  mlora bench generate --load-format dummy --config llama-3.1-8b\n",
    .run = run,
};
