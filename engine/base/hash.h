/* SipHash-2-4 with 128 bits (Aumasson and Bernstein, 2012): with a secret key, nobody can make two
 * contents of the same hash. */
#ifndef MLORA_BASE_HASH_H
#define MLORA_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct hash_key {
    uint64_t word[2];
};

struct hash128 {
    uint64_t word[2];
};

/* A hash being made: bytes are added in as many pieces as one likes. */
struct hasher {
    uint64_t v[4];
    uint64_t tail; /* bytes that do not fill a word yet */
    uint64_t n_bytes;
};

void hash_begin(struct hasher *hasher, struct hash_key key);
void hash_add(struct hasher *hasher, const void *data, size_t bytes);
struct hash128 hash_end(const struct hasher *hasher);

struct hash128 hash_bytes(struct hash_key key, const void *data, size_t bytes);
bool hash_equal(struct hash128 a, struct hash128 b);

#endif
