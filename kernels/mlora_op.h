/* Writing an op of your own: a shared object that stands in the place of one of mlora's ops.
 *
 *     #include "mlora_op.h"
 *
 *     static int run(const mlora_op_call *call, const void *arguments)
 *     {
 *         const mlora_op_silu_mul *op = arguments;
 *         ...
 *         return 0;
 *     }
 *
 *     MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "silu_mul", .backend = "cpu", .run = run};
 *
 * `mlora check-op ./my_op.so` compares it with what it replaces, `--op silu_mul=./my_op.so` uses it.
 * This header needs nothing but the standard library and compiles as C99 and as C++.
 *
 * Letters: T tokens of the step, D model width, F MLP width, N and K output and input width of a
 * matrix, H query heads, G key/value heads, d head width, R rank. Activations are f32 or bf16, which
 * `dtype` says: in an engine with an op from a file all are of one type, the results of products,
 * too, but for the residual stream and the logits. Arithmetic is to be f32, rounded once when a
 * result is written. A token's result must not depend on the other tokens of the call. */
#ifndef MLORA_OP_H
#define MLORA_OP_H

#include <stdint.h>

/* Changes whenever a struct below does, or what it says: an op of another version is refused. */
#define MLORA_OP_ABI 2

#define MLORA_OP_SYMBOL "mlora_op_export"

#ifdef __cplusplus
#define MLORA_OP_EXPORT                                                                            \
    extern "C" __attribute__((visibility("default"))) const mlora_op mlora_op_export;              \
    const mlora_op mlora_op_export
#else
#define MLORA_OP_EXPORT __attribute__((visibility("default"))) const mlora_op mlora_op_export
#endif

typedef enum mlora_op_dtype {
    MLORA_OP_F32 = 0,
    MLORA_OP_F16 = 1, /* weights and LoRA factors only */
    MLORA_OP_BF16 = 2
} mlora_op_dtype;

/* ---- a call ------------------------------------------------------------------------------- */

typedef struct mlora_op_call mlora_op_call;

/* Do items [begin, end); `thread` is below n_threads and no one else's meanwhile. */
typedef void (*mlora_op_part)(void *context, int begin, int end, int thread);

struct mlora_op_call {
    void *state;   /* what open() gave */
    void *stream;  /* cuda: the cudaStream_t on which all work is to be started; its device is
                    * current. The call may be in a capture: start kernels and copies on this
                    * stream, and do not wait, allocate or use another stream. cpu: NULL */
    int n_threads; /* cpu: of parallel(); cuda: 0 */
    /* cpu: share n_items out to the threads, `grain` at a time, and wait; cuda: NULL */
    void (*parallel)(const mlora_op_call *call, int n_items, int grain, mlora_op_part part,
                     void *context);
    void *device; /* mlora's */
};

/* ---- arguments, a struct for each op -------------------------------------------------------- */

/* Pointers are memory of the backend: on cuda they are not to be read by the host. Rows follow one
 * another without gaps. T is at least 1. */

/* y[t, f] = silu(gate[f]) * up[f], the rows of gate_up being gate [F], up [F]. */
typedef struct mlora_op_silu_mul {
    void *y;             /* [T, F] dtype   */
    const void *gate_up; /* [T, 2 F] dtype */
    int32_t T, F;
    int32_t dtype;
} mlora_op_silu_mul;

/* x[t, :] += delta[t, :];  y[t, :] = weight[:] * x[t, :] / sqrt(mean(x[t, :]^2) + eps)
 * x is the residual stream: f32 whatever dtype is. */
typedef struct mlora_op_add_rms_norm {
    void *y;             /* [T, D] dtype                */
    float *x;            /* [T, D], in and out          */
    const void *delta;   /* [T, D] dtype; NULL: nothing */
    const float *weight; /* [D]                         */
    int32_t T, D;
    float eps;
    int32_t dtype;
} mlora_op_add_rms_norm;

/* y[t, n] = dot(w[n, :], x[t, :]) + bias[n]: every linear of the model, and its head. */
typedef struct mlora_op_matmul {
    void *y;           /* [T, N] y_dtype */
    const void *x;     /* [T, K] x_dtype */
    const void *w;     /* [N, K] w_dtype */
    const float *bias; /* [N] or NULL    */
    int32_t T, N, K;
    int32_t y_dtype, x_dtype, w_dtype;
} mlora_op_matmul;

#define MLORA_OP_KV_BLOCK 16 /* tokens of a block of the KV cache */

