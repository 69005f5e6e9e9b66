/* lora_expand inside the op that reads its result, against the two ops one after the other, whose
 * products are made token by token. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "tests/kernels/adapters.h"

TestSuite(lora_fused, .init = device_open, .fini = device_close);

/* Of n adapters' kinds; base tokens among them where `base`. */
static void slots_random(int32_t *slot, struct numbers *numbers, int T, int n, bool base)
{
    for (int t = 0; t < T; t++) slot[t] = next_int(numbers, base ? -1 : 0, n - 1);
}

/* h of small numbers, so that results have the size of y. */
static float *h_random(struct numbers *numbers, const struct lora_view *view, int T, int n_slices)
{
    const size_t n = (size_t)(T * n_slices * view->max_rank);
    float *host = next_floats(numbers, n, DTYPE_F32);
    for (size_t i = 0; i < n; i++) host[i] *= 0.125f;
    float *h = upload(host, n * sizeof *host);
    free(host);
    return h;
}

static void expect_close(const void *got, const void *want, enum dtype dtype, size_t n,
                         const char *what)
{
    float *a = zeros(n, sizeof *a), *b = zeros(n, sizeof *b);
    download_f32(a, got, dtype, n);
    download_f32(b, want, dtype, n);
    /* Sums in another order: 2^-16 of terms up to 10 (h in two parts of 8 bits); bf16 then may be
     * a neighbour at each of two roundings. */
    if (device_is_cpu())
        cr_expect_arr_eq(a, b, n * sizeof *a, "%s", what);
    else
        expect_near(a, b, n, dtype == DTYPE_F32 ? 2e-4 : 0.02, dtype == DTYPE_F32 ? 1e-4 : 0x1p-6,
                    what);
    free(a);
    free(b);
}

static int plain_rank; /* of adapters whose factors are bf16; 0: of all kinds */

static void check_silu_mul(int F, int T, int n, bool base, enum dtype product, enum dtype dtype)
{
    const struct lora_site site = {LORA_GATE, 2, 4, 2 * F, {0, F}, {F, F}, NULL};
    struct numbers numbers = {(uint64_t)(F + T)};
    struct adapters adapters;
    int32_t slot[T_MAX];
    const size_t size = (size_t)(T * F);

    if (plain_rank > 0)
        adapters_plain(&adapters, &numbers, &site, plain_rank);
    else
        adapters_random(&adapters, &numbers, &site);
    slots_random(slot, &numbers, T, n, base);
    struct lora_view view = view_of(&adapters, &site, slot, T);
    float *h = h_random(&numbers, &view, T, 2);
    float *y0 = next_floats(&numbers, 2 * size, product);
    void *gate_up = upload_as(product, y0, 2 * size), *other = upload_as(product, y0, 2 * size);
    void *got = device_memory(size * dtype_bytes(dtype));
    void *want = device_memory(size * dtype_bytes(dtype));

    view.mode = MLORA_LORA_FUSED;
    dev->ops->lora_expand_silu_mul(dev, got, gate_up, product, h, &view, &site, LAYER, T, dtype);
    view.mode = MLORA_LORA_BGMV;
    dev->ops->lora_expand(dev, other, h, &view, &site, LAYER, product);
    dev->ops->silu_mul(dev, want, other, product, T, F, dtype);
    expect_close(got, want, dtype, size, "mlp");
    free(y0);
    adapters_free(&adapters);
}

Test(lora_fused, silu_mul_is_expand_then_silu_mul)
{
    for (int i = 0; i < PRODUCT_TYPES; i++) {
        const enum dtype product = product_types[i].product, dtype = product_types[i].dtype;
        check_silu_mul(8, 1, 1, false, product, dtype);
        check_silu_mul(264, 40, S_MAX, true, product, dtype);
        check_silu_mul(1000, 17, S_MAX, true, product, dtype);
        check_silu_mul(512, 150, 2, false, product, dtype); /* long segments */
        check_silu_mul(37, 9, S_MAX, true, product, dtype); /* rows that are not aligned */
    }
}

/* Whose B stays in registers, of up to rank 64. */
Test(lora_fused, silu_mul_of_plain_adapters)
{
    static const int ranks[] = {8, 16, 32, 48, 64, 80};

    for (size_t r = 0; r < sizeof ranks / sizeof ranks[0]; r++)
        for (int i = 0; i < PRODUCT_TYPES; i++) {
            const enum dtype product = product_types[i].product, dtype = product_types[i].dtype;
            plain_rank = ranks[r];
            check_silu_mul(8, 1, 1, false, product, dtype);
            check_silu_mul(264, 40, S_MAX, true, product, dtype);
            check_silu_mul(512, 150, 2, false, product, dtype); /* long segments */
            check_silu_mul(1000, 100, 3, true, product, dtype);
        }
}
