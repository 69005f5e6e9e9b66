/* A vocabulary: texts to ids and back. One arena of text, one open-addressing table of our own,
 * because a tokenizer has 128,000 entries and encoding looks up every character. */
#ifndef MLORA_TOKENIZER_VOCAB_H
#define MLORA_TOKENIZER_VOCAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/buffer.h"

enum { VOCAB_ID_MAX = (1 << 22) - 1 }; /* the largest id: bounds what a hostile file allocates */

struct vocab_entry {
    size_t start; /* in the arena */
    uint32_t bytes;
    int32_t id;
};

struct vocab_slot {
    uint32_t tag;  /* of the text's hash: most other texts are passed over without a look */
    int32_t entry; /* -1: free */
};

struct vocab {
    struct buffer arena;
    struct vocab_entry *entries; /* [n] in order of adding */
    int n;
    int capacity;
    struct vocab_slot *slots; /* [n_slots] */
    uint32_t n_slots;         /* a power of two; at least half are free */
    int32_t *entry_of;        /* [id_capacity] entry or -1 */
    int n_ids;                /* one past the largest id */
    int id_capacity;
    size_t max_bytes; /* of the longest text */
    uint64_t seed;    /* of the hash: a file cannot choose texts that collide */
};

/* Make room for `n` entries in all. Returns OK or ENOMEM. */
mlora_status vocab_reserve(struct vocab *vocab, int n);

/* Add a text that is not there yet under an id from 0 to VOCAB_ID_MAX that has no text yet.
 * Returns OK, EFORMAT (either is taken or out of range; the text says which) or ENOMEM. */
mlora_status vocab_add(struct vocab *vocab, const char *text, size_t bytes, int64_t id);

/* The id of a text, -1 if there is none. */
int32_t vocab_find(const struct vocab *vocab, const char *text, size_t bytes);

/* The text of an id, NULL if there is none. Lives until the next vocab_add. */
const char *vocab_text(const struct vocab *vocab, int32_t id, size_t *bytes);

void vocab_free(struct vocab *vocab); /* accepts zeroes */

/* A number that differs from run to run, for the seed of a hash. */
uint64_t hash_seed(void);

/* Spread the bits of `key`. */
static inline uint64_t hash_u64(uint64_t key, uint64_t seed)
{
    uint64_t h = (key ^ seed) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32) * 0xd6e8feb86659fd93u;
    return h ^ h >> 32;
}

#endif
