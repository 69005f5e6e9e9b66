/* Rows to tokens. Bound by latency: a few kilobytes, one dependent search a token. */
#include "kernels/cuda/cuda.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { METADATA_BLOCK = 128, LINEAR_ROWS = 16 };

/* For token t of row q, the last row that starts at or before t and is not empty:
 *   row[t] = q, position[t] = kv_len[q] - (row_start[q + 1] - t)
 * and ids[t] is looked up in `drawn` where it is below 0.
 *
 *   row, position, ids [T]    row_start [Q + 1]    kv_len [Q]
 *   grid T / METADATA_BLOCK    block METADATA_BLOCK, a thread a token */
static __global__ void metadata_kernel(int32_t *position, int32_t *row, int32_t *ids,
                                       const int32_t *drawn, const int32_t *row_start,
                                       const int32_t *kv_len, int T, int Q)
{
    grid_begin();
    const int t = blockIdx.x * METADATA_BLOCK + threadIdx.x;
    if (t >= T) return;

    if (drawn && ids[t] < 0) ids[t] = max_int(0, drawn[-1 - ids[t]]);
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

/* ---- draft and extend ---------------------------------------------------------------------- */

enum { OWN_RUN = 8 /* tokens that a thread writes alone */ };

/* lengths[b] to lengths[b + OWN - 1], b a multiple of OWN; from n on they are zeros. */
template <int OWN>
static __device__ void load_lengths(int to[OWN], const int32_t *lengths, int b, int n)
{
    if constexpr (OWN % 4 == 0) {
        if (b + OWN <= n && is_aligned(lengths)) {
#pragma unroll
            for (int i = 0; i < OWN; i += 4) {
                const int4 four = *(const int4 *)(lengths + b + i);
                to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
            }
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) to[i] = b + i < n ? lengths[b + i] : 0;
}

template <int OWN>
static __device__ void load_lengths(int to[OWN], const int64_t *lengths, int b, int n)
{
#pragma unroll
    for (int i = 0; i < OWN; i++) to[i] = b + i < n ? (int)lengths[b + i] : 0;
}

/* Exclusive sum of `own` over the block's threads; `sum` receives the whole. */
static __device__ int block_scan(int own, int *sum)
{
    __shared__ int of_warp[EXTEND_BLOCK / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    int through = own; /* the sum up to and with this lane */
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += before;
    }
    if (lane == WARP - 1) of_warp[warp] = through;
    __syncthreads();
    /* Each warp scans all of them: it saves a barrier. */
    int warps = lane < EXTEND_BLOCK / WARP ? of_warp[lane] : 0;
    for (int step = 1; step < EXTEND_BLOCK / WARP; step *= 2) {
        const int before = __shfl_up_sync(~0u, warps, step);
        if (lane >= step) warps += before;
    }
    *sum = __shfl_sync(~0u, warps, EXTEND_BLOCK / WARP - 1);
    const int before = __shfl_sync(~0u, warps, warp == 0 ? 0 : warp - 1);
    return (warp == 0 ? 0 : before) + through - own;
}

/* Token t is token j of request b, which begins `before` tokens into its sequence. */
static __device__ void write_token(const struct extend_view &view, int t, int b, int before, int j)
{
    const int kv_len = before + 1 + j;
    if (view.token_kv_len) view.token_kv_len[t] = kv_len;
    if (view.clamped_kv_len) view.clamped_kv_len[t] = min_int(kv_len, view.topk);
    if (view.token_position) view.token_position[t] = kv_len - 1;
    if (view.token_request) view.token_request[t] = b;
    if (view.token_adapter) view.token_adapter[t] = view.adapter[b];
}

/* The index of the last of `n` requests that starts at or before t and is not empty, in
 * start[n + 1]. */
static __device__ int find_request(const int *start, int n, int t, bool is_linear)
{
    int q = 0; /* the number of requests that end at or before t */

    if (is_linear) {
        for (int i = 0; i < n; i++) q += start[i + 1] <= t;
    } else {
        for (int end = n; q < end;) {
            const int middle = (q + end) / 2;
            if (start[middle + 1] <= t)
                q = middle + 1;
            else
                end = middle;
        }
    }
    return q;
}

/* Tokens [first, end) of request b, whose token 0 is t0: short runs by the thread alone, long ones
 * by its warp together. All threads of the warp call it. */
static __device__ void write_run(const struct extend_view &view, int b, int before, int t0,
                                 int first, int end)
{
    const int lane = threadIdx.x % WARP;
    const bool is_long = end - first > OWN_RUN;

    if (!is_long)
        for (int t = first; t < end; t++) write_token(view, t, b, before, t - t0);
    for (unsigned lanes = __ballot_sync(~0u, is_long); lanes; lanes &= lanes - 1) {
        const int from = __ffs(lanes) - 1;
        const int run_first = __shfl_sync(~0u, first, from), run_end = __shfl_sync(~0u, end, from);
        const int run_b = __shfl_sync(~0u, b, from), run_t0 = __shfl_sync(~0u, t0, from);
        const int run_before = __shfl_sync(~0u, before, from);
        for (int t = run_first + lane; t < run_end; t += WARP)
            write_token(view, t, run_b, run_before, t - run_t0);
    }
}

/* The formulas of kernels.h. Every block sums the lengths of all requests for itself, which is
 * cheaper than a second launch, and writes its own EXTEND_BLOCK tokens; block 0 writes the starts.
 * A thread takes OWN requests in a round of the sum, and reads all that it needs of them at once.
 *
 *   grid max(1, capacity / EXTEND_BLOCK)    block EXTEND_BLOCK, a thread a token
 *   shared 2 OWN KiB: of a round of requests, where each starts and what is before it */
template <typename Length, int OWN>
static __global__ void __launch_bounds__(EXTEND_BLOCK, 2) extend_kernel(struct extend_view view)
{
    enum { ROUND = EXTEND_BLOCK * OWN };
    __shared__ int start[ROUND + 1], before[ROUND];
    const Length *extend_len = (const Length *)view.extend_len;
    const Length *kv_len = (const Length *)view.kv_len;
    const int tile = blockIdx.x * EXTEND_BLOCK;
    const int tile_end = min_int(tile + EXTEND_BLOCK, view.capacity);
    const int t = tile + threadIdx.x;
    int total = 0; /* of the rounds before */

    grid_begin();
    for (int round = 0; round < view.bs; round += ROUND) {
        const int n = min_int(ROUND, view.bs - round);
        const int mine = threadIdx.x * OWN;
        int own[OWN], own_before[OWN], sum_own = 0, sum;

        load_lengths<OWN>(own, extend_len, round + mine, view.bs);
        load_lengths<OWN>(own_before, kv_len, round + mine, view.bs);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            own_before[i] -= own[i];
            sum_own += own[i];
        }
        int at = total + block_scan(sum_own, &sum);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            start[mine + i] = at;
            before[mine + i] = own_before[i];
            if (blockIdx.x == 0 && mine + i < n) view.request_start[round + mine + i] = at;
            at += own[i];
        }
        if (threadIdx.x == EXTEND_BLOCK - 1) start[ROUND] = at;
        __syncthreads();

        if (view.search == EXTEND_BY_REQUEST) {
            for (int b = threadIdx.x; b < ROUND; b += EXTEND_BLOCK)
                write_run(view, round + b, before[b], start[b], max_int(start[b], tile),
                          min_int(start[b + 1], tile_end));
        } else if (t >= total && t < min_int(total + sum, tile_end)) {
            const int q = find_request(start, n, t, view.search == EXTEND_LINEAR);
            write_token(view, t, round + q, before[q], t - start[q]);
        }
        total += sum;
        __syncthreads(); /* the next round overwrites `start` */
    }

    if (blockIdx.x == 0 && threadIdx.x == 0) {
        view.request_start[view.bs] = total;
        *view.total = total;
    }
    if (view.fills_tail && t >= total && t < tile_end) {
        if (view.token_kv_len) view.token_kv_len[t] = view.tail;
        if (view.clamped_kv_len) view.clamped_kv_len[t] = view.tail;
        if (view.token_position) view.token_position[t] = view.tail;
        if (view.token_request) view.token_request[t] = view.tail;
        if (view.token_adapter) view.token_adapter[t] = view.tail;
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_metadata(struct device *dev, const struct batch_view *batch)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || batch->T == 0) return;

    cuda_launch(cuda, "metadata", metadata_kernel, ceil_div(batch->T, METADATA_BLOCK),
                METADATA_BLOCK, 0, 1, batch->position, batch->row, batch->ids, batch->drawn,
                batch->row_start, batch->kv_len, batch->T, batch->Q);
}

/* With as many requests a thread as let one round suffice. */
template <typename Length> static auto extend_kernel_for(int bs)
{
    return bs <= EXTEND_BLOCK       ? extend_kernel<Length, 1>
           : bs <= 4 * EXTEND_BLOCK ? extend_kernel<Length, 4>
                                    : extend_kernel<Length, 16>;
}

void cuda_extend_metadata(struct device *dev, const struct extend_view *extend)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda) return;

    struct extend_view view = *extend;
    if (view.search == EXTEND_ADAPTIVE)
        view.search = view.bs <= EXTEND_LINEAR_MAX ? EXTEND_LINEAR : EXTEND_BINARY;
    const auto kernel = view.has_int64_lengths ? extend_kernel_for<int64_t>(view.bs)
                                               : extend_kernel_for<int32_t>(view.bs);
    cuda_launch(cuda, "extend_metadata", kernel, max_int(1, ceil_div(view.capacity, EXTEND_BLOCK)),
                EXTEND_BLOCK, 0, 1, view);
}
