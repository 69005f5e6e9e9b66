/* Attention of rows of several tokens on sm_90a, heads of 64 and 128, no window: what
 * attention_prefill.cu does, with the copies made by a warp of their own and the products by
 * warpgroups that read both operands from shared memory. A warpgroup begins the scores of the next
 * positions before the weights of the last ones are multiplied with their values, and while one
 * does the softmax of its scores, another one has the tensor cores. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/wgmma.cuh"

#include <math.h>

/* ---- kernels ------------------------------------------------------------------------------ */

enum {
    POSITIONS = 128, /* of a tile */
    PAGES = POSITIONS / KV_BLOCK,
    STAGES = 2,          /* tiles of keys, and of values, in shared memory */
    GROUP_ROWS = 64,     /* packed queries of a warpgroup */
    GROUP_THREADS = 128, /* of a warpgroup */
};

template <int D> static constexpr __host__ __device__ int warpgroups()
{
    return D == 64 ? 3 : 2;
}

template <int D> static constexpr __host__ __device__ int queries()
{
    return warpgroups<D>() * GROUP_ROWS;
}

template <int D> static constexpr __host__ __device__ int block_threads()
{
    return (warpgroups<D>() + 1) * GROUP_THREADS;
}

/* Shared memory: panels of all queries, of STAGES tiles of keys and of values, and the barriers;
 * and what it takes to begin at a multiple of 1,024. */
template <int D> struct places {
    enum {
        QUERIES = 0,
        TILE = POSITIONS * D * 2, /* bytes */
        KEYS = queries<D>() * D * 2,
        VALUES = KEYS + STAGES * TILE,
        BARRIERS = VALUES + STAGES * TILE,
        BYTES = BARRIERS + 4 * STAGES * 8 + 1024,
    };
};

/* Which of the barriers. */
enum { KEYS_FULL = 0, KEYS_EMPTY = STAGES, VALUES_FULL = 2 * STAGES, VALUES_EMPTY = 3 * STAGES };

/* What a block works on. */
struct work {
    const int32_t *table; /* of the row */
    int t0, n, kv_len;    /* the row's first token, tokens, positions */
    int m0;               /* first packed query */
    int n_tiles;          /* of positions, the last one first */
    int g;
};

/* The copying warp. Slots of the cache past the row's end may hold anything: NaN times a weight of
 * zero is NaN, so values are zeros there. */
template <int D>
static __device__ void copy_tiles(uint32_t shared, uint32_t barriers, const struct work &work,
                                  const CUtensorMap *keys_map, const CUtensorMap *values_map,
                                  const bf16 *v, int G)
{
    const int lane = threadIdx.x % WARP;
    for (int i = 0; i < work.n_tiles; i++) {
        const int p0 = (work.n_tiles - 1 - i) * POSITIONS, stage = i % STAGES, turn = i / STAGES;
        const int left = work.kv_len - p0; /* positions */
        const int pages = min_int(PAGES, ceil_div(left, KV_BLOCK));
        const int whole = min_int(PAGES, left / KV_BLOCK);
        const int block = lane < pages ? work.table[p0 / KV_BLOCK + lane] : 0;
        const int row = (block * G + work.g) * KV_BLOCK; /* of the cache, as the maps see it */
        const uint32_t at = stage * places<D>::TILE + lane * (KV_BLOCK * PANEL_ROW);

        const uint32_t keys_full = barriers + (KEYS_FULL + stage) * 8;
        if (turn > 0) barrier_wait(barriers + (KEYS_EMPTY + stage) * 8, turn - 1);
        if (lane == 0) barrier_expect(keys_full, pages * KV_BLOCK * D * 2);
        __syncwarp();
        if (lane < pages)
            for (int c = 0; c < D / PANEL; c++)
                copy_box(shared + places<D>::KEYS + at + c * (POSITIONS * PANEL_ROW), keys_map, row,
                         c * PANEL, keys_full);

        const uint32_t values_full = barriers + (VALUES_FULL + stage) * 8;
        const uint32_t values = shared + places<D>::VALUES;
        if (turn > 0) barrier_wait(barriers + (VALUES_EMPTY + stage) * 8, turn - 1);
        if (whole < PAGES) {
            const int tail = __shfl_sync(~0u, row, whole); /* of the page that is not whole */
            constexpr int UNITS = D / 8;
            for (int j = whole * KV_BLOCK * UNITS + lane; j < POSITIONS * UNITS; j += WARP) {
                const int p = j / UNITS, unit = j % UNITS;
                uint4 bits = make_uint4(0, 0, 0, 0);
                if (p < left)
                    bits = *(const uint4 *)(v + ((size_t)tail + p % KV_BLOCK) * D + unit * 8);
                store_shared(values + stage * places<D>::TILE + unit / 8 * (POSITIONS * PANEL_ROW) +
                                 panel_at(p, unit % 8),
                             bits);
            }
            shared_publish();
            __syncwarp();
        }
        if (lane == 0) barrier_expect(values_full, whole * KV_BLOCK * D * 2);
        __syncwarp();
        if (lane < whole)
            for (int c = 0; c < D / PANEL; c++)
                copy_box(values + at + c * (POSITIONS * PANEL_ROW), values_map, row, c * PANEL,
                         values_full);
    }
}

