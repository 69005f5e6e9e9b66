/* A vec is two registers of AVX2, lanes 0 to 7 and 8 to 15. */
#include "kernels/cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) /* GCC's target pragma */

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

enum { TILE_T = 2, TILE_N = 3 }; /* 6 sums: 12 of 16 registers */

typedef struct {
    __m256 low, high;
} vec;

#define OP static inline __attribute__((always_inline))

OP vec vec_of(__m256 low, __m256 high)
{
    return (vec){low, high};
}
OP vec vec_zero(void)
{
    return vec_of(_mm256_setzero_ps(), _mm256_setzero_ps());
}
OP vec vec_splat(float value)
{
    return vec_of(_mm256_set1_ps(value), _mm256_set1_ps(value));
}
OP vec vec_load(const float *from)
{
    return vec_of(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
}

OP void vec_store(float *to, vec value)
{
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
}

OP vec vec_add(vec a, vec b)
{
    return vec_of(_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high));
}

OP vec vec_sub(vec a, vec b)
{
    return vec_of(_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high));
}

OP vec vec_mul(vec a, vec b)
{
    return vec_of(_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high));
}

OP vec vec_fma(vec a, vec b, vec c)
{
    return vec_of(_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high));
}

OP vec vec_max(vec a, vec b)
{
    return vec_of(_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high));
}

OP vec vec_load_part(const float *from, size_t n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n - 8), lane);
    return vec_of(_mm256_maskload_ps(from, low), _mm256_maskload_ps(from + 8, high));
}

OP __m256 widen_bf16(const uint16_t *from)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

OP vec vec_load_bf16(const uint16_t *from)
{
    return vec_of(widen_bf16(from), widen_bf16(from + 8));
}

OP vec vec_load_f16(const uint16_t *from)
{
    return vec_of(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                  _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8))));
}

/* As bf16_from_f32. */
OP __m256i round_bf16(__m256 value)
{
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i top = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(top, quiet, nan);
}

OP void vec_store_bf16(uint16_t *to, vec value)
{
    /* packus works within 128-bit halves: put the quarters back in order. */
    const __m256i packed = _mm256_packus_epi32(round_bf16(value.low), round_bf16(value.high));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0xd8));
}

OP float vec_sum(vec a)
{
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#define PAIR_HALVES(a, b)                                                                          \
    _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))
#define PAIR_LANES(a, b, first, rest)                                                              \
    _mm256_add_ps(_mm256_shuffle_ps(a, b, first), _mm256_shuffle_ps(a, b, rest))

/* The tree of vec_sum in eight vectors at once: each step halves their number. */
OP void sum_8(float *to, const float *from)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256 a[8];

#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] =
            _mm256_add_ps(_mm256_loadu_ps(from + i * LANES), _mm256_loadu_ps(from + i * LANES + 8));
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) a[i] = PAIR_HALVES(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < 2; i++) a[i] = PAIR_LANES(a[2 * i], a[2 * i + 1], 0x44, 0xee);
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(PAIR_LANES(a[0], a[1], 0x88, 0xdd), order));
}

OP void vec_sum_16(float *to, const float *from)
{
    sum_8(to, from);
    sum_8(to + 8, from + 8 * LANES);
}

OP vec vec_round(vec a)
{
    return vec_of(_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                  _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

OP __m256 exp2i(__m256 whole)
{
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

OP vec vec_exp2i(vec whole)
{
    return vec_of(exp2i(whole.low), exp2i(whole.high));
}

#include "kernels/cpu/simd_loops.h"

#pragma GCC pop_options

const struct simd *simd_avx2(void)
{
    static const struct simd simd = {"avx2", dots, mix, widen, narrow, exp_sum};
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c")
               ? &simd
               : NULL;
}

#else

const struct simd *simd_avx2(void)
{
    return NULL;
}

#endif
