/* The draw of a row in one reading, begun before its largest logit is known, and for top_p a
 * second. With noise -log(E), E = -log(u) of the token, the draw is a race: the token whose
 * E e^(-logit / temperature) is least wins. A few tokens of a block set a bar. Since E > 1 - u, a
 * token with 1 - u above e^(logit / temperature - bar) stays below it, and nothing more is computed
 * of most. The others are looked at exactly, in the order in which they come in; for top_p each is
 * kept or not by the sum of what is more likely. Sums are floats: where they leave it open, and
 * where the bar tells little, the row is drawn another way, with the same result. */
#ifndef MLORA_KERNELS_CUDA_RACE_CUH
#define MLORA_KERNELS_CUDA_RACE_CUH

#include "kernels/cuda/draw.cuh"
#include "kernels/cuda/wanted.cuh"

#include <type_traits>

#ifdef __CUDACC__

enum {
    ROW_WARPS = ROW_BLOCK / WARP,
    TRIED = 3, /* tokens whose sums are made in one reading */
    TURNS = 4,
};

/* How far rounding may shift a base-2 logarithm of those used here, and up to which size of them. */
static constexpr float RACE_SLACK = 0.06f, RACE_RANGE = 32768.0f;

/* What a block has seen of its part. */
struct race_seen {
    float max;        /* NaN where a logit is */
    float bar;        /* base-2 logarithm; no token that is not in `fours` reaches it */
    unsigned n_fours; /* ROW_BLOCK at most, if they fit */
};

/* A token that reaches the row's bar. */
struct alignas(16) racer {
    struct candidate noisy;
    float logit;
};

struct race_memory {
    struct race_seen seen;
    float of_warp[2][ROW_WARPS];
    int fours[ROW_BLOCK]; /* multiples of four: a token of the four may reach the bar */
    unsigned n_own;
    struct racer own[ROW_BLOCK]; /* of this block; other blocks read it */
    struct racer first_of_warp[ROW_WARPS][TRIED];
    struct racer tried[TRIED]; /* in the order in which they come in */
    float sums_of_warp[ROW_WARPS][TRIED + 1];
    float sums[2][PARTS_MAX][TRIED + 1]; /* of all blocks, for this turn and the next */
};

/* log2(x) in one instruction; -infinity for 0. */
static inline __device__ float fast_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 + word / 2^32, rounded down to 23 bits. */
static inline __device__ float one_and(uint32_t word)
{
    return __uint_as_float(0x3f800000u + (word >> 9));
}

/* Groups of four of a thread, which come by AHEAD that lie far from each other. */
struct places {
    int first, step, n;

    __device__ int token(int i, int j) const
    {
        return first + (i + j * n) * step;
    }

    __device__ void load(float (&fours)[AHEAD][4], const struct row_part &part, int i) const
    {
#pragma unroll
        for (int j = 0; j < AHEAD; j++) load_four(fours[j], part, token(i, j));
    }
};

static __device__ struct places places_of(const struct row_part &part)
{
    const int step = part.parts * ROW_BLOCK * 4;
    return {(part.part * ROW_BLOCK + (int)threadIdx.x) * 4, step,
            ceil_div(ceil_div(part.V, step), AHEAD)};
}

static __device__ void copy_fours(float (&to)[AHEAD][4], const float (&from)[AHEAD][4])
{
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) to[j][k] = from[j][k];
}

/* Look at the block's part: race->seen and race->fours. The bar is the n-th best of the warps' best
 * tokens among the first groups of four, which lie at AHEAD places of the row. */
