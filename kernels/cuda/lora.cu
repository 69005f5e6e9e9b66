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

/* What `auto` goes by: us that a layer's seven linears of an 8B model take on an H200, in a
 * recording of 32 layers, silu_mul and rope left out; 64/7 is 64 tokens of seven adapters.
 *
 *   tokens/adapters, rank    bgmv    sgmv   fused    loop    gbmm
 *   1/1      16              13.1    14.6    14.0    14.5    96.7
 *   4/1      16              14.6    16.0    15.2       -   113.5
 *   8/7      16              18.1    21.1    19.8       -   152.0
 *   16/1     16              21.5    17.1    17.7       -   208.3
 *   16/7     16              23.1    22.0    21.7   116.4   212.7
 *   64/1     16              41.5    19.9    20.7    25.3   656.4
 *   64/7     16              44.8    24.6    24.6   127.2   657.7
 *   64/32    16              51.9    53.5    52.7       -   666.5
 *   64/64    16              62.8    92.7    73.5   929.4   677.8
 *   64/7     64             123.6    50.1    56.5   160.9    2281
 *   64/64    64             195.7   212.7   219.1    1137    2351
 *   256/7    16             131.8    49.7    45.4   152.4    2662
 *   512/7    16                 -    61.7    54.1   170.3       -
 *   4096/7   16                 -   304.1   202.1   564.3       - */

/* From how many tokens on tiles are faster than tokens one by one, of that many adapters: measured
 * at every count to 16 and at 20, 24, 32, 48 and 64, of 1 to 64 adapters of rank 16 and 64. One by
 * one, factors are read again for every token, which tells more at high ranks. */
static int tokens_for_tiles(int n_adapters, int max_rank)
{
    static const int of_few[] = {3, 3, 5, 9, 10, 12, 14, 18, 22}; /* adapters */
    if (n_adapters <= 8) return of_few[n_adapters];
    if (max_rank > 32) return n_adapters + 13;
    return max_int(8 * n_adapters / 3, 11 * n_adapters / 2 - 46);
}

/* Whether tokens go in tiles of one adapter; else one by one. */
static bool wants_tiles(const struct lora_view *lora)
{
    if (lora->mode == MLORA_LORA_BGMV) return false;
    if (lora->mode == MLORA_LORA_SGMV || lora->mode == MLORA_LORA_LOOP) return true;
    return lora->n_tokens >= tokens_for_tiles(lora->n_segments, lora->max_rank);
}

bool lora_is_fused(const struct lora_view *lora)
{
    if (lora->n_tokens == 0 || lora->max_rank == 0 || lora->expands_more) return false;
    if (lora->mode == MLORA_LORA_FUSED) return true;
    return lora->mode == MLORA_LORA_AUTO && wants_tiles(lora) && lora->n_tokens > 128 &&
           lora->max_rank <= 32;
}

static void check_sizes(const struct lora_view *lora, const struct lora_site *site)
{
    (void)lora, (void)site;
    assert(lora->max_rank > 0 && lora->max_rank <= LORA_RANK_MAX && lora->n_tokens <= 65535);
    assert(site->n_slices > 0 && site->n_slices <= LORA_SLICES_MAX);
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
        lora_shrink_gathered(cuda, h, x, &args, dtype);
        return;
    }
    const bool tiles = wants_tiles(lora) && lora_shrink_has_tiles(x, &args, dtype);
    const bool has_delta = lora_begins_delta(cuda, h, lora, site, layer, dtype);
    cuda_fork(cuda); /* the base product reads the same x and writes another y */
    for_parts(lora, &args, [&](const struct lora_args *part) {
        if (tiles)
            lora_shrink_by_tile(cuda, h, (const bf16 *)x, part);
        else
            lora_shrink_by_row(cuda, h, x, part, dtype);
    });
    if (has_delta) lora_delta(cuda, &args);
    cuda_fork_end(cuda);
}

void cuda_lora_expand(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype)
{
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
        lora_expand_gathered(cuda, y, h, &args, dtype);
        return;
    }
    const bool tiles = wants_tiles(lora);
    for_parts(lora, &args, [&](const struct lora_args *part) {
        if (tiles)
            lora_expand_by_tile(cuda, y, h, part, dtype);
        else
            lora_expand_by_row(cuda, y, h, part, dtype);
    });
}