/* Turn the queries and keys in place, and write keys and values to the cache. With h a query or key
 * head of token t, angle a = position[t] * frequency[i], i < d / 2, c = amplitude:
 *   h'[i] = c (h[i] cos a - h[i + d/2] sin a),  h'[i + d/2] = c (h[i + d/2] cos a + h[i] sin a)
 * and, with p = position[t], block = block_table[row[t]][p / 16], for each g < G:
 *   k[block][g][p % 16][:] = key head g,  v[block][g][p % 16][:] = value head g */
typedef struct mlora_op_rope {
    void *qkv;                  /* [T, H + 2 G, d] dtype: queries, keys, values */
    void *k, *v;                /* [blocks, G, 16, d] kv_dtype                  */
    const float *frequency;     /* [d / 2]                                      */
    const int32_t *position;    /* [T]                                          */
    const int32_t *row;         /* [T]                                          */
    const int32_t *block_table; /* [rows, max_blocks]                           */
    int32_t T, H, G, d, max_blocks;
    float amplitude;
    int32_t dtype, kv_dtype;
} mlora_op_rope;

/* One adapter's factors of one linear. */
typedef struct mlora_op_factors {
    const void *a; /* [R, K] dtype; NULL: there are none */
    const void *b; /* [N of the slice, R] dtype          */
    int32_t R;
    int32_t dtype;
    float scale;
    /* Each NULL but for adapters that need it (DoRA, lora_bias, biases); see lora_expand. */
    const float *g, *b_bias, *bias_delta; /* [N of the slice] */
} mlora_op_factors;

/* A base product of width N is followed by what adapters add to its slices: linears that share x
 * (queries, keys and values; gate and up), whose outputs lie one after another in y. */
typedef struct mlora_op_lora {
    /* Of token t and slice i: factors[slot[t] * slot_pitch + i], in the memory of the backend. */
    const mlora_op_factors *factors;
    int32_t slot_pitch;
    int32_t T;                    /* tokens of the step                               */
    int32_t n_slices;             /* 1 to 3                                           */
    int32_t K, N;                 /* width of x, and of y                             */
    int32_t offset[3], width[3];  /* of each slice in y                               */
    const float *bias;            /* [N] that y holds already, or NULL                */
    int32_t n_segments;           /* at least 1                                       */
    int32_t n_tokens;             /* of all segments                                  */
    int32_t max_rank;             /* pitch of h                                       */
    int32_t max_segment;          /* no segment has more tokens                       */
    const int32_t *slot;          /* [T]; -1: no adapter                              */
    const int32_t *segment_slot;  /* [n_segments]; -1: nothing to do, as for its tokens */
    const int32_t *segment_start; /* [n_segments + 1] into `order`                    */
    const int32_t *order;         /* [n_tokens] tokens by slot                        */
    int32_t expands_more;         /* some factors have g, b_bias or bias_delta        */
} mlora_op_lora;

/* h[t, i, r] = dot(A[r, :], x[t, :]) for each token with an adapter, each slice i for which it has
 * factors, r < their R; nothing else of h is written. */
typedef struct mlora_op_lora_shrink {
    float *h;      /* [T, n_slices, max_rank] */
    const void *x; /* [T, K] dtype            */
    mlora_op_lora lora;
    int32_t dtype;
} mlora_op_lora_shrink;

/* y[t, offset[i] + n] += scale * dot(B[n, :], h[t, i, :]) for the same t and i, n < width[i]; with
 * the arrays that may be NULL, each as 1 (g) or 0 where it is:
 *   y += (g - 1) * (y - bias) + g * scale * (dot(B[n, :], h) + b_bias) + bias_delta
 * where a linear without factors may still have bias_delta. */
typedef struct mlora_op_lora_expand {
    void *y;        /* [T, N] dtype, in and out */
    const float *h; /* [T, n_slices, max_rank]  */
    mlora_op_lora lora;
    int32_t dtype;
} mlora_op_lora_expand;

/* ---- the op ------------------------------------------------------------------------------- */

typedef struct mlora_op {
    uint32_t abi;        /* MLORA_OP_ABI                                                          */
    const char *name;    /* silu_mul, add_rms_norm, matmul, rope, lora_shrink or lora_expand      */
    const char *backend; /* "cpu" or "cuda"                                                       */
    /* Return 0, or a number of your own for a failure: after one, the engine can only be closed.
     * `arguments` is a struct mlora_op_<name>, which lives until run() returns. */
    int (*run)(const mlora_op_call *call, const void *arguments);
    /* Once for each engine, before the first call and after the last; either may be NULL. */
    int (*open)(void **state);
    void (*close)(void *state);
    /* For an op that is another function than the one it replaces: its definition, for check-op.
     * Called like run() with state NULL, on host memory, every dtype MLORA_OP_F32; sums in double.
     * NULL: the op computes what it replaces computes. */
    int (*reference)(const mlora_op_call *call, const void *arguments);
} mlora_op;

#endif
