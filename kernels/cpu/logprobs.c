/* Log-probabilities under the model's own distribution. */
#include "kernels/cpu/device.h"

#include <assert.h>
#include <math.h>

struct logprobs {
    const struct simd *simd;
    float *logprob;        /* [Q] */
    int32_t *top_ids;      /* [Q, n] */
    float *top_logprobs;   /* [Q, n] */
    const float *logits;   /* [Q, V] */
    const int32_t *target; /* [Q] */
    int V, n;
};

enum { PART = 512 }; /* exponentials that are summed as f32 before they join the double */

/* log(sum of exp(logits)) */
static double log_sum_exp(const struct simd *simd, const float *logits, int V)
{
    float part[PART];
    float max = -INFINITY;
    double sum = 0;

    assert(V > 0);
    for (int v = 0; v < V; v++)
        if (logits[v] > max) max = logits[v];
    for (int v = 0; v < V; v += PART)
        sum += simd->exp_sum(part, logits + v, max, (size_t)min_int(PART, V - v));
    return max + log(sum);
}

/* The n largest, in descending order, of equals the lower id first. Where V < n or logits are
 * NaN, the list ends with id -1 and -infinity. */
static void top(int32_t *ids, float *values, const float *logits, int V, int n)
{
    for (int i = 0; i < n; i++) {
        ids[i] = -1;
        values[i] = -INFINITY;
    }
    for (int v = 0; v < V; v++) {
        if (!(logits[v] > values[n - 1] || (ids[n - 1] < 0 && logits[v] == -INFINITY))) continue;
        int i = n - 1;
        for (; i > 0 && (ids[i - 1] < 0 || logits[v] > values[i - 1]); i--) {
            ids[i] = ids[i - 1];
            values[i] = values[i - 1];
        }
        ids[i] = v;
        values[i] = logits[v];
    }
}

static void logprobs_rows(void *context, int begin, int end, int thread)
{
    const struct logprobs *op = context;
    const size_t n = (size_t)op->n;

    (void)thread;
    for (int q = begin; q < end; q++) {
        const float *logits = op->logits + (size_t)q * (size_t)op->V;
        const double all = log_sum_exp(op->simd, logits, op->V);
        const int32_t target = op->target[q];
        op->logprob[q] = target < 0 ? 0.0f : (float)(logits[target] - all);
        if (op->n == 0) continue;

        int32_t *ids = op->top_ids + (size_t)q * n;
        float *values = op->top_logprobs + (size_t)q * n;
        top(ids, values, logits, op->V, op->n);
        for (size_t i = 0; i < n; i++) values[i] = (float)(values[i] - all);
    }
}

void cpu_logprobs(struct device *dev, float *logprob, int32_t *top_ids, float *top_logprobs,
                  const float *logits, const int32_t *target, int Q, int V, int n)
{
    struct logprobs op = {
        cpu_device(dev)->simd, logprob, top_ids, top_logprobs, logits, target, V, n};
    cpu_parallel(dev, Q, 1, logprobs_rows, &op);
}
