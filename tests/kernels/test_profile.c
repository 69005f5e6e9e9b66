/* The clock, the copy, and the profile between a device and its callers. Counts are worked by hand;
 * times are only known to be there. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/profile.h"
#include "tests/kernels/sequences.h"

TestSuite(profile, .init = device_open, .fini = device_close);

static const struct profile_line *find(const char *op, const char *shape)
{
    int n;
    const struct profile_line *lines = profile_lines(dev, &n);

    for (int i = 0; i < n; i++)
        if (strcmp(lines[i].op, op) == 0 && strcmp(lines[i].shape, shape) == 0) return &lines[i];
    cr_assert_fail("there is no line %s %s", op, shape);
    return NULL;
}

Test(profile, a_mark_is_later_than_the_one_before)
{
    float *x = device_memory(1 << 20), *y = device_memory(1 << 20);

    dev->ops->mark(dev, 0);
    dev->ops->copy(dev, y, x, 1 << 20);
    dev->ops->mark(dev, MARKS - 1);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    cr_expect_gt(dev->ops->elapsed(dev, 0, MARKS - 1).seconds, 0);
}

Test(profile, copy_moves_every_byte)
{
    enum { N = (3 << 20) + 5 };
    unsigned char *host = zeros(N, 1), *back = zeros(N, 1);

    for (int i = 0; i < N; i++) host[i] = (unsigned char)(i * 7 + i / 251);
    void *from = upload(host, N), *to = upload(back, N);
    dev->ops->copy(dev, to, from, N);
    download(back, to, N);
    cr_expect_eq(memcmp(host, back, N), 0);
    free(host);
    free(back);
}

Test(profile, counts_what_a_product_reads_and_computes)
{
    enum { T = 3, N = 10, K = 20 };
    struct numbers numbers = {1};
    float *x = next_floats(&numbers, T * K, DTYPE_F32);
    float *w = next_floats(&numbers, N * K, DTYPE_BF16);
    float plain[T * N], timed[T * N];
    void *dev_x = upload(x, T * K * sizeof *x), *y = device_memory(sizeof plain);
    const struct matrix matrix = {upload_as(DTYPE_BF16, w, N * K), DTYPE_BF16, N, K};

    dev->ops->matmul(dev, y, DTYPE_F32, dev_x, &matrix, NULL, T, DTYPE_F32);
    download(plain, y, sizeof plain);
    cr_assert_eq(profile_open(dev, false), MLORA_OK);
    profile_start(dev);
    for (int i = 0; i < 2; i++)
        dev->ops->matmul(dev, y, DTYPE_F32, dev_x, &matrix, NULL, T, DTYPE_F32);
    download(timed, y, sizeof timed);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);

    cr_expect_eq(memcmp(plain, timed, sizeof plain), 0);
    const struct profile_line *line = find("matmul", "10 x 20, T 3");
    cr_expect_eq(line->n_calls, 2);
    cr_expect_eq(line->bytes, 2 * (2 * N * K + 4 * T * K + 4 * T * N));
    cr_expect_eq(line->flops, 2 * 2 * T * N * K);
    cr_expect_geq(line->seconds, 0);
    free(x);
    free(w);
}

Test(profile, is_silent_before_its_start_and_begins_anew_with_each)
{
    int n;
    float *x = device_memory(64 * sizeof *x), *y = device_memory(64 * sizeof *y);

    cr_assert_eq(profile_open(dev, false), MLORA_OK);
    dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    profile_lines(dev, &n);
    cr_expect_eq(n, 0);
    for (int i = 0; i < 2; i++) {
        profile_start(dev);
        dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
        cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
        cr_expect_eq(profile_lines(dev, &n)->n_calls, 1);
        cr_expect_eq(n, 1);
    }
}

/* A row of five cached tokens that brings one, and one of three that are all new. */
Test(profile, counts_attention_by_the_lengths_of_its_rows)
{
    enum { H = 4, G = 2, D = 8, T = 1 + 3 };
    const struct heads heads = {.H = H, .G = G, .d = D, .scale = 1};
    const int kv_len[] = {5, 3}, n_new[] = {1, 3};
    struct numbers numbers = {2};
    struct sequences sequences;

    sequences_build(&sequences, &numbers, 2, kv_len, n_new, G, D, DTYPE_F32);
    float *qkv = next_floats(&numbers, T * (H + 2 * G) * D, DTYPE_F32);
    void *dev_qkv = upload(qkv, T * (H + 2 * G) * D * sizeof *qkv);
    void *y = device_memory(T * H * D * sizeof(float));
    cr_assert_eq(profile_open(dev, false), MLORA_OK);
    profile_start(dev);
    dev->ops->attention(dev, y, dev_qkv, DTYPE_F32, &sequences.kv, &sequences.batch, &heads,
                        DTYPE_F32);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);

    const struct profile_line *line = find("attention", "4 tokens, 2 rows");
    /* keys and values of 5 and of 3 tokens; queries in, results out */
    cr_expect_eq(line->bytes, 4 * (2 * G * D * (5 + 3) + 2 * T * H * D));
    /* the one token sees 5, the three see 1, 2 and 3; two products of 2 d operations a head */
    cr_expect_eq(line->flops, 4 * H * D * (5 + 1 + 2 + 3));
    free(qkv);
    sequences_free(&sequences);
}

/* Two adapters of ranks 3 and 5 on an output of 6, of which one and two tokens are; one token has
 * none, and is not counted. */
