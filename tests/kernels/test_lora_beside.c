/* What adapters add may be computed beside the base product and be added by the op that reads its
 * result, whichever that is: plain, recorded and replayed, against the way that adds it at once. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tests/kernels/adapters.h"
#include "tests/kernels/sequences.h"

TestSuite(lora_beside, .init = device_open, .fini = device_close);

enum { REPLAYS = 3 /* plain, recorded, replayed */ };
static int K = 512;            /* of the products */
static int n_slots = S_MAX;    /* that their tokens use */
static bool has_many_segments; /* each token has one of its own */

/* Of a run of ops: its pointers belong to no other. */
struct run_key {
    const void *y, *got;
};

/* A base product with adapters, y = W x and what each token's adapter adds. */
struct product {
    struct lora_site site;
    struct adapters adapters;
    struct lora_view view;
    struct matrix w;
    enum dtype y_dtype, dtype;
    int T;
    void *x, *y;
    float *h;
};

/* Types are a number of product_types[], or -rank: the last of them with adapters that a base product
 * may take up itself. */
enum { PLAIN_TYPES = PRODUCT_TYPES - 1 };

static enum dtype product_dtype_of(int type)
{
    return product_types[type < 0 ? PLAIN_TYPES : type].product;
}

static enum dtype dtype_of(int type)
{
    return product_types[type < 0 ? PLAIN_TYPES : type].dtype;
}

/* The same tokens, the last first, each a segment of its own: as many adapters, of which some are the
 * same. */
static void give_each_a_segment(struct lora_view *view, const int32_t *slot, int T)
{
    int32_t order[T_MAX], segment_slot[T_MAX], segment_start[T_MAX + 1] = {0};
    int n = 0;

    for (int t = T - 1; t >= 0; t--) {
        if (slot[t] < 0) continue;
        order[n] = t;
        segment_slot[n] = slot[t];
        n++;
        segment_start[n] = n;
    }
    view->n_segments = view->n_tokens = n;
    view->max_segment = 1;
    view->order = upload(order, sizeof order);
    view->segment_slot = upload(segment_slot, sizeof segment_slot);
    view->segment_start = upload(segment_start, sizeof segment_start);
}

static struct product product_random(struct numbers *numbers, const struct lora_site *site, int T,
                                     int type)
{
    const enum dtype y_dtype = product_dtype_of(type), dtype = dtype_of(type);
    struct product p = {.site = *site, .y_dtype = y_dtype, .dtype = dtype, .T = T};
    const size_t n_x = (size_t)(T * K), n_w = (size_t)(site->N * K);
    int32_t slot[T_MAX];

    if (type < 0)
        adapters_plain(&p.adapters, numbers, site, -type);
    else
        adapters_random(&p.adapters, numbers, site);
    for (int t = 0; t < T; t++) slot[t] = next_int(numbers, -1, n_slots - 1);
    slot[T - 1] = n_slots > 1; /* there is one at least */
    p.view = view_of(&p.adapters, site, slot, T);
    if (has_many_segments) give_each_a_segment(&p.view, slot, T);
    p.view.n_rows = T;
    float *x = next_floats(numbers, n_x, dtype), *w = next_floats(numbers, n_w, dtype);
    for (size_t i = 0; i < n_x; i++) x[i] *= 0.125f;
    for (size_t i = 0; i < n_w; i++) w[i] *= 0.125f;
    p.x = upload_as(dtype, x, n_x);
    p.w = (struct matrix){upload_as(dtype, w, n_w), dtype, site->N, K};
    p.y = device_memory((size_t)(T * site->N) * dtype_bytes(y_dtype));
    p.h = device_memory((size_t)(T * site->n_slices * LORA_RANK_MAX) * sizeof(float));
    free(x);
    free(w);
    return p;
}

