/* The next token of each row. Nothing is sorted: top_k and top_p each come down to one number,
 * the smallest logit that stays, which is found digit by digit of the float's bits; and the draw
 * is the largest of logit + Gumbel noise, so it needs no running sum over the vocabulary. */
#include "kernels/cpu/device.h"

#include <assert.h>
#include <math.h>

#include "kernels/cpu/philox.h"

enum { DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS }; /* of a float's bits, see smallest_kept() */

struct sample {
    const struct simd *simd;
    int32_t *ids;        /* [Q] */
    const float *logits; /* [Q, V] */
    const struct sample_view *view;
    int V;
    /* For each thread: */
    float *scaled;    /* [threads, V] logits after penalties and temperature */
    float *weight;    /* [threads, V] their exponentials */
    double *mass;     /* [threads, DIGITS] */
    uint32_t *counts; /* [threads, V] zeros but while penalties are applied */
};

/* ---- penalties ---------------------------------------------------------------------------- */

/* Each token of the row's history once: repetition_penalty for all of it, the other two for what
 * was generated. `counts` is zeros before and after. */
static void penalize(float *logits, uint32_t *counts, const struct sampling *sampling,
                     const int32_t *history, int n_history, int n_prompt)
{
    for (int i = 0; i < n_history; i++) {
        const int32_t id = history[i];
        if (counts[id]) continue;
        counts[id] = 1;
        const float penalty = sampling->repetition_penalty;
        logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
    }
    for (int i = 0; i < n_history; i++) counts[history[i]] = 0;

    for (int i = n_prompt; i < n_history; i++) counts[history[i]]++;
    for (int i = n_prompt; i < n_history; i++) {
        const int32_t id = history[i];
        if (!counts[id]) continue;
        logits[id] -= sampling->presence_penalty + sampling->frequency_penalty * (float)counts[id];
        counts[id] = 0;
    }
}

/* ---- truncation --------------------------------------------------------------------------- */

