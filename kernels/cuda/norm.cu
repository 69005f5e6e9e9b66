/* Root mean square norms, of rows and of heads. Bound by memory; at decode by the latency of one
 * read, one block-wide sum and one write, so a row is read once and kept in registers, and the weights
 * are asked for before what they weigh is there. */
#include "kernels/cuda/cuda.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

/* Whose norms may stand in the place of the base's. */
struct own_norms {
    const struct lora_own *own; /* [S]; NULL: nobody's */
    const int32_t *slot;        /* [T] */
    int first;                  /* of the layer: own[slot].norms[first + norm] */
};

static __device__ const float *weight_of(const struct own_norms &norms, int t, int norm,
                                         const float *base)
{
    const int slot = norms.own ? norms.slot[t] : -1;
    if (slot < 0 || !norms.own[slot].norms) return base;
    const float *weight = norms.own[slot].norms[norms.first + norm];
    return weight ? weight : base;
}

/* A block of several groups a thread is smaller, for their registers. With one group a block of 512
 * threads leaves as many as a product with LoRA inside needs, which begins beside it: each has four warps
 * in a quarter of a multiprocessor. */
enum { NORM_BLOCK_MAX = 1024, NORM_GROUPS_MAX = 4, NORM_GROUPS_BLOCK = 896 };
enum { NORM_REGISTERS = 56, NORM_GROUPS_REGISTERS = 72, REGISTERS_OF_A_QUARTER = 16384 };
static_assert(4 * WARP * ((int)NORM_REGISTERS + (int)LORA_REGISTERS) <= REGISTERS_OF_A_QUARTER);

/* x[t, :] += delta[t, :]    y[t, :] = weight * x[t, :] / sqrt(mean(x[t, :]^2) + eps)
 *
 *   y [T, D] X    delta [T, D] P, and what is added to it    x [T, D]
 *   weight [D], or the token's own
 *   grid T    block D / GROUP / GROUPS threads, GROUPS groups of eight elements each */
template <typename P, typename X, int GROUPS>
static __global__ void __maxnreg__(GROUPS == 1 ? NORM_REGISTERS : NORM_GROUPS_REGISTERS)
    add_rms_norm_kernel(X *y, float *x, const P *delta, struct addend addend, const float *base,
                        int D, float eps, bool aligned, struct own_norms norms, int norm)
{
    __shared__ float shared[WARP];
    grid_release();
    const size_t row = (size_t)blockIdx.x * D;
    const float *weight = weight_of(norms, blockIdx.x, norm, base);
    const bool whole = aligned && is_aligned(weight);
    constexpr bool early = GROUPS == 1; /* else there are no registers for it */
    float w[GROUPS][GROUP], value[GROUPS][GROUP];
    float sum = 0.0f;

#pragma unroll
    for (int j = 0; early && j < GROUPS; j++) {
        const int i = (threadIdx.x + j * blockDim.x) * GROUP;
        if (i < D) load_some(w[j], weight + i, D - i, whole);
    }
    if (delta) addend = addend_of(addend, blockIdx.x);
    grid_wait();
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const int i = (threadIdx.x + j * blockDim.x) * GROUP;
        if (i >= D) continue;
        load_some(value[j], x + row + i, D - i, aligned);
        if (delta) {
            float more[GROUP];
            load_some(more, delta + row + i, D - i, aligned);
            if (is_added(addend)) add_some<P>(more, addend, row + i, D - i, aligned);
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
        if (!early) load_some(w[j], weight + i, D - i, whole);
#pragma unroll
        for (int e = 0; e < GROUP; e++) w[j][e] *= value[j][e] * scale;
        store_some(y + row + i, w[j], D - i, aligned);
    }
}

enum { HEAD_BLOCK = 128, HEAD_ELEMENTS = 16 }; /* of a lane: d <= 512 */

/* qkv[t, h, :] = weight * qkv[t, h, :] / sqrt(mean(qkv[t, h, :]^2) + eps), h < H + G
 *
 *   qkv [T, H + 2 G, d] X, in and out    q_weight, k_weight [d]
 *   grid T (H + G) / 4    block HEAD_BLOCK, a warp a head */
template <typename X>
static __global__ void head_norm_kernel(X *qkv, const float *q_weight, const float *k_weight, int T,
                                        int H, int G, int d, float eps, struct own_norms norms)
{
    grid_begin();
    const int item = (blockIdx.x * HEAD_BLOCK + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (item >= T * (H + G)) return;
    const int t = item / (H + G), h = item % (H + G);
    X *head = qkv + ((size_t)t * (H + 2 * G) + h) * d;
    const float *weight =
        h < H ? weight_of(norms, t, NORM_Q, q_weight) : weight_of(norms, t, NORM_K, k_weight);

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

static struct own_norms own_norms(const struct lora_view *lora, int layer)
{
    struct own_norms norms = {};
    if (!lora) return norms;
    norms.own = lora->own;
    norms.slot = lora->slot;
    norms.first = layer * LORA_NORMS;
    return norms;
}

void cuda_lora_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                            enum dtype delta_dtype, const float *weight,
                            const struct lora_view *lora, int layer, enum lora_norm norm, int T,
                            int D, float eps, enum dtype dtype)
{
    struct addend addend;
    struct cuda_device *cuda = cuda_begin_adding(dev, delta, &addend);
    if (!cuda || T == 0) return;
    assert(D <= NORM_GROUPS_BLOCK * NORM_GROUPS_MAX * GROUP);

    const int groups = ceil_div(D, GROUP);
    const int a_thread = groups <= NORM_BLOCK_MAX ? 1 : NORM_GROUPS_MAX;
    const int block = ceil_div(ceil_div(groups, a_thread), WARP) * WARP;
    const bool aligned = D % GROUP == 0 && is_aligned(y) && is_aligned(x) && is_aligned(delta);
    with_product(delta_dtype, dtype, [&](auto product, auto type) {
        using P = decltype(product);
        using X = decltype(type);
        const auto kernel = a_thread == 1 ? add_rms_norm_kernel<P, X, 1>
                                          : add_rms_norm_kernel<P, X, NORM_GROUPS_MAX>;
        cuda_launch(cuda, "add_rms_norm", kernel, T, block, 0, 1, (X *)y, x, (const P *)delta,
                    addend, weight, D, eps, aligned, own_norms(lora, layer), (int)norm);
    });
}

void cuda_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                       enum dtype delta_dtype, const float *weight, int T, int D, float eps,
                       enum dtype dtype)
{
    cuda_lora_add_rms_norm(dev, y, x, delta, delta_dtype, weight, NULL, 0, NORM_ATTENTION, T, D,
                           eps, dtype);
}

void cuda_lora_head_norm(struct device *dev, void *qkv, const float *q_weight,
                         const float *k_weight, const struct lora_view *lora, int layer,
                         const struct heads *heads, int T, float eps, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || T == 0) return;
    assert(heads->d <= HEAD_ELEMENTS * WARP);

    const int grid = ceil_div(T * (heads->H + heads->G), HEAD_BLOCK / WARP);
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        cuda_launch(cuda, "head_norm", head_norm_kernel<X>, grid, HEAD_BLOCK, 0, 1, (X *)qkv,
                    q_weight, k_weight, T, heads->H, heads->G, heads->d, eps,
                    own_norms(lora, layer));
    });
}

void cuda_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                    const struct heads *heads, int T, float eps, enum dtype dtype)
{
    cuda_lora_head_norm(dev, qkv, q_weight, k_weight, NULL, 0, heads, T, eps, dtype);
}
