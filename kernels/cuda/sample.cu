/* The next token of each row, as kernels/cpu/sample.c defines it. A cluster of blocks a row. Bound
 * by reading the logits, and by making the random words of all tokens. Most rows are drawn in one
 * reading, with top_p in two: race.cuh. Others are read (from L2) two to four times: for the
 * largest, for how they are distributed over bins, and for the draw; what lies in the bin where
 * top_k or top_p end is set aside and looked at last. */
#include "kernels/cuda/race.cuh"

#include <float.h>

/* ---- kernels ------------------------------------------------------------------------------ */

/* Mark and count the row's history. `touched` [V] bits in each block's shared memory, `counts`
 * [V] by the first block. */
static __device__ void count_history(uint32_t *touched, int32_t *counts, const int32_t *history,
                                     int n_history, int n_prompt, int V, int part)
{
    for (int i = threadIdx.x; i < ceil_div(V, 32); i += ROW_BLOCK) touched[i] = 0;
    if (part == 0)
        for (int i = threadIdx.x; i < n_history; i += ROW_BLOCK) counts[history[i]] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_history; i += ROW_BLOCK)
        atomicOr(&touched[history[i] / 32], 1u << history[i] % 32);
    if (part == 0)
        for (int i = n_prompt + threadIdx.x; i < n_history; i += ROW_BLOCK)
            atomicAdd(&counts[history[i]], 1);
    cluster_sync();
}

/* What a first look at the row tells. */
struct extremes {
    struct candidate best; /* id: the first of its group of four */
    float least;           /* of those above -infinity */
    bool damaged;          /* a logit is NaN or +infinity */
};

