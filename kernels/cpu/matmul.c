/* The base model's products, and the blocks of dot products that they and LoRA are made of.
 *
 * Rows of w are shared out to the threads, because w is what has to come from memory: each row is
 * read once, in its 16 bits, for 64 tokens, whose x stays in the cache meanwhile. */
#include "kernels/cpu/device.h"

#include <assert.h>

/* A block of at most DOTS_T tokens. */
struct matmul {
    const struct simd *simd;
    void *y;               /* [T, N] y_dtype */
    const float *const *x; /* [T] -> [K] */
    const struct matrix *w;
    const float *bias; /* [N] or NULL */
    float *scratch;    /* [threads, MATMUL_SCRATCH] */
    int T;
    enum dtype y_dtype;
};

enum { MATMUL_SCRATCH = DOTS_SCRATCH + DOTS_T * DOTS_N };

/* y[t, n0 + n] = sum[t, n] + bias[n0 + n] for n < N. */
static void store_block(const struct matmul *op, float *sum, int n0, int N)
{
    for (int t = 0; t < op->T; t++) {
        float *row = sum + t * DOTS_N;
        if (op->bias)
            for (int n = 0; n < N; n++) row[n] += op->bias[n0 + n];
        const size_t first = (size_t)t * (size_t)op->w->N + (size_t)n0;
        op->simd->narrow(element(op->y, op->y_dtype, first), op->y_dtype, row, (size_t)N);
    }
}

/* The block's tokens by rows [begin, end) of w. */
static void matmul_rows(void *context, int begin, int end, int thread)
{
    const struct matmul *op = context;
    const struct matrix *w = op->w;
    float *scratch = op->scratch + (size_t)thread * MATMUL_SCRATCH;
    float *sum = scratch + DOTS_SCRATCH; /* [DOTS_T, DOTS_N] */

    for (int n = begin; n < end; n += DOTS_N) {
        const struct dots dots = {
            .out = sum,
            .pitch = DOTS_N,
            .x = op->x,
            .w = element(w->data, w->dtype, (size_t)n * (size_t)w->K),
            .dtype = w->dtype,
            .T = op->T,
            .N = min_int(DOTS_N, end - n),
            .K = w->K,
            .scratch = scratch,
        };
        op->simd->dots(&dots);
        store_block(op, sum, n, dots.N);
    }
}

void cpu_matmul(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                const struct matrix *w, const float *bias, int T, enum dtype dtype)
{
    assert(w->N > 0 && w->K > 0);
    struct cpu_device *cpu = cpu_device(dev);
    const float *const *rows = cpu_rows_f32(dev, x, NULL, T, w->K, dtype, "matmul");
    const size_t n_floats = (size_t)threads_count(cpu->threads) * MATMUL_SCRATCH;
    float *scratch = cpu_scratch(dev, SCRATCH_OP, n_floats * sizeof *scratch, "matmul");
    if (!rows || !scratch) return;

    for (int t = 0; t < T; t += DOTS_T) {
        void *block = element(y, y_dtype, (size_t)t * (size_t)w->N);
        const int n_tokens = min_int(DOTS_T, T - t);
        struct matmul op = {cpu->simd, block, rows + t, w, bias, scratch, n_tokens, y_dtype};
        cpu_parallel(dev, w->N, DOTS_N, matmul_rows, &op);
    }
}
