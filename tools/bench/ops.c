#include "tools/bench/ops.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { POOL = 1 << 20, BATCHES = 3, RUNS_MAX = 200, LAYERS_GPU = 32, LAYERS_CPU = 4 };

/* ---- the device ----------------------------------------------------------------------------- */

mlora_status ops_open(struct ops_bench *ops, const struct setup *setup)
{
    static const char *const backends[] = {"auto", "cpu", "cuda"}; /* as mlora_backend */

    mlora_status status = bench_device_open(&ops->dev, setup, backends[setup->backend]);
    if (status != MLORA_OK) return status;
    ops->cuda = strcmp(ops->dev->backend, "cuda") == 0;
    ops->dtype = setup->dtype == MLORA_DTYPE_BF16 || (setup->dtype == MLORA_DTYPE_AUTO && ops->cuda)
                     ? DTYPE_BF16
                     : DTYPE_F32;
    status = bench_bandwidth(&ops->bandwidth, ops->dev);
    return status == MLORA_OK ? report_add_device(ops->report, ops->dev, ops->bandwidth) : status;
}

void ops_close(struct ops_bench *ops)
{
    ops_release(ops);
    if (ops->dev) ops->dev->ops->close(ops->dev);
    ops->dev = NULL;
}

/* ---- memory --------------------------------------------------------------------------------- */

void *ops_memory(struct ops_bench *bench, size_t bytes)
{
    void *memory = NULL;

    if (bench->status != MLORA_OK) return NULL;
    void **all = realloc(bench->memory, ((size_t)bench->n_memory + 1) * sizeof *all);
    if (!all) {
        bench->status = error_set(MLORA_ENOMEM, "out of memory for a list");
        return NULL;
    }
    bench->memory = all;
    bench->status = bench->dev->ops->alloc(bench->dev, bytes, &memory);
    if (bench->status == MLORA_OK) all[bench->n_memory++] = memory;
    return memory;
}

void *ops_upload(struct ops_bench *bench, const void *from, size_t bytes)
{
    void *memory = ops_memory(bench, bytes);
    if (memory) bench->dev->ops->upload(bench->dev, memory, from, bytes);
    return memory;
}

/* A pool of random numbers is uploaded, then doubled on the device. */
void *ops_random(struct ops_bench *bench, size_t n, enum dtype dtype)
{
    const size_t bytes = n * dtype_bytes(dtype);
    const size_t first = n < POOL ? n : POOL;
    char *memory = ops_memory(bench, bytes);
    char *pool = malloc(first * sizeof(float));
    uint64_t state = bench->n_timed * 2 + 1;

    if (memory && !pool) bench->status = error_set(MLORA_ENOMEM, "out of memory for random values");
    if (!memory || !pool) {
        free(pool);
        return NULL;
    }
    for (size_t i = 0; i < first; i++) {
        const float value = 0.07f * ((float)(random_next(&state) >> 40) / 16777216.0f - 0.5f);
        dtype_store(pool, dtype, i, value);
    }
    size_t done = first * dtype_bytes(dtype);
    bench->dev->ops->upload(bench->dev, memory, pool, done);
    while (done < bytes) {
        const size_t piece = done < bytes - done ? done : bytes - done;
        bench->dev->ops->copy(bench->dev, memory + done, memory, piece);
        done += piece;
    }
    free(pool);
    return memory;
}

void ops_release(struct ops_bench *bench)
{
    for (int i = 0; i < bench->n_memory; i++) bench->dev->ops->free(bench->dev, bench->memory[i]);
    free(bench->memory);
    bench->memory = NULL;
    bench->n_memory = 0;
}

int ops_layers(const struct ops_bench *bench, double bytes_of_one)
{
    const double enough = bench->cuda ? 512e6 : 64e6; /* well above the last cache */
    const int most = bench->cuda ? LAYERS_GPU : LAYERS_CPU;

    if (bytes_of_one * most <= enough) return most;
    return bytes_of_one * 2 >= enough ? 2 : (int)(enough / bytes_of_one) + 1;
}

