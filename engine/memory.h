/* One budget of device memory for adapters and KV blocks: adapters lie in its first bytes, blocks in
 * the rest, and the boundary between the two moves. Who is short takes first what the other does not
 * use at all, then lets go of what it keeps only in case it is needed again (adapters that nobody
 * waits for, blocks that can be found by content), then takes the other's of that kind. What a
 * request uses is not taken from it here.
 *
 * Between steps only, in the order of the device's ops. Thread: the engine's. */
#ifndef MLORA_ENGINE_MEMORY_H
#define MLORA_ENGINE_MEMORY_H

#include "engine/kvcache.h"
#include "engine/scheduler.h"
#include "lora/pool.h"
#include "model/forward.h"

/* How the budget is cut. */
struct memory_plan {
    int n_blocks;          /* of KV at most */
    int n_kept;            /* of those: never lent, so that one sequence always fits */
    int64_t adapter_bytes; /* before the first block: never KV's */
    int64_t adapter_limit; /* for adapters at most */
};

struct memory {
    struct device *dev;
    const struct kv_cache *cache;
    struct kvcache *kv;
    struct scheduler *scheduler; /* whose running requests have blocks */
    struct pool *pool;
    int64_t adapter_bytes, block_bytes;
    int max_lent; /* blocks */
};

/* Share `budget` bytes out. `n_blocks` of `block_bytes` bytes are as many as KV can use, of which
 * n_kept are kept; adapters take up to `adapter_limit`, and what KV cannot use. */
struct memory_plan memory_plan(int64_t budget, int64_t block_bytes, int n_blocks, int n_kept,
                               int64_t adapter_limit);

/* Let the pool and the cache lend each other memory. All are borrowed, and open already. */
void memory_share(struct memory *memory, const struct memory_plan *plan, struct device *dev,
                  const struct kv_cache *cache, struct kvcache *kv, struct scheduler *scheduler,
                  struct pool *pool);

/* Blocks that no request uses and no adapter lies in. */
int memory_free_blocks(const struct memory *memory);

#endif
