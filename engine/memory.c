#include "engine/memory.h"

enum { ALIGNMENT = 256 };

struct memory_plan memory_plan(int64_t budget, int64_t block_bytes, int n_blocks, int n_kept,
                               int64_t adapter_limit)
{
    const int64_t fit = budget / block_bytes;
    struct memory_plan plan = {.n_blocks = n_blocks < fit ? n_blocks : (int)fit};

    if (plan.n_blocks < n_kept) plan.n_blocks = n_kept; /* to be refused by the device */
    const int64_t left = budget - plan.n_blocks * block_bytes;
    plan.n_kept = n_kept;
    plan.adapter_limit = adapter_limit;
    plan.adapter_bytes = left < adapter_limit ? left / ALIGNMENT * ALIGNMENT : adapter_limit;
    if (plan.adapter_bytes < 0) plan.adapter_bytes = 0;
    return plan;
}

/* Blocks that end by `bytes` from the start of the memory, the last one in part. */
static int blocks_before(const struct memory *memory, int64_t bytes)
{
    const int64_t beyond = bytes - memory->adapter_bytes;
    return beyond <= 0 ? 0 : (int)((beyond + memory->block_bytes - 1) / memory->block_bytes);
}

/* The pool reaches as far as blocks are lent. */
static void set_boundary(struct memory *memory)
{
    const int64_t end = memory->adapter_bytes + memory->kv->n_lent * memory->block_bytes;
    struct pool *pool = memory->pool;

    pool->arena.capacity = end < pool->limit ? end : pool->limit;
}

/* ---- blocks for adapters ------------------------------------------------------------------ */

/* Each running request keeps a block to grow into: what is lent comes back at the price of an
 * adapter. */
static int idle_blocks(const struct memory *memory, bool all)
{
    const struct kvcache *kv = memory->kv;
    const int n = kv->n_free - (all ? 0 : kv->n_held) - memory->scheduler->n_running;
    const int most = memory->max_lent - kv->n_lent;

    return n < 0 ? 0 : n < most ? n : most;
}

static int64_t idle_bytes(void *context, bool all)
{
    const struct memory *memory = context;
    const int64_t end = memory->adapter_bytes +
                        (memory->kv->n_lent + idle_blocks(memory, all)) * memory->block_bytes;
    const int64_t limit = memory->pool->limit;

    return (end < limit ? end : limit) - memory->pool->arena.capacity;
}

/* To a free block of the cache from one that is lent. */
static void move_block(void *context, int32_t to, int32_t from)
{
    const struct memory *memory = context;
    const size_t bytes = (size_t)memory->block_bytes;

    memory->dev->ops->copy(memory->dev, memory->cache->blocks + (size_t)to * bytes,
                           memory->cache->blocks + (size_t)from * bytes, bytes);
}

static mlora_status lend_blocks(void *context, int64_t bytes)
{
    struct memory *memory = context;
    const struct scheduler *scheduler = memory->scheduler;
    const int n = blocks_before(memory, memory->pool->arena.capacity + bytes) - memory->kv->n_lent;

    kvcache_lend(memory->kv, n, move_block, memory);
    for (int i = 0; i < scheduler->n_running; i++)
        kvcache_follow(memory->kv, &scheduler->running[i]->kv);
    set_boundary(memory);
    /* What is brought there comes beside the ops: it must not overtake those that read the blocks. */
    return memory->dev->ops->sync(memory->dev);
}

/* ---- adapters for blocks ------------------------------------------------------------------ */

/* At least n blocks if that can be, and with them all that no adapter lies in. */
static void take_back(void *context, int n)
{
    struct memory *memory = context;
    const int keep = memory->kv->n_lent - n;

    if (keep < 0) return;
    pool_clear(memory->pool, memory->adapter_bytes + keep * memory->block_bytes);
    const int needed = blocks_before(memory, arena_end(&memory->pool->arena));
    kvcache_take_back(memory->kv, memory->kv->n_lent - needed);
    set_boundary(memory);
}

void memory_share(struct memory *memory, const struct memory_plan *plan, struct device *dev,
                  const struct kv_cache *cache, struct kvcache *kv, struct scheduler *scheduler,
                  struct pool *pool)
{
    *memory = (struct memory){
        .dev = dev,
        .cache = cache,
        .kv = kv,
        .scheduler = scheduler,
        .pool = pool,
        .adapter_bytes = plan->adapter_bytes,
        .block_bytes = (int64_t)cache->stride * (int64_t)cache->part_bytes,
        .max_lent = plan->n_blocks - plan->n_kept,
    };
    const struct neighbour neighbour = {idle_bytes, lend_blocks, memory};
    pool_share(pool, plan->adapter_limit, &neighbour);
    kv->more = take_back;
    kv->context = memory;
}

int memory_free_blocks(const struct memory *memory)
{
    const int taken = blocks_before(memory, memory->pool->arena.used);
    return memory->kv->n_free + memory->kv->n_lent - taken;
}
