/* The second half of LoRA: the rank to y, added with one rounding. Bound by reading B once for
 * each adapter in use and by y, read and written (from L2 at decode); at few adapters by latency,
 * so B is on its way before h and y are waited for. */
#include "kernels/cuda/lora_add.cuh"

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
        bits[j] = r < R ? __ldcs((const uint4 *)(b + (size_t)min_int(n + j, N - 1) * R + r))
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
    TILE_BLOCK = ADD_BLOCK,
    WARP_N = 64,
    QUADS = WARP_N / QUAD,
    TILE_N = TILE_BLOCK / WARP * WARP_N,
};

/* What a warp of the tile kernel works on. */
template <typename Y> struct expand_tile {
    Y *y;                 /* the warp's first output, of token 0 of the step */
    const float *h;       /* the slice of token 0 */
    const int32_t *order; /* of the tile's tokens */
    const void *b;
    float scale;
    int dtype, R;
    int y_pitch, h_pitch;  /* of tokens */
    int n_tokens, n, N;    /* the warp's outputs, of N in the slice */
    bool whole_h, whole_b; /* aligned */
};

/* Of 32 tokens of the tile from i on, this lane's, or the last: asked for before the wait. */
template <typename Y> static __device__ int token_of(const struct expand_tile<Y> &tile, int i)
{
    return tile.order[min_int(i + (int)threadIdx.x % WARP, tile.n_tokens - 1)];
}

/* Where this lane's two tokens of the sixteen from i on begin in y and h; `tokens` are those from
 * a multiple of 32 on. */
template <typename Y> struct token_rows {
    Y *y[2];
    const float *h[2];
};

template <typename Y>
static __device__ struct token_rows<Y> rows_of(const struct expand_tile<Y> &tile, int tokens,
                                               int i) {
    struct token_rows<Y> rows;
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const size_t token =
            __shfl_sync(~0u, tokens, i % WARP + threadIdx.x % WARP / 4 + t * GROUP);
        rows.y[t] = tile.y + token * tile.y_pitch;
        rows.h[t] = tile.h + token * tile.h_pitch;
    }
    return rows;
}

/* From a quad on, how many outputs there are. */
template <typename Y>
static __device__ int n_outputs(const struct expand_tile<Y> &tile, int quad)
{
    return tile.N - tile.n - quad * QUAD;
}

template <typename Y>
static __device__ void load_y(struct eight<Y> (&old)[QUADS][2], const struct expand_tile<Y> &tile,
                              const struct token_rows<Y> &rows, bool whole)
{
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++)
#pragma unroll
        for (int t = 0; t < 2; t++)
            load_eight(&old[quad][t], rows.y[t] + quad * QUAD, n_outputs(tile, quad), whole);
}

/* y = round(c), of the tokens from i on that there are. */
template <typename Y>
static __device__ void store_y(const struct expand_tile<Y> &tile, const struct token_rows<Y> &rows,
                               const float (&c)[4][4], int quad, int i, bool whole)
{
#pragma unroll
    for (int t = 0; t < 2; t++)
        if (i + (int)threadIdx.x % WARP / 4 + t * GROUP < tile.n_tokens)
            store_eight(rows.y[t] + quad * QUAD, c, t, n_outputs(tile, quad), whole);
    __syncwarp(); /* products take the whole warp */
}

/* B, of STEPS 16 of the rank at most, in registers: asked for before h and y are waited for. The
 * next tokens' y is on its way while these are worked on. All warps of the block call it together. */
template <typename Y, int STEPS>
static __device__ void expand_kept(const struct expand_tile<Y> &tile)
{
    __shared__ struct shared_h<1, STEPS, PARTS<Y>> shared;
    const int r0 = threadIdx.x % 4 * 4;
    const int R[1] = {tile.R};
    const float scale[1] = {tile.scale};
    uint2 b[STEPS][QUADS][4];
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++)
            load_quad<Y>(b[s][quad], (const bf16 *)tile.b, tile.n + quad * QUAD, tile.N, tile.R,
                         s * 16 + r0);
    int tokens = token_of(tile, 0);
    struct token_rows<Y> rows;
    struct eight<Y> old[QUADS][2];
    struct h_items<1, STEPS> h;
    const auto load = [&](int i) {
        if (i > 0 && i % WARP == 0) tokens = token_of(tile, i);
        rows = rows_of(tile, tokens, i);
        h.load(tile.h + (size_t)__shfl_sync(~0u, tokens, i % WARP + h.index()) * tile.h_pitch, 0,
               R);
        load_y(old, tile, rows, true);
    };
    grid_wait();
    load(0);
#pragma unroll 1
    for (int i = 0; i < tile.n_tokens; i += SIXTEEN) {
        const int which = i / SIXTEEN % 2;
        float c[QUADS][4][4];
        h.share(&shared, which, scale);
        __syncthreads();
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++) set_quad(c[quad], old[quad]);
        const struct token_rows<Y> here = rows;
        if (i + SIXTEEN < tile.n_tokens) load(i + SIXTEEN);
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            struct h_rows<PARTS<Y>> x;
            take_rows(&x, shared, which, 0, s);
#pragma unroll
            for (int quad = 0; quad < QUADS; quad++) add_quad(c[quad], x, b[s][quad]);
        }
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++) store_y(tile, here, c[quad], quad, i, true);
    }
}

