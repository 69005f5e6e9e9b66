/* From rows to tokens: which they are, where each one stands, and how much it may see. */
#include "kernels/cpu/device.h"

void cpu_metadata(struct device *dev, const struct batch_view *batch)
{
    (void)dev;
    for (int q = 0; q < batch->Q; q++) {
        const int n = batch->row_start[q + 1] - batch->row_start[q];
        for (int j = 0; j < n; j++) {
            batch->row[batch->row_start[q] + j] = q;
            batch->position[batch->row_start[q] + j] = batch->kv_len[q] - n + j;
        }
    }
    for (int t = 0; batch->drawn && t < batch->T; t++) {
        if (batch->ids[t] >= 0) continue;
        const int32_t id = batch->drawn[-1 - batch->ids[t]];
        batch->ids[t] = id < 0 ? 0 : id;
    }
}

/* ---- draft and extend --------------------------------------------------------------------- */

static int32_t length_at(const struct extend_view *extend, const void *lengths, int b)
{
    return extend->has_int64_lengths ? (int32_t)((const int64_t *)lengths)[b]
                                     : ((const int32_t *)lengths)[b];
}

static void set(int32_t *values, int t, int32_t value)
{
    if (values) values[t] = value;
}

void cpu_extend_metadata(struct device *dev, const struct extend_view *extend)
{
    int start = 0;

    (void)dev;
    for (int b = 0; b < extend->bs; b++) {
        const int n = length_at(extend, extend->extend_len, b);
        const int before = length_at(extend, extend->kv_len, b) - n;
        extend->request_start[b] = start;
        for (int j = 0; j < n && start + j < extend->capacity; j++) {
            const int kv_len = before + 1 + j;
            set(extend->token_kv_len, start + j, kv_len);
            set(extend->clamped_kv_len, start + j, kv_len < extend->topk ? kv_len : extend->topk);
            set(extend->token_position, start + j, kv_len - 1);
            set(extend->token_request, start + j, b);
            if (extend->token_adapter) extend->token_adapter[start + j] = extend->adapter[b];
        }
        start += n;
    }
    extend->request_start[extend->bs] = start;
    *extend->total = start;

    for (int t = start; extend->fills_tail && t < extend->capacity; t++) {
        set(extend->token_kv_len, t, extend->tail);
        set(extend->clamped_kv_len, t, extend->tail);
        set(extend->token_position, t, extend->tail);
        set(extend->token_request, t, extend->tail);
        set(extend->token_adapter, t, extend->tail);
    }
}
