/* The loops of simd.h over a `vec` of 16 floats. Included by simd_avx512.c, simd_avx2.c and
 * simd_plain.c, each of which defines before:
 *
 *   TILE_T, TILE_N                   the tile of sums that fits the registers, at least 2 by 2
 *   vec                              16 floats
 *   vec_zero, vec_splat, vec_load, vec_load_bf16, vec_load_f16, vec_store, vec_store_bf16
 *   vec_load_part(from, n)           the first n < 16 floats, then zeros; reads nothing else
 *   vec_add, vec_sub, vec_mul
 *   vec_fma(a, b, c)                 a b + c
 *   vec_sum                          as a tree: lanes i and i + 8, then i + 4, i + 2, i + 1
 *   vec_sum_16(to, from)             the same of 16 vectors one after another, to 16 floats
 *   vec_exp2i(x)                     2^x of whole x in [-127, 0]; 0 for -127
 *   vec_max, vec_round
 *
 * A tile is some rows of x by some rows of w: each value that is loaded is used several times,
 * and each sum has one accumulator from its first term to its last. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* From this many rows of x on it is worth to widen rows of w once, before they are used. */
enum { WIDEN_T = 32 };

INLINE const void *at(const void *elements, enum dtype dtype, size_t index)
{
    return (const char *)elements + index * dtype_bytes(dtype);
}

INLINE vec load_wide(const void *from, enum dtype dtype)
{
    if (dtype == DTYPE_BF16) return vec_load_bf16(from);
    if (dtype == DTYPE_F16) return vec_load_f16(from);
    return vec_load(from);
}

/* The first n < 16 elements, then zeros. */
INLINE vec load_wide_part(const void *from, enum dtype dtype, size_t n)
{
    if (dtype == DTYPE_F32) return vec_load_part(from, n);
    uint16_t part[LANES] = {0};
    memcpy(part, from, n * sizeof part[0]);
    return dtype == DTYPE_BF16 ? vec_load_bf16(part) : vec_load_f16(part);
}

INLINE void store_part(float *to, vec value, size_t n)
{
    float part[LANES];
    vec_store(part, value);
    memcpy(to, part, n * sizeof part[0]);
}

/* ---- dots --------------------------------------------------------------------------------- */

/* sum[i, j, :] (+)= the lanes of w[j, :] x[i, k0:], i < n_x, j < n_w. The last three arguments
 * are constants where this is called, so the sums stay in registers. */
