/* mlora check-op: an op from a shared object against its definition (random sizes, every type), and
 * its speed beside the built-in op's and the memory's. All of it runs in a process of its own, as
 * the op may crash. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/op_case.h"
#include "tools/bench/ops.h"
#include "tools/child.h"
#include "tools/commands.h"
#include "tools/io.h"
#include "tools/table.h"

struct check {
    struct bench_output output;
    struct setup setup;
    const char *tokens; /* list of --tokens */
    int64_t n_cases, seed;
    double tolerance; /* times what is allowed */

    mlora_op_source source;
    json_t *report;
    struct custom_about about;
    struct ops_bench bench; /* whose device has the op */
    struct device *definition;
};

/* ---- right? --------------------------------------------------------------------------------- */

static int pick(uint64_t *state, int min, int max)
{
    return min + (int)((random_next(state) >> 33) % (uint64_t)(max - min + 1));
}

/* Odd sizes and round ones by turns. */
static struct op_sizes pick_sizes(uint64_t *state, int turn)
{
    const int step = turn % 2 == 0 ? 1 : 32;

    return (struct op_sizes){
        .T = pick(state, 1, turn % 4 == 3 ? 150 : 20),
        .D = step * pick(state, 1, 640 / step),
        .F = step * pick(state, 1, 640 / step),
        .N = step * pick(state, 1, 320 / step),
        .K = step * pick(state, 1, 640 / step),
        .G = pick(state, 1, 3),
        .H = pick(state, 1, 8),
        .d = 2 * step * pick(state, 1, 128 / step / 2 > 0 ? 128 / step / 2 : 1),
        .R = pick(state, 1, 70),
        .more = turn % 3 == 1,
    };
}

/* The types that the engine may ask an op for: activations, weights. */
static const struct op_types all_types[] = {
    {DTYPE_F32, DTYPE_F32},  {DTYPE_BF16, DTYPE_BF16}, {DTYPE_F32, DTYPE_BF16},
    {DTYPE_BF16, DTYPE_F32}, {DTYPE_BF16, DTYPE_F16},
};

static int n_types(enum custom_kind kind)
{
    const bool has_weights =
        kind == CUSTOM_MATMUL || kind == CUSTOM_LORA_SHRINK || kind == CUSTOM_LORA_EXPAND;
    return has_weights ? (int)(sizeof all_types / sizeof *all_types) : 2;
}

static mlora_status compare_once(struct check *check, struct op_difference *out,
                                 const struct op_sizes *sizes, const struct op_types *types,
                                 uint64_t seed)
{
    const enum custom_kind kind = check->about.kind;
    struct op_case got = {0}, want = {0};

    mlora_status status = op_case_make(&got, check->bench.dev, kind, sizes, types, false, seed);
    if (status == MLORA_OK)
        status = op_case_make(&want, check->definition, kind, sizes, types, true, seed);
    if (status == MLORA_OK) {
        op_case_run(&got, check->bench.dev->ops);
        op_case_run(&want, check->definition->ops);
        status = op_case_compare(out, &got, &want);
    }
    op_case_free(&got);
    op_case_free(&want);
    return status;
}

/* A row of `rows`, and the first thing that is wrong in `*refusal`. */
static mlora_status compare_types(struct check *check, json_t *rows, const struct op_types *types,
                                  mlora_status *refusal)
{
    uint64_t state = (uint64_t)check->seed;
    double worst = 0;
    int n_wrong = 0;
    char where[64] = "";

    for (int i = 0; i < check->n_cases; i++) {
        const struct op_sizes sizes = pick_sizes(&state, i);
        struct op_difference difference;
        const mlora_status status =
            compare_once(check, &difference, &sizes, types, (uint64_t)check->seed + (uint64_t)i);
        if (status != MLORA_OK) return status;
        const double error = difference.error / check->tolerance;
        n_wrong += error > 1;
        if (error > 1 && *refusal == MLORA_OK)
            *refusal = error_set(
                MLORA_EFORMAT,
                "%s: %s is wrong: %s[%zu] is %g, %g is needed (%d tokens, activations %s, weights "
                "%s)",
                check->source.path, custom_name(check->about.kind), difference.tensor,
                difference.index, difference.got, difference.want, sizes.T,
                dtype_name(types->activations), dtype_name(types->weights));
        if (error <= worst) continue;
        worst = error;
        snprintf(where, sizeof where, "%s[%zu]", difference.tensor, difference.index);
    }
    json_t *row =
        json_pack("{s:s, s:s, s:I, s:i, s:f, s:s}", "activations", dtype_name(types->activations),
                  "weights", n_types(check->about.kind) > 2 ? dtype_name(types->weights) : "-",
                  "cases", (json_int_t)check->n_cases, "wrong", n_wrong, "worst, 1 is allowed",
                  isfinite(worst) ? worst : 1e9, "at", where);
    return row && json_array_append_new(rows, row) == 0
               ? MLORA_OK
               : error_set(MLORA_ENOMEM, "out of memory for a report");
}

