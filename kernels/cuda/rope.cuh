/* Rotary positions, as rope.cu and attention_decode.cu make them. */
#ifndef MLORA_KERNELS_CUDA_ROPE_CUH
#define MLORA_KERNELS_CUDA_ROPE_CUH

#include "kernels/cuda/cuda.cuh"

/* By how much what is turned: element i < d / 2 of a head together with element i + d / 2. */
struct turn {
    bool is_wanted;         /* by attention: false where rope has been */
    const float *frequency; /* [d / 2], or NULL: nothing is turned */
    float amplitude;
    struct addend addend; /* to qkv, before it is turned */
};

/* Token t is the only one of row t: what was uploaded says where it is. */
static inline bool has_single_tokens(const struct batch_view *batch)
{
    return batch->T == batch->Q && batch->max_row == 1;
}

/* cosine and sine [d / 2] in shared memory, of a token's position. All threads of the block call it; they
 * may be read after a barrier. */
static inline __device__ void make_angles(float *cosine, float *sine, const struct turn &turn,
                                          int position, int half)
{
    for (int i = threadIdx.x; i < half && turn.frequency; i += blockDim.x) {
        float s, c;
        sincosf((float)position * turn.frequency[i], &s, &c);
        cosine[i] = c * turn.amplitude;
        sine[i] = s * turn.amplitude;
    }
}

/* Eight elements of each half of a head, at `from`, which is element `at` of qkv, and d / 2 further; where
 * `adds`, with what is added to them. */
template <typename X>
static inline __device__ void load_halves(float (&a)[GROUP], float (&b)[GROUP], const X *from,
                                          const struct addend &of_row, bool adds, size_t at,
                                          int half)
{
    load_group(a, from);
    load_group(b, from + half);
    if (adds) {
        add_some<X>(a, of_row, at, GROUP, true);
        add_some<X>(b, of_row, at + half, GROUP, true);
    }
}

/* WIDTH elements of each half of a head, those of the second in b. */
template <typename X, int WIDTH>
static inline __device__ void turn_pairs(float (&a)[WIDTH], float (&b)[WIDTH], const float *cosine,
                                         const float *sine)
{
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const float c = cosine[e], s = sine[e], x = a[e];
        a[e] = rounded<X>(x * c - b[e] * s);
        b[e] = rounded<X>(b[e] * c + x * s);
    }
}

#endif
