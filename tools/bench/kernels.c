/* mlora bench kernels: single ops against what the memory's speed or the arithmetic's allows. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/custom.h"
#include "tools/bench/ops.h"

/* ---- one op over many layers ---------------------------------------------------------------- */

struct op_case {
    struct ops_bench *bench;
    int T, layers;
    void *x, *y;          /* activations */
    void *matrix;         /* [layers, N, K], or [layers, ...] keys and values */
    size_t matrix_values; /* of one layer */
    int N, K;
    float *residual; /* [layers, T, D] */
    const float *weight;
    struct ops_rows rows;
    struct heads heads;
    struct sample_view sample;
};

static void *of_layer(const struct op_case *at, int layer)
{
    const size_t bytes = at->matrix_values * dtype_bytes(at->bench->dtype);
    return (char *)at->matrix + (size_t)layer * bytes;
}

static void run_matmul(void *context)
{
    const struct op_case *at = context;
    struct device *dev = at->bench->dev;

    for (int l = 0; l < at->layers; l++) {
        const struct matrix w = {of_layer(at, l), at->bench->dtype, at->N, at->K};
        dev->ops->matmul(dev, at->y, at->bench->dtype, at->x, &w, NULL, at->T, at->bench->dtype);
    }
}

static void run_attention(void *context)
{
    const struct op_case *at = context;
    struct device *dev = at->bench->dev;

    for (int l = 0; l < at->layers; l++) {
        struct kv_view kv = at->rows.kv;
        kv.k = of_layer(at, 2 * l);
        kv.v = of_layer(at, 2 * l + 1);
        dev->ops->attention(dev, at->y, at->x, at->bench->dtype, &kv, &at->rows.batch, &at->heads,
                            at->bench->dtype);
    }
}

static void run_norm(void *context)
{
    const struct op_case *at = context;
    struct device *dev = at->bench->dev;

    for (int l = 0; l < at->layers; l++)
        dev->ops->add_rms_norm(dev, at->y, at->residual + (size_t)l * at->matrix_values,
                               of_layer(at, l), at->bench->dtype, at->weight, at->T, at->K, 1e-5f,
                               at->bench->dtype);
}

static void run_silu(void *context)
{
    const struct op_case *at = context;
    struct device *dev = at->bench->dev;

    for (int l = 0; l < at->layers; l++)
        dev->ops->silu_mul(dev, at->y, of_layer(at, l), at->bench->dtype, at->T, at->K,
                           at->bench->dtype);
}

static void run_sample(void *context)
{
    const struct op_case *at = context;
    struct device *dev = at->bench->dev;

    dev->ops->sample(dev, at->y, at->x, &at->sample, at->K);
}

/* ---- rows ----------------------------------------------------------------------------------- */

/* The later of what the memory and what the arithmetic allows. */
static void add_row(struct ops_bench *bench, const char *kernel, const char *phase, int T,
                    const char *shape, double seconds, double bytes, double flops)
{
    const double memory = bytes / bench->bandwidth;
    const double arithmetic = bench->flops > 0 ? flops / bench->flops : 0;
    const double limit = memory > arithmetic ? memory : arithmetic;

    if (bench->status != MLORA_OK || seconds <= 0) return;
    bench->status = report_add(bench->report,
                               json_pack("{s:s, s:s, s:i, s:n, s:n, s:s, s:f, s:f, s:f, s:f, s:f}",
                                         "kernel", kernel, "phase", phase, "tokens", T, "adapters",
                                         "rank", "case", shape, "us", 1e6 * seconds, "limit us",
                                         1e6 * limit, "% of limit", 100 * limit / seconds, "MB",
                                         1e-6 * bytes, "GFLOP/s", 1e-9 * flops / seconds));
}

static double matmul_time(struct ops_bench *bench, int T, int N, int K)
{
    const double bytes = (double)N * K * (double)dtype_bytes(bench->dtype);
    struct op_case at = {.bench = bench, .T = T, .N = N, .K = K};

    at.layers = ops_layers(bench, bytes);
    at.matrix_values = (size_t)N * (size_t)K;
    at.matrix = ops_random(bench, (size_t)at.layers * at.matrix_values, bench->dtype);
    at.x = ops_random(bench, (size_t)T * (size_t)K, bench->dtype);
    at.y = ops_memory(bench, (size_t)T * (size_t)N * dtype_bytes(bench->dtype));
    const double seconds = ops_time(bench, run_matmul, &at) / at.layers;
    ops_release(bench);
    return seconds;
}

