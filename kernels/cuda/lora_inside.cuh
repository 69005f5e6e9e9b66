/* LoRA inside the streaming product: four more warps of its blocks make h while the others read the weights,
 * which takes longer. They ask for A before x is there, like the copy engine for w, and share out K. Then
 * they multiply B by h: lora_inside_add.cuh. No launch, nothing read or written but A, B and h. A fifth
 * warp minds whose the tokens are and where h passes.
 *
 * Beside a stream every load waits as long as the queue before it: so h passes from block to block in
 * one store and one load, with no fence and no counter. */
#ifndef MLORA_KERNELS_CUDA_LORA_INSIDE_CUH
#define MLORA_KERNELS_CUDA_LORA_INSIDE_CUH

#include "kernels/cuda/lora_tile.cuh"
#include "kernels/cuda/wgmma.cuh"

enum {
    SIXTEEN = 16, /* tokens of a tile, and of the rank that a small product takes */
    INSIDE_WARPS = 4,
    INSIDE_BLOCK = INSIDE_WARPS * WARP,
    INSIDE_PARTS = 4,  /* of a sum of h, however many tokens and adapters there are */
    INSIDE_STEP = 32,  /* k that a warp takes at once */
    INSIDE_AHEAD = 8,  /* such steps that it asks for at once */
    INSIDE_STEPS = 16, /* tiles of the rank of all adapters, of a slice, at most */
    INSIDE_TILES = 4,  /* of one adapter, at most; each has one or more */
    INSIDE_TOKENS = 64,
    INSIDE_STAGED = INSIDE_BLOCK * INSIDE_AHEAD * 2 * 16, /* bytes of A, or of x */
};

/* Where the blocks of a product leave each other parts of h: [INSIDE_PARTS, T, n_slices tiles_a_slice,
 * 16]. NOTHING stands where nothing has been stored, so that what has come needs no other sign. A
 * product uses h[turn] and clears the other one's first `used`, which the product before it has read. */
struct exchange {
    enum { SIZE = INSIDE_PARTS * INSIDE_TOKENS * LORA_SLICES_MAX * INSIDE_TILES * SIXTEEN };
    uint32_t h[2][SIZE];
    int turn, used, arrived;
};
static const uint32_t NOTHING = ~0u; /* a NaN that no instruction makes */

/* A product's argument. */
struct lora_inside {
    enum { WORKERS = INSIDE_BLOCK, THREADS = WORKERS + WARP };
    struct lora_args args;
    const bf16 *x;
    struct exchange *exchange;
    int T, n_units;
    int n_blocks, first;      /* blocks that make h: 0 to n_blocks - 1, from `first` on and round */
    int tiles_a_slice;        /* of 16 of the rank */
    int row_tiles;            /* of all slices */
    int tiles_a_share;        /* of the rank: blocks that share out k share it out, too */
    int b_bytes, added_bytes; /* in shared memory, of 64 rows: of B, and of what is added */
    int kept, kept_of_makers; /* stages of the ring of w: of a block, and of one that makes h */
};
struct lora_not_inside {
    enum { WORKERS = 0, THREADS = 0 };
};

#ifdef __CUDACC__

/* A segment's rows of B from a block's first on, R elements each. R 0: there are none. */
struct b_rows {
    const bf16 *from;
    int R;
};

/* What a block adds of each adapter's rank: `tiles` of 16 from `first` on; 0: nothing. */
struct inside_share {
    int first, tiles;
};

/* The ring of w. While w waits for x it takes all stages, which keeps the memory busy, and afterwards `kept`
 * of them, which is enough for that: then B is behind these, and what it adds. In a block that makes h,
 * A and x are behind all stages. */
struct ring_of_w {
    uint32_t at, empty; /* stages, and the barriers that tell that one has been read */
    int stages, kept, stage_bytes;
    int n; /* panels of w that the block reads */
};

/* A block has rows of one slice, or, where it is a gate's, half as many of each of two. */
struct inside_shared {
    int slice, row; /* of the block's rows: the first's, and which of the slice's that is */
    struct inside_share share;
    struct ring_of_w ring;
    struct b_rows b[2][INSIDE_STEPS]; /* of a segment, in the block's slices */
    /* Barriers: that the segments are known, and the turn; that all of w has been multiplied; that what
     * is added is there. */
    uint64_t segments_known, turn_known, idle, ready;
    int turn; /* of the exchange, once it is known */
    int unit_token[SIXTEEN];
    signed char segment[INSIDE_TOKENS]; /* of a token; -1: none */
};