INLINE void tile(float *sum, int fresh, const float *const *x, int k0, const void *w, int w_pitch,
                 int K, const enum dtype dtype, const int n_x, const int n_w)
{
    vec acc[TILE_T * TILE_N];
    const float *x_row[TILE_T];
    const void *w_row[TILE_N];

#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++) x_row[i] = x[i] + k0;
#pragma GCC unroll 8
    for (int j = 0; j < n_w; j++) w_row[j] = at(w, dtype, (size_t)j * (size_t)w_pitch);
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n_w; j++)
            acc[i * n_w + j] = fresh ? vec_zero() : vec_load(sum + (i * DOTS_N + j) * LANES);

    size_t k = 0;
    for (; k + LANES <= (size_t)K; k += LANES) {
        vec wide[TILE_N];
#pragma GCC unroll 8
        for (int j = 0; j < n_w; j++) wide[j] = load_wide(at(w_row[j], dtype, k), dtype);
#pragma GCC unroll 8
        for (int i = 0; i < n_x; i++) {
            const vec row = vec_load(x_row[i] + k);
#pragma GCC unroll 8
            for (int j = 0; j < n_w; j++)
                acc[i * n_w + j] = vec_fma(wide[j], row, acc[i * n_w + j]);
        }
    }
    const size_t n = (size_t)K - k;
    if (n > 0) {
        vec wide[TILE_N];
#pragma GCC unroll 8
        for (int j = 0; j < n_w; j++) wide[j] = load_wide_part(at(w_row[j], dtype, k), dtype, n);
#pragma GCC unroll 8
        for (int i = 0; i < n_x; i++) {
            const vec row = vec_load_part(x_row[i] + k, n);
#pragma GCC unroll 8
            for (int j = 0; j < n_w; j++)
                acc[i * n_w + j] = vec_fma(wide[j], row, acc[i * n_w + j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_x; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n_w; j++) vec_store(sum + (i * DOTS_N + j) * LANES, acc[i * n_w + j]);
}

/* The same for any n_x and n_w up to TILE_T and TILE_N. */
INLINE void any_tile(float *sum, int fresh, const float *const *x, int k0, const void *w,
                     int w_pitch, int K, const enum dtype dtype, int n_x, const int n_w)
{
    if (n_x == TILE_T) {
        tile(sum, fresh, x, k0, w, w_pitch, K, dtype, TILE_T, n_w);
        return;
    }
    int i = 0;
    for (; i + 2 <= n_x; i += 2)
        tile(sum + i * DOTS_N * LANES, fresh, x + i, k0, w, w_pitch, K, dtype, 2, n_w);
    if (i < n_x) tile(sum + i * DOTS_N * LANES, fresh, x + i, k0, w, w_pitch, K, dtype, 1, n_w);
}

/* The same for any n_x, and n_w up to DOTS_PANEL; rows of w outside, so that they are read from
 * memory once. */
INLINE void panel(float *sum, int fresh, const float *const *x, int k0, const void *w, int w_pitch,
                  int K, const enum dtype dtype, int n_x, int n_w)
{
    int step;
    for (int j = 0; j < n_w; j += step) {
        const void *w_row = at(w, dtype, (size_t)j * (size_t)w_pitch);
        step = n_w - j >= TILE_N ? TILE_N : n_w - j >= 2 ? 2 : 1;
        for (int i = 0; i < n_x; i += TILE_T) {
            const int n = n_x - i < TILE_T ? n_x - i : TILE_T;
            float *part = sum + (i * DOTS_N + j) * LANES;
            if (step == TILE_N)
                any_tile(part, fresh, x + i, k0, w_row, w_pitch, K, dtype, n, TILE_N);
            else if (step == 2)
                any_tile(part, fresh, x + i, k0, w_row, w_pitch, K, dtype, n, 2);
            else
                any_tile(part, fresh, x + i, k0, w_row, w_pitch, K, dtype, n, 1);
        }
    }
}

/* panel() for each type: kept out of line, since each is large. */
#define DEFINE_PANEL(name, dtype)                                                                  \
    static __attribute__((noinline)) void name(float *sum, int fresh, const float *const *x,       \
                                               int k0, const void *w, int w_pitch, int K, int n_x, \
                                               int n_w)                                            \
    {                                                                                              \
        panel(sum, fresh, x, k0, w, w_pitch, K, dtype, n_x, n_w);                                  \
    }
DEFINE_PANEL(panel_f32, DTYPE_F32)
DEFINE_PANEL(panel_f16, DTYPE_F16)
DEFINE_PANEL(panel_bf16, DTYPE_BF16)

static void widen(float *to, const void *from, enum dtype dtype, size_t n)
{
    size_t i = 0;
    if (dtype == DTYPE_F32) {
        memcpy(to, from, n * sizeof *to);
        return;
    }
    for (; i + LANES <= n; i += LANES) vec_store(to + i, load_wide(at(from, dtype, i), dtype));
    if (i < n) store_part(to + i, load_wide_part(at(from, dtype, i), dtype, n - i), n - i);
}

static void narrow(void *to, enum dtype dtype, const float *from, size_t n)
{
    uint16_t *bits = to;
    size_t i = 0;
    if (dtype == DTYPE_F32) {
        memcpy(to, from, n * sizeof *from);
        return;
    }
    for (; i + LANES <= n; i += LANES) vec_store_bf16(bits + i, vec_load(from + i));
    for (; i < n; i++) bits[i] = bf16_from_f32(from[i]);
}

/* Few rows of x: some rows of w at a time over all of K, as they come from memory. Many: a part
 * of K at a time, so that what is used again stays near: the panel of w in the L1 cache, x and the
 * sums in the L2. */
static void dots(const struct dots *dots)
{
    float *sum = dots->scratch;                  /* [T, DOTS_N, LANES] */
    float *wide = sum + DOTS_T * DOTS_N * LANES; /* [DOTS_PANEL, DOTS_PITCH] */
    const size_t K = (size_t)dots->K;
    const int part = dots->T < WIDEN_T ? dots->K : DOTS_K;

    for (int k = 0; k < dots->K; k += part) {
        const int n_k = dots->K - k < part ? dots->K - k : part;
        for (int j = 0; j < dots->N; j += DOTS_PANEL) {
            const int n = dots->N - j < DOTS_PANEL ? dots->N - j : DOTS_PANEL;
            const void *w = at(dots->w, dots->dtype, (size_t)j * K + (size_t)k);
            float *to = sum + j * LANES;
            if (dots->dtype == DTYPE_F32) {
                panel_f32(to, k == 0, dots->x, k, w, dots->K, n_k, dots->T, n);
            } else if (dots->T >= WIDEN_T) {
                for (int i = 0; i < n; i++)
                    widen(wide + i * DOTS_PITCH, at(w, dots->dtype, (size_t)i * K), dots->dtype,
                          (size_t)n_k);
                panel_f32(to, k == 0, dots->x, k, wide, DOTS_PITCH, n_k, dots->T, n);
            } else if (dots->dtype == DTYPE_F16) {
                panel_f16(to, k == 0, dots->x, k, w, dots->K, n_k, dots->T, n);
            } else {
                panel_bf16(to, k == 0, dots->x, k, w, dots->K, n_k, dots->T, n);
            }
        }
    }
    for (int t = 0; t < dots->T; t++) {
        const float *from = sum + t * DOTS_N * LANES;
        float *out = dots->out + (size_t)t * (size_t)dots->pitch;
        int n = 0;
        for (; n + LANES <= dots->N; n += LANES) vec_sum_16(out + n, from + n * LANES);
        for (; n < dots->N; n++) out[n] = vec_sum(vec_load(from + n * LANES));
    }
}

/* ---- mix ---------------------------------------------------------------------------------- */

enum { MIX_T = TILE_T, MIX_VECS = 4 }; /* outputs at a time: rows of y by vectors of a row */

/* y[i, :] for i < n_t, n_v vectors of it; the last two and dtype constants where it is called. */
INLINE void mix_tile(float *y, size_t y_pitch, const float *weight, size_t weight_pitch,
                     const void *rows, size_t row_pitch, int P, const enum dtype dtype,
                     const int n_t, const int n_v)
{
    vec acc[MIX_T * MIX_VECS];

#pragma GCC unroll 8
    for (int i = 0; i < n_t; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n_v; j++)
            acc[i * n_v + j] = vec_load(y + (size_t)i * y_pitch + (size_t)j * LANES);
    for (int p = 0; p < P; p++) {
        vec wide[MIX_VECS];
#pragma GCC unroll 8
        for (int j = 0; j < n_v; j++)
            wide[j] = load_wide(at(rows, dtype, (size_t)p * row_pitch + (size_t)j * LANES), dtype);
#pragma GCC unroll 8
        for (int i = 0; i < n_t; i++) {
            const vec factor = vec_splat(weight[(size_t)i * weight_pitch + (size_t)p]);
#pragma GCC unroll 8
            for (int j = 0; j < n_v; j++)
                acc[i * n_v + j] = vec_fma(wide[j], factor, acc[i * n_v + j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n_t; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n_v; j++)
            vec_store(y + (size_t)i * y_pitch + (size_t)j * LANES, acc[i * n_v + j]);
}

INLINE void mix_typed(const struct mix *mix, const enum dtype dtype)
{
    const size_t d = (size_t)mix->d;
    const size_t pitch = (size_t)mix->pitch;

    for (int t = 0; t < mix->T;) {
        const int n_t = mix->T - t >= MIX_T ? MIX_T : 1;
        float *y = mix->y + (size_t)t * d;
        const float *weight = mix->weight + (size_t)t * pitch;
        size_t i = 0;
        for (; i + MIX_VECS * LANES <= d; i += MIX_VECS * LANES) {
            const void *rows = at(mix->rows, dtype, i);
            if (n_t == MIX_T)
                mix_tile(y + i, d, weight, pitch, rows, d, mix->P, dtype, MIX_T, MIX_VECS);
            else
                mix_tile(y + i, d, weight, pitch, rows, d, mix->P, dtype, 1, MIX_VECS);
        }
        for (; i + LANES <= d; i += LANES) {
            const void *rows = at(mix->rows, dtype, i);
            if (n_t == MIX_T)
                mix_tile(y + i, d, weight, pitch, rows, d, mix->P, dtype, MIX_T, 1);
            else
                mix_tile(y + i, d, weight, pitch, rows, d, mix->P, dtype, 1, 1);
        }
        for (int u = 0; u < n_t && i < d; u++) {
            vec acc = vec_load_part(y + (size_t)u * d + i, d - i);
            for (int p = 0; p < mix->P; p++) {
                const void *row = at(mix->rows, dtype, (size_t)p * d + i);
                const vec factor = vec_splat(weight[(size_t)u * pitch + (size_t)p]);
                acc = vec_fma(load_wide_part(row, dtype, d - i), factor, acc);
            }
            store_part(y + (size_t)u * d + i, acc, d - i);
        }
        t += n_t;
    }
}

static void mix(const struct mix *mix)
{
    if (mix->dtype == DTYPE_BF16)
        mix_typed(mix, DTYPE_BF16);
    else if (mix->dtype == DTYPE_F16)
        mix_typed(mix, DTYPE_F16);
    else
        mix_typed(mix, DTYPE_F32);
}

/* ---- exp ---------------------------------------------------------------------------------- */

/* exp of lanes <= 0: 2^n exp(r) with n the nearest whole number to x / ln 2, |r| <= ln 2 / 2, and
 * exp(r) by its series to r^7, whose rest is below 1e-8. Where n would be below -126 (under about
 * exp(-87.7), the end of the normal numbers) it is 0. */
static inline vec vec_exp(vec x)
{
    const vec low = vec_splat(-88.0f);
    const vec bounded = vec_max(low, x); /* NaN stays: the second operand is returned */
    const vec n = vec_round(vec_mul(bounded, vec_splat(0x1.715476p+0f)));
    vec r = vec_fma(n, vec_splat(-0x1.62e400p-1f), bounded); /* ln 2 in two parts */
    r = vec_fma(n, vec_splat(-0x1.7f7d1cp-20f), r);

    vec series = vec_splat(1.0f / 5040);
    series = vec_fma(series, r, vec_splat(1.0f / 720));
    series = vec_fma(series, r, vec_splat(1.0f / 120));
    series = vec_fma(series, r, vec_splat(1.0f / 24));
    series = vec_fma(series, r, vec_splat(1.0f / 6));
    series = vec_fma(series, r, vec_splat(0.5f));
    series = vec_fma(series, r, vec_splat(1.0f));
    series = vec_fma(series, r, vec_splat(1.0f));
    return vec_mul(series, vec_exp2i(n));
}

static float exp_sum(float *y, const float *x, float max, size_t n)
{
    const vec shift = vec_splat(max);
    vec sum = vec_zero();
    size_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        const vec value = vec_exp(vec_sub(vec_load(x + i), shift));
        vec_store(y + i, value);
        sum = vec_add(sum, value);
    }
    if (i < n) {
        float part[LANES] = {0};
        vec_store(part, vec_exp(vec_sub(vec_load_part(x + i, n - i), shift)));
        memset(part + (n - i), 0, (LANES - (n - i)) * sizeof part[0]);
        memcpy(y + i, part, (n - i) * sizeof part[0]);
        sum = vec_add(sum, vec_load(part));
    }
    return vec_sum(sum);
}
