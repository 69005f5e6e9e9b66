/* Segments as other engines make them: one of the tokens without an adapter among them, empty ones
 * after them, h by slice. The result is that of the engine's own view. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "tests/kernels/adapters.h"

TestSuite(lora_segments, .init = device_open, .fini = device_close);

enum { SEGMENTS = S_MAX + 3 };

/* The same tokens: all of them sorted by slot, -1 first, then two entries that say nothing. */
static struct lora_view view_of_all(const struct lora_view *view, const int32_t *slot, int T)
{
    int32_t order[T_MAX], segment_slot[SEGMENTS], segment_start[SEGMENTS + 1] = {0};
    struct lora_view all = *view;
    int n = 0;

    all.n_segments = 0;
    for (int s = -1; s < S_MAX; s++) {
        const int first = n;
        for (int t = 0; t < T; t++)
            if (slot[t] == s) order[n++] = t;
        if (n == first) continue;
        segment_slot[all.n_segments] = s;
        segment_start[++all.n_segments] = n;
    }
    while (all.n_segments < SEGMENTS) segment_slot[all.n_segments++] = -1; /* they start at 0 */
    all.n_tokens = all.max_segment = all.n_rows = T;
    all.has_base_segments = all.h_by_slice = true;
    all.order = upload(order, sizeof order);
    all.segment_slot = upload(segment_slot, sizeof segment_slot);
    all.segment_start = upload(segment_start, sizeof segment_start);
    return all;
}

static void expect_equal(const void *got, const void *want, size_t n, enum dtype dtype)
{
    float *a = zeros(n, sizeof *a), *b = zeros(n, sizeof *b);
    download_f32(a, got, dtype, n);
    download_f32(b, want, dtype, n);
    /* Other tiles, so sums in another order; bf16 then may be a neighbour. */
    if (device_is_cpu())
        cr_expect_arr_eq(a, b, n * sizeof *a);
    else
        expect_near(a, b, n, dtype == DTYPE_F32 ? 2e-4 : 0.02, dtype == DTYPE_F32 ? 1e-4 : 0x1p-6,
                    "y");
    free(a);
    free(b);
}

static void check(const struct lora_site *site, int T, enum dtype dtype, int mode, bool has_silu)
{
    struct numbers numbers = {(uint64_t)T};
    struct adapters adapters;
    int32_t slot[T_MAX];
    const size_t n = (size_t)(T * site->N), n_out = has_silu ? n / 2 : n;

    adapters_random(&adapters, &numbers, site);
    for (int t = 0; t < T; t++) slot[t] = next_int(&numbers, -1, S_MAX - 2);
    float *x = next_floats(&numbers, (size_t)(T * site->K), dtype);
    float *y0 = next_floats(&numbers, n, dtype);
    for (int i = 0; i < T * site->K; i++) x[i] /= 64; /* results have the size of y */
    const void *x_device = upload_as(dtype, x, (size_t)(T * site->K));
    struct lora_view views[2];
    void *out[2];
    views[0] = view_of(&adapters, site, slot, T);
    views[0].mode = MLORA_LORA_BGMV;
    views[1] = view_of_all(&views[0], slot, T);
    views[1].mode = mode;

    for (int i = 0; i < 2; i++) {
        float *h = device_memory((size_t)(T * site->n_slices * views[i].max_rank) * sizeof *h);
        void *y = upload_as(dtype, y0, n);
        out[i] = has_silu ? device_memory(n_out * dtype_bytes(dtype)) : y;
        dev->ops->lora_shrink(dev, h, x_device, &views[i], site, LAYER, dtype);
        if (has_silu)
            dev->ops->lora_expand_silu_mul(dev, out[i], y, dtype, h, &views[i], site, LAYER, T,
                                           dtype);
        else
            dev->ops->lora_expand(dev, y, h, &views[i], site, LAYER, dtype);
    }
    expect_equal(out[1], out[0], n_out, dtype);
    free(x);
    free(y0);
    adapters_free(&adapters);
}

Test(lora_segments, without_an_adapter_are_skipped)
{
    const struct lora_site qkv = {LORA_Q, 3, 96, 104, {0, 64, 84}, {64, 20, 20}, NULL};

    for (int mode = MLORA_LORA_AUTO; mode <= MLORA_LORA_FUSED; mode++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            check(&qkv, 3, bf16 ? DTYPE_BF16 : DTYPE_F32, mode, false);
            check(&qkv, 90, bf16 ? DTYPE_BF16 : DTYPE_F32, mode, false);
        }
}

Test(lora_segments, of_the_base_are_activated)
{
    const struct lora_site gate_up = {LORA_GATE, 2, 64, 128, {0, 64}, {64, 64}, NULL};

    for (int mode = MLORA_LORA_AUTO; mode <= MLORA_LORA_FUSED; mode++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            check(&gate_up, 80, bf16 ? DTYPE_BF16 : DTYPE_F32, mode, true);
}
