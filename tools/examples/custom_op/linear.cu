/* A linear of one's own on a GPU, in the place of matmul: the product, its bias and an activation in
 * one kernel.
 *
 * Bound by memory at one token: w is read once for TILE of them. With more, the loads of x and the
 * arithmetic outside of the tensor cores are what it waits for, which is where a library is better:
 * check-op's table shows by how much.
 *
 * As it is, the activation is the identity, and check-op compares it with mlora's own. Built with
 * -DRELU it is max(W x + bias, 0), another function, which brings its definition along. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/mlora_op.h"

#ifdef RELU
#define ACTIVATION(x) ((x) > 0 ? (x) : 0)
#define REFERENCE     reference
#else
#define ACTIVATION(x) (x)
#define REFERENCE     nullptr
#endif

typedef __nv_bfloat16 bf16;

enum { WARP = 32, WARPS = 8, TILE = 8, GROUP = 8 }; /* GROUP elements are loaded at a time */

static __device__ float widen(float x)
{
    return x;
}
static __device__ float widen(__half x)
{
    return __half2float(x);
}
static __device__ float widen(bf16 x)
{
    return __bfloat162float(x);
}
static __device__ void narrow(float *to, float x)
{
    *to = x;
}
static __device__ void narrow(bf16 *to, float x)
{
    *to = __float2bfloat16(x);
}

/* from[0 ... GROUP) as f32: those from n on are zero. */
template <typename W>
static __device__ void load_group(float *to, const W *from, int n, bool aligned)
{
    struct alignas(GROUP * sizeof(W) < 16 ? GROUP * sizeof(W) : 16) vector {
        W e[GROUP];
    };
    if (aligned) {
        const vector v = *(const vector *)from;
#pragma unroll
        for (int i = 0; i < GROUP; i++) to[i] = widen(v.e[i]);
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; i++) to[i] = i < n ? widen(from[i]) : 0.0f;
    }
}

/* y[t, n] = activation(dot(w[n, :], x[t, :]) + bias[n]): a warp makes one n for TILE tokens. The
 * order of a sum depends on K only, so a token's result is the same in every batch.
 *
 *   grid (N / WARPS, T / TILE)    block WARPS * WARP */
template <typename W, typename X, typename Y>
static __global__ void linear_kernel(Y *__restrict__ y, const X *__restrict__ x,
                                     const W *__restrict__ w, const float *__restrict__ bias, int T,
                                     int N, int K, bool aligned)
{
    const int n = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int t0 = blockIdx.y * TILE;
    if (n >= N) return; /* the whole warp */

    float sum[TILE] = {};
    for (int k = lane * GROUP; k < K; k += WARP * GROUP) {
        float a[GROUP], b[GROUP];
        load_group(a, w + (size_t)n * K + k, K - k, aligned);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            if (t0 + t >= T) break;
            load_group(b, x + (size_t)(t0 + t) * K + k, K - k, aligned);
#pragma unroll
            for (int i = 0; i < GROUP; i++) sum[t] += a[i] * b[i];
        }
    }
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        for (int i = WARP / 2; i > 0; i /= 2) sum[t] += __shfl_xor_sync(0xffffffff, sum[t], i);
        if (lane != 0 || t0 + t >= T) continue;
        const float result = sum[t] + (bias ? bias[n] : 0.0f);
        narrow(&y[(size_t)(t0 + t) * N + n], ACTIVATION(result));
    }
}

template <typename W, typename X, typename Y>
static void launch(const mlora_op_matmul *op, cudaStream_t stream)
{
    const dim3 grid((op->N + WARPS - 1) / WARPS, (op->T + TILE - 1) / TILE);
    const bool aligned =
        op->K % GROUP == 0 && (uintptr_t)op->w % 16 == 0 && (uintptr_t)op->x % 16 == 0;

    linear_kernel<<<grid, WARPS * WARP, 0, stream>>>((Y *)op->y, (const X *)op->x, (const W *)op->w,
                                                     op->bias, op->T, op->N, op->K, aligned);
}

template <typename W> static void launch_types(const mlora_op_matmul *op, cudaStream_t stream)
{
    if (op->x_dtype == MLORA_OP_F32)
        launch<W, float, float>(op, stream);
    else if (op->y_dtype == MLORA_OP_F32) /* logits */
        launch<W, bf16, float>(op, stream);
    else
        launch<W, bf16, bf16>(op, stream);
}

static int run(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_matmul *op = (const mlora_op_matmul *)arguments;
    const cudaStream_t stream = (cudaStream_t)call->stream;

    if (op->w_dtype == MLORA_OP_F32)
        launch_types<float>(op, stream);
    else if (op->w_dtype == MLORA_OP_F16)
        launch_types<__half>(op, stream);
    else
        launch_types<bf16>(op, stream);
    return (int)cudaGetLastError();
}

#ifdef RELU
/* The definition: f32 on the host, computed in double. */
static int reference(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_matmul *op = (const mlora_op_matmul *)arguments;
    const float *x = (const float *)op->x, *w = (const float *)op->w;
    const size_t K = (size_t)op->K, N = (size_t)op->N;
    float *y = (float *)op->y;

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

MLORA_OP_EXPORT = {MLORA_OP_ABI, "matmul", "cuda", run, nullptr, nullptr, REFERENCE};
