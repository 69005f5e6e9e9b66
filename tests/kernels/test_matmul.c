#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/device.h"

TestSuite(matmul, .init = device_open, .fini = device_close);

/* y[t, n] in double, and the sum of the terms' magnitudes, which bounds the rounding error. */
static double dot(const float *a, const float *b, int K, double *magnitude)
{
    double sum = 0;
    *magnitude = 0;
    for (int k = 0; k < K; k++) {
        sum += (double)a[k] * (double)b[k];
        *magnitude += fabs((double)a[k] * (double)b[k]);
    }
    return sum;
}

Test(matmul, multiplies_by_rows_and_adds_the_bias)
{
    const float x[2][3] = {{1, 2, 3}, {-1, 0, 2}};                        /* [T, K] */
    const float w0[4][3] = {{1, 0, 0}, {0, 1, 0}, {1, 1, 1}, {2, -1, 4}}; /* [N, K] */
    const float bias[4] = {0, 10, 0, 0.5f};
    const float want[2][4] = {{1, 12, 6, 12.5f}, {-1, 10, 1, 6.5f}};
    void *y = device_memory(sizeof want);

    for (enum dtype type = DTYPE_F32; type <= DTYPE_BF16; type++) {
        const struct matrix w = {upload_as(type, &w0[0][0], 12), type, 4, 3};
        float got[2][4];
        dev->ops->matmul(dev, y, DTYPE_F32, upload(x, sizeof x), &w, upload(bias, sizeof bias), 2,
                         DTYPE_F32);
        download(got, y, sizeof got);
        cr_expect_arr_eq(got, want, sizeof want);
    }
}

Test(matmul, rounds_once_after_the_bias)
{
    /* 1 + 2^-8 is halfway between two bf16 numbers; with the bias of 2^-20 it is above half. */
    const float x[2] = {1, 0x1p-8f}, one[2] = {1, 1}, bias[1] = {0x1p-20f};
    const struct matrix w = {upload_as(DTYPE_BF16, one, 2), DTYPE_BF16, 1, 2};
    void *y = device_memory(2);
    float got;

    dev->ops->matmul(dev, y, DTYPE_BF16, upload_as(DTYPE_BF16, x, 2), &w, upload(bias, 4), 1,
                     DTYPE_BF16);
    download_f32(&got, y, DTYPE_BF16, 1);
    cr_expect_eq(got, 1.0078125f);
}

static void check_random(struct numbers *numbers, int T, int N, int K, enum dtype type,
                         enum dtype dtype, enum dtype y_dtype)
{
    float *x = next_floats(numbers, (size_t)T * (size_t)K, dtype);
    float *w0 = next_floats(numbers, (size_t)N * (size_t)K, type);
    float *bias = next_floats(numbers, (size_t)N, DTYPE_F32);
    float *got = zeros((size_t)T * (size_t)N, sizeof *got);
    const struct matrix w = {upload_as(type, w0, (size_t)N * (size_t)K), type, N, K};
    void *y = device_memory((size_t)T * (size_t)N * dtype_bytes(y_dtype));

    dev->ops->matmul(dev, y, y_dtype, upload_as(dtype, x, (size_t)T * (size_t)K), &w,
                     upload(bias, (size_t)N * sizeof *bias), T, dtype);
    download_f32(got, y, y_dtype, (size_t)T * (size_t)N);
    for (int t = 0; t < T; t++) {
        for (int n = 0; n < N; n++) {
            double magnitude;
            const float want =
                (float)(dot(x + (size_t)t * (size_t)K, w0 + (size_t)n * (size_t)K, K, &magnitude) +
                        (double)bias[n]);
            /* A partial sum has K / 16 terms and each addition may be half a unit off; then the
             * tree, the bias, and one rounding to the type of y. */
            const double absolute = (K / 16 + 6) * 0x1p-24 * (magnitude + 1);
            expect_near(&got[t * N + n], &want, 1, absolute, half_ulp(y_dtype) * 1.01, "matmul");
        }
    }
    free(x);
    free(w0);
    free(bias);
    free(got);
}

