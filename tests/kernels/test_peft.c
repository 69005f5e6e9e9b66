/* What adapters change beyond A, B and scale. */
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

TestSuite(lora_expand_more, .init = device_open, .fini = device_close);
TestSuite(lora_embed, .init = device_open, .fini = device_close);
TestSuite(lora_head, .init = device_open, .fini = device_close);
TestSuite(lora_norms, .init = device_open, .fini = device_close);
TestSuite(lora_row_norms, .init = device_open, .fini = device_close);

/* Two slots of a model of one layer; tokens of slot 0 and 1 and the base, in segments. */
struct fixture {
    struct lora_factors factors[2][2][LORA_LINEARS]; /* [S, L + 1, ] */
    struct lora_own own[2];
};

static struct lora_view view_of(const struct fixture *fixture, const int32_t *slot, int T,
                                int max_rank)
{
    int32_t order[16], segment_slot[2], segment_start[3] = {0};
    struct lora_view view = {.L = 2, .max_rank = max_rank, .expands_more = true};

    for (int s = 0; s < 2; s++) {
        const int first = view.n_tokens;
        for (int t = 0; t < T; t++)
            if (slot[t] == s) order[view.n_tokens++] = t;
        if (view.n_tokens == first) continue;
        if (view.n_tokens - first > view.max_segment) view.max_segment = view.n_tokens - first;
        segment_slot[view.n_segments] = s;
        segment_start[++view.n_segments] = view.n_tokens;
    }
    view.factors = upload(fixture->factors, sizeof fixture->factors);
    view.own = upload(fixture->own, sizeof fixture->own);
    view.slot = upload(slot, (size_t)T * sizeof *slot);
    view.order = upload(order, sizeof order);
    view.segment_slot = upload(segment_slot, sizeof segment_slot);
    view.segment_start = upload(segment_start, sizeof segment_start);
    return view;
}

#define UPLOAD(...) upload((float[]){__VA_ARGS__}, sizeof((float[]){__VA_ARGS__}))

/* y = 5 and 5, bias = 1 and 3: of W x alone 4 and 2. B h = 2 and 6, scale 0.5. */
static void expect_expanded(struct lora_factors factors, const float *bias, float want0,
                            float want1)
{
    const struct lora_site site = {
        .linear = LORA_O, .n_slices = 1, .K = 1, .N = 2, .width = {2}, .bias = bias};
    struct fixture fixture = {0};
    const int32_t slot[] = {0};
    float got[2];

    fixture.factors[0][0][LORA_O] = factors;
    const struct lora_view view = view_of(&fixture, slot, 1, 1);
    float *y = UPLOAD(5, 5);
    dev->ops->lora_expand(dev, y, UPLOAD(2), &view, &site, 0, DTYPE_F32);
    download(got, y, sizeof got);
    cr_expect_eq(got[0], want0, "%g", (double)got[0]);
    cr_expect_eq(got[1], want1, "%g", (double)got[1]);
}

Test(lora_expand_more, does_what_the_formula_says)
{
    const struct lora_factors plain = {
        .a = UPLOAD(0), .b = UPLOAD(1, 3), .R = 1, .dtype = DTYPE_F32, .scale = 0.5f};
    const float *bias = UPLOAD(1, 3);
    struct lora_factors factors = plain;

    expect_expanded(factors, bias, 6, 8); /* 5 + 0.5 * 2, 5 + 0.5 * 6 */
    factors.b_bias = UPLOAD(4, -2);
    expect_expanded(factors, bias, 8, 7); /* 5 + 0.5 * (2 + 4), 5 + 0.5 * (6 - 2) */
    factors = plain;
    factors.g = UPLOAD(3, 0.5f);
    expect_expanded(factors, bias, 16, 5.5f); /* 5 + 2 * 4 + 3 * 1, 5 - 0.5 * 2 + 0.5 * 3 */
    expect_expanded(factors, NULL, 18, 4.0f); /* 5 + 2 * 5 + 3 * 1, 5 - 0.5 * 5 + 0.5 * 3 */
    factors.bias_delta = UPLOAD(10, -1);
    expect_expanded(factors, bias, 26, 4.5f);
    factors = (struct lora_factors){.bias_delta = UPLOAD(0.25f, -2)}; /* a bias alone */
    expect_expanded(factors, bias, 5.25f, 3);
}

