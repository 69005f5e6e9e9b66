/* The first half of LoRA: x to the rank. Bound by reading A once for each adapter in use, and at
 * few adapters by latency: the first rows of A are on their way before x is waited for, and the
 * sum over K is shared out over the warps of a block and, where blocks are few, over several
 * blocks, whose parts are added in their order. */
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { ROW_BLOCK = 256, ROW_WARPS = ROW_BLOCK / WARP, ROW_STEP = ROW_BLOCK * GROUP };

/* sum[r] += this thread's part of dot(A[first + r, :], x), rows clamped to the last one. Waits
 * for x after it asked for the first ROWS groups of A. */
template <int ROWS, typename X>
static __device__ void shrink_rows_bf16(float (&sum)[ROWS], const X *x, const bf16 *a, int first,
                                        int R, int K)
{
    for (int k = threadIdx.x * GROUP; k - (int)threadIdx.x * GROUP < K; k += ROW_STEP) {
        uint4 bits[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            bits[r] = k < K ? __ldcs((const uint4 *)(a + (size_t)min_int(first + r, R - 1) * K + k))
                            : make_uint4(0, 0, 0, 0);
        if (k < ROW_STEP) grid_wait();
        if (k >= K) break;
        float b[GROUP];
        load_group(b, x + k);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            bf16 w[GROUP];
            memcpy(w, &bits[r], sizeof w);
#pragma unroll
            for (int e = 0; e < GROUP; e++) sum[r] += widen(w[e]) * b[e];
        }
    }
}

