/* Plain structs that the ops read. Their pointers are device memory unless "host" is said; the
 * structs themselves are host memory and passed by address.
 *
 * Letters, everywhere: T tokens in the step, Q requests ("rows") in it, S adapter slots, D model
 * width, H query heads, G key/value heads, d head width, F MLP width, V vocabulary, N and K
 * output and input width of a matmul, R rank, L layers. */
#ifndef MLORA_KERNELS_VIEWS_H
#define MLORA_KERNELS_VIEWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/dtype.h"

/* A weight matrix: row n holds the K inputs of output n. */
struct matrix {
    const void *data; /* [N, K] dtype, rows one after another */
    enum dtype dtype;
    int N, K;
};

/* The tokens of one step. Rows follow one another: row q owns tokens row_start[q] up to
 * row_start[q + 1]; they are the last ones of its sequence so far. A row of one token is a
 * decode, a longer one (part of) a prompt: no op tells them apart but by length. */
struct batch_view {
    int T, Q;
    int max_row;              /* tokens of the longest row                                       */
    int max_kv;               /* at least the largest kv_len                                     */
    int32_t *ids;             /* [T] token ids; -1 - i: draw i of the step before, until metadata */
                              /* puts it in                                                      */
    const int32_t *drawn;     /* what the step before has drawn; NULL: no id is below 0          */
    const int32_t *row_start; /* [Q + 1]                                                         */
    const int32_t *kv_len;    /* [Q] tokens of the sequence, those of this step included         */
    int32_t *position;        /* [T] written by metadata: kv_len[q] - row's tokens + index in it */
    int32_t *row;             /* [T] written by metadata: q                                      */
};

enum { KV_BLOCK = 16 }; /* tokens of a KV block */

/* The KV cache of one layer. Position p of row q lies in block table[q][p / KV_BLOCK] at
 * p % KV_BLOCK: K[block][g][p % KV_BLOCK][:], so that a head's tokens in a block are together. */
struct kv_view {
    void *k;                    /* [n_blocks, G, KV_BLOCK, d] dtype */
    void *v;                    /* [n_blocks, G, KV_BLOCK, d] dtype */
    const int32_t *block_table; /* [Q, max_blocks], entries past a row's length are not read */
    int max_blocks;
    enum dtype dtype;
};

/* Sizes of the attention of one layer. qkv rows are [H + 2 G, d]: queries, keys, values. */
struct heads {
    int H, G, d;
    int window;  /* a token sees itself and the window - 1 before it; 0: all before it */
    float scale; /* of q . k, d^-0.5 */
};

/* Rotary embedding: element i < d/2 of a head turns with element i + d/2 by
 * position * frequency[i]; cos and sin are multiplied by `amplitude` (1 but for yarn). */
struct rope_view {
    const float *frequency; /* [d / 2], or NULL: nothing is turned */
    float amplitude;
};

/* ---- LoRA --------------------------------------------------------------------------------- */

/* The linears of a layer that adapters change, in the order of their outputs at a site. */
enum lora_linear { LORA_Q, LORA_K, LORA_V, LORA_O, LORA_GATE, LORA_UP, LORA_DOWN, LORA_LINEARS };

/* What adapters change outside the layers: a table of factors has one more "layer", the last, in
 * which these are the linears. */
enum { LORA_EMBEDDING = 0, LORA_HEAD = 1 };

/* The norms of a layer that adapters may replace; the last norm is the first of layer L. */
enum lora_norm { NORM_ATTENTION, NORM_MLP, NORM_Q, NORM_K, LORA_NORMS, NORM_FINAL = 0 };

enum { LORA_SLICES_MAX = 3, LORA_RANK_MAX = 512 };

/* A place in the layer where one input feeds one fused base matmul: its slices are linears that
 * share x and whose outputs lie one after another in y. */
struct lora_site {
    int linear;                  /* the first one: enum lora_linear                  */
    int n_slices;                /* 1 to LORA_SLICES_MAX                             */
    int K;                       /* width of x                                       */
    int N;                       /* width of y, the sum of the slices                */
    int offset[LORA_SLICES_MAX]; /* of each slice in y                              */
    int width[LORA_SLICES_MAX];  /* of each slice                                   */
    const float *bias;           /* [N] that the base product has added, or NULL    */
};

/* One adapter's factors of one linear: y += scale * B (A x), and with what stands below, each of
 * which may be NULL:
 *   y += (g - 1) * (y - bias) + g * scale * (B (A x) + b_bias) + bias_delta,
 * element by element, bias being the base's. */
struct lora_factors {
    const void *a; /* [R, K] dtype, of the embedding [K, R]; NULL: there are no factors */
    const void *b; /* [N, R] dtype */
    int32_t R;
    int32_t dtype; /* enum dtype */
    float scale;
    const float *g;          /* [N] DoRA: magnitude by norm of the adapted row          */
    const float *b_bias;     /* [N] lora_bias                                           */
    const float *bias_delta; /* [N] the adapter's bias less the base's; may stand alone */
};

