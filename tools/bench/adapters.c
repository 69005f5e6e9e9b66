/* mlora bench adapters: throughput by how many adapters are being asked for, the popular ones more
 * often than the others (Zipf's law: number k has the weight 1 / k). */
#include <math.h>
#include <stdlib.h>

#include "engine/base/error.h"
#include "kernels/kernels.h"
#include "tools/bench/bench.h"

struct bench {
    struct setup setup;
    struct bench_output output;
    const char *counts;
    int64_t batch, waiting, n_requests, rank, prompt_tokens, max_tokens;
    double skew, vary;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "num-adapters", .kind = OPTION_TEXT, AT(counts), .argument = "N,...",
     .help = "that the requests ask for", .fallback = "8,64,512,2000"},
    {.name = "skew", .kind = OPTION_NUMBER, AT(skew), .argument = "S", .min = 0, .max = 10,
     .help = "adapter k is asked for as often as 1 / k^S; 0: all equally", .fallback = "1"},
    {.name = "batch-size", .kind = OPTION_INT, AT(batch), .argument = "N", .min = 1, .max = 4096,
     .help = "requests that run at any time", .fallback = "64"},
    {.name = "waiting", .kind = OPTION_INT, AT(waiting), .argument = "N", .min = 0,
     .max = 1 << 20, .help = "requests that wait beside those that run", .fallback = "0"},
    {.name = "requests", .kind = OPTION_INT, AT(n_requests), .argument = "N", .min = 1,
     .max = 1 << 20, .help = "of each case", .fallback = "four times as many as run"},
    {.name = "rank", .kind = OPTION_INT, AT(rank), .argument = "R", .min = 1, .max = 512,
     .help = "of the adapters", .fallback = "8"},
    {.name = "prompt-tokens", .kind = OPTION_INT, AT(prompt_tokens), .argument = "N", .min = 1,
     .max = 1 << 20, .help = "of a request", .fallback = "32"},
    {.name = "max-new-tokens", .aliases = {"max-tokens"}, .kind = OPTION_INT, AT(max_tokens),
     .argument = "N", .min = 1, .max = 1 << 20, .help = "that each request generates",
     .fallback = "64"},
    {.name = "vary", .kind = OPTION_NUMBER, AT(vary), .argument = "PART", .min = 0, .max = 1,
     .help = "requests generate up to this part more or less, other ones in each run",
     .fallback = "0"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

/* Which adapter each request asks for. */
struct demand {
    int32_t *adapter; /* [n_requests] */
    int n_used;       /* different ones */
};

static mlora_status demand_make(struct demand *out, int n_requests, int n_adapters, double skew)
{
    double *sum = calloc((size_t)n_adapters, sizeof *sum); /* of the weights up to each */
    bool *used = calloc((size_t)n_adapters, sizeof *used);
    uint64_t state = 1;

    *out = (struct demand){.adapter = calloc((size_t)n_requests, sizeof *out->adapter)};
    for (int i = 0; i < n_requests && sum && used && out->adapter; i++) {
        if (i == 0)
            for (int k = 0; k < n_adapters; k++)
                sum[k] = pow(k + 1, -skew) + (k > 0 ? sum[k - 1] : 0);
        const double at = random_part(&state) * sum[n_adapters - 1];
        int k = 0;
        while (k < n_adapters - 1 && sum[k] <= at) k++;
        out->adapter[i] = k;
        out->n_used += !used[k];
        used[k] = true;
    }
    const bool ok = sum && used && out->adapter;
    free(sum);
    free(used);
    return ok ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory for the adapters' popularity");
}

static mlora_status asked_adapter(void *user, mlora_engine *engine, int i, char name[ADAPTER_NAME])
{
    const struct demand *demand = user;

    (void)engine;
    random_name(name, demand->adapter[i]);
    return MLORA_OK;
}

/* The least that a step with so many adapters reads. */
static double step_bytes(const struct bench *bench, const struct model_config *config,
                         const mlora_info *info, double n_adapters)
{
    const double context = (double)bench->prompt_tokens + 0.5 * (double)bench->max_tokens;
    return decode_step_bytes(config, info,
                             n_adapters * random_adapter_bytes(config, (int)bench->rank),
                             (double)bench->batch * context);
}

static mlora_status run_case(json_t *report, const struct bench *bench, mlora_engine *engine,
                             struct device *dev, int n_adapters)
{
    struct demand demand = {0};
    struct stream_times times = {0};
    mlora_stats before = {0};
    struct stream_load load = {
        .work = {.batch = bench->batch + bench->waiting,
                 .prompt_tokens = bench->prompt_tokens,
                 .max_tokens = bench->max_tokens,
                 .temperature = 0.7,
                 .top_p = 0.9},
        .n_requests = (int)(bench->n_requests > 0 ? bench->n_requests : 4 * bench->batch),
        .n_running = (int)bench->batch,
        .vary = bench->vary,
        .adapter = asked_adapter,
        .user = &demand,
    };

    mlora_status status = demand_make(&demand, load.n_requests, n_adapters, bench->skew);
    for (int i = -WARM_UPS; i <= 0 && status == MLORA_OK; i++) { /* the last counts */
        stream_free(&times);
        mlora_engine_stats(engine, &before);
        load.draw = i + WARM_UPS;
        status = stream_run(&times, engine, &load);
    }
    const mlora_stats after = times.stats;
    const double n_steps = (double)(after.n_steps - before.n_steps);
    if (status == MLORA_OK)
        status = report_add(
            report,
            json_pack("{s:i, s:i, s:f, s:i, s:I, s:f, s:f, s:n, s:n, s:I, s:I, s:I, s:f, s:f, s:I}",
                      "adapters", n_adapters, "asked for", demand.n_used, "in a step",
                      (double)(after.n_adapter_turns - before.n_adapter_turns) / n_steps,
                      "requests", load.n_requests, "tokens", (json_int_t)times.n_tokens, "seconds",
                      times.seconds, "tokens/s", (double)times.n_tokens / times.seconds,
                      "% of first", "% by bytes read", "loads",
                      (json_int_t)(after.n_adapter_loads - before.n_adapter_loads), "waits",
                      (json_int_t)(after.n_adapter_waits - before.n_adapter_waits), "set back",
                      (json_int_t)(after.n_preemptions - before.n_preemptions), "first ms p99",
                      1e3 * percentile(times.first, times.n_first, 99), "next ms p99",
                      1e3 * percentile(times.next, times.n_next, 99), "peak bytes",
                      (json_int_t)bench_memory(dev)));
    stream_free(&times);
    free(demand.adapter);
    return status;
}

static mlora_status run_cases(json_t *report, const struct bench *bench, mlora_engine *engine,
                              struct device *dev, const struct model_config *config,
                              const int32_t *counts, int n)
{
    mlora_status status = MLORA_OK;
    double first = 0, first_bytes = 0;
    mlora_info info;
    size_t i;
    json_t *row;

    for (int c = 0; c < n && status == MLORA_OK; c++) {
        const int have = mlora_adapter_count(engine);
        status = adapters_make(engine, have, counts[c], (int)bench->rank);
        if (status == MLORA_OK) status = run_case(report, bench, engine, dev, counts[c]);
    }
    mlora_engine_info(engine, &info);
    json_array_foreach(json_object_get(report, "cases"), i, row)
    {
        const double speed = json_number_value(json_object_get(row, "tokens/s"));
        const double in_a_step = json_number_value(json_object_get(row, "in a step"));
        const double bytes = step_bytes(bench, config, &info, in_a_step);
        if (i == 0) first = speed, first_bytes = bytes;
        json_object_set_new(row, "% of first", json_real(100 * (speed / first)));
        json_object_set_new(row, "% by bytes read", json_real(100 * (first_bytes / bytes)));
    }
    return status;
}

static mlora_status action(void *target, json_t *report)
{
    struct bench *bench = target;
    struct device *dev = NULL;
    mlora_engine *engine = NULL;
    struct model_config config = {0};
    int32_t *counts = NULL;
    char *folder = NULL;
    mlora_info info;
    int n = 0;

    mlora_status status = read_list(&counts, &n, bench->counts, 1, 65536, "--num-adapters");
    if (status == MLORA_OK && bench->output.plot)
        status = plot_check("adapters", bench->output.plot);
    if (status == MLORA_OK) status = setup_folder(&folder, &bench->setup);
    if (status == MLORA_OK) status = model_config_read(&config, folder);
    if (bench->setup.max_num_seqs == 0) bench->setup.max_num_seqs = bench->batch;
    bench->setup.no_prefix_cache = true; /* every prompt is computed, and measured */
    if (status == MLORA_OK) status = setup_open(&engine, &bench->setup);
    if (status == MLORA_OK) status = report_add_both(report, engine, &bench->setup);
    if (status == MLORA_OK) {
        mlora_engine_info(engine, &info);
        status = bench_device_open(&dev, &bench->setup, info.backend);
    }
    if (status == MLORA_OK) status = run_cases(report, bench, engine, dev, &config, counts, n);
    if (status == MLORA_OK) status = report_finish(report, &bench->output);
    mlora_close(engine);
    if (dev) dev->ops->close(dev);
    free(counts);
    free(folder);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.counts = "8,64,512,2000",
                          .skew = 1,
                          .batch = 64,
                          .rank = 8,
                          .prompt_tokens = 32,
                          .max_tokens = 64};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result = bench_main(&bench_adapters, targets, argc, argv, action, NULL);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_adapters = {
    .name = "bench adapters",
    .summary = "throughput against the number of adapters",
    .usage = "--model DIR [FLAGS]",
    .description =
        "Keep a number of requests running that ask for random adapters, the popular "
        "ones more often than the others (Zipf's law). Each case runs four times with "
        "the same requests: three warm up, so that its adapters are loaded, plans and "
        "recordings of its steps made; the fourth counts. With --vary their lengths "
        "are others each time, so that no run has the steps of another. Tokens count while as "
        "many requests run; what comes after fewer are left does not. \"% by bytes read\" "
        "is what would be left of the first case's throughput if steps took as long "
        "as reading weights, keys and values, and their adapters.",
    .groups = groups,
    .examples = "  mlora bench adapters -m llama --num-adapters 8,64,512,2000 --plot many.svg\n",
    .run = run,
};
