/* The second half of LoRA: the rank to y, added with one rounding. Bound by reading B once for
 * each adapter in use and by y, read and written (from L2 at decode); at few adapters by latency,
 * so B is on its way before h and y are waited for. */
#include "kernels/cuda/lora_tile.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { ROW_BLOCK = 128, ROW_WARPS = ROW_BLOCK / WARP };

/* Lanes that share a row of B: 8 of its elements each. */
static inline __host__ __device__ int lanes_a_row(int R)
{
    int lanes = 1;
    while (lanes < WARP && lanes * GROUP < R) lanes *= 2;
    return lanes;
}

/* Eight rows of B from n on, eight elements from r on of each (bf16, aligned); the last row again
 * where there are no more, zeros past R. */
static __device__ void load_rows(uint4 (&bits)[GROUP], const bf16 *b, int n, int N, int R, int r)
{
#pragma unroll
    for (int j = 0; j < GROUP; j++)
        bits[j] = r < R ? *(const uint4 *)(b + (size_t)min_int(n + j, N - 1) * R + r)
                        : make_uint4(0, 0, 0, 0);
}

static __device__ void add_rows(float (&sum)[GROUP], const uint4 (&bits)[GROUP],
                                const float (&x)[GROUP])
{
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
        bf16 w[GROUP];
        memcpy(w, &bits[j], sizeof w);
#pragma unroll
        for (int e = 0; e < GROUP; e++) sum[j] += widen(w[e]) * x[e];
    }
}

/* The same for any type and rank, all of the row: lanes step by `lanes` groups. */
static __device__ void add_rows_any(float (&sum)[GROUP], const float *h,
                                    const struct lora_factors &f, int n, int N, int r0, int lanes,
                                    bool whole)
{
    for (int r = r0; r < f.R; r += lanes * GROUP) {
        float x[GROUP];
        load_some(x, h + r, f.R - r, false);
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            float w[GROUP];
            load_factor(w, f.b, f.dtype, (size_t)min_int(n + j, N - 1) * f.R + r, f.R - r, whole);
#pragma unroll
            for (int e = 0; e < GROUP; e++) sum[j] += w[e] * x[e];
        }
    }
}

/* y[n + j] += scale * the lanes' sums, by the first lane of the row's. All lanes call it. */
template <typename X>
static __device__ void add_to_row(X *y, float (&sum)[GROUP], int n, int end, int lanes, float scale,
                                  bool whole)
{
    const bool writes = threadIdx.x % lanes == 0 && n < end;
    float old[GROUP];
    if (writes) load_some(old, y + n, end - n, whole && n + GROUP <= end);
    for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
        for (int j = 0; j < GROUP; j++) sum[j] += __shfl_xor_sync(~0u, sum[j], step);
    if (!writes) return;
#pragma unroll
    for (int j = 0; j < GROUP; j++) old[j] += scale * sum[j];
    store_some(y + n, old, end - n, whole && n + GROUP <= end);
}

/* Tokens one by one, for any types and sizes:
 *   y[t, offset[i] + n] = round(y + scale * dot(B[n, :], h[t, i, :]))
 *
 *   y [T, N] X, in and out    h [T, n_slices, max_rank]
 *   grid (chunks, n_tokens)    block ROW_BLOCK: lanes_a_row(R) lanes for eight outputs */
