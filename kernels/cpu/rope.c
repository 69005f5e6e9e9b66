/* Rotary positions, and the step's keys and values into the cache. */
#include "kernels/cpu/device.h"

#include <assert.h>
#include <math.h>

struct rope {
    void *qkv; /* [T, H + 2 G, d] dtype */
    const struct rope_view *rope;
    const struct kv_view *kv;
    const struct batch_view *batch;
    const struct heads *heads;
    float *scratch; /* [threads, 2, d / 2] */
    enum dtype dtype;
};

/* Turn one head in place. */
static void turn(void *head, const float *cosine, const float *sine, int d, enum dtype dtype)
{
    const size_t half = (size_t)d / 2;

    for (size_t i = 0; i < half; i++) {
        const float a = dtype_load(head, dtype, i);
        const float b = dtype_load(head, dtype, i + half);
        dtype_store(head, dtype, i, a * cosine[i] - b * sine[i]);
        dtype_store(head, dtype, i + half, b * cosine[i] + a * sine[i]);
    }
}

static void copy_head(void *to, enum dtype to_dtype, const void *from, enum dtype dtype, int d)
{
    if (to_dtype == dtype)
        memcpy(to, from, (size_t)d * dtype_bytes(dtype));
    else
        for (size_t i = 0; i < (size_t)d; i++)
            dtype_store(to, to_dtype, i, dtype_load(from, dtype, i));
}

static void rope_tokens(void *context, int begin, int end, int thread)
{
    const struct rope *op = context;
    const struct heads *heads = op->heads;
    const struct kv_view *kv = op->kv;
    const int H = heads->H, G = heads->G, d = heads->d;
    float *cosine = op->scratch + (size_t)thread * (size_t)d;
    float *sine = cosine + d / 2;

    for (int t = begin; t < end; t++) {
        const int position = op->batch->position[t];
        char *row = element(op->qkv, op->dtype, (size_t)t * (size_t)(H + 2 * G) * (size_t)d);

        for (int i = 0; i < d / 2 && op->rope->frequency; i++) {
            const float angle = (float)position * op->rope->frequency[i];
            cosine[i] = cosf(angle) * op->rope->amplitude;
            sine[i] = sinf(angle) * op->rope->amplitude;
        }
        for (int h = 0; h < H + G && op->rope->frequency; h++)
            turn(element(row, op->dtype, (size_t)h * (size_t)d), cosine, sine, d, op->dtype);

        const int32_t *table = kv->block_table + (size_t)op->batch->row[t] * (size_t)kv->max_blocks;
        const size_t block = (size_t)table[position / KV_BLOCK];
        for (int g = 0; g < G; g++) {
            /* K[block][g][position % KV_BLOCK][:] */
            const size_t slot =
                (block * (size_t)G + (size_t)g) * KV_BLOCK + (size_t)(position % KV_BLOCK);
            copy_head(element(kv->k, kv->dtype, slot * (size_t)d), kv->dtype,
                      element(row, op->dtype, (size_t)(H + g) * (size_t)d), op->dtype, d);
            copy_head(element(kv->v, kv->dtype, slot * (size_t)d), kv->dtype,
                      element(row, op->dtype, (size_t)(H + G + g) * (size_t)d), op->dtype, d);
        }
    }
}

void cpu_rope(struct device *dev, void *qkv, const struct rope_view *rope, const struct kv_view *kv,
              const struct batch_view *batch, const struct heads *heads, enum dtype dtype)
{
    assert(heads->d % 2 == 0 && (kv->dtype == DTYPE_F32 || kv->dtype == DTYPE_BF16));
    const size_t n_floats = (size_t)threads_count(cpu_device(dev)->threads) * (size_t)heads->d;
    float *scratch = cpu_scratch(dev, SCRATCH_OP, n_floats * sizeof *scratch, "rope");
    if (!scratch) return;

    struct rope op = {qkv, rope, kv, batch, heads, scratch, dtype};
    cpu_parallel(dev, batch->T, 4, rope_tokens, &op);
}
