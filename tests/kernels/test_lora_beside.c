/* What adapters add may be computed beside the base product and be added by the op that reads its
 * result, whichever that is: plain, recorded and replayed, against the way that adds it at once. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "tests/kernels/adapters.h"
#include "tests/kernels/sequences.h"

TestSuite(lora_beside, .init = device_open, .fini = device_close);

enum { K = 512, REPLAYS = 3 /* plain, recorded, replayed */ };

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

static struct product product_random(struct numbers *numbers, const struct lora_site *site, int T,
                                     int type)
{
    const enum dtype y_dtype = product_types[type].product, dtype = product_types[type].dtype;
    struct product p = {.site = *site, .y_dtype = y_dtype, .dtype = dtype, .T = T};
    const size_t n_x = (size_t)(T * K), n_w = (size_t)(site->N * K);
    int32_t slot[T_MAX];

    adapters_random(&p.adapters, numbers, site);
    for (int t = 0; t < T; t++) slot[t] = next_int(numbers, -1, S_MAX - 1);
    slot[T - 1] = 1; /* there is one at least */
    p.view = view_of(&p.adapters, site, slot, T);
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
    const enum dtype dtype = product_types[type].dtype;
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
    const enum dtype dtype = product_types[type].dtype;
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
 * that adds nothing itself. */
static void check_rope(int d, int n_rows, int mode, bool has_norm, bool turns, int type)
{
    const enum dtype dtype = product_types[type].dtype;
    enum { H = 4, G = 2 };
    const struct heads heads = {.H = H, .G = G, .d = d};
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
    const struct run_key key = {p.y, sequences.kv.k};
    void *none = zeros(n_cache, sizeof(float));

    for (int i = -1; i < REPLAYS; i++) {
        dev->ops->upload(dev, sequences.kv.k, none, cache_bytes);
        dev->ops->upload(dev, sequences.kv.v, none, cache_bytes);
        if (i >= 0 && dev->ops->replay(dev, &key, sizeof key)) break;
        project(&p, i < 0 ? MLORA_LORA_BGMV : mode, true);
        if (has_norm) dev->ops->head_norm(dev, p.y, weight, weight, &heads, T, 1e-5f, p.y_dtype);
        dev->ops->rope(dev, p.y, &rope, &sequences.kv, &sequences.batch, &heads, p.y_dtype);
        if (i >= 0) dev->ops->record_end(dev);
        if (i >= 0) continue;
        dev->ops->copy(dev, want, p.y, bytes);
        dev->ops->copy(dev, k, sequences.kv.k, cache_bytes);
        dev->ops->copy(dev, v, sequences.kv.v, cache_bytes);
    }
    expect_alike(p.y, want, p.y_dtype, n, "qkv");
    expect_alike(sequences.kv.k, k, dtype, n_cache, "keys");
    expect_alike(sequences.kv.v, v, dtype, n_cache, "values");
    free(none);
    free(frequency);
    sequences_free(&sequences);
    adapters_free(&p.adapters);
}

/* The next op is one that knows nothing of adapters, or none comes. */
static void check_copy(int N, int T, bool copies, int type)
{
    const enum dtype dtype = product_types[type].product;
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

Test(lora_beside, any_other_op_finds_it_added)
{
    for (int i = 0; i < PRODUCT_TYPES; i++) {
        check_rope(64, 4, MLORA_LORA_AUTO, true, true, i);
        check_copy(264, 16, true, i);
        check_copy(37, 3, true, i);
        check_copy(264, 9, false, i);
    }
}
