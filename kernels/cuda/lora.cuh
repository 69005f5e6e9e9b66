/* What the LoRA kernels share: finding their work in the step's segments. The host knows only
 * counts (struct lora_view), so grids are sized by those and blocks look up the rest. */
#ifndef MLORA_KERNELS_CUDA_LORA_CUH
#define MLORA_KERNELS_CUDA_LORA_CUH

#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/lora_choice.h"

/* Up to so many tokens shrink runs beside the base product of the same x. With more the product
 * loses more by that than shrink takes alone. */
enum { BESIDE_TOKENS = 192 };

static inline struct lora_args lora_args(const struct lora_view *lora, const struct lora_site *site,
                                         int layer)
{
    struct lora_args args = {};
    args.factors = lora->factors;
    args.slot = lora->slot;
    args.segment_slot = lora->segment_slot;
    args.segment_start = lora->segment_start;
    args.order = lora->order;
    args.L = lora->L;
    args.n_segments = lora->n_segments;
    args.n_tokens = lora->n_tokens;
    args.max_rank = lora->max_rank;
    args.max_segment = lora->max_segment;
    args.layer = layer;
    args.linear = site->linear;
    args.n_slices = site->n_slices;
    args.K = site->K;
    args.N = site->N;
    args.h_token = lora->h_by_slice ? lora->max_rank : site->n_slices * lora->max_rank;
    args.h_slice = lora->h_by_slice ? lora->n_rows * lora->max_rank : lora->max_rank;
    for (int i = 0; i < site->n_slices; i++) {
        args.offset[i] = site->offset[i];
        args.width[i] = site->width[i];
    }
    return args;
}

/* Segment s alone. The host does not know how long it is, only how long the longest is. */
static inline struct lora_args lora_part(const struct lora_args *args, int s)
{
    struct lora_args part = *args;
    part.segment_slot += s;
    part.segment_start += s;
    part.n_segments = 1;
    part.n_tokens = part.max_segment;
    part.is_part = true;
    return part;
}

/* Tokens of one adapter that a block works on: order[first] to order[first + n - 1]. */
struct lora_tile {
    int slot, first, n;
    bool leads; /* the first of its segment */
};

/* Tiles of up to `size` tokens of all segments are never more than this; where each segment is
 * one, exactly this. */
static inline int lora_tiles(const struct lora_args *args, int size)
{
    return args->max_segment <= size ? args->n_segments : args->n_tokens / size + args->n_segments;
}

/* Outputs of one slice that a block works on: first, first + 1, ... (in the slice). */
struct lora_chunk {
    int slice, first;
};

/* Chunks of `size` outputs, each within a slice. */
static inline int lora_chunks(const struct lora_args *args, int size)
{
    int n = 0;
    for (int i = 0; i < args->n_slices; i++) n += ceil_div(args->width[i], size);
    return n;
}

/* Whether what adapters add is made together with the base product of the same x: then shrink leaves
 * that to it: cuda->left, and expand has nothing left to do but to say which y it is for:
 * lora_defers(). */
bool lora_begins_delta(struct cuda_device *cuda, const float *h, const struct lora_view *lora,
                       const struct lora_site *site, int layer, enum dtype dtype);
void lora_delta(struct cuda_device *cuda, float *z, const float *h, const struct lora_args *args);
bool lora_is_added(struct cuda_device *cuda, const float *h, const struct lora_site *site,
                   int layer);
bool lora_defers(struct cuda_device *cuda, void *y, const float *h, const struct lora_site *site,
                 int layer, enum dtype y_dtype);

/* The two halves, token by token for any types and sizes, and in tiles of an adapter's tokens on
 * tensor cores; the gathered products of `gbmm`. */
void lora_shrink_by_row(struct cuda_device *cuda, float *h, const void *x,
                        const struct lora_args *args, enum dtype dtype);
void lora_expand_by_row(struct cuda_device *cuda, void *y, const float *h,
                        const struct lora_args *args, enum dtype dtype);
bool lora_shrink_has_tiles(const void *x, const struct lora_args *args, enum dtype dtype);
void lora_shrink_by_tile(struct cuda_device *cuda, float *h, const bf16 *x,
                         const struct lora_args *args);
void lora_expand_by_tile(struct cuda_device *cuda, void *y, const float *h,
                         const struct lora_args *args, enum dtype dtype);
void lora_shrink_gathered(struct cuda_device *cuda, float *h, const void *x,
                          const struct lora_args *args, enum dtype dtype, bool is_plain);
void lora_expand_gathered(struct cuda_device *cuda, void *y, const float *h,
                          const struct lora_args *args, enum dtype dtype, bool is_plain);

/* Scratch that the two take at most; what lora_shrink_by_tile() takes. */
size_t lora_gathered_bytes(const struct lora_args *args);
size_t lora_shrink_tile_bytes(const struct cuda_device *cuda);

#ifdef __CUDACC__

static inline __device__ const struct lora_factors *lora_factors_of(const struct lora_args &args,
                                                                    int slot, int slice)
{
    const size_t layer = (size_t)slot * args.L + args.layer;
    return &args.factors[layer * LORA_LINEARS + args.linear + slice];
}