/* Random factors of one linear on the device, and the host's copies. */
struct random_factors {
    struct lora_factors dev;
    float *b, *g, *b_bias, *bias_delta; /* [N, R], [N]; NULL: there is none */
};

static struct random_factors random_factors(struct numbers *numbers, int N)
{
    static const int ranks[] = {0, 1, 8, 13, 64};
    const int R = ranks[next_int(numbers, 0, 4)];
    const enum dtype dtype = (enum dtype)next_int(numbers, DTYPE_F32, DTYPE_BF16);
    struct random_factors f = {.dev = {.R = R, .dtype = (int32_t)dtype}};
    const size_t bytes = (size_t)N * sizeof(float);

    if (R > 0) {
        f.dev.scale = 0.75f;
        f.b = next_floats(numbers, (size_t)(N * R), dtype);
        f.dev.b = f.dev.a = upload_as(dtype, f.b, (size_t)(N * R)); /* A is not read */
        if (next_int(numbers, 0, 1)) f.g = next_floats(numbers, (size_t)N, DTYPE_F32);
        if (next_int(numbers, 0, 1)) f.b_bias = next_floats(numbers, (size_t)N, DTYPE_F32);
    }
    if (next_int(numbers, 0, 1)) f.bias_delta = next_floats(numbers, (size_t)N, DTYPE_F32);
    if (f.g) f.dev.g = upload(f.g, bytes);
    if (f.b_bias) f.dev.b_bias = upload(f.b_bias, bytes);
    if (f.bias_delta) f.dev.bias_delta = upload(f.bias_delta, bytes);
    return f;
}

/* Output n in double. */
static double want_expanded(const struct random_factors *f, const float *h, double y, double bias,
                            int n)
{
    double delta = 0;
    for (int r = 0; r < f->dev.R; r++) delta += (double)f->b[n * f->dev.R + r] * (double)h[r];
    if (f->b_bias) delta += (double)f->b_bias[n];
    delta *= (double)f->dev.scale;
    if (f->g) delta = ((double)f->g[n] - 1) * (y - bias) + (double)f->g[n] * delta;
    return y + delta + (f->bias_delta ? (double)f->bias_delta[n] : 0);
}

