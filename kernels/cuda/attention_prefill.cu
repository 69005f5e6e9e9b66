/* Attention of rows of several tokens, with whatever history they have. Bound by arithmetic, so
 * it runs on tensor cores: a block holds the queries of some tokens and of all heads of a group
 * (they read the same keys), packed token by token, and walks over the keys and values in tiles
 * of 64 positions. The values of a tile are copied while its scores are computed, the next keys
 * while the values are used. On sm_90a attention_prefill_sm90.cu does the longer ones. */
#include "kernels/cuda/attention.cuh"

#include <math.h>

/* ---- kernels ------------------------------------------------------------------------------ */

enum { PREFILL_BLOCK = 128, PREFILL_WARPS = PREFILL_BLOCK / WARP, POSITIONS = 64 };
enum { WGMMA_KV_MIN = 256 };

/* A row of shared memory is 16 bytes longer than a head: see attention_decode.cu. */
template <int D> static constexpr __host__ __device__ int pitch()
{
    return D + 8;
}

/* Queries of a block: MT 16 of each warp. */
template <int MT> static constexpr __host__ __device__ int queries()
{
    return PREFILL_WARPS * 16 * MT;
}

template <int D, int MT> static constexpr int prefill_shared()
{
    return (queries<MT>() + 2 * POSITIONS) * pitch<D>() * 2;
}

/* Begin to copy positions [first, first + POSITIONS) of a head; zeros from `end` on. Where a pass
 * of the block's threads is a whole number of rows, a block of the cache is looked up once. */
template <int D>
static __device__ void copy_positions(uint32_t to, const bf16 *from, const int32_t *table,
                                      size_t block_stride, int first, int end)
{
    constexpr int UNITS = D / 8, ROWS = PREFILL_BLOCK / UNITS; /* 16 bytes of a row; rows a pass */
    if constexpr (ROWS * UNITS == PREFILL_BLOCK && KV_BLOCK % ROWS == 0) {
        const int row = threadIdx.x / UNITS, column = threadIdx.x % UNITS * 8;
#pragma unroll
        for (int i = 0; i < POSITIONS / KV_BLOCK; i++) {
            const int p = first + i * KV_BLOCK;
            const size_t block = p < end ? table[p / KV_BLOCK] : 0;
            const bf16 *page = from + block * block_stride + row * D + column;
#pragma unroll
            for (int j = 0; j < KV_BLOCK; j += ROWS)
                copy_async(to + ((i * KV_BLOCK + j + row) * pitch<D>() + column) * 2, page + j * D,
                           p + j + row < end);
        }
    } else {
#pragma unroll
        for (int j = 0; j < POSITIONS * UNITS / PREFILL_BLOCK; j++) {
            const int unit = j * PREFILL_BLOCK + threadIdx.x;
            const int row = unit / UNITS, column = unit % UNITS * 8, p = first + row;
            const size_t block = p < end ? table[p / KV_BLOCK] : 0;
            copy_async(to + (row * pitch<D>() + column) * 2,
                       from + block * block_stride + p % KV_BLOCK * D + column, p < end);
        }
    }
}

/* For the packed queries m = (token j of the row, head r of group g), m in a tile of 64 MT:
 *   y[t, h, :] = sum_p softmax_p(scale q . K[p, g, :]) V[p, g, :]
 *
 *   y [T, H, D]    qkv [T, H + 2 G, D], or f32    k, v [., G, KV_BLOCK, D]
 *   grid (G, tiles)    block PREFILL_BLOCK, a warp for 16 MT queries
 *   shared prefill_shared<D, MT>(): queries, a tile of keys, a tile of values */
