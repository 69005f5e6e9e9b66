/* Room in one large block of memory, on paper: extents of exact sizes, none padded to another's.
 * The first hole that is large enough is taken. When only the sum of the holes is large enough,
 * extents are moved together: so free room is never lost to its being scattered. */
#ifndef MLORA_LORA_ARENA_H
#define MLORA_LORA_ARENA_H

#include <stdbool.h>
#include <stdint.h>

struct extent {
    int64_t at, bytes;
    bool fixed;                     /* may not be moved now */
    struct extent *before, *behind; /* in order of `at` */
};

struct arena {
    int64_t capacity, used; /* bytes */
    struct extent *first;
};

/* Bytes that an extent takes: rounded up to 256. */
int64_t arena_round(int64_t bytes);

/* Put `extent`, which the caller owns and which stays in place until arena_give(), into the first
 * hole of `bytes`. False: there is no such hole. */
bool arena_take(struct arena *arena, struct extent *extent, int64_t bytes);
void arena_give(struct arena *arena, struct extent *extent);

/* Move extents that are not fixed towards the front, until there is a hole of `bytes`. `move` is
 * called in an order in which each move only writes what is free or its own. True: there is one. */
typedef void (*arena_move_fn)(void *context, struct extent *extent, int64_t from);
bool arena_compact(struct arena *arena, int64_t bytes, arena_move_fn move, void *context);

/* Move extents to the front until all end by `end`: the last ones into holes that they fit, or else
 * all of them together. False: some that are fixed do not. */
bool arena_clear(struct arena *arena, int64_t end, arena_move_fn move, void *context);
int64_t arena_end(const struct arena *arena); /* of the last extent */

#endif