static __forceinline__ __device__ void race_part(struct race_memory *race,
                                                 const struct row_part &part,
                                                 const struct wanted_row &row, float per_logit,
                                                 int n_bar)
{
    const uint64_t seed = row.sampling->seed;
    const uint32_t draw = row.sampling->draw;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const struct places places = places_of(part);
    float fours[AHEAD][4], next[AHEAD][4], max = -INFINITY, bar = -INFINITY;

    const auto look = [&](int i, auto is_first) {
        uint32_t words[AHEAD][4];
        float top[AHEAD], u[AHEAD];
        bool reaches[AHEAD], any = false;
        copy_fours(fours, next);
        if (i + 1 < places.n) places.load(next, part, i + 1);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const float(&x)[4] = fours[j];
            row.penalize(places.token(i, j), fours[j]);
            philox4x32(words[j], (uint32_t)places.token(i, j) / 4, draw, seed);
            top[j] = larger_or_nan(larger_or_nan(x[0], x[1]), larger_or_nan(x[2], x[3]));
            u[j] = one_and(min(min(words[j][0], words[j][1]), min(words[j][2], words[j][3])));
            max = larger_or_nan(max, top[j]);
        }
        if (is_first.value) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    /* w is at least 1 - u; up to 1/2, E is at most w + w^2. */
                    const float w = one_and(words[j][k]) - (1.0f - 0x1p-23f);
                    const float reached = fmaf(fours[j][k], per_logit, -fast_log2(fmaf(w, w, w)));
                    if (w <= 0.5f) bar = fmaxf(bar, reached);
                }
            for (int s = WARP / 2; s > 0; s /= 2) bar = fmaxf(bar, __shfl_xor_sync(~0u, bar, s));
            if (lane == 0) race->of_warp[0][warp] = bar;
            __syncthreads();
            const float mine = lane < ROW_WARPS ? race->of_warp[0][lane] : -INFINITY;
            int before = 0;
#pragma unroll
            for (int w = 0; w < ROW_WARPS; w++) {
                const float other = __shfl_sync(~0u, mine, w);
                before += other > mine || (other == mine && w < lane);
            }
            bar = __shfl_sync(~0u, mine, __ffs(__ballot_sync(~0u, before == n_bar - 1)) - 1);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            reaches[j] = u[j] <= 1.0f + fast_exp2(fmaf(top[j], per_logit, RACE_SLACK - bar));
            any |= reaches[j];
        }
        if (!any) return;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (!reaches[j]) continue;
            const unsigned at = atomicAdd(&race->seen.n_fours, 1u);
            if (at < ROW_BLOCK) race->fours[at] = places.token(i, j);
        }
    };

    if (threadIdx.x == 0) race->seen.n_fours = 0, race->n_own = 0;
    places.load(next, part, 0);
    look(0, std::true_type());
#pragma unroll 1
    for (int i = 1; i < places.n; i++) look(i, std::false_type());
    for (int s = WARP / 2; s > 0; s /= 2) max = larger_or_nan(max, __shfl_xor_sync(~0u, max, s));
    if (lane == 0) race->of_warp[1][warp] = max;
    __syncthreads();
    if (threadIdx.x < WARP) {
        max = race->of_warp[1][lane % ROW_WARPS];
        for (int s = ROW_WARPS / 2; s > 0; s /= 2)
            max = larger_or_nan(max, __shfl_xor_sync(~0u, max, s));
        if (lane == 0) race->seen.max = max, race->seen.bar = bar;
    }
    cluster_sync();
}

/* The same of the row. n_fours: of this block, ROW_BLOCK + 1 where one's did not fit. */
static __device__ struct race_seen race_seen_by_all(struct race_memory *race,
                                                    const struct row_part &part)
{
    const int lane = threadIdx.x % WARP;
    struct race_seen all = cluster_block(race, lane < part.parts ? lane : part.part)->seen;

    for (int s = WARP / 2; s > 0; s /= 2) {
        all.max = larger_or_nan(all.max, __shfl_xor_sync(~0u, all.max, s));
        all.bar = fmaxf(all.bar, __shfl_xor_sync(~0u, all.bar, s));
    }
    const bool fits = __all_sync(~0u, all.n_fours <= ROW_BLOCK);
    all.n_fours = fits ? race->seen.n_fours : ROW_BLOCK + 1;
    return all;
}