/* What a thread of a warpgroup keeps of its two queries. */
template <int D> struct running {
    float out[D / 2]; /* sums of weighted values */
    float max[2], total[2], keep[2];
    int position[2];
};

/* Scores become weights: exp2(scale (score - max)), and what is kept of the sums so far. */
template <int D>
static __device__ void weigh(struct running<D> &run, float (&score)[POSITIONS / 2], int p0,
                             bool edge, float scale)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float largest = run.max[c];
        if (edge) {
#pragma unroll
            for (int j = 0; j < POSITIONS / 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (p0 + j * 8 + lane % 4 * 2 + e > run.position[c])
                        score[4 * j + 2 * c + e] = -INFINITY;
        }
#pragma unroll
        for (int j = 0; j < POSITIONS / 8; j++)
            largest = fmaxf(largest, fmaxf(score[4 * j + 2 * c], score[4 * j + 2 * c + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        /* Nothing seen so far: any finite number keeps the weights at 0. */
        const float top = largest == -INFINITY ? 0.0f : largest * scale;
        run.keep[c] = fast_exp2(run.max[c] * scale - top);
        run.max[c] = largest;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < POSITIONS / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float weight = fast_exp2(score[4 * j + 2 * c + e] * scale - top);
                score[4 * j + 2 * c + e] = weight;
                sum += weight;
            }
        run.total[c] = run.total[c] * run.keep[c] + sum;
    }
}

/* As operands of 16 positions each. */
template <int N>
static __device__ void pack_weights(uint32_t (&weight)[N][4], const float (&score)[8 * N])
{
#pragma unroll
    for (int s = 0; s < N; s++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            weight[s][e] = pack_bf16(score[8 * s + 2 * e], score[8 * s + 2 * e + 1]);
}

/* Begin S [64, POSITIONS] = Q K^T. */
template <int D>
static __device__ void begin_scores(float (&score)[POSITIONS / 2], uint32_t queries_at,
                                    uint32_t keys_at)
{
    products_begin();
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        const int panel = s / (PANEL / 16), column = s % (PANEL / 16) * 32; /* bytes */
        product_rows(score, operand(queries_at + panel * (queries<D>() * PANEL_ROW) + column, 16),
                     operand(keys_at + panel * (POSITIONS * PANEL_ROW) + column, 16), s > 0);
    }
    products_commit();
}

/* Begin O [64, D] += P V. */
template <int D>
static __device__ void begin_sums(struct running<D> &run,
                                  const uint32_t (&weight)[POSITIONS / 16][4], uint32_t values_at)
{
    products_begin();
#pragma unroll
    for (int s = 0; s < POSITIONS / 16; s++)
        product_columns(run.out, weight[s],
                        operand(values_at + s * (16 * PANEL_ROW), POSITIONS * PANEL_ROW));
    products_commit();
}

/* For the packed queries m = (token j of the row, head r of group g), m in a tile of queries<D>():
 *   y[t, h, :] = sum_p softmax_p(scale q . K[p, g, :]) V[p, g, :]
 *
 *   y [T, H, D]    qkv [T, H + 2 G, D], or f32    v [., G, KV_BLOCK, D]
 *   maps of keys and values [. G KV_BLOCK, D] in boxes of [KV_BLOCK, PANEL]
 *   grid (G, tiles)    block block_threads<D>(): the warpgroups, then one whose first warp copies
 *   shared places<D>::BYTES */
template <int D>
static __global__ void __launch_bounds__(block_threads<D>(), 1)
    attention_prefill_sm90_kernel(bf16 *y, const void *qkv, const bf16 *v,
                                  const __grid_constant__ CUtensorMap keys_map,
                                  const __grid_constant__ CUtensorMap values_map,
                                  const struct attention_args args)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char memory[];
    const uint32_t shared = (shared_address(memory) + 1023) / 1024 * 1024;
    const uint32_t barriers = shared + places<D>::BARRIERS;
    const int H = args.H, G = args.G, group = H / G;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, wg = warp / 4;
    struct work work;
    int row, tile;
    grid_release();
    if (!find_tile(&row, &tile, blockIdx.y, args, queries<D>())) {
        grid_wait();
        return; /* the whole block */
    }
    work.g = blockIdx.x;
    work.table = args.block_table + (size_t)row * args.max_blocks;
    work.t0 = args.row_start[row];
    work.n = args.row_start[row + 1] - work.t0;
    work.kv_len = args.kv_len[row];
    work.m0 = tile * queries<D>();
    const int before = work.kv_len - work.n; /* positions before the row's */
    const int last = min_int(work.n - 1, (work.m0 + queries<D>() - 1) / group);
    work.n_tiles = ceil_div(before + last + 1, POSITIONS);

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_make(barriers + (KEYS_FULL + stage) * 8, 1);
            barrier_make(barriers + (VALUES_FULL + stage) * 8, 1);
            barrier_make(barriers + (KEYS_EMPTY + stage) * 8, warpgroups<D>() * 4);
            barrier_make(barriers + (VALUES_EMPTY + stage) * 8, warpgroups<D>() * 4);
        }
        shared_publish();
    }
    __syncthreads();
    grid_wait();
    if (wg == warpgroups<D>()) {
        registers_release<D == 64 ? 32 : 24>();
        if (warp % 4 == 0) copy_tiles<D>(shared, barriers, work, &keys_map, &values_map, v, G);
        return; /* the whole warpgroup: no barrier of the others counts its threads */
    }
    registers_take<D == 64 ? 160 : 240>();

    const int m_group = work.m0 + wg * GROUP_ROWS;
    for (int part = threadIdx.x % GROUP_THREADS; part < GROUP_ROWS * D / 8; part += GROUP_THREADS) {
        const int i = part / (D / 8), unit = part % (D / 8), m = m_group + i, j = m / group;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (j < work.n)
            bits = query_group(
                args, qkv,
                ((size_t)(work.t0 + j) * (H + 2 * G) + work.g * group + m % group) * D + unit * 8);
        store_shared(shared + places<D>::QUERIES + unit / 8 * (queries<D>() * PANEL_ROW) +
                         panel_at(wg * GROUP_ROWS + i, unit % 8),
                     bits);
    }
    shared_publish();
    threads_sync(1 + warpgroups<D>() + wg, GROUP_THREADS);

    const uint32_t queries_at = shared + places<D>::QUERIES + wg * (GROUP_ROWS * PANEL_ROW);
    const int m_thread = m_group + warp % 4 * 16 + lane / 4;
    struct running<D> run = {
    };
