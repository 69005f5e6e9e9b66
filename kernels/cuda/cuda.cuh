/* What the files of the CUDA backend share: the device, its first failure, its scratch memory,
 * and the few device functions that hide a number format or an instruction.
 *
 * Every launcher begins with cuda_begin(), which makes the device current and says whether it is
 * still sound, and ends with cuda_check(), which keeps the first failure and the op's name. */
#ifndef MLORA_KERNELS_CUDA_CUH
#define MLORA_KERNELS_CUDA_CUH

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "engine/base/error.h"
#include "kernels/kernels.h"
}

typedef __nv_bfloat16 bf16;
typedef __half f16;

enum {
    WARP = 32,
    COUNTERS = 1 << 16, /* arrival counters, see struct cuda_device       */
    GROWN = 48,         /* each at least twice as large as the one before */
    DELTA_TOKENS = 64,  /* up to which LoRA runs beside the base product      */
    PRODUCT_PARTS = 3,  /* of a product's sums, besides the first             */
    /* Of a thread of a product with LoRA inside: what add_rms_norm leaves, beside which it begins. */
    LORA_REGISTERS = 72,
};

struct blas;
struct recordings;
struct clock_marks;

/* Pinned host memory through which small transfers go: the copy engine reads it without a copy of
 * the driver's, and the call does not wait. Uploads fill one half, then the other; `left` is
 * passed when the last copy from a half is done. */
struct staging {
    unsigned char *up;   /* [2, STAGING_HALF] */
    unsigned char *down; /* [STAGING_HALF] */
    cudaEvent_t left[2];
    int half;
    size_t used; /* bytes of that half */
};
struct transfer;

/* What the next launch of a recording depends on. */
enum { EDGES = 4 };
struct edges {
    cudaGraphNode_t from[EDGES];
    cudaGraphEdgeData data[EDGES];
    size_t n;
};

/* Memory that has grown. Older, smaller pieces are kept until close, so that what was recorded with
 * them stays valid. */
struct grown {
    void *memory[GROWN];
    int n;
    size_t bytes; /* of the last one */
};

/* What an op adds to the y [T, N] it reads, in this order. */
struct addend {
    const float *parts; /* [n_parts, T, N]: more sums over other k of the product that y is of */
    int n_parts;
    size_t part;         /* T N */
    const float *z;      /* [T, N]: of adapters; NULL: nothing */
    const int32_t *slot; /* [T]: of tokens without an adapter -1, and z is not defined */
};

/* What matmul and lora_expand left to the op that reads y next: it adds this as it reads, or it is
 * added before that op begins: deferred.cu. */
struct deferred {
    void *y; /* [T, N] y_dtype; NULL: nothing is deferred */
    enum dtype y_dtype;
    int T, N;
    struct addend addend;
};

/* A lora_view and lora_site as a kernel argument. */
struct lora_args {
    const struct lora_factors *factors; /* [S, L, LORA_LINEARS] */
    const int32_t *slot;                /* [T] */
    const int32_t *segment_slot, *segment_start, *order;
    int L, n_segments, n_tokens, max_rank, max_segment;
    bool is_part; /* one segment of several: it need not begin at order[0], nor have n_tokens */
    int layer, linear, n_slices, K, N;
    int h_token, h_slice; /* floats of h from one to the next */
    int offset[LORA_SLICES_MAX], width[LORA_SLICES_MAX];
};

/* What lora_expand is going to add to a y, by order of lora_shrink. z NULL: nothing */
struct delta {
    float *z;
    const int32_t *slot;
    const float *h;
    int linear, layer, T, N;
    bool is_added; /* the product has it already */
};

/* What lora_shrink left to the next op: the product of x may add it to its result as it goes; before
 * any other it is made by itself, as z. x NULL: nothing */
struct left {
    const bf16 *x;
    float *h, *z;
    bool has_tiles, is_plain;
    struct lora_args args;
};

