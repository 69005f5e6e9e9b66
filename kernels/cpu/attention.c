/* Causal attention over the blocks of the KV cache, in three passes over the positions that a
 * token sees: scores, their softmax, and the mix of the values. All heads that share a key head,
 * and up to ATTENTION_T neighbouring tokens of a row, are done together while a block of keys or
 * values is in the cache.
 *
 * The order of each sum is that of the positions and depends on their range only, so a token's
 * result is the same in a prompt's chunk and alone. */
#include "kernels/cpu/device.h"

#include <assert.h>

enum { ATTENTION_T = 8 };

struct attention {
    const struct simd *simd;
    void *y;         /* [T, H, d] dtype */
    const void *qkv; /* [T, H + 2 G, d] qkv_dtype */
    const struct kv_view *kv;
    const struct batch_view *batch;
    const struct heads *heads;
    enum dtype qkv_dtype, dtype;
    float *scratch; /* [threads, scratch_floats] */
    size_t scratch_floats;
    int n_x;   /* queries at a time: DOTS_T at most */
    int step;  /* tokens at a time, 1 to ATTENTION_T */
    int pitch; /* of scores: positions, max_kv rounded up to a block */
};

/* What one thread works on: queries of tokens [t0, t1) of a row, heads [h0, h1) of key head g.
 * Query x is token t0 + x / (h1 - h0), head h0 + x % (h1 - h0). */
struct unit {
    int t0, t1, g, h0, h1;
    float *q;      /* [n_x, d] */
    float *y;      /* [n_x, d] */
    float *scores; /* [n_x, pitch], column p - base is position p */
    float *dots;   /* [DOTS_SCRATCH] */
    int base;      /* first position that any of the tokens sees, down to a block's start */
};

static int first_position(const struct attention *op, int t)
{
    const int position = op->batch->position[t];
    const int window = op->heads->window;
    return window > 0 && position >= window ? position - window + 1 : 0;
}

/* The keys or values of block p / KV_BLOCK of the unit's row: K[block][g][:, :] */
static const void *kv_block(const struct attention *op, const struct unit *unit, const void *cache,
                            int p)
{
    const struct kv_view *kv = op->kv;
    const int q = op->batch->row[unit->t0];
    const int32_t *table = kv->block_table + (size_t)q * (size_t)kv->max_blocks;
    const size_t head = (size_t)table[p / KV_BLOCK] * (size_t)op->heads->G + (size_t)unit->g;
    return element(cache, kv->dtype, head * KV_BLOCK * (size_t)op->heads->d);
}

/* scores[x, p] = q[x, :] . K[p, :] for all positions up to the last token's, whether the token
 * sees them or not. */
static void score(const struct attention *op, const struct unit *unit, int n_x, int end)
{
    const float *q[DOTS_T];
    for (int x = 0; x < n_x; x++) q[x] = unit->q + (size_t)x * (size_t)op->heads->d;

    for (int p = unit->base; p < end; p += KV_BLOCK) {
        const struct dots dots = {
            .out = unit->scores + (p - unit->base),
            .pitch = op->pitch,
            .x = q,
            .w = kv_block(op, unit, op->kv->k, p),
            .dtype = op->kv->dtype,
            .T = n_x,
            .N = min_int(KV_BLOCK, end - p),
            .K = op->heads->d,
            .scratch = unit->dots,
        };
        op->simd->dots(&dots);
    }
}

/* The softmax of n scores, not yet divided by its sum, which is returned. */
static float softmax(const struct attention *op, float *scores, int n)
{
    float max = scores[0] * op->heads->scale;
    for (int i = 0; i < n; i++) {
        scores[i] *= op->heads->scale;
        if (scores[i] > max) max = scores[i];
    }
    return op->simd->exp_sum(scores, scores, max, (size_t)n);
}

/* y[x, :] += scores[x, p] V[p, :] for n_x queries from x on, positions [begin, end). */
static void mix_values(const struct attention *op, const struct unit *unit, int x, int n_x,
                       int begin, int end)
{
    const size_t d = (size_t)op->heads->d;

    for (int p = begin; p < end;) {
        const int next = min_int(end, (p / KV_BLOCK + 1) * KV_BLOCK);
        const struct mix mix = {
            .y = unit->y + (size_t)x * d,
            .weight = unit->scores + (size_t)x * (size_t)op->pitch + (size_t)(p - unit->base),
            .pitch = op->pitch,
            .rows = element(kv_block(op, unit, op->kv->v, p), op->kv->dtype,
                            (size_t)(p % KV_BLOCK) * d),
            .dtype = op->kv->dtype,
            .T = n_x,
            .P = next - p,
            .d = op->heads->d,
        };
        op->simd->mix(&mix);
        p = next;
    }
}