static void project(struct product *p, int mode, bool expands)
{
    p->view.mode = mode;
    dev->ops->lora_shrink(dev, p->h, p->x, &p->view, &p->site, LAYER, p->dtype);
    dev->ops->matmul(dev, p->y, p->y_dtype, p->x, &p->w, NULL, p->T, p->dtype);
    if (expands) dev->ops->lora_expand(dev, p->y, p->h, &p->view, &p->site, LAYER, p->y_dtype);
}

/* Sums of up to 512 terms in two orders, which bf16 may round to neighbours. */
static void expect_alike(const void *got, const void *want, enum dtype dtype, size_t n,
                         const char *what)
{
    float *a = zeros(n, sizeof *a), *b = zeros(n, sizeof *b);
    download_f32(a, got, dtype, n);
    download_f32(b, want, dtype, n);
    expect_near(a, b, n, dtype == DTYPE_F32 ? 2e-3 : 0.06, dtype == DTYPE_F32 ? 1e-4 : 0x1p-6,
                what);
    free(a);
    free(b);
}

static void check_silu_mul(int F, int T, int mode, int type)
{
    const enum dtype dtype = dtype_of(type);
    const struct lora_site site = {LORA_GATE, 2, K, 2 * F, {0, F}, {F, F}, NULL};
    struct numbers numbers = {(uint64_t)(F + T)};
    struct product p = product_random(&numbers, &site, T, type);
    const size_t n = (size_t)(T * F), bytes = n * dtype_bytes(dtype);
    void *got = device_memory(bytes), *want = device_memory(bytes);
    const struct run_key key = {p.y, got};

    project(&p, MLORA_LORA_BGMV, true);
    dev->ops->silu_mul(dev, want, p.y, p.y_dtype, T, F, dtype);
    for (int i = 0; i < REPLAYS; i++) {
        if (dev->ops->replay(dev, &key, sizeof key)) break;
        project(&p, mode, false);
        dev->ops->lora_expand_silu_mul(dev, got, p.y, p.y_dtype, p.h, &p.view, &p.site, LAYER, T,
                                       dtype);
        dev->ops->record_end(dev);
    }
    expect_alike(got, want, dtype, n, "silu_mul");
    adapters_free(&p.adapters);
}

static void check_norm(int D, int T, int mode, int type)
{
    const enum dtype dtype = dtype_of(type);
    const struct lora_site site = {LORA_O, 1, K, D, {0}, {D}, NULL};
    struct numbers numbers = {(uint64_t)(D + T)};
    struct product p = product_random(&numbers, &site, T, type);
    const size_t n = (size_t)(T * D), bytes = n * dtype_bytes(dtype);
    void *got = device_memory(bytes), *want = device_memory(bytes);
    float *zero = zeros(n, sizeof *zero), *ones = zeros((size_t)D, sizeof *ones);
    for (int d = 0; d < D; d++) ones[d] = 1;
    float *x = upload(zero, n * sizeof *zero), *weight = upload(ones, (size_t)D * sizeof *ones);
    const struct run_key key = {p.y, got};

    project(&p, MLORA_LORA_BGMV, true);
    dev->ops->add_rms_norm(dev, want, x, p.y, p.y_dtype, weight, T, D, 1e-5f, dtype);
    for (int i = 0; i < REPLAYS; i++) {
        dev->ops->upload(dev, x, zero, n * sizeof *zero);
        if (dev->ops->replay(dev, &key, sizeof key)) break;
        project(&p, mode, true);
        dev->ops->add_rms_norm(dev, got, x, p.y, p.y_dtype, weight, T, D, 1e-5f, dtype);
        dev->ops->record_end(dev);
    }
    expect_alike(got, want, dtype, n, "norm");
    free(zero);
    free(ones);
    adapters_free(&p.adapters);
}

/* Queries in place, keys and values in the cache; with a norm of heads between, which is an op
 * that adds nothing itself; with an attention after it, which may do all that rope does. */
