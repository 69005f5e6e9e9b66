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
    double *mass;     /* [threads, DIGITS] */
    uint32_t *counts; /* [threads, V] zeros but while penalties are applied */
    float *logit;     /* [threads, V] of struct candidates */
    float *weight;    /* [threads, V] */
    int32_t *id;      /* [threads, V] */
};

/* Tokens that may still be drawn, in the order of their ids. */
struct candidates {
    int n;
    int32_t *id;   /* [n] */
    float *logit;  /* [n] less the largest, divided by the temperature */
    float *weight; /* [n] exp(logit) */
};

/* ---- greedy ------------------------------------------------------------------------------- */

/* The largest, the lowest id of equals; -1 where a logit is NaN or +infinity, or there is none
 * above -infinity. */
static int32_t largest(const float *logits, int V)
{
    float max[LANES];
    int damaged = 0;
    int32_t v = 0;

    for (int i = 0; i < LANES; i++) max[i] = -INFINITY;
    for (; v + LANES <= V; v += LANES)
        for (int i = 0; i < LANES; i++) {
            max[i] = logits[v + i] > max[i] ? logits[v + i] : max[i];
            damaged |= !(logits[v + i] < INFINITY); /* NaN too */
        }
    for (; v < V; v++) {
        max[0] = logits[v] > max[0] ? logits[v] : max[0];
        damaged |= !(logits[v] < INFINITY);
    }
    for (int i = 1; i < LANES; i++) max[0] = max[i] > max[0] ? max[i] : max[0];
    if (damaged || max[0] == -INFINITY) return -1;
    for (v = 0; logits[v] != max[0]; v++) continue;
    return v;
}

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