/* What a large square product reaches is the limit of all arithmetic. */
void measure_flops(struct ops_bench *bench)
{
    const int width = bench->cuda ? 8192 : 512;
    const double seconds = matmul_time(bench, width, width, width);

    if (seconds > 0) bench->flops = 2.0 * width * width * width / seconds;
}

static void matmul_cases(struct ops_bench *bench, const char *phase, int T)
{
    const struct model_config *c = &bench->config;
    const int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const struct {
        const char *name;
        int N, K;
    } linears[] = {{"qkv", q + 2 * kv, c->hidden_size},
                   {"o", c->hidden_size, q},
                   {"gate_up", 2 * c->mlp_size, c->hidden_size},
                   {"down", c->hidden_size, c->mlp_size},
                   {"head", c->vocab_size, c->hidden_size}};

    for (size_t i = 0; i < sizeof linears / sizeof *linears; i++) {
        const int N = linears[i].N, K = linears[i].K;
        char shape[64];
        if (strcmp(phase, "prefill") == 0 && strcmp(linears[i].name, "head") == 0) continue;
        snprintf(shape, sizeof shape, "%s %d x %d", linears[i].name, N, K);
        const double values = (double)N * K + (double)T * N + (double)T * K;
        add_row(bench, "matmul", phase, T, shape, matmul_time(bench, T, N, K),
                values * (double)dtype_bytes(bench->dtype), 2.0 * T * N * K);
    }
}

static void attention_case(struct ops_bench *bench, const char *phase, int Q, int kv_len, int n_new)
{
    const struct model_config *c = &bench->config;
    const size_t element = dtype_bytes(bench->dtype);
    struct op_case at = {.bench = bench, .T = Q * n_new};
    char shape[64];

    at.heads = (struct heads){.H = c->n_heads,
                              .G = c->n_kv_heads,
                              .d = c->head_dim,
                              .scale = 1.0f / sqrtf((float)c->head_dim)};
    at.rows = ops_rows(bench, Q, kv_len, n_new);
    at.matrix_values =
        (size_t)at.rows.n_blocks * KV_BLOCK * (size_t)c->n_kv_heads * (size_t)c->head_dim;
    at.layers = ops_layers(bench, 2.0 * (double)(at.matrix_values * element));
    at.matrix = ops_random(bench, 2 * (size_t)at.layers * at.matrix_values, bench->dtype);
    const size_t q_values = (size_t)at.T * (size_t)c->n_heads * (size_t)c->head_dim;
    const size_t qkv = q_values + 2 * (size_t)at.T * (size_t)(c->n_kv_heads * c->head_dim);
    at.x = ops_random(bench, qkv, bench->dtype);
    at.y = ops_memory(bench, q_values * element);
    const double seconds = ops_time(bench, run_attention, &at) / at.layers;
    ops_release(bench);

    snprintf(shape, sizeof shape, "%d rows of %d", Q, kv_len);
    const double kv_values = 2.0 * Q * kv_len * c->n_kv_heads * c->head_dim;
    const double pairs = (double)Q * n_new * (2.0 * kv_len - n_new + 1) / 2;
    add_row(bench, "attention", phase, at.T, shape, seconds,
            (kv_values + 2.0 * (double)q_values) * (double)element,
            4.0 * c->n_heads * c->head_dim * pairs);
}

static void norm_case(struct ops_bench *bench, const char *phase, int T)
{
    const int D = bench->config.hidden_size;
    struct op_case at = {.bench = bench, .T = T, .K = D};
    char shape[64];

    at.matrix_values = (size_t)T * (size_t)D;
    const double bytes = (double)at.matrix_values * (double)dtype_bytes(bench->dtype);
    const double x_bytes = (double)at.matrix_values * sizeof(float);
    at.layers = ops_layers(bench, bytes + x_bytes);
    at.matrix = ops_random(bench, (size_t)at.layers * at.matrix_values, bench->dtype);
    at.residual = ops_random(bench, (size_t)at.layers * at.matrix_values, DTYPE_F32);
    at.y = ops_memory(bench, (size_t)bytes);
    at.weight = ops_random(bench, (size_t)D, DTYPE_F32);
    snprintf(shape, sizeof shape, "%d wide", D);
    const double seconds = ops_time(bench, run_norm, &at) / at.layers;
    ops_release(bench);
    add_row(bench, "add_rms_norm", phase, T, shape, seconds, 2 * (bytes + x_bytes), 0);
}

