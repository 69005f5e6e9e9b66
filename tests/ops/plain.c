/* Every op that can be replaced, in plain loops: built once for each with -DOP=silu_mul and so on.
 * silu_mul rounds as mlora's own does, to the bit; the others sum in another order. */
#include <math.h>
#include <string.h>

#include "kernels/mlora_op.h"

#define STRING(x) #x
#define NAME(x)   STRING(x)
#define MAYBE     __attribute__((unused)) static

MAYBE float load(const void *array, int dtype, size_t i)
{
    uint32_t bits;
    uint16_t half;
    float value;

    if (dtype == MLORA_OP_F32) return ((const float *)array)[i];
    memcpy(&half, (const char *)array + 2 * i, sizeof half);
    if (dtype == MLORA_OP_F16) { /* normal numbers and zero are all that the tests hold */
        const int exponent = half >> 10 & 31;
        const float fraction = (float)(half & 1023);
        value = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
        return half & 0x8000 ? -value : value;
    }
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MAYBE void store(void *array, int dtype, size_t i, float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    if (dtype == MLORA_OP_F32)
        ((float *)array)[i] = value;
    else
        ((uint16_t *)array)[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

MAYBE float dot(const void *a, int a_dtype, size_t i, const void *b, int b_dtype, size_t j, int n)
{
    float sum = 0;
    for (int k = 0; k < n; k++)
        sum += load(a, a_dtype, i + (size_t)k) * load(b, b_dtype, j + (size_t)k);
    return sum;
}

/* ---- silu_mul, shared out to the threads ---------------------------------------------------- */

MAYBE void silu_rows(void *context, int begin, int end, int thread)
{
    const mlora_op_silu_mul *op = context;
    const size_t F = (size_t)op->F;

    (void)thread;
    for (size_t t = (size_t)begin; t < (size_t)end; t++) {
        for (size_t f = 0; f < F; f++) {
            const float gate = load(op->gate_up, op->dtype, t * 2 * F + f);
            const float silu = gate / (1.0f + expf(-gate));
            store(op->y, op->dtype, t * F + f,
                  silu * load(op->gate_up, op->dtype, t * 2 * F + F + f));
        }
    }
}

MAYBE int silu_mul(const mlora_op_call *call, const void *arguments)
{
    mlora_op_silu_mul op = *(const mlora_op_silu_mul *)arguments;
    call->parallel(call, op.T, 1, silu_rows, &op);
    return 0;
}

/* ---- the others ----------------------------------------------------------------------------- */

MAYBE int add_rms_norm(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_add_rms_norm *op = arguments;
    const size_t D = (size_t)op->D;

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++) {
        float *x = op->x + t * D;
        double sum = 0;
        for (size_t i = 0; i < D; i++) {
            if (op->delta) x[i] += load(op->delta, op->dtype, t * D + i);
            sum += (double)x[i] * x[i];
        }
        const float scale = 1.0f / sqrtf((float)(sum / (double)D) + op->eps);
        for (size_t i = 0; i < D; i++)
            store(op->y, op->dtype, t * D + i, op->weight[i] * (x[i] * scale));
    }
    return 0;
}

MAYBE int matmul(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_matmul *op = arguments;
    const size_t N = (size_t)op->N, K = (size_t)op->K;

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++)
        for (size_t n = 0; n < N; n++)
            store(op->y, op->y_dtype, t * N + n,
                  dot(op->x, op->x_dtype, t * K, op->w, op->w_dtype, n * K, op->K) +
                      (op->bias ? op->bias[n] : 0));
    return 0;
}

MAYBE void keep(void *cache, const mlora_op_rope *op, size_t t, int g, size_t from)
{
    const int position = op->position[t];
    const size_t block =
        (size_t)op->block_table[op->row[t] * op->max_blocks + position / MLORA_OP_KV_BLOCK];
    const size_t slot = (block * (size_t)op->G + (size_t)g) * MLORA_OP_KV_BLOCK +
                        (size_t)(position % MLORA_OP_KV_BLOCK);

    for (size_t i = 0; i < (size_t)op->d; i++)
        store(cache, op->kv_dtype, slot * (size_t)op->d + i, load(op->qkv, op->dtype, from + i));
}

MAYBE int rope(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_rope *op = arguments;
    const size_t d = (size_t)op->d, half = d / 2, heads = (size_t)(op->H + 2 * op->G);

    (void)call;
    for (size_t t = 0; t < (size_t)op->T; t++) {
        for (size_t h = 0; h < (size_t)(op->H + op->G); h++) {
            for (size_t i = 0; i < half; i++) {
                const size_t at = (t * heads + h) * d + i;
                const float angle = (float)op->position[t] * op->frequency[i];
                const float c = cosf(angle) * op->amplitude, s = sinf(angle) * op->amplitude;
                const float a = load(op->qkv, op->dtype, at);
                const float b = load(op->qkv, op->dtype, at + half);
                store(op->qkv, op->dtype, at, a * c - b * s);
                store(op->qkv, op->dtype, at + half, b * c + a * s);
            }
        }
        for (int g = 0; g < op->G; g++) {
            const size_t key = (t * heads + (size_t)(op->H + g)) * d;
            keep(op->k, op, t, g, key);
            keep(op->v, op, t, g, key + (size_t)op->G * d);
        }
    }
    return 0;
}

MAYBE const mlora_op_factors *factors_of(const mlora_op_lora *lora, int t, int i)
{
    return &lora->factors[lora->slot[t] * lora->slot_pitch + i];
}

MAYBE int lora_shrink(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_lora_shrink *op = arguments;
    const mlora_op_lora *lora = &op->lora;

    (void)call;
    for (int j = 0; j < lora->n_tokens; j++) {
        const int t = lora->order[j];
        for (int i = 0; lora->slot[t] >= 0 && i < lora->n_slices; i++) {
            const mlora_op_factors *f = factors_of(lora, t, i);
            for (int r = 0; f->a && r < f->R; r++)
                op->h[(t * lora->n_slices + i) * lora->max_rank + r] =
                    dot(f->a, f->dtype, (size_t)r * (size_t)lora->K, op->x, op->dtype,
                        (size_t)t * (size_t)lora->K, lora->K);
        }
    }
    return 0;
}

MAYBE void expand_slice(const mlora_op_lora_expand *op, int t, int i)
{
    const mlora_op_lora *lora = &op->lora;
    const mlora_op_factors *f = factors_of(lora, t, i);
    const float *h = op->h + (t * lora->n_slices + i) * lora->max_rank;

    if (!f->a && !f->bias_delta) return;
    for (int n = 0; n < lora->width[i]; n++) {
        const size_t at = (size_t)t * (size_t)lora->N + (size_t)(lora->offset[i] + n);
        const float y = load(op->y, op->dtype, at);
        const float g = f->g ? f->g[n] : 1;
        const float bias = lora->bias ? lora->bias[lora->offset[i] + n] : 0;
        float sum =
            f->a ? dot(f->b, f->dtype, (size_t)n * (size_t)f->R, h, MLORA_OP_F32, 0, f->R) : 0;
        if (f->b_bias) sum += f->b_bias[n];
        store(op->y, op->dtype, at,
              y + (g - 1) * (y - bias) + g * f->scale * sum +
                  (f->bias_delta ? f->bias_delta[n] : 0));
    }
}

/* By all tokens of the step, where shrink goes by the order of those with an adapter. */
MAYBE int lora_expand(const mlora_op_call *call, const void *arguments)
{
    const mlora_op_lora_expand *op = arguments;

    (void)call;
    for (int t = 0; t < op->lora.T; t++)
        for (int i = 0; op->lora.slot[t] >= 0 && i < op->lora.n_slices; i++) expand_slice(op, t, i);
    return 0;
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = NAME(OP), .backend = "cpu", .run = OP};