/* Rows that replace some of a matrix. */
struct lora_rows {
    const int32_t *ids; /* [n] ascending */
    const void *data;   /* [n, D] dtype  */
    int32_t n;
    int32_t dtype; /* enum dtype */
};

/* What one adapter has in the place of weights of the base; data NULL: nothing. */
struct lora_own {
    struct matrix embedding; /* [V, D] */
    struct matrix head;      /* [V, D] */
    struct lora_rows embedding_rows, head_rows;
    const float *const *norms; /* [L, LORA_NORMS] and the last one: [D] or [d] f32, or NULL */
};

/* Which adapter each token uses. A segment is the tokens of one adapter. */
struct lora_view {
    const struct lora_factors *factors; /* [S, L, LORA_LINEARS]: a slot's are together        */
    int L;                              /* layers of the table: the model's and the one outside  */
    int n_segments;                     /* 0: nothing to do                                      */
    int n_tokens;                       /* of all segments                                       */
    int max_rank;                       /* largest rank among the segments: pitch of h           */
    int max_segment;                    /* no segment has more tokens                            */
    int mode;                           /* mlora_lora_mode: how, never what; the CPU has one way */
    const int32_t *slot;                /* [T] slot of each token, -1: base model only           */
    const int32_t *segment_slot;        /* [n_segments]                                          */
    const int32_t *segment_start;       /* [n_segments + 1] into `order`                         */
    const int32_t *order;               /* [n_tokens] tokens sorted by slot, stable              */
    const struct lora_own *own;         /* [S]                                                   */
    /* Some adapter of the step changes these: else the ops for them are not called. */
    bool changes_embedding, changes_head, changes_norms;
    bool expands_more; /* some factors of the step have g, b_bias or bias_delta */
    /* All factors of the step are bf16 and finite, begin at multiples of 16 bytes and have a rank
     * that is a multiple of 8: false where nobody knows. */
    bool is_plain;
    /* Segments of slot -1 that have tokens, which no op works on, may stand among the others. Those of
     * no token, or fewer, may in any case. */
    bool has_base_segments;
    bool h_by_slice; /* h is [n_slices, n_rows, max_rank], else [T, n_slices, max_rank] */
    int n_rows;      /* T: of h, and of x and y    */
};

/* ---- sampling ----------------------------------------------------------------------------- */

/* How one row's next token is drawn; see mlora_request for the meaning of each field. */
struct sampling {
    float temperature; /* 0: greedy */
    float top_p;
    float min_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    int32_t top_k;
    uint32_t draw; /* how many tokens the request has drawn before: the counter of its noise */
    uint64_t seed;
};

struct sample_view {
    int Q;
    const struct sampling *sampling; /* [Q] */
    /* Tokens of the rows that have a penalty, prompt first; other rows are empty. */
    const int32_t *history;       /* [history_start[Q]] */
    const int32_t *history_start; /* [Q + 1] */
    const int32_t *n_prompt;      /* [Q] how many of the row's history are prompt */
};

/* ---- draft and extend --------------------------------------------------------------------- */

/* How a token finds its request. By request: each request writes its own run of tokens. */
enum extend_search {
    EXTEND_ADAPTIVE, /* linear for up to EXTEND_LINEAR_MAX requests, binary above */
    EXTEND_LINEAR,
    EXTEND_BINARY,
    EXTEND_BY_REQUEST
};

enum { EXTEND_LINEAR_MAX = 16, EXTEND_BLOCK = 256 /* tokens of a block of threads */ };

/* A batch in which request b extends its sequence by extend_len[b] tokens, whose number the host
 * need not know: drafted tokens, or those that a verification has accepted. */
struct extend_view {
    int bs;       /* requests, 0 or more                           */
    int capacity; /* tokens that each output below has room for    */
    int topk;     /* upper bound of clamped_kv_len                 */
    enum extend_search search;
    bool has_int64_lengths; /* extend_len and kv_len are int64, else int32             */
    bool fills_tail;        /* entries from `total` to capacity become `tail`          */
    int32_t tail;           /* else they are left as they are                          */
    const void *extend_len; /* [bs] 0 or more; their sum fits int32                    */
    const void *kv_len;     /* [bs] tokens of the sequence, those of extend_len included */
    const int32_t *adapter; /* [bs] or NULL where token_adapter is                     */
    int32_t *total;         /* [1] the sum of extend_len, also where it exceeds capacity */
    int32_t *request_start; /* [bs + 1] first token of each request, and the total     */
    int32_t *token_kv_len;  /* [capacity] each may be NULL: not wanted                 */
    int32_t *clamped_kv_len;
    int32_t *token_position;
    int32_t *token_request;
    int32_t *token_adapter;
};

#endif
