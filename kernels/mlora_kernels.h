/* The kernels of mlora for programs that have their own engine: LoRA for many adapters in one
 * batch, attention over a paged cache, and the metadata of draft and extend steps, on raw pointers.
 * This header is all of it; libmlora_kernels.so needs nothing else of mlora.
 *
 *     mlora_kernels *kernels;
 *     if (mlora_kernels_open(&kernels, MLORA_KERNELS_VERSION, MLORA_KERNELS_CUDA, 0) != 0)
 *         return puts(mlora_kernels_error());
 *     mlora_kernels_lora lora = {0};        // shapes, the table of factors, who uses which
 *     ...
 *     size_t bytes;
 *     mlora_kernels_lora_workspace(kernels, &lora, &bytes);
 *     mlora_kernels_run run = {stream, workspace, bytes};
 *     mlora_kernels_lora_add(kernels, y, x, &lora, &run);
 *     mlora_kernels_close(kernels);
 *
 * Memory. Every pointer inside a struct and every tensor is memory of the device (on the CPU: of
 * the host) and borrowed until the work is done; the structs themselves are host memory, read
 * before the call returns. Nothing is kept between calls. Tensors are dense, the last index
 * fastest; alignment to the size of an element is needed, to 16 bytes is faster.
 *
 * Time. On a GPU a call starts work on the caller's stream and returns; it neither waits nor
 * allocates, so it may be recorded in a CUDA graph (call each op once before the first recording:
 * the driver loads kernels then). On the CPU the work is done when the call returns, and its
 * scratch belongs to the handle: it grows to what the largest call needs.
 *
 * Threads. One thread at a time uses a handle, and its work is on one stream at a time: attention,
 * the mode gbmm and GPUs before Hopper count arrivals in memory of the handle. Handles are
 * independent; open one for each stream where work overlaps. The thread's current CUDA device is
 * after each call what it was before.
 *
 * Errors. Every function that can fail returns an mlora_kernels_status. What the host can see
 * (shapes, types, NULL, alignment, the workspace's size) is checked and refused before anything is
 * started. What only the device can see (slots, indices, lengths) is the caller's promise. */
#ifndef MLORA_KERNELS_ABI_H
#define MLORA_KERNELS_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MLORA_KERNELS_API __attribute__((visibility("default")))
#else
#define MLORA_KERNELS_API
#endif

/* Structs and functions of one version never change; another version is refused at open. */
#define MLORA_KERNELS_VERSION 1

/* ---- status ------------------------------------------------------------------------------- */

typedef enum mlora_kernels_status {
    MLORA_KERNELS_OK = 0,
    MLORA_KERNELS_EINVAL = -1,       /* the caller broke a rule written in this header         */
    MLORA_KERNELS_ENOMEM = -2,       /* host or device memory ran out, at open                 */
    MLORA_KERNELS_EUNSUPPORTED = -5, /* no such backend or GPU here; the text says what to do  */
    MLORA_KERNELS_EDEVICE = -7       /* a kernel could not be started, or one before it failed */
} mlora_kernels_status;

/* What failed last on this thread, in one line without a newline, such as
 * "lora: max_rank is 600, at most 512 is served". Never NULL; valid until the next mlora_kernels_
 * call on the same thread. Thread: any. */
MLORA_KERNELS_API const char *mlora_kernels_error(void);

/* MLORA_KERNELS_VERSION of the library, which may differ from the header's. Thread: any. */
MLORA_KERNELS_API int mlora_kernels_version(void);

/* ---- the handle --------------------------------------------------------------------------- */

typedef struct mlora_kernels mlora_kernels;

typedef enum mlora_kernels_backend {
    MLORA_KERNELS_CPU = 1,
    MLORA_KERNELS_CUDA = 2
} mlora_kernels_backend;

/* Open a backend.
 *
 * version   MLORA_KERNELS_VERSION of the header that the caller was compiled with
 * backend   one of mlora_kernels_backend
 * ordinal   CUDA: which GPU. CPU: number of threads, 0: one for each core
 *
 * Returns OK; EINVAL, ENOMEM, EUNSUPPORTED with *out = NULL. On a GPU it allocates about 35 MiB
 * there, once, and waits for it: not while a stream of the thread is being recorded.
 * Thread: any. */
