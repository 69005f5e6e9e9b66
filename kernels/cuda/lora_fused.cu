/* The second half of LoRA inside the kernel that reads its result: silu_mul after gate_up. gate
 * and up are read once, have what the adapters add to them added and rounded in registers, and go
 * on from there: no launch and no round trip of their own. Bound by B and by gate_up, at decode
 * by latency. */
#include "kernels/cuda/lora_tile.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { SILU_BLOCK = 128, WARP_F = 64, BLOCK_F = SILU_BLOCK / WARP * WARP_F, EIGHT = 8 };

/* Tokens that a block works on: of a segment, or those without an adapter among the step's. */
struct silu_tokens {
    const int32_t *order; /* of the segment, NULL: tokens first, first + 1, ... */
    const int32_t *slot;
    int first, n;
};

/* Token number i, -1: none. */
static __device__ int token_at(const struct silu_tokens &tokens, int i)
{
    if (i >= tokens.n) return -1;
    if (tokens.order) return tokens.order[i];
    return tokens.slot[tokens.first + i] < 0 ? tokens.first + i : -1;
}

/* Eight outputs of gate or up, this lane's, and what adds to them. */
struct side {
    struct lora_factors f; /* a NULL: nothing */
    const float *h;        /* the slice of token 0 */
    const bf16 *y;         /* output n of token 0 */
    int n, N;
    bool whole, kept; /* B is aligned; all of it is in registers */
};

static __device__ void side_begin(struct side *side, const bf16 *y, const float *h,
                                  const struct lora_args &args, int slice, int n, int slot,
                                  int steps)
{
    const struct lora_factors none = {};
    side->n = n;
    side->N = args.width[slice];
    side->f = slot < 0 ? none : *lora_factors_of(args, slot, slice);
    if (!side->f.a) side->f = none;
    side->h = h + (size_t)slice * args.h_slice;
    side->y = y + args.offset[slice] + n;
    side->whole = side->f.R % 4 == 0 && is_aligned_on_device(side->f.b);
    side->kept = side->whole && side->f.dtype == DTYPE_BF16 && side->f.R <= steps * 16;
}

/* B of the side on its way: to registers, or to L2. */
template <int STEPS>
static __device__ void ask_for_b(uint32_t (&b)[STEPS > 0 ? STEPS : 1][4][4],
                                 const struct side &side)
{
    if (side.kept) {
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            load_b(b[s], (const bf16 *)side.f.b, side.n, side.N, side.f.R,
                   s * 16 + threadIdx.x % 4 * 4);
        return;
    }
    const size_t row = (size_t)side.f.R * (side.f.dtype == DTYPE_F32 ? 4 : 2);
    const char *rows = (const char *)side.f.b + side.n * row;
    const int bytes = side.n < side.N ? (int)(min_int(GROUP, side.N - side.n) * row) : 0;
    for (int at = threadIdx.x % 4 * 128; at < bytes; at += 512)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(rows + at));
}

/* sum += B of this lane's outputs times the row of h */
template <int STEPS>
static __device__ void add_product(float (&sum)[4][4], const struct side &side,
                                   const uint32_t (&b)[STEPS > 0 ? STEPS : 1][4][4], const float *h,
                                   bool whole_h)
{
    const int r0 = threadIdx.x % 4 * 4, R = side.f.R;
    uint32_t x[2][2];
    if (side.kept) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            split_h(x, load_h(h, s * 16 + r0, R, whole_h));
            multiply(sum, b[s], x);
        }
    } else if (side.whole && side.f.dtype == DTYPE_BF16) {
#pragma unroll 1
        for (int r = r0; r - r0 < R; r += 16) {
            uint32_t rows[4][4];
            load_b(rows, (const bf16 *)side.f.b, side.n, side.N, R, r);
            split_h(x, load_h(h, r, R, whole_h));
            multiply(sum, rows, x);
        }
    } else {
#pragma unroll 1
        for (int r = r0; r - r0 < R; r += 16) {
            split_h(x, load_h(h, r, R, whole_h));
#pragma unroll
            for (int m = 0; m < 4; m++) {
                uint32_t rows[2][4];
                load_b_any(rows, side.f.b, side.f.dtype, side.n + 2 * m, side.N, R, r, side.whole);
                mma_bf16(sum[m], rows[0], x[0][0], x[0][1]);
                mma_bf16(sum[m], rows[0], x[1][0], x[1][1]);
                mma_bf16(sum[m], rows[1], x[0][0], x[0][1]);
            }
        }
    }
}

/* value = round(y + scale * sum) of the side's outputs and column c of the products */
static __device__ void add_to_old(float (&value)[GROUP], const uint4 &old, const struct side &side,
                                  const float (&sum)[4][4], int c)
{
    const uint32_t pairs[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        value[2 * j] = rounded<bf16>(bf16_low(pairs[j]) + side.f.scale * sum[j][c]);
        value[2 * j + 1] = rounded<bf16>(bf16_high(pairs[j]) + side.f.scale * sum[j][c + 2]);
    }
}

