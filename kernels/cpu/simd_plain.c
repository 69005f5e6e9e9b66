/* A vec is an array of 16 floats: the definition, for machines without the other two. */
#include "kernels/cpu/simd.h"

#include <math.h>

enum { TILE_T = 2, TILE_N = 3 };

typedef struct {
    float lane[LANES];
} vec;

#define OP static inline __attribute__((always_inline))
#define EACH(of)                                                                                   \
    vec result;                                                                                    \
    for (int i = 0; i < LANES; i++) result.lane[i] = (of);                                         \
    return result

/* clang-format off */
OP vec vec_splat(float value)              { EACH(value); }
OP vec vec_zero(void)                      { return vec_splat(0.0f); }
OP vec vec_load(const float *from)         { EACH(from[i]); }
OP vec vec_load_bf16(const uint16_t *from) { EACH(bf16_to_f32(from[i])); }
OP vec vec_load_f16(const uint16_t *from)  { EACH(f16_to_f32(from[i])); }
OP vec vec_load_part(const float *from, size_t n) { EACH((size_t)i < n ? from[i] : 0.0f); }
OP vec vec_add(vec a, vec b)               { EACH(a.lane[i] + b.lane[i]); }
OP vec vec_sub(vec a, vec b)               { EACH(a.lane[i] - b.lane[i]); }
OP vec vec_mul(vec a, vec b)               { EACH(a.lane[i] * b.lane[i]); }
OP vec vec_max(vec a, vec b)               { EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
OP vec vec_round(vec a)                    { EACH(rintf(a.lane[i])); }
#ifdef FP_FAST_FMAF
OP vec vec_fma(vec a, vec b, vec c)        { EACH(fmaf(a.lane[i], b.lane[i], c.lane[i])); }
#else
OP vec vec_fma(vec a, vec b, vec c)        { EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
#endif
/* clang-format on */

OP void vec_store(float *to, vec value)
{
    for (int i = 0; i < LANES; i++) to[i] = value.lane[i];
}

OP void vec_store_bf16(uint16_t *to, vec value)
{
    for (int i = 0; i < LANES; i++) to[i] = bf16_from_f32(value.lane[i]);
}

OP float vec_sum(vec a)
{
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) a.lane[i] += a.lane[i + half];
    return a.lane[0];
}

OP void vec_sum_16(float *to, const float *from)
{
    for (int i = 0; i < LANES; i++) to[i] = vec_sum(vec_load(from + i * LANES));
}

OP float exp2i(float whole)
{
    /* NaN has no whole number: any will do, the factor beside it is NaN. */
    const uint32_t bits = whole == whole ? (uint32_t)((int)whole + 127) << 23 : 0;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

OP vec vec_exp2i(vec whole)
{
    EACH(exp2i(whole.lane[i]));
}

#include "kernels/cpu/simd_loops.h"

const struct simd *simd_plain(void)
{
    static const struct simd simd = {"plain C", dots, mix, widen, narrow, exp_sum};
    return &simd;
}
