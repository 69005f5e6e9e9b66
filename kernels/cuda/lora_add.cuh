/* y plus products of rows of B with h, for sixteen tokens at a time, as expand and silu_mul after
 * it make them. Instructions bound it before memory does, so the tensor cores add y of bf16, too: a
 * product of y and the identity takes the place of what would unpack and add each number; and a block
 * splits h into parts of bf16 once for its warps. The rows of a product are tokens, and its columns are
 * dealt so that a lane gets outputs of two tokens in units of 16 bytes: eight neighbours of bf16, or twice
 * four of f32, where h keeps all its bits. */
#ifndef MLORA_KERNELS_CUDA_LORA_ADD_CUH
#define MLORA_KERNELS_CUDA_LORA_ADD_CUH

#include "kernels/cuda/lora_tile.cuh"

#ifdef __CUDACC__

/* With g = lane / 4 and i = lane % 4, a lane has of a quad of products, 16 tokens x 32 outputs:
 *   outputs first_output() to + 3 and second_output() to + 3 of tokens g and g + 8: of each four, two in
 *   a product and two in the next
 *   h of those tokens, four elements of the rank from 4 i on
 *   row quad_row() of B for product j, the same elements */
enum { SIXTEEN = 16, QUAD = 32 };

template <typename Y> constexpr int PARTS = 2; /* of bf16, 8 bits each */
template <> constexpr int PARTS<float> = 3;

template <int PARTS> struct h_rows {
    uint32_t part[PARTS][4]; /* their sum is scale * h */
};

template <int PARTS>
static inline __device__ void split_rows(struct h_rows<PARTS> *rows, const float4 &a,
                                         const float4 &b, float scale)
{
    const float x[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t part[PARTS];
            split_pair<PARTS>(part, scale * x[t][2 * pair], scale * x[t][2 * pair + 1]);
#pragma unroll
            for (int i = 0; i < PARTS; i++) rows->part[i][t + 2 * pair] = part[i];
        }
}

/* Of a quad, this lane's outputs: four from the first on and four from the second. */
template <typename Y> static inline __device__ int first_output(int i)
{
    return i * 16 / (int)sizeof(Y);
}
template <typename Y> static inline __device__ int second_output(int i)
{
    return sizeof(Y) == 2 ? i * GROUP + 4 : i * 4 + QUAD / 2;
}

/* Row of B, from the quad's first on, that this lane has for product j: column g is of lane g / 2. */
template <typename Y> static inline __device__ int quad_row(int j)
{
    const int g = threadIdx.x % WARP / 4, i = g / 2;
    return (j < 2 ? first_output<Y>(i) : second_output<Y>(i)) + j % 2 * 2 + g % 2;
}

/* Elements from r on (bf16, R a multiple of 4) of the quad from row n on. Zeros past R, the last
 * row again past N. */
template <typename Y>
static inline __device__ void load_quad(uint2 (&b)[4], const bf16 *from, int n, int N, int R, int r)
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        b[j] =
            r < R
                ? __ldcs((const uint2 *)(from + (size_t)min_int(n + quad_row<Y>(j), N - 1) * R + r))
                : make_uint2(0, 0);
}

/* c[j] += h times B */
template <int PARTS>
static inline __device__ void add_quad(float (&c)[4][4], const struct h_rows<PARTS> &h,
                                       const uint2 (&b)[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < PARTS; i++) mma_bf16(c[j], h.part[i], b[j].x, b[j].y);
}

/* The same for B of any type and rank. */
template <typename Y, int PARTS>
static inline __device__ void add_quad_any(float (&c)[4][4], const struct h_rows<PARTS> &h,
                                           const void *from, int dtype, int n, int N, int R, int r,
                                           bool whole)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const size_t at = (size_t)min_int(n + quad_row<Y>(j), N - 1) * R + r;
        uint32_t low[PARTS], high[PARTS];
        float w[4];
        load_factor(w, from, dtype, at, R - r, whole && r < R);
        split_pair<PARTS>(low, w[0], w[1]);
        split_pair<PARTS>(high, w[2], w[3]);
#pragma unroll
        for (int k = 0; k < PARTS; k++)
#pragma unroll
            for (int i = 0; i < PARTS - k; i++) mma_bf16(c[j], h.part[i], low[k], high[k]);
    }
}

/* This lane's eight outputs of a token, as y has them. */
template <typename Y> struct eight;
template <> struct eight<bf16> {
    uint4 bits;
};
template <> struct eight<float> {
    float value[GROUP];
};

/* From a quad of y on, of which there are n outputs; zeros after. `whole`: a multiple of eight, and
 * aligned. */
static inline __device__ void load_eight(struct eight<bf16> *to, const bf16 *y, int n, bool whole)
{
    const int first = first_output<bf16>(threadIdx.x % 4);
    y += first, n -= first;
    if (whole) {
        to->bits = n > 0 ? *(const uint4 *)y : make_uint4(0, 0, 0, 0);
        return;
    }
    const auto pair = [&](int e) {
        return pack_bf16(e < n ? widen(y[e]) : 0.0f, e + 1 < n ? widen(y[e + 1]) : 0.0f);
    };
    to->bits = make_uint4(pair(0), pair(2), pair(4), pair(6));
}

static inline __device__ void load_eight(struct eight<float> *to, const float *y, int n, bool whole)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = threadIdx.x % 4;
        const int first = half ? second_output<float>(i) : first_output<float>(i);
        if (whole && first < n) {
            *(float4 *)(to->value + half * 4) = *(const float4 *)(y + first);
            continue;
        }
