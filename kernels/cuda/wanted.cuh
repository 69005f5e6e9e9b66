/* A row of logits as its request wants them: with penalties, and over its temperature. */
#ifndef MLORA_KERNELS_CUDA_WANTED_CUH
#define MLORA_KERNELS_CUDA_WANTED_CUH

#include "kernels/cuda/cuda.cuh"

#include <float.h>

static constexpr float LOG2_E = 1.44269504f;

/* A row of logits as the request wants them. */
struct wanted_row {
    const uint32_t *touched; /* [V] bits: tokens of the history; NULL: no penalties */
    const int32_t *counts;   /* [V] of the touched ones: how often they are in the output */
    const struct sampling *sampling;
    float max, least; /* of those above -infinity */
    float temperature;
    int V;

    __device__ float penalized(int v, float logit) const
    {
        const float penalty = sampling->repetition_penalty;
        logit = logit > 0 ? logit / penalty : logit * penalty;
        const int32_t n = __ldcg(&counts[v]); /* the cluster's first block counted */
        if (n == 0) return logit;
        const float less =
            __fadd_rn(sampling->presence_penalty, __fmul_rn(sampling->frequency_penalty, (float)n));
        return __fsub_rn(logit, less);
    }

    /* The logits of v to v + 3, v a multiple of four. */
    __device__ void penalize(int v, float (&four)[4]) const
    {
        if (!touched || v >= V) return;
        const unsigned bits = touched[v / 32] >> v % 32 & 15;
        if (bits == 0) return;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (bits >> i & 1) four[i] = penalized(v + i, four[i]);
    }

    __device__ float scaled(float penalized) const
    {
        return (penalized - max) / temperature;
    }

    /* exp(scaled) as a whole number, 2^31 for the largest. */
    __device__ unsigned weight(float penalized) const
    {
        const float per_logit = fminf(LOG2_E / temperature, FLT_MAX);
        return __float2uint_rn(fast_exp2(fmaf(penalized - max, per_logit, 31.0f)));
    }
};

#endif
