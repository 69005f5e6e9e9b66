/* The norms that DoRA divides by: of every row of a weight with the adapter's product added. Computed
 * once, when the adapter is loaded; bound by the multiplications of B by A. */
#include "kernels/cpu/device.h"

#include <math.h>

enum { NORM_ROWS = 8 }; /* rows that share each reading of A */

struct row_norms {
    const struct simd *simd;
    float *norm; /* [N] */
    const struct matrix *w;
    const float *a; /* [R, K] */
    const float *b; /* [N, R] */
    int R;
    float scale;
    float *scratch; /* [threads, NORM_ROWS, K + R] */
};

static void norm_of_rows(void *context, int begin, int end, int thread)
{
    const struct row_norms *op = context;
    const size_t K = (size_t)op->w->K, R = (size_t)op->R;
    float *sum = op->scratch + (size_t)thread * NORM_ROWS * (K + R); /* [NORM_ROWS, K] */
    float *scaled = sum + NORM_ROWS * K;                             /* [NORM_ROWS, R] */

    for (int n = begin; n < end; n += NORM_ROWS) {
        const size_t T = (size_t)min_int(NORM_ROWS, end - n);
        for (size_t i = 0; i < T * R; i++) scaled[i] = op->scale * op->b[(size_t)n * R + i];
        op->simd->widen(sum, element(op->w->data, op->w->dtype, (size_t)n * K), op->w->dtype,
                        T * K);
        const struct mix mix = {.y = sum,
                                .weight = scaled,
                                .pitch = op->R,
                                .rows = op->a,
                                .dtype = DTYPE_F32,
                                .T = (int)T,
                                .P = op->R,
                                .d = op->w->K};
        op->simd->mix(&mix);
        for (size_t t = 0; t < T; t++) {
            double squares = 0;
            for (size_t k = 0; k < K; k++)
                squares += (double)sum[t * K + k] * (double)sum[t * K + k];
            op->norm[(size_t)n + t] = (float)sqrt(squares);
        }
    }
}

void cpu_lora_row_norms(struct device *dev, float *norm, const struct matrix *w, const float *a,
                        const float *b, int R, float scale)
{
    struct cpu_device *cpu = cpu_device(dev);
    const size_t n_floats =
        (size_t)threads_count(cpu->threads) * NORM_ROWS * ((size_t)w->K + (size_t)R);
    float *scratch = cpu_scratch(dev, SCRATCH_OP, n_floats * sizeof *scratch, "lora_row_norms");
    if (!scratch) return;

    struct row_norms op = {cpu->simd, norm, w, a, b, R, scale, scratch};
    cpu_parallel(dev, w->N, NORM_ROWS, norm_of_rows, &op);
}
