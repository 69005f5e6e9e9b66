/* LoRA inside the streaming product: four more warps of its blocks make h, and B times h, while the others
 * read the weights, which takes longer. They ask for A before x is there, like the copy engine for w, and
 * share out K; the warps that multiply x by w only add what has been made to their sums. No launch,
 * nothing read or written but A, B and h. A fifth warp minds where h passes.
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
    INSIDE_ROW = SIXTEEN * 2,                             /* bytes, in shared memory */
    INSIDE_TILE = SIXTEEN * INSIDE_ROW,                   /* the same, of 16 rows of B */
    INSIDE_STAGED = INSIDE_BLOCK * INSIDE_AHEAD * 2 * 16, /* bytes of A, or of x */
    INSIDE_ROOM = 104 * 1024,                             /* in shared memory, for B and h */
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
    enum { THREADS = INSIDE_BLOCK + WARP };
    struct lora_args args;
    const bf16 *x;
    struct exchange *exchange;
    int T, n_units;
    int n_blocks, first;  /* blocks that make h: 0 to n_blocks - 1, from `first` on and round */
    int tiles_a_slice;    /* of 16 of the rank */
    int row_tiles;        /* of all slices */
    int steps;            /* tiles of all adapters, of a slice */
    int band_bytes;       /* of sixteen rows of B, where what they add is put, too */
    int b_bytes, h_bytes; /* in shared memory: B, then h; before them, A and x of who makes h */
};
struct lora_not_inside {
    enum { THREADS = 0 };
};

#ifdef __CUDACC__

/* Rows of 16 of the rank: byte of 16-byte unit `unit` of row `row`. Eight rows' lie in different
 * banks. */
static inline __device__ uint32_t inside_at(int row, int unit)
{
    return row * INSIDE_ROW + (unit ^ row / 4 % 2) * 16;
}

/* A block has ROWS rows of one slice, or, where HALVES is 2, half as many of each of two.
 *
 * Rows of B of all adapters, of which a thread brings 8 elements of some: from one of them on, R elements
 * apart from the next row's. NULL: zeros. */
struct b_rows {
    const bf16 *from;
    int R;
};

struct inside_shared {
    struct b_rows b[INSIDE_BLOCK];
    float of_warp[INSIDE_WARPS][SIXTEEN * SIXTEEN];
    uint64_t ready, turn_known, idle;   /* barriers: what is added; turn; the ring of w, at last */
    uint32_t room;                      /* where A and x, then B and h are */
    int turn;                           /* of the exchange, once it is known */
    signed char segment[INSIDE_TOKENS]; /* of a token; -1: none */
    signed char lowest[INSIDE_TOKENS / SIXTEEN]; /* of sixteen tokens' segments */
    signed char highest[INSIDE_TOKENS / SIXTEEN];
    short rank[2][INSIDE_TOKENS]; /* of its adapter, in the block's slices */
};

/* By one thread, before the others begin. */
static inline __device__ void inside_make(struct inside_shared *shared, uint32_t room,
                                          int consumers)
{
    barrier_make(shared_address(&shared->ready), INSIDE_BLOCK);
    barrier_make(shared_address(&shared->turn_known), 1);
    barrier_make(shared_address(&shared->idle), consumers);
    shared->room = room;
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

static inline __device__ void prefetch_line(const void *line)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
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
    const struct lora_factors f = *lora_factors_of(args, tokens.slot, slice);
    if (!f.a || first >= f.R) return; /* all warps */

    const int steps = args.K / INSIDE_STEP, a_part = ceil_div(steps, INSIDE_PARTS);
    const int begin = part * a_part, end = min_int(steps, begin + a_part);
    const bf16 *a_rows[2], *x_rows[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = min_int(first + lane / 4 + i * 8, f.R - 1);
        const int t = args.order[tokens.first + min_int(lane / 4 + i * 8, tokens.n - 1)];
        a_rows[i] = (const bf16 *)f.a + (size_t)r * args.K + lane % 4 * GROUP;
        x_rows[i] = in.x + (size_t)t * args.K + lane % 4 * GROUP;
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
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = n * 8 + lane % 4 * 2 + e % 2, r = lane / 4 + e / 2 * 8;
            shared->of_warp[warp][token * SIXTEEN + r] = sum[n][e];
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
        for (int w = 0; w < INSIDE_WARPS; w++) total += shared->of_warp[w][i];
        const uint32_t bits = __float_as_uint(f.scale * total);
        __stcg(&h[args.order[tokens.first + i / SIXTEEN] * in.row_tiles * SIXTEEN],
               bits == NOTHING ? bits >> 1 : bits);
    }
    inside_sync();
}