/* For a tile of 8 `eights` tokens, f of gate and up:
 *   v[i] = round(gate_up[t, i F + f] + scale[i] * dot(B[i][f, :], h[t, i, :]))    i = 0, 1
 *   y[t, f] = round(silu(v[0]) * v[1])
 * After the segments' tiles come those of the tokens without an adapter.
 *
 *   y [T, F]    gate_up [T, 2 F]    h [T, 2, max_rank]    F a multiple of 8
 *   grid (F / BLOCK_F, n_tiles + base tiles)    block SILU_BLOCK, a warp for WARP_F of f
 *   STEPS of 16 of the rank whose B stays in registers; 0: none */
template <int STEPS>
static __global__ void __launch_bounds__(SILU_BLOCK, 3)
    lora_expand_silu_mul_kernel(bf16 *y, const bf16 *gate_up, const float *h,
                                const __grid_constant__ struct lora_args args, int T, int n_tiles,
                                int eights)
{
    grid_release();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, F = args.width[0];
    const int f = blockIdx.x * BLOCK_F + warp * WARP_F + lane / 4 * GROUP;
    struct silu_tokens tokens = {};
    struct lora_tile tile = {};
    if ((int)blockIdx.y < n_tiles) {
        if (!lora_find_tile(&tile, blockIdx.y, args, EIGHT * eights)) { /* the whole block */
            grid_wait();
            return;
        }
        tokens.order = args.order + tile.first;
        tokens.n = tile.n;
    } else {
        tile.slot = -1;
        tokens.slot = args.slot;
        tokens.first = ((int)blockIdx.y - n_tiles) * EIGHT * eights;
        tokens.n = min_int(EIGHT * eights, T - tokens.first);
    }

    struct side sides[2];
    uint32_t b[2][STEPS > 0 ? STEPS : 1][4][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        side_begin(&sides[i], gate_up, h, args, i, f, tile.slot, STEPS);
        ask_for_b<STEPS>(b[i], sides[i]);
    }
    const bool whole_h = args.max_rank % 4 == 0;
    const int h_pitch = args.h_token;
    grid_wait();

    for (int first = 0; first < tokens.n; first += EIGHT) {
        int t[2];
        uint4 old[2][2]; /* [side][c] */
#pragma unroll
        for (int c = 0; c < 2; c++) {
            t[c] = f < F ? token_at(tokens, first + lane % 4 * 2 + c) : -1;
#pragma unroll
            for (int i = 0; i < 2; i++)
                old[i][c] = t[c] < 0 ? make_uint4(0, 0, 0, 0)
                                     : *(const uint4 *)(sides[i].y + (size_t)t[c] * args.N);
        }
        float sum[2][4][4] = {};
        if (tokens.order) {
            const int row = tokens.order[min_int(first + lane / 4, tokens.n - 1)];
#pragma unroll
            for (int i = 0; i < 2; i++)
                add_product<STEPS>(sum[i], sides[i], b[i], sides[i].h + (size_t)row * h_pitch,
                                   whole_h && sides[i].f.R % 4 == 0);
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            if (t[c] < 0) continue;
            float gate[GROUP], up[GROUP];
            add_to_old(gate, old[0][c], sides[0], sum[0], c);
            add_to_old(up, old[1][c], sides[1], sum[1], c);
#pragma unroll
            for (int e = 0; e < GROUP; e++) gate[e] = silu<bf16>(gate[e]) * up[e];
            store_group(y + (size_t)t[c] * F + f, gate);
        }
        __syncwarp(); /* products take the whole warp */
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up, const float *h,
                               const struct lora_view *lora, const struct lora_site *site,
                               int layer, int T, enum dtype dtype)
{
    const int F = site->width[0];
    const bool has_delta = ((struct cuda_device *)dev)->deferred.addend.z;

    assert(site->n_slices == 2 && site->width[1] == F && site->N == 2 * F);
    if (!lora_is_fused(lora) || has_delta || dtype != DTYPE_BF16 || F % GROUP != 0 ||
        !is_aligned(y) || !is_aligned(gate_up)) {
        cuda_lora_expand(dev, gate_up, h, lora, site, layer, dtype);
        cuda_silu_mul(dev, y, gate_up, T, F, dtype);
        return;
    }
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda) return;
    cuda_join(cuda);

    /* Tiles of as many tokens as leave half a wave of blocks: B is read once for each. */
    enum { HALF_WAVE = 2 }; /* blocks for each multiprocessor */
    const struct lora_args args = lora_args(lora, site, layer);
    const int chunks = ceil_div(F, BLOCK_F);
    int eights = min_int(16, ceil_div(lora->max_segment, EIGHT));
    while (eights > 1 && lora_tiles(&args, EIGHT * eights) * chunks < HALF_WAVE * cuda->n_sms)
        eights /= 2;
    const int n_tiles = lora_tiles(&args, EIGHT * eights);
    const bool has_base = lora->n_tokens < T || lora->has_base_segments;
    const int n_base = has_base ? ceil_div(T, EIGHT * eights) : 0;
    const dim3 grid(chunks, n_tiles + n_base);
    assert(grid.y <= 65535);
    const auto kernel = lora->max_rank <= 16   ? lora_expand_silu_mul_kernel<1>
                        : lora->max_rank <= 32 ? lora_expand_silu_mul_kernel<2>
                                               : lora_expand_silu_mul_kernel<0>;
    cuda_launch(cuda, "lora_expand_silu_mul", kernel, grid, SILU_BLOCK, 0, 1, (bf16 *)y,
                (const bf16 *)gate_up, h, args, T, n_tiles, eights);
}
