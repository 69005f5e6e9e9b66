#include "tests/kernels/sequences.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/device.h"

TestSuite(attention, .init = device_open, .fini = device_close);

/* A cache full of keys and values, also where no row has any; NaN in the unused slots of a row's
 * last block, which nothing may read. */
static void fill_cache(struct sequences *sequences, float **k, float **v, struct numbers *numbers,
                       int G, int d)
{
    const enum dtype dtype = sequences->kv.dtype;
    const size_t n = (size_t)((sequences->n_blocks + 2) * G * KV_BLOCK * d);

    *k = next_floats(numbers, n, dtype);
    *v = next_floats(numbers, n, dtype);
    for (int q = 0; q < sequences->batch.Q; q++)
        for (int g = 0; g < G; g++)
            for (int p = sequences->kv_len[q]; p % KV_BLOCK != 0; p++) {
                const size_t slot = sequences_slot(sequences, q, p, g, G, d);
                for (int i = 0; i < d; i++) (*k)[slot + (size_t)i] = (*v)[slot + (size_t)i] = NAN;
            }
    sequences->kv.k = upload_as(dtype, *k, n);
    sequences->kv.v = upload_as(dtype, *v, n);
}

Test(attention, mixes_values_by_the_softmax_of_scores)
{
    /* q . k is 0, then ln 3 / scale: weights 1/4 and 3/4 */
    const struct heads heads = {.H = 1, .G = 1, .d = 2, .scale = 0.5f};
    const float qkv[3][2] = {{2, 0}, {9, 9}, {9, 9}}; /* only the query is read */
    const float want[2] = {0.25f * 4 + 0.75f * 8, 0.25f * 0 + 0.75f * -4};
    struct numbers numbers = {1};
    struct sequences sequences;
    float k[3 * KV_BLOCK * 2] = {0}, v[3 * KV_BLOCK * 2] = {0}, got[2];
    float *y = device_memory(sizeof got);

    sequences_build(&sequences, &numbers, 1, (int[]){2}, (int[]){1}, 1, 2, DTYPE_F32);
    const size_t first = sequences_slot(&sequences, 0, 0, 0, 1, 2), second = first + 2;
    v[first] = 4;
    k[second] = 1.0986123f;
    v[second] = 8;
    v[second + 1] = -4;
    sequences.kv.k = upload(k, sizeof k);
    sequences.kv.v = upload(v, sizeof v);
    dev->ops->attention(dev, y, upload(qkv, sizeof qkv), DTYPE_F32, &sequences.kv, &sequences.batch,
                        &heads, DTYPE_F32);
    download(got, y, sizeof got);
    expect_near(got, want, 2, 1e-6, 1e-6, "y");
    sequences_free(&sequences);
}

/* The formula in double. */
static void want_attention(float *y, const float *q, const float *k, const float *v,
                           const struct sequences *sequences, const struct heads *heads, int t,
                           int h)
{
    const int d = heads->d, g = h / (heads->H / heads->G);
    const int position = sequences->position[t], row = sequences->row[t];
    const int first = heads->window && position >= heads->window ? position - heads->window + 1 : 0;
    double *weight = zeros((size_t)(position + 1), sizeof *weight);
    double max = -INFINITY, sum = 0;

    for (int p = first; p <= position; p++) {
        const float *key = k + sequences_slot(sequences, row, p, g, heads->G, d);
        for (int i = 0; i < d; i++) weight[p] += (double)q[i] * (double)key[i];
        weight[p] *= (double)heads->scale;
        if (weight[p] > max) max = weight[p];
    }
    for (int p = first; p <= position; p++) sum += weight[p] = exp(weight[p] - max);
    for (int i = 0; i < d; i++) {
        double mixed = 0;
        for (int p = first; p <= position; p++)
            mixed += weight[p] *
                     (double)v[sequences_slot(sequences, row, p, g, heads->G, d) + (size_t)i];
        y[i] = (float)(mixed / sum);
    }
    free(weight);
}

static void check_types(int Q, const int *kv_len, const int *n_new, int H, int G, int d, int window,
                        enum dtype qkv_dtype, enum dtype dtype, enum dtype kv_dtype)
{
    const struct heads heads = {H, G, d, window, 1.0f / sqrtf((float)d)};
    struct numbers numbers = {(uint64_t)(H * 1000 + d)};
    struct sequences sequences;
    float *k, *v;
    sequences_build(&sequences, &numbers, Q, kv_len, n_new, G, d, kv_dtype);
    fill_cache(&sequences, &k, &v, &numbers, G, d);
    const int T = sequences.T;
    const size_t n_in = (size_t)(T * (H + 2 * G) * d), n_out = (size_t)(T * H * d);
    float *qkv = next_floats(&numbers, n_in, qkv_dtype);
    float *got = zeros(n_out, sizeof *got), *want = zeros(n_out, sizeof *want);
    void *y = device_memory(n_out * dtype_bytes(dtype));

