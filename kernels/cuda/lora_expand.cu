/* The second half of LoRA: the rank to y, added with one rounding. Bound by reading B once for
 * each adapter in use and by y, read and written (from L2 at decode). */
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

/* Outputs are cut into chunks of `size` within each slice. Slice and first output (in the slice)
 * of chunk number `index`; false: there is none. */
static __device__ bool find_chunk(int *slice, int *first, int index, const struct lora_args &args,
                                  int size)
{
    for (int i = 0; i < args.n_slices; i++) {
        const int chunks = ceil_div(args.width[i], size);
        if (index < chunks) {
            *slice = i;
            *first = index * size;
            return true;
        }
        index -= chunks;
    }
    return false;
}

static int count_chunks(const struct lora_args *args, int size)
{
    int n = 0;
    for (int i = 0; i < args->n_slices; i++) n += ceil_div(args->width[i], size);
    return n;
}

enum { ROW_BLOCK = 128, ROW_WARPS = ROW_BLOCK / WARP };

/* Lanes that share a row of B: 8 of its elements each. */
static inline __host__ __device__ int lanes_a_row(int R)
{
    int lanes = 1;
    while (lanes < WARP && lanes * GROUP < R) lanes *= 2;
    return lanes;
}

/* sum[j] += this lane's part of dot(B[n + j, :], h), rows clamped to the last one */
template <bool WHOLE, typename B>
static __device__ void expand_rows(float (&sum)[GROUP], const float *h, const B *b, int n, int N,
                                   int R, int r0, int lanes)
{
    for (int r = r0; r < R; r += lanes * GROUP) {
        float x[GROUP];
#pragma unroll
        for (int e = 0; e < GROUP; e++) x[e] = r + e < R ? h[r + e] : 0.0f;
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            float w[GROUP];
            load_some(w, b + (size_t)min_int(n + j, N - 1) * R + r, R - r, WHOLE);
#pragma unroll
            for (int e = 0; e < GROUP; e++) sum[j] += w[e] * x[e];
        }
    }
}

/* Tokens one by one, for any types and sizes:
 *   y[t, offset[i] + n] = round(y + scale * dot(B[n, :], h[t, i, :]))
 *
 *   y [T, N] X, in and out    h [T, n_slices, max_rank]
 *   grid (chunks, n_tokens)    block ROW_BLOCK: lanes_a_row(R) lanes for eight outputs */
template <typename X>
static __global__ void __launch_bounds__(ROW_BLOCK)
    lora_expand_row_kernel(X *__restrict__ y, const float *__restrict__ h,
                           const __grid_constant__ struct lora_args args, int chunk)
{
    const int t = args.order[blockIdx.y];
    int slice, first;
    if (!find_chunk(&slice, &first, blockIdx.x, args, chunk)) return;
    const struct lora_factors f = *lora_factors_of(args, args.slot[t], slice);
    if (!f.a) return;

    const int lanes = lanes_a_row(f.R), lane = threadIdx.x % WARP, in_row = lane % lanes;
    const int outputs = WARP / lanes * GROUP; /* of a warp */
    const int N = args.width[slice], end = min_int(N, first + chunk);
    const float *h_row = h + lora_h_row(args, t, slice);
    const bool whole = f.R % GROUP == 0 && is_aligned_on_device(f.b);
    X *y_row = y + (size_t)t * args.N + args.offset[slice];
    const bool y_whole = is_aligned_on_device(y_row) && args.N % GROUP == 0;

    for (int n0 = first + threadIdx.x / WARP * outputs; n0 < end; n0 += ROW_WARPS * outputs) {
        const int n = n0 + lane / lanes * GROUP;
        float sum[GROUP] = {}, old[GROUP];
        if (in_row == 0 && n < end) load_some(old, y_row + n, end - n, y_whole && n + GROUP <= end);
        if (f.dtype == DTYPE_BF16 && whole)
            expand_rows<true>(sum, h_row, (const bf16 *)f.b, n, N, f.R, in_row * GROUP, lanes);
        else if (f.dtype == DTYPE_BF16)
            expand_rows<false>(sum, h_row, (const bf16 *)f.b, n, N, f.R, in_row * GROUP, lanes);
        else if (f.dtype == DTYPE_F16)
            expand_rows<false>(sum, h_row, (const f16 *)f.b, n, N, f.R, in_row * GROUP, lanes);
        else if (whole)
            expand_rows<true>(sum, h_row, (const float *)f.b, n, N, f.R, in_row * GROUP, lanes);
        else
            expand_rows<false>(sum, h_row, (const float *)f.b, n, N, f.R, in_row * GROUP, lanes);
        for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
            for (int j = 0; j < GROUP; j++) sum[j] += __shfl_xor_sync(~0u, sum[j], step);
        if (in_row != 0 || n >= end) continue;
#pragma unroll
        for (int j = 0; j < GROUP; j++) old[j] += f.scale * sum[j];
        store_some(y_row + n, old, end - n, y_whole && n + GROUP <= end);
    }
}