MLORA_KERNELS_API int mlora_kernels_open(mlora_kernels **out, int version, int backend,
                                         int ordinal);

/* Waits for the handle's work on a GPU's own stream only: the caller has waited for its streams.
 * NULL is allowed. */
MLORA_KERNELS_API void mlora_kernels_close(mlora_kernels *kernels);

typedef struct mlora_kernels_facts {
    int version;              /* MLORA_KERNELS_VERSION of the library                       */
    int backend;              /* mlora_kernels_backend                                      */
    int capability;           /* of the GPU, 90 for 9.0; 0 on the CPU                       */
    int n_multiprocessors;    /* of the GPU; 0 on the CPU                                   */
    int max_rank, max_slices; /* LoRA                                                       */
    int max_tokens;           /* T of any op                                                */
    int kv_block;             /* tokens of a block of the cache                             */
    int extend_linear_max;    /* requests up to which the adaptive search is linear         */
    int extend_block;         /* tokens of a block of threads in extend_metadata            */
    char description[96];     /* such as "NVIDIA H200, 140 GiB" or "avx512, 8 threads"      */
    char architectures[64];   /* GPU code in the library, such as "800,900"; "": none       */
} mlora_kernels_facts;

MLORA_KERNELS_API int mlora_kernels_info(const mlora_kernels *kernels, mlora_kernels_facts *out);

typedef enum mlora_kernels_dtype {
    MLORA_KERNELS_F32 = 0,
    MLORA_KERNELS_F16 = 1,
    MLORA_KERNELS_BF16 = 2
} mlora_kernels_dtype;

/* Where a call works. On the CPU only lora_add() reads it, for its workspace; else it may be NULL
 * there. */
typedef struct mlora_kernels_run {
    void *stream;           /* cudaStream_t of the handle's GPU; NULL: the default stream      */
    void *workspace;        /* at least what the op's _workspace function says; aligned to 256 */
    size_t workspace_bytes; /* contents before and after are undefined; NULL where 0 is needed */
} mlora_kernels_run;

/* ---- LoRA --------------------------------------------------------------------------------- */

/* One adapter's factors of one linear: y += scale * B (A x), and with what stands below:
 *   y += (g - 1) * (y - bias) + g * scale * (B (A x) + b_bias) + bias_delta, by element. */
typedef struct mlora_kernels_factors {
    const void *a; /* [rank, K] dtype; NULL: the adapter does not change this linear */
    const void *b; /* [N, rank] dtype */
    int32_t rank;  /* 1 to max_rank of the call */
    int32_t dtype; /* mlora_kernels_dtype */
    float scale;
    const float *g;          /* [N] DoRA, or NULL       */
    const float *b_bias;     /* [N] lora_bias, or NULL  */
    const float *bias_delta; /* [N] or NULL             */
} mlora_kernels_factors;

enum { MLORA_KERNELS_LINEARS = 7, MLORA_KERNELS_SLICES = 3 };

/* The ways to make the products: how, never what. Activations of f32 are shrunk as in bgmv where
 * sgmv is said; the CPU has one way. */
typedef enum mlora_kernels_mode {
    MLORA_KERNELS_AUTO = 0,
    MLORA_KERNELS_LOOP = 1,
    MLORA_KERNELS_GBMM = 2,
    MLORA_KERNELS_BGMV = 3,
    MLORA_KERNELS_SGMV = 4,
    MLORA_KERNELS_FUSED = 5 /* as sgmv, and inside silu_mul */
} mlora_kernels_mode;

/* A site: one input x [T, K] feeds n_slices linears, whose outputs stand in columns of y [T, N].
 * Segments are the tokens of one adapter, one after another in `order`: segment i owns
 * order[segment_start[i]] to order[segment_start[i + 1] - 1]. Segments of slot -1 and those of
 * less than one token are skipped, in any place; so the host need not know how many are in use. */