template <typename X>
static __global__ void __launch_bounds__(ROW_BLOCK, 5)
    lora_expand_row_kernel(X *y, const float *h, const __grid_constant__ struct lora_args args,
                           int chunk)
{
    grid_release();
    const int t = lora_token(args, blockIdx.y);
    struct lora_chunk part = {};
    struct lora_factors f = {};
    if (lora_find_chunk(&part, blockIdx.x, args, chunk))
        f = lora_factors_of_token(args, t, part.slice);
    const int slice = part.slice, first = part.first;
    if (!f.a) { /* the whole block */
        grid_wait();
        return;
    }

    const int lanes = lanes_a_row(f.R), lane = threadIdx.x % WARP, r0 = lane % lanes * GROUP;
    const int outputs = WARP / lanes * GROUP; /* of a warp */
    const int N = args.width[slice], end = min_int(N, first + chunk);
    const float *h_row = h + lora_h_row(args, t, slice);
    const bool whole = f.R % GROUP == 0 && is_aligned_on_device(f.b);
    const bool ahead = whole && f.dtype == DTYPE_BF16 && f.R <= WARP * GROUP;
    X *y_row = y + (size_t)t * args.N + args.offset[slice];
    const bool y_whole = is_aligned_on_device(y_row) && args.N % GROUP == 0;

    const int n0 = first + threadIdx.x / WARP * outputs, in_warp = lane / lanes * GROUP;
    const int step = ROW_WARPS * outputs;
    if (ahead) {
        uint4 bits[GROUP];
        load_rows(bits, (const bf16 *)f.b, n0 + in_warp, N, f.R, r0);
        grid_wait();
        float x[GROUP];
        load_some(x, h_row + r0, f.R - r0, r0 < f.R && args.max_rank % 4 == 0);
        for (int n = n0; n < end; n += step) {
            float sum[GROUP] = {};
            add_rows(sum, bits, x);
            if (n + step < end) load_rows(bits, (const bf16 *)f.b, n + step + in_warp, N, f.R, r0);
            add_to_row(y_row, sum, n + in_warp, end, lanes, f.scale, y_whole);
        }
    } else {
        grid_wait();
#pragma unroll 1
        for (int n = n0; n < end; n += step) {
            float sum[GROUP] = {};
            add_rows_any(sum, h_row, f, n + in_warp, N, r0, lanes, whole);
            add_to_row(y_row, sum, n + in_warp, end, lanes, f.scale, y_whole);
        }
    }
}

enum {
    TILE_BLOCK = 128,
    TILE_WARPS = TILE_BLOCK / WARP,
    WARP_N = 64,
    TILE_N = TILE_WARPS * WARP_N,
};

/* What a warp of the tile kernel works on. */
struct expand_tile {
    bf16 *y;              /* this lane's first output of token 0 of the step */
    const float *h;       /* the slice of token 0 */
    const int32_t *order; /* of the tile's tokens */
    const void *b;
    float scale;
    int dtype, R;
    int y_pitch, h_pitch;           /* of tokens */
    int n_tokens, n, N;             /* this lane's eight outputs, of N in the slice */
    bool whole_y, whole_h, whole_b; /* aligned */
};

/* Of 32 tokens of the tile from i on, this lane's, or the last: asked for before the wait. */
static __device__ int token_of(const struct expand_tile &tile, int i)
{
    return tile.order[min_int(i + (int)threadIdx.x % WARP, tile.n_tokens - 1)];
}

/* y of this lane's eight outputs and token i + 2 (lane % 4) + c, or the last; `tokens` are those
 * from a multiple of 32 on. */
static __device__ bf16 *y_of(const struct expand_tile &tile, int tokens, int i, int c)
{
    const int token = __shfl_sync(~0u, tokens, i % WARP + threadIdx.x % 4 * 2 + c);
    return tile.y + (size_t)token * tile.y_pitch;
}

static __device__ void load_y(uint4 (&old)[2], const struct expand_tile &tile, int tokens, int i)
{
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const bf16 *y = y_of(tile, tokens, i, c);
        if (tile.whole_y) {
            old[c] = *(const uint4 *)y;
            continue;
        }
        const int n = tile.N - tile.n;
        const auto pair = [&](int e) {
            return pack_bf16(e < n ? widen(y[e]) : 0.0f, e + 1 < n ? widen(y[e + 1]) : 0.0f);
        };
        old[c] = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
}

/* sum[j][c] and sum[j][c + 2] are outputs n + 2 j and the next of token c. */
static __device__ void add_to_y(const struct expand_tile &tile, const uint4 (&old)[2],
                                const float (&sum)[4][4], int tokens, int i)
{
#pragma unroll
    for (int c = 0; c < 2; c++) {
        bf16 *y = y_of(tile, tokens, i, c);
        if (i + (int)threadIdx.x % 4 * 2 + c >= tile.n_tokens || tile.n >= tile.N) continue;
        const uint32_t pairs[4] = {old[c].x, old[c].y, old[c].z, old[c].w};
        float value[GROUP];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            value[2 * j] = bf16_low(pairs[j]) + tile.scale * sum[j][c];
            value[2 * j + 1] = bf16_high(pairs[j]) + tile.scale * sum[j][c + 2];
        }
        store_some(y, value, tile.N - tile.n, tile.whole_y);
    }
    __syncwarp(); /* products take the whole warp */
}

