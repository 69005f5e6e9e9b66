/* What the full blocks of the KV cache hold, to find them again. A block is known by the block
 * before it, the adapter that computed it and its tokens, so that finding one says what all tokens
 * up to it were. Compared is the content itself: a hash only says where to look. */
#ifndef MLORA_ENGINE_PREFIX_H
#define MLORA_ENGINE_PREFIX_H

#include "engine/base/hash.h"
#include "engine/mlora.h"
#include "kernels/views.h" /* KV_BLOCK */

/* No padding: it is hashed as bytes. */
struct prefix_key {
    uint64_t before; /* the number of the content in the block before it; 0: it is the first */
    struct hash128 adapter; /* hash of its content; zeroes: the base model */
    int64_t adapter_from;   /* index in the block from which on the adapter counts */
    int32_t ids[KV_BLOCK];
};

struct prefix_entry {
    uint64_t number; /* of this content, never given again; 0: the block holds nothing to find */
    struct prefix_key key;
    int32_t next; /* block in the same bucket, -1: none */
};

struct prefix {
    struct prefix_entry *entries; /* [n_blocks] by block */
    int32_t *buckets;             /* [n_buckets] the first block of each, -1: none */
    size_t n_buckets;             /* a power of two */
    struct hash_key hash_key;
    uint64_t last_number;
};

mlora_status prefix_open(struct prefix *out, int n_blocks,
                         struct hash_key hash_key); /* or ENOMEM */
void prefix_close(struct prefix *prefix);           /* accepts zeroes */

/* The block that holds this content; -1: none does. */
int32_t prefix_find(const struct prefix *prefix, const struct prefix_key *key);

/* `block`, which holds nothing to find, holds this content, which no other block does. */
void prefix_put(struct prefix *prefix, int32_t block, const struct prefix_key *key);

/* What `from` holds is in `to` from now on, which held nothing to find. */
void prefix_move(struct prefix *prefix, int32_t to, int32_t from);

/* What `block` holds is no longer to be found. */
void prefix_drop(struct prefix *prefix, int32_t block);

#endif
