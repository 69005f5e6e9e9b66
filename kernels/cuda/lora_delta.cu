/* LoRA beside the base product, on Hopper and newer: at few tokens what adapters add to y is computed
 * while the product of the same x runs, into z, and the op that reads y next adds it. In a recording,
 * where kernels can run beside each other, shrink and expand cost almost no time then, and y is not read
 * and written once more; elsewhere it is done the same way, so that both give the same bits. Only where
 * x is bf16: f32 is not rounded to what tensor cores take. Bound by B and z, both small next to the
 * weights that the product reads. */
#include "kernels/cuda/lora_tile.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum {
    DELTA_BLOCK = 128,
    WARP_N = 64, /* outputs of a warp */
    BLOCK_N = DELTA_BLOCK / WARP * WARP_N,
    EIGHT = 8,      /* tokens of a product */
    EIGHTS_MAX = 2, /* of a block: more would be done one after another */
};

/* z[t, offset[i] + n] = scale * dot(B[n, :], h[t, i, :]), 0 where the adapter has no factors of
 * linear i, for tiles of 8 `eights` tokens of one adapter.
 *
 *   z [T, N]    h [T, n_slices, max_rank]
 *   grid (chunks of BLOCK_N outputs, tiles)    block DELTA_BLOCK
 *   STEPS of 16 of the rank whose B stays in registers; 0: none
 * Nothing before Hopper, where nobody launches it. */
template <int STEPS>
static __global__ void __launch_bounds__(DELTA_BLOCK, STEPS == 0 ? 4 : 3)
    lora_delta_kernel(float *z, const float *h, const __grid_constant__ struct lora_args args,
                      int eights)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    grid_release();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r0 = lane % 4 * 4;
    struct lora_chunk chunk;
    struct lora_tile tile;
    struct lora_factors f = {};
    const bool found = lora_find_tile(&tile, blockIdx.y, args, EIGHT * eights) &&
                       lora_find_chunk(&chunk, blockIdx.x, args, BLOCK_N);
    if (!found) { /* the whole block */
        grid_wait();
        return;
    }
    f = *lora_factors_of(args, tile.slot, chunk.slice);
    const int N = args.width[chunk.slice], n = chunk.first + warp * WARP_N + lane / 4 * GROUP;
    const bool whole_b = f.R % 4 == 0 && is_aligned_on_device(f.b);
    const bool kept = STEPS > 0 && whole_b && f.dtype == DTYPE_BF16 && f.R <= STEPS * 16;
    const bool whole_h = args.max_rank % 4 == 0 && f.R % 4 == 0;
    const bool whole_z = args.N % 4 == 0 && args.offset[chunk.slice] % 4 == 0 && n + GROUP <= N;
    if (!f.a) f.R = 0;

    uint32_t b[STEPS > 0 ? STEPS : 1][4][4];
    if (kept)
#pragma unroll
        for (int s = 0; s < STEPS; s++) load_b(b[s], (const bf16 *)f.b, n, N, f.R, s * 16 + r0);
    grid_wait();

    const int32_t *order = args.order + tile.first;
    z += args.offset[chunk.slice] + n;
    h += (size_t)chunk.slice * args.h_slice;
#pragma unroll 1
    for (int i = 0; i < tile.n; i += EIGHT) {
        const float *row = h + (size_t)order[min_int(i + lane / 4, tile.n - 1)] * args.h_token;
        float sum[4][4] = {};
        uint32_t x[H_PARTS][2];
        if (kept) {
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                split_h(x, load_h(row, s * 16 + r0, f.R, whole_h));
                multiply(sum, b[s], x);
            }
        } else {
#pragma unroll 1
            for (int r = r0; r - r0 < f.R; r += 16) {
                split_h(x, load_h(row, r, f.R, whole_h));
                if (whole_b && f.dtype == DTYPE_BF16) {
                    uint32_t rows[4][4];
                    load_b(rows, (const bf16 *)f.b, n, N, f.R, r);
                    multiply(sum, rows, x);
                    continue;
                }
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    uint32_t rows[H_PARTS][4];
                    load_b_any(rows, f.b, f.dtype, n + 2 * m, N, f.R, r, whole_b);
#pragma unroll
                    for (int k = 0; k < H_PARTS; k++) /* what is left out has no bits of f32 */
#pragma unroll
                        for (int p = 0; p < H_PARTS - k; p++)
                            mma_bf16(sum[m], rows[k], x[p][0], x[p][1]);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int j = i + lane % 4 * 2 + c;
            if (j >= tile.n || n >= N) continue;
            float value[GROUP];
#pragma unroll
            for (int m = 0; m < 4; m++) {
                value[2 * m] = f.scale * sum[m][c];
                value[2 * m + 1] = f.scale * sum[m][c + 2];
            }
            store_some(z + (size_t)order[j] * args.N, value, N - n, whole_z);
        }
        __syncwarp(); /* products take the whole warp */
    }
#endif
}

/* ---- launchers ---------------------------------------------------------------------------- */

bool lora_begins_delta(struct cuda_device *cuda, const float *h, const struct lora_view *lora,
                       const struct lora_site *site, int layer, enum dtype dtype)
{
    const bool is_in_layer = layer < lora->L - 1; /* the head's product has been before */

    memset(&cuda->delta, 0, sizeof cuda->delta);
    if (!cuda->is_hopper || cuda->is_lent || !lora_expands_beside(lora) || !is_in_layer ||
        lora->expands_more || lora->n_rows < 1 || lora->n_rows > DELTA_TOKENS ||
        dtype != DTYPE_BF16)
        return false;
    const size_t bytes = (size_t)DELTA_TOKENS * site->N * sizeof(float);
    float *z = (float *)cuda_grow(cuda, &cuda->deltas, bytes, "lora_shrink");
    if (!z) return false;
    cuda->delta = {z, lora->slot, h, site->linear, layer, lora->n_rows, site->N, false};
    return true;
}

void lora_delta(struct cuda_device *cuda, float *z, const float *h, const struct lora_args *args)
{
    const int chunks = lora_chunks(args, BLOCK_N);
    const int eights = min_int(EIGHTS_MAX, ceil_div(args->max_segment, EIGHT));
    const dim3 grid(chunks, lora_tiles(args, EIGHT * eights));
    const auto kernel = args->max_rank <= 16   ? lora_delta_kernel<1>
                        : args->max_rank <= 32 ? lora_delta_kernel<2>
                        : args->max_rank <= 64 ? lora_delta_kernel<4>
                                               : lora_delta_kernel<0>;
    cuda_launch(cuda, "lora_delta", kernel, grid, DELTA_BLOCK, 0, 1, z, h, *args, eights);
}

static bool is_of(const struct delta *delta, const float *h, const struct lora_site *site,
                  int layer)
{
    return delta->z && delta->h == h && delta->linear == site->linear && delta->layer == layer;
}

bool lora_is_added(struct cuda_device *cuda, const float *h, const struct lora_site *site,
                   int layer)
{
    if (!is_of(&cuda->delta, h, site, layer) || !cuda->delta.is_added) return false;
    cuda->delta.z = NULL;
    return true;
}

bool lora_defers(struct cuda_device *cuda, void *y, const float *h, const struct lora_site *site,
                 int layer, enum dtype y_dtype)
{
    const struct delta delta = cuda->delta;
    struct addend addend = {};

    if (!is_of(&delta, h, site, layer)) return false;
    addend.z = delta.z;
    addend.slot = delta.slot;
    cuda_defer(cuda, y, y_dtype, delta.T, delta.N, &addend);
    cuda->delta.z = NULL;
    return true;
}
