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

/* Up to 8 the number itself, then the next of four steps to each power of two, at most a quarter more:
 * 20 different ones up to 64. */
static int round_up(int n)
{
    int step = 1;
    while (8 * step < n) step *= 2;
    return (n + step - 1) / step * step;
}

static int min_int(int a, int b)
{
    return a < b ? a : b;
}

static void round_counts(struct segments *out, const struct segment_rows *rows)
{
    const int T = rows->start[rows->Q], n_tokens = min_int(round_up(out->n_tokens), T);

    out->n_adapters = out->n_segments;
    if (out->n_adapters == 0) return;
    out->has_base_segments = out->n_tokens < n_tokens;
    if (out->has_base_segments) out->segment_slot[out->n_segments++] = -1;
    for (int t = 0; out->n_tokens < n_tokens; t++)
        if (out->slot[t] < 0) out->order[out->n_tokens++] = t;
    const int n_segments = round_up(out->n_segments);
    out->segment_start[out->n_segments] = out->n_tokens;
    while (out->n_segments < n_segments && out->n_segments < rows->Q) {
        out->segment_slot[out->n_segments++] = -1;
        out->segment_start[out->n_segments] = out->n_tokens;
    }
    out->max_segment = min_int(round_up(out->max_segment), T);
}

void segments_build(struct segments *out, const struct segment_rows *rows, int32_t *scratch)
{
    int32_t *sorted = scratch;

    out->n_segments = 0;
    out->n_tokens = 0;
    out->max_segment = 0;
    out->has_base_segments = false;
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
    round_counts(out, rows);
}
