/* The MLP's gate: silu(g) u. */
#include "kernels/cpu/device.h"

#include <math.h>

struct silu_mul {
    void *y;             /* [T, F] dtype */
    const void *gate_up; /* [T, 2 F] gate_up_dtype */
    int F;
    int n_parts; /* of a row, of PART elements */
    enum dtype gate_up_dtype, dtype;
};

enum { PART = 1024 };

static void silu_mul_parts(void *context, int begin, int end, int thread)
{
    const struct silu_mul *op = context;
    const size_t F = (size_t)op->F;

    (void)thread;
    for (int item = begin; item < end; item++) {
        const size_t t = (size_t)(item / op->n_parts);
        const size_t first = (size_t)(item % op->n_parts) * PART;
        const size_t last = first + PART < F ? first + PART : F;
        for (size_t f = first; f < last; f++) {
            const float gate = dtype_load(op->gate_up, op->gate_up_dtype, t * 2 * F + f);
            const float up = dtype_load(op->gate_up, op->gate_up_dtype, t * 2 * F + F + f);
            const float silu = gate / (1.0f + expf(-gate));
            dtype_store(op->y, op->dtype, t * F + f, silu * up);
        }
    }
}

void cpu_silu_mul(struct device *dev, void *y, const void *gate_up, enum dtype gate_up_dtype, int T,
                  int F, enum dtype dtype)
{
    struct silu_mul op = {y, gate_up, F, ceil_div(F, PART), gate_up_dtype, dtype};
    cpu_parallel(dev, T * op.n_parts, 4, silu_mul_parts, &op);
}
