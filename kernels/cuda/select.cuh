/* The smallest of a row's values that is among the largest, by number or by weight, without
 * sorting: values are counted into bins, the bin in which the number is reached is looked at
 * alone. A cluster of blocks works on a row. Weights are added as whole numbers, so neither the
 * number of blocks nor the order in which threads come makes a difference. */
#ifndef MLORA_KERNELS_CUDA_SELECT_CUH
#define MLORA_KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/cuda.cuh"

#include <math.h>

enum {
    ROW_BLOCK = 1024,
    AHEAD = 4,        /* groups of four numbers that a thread asks for at once */
    SELECT_AHEAD = 2, /* the same where there are fewer registers left */
    BINS = 2048,
    LIST = 512, /* values of one bin that are compared with each other */
};

/* Of the cluster's first block, but for the bins, which each block has. */
struct select_memory {
    unsigned low[BINS], high[BINS]; /* 64-bit sums in two words, which shared memory can add */
    float list[LIST];
    unsigned n_list;
    unsigned smallest, largest; /* sort keys, of the values in the bin */
    unsigned kept;              /* sort key */
    int bin;
    unsigned long long above, wanted;
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

/* A row of numbers, `part` of `parts` of which is this block's. `own`: the block has all that it
 * holds in its own shared memory. */
struct row_part {
    const float *row; /* [V] */
    int V;
    bool whole; /* V is a multiple of four and the row is aligned */
    int part, parts;
    bool own;
};

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
        for (int j = 0; j < N; j++) {
            const int v = v0 + j * step;
            if (part.whole) {
                float4 bits = make_float4(0, 0, 0, 0);
                if (v < part.V) bits = *(const float4 *)(part.row + v);
                fours[j][0] = bits.x, fours[j][1] = bits.y;
                fours[j][2] = bits.z, fours[j][3] = bits.w;
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fours[j][i] = v + i < part.V ? part.row[v + i] : -INFINITY;
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++)
            if (v0 + j * step < part.V) f4(v0 + j * step, fours[j]);
    }
}

static inline __device__ unsigned long long bin_sum(const struct select_memory *memory, int bin)
{
    return (unsigned long long)memory->high[bin] << 32 | memory->low[bin];
}

/* Add the other blocks' bins to the first block's, which calls it. */
static __device__ void bins_join(struct select_memory *memory, int parts)
{
    for (int i = threadIdx.x; i < BINS; i += ROW_BLOCK) {
        unsigned long long sum = bin_sum(memory, i);
        for (int p = 1; p < parts; p++) sum += bin_sum(cluster_block(memory, p), i);
        memory->low[i] = (unsigned)sum;
        memory->high[i] = (unsigned)(sum >> 32);
    }
}

/* Where the running sum of the bins reaches memory->wanted: memory->bin, and memory->above, the
 * sum before it. Where it does not, the last bin that is not empty. Done by one warp. */
static __device__ void find_bin(struct select_memory *memory)
{
    enum { EACH = BINS / WARP };
    const int lane = threadIdx.x;
    const unsigned long long before = memory->above, wanted = memory->wanted;
    unsigned long long sum = 0;

    for (int i = 0; i < EACH; i++) sum += bin_sum(memory, lane * EACH + i);
    unsigned long long upto = sum;
    for (int step = 1; step < WARP; step *= 2) {
        const unsigned long long other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
    }
    const unsigned reach = __ballot_sync(~0u, sum > 0 && before + upto >= wanted);
    const unsigned filled = __ballot_sync(~0u, sum > 0);
    const int found = reach ? __ffs(reach) - 1 : 31 - __clz(filled | 1);
    __syncwarp(); /* all have read what the one found sets */
    if (lane != found) return;

    unsigned long long running = before + upto - sum, above = running;
    int bin = lane * EACH;
    for (int i = 0; i < EACH; i++) {
        const unsigned long long here = bin_sum(memory, lane * EACH + i);
        if (here == 0) continue;
        bin = lane * EACH + i;
        above = running;
        running += here;
        if (running >= wanted) break;
    }
    memory->bin = bin;
    memory->above = above;
}

