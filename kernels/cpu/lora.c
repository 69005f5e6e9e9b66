/* LoRA: what an adapter adds to the output of a base product, in two small products. The tokens
 * of a segment share the factors, so a long prompt is a blocked product and a step of many
 * adapters reads each one's factors once. */
#include "kernels/cpu/device.h"

enum { LORA_SCRATCH = DOTS_SCRATCH + DOTS_T * DOTS_N };

struct lora_op {
    const struct simd *simd;
    const struct lora_view *lora;
    const struct lora_site *site;
    int layer;
    enum dtype dtype;
    float *scratch; /* [threads, LORA_SCRATCH] */
    int n_t, n_n;   /* blocks that the longest segment, the most rows of a factor are cut in */
    int step_n;     /* rows of a factor in a block */

    const float *const *x; /* shrink: [n_tokens] -> [K], in the order of lora->order */
    float *h;              /* [T, n_slices, max_rank]; shrink writes it, expand reads it */
    void *y;               /* expand: [T, N] dtype */
};

/* One unit of work: a slice of a segment, some of its tokens, some rows of the factor. */
struct lora_unit {
    const struct lora_factors *factors;
    const int32_t *tokens;  /* [T], lora->order from `first` on */
    int first, slice, T, n; /* rows of the factor start at n */
};

/* Unit `item` of the grid segments x slices x token blocks x row blocks; 0 if there is none. */
static int lora_unit(struct lora_unit *unit, const struct lora_op *op, int item)
{
    const struct lora_view *lora = op->lora;
    const int n = item % op->n_n * op->step_n;
    item /= op->n_n;
    const int t = item % op->n_t * DOTS_T;
    item /= op->n_t;
    const int slice = item % op->site->n_slices;
    const int segment = item / op->site->n_slices;

    const int n_tokens = lora->segment_start[segment + 1] - lora->segment_start[segment];
    const size_t slot = (size_t)lora->segment_slot[segment];
    const size_t linear = (size_t)op->layer * LORA_LINEARS + (size_t)(op->site->linear + slice);
    unit->factors = &lora->factors[slot * (size_t)lora->L * LORA_LINEARS + linear];
    unit->first = lora->segment_start[segment] + t;
    unit->tokens = lora->order + unit->first;
    unit->slice = slice;
    unit->T = min_int(DOTS_T, n_tokens - t);
    unit->n = n;
    return unit->T > 0 && unit->factors->a != NULL;
}

/* h[t, slice, :] */
static float *h_row(const struct lora_op *op, int32_t token, int slice)
{
    const size_t row = (size_t)token * (size_t)op->site->n_slices + (size_t)slice;
    return op->h + row * (size_t)op->lora->max_rank;
}

static void shrink_units(void *context, int begin, int end, int thread)
{
    const struct lora_op *op = context;
    float *scratch = op->scratch + (size_t)thread * LORA_SCRATCH;
    float *sum = scratch + DOTS_SCRATCH; /* [DOTS_T, DOTS_N] */
    struct lora_unit unit;

    for (int item = begin; item < end; item++) {
        if (!lora_unit(&unit, op, item) || unit.n >= unit.factors->R) continue;
        const enum dtype dtype = (enum dtype)unit.factors->dtype;
        const int K = op->site->K;
        const int N = min_int(op->step_n, unit.factors->R - unit.n);

        const struct dots dots = {
            .out = sum,
            .pitch = DOTS_N,
            .x = op->x + unit.first,
            .w = element(unit.factors->a, dtype, (size_t)unit.n * (size_t)K),
            .dtype = dtype,
            .T = unit.T,
            .N = N,
            .K = K,
            .scratch = scratch,
        };
        op->simd->dots(&dots);
        for (int t = 0; t < unit.T; t++)
            memcpy(h_row(op, unit.tokens[t], unit.slice) + unit.n, sum + t * DOTS_N,
                   (size_t)N * sizeof *sum);
    }
}