/* Any rank and type: B is read again for each sixteen tokens. */
template <typename Y> static __device__ void expand_any(const struct expand_tile<Y> &tile)
{
    const int r0 = threadIdx.x % 4 * 4;
    int tokens = token_of(tile, 0);
    grid_wait();
#pragma unroll 1
    for (int i = 0; i < tile.n_tokens; i += SIXTEEN) {
        if (i > 0 && i % WARP == 0) tokens = token_of(tile, i);
        const struct token_rows<Y> rows = rows_of(tile, tokens, i);
        struct eight<Y> old[QUADS][2];
        float c[QUADS][4][4];
        load_y(old, tile, rows, false);
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++) set_quad(c[quad], old[quad]);
#pragma unroll 1
        for (int r = r0; r - r0 < tile.R; r += 16) {
            struct h_rows<PARTS<Y>> x;
            split_rows(&x, load_h(rows.h[0], r, tile.R, tile.whole_h),
                       load_h(rows.h[1], r, tile.R, tile.whole_h), tile.scale);
#pragma unroll
            for (int quad = 0; quad < QUADS; quad++) {
                const int n = tile.n + quad * QUAD;
                if (tile.whole_b && tile.dtype == DTYPE_BF16) {
                    uint2 b[4];
                    load_quad<Y>(b, (const bf16 *)tile.b, n, tile.N, tile.R, r);
                    add_quad(c[quad], x, b);
                } else {
                    add_quad_any<Y>(c[quad], x, tile.b, tile.dtype, n, tile.N, tile.R, r,
                                    tile.whole_b);
                }
            }
        }
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++) store_y(tile, rows, c[quad], quad, i, false);
    }
}

enum { TOKENS_MIN = 8, TOKENS_MAX = 128 }; /* of a tile */

/* The same for segments of several tokens on tensor cores: a block does TILE_N outputs of a slice
 * for a tile of `size` tokens of one adapter, sixteen at a time.
 *
 *   y [T, N] Y, in and out    h [T, n_slices, max_rank]
 *   grid (chunks, tiles)    block TILE_BLOCK, a warp for WARP_N outputs
 *   STEPS of 16 of the rank whose B stays in registers; 0: none */
template <typename Y, int STEPS>
static __global__ void __launch_bounds__(TILE_BLOCK, STEPS < 2                ? 4
                                                     : STEPS * sizeof(Y) < 16 ? 3
                                                                              : 2)
    lora_expand_tile_kernel(Y *y, const float *h, const __grid_constant__ struct lora_args args,
                            int size)
{
    grid_release();
    struct lora_chunk chunk = {};
    struct lora_tile tokens;
    struct lora_factors f = {};
    const bool found = lora_find_tile(&tokens, blockIdx.y, args, size);
    if (lora_find_chunk(&chunk, blockIdx.x, args, TILE_N) && found)
        f = *lora_factors_of(args, tokens.slot, chunk.slice);
    const int slice = chunk.slice, first = chunk.first;
    if (!f.a) { /* the whole block */
        grid_wait();
        return;
    }

    struct expand_tile<Y> tile;
    tile.n = first + threadIdx.x / WARP * WARP_N;
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
    const bool whole_y =
        args.N % GROUP == 0 && tile.N % GROUP == 0 && is_aligned_on_device(y + args.offset[slice]);
    if constexpr (STEPS > 0)
        if (whole_y && tile.whole_b && tile.whole_h && tile.dtype == DTYPE_BF16 &&
            tile.R <= STEPS * 16) {
            expand_kept<Y, STEPS>(tile);
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

/* Tiles of as many tokens as leave half a wave of blocks, large ones a whole: B is read once for each.
 * Where that is small, half of what a block does at once is better than multiprocessors that have none. */
template <typename Y>
static void expand_by_tile(struct cuda_device *cuda, Y *y, const float *h,
                           const struct lora_args *args)
{
    const int chunks = lora_chunks(args, TILE_N);
    int size = min_int(TOKENS_MAX, ceil_div(args->max_segment, SIXTEEN) * SIXTEEN);
    if (size == TOKENS_MAX && lora_tiles(args, size) * chunks < WAVE * cuda->n_sms) size /= 2;
    while (size > SIXTEEN && lora_tiles(args, size) * chunks < WAVE / 2 * cuda->n_sms)
        size = size / SIXTEEN / 2 * SIXTEEN;
    if (size == SIXTEEN && args->max_rank <= 16 && lora_tiles(args, size) * chunks < cuda->n_sms)
        size = TOKENS_MIN;
    const dim3 grid(chunks, lora_tiles(args, size));
    assert(grid.y <= 65535);
    const auto kernel = args->max_rank <= 16   ? lora_expand_tile_kernel<Y, 1>
                        : args->max_rank <= 32 ? lora_expand_tile_kernel<Y, 2>
                        : args->max_rank <= 64 ? lora_expand_tile_kernel<Y, 4>
                                               : lora_expand_tile_kernel<Y, 0>;
    cuda_launch(cuda, "lora_expand", kernel, grid, TILE_BLOCK, 0, 1, y, h, *args, size);
}

void lora_expand_by_row(struct cuda_device *cuda, void *y, const float *h,
                        const struct lora_args *args, enum dtype dtype)
{
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        expand_by_row(cuda, (X *)y, h, args);
    });
}

void lora_expand_by_tile(struct cuda_device *cuda, void *y, const float *h,
                         const struct lora_args *args, enum dtype dtype)
{
    with_activation(dtype, [&](auto type) {
        using Y = decltype(type);
        expand_by_tile(cuda, (Y *)y, h, args);
    });
}