    dev->ops->attention(dev, y, upload_as(qkv_dtype, qkv, n_in), qkv_dtype, &sequences.kv,
                        &sequences.batch, &heads, dtype);
    download_f32(got, y, dtype, n_out);
    for (size_t i = 0; i < n_in; i++) qkv[i] = round_to(dtype, qkv[i]);
    for (int t = 0; t < T; t++)
        for (int h = 0; h < H; h++)
            want_attention(want + (t * H + h) * d, qkv + (t * (H + 2 * G) + h) * d, k, v,
                           &sequences, &heads, t, h);
    /* Values are below 1 and weights sum to 1; the scores, exp and sums are off by some units of
     * 2^-24 each, and the sums have some hundred terms. */
    double absolute = 2e-5;
    /* A GPU's tensor cores take the weights in bf16, too: each is off by up to 2^-9 of itself, and
     * so is their mean of values below 1 in absolute value. */
    if (!device_is_cpu() && dtype == DTYPE_BF16) absolute += 0x1p-9;
    expect_near(got, want, n_out, absolute, half_ulp(dtype), "y");
    free(k);
    free(v);
    free(qkv);
    free(got);
    free(want);
    sequences_free(&sequences);
}

/* Q rows of n_new[q] tokens at the end of kv_len[q] positions. */
static void check_rows(int Q, const int *kv_len, const int *n_new, int H, int G, int d, int window,
                       enum dtype dtype, enum dtype kv_dtype)
{
    check_types(Q, kv_len, n_new, H, G, d, window, dtype, dtype, kv_dtype);
    if (dtype != DTYPE_F32)
        check_types(Q, kv_len, n_new, H, G, d, window, DTYPE_F32, dtype, kv_dtype);
}

static void check_random(int H, int G, int d, int window, enum dtype dtype, enum dtype kv_dtype)
{
    check_rows(5, (int[]){21, 1, 33, 150, 16}, (int[]){21, 1, 1, 37, 7}, H, G, d, window, dtype,
               kv_dtype);
}

Test(attention, is_right_for_long_rows_with_and_without_history)
{
    static const int shapes[][3] = {{4, 1, 64}, {4, 1, 128}, {3, 3, 64}, {2, 2, 128}, {3, 1, 96}};
    for (int i = 0; i < 5; i++)
        check_rows(4, (int[]){257, 128, 401, 516}, (int[]){257, 128, 68, 3}, shapes[i][0],
                   shapes[i][1], shapes[i][2], 0, DTYPE_BF16, DTYPE_BF16);
    check_rows(2, (int[]){257, 401}, (int[]){257, 68}, 4, 2, 64, 130, DTYPE_BF16, DTYPE_BF16);
}

Test(attention, is_right_for_all_head_shapes_and_types)
{
    check_random(4, 4, 8, 0, DTYPE_F32, DTYPE_F32);
    check_random(6, 2, 6, 0, DTYPE_F32, DTYPE_F32);
    check_random(8, 1, 10, 0, DTYPE_F32, DTYPE_BF16);
    check_random(4, 2, 64, 0, DTYPE_BF16, DTYPE_BF16);
    check_random(3, 1, 80, 0, DTYPE_BF16, DTYPE_BF16);
    check_random(2, 1, 96, 0, DTYPE_F32, DTYPE_F32);
    check_random(2, 2, 128, 0, DTYPE_BF16, DTYPE_BF16);
    check_random(1, 1, 256, 0, DTYPE_F32, DTYPE_F32);
    check_random(71, 1, 4, 0, DTYPE_F32, DTYPE_F32); /* more heads of a key than are done at once */
}

Test(attention, sees_only_the_window)
{
    check_random(4, 2, 8, 1, DTYPE_F32, DTYPE_F32);
    check_random(4, 2, 8, 3, DTYPE_F32, DTYPE_F32);
    check_random(4, 2, 16, 16, DTYPE_BF16, DTYPE_BF16);
    check_random(2, 1, 8, 50, DTYPE_F32, DTYPE_F32);
    check_random(2, 1, 8, 1000, DTYPE_F32, DTYPE_F32);
}