static mlora_status compare(struct check *check)
{
    json_t *rows = json_array();
    mlora_status status = MLORA_OK, refusal = MLORA_OK;

    for (int i = 0; i < n_types(check->about.kind) && status == MLORA_OK; i++)
        status = compare_types(check, rows, &all_types[i], &refusal);
    if (status == MLORA_OK) {
        printf("%s of %s against %s\n\n", custom_name(check->about.kind), check->source.path,
               check->about.is_another ? "its own reference" : "the built-in definition");
        table_print(stdout, rows);
        printf("\n");
        json_object_set(check->report, "checks", rows);
    }
    json_decref(rows);
    return status != MLORA_OK ? status : refusal;
}

/* ---- fast? ---------------------------------------------------------------------------------- */

enum { COPIES_MAX = 64 };

struct layers {
    struct op_case cases[COPIES_MAX];
    int n;
    const struct kernels *ops;
};

static void run_layers(void *context)
{
    const struct layers *layers = context;
    for (int i = 0; i < layers->n; i++) op_case_run(&layers->cases[i], layers->ops);
}

/* Those of an 8B model on a GPU, of a 1B model on a CPU. */
static struct op_sizes large_sizes(bool cuda, int T)
{
    return cuda ? (struct op_sizes){.T = T,
                                    .D = 4096,
                                    .F = 14336,
                                    .N = 4096,
                                    .K = 4096,
                                    .H = 32,
                                    .G = 8,
                                    .d = 128,
                                    .R = 16}
                : (struct op_sizes){.T = T,
                                    .D = 2048,
                                    .F = 8192,
                                    .N = 2048,
                                    .K = 2048,
                                    .H = 32,
                                    .G = 8,
                                    .d = 64,
                                    .R = 16};
}

static void describe_shape(char *out, size_t bytes, enum custom_kind kind, const struct op_sizes *s)
{
    switch (kind) {
    case CUSTOM_SILU_MUL:
        snprintf(out, bytes, "%d", s->F);
        break;
    case CUSTOM_ADD_RMS_NORM:
        snprintf(out, bytes, "%d", s->D);
        break;
    case CUSTOM_ROPE:
        snprintf(out, bytes, "%d + 2 x %d heads of %d", s->H, s->G, s->d);
        break;
    case CUSTOM_MATMUL:
        snprintf(out, bytes, "%d x %d", s->N, s->K);
        break;
    default:
        snprintf(out, bytes, "3 x %d x %d, rank %d", s->N, s->K, s->R);
        break;
    }
}

/* The roofline: no faster than its bytes are copied, nor than its sums are made. */
static mlora_status add_time(struct check *check, int T, const char *shape, double own,
                             double builtin, const struct op_case *at)
{
    const struct ops_bench *bench = &check->bench;
    const double memory = at->bytes / bench->bandwidth;
    const double arithmetic = bench->flops > 0 ? at->flops / bench->flops : 0;
    const double limit = memory > arithmetic ? memory : arithmetic;
    json_t *row = json_pack(
        "{s:i, s:s, s:s, s:f, s:f, s:f, s:s, s:f, s:f, s:f}", "tokens", T, "shape", shape, "dtype",
        dtype_name(bench->dtype), "us", 1e6 * own, "built-in us", 1e6 * builtin, "limit us",
        1e6 * limit, "of", memory > arithmetic ? "memory" : "arithmetic", "% of limit",
        100 * limit / own, "MB", 1e-6 * at->bytes, "GB/s", 1e-9 * at->bytes / own);

    if (row && at->flops > 0)
        json_object_set_new(row, "GFLOP/s", json_real(1e-9 * at->flops / own));
    return report_add(check->report, row);
}

static mlora_status time_tokens(struct check *check, int T)
{
    struct ops_bench *bench = &check->bench;
    struct op_sizes sizes = large_sizes(bench->cuda, T);
    const struct op_types types = {bench->dtype, bench->dtype};
    struct layers layers = {.n = 1};
    char shape[64];
    mlora_status status = MLORA_OK;

    sizes.more = check->about.kind == CUSTOM_ADD_RMS_NORM;
    for (int i = 0; i < layers.n && status == MLORA_OK; i++) {
        status = op_case_make(&layers.cases[i], bench->dev, check->about.kind, &sizes, &types,
                              false, (uint64_t)i);
        if (i == 0) layers.n = ops_layers(bench, layers.cases[0].bytes);
        if (layers.n > COPIES_MAX) layers.n = COPIES_MAX;
    }
    bench->status = status;
    layers.ops = bench->dev->ops;
    const double own = ops_time(bench, run_layers, &layers) / layers.n;
    layers.ops = custom_builtin(bench->dev);
    const double builtin = ops_time(bench, run_layers, &layers) / layers.n;
    describe_shape(shape, sizeof shape, check->about.kind, &sizes);
    if (bench->status == MLORA_OK)
        bench->status = add_time(check, T, shape, own, builtin, &layers.cases[0]);
    for (int i = 0; i < layers.n; i++) op_case_free(&layers.cases[i]);
    return bench->status;
}

/* ---- the command ---------------------------------------------------------------------------- */

