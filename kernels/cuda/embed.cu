/* Picking rows: of the embedding table and of adapters' own by token id, of the activations by
 * index. Bound by the
 * latency of one dependent read; a row is some kilobytes. */
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { EMBED_BLOCK = 128 };

/* y[t, :] = table[ids[t], :], eight elements a thread
 *
 *   y [T, D] Y    table [., D] X    ids [T]
 *   grid (D / (GROUP EMBED_BLOCK), T)    block EMBED_BLOCK */
template <typename Y, typename X>
static __global__ void pick_rows_kernel(Y *y, const X *table, const int32_t *ids, int D,
                                        bool aligned)
{
    grid_begin();
    const int i = (blockIdx.x * EMBED_BLOCK + threadIdx.x) * GROUP;
    if (i >= D) return;
    float x[GROUP];
    load_some(x, table + (size_t)ids[blockIdx.y] * D + i, D - i, aligned);
    store_some(y + (size_t)blockIdx.y * D + i, x, D - i, aligned);
}

/* Which of `rows` is for `id`; -1: none. */
static __device__ int find_row(const struct lora_rows &rows, int id)
{
    int low = 0, high = rows.n;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (rows.ids[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < rows.n && rows.ids[low] == id ? low : -1;
}

/* to [n] = from[row, :], by the whole block */
template <typename Y>
static __device__ void copy_row(Y *to, const void *from, int dtype, int row, int n)
{
    for (int i = threadIdx.x * GROUP; i < n; i += EMBED_BLOCK * GROUP) {
        float x[GROUP];
        load_any(x, from, dtype, (size_t)row * n + i, n - i, false);
        store_some(to + i, x, n - i, false);
    }
}

/* y[t, :] = own embedding[ids[t], :], h[t, :] = A[ids[t], :], where the token's adapter has them
 *
 *   y [T, D] Y    h [T, max_rank]    ids [T]
 *   grid n_tokens    block EMBED_BLOCK */
template <typename Y>
static __global__ void lora_embed_kernel(Y *y, float *h, const int32_t *ids, int D,
                                         const struct lora_own *owns,
                                         const __grid_constant__ struct lora_args args)
{
    grid_begin();
    const int t = args.order[blockIdx.x], slot = args.slot[t], id = ids[t];
    if (slot < 0) return; /* the whole block */
    const struct lora_own &own = owns[slot];
    const struct lora_factors &f = *lora_factors_of(args, slot, 0);
    const int row = find_row(own.embedding_rows, id);
    Y *to = y + (size_t)t * D;

    if (row >= 0)
        copy_row(to, own.embedding_rows.data, own.embedding_rows.dtype, row, D);
    else if (own.embedding.data)
        copy_row(to, own.embedding.data, own.embedding.dtype, id, D);
    if (f.a) copy_row(h + (size_t)t * args.max_rank, f.a, f.dtype, id, f.R);
}

/* ---- launchers ---------------------------------------------------------------------------- */

enum { GRID_Y = 65535 };

static void pick_rows(struct device *dev, void *y, const void *table, enum dtype from,
                      const int32_t *ids, int T, int D, enum dtype dtype, const char *op)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || T == 0) return;
    assert(T <= GRID_Y);

    const bool aligned = D % GROUP == 0 && is_aligned(y) && is_aligned(table);
    const dim3 grid(ceil_div(D, GROUP * EMBED_BLOCK), T);
    with_activation(dtype, [&](auto y_type) {
        with_type(from, [&](auto x_type) {
            using Y = decltype(y_type);
            using X = decltype(x_type);
            cuda_launch(cuda, op, pick_rows_kernel<Y, X>, grid, EMBED_BLOCK, 0, 1, (Y *)y,
                        (const X *)table, ids, D, aligned);
        });
    });
}

void cuda_embed(struct device *dev, void *y, const struct matrix *table, const int32_t *ids, int T,
                enum dtype dtype)
{
    pick_rows(dev, y, table->data, table->dtype, ids, T, table->K, dtype, "embed");
}

void cuda_gather_rows(struct device *dev, void *y, const void *x, const int32_t *rows, int Q, int D,
                      enum dtype dtype)
{
    pick_rows(dev, y, x, dtype, rows, Q, D, dtype, "gather_rows");
}

void cuda_lora_embed(struct device *dev, void *y, float *h, const int32_t *ids,
                     const struct lora_view *lora, int D, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || lora->n_tokens == 0) return;

    struct lora_site site = {};
    site.linear = LORA_EMBEDDING;
    const struct lora_args args = lora_args(lora, &site, lora->L - 1);
    with_activation(dtype, [&](auto type) {
        using Y = decltype(type);
        cuda_launch(cuda, "lora_embed", lora_embed_kernel<Y>, lora->n_tokens, EMBED_BLOCK, 0, 1,
                    (Y *)y, h, ids, D, lora->own, args);
    });
}
