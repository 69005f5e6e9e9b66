/* LoRA inside the streaming product: four more warps of its blocks make h while the others read the weights,
 * which takes longer. They ask for A before x is there, like the copy engine for w, and share out K. Then
 * they multiply B by h: lora_inside_add.cuh. No launch, nothing read or written but A, B and h. A fifth
 * warp minds whose the tokens are and where h passes.
 *
 * Beside a stream every load waits as long as the queue before it: so h passes from block to block in
 * one store and one copy, with no fence and no counter. */
#ifndef MLORA_KERNELS_CUDA_LORA_INSIDE_CUH
#define MLORA_KERNELS_CUDA_LORA_INSIDE_CUH

#include "kernels/cuda/lora_tile.cuh"
#include "kernels/cuda/wgmma.cuh"

enum {
    SIXTEEN = 16, /* tokens of a tile, and of the rank that a small product takes */
    INSIDE_WARPS = 4,
    INSIDE_BLOCK = INSIDE_WARPS * WARP,
    INSIDE_PARTS = 4, /* of a sum of h, however many tokens and adapters there are */
    INSIDE_STEP = 64, /* k that a warp takes at once: a line of memory of each row */
    INSIDE_AHEAD = 4, /* such steps that it asks for at once */
    INSIDE_SEGMENTS = 16,
    INSIDE_PLACES = 4, /* of B in shared memory, at most */
    INSIDE_TILES = 4,  /* of one adapter, at most; each has one or more */
    UNIT_TILES = 4,    /* of a unit of h, at most */
    INSIDE_TOKENS = 64,
    INSIDE_JOBS = INSIDE_SEGMENTS + INSIDE_TOKENS / SIXTEEN,
    INSIDE_STAGED =
        INSIDE_WARPS * INSIDE_AHEAD * SIXTEEN * INSIDE_STEP * 2, /* bytes of A, or of x */
};

/* Where the blocks of a product leave each other parts of h, tokens in the segments' order:
 * [n_slices tiles_a_slice, INSIDE_PARTS, n_tokens, 16]. NOTHING stands where nothing has been stored, so
 * that what has come needs no other sign. A product uses h[turn] and clears the other one's first `used`,
 * which the product before it has read. */
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
    int n_units;
    int n_blocks, first; /* blocks that make h: 0 to n_blocks - 1, from `first` on and round */
    int tiles_a_slice;   /* of 16 of the rank */
    int row_tiles;       /* of all slices */
    int tiles_a_unit;    /* of these, of a unit of h */
    int tiles_a_share;   /* of the rank: blocks that share out k share it out, too */
    /* Maps of all memory, one for B of each rank; bytes of a row of B that a block has. */
    const CUtensorMap *maps;
    int row_bytes;
    /* In shared memory: places of B, and segments that have one at once; columns of h, a token each,
     * every segment's filled up to a multiple of 8; bytes that are added to 64 rows. */
    int n_places, segments_a_place, h_columns, added_bytes;
    int kept, kept_of_makers; /* stages of the ring of w: of a block, and of one that makes h */
};
struct lora_not_inside {
    enum { WORKERS = 0, THREADS = 0 };
};

#ifdef __CUDACC__

/* A unit of h: up to UNIT_TILES times 16 rows of A, 16 tokens of an adapter, a part of K. It lies in shared
 * memory, since no register is left to keep it in. */
struct unit {
    const bf16 *a[UNIT_TILES]; /* [n_rows, K] */
    float scale[UNIT_TILES];
    short n_rows[UNIT_TILES]; /* 0: nothing to do */
    int number;
    short part, begin, end;          /* steps of k */
    short row_tile, n_tokens, first; /* of the tokens, in the segments' order */
};

/* What a block adds of each adapter's rank: `tiles` of 16 from `first` on; 0: nothing. */
struct inside_share {
    int first, tiles;
};

/* The ring of w. While w waits for x it takes all stages, which keeps the memory busy, and afterwards `kept`
 * of them, which is enough for that: then places of B are behind these, then h, then what it adds. In a
 * block that makes h, A and x are behind all stages; as far as B reaches into them it waits for h. */
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
    /* In the block's slices: elements of a segment's row of B, 0: it has none; the most tiles of the
     * rank that one has; what there is to multiply, bits_of() each; the tokens that something is added
     * to, a bit each. */
    unsigned char R[2][INSIDE_SEGMENTS];
    int tiles[2], n_jobs[2];
    uint32_t jobs[2][INSIDE_JOBS], adds[2][INSIDE_TOKENS / WARP];
    /* Of the tokens in the segments' order: which they are, as far as a job may read; their segments, -1:
     * none; their columns of h. */
    signed char token[INSIDE_TOKENS + SIXTEEN], segment[INSIDE_TOKENS];
    unsigned char column[INSIDE_TOKENS];
    /* Barriers: that the segments are known, and the turn; that the block's own units of h are made; that
     * h of a tile is there; that a place of B is full, and empty; that all of w has been multiplied;
     * that what is added is there. */
    uint64_t segments_known, turn_known, made, h_full;
    uint64_t b_full[INSIDE_PLACES], b_empty[INSIDE_PLACES], idle, ready;
    int turn; /* of the exchange, once it is known */
    /* Of h that was asked for: some of what has not come, and whether that had been waited for long. Then:
     * where to go on, and how often any was asked for. */
    int missing, step, asked;
    bool is_late;
    struct unit unit; /* that is being made, and its tokens */
    signed char unit_token[SIXTEEN];
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
    barrier_make(shared_address(&shared->made), INSIDE_BLOCK);
    barrier_make(shared_address(&shared->h_full), 1);
    for (int i = 0; i < INSIDE_PLACES; i++) {
        barrier_make(shared_address(&shared->b_full[i]), WARP);
        barrier_make(shared_address(&shared->b_empty[i]), INSIDE_WARPS);
    }
    barrier_make(shared_address(&shared->idle), consumers);
    barrier_make(shared_address(&shared->ready), INSIDE_BLOCK);
    shared->slice = slice;
    shared->row = n0 - in.args.offset[slice];
    shared->share = inside_share_of(in, share);
    shared->ring = ring;
    shared->step = shared->asked = 0;
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

