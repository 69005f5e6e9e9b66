/* Log-probabilities under the model's own distribution. A block a row. Bound by reading the
 * logits twice, and where the most likely are asked for, three times more. */
#include "kernels/cuda/select.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { TOP_MAX = 128 };

/* The n tokens of the largest logits, unordered: those above `floor`, then those equal to it in
 * the order of their ids. Returns how many were found. */
static __device__ int collect_top(int32_t *ids, float *values, const float *row, int V, float floor,
                                  int n)
{
    __shared__ int n_found;
    __shared__ int warp_counts[ROW_BLOCK / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    if (threadIdx.x == 0) n_found = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += ROW_BLOCK) {
        if (!(row[v] > floor)) continue;
        const int at = atomicAdd(&n_found, 1); /* fewer than n: see smallest_kept() */
        if (at < n) ids[at] = v, values[at] = row[v];
    }
    __syncthreads();
    int found = min_int(n_found, n);
    for (int base = 0; base < V && found < n; base += ROW_BLOCK) {
        const int v = base + threadIdx.x;
        const bool equal = v < V && row[v] == floor;
        const unsigned equals = __ballot_sync(~0u, equal);
        if (lane == 0) warp_counts[warp] = __popc(equals);
        __syncthreads();
        int at = found, all = 0;
        for (int w = 0; w < ROW_BLOCK / WARP; w++) {
            if (w < warp) at += warp_counts[w];
            all += warp_counts[w];
        }
        at += __popc(equals & ((1u << lane) - 1));
        if (equal && at < n) ids[at] = v, values[at] = row[v];
        found = min_int(n, found + all);
        __syncthreads();
    }
    return found;
}

/* logprob[q] = log softmax(logits[q, :])[target[q]], 0 where target[q] < 0; and of the n largest
 *
 *   logprob [Q]    top_ids, top_logprobs [Q, n]    logits [Q, V]    target [Q]
 *   grid Q    block ROW_BLOCK */
static __global__ void __launch_bounds__(ROW_BLOCK, 1)
    logprobs_kernel(float *logprob, int32_t *top_ids, float *top_logprobs, const float *logits,
                    const int32_t *target, int V, int n, bool whole)
{
    __shared__ struct select_memory memory;
    __shared__ float shared[WARP];
    __shared__ double sums[WARP];
    __shared__ int32_t ids[TOP_MAX];
    __shared__ float values[TOP_MAX];
    grid_begin();
    const int q = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float *row = logits + (size_t)q * V;

    const struct row_part part = {row, V, whole, 0, 1};
    float max = -INFINITY, min = INFINITY;
    for_fours<FAR_AHEAD>(part, [&](int, const float(&four)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            max = fmaxf(max, four[i]);
            if (four[i] > -INFINITY) min = fminf(min, four[i]);
        }
    });
    for (int step = WARP / 2; step > 0; step /= 2) {
        max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
        min = fminf(min, __shfl_xor_sync(~0u, min, step));
    }
    if (lane == 0) shared[warp] = max, values[warp] = min;
    __syncthreads();
    for (int w = 0; w < ROW_BLOCK / WARP; w++) {
        max = fmaxf(max, shared[w]);
        min = fminf(min, values[w]);
    }

    double sum = 0;
    for_fours<FAR_AHEAD>(part, [&](int v, const float(&four)[4]) {
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (v + i < V) part += expf(four[i] - max);
        sum += (double)part;
    });
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < ROW_BLOCK / WARP; w++) sum += sums[w];
    const double all = (double)max + log(sum);
    if (threadIdx.x == 0) {
        const int32_t id = target[q];
        logprob[q] = id < 0 ? 0.0f : (float)((double)row[id] - all);
    }
    if (n == 0) return; /* the whole block */

    float floor = -INFINITY;
    if (n < V) {
        unsigned long long n_reached = 0;
        floor = smallest_kept(
            &memory, part, floor, min, max, 64.0f, (unsigned)n, 0.0, &n_reached,
            [](int, float(&)[4]) {}, [](float) { return 1u; });
        /* Fewer than n are above -infinity: the rest is -infinity. */
        if (n_reached < (unsigned long long)n) floor = -INFINITY;
    }
    __syncthreads();
    const int found = collect_top(ids, values, row, V, floor, n);
    for (int i = threadIdx.x; i < n; i += ROW_BLOCK) {
        const size_t to = (size_t)q * n;
        if (i >= found) {
            top_ids[to + i] = -1;
            top_logprobs[to + i] = -INFINITY;
            continue;
        }
        int rank = 0;
        for (int j = 0; j < found; j++)
            rank += values[j] > values[i] || (values[j] == values[i] && ids[j] < ids[i]);
        top_ids[to + rank] = ids[i];
        top_logprobs[to + rank] = (float)((double)values[i] - all);
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_logprobs(struct device *dev, float *logprob, int32_t *top_ids, float *top_logprobs,
                   const float *logits, const int32_t *target, int Q, int V, int n)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || Q == 0) return;
    assert(V > 0 && n >= 0 && n <= TOP_MAX);

    cuda_launch(cuda, "logprobs", logprobs_kernel, Q, ROW_BLOCK, 0, 1, logprob, top_ids,
                top_logprobs, logits, target, V, n, V % 4 == 0 && is_aligned(logits));
}
