/* mlora bench generate: tokens/s of whole generations over a mixed batch, for each way to add the
 * adapters' products, beside the base model alone and beside what the memory's speed allows. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/kernels.h"
#include "tools/bench/bench.h"

enum { MAX_REPEATS = 101 };

struct bench {
    struct setup setup;
    struct bench_output output;
    const char *modes, *batch_sizes, *n_adapters, *ranks; /* lists */
    int64_t prompt_tokens, max_tokens, repeat, seed;
    double temperature, top_p;
};

/* "batch=1,8,64" is another spelling of "--batch-size 1,8,64". */
static mlora_status add_sweep(void *target, const char *text)
{
    struct bench *bench = target;
    const struct {
        const char *key;
        const char **list;
    } keys[] = {{"batch=", &bench->batch_sizes},
                {"adapters=", &bench->n_adapters},
                {"rank=", &bench->ranks}};

    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (strncmp(text, keys[i].key, strlen(keys[i].key)) != 0) continue;
        *keys[i].list = text + strlen(keys[i].key);
        return MLORA_OK;
    }
    return error_set(MLORA_EINVAL, "\"%s\" is none of batch=N,... adapters=N,... rank=R,...", text);
}

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "modes", .kind = OPTION_TEXT, AT(modes), .argument = "MODE,...",
     .help = "ways to add the adapters' products: loop, gbmm, bgmv, sgmv, fused, auto",
     .fallback = "auto"},
    {.name = "batch-size", .kind = OPTION_TEXT, AT(batch_sizes), .argument = "N,...",
     .help = "requests that run together", .fallback = "64"},
    {.name = "num-adapters", .kind = OPTION_TEXT, AT(n_adapters), .argument = "N,...",
     .help = "random adapters on all linears that the requests of a batch take turns with; the "
             "base model alone (0) is always measured", .fallback = "7"},
    {.name = "rank", .kind = OPTION_TEXT, AT(ranks), .argument = "R,...",
     .help = "of the adapters", .fallback = "16"},
    {.name = "sweep", .kind = OPTION_EACH, .each = add_sweep, .argument = "KEY=N,...",
     .help = "batch=, adapters= or rank=: the three lists above in one; more may follow"},
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
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

/* What all cases have in common. */
struct session {
    const struct bench *bench;
    json_t *report;
    struct model_config config;
    struct device *dev; /* of our own, for what the engine does not tell */
    double bandwidth;
    mlora_engine *engine;
    int mode;
    int n_adapters, rank; /* loaded now */
};

struct one_case {
    int batch, n_adapters, rank;
};

/* ---- the least that a step has to read ------------------------------------------------------ */

/* Of all decode steps together: the adapters that the batch uses, and every request's keys and values
 * up to its token. */
static double decode_bytes(const struct session *session, const struct one_case *one,
                           double n_steps)
{
    const struct bench *bench = session->bench;
    const struct model_config *c = &session->config;
    const int used = one->n_adapters < one->batch ? one->n_adapters : one->batch;
    const double context = (double)bench->prompt_tokens + 0.5 * (double)bench->max_tokens;
    mlora_info info;

    mlora_engine_info(session->engine, &info);
    return n_steps * decode_step_bytes(c, &info, used * random_adapter_bytes(c, one->rank),
                                       one->batch * context);
}

/* What a case fills: the weights, its adapters, and the blocks of keys and values that its requests
 * have at their end. More than that is reserved. */