/* Token number i of those with an adapter, in the segments' order; -1: there is none. */
static inline __device__ int lora_token(const struct lora_args &args, int i)
{
    if (!args.is_part) return args.order[i];
    i += args.segment_start[0];
    return i < args.segment_start[args.n_segments] ? args.order[i] : -1;
}

/* The factors of a token and slice; a is NULL where there are none, or no token. */
static inline __device__ struct lora_factors lora_factors_of_token(const struct lora_args &args,
                                                                   int t, int slice)
{
    struct lora_factors none = {};
    const int slot = t < 0 ? -1 : args.slot[t];
    return slot < 0 ? none : *lora_factors_of(args, slot, slice);
}

/* h[t, slice, :] */
static inline __device__ size_t lora_h_row(const struct lora_args &args, int t, int slice)
{
    return (size_t)t * args.h_token + (size_t)slice * args.h_slice;
}

/* Find chunk number `index`. False: there is none. */
static inline __device__ bool lora_find_chunk(struct lora_chunk *out, int index,
                                              const struct lora_args &args, int size)
{
#pragma unroll
    for (int i = 0; i < LORA_SLICES_MAX; i++) {
        const int chunks = i < args.n_slices ? ceil_div(args.width[i], size) : 0;
        if (index < chunks) {
            out->slice = i;
            out->first = index * size;
            return true;
        }
        index -= chunks;
    }
    return false;
}

/* A lane's segment; n: its tokens, 0 where there is nothing to do. */
struct lora_segment {
    int slot, start, n;
};

static inline __device__ struct lora_segment lora_segment_at(const struct lora_args &args,
                                                             int segment)
{
    const bool valid = segment < args.n_segments;
    /* Asked for at once, whatever the slot is. */
    const int start = valid ? args.segment_start[segment] : 0;
    const int end = valid ? args.segment_start[segment + 1] : 0;
    const int slot = valid ? args.segment_slot[segment] : -1;
    return {slot, start, slot < 0 ? 0 : max_int(0, end - start)};
}

/* The sum of the lanes' numbers up to this one's. */
static inline __device__ int sum_upto(int number, int lane)
{
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(~0u, number, step);
        if (lane >= step) number += other;
    }
    return number;
}

/* Find tile number `index` of `size` tokens among those of the lanes' segments, of which `before` come first.
 * False, and `before` has these too: it is not there. */
static inline __device__ bool lora_tile_among(struct lora_tile *out,
                                              const struct lora_segment &segment, int index,
                                              int size, int *before)
{
    const int lane = threadIdx.x % WARP, tiles = ceil_div(segment.n, size);
    const int upto = sum_upto(tiles, lane);
    const unsigned reach = __ballot_sync(~0u, *before + upto > index);
    if (!reach) {
        *before += __shfl_sync(~0u, upto, WARP - 1);
        return false;
    }
    const int found = __ffs(reach) - 1;
    const int skip = (index - *before - __shfl_sync(~0u, upto - tiles, found)) * size;
    out->slot = __shfl_sync(~0u, segment.slot, found);
    out->first = __shfl_sync(~0u, segment.start, found) + skip;
    out->n = min_int(size, __shfl_sync(~0u, segment.n, found) - skip);
    out->leads = skip == 0;
    return true;
}

/* Find tile number `index` among the segments' tiles of `size` tokens. Every warp of the block
 * does the same work and all get the same answer, so no barrier is needed. False: no such tile. */
static inline __device__ bool lora_find_tile(struct lora_tile *out, int index,
                                             const struct lora_args &args, int size)
{
    int before = 0; /* tiles of earlier segments */

    for (int base = 0; base < args.n_segments; base += WARP) {
        const struct lora_segment segment = lora_segment_at(args, base + threadIdx.x % WARP);
        if (lora_tile_among(out, segment, index, size, &before)) return true;
    }
    return false;
}

/* Numbers as sums of bf16, so that tensor cores multiply them without loss: f16 needs two, f32
 * three (8 bits each). part[i] gets the i-th parts of two neighbours. */
template <int PARTS>
static inline __device__ void split_pair(uint32_t part[PARTS], float low, float high)
{
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        part[i] = pack_bf16(low, high);
        low -= bf16_low(part[i]);
        high -= bf16_high(part[i]);
    }
}

/* N elements from index i on of a factor of any type; the first n of them, then zeros, where it
 * is not `whole`. */
template <int N>
static inline __device__ void load_factor(float (&to)[N], const void *from, int dtype, size_t i,
                                          int n, bool whole)
{
    static_assert(N == 4 || N == 8);
    if (whole && dtype == DTYPE_F32) {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            const float4 four = *(const float4 *)((const float *)from + i + e);
            to[e] = four.x, to[e + 1] = four.y, to[e + 2] = four.z, to[e + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < N; e++) {
        to[e] = 0.0f;
        if (e >= n) continue;
        if (dtype == DTYPE_F32)
            to[e] = ((const float *)from)[i + e];
        else if (dtype == DTYPE_F16)
            to[e] = widen(((const f16 *)from)[i + e]);
        else
            to[e] = widen(((const bf16 *)from)[i + e]);
    }
}

static inline __device__ bool is_aligned_on_device(const void *pointer)
{
    return ((uintptr_t)pointer & 15) == 0;
}

#endif
#endif