static __device__ struct extremes block_extremes(const struct row_part &part,
                                                 const struct wanted_row row)
{
    struct extremes mine = {{-INFINITY, part.V}, INFINITY, false};
    for_fours<FAR_AHEAD>(part, [&](int v, float(&four)[4]) {
        row.penalize(v, four);
        const float top =
            larger_or_nan(larger_or_nan(four[0], four[1]), larger_or_nan(four[2], four[3]));
        const float low = fminf(fminf(four[0], four[1]), fminf(four[2], four[3]));
        if (top > mine.best.value) mine.best = {top, v};
        mine.damaged |= !(top < INFINITY); /* NaN too */
        if (low > -INFINITY) {
            mine.least = fminf(mine.least, low);
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (four[i] > -INFINITY) mine.least = fminf(mine.least, four[i]);
    });
    return mine;
}

/* The lowest token of the best's group of four that is as large. */
static __device__ int best_of_four(const struct row_part &part, const struct wanted_row row,
                                   struct candidate best)
{
    float four[4];
    load_four(four, part, best.id);
    row.penalize(best.id, four);
    for (int i = 3; i >= 0; i--)
        if (four[i] == best.value) best.id = best.id / 4 * 4 + i;
    return best.id;
}

/* The cluster's, for every thread. `memory` [WARP + 1]; other blocks read it until the cluster's
 * next barrier. */
static __device__ struct extremes cluster_extremes(struct extremes *memory, struct extremes mine,
                                                   int parts)
{
    const auto join = [](struct extremes *to, struct extremes other) {
        to->best = better(to->best, other.best);
        to->least = fminf(to->least, other.least);
        to->damaged |= other.damaged;
    };
    const auto over_warp = [](struct extremes of) {
        of.best = warp_largest(of.best);
        for (int step = WARP / 2; step > 0; step /= 2)
            of.least = fminf(of.least, __shfl_xor_sync(~0u, of.least, step));
        of.damaged = __any_sync(~0u, of.damaged);
        return of;
    };

    mine = over_warp(mine);
    if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = mine;
    __syncthreads();
    if (threadIdx.x < WARP) {
        if (threadIdx.x < ROW_BLOCK / WARP) mine = memory[threadIdx.x];
        mine = over_warp(mine);
        if (threadIdx.x == 0) memory[WARP] = mine;
    }
    cluster_sync();
    mine = memory[WARP];
    for (int p = 0; p < parts; p++) join(&mine, *cluster_block(&memory[WARP], p));
    return mine;
}

/* The few that can be drawn, where they are few: of the cluster's first block. */
enum { FEW = 512, FEW_WANTED = 384 };

struct few_memory {
    struct candidate list[FEW];
    unsigned weight[FEW];
    unsigned n, kept;       /* kept: sort key of the smallest */
    unsigned long long all; /* weight of what top_k keeps */
    unsigned bound;         /* of each block: a sort key, see reached_by() */
};

static __device__ unsigned likelihood(float z)
{
    return __float2uint_rn(expf(z) * 0x1p31f);
}

/* A number that at least `wanted` of the row's logits reach, and not many more where they lie in
 * no order: that many threads have one so large. `mine` is a thread's largest. */
static __device__ float reached_by(struct few_memory *few, float mine, int wanted,
                                   const struct row_part &part)
{
    const bool all_blocks = part.V >= part.parts * ROW_BLOCK * 4; /* have logits in each thread */
    const int of_block = all_blocks ? ceil_div(wanted, part.parts) : wanted;
    const unsigned key = sort_key(mine);
    unsigned bound = 0;
    for (unsigned bit = 1u << 31; bit >= 1u << 12; bit /= 2)
        if (__syncthreads_count(key >= (bound | bit)) >= of_block) bound |= bit;
    if (threadIdx.x == 0) {
        few->bound = bound;
        few->n = 0;
        few->kept = ~0u;
        few->all = 0;
    }
    cluster_sync();
    for (int p = 0; p < part.parts; p++) {
        const unsigned other = cluster_block(few, p)->bound;
        bound = all_blocks ? min(bound, other) : max(bound, other);
    }
    return bound > sort_key(-INFINITY) ? from_sort_key(bound) : -INFINITY;
}

/* Draw from the list, in the first block: the smallest of its values that top_k, then top_p
 * keep, by comparing each with all, then the best of those with their noise. */
static __device__ struct candidate draw_few(struct few_memory *few, const struct sampling &sampling)
{
    const int n = (int)few->n, i = threadIdx.x;
    const struct candidate mine = i < n ? few->list[i] : candidate{-INFINITY, 0};
    unsigned greater = 0;
    unsigned long long before = 0;

    if (i < n) few->weight[i] = likelihood(mine.value);
    __syncthreads();
    if (i < n) {
        for (int j = 0; j < n; j++)
            if (few->list[j].value > mine.value) {
                greater++;
                before += few->weight[j];
            }
        if (greater < (unsigned)sampling.top_k) {
            atomicMin(&few->kept, sort_key(mine.value));
            atomicAdd(&few->all, (unsigned long long)few->weight[i]);
        }
    }
    __syncthreads();
    bool keep = i < n && sort_key(mine.value) >= few->kept;
    if (sampling.top_p < 1.0f) {
        const unsigned long long wanted =
            (unsigned long long)((double)sampling.top_p * (double)few->all);
        keep = keep && before < (wanted > 0 ? wanted : 1);
    }
    if (sampling.min_p > 0.0f) keep = keep && expf(mine.value) >= sampling.min_p;
    if (!keep) return {-INFINITY, INT32_MAX};
    return {noisy(mine.value, mine.id, sampling), mine.id};
}

/* Gather what top_k may keep in the first block's list. False where that is too much. */
static __device__ bool gather_few(struct few_memory *few, const struct row_part &part,
                                  const struct wanted_row row, float least)
{
    struct few_memory *shared = cluster_block(few, 0);
    const float least_z = row.scaled(least); /* -infinity: all */

    for_fours(part, [&](int v, float(&four)[4]) {
        row.penalize(v, four);
        /* Nothing is below `least` but what rounding makes equal. */
        const float largest = fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3]));
        if (row.scaled(largest) < least_z) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float z = row.scaled(four[i]);
            if (z < least_z || z == -INFINITY) continue;
            const unsigned at = atomicAdd(&shared->n, 1u);
            if (at < FEW) shared->list[at] = {z, v + i};
        }
    });
    cluster_sync();
    const bool fits = shared->n <= FEW;
    cluster_sync(); /* the first block may end */
    return fits;
}

