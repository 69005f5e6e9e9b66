/* Rows to tokens. Bound by latency: a few kilobytes, one dependent search a token. */
#include "kernels/cuda/cuda.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { METADATA_BLOCK = 128, LINEAR_ROWS = 16 };

/* For token t of row q, the last row that starts at or before t and is not empty:
 *   row[t] = q, position[t] = kv_len[q] - (row_start[q + 1] - t)
 *
 *   row, position [T]    row_start [Q + 1]    kv_len [Q]
 *   grid T / METADATA_BLOCK    block METADATA_BLOCK, a thread a token */
static __global__ void metadata_kernel(int32_t *position, int32_t *row, const int32_t *row_start,
                                       const int32_t *kv_len, int T, int Q)
{
    grid_begin();
    const int t = blockIdx.x * METADATA_BLOCK + threadIdx.x;
    if (t >= T) return;

    int q = 0; /* the number of rows that end at or before t */
    if (Q <= LINEAR_ROWS) {
        for (int i = 0; i < Q; i++) q += row_start[i + 1] <= t;
    } else {
        for (int end = Q; q < end;) {
            const int middle = (q + end) / 2;
            if (row_start[middle + 1] <= t)
                q = middle + 1;
            else
                end = middle;
        }
    }
    if (q >= Q) return;
    row[t] = q;
    position[t] = kv_len[q] - row_start[q + 1] + t;
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_metadata(struct device *dev, const struct batch_view *batch)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || batch->T == 0) return;

    cuda_launch(cuda, "metadata", metadata_kernel, ceil_div(batch->T, METADATA_BLOCK),
                METADATA_BLOCK, 0, 1, batch->position, batch->row, batch->row_start, batch->kv_len,
                batch->T, batch->Q);
}