static void check_rope_and(bool attends, int d, int n_rows, int mode, bool has_norm, bool turns,
                           int type)
{
    const enum dtype dtype = dtype_of(type);
    enum { H = 4, G = 2 };
    const struct heads heads = {.H = H, .G = G, .d = d, .scale = 0.125f};
    const int N = (H + 2 * G) * d;
    const struct lora_site site = {LORA_Q, 3, K, N, {0, H * d, (H + G) * d}, {H * d, G * d, G * d},
                                   NULL};
    struct numbers numbers = {(uint64_t)(d + n_rows)};
    struct sequences sequences;
    sequences_build(&sequences, &numbers, n_rows, (int[]){5, 40, 17, 33}, (int[]){1, 1, 2, 1}, G, d,
                    dtype);
    const int T = sequences.T;
    struct product p = product_random(&numbers, &site, T, type);
    const size_t n = (size_t)(T * N), n_cache = (size_t)((sequences.n_blocks + 2) * G * 16 * d);
    const size_t bytes = n * dtype_bytes(p.y_dtype), cache_bytes = n_cache * dtype_bytes(dtype);
    float *frequency = zeros((size_t)d, sizeof *frequency);
    for (int i = 0; i < d; i++) frequency[i] = 1.0f / (float)(1 + i);
    const struct rope_view rope = {turns ? upload(frequency, (size_t)d * 4) : NULL, 1.0f};
    const float *weight = upload(frequency, (size_t)d * 4);
    void *want = device_memory(bytes), *k = device_memory(cache_bytes);
    void *v = device_memory(cache_bytes);
    const size_t n_heads = (size_t)(T * H * d), heads_bytes = n_heads * dtype_bytes(dtype);
    void *mixed = device_memory(heads_bytes), *want_mixed = device_memory(heads_bytes);
    const struct run_key key = {p.y, sequences.kv.k};
    void *none = zeros(n_cache, sizeof(float));

    for (int i = -1; i < REPLAYS; i++) {
        dev->ops->upload(dev, sequences.kv.k, none, cache_bytes);
        dev->ops->upload(dev, sequences.kv.v, none, cache_bytes);
        if (i >= 0 && dev->ops->replay(dev, &key, sizeof key)) break;
        project(&p, i < 0 ? MLORA_LORA_BGMV : mode, true);
        if (has_norm) dev->ops->head_norm(dev, p.y, weight, weight, &heads, T, 1e-5f, p.y_dtype);
        dev->ops->rope(dev, p.y, &rope, &sequences.kv, &sequences.batch, &heads, p.y_dtype);
        if (i < 0) dev->ops->copy(dev, want, p.y, bytes); /* an attention finds it done */
        if (attends)
            dev->ops->attention(dev, i < 0 ? want_mixed : mixed, p.y, p.y_dtype, &sequences.kv,
                                &sequences.batch, &heads, dtype);
        if (i >= 0) dev->ops->record_end(dev);
        if (i >= 0) continue;
        dev->ops->copy(dev, k, sequences.kv.k, cache_bytes);
        dev->ops->copy(dev, v, sequences.kv.v, cache_bytes);
    }
    if (attends)
        expect_alike(mixed, want_mixed, dtype, n_heads, "heads");
    else
        expect_alike(p.y, want, p.y_dtype, n, "qkv");
    expect_alike(sequences.kv.k, k, dtype, n_cache, "keys");
    expect_alike(sequences.kv.v, v, dtype, n_cache, "values");
    free(none);
    free(frequency);
    sequences_free(&sequences);
    adapters_free(&p.adapters);
}

static void check_rope(int d, int n_rows, int mode, bool has_norm, bool turns, int type)
{
    check_rope_and(false, d, n_rows, mode, has_norm, turns, type);
}