Test(matmul, is_right_for_all_types_and_odd_shapes)
{
    static const int shapes[][3] = {
        {1, 1, 1},   {1, 7, 5},     {3, 13, 16},    {2, 50, 17},    {5, 31, 40},   {7, 100, 129},
        {8, 49, 64}, {9, 97, 1023}, {33, 53, 1024}, {65, 61, 1025}, {130, 20, 70}, {4, 200, 2100},
    };
    struct numbers numbers = {1};

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (enum dtype type = DTYPE_F32; type <= DTYPE_BF16; type++) {
            const int T = shapes[i][0], N = shapes[i][1], K = shapes[i][2];
            check_random(&numbers, T, N, K, type, DTYPE_F32, DTYPE_F32);
            check_random(&numbers, T, N, K, type, DTYPE_BF16, DTYPE_BF16);
            if (i < 4) check_random(&numbers, T, N, K, type, DTYPE_BF16, DTYPE_F32);
        }
}

/* y of bf16 matrices, f32 as at decode, against sums in double. */
static void check_few_tokens(struct numbers *numbers, int T, int N, int K, bool has_bias)
{
    const size_t n_x = (size_t)(T * K), n_w = (size_t)(N * K), n_y = (size_t)(T * N);
    float *x = next_floats(numbers, n_x, DTYPE_BF16), *w0 = next_floats(numbers, n_w, DTYPE_BF16);
    float *bias = next_floats(numbers, (size_t)N, DTYPE_F32);
    float *got = zeros(n_y, sizeof *got);
    const struct matrix w = {upload_as(DTYPE_BF16, w0, n_w), DTYPE_BF16, N, K};
    void *y = device_memory(n_y * sizeof *got);

    dev->ops->matmul(dev, y, DTYPE_F32, upload_as(DTYPE_BF16, x, n_x), &w,
                     has_bias ? upload(bias, (size_t)N * sizeof *bias) : NULL, T, DTYPE_BF16);
    download(got, y, n_y * sizeof *got);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double magnitude;
            const double sum = dot(x + t * K, w0 + n * K, K, &magnitude);
            const float want = (float)(sum + (has_bias ? (double)bias[n] : 0));
            /* Tensor cores may cut a unit off at every addition of 16 terms or fewer. */
            const double absolute = (K / 8 + 6) * 0x1p-23 * (magnitude + 1);
            expect_near(&got[t * N + n], &want, 1, absolute, 0, "few tokens");
        }
    free(x);
    free(w0);
    free(bias);
    free(got);
}

Test(matmul, of_few_tokens_is_right_at_any_size)
{
    static const int shapes[][3] = {
        {1, 128, 64},   {2, 129, 72},    {7, 300, 520},  {8, 64, 1024},  {9, 257, 2048},
        {16, 140, 776}, {17, 200, 1096}, {33, 256, 512}, {63, 1, 1024},  {64, 130, 136},
        {64, 320, 640}, {65, 130, 520},  {3, 500, 8},    {50, 20, 4096},
    };
    struct numbers numbers = {5};

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        check_few_tokens(&numbers, shapes[i][0], shapes[i][1], shapes[i][2], i % 2 == 0);
}

/* Parts of a product may be left to the op that reads it: the same as from a y that is whole. */
Test(matmul, is_whole_for_the_op_that_reads_it)
{
    enum { T = 21, N = 256, K = 1024 };
    struct numbers numbers = {6};
    float *x0 = next_floats(&numbers, T * K, DTYPE_BF16), *norm = zeros(T * N, sizeof *norm);
    float *w0 = next_floats(&numbers, N * K, DTYPE_BF16), *want = zeros(T * N, sizeof *want);
    float *whole = zeros(T * N, sizeof *whole), *ones = zeros(N, sizeof *ones);
    const struct matrix w = {upload_as(DTYPE_BF16, w0, N * K), DTYPE_BF16, N, K};
    const void *x = upload_as(DTYPE_BF16, x0, T * K);
    float *y = device_memory(T * N * sizeof *y), *residual;
    void *out = device_memory(T * N * sizeof(uint16_t));

    for (int n = 0; n < N; n++) ones[n] = 1;
    const float *weight = upload(ones, N * sizeof *ones);
    dev->ops->matmul(dev, y, DTYPE_F32, x, &w, NULL, T, DTYPE_BF16);
    download(whole, y, T * N * sizeof *whole);
    for (int reader = 0; reader < 2; reader++)
        for (int pass = 0; pass < 2; pass++) {
            if (pass)
                dev->ops->upload(dev, y, whole, T * N * sizeof *whole);
            else
                dev->ops->matmul(dev, y, DTYPE_F32, x, &w, NULL, T, DTYPE_BF16);
            if (reader) {
                dev->ops->silu_mul(dev, out, y, DTYPE_F32, T, N / 2, DTYPE_BF16);
            } else {
                residual = upload(want, T * N * sizeof *want); /* zeros at first */
                dev->ops->add_rms_norm(dev, out, residual, y, DTYPE_F32, weight, T, N, 1e-5f,
                                       DTYPE_BF16);
            }
            const size_t n = reader ? T * N / 2 : T * N;
            download_f32(pass ? want : norm, out, DTYPE_BF16, n);
            if (pass) expect_same(norm, want, n, reader ? "silu_mul" : "add_rms_norm");
            memset(want, 0, T * N * sizeof *want);
        }
    free(x0);
    free(w0);
    free(norm);
    free(want);
    free(whole);
    free(ones);
}

