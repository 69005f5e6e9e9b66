/* mlora bench profile: one decode step and one step of prompts taken apart by op, the op that loses
 * most against what the memory or the arithmetic allows first: the next thing to speed up. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/bench/bench.h"
#include "tools/bench/ops.h"

struct bench {
    struct setup setup;
    struct bench_output output;
    int64_t batch, n_adapters, rank, context, prompt_tokens, steps;
    bool nvtx;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "batch-size", .kind = OPTION_INT, AT(batch), .argument = "N", .min = 1, .max = 4096,
     .help = "requests of the decode step", .fallback = "64"},
    {.name = "num-adapters", .kind = OPTION_INT, AT(n_adapters), .argument = "N", .min = 0,
     .max = 4096, .help = "that they take turns with", .fallback = "7"},
    {.name = "rank", .kind = OPTION_INT, AT(rank), .argument = "R", .min = 1, .max = 512,
     .help = "of the adapters", .fallback = "16"},
    {.name = "context", .kind = OPTION_INT, AT(context), .argument = "N", .min = 1,
     .max = 1 << 20, .help = "tokens before the decode step, of each request", .fallback = "300"},
    {.name = "prompt-tokens", .kind = OPTION_INT, AT(prompt_tokens), .argument = "N", .min = 1,
     .max = 1 << 16, .help = "of the step of prompts, one prompt for each adapter",
     .fallback = "2048"},
    {.name = "steps", .kind = OPTION_INT, AT(steps), .argument = "N", .min = 1, .max = 1000,
     .help = "decode steps that are timed; their mean counts", .fallback = "8"},
    {.name = "nvtx", .kind = OPTION_FLAG, AT(nvtx),
     .help = "for nsys and ncu: launch each op by itself, in an NVTX range of its name inside one "
             "of its layer (\"layer 3\"); the times then hold the gaps between launches"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

/* ---- the table ------------------------------------------------------------------------------ */