Test(lora_expand_more, is_right_for_mixed_adapters_ranks_and_types)
{
    enum { T = 16, SLICES = 3, R = 64, N = 350 };
    struct numbers numbers = {17};

    for (int round = 0; round < 12; round++) {
        const enum dtype dtype = round % 2 ? DTYPE_BF16 : DTYPE_F32;
        float *bias = round % 3 ? next_floats(&numbers, N, DTYPE_F32) : NULL;
        const struct lora_site site = {LORA_Q,
                                       SLICES,
                                       1,
                                       N,
                                       {0, 201, 300},
                                       {201, 99, 50},
                                       bias ? upload(bias, N * sizeof *bias) : NULL};
        struct random_factors factors[2][SLICES];
        struct fixture fixture = {0};
        int32_t slot[T];

        for (int s = 0; s < 2; s++)
            for (int i = 0; i < SLICES; i++) {
                factors[s][i] = random_factors(&numbers, site.width[i]);
                fixture.factors[s][0][LORA_Q + i] = factors[s][i].dev;
            }
        for (int t = 0; t < T; t++) slot[t] = round < 4 ? 0 : next_int(&numbers, -1, 1);
        const struct lora_view view = view_of(&fixture, slot, T, R);
        float *y0 = next_floats(&numbers, T * N, dtype), *got = zeros(T * N, sizeof *got);
        float *h = next_floats(&numbers, T * SLICES * R, DTYPE_F32);
        void *y = upload_as(dtype, y0, T * N);
        dev->ops->lora_expand(dev, y, upload(h, T * SLICES * R * sizeof *h), &view, &site, 0,
                              dtype);
        download_f32(got, y, dtype, T * N);

        for (int t = 0; t < T; t++)
            for (int i = 0; i < SLICES; i++)
                for (int n = 0; n < site.width[i]; n++) {
                    const int at = t * N + site.offset[i] + n;
                    const double b = bias ? (double)bias[site.offset[i] + n] : 0;
                    const float want = slot[t] < 0 ? y0[at]
                                                   : (float)want_expanded(&factors[slot[t]][i],
                                                                          h + (t * SLICES + i) * R,
                                                                          (double)y0[at], b, n);
                    /* terms below 1: R + 4 of them, a few roundings each; and one to dtype */
                    expect_near(&got[at], &want, 1, 4 * R * 0x1p-24, half_ulp(dtype), "y");
                }
        for (int s = 0; s < 2; s++)
            for (int i = 0; i < SLICES; i++) {
                free(factors[s][i].b);
                free(factors[s][i].g);
                free(factors[s][i].b_bias);
                free(factors[s][i].bias_delta);
            }
        free(bias);
        free(y0);
        free(got);
        free(h);
    }
}

Test(lora_embed, takes_whole_tables_rows_and_factors_of_its_own)
{
    const int32_t slot[] = {0, -1, 1, 0, 1}, ids[] = {2, 2, 2, 0, 3};
    const float before[] = {9, 9, 9, 9, 9, 9, 9, 9, 9, 9};
    /* slot 0: a table, and row 2 of it replaced; slot 1: rows 1 and 3, and factors of rank 1 */
    const float want[] = {-1, -2, 9, 9, 9, 9, 10, 11, 5, 6};
    const float want_h[] = {0, 0, 30, 0, 40};
    struct fixture fixture = {0};
    float got[10], got_h[5];

    fixture.own[0].embedding =
        (struct matrix){UPLOAD(10, 11, 20, 21, 30, 31, 40, 41), DTYPE_F32, 4, 2};
    fixture.own[0].embedding_rows =
        (struct lora_rows){upload((int32_t[]){2}, 4), UPLOAD(-1, -2), 1, DTYPE_F32};
    fixture.own[1].embedding_rows =
        (struct lora_rows){upload((int32_t[]){1, 3}, 8), UPLOAD(3, 4, 5, 6), 2, DTYPE_F32};
    fixture.factors[1][1][LORA_EMBEDDING] =
        (struct lora_factors){.a = UPLOAD(10, 20, 30, 40), .R = 1, .dtype = DTYPE_F32};
    const struct lora_view view = view_of(&fixture, slot, 5, 1);
    float *y = upload(before, sizeof before), *h = UPLOAD(0, 0, 0, 0, 0);
    dev->ops->lora_embed(dev, y, h, upload(ids, sizeof ids), &view, 2, DTYPE_F32);
    download(got, y, sizeof got);
    download(got_h, h, sizeof got_h);
    cr_expect_arr_eq(got, want, sizeof want);
    cr_expect_arr_eq(got_h, want_h, sizeof want_h);
}