Test(attention, does_not_read_what_a_token_does_not_see)
{
    /* NaN in the unused slots of the last block: positions past the row's end. */
    const struct heads heads = {.H = 2, .G = 1, .d = 4, .scale = 1};
    struct numbers numbers = {5};
    struct sequences sequences;
    float *k, *v, got[19 * 8];
    float *y = device_memory(sizeof got);

    sequences_build(&sequences, &numbers, 1, (int[]){19}, (int[]){19}, 1, 4, DTYPE_F32);
    fill_cache(&sequences, &k, &v, &numbers, 1, 4);
    for (int p = 19; p < 32; p++)
        for (int i = 0; i < 4; i++) {
            k[sequences_slot(&sequences, 0, p, 0, 1, 4) + (size_t)i] = NAN;
            v[sequences_slot(&sequences, 0, p, 0, 1, 4) + (size_t)i] = NAN;
        }
    const size_t bytes = (size_t)((sequences.n_blocks + 2) * KV_BLOCK * 4) * sizeof *k;
    dev->ops->upload(dev, sequences.kv.k, k, bytes);
    dev->ops->upload(dev, sequences.kv.v, v, bytes);
    float *qkv = next_floats(&numbers, 19 * 16, DTYPE_F32);
    dev->ops->attention(dev, y, upload(qkv, 19 * 16 * 4), DTYPE_F32, &sequences.kv,
                        &sequences.batch, &heads, DTYPE_F32);
    download(got, y, sizeof got);
    for (int i = 0; i < 19 * 8; i++) cr_assert(isfinite(got[i]));
    free(qkv);
    free(k);
    free(v);
    sequences_free(&sequences);
}

/* Tokens of one sequence in pieces of `step` tokens, beside another row, must be the same bits. */
static void check_pieces(int window, enum dtype qkv_dtype, enum dtype dtype)
{
    enum { H = 6, G = 2, D = 24, N = 61, ROW = (H + 2 * G) * D };
    const struct heads heads = {H, G, D, window, 0.2f};
    struct numbers numbers = {6};
    struct sequences all;
    float *k, *v;
    sequences_build(&all, &numbers, 1, (int[]){N}, (int[]){N}, G, D, dtype);
    fill_cache(&all, &k, &v, &numbers, G, D);
    float *qkv = next_floats(&numbers, N * ROW, qkv_dtype);
    float *want = zeros(N * H * D, sizeof *want), *got = zeros(N * H * D, sizeof *got);
    void *y = device_memory((N + 1) * H * D * sizeof(float));

    dev->ops->attention(dev, y, upload_as(qkv_dtype, qkv, N * ROW), qkv_dtype, &all.kv, &all.batch,
                        &heads, dtype);
    download_f32(want, y, dtype, N * H * D);

    static const int steps[] = {1, 2, 5, 7, 16, 30};
    for (int i = 0; i < 6; i++) {
        for (int first = 0; first < N; first += steps[i]) {
            const int n = N - first < steps[i] ? N - first : steps[i];
            const int Q = 1 + i % 2; /* alone, or after a decode row of the same keys */
            struct sequences piece;
            sequences_build(&piece, &numbers, Q,
                            Q == 1 ? (int[]){first + n} : (int[]){9, first + n},
                            Q == 1 ? (int[]){n} : (int[]){1, n}, G, D, dtype);
            piece.kv.k = all.kv.k;
            piece.kv.v = all.kv.v;
            for (int q = 0; q < Q; q++)
                memcpy(piece.table + q * piece.kv.max_blocks, all.table,
                       (size_t)((piece.kv_len[q] + 15) / 16) * sizeof *piece.table);
            piece.kv.block_table =
                upload(piece.table, (size_t)(Q * piece.kv.max_blocks) * sizeof *piece.table);
            /* With the other row first, its token takes the place before ours. */
            const int skip = Q - 1;
            float *part = zeros((size_t)((n + skip) * ROW), sizeof *part);
            memcpy(part + skip * ROW, qkv + first * ROW, (size_t)(n * ROW) * sizeof *part);
            dev->ops->attention(dev, y, upload_as(qkv_dtype, part, (size_t)((n + skip) * ROW)),
                                qkv_dtype, &piece.kv, &piece.batch, &heads, dtype);
            download_f32(got, y, dtype, (size_t)((n + skip) * H * D));
            expect_same(got + skip * H * D, want + first * H * D, (size_t)(n * H * D), "pieces");
            free(part);
            sequences_free(&piece);
        }
    }
    free(k);
    free(v);
    free(qkv);
    free(want);
    free(got);
    sequences_free(&all);
}

Test(attention, gives_a_token_the_same_bits_in_a_prompt_and_alone)
{
    for (int i = 0; i < PRODUCT_TYPES; i++)
        check_pieces(0, product_types[i].product, product_types[i].dtype);
    check_pieces(9, DTYPE_F32, DTYPE_F32);
    check_pieces(40, DTYPE_F32, DTYPE_F32);
}