typedef struct mlora_kernels_lora {
    const mlora_kernels_factors *factors; /* [S, n_layers, MLORA_KERNELS_LINEARS]              */
    int n_layers, layer;                  /* of the table; 1 and 0 for a table of one site     */
    int linear;                           /* entry of slice 0; slice i has entry linear + i    */
    int n_slices;                         /* 1 to MLORA_KERNELS_SLICES                         */
    int T, K, N;                          /* x [T, K], y [T, N]                                */
    int offset[MLORA_KERNELS_SLICES];     /* first column of each slice in y                   */
    int width[MLORA_KERNELS_SLICES];      /* its columns                                       */
    int dtype;                            /* of x and y: F32 or BF16                           */
    int mode;                             /* mlora_kernels_mode                                */
    int max_rank;                         /* pitch of h: at least every rank of the call       */
    int h_by_slice;               /* h is [n_slices, T, max_rank], else [T, n_slices, max_rank] */
    int expands_more;             /* some factors of the call have g, b_bias, bias_delta */
    const float *bias;            /* [N] that the base product has added, or NULL      */
    int n_segments;               /* entries of segment_slot                           */
    int n_tokens;                 /* entries of order, at most T                       */
    int max_segment;              /* at least the tokens of the longest segment        */
    const int32_t *slot;          /* [T] slot of each token, -1: no adapter            */
    const int32_t *segment_slot;  /* [n_segments] -1: skipped                          */
    const int32_t *segment_start; /* [n_segments + 1]                                  */
    const int32_t *order;         /* [n_tokens] tokens sorted by slot                  */
} mlora_kernels_lora;

/* Bytes of workspace for the LoRA functions below with these shapes, counts and mode (pointers
 * may be NULL). */
MLORA_KERNELS_API int mlora_kernels_lora_workspace(const mlora_kernels *kernels,
                                                   const mlora_kernels_lora *lora, size_t *out);

/* h[t, i, r] = dot(A[r, :], x[t, :]) for tokens with an adapter, r below its rank; the rest of h
 * is left as it is.        h f32    x [T, K] */
MLORA_KERNELS_API int mlora_kernels_lora_shrink(mlora_kernels *kernels, float *h, const void *x,
                                                const mlora_kernels_lora *lora,
                                                const mlora_kernels_run *run);

/* y[t, offset[i] + n] = round(y + scale * dot(B[n, :], h[t, i, :])) for the same tokens. */
MLORA_KERNELS_API int mlora_kernels_lora_expand(mlora_kernels *kernels, void *y, const float *h,
                                                const mlora_kernels_lora *lora,
                                                const mlora_kernels_run *run);

/* Both, h being in the workspace. */
MLORA_KERNELS_API int mlora_kernels_lora_add(mlora_kernels *kernels, void *y, const void *x,
                                             const mlora_kernels_lora *lora,
                                             const mlora_kernels_run *run);

/* lora_expand on gate_up [T, 2 F], whose slices are gate (columns 0 to F - 1) and up, then
 * y[t, f] = silu(gate[f]) * up[f] for every token; what gate_up holds then is undefined.
 * y [T, F]    n_slices 2, width F, F, N 2 F */
MLORA_KERNELS_API int mlora_kernels_lora_expand_silu_mul(mlora_kernels *kernels, void *y,
                                                         void *gate_up, const float *h,
                                                         const mlora_kernels_lora *lora,
                                                         const mlora_kernels_run *run);

/* ---- the paged cache ---------------------------------------------------------------------- */

/* Rows of new tokens over a cache in blocks of kv_block (16) tokens. Row q owns tokens
 * row_start[q] to row_start[q + 1] - 1, the last ones of its sequence of kv_len[q] tokens. Position
 * p of row q lies in block block_table[q][p / 16] at p % 16: K[block][g][p % 16][:]. */
