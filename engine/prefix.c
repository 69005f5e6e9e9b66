#include "engine/prefix.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

_Static_assert(sizeof(struct prefix_key) == 32 + KV_BLOCK * sizeof(int32_t), "it has no padding");

mlora_status prefix_open(struct prefix *out, int n_blocks, struct hash_key hash_key)
{
    *out = (struct prefix){.n_buckets = 1, .hash_key = hash_key};
    while (out->n_buckets < (size_t)n_blocks) out->n_buckets *= 2;
    out->entries = calloc((size_t)n_blocks, sizeof *out->entries);
    out->buckets = malloc(out->n_buckets * sizeof *out->buckets);
    if (!out->entries || !out->buckets) {
        prefix_close(out);
        return error_set(MLORA_ENOMEM, "out of memory: what %d KV blocks hold", n_blocks);
    }
    for (size_t i = 0; i < out->n_buckets; i++) out->buckets[i] = -1;
    return MLORA_OK;
}

void prefix_close(struct prefix *prefix)
{
    free(prefix->entries);
    free(prefix->buckets);
    *prefix = (struct prefix){0};
}

static int32_t *bucket_of(const struct prefix *prefix, const struct prefix_key *key)
{
    const struct hash128 hash = hash_bytes(prefix->hash_key, key, sizeof *key);
    return &prefix->buckets[hash.word[0] & (prefix->n_buckets - 1)];
}

int32_t prefix_find(const struct prefix *prefix, const struct prefix_key *key)
{
    int32_t block = *bucket_of(prefix, key);

    while (block >= 0 && memcmp(&prefix->entries[block].key, key, sizeof *key) != 0)
        block = prefix->entries[block].next;
    return block;
}

void prefix_put(struct prefix *prefix, int32_t block, const struct prefix_key *key)
{
    struct prefix_entry *entry = &prefix->entries[block];
    int32_t *bucket = bucket_of(prefix, key);

    assert(entry->number == 0);
    *entry = (struct prefix_entry){++prefix->last_number, *key, *bucket};
    *bucket = block;
}

/* Where the list of its bucket says that it is next. */
static int32_t *link_of(const struct prefix *prefix, int32_t block)
{
    int32_t *at = bucket_of(prefix, &prefix->entries[block].key);

    while (*at != block) at = &prefix->entries[*at].next;
    return at;
}

void prefix_move(struct prefix *prefix, int32_t to, int32_t from)
{
    assert(prefix->entries[from].number != 0 && prefix->entries[to].number == 0);
    *link_of(prefix, from) = to;
    prefix->entries[to] = prefix->entries[from];
    prefix->entries[from].number = 0;
}

void prefix_drop(struct prefix *prefix, int32_t block)
{
    struct prefix_entry *entry = &prefix->entries[block];

    if (entry->number == 0) return;
    *link_of(prefix, block) = entry->next;
    entry->number = 0;
}
