/* Picking rows: of the embedding table by token id, of the activations by index. Bound by the
 * latency of one dependent read; a row is some kilobytes. */
#include "kernels/cuda/cuda.cuh"

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