enum { PATIENCE = 1 << 16 /* cycles: four times as long as it takes */ };

/* Wait for the first of what these lanes want of h: one of them looks for all, which would be in the way
 * of the weights. What it has not found after long, load_h_unit() will not find. */
static inline __device__ void wait_for_h(const uint32_t *from, bool wants)
{
    const int leader = __ffs(__ballot_sync(~0u, wants)) - 1;
    const uint32_t start = cycles();
    if ((int)threadIdx.x % WARP == leader)
        while (load_now(from).x == NOTHING && cycles() - start < PATIENCE) __nanosleep(20);
    __syncwarp();
}

/* The sum of h's parts from `from` on, 8 elements, as parts of bf16. False: they have not come for
 * long. */
static inline __device__ bool load_h_unit(uint4 (&part)[H_PARTS], const uint32_t *from,
                                          int part_size)
{
    const uint32_t start = cycles();
    float h[GROUP] = {};
    uint32_t three[4][H_PARTS];

    uint4 four[INSIDE_PARTS][2];
    for (bool all = false; !all;) {
        if (cycles() - start > PATIENCE) return false;
        const int size = anew(part_size);
        all = true;
#pragma unroll
        for (int p = 0; p < INSIDE_PARTS; p++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                four[p][half] = load_now(from + half * 4 + p * size);
#pragma unroll
        for (int p = 0; p < INSIDE_PARTS; p++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 &of = four[p][half];
                all =
                    all && of.x != NOTHING && of.y != NOTHING && of.z != NOTHING && of.w != NOTHING;
            }
    }
#pragma unroll
    for (int p = 0; p < INSIDE_PARTS; p++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            h[half * 4] += __uint_as_float(four[p][half].x);
            h[half * 4 + 1] += __uint_as_float(four[p][half].y);
            h[half * 4 + 2] += __uint_as_float(four[p][half].z);
            h[half * 4 + 3] += __uint_as_float(four[p][half].w);
        }
#pragma unroll
    for (int i = 0; i < 4; i++) split_pair<H_PARTS>(three[i], h[2 * i], h[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < H_PARTS; i++)
        part[i] = make_uint4(three[0][i], three[1][i], three[2][i], three[3][i]);
    return true;
}

/* h of the block's slices, from `slice` on, once it has come: [HALVES, tiles_a_slice, H_PARTS, TOKENS,
 * 16] at `to`. False: some has not come for long. */
template <int TOKENS, int HALVES>
static inline __device__ bool take_h(const struct lora_inside &in, int slice, int thread,
                                     const struct inside_shared *shared, const uint32_t *parts,
                                     uint32_t to)
{
    const int units = 2 * in.tiles_a_slice * HALVES; /* of a token */
    bool is_there = true;
#pragma unroll 1
    for (int first = 0; first < in.T * units; first += INSIDE_BLOCK) {
        const int t = (first + thread) / units, at = (first + thread) % units;
        const int half = HALVES > 1 ? at / (2 * in.tiles_a_slice) : 0;
        const int unit = HALVES > 1 ? at % (2 * in.tiles_a_slice) : at;
        const int row = t * in.row_tiles + (slice + half) * in.tiles_a_slice;
        const uint32_t *from = parts + row * SIXTEEN + unit * GROUP;
        const bool wants = is_there && t < in.T && unit * GROUP < shared->rank[half][t];
        uint4 part[H_PARTS] = {};
        if (first == 0) wait_for_h(from, wants);
        if (wants) is_there = load_h_unit(part, from, in.T * in.row_tiles * SIXTEEN);
        if (t < in.T)
#pragma unroll
            for (int i = 0; i < H_PARTS; i++)
                store_shared(to + (at / 2 * H_PARTS + i) * (TOKENS * INSIDE_ROW) +
                                 inside_at(t, unit % 2),
                             part[i]);
    }
    return inside_all(is_there);
}

/* Eight elements of rank are unit `thread` % 2 of a step, steps of all adapters follow one another, and
 * the second slice's those of the first. n is the first row in a slice. */
template <int HALVES>
static inline __device__ struct b_rows find_b(const struct lora_inside &in, int slice, int n,
                                              int thread)
{
    const int unit = thread % (2 * in.steps * HALVES), step = unit / 2 % in.steps;
    const int r = step % in.tiles_a_slice * SIXTEEN + unit % 2 * GROUP;
    const int slot = in.args.segment_slot[step / in.tiles_a_slice];
    struct lora_factors f = {};
    if (slot >= 0) f = *lora_factors_of(in.args, slot, slice + unit / 2 / in.steps);
    if (!f.a || r >= f.R) return {NULL, 0};
    return {(const bf16 *)f.b + (size_t)n * f.R + r, f.R};
}

/* visit(row, unit) for what is this thread's of `rows` rows. */
template <int HALVES, typename Visit>
static inline __device__ void for_b(const struct lora_inside &in, int rows, int thread,
                                    const Visit &visit)
{
    const int units = 2 * in.steps * HALVES, rows_at_once = INSIDE_BLOCK / units;
    if (thread >= units * rows_at_once) return;
#pragma unroll 1
    for (int row = thread / units; row < rows; row += rows_at_once) visit(row, thread % units);
}

/* Into [ROWS / 16, steps, 16, 16] at `to`: bands of sixteen rows, band_bytes each. */
template <int ROWS, int HALVES>
static inline __device__ void fetch_b(const struct lora_inside &in, const struct b_rows &rows,
                                      int thread, uint32_t to)
{
    for_b<HALVES>(in, ROWS / HALVES, thread, [&](int row, int unit) {
        const int half = HALVES > 1 ? unit / (2 * in.steps) : 0;
        const int band = (half * (ROWS / HALVES) + row) / SIXTEEN;
        copy_async_once(to + band * in.band_bytes + (unit / 2 - half * in.steps) * INSIDE_TILE +
                            inside_at(row % SIXTEEN, unit % 2),
                        rows.from ? rows.from + (size_t)row * rows.R : in.x, rows.from);
    });
    copy_commit();
}

/* sum [16, TOKENS] of a warp = a band of B times h. For sixteen tokens that is done with each adapter from
 * the lowest to the highest of theirs, so that it is well to have those of an adapter side by side. */
template <int TOKENS, int ROWS, int HALVES>
static inline __device__ void multiply_band(float (&sum)[TOKENS / 2], const struct lora_inside &in,
                                            const struct inside_shared *shared, int band)
{
    const int lane = threadIdx.x % WARP, half = band / (ROWS / HALVES / SIXTEEN);
    const uint32_t h = shared->room + in.b_bytes +
                       half * in.tiles_a_slice * (H_PARTS * TOKENS * INSIDE_ROW) +
                       inside_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const uint32_t b = shared->room + band * in.band_bytes + inside_at(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sum[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
        const signed char *of = &shared->segment[j * 8 + lane / 4];
        const int of_first = of[0], of_second = of[8];
        const int lowest = shared->lowest[j / 2], end = shared->highest[j / 2] + 1;
#pragma unroll 1
        for (int tile = 0; tile < in.tiles_a_slice; tile++) {
            uint32_t h_part[H_PARTS][4];
#pragma unroll
            for (int i = 0; i < H_PARTS; i++)
                load_matrices(h_part[i], h + (tile * H_PARTS + i) * (TOKENS * INSIDE_ROW) +
                                             j * (8 * INSIDE_ROW));
            uint32_t b_at = b + (lowest * in.tiles_a_slice + tile) * INSIDE_TILE, next[4];
            if (lowest < end) load_matrices(next, b_at);
#pragma unroll 1
            for (int segment = lowest; segment < end; segment++) {
                const uint32_t b_part[4] = {next[0], next[1], next[2], next[3]};
                if (segment + 1 < end) load_matrices(next, b_at += in.tiles_a_slice * INSIDE_TILE);
                const uint32_t first = segment == of_first ? ~0u : 0;
                const uint32_t second = segment == of_second ? ~0u : 0;
#pragma unroll
                for (int i = 0; i < H_PARTS; i++) {
                    mma_bf16(sum + 4 * j, b_part, h_part[i][0] & first, h_part[i][1] & first);
                    mma_bf16(sum + 4 * j + 4, b_part, h_part[i][2] & second, h_part[i][3] & second);
                }
            }
        }
    }
}

/* Where a lane's pair i of a band's sums [16, TOKENS] is, in the order of mma_bf16() with eight tokens
 * after eight: those of a product's four neighbouring rows lie in different banks. */
template <int TOKENS> static inline __device__ float2 *sums_at(uint32_t sums, int lane, int i)
{
    const int row = lane / 4 + i % 2 * 8, t = i / 2 * 8 + lane % 4 * 2;
    const int turned = TOKENS > SIXTEEN ? row % 4 * 8 : row / 2 % 2 * 8;
    return (float2 *)__cvta_shared_to_generic(sums + (row * TOKENS + (t ^ turned)) * 4);
}

/* B times h for the block's rows, put in the place of B. */
template <int TOKENS, int ROWS, int HALVES>
static inline __device__ void multiply_inside(const struct lora_inside &in, int thread,
                                              const struct inside_shared *shared)
{
    const int lane = thread % WARP;
#pragma unroll 1
    for (int band = thread / WARP; band < ROWS / SIXTEEN; band += INSIDE_WARPS) {
        float sum[TOKENS / 2];
        multiply_band<TOKENS, ROWS, HALVES>(sum, in, shared, band);
        __syncwarp(); /* the band has been read */
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++)
            *sums_at<TOKENS>(shared->room + band * in.band_bytes, lane, i) =
                make_float2(sum[2 * i], sum[2 * i + 1]);
    }
}

/* sum [64, TOKENS] of a warpgroup += what has been put there for this warp's rows. */
template <int TOKENS>
static inline __device__ void add_inside(float (&sum)[TOKENS / 2], const struct lora_inside &in,
                                         const struct inside_shared *shared, int band)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < TOKENS / 4; i++) {
        const float2 two = *sums_at<TOKENS>(shared->room + band * in.band_bytes, lane, i);
        sum[2 * i] += two.x, sum[2 * i + 1] += two.y;
    }
}