/* Against plain loops, many columns, several types, and each token alone. */
Test(lora_head, gives_each_token_its_own_logits)
{
    enum { T = 9, V = 500, D = 37, ROWS = 60 };
    const int32_t slot[T] = {0, 1, -1, 0, 1, 1, -1, 0, 0};
    struct numbers numbers = {3};
    struct fixture fixture = {0};
    int32_t ids[ROWS];
    float *head = next_floats(&numbers, V * D, DTYPE_BF16);
    float *rows = next_floats(&numbers, ROWS * D, DTYPE_F16);
    float *x = next_floats(&numbers, T * D, DTYPE_F32);
    float *before = next_floats(&numbers, T * V, DTYPE_F32);
    float *got = zeros(T * V, sizeof *got), *alone = zeros(V, sizeof *alone);

    for (int i = 0; i < ROWS; i++) ids[i] = 7 * i + 3;
    fixture.own[0].head = (struct matrix){upload_as(DTYPE_BF16, head, V * D), DTYPE_BF16, V, D};
    fixture.own[1].head_rows = (struct lora_rows){
        upload(ids, sizeof ids), upload_as(DTYPE_F16, rows, ROWS * D), ROWS, DTYPE_F16};
    struct lora_view view = view_of(&fixture, slot, T, 0);
    float *logits = upload(before, T * V * sizeof *before);
    dev->ops->lora_head(dev, logits, upload(x, T * D * sizeof *x), &view, V, D, DTYPE_F32);
    download(got, logits, T * V * sizeof *got);

    for (int t = 0; t < T; t++) {
        for (int v = 0; v < V; v++) {
            const int row = v >= 3 && (v - 3) % 7 == 0 && (v - 3) / 7 < ROWS ? (v - 3) / 7 : -1;
            const float *w = slot[t] == 0               ? head + v * D
                             : slot[t] == 1 && row >= 0 ? rows + row * D
                                                        : NULL;
            double sum = 0;
            for (int k = 0; w && k < D; k++) sum += (double)w[k] * (double)x[t * D + k];
            const float want = w ? (float)sum : before[t * V + v];
            expect_near(&got[t * V + v], &want, 1, w ? D * 0x1p-24 : 0, 0, "logit");
        }
        view = view_of(&fixture, &slot[t], 1, 0);
        logits = upload(before + t * V, V * sizeof *before);
        dev->ops->lora_head(dev, logits, upload(x + t * D, D * sizeof *x), &view, V, D, DTYPE_F32);
        download(alone, logits, V * sizeof *alone);
        expect_same(got + t * V, alone, V, "alone");
    }
    free(head);
    free(rows);
    free(x);
    free(before);
    free(got);
    free(alone);
}

Test(lora_norms, take_each_tokens_own_weights)
{
    const int32_t slot[] = {-1, 0, 1};
    const float x[] = {1, -1, 1, -1, 1, -1}; /* of mean square 1 */
    const float *base = UPLOAD(2, 2), *own = UPLOAD(5, 7);
    const float *table[LORA_NORMS + 1] = {[NORM_MLP] = own, [LORA_NORMS + NORM_FINAL] = own};
    struct fixture fixture = {0};
    float got[6];

    fixture.own[0].norms = upload(table, sizeof table);
    const struct lora_view view = view_of(&fixture, slot, 3, 0);
    static const struct {
        int layer;
        enum lora_norm norm;
        float own[2]; /* of the token of slot 0 */
    } cases[] = {{0, NORM_ATTENTION, {2, -2}}, {0, NORM_MLP, {5, -7}}, {1, NORM_FINAL, {5, -7}}};
    for (int i = 0; i < 3; i++) {
        const float want[] = {2, -2, cases[i].own[0], cases[i].own[1], 2, -2};
        float *y = device_memory(sizeof got);
        dev->ops->lora_add_rms_norm(dev, y, upload(x, sizeof x), NULL, DTYPE_F32, base, &view,
                                    cases[i].layer, cases[i].norm, 3, 2, 0, DTYPE_F32);
        download(got, y, sizeof got);
        expect_near(got, want, 6, 0, 2 * 0x1p-23, "y");
    }
}

