/* LoRA: what an adapter adds to the output of a base product, in two small products. The tokens
 * of a segment share the factors, so a long prompt is a blocked product and a step of many
 * adapters reads each one's factors once. An adapter's own head is a product of the same kind. */
#include "kernels/cpu/device.h"

enum { LORA_SCRATCH = DOTS_SCRATCH + DOTS_T * DOTS_N };

/* What a segment's rows of x are multiplied with. */
enum lora_matrix { LORA_A, LORA_OWN_HEAD, LORA_OWN_HEAD_ROWS };

struct lora_op {
    const struct simd *simd;
    const struct lora_view *lora;
    const struct lora_site *site;
    int layer;
    enum dtype dtype;
    float *scratch; /* [threads, LORA_SCRATCH] */
    int n_t, n_n;   /* blocks that the longest segment, the most rows of a factor are cut in */
    int step_n;     /* rows of a factor in a block */

    enum lora_matrix matrix; /* shrink and head */
    const float *const *x;   /* shrink and head: [n_tokens] -> [K], in the order of lora->order */
    float *h;                /* [T, n_slices, pitch]; shrink and head write it, expand reads it */
    int pitch;               /* of h: max_rank; V for the head */
    void *y;                 /* expand: [T, N] dtype */
};

/* One unit of work: a slice of a segment, some of its tokens, some rows of the factor. */
struct lora_unit {
    const struct lora_factors *factors;
    size_t slot;
    const int32_t *tokens;  /* [T], lora->order from `first` on */
    int first, slice, T, n; /* rows of the factor start at n */
};

/* Unit `item` of the grid segments x slices x token blocks x row blocks; 0 if it has no tokens. */
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
    if (lora->segment_slot[segment] < 0) return 0;
    const size_t slot = (size_t)lora->segment_slot[segment];
    const size_t linear = (size_t)op->layer * LORA_LINEARS + (size_t)(op->site->linear + slice);
    unit->factors = &lora->factors[slot * (size_t)lora->L * LORA_LINEARS + linear];
    unit->slot = slot;
    unit->first = lora->segment_start[segment] + t;
    unit->tokens = lora->order + unit->first;
    unit->slice = slice;
    unit->T = min_int(DOTS_T, n_tokens - t);
    unit->n = n;
    return unit->T > 0;
}

/* h[t, slice, :] */
static float *h_row(const struct lora_op *op, int32_t token, int slice)
{
    const size_t row = op->lora->h_by_slice
                           ? (size_t)slice * (size_t)op->lora->n_rows + (size_t)token
                           : (size_t)token * (size_t)op->site->n_slices + (size_t)slice;
    return op->h + row * (size_t)op->pitch;
}

/* The matrix [n, K] of a unit, n being 0 if the adapter has none, and the columns of h that its
 * rows are for (NULL: 0 to n - 1). */
static struct lora_rows matrix_of(const struct lora_op *op, const struct lora_unit *unit)
{
    const struct lora_factors *factors = unit->factors;
    struct matrix head;

    switch (op->matrix) {
    case LORA_OWN_HEAD:
        head = op->lora->own[unit->slot].head;
        return (struct lora_rows){
            .data = head.data, .n = head.data ? head.N : 0, .dtype = (int32_t)head.dtype};
    case LORA_OWN_HEAD_ROWS:
        return op->lora->own[unit->slot].head_rows;
    default:
        return (struct lora_rows){
            .data = factors->a, .n = factors->a ? factors->R : 0, .dtype = factors->dtype};
    }
}

