#include "tests/kernels/adapters.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

TestSuite(lora_shrink, .init = device_open, .fini = device_close);
TestSuite(lora_expand, .init = device_open, .fini = device_close);
TestSuite(lora, .init = device_open, .fini = device_close);

Test(lora_shrink, gives_each_token_its_own_adapter)
{
    const float x[3][2] = {{1, 2}, {3, 4}, {5, 6}};
    const struct lora_site site = {LORA_O, 1, 2, 1, {0}, {1}, NULL};
    const int32_t slot[3] = {1, -1, 0};
    const float want[3][2] = {{3, 7}, {7, 7}, {5, 7}}; /* 7: as it was, nothing is written */
    struct adapters adapters = {.S = 2};
    struct lora_factors *o = &adapters.host[0][LAYER][LORA_O];
    struct lora_factors *p = &adapters.host[1][LAYER][LORA_O];
    float got[3][2];
    const float before[3][2] = {{7, 7}, {7, 7}, {7, 7}};

    o->a = memcpy(zeros(2, 4), (float[]){1, 0}, 8); /* rank 1 */
    o->b = zeros(1, 4);
    o->R = 1;
    p->a = memcpy(zeros(2, 4), (float[]){1, 1}, 8);
    p->b = zeros(1, 4);
    p->R = 1;
    adapters_upload(&adapters, &site);
    struct lora_view view = view_of(&adapters, &site, slot, 3);
    view.max_rank = 2; /* as if another site had more */
    float *h = upload(before, sizeof before);
    dev->ops->lora_shrink(dev, h, upload(x, sizeof x), &view, &site, LAYER, DTYPE_F32);
    download(got, h, sizeof got);
    cr_expect_arr_eq(got, want, sizeof want);
    adapters_free(&adapters);
}

/* On a GPU shrink may be a branch of what is recorded; an op from a file, which asks for the stream
 * and starts kernels of its own there, knows of none. */
Test(lora_shrink, in_a_recording_is_done_for_kernels_from_elsewhere)
{
    enum { T = 64, K = 4096 };
    const struct lora_site site = {LORA_Q, 1, K, 16, {0}, {16}, NULL};
    const int32_t last[] = {T - 1};
    struct numbers numbers = {7};
    struct adapters adapters;
    int32_t slot[T];

    adapters_random(&adapters, &numbers, &site);
    for (int t = 0; t < T; t++) slot[t] = t % S_MAX;
    slot[T - 1] = 4; /* of the largest rank */
    const struct lora_view view = view_of(&adapters, &site, slot, T);
    const size_t n_h = (size_t)(T * view.max_rank), row = (size_t)view.max_rank;
    float *x = next_floats(&numbers, T * K, DTYPE_BF16), *nothing = zeros(n_h, sizeof *nothing);
    float *want = zeros(row, sizeof *want), *got = zeros(row, sizeof *got);
    void *dev_x = upload_as(DTYPE_BF16, x, T * K), *rows = upload(last, sizeof last);
    float *h = device_memory(n_h * sizeof *h), *y = device_memory(row * sizeof *y);

    for (int turn = 0; turn < 4; turn++) { /* an ordinary one, the recorded one, two replays */
        dev->ops->upload(dev, h, nothing, n_h * sizeof *h);
        if (!dev->ops->replay(dev, "shrink", 6)) {
            dev->ops->gather_rows(dev, y, h, rows, 1, view.max_rank, DTYPE_F32); /* to branch off */
            dev->ops->lora_shrink(dev, h, dev_x, &view, &site, LAYER, DTYPE_BF16);
            if (dev->ops->stream) cr_assert(dev->ops->stream(dev));
            dev->ops->gather_rows(dev, y, h, rows, 1, view.max_rank, DTYPE_F32);
            dev->ops->record_end(dev);
        }
        download(got, y, row * sizeof *got);
        download(want, h + (T - 1) * row, row * sizeof *want);
        cr_expect_neq(want[row - 1], 0.0f);
        cr_expect_arr_eq(got, want, row * sizeof *got, "turn %d", turn);
    }
    free(x);
    free(nothing);
    free(want);
    free(got);
    adapters_free(&adapters);
}

