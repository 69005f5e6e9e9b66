/* The LoRA ops: each mode's way through the kernels of lora_shrink.cu, lora_expand.cu and
 * lora_gbmm.cu. */
#include "kernels/cuda/lora.cuh"

/* Segments are worked on together, or, in mode `loop`, one after another. */
template <typename F>
static void for_parts(const struct lora_view *lora, const struct lora_args *args, F &&f)
{
    if (lora->mode != MLORA_LORA_LOOP) {
        f(args);
        return;
    }
    for (int s = 0; s < lora->n_segments; s++) {
        const struct lora_args part = lora_part(args, s);
        f(&part);
    }
}

static void check_sizes(const struct lora_view *lora, const struct lora_site *site)
{
    (void)lora, (void)site;
    assert(lora->max_rank > 0 && lora->max_rank <= LORA_RANK_MAX && lora->n_tokens <= 65535);
    assert(site->n_slices > 0 && site->n_slices <= LORA_SLICES_MAX);
}

static void shrink(struct cuda_device *cuda, float *h, const void *x, const struct lora_args *args,
                   bool has_tiles, enum dtype dtype)
{
    if (has_tiles)
        lora_shrink_by_tile(cuda, h, (const bf16 *)x, args);
    else
        lora_shrink_by_row(cuda, h, x, args, dtype);
}

void cuda_lora_shrink(struct device *dev, float *h, const void *x, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || lora->n_segments == 0 || lora->n_tokens == 0) return;
    if (lora->max_rank == 0) return; /* there is no A */
    check_sizes(lora, site);

    const struct lora_args args = lora_args(lora, site, layer);
    if (lora->mode == MLORA_LORA_GBMM) {
        lora_shrink_gathered(cuda, h, x, &args, dtype, lora->is_plain);
        return;
    }
    const bool tiles = lora_wants_tiles(lora) && lora_shrink_has_tiles(x, &args, dtype);
    if (lora_begins_delta(cuda, h, lora, site, layer, dtype)) {
        cuda->left = {(const bf16 *)x, h, cuda->delta.z, tiles, lora->is_plain, args};
        return;
    }
    const bool is_beside = lora->n_rows <= BESIDE_TOKENS;
    if (is_beside) cuda_fork(cuda); /* the base product reads the same x and writes another y */
    for_parts(lora, &args,
              [&](const struct lora_args *part) { shrink(cuda, h, x, part, tiles, dtype); });
    if (is_beside) cuda_fork_end(cuda);
}

void lora_make_left(struct cuda_device *cuda)
{
    const struct left left = cuda->left;

    cuda->left.x = NULL;
    cuda_fork(cuda); /* the base product reads the same x and writes another y */
    shrink(cuda, left.h, left.x, &left.args, left.has_tiles, DTYPE_BF16);
    lora_delta(cuda, left.z, left.h, &left.args);
    cuda_fork_end(cuda);
}

void cuda_lora_expand(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype)
{
    if (lora_is_added((struct cuda_device *)dev, h, site, layer)) return;
    struct cuda_device *cuda = lora->expands_more ? cuda_begin(dev) : cuda_begin_beside(dev);
    if (!cuda || lora->n_segments == 0 || lora->n_tokens == 0) return;
    if (lora_defers(cuda, y, h, site, layer, dtype)) return;
    cuda_join(cuda);
    if (lora->expands_more) {
        cuda_lora_expand_more(dev, y, h, lora, site, layer, dtype);
        return;
    }
    if (lora->max_rank == 0) return; /* nothing that the linears know of */
    check_sizes(lora, site);

    const struct lora_args args = lora_args(lora, site, layer);
    if (lora->mode == MLORA_LORA_GBMM) {
        lora_expand_gathered(cuda, y, h, &args, dtype, lora->is_plain);
        return;
    }
    const bool tiles = lora_wants_tiles(lora);
    for_parts(lora, &args, [&](const struct lora_args *part) {
        if (tiles)
            lora_expand_by_tile(cuda, y, h, part, dtype);
        else
            lora_expand_by_row(cuda, y, h, part, dtype);
    });
}
