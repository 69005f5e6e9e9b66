/* The second half of LoRA inside the kernel that reads its result: silu_mul after gate_up. gate
 * and up are read once, have what the adapters add to them added and rounded in registers, and go
 * on from there: no launch and no round trip of their own. Bound by B and by gate_up, at decode
 * by latency. */
#include "kernels/cuda/lora_add.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum {
    SILU_BLOCK = ADD_BLOCK,
    BLOCK_F = SILU_BLOCK / WARP * QUAD,
    SIXTEENS_MAX = 8 /* in a tile */
};

/* The tokens that a block works on: of a segment, or those without an adapter among the step's. */
struct silu_tokens {
    const int32_t *order; /* of the segment, NULL: tokens first, first + 1, ... */
    const int32_t *slot;
    int first, n;
};

/* Of 32 tokens from i on, this lane's; -1: none. */
static __device__ int token_of(const struct silu_tokens &tokens, int i)
{
    i += threadIdx.x % WARP;
    if (i >= tokens.n) return -1;
    if (tokens.order) return tokens.order[i];
    return tokens.slot[tokens.first + i] < 0 ? tokens.first + i : -1;
}

/* A quad of outputs of gate or up, the warp's, and what adds to them. */
struct side {
    struct lora_factors f; /* a NULL: nothing */
    bool whole, kept;      /* B and h are aligned; all of B is in registers */
};

static __device__ struct side side_of(const struct lora_args &args, int slice, int slot, int steps)
{
    struct side side = {};
    if (slot >= 0) side.f = *lora_factors_of(args, slot, slice);
    if (!side.f.a) return {{}, true, true};
    side.whole = side.f.R % 4 == 0 && args.max_rank % 4 == 0 && is_aligned_on_device(side.f.b);
    side.kept = side.whole && side.f.dtype == DTYPE_BF16 && side.f.R <= steps * 16;
    return side;
}

/* Two numbers as they come back from Y. */
template <typename Y> static __device__ float2 rounded_pair(float a, float b)
{
    return make_float2(a, b);
}
template <> __device__ float2 rounded_pair<bf16>(float a, float b)
{
    const uint32_t bits = pack_bf16(a, b);
    return make_float2(bf16_low(bits), bf16_high(bits));
}

/* Two of silu(gate) * up, each of numbers rounded to Y. */
template <typename Y> static __device__ uint32_t silu_pair(const float *gate, const float *up)
{
    const float2 g = rounded_pair<Y>(gate[0], gate[1]), u = rounded_pair<Y>(up[0], up[1]);
    return pack_bf16(silu<bf16>(g.x) * u.x, silu<bf16>(g.y) * u.y);
}

/* What a warp works on: a quad of f from n on. */
template <typename Y> struct silu_tile {
    struct silu_tokens tokens;
    struct side sides[2];
    bf16 *y;          /* [T, F] */
    const Y *gate_up; /* [T, 2 F] */
    const float *h;
    int n;
};

/* This lane's two of the sixteen tokens from i on, -1: none; `some` are those of 32. */
static __device__ void two_tokens(int (&t)[2], int some, int i)
{
#pragma unroll
    for (int k = 0; k < 2; k++)
        t[k] = __shfl_sync(~0u, some, i % WARP + threadIdx.x % WARP / 4 + k * GROUP);
}

template <typename Y>
static __device__ void load_old(struct eight<Y> (&old)[2][2], const struct silu_tile<Y> &tile,
                                const struct lora_args &args, const int (&t)[2])
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const Y *from = tile.gate_up + (size_t)max_int(t[k], 0) * args.N + tile.n;
        const int n = t[k] < 0 ? 0 : args.width[0] - tile.n;
#pragma unroll
        for (int i = 0; i < 2; i++) load_eight(&old[i][k], from + args.offset[i], n, true);
    }
}

/* y of the two tokens, from gate_up and what is added to it. */
template <typename Y>
static __device__ void write_silu(const struct silu_tile<Y> &tile, int F, const float (&c)[2][4][4],
                                  const int (&t)[2])
{
    const int i = threadIdx.x % 4;
    const int first = tile.n + first_output<Y>(i), second = tile.n + second_output<Y>(i);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const auto pair = [&](int j) { return silu_pair<Y>(c[0][j] + 2 * k, c[1][j] + 2 * k); };
        bf16 *y = tile.y + (size_t)max_int(t[k], 0) * F;
        if (sizeof(Y) == 2 && t[k] >= 0 && first < F)
            *(uint4 *)(y + first) = make_uint4(pair(0), pair(1), pair(2), pair(3));
        if (sizeof(Y) == 4 && t[k] >= 0 && first < F)
            *(uint2 *)(y + first) = make_uint2(pair(0), pair(1));
        if (sizeof(Y) == 4 && t[k] >= 0 && second < F)
            *(uint2 *)(y + second) = make_uint2(pair(2), pair(3));
    }
    __syncwarp(); /* products take the whole warp */
}

