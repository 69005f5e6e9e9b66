/* A linear that doubles the logits of the tests' models, whose vocabulary is 2048. f32 activations. */
#include <stddef.h>

#include "kernels/mlora_op.h"

static int run(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_matmul *op = arguments;
    const float *x = op->x;
    float *y = op->y;
    const size_t N = (size_t)op->N, K = (size_t)op->K;

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++) {
        for (size_t n = 0; n < N; n++) {
            double sum = op->bias ? op->bias[n] : 0;
            for (size_t k = 0; k < K; k++) {
                union {
                    uint32_t bits;
                    float value;
                } w;
                if (op->w_dtype == MLORA_OP_F32)
                    w.value = ((const float *)op->w)[n * K + k];
                else
                    w.bits = (uint32_t)((const uint16_t *)op->w)[n * K + k] << 16;
                sum += (double)w.value * x[t * K + k];
            }
            y[t * N + n] = (float)(op->N == 2048 ? 2 * sum : sum);
        }
    }
    return 0;
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "matmul", .backend = "cpu", .run = run};