#pragma unroll
    for (int c = 0; c < 2; c++) {
        run.max[c] = -INFINITY;
        run.position[c] = before + (m_thread + c * 8) / group;
    }
    const int first_position = before + m_group / group; /* of the warpgroup's queries */
    float score[POSITIONS / 2];
    uint32_t weight[POSITIONS / 16][4];

    int p0 = (work.n_tiles - 1) * POSITIONS;
    barrier_wait(barriers + KEYS_FULL * 8, 0);
    begin_scores<D>(score, queries_at, shared + places<D>::KEYS);
    products_wait<0>();
    products_land(score);
    if (lane == 0) barrier_arrive(barriers + KEYS_EMPTY * 8);
    weigh<D>(run, score, p0, p0 + POSITIONS - 1 > first_position, args.scale);
    pack_weights(weight, score);

    for (int i = 1; i < work.n_tiles; i++) {
        const int stage = i % STAGES, earlier = (i - 1) % STAGES;
        p0 -= POSITIONS;
        barrier_wait(barriers + (KEYS_FULL + stage) * 8, i / STAGES);
        /* The warpgroups take turns: 0 begins, the last one's last turn is followed by none. */
        if (wg > 0 || i > 1) threads_sync(1 + wg, 2 * GROUP_THREADS);
        begin_scores<D>(score, queries_at, shared + places<D>::KEYS + stage * places<D>::TILE);
        barrier_wait(barriers + (VALUES_FULL + earlier) * 8, (i - 1) / STAGES);
        begin_sums<D>(run, weight, shared + places<D>::VALUES + earlier * places<D>::TILE);
        if (wg + 1 < warpgroups<D>() || i + 1 < work.n_tiles)
            threads_arrive(1 + (wg + 1) % warpgroups<D>(), 2 * GROUP_THREADS);
        products_wait<1>();
        products_land(score);
        if (lane == 0) barrier_arrive(barriers + (KEYS_EMPTY + stage) * 8);
        weigh<D>(run, score, p0, p0 + POSITIONS - 1 > first_position, args.scale);
        products_wait<0>();
        products_land(run.out);
        if (lane == 0) barrier_arrive(barriers + (VALUES_EMPTY + earlier) * 8);
#pragma unroll
        for (int j = 0; j < D / 2; j++) run.out[j] *= run.keep[j / 2 % 2];
        pack_weights(weight, score);
    }
    const int final = work.n_tiles - 1;
    barrier_wait(barriers + (VALUES_FULL + final % STAGES) * 8, final / STAGES);
    begin_sums<D>(run, weight, shared + places<D>::VALUES + final % STAGES * places<D>::TILE);
    products_wait<0>();
    products_land(run.out);

