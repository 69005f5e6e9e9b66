/* mlora bench latency: how long a request waits for its first token and for each next one, by how
 * many run together and by whether its adapter is loaded already. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/bench/bench.h"

struct bench {
    struct setup setup;
    struct bench_output output;
    const char *concurrency;
    int64_t n_requests, n_adapters, rank, prompt_tokens, max_tokens;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "concurrency", .kind = OPTION_TEXT, AT(concurrency), .argument = "N,...",
     .help = "requests that run at any time", .fallback = "1,8,64,256"},
    {.name = "requests", .kind = OPTION_INT, AT(n_requests), .argument = "N", .min = 1,
     .max = 1 << 20, .help = "of each case", .fallback = "twice as many as run, at least 16"},
    {.name = "num-adapters", .kind = OPTION_INT, AT(n_adapters), .argument = "N", .min = 1,
     .max = 4096, .help = "that warm requests take turns with", .fallback = "7"},
    {.name = "rank", .kind = OPTION_INT, AT(rank), .argument = "R", .min = 1, .max = 512,
     .help = "of random adapters", .fallback = "16"},
    {.name = "prompt-tokens", .kind = OPTION_INT, AT(prompt_tokens), .argument = "N", .min = 1,
     .max = 1 << 20, .help = "of a request", .fallback = "128"},
    {.name = "max-new-tokens", .aliases = {"max-tokens"}, .kind = OPTION_INT, AT(max_tokens),
     .argument = "N", .min = 1, .max = 1 << 20, .help = "that each request generates",
     .fallback = "64"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

static mlora_status no_adapter(void *user, mlora_engine *engine, int i, char name[ADAPTER_NAME])
{
    (void)user, (void)engine, (void)i;
    name[0] = '\0';
    return MLORA_OK;
}

static mlora_status warm_adapter(void *user, mlora_engine *engine, int i, char name[ADAPTER_NAME])
{
    const struct bench *bench = user;

    (void)engine;
    random_name(name, i % bench->n_adapters);
    return MLORA_OK;
}

/* Each request's own: read from the first of --adapters, or random. */
static mlora_status cold_adapter(void *user, mlora_engine *engine, int i, char name[ADAPTER_NAME])
{
    const struct bench *bench = user;

    snprintf(name, ADAPTER_NAME, "cold%d", i);
    if (bench->setup.n_sources > 0)
        return mlora_adapter_load(engine, bench->setup.sources[0].path, name);
    return mlora_adapter_random(engine, name, (int)bench->rank, (uint64_t)i + 1000);
}

static mlora_status forget_cold(mlora_engine *engine, int n)
{
    mlora_status status = MLORA_OK;

    for (int i = 0; i < n && status == MLORA_OK; i++) {
        char name[ADAPTER_NAME];
        snprintf(name, ADAPTER_NAME, "cold%d", i);
        status = mlora_adapter_unload(engine, name);
    }
    return status == MLORA_OK ? mlora_step(engine, NULL) : status; /* which frees their memory */
}

enum { BASE, WARM, COLD, KINDS };

static mlora_status run_case(json_t *report, struct bench *bench, mlora_engine *engine,
                             int concurrency, int kind)
{
    static const struct {
        const char *name;
        mlora_status (*adapter)(void *, mlora_engine *, int, char *);
    } kinds[KINDS] = {{"none", no_adapter}, {"warm", warm_adapter}, {"cold", cold_adapter}};
    struct stream_load load = {.work = {.batch = concurrency,
                                        .prompt_tokens = bench->prompt_tokens,
                                        .max_tokens = bench->max_tokens,
                                        .temperature = 0.7,
                                        .top_p = 0.9},
                               .n_requests = concurrency > 8 ? 2 * concurrency : 16,
                               .adapter = kinds[kind].adapter,
                               .user = bench};
    struct stream_times times = {0};

    if (bench->n_requests > 0) load.n_requests = (int)bench->n_requests;
    mlora_status status = MLORA_OK;
    if (kind != COLD) { /* warm up: scratch, plans, recordings */
        const int n = load.n_requests;
        load.n_requests = n < concurrency ? n : concurrency;
        status = stream_run(&times, engine, &load);
        stream_free(&times);
        load.n_requests = n;
    }
    if (status == MLORA_OK) status = stream_run(&times, engine, &load);
    if (status == MLORA_OK && kind == COLD) status = forget_cold(engine, load.n_requests);
    if (status == MLORA_OK)
        status = report_add(
            report, json_pack("{s:i, s:s, s:i, s:I, s:f, s:f, s:f, s:f, s:f}", "concurrency",
                              concurrency, "adapter", kinds[kind].name, "requests", load.n_requests,
                              "tokens", (json_int_t)times.n_tokens, "tokens/s",
                              (double)times.n_tokens / times.seconds, "first ms p50",
                              1e3 * percentile(times.first, times.n_first, 50), "first ms p99",
                              1e3 * percentile(times.first, times.n_first, 99), "next ms p50",
                              1e3 * percentile(times.next, times.n_next, 50), "next ms p99",
                              1e3 * percentile(times.next, times.n_next, 99)));
    stream_free(&times);
    return status;
}

static mlora_status action(void *target, json_t *report)
{
    struct bench *bench = target;
    mlora_engine *engine = NULL;
    int32_t *concurrency = NULL;
    int n = 0;

    mlora_status status = read_list(&concurrency, &n, bench->concurrency, 1, 4096, "--concurrency");
    if (status == MLORA_OK && bench->output.plot)
        status = plot_check("latency", bench->output.plot);
    if (status == MLORA_OK && bench->setup.max_num_seqs == 0)
        bench->setup.max_num_seqs = list_largest(concurrency, n);
    bench->setup.no_prefix_cache = true; /* every prompt is computed, and measured */
    if (status == MLORA_OK) status = setup_open(&engine, &bench->setup);
    if (status == MLORA_OK) status = report_add_both(report, engine, &bench->setup);
    if (status == MLORA_OK)
        status = adapters_make(engine, 0, (int)bench->n_adapters, (int)bench->rank);
    for (int i = 0; i < n && status == MLORA_OK; i++)
        for (int kind = BASE; kind < KINDS && status == MLORA_OK; kind++)
            status = run_case(report, bench, engine, concurrency[i], kind);
    if (status == MLORA_OK) status = report_finish(report, &bench->output);
    mlora_close(engine);
    free(concurrency);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.concurrency = "1,8,64,256",
                          .n_adapters = 7,
                          .rank = 16,
                          .prompt_tokens = 128,
                          .max_tokens = 64};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result = bench_main(&bench_latency, targets, argc, argv, action, NULL);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_latency = {
    .name = "bench latency",
    .summary = "time to the first token and between tokens",
    .usage = "--model DIR [FLAGS]",
    .description = "Keep a number of requests running and time their tokens: without an adapter, "
                   "with adapters that are loaded (warm), and with one that is loaded for the "
                   "request when it comes (cold: from the first of --adapters, else random), the "
                   "loading included.",
    .groups = groups,
    .examples = "  mlora bench latency -m llama --adapters sql=adapters/sql --concurrency 1,64\n",
    .run = run,
};
