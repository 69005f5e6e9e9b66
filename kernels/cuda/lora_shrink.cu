/* The first half of LoRA: x to the rank. Bound by reading A once for each adapter in use, and at
 * few adapters by latency: the sum over K is shared out over the warps of a block and, where
 * blocks are few, over several blocks, whose parts are added in their order by the last one. */
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { ROW_BLOCK = 256, ROW_WARPS = ROW_BLOCK / WARP };

/* sum[r] += this thread's part of dot(A[first + r, :], x), rows clamped to the last one */
template <int ROWS, bool WHOLE, typename X, typename A>
static __device__ void shrink_rows(float (&sum)[ROWS], const X *x, const A *a, int first, int R,
                                   int K)
{
#pragma unroll 2
    for (int k = threadIdx.x * GROUP; k < K; k += ROW_BLOCK * GROUP) {
        float b[GROUP];
        load_some(b, x + k, K - k, WHOLE);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float w[GROUP];
            load_some(w, a + (size_t)min_int(first + r, R - 1) * K + k, K - k, WHOLE);
#pragma unroll
            for (int e = 0; e < GROUP; e++) sum[r] += w[e] * b[e];
        }
    }
}

/* Tokens one by one, for any types and sizes: h[t, i, r] = dot(A[r, :], x[t, :])
 *
 *   h [T, n_slices, max_rank]    x [T, K] X
 *   grid (max_rank / ROWS, n_slices, n_tokens)    block ROW_BLOCK, all of it on ROWS rows of A */
template <typename X, int ROWS>
static __global__ void __launch_bounds__(ROW_BLOCK)
    lora_shrink_row_kernel(float *__restrict__ h, const X *__restrict__ x,
                           const __grid_constant__ struct lora_args args)
{
    __shared__ float shared[ROW_WARPS][ROWS];
    const int t = args.order[blockIdx.z], slice = blockIdx.y, first = blockIdx.x * ROWS;
    const struct lora_factors f = *lora_factors_of(args, args.slot[t], slice);
    if (!f.a || first >= f.R) return; /* the whole block */

    const X *row = x + (size_t)t * args.K;
    const bool whole = args.K % GROUP == 0 && is_aligned_on_device(f.a) && is_aligned_on_device(x);
    float sum[ROWS] = {};
    if (f.dtype == DTYPE_BF16 && whole)
        shrink_rows<ROWS, true>(sum, row, (const bf16 *)f.a, first, f.R, args.K);
    else if (f.dtype == DTYPE_BF16)
        shrink_rows<ROWS, false>(sum, row, (const bf16 *)f.a, first, f.R, args.K);
    else if (f.dtype == DTYPE_F16 && whole)
        shrink_rows<ROWS, true>(sum, row, (const f16 *)f.a, first, f.R, args.K);
    else if (f.dtype == DTYPE_F16)
        shrink_rows<ROWS, false>(sum, row, (const f16 *)f.a, first, f.R, args.K);
    else if (whole)
        shrink_rows<ROWS, true>(sum, row, (const float *)f.a, first, f.R, args.K);
    else
        shrink_rows<ROWS, false>(sum, row, (const float *)f.a, first, f.R, args.K);

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sum[r] = warp_sum(sum[r]);
        if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP][r] = sum[r];
    }
    __syncthreads();
    const int r = threadIdx.x;
    if (r >= ROWS || first + r >= f.R) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < ROW_WARPS; w++) total += shared[w][r];
    h[lora_h_row(args, t, slice) + first + r] = total;
}

enum { TILE_BLOCK = 256, TILE_WARPS = TILE_BLOCK / WARP, STEP_K = 32, PARTS_MAX = 16 };

/* The 16 rows of A of one slice that are the rows of a small product. */
struct row_tile {
    const void *a; /* NULL: nothing to do */
    int dtype, slice, first, R;
};

/* Of two rows of A, this lane's 8 elements from k on: its part of a 16 x 32 operand. Which k a
 * lane holds does not matter as long as x is held the same way. */
template <bool BF16>
static __device__ void load_rows(uint32_t (&part)[3][2][4], const struct row_tile &tile, int K,
                                 int k, int lane)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = min_int(tile.first + lane / 4 + half * 8, tile.R - 1);
        const size_t at = (size_t)r * K + k;
        if (BF16) {
            const uint4 bits = *(const uint4 *)((const bf16 *)tile.a + at);
            part[0][0][half] = bits.x, part[0][0][half + 2] = bits.y;
            part[0][1][half] = bits.z, part[0][1][half + 2] = bits.w;
        } else {
            float w[GROUP];
            load_factor<GROUP>(w, tile.a, tile.dtype, at, GROUP);
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                uint32_t split[3];
                split_pair<3>(split, w[2 * pair], w[2 * pair + 1]);
#pragma unroll
                for (int i = 0; i < 3; i++) part[i][pair / 2][half + pair % 2 * 2] = split[i];
            }
        }
    }
}