static int64_t used_bytes(const struct session *session, const struct one_case *one)
{
    const struct bench *bench = session->bench;
    const int64_t tokens = bench->prompt_tokens + bench->max_tokens - 1; /* the last is not kept */
    const int64_t kept = (tokens + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
    mlora_stats stats;
    mlora_info info;

    mlora_engine_info(session->engine, &info);
    mlora_engine_stats(session->engine, &stats);
    return info.weight_bytes + stats.adapter_bytes_used +
           one->batch * kept * info.kv_bytes_per_token;
}

/* ---- one case ------------------------------------------------------------------------------- */

static int by_speed(const void *a, const void *b)
{
    const double x = ((const struct measure *)a)->tokens_per_second;
    const double y = ((const struct measure *)b)->tokens_per_second;
    return (x > y) - (x < y);
}

/* Have exactly the adapters "random0" to "random<n-1>" of that rank. */
static mlora_status fit_adapters(struct session *session, int n, int rank)
{
    mlora_status status = MLORA_OK;

    if (rank != session->rank || n < session->n_adapters) {
        status = adapters_drop(session->engine, session->n_adapters);
        session->n_adapters = 0;
    }
    if (status == MLORA_OK) status = adapters_make(session->engine, session->n_adapters, n, rank);
    session->n_adapters = n;
    session->rank = rank;
    return status;
}

/* Warm up, repeat, and make a row of the table. */
static mlora_status run_case(struct session *session, const struct one_case *one)
{
    const struct bench *bench = session->bench;
    const struct workload work = {.batch = one->batch,
                                  .n_adapters = one->n_adapters,
                                  .prompt_tokens = bench->prompt_tokens,
                                  .max_tokens = bench->max_tokens,
                                  .seed = bench->seed,
                                  .temperature = bench->temperature,
                                  .top_p = bench->top_p};
    struct measure runs[MAX_REPEATS] = {{0}};
    const size_t n = (size_t)bench->repeat;

    mlora_status status = fit_adapters(session, one->n_adapters, one->rank);
    for (int64_t i = -WARM_UPS; i < bench->repeat && status == MLORA_OK; i++)
        status = workload_run(&runs[i < 0 ? 0 : i], session->engine, &work);
    if (status != MLORA_OK) return status;

    qsort(runs, n, sizeof *runs, by_speed);
    const struct measure *median = &runs[n / 2];
    const double limit = decode_bytes(session, one, median->n_decode_steps) / session->bandwidth;
    const double spent = 1e-3 * median->ms_per_step * median->n_decode_steps;
    json_t *of_limit = spent > 0 ? json_real(100 * limit / spent) : json_null();
    return report_add(
        session->report,
        json_pack(
            "{s:s, s:i, s:i, s:i, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:n, s:n, s:n, s:o, s:I, "
            "s:I}",
            "mode", one->n_adapters > 0 ? mode_name(session->mode) : "base", "batch", one->batch,
            "adapters", one->n_adapters, "rank", one->n_adapters > 0 ? one->rank : 0, "tokens",
            (json_int_t)median->n_tokens, "seconds", median->seconds, "tokens/s",
            median->tokens_per_second, "min", runs[0].tokens_per_second, "max",
            runs[n - 1].tokens_per_second, "ms/step", median->ms_per_step, "first ms",
            median->first_token_ms, "added us/layer", "x slowest", "% of base", "% of limit",
            of_limit, "used bytes", (json_int_t)used_bytes(session, one), "peak bytes",
            (json_int_t)bench_memory(session->dev)));
}

/* ---- rows beside each other ----------------------------------------------------------------- */

static double number(const json_t *row, const char *key)
{
    return json_number_value(json_object_get(row, key));
}

static bool same(const json_t *a, const json_t *b, const char *key)
{
    return number(a, key) == number(b, key);
}

/* Each row against the base of its batch size, whose steps it makes longer by what its adapters add
 * to each layer, and against the slowest way for the same adapters. */
static mlora_status compare_rows(json_t *rows, int n_layers)
{
    size_t i, j;
    json_t *row;
    const json_t *other;
    bool ok = true;

    json_array_foreach(rows, i, row)
    {
        const double speed = number(row, "tokens/s");
        double slowest = speed, base = 0, base_ms = 0;
        json_array_foreach(rows, j, other)
        {
            const double its = number(other, "tokens/s");
            if (!same(row, other, "batch")) continue;
            if (number(other, "adapters") == 0) {
                base = its;
                base_ms = number(other, "ms/step");
            }
            if (same(row, other, "adapters") && same(row, other, "rank") && its < slowest)
                slowest = its;
        }
        const double added = 1e3 * (number(row, "ms/step") - base_ms) / n_layers;
        if (number(row, "adapters") > 0)
            ok = ok && json_object_set_new(row, "added us/layer", json_real(added)) == 0;
        ok = ok && json_object_set_new(row, "x slowest", json_real(speed / slowest)) == 0;
        ok = ok && json_object_set_new(row, "% of base", json_real(100 * (speed / base))) == 0;
    }
    return ok ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory for a result");
}

static int by_case(const void *a, const void *b)
{
    static const char *const keys[] = {"batch", "adapters", "rank", "index"};
    const json_t *x = *(json_t *const *)a, *y = *(json_t *const *)b;

    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!same(x, y, keys[i])) return number(x, keys[i]) < number(y, keys[i]) ? -1 : 1;
    return 0;
}