static double number(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static int by_loss(const void *a, const void *b)
{
    const double x = number(*(json_t *const *)a, "lost us");
    const double y = number(*(json_t *const *)b, "lost us");
    return (x < y) - (x > y);
}

/* A line of the profile as a row: of one step, with its limits. */
static json_t *make_row(const json_t *line, const char *phase, double n_steps, double total,
                        const struct ops_bench *ops)
{
    const double seconds = number(line, "seconds") / n_steps;
    const double bytes = number(line, "bytes") / n_steps, flops = number(line, "flops") / n_steps;
    const double memory = bytes / ops->bandwidth, arithmetic = flops / ops->flops;
    const double limit = memory > arithmetic ? memory : arithmetic;
    const json_t *launches = json_object_get(line, "launches");

    return json_pack("{s:s, s:O, s:O, s:f, s:o, s:f, s:f, s:f, s:f, s:f, s:f}", "phase", phase,
                     "op", json_object_get(line, "op"), "shape", json_object_get(line, "shape"),
                     "calls", number(line, "calls") / n_steps, "launches",
                     json_is_null(launches) ? json_null()
                                            : json_real(json_number_value(launches) / n_steps),
                     "us", 1e6 * seconds, "% of step", 100 * seconds / total, "MB", 1e-6 * bytes,
                     "GFLOP", 1e-9 * flops, "% of limit", seconds > 0 ? 100 * limit / seconds : 0,
                     "lost us", 1e6 * (seconds - limit));
}

/* The lines since the last call, as rows of one step each, then their sum. */
static mlora_status add_phase(json_t *report, mlora_engine *engine, const struct ops_bench *ops,
                              const char *phase, double n_steps, double plain_seconds)
{
    char *text = NULL;
    size_t i;
    const json_t *line;
    double total = 0, bytes = 0, flops = 0, limit = 0;
    char shape[32];

    mlora_status status = mlora_engine_profile(engine, &text);
    json_t *lines = text ? json_loads(text, 0, NULL) : NULL;
    mlora_free(text);
    if (status != MLORA_OK) return status;
    json_t **rows = calloc(json_array_size(lines) + 1, sizeof *rows);
    if (!lines || !rows) status = error_set(MLORA_ENOMEM, "out of memory for a profile");
    json_array_foreach(lines, i, line)
    {
        total += number(line, "seconds") / n_steps;
    }
    size_t n = 0;
    json_array_foreach(lines, i, line)
    {
        if (rows) rows[n] = make_row(line, phase, n_steps, total, ops);
        if (rows && rows[n]) n++;
    }
    if (rows) qsort(rows, n, sizeof *rows, by_loss);
    for (size_t r = 0; r < n; r++) {
        bytes += number(rows[r], "MB");
        flops += number(rows[r], "GFLOP");
        limit += number(rows[r], "us") - number(rows[r], "lost us");
        const mlora_status added = report_add(report, rows[r]);
        if (status == MLORA_OK) status = added;
    }
    free(rows);
    json_decref(lines);
    if (status != MLORA_OK) return status;
    snprintf(shape, sizeof shape, "%.3f ms untimed", 1e3 * plain_seconds);
    return report_add(report, json_pack("{s:s, s:s, s:s, s:n, s:n, s:f, s:f, s:f, s:f, s:f, s:f}",
                                        "phase", phase, "op", "all", "shape", shape, "calls",
                                        "launches", "us", 1e6 * total, "% of step", 100.0, "MB",
                                        bytes, "GFLOP", flops, "% of limit", 1e-4 * limit / total,
                                        "lost us", 1e6 * total - limit));
}

/* ---- steps ---------------------------------------------------------------------------------- */

/* Submit n requests of random prompts. */
static mlora_status submit(mlora_engine *engine, const struct bench *bench, int64_t n,
                           int64_t prompt_tokens, int64_t max_tokens, int64_t first_seed)
{
    const struct workload work = {.batch = n,
                                  .n_adapters = bench->n_adapters,
                                  .prompt_tokens = prompt_tokens,
                                  .max_tokens = max_tokens,
                                  .seed = first_seed,
                                  .temperature = 0.7,
                                  .top_p = 0.9};
    return workload_submit(engine, &work, NULL, NULL);
}

static mlora_status run_out(mlora_engine *engine)
{
    mlora_status status = MLORA_OK;

    for (int n_active = 1; n_active > 0 && status == MLORA_OK;)
        status = mlora_step(engine, &n_active);
    return status;
}

/* Begin, or end, what is profiled. */
static mlora_status clear(mlora_engine *engine)
{
    char *text = NULL;
    const mlora_status status = mlora_engine_profile(engine, &text);

    mlora_free(text);
    return status;
}

/* Prompts of `prompt_tokens` together, in one step; `*seconds` of the step. */
static mlora_status run_prompts(double *step_seconds, mlora_engine *engine,
                                const struct bench *bench)
{
    const int64_t most = bench->prompt_tokens < bench->batch ? bench->prompt_tokens : bench->batch;
    const int64_t n = bench->n_adapters < 1      ? 1
                      : bench->n_adapters < most ? bench->n_adapters
                                                 : most;
    mlora_stats before, after;

    mlora_engine_stats(engine, &before);
    mlora_status status = submit(engine, bench, n, bench->prompt_tokens / n, 1, 0);
    if (status == MLORA_OK) status = run_out(engine);
    mlora_engine_stats(engine, &after);
    *step_seconds = after.prompt_seconds - before.prompt_seconds;
    return status;
}

/* Bring all requests past their prompts, then time `steps` decode steps: with `report` by op, else
 * as a whole. */
static mlora_status run_decode(double *step_seconds, mlora_engine *engine,
                               const struct bench *bench, json_t *report,
                               const struct ops_bench *ops)
{
    enum { WARM = 4 };
    const int64_t n_prompt = bench->batch * bench->context;
    mlora_stats before, now;
    mlora_info info;

    mlora_engine_info(engine, &info);
    mlora_engine_stats(engine, &before);
    now = before;
    const int64_t n_chunks = n_prompt / (info.max_batch_tokens - bench->batch + 1) + 1;
    mlora_status status = submit(engine, bench, bench->batch, bench->context,
                                 bench->steps + WARM + n_chunks + 1, 1000);
    while (status == MLORA_OK && now.n_prompt_tokens - before.n_prompt_tokens < n_prompt) {
        status = mlora_step(engine, NULL);
        mlora_engine_stats(engine, &now);
    }
    for (int i = 0; i < WARM && status == MLORA_OK; i++) status = mlora_step(engine, NULL);
    if (status == MLORA_OK && report) status = clear(engine);
    mlora_engine_stats(engine, &before);
    for (int64_t i = 0; i < bench->steps && status == MLORA_OK; i++)
        status = mlora_step(engine, NULL);
    mlora_engine_stats(engine, &now);
    if (status == MLORA_OK && report)
        status = add_phase(report, engine, ops, "decode", (double)bench->steps, *step_seconds);
    if (!report)
        *step_seconds = (now.decode_seconds - before.decode_seconds) / (double)bench->steps;
    return status == MLORA_OK ? run_out(engine) : status;
}

static mlora_status run_phases(json_t *report, mlora_engine *engine, const struct bench *bench,
                               const struct ops_bench *ops)
{
    double prompts = 0, decode = 0, timed = 0;
    mlora_status status = MLORA_OK;

    for (int i = 0; i < 4 && status == MLORA_OK; i++) /* plans, recordings, then the time */
        status = run_prompts(&prompts, engine, bench);
    for (int i = 0; i < 2 && status == MLORA_OK; i++)
        status = run_decode(&decode, engine, bench, NULL, NULL);
    if (status == MLORA_OK) status = clear(engine);
    if (status == MLORA_OK) status = run_decode(&decode, engine, bench, report, ops);
    if (status == MLORA_OK) status = clear(engine);
    if (status == MLORA_OK) status = run_prompts(&timed, engine, bench);
    if (status == MLORA_OK) status = add_phase(report, engine, ops, "prefill", 1, prompts);
    return status;
}

/* The limits of the device: measured before the model takes its memory. */
static mlora_status measure_device(struct ops_bench *ops, const struct setup *setup)
{
    mlora_status status = ops_open(ops, setup);

    if (status == MLORA_OK) {
        measure_flops(ops);
        status = ops->status;
    }
    ops_close(ops);
    return status;
}

static mlora_status action(void *target, json_t *report)
{
    char *folder = NULL;
    struct bench *bench = target;
    struct ops_bench ops = {.report = report};
    mlora_engine *engine = NULL;
    struct setup *setup = &bench->setup;

    mlora_status status = setup_folder(&folder, setup);
    if (status == MLORA_OK && bench->output.plot)
        status = plot_check("profile", bench->output.plot);
    if (status == MLORA_OK) status = setup_try_ops(setup);
    if (status == MLORA_OK) status = measure_device(&ops, setup);
    setup->profile = bench->nvtx ? 2 : 1;
    setup->no_prefix_cache = true; /* every prompt is computed, and measured */
    if (setup->max_num_seqs == 0) setup->max_num_seqs = bench->batch;
    if (setup->max_batch_tokens == 0)
        setup->max_batch_tokens =
            bench->prompt_tokens > bench->batch ? bench->prompt_tokens : bench->batch;
    if (status == MLORA_OK) status = setup_open(&engine, setup);
    if (status == MLORA_OK) status = report_add_engine(report, engine);
    if (status == MLORA_OK)
        status = adapters_make(engine, 0, (int)bench->n_adapters, (int)bench->rank);
    if (status == MLORA_OK) status = run_phases(report, engine, bench, &ops);
    if (status == MLORA_OK) json_object_set_new(report, "flops_per_second", json_real(ops.flops));
    if (status == MLORA_OK) status = report_finish(report, &bench->output);
    mlora_close(engine);
    free(folder);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.batch = 64,
                          .n_adapters = 7,
                          .rank = 16,
                          .context = 300,
                          .prompt_tokens = 2048,
                          .steps = 8};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result = bench_main(&bench_profile, targets, argc, argv, action, NULL);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_profile = {
    .name = "bench profile",
    .summary = "a decode step and a step of prompts, op by op",
    .usage = "--model DIR [FLAGS]",
    .description = "Time every op of a step. Rows are sorted by the time that an op takes beyond "
                   "what the memory or the arithmetic allows: the first is the next to speed up. "
                   "The last row of a phase has the step as a whole, and what it takes when its "
                   "ops are not timed.",
    .groups = groups,
    .examples = "  mlora bench profile --load-format dummy --config llama-3.1-8b\n"
                "  nsys profile mlora bench profile -m llama --nvtx --steps 2\n"
                "  ncu --nvtx --nvtx-include 'layer 3/' mlora bench profile -m llama --nvtx\n",
    .run = run,
};
