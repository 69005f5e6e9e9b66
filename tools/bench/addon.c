/* What the adapters add to one decoder layer: the seven linears at their four sites, for each way
 * to compute it, beside two baselines: a loop over the rows, and rows whose factors lie ready, each
 * with a copy of its own ("cheat_bmm": what a batched product costs when gathering is free). */
#include <stdlib.h>

#include "engine/base/error.h"
#include "tools/bench/ops.h"

enum { SITES = 4, MODE_ROWS = -1, MODE_CHEAT = -2, LAUNCHES_MAX = 8192 };

struct addon {
    struct ops_bench *bench;
    int T, A, R, layers, mode;
    struct lora_site sites[SITES];
    void *x, *y; /* [T, widest] */
    float *h;    /* [T, LORA_SLICES_MAX, R] */
    struct lora_view view;
    struct lora_view *rows; /* [T] of one row each */
};

static void find_sites(struct addon *addon)
{
    const struct model_config *c = &addon->bench->config;
    const int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const int D = c->hidden_size, F = c->mlp_size;

    addon->sites[0] = (struct lora_site){.linear = LORA_Q,
                                         .n_slices = 3,
                                         .K = D,
                                         .N = q + 2 * kv,
                                         .offset = {0, q, q + kv},
                                         .width = {q, kv, kv}};
    addon->sites[1] =
        (struct lora_site){.linear = LORA_O, .n_slices = 1, .K = q, .N = D, .width = {D}};
    addon->sites[2] = (struct lora_site){
        .linear = LORA_GATE, .n_slices = 2, .K = D, .N = 2 * F, .offset = {0, F}, .width = {F, F}};
    addon->sites[3] =
        (struct lora_site){.linear = LORA_DOWN, .n_slices = 1, .K = F, .N = D, .width = {D}};
}

/* Values of one adapter's factors in one layer. */
static size_t layer_values(const struct addon *addon)
{
    size_t n = 0;
    for (int s = 0; s < SITES; s++)
        for (int i = 0; i < addon->sites[s].n_slices; i++)
            n += (size_t)(addon->sites[s].K + addon->sites[s].width[i]);
    return n * (size_t)addon->R;
}

/* The table of factors of n_slots adapters, all layers' values in one piece of memory. */
static const struct lora_factors *make_factors(struct addon *addon, int n_slots)
{
    struct ops_bench *bench = addon->bench;
    const size_t per_layer = layer_values(addon);
    const size_t n = (size_t)n_slots * (size_t)addon->layers;
    struct lora_factors *table = calloc(n * LORA_LINEARS, sizeof *table);
    const char *memory = ops_random(bench, n * per_layer, DTYPE_BF16);

    for (size_t at = 0; at < n && table && memory; at++) {
        const char *next = memory + at * per_layer * 2;
        for (int s = 0; s < SITES; s++) {
            const struct lora_site *site = &addon->sites[s];
            for (int i = 0; i < site->n_slices; i++) {
                const char *b = next + (size_t)site->K * (size_t)addon->R * 2;
                table[at * LORA_LINEARS + (size_t)(site->linear + i)] =
                    (struct lora_factors){.a = next,
                                          .b = b,
                                          .R = addon->R,
                                          .dtype = DTYPE_BF16,
                                          .scale = 1.0f / (float)addon->R};
                next = b + (size_t)site->width[i] * (size_t)addon->R * 2;
            }
        }
    }
    const void *uploaded =
        table && memory ? ops_upload(bench, table, n * LORA_LINEARS * sizeof *table) : NULL;
    if (!table) bench->status = error_set(MLORA_ENOMEM, "out of memory for factors");
    free(table);
    return uploaded;
}

/* Token t uses slot t % A (decode), or the tokens come in A pieces (prefill). */
static void make_view(struct addon *addon, int A, bool prefill)
{
    struct ops_bench *bench = addon->bench;
    const int T = addon->T, n_segments = A < T ? A : T;
    int32_t *host = calloc(4 * (size_t)T + 2, sizeof *host);

    if (!host) {
        bench->status = error_set(MLORA_ENOMEM, "out of memory for a view");
        return;
    }
    int32_t *slot = host, *order = slot + T, *segment_slot = order + T;
    int32_t *start = segment_slot + T;
    int at = 0, longest = 0;
    for (int t = 0; t < T; t++)
        slot[t] = prefill ? (int32_t)((int64_t)t * n_segments / T) : t % n_segments;
    for (int s = 0; s < n_segments; s++) {
        segment_slot[s] = s;
        start[s] = at;
        for (int t = 0; t < T; t++)
            if (slot[t] == s) order[at++] = t;
        if (at - start[s] > longest) longest = at - start[s];
    }
    start[n_segments] = at;

    const size_t bytes = (size_t)T * sizeof *host;
    addon->view = (struct lora_view){
        .factors = addon->view.factors,
        .L = addon->layers,
        .n_segments = n_segments,
        .n_tokens = T,
        .max_rank = addon->R,
        .max_segment = longest,
        .mode = addon->mode >= 0 ? addon->mode : 0,
        .is_plain = addon->R % 8 == 0,
        .slot = ops_upload(bench, slot, bytes),
        .order = ops_upload(bench, order, bytes),
        .segment_slot = ops_upload(bench, segment_slot, bytes),
        .segment_start = ops_upload(bench, start, bytes + sizeof *host),
    };
    free(host);
}