/* Whose the tokens are. */
template <int HALVES>
static inline __device__ void find_tokens(const struct lora_inside &in, int slice, int thread,
                                          struct inside_shared *shared)
{
    const struct lora_args &args = in.args;
    const int n = min_int(args.n_tokens, args.segment_start[args.n_segments]);

    if (thread < INSIDE_TOKENS) {
        shared->segment[thread] = -1;
        shared->rank[0][thread] = shared->rank[1][thread] = 0;
    }
    inside_sync();
    for (int i = thread; i < n; i += INSIDE_BLOCK) {
        int segment = 0;
        while (i >= args.segment_start[segment + 1]) segment++;
        const int slot = args.segment_slot[segment], t = args.order[i];
        if (slot < 0) continue;
        shared->segment[t] = segment;
        for (int half = 0; half < HALVES; half++) {
            const struct lora_factors *f = lora_factors_of(args, slot, slice + half);
            shared->rank[half][t] = f->a ? f->R : 0;
        }
    }
    inside_sync();
    const int own = thread < INSIDE_TOKENS ? shared->segment[thread] : -1;
    int lowest = own < 0 ? INSIDE_STEPS : own, highest = own;
#pragma unroll
    for (int lane = SIXTEEN / 2; lane > 0; lane /= 2) {
        lowest = min_int(lowest, __shfl_xor_sync(~0u, lowest, lane));
        highest = max_int(highest, __shfl_xor_sync(~0u, highest, lane));
    }
    if (thread < INSIDE_TOKENS && thread % SIXTEEN == 0) {
        shared->lowest[thread / SIXTEEN] = lowest;
        shared->highest[thread / SIXTEEN] = highest;
    }
}

