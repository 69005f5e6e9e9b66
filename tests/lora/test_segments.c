#include "lora/segments.h"

#include <criterion/criterion.h>

Test(segments, sort_tokens_by_slot_and_leave_the_base_out)
{
    /* rows:  0: 2 tokens of slot 5   1: 1 of the base   2: 1 of slot 2   3: 3 of slot 5 */
    const int32_t row_slot[] = {5, -1, 2, 5}, start[] = {0, 2, 3, 4, 7};
    const struct segment_rows rows = {start, row_slot, start, 4};
    int32_t slot[7], order[7], segment_slot[5], segment_start[6], scratch[4];
    struct segments segments = {slot, order, segment_slot, segment_start, 0, 0, 0, 0, false};

    segments_build(&segments, &rows, scratch);

    const int32_t want_slot[] = {5, 5, -1, 2, 5, 5, 5};
    const int32_t want_order[] = {3, 0, 1, 4, 5, 6};
    cr_expect_arr_eq(slot, want_slot, sizeof want_slot);
    cr_expect_eq(segments.n_adapters, 2);
    cr_expect_eq(segments.n_segments, 2);
    cr_expect_eq(segments.n_tokens, 6);
    cr_expect_eq(segments.max_segment, 5);
    cr_expect_not(segments.has_base_segments);
    cr_expect_arr_eq(order, want_order, sizeof want_order);
    cr_expect_eq(segment_slot[0], 2);
    cr_expect_eq(segment_slot[1], 5);
    cr_expect_eq(segment_start[0], 0);
    cr_expect_eq(segment_start[1], 1);
    cr_expect_eq(segment_start[2], 6);
}

/* Row 0 counts from its second token on, row 1 not at all, row 2 (after the end) neither. */
Test(segments, begin_where_the_adapter_begins_to_count)
{
    const int32_t row_slot[] = {3, 1, 3}, start[] = {0, 3, 4, 6}, first[] = {1, 4, 9};
    const struct segment_rows rows = {start, row_slot, first, 3};
    int32_t slot[6], order[6], segment_slot[4], segment_start[5], scratch[3];
    struct segments segments = {slot, order, segment_slot, segment_start, 0, 0, 0, 0, false};

    segments_build(&segments, &rows, scratch);

    const int32_t want_slot[] = {-1, 3, 3, -1, -1, -1}, want_order[] = {1, 2};
    cr_expect_arr_eq(slot, want_slot, sizeof want_slot);
    cr_expect_eq(segments.n_segments, 1);
    cr_expect_eq(segments.n_tokens, 2);
    cr_expect_eq(segments.max_segment, 2);
    cr_expect_arr_eq(order, want_order, sizeof want_order);
    cr_expect_eq(segment_slot[0], 3);
    cr_expect_eq(segment_start[1], 2);
}

Test(segments, of_the_base_alone_are_none)
{
    const int32_t row_slot[] = {-1, -1}, start[] = {0, 1, 4};
    const struct segment_rows rows = {start, row_slot, start, 2};
    int32_t slot[4], order[4], segment_slot[3], segment_start[4], scratch[2];
    struct segments segments = {slot, order, segment_slot, segment_start, 9, 9, 9, 9, true};

    segments_build(&segments, &rows, scratch);
    cr_expect_eq(segments.n_adapters, 0);
    cr_expect_eq(segments.n_segments, 0);
    cr_expect_not(segments.has_base_segments);
    cr_expect_eq(segments.n_tokens, 0);
    cr_expect_eq(segments.max_segment, 0);
    for (int t = 0; t < 4; t++) cr_expect_eq(slot[t], -1);
}

enum { ROWS = 64 };

/* Rows of one token. */
struct step {
    int32_t slot[ROWS], order[ROWS], segment_slot[ROWS + 1], segment_start[ROWS + 2];
    struct segments segments;
};

static void build(struct step *step, const int32_t *row_slot, int Q)
{
    int32_t start[ROWS + 1], scratch[ROWS];
    const struct segment_rows rows = {start, row_slot, start, Q};

    for (int q = 0; q <= Q; q++) start[q] = q;
    step->segments = (struct segments){.slot = step->slot,
                                       .order = step->order,
                                       .segment_slot = step->segment_slot,
                                       .segment_start = step->segment_start};
    segments_build(&step->segments, &rows, scratch);
}

/* 9 adapters with 11 tokens, 3 of them of one; and 2 tokens of the base. */
Test(segments, are_rounded_up_by_tokens_of_the_base_and_empty_ones)
{
    const int32_t slot[] = {0, 1, 2, -1, 3, 4, 5, 6, 7, 8, 0, 0, -1};
    struct step step;

    build(&step, slot, 13);

    cr_expect_eq(step.segments.n_adapters, 9);
    cr_expect_eq(step.segments.n_segments, 10);
    cr_expect_eq(step.segments.n_tokens, 12);
    cr_expect_eq(step.segments.max_segment, 3);
    cr_expect(step.segments.has_base_segments);
    cr_expect_eq(step.segment_slot[9], -1);
    cr_expect_eq(step.segment_start[9], 11);
    cr_expect_eq(step.segment_start[10], 12);
    cr_expect_eq(step.order[11], 3, "the first of the base");

    const int32_t each[] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    build(&step, each, 9); /* there is nothing to round up with */
    cr_expect_eq(step.segments.n_segments, 9);
    cr_expect_eq(step.segments.n_tokens, 9);
    cr_expect_not(step.segments.has_base_segments);
}

/* Whatever comes and goes: every token of an adapter is in its segment once, no other is in one of an
 * adapter, and steps of 64 rows have few different counts. */
Test(segments, of_changing_steps_have_few_different_counts)
{
    enum { STEPS = 4000 };
    static bool seen[ROWS + 2][ROWS + 1][ROWS + 1];
    uint32_t state = 1;
    int n_different = 0, n_exact = 0;
    static bool seen_exact[ROWS + 1][ROWS + 1][ROWS + 1];

    for (int i = 0; i < STEPS; i++) {
        int32_t slot[ROWS];
        int n_of[ROWS] = {0}, most = 0, n_tokens = 0;
        struct step step;
        for (int q = 0; q < ROWS; q++) {
            state = state * 1664525u + 1013904223u;
            slot[q] = (int32_t)(state >> 16) % 41 - 1; /* of 40 adapters, or the base */
            if (slot[q] >= 0 && ++n_of[slot[q]] > most) most = n_of[slot[q]];
            n_tokens += slot[q] >= 0;
        }
        build(&step, slot, ROWS);

        const struct segments *got = &step.segments;
        bool in_segment[ROWS] = {false};
        cr_assert_geq(got->max_segment, most);
        cr_assert_leq(got->n_segments, ROWS + 1);
        cr_assert_eq(step.segment_start[got->n_segments], got->n_tokens);
        for (int s = 0; s < got->n_segments; s++)
            for (int j = step.segment_start[s]; j < step.segment_start[s + 1]; j++) {
                const int32_t t = step.order[j];
                cr_assert_eq(step.segment_slot[s], slot[t]);
                cr_assert_not(in_segment[t]);
                in_segment[t] = true;
            }
        for (int q = 0; q < ROWS; q++) cr_assert(slot[q] < 0 || in_segment[q]);
        bool *is_seen = &seen[got->n_segments][got->n_tokens][got->max_segment];
        n_different += !*is_seen;
        *is_seen = true;
        is_seen = &seen_exact[got->n_adapters][n_tokens][most];
        n_exact += !*is_seen;
        *is_seen = true;
    }
    cr_expect_leq(4 * n_different, n_exact, "%d, %d as they are", n_different, n_exact);
}
