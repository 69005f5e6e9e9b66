#include "tests/kernels/sequences.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

TestSuite(rope, .init = device_open, .fini = device_close);

Test(rope, turns_queries_and_keys_and_writes_the_cache)
{
    /* One token at position 1; frequency pi / 2: a quarter turn takes (a, b) to (-b, a). */
    const float qkv0[3][2] = {{1, 2}, {3, 4}, {5, 6}}, frequency[1] = {1.5707964f};
    const float want[3][2] = {{-2, 1}, {-4, 3}, {5, 6}};
    const struct heads heads = {.H = 1, .G = 1, .d = 2};
    const struct rope_view rope = {upload(frequency, sizeof frequency), 1};
    struct numbers numbers = {1};
    struct sequences sequences;
    float *qkv = upload(qkv0, sizeof qkv0);
    float got[3][2], k[2], v[2];

    sequences_build(&sequences, &numbers, 1, (int[]){2}, (int[]){1}, 1, 2, DTYPE_F32);
    dev->ops->rope(dev, qkv, &rope, &sequences.kv, &sequences.batch, &heads, DTYPE_F32);
    download(got, qkv, sizeof got);
    expect_near(&got[0][0], &want[0][0], 6, 1e-6, 0, "qkv"); /* cos of f32 pi / 2 is -4e-8 */

    const size_t slot = sequences_slot(&sequences, 0, 1, 0, 1, 2);
    download(k, (float *)sequences.kv.k + slot, sizeof k);
    download(v, (float *)sequences.kv.v + slot, sizeof v);
    cr_expect_arr_eq(k, got[1], sizeof k);
    cr_expect_arr_eq(v, got[2], sizeof v);
    sequences_free(&sequences);
}

Test(rope, writes_the_cache_alone_where_there_are_no_frequencies)
{
    const float qkv0[3][2] = {{1, 2}, {INFINITY, 4}, {5, -INFINITY}};
    const struct heads heads = {.H = 1, .G = 1, .d = 2};
    const struct rope_view rope = {NULL, 1};
    struct numbers numbers = {1};
    struct sequences sequences;
    float *qkv = upload(qkv0, sizeof qkv0);
    float got[3][2], k[2], v[2];

    sequences_build(&sequences, &numbers, 1, (int[]){2}, (int[]){1}, 1, 2, DTYPE_F32);
    dev->ops->rope(dev, qkv, &rope, &sequences.kv, &sequences.batch, &heads, DTYPE_F32);
    download(got, qkv, sizeof got);
    cr_expect_arr_eq(got, qkv0, sizeof got);
    const size_t slot = sequences_slot(&sequences, 0, 1, 0, 1, 2);
    download(k, (float *)sequences.kv.k + slot, sizeof k);
    download(v, (float *)sequences.kv.v + slot, sizeof v);
    cr_expect_arr_eq(k, qkv0[1], sizeof k);
    cr_expect_arr_eq(v, qkv0[2], sizeof v);
    sequences_free(&sequences);
}

static void check_random(int H, int G, int d, enum dtype dtype, enum dtype kv_dtype)
{
    const int row = (H + 2 * G) * d;
    const struct heads heads = {.H = H, .G = G, .d = d};
    struct numbers numbers = {(uint64_t)d};
    struct sequences sequences;
    sequences_build(&sequences, &numbers, 4, (int[]){5, 40, 17, 300}, (int[]){5, 1, 2, 33}, G, d,
                    kv_dtype);
    const int T = sequences.T;
    const size_t n = (size_t)(T * row), n_cache = (size_t)((sequences.n_blocks + 2) * G * 16 * d);
    float *qkv0 = next_floats(&numbers, n, dtype), *got = zeros(n, sizeof *got);
    float *k = zeros(n_cache, sizeof *k), *v = zeros(n_cache, sizeof *v);
    float *frequency = zeros((size_t)d / 2, sizeof *frequency);
    for (int i = 0; i < d / 2; i++) frequency[i] = (float)pow(10000, -2.0 * i / d);
    const struct rope_view rope = {upload(frequency, (size_t)d / 2 * 4), 1.25f};
    void *qkv = upload_as(dtype, qkv0, n);

    dev->ops->rope(dev, qkv, &rope, &sequences.kv, &sequences.batch, &heads, dtype);
    download_f32(got, qkv, dtype, n);
    download_f32(k, sequences.kv.k, kv_dtype, n_cache);
    download_f32(v, sequences.kv.v, kv_dtype, n_cache);
    for (int t = 0; t < T; t++) {
        for (int h = 0; h < H + 2 * G; h++) {
            const size_t head = (size_t)(t * row + h * d);
            const int g = h < H + G ? h - H : h - H - G;
            const size_t slot = h < H ? 0
                                      : sequences_slot(&sequences, sequences.row[t],
                                                       sequences.position[t], g, G, d);
            for (int i = 0; i < d; i++) {
                const int j = i % (d / 2);
                const float angle = (float)sequences.position[t] * frequency[j];
                const float c = cosf(angle) * 1.25f;
                const float s = sinf(angle) * 1.25f;
                const float a = qkv0[head + (size_t)j], b = qkv0[head + (size_t)(j + d / 2)];
                float want = i < d / 2 ? a * c - b * s : b * c + a * s;
                if (h >= H + G) want = qkv0[head + (size_t)i];
                expect_near(&got[head + (size_t)i], &want, 1, 1e-6, half_ulp(dtype), "qkv");
                if (h < H) continue;
                const float held = round_to(kv_dtype, got[head + (size_t)i]);
                cr_assert_eq(held, (h < H + G ? k : v)[slot + (size_t)i]);
            }
        }
    }
    size_t n_written = 0;
    for (size_t i = 0; i < n_cache; i++) n_written += v[i] != 0;
    cr_expect_leq(n_written, (size_t)(T * G * d)); /* nothing else was touched */
    free(qkv0);
    free(got);
    free(k);
    free(v);
    free(frequency);
    sequences_free(&sequences);
}

Test(rope, is_right_for_all_shapes_and_types)
{
    check_random(4, 2, 8, DTYPE_F32, DTYPE_F32);
    check_random(3, 1, 6, DTYPE_F32, DTYPE_F32);
    check_random(2, 2, 64, DTYPE_BF16, DTYPE_BF16);
    check_random(8, 2, 80, DTYPE_BF16, DTYPE_BF16);
    check_random(5, 5, 2, DTYPE_F32, DTYPE_BF16);
    check_random(4, 2, 64, DTYPE_F32, DTYPE_BF16);
    check_random(3, 1, 80, DTYPE_F32, DTYPE_BF16);
}
