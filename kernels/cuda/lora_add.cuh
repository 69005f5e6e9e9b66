/* y plus products of rows of B with h, for sixteen tokens at a time, as expand and silu_mul after
 * it make them. Instructions bound it before memory does, so the tensor cores add y, too: a product
 * of y and the identity takes the place of what would unpack and add each number. The rows of a
 * product are tokens, and its columns are dealt so that a lane gets eight neighbouring outputs of
 * two tokens: 16 bytes of y each. */
#ifndef MLORA_KERNELS_CUDA_LORA_ADD_CUH
#define MLORA_KERNELS_CUDA_LORA_ADD_CUH

#include "kernels/cuda/lora_tile.cuh"

#ifdef __CUDACC__

/* With g = lane / 4 and i = lane % 4, a lane has of a quad of products, 16 tokens x 32 outputs:
 *   outputs 8 i to 8 i + 7 of tokens g and g + 8, two of each in each product
 *   h of those tokens, four elements of the rank from 4 i on
 *   row g / 2 * 8 + g % 2 + 2 j of B for product j, the same elements */
enum { SIXTEEN = 16, QUAD = 32 };

struct h_rows {
    uint32_t part[2][4]; /* their sum is scale * h */
};

static inline __device__ void split_rows(struct h_rows *rows, const float4 &a, const float4 &b,
                                         float scale)
{
    const float x[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t part[2];
            split_pair<2>(part, scale * x[t][2 * pair], scale * x[t][2 * pair + 1]);
            rows->part[0][t + 2 * pair] = part[0];
            rows->part[1][t + 2 * pair] = part[1];
        }
}

/* Row of B, from the quad's first on, that this lane has for product j. */
static inline __device__ int quad_row(int j)
{
    const int g = threadIdx.x % WARP / 4;
    return g / 2 * 8 + g % 2 + 2 * j;
}

/* Elements from r on (bf16, R a multiple of 4) of the quad from row n on. Zeros past R, the last
 * row again past N. */
static inline __device__ void load_quad(uint2 (&b)[4], const bf16 *from, int n, int N, int R, int r)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        b[j] = r < R ? *(const uint2 *)(from + (size_t)min_int(n + quad_row(j), N - 1) * R + r)
                     : make_uint2(0, 0);
}

/* c[j] += h times B */
static inline __device__ void add_quad(float (&c)[4][4], const struct h_rows &h,
                                       const uint2 (&b)[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        mma_bf16(c[j], h.part[0], b[j].x, b[j].y);
        mma_bf16(c[j], h.part[1], b[j].x, b[j].y);
    }
}

/* The same for B of any type and rank. */
static inline __device__ void add_quad_any(float (&c)[4][4], const struct h_rows &h,
                                           const void *from, int dtype, int n, int N, int R, int r,
                                           bool whole)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const size_t at = (size_t)min_int(n + quad_row(j), N - 1) * R + r;
        uint32_t low[2], high[2];
        float w[4];
        load_factor(w, from, dtype, at, R - r, whole && r < R);
        split_pair<2>(low, w[0], w[1]);
        split_pair<2>(high, w[2], w[3]);
        mma_bf16(c[j], h.part[0], low[0], high[0]);
        mma_bf16(c[j], h.part[1], low[0], high[0]);
        mma_bf16(c[j], h.part[0], low[1], high[1]);
    }
}

/* c += y of this lane's outputs and two tokens */
static inline __device__ void add_old(float (&c)[4][4], const uint4 (&old)[2])
{
    const int lane = threadIdx.x % WARP;
    const uint32_t one = lane / 8 != lane % 4 ? 0 : lane / 4 % 2 ? 0x3f800000u : 0x3f80u;
    const uint32_t y[4][2] = {
        {old[0].x, old[1].x}, {old[0].y, old[1].y}, {old[0].z, old[1].z}, {old[0].w, old[1].w}};
#pragma unroll
    for (int j = 0; j < 4; j++) mma_bf16_eight(c[j], y[j], one);
}

/* c as it is stored */
static inline __device__ void round_quad(uint4 (&y)[2], const float (&c)[4][4])
{
#pragma unroll
    for (int t = 0; t < 2; t++)
        y[t] = make_uint4(
            pack_bf16(c[0][2 * t], c[0][2 * t + 1]), pack_bf16(c[1][2 * t], c[1][2 * t + 1]),
            pack_bf16(c[2][2 * t], c[2][2 * t + 1]), pack_bf16(c[3][2 * t], c[3][2 * t + 1]));
}

#endif
#endif
