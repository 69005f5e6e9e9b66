#include "lora/pool.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { FIRST_SLOTS = 8 };

static size_t slot_factors(const struct pool *pool)
{
    return ((size_t)pool->n_layers + 1) * LORA_LINEARS;
}

mlora_status pool_open(struct pool *out, struct device *dev, int n_layers, char *memory,
                       int64_t capacity)
{
    *out = (struct pool){
        .dev = dev, .memory = memory, .limit = capacity, .n_layers = n_layers, .step = 1};
    out->arena.capacity = capacity;
    out->norms = calloc((size_t)n_layers * LORA_NORMS + 1, sizeof *out->norms);
    if (!out->norms) return error_set(MLORA_ENOMEM, "out of memory: a pool of adapters");
    return MLORA_OK;
}

void pool_close(struct pool *pool)
{
    if (pool->dev_table) pool->dev->ops->free(pool->dev, pool->dev_table);
    if (pool->dev_own) pool->dev->ops->free(pool->dev, pool->dev_own);
    free(pool->list);
    free(pool->slot_taken);
    free(pool->table);
    free(pool->own);
    free(pool->norms);
    *pool = (struct pool){0};
}

void pool_share(struct pool *pool, int64_t limit, const struct neighbour *neighbour)
{
    assert(limit >= pool->arena.capacity);
    pool->limit = limit;
    pool->neighbour = *neighbour;
}

char *pool_address(const struct pool *pool, const struct resident *resident)
{
    return pool->memory + resident->extent.at;
}

/* ---- tables ------------------------------------------------------------------------------- */

/* A table of twice the size, on the host and on the device, with the `used` bytes of the old one,
 * which is freed. On failure the old one stays. */
static mlora_status grow(struct device *dev, void **host, void **on_device, size_t used,
                         size_t bytes)
{
    void *new_host = calloc(1, bytes), *new_device = NULL;

    const mlora_status status =
        new_host
            ? dev->ops->alloc(dev, bytes, &new_device)
            : error_set(MLORA_ENOMEM, "out of memory: a table of %zu bytes for adapters", bytes);
    if (status != MLORA_OK) {
        free(new_host);
        return status;
    }
    if (used) memcpy(new_host, *host, used);
    dev->ops->upload(dev, new_device, new_host, bytes);
    if (*on_device) dev->ops->free(dev, *on_device);
    free(*host);
    *host = new_host;
    *on_device = new_device;
    return MLORA_OK;
}

/* Twice as many slots. */
static mlora_status grow_tables(struct pool *pool)
{
    struct device *dev = pool->dev;
    const size_t old = (size_t)pool->n_slots;
    const size_t n = old ? 2 * old : FIRST_SLOTS;
    const size_t per_slot = slot_factors(pool) * sizeof *pool->table;
    void *table = pool->table, *dev_table = pool->dev_table;
    void *own = pool->own, *dev_own = pool->dev_own;

    bool *taken = realloc(pool->slot_taken, n * sizeof *taken);
    if (!taken) return error_set(MLORA_ENOMEM, "out of memory: a table for %zu adapters", n);
    pool->slot_taken = taken;
    mlora_status status = grow(dev, &table, &dev_table, old * per_slot, n * per_slot);
    pool->table = table;
    pool->dev_table = dev_table;
    if (status != MLORA_OK) return status;
    status = grow(dev, &own, &dev_own, old * sizeof *pool->own, n * sizeof *pool->own);
    pool->own = own;
    pool->dev_own = dev_own;
    if (status != MLORA_OK) return status;
    memset(taken + old, 0, (n - old) * sizeof *taken);
    pool->n_slots = (int)n;
    return MLORA_OK;
}

/* The first free slot; may grow the tables. */
static mlora_status find_slot(struct pool *pool, int *slot)
{
    for (*slot = 0; *slot < pool->n_slots; (*slot)++)
        if (!pool->slot_taken[*slot]) return MLORA_OK;
    return grow_tables(pool);
}

static mlora_status reserve_list(struct pool *pool)
{
    if (pool->n < pool->list_capacity) return MLORA_OK;
    const int capacity = pool->list_capacity ? 2 * pool->list_capacity : FIRST_SLOTS;
    struct resident **list = realloc(pool->list, (size_t)capacity * sizeof(*list));
    if (!list) return error_set(MLORA_ENOMEM, "out of memory: %d adapters", capacity);
    pool->list = list;
    pool->list_capacity = capacity;
    return MLORA_OK;
}

/* Say in the tables where it is. */
static void write_slot(struct pool *pool, const struct resident *resident)
{
    const struct kernels *op = pool->dev->ops;
    const struct adapter *adapter = resident->adapter;
    const size_t n = slot_factors(pool), slot = (size_t)resident->slot;
    struct lora_factors *factors = pool->table + slot * n;
    struct lora_own *own = &pool->own[slot];

    adapter_place(adapter, pool_address(pool, resident), factors, own, pool->norms);
    op->upload(pool->dev, pool->dev_table + slot * n, factors, n * sizeof *factors);
    op->upload(pool->dev, pool->dev_own + slot, own, sizeof *own);
    if (own->norms)
        op->upload(pool->dev, (void *)(uintptr_t)own->norms, pool->norms,
                   ((size_t)pool->n_layers * LORA_NORMS + 1) * sizeof *pool->norms);
}

/* ---- room --------------------------------------------------------------------------------- */

