#include "engine/kvcache.h"

#include <stdlib.h>

#include "engine/base/error.h"
#include "kernels/views.h" /* KV_BLOCK */

mlora_status kvcache_open(struct kvcache *out, int n_blocks)
{
    *out = (struct kvcache){.n_blocks = n_blocks, .n_free = n_blocks};
    out->free_blocks = malloc((size_t)n_blocks * sizeof *out->free_blocks);
    if (!out->free_blocks) {
        *out = (struct kvcache){0};
        return error_set(MLORA_ENOMEM, "out of memory: a list of %d KV blocks", n_blocks);
    }
    for (int i = 0; i < n_blocks; i++)
        out->free_blocks[i] = n_blocks - 1 - i; /* 0 is taken first */
    return MLORA_OK;
}

void kvcache_close(struct kvcache *kv)
{
    free(kv->free_blocks);
    *kv = (struct kvcache){0};
}

int kvcache_blocks_for(int n_tokens)
{
    return n_tokens / KV_BLOCK + (n_tokens % KV_BLOCK != 0);
}

bool kvcache_extend(struct kvcache *kv, int32_t *blocks, int *n, int n_tokens)
{
    const int need = kvcache_blocks_for(n_tokens);

    if (need - *n > kv->n_free) return false;
    while (*n < need) blocks[(*n)++] = kv->free_blocks[--kv->n_free];
    return true;
}

void kvcache_release(struct kvcache *kv, const int32_t *blocks, int *n)
{
    while (*n > 0) kv->free_blocks[kv->n_free++] = blocks[--(*n)];
}
