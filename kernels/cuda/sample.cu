/* The next token of each row, as kernels/cpu/sample.c defines it. A cluster of blocks a row. Bound
 * by reading the logits (from L2) two to six times, and by the arithmetic of each pass: what
 * can be drawn is gathered in the second where there is room for it. */
#include "kernels/cuda/select.cuh"

#include <float.h>

/* ---- kernels ------------------------------------------------------------------------------ */

/* philox4x32-10: random words as a pure function of a key and a counter (Salmon, Moraes, Dror and
 * Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011). */
static __device__ void philox4x32(uint32_t out[4], uint32_t c0, uint32_t c1, uint64_t key)
{
    uint32_t c2 = 0, c3 = 0, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t a_high = __umulhi(0xd2511f53u, c0), a_low = 0xd2511f53u * c0;
        const uint32_t b_high = __umulhi(0xcd9e8d57u, c2), b_low = 0xcd9e8d57u * c2;
        c0 = b_high ^ c1 ^ k0;
        c1 = b_low;
        c2 = a_high ^ c3 ^ k1;
        c3 = a_low;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* -log(-log(u)), u = 1 - (word + 1/2) / 2^32. The inner logarithm is taken from whichever of u
 * and 1 - u is small, which a float holds to its last bit. */
static __device__ float gumbel(uint32_t word)
{
    const float inner = word < 0x80000000u ? -log1pf(-((float)word + 0.5f) * 0x1p-32f)
                                           : -logf(((float)~word + 0.5f) * 0x1p-32f);
    return -logf(inner);
}

/* gumbel() is never above 22.87 nor below -3.14. */
static constexpr float GUMBEL_MAX = 22.9f, GUMBEL_MIN = -3.2f;

/* A row of logits as the request wants them. */
struct wanted_row {
    const uint32_t *touched; /* [V] bits: tokens of the history; NULL: no penalties */
    const int32_t *counts;   /* [V] of the touched ones: how often they are in the output */
    const struct sampling *sampling;
    float max, temperature;

    __device__ float penalized(int v, float logit) const
    {
        const float penalty = sampling->repetition_penalty;
        logit = logit > 0 ? logit / penalty : logit * penalty;
        const int32_t n = __ldcg(&counts[v]); /* the cluster's first block counted */
        if (n == 0) return logit;
        const float less =
            __fadd_rn(sampling->presence_penalty, __fmul_rn(sampling->frequency_penalty, (float)n));
        return __fsub_rn(logit, less);
    }

    /* The logits of v to v + 3, v a multiple of four. */
    __device__ void penalize(int v, float (&four)[4]) const
    {
        if (!touched) return;
        const unsigned bits = touched[v / 32] >> v % 32 & 15;
        if (bits == 0) return;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (bits >> i & 1) four[i] = penalized(v + i, four[i]);
    }

    __device__ float scaled(float penalized) const
    {
        return (penalized - max) / temperature;
    }
};

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

/* A value and its token. */
struct candidate {
    float value;
    int id;
};

static __device__ float noisy(float z, int v, const struct sampling &sampling)
{
    uint32_t words[4];
    philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
    const uint32_t low = v & 1 ? words[1] : words[0], high = v & 1 ? words[3] : words[2];
    return z + gumbel(v & 2 ? high : low);
}

static __device__ struct candidate better(struct candidate a, struct candidate b)
{
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

/* The largest value over the block with the lowest id of equals, in memory[WARP] and thread 0.
 * `memory` [WARP + 1]. */
static __device__ struct candidate block_largest(struct candidate *memory, struct candidate best)
{
    for (int step = WARP / 2; step > 0; step /= 2) {
        const struct candidate other = {__shfl_xor_sync(~0u, best.value, step),
                                        __shfl_xor_sync(~0u, best.id, step)};
        best = better(best, other);
    }
    if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < ROW_BLOCK / WARP; i++) best = better(best, memory[i]);
        memory[WARP] = best;
    }
    return best;
}

/* The same over the cluster, for every thread. */
static __device__ struct candidate cluster_largest(struct candidate *memory, struct candidate best,
                                                   int parts)
{
    block_largest(memory, best);
    cluster_sync();
    best = memory[WARP];
    for (int p = 0; p < parts; p++) best = better(best, *cluster_block(&memory[WARP], p));
    cluster_sync(); /* the memory may be used again, and the others may end */
    return best;
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
                                  const struct wanted_row &row, float least)
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

/* What top_p alone may keep of a block's part: each warp has `room` WARP places of its own, WARP
 * in every ROW_BLOCK. */
struct likely_list {
    float *values; /* [room, ROW_BLOCK] */
    int32_t *ids;  /* [room, ROW_BLOCK] */
    int room;
};

/* The block's sums are added up here. */
struct likely_memory {
    unsigned long long all; /* weight of the block's part */
    int most;               /* rows of ROW_BLOCK places that some warp needs */
};

/* Gather what is not below `least`; *row_all is the row's weight. -1 where some warp has no
 * room for it; else how many rows of ROW_BLOCK places are used, the rest of which is -infinity. */