/* Which logits can be drawn, by how far they lie below the largest, in widths of a bin. */
struct cut {
    float per_bin;
    float sure;  /* nearer than that: they can */
    float end;   /* not nearer: they cannot. Between: those of the last bin, some can */
    float floor; /* logits below this cannot, either */

    __device__ float place(float max, float logit) const
    {
        return (max - logit) * per_bin;
    }
};

/* Bins for the truncation of a row: of its likely part. */
static __device__ struct cut cut_of(const struct wanted_row &row, bool by_number)
{
    /* What is under half of an even share of 1 - top_p is not among the most likely that make up
     * top_p, as in the CPU's: even where the largest is all there is. */
    const struct sampling &sampling = *row.sampling;
    const float depth =
        by_number ? FAR * fmaxf(row.temperature, 1.0f)
                  : row.temperature * (0.1f - logf(0.5f * (1.0f - sampling.top_p) / row.V));
    const float bottom = fmaxf(row.least, row.max - depth);
    return {bottom < row.max ? (BINS - 1) / (row.max - bottom) : 0.0f, INFINITY, INFINITY,
            -INFINITY};
}

/* Bins of the row for top_k, where what lies below all bins is in the last, or top_p; and where
 * the truncation ends in them, to *cut. */
static __device__ void find_cut(struct select_memory *memory, struct cut *cut,
                                const struct row_part &part, const struct wanted_row row,
                                bool by_number)
{
    const struct cut bins = cut_of(row, by_number);

    if (threadIdx.x == 0) {
        memory->above = 0;
        memory->wanted = by_number ? row.sampling->top_k : 1;
    }
    fill_bins(
        memory, part, [&](int v, float(&four)[4]) { row.penalize(v, four); },
        [&](float logit) {
            const float place = bins.place(row.max, logit);
            return by_number || place < BINS ? (int)fminf(place, BINS - 1) : (int)BINS;
        },
        [&](float logit) { return !by_number          ? row.weight(logit)
                                  : logit > -INFINITY ? 1u
                                                      : 0u; });
    find_bin(memory, part.parts, by_number ? 0.0 : (double)row.sampling->top_p);
    if (threadIdx.x == 0) {
        const float sure = (float)memory->bin;
        *cut = bins;
        cut->sure = sure;
        cut->end = by_number && memory->bin == BINS - 1 ? INFINITY : sure + 1.0f;
    }
    __syncthreads();
}

/* The smallest logit that top_k, and of these top_p, keep of the row, or of a list of its logits. */
static __device__ float kept_from(struct select_memory *memory, const struct row_part &part,
                                  const struct wanted_row row, bool by_number, bool by_weight)
{
    unsigned long long n_reached;
    float floor = -INFINITY;

#pragma unroll 1
    for (int by = by_number ? 0 : 1; by <= (by_weight ? 1 : 0); by++)
        floor = smallest_kept(
            memory, part, floor, row.least, row.max, FAR * fmaxf(row.temperature, 1.0f),
            by ? 1 : row.sampling->top_k, by ? (double)row.sampling->top_p : 0.0, &n_reached,
            [&](int v, float(&four)[4]) { row.penalize(v, four); },
            [&](float logit) { return by ? row.weight(logit) : 1u; });
    return floor;
}

/* Logits that top_k may keep of a block's part: each warp has `room` WARP places of its own, WARP
 * in every ROW_BLOCK. */
struct likely_list {
    float *values; /* [room, ROW_BLOCK] */
    int32_t *ids;  /* [room, ROW_BLOCK] */
    int room;
};

/* Gather what is nearer than cut.end. `most` is the block's. -1 where some warp has no room for it;
 * else how many rows of ROW_BLOCK places are used, the rest of which is -infinity. */