/* Call each(racer) for this thread's tokens that reach the row's bar and that min_p keeps. */
template <typename Each>
static __forceinline__ __device__ void
for_racers(const struct race_memory *race, const struct row_part &part,
           const struct wanted_row &row, float per_logit, const struct race_seen &seen, Each &&each)
{
    const struct sampling &sampling = *row.sampling;
    if (threadIdx.x >= seen.n_fours) return;
    const int v = race->fours[threadIdx.x];
    float four[4];
    uint32_t words[4];

    load_four(four, part, v);
    row.penalize(v, four);
    philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (!(one_and(words[k]) <=
              1.0f + fast_exp2(fmaf(four[k], per_logit, RACE_SLACK - seen.bar))))
            continue;
        const float z = row.scaled(four[k]);
        if (z == -INFINITY || (sampling.min_p > 0.0f && expf(z) < sampling.min_p)) continue;
        const float y = z + gumbel(words[k]);
        if (fmaf(y, LOG2_E, row.max * per_logit) < seen.bar - 0.5f * RACE_SLACK) continue;
        each(racer{{y, v + k}, four[k]});
    }
}

static inline __device__ struct racer no_racer()
{
    return {{-INFINITY, INT32_MAX}, -INFINITY};
}

/* Deal all blocks' own racers out to the threads of each block. False where they are too many. */
static __device__ bool deal_racers(struct racer *mine, struct race_memory *race,
                                   const struct row_part &part)
{
    cluster_sync();
    const int room = ROW_BLOCK / part.parts; /* of each block */
    const int p = min_int((int)threadIdx.x / room, part.parts - 1), at = threadIdx.x - p * room;
    const struct race_memory *other = cluster_block(race, p);
    const int n = (int)other->n_own;
    *mine = other->own[at];
    if (at >= min_int(n, room)) *mine = no_racer();
    return __syncthreads_and(n <= room);
}

/* The lane whose candidate is the warp's best. */
static __device__ int best_lane(struct candidate mine)
{
    const unsigned key = sort_key(mine.value), best = __reduce_max_sync(~0u, key);
    const int id = __reduce_min_sync(~0u, key == best ? mine.id : INT32_MAX);
    return __ffs(__ballot_sync(~0u, key == best && mine.id == id)) - 1;
}

/* The first of the threads' racers whose logit is above `floor`, to race->tried. */
static __device__ void choose_tried(struct race_memory *race, const struct racer &mine, float floor)
{
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    struct racer left = mine.logit > floor ? mine : no_racer();

#pragma unroll
    for (int c = 0; c < TRIED; c++)
        if (lane == best_lane(left.noisy)) race->first_of_warp[warp][c] = left, left = no_racer();
    __syncthreads();
    if (warp == 0) {
        int c_of_warp = 0; /* of warp `lane` */
#pragma unroll
        for (int c = 0; c < TRIED; c++) {
            left = lane < ROW_WARPS ? race->first_of_warp[lane][c_of_warp] : no_racer();
            if (lane == best_lane(left.noisy)) race->tried[c] = left, c_of_warp++;
        }
    }
    __syncthreads();
}

/* For each token that is tried, the sum of the weights of greater logits; last, of all. */
static __forceinline__ __device__ void sum_tried(struct race_memory *race, float (&sums)[TRIED + 1],
                                                 const struct row_part &part,
                                                 const struct wanted_row &row, float per_logit,
                                                 int turn)
{
    const struct places places = places_of(part);
    const float offset = -row.max * per_logit;
    float tried[TRIED], fours[AHEAD][4], next[AHEAD][4];

#pragma unroll
    for (int c = 0; c < TRIED; c++) sums[c] = 0.0f, tried[c] = race->tried[c].logit;
    sums[TRIED] = 0.0f;
    places.load(next, part, places.n - 1);
#pragma unroll 1
    for (int i = places.n - 1; i >= 0; i--) { /* what has been read last may still be near */
        copy_fours(fours, next);
        if (i > 0) places.load(next, part, i - 1);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            row.penalize(places.token(i, j), fours[j]);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float weight = fast_exp2(fmaf(fours[j][k], per_logit, offset));
                sums[TRIED] += weight;
#pragma unroll
                for (int c = 0; c < TRIED; c++)
                    if (fours[j][k] > tried[c]) sums[c] += weight;
            }
        }
    }
#pragma unroll
    for (int c = 0; c <= TRIED; c++) {
        const float sum = warp_sum(sums[c]);
        if (threadIdx.x % WARP == 0) race->sums_of_warp[threadIdx.x / WARP][c] = sum;
    }
    __syncthreads();
    if (threadIdx.x <= TRIED) {
        float sum = 0.0f;
        for (int w = 0; w < ROW_WARPS; w++) sum += race->sums_of_warp[w][threadIdx.x];
        for (int p = 0; p < part.parts; p++)
            cluster_block(race, p)->sums[turn % 2][part.part][threadIdx.x] = sum;
    }
    cluster_sync();