/* The same for any type and size. */
template <int ROWS, typename X>
static __device__ void shrink_rows_any(float (&sum)[ROWS], const X *x, const void *a, int dtype,
                                       int first, int R, int K, bool whole)
{
    for (int k = threadIdx.x * GROUP; k < K; k += ROW_STEP) {
        float b[GROUP];
        load_some(b, x + k, K - k, whole);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float w[GROUP];
            load_factor(w, a, dtype, (size_t)min_int(first + r, R - 1) * K + k, K - k, whole);
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
static __global__ void __launch_bounds__(ROW_BLOCK, 3)
    lora_shrink_row_kernel(float *h, const X *x, const __grid_constant__ struct lora_args args)
{
    __shared__ float shared[ROW_WARPS][ROWS];
    grid_release();
    const int t = lora_token(args, blockIdx.z), slice = blockIdx.y, first = blockIdx.x * ROWS;
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    if (!f.a || first >= f.R) { /* the whole block */
        grid_wait();
        return;
    }

    const X *row = x + (size_t)t * args.K;
    const bool whole = args.K % GROUP == 0 && is_aligned_on_device(f.a) && is_aligned_on_device(x);
    float sum[ROWS] = {};
    if (f.dtype == DTYPE_BF16 && whole) {
        shrink_rows_bf16(sum, row, (const bf16 *)f.a, first, f.R, args.K);
    } else {
        grid_wait();
        shrink_rows_any(sum, row, f.a, f.dtype, first, f.R, args.K, whole);
    }
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

enum { STEP_K = 32, CLUSTER_MAX = 16, PARTS_MAX = 8 /* blocks that share a sum */ };

/* What a block of the tile kernel is made of: `warps`, which share out its k, tiles of 16 rows of A
 * and of 8 tokens, loads of `ahead` steps under way. */
template <int WARPS_, int MT_, int NT_, int AHEAD_, int BLOCKS_> struct shrink_shape {
    enum { WARPS = WARPS_, MT = MT_, NT = NT_, AHEAD = AHEAD_ };
    enum { BLOCKS = BLOCKS_ /* of a multiprocessor */, BLOCK = WARPS * WARP };
    enum { SUMS = NT * 128 /* of a row tile */ };
};

/* The 16 rows of A of one slice that are the rows of a small product. */
struct row_tile {
    const void *a; /* NULL: nothing to do */
    int dtype, slice, first, R;
    bool whole; /* aligned */
};

static __device__ void multiply(float (&sum)[4], const uint4 (&a)[2], const uint4 &b)
{
    const uint32_t a0[4] = {a[0].x, a[1].x, a[0].y, a[1].y};
    const uint32_t a1[4] = {a[0].z, a[1].z, a[0].w, a[1].w};
    mma_bf16(sum, a0, b.x, b.y);
    mma_bf16(sum, a1, b.z, b.w);
}

/* sum[m][n] += A of tile m times x of tokens 8 n to 8 n + 7, n < eights, over steps begin,
 * begin + WARPS, ... of 32 k. Of a step a lane holds 8 elements of two rows of each tile of A and
 * of a token of each eight: which k they are does not matter as long as both are held the same
 * way. Waits for x after it asked for the rows of the first AHEAD steps. */
template <typename S>
static __device__ void shrink_steps_bf16(float (&sum)[S::MT][S::NT][4],
                                         const struct row_tile (&tiles)[S::MT], const bf16 *x,
                                         const uint32_t (&rows)[S::NT], int eights, int K,
                                         int begin, int end)
{
    const int lane = threadIdx.x % WARP, column = lane % 4 * GROUP;
    for (int first = begin; first < end || first == begin; first += S::AHEAD * S::WARPS) {
        uint4 a[S::AHEAD][S::MT][2], b[S::AHEAD][S::NT];
#pragma unroll
        for (int i = 0; i < S::AHEAD; i++)
#pragma unroll
            for (int m = 0; m < S::MT; m++)
                if (first + i * S::WARPS < end && tiles[m].a)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int r = min_int(tiles[m].first + lane / 4 + half * 8, tiles[m].R - 1);
                        a[i][m][half] =
                            __ldcs((const uint4 *)((const bf16 *)tiles[m].a + (size_t)r * K +
                                                   (first + i * S::WARPS) * STEP_K + column));
                    }
        if (first == begin) grid_wait();
#pragma unroll
        for (int i = 0; i < S::AHEAD; i++)
#pragma unroll
            for (int n = 0; n < S::NT; n++)
                if (first + i * S::WARPS < end && n < eights)
                    b[i][n] = *(const uint4 *)(x + (size_t)rows[n] * GROUP +
                                               (first + i * S::WARPS) * STEP_K + column);
#pragma unroll
        for (int i = 0; i < S::AHEAD; i++) {
            if (first + i * S::WARPS >= end) continue;
#pragma unroll
            for (int m = 0; m < S::MT; m++)
                if (tiles[m].a)
#pragma unroll
                    for (int n = 0; n < S::NT; n++)
                        if (n < eights) multiply(sum[m][n], a[i][m], b[i][n]);
        }
    }
}

/* The same for factors of any type, as sums of three bf16. */
template <typename S>
static __device__ void shrink_steps_any(float (&sum)[S::MT][S::NT][4],
                                        const struct row_tile (&tiles)[S::MT], const bf16 *x,
                                        const uint32_t (&rows)[S::NT], int eights, int K, int begin,
                                        int end)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int step = begin; step < end; step += S::WARPS) {
        const int k = step * STEP_K + lane % 4 * GROUP;
#pragma unroll
        for (int m = 0; m < S::MT; m++) {
            if (!tiles[m].a) continue;
            uint32_t part[3][2][4]; /* [which][half][pair] */
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = min_int(tiles[m].first + lane / 4 + half * 8, tiles[m].R - 1);
                float w[GROUP];
                load_factor(w, tiles[m].a, tiles[m].dtype, (size_t)r * K + k, GROUP,
                            tiles[m].whole);
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    uint32_t split[3];
                    split_pair<3>(split, w[2 * pair], w[2 * pair + 1]);
#pragma unroll
                    for (int i = 0; i < 3; i++) part[i][half][pair] = split[i];
                }
            }
#pragma unroll
            for (int n = 0; n < S::NT; n++) {
                if (n >= eights) continue;
                const uint4 b = *(const uint4 *)(x + (size_t)rows[n] * GROUP + k);
#pragma unroll
                for (int i = 0; i < 3; i++) {
                    uint4 a[2];
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        a[half] = make_uint4(part[i][half][0], part[i][half][1], part[i][half][2],
                                             part[i][half][3]);
                    multiply(sum[m][n], a, b);
                }
            }
        }
    }
}

/* Keep in L2 what expand reads after the base product, which streams more than L2 holds through
 * it: the tables, and this block's part of B. */