/* Which of the threads that make h, and what it adds, this one is: read anew, not kept in a register. */
static inline __device__ int worker()
{
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % INSIDE_BLOCK; /* those before them are as many, or a multiple */
}

/* Of the multiprocessor's clock; it begins anew every few seconds. */
static inline __device__ uint32_t cycles()
{
    uint32_t count;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(count)::"memory");
    return count;
}

/* By a warp: what a unit of h is made of. */
static inline __device__ void find_unit(const struct lora_inside &in, int number, int lane,
                                        struct inside_shared *shared)
{
    static_assert(INSIDE_SEGMENTS <= WARP);
    const struct lora_args &args = in.args;
    const struct lora_segment segment = lora_segment_at(args, lane);
    const int steps = ceil_div(args.K, INSIDE_STEP), a_part = ceil_div(steps, INSIDE_PARTS);
    struct unit unit = {};
    unit.number = number;
    unit.part = number % INSIDE_PARTS;
    unit.begin = unit.part * a_part, unit.end = min_int(steps, unit.begin + a_part);
    const int row_units = ceil_div(in.row_tiles, in.tiles_a_unit);
    unit.row_tile = number / INSIDE_PARTS % row_units * in.tiles_a_unit;
    const int row_tile = unit.row_tile + lane, slice = row_tile / in.tiles_a_slice;
    const int r = row_tile % in.tiles_a_slice * SIXTEEN; /* of a lane's tile */
    struct lora_factors f = {};
    struct lora_tile tile;
    int before = 0;
    if (lora_tile_among(&tile, segment, number / INSIDE_PARTS / row_units, SIXTEEN, &before)) {
        /* Asked for at once: each load waits long. */
        const int t = args.order[tile.first + min_int(lane, tile.n - 1)];
        if (lane < in.tiles_a_unit && row_tile < in.row_tiles)
            f = *lora_factors_of(args, tile.slot, slice);
        unit.n_tokens = tile.n;
        unit.first = tile.first;
        if (lane < SIXTEEN) shared->unit_token[lane] = (signed char)t;
    }
    if (lane == 0) shared->unit = unit;
    __syncwarp(); /* then each tile's */
    if (lane < UNIT_TILES) {
        shared->unit.a[lane] = f.a ? (const bf16 *)f.a + (size_t)r * args.K : NULL;
        shared->unit.scale[lane] = f.scale;
        shared->unit.n_rows[lane] = f.a ? min_int(SIXTEEN, f.R - r) : 0;
    }
}

/* Where 16-byte unit `unit` of row `row` of A, or of a token of x, of a warp's first step lies in shared memory;
 * that of the next is 16 rows further. Units of neighbouring rows lie in different banks. */
static inline __device__ uint32_t staged_at(uint32_t staged, int row, int unit)
{
    static_assert(INSIDE_STEP * 2 == PANEL_ROW);
    return staged + worker() / WARP * (INSIDE_STAGED / INSIDE_WARPS) + row * PANEL_ROW +
           (unit ^ row % 2 * 4) * 16;
}
enum { STAGED_STEP = SIXTEEN * PANEL_ROW };

/* Ask for the rows of A of a unit's tile from step `step` of k on. */
static inline __device__ void ask_for_a(const struct lora_inside &in, int step, int tile,
                                        const struct unit &unit, uint32_t staged)
{
    const int lane = worker() % WARP, k = step * INSIDE_STEP + lane % 8 * GROUP;
    const int end = min_int(unit.end * INSIDE_STEP, in.args.K);
#pragma unroll 1
    for (int r = lane / 8; r < SIXTEEN; r += 4) {
        const bf16 *row = unit.a[tile] + (size_t)min_int(r, unit.n_rows[tile] - 1) * in.args.K;
        const uint32_t to = staged_at(staged, r, lane % 8);
#pragma unroll
        for (int i = 0; i < INSIDE_AHEAD; i++) {
            const int at = k + i * (INSIDE_WARPS * INSIDE_STEP);
            copy_async_once(to + i * STAGED_STEP, row + (at < end ? at : 0), at < end);
        }
    }
}