/* A rope of rows of one token that waits for the op that reads its qkv. qkv NULL: none waits */
struct held_rope {
    void *qkv;
    enum dtype dtype;
    struct rope_view rope;
    struct kv_view kv;
    struct batch_view batch;
    struct heads heads;
    struct addend addend;
};

struct exchange; /* lora_inside.cuh */
struct streamed; /* matmul_sm90.cu */

struct cuda_device {
    struct device base; /* first: a struct device * is one of these */
    int ordinal;
    int n_sms;      /* multiprocessors */
    bool is_hopper; /* or newer: kernels overlap, and blocks of a cluster share their memory */
    bool overlaps;  /* the next kernel may begin while the one before it runs */
    void *encode_tensor_map; /* the driver's function, where there is wgmma: 9.0; else NULL */
    cudaStream_t stream;
    struct blas *blas;
    struct recordings *recordings;
    struct edges before, beside; /* a branch of the recording: where it begins, its end */
    bool edges_are_set;          /* the next launch has them from cuda_join() */
    struct clock_marks *marks;   /* NULL before the first mark */
    struct transfer *transfer;
    /* For the copy engine, one for each rank of B; NULL where there is no wgmma. */
    struct CUtensorMap_st *maps_of_memory;
    /* [COUNTERS] zero between ops: blocks count here who of them is the last to finish a common
     * sum; that one adds the parts up in their order and sets the counter back. */
    int *counters;
    struct grown scratch;       /* of one op: the next may overwrite it */
    struct grown parts, deltas; /* of `deferred` */
    struct exchange *exchange;  /* of products with LoRA inside */
    const void *held_y;         /* the result of a product that waits for the op that reads it... */
    struct streamed *held;      /* ... which that is; held_y NULL: none waits */
    struct held_rope held_rope;
    struct deferred deferred;
    struct delta delta;
    struct left left;
    bool is_lent; /* scratch is a caller's: it does not grow */
    struct staging staging;
    cudaEvent_t fences[FENCES];
    char failure[256]; /* the first one, "" while there is none */
};

/* ---- host --------------------------------------------------------------------------------- */

/* The device, made current, or NULL after a failure: the op has nothing to do then. */
struct cuda_device *cuda_begin(struct device *dev);

/* The same for an op that adds to the y it reads what is deferred for it: `addend` receives it. */
struct cuda_device *cuda_begin_adding(struct device *dev, const void *y, struct addend *addend);

/* The same for an op that only adds to y, whatever else is still to be added. */
struct cuda_device *cuda_begin_beside(struct device *dev);

/* The same for a product, which may take up what lora_shrink left; else lora_make_left() is next. */
struct cuda_device *cuda_begin_product(struct device *dev);
void lora_make_left(struct cuda_device *cuda);

/* Leave `addend` to the op that reads y next, after what was left to it before. */
void cuda_defer(struct cuda_device *cuda, void *y, enum dtype y_dtype, int T, int N,
                const struct addend *addend);

/* Start what was left to a next op, which is not this one: cuda_begin() calls it, so that every op
 * finds it done. */
void cuda_catch_up(struct cuda_device *cuda);

/* Add to y what is deferred for it. */
void cuda_add_deferred(struct cuda_device *cuda);

/* Keep `error` as the device's failure if it is one and the first. */
void cuda_check(struct cuda_device *cuda, cudaError_t error, const char *op);
void cuda_fail(struct cuda_device *cuda, const char *op, const char *what);

/* At least `bytes` that are this op's until its last kernel ends; NULL (kept as a failure) where
 * there is not so much memory. */
void *cuda_scratch(struct cuda_device *cuda, size_t bytes, const char *op);

/* At least `bytes` of `grown`; NULL as above. */
void *cuda_grow(struct cuda_device *cuda, struct grown *grown, size_t bytes, const char *op);

/* Let `kernel` use `bytes` of dynamic shared memory: it is to be asked for where that and its static
 * memory are more than 48 KiB. */
template <typename Kernel>
static inline void cuda_allow_shared(struct cuda_device *cuda, Kernel *kernel, size_t bytes,
                                     const char *op)
{
    if (bytes > 32 * 1024)
        cuda_check(
            cuda,
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
            op);
}

