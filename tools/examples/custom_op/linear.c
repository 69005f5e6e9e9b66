/* A linear of one's own on the CPU, in the place of matmul: the product, its bias and an activation
 * in one pass over y.
 *
 * As it is, the activation is the identity, and check-op compares it with mlora's own. Built with
 * -DRELU it is max(W x + bias, 0), another function, which brings its definition along. */
#include <string.h>

#include "kernels/mlora_op.h"

#ifdef RELU
#define ACTIVATION(x) ((x) > 0 ? (x) : 0)
#define REFERENCE     reference
#else
#define ACTIVATION(x) (x)
#define REFERENCE     NULL
#endif

enum { LANES = 8, ROWS = 16 }; /* partial sums of a dot product; rows of w a thread takes */

static float f16_to_f32(uint16_t half)
{
    /* The exponent's bias is 15, of f32 127: the product moves it, subnormals included. */
    uint32_t bits = (uint32_t)(half & 0x7fffu) << 13;
    float value;

    memcpy(&value, &bits, sizeof value);
    value *= 5.192296858534828e33f; /* 2^112 */
    return half & 0x8000u ? -value : value;
}

static float load(const void *array, int dtype, size_t i)
{
    uint16_t half;
    uint32_t bits;
    float value;

    if (dtype == MLORA_OP_F32) return ((const float *)array)[i];
    memcpy(&half, (const uint16_t *)array + i, sizeof half);
    if (dtype == MLORA_OP_F16) return f16_to_f32(half);
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

/* Partial sums by k % LANES: the compiler makes vectors of them, and their order depends on K only,
 * so a token's result is the same bits in every batch. */
static float dot(const mlora_op_matmul *op, size_t w_at, size_t x_at)
{
    float lane[LANES] = {0};
    const int K = op->K;
    int k = 0;

    for (; k + LANES <= K; k += LANES)
        for (int i = 0; i < LANES; i++)
            lane[i] += load(op->w, op->w_dtype, w_at + (size_t)(k + i)) *
                       load(op->x, op->x_dtype, x_at + (size_t)(k + i));
    for (int i = 0; k + i < K; i++)
        lane[i] += load(op->w, op->w_dtype, w_at + (size_t)(k + i)) *
                   load(op->x, op->x_dtype, x_at + (size_t)(k + i));
    for (int i = 1; i < LANES; i++) lane[0] += lane[i];
    return lane[0];
}

/* Rows [begin, end) of w: each is read once from memory and is in the cache for the next token. */
static void multiply(void *context, int begin, int end, int thread)
{
    const mlora_op_matmul *op = context;
    const size_t K = (size_t)op->K, N = (size_t)op->N;

    (void)thread;
    for (size_t n = (size_t)begin; n < (size_t)end; n++) {
        for (size_t t = 0; t < (size_t)op->T; t++) {
            const float sum = dot(op, n * K, t * K) + (op->bias ? op->bias[n] : 0);
            store(op->y, op->y_dtype, t * N + n, ACTIVATION(sum));
        }
    }
}

static int run(const mlora_op_call *call, const void *arguments)
{
    mlora_op_matmul op = *(const mlora_op_matmul *)arguments;

    call->parallel(call, op.N, ROWS, multiply, &op);
    return 0;
}

#ifdef RELU
/* The definition: f32 on the host, computed in double. */
static int reference(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_matmul *op = arguments;
    const float *x = op->x, *w = op->w;
    const size_t K = (size_t)op->K, N = (size_t)op->N;
    float *y = op->y;

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++) {
        for (size_t n = 0; n < N; n++) {
            double sum = op->bias ? op->bias[n] : 0;
            for (size_t k = 0; k < K; k++) sum += (double)w[n * K + k] * x[t * K + k];
            y[t * N + n] = (float)ACTIVATION(sum);
        }
    }
    return 0;
}
#endif

MLORA_OP_EXPORT = {
    .abi = MLORA_OP_ABI, .name = "matmul", .backend = "cpu", .run = run, .reference = REFERENCE};