#pragma unroll
        for (int e = 0; e < 4; e++) to->value[half * 4 + e] = first + e < n ? y[first + e] : 0.0f;
    }
}

/* c = y of this lane's outputs and two tokens */
static inline __device__ void set_quad(float (&c)[4][4], const struct eight<bf16> (&old)[2])
{
    const int lane = threadIdx.x % WARP;
    const uint32_t one = lane / 8 != lane % 4 ? 0 : lane / 4 % 2 ? 0x3f800000u : 0x3f80u;
    const uint4 a = old[0].bits, b = old[1].bits;
    const uint32_t y[4][2] = {{a.x, b.x}, {a.y, b.y}, {a.z, b.z}, {a.w, b.w}};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
        mma_bf16_eight(c[j], y[j], one);
    }
}

static inline __device__ void set_quad(float (&c)[4][4], const struct eight<float> (&old)[2])
{
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) c[j][e] = old[e / 2].value[2 * j + e % 2];
}

/* Of c, token t's outputs, as load_eight(). */
static inline __device__ void store_eight(bf16 *y, const float (&c)[4][4], int t, int n, bool whole)
{
    const int first = first_output<bf16>(threadIdx.x % 4);
    const uint4 bits = make_uint4(
        pack_bf16(c[0][2 * t], c[0][2 * t + 1]), pack_bf16(c[1][2 * t], c[1][2 * t + 1]),
        pack_bf16(c[2][2 * t], c[2][2 * t + 1]), pack_bf16(c[3][2 * t], c[3][2 * t + 1]));
    y += first, n -= first;
    if (whole) {
        if (n > 0) *(uint4 *)y = bits;
        return;
    }
    bf16 each[GROUP];
    memcpy(each, &bits, sizeof each);
#pragma unroll
    for (int e = 0; e < GROUP; e++)
        if (e < n) y[e] = each[e];
}

static inline __device__ void store_eight(float *y, const float (&c)[4][4], int t, int n,
                                          bool whole)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = threadIdx.x % 4;
        const int first = half ? second_output<float>(i) : first_output<float>(i);
        const float four[4] = {c[2 * half][2 * t], c[2 * half][2 * t + 1], c[2 * half + 1][2 * t],
                               c[2 * half + 1][2 * t + 1]};
        if (whole) {
            if (first < n) *(float4 *)(y + first) = make_float4(four[0], four[1], four[2], four[3]);
            continue;
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (first + e < n) y[first + e] = four[e];
    }
}

/* ---- h of sixteen tokens, by all threads of a block -------------------------------------------- */

/* h split, twice, so that the next tokens' is written while warps read these'. Units are four elements
 * of a token's rank. */
template <int SIDES, int STEPS, int PARTS> struct shared_h {
    uint2 part[2][SIDES][STEPS][PARTS][SIXTEEN][4];
};

enum { ADD_BLOCK = 128 }; /* threads */

/* What a thread brings: of token index() of the sixteen, four elements of some steps of the rank. */
template <int SIDES, int STEPS> struct h_items {
    enum { ALL = SIDES * STEPS * SIXTEEN * 4, EACH = (ALL + ADD_BLOCK - 1) / ADD_BLOCK };
    float4 value[EACH];

    static __device__ int index()
    {
        return threadIdx.x / 4 % SIXTEEN;
    }

    /* h of the token, that of the second side h_side floats further on, with R elements each. */
    __device__ void load(const float *h, int h_side, const int (&R)[SIDES])
    {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int step = (threadIdx.x + e * ADD_BLOCK) / (SIXTEEN * 4);
            const int side = SIDES > 1 ? step / STEPS : 0;
            const int r = step % STEPS * 16 + threadIdx.x % 4 * 4;
            if (step < SIDES * STEPS)
                value[e] = load_h(h + side * h_side, r, side > 0 ? R[SIDES - 1] : R[0], true);
        }
    }

    /* Into the i-th of the two, times the side's scale. */
    template <int PARTS>
    __device__ void share(struct shared_h<SIDES, STEPS, PARTS> *to, int i,
                          const float (&scale)[SIDES]) const
    {
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int step = (threadIdx.x + e * ADD_BLOCK) / (SIXTEEN * 4);
            if (step >= SIDES * STEPS) continue;
            const int side = SIDES > 1 ? step / STEPS : 0;
            const float by = side > 0 ? scale[SIDES - 1] : scale[0];
            uint32_t low[PARTS], high[PARTS];
            split_pair<PARTS>(low, by * value[e].x, by * value[e].y);
            split_pair<PARTS>(high, by * value[e].z, by * value[e].w);
#pragma unroll
            for (int p = 0; p < PARTS; p++)
                to->part[i][side][step % STEPS][p][index()][threadIdx.x % 4] =
                    make_uint2(low[p], high[p]);
        }
    }
};

/* This lane's. */
template <int SIDES, int STEPS, int PARTS>
static inline __device__ void take_rows(struct h_rows<PARTS> *rows,
                                        const struct shared_h<SIDES, STEPS, PARTS> &from, int i,
                                        int side, int step)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        const uint2(&tokens)[SIXTEEN][4] = from.part[i][side][step][p];
        const uint2 a = tokens[lane / 4][lane % 4], b = tokens[lane / 4 + 8][lane % 4];
        rows->part[p][0] = a.x, rows->part[p][1] = b.x;
        rows->part[p][2] = a.y, rows->part[p][3] = b.y;
    }
}

#endif
#endif