static __device__ void keep_for_expand(const struct lora_args &args, const struct lora_tile &tokens,
                                       int slice, int part, int parts)
{
    const auto keep = [](const void *line) {
        asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(line));
    };
    const struct lora_factors *f = lora_factors_of(args, tokens.slot, slice);
    if (part == 0 && threadIdx.x == 0) {
        keep(f);
        keep(&args.order[tokens.first]);
        keep(args.segment_start);
        keep(args.segment_slot);
    }
    const size_t bytes = (size_t)args.width[slice] * f->R * (f->dtype == DTYPE_F32 ? 4 : 2);
    const size_t step = (size_t)parts * blockDim.x * 128;
    for (size_t at = ((size_t)part * blockDim.x + threadIdx.x) * 128; at < bytes; at += step)
        keep((const char *)f->b + at);
}

/* Segments of several tokens on tensor cores: h[t, i, r] = dot(A[r, :], x[t, :]) for a tile of
 * 8 NT tokens of one adapter, MT tiles of 16 rows of A, and one of `splits` parts of K. The parts
 * are added up by the blocks of a cluster, or (before Hopper) by the last block.
 *
 *   h [T, n_slices, max_rank]    x [T, K], K a multiple of 32
 *   parts [grid.x, grid.y, splits, MT NT 128], used where splits > 1 and there are no clusters
 *   grid (tiles, row tiles / MT, splits)    block BLOCK: its warps share out its k */
