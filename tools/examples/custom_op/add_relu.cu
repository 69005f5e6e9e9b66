/* Fused add and ReLU on a GPU, in the place of silu_mul: y = max(gate + up, 0).
 *
 * Bound by memory: 3 T F elements go through it, each once. So all that matters is that the loads
 * are wide (16 bytes a thread), lie side by side, and that there are enough of them under way. */
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/mlora_op.h"

typedef __nv_bfloat16 bf16;

enum { BLOCK = 256, BYTES = 16 }; /* of a load */

static __device__ float add_relu(float gate, float up)
{
    return fmaxf(gate + up, 0.0f);
}

static __device__ bf16 add_relu(bf16 gate, bf16 up)
{
    return __float2bfloat16(add_relu(__bfloat162float(gate), __bfloat162float(up)));
}

/* y[t, f] = max(gate_up[t, f] + gate_up[t, F + f], 0), N elements a thread
 *
 *   y [T, F] X    gate_up [T, 2 F] X    grid (F / N / BLOCK, T)    block BLOCK */
template <typename X, int N>
static __global__ void add_relu_kernel(X *__restrict__ y, const X *__restrict__ gate_up, int F)
{
    struct alignas(N * sizeof(X)) vector {
        X e[N];
    };
    const size_t t = blockIdx.y;
    const int f = (blockIdx.x * BLOCK + threadIdx.x) * N;
    if (f >= F) return;

    const X *row = gate_up + t * 2 * F;
    const vector gate = *(const vector *)(row + f);
    const vector up = *(const vector *)(row + F + f);
    vector out;
#pragma unroll
    for (int i = 0; i < N; i++) out.e[i] = add_relu(gate.e[i], up.e[i]);
    *(vector *)(y + t * F + f) = out;
}

template <typename X> static void launch(const mlora_op_silu_mul *op, cudaStream_t stream)
{
    enum { WIDE = BYTES / sizeof(X) };
    const bool wide =
        op->F % WIDE == 0 && (uintptr_t)op->y % BYTES == 0 && (uintptr_t)op->gate_up % BYTES == 0;
    const int width = wide ? WIDE : 1;
    const dim3 grid((op->F / width + BLOCK - 1) / BLOCK, op->T);
    X *y = (X *)op->y;
    const X *gate_up = (const X *)op->gate_up;

    if (wide)
        add_relu_kernel<X, WIDE><<<grid, BLOCK, 0, stream>>>(y, gate_up, op->F);
    else
        add_relu_kernel<X, 1><<<grid, BLOCK, 0, stream>>>(y, gate_up, op->F);
}

static int run(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_silu_mul *op = (const mlora_op_silu_mul *)arguments;
    const cudaStream_t stream = (cudaStream_t)call->stream;

    if (op->dtype == MLORA_OP_F32)
        launch<float>(op, stream);
    else
        launch<bf16>(op, stream);
    return (int)cudaGetLastError();
}

/* The definition: f32 on the host, computed in double. */
static int reference(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_silu_mul *op = (const mlora_op_silu_mul *)arguments;
    const size_t F = (size_t)op->F;
    float *y = (float *)op->y;

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++) {
        const float *row = (const float *)op->gate_up + t * 2 * F;
        for (size_t f = 0; f < F; f++) {
            const double sum = (double)row[f] + row[F + f];
            y[t * F + f] = (float)(sum > 0 ? sum : 0);
        }
    }
    return 0;
}

MLORA_OP_EXPORT = {MLORA_OP_ABI, "silu_mul", "cuda", run, nullptr, nullptr, reference};