/* The next op is one that knows nothing of adapters, or none comes. */
static void check_copy(int N, int T, bool copies, int type)
{
    const enum dtype dtype = product_dtype_of(type);
    const struct lora_site site = {LORA_DOWN, 1, K, N, {0}, {N}, NULL};
    struct numbers numbers = {(uint64_t)(N + T)};
    struct product p = product_random(&numbers, &site, T, type);
    const size_t n = (size_t)(T * N), bytes = n * dtype_bytes(dtype);
    void *got = device_memory(bytes), *want = device_memory(bytes);
    const struct run_key key = {p.y, got};

    project(&p, MLORA_LORA_BGMV, true);
    dev->ops->copy(dev, want, p.y, bytes);
    for (int i = 0; i < REPLAYS; i++) {
        if (dev->ops->replay(dev, &key, sizeof key)) break;
        project(&p, MLORA_LORA_AUTO, true);
        if (copies) dev->ops->copy(dev, got, p.y, bytes);
        dev->ops->record_end(dev);
    }
    expect_alike(copies ? got : p.y, want, dtype, n, "copy");
    adapters_free(&p.adapters);
}

static const int modes[] = {MLORA_LORA_AUTO, MLORA_LORA_FUSED, MLORA_LORA_SGMV};

Test(lora_beside, silu_mul_adds_it)
{
    for (int i = 0; i < PRODUCT_TYPES; i++)
        for (int m = 0; m < 3; m++) {
            check_silu_mul(512, 1, modes[m], i);
            check_silu_mul(264, 7, modes[m], i);
            check_silu_mul(37, 16, modes[m], i); /* rows that are not aligned */
            check_silu_mul(520, 17, modes[m], i);
        }
}

Test(lora_beside, the_norm_adds_it)
{
    for (int i = 0; i < PRODUCT_TYPES; i++)
        for (int m = 0; m < 3; m++) {
            check_norm(512, 1, modes[m], i);
            check_norm(1000, 16, modes[m], i);
            check_norm(37, 5, modes[m], i);
        }
}

Test(lora_beside, rope_adds_it)
{
    for (int i = 0; i < PRODUCT_TYPES; i++)
        for (int m = 0; m < 3; m++) {
            check_rope(64, 1, modes[m], false, true, i);
            check_rope(64, 4, modes[m], false, false, i); /* nothing is turned */
            check_rope(6, 4, modes[m], false, true, i);
        }
}

Test(lora_beside, attention_adds_it_and_turns)
{
    for (int i = 0; i < PRODUCT_TYPES; i++)
        for (int m = 0; m < 3; m++) {
            check_rope_and(true, 64, 2, modes[m], false, true, i);
            check_rope_and(true, 64, 2, modes[m], true, false, i);
            check_rope_and(true, 80, 1, modes[m], false, true, i);
            check_rope_and(true, 64, 3, modes[m], false, true, i); /* a row of two tokens */
        }
    for (int m = 0; m < 2; m++) check_rope_and(true, 128, 2, modes[m], false, true, -16);
}

Test(lora_beside, any_other_op_finds_it_added)
{
    for (int i = 0; i < PRODUCT_TYPES; i++) {
        check_rope(64, 4, MLORA_LORA_AUTO, true, true, i);
        check_copy(264, 16, true, i);
        check_copy(37, 3, true, i);
        check_copy(264, 9, false, i);
    }
}

Test(lora_beside, a_product_takes_it_up)
{
    for (int m = 0; m < 2; m++) {
        check_silu_mul(128, 1, modes[m], -64);
        check_silu_mul(1024, 3, modes[m], -16);
        check_silu_mul(2560, 64, modes[m], -16);
        check_norm(512, 1, modes[m], -40);
        check_norm(1024, 16, modes[m], -16);
        check_norm(4096, 17, modes[m], -8);
        check_norm(4096, 64, modes[m], -16);
        check_rope(128, 1, modes[m], false, true, -32);
        check_rope(64, 4, modes[m], true, true, -16);
    }
    check_copy(256, 16, true, -16);
    check_copy(384, 3, false, -16);
}