#pragma unroll
    for (int c = 0; c < 2; c++) {
        run.total[c] += __shfl_xor_sync(~0u, run.total[c], 1);
        run.total[c] += __shfl_xor_sync(~0u, run.total[c], 2);
        const int m = m_thread + c * 8, j = m / group;
        if (j >= work.n) continue;
        const float scale = 1.0f / run.total[c];
        bf16 *to = y + ((size_t)(work.t0 + j) * H + work.g * group + m % group) * D + lane % 4 * 2;
#pragma unroll
        for (int e = 0; e < D / 8; e++)
            *(uint32_t *)(to + e * 8) =
                pack_bf16(run.out[4 * e + 2 * c] * scale, run.out[4 * e + 2 * c + 1] * scale);
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "wgmma is in sm_90a, not in sm_90: build with CUDA_ARCH=90a"
#endif
}

/* ---- launchers ---------------------------------------------------------------------------- */

template <int D>
static void launch(struct cuda_device *cuda, bf16 *y, const void *qkv, const bf16 *k, const bf16 *v,
                   const struct attention_args *args, int T)
{
    const dim3 grid(args->G, prefill_tiles(args, T, queries<D>()));
    const CUtensorMap keys_map = map_cache(cuda, k, D), values_map = map_cache(cuda, v, D);
    cuda_allow_shared(cuda, attention_prefill_sm90_kernel<D>, places<D>::BYTES, "attention");
    cuda_launch(cuda, "attention", attention_prefill_sm90_kernel<D>, grid, block_threads<D>(),
                places<D>::BYTES, 1, y, qkv, v, keys_map, values_map, *args);
}

bool attention_prefill_sm90(struct cuda_device *cuda, bf16 *y, const void *qkv, const bf16 *k,
                            const bf16 *v, const struct attention_args *args, int T)
{
    if (!cuda->encode_tensor_map || args->window > 0 || (args->d != 64 && args->d != 128))
        return false;
    if (args->d == 64)
        launch<64>(cuda, y, qkv, k, v, args, T);
    else
        launch<128>(cuda, y, qkv, k, v, args, T);
    return true;
}