static inline __device__ int slice_of(const struct lora_args &args, int n0)
{
    int slice = 0;
    while (slice + 1 < args.n_slices && n0 >= args.offset[slice + 1]) slice++;
    return slice;
}

static inline __device__ struct inside_share inside_share_of(const struct lora_inside &in,
                                                             int share)
{
    const int first = share * in.tiles_a_share;
    return {first, max_int(0, min_int(in.tiles_a_share, in.tiles_a_slice - first))};
}

/* The first unit of h that a block makes; the others follow in steps of n_blocks. */
static inline __device__ int first_unit(const struct lora_inside &in, int block)
{
    if (block >= in.n_blocks) return in.n_units;
    return (block - in.first + in.n_blocks) % in.n_blocks;
}

static inline __device__ bool makes_h(const struct lora_inside &in)
{
    return first_unit(in, blockIdx.x) < in.n_units;
}

/* By one thread, before the others begin. */
static inline __device__ void inside_make(const struct lora_inside &in,
                                          struct inside_shared *shared, int n0, int share,
                                          const struct ring_of_w &ring, int consumers)
{
    const int slice = slice_of(in.args, n0);
    barrier_make(shared_address(&shared->segments_known), WARP);
    barrier_make(shared_address(&shared->turn_known), 1);
    barrier_make(shared_address(&shared->idle), consumers);
    barrier_make(shared_address(&shared->ready), INSIDE_BLOCK);
    shared->slice = slice;
    shared->row = n0 - in.args.offset[slice];
    shared->share = inside_share_of(in, share);
    shared->ring = ring;
}

static inline __device__ void inside_sync()
{
    enum { BARRIER = 1 };
    threads_sync(BARRIER, INSIDE_BLOCK);
}

/* Whether it is so for all of these threads. */
static inline __device__ bool inside_all(bool is_so)
{
    int all;
    asm volatile("{ .reg .pred one, all;\n"
                 "setp.ne.s32 one, %1, 0;\n"
                 "bar.red.and.pred all, 1, %2, one;\n"
                 "selp.s32 %0, 1, 0, all; }"
                 : "=r"(all)
                 : "r"((int)is_so), "n"((int)INSIDE_BLOCK)
                 : "memory");
    return all;
}

/* The same number; what follows from it is to be computed anew, not to be kept in registers. */
static inline __device__ int anew(int number)
{
    asm volatile("" : "+r"(number));
    return number;
}

/* Of the multiprocessor's clock; it begins anew every few seconds. */
static inline __device__ uint32_t cycles()
{
    uint32_t count;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(count)::"memory");
    return count;
}

/* A unit of h: 16 rows of A, 16 tokens of its adapter, a part of K. A lane holds 8 elements of a step
 * of k of two rows and of two tokens: which k they are does not matter, both are held the same way. They
 * pass through INSIDE_STAGED bytes each. */
static inline __device__ void shrink_inside(const struct lora_inside &in, int unit, int thread,
                                            struct inside_shared *shared, uint32_t staged)
{
    const struct lora_args &args = in.args;
    const int lane = thread % WARP, warp = thread / WARP;
    const int part = unit % INSIDE_PARTS, row_tile = unit / INSIDE_PARTS % in.row_tiles;
    const int slice = row_tile / in.tiles_a_slice, first = row_tile % in.tiles_a_slice * SIXTEEN;
    struct lora_tile tokens;
    if (!lora_find_tile(&tokens, unit / INSIDE_PARTS / in.row_tiles, args, SIXTEEN)) return;
    int t[2]; /* asked for at once: each load waits long */
#pragma unroll
    for (int i = 0; i < 2; i++)
        t[i] = args.order[tokens.first + min_int(lane / 4 + i * 8, tokens.n - 1)];
    const struct lora_factors f = *lora_factors_of(args, tokens.slot, slice);
    if (!f.a || first >= f.R) return; /* all warps */

    const int steps = args.K / INSIDE_STEP, a_part = ceil_div(steps, INSIDE_PARTS);
    const int begin = part * a_part, end = min_int(steps, begin + a_part);
    const bf16 *a_rows[2], *x_rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = min_int(first + lane / 4 + i * 8, f.R - 1);
        a_rows[i] = (const bf16 *)f.a + (size_t)r * args.K + lane % 4 * GROUP;
        x_rows[i] = in.x + (size_t)t[i] * args.K + lane % 4 * GROUP;
        if (warp == 0 && lane % 4 == 0) shared->unit_token[lane / 4 + i * 8] = t[i];
    }
    const uint32_t a_at = staged + thread * 16, x_at = a_at + INSIDE_STAGED;
    float sum[2][4] = {};
    int step = begin + warp;
