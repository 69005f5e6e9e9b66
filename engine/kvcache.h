/* KV blocks on paper: which are free, which belong to a request. No device memory here. */
#ifndef MLORA_ENGINE_KVCACHE_H
#define MLORA_ENGINE_KVCACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/mlora.h"

struct kvcache {
    int32_t *free_blocks; /* [n_free] a stack */
    int n_free;
    int n_blocks;
};

mlora_status kvcache_open(struct kvcache *out, int n_blocks); /* OK or ENOMEM */
void kvcache_close(struct kvcache *kv);                       /* accepts zeroes */

/* Blocks that hold `n_tokens`. */
int kvcache_blocks_for(int n_tokens);

/* Extend blocks [*n] to hold `n_tokens`; false, and nothing taken, if too few are free. */
bool kvcache_extend(struct kvcache *kv, int32_t *blocks, int *n, int n_tokens);

/* Give all back; *n becomes 0. */
void kvcache_release(struct kvcache *kv, const int32_t *blocks, int *n);

#endif
