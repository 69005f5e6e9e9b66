/* The vector code of each width, against plain definitions. CPU only. */
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/simd.h"

/* Those that this machine has; the first is plain C. */
static int all_kinds(const struct simd **kinds)
{
    int n = 0;
    kinds[n++] = simd_plain();
    if (simd_avx2()) kinds[n++] = simd_avx2();
    if (simd_avx512()) kinds[n++] = simd_avx512();
    return n;
}

Test(simd, widens_every_16_bit_number)
{
    enum { N = 65536 };
    const struct simd *kinds[3];
    const int n_kinds = all_kinds(kinds);
    uint16_t *bits = zeros(N, sizeof *bits);
    float *wide = zeros(N, sizeof *wide);

    for (int i = 0; i < N; i++) bits[i] = (uint16_t)i;
    for (int kind = 0; kind < n_kinds; kind++) {
        for (enum dtype type = DTYPE_F16; type <= DTYPE_BF16; type++) {
            kinds[kind]->widen(wide, bits, type, N);
            for (int i = 0; i < N; i++) {
                const float want = type == DTYPE_F16 ? f16_to_f32(bits[i]) : bf16_to_f32(bits[i]);
                if (want == want)
                    cr_assert(memcmp(&wide[i], &want, sizeof want) == 0, "%s: %s %04x",
                              kinds[kind]->name, dtype_name(type), (unsigned)i);
                else
                    cr_assert(wide[i] != wide[i]);
            }
        }
    }
    free(bits);
    free(wide);
}

Test(simd, narrows_as_bf16_from_f32)
{
    enum { N = 20003 };
    const struct simd *kinds[3];
    const int n_kinds = all_kinds(kinds);
    struct numbers numbers = {1};
    float *values = zeros(N, sizeof *values);
    uint16_t *bits = zeros(N, sizeof *bits);

    for (int i = 0; i < N; i++) { /* any bits: subnormals, infinities and NaN too */
        uint32_t word = (uint32_t)next_word(&numbers);
        if (i % 3 == 0) word = (word & 0xffff0000u) | 0x8000u; /* halfway */
        if (i % 50 == 0) word = (word & 0x8000ffffu) | 0x7f800000u | (word >> 12 & 0x700000u);
        memcpy(&values[i], &word, sizeof word);
    }
    for (int kind = 0; kind < n_kinds; kind++) {
        kinds[kind]->narrow(bits, DTYPE_BF16, values, N);
        for (int i = 0; i < N; i++)
            cr_assert_eq(bits[i], bf16_from_f32(values[i]), "%s: %a", kinds[kind]->name,
                         (double)values[i]);
    }
    free(values);
    free(bits);
}

Test(simd, exp_is_within_two_units_and_adds_up)
{
    enum { N = 10007 };
    const struct simd *kinds[3];
    const int n_kinds = all_kinds(kinds);
    float *x = zeros(N, sizeof *x), *y = zeros(N, sizeof *y);

    for (int i = 0; i < N; i++) x[i] = 3 - 90.0f * (float)i / N;
    x[N - 1] = -INFINITY;
    for (int kind = 0; kind < n_kinds; kind++) {
        const float sum = kinds[kind]->exp_sum(y, x, 3, N);
        double want_sum = 0;
        for (int i = 0; i < N; i++) {
            const double want = exp((double)x[i] - 3.0);
            want_sum += want;
            cr_assert(fabs((double)y[i] - want) <= want * 2 * 0x1p-23 + 0x1p-126, "%s: exp(%g)",
                      kinds[kind]->name, (double)x[i] - 3.0);
        }
        cr_expect_float_eq(sum, want_sum, want_sum * 1e-5);
        for (int n = 1; n < 40; n++) { /* ends of every length, nothing beyond written */
            float tail[41];
            memset(tail, 0x55, sizeof tail);
            const float before = tail[n];
            const float total = kinds[kind]->exp_sum(tail, x, 3, (size_t)n);
            cr_assert_eq(memcmp(&tail[n], &before, sizeof before), 0);
            cr_assert_eq(tail[0], 1);
            cr_assert(total > 0.8f * (float)n && total <= (float)n);
        }
    }
    free(x);
    free(y);
}

Test(simd, avx2_and_avx512_agree_bit_for_bit)
{
    enum { T = 11, N = 20, K = 333, P = 9 };
    const struct simd *avx2 = simd_avx2(), *avx512 = simd_avx512();
    if (!avx2 || !avx512) return; /* nothing to compare on this machine */
    struct numbers numbers = {2};
    float *x = next_floats(&numbers, T * K, DTYPE_F32),
          *w = next_floats(&numbers, N * K, DTYPE_F32);
    float *scratch = zeros(DOTS_SCRATCH, sizeof *scratch);
    float got[2][T * N], mixed[2][T * K];
    const float *rows[T];

    for (int t = 0; t < T; t++) rows[t] = x + t * K;
    memset(mixed, 0, sizeof mixed);
    for (int i = 0; i < 2; i++) {
        const struct simd *simd = i ? avx512 : avx2;
        const struct dots dots = {got[i], N, rows, w, DTYPE_F32, T, N, K, scratch};
        const struct mix mix = {mixed[i], x, K, w, DTYPE_F32, T, P, K};
        simd->dots(&dots);
        simd->mix(&mix);
    }
    cr_expect_arr_eq(got[0], got[1], sizeof got[0]);
    cr_expect_arr_eq(mixed[0], mixed[1], sizeof mixed[0]);
    free(x);
    free(w);
    free(scratch);
}