template <int D, int MT>
static __global__ void __launch_bounds__(PREFILL_BLOCK)
    attention_prefill_kernel(bf16 *y, const void *qkv, const bf16 *k, const bf16 *v,
                             const struct attention_args args)
{
    extern __shared__ __align__(16) unsigned char shared[];
    const uint32_t queries_tile = shared_address(shared);
    const uint32_t keys = queries_tile + queries<MT>() * pitch<D>() * 2;
    const uint32_t values = keys + POSITIONS * pitch<D>() * 2;
    const int H = args.H, G = args.G, group = H / G, g = blockIdx.x;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int row, tile;
    grid_release();
    const bool found = find_tile(&row, &tile, blockIdx.y, args, queries<MT>());
    grid_wait();
    if (!found) return; /* the whole block */

    __shared__ struct {
        int t0, n, m0, before, last;
    } at; /* read anew where it is needed: there is no register to spare */
    const int t0 = args.row_start[row], n = args.row_start[row + 1] - t0;
    const int kv_len = args.kv_len[row], before = kv_len - n; /* positions before the row's */
    const int m0 = tile * queries<MT>();
    const int last = min_int(n - 1, (m0 + queries<MT>() - 1) / group);
    const int end = before + last + 1;
    const int begin = first_seen(args, before + m0 / group) / POSITIONS * POSITIONS;
    if (threadIdx.x == 0) at = {t0, n, m0, before, last};
    const int32_t *table = args.block_table + (size_t)row * args.max_blocks;
    const size_t block_stride = (size_t)G * KV_BLOCK * D;
    const bf16 *k_head = k + (size_t)g * KV_BLOCK * D, *v_head = v + (size_t)g * KV_BLOCK * D;

    for (int part = threadIdx.x; part < queries<MT>() * D / 8; part += PREFILL_BLOCK) {
        const int m = m0 + part / (D / 8), column = part % (D / 8) * 8;
        const int j = min_int(m / group, n - 1);
        const int to = (part / (D / 8) * pitch<D>() + column) * 2;
        const size_t from = ((size_t)(t0 + j) * (H + 2 * G) + g * group + m % group) * D + column;
        if (args.has_f32_queries) /* past the row's end: the last token's, for nobody */
            *(uint4 *)(shared + to) = query_group(args, qkv, from);
        else
            copy_async(queries_tile + to, (const bf16 *)qkv + from, m / group < n);
    }
    copy_positions<D>(keys, k_head, table, block_stride, begin, end);
    copy_commit();

    /* Of tile i of this warp, a lane has query lane / 4 (c = 0) and the one 8 below (c = 1). */
    float out[MT][D / 8][4] = {}, max[MT][2], total[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            max[i][c] = -INFINITY;
            total[i][c] = 0.0f;
        }
    const uint32_t query =
        queries_tile + ((warp * MT * 16 + lane % 16) * pitch<D>() + lane / 16 * 8) * 2;
    const uint32_t key = keys + ((lane % 8 + lane / 16 * 8) * pitch<D>() + lane / 8 % 2 * 8) * 2;
    const uint32_t value = values + (lane % 16 * pitch<D>() + lane / 16 * 8) * 2;

    for (int p0 = begin; p0 < end; p0 += POSITIONS) {
        copy_wait<0>();
        __syncthreads();
        copy_positions<D>(values, v_head, table, block_stride, p0, end);
        copy_commit();

        /* Whether some query of the block does not see some position of this tile. */
        const bool edge = p0 + POSITIONS - 1 > at.before + at.m0 / group ||
                          p0 < first_seen(args, at.before + at.last);
        float score[MT][POSITIONS / 8][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            uint32_t a[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++)
                load_matrices(a[i], query + (i * 16 * pitch<D>() + s * 16) * 2);
#pragma unroll
            for (int j = 0; j < POSITIONS / 16; j++) {
                uint32_t b[4];
                load_matrices(b, key + (j * 16 * pitch<D>() + s * 16) * 2);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(score[i][2 * j], a[i], b[0], b[1]);
                    mma_bf16(score[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }

#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float largest = max[i][c];
                if (edge) {
                    const int position =
                        at.before + (at.m0 + (warp * MT + i) * 16 + lane / 4 + c * 8) / group;
                    const int first = first_seen(args, position);
#pragma unroll
                    for (int j = 0; j < POSITIONS / 8; j++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int p = p0 + j * 8 + lane % 4 * 2 + e;
                            if (p > position || p < first) score[i][j][2 * c + e] = -INFINITY;
                        }
                }
#pragma unroll
                for (int j = 0; j < POSITIONS / 8; j++)
                    largest = fmaxf(largest, fmaxf(score[i][j][2 * c], score[i][j][2 * c + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
                /* Nothing seen so far: any finite number keeps the weights at 0. */
                const float top = largest == -INFINITY ? 0.0f : largest * args.scale;
                const float keep = fast_exp2(max[i][c] * args.scale - top);
                max[i][c] = largest;
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < POSITIONS / 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float weight = fast_exp2(score[i][j][2 * c + e] * args.scale - top);
                        score[i][j][2 * c + e] = weight;
                        sum += weight;
                    }
                total[i][c] = total[i][c] * keep + sum;
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    out[i][j][2 * c] *= keep;
                    out[i][j][2 * c + 1] *= keep;
                }
            }

        copy_wait<0>();
        __syncthreads();
        if (p0 + POSITIONS < end)
            copy_positions<D>(keys, k_head, table, block_stride, p0 + POSITIONS, end);
        copy_commit();
#pragma unroll
        for (int s = 0; s < POSITIONS / 16; s++) {
            uint32_t a[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                const float(*w)[4] = &score[i][2 * s];
                a[i][0] = pack_bf16(w[0][0], w[0][1]);
                a[i][1] = pack_bf16(w[0][2], w[0][3]);
                a[i][2] = pack_bf16(w[1][0], w[1][1]);
                a[i][3] = pack_bf16(w[1][2], w[1][3]);
            }
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                uint32_t b[4];
                load_matrices_transposed(b, value + (s * 16 * pitch<D>() + j * 16) * 2);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma_bf16(out[i][2 * j], a[i], b[0], b[1]);
                    mma_bf16(out[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            total[i][c] += __shfl_xor_sync(~0u, total[i][c], 1);
            total[i][c] += __shfl_xor_sync(~0u, total[i][c], 2);
            const int m = at.m0 + (warp * MT + i) * 16 + lane / 4 + c * 8, j = m / group;
            if (j >= at.n) continue;
            const float scale = 1.0f / total[i][c];
            bf16 *to = y + ((size_t)(at.t0 + j) * H + g * group + m % group) * D + lane % 4 * 2;
#pragma unroll
            for (int e = 0; e < D / 8; e++)
                *(uint32_t *)(to + e * 8) =
                    pack_bf16(out[i][e][2 * c] * scale, out[i][e][2 * c + 1] * scale);
        }
}

/* ---- launchers ---------------------------------------------------------------------------- */

template <int D, int MT>
static void launch(struct cuda_device *cuda, bf16 *y, const void *qkv, const bf16 *k, const bf16 *v,
                   const struct attention_args *args, int T)
{
    const dim3 grid(args->G, prefill_tiles(args, T, queries<MT>()));
    cuda_allow_shared(cuda, attention_prefill_kernel<D, MT>, prefill_shared<D, MT>(), "attention");
    cuda_launch(cuda, "attention", attention_prefill_kernel<D, MT>, grid, PREFILL_BLOCK,
                prefill_shared<D, MT>(), 1, y, qkv, k, v, *args);
}

void attention_prefill(struct cuda_device *cuda, bf16 *y, const void *qkv, const bf16 *k,
                       const bf16 *v, const struct attention_args *args, int T, int max_kv)
{
    /* Short rows are over before the larger blocks have begun: three of these are on a
     * multiprocessor at a time, one of those. */
    if (max_kv > WGMMA_KV_MIN && attention_prefill_sm90(cuda, y, qkv, k, v, args, T)) return;
    switch (args->d) {
    case 64:
        launch<64, 2>(cuda, y, qkv, k, v, args, T);
        break;
    case 80:
        launch<80, 2>(cuda, y, qkv, k, v, args, T);
        break;
    case 96:
        launch<96, 2>(cuda, y, qkv, k, v, args, T);
        break;
    case 128:
        launch<128, 2>(cuda, y, qkv, k, v, args, T);
        break;
    default:
        launch<256, 1>(cuda, y, qkv, k, v, args, T);
        break;
    }
}