static __device__ int gather_likely(int *most, const struct likely_list &list,
                                    const struct row_part &part, const struct wanted_row row,
                                    const struct cut cut)
{
    const int lane = threadIdx.x % WARP, first = threadIdx.x - lane;
    int n = 0; /* of the warp; lanes that have come to the row's end do not count any more */

    if (threadIdx.x == 0) *most = 0;
    __syncthreads();
    for_fours(part, [&](int v, float(&four)[4]) {
        const int lanes = min_int(WARP, ceil_div(part.V - v + lane * 4, 4)); /* that are here */
        row.penalize(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool likely = cut.place(row.max, four[i]) < cut.end && four[i] > -INFINITY;
            const unsigned all = __ballot_sync(~0u >> (WARP - lanes), likely);
            const int mine = n + __popc(all & ((1u << lane) - 1));
            if (likely && mine < list.room * WARP) {
                const int at = mine / WARP * ROW_BLOCK + first + mine % WARP;
                list.values[at] = four[i];
                list.ids[at] = v + i;
            }
            n += __popc(all);
        }
    });
    __syncwarp();
    n = __shfl_sync(~0u, n, 0); /* the last lane to come to the end is the first */
    if (lane == 0) atomicMax(most, ceil_div(n, WARP));
    cluster_sync();
    bool fits = true;
    for (int p = 0; p < part.parts; p++) fits = fits && *cluster_block(most, p) <= list.room;
    const int used = *most;
    if (fits)
        for (int i = n + lane; i < used * WARP; i += WARP)
            list.values[i / WARP * ROW_BLOCK + first + i % WARP] = -INFINITY;
    cluster_sync(); /* the memory may be used again */
    return fits ? used : -1;
}

/* The best of this block's part, with noise, of those that `cut` keeps for sure; those of the last
 * bin are put in the first block's list. Noise is at most -log(1 - u): what cannot win by that, or
 * could not have some time before, is left out before its noise is made, all of it in fast
 * arithmetic with a margin. `bar_key`: sort key of the best value of this block so far. */
static __device__ struct candidate draw_row(struct select_memory *memory, unsigned *bar_key,
                                            const struct row_part &part,
                                            const struct wanted_row row, const struct cut cut)
{
    struct select_memory *shared = cluster_block(memory, 0);
    const struct sampling &sampling = *row.sampling;
    const float margin = 0.02f, inverse = 1.0f / row.temperature;
    struct candidate best = {-INFINITY, part.V};

    if (threadIdx.x == 0) *bar_key = sort_key(GUMBEL_MIN); /* the largest, 0, will have that */
    __syncthreads();
    for_fours(part, [&](int v, float(&four)[4]) {
        const float bar = from_sort_key(*(volatile unsigned *)bar_key) - margin;
        const float least = bar - GUMBEL_MAX;
        float about[4];
        bool any = false, in_last = false;
        row.penalize(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float place = cut.place(row.max, four[i]);
            const bool is_sure = place < cut.sure && four[i] >= cut.floor;
            in_last |= place >= cut.sure && place < cut.end;
            about[i] = is_sure ? (four[i] - row.max) * inverse : -INFINITY;
            any |= about[i] >= least;
        }
        if (in_last) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float place = cut.place(row.max, four[i]);
                if (place < cut.sure || !(place < cut.end) || four[i] == -INFINITY) continue;
                const unsigned at = atomicAdd(&shared->n_list, 1u);
                if (at < LIST) shared->list[at] = four[i], shared->ids[at] = v + i;
            }
        }
        if (!any) return;
        uint32_t words[4];
        philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* 1 + word / 2^32, rounded down in its 23 bits */
            const float u = __uint_as_float(0x3f800000u | words[i] >> 9);
            if (u > 1.000001f + __expf(about[i] - bar)) continue;
            const float z = row.scaled(four[i]);
            if (about[i] == -INFINITY || z == -INFINITY) continue;
            if (sampling.min_p > 0.0f && expf(z) < sampling.min_p) continue;
            best = better(best, {z + gumbel(words[i]), v + i});
            atomicMax(bar_key, sort_key(best.value));
        }
    });
    return best;
}

/* A value that is kept, with its noise. */
static __device__ struct candidate drawn(const struct wanted_row &row, float logit, int v)
{
    const struct sampling &sampling = *row.sampling;
    const float z = row.scaled(logit);
    if (z == -INFINITY || (sampling.min_p > 0.0f && expf(z) < sampling.min_p))
        return {-INFINITY, INT32_MAX};
    return {noisy(z, v, sampling), v};
}