/* Launch with, on Hopper, leave to begin while the kernel before is still running: what a kernel
 * does before grid_wait() may touch only what no kernel writes (weights, and what was uploaded).
 * __restrict__ stands at such pointers only: it lets the compiler move their loads before the
 * wait.
 * `cluster` neighbouring blocks along z run at the same time (Hopper only; 1: no cluster). */
template <typename... Parameters, typename... Arguments>
static inline void cuda_launch(struct cuda_device *cuda, const char *op,
                               void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                               unsigned cluster, Arguments... arguments)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = cuda->stream;
    config.attrs = attributes;
    if (cuda->is_hopper && !cuda->edges_are_set) {
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = cuda->overlaps;
        config.numAttrs = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = 1;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs].val.clusterDim.z = cluster;
        config.numAttrs++;
    }
    cuda->edges_are_set = false;
    cuda_check(cuda, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
               op);
    cuda->overlaps = true;
}

/* In a recording on Hopper, launches between fork and fork_end run beside those from there to the
 * join, after which the next cuda_launch() waits for both. Elsewhere the three do nothing, nor where
 * the device is lent: a caller's recording knows of no branch. One branch at a time; what runs
 * beside each other shares no scratch. */
void cuda_fork(struct cuda_device *cuda);
void cuda_fork_end(struct cuda_device *cuda);
void cuda_join(struct cuda_device *cuda);
/* The same for kernels that are not launched here, which wait for nothing themselves. */
void cuda_join_for_others(struct cuda_device *cuda);

/* Call f with a value of the C++ type of `dtype`. */
template <typename F> static inline void with_type(enum dtype dtype, F &&f)
{
    if (dtype == DTYPE_F32)
        f(float());
    else if (dtype == DTYPE_F16)
        f(f16());
    else
        f(bf16());
}

/* The same for the types of activations. */
template <typename F> static inline void with_activation(enum dtype dtype, F &&f)
{
    assert(dtype == DTYPE_F32 || dtype == DTYPE_BF16);
    if (dtype == DTYPE_F32)
        f(float());
    else
        f(bf16());
}

/* The same for an op that reads a product's result, which is of its own type or f32: f is called
 * with values of the product's type and of the op's. */
template <typename F> static inline void with_product(enum dtype product, enum dtype dtype, F &&f)
{
    assert(product == DTYPE_F32 || product == dtype);
    with_activation(dtype, [&](auto type) {
        if (product == dtype)
            f(type, type);
        else
            f(float(), bf16());
    });
}

static inline __host__ __device__ bool is_aligned(const void *pointer)
{
    return ((uintptr_t)pointer & 15) == 0;
}

static inline __host__ __device__ int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

static inline __host__ __device__ int min_int(int a, int b)
{
    return a < b ? a : b;
}

static inline __host__ __device__ int max_int(int a, int b)
{
    return a > b ? a : b;
}

/* The ops, as in kernels.h. */
void cuda_metadata(struct device *dev, const struct batch_view *batch);
void cuda_extend_metadata(struct device *dev, const struct extend_view *extend);
void cuda_embed(struct device *dev, void *y, const struct matrix *table, const int32_t *ids, int T,
                enum dtype dtype);
void cuda_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                       enum dtype delta_dtype, const float *weight, int T, int D, float eps,
                       enum dtype dtype);
void cuda_matmul(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                 const struct matrix *w, const float *bias, int T, enum dtype dtype);
void cuda_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                    const struct heads *heads, int T, float eps, enum dtype dtype);
void cuda_rope(struct device *dev, void *qkv, const struct rope_view *rope,
               const struct kv_view *kv, const struct batch_view *batch, const struct heads *heads,
               enum dtype dtype);
void cuda_attention(struct device *dev, void *y, const void *qkv, enum dtype qkv_dtype,
                    const struct kv_view *kv, const struct batch_view *batch,
                    const struct heads *heads, enum dtype dtype);