/* The ways for the same case one below the other, in the order given. */
static mlora_status sort_rows(json_t *rows)
{
    const size_t n = json_array_size(rows);
    json_t **sorted = calloc(n + 1, sizeof *sorted);

    if (!sorted) return error_set(MLORA_ENOMEM, "out of memory for a result");
    for (size_t i = 0; i < n; i++) {
        sorted[i] = json_incref(json_array_get(rows, i));
        json_object_set_new(sorted[i], "index", json_integer((json_int_t)i));
    }
    qsort(sorted, n, sizeof *sorted, by_case);
    for (size_t i = 0; i < n; i++) {
        json_object_del(sorted[i], "index");
        json_array_set_new(rows, i, sorted[i]);
    }
    free(sorted);
    return MLORA_OK;
}

/* ---- all cases ------------------------------------------------------------------------------ */

struct lists {
    int32_t *modes, *batches, *counts, *ranks;
    int n_modes, n_batches, n_counts, n_ranks;
};

static mlora_status read_lists(struct lists *lists, const struct bench *bench)
{
    mlora_status status = read_modes(&lists->modes, &lists->n_modes, bench->modes);
    if (status == MLORA_OK)
        status = read_list(&lists->batches, &lists->n_batches, bench->batch_sizes, 1, 4096,
                           "--batch-size");
    if (status == MLORA_OK)
        status = read_list(&lists->counts, &lists->n_counts, bench->n_adapters, 0, 65536,
                           "--num-adapters");
    if (status == MLORA_OK)
        status = read_list(&lists->ranks, &lists->n_ranks, bench->ranks, 1, 512, "--rank");
    return status;
}

static mlora_status run_mode(struct session *session, const struct lists *lists, bool base)
{
    mlora_status status = MLORA_OK;

    for (int b = 0; b < lists->n_batches && base && status == MLORA_OK; b++)
        status = run_case(session, &(struct one_case){lists->batches[b], 0, lists->ranks[0]});
    for (int r = 0; r < lists->n_ranks && status == MLORA_OK; r++)
        for (int c = 0; c < lists->n_counts && status == MLORA_OK; c++)
            for (int b = 0; b < lists->n_batches && status == MLORA_OK; b++)
                if (lists->counts[c] > 0)
                    status =
                        run_case(session, &(struct one_case){lists->batches[b], lists->counts[c],
                                                             lists->ranks[r]});
    return status;
}

