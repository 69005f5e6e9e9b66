#include "lora/segments.h"

#include <criterion/criterion.h>

Test(segments, sort_tokens_by_slot_and_leave_the_base_out)
{
    /* rows:  0: 2 tokens of slot 5   1: 1 of the base   2: 1 of slot 2   3: 3 of slot 5 */
    const int32_t row_slot[] = {5, -1, 2, 5}, start[] = {0, 2, 3, 4, 7};
    const struct segment_rows rows = {start, row_slot, start, 4};
    int32_t slot[7], order[7], segment_slot[4], segment_start[5], scratch[4];
    struct segments segments = {slot, order, segment_slot, segment_start, 0, 0, 0};

    segments_build(&segments, &rows, scratch);

    const int32_t want_slot[] = {5, 5, -1, 2, 5, 5, 5};
    const int32_t want_order[] = {3, 0, 1, 4, 5, 6};
    cr_expect_arr_eq(slot, want_slot, sizeof want_slot);
    cr_expect_eq(segments.n_segments, 2);
    cr_expect_eq(segments.n_tokens, 6);
    cr_expect_eq(segments.max_segment, 5);
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
    int32_t slot[6], order[6], segment_slot[3], segment_start[4], scratch[3];
    struct segments segments = {slot, order, segment_slot, segment_start, 0, 0, 0};

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
    int32_t slot[4], order[4], segment_slot[2], segment_start[3], scratch[2];
    struct segments segments = {slot, order, segment_slot, segment_start, 9, 9, 9};

    segments_build(&segments, &rows, scratch);
    cr_expect_eq(segments.n_segments, 0);
    cr_expect_eq(segments.n_tokens, 0);
    cr_expect_eq(segments.max_segment, 0);
    for (int t = 0; t < 4; t++) cr_expect_eq(slot[t], -1);
}
