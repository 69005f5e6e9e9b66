#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

TestSuite(add_rms_norm, .init = device_open, .fini = device_close);
TestSuite(head_norm, .init = device_open, .fini = device_close);

Test(add_rms_norm, divides_by_the_root_of_the_mean_square)
{
    const float x0[2] = {2, -6}, delta[2] = {1, 1}; /* x + delta = 3, -5: mean square 17 */
    const float weight[2] = {1, 2};
    const float want[2] = {3.0f / 6.0f, 2 * -5.0f / 6.0f}; /* 17 + eps of 19 = 36 */
    float *x = upload(x0, sizeof x0), *y = device_memory(sizeof want);
    float got[2], got_x[2];

    dev->ops->add_rms_norm(dev, y, x, upload(delta, sizeof delta), DTYPE_F32,
                           upload(weight, sizeof weight), 1, 2, 19, DTYPE_F32);
    download(got, y, sizeof got);
    download(got_x, x, sizeof got_x);
    expect_near(got, want, 2, 0, 4 * 0x1p-24, "y"); /* root, quotient and two products */
    cr_expect_eq(got_x[0], 3);
    cr_expect_eq(got_x[1], -5);
}

Test(add_rms_norm, leaves_x_alone_without_delta)
{
    const float x0[3] = {1, 1, -1}, weight[3] = {1, 1, 1};
    float *x = upload(x0, sizeof x0), *y = device_memory(sizeof x0);
    float got[3];

    dev->ops->add_rms_norm(dev, y, x, NULL, DTYPE_F32, upload(weight, sizeof weight), 1, 3, 0,
                           DTYPE_F32);
    download(got, y, sizeof got);
    expect_near(got, x0, 3, 0, 2 * 0x1p-23, "y"); /* already of mean square 1 */
    download(got, x, sizeof got);
    cr_expect_arr_eq(got, x0, sizeof x0);
}

/* y = weight * x / sqrt(mean square + eps) in double */
static void want_norm(float *y, const float *x, const float *weight, int n, float eps)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    for (int i = 0; i < n; i++)
        y[i] = (float)((double)weight[i] * (double)x[i] / sqrt(sum / n + (double)eps));
}

Test(add_rms_norm, is_right_for_odd_widths_in_all_types)
{
    static const int widths[] = {1, 15, 16, 33, 257, 4096};
    struct numbers numbers = {1};

    for (int i = 0; i < 6; i++) {
        for (int type = 0; type < PRODUCT_TYPES; type++) {
            const enum dtype product = product_types[type].product;
            const enum dtype dtype = product_types[type].dtype;
            const int T = 9, D = widths[i];
            const size_t n = (size_t)(T * D);
            float *x0 = next_floats(&numbers, n, DTYPE_F32),
                  *delta = next_floats(&numbers, n, product);
            float *weight = next_floats(&numbers, (size_t)D, DTYPE_F32);
            float *got = zeros(n, sizeof *got), *want = zeros(n, sizeof *want);
            float *x = upload(x0, n * sizeof *x0);
            void *y = device_memory(n * dtype_bytes(dtype));

            dev->ops->add_rms_norm(dev, y, x, upload_as(product, delta, n), product,
                                   upload(weight, (size_t)D * 4), T, D, 1e-5f, dtype);
            for (size_t j = 0; j < n; j++) x0[j] += delta[j];
            for (int t = 0; t < T; t++) want_norm(want + t * D, x0 + t * D, weight, D, 1e-5f);
            download(got, x, n * sizeof *got);
            expect_near(got, x0, n, 0, 0, "x");
            download_f32(got, y, dtype, n);
            /* D / 16 additions of squares, each half a unit, halved by the root; bf16: and one
             * rounding */
            expect_near(got, want, n, 0,
                        (D / 32 + 8) * 0x1p-24 + (dtype == DTYPE_F32 ? 0 : half_ulp(dtype)), "y");
            free(x0);
            free(delta);
            free(weight);
            free(got);
            free(want);
        }
    }
}

Test(head_norm, norms_queries_and_keys_and_leaves_values)
{
    enum { T = 3, H = 4, G = 2, D = 6, ROW = (H + 2 * G) * D };
    const struct heads heads = {.H = H, .G = G, .d = D};
    struct numbers numbers = {2};

    for (int bf16 = 0; bf16 < 2; bf16++) {
        const enum dtype dtype = bf16 ? DTYPE_BF16 : DTYPE_F32;
        float *qkv0 = next_floats(&numbers, T * ROW, dtype);
        float *q = next_floats(&numbers, D, DTYPE_F32), *k = next_floats(&numbers, D, DTYPE_F32);
        void *qkv = upload_as(dtype, qkv0, T * ROW);
        float got[T * ROW], want[T * ROW];

        dev->ops->head_norm(dev, qkv, upload(q, D * 4), upload(k, D * 4), &heads, T, 1e-6f, dtype);
        download_f32(got, qkv, dtype, T * ROW);
        for (int i = 0; i < T * ROW; i += D) {
            const int head = i % ROW / D;
            if (head < H + G)
                want_norm(want + i, qkv0 + i, head < H ? q : k, D, 1e-6f);
            else
                for (int j = 0; j < D; j++) want[i + j] = qkv0[i + j];
        }
        expect_near(got, want, T * ROW, 0, 8 * 0x1p-24 + (bf16 ? half_ulp(dtype) : 0), "qkv");
        free(qkv0);
        free(q);
        free(k);
    }
}