Test(matmul, gives_a_row_the_same_bits_beside_any_other_rows)
{
    enum { T_MAX = 70, N = 101, K = 1237 };
    struct numbers numbers = {2};

    for (enum dtype type = DTYPE_F32; type <= DTYPE_BF16; type++) {
        float *x0 = next_floats(&numbers, T_MAX * K, DTYPE_F32);
        float *w0 = next_floats(&numbers, N * K, type);
        float *want = zeros(T_MAX * N, sizeof *want);
        float *got = zeros(T_MAX * N, sizeof *got);
        const struct matrix w = {upload_as(type, w0, N * K), type, N, K};
        float *x = upload(x0, T_MAX * K * sizeof *x0);
        float *y = device_memory(T_MAX * N * sizeof *y);

        for (int t = 0; t < T_MAX; t++)
            dev->ops->matmul(dev, y + t * N, DTYPE_F32, x + t * K, &w, NULL, 1, DTYPE_F32);
        download(want, y, T_MAX * N * sizeof *y);
        for (int T = 1; T <= T_MAX; T++) {
            const int first = (T_MAX - T) / 2;
            dev->ops->matmul(dev, y, DTYPE_F32, x + first * K, &w, NULL, T, DTYPE_F32);
            download(got, y, (size_t)T * N * sizeof *y);
            expect_same(got, want + first * N, (size_t)T * N, dtype_name(type));
        }
        free(x0);
        free(w0);
        free(want);
        free(got);
    }
}

/* On the CPU only: with each kind of vector code and numbers of threads, from host arrays. */
static void run_with(float *y, const struct simd *simd, int n_threads, const float *x,
                     const struct matrix *w, int T)
{
    struct device *cpu;
    cr_assert_eq(cpu_device_open(&cpu, n_threads), MLORA_OK);
    cpu_device(cpu)->simd = simd;
    cpu->ops->matmul(cpu, y, DTYPE_F32, x, w, NULL, T, DTYPE_F32);
    cr_assert_eq(cpu->ops->sync(cpu), MLORA_OK);
    cpu->ops->close(cpu);
}

Test(matmul, gives_the_same_bits_with_any_number_of_threads_and_vector_width)
{
    enum { T = 37, N = 211, K = 1100 };
    struct numbers numbers = {3};
    float *x = next_floats(&numbers, T * K, DTYPE_F32);
    float *w0 = next_floats(&numbers, N * K, DTYPE_F32);
    uint16_t *bits = zeros(N * K, sizeof *bits);
    float *want = zeros(T * N, sizeof *want);
    float *got = zeros(T * N, sizeof *got);
    const struct simd *plain = simd_plain(), *avx2 = simd_avx2();

    for (int i = 0; i < N * K; i++) bits[i] = bf16_from_f32(w0[i]);
    const struct matrix w = {bits, DTYPE_BF16, N, K};
    run_with(want, simd_best(), 1, x, &w, T);
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        run_with(got, simd_best(), n_threads, x, &w, T);
        expect_same(got, want, T * N, "threads");
        run_with(got, simd_best(), n_threads, x, &w, 1);
        expect_same(got, want, N, "threads, one row");
        if (!avx2) continue;
        run_with(got, avx2, n_threads, x, &w, T);
        expect_same(got, want, T * N, "avx2");
    }
    run_with(got, plain, 2, x, &w, T);
    expect_near(got, want, T * N, 1e-3, 0, "plain C"); /* no fused multiply-add: last bits */
    free(x);
    free(w0);
    free(bits);
    free(want);
    free(got);
}