/* One view for each token: what a loop over the rows calls the ops with. */
static void make_rows(struct addon *addon)
{
    struct ops_bench *bench = addon->bench;
    const int32_t one[] = {0, 1};
    const void *zero_one = ops_upload(bench, one, sizeof one);

    addon->rows = calloc((size_t)addon->T, sizeof *addon->rows);
    if (!addon->rows) bench->status = error_set(MLORA_ENOMEM, "out of memory for views");
    for (int t = 0; t < addon->T && bench->status == MLORA_OK; t++) {
        addon->rows[t] = addon->view;
        addon->rows[t].n_segments = addon->rows[t].n_tokens = addon->rows[t].max_segment = 1;
        addon->rows[t].slot += t;
        addon->rows[t].segment_slot = addon->view.slot + t;
        addon->rows[t].segment_start = zero_one;
        addon->rows[t].order = zero_one;
    }
}

static void add_site(struct addon *addon, const struct lora_view *view,
                     const struct lora_site *site, int layer, size_t row)
{
    struct ops_bench *bench = addon->bench;
    const enum dtype dtype = bench->dtype, y_dtype = product_dtype(bench->dev, addon->T, dtype);
    const char *x = (const char *)addon->x + row * (size_t)site->K * dtype_bytes(dtype);
    char *y = (char *)addon->y + row * (size_t)site->N * dtype_bytes(y_dtype);

    bench->dev->ops->lora_shrink(bench->dev, addon->h, x, view, site, layer, dtype);
    bench->dev->ops->lora_expand(bench->dev, y, addon->h, view, site, layer, y_dtype);
}

static void run_layers(void *context)
{
    struct addon *addon = context;

    for (int l = 0; l < addon->layers; l++)
        for (int s = 0; s < SITES; s++)
            for (int t = 0; t < (addon->rows ? addon->T : 1); t++)
                add_site(addon, addon->rows ? &addon->rows[t] : &addon->view, &addon->sites[s], l,
                         addon->rows ? (size_t)t : 0);
}

/* x and y of all sites pass through memory at prefill; a batch's few rows stay in the cache. */
static double activation_bytes(const struct addon *addon)
{
    const enum dtype dtype = addon->bench->dtype;
    const enum dtype y_dtype = product_dtype(addon->bench->dev, addon->T, dtype);
    double bytes = 0; /* of a token */
    for (int s = 0; s < SITES; s++)
        bytes += (double)dtype_bytes(dtype) * addon->sites[s].K +
                 2.0 * (double)dtype_bytes(y_dtype) * addon->sites[s].N;
    return bytes * addon->T;
}

static void one_case(struct ops_bench *bench, int T, int A, int R, int mode, bool prefill)
{
    struct addon addon = {.bench = bench, .T = T, .A = A < T ? A : T, .R = R, .mode = mode};
    const int slots = mode == MODE_CHEAT ? T : addon.A;
    int widest = 0;

    find_sites(&addon);
    for (int s = 0; s < SITES; s++) {
        if (addon.sites[s].K > widest) widest = addon.sites[s].K;
        if (addon.sites[s].N > widest) widest = addon.sites[s].N;
    }
    const double factor_bytes = 2.0 * (double)layer_values(&addon);
    addon.layers = ops_layers(bench, slots * factor_bytes);
    if (mode == MODE_ROWS && addon.layers * T > LAUNCHES_MAX / (2 * SITES))
        addon.layers = T > LAUNCHES_MAX / (4 * SITES) ? 1 : LAUNCHES_MAX / (2 * SITES * T);
    addon.view.factors = make_factors(&addon, slots);
    addon.x = ops_random(bench, (size_t)T * (size_t)widest, bench->dtype);
    addon.y =
        ops_random(bench, (size_t)T * (size_t)widest, product_dtype(bench->dev, T, bench->dtype));
    addon.h = ops_memory(bench, (size_t)T * LORA_SLICES_MAX * (size_t)R * sizeof(float));
    make_view(&addon, slots, prefill);
    if (mode == MODE_ROWS) make_rows(&addon);

    const double seconds = ops_time(bench, run_layers, &addon) / addon.layers;
    const double bytes = addon.A * factor_bytes + (prefill ? activation_bytes(&addon) : 0);
    const double limit = bytes / bench->bandwidth;
    if (bench->status == MLORA_OK)
        bench->status = report_add(
            bench->report, json_pack("{s:s, s:s, s:i, s:i, s:i, s:s, s:f, s:f, s:f, s:f}", "kernel",
                                     "lora", "phase", prefill ? "prefill" : "decode", "tokens", T,
                                     "adapters", addon.A, "rank", R, "case",
                                     mode == MODE_ROWS    ? "loop rows"
                                     : mode == MODE_CHEAT ? "cheat_bmm"
                                                          : mode_name(mode),
                                     "us", 1e6 * seconds, "limit us", 1e6 * limit, "% of limit",
                                     100 * limit / seconds, "MB", 1e-6 * bytes));
    ops_release(bench);
    free(addon.rows);
}

void addon_cases(struct ops_bench *bench, const struct addon_lists *lists, bool prefill)
{
    for (int r = 0; r < lists->n_ranks; r++)
        for (int t = 0; t < lists->n_tokens; t++)
            for (int a = 0; a < lists->n_adapters; a++) {
                const int T = lists->tokens[t], A = lists->adapters[a], R = lists->ranks[r];
                if (A > T && a > 0) continue; /* as if there were T: measured already or next */
                if (!prefill) one_case(bench, T, A, R, MODE_ROWS, prefill);
                if (!prefill) one_case(bench, T, A, R, MODE_CHEAT, prefill);
                for (int m = 0; m < lists->n_modes; m++)
                    one_case(bench, T, A, R, lists->modes[m], prefill);
            }
}
