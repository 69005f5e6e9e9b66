/* The draw of a token: a logit with the noise of its token, and the largest over warp, block and
 * cluster. The noise is a function of seed, draw and token alone, so any thread makes any of it. */
#ifndef MLORA_KERNELS_CUDA_DRAW_CUH
#define MLORA_KERNELS_CUDA_DRAW_CUH

#include "kernels/cuda/select.cuh"

#ifdef __CUDACC__

/* philox4x32-10: random words as a pure function of a key and a counter (Salmon, Moraes, Dror and
 * Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011). */
static inline __device__ void philox4x32(uint32_t out[4], uint32_t c0, uint32_t c1, uint64_t key)
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
static inline __device__ float gumbel(uint32_t word)
{
    const float inner = word < 0x80000000u ? -log1pf(-((float)word + 0.5f) * 0x1p-32f)
                                           : -logf(((float)~word + 0.5f) * 0x1p-32f);
    return -logf(inner);
}

/* gumbel() is never above 22.87 nor below -3.14. */
static constexpr float GUMBEL_MAX = 22.9f, GUMBEL_MIN = -3.2f;

/* A value and its token. */
struct candidate {
    float value;
    int id;
};

static inline __device__ float noisy(float z, int v, const struct sampling &sampling)
{
    uint32_t words[4];
    philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
    const uint32_t low = v & 1 ? words[1] : words[0], high = v & 1 ? words[3] : words[2];
    return z + gumbel(v & 2 ? high : low);
}

static inline __device__ struct candidate better(struct candidate a, struct candidate b)
{
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

static inline __device__ struct candidate warp_largest(struct candidate best)
{
    for (int step = WARP / 2; step > 0; step /= 2) {
        const struct candidate other = {__shfl_xor_sync(~0u, best.value, step),
                                        __shfl_xor_sync(~0u, best.id, step)};
        best = better(best, other);
    }
    return best;
}

/* The largest value over the block with the lowest id of equals, in thread 0. `memory` [WARP]. */
static inline __device__ struct candidate block_largest(struct candidate *memory,
                                                        struct candidate best)
{
    best = warp_largest(best);
    if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x < ROW_BLOCK / WARP) best = memory[threadIdx.x];
    if (threadIdx.x < WARP) best = warp_largest(best); /* the others' are in it already */
    return best;
}

enum { PARTS_MAX = 8 }; /* blocks of a row */
static constexpr float FAR = 64.0f;

/* The same over the cluster, in thread 0 of its first block. `memory` [WARP + PARTS_MAX]. */
static inline __device__ struct candidate
cluster_largest(struct candidate *memory, struct candidate best, const struct row_part &part)
{
    best = block_largest(memory, best);
    if (threadIdx.x == 0) *cluster_block(&memory[WARP + part.part], 0) = best;
    cluster_sync();
    if (part.part == 0 && threadIdx.x == 0)
        for (int p = 0; p < part.parts; p++) best = better(best, memory[WARP + p]);
    return best;
}

#endif
#endif