/* B, of STEPS 16 of the rank at most, in registers: asked for before h and gate_up are waited for.
 * The next tokens' are on their way while these are worked on. All warps of the block call it together. */
template <typename Y, int STEPS>
static __device__ void silu_kept(const struct silu_tile<Y> &tile, const struct lora_args &args)
{
    __shared__ struct shared_h<2, STEPS, PARTS<Y>> shared;
    const int F = args.width[0], r0 = threadIdx.x % 4 * 4;
    const int R[2] = {tile.sides[0].f.R, tile.sides[1].f.R};
    const float scale[2] = {tile.sides[0].f.scale, tile.sides[1].f.scale};
    uint2 b[2][STEPS][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            load_quad<Y>(b[i][s], (const bf16 *)tile.sides[i].f.b, tile.n, F, R[i], s * 16 + r0);
    int some = token_of(tile.tokens, 0), t[2];
    struct eight<Y> old[2][2]; /* [side][token] */
    struct h_items<2, STEPS> h;
    const auto load = [&](int first) {
        if (first > 0 && first % WARP == 0) some = token_of(tile.tokens, first);
        two_tokens(t, some, first);
        const int of_h = max_int(__shfl_sync(~0u, some, first % WARP + h.index()), 0);
        h.load(tile.h + (size_t)of_h * args.h_token, args.h_slice, R);
        load_old(old, tile, args, t);
    };
    grid_wait();
    load(0);
#pragma unroll 1
    for (int first = 0; first < tile.tokens.n; first += SIXTEEN) {
        const int which = first / SIXTEEN % 2;
        float c[2][4][4];
        h.share(&shared, which, scale);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) set_quad(c[i], old[i]);
        const int here[2] = {t[0], t[1]};
        if (first + SIXTEEN < tile.tokens.n) load(first + SIXTEEN);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                struct h_rows<PARTS<Y>> x;
                take_rows(&x, shared, which, i, s);
                add_quad(c[i], x, b[i][s]);
            }
        write_silu(tile, F, c, here);
    }
}

/* Any rank and type: B is read again for each sixteen tokens. */
template <typename Y>
static __device__ void silu_any(const struct silu_tile<Y> &tile, const struct lora_args &args)
{
    const int F = args.width[0], r0 = threadIdx.x % 4 * 4;
    int some = token_of(tile.tokens, 0), t[2];
    grid_wait();
#pragma unroll 1
    for (int first = 0; first < tile.tokens.n; first += SIXTEEN) {
        if (first > 0 && first % WARP == 0) some = token_of(tile.tokens, first);
        two_tokens(t, some, first);
        struct eight<Y> old[2][2];
        float c[2][4][4];
        load_old(old, tile, args, t);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            set_quad(c[i], old[i]);
            const struct side &side = tile.sides[i];
            const float *h = tile.h + i * args.h_slice;
#pragma unroll 1
            for (int r = r0; r - r0 < side.f.R; r += 16) {
                struct h_rows<PARTS<Y>> x;
                float4 rows[2];
#pragma unroll
                for (int k = 0; k < 2; k++)
                    rows[k] = load_h(h + (size_t)max_int(t[k], 0) * args.h_token, r, side.f.R,
                                     side.whole);
                split_rows(&x, rows[0], rows[1], side.f.scale);
                if (side.whole && side.f.dtype == DTYPE_BF16) {
                    uint2 b[4];
                    load_quad<Y>(b, (const bf16 *)side.f.b, tile.n, F, side.f.R, r);
                    add_quad(c[i], x, b);
                } else {
                    add_quad_any<Y>(c[i], x, side.f.b, side.f.dtype, tile.n, F, side.f.R, r,
                                    side.whole);
                }
            }
        }
        write_silu(tile, F, c, t);
    }
}

