/* Products of rows of B with h on tensor cores for few tokens, as lora_delta.cu makes them: a warp
 * does 64 outputs of eight tokens, eight neighbouring outputs to a lane. Rows of the small products
 * are outputs; h goes in as three parts of bf16. lora_add.cuh has sixteen tokens, and adds y. */
#ifndef MLORA_KERNELS_CUDA_LORA_TILE_CUH
#define MLORA_KERNELS_CUDA_LORA_TILE_CUH

#include "kernels/cuda/lora.cuh"

#ifdef __CUDACC__

enum { H_PARTS = 3 }; /* of bf16, 8 bits each */

/* Of eight rows of B from n on, this lane's four elements from r on (bf16, R a multiple of 4):
 * operands of four products of 16 x 16. Zeros past R, the last row again past N. */
static inline __device__ void load_b(uint32_t (&a)[4][4], const bf16 *b, int n, int N, int R, int r)
{
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const uint2 bits = r < R
                               ? __ldcs((const uint2 *)(b + (size_t)min_int(n + j, N - 1) * R + r))
                               : make_uint2(0, 0);
        a[j / 2][j % 2] = bits.x;
        a[j / 2][j % 2 + 2] = bits.y;
    }
}

/* Of a row of h, four elements from r on. Zeros past R. */
static inline __device__ float4 load_h(const float *h, int r, int R, bool whole)
{
    if (whole && r < R) return *(const float4 *)(h + r);
    return make_float4(r < R ? h[r] : 0.0f, r + 1 < R ? h[r + 1] : 0.0f,
                       r + 2 < R ? h[r + 2] : 0.0f, r + 3 < R ? h[r + 3] : 0.0f);
}

/* As three parts of bf16, all its bits: with 16 of them a request would get something else here than
 * in a step of more tokens, by more than the order of sums. */
static inline __device__ void split_h(uint32_t (&b)[H_PARTS][2], const float4 &h)
{
    const float2 pairs[2] = {{h.x, h.y}, {h.z, h.w}};
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        uint32_t part[H_PARTS];
        split_pair<H_PARTS>(part, pairs[pair].x, pairs[pair].y);
#pragma unroll
        for (int i = 0; i < H_PARTS; i++) b[i][pair] = part[i];
    }
}

/* sum[i] += rows a[i] of B times h */
static inline __device__ void multiply(float (&sum)[4][4], const uint32_t (&a)[4][4],
                                       const uint32_t (&x)[H_PARTS][2])
{
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < H_PARTS; i++) mma_bf16(sum[m], a[m], x[i][0], x[i][1]);
}

/* Of rows n and the next of B, four elements from r on, of any type and rank, as three parts of
 * bf16. */
static inline __device__ void load_b_any(uint32_t (&a)[H_PARTS][4], const void *b, int dtype, int n,
                                         int N, int R, int r, bool whole)
{
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const size_t at = (size_t)min_int(n + j, N - 1) * R + r;
        float w[4];
        load_factor(w, b, dtype, at, R - r, whole && r < R);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t part[H_PARTS];
            split_pair<H_PARTS>(part, w[2 * pair], w[2 * pair + 1]);
#pragma unroll
            for (int i = 0; i < H_PARTS; i++) a[i][j + 2 * pair] = part[i];
        }
    }
}

#endif
#endif