Test(lora_expand, adds_the_scaled_product_to_its_slice)
{
    const struct lora_site site = {LORA_Q, 2, 1, 3, {0, 2}, {2, 1}, NULL};
    const int32_t slot[2] = {-1, 0};
    const float y0[2][3] = {{1, 1, 1}, {1, 1, 1}};
    const float h0[2][2][1] = {{{9}, {9}}, {{2}, {3}}};
    const float want[2][3] = {{1, 1, 1}, {3, 0, 13}}; /* 1 + .5 * 4, 1 + .5 * -2, 1 + 2 * 6 */
    struct adapters adapters = {.S = 1};
    struct lora_factors *q = &adapters.host[0][LAYER][LORA_Q];
    struct lora_factors *k = &adapters.host[0][LAYER][LORA_K];
    float got[2][3];

    *q = (struct lora_factors){.a = zeros(1, 4), .R = 1, .dtype = DTYPE_BF16, .scale = 0.5f};
    q->b = memcpy(zeros(2, 4), (float[]){2, -1}, 8);
    *k = (struct lora_factors){.a = zeros(1, 4), .R = 1, .dtype = DTYPE_F16, .scale = 2};
    k->b = memcpy(zeros(1, 4), (float[]){2}, 4);
    adapters_upload(&adapters, &site);
    const struct lora_view view = view_of(&adapters, &site, slot, 2);
    float *y = upload(y0, sizeof y0);
    dev->ops->lora_expand(dev, y, upload(h0, sizeof h0), &view, &site, LAYER, DTYPE_F32);
    download(got, y, sizeof got);
    cr_expect_arr_eq(got, want, sizeof want);
    adapters_free(&adapters);
}

/* bf16 keeps 8 significant bits. A x = 1 + 2^-9, scale = 1 + 2^-12 and their product need more, so
 * each output is another number where any of them, or the delta, is rounded before the sum is. */
Test(lora, rounds_to_bf16_once_after_the_sum_in_f32)
{
    const struct lora_site site = {LORA_O, 1, 2, 3, {0}, {3}, NULL};
    const uint16_t x[2] = {0x3f80, 0x3b00};          /* 1, 2^-9 */
    const uint16_t y0[3] = {0xbf80, 0x3f80, 0x4380}; /* -1, 1, 256 */
    /* -1 + q, 1 + 2^-8 q, 256 + q, where q = 1 + 2^-9 + 2^-12 + 2^-21: */
    const uint16_t want[3] = {
        0x3b10, /* 2^-9 + 2^-12; 2^-12 if A x was rounded, 2^-9 if scale, 0 if the delta */
        0x3f81, /* 1 + 2^-7, just above the tie that 1 wins if the delta was rounded */
        0x4381, /* 258, just above the tie that 256 wins */
    };
    const int32_t slot[1] = {0};
    struct adapters adapters = {.S = 1};
    struct lora_factors *o = &adapters.host[0][LAYER][LORA_O];
    uint16_t got[3];

    *o = (struct lora_factors){.R = 1, .dtype = DTYPE_BF16, .scale = 1 + 0x1p-12f};
    o->a = memcpy(zeros(2, 4), (float[]){1, 1}, 8);
    o->b = memcpy(zeros(3, 4), (float[]){1, 0x1p-8f, 1}, 12);
    adapters_upload(&adapters, &site);
    const struct lora_view view = view_of(&adapters, &site, slot, 1);
    float *h = device_memory(sizeof *h);
    uint16_t *y = upload(y0, sizeof y0);
    dev->ops->lora_shrink(dev, h, upload(x, sizeof x), &view, &site, LAYER, DTYPE_BF16);
    dev->ops->lora_expand(dev, y, h, &view, &site, LAYER, DTYPE_BF16);
    download(got, y, sizeof got);
    for (int n = 0; n < 3; n++) cr_expect_eq(got[n], want[n], "%d: %04x", n, got[n]);
    adapters_free(&adapters);
}

/* y += scale B A x for these tokens. */
static void run_mode(float *y_out, mlora_lora_mode mode, const struct adapters *adapters,
                     const struct lora_site *site, const int32_t *slot, const float *x,
                     const float *y0, int T, enum dtype y_dtype, enum dtype dtype)
{
    struct lora_view view = view_of(adapters, site, slot, T);
    view.mode = mode;
    float *h = device_memory((size_t)(T * site->n_slices * view.max_rank) * sizeof *h);
    void *x_device = upload_as(dtype, x, (size_t)(T * site->K));
    void *y = upload_as(y_dtype, y0, (size_t)(T * site->N));

    dev->ops->lora_shrink(dev, h, x_device, &view, site, LAYER, dtype);
    dev->ops->lora_expand(dev, y, h, &view, site, LAYER, y_dtype);
    download_f32(y_out, y, y_dtype, (size_t)(T * site->N));
}

static void run(float *y_out, const struct adapters *adapters, const struct lora_site *site,
                const int32_t *slot, const float *x, const float *y0, int T, enum dtype dtype)
{
    run_mode(y_out, MLORA_LORA_AUTO, adapters, site, slot, x, y0, T, dtype, dtype);
}

