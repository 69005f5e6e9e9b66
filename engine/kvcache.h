/* KV blocks on paper: which are free, which are used and by how many. No device memory here.
 *
 * With prefix sharing, full blocks are remembered by content, also after their last user has gone:
 * a free block keeps what it holds until it is taken for something else, the least recently used
 * one first. Only full blocks are shared, and full blocks are never written again, so nobody ever
 * has to copy one.
 *
 * The first blocks may be lent: their memory serves for something else (memory.h). */
#ifndef MLORA_ENGINE_KVCACHE_H
#define MLORA_ENGINE_KVCACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/mlora.h"
#include "engine/prefix.h"

struct kv_block {
    int32_t n_users;    /* 0: it is free, and in the list of those */
    int32_t prev, next; /* in that list; -1: an end */
};

struct kvcache {
    struct kv_block *blocks;       /* [n_blocks] */
    int32_t first_free, last_free; /* taken from the first; -1: none */
    int n_free;
    int n_held; /* of those: they can still be found by content */
    int n_blocks;
    int n_lent; /* of those, the first ones: neither free nor used. The `next` of one that was used */
                /* then is where what it held is now                                             */
    bool shares;
    struct prefix prefix; /* where it shares */

    /* Called when n blocks are too few: gives lent ones back, if it can. NULL: nothing is lent. */
    void (*more)(void *context, int n);
    void *context; /* of `more` */
};

/* The blocks of one sequence. Its owner reserves the room. */
struct kv_run {
    int32_t *blocks; /* [n_blocks] */
    int n_blocks;
    int n_known;     /* blocks at the front that are remembered by content... */
    uint64_t number; /* ... and the number of the last one's */
};

/* What a sequence's keys and values are computed from. */
struct kv_source {
    const int32_t *ids;
    struct hash128 adapter; /* zeroes: the base model */
    int adapter_from;       /* position from which on it counts, and before it the base */
};

/* `shares`: blocks are found by content; `hash_key` is a secret. Returns OK or ENOMEM. */
mlora_status kvcache_open(struct kvcache *out, int n_blocks, bool shares, struct hash_key hash_key);
void kvcache_close(struct kvcache *kv); /* accepts zeroes */

/* Blocks that hold `n_tokens`. */
int kvcache_blocks_for(int n_tokens);

/* Fill an empty run with blocks that hold the first of the source's `n_tokens`, as many as are
 * found. The last of them is left out, as somebody has to compute what follows it. Returns the
 * number of tokens found. */
int kvcache_find(struct kvcache *kv, struct kv_run *run, const struct kv_source *source,
                 int n_tokens);

/* Whether n blocks are free, after `more` was asked for what is missing. */
bool kvcache_want(struct kvcache *kv, int n);

/* Extend a run to hold `n_tokens`; false, and nothing taken, if too few blocks are free. */
bool kvcache_extend(struct kvcache *kv, struct kv_run *run, int n_tokens);

/* The first `n_tokens` of the source are computed and will not be taken back: remember the blocks
 * that they fill. A block whose content another has already is exchanged for that one. */
void kvcache_remember(struct kvcache *kv, struct kv_run *run, const struct kv_source *source,
                      int n_tokens);

/* Give back what a run has beyond `n_tokens`, which are at least those that are remembered. */
void kvcache_trim(struct kvcache *kv, struct kv_run *run, int n_tokens);

/* Give all back; the run is empty then. */
void kvcache_release(struct kvcache *kv, struct kv_run *run);

/* Lend the first n blocks that are not lent; at least n are free. What is in use among them is first
 * moved to others, by `move`; then kvcache_follow() is due for every run. */
typedef void (*kv_move_fn)(void *context, int32_t to, int32_t from);
void kvcache_lend(struct kvcache *kv, int n, kv_move_fn move, void *context);
void kvcache_follow(const struct kvcache *kv, struct kv_run *run);

/* The last n blocks that were lent are free again. */
void kvcache_take_back(struct kvcache *kv, int n);

#endif