template <typename S>
static __global__ void __launch_bounds__(S::BLOCK, S::BLOCKS)
    lora_shrink_tile_kernel(float *h, const bf16 *x, float *parts, int *counters, bool has_clusters,
                            bool keeps, const __grid_constant__ struct lora_args args)
{
    enum { MT = S::MT, NT = S::NT, SUMS = S::SUMS };
    /* With clusters, of_block holds the parts of all blocks of the sums that this one finishes. */
    __shared__ float of_warp[S::WARPS][MT * SUMS], of_block[MT * SUMS + CLUSTER_MAX];
    __shared__ int32_t token[8 * NT];
    grid_release();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int splits = gridDim.z, tiles_a_slice = ceil_div(args.max_rank, 16);
    struct lora_tile tokens;
    struct row_tile tiles[MT];
    bool any = false, all_bf16 = true;
    const bool found = lora_find_tile(&tokens, blockIdx.x, args, 8 * NT);
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int index = blockIdx.y * MT + m;
        tiles[m] = {};
        tiles[m].slice = index / tiles_a_slice;
        tiles[m].first = index % tiles_a_slice * 16;
        if (!found || tiles[m].slice >= args.n_slices) continue;
        const struct lora_factors f = *lora_factors_of(args, tokens.slot, tiles[m].slice);
        if (!f.a || tiles[m].first >= f.R) continue;
        tiles[m].a = f.a;
        tiles[m].R = f.R;
        tiles[m].dtype = f.dtype;
        tiles[m].whole = is_aligned_on_device(f.a);
        all_bf16 &= f.dtype == DTYPE_BF16 && tiles[m].whole;
        any = true;
    }
    if (!any) { /* the whole cluster */
        grid_wait();
        return;
    }
    const bool is_cluster = splits > 1 && has_clusters;
    if (is_cluster) cluster_arrive(); /* waited for before the others' memory is written */

    uint32_t
        rows[NT]; /* of x, where they begin, in groups: token 8 n + lane / 4, or the last one */
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int index = min_int(n * 8 + lane / 4, tokens.n - 1);
        rows[n] = (uint32_t)args.order[tokens.first + index] * (args.K / GROUP);
    }
    if ((int)threadIdx.x < tokens.n) token[threadIdx.x] = args.order[tokens.first + threadIdx.x];
    const int steps = args.K / STEP_K, a_split = ceil_div(steps, splits);
    const int begin = blockIdx.z * a_split, end = min_int(steps, begin + a_split);
    const int eights = ceil_div(tokens.n, 8);
    float sum[MT][NT][4] = {};
    if (MT == 1 && keeps && tokens.leads && tiles[0].first == 0)
        keep_for_expand(args, tokens, tiles[0].slice, blockIdx.z, splits);
    if (all_bf16) {
        shrink_steps_bf16<S>(sum, tiles, x, rows, eights, args.K, begin + warp, end);
    } else {
        grid_wait();
        shrink_steps_any<S>(sum, tiles, x, rows, eights, args.K, begin + warp, end);
    }

    /* A block finishes `own` of the sums: the blocks write their parts of those into its memory. */
    const int own = is_cluster ? ceil_div(MT * SUMS, splits) : MT * SUMS;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                of_warp[warp][m * SUMS + n * 128 + e * WARP + lane] = sum[m][n][e];
    __syncthreads();
    if (is_cluster) cluster_wait();
    int to = 0, at = threadIdx.x; /* sum j is number `at` of block `to` */
    for (int j = threadIdx.x; j < MT * SUMS; j += S::BLOCK, at += S::BLOCK) {
        for (; at >= own; at -= own) to++;
        if (j % SUMS >= eights * 128) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < S::WARPS; w++) total += of_warp[w][j];
        if (is_cluster)
            *cluster_block(&of_block[blockIdx.z * own + at], to) = total;
        else
            of_block[j] = total;
    }
    __syncthreads();

    const size_t item = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    if (is_cluster) {
        cluster_sync();
    } else if (splits > 1) {
        for (int i = threadIdx.x; i < MT * SUMS; i += S::BLOCK)
            parts[(item * splits + blockIdx.z) * (MT * SUMS) + i] = of_block[i];
        if (!arrives_last(&counters[item], splits)) return;
    }
    const int before = is_cluster ? blockIdx.z * own : 0;
    for (int j = threadIdx.x; j < own && before + j < MT * SUMS; j += S::BLOCK) {
        const int i = before + j;
        const int m = i / SUMS, e = i / WARP % 4, from = i % WARP;
        const int r = from / 4 + e / 2 * 8, n = i % SUMS / 128 * 8 + from % 4 * 2 + e % 2;
        struct row_tile tile = tiles[0];
#pragma unroll
        for (int other = 1; other < MT; other++)
            if (other == m) tile = tiles[other];
        if (!tile.a || n >= tokens.n || tile.first + r >= tile.R) continue;
        float total = of_block[j];
        if (splits > 1) {
            total = 0.0f;
            for (int s = 0; s < splits; s++)
                total += is_cluster ? of_block[s * own + j]
                                    : __ldcg(&parts[(item * splits + s) * (MT * SUMS) + i]);
        }
        h[lora_h_row(args, token[n], tile.slice) + tile.first + r] = total;
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

template <typename X, int ROWS>
static void launch_rows(struct cuda_device *cuda, float *h, const X *x,
                        const struct lora_args *args)
{
    const dim3 grid(ceil_div(args->max_rank, ROWS), args->n_slices, args->n_tokens);
    cuda_launch(cuda, "lora_shrink", lora_shrink_row_kernel<X, ROWS>, grid, ROW_BLOCK, 0, 1, h, x,
                *args);
}

/* As many rows of A a block as leave two blocks for each multiprocessor. */
template <typename X>
static void shrink_by_row(struct cuda_device *cuda, float *h, const X *x,
                          const struct lora_args *args)
{
    const long long rows = (long long)args->n_tokens * args->n_slices * args->max_rank;
    if (rows >= 16LL * cuda->n_sms)
        launch_rows<X, 8>(cuda, h, x, args);
    else if (rows >= 4LL * cuda->n_sms)
        launch_rows<X, 2>(cuda, h, x, args);
    else
        launch_rows<X, 1>(cuda, h, x, args);
}

/* Where there is little to do, some multiprocessors are left to the base product, and B is kept in
 * L2. */
static bool is_small(const struct lora_args *args)
{
    return args->n_tokens <= 64 && args->n_tokens * args->max_rank <= 1024;
}

template <typename S>
static void launch_tiles(struct cuda_device *cuda, float *h, const bf16 *x,
                         const struct lora_args *args, int blocks)
{
    const int tiles = lora_tiles(args, 8 * S::NT);
    const int row_tiles = args->n_slices * ceil_div(args->max_rank, 16);
    const int groups = ceil_div(row_tiles, S::MT), steps = args->K / STEP_K;
    const bool keeps = is_small(args);
    /* Of two steps for each warp or more. Clusters of a power of two find room most easily. */
    int splits = min_int(blocks / (tiles * groups), steps / (2 * S::WARPS));
    splits = min_int(cuda->is_hopper ? CLUSTER_MAX : PARTS_MAX, max_int(1, splits));
    if (!cuda->is_hopper && (long long)tiles * groups > COUNTERS) splits = 1;
    while (splits & (splits - 1)) splits &= splits - 1;
    while (splits > 1 && ceil_div(steps, splits) * (splits - 1) >= steps)
        splits /= 2; /* no empty */
    float *parts = NULL;
    if (splits > 1 && !cuda->is_hopper) {
        const size_t n = (size_t)tiles * groups * splits * S::MT * S::SUMS;
        parts = (float *)cuda_scratch(cuda, n * sizeof *parts, "lora_shrink");
        if (!parts) return;
    }
    if (cuda->is_hopper && splits > 8) /* more than every Hopper promises: these have it */
        cuda_check(cuda,
                   cudaFuncSetAttribute(lora_shrink_tile_kernel<S>,
                                        cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                   "lora_shrink");
    cuda_launch(cuda, "lora_shrink", lora_shrink_tile_kernel<S>, dim3(tiles, groups, splits),
                S::BLOCK, 0, cuda->is_hopper ? splits : 1, h, x, parts, cuda->counters,
                cuda->is_hopper, keeps, *args);
}

size_t lora_shrink_tile_bytes(const struct cuda_device *cuda)
{
    enum { LARGEST = 3 * 4 * 128 }; /* sums of a block: MT NT 128 */
    /* Where sums are shared out, they are of three blocks a multiprocessor at most. */
    return cuda->is_hopper ? 0 : (size_t)3 * cuda->n_sms * LARGEST * sizeof(float);
}

/* Row tiles together, so that x is read once for them; half the warps, so that their sums and loads
 * find registers and a multiprocessor holds three blocks. */
template <int NT>
static void launch_grouped(struct cuda_device *cuda, float *h, const bf16 *x,
                           const struct lora_args *args, int row_tiles)
{
    enum { FEW = NT == 2 }; /* leave room for loads of more steps */
    if (row_tiles % 3 == 0)
        launch_tiles<shrink_shape<4, 3, NT, FEW ? 3 : 2, 3>>(cuda, h, x, args, 3 * cuda->n_sms);
    else if (row_tiles % 2 == 0)
        launch_tiles<shrink_shape<4, 2, NT, FEW ? 4 : 2, 3>>(cuda, h, x, args, 3 * cuda->n_sms);
    else
        launch_tiles<shrink_shape<4, 1, NT, FEW ? 4 : 3, 3>>(cuda, h, x, args, 3 * cuda->n_sms);
}

/* Nothing runs beside it, and no segment is so long that tiles of sixteen tokens would lose more by
 * reading its A again than they gain. */
static bool is_alone(const struct lora_args *args)
{
    return args->n_tokens > BESIDE_TOKENS && args->max_segment > 16 && args->max_segment <= 256;
}

/* The smallest tiles that are no more than the chip does at once, each a whole cluster; alone, as
 * many as there are multiprocessors, in two blocks or more each; else as large as the longest
 * segment, up to 32 tokens. */
void lora_shrink_by_tile(struct cuda_device *cuda, float *h, const bf16 *x,
                         const struct lora_args *args)
{
    const int row_tiles = args->n_slices * ceil_div(args->max_rank, 16);
    const int at_once = cuda->n_sms / PARTS_MAX / row_tiles;
    const int tiles = lora_tiles(args, 16);
    /* A block for each multiprocessor leaves room for the next kernel's to begin. */
    const int blocks = is_small(args) ? cuda->n_sms * 3 / 4 : cuda->n_sms;

    if (args->max_segment <= 8 || lora_tiles(args, 8) <= at_once)
        launch_tiles<shrink_shape<8, 1, 1, 4, 2>>(cuda, h, x, args, blocks);
    else if (is_alone(args) && tiles * row_tiles <= cuda->n_sms)
        launch_tiles<shrink_shape<8, 1, 2, 4, 2>>(cuda, h, x, args, 2 * cuda->n_sms);
    else if (args->max_segment > 16 && tiles > at_once)
        launch_grouped<4>(cuda, h, x, args, row_tiles);
    else if (args->max_rank > 32 && tiles * row_tiles > cuda->n_sms / 2)
        launch_grouped<2>(cuda, h, x, args, row_tiles);
    else
        launch_tiles<shrink_shape<8, 1, 2, 4, 2>>(cuda, h, x, args, blocks);
}

void lora_shrink_by_row(struct cuda_device *cuda, float *h, const void *x,
                        const struct lora_args *args, enum dtype dtype)
{
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        shrink_by_row(cuda, h, (const X *)x, args);
    });
}

bool lora_shrink_has_tiles(const void *x, const struct lora_args *args, enum dtype dtype)
{
    return dtype == DTYPE_BF16 && args->K % STEP_K == 0 && is_aligned(x);
}