void cuda_silu_mul(struct device *dev, void *y, const void *gate_up, enum dtype gate_up_dtype,
                   int T, int F, enum dtype dtype);
void cuda_gather_rows(struct device *dev, void *y, const void *x, const int32_t *rows, int Q, int D,
                      enum dtype dtype);
void cuda_lora_shrink(struct device *dev, float *h, const void *x, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype);
void cuda_lora_expand(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                      const struct lora_site *site, int layer, enum dtype dtype);
void cuda_lora_expand_more(struct device *dev, void *y, const float *h,
                           const struct lora_view *lora, const struct lora_site *site, int layer,
                           enum dtype dtype); /* of lora_expand, where lora->expands_more */
void cuda_lora_embed(struct device *dev, void *y, float *h, const int32_t *ids,
                     const struct lora_view *lora, int D, enum dtype dtype);
void cuda_lora_head(struct device *dev, float *logits, const void *x, const struct lora_view *lora,
                    int V, int D, enum dtype dtype);
void cuda_lora_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                            enum dtype delta_dtype, const float *weight,
                            const struct lora_view *lora, int layer, enum lora_norm norm, int T,
                            int D, float eps, enum dtype dtype);
void cuda_lora_head_norm(struct device *dev, void *qkv, const float *q_weight,
                         const float *k_weight, const struct lora_view *lora, int layer,
                         const struct heads *heads, int T, float eps, enum dtype dtype);
void cuda_lora_row_norms(struct device *dev, float *norm, const struct matrix *w, const float *a,
                         const float *b, int R, float scale);
void cuda_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up, enum dtype gate_up_dtype,
                               const float *h, const struct lora_view *lora,
                               const struct lora_site *site, int layer, int T, enum dtype dtype);
void cuda_sample(struct device *dev, int32_t *ids, const float *logits,
                 const struct sample_view *view, int V);
void cuda_logprobs(struct device *dev, float *logprob, int32_t *top_ids, float *top_logprobs,
                   const float *logits, const int32_t *target, int Q, int V, int n);

bool cuda_replay(struct device *dev, const void *key, size_t bytes);
void cuda_record_end(struct device *dev);
mlora_status recordings_open(struct recordings **out);
void recordings_close(struct recordings *recordings); /* accepts NULL */
void cuda_mark(struct device *dev, int mark);
struct lap cuda_elapsed(struct device *dev, int from, int to);
void cuda_range(struct device *dev, const char *name);
void clock_close(struct clock_marks *marks); /* accepts NULL */
/* cuda_matmul of bf16 for few tokens, where it can be bound by one read of w; false elsewhere. */
bool matmul_stream(struct cuda_device *cuda, float *y, const bf16 *x, const struct matrix *w,
                   const float *bias, int T);
cudaError_t matmul_open(struct cuda_device *cuda); /* makes `exchange` and `held` */

/* A product whose blocks have whole sums is not started before the next op, which may be a silu_mul of
 * its result: then the product makes that itself. */
void matmul_make_held(struct cuda_device *cuda);
bool matmul_takes_silu(struct cuda_device *cuda, void *y, const void *gate_up,
                       enum dtype gate_up_dtype, int T, int F, enum dtype dtype);
/* A rope of rows of one token is not started before the next op, which may be the attention of its qkv:
 * then that turns what it reads, and writes the cache. */
void rope_make_held(struct cuda_device *cuda);
/* cublasLt, for cuda->blas, which is to be closed after a failure, too. */
mlora_status blas_open(struct cuda_device *cuda, const char *cache_dir, const char *gpu);
void blas_close(struct blas *blas); /* accepts NULL */
mlora_status cuda_upload_beside(struct device *dev, int lane, void *to, const void *from,
                                size_t bytes);
void cuda_move(struct device *dev, void *to, const void *from, size_t bytes);
mlora_status transfer_open(struct transfer **out);
void transfer_close(struct transfer *transfer); /* accepts NULL */

#include "kernels/cuda/instructions.cuh"
#include "kernels/cuda/numbers.cuh"

#endif