enum {
    TILE_BLOCK = 128,
    TILE_WARPS = TILE_BLOCK / WARP,
    WARP_N = 64,
    TILE_N = TILE_WARPS * WARP_N
};

/* Of 64 rows of B from `b` on, this lane's four elements from r on of rows 8 (lane / 4) + j:
 * operands a of four products of 16 x 16. Zeros past R and N. PARTS of bf16 each. */
template <int PARTS, bool WHOLE>
static __device__ void load_b(uint32_t (&a)[PARTS][4][4], const struct lora_factors &f, int n,
                              int N, int r)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const size_t at = (size_t)min_int(n + j, N - 1) * f.R + r;
        if (WHOLE) { /* bf16, R a multiple of 4 */
            const uint2 bits =
                r < f.R ? *(const uint2 *)((const bf16 *)f.b + at) : make_uint2(0, 0);
            a[0][j / 2][j % 2] = bits.x;
            a[0][j / 2][j % 2 + 2] = bits.y;
        } else {
            float w[4];
            uint32_t part[PARTS];
            load_factor<4>(w, f.b, f.dtype, at, f.R - r);
            split_pair<PARTS>(part, w[0], w[1]);
#pragma unroll
            for (int p = 0; p < PARTS; p++) a[p][j / 2][j % 2] = part[p];
            split_pair<PARTS>(part, w[2], w[3]);
#pragma unroll
            for (int p = 0; p < PARTS; p++) a[p][j / 2][j % 2 + 2] = part[p];
        }
    }
}

/* Of a row of h, four elements from r on as two parts of bf16: 16 bits. Zeros past R. */
static __device__ void load_h(uint32_t (&b)[2][2], const float *h, int r, int R)
{
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = r + e < R ? h[r + e] : 0.0f;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        uint32_t part[2];
        split_pair<2>(part, x[2 * pair], x[2 * pair + 1]);
        b[0][pair] = part[0], b[1][pair] = part[1];
    }
}

/* Add this lane's outputs: sum[i][0], sum[i][2] are outputs n + 2 i and the next of one token,
 * sum[i][1] and sum[i][3] those of the next token. */
static __device__ void add_outputs(bf16 *y, size_t at, const float (&sum)[4][4], int second,
                                   float scale, int n, bool whole)
{
    float old[GROUP];
    load_some(old, y + at, n, whole);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        old[2 * i] += scale * (second ? sum[i][1] : sum[i][0]);
        old[2 * i + 1] += scale * (second ? sum[i][3] : sum[i][2]);
    }
    store_some(y + at, old, n, whole);
}

/* The same for segments of several tokens on tensor cores: a block does TILE_N outputs of a slice
 * for a tile of 8 `eights` tokens of one adapter, eight at a time. Rows of the products are
 * outputs, eight neighbours to a lane so that it reads and writes 16 bytes of y.
 *
 *   y [T, N], in and out    h [T, n_slices, max_rank]
 *   grid (chunks, tiles)    block TILE_BLOCK, a warp for WARP_N outputs
 *   STEPS of 16 of the rank whose B stays in registers; 0: any rank and type, B is read again */
template <int STEPS>
static __global__ void __launch_bounds__(TILE_BLOCK)
    lora_expand_tile_kernel(bf16 *__restrict__ y, const float *__restrict__ h,
                            const __grid_constant__ struct lora_args args, int eights)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int slice, first;
    struct lora_tile tokens;
    if (!lora_find_tile(&tokens, blockIdx.y, args, 8 * eights)) return;
    if (!find_chunk(&slice, &first, blockIdx.x, args, TILE_N)) return;
    const struct lora_factors f = *lora_factors_of(args, tokens.slot, slice);
    const int N = args.width[slice];
    if (!f.a || first + warp * WARP_N >= N) return; /* no barrier follows */

    const int n = first + warp * WARP_N + lane / 4 * GROUP; /* of this lane's eight outputs */
    const int n_left = N - n, r0 = lane % 4 * 4;
    const bool whole_b = f.dtype == DTYPE_BF16 && f.R % 4 == 0 && is_aligned_on_device(f.b);
    const bool in_registers = STEPS > 0 && whole_b && f.R <= STEPS * 16;
    const bool whole_y = args.N % GROUP == 0 && args.offset[slice] % GROUP == 0 &&
                         n_left >= GROUP && is_aligned_on_device(y);
    uint32_t b_kept[STEPS > 0 ? STEPS : 1][1][4][4];
    if (in_registers)
