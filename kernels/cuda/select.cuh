/* The smallest of a row's values that is among the largest, by number or by weight, without
 * sorting: values are counted into bins, the bin in which the number is reached is looked at
 * alone. A cluster of blocks works on a row. Weights are added as whole numbers, so neither the
 * number of blocks nor the order in which threads come makes a difference. */
#ifndef MLORA_KERNELS_CUDA_SELECT_CUH
#define MLORA_KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/cuda.cuh"

#include <math.h>

enum {
    ROW_BLOCK = 512,
    AHEAD = 4,     /* groups of four numbers that a thread asks for at once */
    FAR_AHEAD = 8, /* the same where little is done with each */
    BINS = 4 * ROW_BLOCK,
    LIST = 1024, /* values of one bin that are compared with each other */
};

/* Each block of a cluster has its bins; the lists of the first block are all blocks'. */
struct select_memory {
    alignas(16) unsigned low[BINS],
        high[BINS];             /* 64-bit sums in two words, which shared memory can add */
    unsigned long long outside; /* the sum of what is in no bin */
    unsigned long long above, wanted;
    unsigned long long of_warp[WARP];
    int bin; /* where the running sum, from `above`, reaches `wanted` */
    unsigned n_list;
    unsigned smallest, largest; /* sort keys, of the values in the bin */
    unsigned kept;              /* sort key */
    alignas(16) float list[LIST + 4];
    alignas(16) unsigned weight[LIST];
    int32_t ids[LIST];
};

/* Orders as the float does, as an unsigned number; both zeros are one. */
static inline __device__ unsigned sort_key(float value)
{
    const unsigned bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline __device__ float from_sort_key(unsigned key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* The larger of two; NaN where one is. */
static inline __device__ float larger_or_nan(float a, float b)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/* A row of numbers, `part` of `parts` of which is this block's. `own`: the block has all that it
 * holds in its own shared memory. */
struct row_part {
    const float *row; /* [V] */
    int V;
    bool whole; /* V is a multiple of four and the row is aligned */
    int part, parts;
    bool own;
};

/* The row's numbers v to v + 3, v a multiple of four; -infinity past V. */
static inline __device__ void load_four(float (&four)[4], const struct row_part &part, int v)
{
    if (part.whole) {
        float4 bits = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (v < part.V) bits = *(const float4 *)(part.row + v);
        four[0] = bits.x, four[1] = bits.y, four[2] = bits.z, four[3] = bits.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = v + i < part.V ? part.row[v + i] : -INFINITY;
    }
}

/* Call f4(v, values of v to v + 3, which it may change) for this block's part of the row, spread
 * over its threads; values past V are -infinity. N groups of four are asked for at once. */
template <int N = AHEAD, typename F>
static inline __device__ void for_fours(const struct row_part &part, F &&f4)
{
    const int step = (part.own ? 1 : part.parts) * ROW_BLOCK * 4;
    for (int v0 = ((part.own ? 0 : part.part) * ROW_BLOCK + threadIdx.x) * 4; v0 < part.V;
         v0 += N * step) {
        float fours[N][4]; /* all asked for before the first is used */
#pragma unroll
        for (int j = 0; j < N; j++) load_four(fours[j], part, v0 + j * step);
#pragma unroll
        for (int j = 0; j < N; j++)
            if (v0 + j * step < part.V) f4(v0 + j * step, fours[j]);
    }
}

static __device__ void clear_bins(struct select_memory *memory)
{
    for (int i = threadIdx.x; i < BINS; i += ROW_BLOCK) memory->low[i] = memory->high[i] = 0;
    if (threadIdx.x == 0) {
        memory->outside = 0;
        memory->n_list = 0;
        memory->smallest = ~0u;
        memory->largest = 0;
        memory->bin = 0;
    }
    __syncthreads();
}

/* Add weight(value) of this block's values to its bins. What weighs 0 does not count; where bin_of()
 * is BINS, it is added to `outside`. */
template <typename Values, typename BinOf, typename Weight>
static __device__ void fill_bins(struct select_memory *memory, const struct row_part &part,
                                 Values &&values, BinOf &&bin_of, Weight &&weight)
{
    unsigned long long outside = 0;

    clear_bins(memory);
    for_fours(part, [&](int v, float(&four)[4]) {
        unsigned old[4], added[4]; /* four additions are under way before the first is looked at */
        int bin[4];
        values(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            added[i] = weight(four[i]);
            bin[i] = bin_of(four[i]);
            if (added[i] && bin[i] < BINS)
                old[i] = atomicAdd(&memory->low[bin[i]], added[i]);
            else
                outside += added[i], added[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (added[i] && old[i] + added[i] < old[i]) atomicAdd(&memory->high[bin[i]], 1u);
    });
    for (int step = WARP / 2; step > 0; step /= 2) outside += __shfl_xor_sync(~0u, outside, step);
    if (threadIdx.x % WARP == 0 && outside > 0) atomicAdd(&memory->outside, outside);
    cluster_sync();
}

static __device__ unsigned long long sum_through(unsigned long long own)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const unsigned long long before = __shfl_up_sync(~0u, own, step);
        if (lane >= step) own += before;
    }
    return own;
}

/* Where the running sum of all blocks' bins, from memory->above on, reaches memory->wanted, or
 * `share` of everything where share > 0: memory->bin, and memory->above, the sum before it. Where
 * it does not, the last bin that is not empty. Each block finds the same for itself. */
static __device__ void find_bin(struct select_memory *memory, int parts, double share)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const unsigned long long start = memory->above;
    unsigned long long wanted = memory->wanted, own[4] = {}, outside = 0;

    for (int p = 0; p < parts; p++) {
        const struct select_memory *other = cluster_block(memory, p);
        const uint4 low = ((const uint4 *)other->low)[threadIdx.x];
        const uint4 high = ((const uint4 *)other->high)[threadIdx.x];
        own[0] += (unsigned long long)high.x << 32 | low.x;
        own[1] += (unsigned long long)high.y << 32 | low.y;
        own[2] += (unsigned long long)high.z << 32 | low.z;
        own[3] += (unsigned long long)high.w << 32 | low.w;
        outside += other->outside;
    }
    const unsigned long long through = sum_through(own[0] + own[1] + own[2] + own[3]);
    if (lane == WARP - 1) memory->of_warp[warp] = through;
    __syncthreads();
    const unsigned long long warps =
        sum_through(lane < ROW_BLOCK / WARP ? memory->of_warp[lane] : 0);
    const unsigned long long all = __shfl_sync(~0u, warps, WARP - 1);
    const unsigned long long before_warp = __shfl_sync(~0u, warps, warp == 0 ? 0 : warp - 1);
    if (share > 0) {
        wanted = (unsigned long long)(share * (double)(all + outside));
        wanted = wanted > 0 ? wanted : 1;
    }
    const unsigned long long reached = start + all < wanted ? start + all : wanted;
    const unsigned long long end = start + (warp == 0 ? 0 : before_warp) + through;
    unsigned long long above = end - own[0] - own[1] - own[2] - own[3];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (above < reached && reached <= above + own[i]) /* of all bins one */
            memory->bin = 4 * threadIdx.x + i, memory->above = above;
        above += own[i];
    }
    if (threadIdx.x == 0) memory->wanted = wanted;
    __syncthreads();
}