/* sum[m][n] += A of tile m times x of tokens 8 n to 8 n + 7, over steps [begin, end) of 32 k */
template <int MT, int NT, bool BF16>
static __device__ void shrink_steps(float (&sum)[MT][NT][4], const struct row_tile (&tiles)[MT],
                                    const bf16 *const (&x)[NT], int K, int begin, int end)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll 4
    for (int step = begin; step < end; step += TILE_WARPS) {
        const int k = step * STEP_K + lane % 4 * GROUP;
        uint4 b[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) b[n] = *(const uint4 *)(x[n] + k);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (!tiles[m].a) continue;
            uint32_t a[3][2][4];
            load_rows<BF16>(a, tiles[m], K, k, lane);
#pragma unroll
            for (int i = 0; i < (BF16 ? 1 : 3); i++)
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    mma_bf16(sum[m][n], a[i][0], b[n].x, b[n].y);
                    mma_bf16(sum[m][n], a[i][1], b[n].z, b[n].w);
                }
        }
    }
}

/* Segments of several tokens on tensor cores: h[t, i, r] = dot(A[r, :], x[t, :]) for a tile of
 * 8 NT tokens of one adapter, MT tiles of 16 rows of A, and one of `splits` parts of K.
 *
 *   h [T, n_slices, max_rank]    x [T, K], K a multiple of 32
 *   parts [grid.x, grid.y, splits, MT NT 128], used where splits > 1
 *   grid (tiles, row tiles / MT, splits)    block TILE_BLOCK: its warps share out its k */
template <int MT, int NT>
static __global__ void __launch_bounds__(TILE_BLOCK)
    lora_shrink_tile_kernel(float *__restrict__ h, const bf16 *__restrict__ x,
                            float *__restrict__ parts, int *__restrict__ counters,
                            const __grid_constant__ struct lora_args args)
{
    __shared__ float shared[TILE_WARPS][NT * 128];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int splits = gridDim.z, tiles_a_slice = ceil_div(args.max_rank, 16);
    struct lora_tile tokens;
    if (!lora_find_tile(&tokens, blockIdx.x, args, 8 * NT)) return; /* the whole block */

    struct row_tile tiles[MT];
    bool any = false, all_bf16 = true;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int index = blockIdx.y * MT + m;
        tiles[m].a = NULL;
        tiles[m].slice = index / tiles_a_slice;
        tiles[m].first = index % tiles_a_slice * 16;
        if (tiles[m].slice >= args.n_slices) continue;
        const struct lora_factors f = *lora_factors_of(args, tokens.slot, tiles[m].slice);
        if (!f.a || tiles[m].first >= f.R) continue;
        tiles[m].a = f.a;
        tiles[m].R = f.R;
        tiles[m].dtype = f.dtype;
        all_bf16 &= f.dtype == DTYPE_BF16 && is_aligned_on_device(f.a);
        any = true;
    }
    if (!any) return; /* the whole block, and all splits of its sum */

    const bf16 *rows[NT]; /* of x: token 8 n + lane / 4, the last one where there is none */
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int index = min_int(n * 8 + lane / 4, tokens.n - 1);
        rows[n] = x + (size_t)args.order[tokens.first + index] * args.K;
    }
    const int steps = args.K / STEP_K, a_split = ceil_div(steps, splits);
    const int begin = blockIdx.z * a_split, end = min_int(steps, begin + a_split);
    float sum[MT][NT][4] = {};
    if (all_bf16)
        shrink_steps<MT, NT, true>(sum, tiles, rows, args.K, begin + warp, end);
    else
        shrink_steps<MT, NT, false>(sum, tiles, rows, args.K, begin + warp, end);

    const size_t item = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float value = 0.0f; /* sum[m][n][e], without an index that moves it to memory */
