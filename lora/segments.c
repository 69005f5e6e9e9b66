#include "lora/segments.h"

/* Sort rows by slot, keeping the batch's order among equals. Rows come nearly sorted from step to
 * step and are few, so insertion is enough. */
static void sort_rows(int32_t *rows, const int32_t *slot_of_row, int Q)
{
    for (int i = 0; i < Q; i++) {
        int at = i;
        for (; at > 0 && slot_of_row[rows[at - 1]] > slot_of_row[i]; at--) rows[at] = rows[at - 1];
        rows[at] = i;
    }
}

void segments_build(struct segments *out, const int32_t *slot_of_row, const int32_t *row_start,
                    int Q, int32_t *scratch)
{
    int32_t *rows = scratch;

    out->n_segments = 0;
    out->n_tokens = 0;
    out->max_segment = 0;
    sort_rows(rows, slot_of_row, Q);

    for (int i = 0; i < Q; i++) {
        const int q = rows[i];
        const int32_t slot = slot_of_row[q];
        for (int t = row_start[q]; t < row_start[q + 1]; t++) out->slot[t] = slot;
        if (slot < 0) continue;

        if (out->n_segments == 0 || out->segment_slot[out->n_segments - 1] != slot) {
            out->segment_start[out->n_segments] = out->n_tokens;
            out->segment_slot[out->n_segments++] = slot;
        }
        for (int t = row_start[q]; t < row_start[q + 1]; t++) out->order[out->n_tokens++] = t;
    }
    out->segment_start[out->n_segments] = out->n_tokens;
    for (int s = 0; s < out->n_segments; s++) {
        const int n = out->segment_start[s + 1] - out->segment_start[s];
        if (n > out->max_segment) out->max_segment = n;
    }
}