/* ---- time ----------------------------------------------------------------------------------- */

static void run_once(struct ops_bench *bench, void (*fn)(void *), void *context)
{
    const uint64_t key = bench->n_timed;
    struct device *dev = bench->dev;

    if (dev->ops->replay(dev, &key, sizeof key)) return;
    fn(context);
    dev->ops->record_end(dev);
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of one of n runs. */
static double time_runs(struct ops_bench *bench, int n, void (*fn)(void *), void *context)
{
    struct device *dev = bench->dev;

    dev->ops->mark(dev, 0);
    for (int i = 0; i < n; i++) run_once(bench, fn, context);
    dev->ops->mark(dev, 1);
    bench->status = dev->ops->sync(dev);
    return bench->status == MLORA_OK ? dev->ops->elapsed(dev, 0, 1).seconds / n : 0;
}

double ops_time(struct ops_bench *bench, void (*fn)(void *context), void *context)
{
    const double enough = bench->cuda ? 0.01 : 0.005; /* seconds of a batch of runs */
    double times[BATCHES] = {0};

    if (bench->status != MLORA_OK) return 0;
    bench->n_timed++;
    for (int i = 0; i < 3; i++) run_once(bench, fn, context); /* plain, recorded, replayed */
    const double once = time_runs(bench, 1, fn, context);
    int n = once > 0 ? (int)(enough / once) : 1;
    if (n < 1) n = 1;
    if (n > RUNS_MAX) n = RUNS_MAX;
    for (int i = 0; i < BATCHES && bench->status == MLORA_OK; i++)
        times[i] = time_runs(bench, n, fn, context);
    qsort(times, BATCHES, sizeof *times, by_value);
    return times[BATCHES / 2];
}

/* ---- rows ----------------------------------------------------------------------------------- */

struct ops_rows ops_rows(struct ops_bench *bench, int Q, int kv_len, int n_new)
{
    const int per_row = (kv_len + KV_BLOCK - 1) / KV_BLOCK;
    const size_t n_table = (size_t)Q * (size_t)per_row;
    struct ops_rows rows = {.n_blocks = (int)n_table};
    int32_t *host = calloc(n_table + 2 * (size_t)Q + 1, sizeof *host);

    if (!host) {
        bench->status = error_set(MLORA_ENOMEM, "out of memory for rows");
        return rows;
    }
    int32_t *table = host, *start = host + n_table, *lengths = start + Q + 1;
    for (int i = 0; i < rows.n_blocks; i++) table[i] = i;
    /* Blocks of the rows in turn, as they come to lie when rows grow together. */
    for (int q = 0; q < Q; q++)
        for (int b = 0; b < per_row; b++) table[q * per_row + b] = b * Q + q;
    for (int q = 0; q <= Q; q++) start[q] = q * n_new;
    for (int q = 0; q < Q; q++) lengths[q] = kv_len;
    rows.batch = (struct batch_view){
        .T = Q * n_new,
        .Q = Q,
        .max_row = n_new,
        .max_kv = kv_len,
        .row_start = ops_upload(bench, start, ((size_t)Q + 1) * sizeof *host),
        .kv_len = ops_upload(bench, lengths, (size_t)Q * sizeof *host),
        .position = ops_memory(bench, (size_t)Q * (size_t)n_new * sizeof *host),
        .row = ops_memory(bench, (size_t)Q * (size_t)n_new * sizeof *host),
    };
    rows.kv = (struct kv_view){
        .block_table = ops_upload(bench, table, n_table * sizeof *host),
        .max_blocks = per_row,
        .dtype = bench->dtype,
    };
    if (bench->status == MLORA_OK) bench->dev->ops->metadata(bench->dev, &rows.batch);
    free(host);
    return rows;
}
