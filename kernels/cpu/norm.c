/* Root mean square norms, of rows and of heads. */
#include "kernels/cpu/device.h"

#include <math.h>

/* The sum of x[i]^2 in 16 partial sums, as in simd.h: an order that depends on n only, and that
 * the compiler can make vectors of. */
static float sum_of_squares(const float *x, int n)
{
    float lane[LANES] = {0};
    int i = 0;

    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < n; j++) lane[j] += x[i + j] * x[i + j];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

/* y[i] = weight[i] * x[i] / sqrt(mean(x^2) + eps) */
static void rms_norm_row(float *y, const float *x, const float *weight, int n, float eps)
{
    const float scale = 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps);

    for (int i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
}

/* Whose norms may stand in the place of the base's. */
struct own_norms {
    const struct lora_view *lora; /* NULL: nobody's */
    int layer;
};

static const float *weight_of(const struct own_norms *own, int t, enum lora_norm norm,
                              const float *base)
{
    const int32_t slot = own->lora ? own->lora->slot[t] : -1;
    if (slot < 0 || !own->lora->own[slot].norms) return base;
    const float *weight = own->lora->own[slot].norms[own->layer * LORA_NORMS + (int)norm];
    return weight ? weight : base;
}

struct add_rms_norm {
    const struct simd *simd;
    void *y;             /* [T, D] dtype */
    float *x;            /* [T, D] */
    const void *delta;   /* [T, D] delta_dtype or NULL */
    const float *weight; /* [D] */
    float *scratch;      /* [threads, D] */
    int D;
    float eps;
    enum dtype delta_dtype, dtype;
    struct own_norms own;
    enum lora_norm norm;
};

static void norm_rows(void *context, int begin, int end, int thread)
{
    const struct add_rms_norm *op = context;
    const size_t D = (size_t)op->D;
    float *y = op->scratch + (size_t)thread * D;

    for (int t = begin; t < end; t++) {
        const size_t first = (size_t)t * D;
        float *x = op->x + first;

        if (op->delta) {
            op->simd->widen(y, element(op->delta, op->delta_dtype, first), op->delta_dtype, D);
            for (size_t i = 0; i < D; i++) x[i] += y[i];
        }
        rms_norm_row(y, x, weight_of(&op->own, t, op->norm, op->weight), op->D, op->eps);
        op->simd->narrow(element(op->y, op->dtype, first), op->dtype, y, D);
    }
}

void cpu_lora_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                           enum dtype delta_dtype, const float *weight,
                           const struct lora_view *lora, int layer, enum lora_norm norm, int T,
                           int D, float eps, enum dtype dtype)
{
    struct cpu_device *cpu = cpu_device(dev);
    const size_t n_floats = (size_t)threads_count(cpu->threads) * (size_t)D;
    float *scratch = cpu_scratch(dev, SCRATCH_OP, n_floats * sizeof *scratch, "add_rms_norm");
    if (!scratch) return;

    struct add_rms_norm op = {cpu->simd, y,   x,           delta, weight,        scratch,
                              D,         eps, delta_dtype, dtype, {lora, layer}, norm};
    cpu_parallel(dev, T, 4, norm_rows, &op);
}

void cpu_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                      enum dtype delta_dtype, const float *weight, int T, int D, float eps,
                      enum dtype dtype)
{
    cpu_lora_add_rms_norm(dev, y, x, delta, delta_dtype, weight, NULL, 0, NORM_ATTENTION, T, D, eps,
                          dtype);
}

struct head_norm {
    const struct simd *simd;
    void *qkv; /* [T, H + 2 G, d] dtype */
    const float *q_weight, *k_weight;
    float *scratch; /* [threads, 2, d] */
    const struct heads *heads;
    float eps;
    enum dtype dtype;
    struct own_norms own;
};

static void norm_heads(void *context, int begin, int end, int thread)
{
    const struct head_norm *op = context;
    const struct heads *heads = op->heads;
    const size_t d = (size_t)heads->d;
    float *x = op->scratch + (size_t)thread * 2 * d;
    float *y = x + d;

    for (int t = begin; t < end; t++) {
        const float *q_weight = weight_of(&op->own, t, NORM_Q, op->q_weight);
        const float *k_weight = weight_of(&op->own, t, NORM_K, op->k_weight);
        for (int h = 0; h < heads->H + heads->G; h++) { /* queries, then keys */
            const size_t head = (size_t)t * (size_t)(heads->H + 2 * heads->G) + (size_t)h;
            void *row = element(op->qkv, op->dtype, head * d);

            op->simd->widen(x, row, op->dtype, d);
            rms_norm_row(y, x, h < heads->H ? q_weight : k_weight, heads->d, op->eps);
            op->simd->narrow(row, op->dtype, y, d);
        }
    }
}

void cpu_lora_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                        const struct lora_view *lora, int layer, const struct heads *heads, int T,
                        float eps, enum dtype dtype)
{
    struct cpu_device *cpu = cpu_device(dev);
    const size_t n_floats = (size_t)threads_count(cpu->threads) * 2 * (size_t)heads->d;
    float *scratch = cpu_scratch(dev, SCRATCH_OP, n_floats * sizeof *scratch, "head_norm");
    if (!scratch) return;

    struct head_norm op = {cpu->simd, qkv, q_weight, k_weight,     scratch,
                           heads,     eps, dtype,    {lora, layer}};
    cpu_parallel(dev, T, 4, norm_heads, &op);
}

void cpu_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                   const struct heads *heads, int T, float eps, enum dtype dtype)
{
    cpu_lora_head_norm(dev, qkv, q_weight, k_weight, NULL, 0, heads, T, eps, dtype);
}
