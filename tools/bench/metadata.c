/* mlora bench metadata: lengths of requests to lengths and positions of their tokens, for each way
 * in which the device finds a token's request, beside a host that does it. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/bench/ops.h"
#include "tools/io.h"

enum { TOPK = 2048, IN_A_GRAPH = 16 /* the op is shorter than the launch of a graph */ };

/* Request b extends its sequence, kv_len[b] tokens then, by extend_len[b]. */
struct requests {
    struct ops_bench *bench;
    int n, T;
    int32_t *extend_len, *kv_len;    /* host, [n] */
    int32_t *token_kv_len, *clamped; /* host, [T], what is right */
    int32_t *start;                  /* host, [n + 1] */
    struct extend_view extend;       /* device */
    struct batch_view batch;         /* device: the same as rows of a step */
};

/* ---- ways to do it -------------------------------------------------------------------------- */

static void run_extend(void *context)
{
    const struct requests *requests = context;
    struct device *dev = requests->bench->dev;
    for (int i = 0; i < IN_A_GRAPH; i++) dev->ops->extend_metadata(dev, &requests->extend);
}

static void run_rows(void *context)
{
    const struct requests *requests = context;
    struct device *dev = requests->bench->dev;
    for (int i = 0; i < IN_A_GRAPH; i++) dev->ops->metadata(dev, &requests->batch);
}

/* The result of the way before is taken away first. */
static double time_extend(struct requests *requests, enum extend_search search)
{
    struct device *dev = requests->bench->dev;
    const size_t bytes = (size_t)requests->T * sizeof(int32_t);

    memset(requests->clamped, 0, bytes);
    dev->ops->upload(dev, requests->extend.token_kv_len, requests->clamped, bytes);
    dev->ops->upload(dev, requests->extend.clamped_kv_len, requests->clamped, bytes);
    requests->extend.search = search;
    return ops_time(requests->bench, run_extend, requests) / IN_A_GRAPH;
}

static void expand_on_host(const struct requests *requests)
{
    int t = 0;

    for (int b = 0; b < requests->n; b++) {
        for (int j = 0; j < requests->extend_len[b]; j++, t++) {
            const int32_t length = requests->kv_len[b] - requests->extend_len[b] + 1 + j;
            requests->token_kv_len[t] = length;
            requests->clamped[t] = length < TOPK ? length : TOPK;
        }
    }
}

/* The lengths come from the device, as drafts are accepted there, and the arrays go back. */
static double time_host(struct requests *requests)
{
    enum { RUNS = 50 };
    const size_t in = (size_t)requests->n * sizeof(int32_t);
    const size_t out = (size_t)requests->T * sizeof(int32_t);
    struct device *dev = requests->bench->dev;
    double best = 1e9;

    for (int i = 0; i < RUNS && requests->bench->status == MLORA_OK; i++) {
        const double start = seconds();
        dev->ops->download(dev, requests->extend_len, requests->extend.extend_len, in);
        dev->ops->download(dev, requests->kv_len, requests->extend.kv_len, in);
        expand_on_host(requests);
        dev->ops->upload(dev, requests->extend.token_kv_len, requests->token_kv_len, out);
        dev->ops->upload(dev, requests->extend.clamped_kv_len, requests->clamped, out);
        requests->bench->status = dev->ops->sync(dev);
        const double spent = seconds() - start;
        if (spent < best) best = spent;
    }
    return best;
}

/* A column each. */
static const struct {
    const char *column;
    enum extend_search search;
} searches[] = {
    {"linear us", EXTEND_LINEAR},
    {"binary us", EXTEND_BINARY},
    {"adaptive us", EXTEND_ADAPTIVE},
    {"by request us", EXTEND_BY_REQUEST},
};

/* What the device has written is what the host computes, or the times mean nothing. */
static void compare(struct requests *requests, const char *column)
{
    struct ops_bench *bench = requests->bench;
    const size_t bytes = (size_t)requests->T * sizeof(int32_t);
    int32_t *got = malloc(2 * bytes + 1);

    if (!got && bench->status == MLORA_OK)
        bench->status = error_set(MLORA_ENOMEM, "out of memory for requests");
    if (bench->status == MLORA_OK) {
        expand_on_host(requests);
        bench->dev->ops->download(bench->dev, got, requests->extend.token_kv_len, bytes);
        bench->dev->ops->download(bench->dev, got + requests->T, requests->extend.clamped_kv_len,
                                  bytes);
        if (memcmp(got, requests->token_kv_len, bytes) != 0 ||
            memcmp(got + requests->T, requests->clamped, bytes) != 0)
            bench->status = error_set(MLORA_EDEVICE,
                                      "%s: the result for %d requests differs from "
                                      "the host's",
                                      column, requests->n);
    }
    free(got);
}

/* ---- cases ---------------------------------------------------------------------------------- */

static void free_requests(struct requests *requests)
{
    ops_release(requests->bench);
    free(requests->extend_len);
    free(requests->kv_len);
    free(requests->start);
    free(requests->token_kv_len);
    free(requests->clamped);
}