static void expand_units(void *context, int begin, int end, int thread)
{
    const struct lora_op *op = context;
    float *scratch = op->scratch + (size_t)thread * LORA_SCRATCH;
    float *sum = scratch + DOTS_SCRATCH; /* [DOTS_T, DOTS_N] */
    const float *h[DOTS_T];
    struct lora_unit unit;

    for (int item = begin; item < end; item++) {
        if (!lora_unit(&unit, op, item)) continue;
        const struct lora_factors *factors = unit.factors;
        const enum dtype dtype = (enum dtype)factors->dtype;
        const int n_end = min_int(unit.n + op->step_n, op->site->width[unit.slice]);

        for (int t = 0; t < unit.T; t++) h[t] = h_row(op, unit.tokens[t], unit.slice);
        for (int n = unit.n; n < n_end; n += DOTS_N) {
            const struct dots dots = {
                .out = sum,
                .pitch = DOTS_N,
                .x = h,
                .w = element(factors->b, dtype, (size_t)n * (size_t)factors->R),
                .dtype = dtype,
                .T = unit.T,
                .N = min_int(DOTS_N, n_end - n),
                .K = factors->R,
                .scratch = scratch,
            };
            op->simd->dots(&dots);
            for (int t = 0; t < unit.T; t++) {
                const size_t first = (size_t)unit.tokens[t] * (size_t)op->site->N +
                                     (size_t)(op->site->offset[unit.slice] + n);
                for (int i = 0; i < dots.N; i++) {
                    const float y = load_f32(op->y, op->dtype, first + (size_t)i);
                    store_f32(op->y, op->dtype, first + (size_t)i,
                              y + factors->scale * sum[t * DOTS_N + i]);
                }
            }
        }
    }
}

/* Run `fn` on the grid of units. */
static void lora_run(struct device *dev, struct lora_op *op, int max_n, threads_fn fn,
                     const char *name)
{
    struct cpu_device *cpu = cpu_device(dev);
    const size_t n_floats = (size_t)threads_count(cpu->threads) * LORA_SCRATCH;
    op->simd = cpu->simd;
    op->scratch = cpu_scratch(dev, SCRATCH_OP, n_floats * sizeof *op->scratch, name);
    if (!op->scratch) return;

    op->n_t = ceil_div(op->lora->max_segment, DOTS_T);
    op->n_n = ceil_div(max_n, op->step_n);
    cpu_parallel(dev, op->lora->n_segments * op->site->n_slices * op->n_t * op->n_n, 1, fn, op);
}

void cpu_lora_shrink(struct device *dev, float *h, const void *x, const struct lora_view *lora,
                     const struct lora_site *site, int layer, enum dtype dtype)
{
    if (lora->n_segments == 0) return;
    struct lora_op op = {.lora = lora, .site = site, .layer = layer, .dtype = dtype, .h = h};
    op.x = cpu_rows_f32(dev, x, lora->order, lora->n_tokens, site->K, dtype, "lora_shrink");
    if (!op.x) return;
    /* Few tokens: small blocks, so that there are some for each thread. */
    op.step_n = lora->max_segment < 4 ? 8 : DOTS_N;
    lora_run(dev, &op, lora->max_rank, shrink_units, "lora_shrink");
}

void cpu_lora_expand(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                     const struct lora_site *site, int layer, enum dtype dtype)
{
    if (lora->n_segments == 0) return;
    struct lora_op op = {.lora = lora, .site = site, .layer = layer, .dtype = dtype, .y = y};
    int max_width = 0;

    op.h = (float *)h; /* only read by expand_units */
    op.step_n = 8 * DOTS_N;
    for (int i = 0; i < site->n_slices; i++)
        if (site->width[i] > max_width) max_width = site->width[i];
    lora_run(dev, &op, max_width, expand_units, "lora_expand");
}
