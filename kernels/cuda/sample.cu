/* The next token of each row, as kernels/cpu/sample.c defines it. A cluster of blocks a row. Bound
 * by reading the logits (from L2) two to six times, and by the arithmetic of each pass. */
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
        const int32_t n = __ldcg(&counts[v]); /* the cluster's first block counted */
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

/* Mark and count the row's history. `touched` [V] bits in each block's shared memory, `counts`
 * [V] by the first block. */
static __device__ void count_history(uint32_t *touched, int32_t *counts, const int32_t *history,
                                     int n_history, int n_prompt, int V, int part)
{
    for (int i = threadIdx.x; i < ceil_div(V, 32); i += ROW_BLOCK) touched[i] = 0;
    if (part == 0)
        for (int i = threadIdx.x; i < n_history; i += ROW_BLOCK) counts[history[i]] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_history; i += ROW_BLOCK)
        atomicOr(&touched[history[i] / 32], 1u << history[i] % 32);
    if (part == 0)
        for (int i = n_prompt + threadIdx.x; i < n_history; i += ROW_BLOCK)
            atomicAdd(&counts[history[i]], 1);
    cluster_sync();
}

/* A value and its token. */
struct candidate {
    float value;
    int id;
};

static __device__ struct candidate better(struct candidate a, struct candidate b)
{
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

/* The largest value over the cluster with the lowest id of equals, for every thread. `memory`
 * [WARP + 1] of each block. */
static __device__ struct candidate cluster_largest(struct candidate *memory, struct candidate best,
                                                   int parts)
{
    for (int step = WARP / 2; step > 0; step /= 2) {
        const struct candidate other = {__shfl_xor_sync(~0u, best.value, step),
                                        __shfl_xor_sync(~0u, best.id, step)};
        best = better(best, other);
    }
    if (threadIdx.x % WARP == 0) memory[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < ROW_BLOCK / WARP; i++) best = better(best, memory[i]);
        memory[WARP] = best;
    }
    cluster_sync();
    best = memory[WARP];
    for (int p = 0; p < parts; p++) best = better(best, *cluster_block(&memory[WARP], p));
    cluster_sync(); /* the memory may be used again, and the others may end */
    return best;
}

/* ids[q] = the token drawn from logits[q, :]
 *
 *   ids [Q]    logits [Q, V]    counts [Q, V] scratch
 *   grid (Q, 1, parts of a row), a cluster along z    block ROW_BLOCK    shared V bits */
static __global__ void __launch_bounds__(ROW_BLOCK, 1)
    sample_kernel(int32_t *ids, const float *logits, int32_t *counts, const struct sample_view view,
                  int V, bool whole)
{
    extern __shared__ uint32_t touched[];
    __shared__ struct select_memory memory;
    __shared__ struct candidate candidates[WARP + 1];
    __shared__ unsigned bar_key; /* of the best value of this block so far */
    grid_begin();
    const int q = blockIdx.x;
    const struct row_part part = {logits + (size_t)q * V, V, whole, (int)blockIdx.z,
                                  (int)gridDim.z};
    const int n_history = view.history_start[q + 1] - view.history_start[q];
    struct wanted_row wanted = {NULL, NULL, view.sampling[q], 0.0f};
    const struct sampling &sampling = wanted.sampling;

    if (n_history > 0) { /* the whole cluster */
        wanted.touched = touched;
        wanted.counts = counts + (size_t)q * V;
        count_history(touched, counts + (size_t)q * V, view.history + view.history_start[q],
                      n_history, view.n_prompt[q], V, part.part);
    }

    struct candidate best = {-INFINITY, V}, least = {-INFINITY, 0};
    for_fours(part, [&](int v, const float(&four)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float logit = wanted.penalized(min_int(v + i, V - 1), four[i]);
            if (logit > best.value) best = {logit, v + i};
            if (logit > -INFINITY) least.value = fmaxf(least.value, -logit);
            if (!(logit < INFINITY)) least.id = -1; /* NaN too */
        }
    });
    best = cluster_largest(candidates, best, part.parts);
    const bool damaged =
        cluster_largest(candidates, {least.id < 0 ? 1.0f : 0.0f, 0}, part.parts).value > 0.0f;
    if (damaged || best.value == -INFINITY || sampling.temperature <= 0.0f) {
        if (part.part == 0 && threadIdx.x == 0)
            ids[q] = damaged || best.value == -INFINITY ? -1 : best.id;
        return; /* the whole cluster */
    }

    wanted.max = best.value;
    const auto scaled = [&](int v, float logit) { return wanted.scaled(min_int(v, V - 1), logit); };
    float floor = -INFINITY;
    const bool by_number = sampling.top_k > 0 && sampling.top_k < V;
    if (by_number || sampling.top_p < 1.0f) {
        unsigned long long n_reached;
        least = cluster_largest(candidates, {least.value, 0}, part.parts);
        const float low = (-least.value - wanted.max) / sampling.temperature;
        if (by_number)
            floor = smallest_kept(&memory, part, floor, low, 0.0f, sampling.top_k, 0.0, &n_reached,
                                  scaled, [](float) { return 1u; });
        if (sampling.top_p < 1.0f)
            floor =
                smallest_kept(&memory, part, floor, low, 0.0f, 0, sampling.top_p, &n_reached,
                              scaled, [](float z) { return __float2uint_rn(expf(z) * 0x1p31f); });
    }

    /* Noise is at most -log(1 - u). What cannot win by that, or could not have some time before,
     * is left out before its noise is made, all of it in fast arithmetic with a margin. */
    const float margin = 0.02f, inverse = 1.0f / sampling.temperature;
    best = {-INFINITY, V};
    if (threadIdx.x == 0) bar_key = sort_key(GUMBEL_MIN); /* the largest, 0, will have that */
    __syncthreads();
    for_fours(part, [&](int v, const float(&four)[4]) {
        const float bar = from_sort_key(*(volatile unsigned *)&bar_key) - margin;
        float about[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            about[i] = (wanted.penalized(min_int(v + i, V - 1), four[i]) - wanted.max) * inverse;
            any |= about[i] >= fmaxf(bar - GUMBEL_MAX, floor - margin);
        }
        if (!any) return;
        uint32_t words[4];
        philox4x32(words, (uint32_t)v / 4, sampling.draw, sampling.seed);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (((float)words[i] + 0.5f) * 0x1p-32f > __expf(about[i] - bar)) continue;
            const float z = scaled(v + i, four[i]);
            if (!(z >= floor) || z == -INFINITY) continue;
            if (sampling.min_p > 0.0f && expf(z) < sampling.min_p) continue;
            best = better(best, {z + gumbel(words[i]), v + i});
            atomicMax(&bar_key, sort_key(best.value));
        }
    });
    best = cluster_largest(candidates, best, part.parts);
    if (part.part == 0 && threadIdx.x == 0) ids[q] = best.id;
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
    int parts = 1; /* as many blocks a row as there are multiprocessors for */
    while (cuda->is_hopper && parts < 8 && 2 * parts * view->Q <= cuda->n_sms) parts *= 2;
    /* The kernel has static shared memory of its own: ask also where V bits alone would fit. */
    cuda_check(cuda,
               cudaFuncSetAttribute(sample_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)shared),
               "sample");
    cuda_launch(cuda, "sample", sample_kernel, dim3(view->Q, 1, parts), ROW_BLOCK, shared, parts,
                ids, logits, counts, *view, V, V % 4 == 0 && is_aligned(logits));
}