static void silu_case(struct ops_bench *bench, const char *phase, int T)
{
    const int F = bench->config.mlp_size;
    struct op_case at = {.bench = bench, .T = T, .K = F};
    char shape[64];

    at.matrix_values = 2 * (size_t)T * (size_t)F;
    const double bytes = (double)at.matrix_values * (double)dtype_bytes(bench->dtype);
    at.layers = ops_layers(bench, bytes);
    at.matrix = ops_random(bench, (size_t)at.layers * at.matrix_values, bench->dtype);
    at.y = ops_memory(bench, (size_t)bytes);
    snprintf(shape, sizeof shape, "%d wide", F);
    const double seconds = ops_time(bench, run_silu, &at) / at.layers;
    ops_release(bench);
    add_row(bench, "silu_mul", phase, T, shape, seconds, 1.5 * bytes, 0);
}

static void sample_cases(struct ops_bench *bench, int Q)
{
    static const struct {
        const char *name;
        struct sampling sampling;
    } kinds[] = {
        {"greedy", {.top_p = 1, .repetition_penalty = 1}},
        {"temperature 0.7", {.temperature = 0.7f, .top_p = 1, .repetition_penalty = 1}},
        {"temperature 0.7, top-p 0.9",
         {.temperature = 0.7f, .top_p = 0.9f, .repetition_penalty = 1}},
    };
    const int V = bench->config.vocab_size;

    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        struct op_case at = {.bench = bench, .T = Q, .K = V};
        struct sampling *sampling = calloc((size_t)Q, sizeof *sampling);
        int32_t *zeros = calloc((size_t)Q + 1, sizeof *zeros);
        if (!sampling || !zeros) bench->status = error_set(MLORA_ENOMEM, "out of memory");
        for (int q = 0; q < Q && sampling; q++) {
            sampling[q] = kinds[k].sampling;
            sampling[q].seed = (uint64_t)q;
        }
        at.x = ops_random(bench, (size_t)Q * (size_t)V, DTYPE_F32);
        at.y = ops_memory(bench, (size_t)Q * sizeof(int32_t));
        const size_t bytes = (size_t)Q * sizeof *zeros;
        if (bench->status == MLORA_OK)
            at.sample = (struct sample_view){
                .Q = Q,
                .sampling = ops_upload(bench, sampling, (size_t)Q * sizeof *sampling),
                .history = ops_upload(bench, zeros, bytes),
                .history_start = ops_upload(bench, zeros, bytes + sizeof *zeros),
                .n_prompt = ops_upload(bench, zeros, bytes),
            };
        const double seconds = ops_time(bench, run_sample, &at);
        ops_release(bench);
        free(sampling);
        free(zeros);
        add_row(bench, "sample", "decode", Q, kinds[k].name, seconds, 4.0 * Q * V, 0);
    }
}

void decode_cases(struct ops_bench *bench, const int32_t *tokens, int n_tokens)
{
    const int most = bench->cuda ? 1 << 17 : 1 << 12; /* tokens of all rows' caches together */

    for (int i = 0; i < n_tokens; i++) {
        const int T = tokens[i];
        const int lengths[] = {300, 1024, 8192, 32768};
        matmul_cases(bench, "decode", T);
        for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++)
            if (lengths[k] <= bench->config.max_position && (int64_t)lengths[k] * T <= 2 * most)
                attention_case(bench, "decode", T, lengths[k], 1);
        norm_case(bench, "decode", T);
        silu_case(bench, "decode", T);
        sample_cases(bench, T);
    }
}

void prefill_cases(struct ops_bench *bench, const int32_t *tokens, int n_tokens)
{
    for (int i = 0; i < n_tokens; i++) {
        const int T = tokens[i];
        matmul_cases(bench, "prefill", T);
        if (T <= bench->config.max_position) attention_case(bench, "prefill", 1, T, T);
        norm_case(bench, "prefill", T);
        silu_case(bench, "prefill", T);
    }
}

/* ---- the command ---------------------------------------------------------------------------- */

