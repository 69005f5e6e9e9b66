/* The smallest of a row's values that is among the largest, by number or by weight, without
 * sorting: values are counted into bins, the bin in which the number is reached is looked at
 * alone. One block works on one row. Weights are added as whole numbers, so the order in which
 * threads come makes no difference. */
#ifndef MLORA_KERNELS_CUDA_SELECT_CUH
#define MLORA_KERNELS_CUDA_SELECT_CUH

#include "kernels/cuda/cuda.cuh"

#include <math.h>

enum {
    ROW_BLOCK = 1024,
    BINS = 2048,
    LIST = 512, /* values of one bin that are compared with each other */
};

struct select_memory {
    unsigned long long bins[BINS];
    float list[LIST];
    unsigned n_list;
    unsigned smallest, largest; /* sort keys, of the values in the bin */
    unsigned kept;              /* sort key */
    int bin;
    unsigned long long above, wanted;
};

/* Orders as the float does, as an unsigned number. */
static inline __device__ unsigned sort_key(float value)
{
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline __device__ float from_sort_key(unsigned key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* Call f(v, row[v]) for all v < V, spread over the block, in groups of four neighbours:
 * f4(v, four values), of which those past V are -infinity. `whole`: V is a multiple of four and
 * the row is aligned. */
template <typename F>
static inline __device__ void for_fours(const float *row, int V, bool whole, F &&f4)
{
#pragma unroll 4
    for (int v = threadIdx.x * 4; v < V; v += ROW_BLOCK * 4) {
        float four[4];
        if (whole) {
            const float4 bits = *(const float4 *)(row + v);
            four[0] = bits.x, four[1] = bits.y, four[2] = bits.z, four[3] = bits.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) four[i] = v + i < V ? row[v + i] : -INFINITY;
        }
        f4(v, four);
    }
}

/* Where the running sum of the bins reaches memory->wanted: memory->bin, and memory->above, the
 * sum before it. Where it does not, the last bin that is not empty. Done by the first warp. */
static __device__ void find_bin(struct select_memory *memory)
{
    enum { EACH = BINS / WARP };
    const int lane = threadIdx.x;
    const unsigned long long before = memory->above, wanted = memory->wanted;
    unsigned long long sum = 0;

    for (int i = 0; i < EACH; i++) sum += memory->bins[lane * EACH + i];
    unsigned long long upto = sum;
    for (int step = 1; step < WARP; step *= 2) {
        const unsigned long long other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
    }
    unsigned reach = __ballot_sync(~0u, sum > 0 && before + upto >= wanted);
    const unsigned filled = __ballot_sync(~0u, sum > 0);
    const int found = reach ? __ffs(reach) - 1 : 31 - __clz(filled | 1);
    if (lane == found) {
        unsigned long long running = before + upto - sum, above = running;
        int bin = lane * EACH;
        for (int i = 0; i < EACH; i++) {
            const unsigned long long here = memory->bins[lane * EACH + i];
            if (here == 0) continue;
            bin = lane * EACH + i;
            above = running;
            running += here;
            if (running >= wanted) break;
        }
        memory->bin = bin;
        memory->above = above;
    }
}

/* The smallest value of the shortest list of largest values (and equals of its last) whose
 * weights reach `wanted`, or `share` of all weights where `wanted` is 0. Values below `floor` and
 * -infinity do not count; `low` and `high` are the least and the greatest of the rest, or wider.
 * value(v, row[v]) and weight(value) are the caller's. All threads of the block call it and get
 * the same answer. */
template <typename Value, typename Weight>
static __device__ float smallest_kept(struct select_memory *memory, const float *row, int V,
                                      bool whole, float floor, float low, float high,
                                      unsigned long long wanted, double share, Value &&value,
                                      Weight &&weight)
{
    if (threadIdx.x == 0) memory->above = 0, memory->wanted = wanted;
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

        for (int i = threadIdx.x; i < BINS; i += ROW_BLOCK) memory->bins[i] = 0;
        if (threadIdx.x == 0) memory->n_list = 0, memory->smallest = ~0u, memory->largest = 0;
        __syncthreads();
        for_fours(row, V, whole, [&](int v, const float(&four)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float z = value(v + i, four[i]);
                if (counts(z)) atomicAdd(&memory->bins[bin_of(z)], weight(z));
            }
        });
        __syncthreads();
        if (threadIdx.x < WARP) {
            if (first && wanted == 0) {
                unsigned long long all = 0;
                for (int i = threadIdx.x; i < BINS; i += WARP) all += memory->bins[i];
                for (int step = WARP / 2; step > 0; step /= 2)
                    all += __shfl_xor_sync(~0u, all, step);
                const unsigned long long part = (unsigned long long)(share * (double)all);
                if (threadIdx.x == 0) memory->wanted = part > 0 ? part : 1;
                __syncwarp();
            }
            find_bin(memory);
        }
        __syncthreads();

        const int bin = memory->bin;
        for_fours(row, V, whole, [&](int v, const float(&four)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float z = value(v + i, four[i]);
                if (!counts(z) || bin_of(z) != bin) continue;
                const unsigned at = atomicAdd(&memory->n_list, 1u);
                if (at < LIST) memory->list[at] = z;
                atomicMin(&memory->smallest, sort_key(z));
                atomicMax(&memory->largest, sort_key(z));
            }
        });
        __syncthreads();
        const unsigned n = memory->n_list, smallest = memory->smallest, largest = memory->largest;
        __syncthreads();          /* all have read what the next turn, or the next call, sets */
        if (n == 0) return floor; /* no value counts */
        if (smallest == largest) return from_sort_key(smallest);
        if (n <= LIST) break;
        low = from_sort_key(smallest);
        high = from_sort_key(largest);
    }

    /* Those that are kept have less than what is wanted before them. */
    if (threadIdx.x == 0) memory->kept = ~0u;
    __syncthreads();
    if (threadIdx.x < memory->n_list) {
        const float z = memory->list[threadIdx.x];
        unsigned long long before = memory->above;
        for (unsigned i = 0; i < memory->n_list; i++)
            if (memory->list[i] > z) before += weight(memory->list[i]);
        if (before < memory->wanted) atomicMin(&memory->kept, sort_key(z));
    }
    __syncthreads();
    const float kept = from_sort_key(memory->kept);
    __syncthreads(); /* the memory may be used again */
    return kept;
}

#endif