Test(profile, counts_adapters_by_their_ranks_and_tokens)
{
    enum { T = 4, K = 7, N = 6 };
    struct numbers numbers = {3};
    float *values = next_floats(&numbers, 5 * (K + N), DTYPE_BF16);
    const void *a = upload_as(DTYPE_BF16, values, 5 * (K + N));
    struct lora_factors factors[2][LORA_LINEARS];
    memset(factors, 0, sizeof factors);
    factors[0][LORA_O] =
        (struct lora_factors){.a = a, .b = a, .R = 3, .dtype = DTYPE_BF16, .scale = 1};
    factors[1][LORA_O] =
        (struct lora_factors){.a = a, .b = a, .R = 5, .dtype = DTYPE_BF16, .scale = 1};
    const int32_t slot[] = {1, -1, 0, 1}, order[] = {2, 0, 3}, segment_slot[] = {0, 1};
    const int32_t start[] = {0, 1, 3};
    const struct lora_view view = {
        .factors = upload(factors, sizeof factors),
        .L = 1,
        .n_segments = 2,
        .n_tokens = 3,
        .max_rank = 5,
        .max_segment = 2,
        .slot = upload(slot, sizeof slot),
        .segment_slot = upload(segment_slot, sizeof segment_slot),
        .segment_start = upload(start, sizeof start),
        .order = upload(order, sizeof order),
    };
    const struct lora_site site = {.linear = LORA_O, .n_slices = 1, .K = K, .N = N, .width = {N}};
    float x[T * K] = {0}, y[T * N] = {0};
    void *dev_x = upload(x, sizeof x), *dev_y = upload(y, sizeof y);
    float *h = device_memory(T * LORA_SLICES_MAX * 5 * sizeof *h);

    cr_assert_eq(profile_open(dev, false), MLORA_OK);
    profile_start(dev);
    dev->ops->lora_shrink(dev, h, dev_x, &view, &site, 0, DTYPE_F32);
    dev->ops->lora_expand(dev, dev_y, h, &view, &site, 0, DTYPE_F32);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);

    const struct profile_line *shrink = find("lora_shrink", "1 slices of 7");
    const struct profile_line *expand = find("lora_expand", "1 slices to 6");
    const double h_bytes = 4 * (1 * 3 + 2 * 5);
    cr_expect_eq(shrink->bytes, 2 * K * (3 + 5) + h_bytes + 4 * 3 * K);
    cr_expect_eq(shrink->flops, 2 * K * (1 * 3 + 2 * 5));
    cr_expect_eq(expand->bytes, 2 * N * (3 + 5) + h_bytes + 2 * 4 * 3 * N);
    cr_expect_eq(expand->flops, 2 * N * (1 * 3 + 2 * 5));
    free(values);
}

/* ---- ranges --------------------------------------------------------------------------------- */

static char ranges[256]; /* names as they begin, ) where one ends */

static void note_range(struct device *device, const char *name)
{
    (void)device;
    const size_t n = strlen(ranges);
    snprintf(ranges + n, sizeof ranges - n, "%s", name ? name : ")");
    if (name) strncat(ranges, "(", sizeof ranges - strlen(ranges) - 1);
}

/* A layer's ops lie inside its range, and what follows outside of it; nothing is replayed. */
Test(profile, gives_profilers_a_range_for_each_layer_and_op)
{
    float *x = device_memory(64 * sizeof *x), *y = device_memory(64 * sizeof *y);
    static struct kernels ops; /* until the device is closed */
    const int key = 1;

    ops = *dev->ops;
    ops.range = note_range;
    dev->ops = &ops;
    cr_assert_eq(profile_open(dev, true), MLORA_OK);
    profile_layer(dev, 0);
    dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
    profile_layer(dev, -1);
    cr_expect_str_eq(ranges, "", "before the start: %s", ranges);
    profile_start(dev);
    for (int i = 0; i < 3; i++) {
        cr_expect_not(dev->ops->replay(dev, &key, sizeof key));
        for (int l = 0; l < 2; l++) {
            profile_layer(dev, l);
            dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
        }
        profile_layer(dev, -1);
        dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
        dev->ops->record_end(dev);
        cr_expect_str_eq(ranges, "layer 0(silu_mul())layer 1(silu_mul())silu_mul()");
        ranges[0] = '\0';
    }
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    cr_expect_eq(find("silu_mul", "2 x 16")->n_calls, 9);
}

static void note_mark(struct device *device, int mark)
{
    (void)device, (void)mark;
    strncat(ranges, ".", sizeof ranges - strlen(ranges) - 1);
}

/* What an op leaves to the next one, the mark after it starts: that is inside, too. */
Test(profile, ends_a_range_after_the_mark_that_ends_the_op)
{
    float *x = device_memory(64 * sizeof *x), *y = device_memory(64 * sizeof *y);
    static struct kernels ops; /* until the device is closed */

    ops = *dev->ops;
    ops.range = note_range;
    ops.mark = note_mark;
    dev->ops = &ops;
    cr_assert_eq(profile_open(dev, true), MLORA_OK);
    profile_start(dev);
    ranges[0] = '\0'; /* it marked, too */
    for (int i = 0; i < 2; i++) dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
    cr_expect_str_eq(ranges, ".silu_mul(.)silu_mul(.)");
}

Test(profile, makes_no_ranges_that_nobody_asked_for)
{
    float *x = device_memory(64 * sizeof *x), *y = device_memory(64 * sizeof *y);
    static struct kernels ops; /* until the device is closed */

    ops = *dev->ops;
    ops.range = note_range;
    dev->ops = &ops;
    cr_assert_eq(profile_open(dev, false), MLORA_OK);
    profile_start(dev);
    profile_layer(dev, 0);
    dev->ops->silu_mul(dev, y, x, DTYPE_F32, 2, 16, DTYPE_F32);
    profile_layer(dev, -1);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    cr_expect_str_eq(ranges, "");
}
