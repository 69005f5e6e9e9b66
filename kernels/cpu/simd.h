/* The few loops that decide the speed of the CPU backend, compiled once for each vector width and
 * chosen when the device is opened.
 *
 * The one rule: each sum is made in an order that depends on its own length only. A dot product
 * has 16 partial sums, lane i taking the terms k with k % 16 == i in ascending k, which are added
 * as a tree at the end: so an output is the same bits whatever else is computed beside it, and
 * avx512 (one register) and avx2 (two registers) agree bit for bit. Plain C may differ in the
 * last bits where the machine has no fused multiply-add. */
#ifndef MLORA_KERNELS_CPU_SIMD_H
#define MLORA_KERNELS_CPU_SIMD_H

#include "kernels/dtype.h"

enum {
    LANES = 16,     /* partial sums of a dot product                                   */
    DOTS_T = 64,    /* most rows of x in one struct dots: their part of K stays in L2  */
    DOTS_N = 48,    /* most rows of w                                                  */
    DOTS_K = 512,   /* part of K that is worked on at a time: six rows of w stay in L1 */
    DOTS_PANEL = 6, /* rows of w that are widened at a time                            */
    DOTS_PITCH = DOTS_K + LANES, /* of widened rows: not a multiple of the L1's period */
    DOTS_SCRATCH = DOTS_T * DOTS_N * LANES + DOTS_PANEL * DOTS_PITCH, /* floats */
};

/* out[t, n] = dot(w[n, :], x[t, :])     t < T <= DOTS_T, n < N <= DOTS_N */
struct dots {
    float *out; /* [T, pitch] */
    int pitch;
    const float *const *x; /* [T] -> [K] */
    const void *w;         /* [N, K] dtype */
    enum dtype dtype;
    int T, N, K;
    float *scratch; /* [DOTS_SCRATCH] */
};

/* y[t, i] += sum over p of weight[t, p] rows[p, i], p ascending, for each output */
struct mix {
    float *y;            /* [T, d] */
    const float *weight; /* [T, pitch] */
    int pitch;
    const void *rows; /* [P, d] dtype */
    enum dtype dtype;
    int T, P, d;
};

struct simd {
    const char *name;
    void (*dots)(const struct dots *dots);
    void (*mix)(const struct mix *mix);
    void (*widen)(float *to, const void *from, enum dtype dtype, size_t n);
    void (*narrow)(void *to, enum dtype dtype, const float *from, size_t n);
    /* y[i] = exp(x[i] - max), returns the sum of y: lanes, then a tree. x may be y. No x is
     * greater than max. */
    float (*exp_sum)(float *y, const float *x, float max, size_t n);
};

/* NULL where the compiler or this machine has no such instructions. */
const struct simd *simd_avx512(void);
const struct simd *simd_avx2(void);
const struct simd *simd_plain(void); /* never NULL */

static inline const struct simd *simd_best(void)
{
    const struct simd *simd = simd_avx512();
    if (!simd) simd = simd_avx2();
    return simd ? simd : simd_plain();
}

#endif