static mlora_status open_devices(struct check *check)
{
    struct ops_bench *bench = &check->bench;

    mlora_status status = custom_describe(&check->about, &check->source);
    if (status == MLORA_OK) status = cpu_device_open(&check->definition, 1);
    if (status == MLORA_OK) status = custom_open_references(check->definition, &check->source, 1);
    if (status != MLORA_OK) return status;
    status = bench_device_open(&bench->dev, &check->setup, check->about.backend);
    if (status != MLORA_OK)
        return error_prefix(status, "%s: is for the backend %s", check->source.path,
                            check->about.backend);
    bench->report = check->report;
    bench->cuda = strcmp(bench->dev->backend, "cuda") == 0;
    bench->dtype = bench->cuda ? DTYPE_BF16 : DTYPE_F32;
    measure_flops(bench); /* by mlora's own matmul, which the op may be about to replace */
    return bench->status == MLORA_OK ? custom_open(bench->dev, &check->source, 1) : bench->status;
}

static mlora_status check_op(void *context)
{
    struct check *check = context;
    int32_t *tokens = NULL;
    int n = 0;

    mlora_status status = read_list(&tokens, &n, check->tokens, 1, 65536, "--tokens");
    if (status == MLORA_OK) status = open_devices(check);
    if (status == MLORA_OK) status = compare(check);
    if (status == MLORA_OK) status = bench_bandwidth(&check->bench.bandwidth, check->bench.dev);
    if (status == MLORA_OK)
        status = report_add_device(check->report, check->bench.dev, check->bench.bandwidth);
    if (status == MLORA_OK)
        json_object_set_new(check->report, "flops_per_second", json_real(check->bench.flops));
    for (int i = 0; i < n && status == MLORA_OK; i++) status = time_tokens(check, tokens[i]);
    if (status == MLORA_OK) status = report_finish(check->report, &check->output);
    ops_close(&check->bench);
    if (check->definition) check->definition->ops->close(check->definition);
    free(tokens);
    return status;
}

/* clang-format off */
#define AT(member) .offset = offsetof(struct check, member)
static const struct option_spec specs[] = {
    {.name = "cases", .kind = OPTION_INT, AT(n_cases), .argument = "N", .min = 1, .max = 100000,
     .help = "random cases for each type", .fallback = "24"},
    {.name = "seed", .kind = OPTION_INT, AT(seed), .argument = "N", .min = 0, .max = INT32_MAX,
     .help = "of the random numbers", .fallback = "1"},
    {.name = "tolerance", .kind = OPTION_NUMBER, AT(tolerance), .argument = "P", .min = 0,
     .max = 1e6, .above_min = true,
     .help = "times what is allowed: half a unit in the last place of bf16, 1e-5 of f32, and 3e-5 "
             "of the largest result", .fallback = "1"},
    {.name = "tokens", .kind = OPTION_TEXT, AT(tokens), .argument = "N,...",
     .help = "to time it with", .fallback = "1,64,512"},
    {.name = "threads", .letter = 't', .kind = OPTION_INT, AT(setup.n_threads), .argument = "N",
     .min = 1, .max = 4096, .help = "worker threads of the CPU backend",
     .fallback = "one per core"},
    {.name = "json", .kind = OPTION_TEXT, AT(output.json), .argument = "FILE",
     .help = "write the numbers there, too; -: standard output"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {NULL, NULL},
};
/* clang-format on */

static int run(int argc, char **argv)
{
    enum { LIMIT_S = 3600 };
    struct check check = {.tokens = "1,64,512", .n_cases = 24, .seed = 1, .tolerance = 1};
    void *const targets[] = {&check};
    struct operands operands = {0};

    check.report = report_open("check-op", argc, argv);
    mlora_status status = check.report
                              ? options_parse(&command_check_op, targets, argc, argv, &operands)
                              : error_set(MLORA_ENOMEM, "out of memory");
    if (status == MLORA_OK && operands.help) {
        options_help(stdout, &command_check_op);
    } else if (status == MLORA_OK && operands.n != 1) {
        status = error_set(MLORA_EINVAL, "check-op needs one shared object: mlora check-op "
                                         "./my_op.so");
    } else if (status == MLORA_OK) {
        check.source.path = operands.values[0];
        json_object_set_new(check.report, "command",
                            json_pack("s+", "mlora check-op ", check.source.path));
        status = child_run(check.source.path, LIMIT_S, check_op, &check);
    }
    json_decref(check.report);
    const int result = fail(status);
    return finish_output(stdout) != 0 ? 1 : result;
}

const struct command command_check_op = {
    .name = "check-op",
    .summary = "an op of your own: is it right, how fast is it",
    .usage = "FILE [FLAGS]",
    .description = "FILE is a shared object written against kernels/mlora_op.h. Its op is compared "
                   "with the built-in definition (or with its own reference, where it is another "
                   "function) over random sizes and all types, then timed beside the built-in op "
                   "and the memory's bandwidth.",
    .groups = groups,
    .examples = "  mlora check-op ./my_op.so\n"
                "  mlora generate -m llama --op silu_mul=./my_op.so -p 'Once'\n",
    .run = run,
};
