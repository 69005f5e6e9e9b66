/* The next token of each row, as kernels/cpu/sample.c defines it. A block a row. Bound by reading
 * the logits (from L2) up to six times, and by the noise of the tokens that stay. */
#include "kernels/cuda/select.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

/* philox4x32-10: random words as a pure function of a key and a counter (Salmon, Moraes, Dror and
 * Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011). */
static __device__ void philox4x32(uint32_t out[4], uint32_t c0, uint32_t c1, uint64_t key)
{
    uint32_t c2 = 0, c3 = 0, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t a_high = __umulhi(0xd2511f53u, c0), a_low = 0xd2511f53u * c0;
        const uint32_t b_high = __umulhi(0xcd9e8d57u, c2), b_low = 0xcd9e8d57u * c2;
        c0 = b_high ^ c1 ^ k0;
        c1 = b_low;
        c2 = a_high ^ c3 ^ k1;
        c3 = a_low;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* -log(-log(u)), u = 1 - (word + 1/2) / 2^32. The inner logarithm is taken from whichever of u
 * and 1 - u is small, which a float holds to its last bit. */
static __device__ float gumbel(uint32_t word)
{
    const float inner = word < 0x80000000u ? -log1pf(-((float)word + 0.5f) * 0x1p-32f)
                                           : -logf(((float)~word + 0.5f) * 0x1p-32f);
    return -logf(inner);
}

/* gumbel() is never above 22.87 nor below -3.14. */
static constexpr float GUMBEL_MAX = 22.9f, GUMBEL_MIN = -3.2f;

/* A row of logits as the request wants them. */
struct wanted_row {
    const uint32_t *touched; /* [V] bits: tokens of the history; NULL: no penalties */
    const int32_t *counts;   /* [V] of the touched ones: how often they are in the output */
    struct sampling sampling;
    float max;

    __device__ float penalized(int v, float logit) const
    {
        if (!touched || !(touched[v / 32] >> v % 32 & 1)) return logit;
        const float penalty = sampling.repetition_penalty;
        logit = logit > 0 ? logit / penalty : logit * penalty;
        const int32_t n = counts[v];
        if (n == 0) return logit;
        const float less =
            __fadd_rn(sampling.presence_penalty, __fmul_rn(sampling.frequency_penalty, (float)n));
        return __fsub_rn(logit, less);
    }

    __device__ float scaled(int v, float logit) const
    {
        return (penalized(v, logit) - max) / sampling.temperature;
    }
};

/* Mark and count the row's history. `touched` [V] bits in shared memory, `counts` [V]. */
static __device__ void count_history(uint32_t *touched, int32_t *counts, const int32_t *history,
                                     int n_history, int n_prompt, int V)
{
    for (int i = threadIdx.x; i < ceil_div(V, 32); i += ROW_BLOCK) touched[i] = 0;
    for (int i = threadIdx.x; i < n_history; i += ROW_BLOCK) counts[history[i]] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_history; i += ROW_BLOCK)
        atomicOr(&touched[history[i] / 32], 1u << history[i] % 32);
    for (int i = n_prompt + threadIdx.x; i < n_history; i += ROW_BLOCK)
        atomicAdd(&counts[history[i]], 1);
    __syncthreads();
}

/* The largest value over the block with the lowest id of equals; every thread gets both. */
static __device__ void block_largest(float *value, int *id)
{
    __shared__ float values[WARP];
    __shared__ int ids[WARP];
    const auto join = [&](float other, int other_id) {
        if (other > *value || (other == *value && other_id < *id)) *value = other, *id = other_id;
    };
    for (int step = WARP / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(~0u, *value, step);
        join(other, __shfl_xor_sync(~0u, *id, step));
    }
    if (threadIdx.x % WARP == 0) values[threadIdx.x / WARP] = *value, ids[threadIdx.x / WARP] = *id;
    __syncthreads();
    for (int i = 0; i < ROW_BLOCK / WARP; i++) join(values[i], ids[i]);
    __syncthreads();
}

/* ids[q] = the token drawn from logits[q, :]
 *
 *   ids [Q]    logits [Q, V]    counts [Q, V] scratch
 *   grid Q    block ROW_BLOCK    shared V bits */