/* Ask for the same of x. */
static inline __device__ void ask_for_x(const struct lora_inside &in, int step,
                                        const struct inside_shared *shared, uint32_t staged)
{
    const struct unit &unit = shared->unit;
    const int lane = worker() % WARP, k = step * INSIDE_STEP + lane % 8 * GROUP;
    const int end = min_int(unit.end * INSIDE_STEP, in.args.K);
#pragma unroll 1
    for (int token = lane / 8; token < SIXTEEN; token += 4) {
        const bf16 *row = in.x + (size_t)shared->unit_token[token] * in.args.K;
        const uint32_t to = staged_at(staged, token, lane % 8);
#pragma unroll
        for (int i = 0; i < INSIDE_AHEAD; i++) {
            const int at = k + i * (INSIDE_WARPS * INSIDE_STEP);
            const bool valid = at < end && token < unit.n_tokens;
            copy_async(to + i * STAGED_STEP, row + (valid ? at : 0), valid);
        }
    }
}

/* What 16 rows of A and 16 tokens give over a part of K, of which each warp has summed its share: to the
 * exchange. The sums pass through shared memory, where A was. */
static inline __device__ void share_h(const struct lora_inside &in, const float (&sum)[2][4],
                                      int tile, const struct inside_shared *shared, uint32_t room)
{
    const struct unit &unit = shared->unit;
    const int thread = worker(), lane = thread % WARP;
    float *sums = (float *)__cvta_shared_to_generic(room); /* [INSIDE_WARPS, 16 tokens, 16] */
    inside_sync();                                         /* A has been read */
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = n * 8 + lane % 4 * 2 + e % 2, r = lane / 4 + e / 2 * 8;
            sums[(thread / WARP * SIXTEEN + token) * SIXTEEN + r] = sum[n][e];
        }
    inside_sync();
    barrier_wait(shared_address(&shared->turn_known), 0);
    uint32_t *h =
        in.exchange->h[shared->turn] +
        (((unit.row_tile + tile) * INSIDE_PARTS + unit.part) * in.args.n_tokens + unit.first) *
            SIXTEEN;
#pragma unroll 1
    for (int i = thread; i < unit.n_tokens * SIXTEEN; i += INSIDE_BLOCK) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < INSIDE_WARPS; w++) total += sums[w * (SIXTEEN * SIXTEEN) + i];
        const uint32_t bits = __float_as_uint(unit.scale[tile] * total);
        __stcg(&h[i], bits == NOTHING ? bits >> 1 : bits);
    }
}

/* Make unit `number` of h. A and x pass through INSIDE_STAGED bytes each. Of a 16-byte unit a lane holds 8
 * elements of two rows, and of two tokens, in the products: which k they are does not matter, both are
 * held the same way. */
static inline __device__ void shrink_inside(const struct lora_inside &in, int number,
                                            struct inside_shared *shared, uint32_t staged)
{
    const struct unit &unit = shared->unit;
    const uint32_t x_staged = staged + INSIDE_STAGED;
    if (worker() < WARP) find_unit(in, number, worker(), shared);
    inside_sync();
    bool has_x = false; /* a unit of more than one tile keeps it */
#pragma unroll 1
    for (int tile = 0; tile < in.tiles_a_unit; tile++) {
        if (unit.n_rows[tile] <= 0) continue; /* all warps */
        float sum[2][4] = {};
        int step = unit.begin + worker() / WARP;
#pragma unroll 1
        do { /* once at least: it may have nothing to do */
            ask_for_a(in, step, tile, unit, staged);
            if (!has_x) {
                grid_wait(); /* x is there, and h has been read */
                ask_for_x(in, step, shared, x_staged);
            }
            copy_commit();
            copy_wait<0>();
            __syncwarp();
            const int row = worker() % WARP / 4, column = worker() % 4;
            uint32_t a_at = staged_at(staged, row, column), x_at = staged_at(x_staged, row, column);
#pragma unroll
            for (int i = 0; i < 2 * INSIDE_AHEAD; i++) { /* `column` and 4 further of a step */
                const uint4 low = load_shared(a_at), high = load_shared(a_at + 8 * PANEL_ROW);
                const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
                const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const uint4 b = load_shared(x_at + n * (8 * PANEL_ROW));
                    mma_bf16(sum[n], a0, b.x, b.y);
                    mma_bf16(sum[n], a1, b.z, b.w);
                }
                a_at = (a_at ^ 64) + i % 2 * STAGED_STEP, x_at = (x_at ^ 64) + i % 2 * STAGED_STEP;
            }
            step += INSIDE_AHEAD * INSIDE_WARPS;
        } while (step < unit.end);
        has_x = in.tiles_a_unit > 1;
        share_h(in, sum, tile, shared, staged);
        inside_sync(); /* the sums have been read */
    }
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
        exchange->used = INSIDE_PARTS * in.args.n_tokens * in.row_tiles * SIXTEEN;
        exchange->turn = 1 - turn;
    }
}

#endif
#endif
