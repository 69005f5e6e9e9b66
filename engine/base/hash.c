#include "engine/base/hash.h"

#include <string.h>

static uint64_t rotate(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

static void rounds(uint64_t v[4], int n)
{
    for (int i = 0; i < n; i++) {
        v[0] += v[1];
        v[2] += v[3];
        v[1] = rotate(v[1], 13) ^ v[0];
        v[3] = rotate(v[3], 16) ^ v[2];
        v[0] = rotate(v[0], 32);
        v[2] += v[1];
        v[0] += v[3];
        v[1] = rotate(v[1], 17) ^ v[2];
        v[3] = rotate(v[3], 21) ^ v[0];
        v[2] = rotate(v[2], 32);
    }
}

static void add_word(struct hasher *hasher, uint64_t word)
{
    hasher->v[3] ^= word;
    rounds(hasher->v, 2);
    hasher->v[0] ^= word;
}

void hash_begin(struct hasher *hasher, struct hash_key key)
{
    *hasher = (struct hasher){.v = {
                                  key.word[0] ^ 0x736f6d6570736575u,
                                  key.word[1] ^ 0x646f72616e646f6du ^ 0xee, /* 128 bits come out */
                                  key.word[0] ^ 0x6c7967656e657261u,
                                  key.word[1] ^ 0x7465646279746573u,
                              }};
}

void hash_add(struct hasher *hasher, const void *data, size_t bytes)
{
    const unsigned char *at = data, *end = at + bytes;
    int filled = (int)(hasher->n_bytes % 8);

    hasher->n_bytes += bytes;
    while (at < end) {
        uint64_t word;
        if (filled == 0 && end - at >= 8) {
            memcpy(&word, at, 8); /* little-endian, as x86-64 is */
            add_word(hasher, word);
            at += 8;
            continue;
        }
        hasher->tail |= (uint64_t)*at++ << (8 * filled);
        if (++filled < 8) continue;
        add_word(hasher, hasher->tail);
        hasher->tail = 0;
        filled = 0;
    }
}

struct hash128 hash_end(const struct hasher *hasher)
{
    struct hasher last = *hasher;
    struct hash128 hash;

    add_word(&last, last.tail | last.n_bytes << 56);
    last.v[2] ^= 0xee;
    rounds(last.v, 4);
    hash.word[0] = last.v[0] ^ last.v[1] ^ last.v[2] ^ last.v[3];
    last.v[1] ^= 0xdd;
    rounds(last.v, 4);
    hash.word[1] = last.v[0] ^ last.v[1] ^ last.v[2] ^ last.v[3];
    return hash;
}

struct hash128 hash_bytes(struct hash_key key, const void *data, size_t bytes)
{
    struct hasher hasher;

    hash_begin(&hasher, key);
    hash_add(&hasher, data, bytes);
    return hash_end(&hasher);
}

bool hash_equal(struct hash128 a, struct hash128 b)
{
    return a.word[0] == b.word[0] && a.word[1] == b.word[1];
}