/* The best of the list's logits from `floor` on, with noise. */
static __device__ struct candidate draw_list(const struct likely_list &list, int used,
                                             const struct wanted_row &row, float floor)
{
    struct candidate best = {-INFINITY, INT32_MAX};
    for (int i = threadIdx.x; i < used * ROW_BLOCK; i += ROW_BLOCK)
        if (list.values[i] >= floor) best = better(best, drawn(row, list.values[i], list.ids[i]));
    return best;
}

/* ids[q] = the token drawn from logits[q, :]
 *
 *   ids [Q]    logits [Q, V]    counts [Q, V] scratch
 *   grid (Q, 1, parts of a row), a cluster along z    block ROW_BLOCK
 *   shared V bits, then 2 room ROW_BLOCK numbers */
static __global__ void __launch_bounds__(ROW_BLOCK, 1)
    sample_kernel(int32_t *ids, const float *logits, int32_t *counts, const struct sample_view view,
                  int V, bool whole, int room)
{
    extern __shared__ __align__(16) uint32_t touched[];
    __shared__ union {
        struct select_memory select;
        struct few_memory few;
        struct race_memory race;
    } memory;
    __shared__ struct extremes extremes[WARP + 1];
    __shared__ struct candidate candidates[WARP + PARTS_MAX];
    __shared__ struct wanted_row wanted; /* what the passes need of the row, and registers do not */
    __shared__ struct cut cut;           /* hold from pass to pass                                */
    __shared__ unsigned bar_key;
    __shared__ int most;
    grid_begin();
    const int q = blockIdx.x;
    const struct row_part part = {logits + (size_t)q * V, V, whole, (int)blockIdx.z,
                                  (int)gridDim.z};
    const struct sampling &sampling = view.sampling[q];
    const int n_history = view.history_start[q + 1] - view.history_start[q];

    if (threadIdx.x == 0) {
        wanted = {n_history > 0 ? touched : NULL,
                  counts + (size_t)q * V,
                  &view.sampling[q],
                  0.0f,
                  0.0f,
                  sampling.temperature,
                  V};
        cut = {0.0f, INFINITY, INFINITY, -INFINITY};
    }
    __syncthreads();
    if (n_history > 0) /* the whole cluster */
        count_history(touched, counts + (size_t)q * V, view.history + view.history_start[q],
                      n_history, view.n_prompt[q], V, part.part);

    if (sampling.temperature > 0.0f && (sampling.top_k <= 0 || sampling.top_k >= V) &&
        (whole && n_history == 0
             ? race_wins<true>(&ids[q], &memory.race, candidates, part, wanted)
             : race_wins<false>(&ids[q], &memory.race, candidates, part, wanted)))
        return; /* the whole cluster */
    struct extremes row = block_extremes(part, wanted);
    const float mine = row.best.value;
    row = cluster_extremes(extremes, row, part.parts);
    if (row.damaged || row.best.value == -INFINITY || sampling.temperature <= 0.0f) {
        if (part.part == 0 && threadIdx.x == 0)
            ids[q] = row.damaged || row.best.value == -INFINITY
                         ? -1
                         : best_of_four(part, wanted, row.best);
        cluster_sync(); /* all have read the others' extremes */
        return;         /* the whole cluster */
    }

    if (threadIdx.x == 0) wanted.max = row.best.value, wanted.least = row.least;
    __syncthreads();
    const bool any_differs = row.least < row.best.value; /* else all equal the last one kept */
    const bool by_number = any_differs && sampling.top_k > 0 && sampling.top_k < V;
    const bool by_weight = any_differs && sampling.top_p < 1.0f;
    struct candidate best;
    if (by_number && sampling.top_k <= FEW_WANTED) {
        const float reached = reached_by(&memory.few, mine, sampling.top_k, part);
        if (gather_few(&memory.few, part, wanted, reached)) {
            if (part.part > 0) return; /* the whole block */
            best = block_largest(candidates, draw_few(&memory.few, sampling));
            if (threadIdx.x == 0) ids[q] = best.id;
            return;
        }
    }

    struct select_memory *select = &memory.select;
    const struct likely_list list = {(float *)(touched + ceil_div(V, 128) * 4),
                                     (int32_t *)(touched + ceil_div(V, 128) * 4) + room * ROW_BLOCK,
                                     room};
    int used = -1; /* of the list, where what can be drawn is there */
    if (by_number || by_weight) find_cut(select, &cut, part, wanted, by_number);
    if (by_number && by_weight) used = gather_likely(&most, list, part, wanted, cut);
#pragma unroll 1
    for (bool by_floor = by_number && by_weight;; by_floor = true) {
        if (by_floor) {
            struct row_part here = part;
            struct wanted_row as_it_is = wanted;
            if (used >= 0) {
                here = {list.values, used * ROW_BLOCK, true, part.part, part.parts, true};
                as_it_is.touched = NULL;
            }
            const float floor = kept_from(select, here, as_it_is, by_number, by_weight);
            if (threadIdx.x == 0) cut = {0.0f, INFINITY, INFINITY, floor};
            __syncthreads();
        }
        best = used < 0 ? draw_row(select, &bar_key, part, wanted, cut)
                        : draw_list(list, used, wanted, cut.floor);
        if (by_floor || !(by_number || by_weight)) break;

        cluster_sync();
        const unsigned n = cluster_block(select, 0)->n_list;
        cluster_sync();         /* all have read it */
        if (n > LIST) continue; /* too many are in the last bin */
        if (part.part == 0) {
            weigh_list(select, [&](float logit) { return by_number ? 1u : wanted.weight(logit); });
            for (int i = threadIdx.x; i < (int)n; i += ROW_BLOCK)
                if (list_keeps(select, i))
                    best = better(best, drawn(wanted, select->list[i], select->ids[i]));
        }
        break;
    }
    best = cluster_largest(candidates, best, part);
    if (part.part == 0 && threadIdx.x == 0) ids[q] = best.id;
}