static int plain_rank; /* of adapters whose factors are bf16; 0: of all kinds */

static void check_random(const struct lora_site *site, int T, int n_kinds, int type,
                         mlora_lora_mode mode)
{
    const enum dtype y_dtype = product_types[type].product, dtype = product_types[type].dtype;
    struct numbers numbers = {(uint64_t)T};
    struct adapters adapters;
    int32_t slot[T_MAX];
    if (plain_rank > 0)
        adapters_plain(&adapters, &numbers, site, plain_rank);
    else
        adapters_random(&adapters, &numbers, site);
    for (int t = 0; t < T; t++) slot[t] = next_int(&numbers, -1, n_kinds - 2);
    float *x = next_floats(&numbers, (size_t)(T * site->K), dtype);
    float *y0 = next_floats(&numbers, (size_t)(T * site->N), y_dtype);
    float *got = zeros((size_t)(T * site->N), sizeof *got);

    run_mode(got, mode, &adapters, site, slot, x, y0, T, y_dtype, dtype);
    for (int t = 0; t < T; t++) {
        if (slot[t] < 0)
            cr_expect_arr_eq(got + t * site->N, y0 + t * site->N, (size_t)site->N * sizeof *got);
        for (int i = 0; i < site->n_slices; i++) {
            static const struct lora_factors none;
            const struct lora_factors *factors =
                slot[t] < 0 ? &none : &adapters.host[slot[t]][LAYER][site->linear + i];
            const float *a = factors->a, *b = factors->b;
            double h[LORA_RANK_MAX];
            for (int r = 0; r < factors->R; r++) {
                h[r] = 0;
                for (int k = 0; k < site->K; k++)
                    h[r] += (double)a[r * site->K + k] * (double)x[t * site->K + k];
            }
            for (int n = 0; n < site->width[i]; n++) {
                const int at = t * site->N + site->offset[i] + n;
                double sum = 0, magnitude = 1;
                for (int r = 0; r < factors->R; r++) {
                    const double term = (double)b[n * factors->R + r] * h[r];
                    sum += term;
                    magnitude += fabs(term) + sqrt(site->K) * fabs((double)b[n * factors->R + r]);
                }
                const float want = (float)((double)y0[at] + (double)factors->scale * sum);
                /* Two sums in f32 of at most 16 terms a lane each, and one rounding. */
                expect_near(&got[at], &want, 1,
                            20 * 0x1p-24 * magnitude * (double)(1 + factors->scale),
                            half_ulp(y_dtype), "y");
            }
        }
    }
    free(x);
    free(y0);
    free(got);
    adapters_free(&adapters);
}

Test(lora, is_right_for_mixed_adapters_ranks_and_types_in_every_mode)
{
    const struct lora_site qkv = {LORA_Q, 3, 70, 85, {0, 50, 67}, {50, 17, 18}, NULL};
    const struct lora_site down = {LORA_DOWN, 1, 200, 49, {0}, {49}, NULL};
    const struct lora_site gate_up = {LORA_GATE, 2, 33, 2000, {0, 1000}, {1000, 1000}, NULL};
    const struct lora_site even = {LORA_Q, 3, 96, 80, {0, 48, 64}, {48, 16, 16}, NULL};
    const struct lora_site long_k = {LORA_DOWN, 1, 1056, 129, {0}, {129}, NULL};
    const int n_modes = device_is_cpu() ? 1 : MLORA_LORA_FUSED + 1;

    for (int mode = 0; mode < n_modes; mode++) {
        for (int type = 0; type < PRODUCT_TYPES; type++) {
            check_random(&qkv, 40, S_MAX + 1, type, (mlora_lora_mode)mode);
            check_random(&qkv, 3, S_MAX + 1, type, (mlora_lora_mode)mode);
            check_random(&down, 150, 3, type, (mlora_lora_mode)mode); /* long segments */
            check_random(&gate_up, 17, S_MAX + 1, type, (mlora_lora_mode)mode);
            check_random(&even, 50, S_MAX + 1, type, (mlora_lora_mode)mode);
            check_random(&even, 1, 3, type, (mlora_lora_mode)mode);
            check_random(&long_k, 60, 3, type, (mlora_lora_mode)mode);
        }
    }
}

