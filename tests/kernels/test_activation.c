#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

TestSuite(silu_mul, .init = device_open, .fini = device_close);

Test(silu_mul, gates_by_silu_at_every_size_of_gate)
{
    /* silu(0) = 0, silu(1) = 0.7310586, silu of large is itself, of very negative is 0 */
    const float gate_up[2][6] = {{0, 1, 100, 5, 2, 3}, {-200, -1, 88.8f, 7, -4, 0.5f}};
    const float want[2][3] = {{0, 1.4621172f, 300}, {0, 1.0757657f, 44.4f}};
    void *y = device_memory(sizeof want);
    float got[2][3];

    dev->ops->silu_mul(dev, y, upload(gate_up, sizeof gate_up), DTYPE_F32, 2, 3, DTYPE_F32);
    download(got, y, sizeof got);
    expect_near(&got[0][0], &want[0][0], 6, 1e-30, 4 * 0x1p-24, "y");
}

Test(silu_mul, is_right_for_odd_widths_in_all_types)
{
    static const int widths[] = {1, 17, 1025, 3000};
    struct numbers numbers = {1};

    for (int i = 0; i < 4; i++) {
        for (int type = 0; type < PRODUCT_TYPES; type++) {
            const enum dtype product = product_types[type].product;
            const enum dtype dtype = product_types[type].dtype;
            const int T = 3, F = widths[i];
            const size_t n = (size_t)(T * F);
            float *gate_up = next_floats(&numbers, 2 * n, DTYPE_F32);
            float *got = zeros(n, sizeof *got), *want = zeros(n, sizeof *want);
            void *y = device_memory(n * dtype_bytes(dtype));

            for (size_t j = 0; j < 2 * n; j++) gate_up[j] = round_to(product, 9 * gate_up[j]);
            dev->ops->silu_mul(dev, y, upload_as(product, gate_up, 2 * n), product, T, F, dtype);
            download_f32(got, y, dtype, n);
            for (int t = 0; t < T; t++) {
                for (int f = 0; f < F; f++) {
                    const double gate = (double)gate_up[t * 2 * F + f];
                    const double up = (double)gate_up[t * 2 * F + F + f];
                    want[t * F + f] = (float)(gate / (1 + exp(-gate)) * up);
                }
            }
            /* exp, sum, quotient and product; bf16: and one rounding */
            expect_near(got, want, n, 0, 6 * 0x1p-24 + (dtype == DTYPE_F32 ? 0 : half_ulp(dtype)),
                        "y");
            free(gate_up);
            free(got);
            free(want);
        }
    }
}

/* A product may make it as it goes, if nothing comes between: the same bits as from its result. */
static void check_after_product(int T, int K, int F, bool has_bias)
{
    enum { REPLAYS = 3 /* plain, recorded, replayed */ };
    struct numbers numbers = {(uint64_t)(T + K + F)};
    const size_t n_x = (size_t)(T * K), n_w = (size_t)(2 * F * K), n = (size_t)(T * F);
    float *x = next_floats(&numbers, n_x, DTYPE_BF16), *w = next_floats(&numbers, n_w, DTYPE_BF16);
    float *b = next_floats(&numbers, (size_t)(2 * F), DTYPE_F32);
    float *got = zeros(n, sizeof *got), *want = zeros(n, sizeof *want);
    const struct matrix matrix = {upload_as(DTYPE_BF16, w, n_w), DTYPE_BF16, 2 * F, K};
    const void *x_there = upload_as(DTYPE_BF16, x, n_x);
    const float *bias = has_bias ? upload(b, (size_t)(2 * F) * sizeof *b) : NULL;
    void *gate_up = device_memory(2 * n * sizeof(float)), *y = device_memory(n * 2);

    for (int i = -1; i < REPLAYS; i++) {
        if (i >= 0 && dev->ops->replay(dev, &y, sizeof y)) break;
        dev->ops->matmul(dev, gate_up, DTYPE_F32, x_there, &matrix, bias, T, DTYPE_BF16);
        if (i < 0) cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
        dev->ops->silu_mul(dev, y, gate_up, DTYPE_F32, T, F, DTYPE_BF16);
        if (i < 0)
            download_f32(want, y, DTYPE_BF16, n);
        else
            dev->ops->record_end(dev);
    }
    download_f32(got, y, DTYPE_BF16, n);
    cr_expect_arr_eq(got, want, n * sizeof *got, "%d x %d, gate %d", T, K, F);
    free(x);
    free(w);
    free(b);
    free(got);
    free(want);
}

Test(silu_mul, of_a_product_has_the_same_bits)
{
    check_after_product(1, 64, 128, false);
    check_after_product(3, 200, 64, true);
    check_after_product(16, 192, 320, true);
    check_after_product(17, 64, 96, false); /* half a tile more: nobody's */
    check_after_product(40, 512, 4352, true);
    check_after_product(64, 136, 512, false);
}