/* Requests that extend by 1 to `longest` tokens, or all by `longest`. */
static void make_requests(struct requests *requests, int n, int longest, bool random)
{
    struct ops_bench *bench = requests->bench;
    const size_t in = (size_t)n * sizeof(int32_t), most = (size_t)n * (size_t)longest;
    uint64_t state = 1;

    requests->n = n;
    requests->extend_len = malloc(in);
    requests->kv_len = malloc(in);
    requests->start = calloc((size_t)n + 1, sizeof *requests->start);
    requests->token_kv_len = calloc(most, sizeof *requests->token_kv_len);
    requests->clamped = calloc(most, sizeof *requests->clamped);
    if (!requests->extend_len || !requests->kv_len || !requests->start || !requests->token_kv_len ||
        !requests->clamped) {
        bench->status = error_set(MLORA_ENOMEM, "out of memory for requests");
        return;
    }
    for (int b = 0; b < n; b++) {
        random_next(&state);
        const int length = random ? 1 + (int)((state >> 33) % (uint64_t)longest) : longest;
        requests->extend_len[b] = length;
        requests->kv_len[b] = 1024 + (int)((state >> 40) % 2048);
        requests->start[b + 1] = requests->start[b] + length;
    }
    const int T = requests->T = requests->start[n];
    requests->extend = (struct extend_view){
        .bs = n,
        .capacity = T,
        .topk = TOPK,
        .extend_len = ops_upload(bench, requests->extend_len, in),
        .kv_len = ops_upload(bench, requests->kv_len, in),
        .total = ops_memory(bench, sizeof(int32_t)),
        .request_start = ops_upload(bench, requests->start, in + sizeof(int32_t)),
        .token_kv_len = ops_memory(bench, (size_t)T * sizeof(int32_t)),
        .clamped_kv_len = ops_memory(bench, (size_t)T * sizeof(int32_t)),
    };
    requests->batch = (struct batch_view){
        .T = T,
        .Q = n,
        .max_row = longest,
        .max_kv = 1024 + 2048,
        .row_start = requests->extend.request_start,
        .kv_len = requests->extend.kv_len,
        .position = ops_memory(bench, (size_t)T * sizeof(int32_t)),
        .row = ops_memory(bench, (size_t)T * sizeof(int32_t)),
    };
}

static void one_case(struct ops_bench *bench, int n, int longest, bool random)
{
    struct requests requests = {.bench = bench};

    make_requests(&requests, n, longest, random);
    json_t *row = json_pack("{s:i, s:s, s:i, s:f}", "requests", n, "lengths",
                            random ? "random" : "static", "tokens", requests.T, "host us",
                            bench->status == MLORA_OK ? 1e6 * time_host(&requests) : 0);
    for (size_t i = 0; i < sizeof searches / sizeof *searches && bench->status == MLORA_OK; i++) {
        const double spent = time_extend(&requests, searches[i].search);
        json_object_set_new(row, searches[i].column, json_real(1e6 * spent));
        compare(&requests, searches[i].column);
    }
    if (bench->status == MLORA_OK)
        json_object_set_new(row, "step us",
                            json_real(1e6 * ops_time(bench, run_rows, &requests) / IN_A_GRAPH));
    if (bench->status == MLORA_OK)
        bench->status = report_add(bench->report, row);
    else
        json_decref(row);
    free_requests(&requests);
}

/* ---- the command ---------------------------------------------------------------------------- */

struct bench {
    struct bench_output output;
    struct setup setup;
    const char *batch_sizes;
    int64_t longest;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench, member)
static const struct option_spec specs[] = {
    {.name = "batch-size", .kind = OPTION_TEXT, AT(batch_sizes), .argument = "N,...",
     .help = "requests", .fallback = "1,8,64,256,1024"},
    {.name = "extend", .kind = OPTION_INT, AT(longest), .argument = "N", .min = 1,
     .max = 4096, .help = "tokens of a request: all of it (static), and 1 to it (random)",
     .fallback = "4"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"What to run", specs},
    {"Output", bench_output_specs},
    {"Device", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

static mlora_status action(void *target, json_t *report)
{
    struct bench *bench = target;
    struct ops_bench ops = {.report = report};
    int32_t *batches = NULL;
    int n = 0;

    mlora_status status = read_list(&batches, &n, bench->batch_sizes, 1, 65536, "--batch-size");
    if (status == MLORA_OK && bench->output.plot)
        status = plot_check("metadata", bench->output.plot);
    if (status == MLORA_OK) status = ops_open(&ops, &bench->setup);
    if (status == MLORA_OK) {
        for (int i = 0; i < n && ops.status == MLORA_OK; i++) {
            one_case(&ops, batches[i], (int)bench->longest, true);
            one_case(&ops, batches[i], (int)bench->longest, false);
        }
        status = ops.status;
    }
    if (status == MLORA_OK) status = report_finish(report, &bench->output);
    ops_close(&ops);
    free(batches);
    return status;
}

static int run(int argc, char **argv)
{
    struct bench bench = {.batch_sizes = "1,8,64,256,1024", .longest = 4};
    void *const targets[] = {&bench, &bench.output, &bench.setup};

    const int result = bench_main(&bench_metadata, targets, argc, argv, action, NULL);
    setup_free(&bench.setup);
    return result;
}

const struct command bench_metadata = {
    .name = "bench metadata",
    .summary = "lengths of requests to their tokens, four ways",
    .usage = "[FLAGS]",
    .description = "Requests extend their sequences by several tokens, as drafts do: compute each "
                   "token's sequence length. \"host\" fetches the lengths, computes and uploads; "
                   "the others are one op each; \"step\" is the op that every step begins with.",
    .groups = groups,
    .examples = "  mlora bench metadata --backend cuda --batch-size 64,256,1024 --extend 8\n",
    .run = run,
};