/* Rope and attention of rows of one token, one after the other, where the second may do the work of
 * both: as rope by itself leaves queries and cache, and the formula from there. */
static void check_after_rope(int H, int G, int d, int window, bool turns, enum dtype qkv_dtype,
                             enum dtype dtype)
{
    enum { Q = 8 };
    const int kv_len[Q] = {1, 700, 2, 16, 17, 33, 150, 15}, n_new[Q] = {1, 1, 1, 1, 1, 1, 1, 1};
    const struct heads heads = {H, G, d, window, 1.0f / sqrtf((float)d)};
    struct numbers numbers = {(uint64_t)(H * 1000 + d)};
    struct sequences sequences;
    float *k, *v, *frequency = zeros((size_t)d, sizeof *frequency);

    sequences_build(&sequences, &numbers, Q, kv_len, n_new, G, d, dtype);
    fill_cache(&sequences, &k, &v, &numbers, G, d);
    const size_t n_in = (size_t)(Q * (H + 2 * G) * d), n_out = (size_t)(Q * H * d);
    const size_t n_cache = (size_t)((sequences.n_blocks + 2) * G * KV_BLOCK * d);
    float *qkv = next_floats(&numbers, n_in, qkv_dtype), *turned = zeros(n_in, sizeof *turned);
    float *got = zeros(n_out, sizeof *got), *want = zeros(n_out, sizeof *want);
    float *got_k = zeros(n_cache, sizeof *k), *got_v = zeros(n_cache, sizeof *v);
    for (int i = 0; i < d / 2; i++) frequency[i] = (float)pow(10000, -2.0 * i / d);
    const struct rope_view rope = {turns ? upload(frequency, (size_t)d / 2 * 4) : NULL, 1.25f};
    void *alone = upload_as(qkv_dtype, qkv, n_in), *y = device_memory(n_out * dtype_bytes(dtype));
    struct kv_view both = sequences.kv;

    both.k = upload_as(dtype, k, n_cache);
    both.v = upload_as(dtype, v, n_cache);
    dev->ops->rope(dev, alone, &rope, &sequences.kv, &sequences.batch, &heads, qkv_dtype);
    download_f32(turned, alone, qkv_dtype, n_in);
    download_f32(k, sequences.kv.k, dtype, n_cache);
    download_f32(v, sequences.kv.v, dtype, n_cache);
    for (size_t i = 0; i < n_in; i++) turned[i] = round_to(dtype, turned[i]);
    for (int t = 0; t < Q; t++)
        for (int h = 0; h < H; h++)
            want_attention(want + (t * H + h) * d, turned + (t * (H + 2 * G) + h) * d, k, v,
                           &sequences, &heads, t, h);

    void *in = upload_as(qkv_dtype, qkv, n_in);
    dev->ops->rope(dev, in, &rope, &both, &sequences.batch, &heads, qkv_dtype);
    dev->ops->attention(dev, y, in, qkv_dtype, &both, &sequences.batch, &heads, dtype);
    download_f32(got, y, dtype, n_out);
    download_f32(got_k, both.k, dtype, n_cache);
    download_f32(got_v, both.v, dtype, n_cache);
    double absolute = 2e-5; /* as in check_types() */
    if (!device_is_cpu() && dtype == DTYPE_BF16) absolute += 0x1p-9;
    expect_near(got, want, n_out, absolute, half_ulp(dtype), "y");
    cr_expect_arr_eq(got_k, k, n_cache * sizeof *k, "keys");
    cr_expect_arr_eq(got_v, v, n_cache * sizeof *v, "values");
    free(k);
    free(v);
    free(qkv);
    free(turned);
    free(got);
    free(want);
    free(got_k);
    free(got_v);
    free(frequency);
    sequences_free(&sequences);
}

Test(attention, of_what_rope_turned_just_before)
{
    const int widths[] = {64, 80, 96, 128, 256, 32};

    for (int i = 0; i < 6; i++) {
        check_after_rope(8, 2, widths[i], 0, true, DTYPE_F32, DTYPE_BF16);
        check_after_rope(12, 1, widths[i], 0, true, DTYPE_BF16, DTYPE_BF16);
    }
    check_after_rope(2, 2, 128, 20, true, DTYPE_F32, DTYPE_BF16);
    check_after_rope(6, 3, 64, 0, false, DTYPE_F32, DTYPE_BF16);
    check_after_rope(4, 2, 64, 0, true, DTYPE_F32, DTYPE_F32);
}
