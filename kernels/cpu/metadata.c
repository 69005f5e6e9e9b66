/* From rows to tokens: where each token of the step stands. */
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
}