/* Orders as the float does, as an unsigned number. */
static uint32_t sort_key(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The sort key of the smallest logit of the shortest list of largest ones whose weights together
 * reach `share` of all (`share_of_all`), or reach `share` itself. `weight` NULL: each weighs 1.
 * Only logits of a key of at least `floor` are looked at. The key's 32 bits are found in digits
 * of 11, 11 and 10, from the top: for each, the weights are added up by digit. */
static uint32_t smallest_kept(const float *logits, const float *weight, double share,
                              int share_of_all, uint32_t floor, double *mass, int V)
{
    uint32_t prefix = 0, mask = 0;
    double above = 0; /* weight of the keys over those that begin with `prefix` */

    for (int shift = 32 - DIGIT_BITS; mask != UINT32_MAX;
         shift = shift > DIGIT_BITS ? shift - DIGIT_BITS : 0) {
        const uint32_t digits = shift > 0 || mask == 0 ? DIGITS - 1 : DIGITS / 2 - 1;
        int digit = (int)digits;

        memset(mass, 0, DIGITS * sizeof *mass);
        for (int v = 0; v < V; v++) {
            const uint32_t key = sort_key(logits[v]);
            if (key < floor || (key & mask) != prefix) continue;
            mass[key >> shift & digits] += weight ? weight[v] : 1.0;
        }
        if (share_of_all) {
            double all = 0;
            for (int i = DIGITS - 1; i >= 0; i--) all += mass[i];
            share *= all;
            share_of_all = 0;
        }
        /* If rounding leaves the last list just short of the share, its smallest is taken. */
        int smallest = digit;
        for (; digit >= 0; digit--) {
            if (mass[digit] <= 0) continue;
            smallest = digit;
            if (above + mass[digit] >= share) break;
            above += mass[digit];
        }
        if (digit < 0) {
            digit = smallest;
            above -= mass[digit];
        }
        prefix |= (uint32_t)digit << shift;
        mask |= digits << shift;
    }
    return prefix;
}

/* ---- the draw ----------------------------------------------------------------------------- */

/* -log(-log(u)), u = 1 - (word + 1/2) / 2^32: fine steps where u is near 1, the noise large. */
static float gumbel(uint32_t word)
{
    return (float)-log(-log1p(-((double)word + 0.5) * 0x1p-32));
}

/* Noise is never above gumbel(0) = 22.87 */
static const float GUMBEL_MAX = 22.9f;

/* The largest logit + noise among logits of a key of at least `floor`, lowest id of equals. */
static int32_t draw_token(const float *logits, uint32_t floor, const struct sampling *sampling,
                          int V)
{
    int32_t best = -1;
    float best_value = -INFINITY;

    for (int v = 0; v < V; v += 4) {
        uint32_t words[4];
        int have_words = 0;
        for (int i = 0; i < 4 && v + i < V; i++) {
            const float logit = logits[v + i];
            if (logit + GUMBEL_MAX <= best_value || sort_key(logit) < floor) continue;
            if (!have_words) {
                const uint32_t counter[4] = {(uint32_t)v / 4, sampling->draw, 0, 0};
                philox4x32(words, counter, sampling->seed);
                have_words = 1;
            }
            const float value = logit + gumbel(words[i]);
            if (value > best_value) {
                best_value = value;
                best = v + i;
            }
        }
    }
    return best;
}

/* The largest, the lowest id of equals; -1 where a logit is NaN or +infinity, or there is none
 * above -infinity. */
static int32_t largest(const float *logits, int V)
{
    int32_t best = 0;
    int damaged = 0;

    for (int v = 0; v < V; v++) {
        if (logits[v] > logits[best]) best = v;
        damaged |= !(logits[v] < INFINITY); /* NaN too */
    }
    return damaged || logits[best] == -INFINITY ? -1 : best;
}

static int32_t sample_row(const struct sample *op, int q, int thread)
{
    const struct sampling *sampling = &op->view->sampling[q];
    const int32_t *history = op->view->history + op->view->history_start[q];
    const int n_history = op->view->history_start[q + 1] - op->view->history_start[q];
    const int V = op->V;
    const float *given = op->logits + (size_t)q * (size_t)V;
    float *logits = op->scaled + (size_t)thread * (size_t)V;
    float *weight = op->weight + (size_t)thread * (size_t)V;
    double *mass = op->mass + (size_t)thread * DIGITS;

    if (n_history == 0 && sampling->temperature <= 0) return largest(given, V);
    memcpy(logits, given, (size_t)V * sizeof *logits);
    penalize(logits, op->counts + (size_t)thread * (size_t)V, sampling, history, n_history,
             op->view->n_prompt[q]);
    const int32_t best = largest(logits, V);
    if (best < 0 || sampling->temperature <= 0) return best;

    /* Less the largest, which changes no probability and keeps the quotient from overflowing. */
    const float max = logits[best];
    for (int v = 0; v < V; v++) logits[v] = (logits[v] - max) / sampling->temperature;

    uint32_t floor = sort_key(-INFINITY) + 1;
    if (sampling->top_k > 0 && sampling->top_k < V)
        floor = smallest_kept(logits, NULL, sampling->top_k, 0, floor, mass, V);
    if (sampling->top_p < 1 || sampling->min_p > 0)
        op->simd->exp_sum(weight, logits, 0.0f, (size_t)V);
    if (sampling->top_p < 1)
        floor = smallest_kept(logits, weight, sampling->top_p, 1, floor, mass, V);
    if (sampling->min_p > 0)
        for (int v = 0; v < V; v++)
            if (weight[v] < sampling->min_p) logits[v] = -INFINITY;
    return draw_token(logits, floor, sampling, V);
}

static void sample_rows(void *context, int begin, int end, int thread)
{
    const struct sample *op = context;
    for (int q = begin; q < end; q++) op->ids[q] = sample_row(op, q, thread);
}

void cpu_sample(struct device *dev, int32_t *ids, const float *logits,
                const struct sample_view *view, int V)
{
    assert(V > 0);
    struct cpu_device *cpu = cpu_device(dev);
    const size_t n_threads = (size_t)threads_count(cpu->threads);
    const size_t row = n_threads * (size_t)V * sizeof(float);
    double *mass =
        cpu_scratch(dev, SCRATCH_OP, n_threads * DIGITS * sizeof *mass + 2 * row, "sample");
    uint32_t *counts = cpu_scratch(dev, SCRATCH_COUNTS, row, "sample");
    if (!mass || !counts) return;

    struct sample op = {
        .simd = cpu->simd,
        .ids = ids,
        .logits = logits,
        .view = view,
        .V = V,
        .scaled = (float *)(mass + n_threads * DIGITS),
        .mass = mass,
        .counts = counts,
    };
    op.weight = op.scaled + n_threads * (size_t)V;
    cpu_parallel(dev, view->Q, 1, sample_rows, &op);
}
