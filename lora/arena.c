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

/* The first hole of `bytes` (rounded), behind *before. False: there is none. */
static bool find_hole(const struct arena *arena, int64_t bytes, struct extent **before)
{
    *before = NULL;
    while (hole_end(arena, *before) - end_of(*before) < bytes) {
        *before = *before ? (*before)->behind : arena->first;
        if (!*before) return false;
    }
    return true;
}

static void link_behind(struct arena *arena, struct extent *extent, struct extent *before)
{
    extent->at = end_of(before);
    extent->before = before;
    extent->behind = before ? before->behind : arena->first;
    if (extent->behind) extent->behind->before = extent;
    *(before ? &before->behind : &arena->first) = extent;
}

static void unlink_extent(struct arena *arena, const struct extent *extent)
{
    *(extent->before ? &extent->before->behind : &arena->first) = extent->behind;
    if (extent->behind) extent->behind->before = extent->before;
}

bool arena_take(struct arena *arena, struct extent *extent, int64_t bytes)
{
    struct extent *before;

    assert(bytes > 0);
    bytes = arena_round(bytes);
    if (!find_hole(arena, bytes, &before)) return false;
    *extent = (struct extent){.bytes = bytes};
    link_behind(arena, extent, before);
    arena->used += bytes;
    return true;
}

void arena_give(struct arena *arena, struct extent *extent)
{
    unlink_extent(arena, extent);
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

static struct extent *last_extent(const struct arena *arena)
{
    struct extent *last = arena->first;
    while (last && last->behind) last = last->behind;
    return last;
}

int64_t arena_end(const struct arena *arena)
{
    return end_of(last_extent(arena));
}

bool arena_clear(struct arena *arena, int64_t end, arena_move_fn move, void *context)
{
    struct extent *last, *before;

    while ((last = last_extent(arena)) != NULL && end_of(last) > end) {
        if (last->fixed || !find_hole(arena, last->bytes, &before) || end_of(before) >= last->at)
            break;
        const int64_t from = last->at;
        unlink_extent(arena, last);
        link_behind(arena, last, before);
        move(context, last, from);
    }
    for (struct extent *extent = arena->first; extent && arena_end(arena) > end;
         extent = extent->behind) {
        const int64_t from = extent->at, to = end_of(extent->before);
        if (extent->fixed || from == to) continue;
        extent->at = to;
        move(context, extent, from);
    }
    return arena_end(arena) <= end;
}