typedef struct mlora_kernels_paged {
    int T, Q;                   /* tokens, rows                                               */
    int H, G, d;                /* query heads, key and value heads, width: d even, up to 512 */
    int max_row, max_kv;        /* tokens of the longest row; at least the largest kv_len     */
    int window;                 /* a token sees itself and window - 1 before it; 0: all       */
    float scale;                /* of q . k                                                   */
    int dtype, kv_dtype;        /* of qkv and y, of the cache: F32 or BF16                    */
    void *k, *v;                /* [n_blocks, G, 16, d] kv_dtype                              */
    int max_blocks;             /* pitch of block_table                                       */
    const int32_t *block_table; /* [Q, max_blocks]                                            */
    const int32_t *row_start;   /* [Q + 1]                                                    */
    const int32_t *kv_len;      /* [Q] those of this step included                            */
    const int32_t *position;    /* [T] of each token in its sequence                          */
    const int32_t *row;         /* [T] q of each token                                        */
    const float *frequency;     /* kv_write: [d / 2] rotary, or NULL: heads are not turned    */
    float amplitude;            /* kv_write: of the cosines and sines, 1 where in doubt       */
} mlora_kernels_paged;

/* Write the step's keys and values to the cache. With `frequency`, queries and keys are turned by
 * their positions first, in place: element i < d/2 with element i + d/2, by position *
 * frequency[i].        qkv [T, H + 2 G, d], in and out */
MLORA_KERNELS_API int mlora_kernels_kv_write(mlora_kernels *kernels, void *qkv,
                                             const mlora_kernels_paged *paged,
                                             const mlora_kernels_run *run);

MLORA_KERNELS_API int mlora_kernels_attention_workspace(const mlora_kernels *kernels,
                                                        const mlora_kernels_paged *paged,
                                                        size_t *out);

/* Causal attention over what is in the cache, the step's own keys and values included:
 *   y[t, h, :] = sum_p softmax_p(scale * q[t, h, :] . K[p, g, :]) V[p, g, :], g = h / (H / G).
 *   y [T, H, d]    qkv [T, H + 2 G, d] */
MLORA_KERNELS_API int mlora_kernels_attention(mlora_kernels *kernels, void *y, const void *qkv,
                                              const mlora_kernels_paged *paged,
                                              const mlora_kernels_run *run);

/* ---- draft and extend --------------------------------------------------------------------- */

typedef enum mlora_kernels_search {
    MLORA_KERNELS_ADAPTIVE = 0, /* linear for up to extend_linear_max requests, binary above */
    MLORA_KERNELS_LINEAR = 1,
    MLORA_KERNELS_BINARY = 2,
    MLORA_KERNELS_BY_REQUEST = 3
} mlora_kernels_search;

/* With start[b] the sum of extend_len before b, for request b and j < extend_len[b],
 * t = start[b] + j < capacity:
 *   token_kv_len[t] = kv_len[b] - extend_len[b] + 1 + j    clamped_kv_len[t] = min(that, topk)
 *   token_position[t] = token_kv_len[t] - 1, token_request[t] = b, token_adapter[t] = adapter[b] */
typedef struct mlora_kernels_extend {
    int bs, capacity, topk; /* requests; tokens that each output has room for; upper bound */
    int search;             /* mlora_kernels_search                                        */
    int has_int64_lengths;  /* extend_len and kv_len are int64, else int32                 */
    int fills_tail;         /* entries from the total to capacity become `tail`, else kept */
    int32_t tail;
    const void *extend_len; /* [bs] 0 or more; their sum fits int32                        */
    const void *kv_len;     /* [bs] those of extend_len included                           */
    const int32_t *adapter; /* [bs], or NULL where token_adapter is                        */
    int32_t *total;         /* [1] the sum of extend_len, also where it exceeds capacity   */
    int32_t *request_start; /* [bs + 1]                                                    */
    int32_t *token_kv_len;  /* [capacity], each of these may be NULL: not wanted           */
    int32_t *clamped_kv_len;
    int32_t *token_position;
    int32_t *token_request;
    int32_t *token_adapter;
} mlora_kernels_extend;

/* One launch; the host learns nothing, so nothing waits. No workspace. */
MLORA_KERNELS_API int mlora_kernels_extend_metadata(mlora_kernels *kernels,
                                                    const mlora_kernels_extend *extend,
                                                    const mlora_kernels_run *run);

#ifdef __cplusplus
}
#endif

#endif
