/* Number formats on the GPU: widening, rounding, loads and stores of eight numbers, and sums over a
 * warp or a block. A part of cuda.cuh, which includes it. */
#ifndef MLORA_KERNELS_CUDA_NUMBERS_CUH
#define MLORA_KERNELS_CUDA_NUMBERS_CUH

#include "kernels/cuda/cuda.cuh"

/* ---- numbers ------------------------------------------------------------------------------ */

static inline __device__ float widen(float x)
{
    return x;
}
static inline __device__ float widen(f16 x)
{
    return __half2float(x);
}
static inline __device__ float widen(bf16 x)
{
    return __bfloat162float(x);
}

template <typename T> static inline __device__ T narrow(float x);
template <> inline __device__ float narrow<float>(float x)
{
    return x;
}
template <> inline __device__ bf16 narrow<bf16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* x as it comes back from T. */
template <typename T> static inline __device__ float rounded(float x)
{
    return widen(narrow<T>(x));
}

/* 2^x in one instruction, to two units; 0 for -infinity. */
static inline __device__ float fast_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x / (1 + e^-x). For bf16 in few instructions: to three units of f32. */
template <typename T> static inline __device__ float silu(float x);
template <> inline __device__ float silu<float>(float x)
{
    return x / (1.0f + expf(-x));
}
template <> inline __device__ float silu<bf16>(float x)
{
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + fast_exp2(-1.442695041f * x)));
    return x * reciprocal;
}

/* Two bf16 in a register, `low` first in memory. */
static inline __device__ uint32_t pack_bf16(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

static inline __device__ float bf16_low(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}

static inline __device__ float bf16_high(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

/* Eight neighbours at a time: 16 bytes of the short types. */
enum { GROUP = 8 };

static inline __device__ void load_group(float to[GROUP], const float *from)
{
    const float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

static inline __device__ void load_group(float to[GROUP], const bf16 *from)
{
    const uint4 bits = *(const uint4 *)from;
    to[0] = bf16_low(bits.x), to[1] = bf16_high(bits.x);
    to[2] = bf16_low(bits.y), to[3] = bf16_high(bits.y);
    to[4] = bf16_low(bits.z), to[5] = bf16_high(bits.z);
    to[6] = bf16_low(bits.w), to[7] = bf16_high(bits.w);
}

static inline __device__ void load_group(float to[GROUP], const f16 *from)
{
    const uint4 bits = *(const uint4 *)from;
    __half2 pair[4];
    memcpy(pair, &bits, sizeof pair);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = __half22float2(pair[i]);
        to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
}

static inline __device__ void store_group(float *to, const float from[GROUP])
{
    *(float4 *)to = make_float4(from[0], from[1], from[2], from[3]);
    *(float4 *)(to + 4) = make_float4(from[4], from[5], from[6], from[7]);
}

static inline __device__ void store_group(bf16 *to, const float from[GROUP])
{
    *(uint4 *)to = make_uint4(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]),
                              pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7]));
}

/* The first n of a group, zeros after; `whole`: all of it is there and aligned. */
template <typename T>
static inline __device__ void load_some(float to[GROUP], const T *from, int n, bool whole)
{
    if (whole) {
        load_group(to, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) to[i] = i < n ? widen(from[i]) : 0.0f;
}

/* The same of element i on of an array whose type is known at run time only. */
static inline __device__ void load_any(float to[GROUP], const void *from, int dtype, size_t i,
                                       int n, bool whole)
{
    if (dtype == DTYPE_F32)
        load_some(to, (const float *)from + i, n, whole);
    else if (dtype == DTYPE_F16)
        load_some(to, (const f16 *)from + i, n, whole);
    else
        load_some(to, (const bf16 *)from + i, n, whole);
}

template <typename T>
static inline __device__ void store_some(T *to, const float from[GROUP], int n, bool whole)
{
    if (whole) {
        store_group(to, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        if (i < n) to[i] = narrow<T>(from[i]);
}

/* Of what is added to y, what is added to row t. */
static inline __device__ struct addend addend_of(struct addend addend, size_t t)
{
    if (addend.z && addend.slot[t] < 0) addend.z = NULL;
    return addend;
}

static inline __device__ bool is_added(const struct addend &of_row)
{
    return of_row.n_parts > 0 || of_row.z;
}

/* value = round(value + what is added), of the elements from `at` on. */
template <typename X>
static inline __device__ void add_some(float value[GROUP], const struct addend &of_row, size_t at,
                                       int n, bool whole)
{
#pragma unroll
    for (int p = 0; p <= PRODUCT_PARTS; p++) {
        const float *more = p < PRODUCT_PARTS ? of_row.parts + p * of_row.part : of_row.z;
        float some[GROUP] = {};
        if (p < PRODUCT_PARTS ? p < of_row.n_parts : more != NULL)
            load_some(some, more + at, n, whole);
#pragma unroll
        for (int e = 0; e < GROUP; e++) value[e] += some[e];
    }
#pragma unroll
    for (int e = 0; e < GROUP; e++) value[e] = rounded<X>(value[e]);
}

/* The same of one element. */
template <typename X>
static inline __device__ float add_one(float value, const struct addend &of_row, size_t at)
{
    for (int p = 0; p < of_row.n_parts; p++) value += of_row.parts[p * of_row.part + at];
    return rounded<X>(of_row.z ? value + of_row.z[at] : value);
}

/* ---- sums --------------------------------------------------------------------------------- */

static inline __device__ float warp_sum(float x)
{
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

/* The sum over the block, for every thread. `shared` [32]; all threads call it; it may be used
 * again after a barrier. */
static inline __device__ float block_sum(float x, float *shared)
{
    const int lane = threadIdx.x % WARP, n_warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(lane < n_warps ? shared[lane] : 0.0f);
}

#endif