/* ---- launchers ---------------------------------------------------------------------------- */

enum { VOCABULARY_MAX = 1 << 20 };

/* As many blocks a row as there are multiprocessors for, all rows at once. */
static int parts_of_row(struct cuda_device *cuda, int Q, size_t shared)
{
    int parts = cuda->is_hopper ? min_int(cuda->n_sms / Q, PARTS_MAX) : 1;
    for (; parts > 1; parts--) {
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = cluster.val.clusterDim.y = 1;
        cluster.val.clusterDim.z = parts;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(Q, 1, parts);
        config.blockDim = ROW_BLOCK;
        config.dynamicSmemBytes = shared;
        config.attrs = &cluster;
        config.numAttrs = 1;
        int at_once = 0;
        cuda_check(cuda, cudaOccupancyMaxActiveClusters(&at_once, sample_kernel, &config),
                   "sample");
        if (at_once >= Q) break;
    }
    return max_int(parts, 1);
}

void cuda_sample(struct device *dev, int32_t *ids, const float *logits,
                 const struct sample_view *view, int V)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || view->Q == 0) return;
    assert(V > 0 && V <= VOCABULARY_MAX);

    int32_t *counts = (int32_t *)cuda_scratch(cuda, (size_t)view->Q * V * sizeof *counts, "sample");
    if (!counts) return;
    int most = 0;
    cudaFuncAttributes kernel;
    cuda_check(
        cuda, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda->ordinal),
        "sample");
    cuda_check(cuda, cudaFuncGetAttributes(&kernel, sample_kernel), "sample");
    if (cuda->failure[0]) return;
    const int bits = ceil_div(V, 128) * 16, of_room = 2 * ROW_BLOCK * 4; /* bytes */
    const int room = (most - (int)kernel.sharedSizeBytes - bits) / of_room;
    const size_t shared = (size_t)bits + (size_t)max_int(room, 0) * of_room;
    cuda_check(cuda,
               cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared),
               "sample");
    const int parts = parts_of_row(cuda, view->Q, shared);
    cuda_launch(cuda, "sample", sample_kernel, dim3(view->Q, 1, parts), ROW_BLOCK, shared, parts,
                ids, logits, counts, *view, V, V % 4 == 0 && is_aligned(logits), max_int(room, 0));
}