static __global__ void __launch_bounds__(ROW_BLOCK, 1)
    sample_kernel(int32_t *__restrict__ ids, const float *__restrict__ logits,
                  int32_t *__restrict__ counts, const struct sample_view view, int V, bool whole)
{
    extern __shared__ uint32_t touched[];
    __shared__ struct select_memory memory;
    const int q = blockIdx.x;
    const float *row = logits + (size_t)q * V;
    const int n_history = view.history_start[q + 1] - view.history_start[q];
    struct wanted_row wanted = {NULL, NULL, view.sampling[q], 0.0f};
    const struct sampling &sampling = wanted.sampling;

    if (n_history > 0) { /* the whole block */
        wanted.touched = touched;
        wanted.counts = counts + (size_t)q * V;
        count_history(touched, counts + (size_t)q * V, view.history + view.history_start[q],
                      n_history, view.n_prompt[q], V);
    }

    float max = -INFINITY, min = INFINITY;
    int best = V, damaged = 0;
    for_fours(row, V, whole, [&](int v, const float(&four)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float logit = wanted.penalized(min_int(v + i, V - 1), four[i]);
            if (logit > max) max = logit, best = v + i;
            if (logit > -INFINITY) min = fminf(min, logit);
            damaged |= !(logit < INFINITY); /* NaN too */
        }
    });
    damaged = __syncthreads_or(damaged);
    block_largest(&max, &best);
    if (damaged || max == -INFINITY || sampling.temperature <= 0.0f) { /* the whole block */
        if (threadIdx.x == 0) ids[q] = damaged || max == -INFINITY ? -1 : best;
        return;
    }

    wanted.max = max;
    const auto scaled = [&](int v, float logit) { return wanted.scaled(v, logit); };
    float floor = -INFINITY;
    const bool by_number = sampling.top_k > 0 && sampling.top_k < V;
    if (by_number || sampling.top_p < 1.0f) {
        float least = -min;
        int any = 0;
        block_largest(&least, &any);
        const float low = (-least - max) / sampling.temperature;
        if (by_number)
            floor = smallest_kept(&memory, row, V, whole, floor, low, 0.0f, sampling.top_k, 0.0,
                                  scaled, [](float) { return 1ull; });
        if (sampling.top_p < 1.0f)
            floor =
                smallest_kept(&memory, row, V, whole, floor, low, 0.0f, 0, sampling.top_p, scaled,
                              [](float z) { return (unsigned long long)(expf(z) * 0x1p40f); });
    }

    float top = -INFINITY;
    best = V;
    for_fours(row, V, whole, [&](int v, const float(&four)[4]) {
        float z[4];
        bool any = false;
        /* The largest, 0, will have GUMBEL_MIN or more. */
        const float reach = fmaxf(top, GUMBEL_MIN) - GUMBEL_MAX;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            z[i] = wanted.scaled(min_int(v + i, V - 1), four[i]);
            if (z[i] < floor || (sampling.min_p > 0.0f && expf(z[i]) < sampling.min_p))
                z[i] = -INFINITY;
            any |= z[i] >= reach;
        }
        if (!any) return;
        uint32_t words[4];
        philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(z[i] >= reach)) continue;
            const float value = z[i] + gumbel(words[i]);
            if (value > top) top = value, best = v + i;
        }
    });
    block_largest(&top, &best);
    if (threadIdx.x == 0) ids[q] = best;
}

/* ---- launchers ---------------------------------------------------------------------------- */

enum { VOCABULARY_MAX = 1 << 20 };

void cuda_sample(struct device *dev, int32_t *ids, const float *logits,
                 const struct sample_view *view, int V)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || view->Q == 0) return;
    assert(V > 0 && V <= VOCABULARY_MAX);

    int32_t *counts = (int32_t *)cuda_scratch(cuda, (size_t)view->Q * V * sizeof *counts, "sample");
    if (!counts) return;
    const size_t shared = (size_t)ceil_div(V, 32) * sizeof(uint32_t);
    /* The kernel has static shared memory of its own: ask also where V bits alone would fit. */
    cuda_check(cuda,
               cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared),
               "sample");
    sample_kernel<<<view->Q, ROW_BLOCK, shared, cuda->stream>>>(ids, logits, counts, *view, V,
                                                                V % 4 == 0 && is_aligned(logits));
    cuda_check(cuda, cudaGetLastError(), "sample");
}