#pragma unroll 1
    do { /* once at least: it may have nothing to do */
#pragma unroll
        for (int i = 0; i < 2 * INSIDE_AHEAD; i++) {
            const int at = step + i / 2 * INSIDE_WARPS;
            copy_async_once(a_at + i * (INSIDE_BLOCK * 16),
                            a_rows[i % 2] + (at < end ? at * INSIDE_STEP : 0), at < end);
        }
        grid_wait(); /* x is there, and h has been read */
#pragma unroll
        for (int i = 0; i < 2 * INSIDE_AHEAD; i++) {
            const int at = step + i / 2 * INSIDE_WARPS;
            const bool valid = at < end && i % 2 * 8 < tokens.n;
            copy_async(x_at + i * (INSIDE_BLOCK * 16),
                       x_rows[i % 2] + (valid ? at * INSIDE_STEP : 0), valid);
        }
        copy_commit();
        copy_wait<0>();
#pragma unroll
        for (int i = 0; i < INSIDE_AHEAD; i++) {
            const uint4 low = load_shared(a_at + 2 * i * (INSIDE_BLOCK * 16));
            const uint4 high = load_shared(a_at + (2 * i + 1) * (INSIDE_BLOCK * 16));
            const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
            const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint4 b = load_shared(x_at + (2 * i + n) * (INSIDE_BLOCK * 16));
                mma_bf16(sum[n], a0, b.x, b.y);
                mma_bf16(sum[n], a1, b.z, b.w);
            }
        }
        step += INSIDE_AHEAD * INSIDE_WARPS;
    } while (step < end);
    inside_sync(); /* A and x have been read: sums take their place, [INSIDE_WARPS, 16 tokens, 16] */
    float *sums = (float *)__cvta_shared_to_generic(staged);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = n * 8 + lane % 4 * 2 + e % 2, r = lane / 4 + e / 2 * 8;
            sums[(warp * SIXTEEN + token) * SIXTEEN + r] = sum[n][e];
        }
    inside_sync();
    unit = anew(unit);
    barrier_wait(shared_address(&shared->turn_known), 0);
    uint32_t *h = in.exchange->h[shared->turn] +
                  unit % INSIDE_PARTS * (in.T * in.row_tiles * SIXTEEN) +
                  unit / INSIDE_PARTS % in.row_tiles * SIXTEEN + thread % SIXTEEN;
#pragma unroll 1
    for (int i = thread; i < tokens.n * SIXTEEN; i += INSIDE_BLOCK) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < INSIDE_WARPS; w++) total += sums[w * (SIXTEEN * SIXTEEN) + i];
        const uint32_t bits = __float_as_uint(f.scale * total);
        __stcg(&h[shared->unit_token[i / SIXTEEN] * in.row_tiles * SIXTEEN],
               bits == NOTHING ? bits >> 1 : bits);
    }
    inside_sync();
}

/* The warp that keeps the exchange: it tells the others their turn, and clears what the product before
 * has read. The last block to know its turn ends it for the next product. */
static inline __device__ void keep_exchange(const struct lora_inside &in, int lane,
                                            struct inside_shared *shared)
{
    struct exchange *exchange = in.exchange;
    grid_wait();
    const int turn = __ldcg(&exchange->turn), used = __ldcg(&exchange->used);
    if (lane == 0) {
        shared->turn = turn;
        barrier_arrive(shared_address(&shared->turn_known));
    }
    uint4 *other = (uint4 *)exchange->h[1 - turn];
    if ((int)blockIdx.x < in.n_blocks)
        for (int i = blockIdx.x * WARP + lane; i < used / 4; i += in.n_blocks * WARP)
            __stcg(&other[i], make_uint4(NOTHING, NOTHING, NOTHING, NOTHING));
    __syncwarp();
    if (lane == 0 && atomicAdd(&exchange->arrived, 1) == (int)gridDim.x - 1) {
        exchange->arrived = 0;
        exchange->used = INSIDE_PARTS * in.T * in.row_tiles * SIXTEEN;
        exchange->turn = 1 - turn;
    }
}

#endif
#endif
