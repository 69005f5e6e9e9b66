/* Picking rows: of the embedding table by token id, of the activations by index. */
#include "kernels/cpu/device.h"

#include <assert.h>

struct embed {
    const struct simd *simd;
    void *y; /* [T, D] dtype */
    const struct matrix *table;
    const int32_t *ids; /* [T] */
    enum dtype dtype;
};

static void embed_tokens(void *context, int begin, int end, int thread)
{
    const struct embed *op = context;
    const size_t D = (size_t)op->table->K;

    (void)thread;
    for (int t = begin; t < end; t++) {
        assert(op->ids[t] >= 0 && op->ids[t] < op->table->N);
        const enum dtype from_dtype = op->table->dtype;
        const void *from = element(op->table->data, from_dtype, (size_t)op->ids[t] * D);
        void *to = element(op->y, op->dtype, (size_t)t * D);

        if (from_dtype == op->dtype) {
            memcpy(to, from, D * dtype_bytes(op->dtype));
        } else if (op->dtype == DTYPE_F32) {
            op->simd->widen(to, from, from_dtype, D);
        } else {
            for (size_t i = 0; i < D; i++)
                store_f32(to, op->dtype, i, load_f32(from, from_dtype, i));
        }
    }
}

void cpu_embed(struct device *dev, void *y, const struct matrix *table, const int32_t *ids, int T,
               enum dtype dtype)
{
    struct embed op = {cpu_device(dev)->simd, y, table, ids, dtype};
    cpu_parallel(dev, T, 16, embed_tokens, &op);
}

void cpu_gather_rows(struct device *dev, void *y, const void *x, const int32_t *rows, int Q, int D,
                     enum dtype dtype)
{
    const size_t bytes = (size_t)D * dtype_bytes(dtype);

    (void)dev;
    for (int q = 0; q < Q; q++)
        memcpy((char *)y + (size_t)q * bytes, (const char *)x + (size_t)rows[q] * bytes, bytes);
}