/* For a tile of 16 `sixteens` tokens, f of gate and up:
 *   v[i] = round(gate_up[t, i F + f] + scale[i] * dot(B[i][f, :], h[t, i, :]))    i = 0, 1, to Y
 *   y[t, f] = round(silu(v[0]) * v[1])
 * After the segments' tiles come those of the tokens without an adapter.
 *
 *   y [T, F]    gate_up [T, 2 F] Y    h [T, 2, max_rank]    F a multiple of 8
 *   grid (F / BLOCK_F, n_tiles + base tiles)    block SILU_BLOCK, a warp for QUAD of f
 *   STEPS of 16 of the rank whose B stays in registers; 0: none */
template <typename Y, int STEPS>
static __global__ void __launch_bounds__(SILU_BLOCK, STEPS < 2        ? 4
                                                     : sizeof(Y) == 2 ? 3
                                                                      : 2)
    lora_expand_silu_mul_kernel(bf16 *y, const Y *gate_up, const float *h,
                                const __grid_constant__ struct lora_args args, int T, int n_tiles,
                                int sixteens)
{
    grid_release();
    struct silu_tile<Y> tile = {
    };
    struct lora_tile found = {};
    tile.y = y;
    tile.gate_up = gate_up;
    tile.h = h;
    tile.n = blockIdx.x * BLOCK_F + threadIdx.x / WARP * QUAD;
    if ((int)blockIdx.y < n_tiles) {
        if (!lora_find_tile(&found, blockIdx.y, args, SIXTEEN * sixteens)) { /* the whole block */
            grid_wait();
            return;
        }
        tile.tokens.order = args.order + found.first;
        tile.tokens.n = found.n;
    } else {
        found.slot = -1;
        tile.tokens.slot = args.slot;
        tile.tokens.first = ((int)blockIdx.y - n_tiles) * SIXTEEN * sixteens;
        tile.tokens.n = min_int(SIXTEEN * sixteens, T - tile.tokens.first);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) tile.sides[i] = side_of(args, i, found.slot, STEPS);
    if constexpr (STEPS > 0)
        if (tile.sides[0].kept && tile.sides[1].kept) {
            silu_kept<Y, STEPS>(tile, args);
            return;
        }
    silu_any(tile, args);
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up, enum dtype gate_up_dtype,
                               const float *h, const struct lora_view *lora,
                               const struct lora_site *site, int layer, int T, enum dtype dtype)
{
    const int F = site->width[0];
    const bool has_delta = ((struct cuda_device *)dev)->delta.z;

    assert(site->n_slices == 2 && site->width[1] == F && site->N == 2 * F);
    if (!lora_is_fused(lora) || has_delta || dtype != DTYPE_BF16 || F % GROUP != 0 ||
        !is_aligned(y) || !is_aligned(gate_up)) {
        cuda_lora_expand(dev, gate_up, h, lora, site, layer, gate_up_dtype);
        cuda_silu_mul(dev, y, gate_up, gate_up_dtype, T, F, dtype);
        return;
    }
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda) return;
    cuda_join(cuda);

    /* Tiles of as many tokens as leave half a wave of blocks: B is read once for each. */
    enum { HALF_WAVE = 2 }; /* blocks for each multiprocessor */
    const struct lora_args args = lora_args(lora, site, layer);
    const int chunks = ceil_div(F, BLOCK_F);
    int sixteens = min_int(SIXTEENS_MAX, ceil_div(lora->max_segment, SIXTEEN));
    while (sixteens > 1 && lora_tiles(&args, SIXTEEN * sixteens) * chunks < HALF_WAVE * cuda->n_sms)
        sixteens /= 2;
    const int n_tiles = lora_tiles(&args, SIXTEEN * sixteens);
    const bool has_base = lora->n_tokens < T || lora->has_base_segments;
    const int n_base = has_base ? ceil_div(T, SIXTEEN * sixteens) : 0;
    const dim3 grid(chunks, n_tiles + n_base);
    assert(grid.y <= 65535);
    with_product(gate_up_dtype, dtype, [&](auto product, auto) {
        using Y = decltype(product);
        const auto kernel = lora->max_rank <= 16   ? lora_expand_silu_mul_kernel<Y, 1>
                            : lora->max_rank <= 32 ? lora_expand_silu_mul_kernel<Y, 2>
                            : lora->max_rank <= 64 ? lora_expand_silu_mul_kernel<Y, 4>
                                                   : lora_expand_silu_mul_kernel<Y, 0>;
        cuda_launch(cuda, "lora_expand_silu_mul", kernel, grid, SILU_BLOCK, 0, 1, (bf16 *)y,
                    (const Y *)gate_up, h, args, T, n_tiles, sixteens);
    });
}