#pragma unroll
        for (int s = 0; s < STEPS; s++) load_b<1, true>(b_kept[s], f, n, N, s * 16 + r0);

    for (int i = 0; i < tokens.n; i += 8) {
        const int last = tokens.n - 1;
        const int t = args.order[tokens.first + min_int(i + lane / 4, last)];
        const float *h_row = h + lora_h_row(args, t, slice);
        float sum[4][4] = {};
        if (in_registers) {
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                uint32_t x[2][2];
                load_h(x, h_row, s * 16 + r0, f.R);
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    mma_bf16(sum[m], b_kept[s][0][m], x[0][0], x[0][1]);
                    mma_bf16(sum[m], b_kept[s][0][m], x[1][0], x[1][1]);
                }
            }
        } else {
            for (int r = r0; r - r0 < f.R; r += 16) {
                uint32_t b[2][4][4], x[2][2];
                load_h(x, h_row, r, f.R);
                if (whole_b) {
                    uint32_t only[1][4][4];
                    load_b<1, true>(only, f, n, N, r);
                    memcpy(b[0], only[0], sizeof b[0]);
                } else {
                    load_b<2, false>(b, f, n, N, r);
                }
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    mma_bf16(sum[m], b[0][m], x[0][0], x[0][1]);
                    mma_bf16(sum[m], b[0][m], x[1][0], x[1][1]);
                    if (!whole_b) mma_bf16(sum[m], b[1][m], x[0][0], x[0][1]);
                }
            }
        }
#pragma unroll
        for (int second = 0; second < 2; second++) {
            const int index = i + lane % 4 * 2 + second;
            if (index > last || n_left <= 0) continue;
            const size_t at =
                (size_t)args.order[tokens.first + index] * args.N + args.offset[slice] + n;
            add_outputs(y, at, sum, second, f.scale, n_left, whole_y);
        }
        __syncwarp(); /* products take the whole warp */
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

template <typename X>
static void expand_by_row(struct cuda_device *cuda, X *y, const float *h,
                          const struct lora_view *lora, const struct lora_args *args)
{
    const int chunk = ROW_WARPS * (WARP / lanes_a_row(args->max_rank)) * GROUP;
    const dim3 grid(count_chunks(args, chunk), lora->n_tokens);
    lora_expand_row_kernel<<<grid, ROW_BLOCK, 0, cuda->stream>>>(y, h, *args, chunk);
}

/* Longer tiles where segments are long: B is read once for each. */
static void expand_by_tile(struct cuda_device *cuda, bf16 *y, const float *h,
                           const struct lora_view *lora, const struct lora_args *args)
{
    const int eights = lora->max_segment < 128 ? 1 : 4;
    const int tiles = lora_tiles(lora, 8 * eights);
    const dim3 grid(count_chunks(args, TILE_N), tiles);
    assert(tiles <= 65535);
    if (args->max_rank <= 16)
        lora_expand_tile_kernel<1><<<grid, TILE_BLOCK, 0, cuda->stream>>>(y, h, *args, eights);
    else if (args->max_rank <= 32)
        lora_expand_tile_kernel<2><<<grid, TILE_BLOCK, 0, cuda->stream>>>(y, h, *args, eights);
    else if (args->max_rank <= 64)
        lora_expand_tile_kernel<4><<<grid, TILE_BLOCK, 0, cuda->stream>>>(y, h, *args, eights);
    else
        lora_expand_tile_kernel<0><<<grid, TILE_BLOCK, 0, cuda->stream>>>(y, h, *args, eights);
}

void cuda_lora_expand(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || lora->n_segments == 0 || lora->n_tokens == 0) return;
    assert(lora->max_rank > 0 && lora->max_rank <= LORA_RANK_MAX && lora->n_tokens <= 65535);
    assert(site->n_slices > 0 && site->n_slices <= LORA_SLICES_MAX);

    const struct lora_args args = lora_args(lora, site, layer);
    if (dtype == DTYPE_BF16 && lora->max_segment > 1)
        expand_by_tile(cuda, (bf16 *)y, h, lora, &args);
    else
        with_activation(dtype, [&](auto type) {
            using X = decltype(type);
            expand_by_row(cuda, (X *)y, h, lora, &args);
        });
    cuda_check(cuda, cudaGetLastError(), "lora_expand");
}