static float float_of_key(uint32_t key)
{
    const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The smallest logit of the shortest list of largest ones whose weights together reach `share`
 * (NULL: each weighs 1). The 32 bits of its key are found in three digits, from the top: for
 * each, the weights of the keys that begin with what is known are added up by their digit.
 * `mass` [DIGITS] is scratch. */
static float smallest_kept(const float *logit, const float *weight, int n, double share,
                           double *mass)
{
    static const struct {
        int shift;
        uint32_t mask;
    } digits[] = {{21, 0x7ff}, {10, 0x7ff}, {0, 0x3ff}};
    uint32_t known = 0, known_mask = 0;
    double above = 0; /* weight of the keys over those that begin with `known` */

    for (int place = 0; place < 3; place++) {
        const int shift = digits[place].shift;
        const uint32_t mask = digits[place].mask;

        memset(mass, 0, DIGITS * sizeof *mass);
        for (int i = 0; i < n; i++) {
            const uint32_t key = sort_key(logit[i]);
            if ((key & known_mask) == known) mass[key >> shift & mask] += weight ? weight[i] : 1.0;
        }
        uint32_t digit = mask;
        while (digit > 0 && above + mass[digit] < share) above += mass[digit--];
        while (digit < mask && mass[digit] <= 0) { /* rounding left all of them short of `share` */
            digit++;
            above -= mass[digit];
        }
        known |= digit << shift;
        known_mask |= mask << shift;
    }
    return float_of_key(known);
}

/* Keep those whose value (their logit or weight) is at least `limit`. */
static void keep(struct candidates *candidates, const float *values, float limit)
{
    int n = 0;
    for (int i = 0; i < candidates->n; i++) {
        const int stays = values[i] >= limit;
        candidates->id[n] = candidates->id[i];
        candidates->logit[n] = candidates->logit[i];
        candidates->weight[n] = candidates->weight[i];
        n += stays;
    }
    candidates->n = n;
}

static void keep_likely(struct candidates *candidates, const struct sampling *sampling,
                        const struct simd *simd, double *mass)
{
    if (sampling->top_k > 0 && sampling->top_k < candidates->n) {
        const float limit =
            smallest_kept(candidates->logit, NULL, candidates->n, (double)sampling->top_k, mass);
        keep(candidates, candidates->logit, limit);
    }
    const float sum =
        simd->exp_sum(candidates->weight, candidates->logit, 0.0f, (size_t)candidates->n);
    if (sampling->top_p < 1) {
        /* Those that are under half of an even share of 1 - top_p are not among the most likely
         * that make up top_p: most of a vocabulary leaves by this cheap test. */
        keep(candidates, candidates->weight,
             0.5f * (1 - sampling->top_p) * sum / (float)candidates->n);
        const float limit = smallest_kept(candidates->logit, candidates->weight, candidates->n,
                                          (double)sampling->top_p * (double)sum, mass);
        keep(candidates, candidates->logit, limit);
    }
    if (sampling->min_p > 0) keep(candidates, candidates->weight, sampling->min_p);
}

/* ---- the draw ----------------------------------------------------------------------------- */

/* -log(-log(u)) with u = 1 - (word + 1/2) / 2^32: the steps are fine where the noise is large. */
static float gumbel(uint32_t word)
{
    return (float)-log(-log1p(-((double)word + 0.5) * 0x1p-32));
}

/* The largest logit + noise, the lowest id of equals. */
static int32_t draw_token(const struct candidates *candidates, const struct sampling *sampling)
{
    uint32_t words[4] = {0};
    int32_t block = -1; /* that `words` belong to */
    int32_t best = -1;
    float best_value = -INFINITY;
    float bound = INFINITY;

    for (int i = 0; i < candidates->n; i++) {
        const int32_t v = candidates->id[i];
        if (v / 4 != block) {
            const uint32_t counter[4] = {(uint32_t)v / 4, sampling->draw, 0, 0};
            philox4x32(words, counter, sampling->seed);
            block = v / 4;
        }
        /* With w = 1 - u the noise is below -log(w), since -log(1 - w) > w: so this token cannot
         * be the best if w > exp(logit - best_value). The bound leaves room for rounding. */
        const uint32_t word = words[v % 4];
        if (((float)word + 0.5f) * 0x1p-32f > candidates->weight[i] * bound) continue;

        const float value = candidates->logit[i] + gumbel(word);
        if (value > best_value) {
            best_value = value;
            best = v;
            bound = 1.0001f * expf(-best_value);
        }
    }
    return best;
}

static int32_t sample_row(const struct sample *op, int q, int thread)
{
    const struct sampling *sampling = &op->view->sampling[q];
    const int32_t *history = op->view->history + op->view->history_start[q];
    const int n_history = op->view->history_start[q + 1] - op->view->history_start[q];
    const int V = op->V;
    const size_t first = (size_t)thread * (size_t)V;
    const float *given = op->logits + (size_t)q * (size_t)V;
    struct candidates candidates = {V, op->id + first, op->logit + first, op->weight + first};

    if (n_history > 0) {
        memcpy(candidates.logit, given, (size_t)V * sizeof *given);
        penalize(candidates.logit, op->counts + first, sampling, history, n_history,
                 op->view->n_prompt[q]);
        given = candidates.logit;
    }
    const int32_t best = largest(given, V);
    if (best < 0 || sampling->temperature <= 0) return best;

    /* Less the largest, which changes no probability and keeps the quotient from overflowing. */
    const float max = given[best];
    for (int v = 0; v < V; v++) {
        candidates.id[v] = v;
        candidates.logit[v] = (given[v] - max) / sampling->temperature;
    }
    keep_likely(&candidates, sampling, op->simd, op->mass + (size_t)thread * DIGITS);
    return draw_token(&candidates, sampling);
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
    const size_t n = n_threads * (size_t)V;
    uint32_t *counts = cpu_scratch(dev, SCRATCH_COUNTS, n * sizeof *counts, "sample");
    double *mass = cpu_scratch(
        dev, SCRATCH_OP,
        n_threads * DIGITS * sizeof *mass + n * (2 * sizeof(float) + sizeof(int32_t)), "sample");
    if (!counts || !mass) return;

    struct sample op = {
        .simd = cpu->simd,
        .ids = ids,
        .logits = logits,
        .view = view,
        .V = V,
        .mass = mass,
        .counts = counts,
        .logit = (void *)(mass + n_threads * DIGITS),
    };
    op.weight = op.logit + n;
    op.id = (void *)(op.weight + n);
    cpu_parallel(dev, view->Q, 1, sample_rows, &op);
}