/* Half of the work of smallest_kept(): the bins, and the bin that is looked at alone. */
template <typename Counts, typename BinOf, typename Values, typename Weight>
static __device__ void select_bin(struct select_memory *memory, const struct row_part &part,
                                  double share, Counts &&counts, BinOf &&bin_of, Values &&values,
                                  Weight &&weight)
{
    for (int i = threadIdx.x; i < BINS; i += ROW_BLOCK) memory->low[i] = memory->high[i] = 0;
    if (threadIdx.x == 0) memory->n_list = 0, memory->smallest = ~0u, memory->largest = 0;
    __syncthreads();
    for_fours<SELECT_AHEAD>(part, [&](int v, float(&four)[4]) {
        unsigned old[4], added[4]; /* four additions are under way before the first is looked at */
        int bin[4];
        values(v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            added[i] = 0;
            if (!counts(four[i])) continue;
            bin[i] = bin_of(four[i]);
            added[i] = weight(four[i]);
            old[i] = atomicAdd(&memory->low[bin[i]], added[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (added[i] && old[i] + added[i] < old[i]) atomicAdd(&memory->high[bin[i]], 1u);
    });
    cluster_sync();
    if (part.part == 0) {
        bins_join(memory, part.parts);
        __syncthreads();
        if (threadIdx.x < WARP) {
            if (share > 0) {
                unsigned long long all = 0;
                for (int i = threadIdx.x; i < BINS; i += WARP) all += bin_sum(memory, i);
                for (int step = WARP / 2; step > 0; step /= 2)
                    all += __shfl_xor_sync(~0u, all, step);
                const unsigned long long wanted = (unsigned long long)(share * (double)all);
                if (threadIdx.x == 0) memory->wanted = wanted > 0 ? wanted : 1;
                __syncwarp();
            }
            find_bin(memory);
        }
    }
    cluster_sync();
}

/* The smallest value of the shortest list of largest values (and equals of its last) whose
 * weights reach `wanted`, or `share` of all weights where share > 0. Values below `floor` and
 * -infinity do not count; `low` and `high` are the least and the greatest of the rest, or wider.
 * values(v, four), which makes the values of row[v] to row[v + 3] in place, and weight(value) are
 * the caller's. All threads of the cluster call it and get
 * the same answer; *n_reached is how many values there are down to it, or more. */
template <typename Values, typename Weight>
static __device__ float smallest_kept(struct select_memory *memory, const struct row_part &part,
                                      float floor, float low, float high, unsigned long long wanted,
                                      double share, unsigned long long *n_reached, Values &&values,
                                      Weight &&weight)
{
    struct select_memory *shared = cluster_block(memory, 0);
    if (threadIdx.x == 0) memory->above = 0, memory->wanted = wanted, memory->kept = ~0u;
    for (bool first = true;; first = false) {
        /* Bin 0 holds the greatest. What lies far below shares the last bin at first. */
        const float bottom = first ? fmaxf(low, high - 64.0f) : low;
        const float per_bin = (BINS - 1) / (high - bottom);
        const auto bin_of = [&](float z) {
            return high > bottom ? (int)fminf((high - z) * per_bin, BINS - 1) : 0;
        };
        const auto counts = [&](float z) {
            return z >= floor && z > -INFINITY && z <= high && (first || z >= low);
        };
        select_bin(memory, part, first ? share : 0.0, counts, bin_of, values, weight);

        const int bin = shared->bin;
        for_fours<SELECT_AHEAD>(part, [&](int v, float(&four)[4]) {
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
        *n_reached = shared->above + n;
        cluster_sync();           /* all have read what the next turn, or the next call, sets */
        if (n == 0) return floor; /* no value counts */
        if (smallest == largest) return from_sort_key(smallest);
        if (n <= LIST) break;
        low = from_sort_key(smallest);
        high = from_sort_key(largest);
    }

    /* Those that are kept have less than what is wanted before them. */
    if (part.part == 0 && threadIdx.x < memory->n_list) {
        const float z = memory->list[threadIdx.x];
        unsigned long long before = memory->above;
        for (unsigned i = 0; i < memory->n_list; i++)
            if (memory->list[i] > z) before += weight(memory->list[i]);
        if (before < memory->wanted) atomicMin(&memory->kept, sort_key(z));
    }
    cluster_sync();
    const float kept = from_sort_key(shared->kept);
    cluster_sync(); /* the memory may be used again, and the first block may end */
    return kept;
}

#endif
