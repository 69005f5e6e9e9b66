#include "lora/arena.h"

#include <assert.h>
#include <stddef.h>

enum { ALIGNMENT = 256 };

int64_t arena_round(int64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int64_t end_of(const struct extent *extent)
{
    return extent ? extent->at + extent->bytes : 0;
}

/* Where the hole behind `extent` (NULL: before the first) ends. */
static int64_t hole_end(const struct arena *arena, const struct extent *extent)
{
    const struct extent *next = extent ? extent->behind : arena->first;
    return next ? next->at : arena->capacity;
}

bool arena_take(struct arena *arena, struct extent *extent, int64_t bytes)
{
    struct extent *before = NULL;

    assert(bytes > 0);
    bytes = arena_round(bytes);
    while (hole_end(arena, before) - end_of(before) < bytes) {
        before = before ? before->behind : arena->first;
        if (!before) return false;
    }
    *extent = (struct extent){.at = end_of(before), .bytes = bytes, .before = before};
    extent->behind = before ? before->behind : arena->first;
    if (extent->behind) extent->behind->before = extent;
    if (before)
        before->behind = extent;
    else
        arena->first = extent;
    arena->used += bytes;
    return true;
}

void arena_give(struct arena *arena, struct extent *extent)
{
    if (extent->before)
        extent->before->behind = extent->behind;
    else
        arena->first = extent->behind;
    if (extent->behind) extent->behind->before = extent->before;
    arena->used -= extent->bytes;
    *extent = (struct extent){0};
}

bool arena_compact(struct arena *arena, int64_t bytes, arena_move_fn move, void *context)
{
    struct extent *before = NULL;

    bytes = arena_round(bytes);
    if (arena->capacity - arena->used < bytes) return false;
    while (hole_end(arena, before) - end_of(before) < bytes) {
        struct extent *extent = before ? before->behind : arena->first;
        if (!extent) return false;
        const int64_t from = extent->at, to = end_of(before);
        if (!extent->fixed && from != to) {
            extent->at = to;
            move(context, extent, from);
        }
        before = extent;
    }
    return true;
}