/* The row of h of token i + lane / 4, or of the last. */
static __device__ const float *h_of(const struct expand_tile &tile, int tokens, int i)
{
    const int token = __shfl_sync(~0u, tokens, i % WARP + threadIdx.x % WARP / 4);
    return tile.h + (size_t)token * tile.h_pitch;
}

/* B, of STEPS 16 of the rank at most, in registers: asked for before h and y are waited for. The
 * next eight tokens' h and y are on their way while these are worked on. */
template <int STEPS> static __device__ void expand_kept(const struct expand_tile &tile)
{
    const int r0 = threadIdx.x % 4 * 4;
    uint32_t b[STEPS][4][4];
    uint4 old[2];
    float4 h[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        load_b(b[s], (const bf16 *)tile.b, tile.n, tile.N, tile.R, s * 16 + r0);
    int tokens = token_of(tile, 0);
    grid_wait();
    load_y(old, tile, tokens, 0);
    const float *row = h_of(tile, tokens, 0);
#pragma unroll
    for (int s = 0; s < STEPS; s++) h[s] = load_h(row, s * 16 + r0, tile.R, tile.whole_h);
    for (int i = 0; i < tile.n_tokens; i += 8) {
        float sum[4][4] = {};
        const uint4 y[2] = {old[0], old[1]};
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            uint32_t x[2][2];
            split_h(x, h[s]);
            multiply(sum, b[s], x);
        }
        const int here = tokens;
        if (i + 8 < tile.n_tokens) {
            if ((i + 8) % WARP == 0) tokens = token_of(tile, i + 8);
            load_y(old, tile, tokens, i + 8);
            row = h_of(tile, tokens, i + 8);
#pragma unroll
            for (int s = 0; s < STEPS; s++) h[s] = load_h(row, s * 16 + r0, tile.R, tile.whole_h);
        }
        add_to_y(tile, y, sum, here, i);
    }
}

/* Any rank and type: B is read again for each eight tokens. */
static __device__ void expand_any(const struct expand_tile &tile)
{
    const int r0 = threadIdx.x % 4 * 4;
    int tokens = token_of(tile, 0);
    grid_wait();
#pragma unroll 1
    for (int i = 0; i < tile.n_tokens; i += 8) {
        if (i > 0 && i % WARP == 0) tokens = token_of(tile, i);
        const float *h = h_of(tile, tokens, i);
        float sum[4][4] = {};
#pragma unroll 1
        for (int r = r0; r - r0 < tile.R; r += 16) {
            uint32_t x[2][2];
            split_h(x, load_h(h, r, tile.R, tile.whole_h));
            if (tile.whole_b && tile.dtype == DTYPE_BF16) {
                uint32_t b[4][4];
                load_b(b, (const bf16 *)tile.b, tile.n, tile.N, tile.R, r);
                multiply(sum, b, x);
                continue;
            }
#pragma unroll
            for (int m = 0; m < 4; m++) {
                uint32_t b[2][4];
                load_b_any(b, tile.b, tile.dtype, tile.n + 2 * m, tile.N, tile.R, r, tile.whole_b);
                mma_bf16(sum[m], b[0], x[0][0], x[0][1]);
                mma_bf16(sum[m], b[0], x[1][0], x[1][1]);
                mma_bf16(sum[m], b[1], x[0][0], x[0][1]);
            }
        }
        uint4 old[2];
        load_y(old, tile, tokens, i);
        add_to_y(tile, old, sum, tokens, i);
    }
}

/* The same for segments of several tokens on tensor cores: a block does TILE_N outputs of a slice
 * for a tile of 8 `eights` tokens of one adapter, eight at a time. Rows of the products are
 * outputs, eight neighbours to a lane so that it reads and writes 16 bytes of y.
 *
 *   y [T, N], in and out    h [T, n_slices, max_rank]
 *   grid (chunks, tiles)    block TILE_BLOCK, a warp for WARP_N outputs
 *   STEPS of 16 of the rank whose B stays in registers; 0: none */