/* Prepare the first block's list for list_keeps(). All threads of that block call it. */
template <typename Weight>
static __device__ void weigh_list(struct select_memory *memory, Weight &&weight)
{
    const int n = (int)memory->n_list;

    for (int i = threadIdx.x; i < n; i += ROW_BLOCK) memory->weight[i] = weight(memory->list[i]);
    if (threadIdx.x < 4) memory->list[n + threadIdx.x] = -INFINITY; /* read with the last four */
    __syncthreads();
}

/* Whether value i of the list is among the largest: those that are kept have less than
 * memory->wanted before them. */
static __device__ bool list_keeps(const struct select_memory *memory, int i)
{
    const float mine = memory->list[i];
    unsigned long long before = memory->above;

#pragma unroll 2
    for (int j = 0; j < (int)memory->n_list; j += 4) {
        const float4 value = *(const float4 *)&memory->list[j];
        const uint4 weight = *(const uint4 *)&memory->weight[j];
        if (value.x > mine) before += weight.x;
        if (value.y > mine) before += weight.y;
        if (value.z > mine) before += weight.z;
        if (value.w > mine) before += weight.w;
    }
    return before < memory->wanted;
}

/* The smallest value of the shortest list of largest values (and equals of its last) whose
 * weights reach `wanted`, or `share` of all weights where share > 0. Values below `floor` and
 * -infinity do not count; `low` and `high` are the least and the greatest of the rest, or wider,
 * and what is `far` below `high` is looked at last. values(v, four), which makes the values of
 * row[v] to row[v + 3] in place, and weight(value) are the caller's. All threads of the cluster
 * call it and get the same answer; *n_reached is how many values there are down to it, or more. */
template <typename Values, typename Weight>
static __device__ float
smallest_kept(struct select_memory *memory, const struct row_part &part, float floor, float low,
              float high, float far, unsigned long long wanted, double share,
              unsigned long long *n_reached, Values &&values, Weight &&weight)
{
    struct select_memory *shared = cluster_block(memory, 0);
    if (threadIdx.x == 0) memory->above = 0, memory->wanted = wanted, memory->kept = ~0u;
#pragma unroll 1
    for (bool first = true;; first = false) {
        /* Bin 0 holds the greatest. What lies far below shares the last bin at first. */
        const float bottom = first ? fmaxf(low, high - far) : low;
        const float per_bin = (BINS - 1) / (high - bottom);
        const auto bin_of = [&](float z) {
            return high > bottom ? (int)fminf((high - z) * per_bin, BINS - 1) : 0;
        };
        const auto counts = [&](float z) {
            return z >= floor && z > -INFINITY && z <= high && (first || z >= low);
        };
        fill_bins(memory, part, values, bin_of,
                  [&](float z) { return counts(z) ? weight(z) : 0u; });
        find_bin(memory, part.parts, first ? share : 0.0);

        const int bin = memory->bin;
        for_fours(part, [&](int v, float(&four)[4]) {
            values(v, four);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float z = four[i];
                if (!counts(z) || bin_of(z) != bin) continue;
                const unsigned at = atomicAdd(&shared->n_list, 1u);
                if (at < LIST) shared->list[at] = z;
                atomicMin(&shared->smallest, sort_key(z));
                atomicMax(&shared->largest, sort_key(z));
            }
        });
        cluster_sync();
        const unsigned n = shared->n_list, smallest = shared->smallest, largest = shared->largest;
        *n_reached = memory->above + n;
        cluster_sync();           /* all have read what the next turn, or the next call, sets */
        if (n == 0) return floor; /* no value counts */
        if (smallest == largest) return from_sort_key(smallest);
        if (n <= LIST) break;
        low = from_sort_key(smallest);
        high = from_sort_key(largest);
    }

    if (part.part == 0) {
        weigh_list(memory, weight);
        for (int i = threadIdx.x; i < (int)memory->n_list; i += ROW_BLOCK)
            if (list_keeps(memory, i)) atomicMin(&memory->kept, sort_key(memory->list[i]));
    }
    cluster_sync();
    const float kept = from_sort_key(shared->kept);
    cluster_sync(); /* the memory may be used again, and the first block may end */
    return kept;
}

#endif
