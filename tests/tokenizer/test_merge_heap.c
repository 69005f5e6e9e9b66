/* The order in which pairs come off the heap. */
#include <criterion/criterion.h>

#include "tokenizer/merge_heap.h"

Test(merge_heap, gives_the_lowest_order_first_and_the_leftmost_of_equals)
{
    enum { N = 1000 };
    struct merge_heap heap = {0};
    uint32_t word = 1;

    for (int i = 0; i < N; i++) {
        word = word * 1664525u + 1013904223u;
        const struct merge_candidate pair = {word >> 28, (int32_t)(word >> 8 & 0xffff), word};
        cr_assert_eq(merge_heap_push(&heap, pair), MLORA_OK);
    }
    struct merge_candidate last = merge_heap_pop(&heap);
    for (int i = 1; i < N; i++) {
        const struct merge_candidate next = merge_heap_pop(&heap);
        cr_assert(last.order < next.order || (last.order == next.order && last.left <= next.left));
        cr_assert_eq(next.order, next.result >> 28); /* all of a pair has moved */
        last = next;
    }
    cr_expect_eq(heap.n, 0);
    merge_heap_free(&heap);
}