static inline __device__ int slice_of(const struct lora_args &args, int n0)
{
    int slice = 0;
    while (slice + 1 < args.n_slices && n0 >= args.offset[slice + 1]) slice++;
    return slice;
}

/* The first unit of h that a block makes; the others follow in steps of n_blocks. */
static inline __device__ int first_unit(const struct lora_inside &in, int block)
{
    return block < in.n_blocks ? (block - in.first + in.n_blocks) % in.n_blocks : in.n_units;
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

/* What these warps do in a block. Where `owns`, it has rows of y from n0 on: ROWS, or half as many of
 * each of two slices; and `ready` is told when what add_inside() reads is there. */
template <int TOKENS, int ROWS, int HALVES>
static inline __device__ void lora_work(const struct lora_inside &in, int thread,
                                        struct inside_shared *shared, bool owns, int n0)
{
    const struct lora_args &args = in.args;

    if (thread >= INSIDE_BLOCK) {
        keep_exchange(in, thread - INSIDE_BLOCK, shared);
        return;
    }
    if (owns) {
        const int slice = slice_of(args, n0);
        const struct b_rows rows = find_b<HALVES>(in, slice, n0 - args.offset[slice], thread);
        shared->b[thread] = rows;
        if (rows.from && first_unit(in, blockIdx.x) < in.n_units)
            for_b<HALVES>(in, ROWS / HALVES, thread,
                          [&](int row, int) { prefetch_line(rows.from + (size_t)row * rows.R); });
        find_tokens<HALVES>(in, slice, thread, shared);
    }
    int unit = first_unit(in, blockIdx.x), stride = in.n_blocks;
#pragma unroll 1
    for (;;) {
#pragma unroll 1
        for (; unit < in.n_units; unit += stride)
            shrink_inside(in, unit, anew(thread), shared,
                          shared->room - (stride > 1 ? 0 : 2 * INSIDE_STAGED));
        if (!owns) return;
        fetch_b<ROWS, HALVES>(in, shared->b[thread], anew(thread), shared->room);
        barrier_wait(shared_address(&shared->turn_known), 0);
        const bool is_there =
            take_h<TOKENS, HALVES>(in, slice_of(args, anew(n0)), anew(thread), shared,
                                   in.exchange->h[shared->turn], shared->room + in.b_bytes);
        copy_wait<0>();
        inside_sync(); /* B and h are there */
        if (is_there) break;
        /* Who is to make it may wait for a multiprocessor that others' kernels hold: make all of it,
         * through the end of the ring. */
        barrier_wait(shared_address(&shared->idle), 0);
        unit = 0, stride = 1;
    }
    multiply_inside<TOKENS, ROWS, HALVES>(in, anew(thread), shared);
    barrier_arrive(shared_address(&shared->ready));
}

#endif
#endif