static void shrink_units(void *context, int begin, int end, int thread)
{
    const struct lora_op *op = context;
    float *scratch = op->scratch + (size_t)thread * LORA_SCRATCH;
    float *sum = scratch + DOTS_SCRATCH; /* [DOTS_T, DOTS_N] */
    struct lora_unit unit;

    for (int item = begin; item < end; item++) {
        if (!lora_unit(&unit, op, item)) continue;
        const struct lora_rows w = matrix_of(op, &unit);
        const int n_end = min_int(unit.n + op->step_n, w.n);

        for (int n = unit.n; n < n_end; n += DOTS_N) {
            const struct dots dots = {
                .out = sum,
                .pitch = DOTS_N,
                .x = op->x + unit.first,
                .w = element(w.data, (enum dtype)w.dtype, (size_t)n * (size_t)op->site->K),
                .dtype = (enum dtype)w.dtype,
                .T = unit.T,
                .N = min_int(DOTS_N, n_end - n),
                .K = op->site->K,
                .scratch = scratch,
            };
            op->simd->dots(&dots);
            for (int t = 0; t < unit.T; t++) {
                float *h = h_row(op, unit.tokens[t], unit.slice);
                for (int i = 0; i < dots.N; i++)
                    h[w.ids ? w.ids[n + i] : n + i] = sum[t * DOTS_N + i];
            }
        }
    }
}

/* What becomes of output n of a linear: y as the base product left it, sum = dot(B[n, :], h). */
static float expanded(const struct lora_factors *factors, const float *bias, float y, float sum,
                      int n)
{
    float delta =
        factors->b_bias ? factors->scale * (sum + factors->b_bias[n]) : factors->scale * sum;

    if (factors->g) {
        const float g = factors->g[n];
        delta = (g - 1.0f) * (bias ? y - bias[n] : y) + g * delta;
    }
    if (factors->bias_delta) delta += factors->bias_delta[n];
    return y + delta;
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
        const int offset = op->site->offset[unit.slice];
        const float *bias = op->site->bias ? op->site->bias + offset : NULL;
        const int n_end = min_int(unit.n + op->step_n, op->site->width[unit.slice]);
        const bool plain = !factors->g && !factors->b_bias && !factors->bias_delta;
        const float scale = factors->scale;
        if (!factors->a && !factors->bias_delta) continue;

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
            if (factors->a)
                op->simd->dots(&dots);
            else
                memset(sum, 0, (size_t)unit.T * DOTS_N * sizeof *sum);
            for (int t = 0; t < unit.T; t++) {
                const size_t first =
                    (size_t)unit.tokens[t] * (size_t)op->site->N + (size_t)(offset + n);
                for (int i = 0; i < dots.N; i++) {
                    const float y = dtype_load(op->y, op->dtype, first + (size_t)i);
                    const float product = sum[t * DOTS_N + i];
                    dtype_store(op->y, op->dtype, first + (size_t)i,
                                plain ? y + scale * product
                                      : expanded(factors, bias, y, product, n + i));
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
    struct lora_op op = {.lora = lora,
                         .site = site,
                         .layer = layer,
                         .dtype = dtype,
                         .matrix = LORA_A,
                         .h = h,
                         .pitch = lora->max_rank};
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
    op.pitch = lora->max_rank;
    op.step_n = 8 * DOTS_N;
    for (int i = 0; i < site->n_slices; i++)
        if (site->width[i] > max_width) max_width = site->width[i];
    lora_run(dev, &op, max_width, expand_units, "lora_expand");
}

void cpu_lora_head(struct device *dev, float *logits, const void *x, const struct lora_view *lora,
                   int V, int D, enum dtype dtype)
{
    if (lora->n_segments == 0) return;
    const struct lora_site site = {
        .linear = LORA_HEAD, .n_slices = 1, .K = D, .N = V, .width = {V}};
    struct lora_op op = {
        .lora = lora, .site = &site, .layer = lora->L - 1, .dtype = dtype, .h = logits, .pitch = V};
    op.x = cpu_rows_f32(dev, x, lora->order, lora->n_tokens, D, dtype, "lora_head");
    if (!op.x) return;
    op.step_n = 8 * DOTS_N;
    for (int own = LORA_OWN_HEAD; own <= LORA_OWN_HEAD_ROWS; own++) {
        op.matrix = (enum lora_matrix)own;
        lora_run(dev, &op, V, shrink_units, "lora_head");
    }
}

void cpu_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up, enum dtype gate_up_dtype,
                              const float *h, const struct lora_view *lora,
                              const struct lora_site *site, int layer, int T, enum dtype dtype)
{
    cpu_lora_expand(dev, gate_up, h, lora, site, layer, gate_up_dtype);
    cpu_silu_mul(dev, y, gate_up, gate_up_dtype, T, site->width[0], dtype);
}