struct bench {
    struct bench_output output;
    struct setup setup;
    const char *modes, *tokens, *n_adapters, *ranks;
    int phase, only;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "phase", .kind = OPTION_CHOICE, AT(phase), .choices = "decode|prefill",
     .help = "one token of each row, or many of few", .fallback = "decode"},
    {.name = "only", .kind = OPTION_CHOICE, AT(only), .choices = "all|lora|base",
     .help = "the adapters' products, or the ops of the base model", .fallback = "all"},
    {.name = "modes", .kind = OPTION_TEXT, AT(modes), .argument = "MODE,...",
     .help = "ways to add the adapters' products", .fallback = "auto"},
    {.name = "batch-size", .aliases = {"tokens"}, .kind = OPTION_TEXT, AT(tokens),
     .argument = "N,...", .help = "tokens of a step",
     .fallback = "decode: 1,16,64; prefill: 512,4096"},
    {.name = "num-adapters", .kind = OPTION_TEXT, AT(n_adapters), .argument = "N,...",
     .help = "that the tokens use", .fallback = "1,7,64"},
    {.name = "rank", .kind = OPTION_TEXT, AT(ranks), .argument = "R,...", .help = "of the adapters",
     .fallback = "16"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Model (config.json is read)", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

static mlora_status action(void *target, json_t *report)
{
    char *folder = NULL;
    struct bench *bench = target;
    struct ops_bench ops = {.report = report};
    int32_t *tokens = NULL, *adapters = NULL, *ranks = NULL, *modes = NULL;
    struct addon_lists lists = {0};
    const bool prefill = bench->phase == 1;

    if (!bench->tokens) bench->tokens = prefill ? "512,4096" : "1,16,64";
    mlora_status status =
        read_list(&tokens, &lists.n_tokens, bench->tokens, 1, 65536, "--batch-size");
    if (status == MLORA_OK)
        status =
            read_list(&adapters, &lists.n_adapters, bench->n_adapters, 1, 4096, "--num-adapters");
    if (status == MLORA_OK)
        status = read_list(&ranks, &lists.n_ranks, bench->ranks, 1, 512, "--rank");
    if (status == MLORA_OK) status = read_modes(&modes, &lists.n_modes, bench->modes);
    if (status == MLORA_OK && bench->output.plot)
        status = plot_check("kernels", bench->output.plot);
    if (status == MLORA_OK) status = setup_folder(&folder, &bench->setup);
    if (status == MLORA_OK) status = model_config_read(&ops.config, folder);
    if (status == MLORA_OK) status = report_add_shape(report, &ops.config);
    if (status == MLORA_OK) status = setup_try_ops(&bench->setup);
    if (status == MLORA_OK) status = ops_open(&ops, &bench->setup);
    if (status == MLORA_OK) status = custom_open(ops.dev, bench->setup.ops, bench->setup.n_ops);
    if (status != MLORA_OK) goto done;

    lists.tokens = tokens, lists.adapters = adapters, lists.ranks = ranks, lists.modes = modes;
    if (bench->only != 2) addon_cases(&ops, &lists, prefill);
    if (bench->only != 1) measure_flops(&ops);
    if (bench->only != 1) (prefill ? prefill_cases : decode_cases)(&ops, tokens, lists.n_tokens);
    status = ops.status;
    if (status == MLORA_OK) json_object_set_new(report, "flops_per_second", json_real(ops.flops));
    if (status == MLORA_OK) status = report_finish(report, &bench->output);

done:
    ops_close(&ops);
    free(tokens);
    free(adapters);
    free(ranks);
    free(modes);
    free(folder);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.modes = "auto", .n_adapters = "1,7,64", .ranks = "16"};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result = bench_main(&bench_kernels, targets, argc, argv, action, NULL);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_kernels = {
    .name = "bench kernels",
    .summary = "single ops beside what the memory allows",
    .usage = "--model DIR [FLAGS]",
    .description =
        "Time what the adapters add to one layer, for each mode, and the ops of the "
        "base model, at the shapes of a model. The ops go through the memory of many "
        "layers, so that no cache serves them. \"loop rows\" calls the ops for each row; "
        "\"cheat_bmm\" gives each row a copy of its own factors.",
    .groups = groups,
    .examples = "  mlora bench kernels -m tools/shapes/llama-3.1-8b --batch-size 1,64\n"
                "  mlora bench kernels -m tools/shapes/llama-3.1-8b --phase prefill --only lora\n",
    .run = run,
};
