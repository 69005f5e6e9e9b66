/* Few tokens times many weights on sm_90a: bound by one read of w. In each block a warp brings rows of
 * w through shared memory with the copy engine, as far ahead as there is room for, and warpgroups
 * multiply them as they come. It begins while the kernels before it still run, since w depends on none
 * of them, so that the memory does not rest between two products.
 *
 * Where there are fewer tiles of rows than multiprocessors, blocks share out a tile's k, and the op
 * that reads y adds up what they have summed: a cluster of blocks that did so here could begin only
 * when the kernel before has left that many multiprocessors. How a row is summed depends on N and K
 * alone, not on the tokens beside it. */
#include "kernels/cuda/wgmma.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum {
    ROWS = 128, /* of w, a block: a warpgroup has 64 */
    CONSUMERS = ROWS / 64 * 128,
    STREAM_BLOCK = CONSUMERS + WARP,
    STREAM_TOKENS = 64,
    /* All buffers. More would keep small kernels, and LoRA's beside this one, out. */
    BUFFERS = 150 * 1024,
};

/* A stage of the ring of buffers: panels of ROWS rows of w, then of TOKENS of x. */
template <int TOKENS> struct ring {
    enum {
        W_BYTES = ROWS * PANEL_ROW,
        STAGE = W_BYTES + TOKENS * PANEL_ROW,
        STAGES = BUFFERS / STAGE,
        SHARED = STAGES * STAGE + 1024, /* to begin at a multiple of 1,024 */
    };
};

/* The copying thread: panels [begin, begin + n) of w from row n0 on, and of x. */
template <int TOKENS>
static __device__ void copy_panels(uint32_t stages, uint32_t full, uint32_t empty,
                                   const CUtensorMap *x, const CUtensorMap *w, int n0, int begin,
                                   int n, int x_bytes)
{
    using R = ring<TOKENS>;
    const int ahead = min_int(n, R::STAGES);

    for (int i = 0; i < ahead; i++) {
        barrier_expect(full + i * 8, R::W_BYTES + x_bytes);
        copy_box(stages + i * R::STAGE, w, n0, (begin + i) * PANEL, full + i * 8);
    }
    grid_wait(); /* now x can be read */
    for (int i = 0; i < ahead; i++)
        copy_box(stages + i * R::STAGE + R::W_BYTES, x, 0, (begin + i) * PANEL, full + i * 8);
    for (int i = ahead; i < n; i++) {
        const int s = i % R::STAGES;
        const uint32_t at = stages + s * R::STAGE;
        barrier_wait(empty + s * 8, i / R::STAGES - 1);
        barrier_expect(full + s * 8, R::W_BYTES + x_bytes);
        copy_box(at, w, n0, (begin + i) * PANEL, full + s * 8);
        copy_box(at + R::W_BYTES, x, 0, (begin + i) * PANEL, full + s * 8);
    }
}

/* y[t, n] = dot(w[n, :], x[t, :]) + bias[n] over the first share of k, parts[p, t, n] the same without
 * a bias over share p + 1, for t < T <= TOKENS
 *
 *   y [T, N]    parts [shares - 1, T, N]    bias [N] or NULL
 *   x [T, K], w [N, K]: maps with boxes of x_bytes / PANEL_ROW and ROWS rows    n_panels of k
 *   grid (N / ROWS, shares)    block STREAM_BLOCK    shared ring<TOKENS>::SHARED */
