/* Attention of a step's tokens over their rows' blocks of the cache: which kernel does it, and
 * the one for every head width and type. */
#include "kernels/cuda/attention.cuh"

#include <math.h>

/* ---- kernels ------------------------------------------------------------------------------ */

enum { ANY_BLOCK = 128, ANY_WARPS = ANY_BLOCK / WARP };

/* y[t, h, :] = sum_p softmax_p(scale q . K[p, g, :]) V[p, g, :], one position at a time by each
 * of four warps. For f32 and odd widths; bound by its serial loop.
 *
 *   y [T, H, d] X    qkv [T, H + 2 G, d] X or f32    k, v [., G, KV_BLOCK, d] C
 *   grid (H, T)    block ANY_BLOCK    shared (ANY_WARPS d + 2 ANY_WARPS) floats
 *   ELEMENTS of a head in each lane: d <= 32 ELEMENTS */
template <typename X, typename C, int ELEMENTS>
static __global__ void attention_kernel(X *y, const void *qkv, const C *k, const C *v,
                                        const int32_t *position_of, const int32_t *row_of,
                                        const struct attention_args args)
{
    extern __shared__ float shared[];
    grid_begin();
    float *sums = shared, *maxima = shared + ANY_WARPS * args.d, *totals = maxima + ANY_WARPS;
    const int H = args.H, G = args.G, d = args.d;
    const int h = blockIdx.x, t = blockIdx.y, g = h / (H / G);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int position = position_of[t];
    const int32_t *table = args.block_table + (size_t)row_of[t] * args.max_blocks;
    const size_t query = ((size_t)t * (H + 2 * G) + h) * d;

    float q[ELEMENTS], sum[ELEMENTS] = {};
#pragma unroll
    for (int j = 0; j < ELEMENTS; j++) {
        const size_t i = query + lane + j * WARP;
        q[j] = 0.0f;
        if (lane + j * WARP < d)
            q[j] = args.scale * (args.has_f32_queries ? rounded<X>(((const float *)qkv)[i])
                                                      : widen(((const X *)qkv)[i]));
    }

    float max = -INFINITY, total = 0.0f;
    for (int p = first_seen(args, position) + warp; p <= position; p += ANY_WARPS) {
        const size_t at = (((size_t)table[p / KV_BLOCK] * G + g) * KV_BLOCK + p % KV_BLOCK) * d;
        float score = 0.0f;
#pragma unroll
        for (int j = 0; j < ELEMENTS; j++)
            if (lane + j * WARP < d) score += q[j] * widen(k[at + lane + j * WARP]);
        score = warp_sum(score);

        const float new_max = fmaxf(max, score);
        const float keep = exp2f(max - new_max), weight = exp2f(score - new_max);
        max = new_max;
        total = total * keep + weight;
#pragma unroll
        for (int j = 0; j < ELEMENTS; j++)
            if (lane + j * WARP < d)
                sum[j] = sum[j] * keep + weight * widen(v[at + lane + j * WARP]);
    }

    if (lane == 0) maxima[warp] = max, totals[warp] = total;
#pragma unroll
    for (int j = 0; j < ELEMENTS; j++)
        if (lane + j * WARP < d) sums[warp * d + lane + j * WARP] = sum[j];
    __syncthreads();
    max = -INFINITY;
    for (int w = 0; w < ANY_WARPS; w++) max = fmaxf(max, maxima[w]); /* warp 0 saw a position */
    for (int i = threadIdx.x; i < d; i += ANY_BLOCK) {
        float value = 0.0f;
        total = 0.0f;
        for (int w = 0; w < ANY_WARPS; w++) {
            const float weight = exp2f(maxima[w] - max);
            value += weight * sums[w * d + i];
            total += weight * totals[w];
        }
        y[((size_t)t * H + h) * d + i] = narrow<X>(value / total);
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

template <typename X, typename C, int ELEMENTS>
static void attention_any(struct cuda_device *cuda, void *y, const void *qkv,
                          const struct kv_view *kv, const struct batch_view *batch,
                          const struct attention_args *args)
{
    const dim3 grid(args->H, batch->T);
    const size_t bytes = (size_t)ANY_WARPS * (args->d + 2) * sizeof(float);
    cuda_launch(cuda, "attention", attention_kernel<X, C, ELEMENTS>, grid, ANY_BLOCK, bytes, 1,
                (X *)y, qkv, (const C *)kv->k, (const C *)kv->v, batch->position, batch->row,
                *args);
}

static bool has_kernel(int d)
{
    return d == 64 || d == 80 || d == 96 || d == 128 || d == 256;
}

/* What a rope that waits was to do, if it is for this attention; else cuda_begin() starts it. The views have
 * no holes. */
static void take_rope(struct cuda_device *cuda, struct turn *turn, const void *qkv,
                      enum dtype qkv_dtype, const struct kv_view *kv,
                      const struct batch_view *batch, const struct heads *heads)
{
    const struct held_rope *held = &cuda->held_rope;

    if (held->qkv != qkv || held->dtype != qkv_dtype || memcmp(&held->kv, kv, sizeof *kv) != 0 ||
        memcmp(&held->batch, batch, sizeof *batch) != 0 ||
        memcmp(&held->heads, heads, sizeof *heads) != 0)
        return;
    *turn = {true, held->rope.frequency, held->rope.amplitude, held->addend};
    cuda->held_rope.qkv = NULL;
}

void cuda_attention(struct device *dev, void *y, const void *qkv, enum dtype qkv_dtype,
                    const struct kv_view *kv, const struct batch_view *batch,
                    const struct heads *heads, enum dtype dtype)
{
    const bool is_tiled = dtype == DTYPE_BF16 && kv->dtype == DTYPE_BF16 && has_kernel(heads->d) &&
                          is_aligned(qkv) && is_aligned(kv->k) && is_aligned(kv->v);
    struct turn turn = {};
    if (is_tiled) take_rope((struct cuda_device *)dev, &turn, qkv, qkv_dtype, kv, batch, heads);
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || batch->T == 0) return;
    assert(heads->G > 0 && heads->H % heads->G == 0 && heads->d > 0 && heads->d <= 512);
    assert(batch->T <= 65535 && batch->Q <= 65535);
    assert(qkv_dtype == DTYPE_F32 || qkv_dtype == dtype);

    const struct attention_args args = {
        batch->row_start,   batch->kv_len,
        kv->block_table,    kv->max_blocks,
        batch->Q,           heads->H,
        heads->G,           heads->d,
        heads->window,      heads->scale * 1.44269504088896f,
        qkv_dtype != dtype, !cuda->is_lent,
    };
    if (is_tiled) {
        bf16 *k = (bf16 *)kv->k, *v = (bf16 *)kv->v;
        const bool all_long = (long long)batch->Q * batch->max_row == batch->T;
        if (batch->max_row == 1 || !all_long)
            attention_decode(cuda, (bf16 *)y, qkv, k, v, &args, &turn, batch->max_kv);
        if (batch->max_row > 1)
            attention_prefill(cuda, (bf16 *)y, qkv, k, v, &args, batch->T, batch->max_kv);
    } else {
        with_activation(dtype, [&](auto x_type) {
            with_activation(kv->dtype, [&](auto c_type) {
                using X = decltype(x_type);
                using C = decltype(c_type);
                if (heads->d <= 4 * WARP)
                    attention_any<X, C, 4>(cuda, y, qkv, kv, batch, &args);
                else
                    attention_any<X, C, 16>(cuda, y, qkv, kv, batch, &args);
            });
        });
    }
}
