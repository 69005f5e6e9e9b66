/* mlora bench load: what it takes until the first token, and the memory of it. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "tools/bench/bench.h"
#include "tools/io.h"

struct bench {
    struct setup setup;
    struct bench_output output;
    int64_t repeat;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "repeat", .kind = OPTION_INT, AT(repeat), .argument = "N", .min = 1, .max = 100,
     .help = "starts; the first finds the files cold if nothing has read them", .fallback = "3"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

/* Bytes of this process that lie in RAM now. */
static int64_t resident_bytes(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");

    if (file && fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
    if (file) fclose(file);
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

static mlora_status run_start(json_t *report, const struct bench *bench, int number)
{
    const struct workload work = {
        .batch = 1, .prompt_tokens = 1, .max_tokens = 1, .temperature = 0, .top_p = 1};
    struct setup bare = bench->setup;
    mlora_engine *engine = NULL;
    struct measure measure = {0};
    mlora_info info = {0};

    bare.n_sources = 0; /* the adapters are timed by themselves */
    const double start = seconds();
    mlora_status status = setup_open(&engine, &bare);
    const double opened = seconds();
    if (status == MLORA_OK && number == 0) status = report_add_both(report, engine, &bench->setup);
    const double loading = seconds();
    for (int i = 0; i < bench->setup.n_sources && status == MLORA_OK; i++) {
        const struct adapter_source *source = &bench->setup.sources[i];
        status = mlora_adapter_load(engine, source->path, source->name ? source->name : "adapter");
    }
    const double loaded = seconds();
    if (status == MLORA_OK) status = workload_run(&measure, engine, &work);
    if (status == MLORA_OK) mlora_engine_info(engine, &info);
    if (status == MLORA_OK)
        status = report_add(
            report,
            json_pack("{s:i, s:f, s:i, s:f, s:f, s:f, s:f, s:I, s:I, s:I}", "start", number + 1,
                      "open seconds", opened - start, "adapters", bench->setup.n_sources,
                      "adapter seconds", loaded - loading, "first token ms", measure.first_token_ms,
                      "total seconds",
                      opened - start + loaded - loading + 1e-3 * measure.first_token_ms, "GB/s",
                      1e-9 * (double)info.weight_bytes / (opened - start), "weight bytes",
                      (json_int_t)info.weight_bytes, "kv bytes", (json_int_t)info.kv_bytes,
                      "resident bytes", (json_int_t)resident_bytes()));
    mlora_close(engine);
    return status;
}

static mlora_status action(void *target, json_t *report)
{
    char *folder = NULL;
    struct bench *bench = target;
    mlora_status status = setup_folder(&folder, &bench->setup);

    if (status == MLORA_OK && bench->output.plot) status = plot_check("load", bench->output.plot);
    if (status == MLORA_OK) status = setup_try_ops(&bench->setup);
    for (int i = 0; i < bench->repeat && status == MLORA_OK; i++)
        status = run_start(report, bench, i);
    if (status == MLORA_OK) status = report_finish(report, &bench->output);
    free(folder);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.repeat = 3};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result = bench_main(&bench_load, targets, argc, argv, action, NULL);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_load = {
    .name = "bench load",
    .summary = "start-up time and memory",
    .usage = "--model DIR [FLAGS]",
    .description = "Open the model, load the adapters and generate one token, again and again.",
    .groups = groups,
    .examples = "  mlora bench load -m llama --adapters sql=adapters/sql\n",
    .run = run,
};
