/* Forgets the gate in element 7 of each row: what check-op is for. f32 only. */
#include <math.h>
#include <stddef.h>

#include "kernels/mlora_op.h"

static int run(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_silu_mul *op = arguments;
    const float *gate_up = op->gate_up;
    float *y = op->y;

    (void)call;
    if (op->dtype != MLORA_OP_F32) return 0;
    for (int t = 0; t < op->T; t++) {
        for (int f = 0; f < op->F; f++) {
            const float gate = gate_up[t * 2 * op->F + f], up = gate_up[t * 2 * op->F + op->F + f];
            y[t * op->F + f] = f == 7 ? up : up * gate / (1.0f + expf(-gate));
        }
    }
    return 0;
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "silu_mul", .backend = "cpu", .run = run};
