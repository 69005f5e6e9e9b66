/* Logits by an adapter's own head, or by rows of its own. Bound by reading those weights once for
 * each eight tokens of the adapter. */
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { HEAD_BLOCK = 128, HEAD_WARPS = HEAD_BLOCK / WARP, HEAD_TOKENS = 8 };

/* logits[t, ids[n]] = dot(w[n, :], x[t, :]) for a tile of tokens of one adapter, where it has a
 * head w of its own (ids[n] is n) or, `rows`, rows of one
 *
 *   logits [T, V]    x [T, D] X
 *   grid (some, tiles)    block HEAD_BLOCK, a warp for each row of w, in turns */
template <typename X>
static __global__ void lora_head_kernel(float *logits, const X *x, const struct lora_own *owns,
                                        bool rows, int V, int D, bool aligned,
                                        const __grid_constant__ struct lora_args args)
{
    grid_begin();
    struct lora_tile tokens;
    if (!lora_find_tile(&tokens, blockIdx.y, args, HEAD_TOKENS)) return; /* the whole block */
    const struct lora_own &own = owns[tokens.slot];
    const void *w = rows ? own.head_rows.data : own.head.data;
    const int dtype = rows ? own.head_rows.dtype : (int)own.head.dtype;
    const int N = rows ? own.head_rows.n : own.head.N;
    if (!w) return; /* the whole block */

    const int lane = threadIdx.x % WARP;
    const bool whole = aligned && is_aligned_on_device(w);
    const X *x_row[HEAD_TOKENS];
    float *out[HEAD_TOKENS];
#pragma unroll
    for (int t = 0; t < HEAD_TOKENS; t++) {
        const size_t token = args.order[tokens.first + min_int(t, tokens.n - 1)];
        x_row[t] = x + token * D;
        out[t] = logits + token * V;
    }
    for (int n = blockIdx.x * HEAD_WARPS + threadIdx.x / WARP; n < N; n += gridDim.x * HEAD_WARPS) {
        float sum[HEAD_TOKENS] = {};
        for (int k = lane * GROUP; k < D; k += WARP * GROUP) {
            float of_w[GROUP];
            load_any(of_w, w, dtype, (size_t)n * D + k, D - k, whole);
#pragma unroll
            for (int t = 0; t < HEAD_TOKENS; t++) {
                if (t >= tokens.n) break;
                float of_x[GROUP];
                load_some(of_x, x_row[t] + k, D - k, aligned);
#pragma unroll
                for (int e = 0; e < GROUP; e++) sum[t] += of_w[e] * of_x[e];
            }
        }
        const int column = rows ? own.head_rows.ids[n] : n;
#pragma unroll
        for (int t = 0; t < HEAD_TOKENS; t++) {
            const float total = warp_sum(sum[t]);
            if (lane == 0 && t < tokens.n) out[t][column] = total;
        }
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_lora_head(struct device *dev, float *logits, const void *x, const struct lora_view *lora,
                    int V, int D, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || lora->n_segments == 0 || lora->n_tokens == 0) return;

    const struct lora_site site = {};
    const struct lora_args args = lora_args(lora, &site, 0);
    const bool aligned = D % GROUP == 0 && is_aligned(x);
    const dim3 grid(min_int(ceil_div(V, HEAD_WARPS), 16 * cuda->n_sms),
                    lora_tiles(&args, HEAD_TOKENS));
    assert(grid.y <= 65535);
    for (int rows = 0; rows < 2; rows++) /* rows stand in the place of some of a head's */
        with_activation(dtype, [&](auto type) {
            using X = decltype(type);
            cuda_launch(cuda, "lora_head", lora_head_kernel<X>, grid, HEAD_BLOCK, 0, 1, logits,
                        (const X *)x, lora->own, rows == 1, V, D, aligned, args);
        });
}