void pool_remove(struct pool *pool, struct resident *resident)
{
    assert(resident->state != RESIDENT_AWAY);
    for (int i = 0; i < pool->n; i++)
        if (pool->list[i] == resident) {
            pool->list[i] = pool->list[--pool->n];
            break;
        }
    pool->slot_taken[resident->slot] = false;
    arena_give(&pool->arena, &resident->extent);
    resident->state = RESIDENT_AWAY;
    resident->slot = -1;
}

static bool may_leave(const struct pool *pool, const struct resident *resident, bool force)
{
    return resident->state == RESIDENT_HERE && !resident->pinned &&
           resident->kept_at != pool->step && (force || atomic_load(&resident->users) == 0);
}

/* Who leaves next: one that nobody waits for, else the one that was asked for longest ago. */
static struct resident *victim(const struct pool *pool, bool force)
{
    struct resident *oldest = NULL;
    bool oldest_wanted = false;

    for (int i = 0; i < pool->n; i++) {
        struct resident *one = pool->list[i];
        if (!may_leave(pool, one, force)) continue;
        const bool wanted = atomic_load(&one->users) > 0;
        if (oldest && (wanted != oldest_wanted ? wanted : one->used_at >= oldest->used_at))
            continue;
        oldest = one;
        oldest_wanted = wanted;
    }
    return oldest;
}

/* Bytes of those that may leave. */
static int64_t leaving_bytes(const struct pool *pool, bool force)
{
    int64_t bytes = 0;
    for (int i = 0; i < pool->n; i++)
        if (may_leave(pool, pool->list[i], force)) bytes += pool->list[i]->extent.bytes;
    return bytes;
}

/* What the neighbour could lend. */
static int64_t idle_bytes(const struct pool *pool, bool all)
{
    const struct neighbour *neighbour = &pool->neighbour;
    return neighbour->idle ? neighbour->idle(neighbour->context, all) : 0;
}

/* Let others leave until no more than `used` bytes are used, or none may leave. */
static void evict(struct pool *pool, int64_t used, bool force)
{
    while (pool->arena.used > used) {
        struct resident *leaving = victim(pool, force);
        if (!leaving) return;
        pool_remove(pool, leaving);
        pool->n_evictions++;
    }
}

/* Borrow what is missing for `bytes` more, as far as it is idle. */
static mlora_status borrow(struct pool *pool, int64_t bytes, bool all)
{
    const int64_t missing = bytes - (pool->arena.capacity - pool->arena.used);
    const int64_t idle = missing > 0 ? idle_bytes(pool, all) : 0;

    if (idle <= 0) return MLORA_OK;
    return pool->neighbour.lend(pool->neighbour.context, missing < idle ? missing : idle);
}

/* Room for `bytes`, from where it is missed least; `*made` says if there is. */
static mlora_status make_room(struct pool *pool, int64_t bytes, bool force, bool *made)
{
    const struct arena *arena = &pool->arena;
    const int64_t room =
        arena->capacity - arena->used + idle_bytes(pool, true) + leaving_bytes(pool, force);

    *made = false;
    if (room < bytes) return MLORA_OK;
    mlora_status status = borrow(pool, bytes, false);
    evict(pool, arena->capacity - bytes, false);
    if (status == MLORA_OK) status = borrow(pool, bytes, true);
    if (force) evict(pool, arena->capacity - bytes, true);
    /* else another thread wants one since a moment ago */
    *made = arena->capacity - arena->used >= bytes;
    return status;
}

static void move(void *context, struct extent *extent, int64_t from)
{
    struct pool *pool = context;
    const struct resident *resident =
        (struct resident *)(void *)((char *)extent - offsetof(struct resident, extent));

    pool->dev->ops->move(pool->dev, pool->memory + extent->at, pool->memory + from,
                         (size_t)extent->bytes);
    write_slot(pool, resident);
    pool->n_moves++;
}

mlora_status pool_place(struct pool *pool, struct resident *resident, bool force, bool *placed)
{
    const int64_t bytes = arena_round(resident->adapter->bytes);
    struct arena *arena = &pool->arena;
    int slot = 0;

    assert(resident->state == RESIDENT_AWAY);
    *placed = false;
    bool made = false;
    mlora_status status = make_room(pool, bytes, force, &made);
    if (status != MLORA_OK || !made) return status;
    status = find_slot(pool, &slot);
    if (status == MLORA_OK) status = reserve_list(pool);
    if (status != MLORA_OK) return status;

    if (!arena_take(arena, &resident->extent, bytes)) {
        const int64_t n_moves = pool->n_moves;
        const bool fits = arena_compact(arena, bytes, move, pool);
        /* The copies to come run beside the ops: they must not overtake the moves. */
        if (pool->n_moves != n_moves) status = pool->dev->ops->sync(pool->dev);
        if (status != MLORA_OK || !fits) return status;
        arena_take(arena, &resident->extent, bytes);
    }
    resident->extent.fixed = true; /* until it has arrived */
    pool->slot_taken[slot] = true;
    pool->list[pool->n++] = resident;
    resident->slot = slot;
    resident->state = RESIDENT_COMING;
    *placed = true;
    return MLORA_OK;
}

bool pool_clear(struct pool *pool, int64_t capacity)
{
    if (pool->arena.used - leaving_bytes(pool, false) > capacity) return false;
    evict(pool, capacity, false);
    return arena_clear(&pool->arena, capacity, move, pool);
}

void pool_arrived(struct pool *pool, struct resident *resident)
{
    assert(resident->state == RESIDENT_COMING);
    resident->state = RESIDENT_HERE;
    resident->extent.fixed = false;
    write_slot(pool, resident);
}