Test(lora, is_right_for_plain_adapters_in_every_mode)
{
    const struct lora_site qkv = {LORA_Q, 3, 128, 192, {0, 128, 160}, {128, 32, 32}, NULL};
    const struct lora_site gate_up = {LORA_GATE, 2, 72, 1998, {0, 999}, {999, 999}, NULL};
    const struct lora_site down = {LORA_DOWN, 1, 1056, 129, {0}, {129}, NULL};
    const struct lora_site odd = {LORA_O, 1, 70, 40, {0}, {40}, NULL};
    const struct lora_site wide = {LORA_Q, 3, 96, 384, {0, 304, 344}, {304, 40, 40}, NULL};
    const int n_modes = device_is_cpu() ? 1 : MLORA_LORA_FUSED + 1;

    for (int mode = 0; mode < n_modes; mode++)
        for (int type = 0; type < PRODUCT_TYPES; type++)
            for (plain_rank = 8; plain_rank <= 64; plain_rank *= 2) {
                check_random(&qkv, 40, S_MAX + 1, type, (mlora_lora_mode)mode);
                check_random(&gate_up, 17, S_MAX + 1, type, (mlora_lora_mode)mode);
                check_random(&down, 60, 3, type, (mlora_lora_mode)mode);
                check_random(&odd, 5, 2, type, (mlora_lora_mode)mode);
                check_random(&wide, 150, 4, type, (mlora_lora_mode)mode); /* long segments */
                check_random(&wide, 320, 5, type, (mlora_lora_mode)mode);
                check_random(&down, 300, 4, type, (mlora_lora_mode)mode);
            }
}

/* What gbmm copies for all tokens is more than it keeps at once. */
Test(lora, is_right_in_several_copies)
{
    const struct lora_site wide = {LORA_O, 1, 96, 2000, {0}, {2000}, NULL};
    const struct lora_site deep = {LORA_DOWN, 1, 1056, 129, {0}, {129}, NULL};

    for (plain_rank = 0; plain_rank <= LORA_RANK_MAX; plain_rank += LORA_RANK_MAX) {
        check_random(&wide, 100, S_MAX + 1, PRODUCT_TYPES - 1, MLORA_LORA_GBMM);
        check_random(&deep, 150, S_MAX + 1, PRODUCT_TYPES - 1, MLORA_LORA_GBMM);
    }
}

Test(lora, adds_nothing_where_no_token_has_an_adapter_in_any_mode)
{
    const struct lora_site site = {LORA_O, 1, 32, 40, {0}, {40}, NULL};

    for (int mode = 0; mode <= MLORA_LORA_FUSED; mode++)
        check_random(&site, 5, 1, 0, (mlora_lora_mode)mode);
}

Test(lora, gives_a_token_the_same_bits_alone_and_in_a_mixed_batch)
{
    enum { T = 90, K = 100, N = 85 };
    const struct lora_site site = {LORA_Q, 3, K, N, {0, 50, 67}, {50, 17, 18}, NULL};
    struct numbers numbers = {9};
    struct adapters adapters;
    int32_t slot[T];
    adapters_random(&adapters, &numbers, &site);
    for (int t = 0; t < T; t++) slot[t] = t % 2 ? 4 : next_int(&numbers, -1, S_MAX - 1);
    float *x = next_floats(&numbers, T * K, DTYPE_F32);
    float *y0 = next_floats(&numbers, T * N, DTYPE_F32);
    float *all = zeros(T * N, sizeof *all), *alone = zeros(T * N, sizeof *alone);

    run(all, &adapters, &site, slot, x, y0, T, DTYPE_F32);
    for (int t = 0; t < T; t++) {
        if (slot[t] < 0) continue;
        run(alone, &adapters, &site, &slot[t], x + t * K, y0 + t * N, 1, DTYPE_F32);
        expect_same(all + t * N, alone, N, "alone");
    }
    for (int first = 0; first + 7 <= T; first += 7) {
        run(alone, &adapters, &site, slot + first, x + first * K, y0 + first * N, 7, DTYPE_F32);
        expect_same(all + first * N, alone, 7 * N, "seven");
    }
    free(x);
    free(y0);
    free(all);
    free(alone);
    adapters_free(&adapters);
}

Test(lora, leaves_tokens_of_the_base_model_alone)
{
    const struct lora_site site = {LORA_O, 1, 20, 30, {0}, {30}, NULL};
    struct numbers numbers = {11};
    struct adapters adapters;
    const int32_t slot[4] = {-1, 1, -1, 2};
    float got[4 * 30];
    adapters_random(&adapters, &numbers, &site);
    float *x = next_floats(&numbers, 4 * 20, DTYPE_F32);
    float *y0 = next_floats(&numbers, 4 * 30, DTYPE_F32);

    run(got, &adapters, &site, slot, x, y0, 4, DTYPE_F32);
    cr_expect_arr_eq(got, y0, 30 * sizeof *got);
    cr_expect_arr_eq(got + 60, y0 + 60, 30 * sizeof *got);
    cr_expect_neq(got[30], y0[30]);
    free(x);
    free(y0);
    adapters_free(&adapters);
}
