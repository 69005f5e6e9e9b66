/* Picking rows: of the embedding table and of adapters' own by token id, of the activations by
 * index. */
#include "kernels/cpu/device.h"

#include <assert.h>

struct embed {
    const struct simd *simd;
    void *y; /* [T, D] dtype */
    const struct matrix *table;
    const int32_t *ids; /* [T] */
    enum dtype dtype;
};

/* to [D] = from [row, :] */
static void copy_row(const struct simd *simd, void *to, enum dtype dtype, const void *from,
                     enum dtype from_dtype, int row, size_t D)
{
    from = element(from, from_dtype, (size_t)row * D);
    if (from_dtype == dtype) {
        memcpy(to, from, D * dtype_bytes(dtype));
    } else if (dtype == DTYPE_F32) {
        simd->widen(to, from, from_dtype, D);
    } else {
        for (size_t i = 0; i < D; i++) dtype_store(to, dtype, i, dtype_load(from, from_dtype, i));
    }
}

static void embed_tokens(void *context, int begin, int end, int thread)
{
    const struct embed *op = context;
    const size_t D = (size_t)op->table->K;

    (void)thread;
    for (int t = begin; t < end; t++) {
        assert(op->ids[t] >= 0 && op->ids[t] < op->table->N);
        copy_row(op->simd, element(op->y, op->dtype, (size_t)t * D), op->dtype, op->table->data,
                 op->table->dtype, op->ids[t], D);
    }
}

void cpu_embed(struct device *dev, void *y, const struct matrix *table, const int32_t *ids, int T,
               enum dtype dtype)
{
    struct embed op = {cpu_device(dev)->simd, y, table, ids, dtype};
    cpu_parallel(dev, T, 16, embed_tokens, &op);
}

/* Which of `rows` is for `id`; -1: none. */
static int find_row(const struct lora_rows *rows, int32_t id)
{
    int low = 0, high = rows->n;

    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (rows->ids[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < rows->n && rows->ids[low] == id ? low : -1;
}

void cpu_lora_embed(struct device *dev, void *y, float *h, const int32_t *ids,
                    const struct lora_view *lora, int D, enum dtype dtype)
{
    const struct simd *simd = cpu_device(dev)->simd;
    const size_t last = (size_t)(lora->L - 1) * LORA_LINEARS;

    for (int i = 0; i < lora->n_tokens; i++) {
        const int32_t t = lora->order[i];
        if (lora->slot[t] < 0) continue;
        const size_t slot = (size_t)lora->slot[t];
        const struct lora_own *own = &lora->own[slot];
        const struct lora_factors *factors =
            &lora->factors[slot * (size_t)lora->L * LORA_LINEARS + last + LORA_EMBEDDING];
        const int row = find_row(&own->embedding_rows, ids[t]);
        void *to = element(y, dtype, (size_t)t * (size_t)D);

        if (own->embedding.data)
            copy_row(simd, to, dtype, own->embedding.data, own->embedding.dtype, ids[t], (size_t)D);
        if (row >= 0)
            copy_row(simd, to, dtype, own->embedding_rows.data,
                     (enum dtype)own->embedding_rows.dtype, row, (size_t)D);
        if (factors->a)
            copy_row(simd, h + (size_t)t * (size_t)lora->max_rank, DTYPE_F32, factors->a,
                     (enum dtype)factors->dtype, ids[t], (size_t)factors->R);
    }
}

void cpu_gather_rows(struct device *dev, void *y, const void *x, const int32_t *rows, int Q, int D,
                     enum dtype dtype)
{
    const size_t bytes = (size_t)D * dtype_bytes(dtype);

    (void)dev;
    for (int q = 0; q < Q; q++)
        memcpy((char *)y + (size_t)q * bytes, (const char *)x + (size_t)rows[q] * bytes, bytes);
}