/* An engine for each mode. */
static mlora_status run_modes(struct session *session, const struct setup *setup,
                              const struct lists *lists)
{
    mlora_status status = MLORA_OK;

    for (int m = 0; m < lists->n_modes && status == MLORA_OK; m++) {
        struct setup own = *setup;
        mlora_info info;

        session->mode = own.lora_mode = lists->modes[m];
        own.no_prefix_cache = true; /* every prompt is computed, and measured */
        session->n_adapters = session->rank = 0;
        status = setup_open(&session->engine, &own);
        if (status == MLORA_OK && m == 0) {
            mlora_engine_info(session->engine, &info);
            status = bench_device_open(&session->dev, setup, info.backend);
            if (status == MLORA_OK) status = bench_bandwidth(&session->bandwidth, session->dev);
            if (status == MLORA_OK)
                status = report_add_device(session->report, session->dev, session->bandwidth);
            if (status == MLORA_OK) status = report_add_engine(session->report, session->engine);
        }
        if (status == MLORA_OK) status = run_mode(session, lists, m == 0);
        mlora_close(session->engine);
        session->engine = NULL;
    }
    return status;
}

static mlora_status bench_action_generate(void *target, json_t *report)
{
    char *folder = NULL;
    struct bench *bench = target;
    struct session session = {.bench = bench, .report = report};
    struct lists lists = {0};
    json_t *rows = json_object_get(report, "cases");

    mlora_status status = read_lists(&lists, bench);
    if (status == MLORA_OK && bench->output.plot)
        status = plot_check("generate", bench->output.plot);
    if (status == MLORA_OK) status = setup_folder(&folder, &bench->setup);
    if (status == MLORA_OK) status = model_config_read(&session.config, folder);
    if (status == MLORA_OK) status = report_add_shape(report, &session.config);
    if (status == MLORA_OK) status = setup_try_ops(&bench->setup);
    if (status != MLORA_OK) goto done;

    if (bench->setup.max_num_seqs == 0)
        bench->setup.max_num_seqs = list_largest(lists.batches, lists.n_batches);
    status = run_modes(&session, &bench->setup, &lists);
    if (status == MLORA_OK) status = compare_rows(rows, session.config.n_layers);
    if (status == MLORA_OK) status = sort_rows(rows);
    if (status == MLORA_OK)
        json_object_set_new(report, "workload",
                            json_pack("{s:I, s:I, s:f, s:f}", "prompt_tokens",
                                      (json_int_t)bench->prompt_tokens, "max_new_tokens",
                                      (json_int_t)bench->max_tokens, "temperature",
                                      bench->temperature, "top_p", bench->top_p));
    if (status == MLORA_OK) status = report_finish(report, &bench->output);

done:
    if (session.dev) session.dev->ops->close(session.dev);
    free(lists.modes);
    free(lists.batches);
    free(lists.counts);
    free(lists.ranks);
    free(folder);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.modes = "auto",
                          .batch_sizes = "64",
                          .n_adapters = "7",
                          .ranks = "16",
                          .prompt_tokens = 32,
                          .max_tokens = 512,
                          .temperature = 0.7,
                          .top_p = 0.9,
                          .repeat = 3};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result =
        bench_main(&bench_generate, targets, argc, argv, bench_action_generate, add_sweep);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_generate = {
    .name = "bench generate",
    .summary = "tokens/s over batch sizes, adapters, ranks and modes",
    .usage = "--model DIR [FLAGS]",
    .description = "Generate whole batches and measure them. Every request runs to its last "
                   "token; each case is warmed up, then repeated, and the median counts. "
                   "\"% of limit\" is the time in which the memory could have delivered what the "
                   "decode steps must read, of the time that they took; \"added us/layer\" what "
                   "the adapters add to a decode step of the base, by layer. \"used\" are the "
                   "weights, the adapters and the keys and values of the requests; \"peak\" is "
                   "what the process has taken, of which the rest is reserved.",
    .groups = groups,
    .examples = "  mlora bench generate -m llama --modes loop,sgmv,auto --batch-size 64\n"
                "  mlora bench generate --load-format dummy --config llama-3.1-8b \\\n"
                "      --sweep batch=1,8,64 adapters=1,7,64 rank=8,16,64\n",
    .run = run,
};