#pragma unroll
                for (int i = 0; i < MT; i++) value = i == m ? sum[i][n][e] : value;
                shared[warp][n * 128 + e * WARP + lane] = value;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < NT * 128; i += TILE_BLOCK) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < TILE_WARPS; w++) total += shared[w][i];
            if (splits > 1)
                parts[((item * splits + blockIdx.z) * MT + m) * (NT * 128) + i] = total;
            else
                shared[0][i] = total; /* read and written by this thread only */
        }
        __syncthreads();
        if (splits > 1) continue;
        for (int i = threadIdx.x; i < NT * 128; i += TILE_BLOCK) {
            const int e = i / WARP % 4, from = i % WARP;
            const int r = from / 4 + e / 2 * 8, n = i / 128 * 8 + from % 4 * 2 + e % 2;
            struct row_tile tile = tiles[0];
#pragma unroll
            for (int j = 1; j < MT; j++)
                if (j == m) tile = tiles[j];
            if (!tile.a || n >= tokens.n || tile.first + r >= tile.R) continue;
            h[lora_h_row(args, args.order[tokens.first + n], tile.slice) + tile.first + r] =
                shared[0][i];
        }
        __syncthreads();
    }
    if (splits == 1 || !arrives_last(&counters[item], splits)) return;
    for (int i = threadIdx.x; i < MT * NT * 128; i += TILE_BLOCK) {
        const int m = i / (NT * 128), e = i / WARP % 4, from = i % WARP;
        const int r = from / 4 + e / 2 * 8, n = i % (NT * 128) / 128 * 8 + from % 4 * 2 + e % 2;
        struct row_tile tile = tiles[0];
#pragma unroll
        for (int j = 1; j < MT; j++)
            if (j == m) tile = tiles[j];
        if (!tile.a || n >= tokens.n || tile.first + r >= tile.R) continue;
        float total = 0.0f;
        for (int s = 0; s < splits; s++)
            total += __ldcg(&parts[(item * splits + s) * (MT * NT * 128) + i]);
        h[lora_h_row(args, args.order[tokens.first + n], tile.slice) + tile.first + r] = total;
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

template <typename X, int ROWS>
static void launch_rows(struct cuda_device *cuda, float *h, const X *x,
                        const struct lora_view *lora, const struct lora_args *args)
{
    const dim3 grid(ceil_div(args->max_rank, ROWS), args->n_slices, lora->n_tokens);
    lora_shrink_row_kernel<X, ROWS><<<grid, ROW_BLOCK, 0, cuda->stream>>>(h, x, *args);
}

/* As many rows of A a block as leave two blocks for each multiprocessor. */
template <typename X>
static void shrink_by_row(struct cuda_device *cuda, float *h, const X *x,
                          const struct lora_view *lora, const struct lora_args *args)
{
    const long long rows = (long long)lora->n_tokens * args->n_slices * args->max_rank;
    if (rows >= 16LL * cuda->n_sms)
        launch_rows<X, 8>(cuda, h, x, lora, args);
    else if (rows >= 8LL * cuda->n_sms)
        launch_rows<X, 4>(cuda, h, x, lora, args);
    else if (rows >= 4LL * cuda->n_sms)
        launch_rows<X, 2>(cuda, h, x, lora, args);
    else
        launch_rows<X, 1>(cuda, h, x, lora, args);
}

template <int MT, int NT>
static void launch_tiles(struct cuda_device *cuda, float *h, const bf16 *x,
                         const struct lora_view *lora, const struct lora_args *args)
{
    const int tiles = lora_tiles(lora, 8 * NT);
    const int row_tiles = args->n_slices * ceil_div(args->max_rank, 16);
    const int groups = ceil_div(row_tiles, MT), steps = args->K / STEP_K;
    /* About two blocks for each multiprocessor, of four steps for each warp or more. */
    int splits = min_int(2 * cuda->n_sms / (tiles * groups), steps / (4 * TILE_WARPS));
    splits = min_int(PARTS_MAX, max_int(1, splits));
    if ((long long)tiles * groups > COUNTERS) splits = 1;
    splits = ceil_div(steps, ceil_div(steps, splits)); /* none is empty */
    float *parts = NULL;
    if (splits > 1) {
        const size_t n = (size_t)tiles * groups * splits * MT * NT * 128;
        parts = (float *)cuda_scratch(cuda, n * sizeof *parts, "lora_shrink");
        if (!parts) return;
    }
    const dim3 grid(tiles, groups, splits);
    lora_shrink_tile_kernel<MT, NT>
        <<<grid, TILE_BLOCK, 0, cuda->stream>>>(h, x, parts, cuda->counters, *args);
}

/* Small tiles while they are few; large ones read x once for several row tiles. */
static void shrink_by_tile(struct cuda_device *cuda, float *h, const bf16 *x,
                           const struct lora_view *lora, const struct lora_args *args)
{
    const int row_tiles = args->n_slices * ceil_div(args->max_rank, 16);
    if (lora->max_segment <= 8)
        launch_tiles<1, 1>(cuda, h, x, lora, args);
    else if (lora->max_segment <= 16)
        launch_tiles<1, 2>(cuda, h, x, lora, args);
    else if (lora->max_segment < 256 || row_tiles == 1)
        launch_tiles<1, 4>(cuda, h, x, lora, args);
    else if (row_tiles % 3 == 0)
        launch_tiles<3, 4>(cuda, h, x, lora, args);
    else
        launch_tiles<2, 4>(cuda, h, x, lora, args);
}

void cuda_lora_shrink(struct device *dev, float *h, const void *x, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || lora->n_segments == 0 || lora->n_tokens == 0) return;
    assert(lora->max_rank > 0 && lora->max_rank <= LORA_RANK_MAX && lora->n_tokens <= 65535);
    assert(site->n_slices > 0 && site->n_slices <= LORA_SLICES_MAX);

    const struct lora_args args = lora_args(lora, site, layer);
    if (dtype == DTYPE_BF16 && lora->max_segment > 1 && site->K % STEP_K == 0 && is_aligned(x))
        shrink_by_tile(cuda, h, (const bf16 *)x, lora, &args);
    else
        with_activation(dtype, [&](auto type) {
            using X = decltype(type);
            shrink_by_row<X>(cuda, h, (const X *)x, lora, &args);
        });
    cuda_check(cuda, cudaGetLastError(), "lora_shrink");
}
