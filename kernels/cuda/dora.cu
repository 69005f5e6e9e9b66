/* What adapters do to a linear beyond A, B and a scale, and the norms that DoRA divides by. A step
 * in which some adapter has such things takes this general expansion for all of its tokens; it is
 * bound by reading B once for each eight tokens of an adapter. */
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { MORE_BLOCK = 128, MORE_TOKENS = 8 };

/* What becomes of output n of a linear: y as the base product left it, sum = dot(B[n, :], h). */
static __device__ float expanded(const struct lora_factors &f, const float *bias, float y,
                                 float sum, int n)
{
    float delta = f.scale * (f.b_bias ? sum + f.b_bias[n] : sum);
    if (f.g) {
        const float g = f.g[n];
        delta = (g - 1.0f) * (bias ? y - bias[n] : y) + g * delta;
    }
    if (f.bias_delta) delta += f.bias_delta[n];
    return y + delta;
}

/* y[t, offset[i] + n] as struct lora_factors says, for a tile of tokens of one adapter:
 *
 *   y [T, N] Y, in and out    h [T, n_slices, max_rank]    bias [N] or NULL
 *   grid (N / MORE_BLOCK for each slice, tiles)    block MORE_BLOCK, a thread an output
 *   shared MORE_TOKENS max_rank floats */
template <typename Y>
static __global__ void lora_expand_more_kernel(Y *y, const float *h, const float *bias,
                                               const __grid_constant__ struct lora_args args)
{
    extern __shared__ float h_tile[]; /* [MORE_TOKENS, R] */
    grid_begin();
    struct lora_tile tokens;
    int slice = 0, chunk = blockIdx.x;
    while (slice < args.n_slices && chunk >= ceil_div(args.width[slice], MORE_BLOCK))
        chunk -= ceil_div(args.width[slice++], MORE_BLOCK);
    if (!lora_find_tile(&tokens, blockIdx.y, args, MORE_TOKENS)) return; /* the whole block */
    const struct lora_factors f = *lora_factors_of(args, tokens.slot, slice);
    if (!f.a && !f.bias_delta) return; /* the whole block */

    const int R = f.a ? f.R : 0;
    for (int i = threadIdx.x; i < MORE_TOKENS * R; i += MORE_BLOCK) {
        const int token = min_int(i / R, tokens.n - 1);
        h_tile[i] = h[lora_h_row(args, args.order[tokens.first + token], slice) + i % R];
    }
    __syncthreads();
    const int n = chunk * MORE_BLOCK + threadIdx.x;
    if (n >= args.width[slice]) return;

    float sum[MORE_TOKENS] = {};
    const bool whole = R % GROUP == 0 && is_aligned_on_device(f.b);
    for (int r = 0; r < R; r += GROUP) {
        float b[GROUP]; /* B[n, r:] */
        load_any(b, f.b, f.dtype, (size_t)n * R + r, R - r, whole);
#pragma unroll
        for (int e = 0; e < GROUP; e++) {
            if (r + e >= R) break;
#pragma unroll
            for (int t = 0; t < MORE_TOKENS; t++) sum[t] += b[e] * h_tile[t * R + r + e];
        }
    }
    const float *bias_of_slice = bias ? bias + args.offset[slice] : NULL;
#pragma unroll
    for (int t = 0; t < MORE_TOKENS; t++) {
        if (t >= tokens.n) break;
        Y *to = y + (size_t)args.order[tokens.first + t] * args.N + args.offset[slice] + n;
        *to = narrow<Y>(expanded(f, bias_of_slice, widen(*to), sum[t], n));
    }
}

enum { NORMS_BLOCK = 256, NORMS_ROWS = 8 };

/* norm[n] = sqrt(sum_k (w[n, k] + dot(scale B[n, :], A[:, k]))^2), the squares summed in double
 *
 *   norm [N]    w [N, K] W    a [R, K], b [N, R]
 *   grid N / NORMS_ROWS    block NORMS_BLOCK    shared NORMS_ROWS R floats */
template <typename W>
static __global__ void row_norms_kernel(float *norm, const W *w, const float *a, const float *b,
                                        int N, int K, int R, float scale)
{
    extern __shared__ float b_rows[]; /* [NORMS_ROWS, R], scaled */
    __shared__ double of_warps[NORMS_BLOCK / WARP];
    grid_begin();
    const int n0 = blockIdx.x * NORMS_ROWS, lane = threadIdx.x % WARP;
    for (int i = threadIdx.x; i < NORMS_ROWS * R; i += NORMS_BLOCK)
        b_rows[i] = scale * b[(size_t)min_int(n0 + i / R, N - 1) * R + i % R];
    __syncthreads();

    double squares[NORMS_ROWS] = {};
    for (int k = threadIdx.x; k < K; k += NORMS_BLOCK) {
        float sum[NORMS_ROWS];
#pragma unroll
        for (int j = 0; j < NORMS_ROWS; j++)
            sum[j] = widen(w[(size_t)min_int(n0 + j, N - 1) * K + k]);
        for (int r = 0; r < R; r++) {
            const float x = a[(size_t)r * K + k];
#pragma unroll
            for (int j = 0; j < NORMS_ROWS; j++) sum[j] += b_rows[j * R + r] * x;
        }
#pragma unroll
        for (int j = 0; j < NORMS_ROWS; j++) squares[j] += (double)sum[j] * (double)sum[j];
    }
    for (int j = 0; j < NORMS_ROWS; j++) {
        double sum = squares[j];
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) of_warps[threadIdx.x / WARP] = sum;
        __syncthreads();
        if (threadIdx.x == 0 && n0 + j < N) {
            double total = 0.0;
            for (int i = 0; i < NORMS_BLOCK / WARP; i++) total += of_warps[i];
            norm[n0 + j] = (float)sqrt(total);
        }
        __syncthreads(); /* of_warps is written again */
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_lora_expand_more(struct device *dev, void *y, const float *h,
                           const struct lora_view *lora, const struct lora_site *site, int layer,
                           enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || lora->n_tokens == 0) return;

    const struct lora_args args = lora_args(lora, site, layer);
    int chunks = 0;
    for (int i = 0; i < site->n_slices; i++) chunks += ceil_div(site->width[i], MORE_BLOCK);
    const dim3 grid(chunks, lora_tiles(&args, MORE_TOKENS));
    const size_t shared = (size_t)MORE_TOKENS * lora->max_rank * sizeof(float);
    assert(grid.y <= 65535 && lora->max_rank <= LORA_RANK_MAX);
    with_activation(dtype, [&](auto type) {
        using Y = decltype(type);
        cuda_launch(cuda, "lora_expand", lora_expand_more_kernel<Y>, grid, MORE_BLOCK, shared, 1,
                    (Y *)y, h, site->bias, args);
    });
}

void cuda_lora_row_norms(struct device *dev, float *norm, const struct matrix *w, const float *a,
                         const float *b, int R, float scale)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || w->N == 0) return;
    assert(R <= LORA_RANK_MAX);

    with_type(w->dtype, [&](auto type) {
        using W = decltype(type);
        cuda_launch(cuda, "lora_row_norms", row_norms_kernel<W>, ceil_div(w->N, NORMS_ROWS),
                    NORMS_BLOCK, (size_t)NORMS_ROWS * R * sizeof(float), 1, norm,
                    (const W *)w->data, a, b, w->N, w->K, R, scale);
    });
}
