/* A vec is one register of AVX-512. */
#include "kernels/cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) /* GCC's target pragma */

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,f16c")

enum { TILE_T = 4, TILE_N = 6 }; /* 24 sums, 6 rows of w and one of x: 31 of 32 registers */

typedef __m512 vec;

#define OP static inline __attribute__((always_inline))

/* clang-format off */
OP vec  vec_zero(void)                    { return _mm512_setzero_ps(); }
OP vec  vec_splat(float value)            { return _mm512_set1_ps(value); }
OP vec  vec_load(const float *from)       { return _mm512_loadu_ps(from); }
OP void vec_store(float *to, vec value)   { _mm512_storeu_ps(to, value); }
OP vec  vec_add(vec a, vec b)             { return _mm512_add_ps(a, b); }
OP vec  vec_sub(vec a, vec b)             { return _mm512_sub_ps(a, b); }
OP vec  vec_mul(vec a, vec b)             { return _mm512_mul_ps(a, b); }
OP vec  vec_max(vec a, vec b)             { return _mm512_max_ps(a, b); }
OP vec  vec_fma(vec a, vec b, vec c)      { return _mm512_fmadd_ps(a, b, c); }
/* clang-format on */

OP vec vec_load_part(const float *from, size_t n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
}

OP vec vec_load_bf16(const uint16_t *from)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

OP vec vec_load_f16(const uint16_t *from)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

/* As bf16_from_f32. */
OP void vec_store_bf16(uint16_t *to, vec value)
{
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i top = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    top = _mm512_mask_mov_epi32(top, nan, quiet);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(top));
}

OP float vec_sum(vec a)
{
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* Quarters (four lanes) first and second, then the rest, of a and of b. */
#define PAIR_QUARTERS(a, b, first, rest)                                                           \
    _mm512_add_ps(_mm512_shuffle_f32x4(a, b, first), _mm512_shuffle_f32x4(a, b, rest))
#define PAIR_LANES(a, b, first, rest)                                                              \
    _mm512_add_ps(_mm512_shuffle_ps(a, b, first), _mm512_shuffle_ps(a, b, rest))

/* The tree of vec_sum in 16 vectors at once: each step halves their number. */
OP void vec_sum_16(float *to, const float *from)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    vec a[8];

#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) { /* lanes i and i + 8: two quarters of each vector are left */
        const vec even = vec_load(from + 2 * i * LANES), odd = vec_load(from + (2 * i + 1) * LANES);
        a[i] = PAIR_QUARTERS(even, odd, 0x44, 0xee);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) a[i] = PAIR_QUARTERS(a[2 * i], a[2 * i + 1], 0x88, 0xdd);
#pragma GCC unroll 8
    for (int i = 0; i < 2; i++) a[i] = PAIR_LANES(a[2 * i], a[2 * i + 1], 0x44, 0xee);
    vec_store(to, _mm512_permutexvar_ps(order, PAIR_LANES(a[0], a[1], 0x88, 0xdd)));
}

OP vec vec_round(vec a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

OP vec vec_exp2i(vec whole)
{
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

#include "kernels/cpu/simd_loops.h"

#pragma GCC pop_options

const struct simd *simd_avx512(void)
{
    static const struct simd simd = {"avx512", dots, mix, widen, narrow, exp_sum};
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("avx2")
               ? &simd
               : NULL;
}

#else

const struct simd *simd_avx512(void)
{
    return NULL;
}

#endif