template <int STEPS>
static __global__ void __launch_bounds__(TILE_BLOCK, STEPS == 4 ? 3 : 4)
    lora_expand_tile_kernel(bf16 *y, const float *h, const __grid_constant__ struct lora_args args,
                            int eights)
{
    grid_release();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    struct lora_chunk chunk = {};
    struct lora_tile tokens;
    struct lora_factors f = {};
    const bool found = lora_find_tile(&tokens, blockIdx.y, args, 8 * eights);
    if (lora_find_chunk(&chunk, blockIdx.x, args, TILE_N) && found)
        f = *lora_factors_of(args, tokens.slot, chunk.slice);
    const int slice = chunk.slice, first = chunk.first;
    if (!f.a) { /* the whole block */
        grid_wait();
        return;
    }

    struct expand_tile tile;
    tile.n = first + warp * WARP_N + lane / 4 * GROUP;
    tile.N = args.width[slice];
    tile.y = y + args.offset[slice] + tile.n;
    tile.h = h + (size_t)slice * args.h_slice;
    tile.order = args.order + tokens.first;
    tile.b = f.b;
    tile.scale = f.scale;
    tile.dtype = f.dtype;
    tile.R = f.R;
    tile.y_pitch = args.N;
    tile.h_pitch = args.h_token;
    tile.n_tokens = tokens.n;
    tile.whole_b = f.R % 4 == 0 && is_aligned_on_device(f.b);
    tile.whole_h = args.max_rank % 4 == 0 && f.R % 4 == 0;
    tile.whole_y = args.N % GROUP == 0 && tile.n + GROUP <= tile.N && is_aligned_on_device(tile.y);
    if constexpr (STEPS > 0)
        if (tile.whole_b && tile.dtype == DTYPE_BF16 && tile.R <= STEPS * 16) {
            expand_kept<STEPS>(tile);
            return;
        }
    expand_any(tile);
}

/* ---- launchers ---------------------------------------------------------------------------- */

enum { WAVE = 6 }; /* blocks a multiprocessor holds, about */

/* Chunks of several rounds where blocks are many: each round's B is asked for during the one
 * before. */
template <typename X>
static void expand_by_row(struct cuda_device *cuda, X *y, const float *h,
                          const struct lora_args *args)
{
    const int round = ROW_WARPS * (WARP / lanes_a_row(args->max_rank)) * GROUP;
    const long long blocks = (long long)lora_chunks(args, round) * args->n_tokens;
    const int rounds = (int)(blocks / (WAVE * cuda->n_sms)) + 1;
    const int chunk = round * min_int(rounds, 16);
    const dim3 grid(lora_chunks(args, chunk), args->n_tokens);
    cuda_launch(cuda, "lora_expand", lora_expand_row_kernel<X>, grid, ROW_BLOCK, 0, 1, y, h, *args,
                chunk);
}

/* Tiles of as many tokens as leave a wave of blocks: B is read once for each. */
void lora_expand_by_tile(struct cuda_device *cuda, bf16 *y, const float *h,
                         const struct lora_args *args)
{
    const int chunks = lora_chunks(args, TILE_N);
    int eights = min_int(16, ceil_div(args->max_segment, 8));
    while (eights > 1 && lora_tiles(args, 8 * eights) * chunks < WAVE / 2 * cuda->n_sms)
        eights /= 2;
    const dim3 grid(chunks, lora_tiles(args, 8 * eights));
    assert(grid.y <= 65535);
    const auto kernel = args->max_rank <= 16   ? lora_expand_tile_kernel<1>
                        : args->max_rank <= 32 ? lora_expand_tile_kernel<2>
                        : args->max_rank <= 64 ? lora_expand_tile_kernel<4>
                                               : lora_expand_tile_kernel<0>;
    cuda_launch(cuda, "lora_expand", kernel, grid, TILE_BLOCK, 0, 1, y, h, *args, eights);
}

void lora_expand_by_row(struct cuda_device *cuda, void *y, const float *h,
                        const struct lora_args *args, enum dtype dtype)
{
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        expand_by_row(cuda, (X *)y, h, args);
    });
}
