/* Timing single ops as a step would run them: one after another through many layers' memory, so
 * that no cache holds what a step would find cold, and replayed as one recording. */
#ifndef MLORA_TOOLS_BENCH_OPS_H
#define MLORA_TOOLS_BENCH_OPS_H

#include "kernels/kernels.h"
#include "tools/bench/bench.h"

struct ops_bench {
    json_t *report;
    struct device *dev;
    struct model_config config;
    enum dtype dtype;
    double bandwidth; /* bytes/s of a copy */
    double flops;     /* of the fastest large product, per second */
    bool cuda;
    void **memory; /* [n_memory] what ops_memory() gave */
    int n_memory;
    mlora_status status; /* the first failure: what follows does nothing */
    uint64_t n_timed;
};

/* Open the device of setup's backend, measure its bandwidth, and tell `report` of it. */
mlora_status ops_open(struct ops_bench *bench, const struct setup *setup);
void ops_close(struct ops_bench *bench); /* accepts zeroes */

/* Memory until ops_release(); NULL after a failure. The first is uploaded, the second random small
 * numbers of the dtype, the third left as it is. */
void *ops_upload(struct ops_bench *bench, const void *from, size_t bytes);
void *ops_random(struct ops_bench *bench, size_t n, enum dtype dtype);
void *ops_memory(struct ops_bench *bench, size_t bytes);
void ops_release(struct ops_bench *bench);

/* How many copies of something of that size make more than caches hold. */
int ops_layers(const struct ops_bench *bench, double bytes_of_one);

/* Seconds of one run of `fn`: the median of several replays. */
double ops_time(struct ops_bench *bench, void (*fn)(void *context), void *context);

/* Rows of attention, as metadata wants them: row q has the n_new last of its kv_len[q] tokens. */
struct ops_rows {
    struct batch_view batch;
    struct kv_view kv; /* of one layer: k and v are left to the caller */
    int n_blocks;
};
struct ops_rows ops_rows(struct ops_bench *bench, int Q, int kv_len, int n_new);

/* The cases of `mlora bench kernels`. */
struct addon_lists {
    const int32_t *tokens, *adapters, *ranks, *modes;
    int n_tokens, n_adapters, n_ranks, n_modes;
};
void addon_cases(struct ops_bench *bench, const struct addon_lists *lists, bool prefill);
void decode_cases(struct ops_bench *bench, const int32_t *tokens, int n_tokens);
void prefill_cases(struct ops_bench *bench, const int32_t *tokens, int n_tokens);
void measure_flops(struct ops_bench *bench);

#endif
