/* Fused add and ReLU on the CPU, in the place of silu_mul: y = max(gate + up, 0).
 *
 * It is another function than the one that it replaces, as for a model that was trained with it, so
 * it brings its definition along: `reference`, with which check-op compares it. */
#include <string.h>

#include "kernels/mlora_op.h"

static float load(const void *array, int dtype, size_t i)
{
    uint16_t half;
    uint32_t bits;
    float value;

    if (dtype == MLORA_OP_F32) return ((const float *)array)[i];
    memcpy(&half, (const uint16_t *)array + i, sizeof half); /* bf16: the upper half of f32 */
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void store(void *array, int dtype, size_t i, float value)
{
    uint32_t bits;

    if (dtype == MLORA_OP_F32) {
        ((float *)array)[i] = value;
        return;
    }
    memcpy(&bits, &value, sizeof bits);
    bits += 0x7fffu + (bits >> 16 & 1); /* to the nearest, ties to even */
    ((uint16_t *)array)[i] = (uint16_t)(bits >> 16);
}

/* Tokens [begin, end). */
static void add_relu(void *context, int begin, int end, int thread)
{
    const mlora_op_silu_mul *op = context;
    const size_t F = (size_t)op->F;

    (void)thread;
    for (size_t t = (size_t)begin; t < (size_t)end; t++) {
        const size_t gate = t * 2 * F, up = gate + F;
        for (size_t f = 0; f < F; f++) {
            const float sum =
                load(op->gate_up, op->dtype, gate + f) + load(op->gate_up, op->dtype, up + f);
            store(op->y, op->dtype, t * F + f, sum > 0 ? sum : 0);
        }
    }
}

static int run(const mlora_op_call *call, const void *arguments)
{
    mlora_op_silu_mul op = *(const mlora_op_silu_mul *)arguments;

    call->parallel(call, op.T, 1, add_relu, &op);
    return 0;
}

/* The definition: f32 on the host, computed in double. */
static int reference(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_silu_mul *op = arguments;
    const float *gate_up = op->gate_up;
    float *y = op->y;

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++) {
        for (size_t f = 0; f < (size_t)op->F; f++) {
            const float *row = gate_up + t * 2 * (size_t)op->F;
            const double sum = (double)row[f] + row[(size_t)op->F + f];
            y[t * (size_t)op->F + f] = (float)(sum > 0 ? sum : 0);
        }
    }
    return 0;
}

MLORA_OP_EXPORT = {
    .abi = MLORA_OP_ABI, .name = "silu_mul", .backend = "cpu", .run = run, .reference = reference};