Test(lora_beside, a_product_takes_it_up_however_long_a_row_is)
{
    static const int lengths[] = {64, 192, 4160};

    for (int i = 0; i < 3; i++) {
        K = lengths[i];
        check_norm(1024, 40, MLORA_LORA_AUTO, -16);
        check_norm(512, 5, MLORA_LORA_AUTO, -8);
        check_silu_mul(256, 16, MLORA_LORA_AUTO, -16);
        check_silu_mul(384, 50, MLORA_LORA_AUTO, -32);
        check_rope(64, 4, MLORA_LORA_AUTO, false, true, -16);
    }
}

/* Blocks that have all of a long row, of which there are fewer and more than multiprocessors. */
Test(lora_beside, a_product_takes_it_up_with_its_silu_mul)
{
    K = 2080;
    check_silu_mul(4608, 64, MLORA_LORA_AUTO, -16);
    n_slots = 2;
    check_silu_mul(4608, 9, MLORA_LORA_FUSED, -64);
    K = 1088;
    check_silu_mul(8704, 33, MLORA_LORA_AUTO, -48);
}

Test(lora_beside, a_product_takes_up_high_ranks)
{
    for (n_slots = 1; n_slots <= S_MAX; n_slots++) {
        check_silu_mul(1024, 64, MLORA_LORA_AUTO, -64);
        check_silu_mul(256, 17, MLORA_LORA_FUSED, -56);
        check_norm(4096, 64, MLORA_LORA_AUTO, -64);
        check_norm(1024, 16, MLORA_LORA_AUTO, -48);
        check_norm(512, 1, MLORA_LORA_AUTO, -64);
        check_rope(128, 4, MLORA_LORA_AUTO, false, true, -64);
        K = 4160;
        check_norm(2048, 50, MLORA_LORA_AUTO, -64);
        K = 512;
    }
}

Test(lora_beside, a_product_takes_up_many_adapters)
{
    has_many_segments = true;
    check_silu_mul(1024, 14, MLORA_LORA_AUTO, -16);
    check_silu_mul(1024, 16, MLORA_LORA_AUTO, -16);
    check_silu_mul(2560, 16, MLORA_LORA_AUTO, -16);
    check_silu_mul(128, 8, MLORA_LORA_AUTO, -32);
    check_norm(4096, 16, MLORA_LORA_AUTO, -16);
    check_norm(4096, 13, MLORA_LORA_AUTO, -16);
    check_norm(4096, 18, MLORA_LORA_AUTO, -16);
    check_silu_mul(1024, 18, MLORA_LORA_AUTO, -16);
    check_norm(1024, 12, MLORA_LORA_FUSED, -16);
    check_norm(512, 9, MLORA_LORA_AUTO, -8);
    check_rope(128, 4, MLORA_LORA_AUTO, false, true, -64);
    check_norm(4096, 14, MLORA_LORA_AUTO, -64);
    check_silu_mul(1024, 9, MLORA_LORA_AUTO, -64);
    K = 4160;
    check_norm(2048, 11, MLORA_LORA_AUTO, -16);
    check_norm(2048, 9, MLORA_LORA_AUTO, -32);
    check_norm(512, 12, MLORA_LORA_AUTO, -64);
    check_silu_mul(2560, 13, MLORA_LORA_AUTO, -48);
}

/* Of more adapters, or higher ranks, than a product takes up, or for outputs that are no whole tiles of it. */
Test(lora_beside, of_plain_adapters_that_no_product_takes_up)
{
    static const int ranks[] = {16, 32, 48, 64, 80};

    for (int i = 0; i < 5; i++)
        for (int m = 0; m < 2; m++) {
            check_silu_mul(264, 33, modes[m], -ranks[i]);
            check_norm(1000, 60, modes[m], -ranks[i]);
            check_norm(1000, 1, modes[m], -ranks[i]);
            check_rope(6, 4, modes[m], false, true, -ranks[i]);
        }
    has_many_segments = true;
    check_silu_mul(1024, 20, MLORA_LORA_AUTO, -64);
    check_norm(4096, 33, MLORA_LORA_AUTO, -16);
}