Test(lora_norms, take_each_tokens_own_weights_of_heads)
{
    const int32_t slot[] = {0, -1};
    const struct heads heads = {.H = 1, .G = 1, .d = 2};
    const float qkv0[] = {1, -1, 1, -1, 8, 9, 1, -1, 1, -1, 8, 9};
    const float want[] = {2, -2, 3, -4, 8, 9, 2, -2, 2, -2, 8, 9};
    const float *base = UPLOAD(2, 2);
    const float *table[LORA_NORMS + 1] = {[NORM_K] = UPLOAD(3, 4)};
    struct fixture fixture = {0};
    float got[12];

    fixture.own[0].norms = upload(table, sizeof table);
    const struct lora_view view = view_of(&fixture, slot, 2, 0);
    float *qkv = upload(qkv0, sizeof qkv0);
    dev->ops->lora_head_norm(dev, qkv, base, base, &view, 0, &heads, 2, 0, DTYPE_F32);
    download(got, qkv, sizeof got);
    expect_near(got, want, 12, 0, 2 * 0x1p-23, "qkv");
}

Test(lora_norms, are_those_of_the_base_where_the_weights_are_the_same)
{
    static const int widths[] = {5, 64, 1000, 9000};
    struct numbers numbers = {23};
    const int32_t slot[] = {0, -1, 0};

    for (int i = 0; i < 8; i++) {
        const enum dtype dtype = i % 2 ? DTYPE_BF16 : DTYPE_F32;
        const int D = widths[i / 2];
        const size_t n = 3 * (size_t)D;
        float *x0 = next_floats(&numbers, n, DTYPE_F32), *delta0 = next_floats(&numbers, n, dtype);
        float *weight0 = next_floats(&numbers, (size_t)D, DTYPE_F32);
        float *got = zeros(n, sizeof *got), *want = zeros(n, sizeof *want);
        const float *weight = upload(weight0, (size_t)D * sizeof *weight0);
        const float *table[LORA_NORMS + 1] = {[NORM_MLP] = weight};
        const void *delta = upload_as(dtype, delta0, n);
        void *y = device_memory(n * sizeof *x0);
        struct fixture fixture = {0};

        fixture.own[0].norms = upload(table, sizeof table);
        const struct lora_view view = view_of(&fixture, slot, 3, 0);
        dev->ops->lora_add_rms_norm(dev, y, upload(x0, n * sizeof *x0), delta, dtype, weight, &view,
                                    0, NORM_MLP, 3, D, 1e-5f, dtype);
        download_f32(got, y, dtype, n);
        dev->ops->add_rms_norm(dev, y, upload(x0, n * sizeof *x0), delta, dtype, weight, 3, D,
                               1e-5f, dtype);
        download_f32(want, y, dtype, n);
        expect_near(got, want, n, 0, 0, "y");
        free(x0);
        free(delta0);
        free(weight0);
        free(got);
        free(want);
    }
}

Test(lora_row_norms, are_those_of_the_rows_with_the_product_added)
{
    enum { N = 19, K = 70, R = 5 };
    struct numbers numbers = {5};

    for (enum dtype type = DTYPE_F32; type <= DTYPE_BF16; type++) {
        float *w = next_floats(&numbers, N * K, type);
        float *a = next_floats(&numbers, R * K, DTYPE_F32);
        float *b = next_floats(&numbers, N * R, DTYPE_F32);
        const struct matrix matrix = {upload_as(type, w, N * K), type, N, K};
        float *norm = device_memory(N * sizeof *norm), got[N], want[N];

        dev->ops->lora_row_norms(dev, norm, &matrix, upload(a, R * K * sizeof *a),
                                 upload(b, N * R * sizeof *b), R, 0.75f);
        download(got, norm, sizeof got);
        for (int n = 0; n < N; n++) {
            double squares = 0;
            for (int k = 0; k < K; k++) {
                double sum = (double)w[n * K + k];
                for (int r = 0; r < R; r++)
                    sum += 0.75 * (double)b[n * R + r] * (double)a[r * K + k];
                squares += sum * sum;
            }
            want[n] = (float)sqrt(squares);
        }
        expect_near(got, want, N, 0, 0x1p-20, "norm");
        free(w);
        free(a);
        free(b);
    }
}
