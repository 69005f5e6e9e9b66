/* Which of the LoRA kernels a step gets: plain C, so that what `auto` chooses is tested without a
 * GPU. */
#ifndef MLORA_KERNELS_CUDA_LORA_CHOICE_H
#define MLORA_KERNELS_CUDA_LORA_CHOICE_H

#include <stdbool.h>

#include "engine/mlora.h" /* mlora_lora_mode */
#include "kernels/views.h"

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
 *   256/32   16             138.5    72.3       -       -       -
 *   256/64   16             146.6   112.1       -       -       -
 *   512/7    16                 -    61.7    54.1   170.3       -
 *   4096/7   16                 -   304.1   202.1   564.3       - */

/* From how many tokens on tiles are faster than tokens one by one, of that many adapters. One by
 * one, factors are read again for every token, which tells more at high ranks; a tile takes an
 * adapter's factors once, in steps of 16 of its rank, however few tokens it has. These lines go
 * between what was measured: tests/kernels/test_lora_choice.c. */
static inline int lora_tokens_for_tiles(int n_adapters, int max_rank)
{
    enum { FEW = 8 };
    static const int low[FEW + 1] = {3, 8, 8, 10, 11, 14, 19, 22, 25}; /* by adapters */
    static const int high[FEW + 1] = {3, 6, 8, 12, 15, 19, 20, 21, 22};
    const int n = n_adapters;

    if (n <= FEW) return max_rank <= 32 ? low[n] : high[n];
    if (max_rank <= 8) return n <= 64 ? 3 * n + 15 : 5 * n - 113;
    if (max_rank <= 32) return n <= 64 ? 7 * n / 3 + 5 : 7 * n / 2 - 70;
    return 5 * n / 2;
}

/* Whether tokens go in tiles of one adapter; else one by one. */
static inline bool lora_wants_tiles(const struct lora_view *lora)
{
    if (lora->mode == MLORA_LORA_BGMV) return false;
    if (lora->mode == MLORA_LORA_SGMV || lora->mode == MLORA_LORA_LOOP) return true;
    return lora->n_tokens >= lora_tokens_for_tiles(lora->n_segments, lora->max_rank);
}

/* Whether expand, too, runs beside the base product; so many adapters' B holds the product up longer
 * than it takes after it: tests/kernels/test_lora_choice.c. */
static inline bool lora_expands_beside(const struct lora_view *lora)
{
    enum { ADAPTERS_MAX = 40 };
    if (lora->mode == MLORA_LORA_FUSED) return true;
    return lora->mode == MLORA_LORA_AUTO && lora->n_segments <= ADAPTERS_MAX;
}

/* Whether expand is made inside the op that reads its result. */
static inline bool lora_is_fused(const struct lora_view *lora)
{
    if (lora->n_tokens == 0 || lora->max_rank == 0 || lora->expands_more) return false;
    if (lora->mode == MLORA_LORA_FUSED) return true;
    return lora->mode == MLORA_LORA_AUTO && lora_wants_tiles(lora) && lora->n_tokens > 128 &&
           lora->max_rank <= 32;
}

#endif