/* Beyond forty adapters expand comes after the product. */
Test(lora_beside, of_many_adapters_half_of_it)
{
    has_many_segments = true;
    for (int T = 40; T <= 64; T += 8) {
        check_silu_mul(512, T, MLORA_LORA_AUTO, -16);
        check_norm(1000, T, MLORA_LORA_AUTO, 0);
        check_copy(264, T, true, 1);
    }
}

/* Two devices of a GPU, whose ops run at the same time in any mixture: what a block of one waits for
 * may find no multiprocessor because of blocks of the other, which wait likewise. */
enum { SHARERS = 2, ROUNDS = 20, RUNS = 50, SHARED_T = 64, SHARED_N = 4096 };

struct sharer {
    pthread_t thread;
    struct device *dev;
    struct product product; /* y, h: its own */
    float *first, *got;     /* [SHARED_T, SHARED_N] */
    int n_different;
};

static void *run_sharer(void *user)
{
    struct sharer *sharer = user;
    struct product *p = &sharer->product;
    const struct kernels *op = sharer->dev->ops;
    const size_t bytes = (size_t)SHARED_T * SHARED_N * sizeof(float);
    const int runs = device_is_cpu() ? 1 : RUNS, rounds = device_is_cpu() ? 2 : ROUNDS;

    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < runs; i++) {
            op->lora_shrink(sharer->dev, p->h, p->x, &p->view, &p->site, LAYER, p->dtype);
            op->matmul(sharer->dev, p->y, p->y_dtype, p->x, &p->w, NULL, p->T, p->dtype);
            op->lora_expand(sharer->dev, p->y, p->h, &p->view, &p->site, LAYER, p->y_dtype);
        }
        op->download(sharer->dev, round == 0 ? sharer->first : sharer->got, p->y, bytes);
        if (op->sync(sharer->dev) != MLORA_OK) sharer->n_different++;
        if (round > 0 && memcmp(sharer->got, sharer->first, bytes) != 0) sharer->n_different++;
    }
    return NULL;
}

Test(lora_beside, devices_of_one_gpu_do_not_wait_for_each_other, .timeout = 60)
{
    const struct lora_site site = {LORA_O, 1, K, SHARED_N, {0}, {SHARED_N}, NULL};
    const size_t n = (size_t)SHARED_T * SHARED_N;
    struct numbers numbers = {1};
    struct product product = product_random(&numbers, &site, SHARED_T, -16);
    struct sharer sharers[SHARERS];

    product.view.mode = MLORA_LORA_AUTO;
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    for (int i = 0; i < SHARERS; i++) {
        struct sharer *sharer = &sharers[i];
        *sharer = (struct sharer){.dev = dev, .product = product};
        sharer->product.y = device_memory(n * sizeof(float));
        sharer->product.h = device_memory((size_t)SHARED_T * LORA_RANK_MAX * sizeof(float));
        sharer->first = zeros(n, sizeof(float));
        sharer->got = zeros(n, sizeof(float));
        if (i > 0)
            cr_assert_eq(device_is_cpu() ? cpu_device_open(&sharer->dev, 1)
                                         : cuda_device_open(&sharer->dev, 0, NULL),
                         MLORA_OK);
    }
    for (int i = 0; i < SHARERS; i++)
        cr_assert_eq(pthread_create(&sharers[i].thread, NULL, run_sharer, &sharers[i]), 0);
    for (int i = 0; i < SHARERS; i++) pthread_join(sharers[i].thread, NULL);
    for (int i = 0; i < SHARERS; i++) {
        cr_expect_eq(sharers[i].n_different, 0, "device %d", i);
        cr_expect_arr_eq(sharers[i].first, sharers[0].first, n * sizeof(float));
    }
    for (int i = 0; i < SHARERS; i++) {
        if (i > 0) sharers[i].dev->ops->close(sharers[i].dev);
        free(sharers[i].first);
        free(sharers[i].got);
    }
    adapters_free(&product.adapters);
}