static __device__ int gather_likely(struct likely_memory *memory, const struct likely_list &list,
                                    const struct row_part &part, const struct wanted_row &row,
                                    float least, unsigned long long *row_all)
{
    const int lane = threadIdx.x % WARP, first = threadIdx.x - lane;
    unsigned long long sum = 0;
    int n = 0; /* of the warp; lanes that have come to the row's end do not count any more */

    if (threadIdx.x == 0) memory->all = 0, memory->most = 0;
    __syncthreads();
    for_fours(part, [&](int v, float(&four)[4]) {
        const int lanes = min_int(WARP, ceil_div(part.V - v + lane * 4, 4)); /* that are here */
        row.penalize(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float z = row.scaled(four[i]);
            const bool likely = z >= least && z > -INFINITY;
            const unsigned all = __ballot_sync(~0u >> (WARP - lanes), likely);
            const int mine = n + __popc(all & ((1u << lane) - 1));
            sum += likelihood(z);
            if (likely && mine < list.room * WARP) {
                const int at = mine / WARP * ROW_BLOCK + first + mine % WARP;
                list.values[at] = z;
                list.ids[at] = v + i;
            }
            n += __popc(all);
        }
    });
    __syncwarp();
    n = __shfl_sync(~0u, n, 0); /* the last lane to come to the end is the first */
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) {
        atomicAdd(&memory->all, sum);
        atomicMax(&memory->most, ceil_div(n, WARP));
    }
    cluster_sync();
    bool fits = true;
    *row_all = 0;
    for (int p = 0; p < part.parts; p++) {
        const struct likely_memory *other = cluster_block(memory, p);
        *row_all += other->all;
        fits = fits && other->most <= list.room;
    }
    const int used = memory->most;
    if (fits)
        for (int i = n + lane; i < used * WARP; i += WARP)
            list.values[i / WARP * ROW_BLOCK + first + i % WARP] = -INFINITY;
    cluster_sync(); /* the memory may be used again */
    return fits ? used : -1;
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
        struct likely_memory likely;
        float sums[WARP];
    } memory;
    __shared__ struct candidate candidates[WARP + 1];
    __shared__ unsigned bar_key; /* of the best value of this block so far */
    grid_begin();
    const int q = blockIdx.x;
    const struct row_part part = {logits + (size_t)q * V, V, whole, (int)blockIdx.z,
                                  (int)gridDim.z};
    const int n_history = view.history_start[q + 1] - view.history_start[q];
    struct wanted_row wanted = {NULL, NULL, &view.sampling[q], 0.0f, view.sampling[q].temperature};
    const struct sampling &sampling = *wanted.sampling;

    if (n_history > 0) { /* the whole cluster */
        wanted.touched = touched;
        wanted.counts = counts + (size_t)q * V;
        count_history(touched, counts + (size_t)q * V, view.history + view.history_start[q],
                      n_history, view.n_prompt[q], V, part.part);
    }

    const bool by_number = sampling.top_k > 0 && sampling.top_k < V;
    const bool by_weight = sampling.top_p < 1.0f && !by_number && sampling.temperature > 0.0f;
    const float per_logit = 1.44269504f / sampling.temperature;
    struct candidate best = {-INFINITY, V}, least = {-INFINITY, 0};
    float about_max = -FLT_MAX, about_sum = 0.0f; /* of by_weight: exp2(per_logit (l - max)) */
    for_fours(part, [&](int v, float(&four)[4]) {
        wanted.penalize(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float logit = four[i];
            if (logit > best.value) best = {logit, v + i};
            if (logit > -INFINITY) least.value = fmaxf(least.value, -logit);
            if (!(logit < INFINITY)) least.id = -1; /* NaN too */
        }
        if (by_weight) {
            const float max = fmaxf(about_max, best.value);
            about_sum *= fast_exp2((about_max - max) * per_logit);
#pragma unroll
            for (int i = 0; i < 4; i++) about_sum += fast_exp2((four[i] - max) * per_logit);
            about_max = max;
        }
    });
    const float mine = best.value;
    best = cluster_largest(candidates, best, part.parts);
    const bool damaged =
        cluster_largest(candidates, {least.id < 0 ? 1.0f : 0.0f, 0}, part.parts).value > 0.0f;
    if (damaged || best.value == -INFINITY || sampling.temperature <= 0.0f) {
        if (part.part == 0 && threadIdx.x == 0)
            ids[q] = damaged || best.value == -INFINITY ? -1 : best.id;
        return; /* the whole cluster */
    }

    wanted.max = best.value;
    const auto scaled = [&](int v, float(&four)[4]) {
        wanted.penalize(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = wanted.scaled(four[i]);
    };
    float floor = -INFINITY;
    float low = -INFINITY; /* nothing that counts is below */
    unsigned long long row_all = 0, wanted_weight = 0;
    if (by_number && sampling.top_k <= FEW_WANTED) {
        const float reached = reached_by(&memory.few, mine, sampling.top_k, part);
        if (gather_few(&memory.few, part, wanted, reached)) {
            if (part.part > 0) return; /* the whole block */
            best = draw_few(&memory.few, sampling);
            best = block_largest(candidates, best);
            if (threadIdx.x == 0) ids[q] = best.id;
            return;
        }
    }
    if (by_weight) {
        /* Those that are under half of an even share of 1 - top_p are not among the most likely
         * that make up top_p, as in the CPU's: of the row, so of what is here of it, too. */
        const float half_share = 0.5f * (1.0f - sampling.top_p) / (float)V;
        const float sum =
            block_sum(about_sum * fast_exp2(fmaxf(about_max - wanted.max, -FLT_MAX) * per_logit),
                      memory.sums);
        const struct likely_list list = {
            (float *)(touched + ceil_div(V, 128) * 4),
            (int32_t *)(touched + ceil_div(V, 128) * 4) + room * ROW_BLOCK, room};
        __syncthreads(); /* all have read the sums */
        const int used = gather_likely(&memory.likely, list, part, wanted,
                                       logf(half_share * sum) - 0.01f, &row_all);
        const unsigned long long share =
            (unsigned long long)((double)sampling.top_p * (double)row_all);
        unsigned long long n_reached;
        floor = logf(half_share * (float)row_all * 0x1p-31f);
        if (used >= 0) {
            const struct row_part mine_only = {list.values, used * ROW_BLOCK, true,
                                               part.part,   part.parts,       true};
            floor = smallest_kept(
                &memory.select, mine_only, floor, floor, 0.0f, share > 0 ? share : 1, 0.0,
                &n_reached, [](int, float(&)[4]) {}, likelihood);
            best = {-INFINITY, V};
            for (int i = threadIdx.x; i < used * ROW_BLOCK; i += ROW_BLOCK) {
                const float z = list.values[i];
                if (!(z >= floor) || z == -INFINITY) continue;
                if (sampling.min_p > 0.0f && expf(z) < sampling.min_p) continue;
                best = better(best, {noisy(z, list.ids[i], sampling), list.ids[i]});
            }
            best = cluster_largest(candidates, best, part.parts);
            if (part.part == 0 && threadIdx.x == 0) ids[q] = best.id;
            return; /* the whole cluster */
        }
        low = floor;
        wanted_weight = share > 0 ? share : 1;
    } else if (by_number) {
        unsigned long long n_reached;
        least = cluster_largest(candidates, {least.value, 0}, part.parts);
        low = (-least.value - wanted.max) / sampling.temperature;
        floor = smallest_kept(&memory.select, part, floor, low, 0.0f, sampling.top_k, 0.0,
                              &n_reached, scaled, [](float) { return 1u; });
    }
    if (sampling.top_p < 1.0f) {
        unsigned long long n_reached;
        floor =
            smallest_kept(&memory.select, part, floor, low, 0.0f, wanted_weight,
                          by_number ? (double)sampling.top_p : 0.0, &n_reached, scaled, likelihood);
    }

    /* Noise is at most -log(1 - u). What cannot win by that, or could not have some time before,
     * is left out before its noise is made, all of it in fast arithmetic with a margin. */
    const float margin = 0.02f, inverse = 1.0f / sampling.temperature;
    best = {-INFINITY, V};
    if (threadIdx.x == 0) bar_key = sort_key(GUMBEL_MIN); /* the largest, 0, will have that */
    __syncthreads();
    for_fours(part, [&](int v, float(&four)[4]) {
        const float bar = from_sort_key(*(volatile unsigned *)&bar_key) - margin;
        const float least = fmaxf(bar - GUMBEL_MAX, floor - margin);
        float about[4];
        bool any = false;
        wanted.penalize(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            about[i] = (four[i] - wanted.max) * inverse;
            any |= about[i] >= least;
        }
        if (!any) return;
        uint32_t words[4];
        philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            /* 1 + word / 2^32, rounded down in its 23 bits */
            const float u = __uint_as_float(0x3f800000u | words[i] >> 9);
            if (u > 1.000001f + __expf(about[i] - bar)) continue;
            const float z = wanted.scaled(four[i]);
            if (!(z >= floor) || z == -INFINITY) continue;
            if (sampling.min_p > 0.0f && expf(z) < sampling.min_p) continue;
            best = better(best, {z + gumbel(words[i]), v + i});
            atomicMax(&bar_key, sort_key(best.value));
        }
    });
    best = cluster_largest(candidates, best, part.parts);
    if (part.part == 0 && threadIdx.x == 0) ids[q] = best.id;
}

/* ---- launchers ---------------------------------------------------------------------------- */

enum { VOCABULARY_MAX = 1 << 20 };

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
    int parts = 1; /* as many blocks a row as there are multiprocessors for */
    while (cuda->is_hopper && parts < 8 && 2 * parts * view->Q <= cuda->n_sms) parts *= 2;
    cuda_check(cuda,
               cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared),
               "sample");
    cuda_launch(cuda, "sample", sample_kernel, dim3(view->Q, 1, parts), ROW_BLOCK, shared, parts,
                ids, logits, counts, *view, V, V % 4 == 0 && is_aligned(logits), max_int(room, 0));
}
