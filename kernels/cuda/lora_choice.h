/* Which of the LoRA kernels a step gets: plain C, so that what `auto` chooses is tested without a
 * GPU. */
#ifndef MLORA_KERNELS_CUDA_LORA_CHOICE_H
#define MLORA_KERNELS_CUDA_LORA_CHOICE_H

#include <stdbool.h>

#include "engine/mlora.h" /* mlora_lora_mode */
#include "kernels/views.h"

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
