#include "lora/arena.h"

#include <criterion/criterion.h>
#include <string.h>

enum { CAPACITY = 256 * 100, EXTENTS = 24 };

/* Extents are in order, apart, and add up. */
static void check(const struct arena *arena)
{
    int64_t end = 0, used = 0;
    for (const struct extent *e = arena->first, *before = NULL; e; before = e, e = e->behind) {
        cr_assert_eq(e->before, before);
        cr_assert_geq(e->at, end);
        cr_assert_eq(e->at % 256, 0);
        end = e->at + e->bytes;
        used += e->bytes;
    }
    cr_assert_leq(end, arena->capacity);
    cr_assert_eq(used, arena->used);
}

static int n_moves;

static void count_move(void *context, struct extent *extent, int64_t from)
{
    (void)context;
    cr_assert_lt(extent->at, from);
    n_moves++;
}

Test(arena, takes_the_first_hole_and_rounds_to_256_bytes)
{
    struct arena arena = {.capacity = 2560};
    struct extent a, b, c, d;

    cr_assert(arena_take(&arena, &a, 1));
    cr_assert(arena_take(&arena, &b, 257));
    cr_assert(arena_take(&arena, &c, 512));
    cr_expect_eq(a.at, 0);
    cr_expect_eq(b.at, 256);
    cr_expect_eq(b.bytes, 512);
    cr_expect_eq(c.at, 768);
    arena_give(&arena, &b);
    cr_assert(arena_take(&arena, &d, 512));
    cr_expect_eq(d.at, 256);
    cr_expect_eq(arena.used, 1280);
    cr_expect_not(arena_take(&arena, &b, 1281));
    cr_assert(arena_take(&arena, &b, 1280));
    check(&arena);
}

Test(arena, is_cleared_from_the_end_by_the_fewest_moves)
{
    struct arena arena = {.capacity = 256 * 10};
    struct extent e[6];

    for (int i = 0; i < 5; i++) cr_assert(arena_take(&arena, &e[i], 512));
    arena_give(&arena, &e[1]);
    n_moves = 0;
    cr_expect(arena_clear(&arena, 256 * 8, count_move, NULL));
    cr_expect_eq(n_moves, 1, "the last went into the hole");
    cr_expect_eq(e[4].at, 512);
    cr_expect_eq(arena_end(&arena), 256 * 8);
    check(&arena);

    arena_give(&arena, &e[0]);
    arena_give(&arena, &e[4]); /* 0 to 1023 is free, 2 and 3 follow */
    cr_assert(arena_take(&arena, &e[5], 1024));
    arena_give(&arena, &e[2]);
    n_moves = 0;
    e[3].fixed = true;
    cr_expect_not(arena_clear(&arena, 256 * 6, count_move, NULL), "the last may not move");
    cr_expect_eq(n_moves, 0);
    e[3].fixed = false;
    cr_expect(arena_clear(&arena, 256 * 6, count_move, NULL));
    cr_expect_eq(e[3].at, 1024);
    check(&arena);

    arena_give(&arena, &e[3]); /* no hole is large enough for the last: all move up */
    arena_give(&arena, &e[5]);
    cr_assert(arena_take(&arena, &e[0], 256));
    cr_assert(arena_take(&arena, &e[1], 256));
    cr_assert(arena_take(&arena, &e[2], 256));
    cr_assert(arena_take(&arena, &e[3], 512));
    arena_give(&arena, &e[1]);
    n_moves = 0;
    cr_expect(arena_clear(&arena, 256 * 4, count_move, NULL));
    cr_expect_eq(n_moves, 2);
    cr_expect_eq(e[2].at, 256);
    cr_expect_eq(e[3].at, 512);
    cr_expect(arena_clear(&arena, 256 * 4, count_move, NULL), "nothing is left to do");
    cr_expect_eq(n_moves, 2);
    cr_expect_not(arena_clear(&arena, 256 * 3, count_move, NULL));
    check(&arena);
}

Test(arena, moves_around_what_is_fixed)
{
    struct arena arena = {.capacity = 256 * 8};
    struct extent e[8], big;

    for (int i = 0; i < 8; i++) cr_assert(arena_take(&arena, &e[i], 256));
    for (int i = 0; i < 8; i += 2) arena_give(&arena, &e[i]); /* 1, 3, 5, 7 stay */
    e[3].fixed = true;
    n_moves = 0;
    cr_assert(arena_compact(&arena, 256 * 2, count_move, NULL));
    cr_expect_eq(n_moves, 1); /* 1 to 0, and 2 slots before 3 */
    cr_expect_eq(e[3].at, 256 * 3);
    cr_expect(arena_take(&arena, &big, 256 * 2));
    check(&arena);
    cr_expect_not(arena_compact(&arena, 256 * 3, count_move, NULL), "two are free");
    cr_expect(arena_compact(&arena, 256 * 2, count_move, NULL));
    check(&arena);
}

/* Whatever was taken and given before: what fits by its sum fits. */
Test(arena, never_loses_room_to_scattering)
{
    struct arena arena = {.capacity = CAPACITY};
    struct extent e[EXTENTS];
    bool taken[EXTENTS] = {false};
    unsigned seed = 1;
    int n_compacted = 0;

    memset(e, 0, sizeof e);
    for (int step = 0; step < 20000; step++) {
        seed = seed * 1664525u + 1013904223u;
        const int i = (int)(seed >> 8) % EXTENTS;
        const int64_t bytes = 1 + (seed >> 4) % (256 * 12);
        if (taken[i]) {
            arena_give(&arena, &e[i]);
            taken[i] = false;
        } else {
            const bool fits = arena.capacity - arena.used >= arena_round(bytes);
            taken[i] = arena_take(&arena, &e[i], bytes);
            if (!taken[i] && fits) {
                cr_assert(arena_compact(&arena, bytes, count_move, NULL));
                taken[i] = arena_take(&arena, &e[i], bytes);
                n_compacted++;
            }
            cr_assert_eq(taken[i], fits);
        }
        check(&arena);
    }
    cr_expect_gt(n_compacted, 100);
}
