/* mlora bench metadata: rows to tokens, on the device and as a host would do it. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/bench/ops.h"
#include "tools/io.h"

/* The lengths of a case: row q brings extend[q] tokens to a sequence that then has kv_len[q]. */
struct rows {
    struct ops_bench *bench;
    int Q, T;
    int32_t *start, *kv_len; /* host: [Q + 1], [Q] */
    int32_t *position, *row; /* host: [T] each */
    void *dev_position, *dev_row;
    struct batch_view batch;
};

/* ---- ways to do it -------------------------------------------------------------------------- */

static void run_op(void *context)
{
    const struct rows *rows = context;
    rows->bench->dev->ops->metadata(rows->bench->dev, &rows->batch);
}

/* What takes the place of the op: a loop on the host, and the two arrays uploaded. */
static void expand_on_host(const struct rows *rows)
{
    struct device *dev = rows->bench->dev;
    const size_t bytes = (size_t)rows->T * sizeof(int32_t);

    for (int q = 0; q < rows->Q; q++) {
        const int n = rows->start[q + 1] - rows->start[q];
        for (int j = 0; j < n; j++) {
            rows->row[rows->start[q] + j] = q;
            rows->position[rows->start[q] + j] = rows->kv_len[q] - n + j;
        }
    }
    dev->ops->upload(dev, rows->dev_position, rows->position, bytes);
    dev->ops->upload(dev, rows->dev_row, rows->row, bytes);
}

static double time_op(struct rows *rows)
{
    return ops_time(rows->bench, run_op, rows);
}

static double time_host(struct rows *rows)
{
    enum { RUNS = 50 };
    double best = 1e9;

    for (int i = 0; i < RUNS && rows->bench->status == MLORA_OK; i++) {
        const double start = seconds();
        expand_on_host(rows);
        rows->bench->status = rows->bench->dev->ops->sync(rows->bench->dev);
        const double spent = seconds() - start;
        if (spent < best) best = spent;
    }
    return best;
}

/* A column each. */
static const struct {
    const char *column;
    double (*time)(struct rows *rows);
} ways[] = {
    {"host us", time_host},
    {"op us", time_op},
};

/* ---- cases ---------------------------------------------------------------------------------- */

static void free_rows(struct rows *rows)
{
    ops_release(rows->bench);
    free(rows->start);
    free(rows->kv_len);
    free(rows->position);
    free(rows->row);
}

/* Rows of 1 to `longest` tokens, or all of `longest`. */
static void make_rows(struct rows *rows, int Q, int longest, bool random)
{
    struct ops_bench *bench = rows->bench;
    uint64_t state = 1;
    int max_row = 0;

    rows->Q = Q;
    rows->start = calloc((size_t)Q + 1, sizeof *rows->start);
    rows->kv_len = calloc((size_t)Q, sizeof *rows->kv_len);
    for (int q = 0; q < Q && rows->start && rows->kv_len; q++) {
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        const int n = random ? 1 + (int)((state >> 33) % (uint64_t)longest) : longest;
        rows->start[q + 1] = rows->start[q] + n;
        rows->kv_len[q] = 1024 + n;
        if (n > max_row) max_row = n;
    }
    rows->T = rows->start ? rows->start[Q] : 0;
    rows->position = calloc((size_t)rows->T + 1, sizeof *rows->position);
    rows->row = calloc((size_t)rows->T + 1, sizeof *rows->row);
    if (!rows->start || !rows->kv_len || !rows->position || !rows->row) {
        bench->status = error_set(MLORA_ENOMEM, "out of memory for rows");
        return;
    }
    rows->dev_position = ops_memory(bench, (size_t)rows->T * sizeof(int32_t));
    rows->dev_row = ops_memory(bench, (size_t)rows->T * sizeof(int32_t));
    rows->batch = (struct batch_view){
        .T = rows->T,
        .Q = Q,
        .max_row = max_row,
        .max_kv = 1024 + max_row,
        .row_start = ops_upload(bench, rows->start, ((size_t)Q + 1) * sizeof *rows->start),
        .kv_len = ops_upload(bench, rows->kv_len, (size_t)Q * sizeof *rows->kv_len),
        .position = rows->dev_position,
        .row = rows->dev_row,
    };
}

/* The same on either way, or the times mean nothing. */
static void compare(struct rows *rows)
{
    struct ops_bench *bench = rows->bench;
    const size_t bytes = (size_t)rows->T * sizeof(int32_t);
    int32_t *got = malloc(2 * bytes + 1);

    if (!got) bench->status = error_set(MLORA_ENOMEM, "out of memory for rows");
    if (bench->status == MLORA_OK) {
        bench->dev->ops->download(bench->dev, got, rows->dev_position, bytes);
        bench->dev->ops->download(bench->dev, got + rows->T, rows->dev_row, bytes);
        expand_on_host(rows);
        if (memcmp(got, rows->position, bytes) != 0 || memcmp(got + rows->T, rows->row, bytes) != 0)
            bench->status =
                error_set(MLORA_EDEVICE, "metadata of %d rows differs from the host's", rows->Q);
    }
    free(got);
}

static void one_case(struct ops_bench *bench, int Q, int longest, bool random)
{
    struct rows rows = {.bench = bench};

    make_rows(&rows, Q, longest, random);
    json_t *row = json_pack("{s:i, s:s, s:i}", "batch", Q, "lengths", random ? "random" : "static",
                            "tokens", rows.T);
    for (size_t w = 0; w < sizeof ways / sizeof *ways && bench->status == MLORA_OK; w++)
        json_object_set_new(row, ways[w].column, json_real(1e6 * ways[w].time(&rows)));
    if (bench->status == MLORA_OK) run_op(&rows);
    compare(&rows);
    if (bench->status == MLORA_OK)
        bench->status = report_add(bench->report, row);
    else
        json_decref(row);
    free_rows(&rows);
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
     .help = "rows of a step", .fallback = "1,8,64,256,1024"},
    {.name = "row-tokens", .kind = OPTION_INT, AT(longest), .argument = "N", .min = 1,
     .max = 4096, .help = "that a row brings: all of it, and a random number up to it",
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
    .summary = "rows to tokens, on the device and on the host",
    .usage = "[FLAGS]",
    .description = "Expand rows to their tokens' rows and positions: the op that does it on the "
                   "device, and the host doing it and uploading the result.",
    .groups = groups,
    .examples = "  mlora bench metadata --backend cuda --batch-size 64,256,1024\n",
    .run = run,
};
