/* Which adapters are on the device. The pool is one block of device memory in which adapters of any
 * rank and any targets lie side by side, each in exactly its bytes (arena.h), and the tables that the
 * LoRA kernels read: a slot for each adapter that is there. The least recently used one leaves when
 * room is needed; one that is pinned, kept for this step or on its way stays. How far the block
 * reaches may change: what lies behind it belongs to a neighbour, and each lends the other what it
 * does not need.
 *
 * Moving and leaving happen between steps, in the order of the device's ops: what a step reads stays
 * where it is until the step is over. Thread: the engine's, for all of it. */
#ifndef MLORA_LORA_POOL_H
#define MLORA_LORA_POOL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "lora/adapter.h"
#include "lora/arena.h"

enum residence { RESIDENT_AWAY, RESIDENT_COMING, RESIDENT_HERE };

/* What the pool knows of an adapter; part of a larger struct that does not move. */
struct resident {
    const struct adapter *adapter;
    enum residence state;
    int slot; /* of the tables; -1 while it is away */
    struct extent extent;
    uint64_t kept_at; /* the step that it must not leave before the end of */
    uint64_t used_at; /* the step in which it was asked for last */
    atomic_int users; /* requests that hold it: one that nobody waits for leaves first */
    bool pinned;
};

/* Whose memory begins where the pool's ends. */
struct neighbour {
    /* Bytes by which the pool could grow: with what could still be of use there, or without. NULL:
     * there is no neighbour. */
    int64_t (*idle)(void *context, bool all);
    /* Grow by at least `bytes`, which are idle: sets arena.capacity. Returns OK or EDEVICE. */
    mlora_status (*lend)(void *context, int64_t bytes);
    void *context;
};

struct pool {
    struct device *dev;
    struct arena arena;
    char *memory;  /* device: [limit], borrowed */
    int64_t limit; /* of arena.capacity */
    struct neighbour neighbour;
    struct resident **list; /* [n] that are here or coming */
    int n, list_capacity;
    uint64_t step;
    uint64_t full_at; /* the step in which no more room could be made */

    int n_layers, n_slots;
    bool *slot_taken;               /* [n_slots]                                       */
    struct lora_factors *table;     /* [n_slots, L + 1, LORA_LINEARS] host copy of...  */
    struct lora_factors *dev_table; /* ... the table that kernels read                 */
    struct lora_own *own, *dev_own; /* [n_slots] the same                              */
    const float **norms;            /* [L * LORA_NORMS + 1] host, of the one being written */

    int64_t n_evictions, n_moves;
};

/* `memory`, device [capacity], is borrowed. Returns OK or ENOMEM. */
mlora_status pool_open(struct pool *out, struct device *dev, int n_layers, char *memory,
                       int64_t capacity);
void pool_close(struct pool *pool); /* accepts zeroes */

/* From now on the capacity is between what it is and `limit`: `neighbour`, copied, has the rest. */
void pool_share(struct pool *pool, int64_t limit, const struct neighbour *neighbour);

/* Let those leave that nobody waits for, and move the others, until all are in the first `capacity`
 * bytes, and the rest is free. False: too many are in use; as a rule, none has left then. */
bool pool_clear(struct pool *pool, int64_t capacity);

/* Find room and a slot for one that is away, letting others leave: those that nobody waits for, and
 * with `force` also others that are not kept in this step. It is coming then, at
 * pool_address(); `*placed` says if there was room. Returns OK, ENOMEM (of the tables) or EDEVICE. */
mlora_status pool_place(struct pool *pool, struct resident *resident, bool force, bool *placed);
char *pool_address(const struct pool *pool, const struct resident *resident);

/* Its image has arrived: from now on steps may use its slot. */
void pool_arrived(struct pool *pool, struct resident *resident);

/* Let it leave, whether it is here or coming; nothing writes or reads it any more. */
void pool_remove(struct pool *pool, struct resident *resident);

/* It stays until the next step begins. */
static inline void pool_keep(const struct pool *pool, struct resident *resident)
{
    resident->kept_at = resident->used_at = pool->step;
}

#endif
