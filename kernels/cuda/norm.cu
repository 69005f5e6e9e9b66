/* Root mean square norms, of rows and of heads. Bound by memory; at decode by the latency of one
 * read, one block-wide sum and one write, so a row is read once and kept in registers. */
#include "kernels/cuda/cuda.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { NORM_BLOCK_MAX = 1024, NORM_GROUPS_MAX = 4 };

/* x[t, :] += delta[t, :]    y[t, :] = weight * x[t, :] / sqrt(mean(x[t, :]^2) + eps)
 *
 *   y, delta [T, D] X    x [T, D]    weight [D]
 *   grid T    block D / GROUP / GROUPS threads, GROUPS groups of eight elements each */
template <typename X, int GROUPS>
static __global__ void __launch_bounds__(NORM_BLOCK_MAX)
    add_rms_norm_kernel(X *y, float *x, const X *delta, const float *__restrict__ weight, int D,
                        float eps, bool aligned)
{
    __shared__ float shared[WARP];
    grid_begin();
    const size_t row = (size_t)blockIdx.x * D;
    float value[GROUPS][GROUP];
    float sum = 0.0f;

#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const int i = (threadIdx.x + j * blockDim.x) * GROUP;
        if (i >= D) continue;
        load_some(value[j], x + row + i, D - i, aligned);
        if (delta) {
            float more[GROUP];
            load_some(more, delta + row + i, D - i, aligned);
#pragma unroll
            for (int e = 0; e < GROUP; e++) value[j][e] += more[e];
            store_some(x + row + i, value[j], D - i, aligned);
        }
#pragma unroll
        for (int e = 0; e < GROUP; e++) sum += value[j][e] * value[j][e];
    }
    const float scale = 1.0f / sqrtf(block_sum(sum, shared) / (float)D + eps);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const int i = (threadIdx.x + j * blockDim.x) * GROUP;
        if (i >= D) continue;
        float w[GROUP];
        load_some(w, weight + i, D - i, aligned);
#pragma unroll
        for (int e = 0; e < GROUP; e++) w[e] *= value[j][e] * scale;
        store_some(y + row + i, w, D - i, aligned);
    }
}

enum { HEAD_BLOCK = 128, HEAD_ELEMENTS = 16 }; /* of a lane: d <= 512 */

/* qkv[t, h, :] = weight * qkv[t, h, :] / sqrt(mean(qkv[t, h, :]^2) + eps), h < H + G
 *
 *   qkv [T, H + 2 G, d] X, in and out    q_weight, k_weight [d]
 *   grid T (H + G) / 4    block HEAD_BLOCK, a warp a head */
template <typename X>
static __global__ void head_norm_kernel(X *qkv, const float *__restrict__ q_weight,
                                        const float *__restrict__ k_weight, int T, int H, int G,
                                        int d, float eps)
{
    grid_begin();
    const int item = (blockIdx.x * HEAD_BLOCK + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (item >= T * (H + G)) return;
    const int t = item / (H + G), h = item % (H + G);
    X *head = qkv + ((size_t)t * (H + 2 * G) + h) * d;
    const float *weight = h < H ? q_weight : k_weight;

    float value[HEAD_ELEMENTS];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < HEAD_ELEMENTS; j++) {
        const int i = lane + j * WARP;
        value[j] = i < d ? widen(head[i]) : 0.0f;
        sum += value[j] * value[j];
    }
    const float scale = 1.0f / sqrtf(warp_sum(sum) / (float)d + eps);
#pragma unroll
    for (int j = 0; j < HEAD_ELEMENTS; j++) {
        const int i = lane + j * WARP;
        if (i < d) head[i] = narrow<X>(weight[i] * (value[j] * scale));
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                       const float *weight, int T, int D, float eps, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || T == 0) return;
    assert(D <= NORM_BLOCK_MAX * NORM_GROUPS_MAX * GROUP);

    const int groups = ceil_div(D, GROUP);
    const int a_thread = groups <= NORM_BLOCK_MAX ? 1 : NORM_GROUPS_MAX;
    const int block = ceil_div(ceil_div(groups, a_thread), WARP) * WARP;
    const bool aligned =
        D % GROUP == 0 && is_aligned(y) && is_aligned(x) && is_aligned(weight) && is_aligned(delta);
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        if (a_thread == 1)
            cuda_launch(cuda, "add_rms_norm", add_rms_norm_kernel<X, 1>, T, block, 0, 1, (X *)y, x,
                        (const X *)delta, weight, D, eps, aligned);
        else
            cuda_launch(cuda, "add_rms_norm", add_rms_norm_kernel<X, NORM_GROUPS_MAX>, T, block, 0,
                        1, (X *)y, x, (const X *)delta, weight, D, eps, aligned);
    });
}

void cuda_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                    const struct heads *heads, int T, float eps, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || T == 0) return;
    assert(heads->d <= HEAD_ELEMENTS * WARP);

    const int grid = ceil_div(T * (heads->H + heads->G), HEAD_BLOCK / WARP);
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        cuda_launch(cuda, "head_norm", head_norm_kernel<X>, grid, HEAD_BLOCK, 0, 1, (X *)qkv,
                    q_weight, k_weight, T, heads->H, heads->G, heads->d, eps);
    });
}