#pragma unroll
    for (int c = 0; c <= TRIED; c++) {
        sums[c] = 0.0f;
        for (int p = 0; p < part.parts; p++) sums[c] += race->sums[turn % 2][p][c];
    }
}

/* The first of the threads' racers that top_p keeps, or -1: none is known. */
static __forceinline__ __device__ int first_kept(struct race_memory *race, const struct racer &mine,
                                                 const struct row_part &part,
                                                 const struct wanted_row &row, float per_logit)
{
    float floor = -INFINITY; /* logits up to it are not kept */
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn++) {
        choose_tried(race, mine, floor);
        if (row.sampling->top_p >= 1.0f || race->tried[0].noisy.id == INT32_MAX)
            return race->tried[0].noisy.id == INT32_MAX ? -1 : race->tried[0].noisy.id;
        float sums[TRIED + 1];
        sum_tried(race, sums, part, row, per_logit, turn);
        const float share = row.sampling->top_p * sums[TRIED];
        /* What rounding does to weights, to a thread's sums, and to whole numbers of 2^-31. */
        const int of_thread = ceil_div(part.V, part.parts * ROW_BLOCK);
        const float unsure =
            (1e-5f + 0x1p-24f * (float)of_thread) * sums[TRIED] + 0x1p-31f * (float)part.V;
        for (int c = 0; c < TRIED && race->tried[c].noisy.id < INT32_MAX; c++) {
            if (sums[c] == 0.0f || sums[c] < share - unsure) return race->tried[c].noisy.id;
            if (sums[c] <= share + unsure) return -1;
            floor = fmaxf(floor, race->tried[c].logit);
        }
        __syncthreads();
    }
    return -1;
}

/* ids[q] = the token drawn from the row; false where it is to be drawn another way. All threads of
 * the cluster call it and get the same answer. PLAIN: the row is whole and has no penalties.
 * `candidates` [WARP + PARTS_MAX]. */
template <bool PLAIN>
static __device__ bool race_wins(int32_t *id, struct race_memory *race,
                                 struct candidate *candidates, struct row_part part,
                                 struct wanted_row row)
{
    const struct sampling &sampling = *row.sampling;
    const bool all_are_kept = sampling.top_p >= 1.0f && sampling.min_p <= 0.0f;
    const bool writes = part.part == 0 && threadIdx.x == 0;
    const float per_logit = LOG2_E / row.temperature;
    if (PLAIN) part.whole = true, row.touched = NULL;

    race_part(race, part, row, per_logit, all_are_kept ? 1 : TRIED);
    const struct race_seen seen = race_seen_by_all(race, part);
    const bool damaged = !(seen.max < INFINITY) || seen.max == -INFINITY;
    row.max = seen.max;
    if (damaged && writes) *id = -1;
    if (damaged || seen.n_fours > ROW_BLOCK || !(fabsf(row.max * per_logit) <= RACE_RANGE)) {
        cluster_sync(); /* all have read what the others have seen */
        return damaged;
    }
    if (all_are_kept) {
        struct candidate best = {-INFINITY, INT32_MAX};
        for_racers(race, part, row, per_logit, seen,
                   [&](const struct racer &racer) { best = better(best, racer.noisy); });
        best = cluster_largest(candidates, best, part);
        if (writes) *id = best.id;
        return true;
    }
    for_racers(race, part, row, per_logit, seen, [&](const struct racer &racer) {
        const unsigned at = atomicAdd(&race->n_own, 1u);
        if (at < ROW_BLOCK) race->own[at] = racer;
    });
    struct racer mine;
    const bool fits = deal_racers(&mine, race, part);
    const int kept = fits ? first_kept(race, mine, part, row, per_logit) : -1;
    if (kept >= 0 && writes) *id = kept;
    cluster_sync(); /* all have read the others' lists, and the memory may be used again */
    return kept >= 0;
}

#endif
#endif