static void attend(const struct attention *op, struct unit *unit)
{
    const int H = op->heads->H, G = op->heads->G;
    const size_t d = (size_t)op->heads->d;
    const int n_h = unit->h1 - unit->h0;
    const int n_x = (unit->t1 - unit->t0) * n_h;
    const int last = unit->t1 - 1;
    float sum[DOTS_T];

    unit->base = first_position(op, unit->t0) / KV_BLOCK * KV_BLOCK;
    for (int x = 0; x < n_x; x++) {
        const size_t head =
            (size_t)(unit->t0 + x / n_h) * (size_t)(H + 2 * G) + (size_t)(unit->h0 + x % n_h);
        float *q = unit->q + (size_t)x * d;
        op->simd->widen(q, element(op->qkv, op->qkv_dtype, head * d), op->qkv_dtype, d);
        if (op->dtype == op->qkv_dtype) continue;
        op->simd->narrow(unit->y, op->dtype, q, d); /* there is nothing in y yet */
        op->simd->widen(q, unit->y, op->dtype, d);
    }
    score(op, unit, n_x, op->batch->position[last] + 1);

    for (int x = 0; x < n_x; x++) {
        const int t = unit->t0 + x / n_h;
        const int begin = first_position(op, t);
        float *scores = unit->scores + (size_t)x * (size_t)op->pitch + (size_t)(begin - unit->base);
        sum[x] = softmax(op, scores, op->batch->position[t] + 1 - begin);
    }

    /* Positions that all tokens of the unit see are mixed for all of them at once, those before
     * and after for each alone. */
    const int common_begin = first_position(op, last);
    const int common_end = op->batch->position[unit->t0] + 1;
    const int middle = common_begin < common_end;
    memset(unit->y, 0, (size_t)n_x * d * sizeof *unit->y);
    for (int t = unit->t0; t < unit->t1; t++)
        mix_values(op, unit, (t - unit->t0) * n_h, n_h, first_position(op, t),
                   middle ? common_begin : op->batch->position[t] + 1);
    if (middle) {
        mix_values(op, unit, 0, n_x, common_begin, common_end);
        for (int t = unit->t0; t < unit->t1; t++)
            mix_values(op, unit, (t - unit->t0) * n_h, n_h, common_end, op->batch->position[t] + 1);
    }
    for (int x = 0; x < n_x; x++) {
        const size_t head = (size_t)(unit->t0 + x / n_h) * (size_t)H + (size_t)(unit->h0 + x % n_h);
        float *y = unit->y + (size_t)x * d;
        for (size_t i = 0; i < d; i++) y[i] /= sum[x];
        op->simd->narrow(element(op->y, op->dtype, head * d), op->dtype, y, d);
    }
}

/* Item: key head `item % G` for `step` tokens from item / G * step on. */
static void attend_items(void *context, int begin, int end, int thread)
{
    const struct attention *op = context;
    const int T = op->batch->T, G = op->heads->G;
    const int heads_per_key = op->heads->H / G;
    const size_t q_floats = (size_t)op->n_x * (size_t)op->heads->d;
    struct unit unit;

    unit.q = op->scratch + (size_t)thread * op->scratch_floats;
    unit.y = unit.q + q_floats;
    unit.dots = unit.y + q_floats;
    unit.scores = unit.dots + DOTS_SCRATCH;
    for (int item = begin; item < end; item++) {
        const int end_t = min_int(T, (item / G + 1) * op->step);
        unit.g = item % G;
        for (int t = item / G * op->step; t < end_t; t = unit.t1) {
            unit.t0 = t;
            unit.t1 = t + 1;
            while (unit.t1 < end_t && op->batch->row[unit.t1] == op->batch->row[t]) unit.t1++;
            for (int h = 0; h < heads_per_key; h += op->n_x) {
                unit.h0 = unit.g * heads_per_key + h;
                unit.h1 = unit.h0 + min_int(op->n_x, heads_per_key - h);
                attend(op, &unit);
            }
        }
    }
}

void cpu_attention(struct device *dev, void *y, const void *qkv, enum dtype qkv_dtype,
                   const struct kv_view *kv, const struct batch_view *batch,
                   const struct heads *heads, enum dtype dtype)
{
    assert(heads->G > 0 && heads->H % heads->G == 0 && heads->d > 0);
    struct cpu_device *cpu = cpu_device(dev);
    struct attention op = {
        .simd = cpu->simd,
        .y = y,
        .qkv = qkv,
        .kv = kv,
        .batch = batch,
        .heads = heads,
        .qkv_dtype = qkv_dtype,
        .dtype = dtype,
        .pitch = ceil_div(batch->max_kv, KV_BLOCK) * KV_BLOCK,
    };
    const int heads_per_key = heads->H / heads->G;
    op.step = min_int(min_int(ATTENTION_T, batch->max_row), DOTS_T / heads_per_key);
    if (op.step < 1) op.step = 1;
    op.n_x = min_int(DOTS_T, op.step * heads_per_key);
    op.scratch_floats = (size_t)op.n_x * ((size_t)op.pitch + 2 * (size_t)heads->d) + DOTS_SCRATCH;
    op.scratch = cpu_scratch(
        dev, SCRATCH_OP,
        (size_t)threads_count(cpu->threads) * op.scratch_floats * sizeof *op.scratch, "attention");
    if (!op.scratch) return;

    cpu_parallel(dev, ceil_div(batch->T, op.step) * heads->G, 1, attend_items, &op);
}
