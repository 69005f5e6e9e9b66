#include "lora/segments.h"

/* Sort rows by slot, keeping the batch's order among equals. Rows come nearly sorted from step to
 * step and are few, so insertion is enough. */
static void sort_rows(int32_t *sorted, const struct segment_rows *rows)
{
    for (int i = 0; i < rows->Q; i++) {
        int at = i;
        for (; at > 0 && rows->slot[sorted[at - 1]] > rows->slot[i]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = i;
    }
}

void segments_build(struct segments *out, const struct segment_rows *rows, int32_t *scratch)
{
    int32_t *sorted = scratch;

    out->n_segments = 0;
    out->n_tokens = 0;
    out->max_segment = 0;
    sort_rows(sorted, rows);

    for (int i = 0; i < rows->Q; i++) {
        const int q = sorted[i];
        const int32_t slot = rows->slot[q], end = rows->start[q + 1];
        const int32_t first = slot < 0 || rows->first[q] > end ? end : rows->first[q];
        for (int t = rows->start[q]; t < end; t++) out->slot[t] = t < first ? -1 : slot;
        if (first == end) continue;

        if (out->n_segments == 0 || out->segment_slot[out->n_segments - 1] != slot) {
            out->segment_start[out->n_segments] = out->n_tokens;
            out->segment_slot[out->n_segments++] = slot;
        }
        for (int t = first; t < end; t++) out->order[out->n_tokens++] = t;
    }
    out->segment_start[out->n_segments] = out->n_tokens;
    for (int s = 0; s < out->n_segments; s++) {
        const int n = out->segment_start[s + 1] - out->segment_start[s];
        if (n > out->max_segment) out->max_segment = n;
    }
}
