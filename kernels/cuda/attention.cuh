/* What the attention kernels share. */
#ifndef MLORA_KERNELS_CUDA_ATTENTION_CUH
#define MLORA_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/rope.cuh"

struct attention_args {
    const int32_t *row_start;   /* [Q + 1] */
    const int32_t *kv_len;      /* [Q] */
    const int32_t *block_table; /* [Q, max_blocks] */
    int max_blocks, Q, H, G, d;
    int window;
    float scale;          /* times log2(e), for exp2 */
    bool has_f32_queries; /* qkv is f32, y is not: queries are rounded as they are read */
    bool keeps_pages;     /* the kernels before write to no page of a row but its last */
};

/* First position that the token at `position` sees. */
static inline __device__ int first_seen(const struct attention_args &args, int position)
{
    return args.window > 0 ? max_int(0, position - args.window + 1) : 0;
}

/* Find the row whose tiles of `size` packed queries hold tile number `tile` of all rows longer
 * than one token; heavy tiles come first within a row. False: there is none. */
static inline __device__ bool find_tile(int *row, int *tile_of_row, int tile,
                                        const struct attention_args &args, int size)
{
    const int lane = threadIdx.x % WARP, group = args.H / args.G;
    int before = 0; /* tiles of earlier rows */

    for (int first = 0; first < args.Q; first += WARP) {
        const int q = first + lane;
        const int n = q < args.Q ? args.row_start[q + 1] - args.row_start[q] : 0;
        const int tiles = n > 1 ? ceil_div(n * group, size) : 0;
        int upto = tiles;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int other = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += other;
        }
        const unsigned reach = __ballot_sync(~0u, before + upto > tile);
        if (reach) {
            const int found = __ffs(reach) - 1;
            const int rest = before + __shfl_sync(~0u, upto, found) - 1 - tile;
            *row = first + found;
            *tile_of_row = rest;
            return true;
        }
        before += __shfl_sync(~0u, upto, WARP - 1);
    }
    return false;
}

/* Tiles of all rows longer than one token, or more: full ones, and at most one more for each row.
 * They are y of a grid, so that heavy tiles of all heads come first. */
static inline int prefill_tiles(const struct attention_args *args, int T, int size)
{
    const long long packed = (long long)T * (args->H / args->G);
    const long long tiles = packed / size + min_int(args->Q, max_int(1, T / 2));
    assert(tiles <= 65535);
    return (int)tiles;
}

/* Two, and eight, neighbouring elements of qkv from i on, as bf16. */
static inline __device__ uint32_t query_pair(const struct attention_args &args, const void *qkv,
                                             size_t i)
{
    if (!args.has_f32_queries) return *(const uint32_t *)((const bf16 *)qkv + i);
    const float2 two = *(const float2 *)((const float *)qkv + i);
    return pack_bf16(two.x, two.y);
}

static inline __device__ uint4 query_group(const struct attention_args &args, const void *qkv,
                                           size_t i)
{
    if (!args.has_f32_queries) return *(const uint4 *)((const bf16 *)qkv + i);
    float x[GROUP];
    load_group(x, (const float *)qkv + i);
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                      pack_bf16(x[6], x[7]));
}

/* bf16 activations and cache, qkv of bf16 or f32, d one of 64, 80, 96, 128, 256. Rows of one token
 * are the decode kernel's, longer ones the prefill kernel's. With `turn`, for rows of one token alone, qkv
 * is not turned yet, and the step's keys and values are not in the cache: it does that, too. */
void attention_decode(struct cuda_device *cuda, bf16 *y, const void *qkv, bf16 *k, bf16 *v,
                      const struct attention_args *args, const struct turn *turn, int max_kv);
/* Scratch that attention_decode() takes. */
size_t attention_decode_bytes(const struct cuda_device *cuda, int Q, int H, int G, int d,
                              int max_kv);
void attention_prefill(struct cuda_device *cuda, bf16 *y, const void *qkv, const bf16 *k,
                       const bf16 *v, const struct attention_args *args, int T, int max_kv);
/* Of the latter, what wgmma can do; false: nothing, by what the device and the heads are. */
bool attention_prefill_sm90(struct cuda_device *cuda, bf16 *y, const void *qkv, const bf16 *k,
                            const bf16 *v, const struct attention_args *args, int T);

#endif