template <int TOKENS>
static __global__ void __launch_bounds__(STREAM_BLOCK)
    matmul_stream_kernel(float *y, float *parts, const __grid_constant__ CUtensorMap x,
                         const __grid_constant__ CUtensorMap w, const float *__restrict__ bias,
                         int T, int N, int n_panels, int x_bytes)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using R = ring<TOKENS>;
    extern __shared__ unsigned char unaligned[];
    __shared__ uint64_t barriers[2 * R::STAGES]; /* full, then empty */
    const uint32_t stages = (shared_address(unaligned) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(barriers), empty = full + R::STAGES * 8;
    const int n0 = blockIdx.x * ROWS, share = blockIdx.y, shares = gridDim.y;
    const int begin = n_panels * share / shares, n = n_panels * (share + 1) / shares - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < R::STAGES; s++) {
            barrier_make(full + s * 8, 1);
            barrier_make(empty + s * 8, CONSUMERS / 128);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS)
            copy_panels<TOKENS>(stages, full, empty, &x, &w, n0, begin, n, x_bytes);
        return;
    }

    float sum[TOKENS / 2] = {};
    for (int i = 0; i < n; i++) {
        const int s = i % R::STAGES;
        const uint32_t x_panel = stages + s * R::STAGE + R::W_BYTES;
        const uint32_t w_panel = stages + s * R::STAGE + threadIdx.x / 128 * (64 * PANEL_ROW);
        barrier_wait(full + s * 8, i / R::STAGES);
        if (i == 0) grid_release(); /* not before x: what is launched sooner holds that up */
        products_begin();
#pragma unroll
        for (int k = 0; k < PANEL / 16; k++)
            product_rows(sum, operand(w_panel + k * 32, 16), operand(x_panel + k * 32, 16));
        products_commit();
        products_wait<0>();
        if (threadIdx.x % 128 == 0) barrier_arrive(empty + s * 8);
    }
    products_land(sum);
    grid_wait(); /* y and parts may have been read until now */

    const int lane = threadIdx.x % WARP, row = n0 + threadIdx.x / WARP * 16 + lane / 4;
    if (share > 0) y = parts + (size_t)(share - 1) * T * N;
    if (share > 0) bias = NULL;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + half * 8;
        if (r >= N) continue;
        const float b = bias ? bias[r] : 0.0f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int t = j * 8 + lane % 4 * 2 + e;
                if (t < T) y[(size_t)t * N + r] = sum[4 * j + 2 * half + e] + b;
            }
    }
#endif
}

/* ---- launchers ---------------------------------------------------------------------------- */

/* Blocks for each tile of rows: as many, of those that a sum may have, as find a multiprocessor. */
static int shares_of(const struct cuda_device *cuda, int tiles, int n_panels)
{
    enum { PANELS_MIN = 4 }; /* of a block */
    int shares = 1;
    while (2 * shares <= PRODUCT_PARTS + 1 && 2 * shares * tiles <= cuda->n_sms &&
           n_panels >= 2 * shares * PANELS_MIN)
        shares *= 2;
    return shares;
}

template <int TOKENS>
static void launch(struct cuda_device *cuda, float *y, float *parts, const bf16 *x,
                   const struct matrix *w, const float *bias, int T, int shares)
{
    const int n_panels = ceil_div(w->K, PANEL), x_rows = ceil_div(T, 8) * 8;
    const CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    const CUtensorMap x_map = map_panels(cuda, x, T, w->K, x_rows, promotion, "matmul");
    const CUtensorMap w_map =
        map_panels(cuda, (const bf16 *)w->data, w->N, w->K, ROWS, promotion, "matmul");

    cuda_allow_shared(cuda, matmul_stream_kernel<TOKENS>, ring<TOKENS>::SHARED, "matmul");
    cuda_launch(cuda, "matmul", matmul_stream_kernel<TOKENS>, dim3(ceil_div(w->N, ROWS), shares),
                STREAM_BLOCK, ring<TOKENS>::SHARED, 1, y, parts, x_map, w_map, bias, T, w->N,
                n_panels, x_rows * PANEL_ROW);
}

bool matmul_stream(struct cuda_device *cuda, float *y, const bf16 *x, const struct matrix *w,
                   const float *bias, int T)
{
    enum { WAVES_MAX = 4 }; /* what a block brings in ahead is worth less in later ones */
    const int tiles = ceil_div(w->N, ROWS);
    struct addend addend = {};

    if (!cuda->encode_tensor_map || cuda->is_lent || T > STREAM_TOKENS || w->K % GROUP != 0 ||
        !is_aligned(x) || !is_aligned(w->data) || tiles > WAVES_MAX * cuda->n_sms)
        return false;
    const int shares = shares_of(cuda, tiles, ceil_div(w->K, PANEL));
    addend.n_parts = shares - 1;
    addend.part = (size_t)T * w->N;
    if (shares > 1) {
        const size_t bytes = (size_t)PRODUCT_PARTS * STREAM_TOKENS * w->N * sizeof(float);
        float *parts = (float *)cuda_grow(cuda, &cuda->parts, bytes, "matmul");
        if (!parts) return true;
        addend.parts = parts;
    }
    if (T <= 16)
        launch<16>(cuda, y, (float *)addend.parts, x, w, bias, T, shares);
    else
        launch<STREAM_TOKENS>(cuda, y, (float *)addend.parts, x, w, bias, T, shares);
    if (shares > 1) cuda_defer(cuda, y, DTYPE_F32, T, w->N, &addend);
    return true;
}
