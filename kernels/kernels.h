/* The arithmetic of the engine: one table of ops, two backends. kernels/cpu is the definition of
 * every op and the oracle for kernels/cuda, which has the same files and names.
 *
 * Ops return nothing. They may run later than the call; sync() waits and reports the first thing
 * that failed since open. Ops of one device run in the order of the calls. Pointers are memory of
 * the device unless "host" is said. A device belongs to one thread at a time.
 *
 * Activations are f32 or bf16 (`dtype` arguments), weights f32, f16 or bf16; all arithmetic is f32.
 * Where activations are bf16, each op rounds its result once, when it writes it. The residual
 * stream x is f32 whatever the activations are: it sums up all layers; and so are the products,
 * except in steps of very many tokens: what an op that reads one takes its type for
 * (product_dtype() below). Then only what goes into a product, into the cache or into attention is
 * rounded. So bf16 is nearer to the reference (transformers) in f32 than the reference in bf16,
 * which rounds more often.
 *
 * On the CPU the value of an output row does not depend on which other rows are in the call, nor
 * on the number of threads, bit for bit: a request's tokens are the same in any batch. */
#ifndef MLORA_KERNELS_H
#define MLORA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/mlora.h" /* mlora_status */
#include "kernels/views.h"

struct device;

enum { MARKS = 1 << 14, UPLOAD_LANES = 4, FENCES = 2 };

/* The time between two marks. */
struct lap {
    double seconds;
    int launches; /* kernels and copies that were started between them; -1: not known */
};

struct kernels {
    /* ---- memory --------------------------------------------------------------------------- */

    void (*close)(struct device *dev);
    /* Fresh memory aligned to 256 bytes, contents undefined. Returns OK or ENOMEM. */
    mlora_status (*alloc)(struct device *dev, size_t bytes, void **out);
    void (*free)(struct device *dev, void *memory); /* accepts NULL */
    /* Host memory that the device itself can read: an upload from there goes at full speed and
     * returns before it is done. Returns OK or ENOMEM; free_host waits for uploads, accepts NULL. */
    mlora_status (*alloc_host)(struct device *dev, size_t bytes, void **out);
    void (*free_host)(struct device *dev, void *memory);
    /* Between host and device. `from` may be reused when upload returns, but for memory of
     * alloc_host: after sync. `to` holds the data when download returns. */
    void (*upload)(struct device *dev, void *to, const void *from, size_t bytes);
    void (*download)(struct device *dev, void *to, const void *from, size_t bytes);
    /* Within the device; the two do not overlap. */
    void (*copy)(struct device *dev, void *to, const void *from, size_t bytes);
    /* Wait for all ops. Returns OK or EDEVICE, the text naming the op that failed first. */
    mlora_status (*sync)(struct device *dev);
    /* Bytes that can still be allocated, and that the device has in all. */
    void (*memory)(struct device *dev, size_t *free_bytes, size_t *total_bytes);

    /* ---- metadata ------------------------------------------------------------------------- */

    /* Expand rows to tokens: for row q and j < n = row_start[q+1] - row_start[q],
     * row[row_start[q] + j] = q and position[row_start[q] + j] = kv_len[q] - n + j.
     * Where `drawn` is given, an id below 0 becomes drawn[-1 - id], or 0 where that draw has failed:
     * what one step draws goes into the next one without the host. */
    void (*metadata)(struct device *dev, const struct batch_view *batch);

    /* ---- the decoder ---------------------------------------------------------------------- */

    /* y[t, :] = table[ids[t], :]       y [T, D] dtype    ids [T] */
    void (*embed)(struct device *dev, void *y, const struct matrix *table, const int32_t *ids,
                  int T, enum dtype dtype);

    /* x[t, :] += delta[t, :] (left out where delta is NULL)
     * y[t, :] = weight[:] * x[t, :] / sqrt(mean(x[t, :]^2) + eps)
     *   y [T, D] dtype    delta [T, D] delta_dtype    x [T, D] f32    weight [D] f32 */
    void (*add_rms_norm)(struct device *dev, void *y, float *x, const void *delta,
                         enum dtype delta_dtype, const float *weight, int T, int D, float eps,
                         enum dtype dtype);

    /* y[t, n] = dot(w[n, :], x[t, :]) + bias[n]
     *   y [T, N] y_dtype    x [T, K] dtype    bias [N] f32 or NULL */
    void (*matmul)(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                   const struct matrix *w, const float *bias, int T, enum dtype dtype);

    /* RMS norm of each query and key head before rope (Qwen3), in place:
     * qkv [T, H + 2 G, d] dtype    q_weight, k_weight [d] f32 */
    void (*head_norm)(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                      const struct heads *heads, int T, float eps, enum dtype dtype);

    /* Turn the queries and keys by their positions in place, and write keys and values to the
     * cache: with h a query or key head of token t, angle a = position[t] * frequency[i], i < d/2:
     *   h'[i] = h[i] cos a - h[i + d/2] sin a,  h'[i + d/2] = h[i + d/2] cos a + h[i] sin a
     * Where frequency is NULL they are written as they are, and qkv is not changed.
     *   qkv [T, H + 2 G, d] dtype
     * The attention of this qkv, if it is the next op, may do it; what qkv holds after that is
     * undefined. */
    void (*rope)(struct device *dev, void *qkv, const struct rope_view *rope,
                 const struct kv_view *kv, const struct batch_view *batch,
                 const struct heads *heads, enum dtype dtype);

    /* Causal attention of the step's tokens over their rows' cache, in which the step's own keys
     * and values are already written:
     *   y[t, h, :] = sum_p softmax_p(scale * q[t, h, :] . K[p, g, :]) V[p, g, :],
     * g = h / (H / G), p from max(0, position[t] - window + 1) to position[t]; q is rounded to
     * dtype where qkv is wider.
     *   y [T, H, d] dtype    qkv [T, H + 2 G, d] qkv_dtype */
    void (*attention)(struct device *dev, void *y, const void *qkv, enum dtype qkv_dtype,
                      const struct kv_view *kv, const struct batch_view *batch,
                      const struct heads *heads, enum dtype dtype);

    /* y[t, f] = silu(gate[f]) * up[f], the rows of gate_up being gate [F], up [F].
     *   y [T, F] dtype    gate_up [T, 2 F] gate_up_dtype
     * The product that gate_up is the result of, if it is the op before, may make y as it goes; what
     * gate_up holds after that is undefined. */
    void (*silu_mul)(struct device *dev, void *y, const void *gate_up, enum dtype gate_up_dtype,
                     int T, int F, enum dtype dtype);

    /* y[q, :] = x[rows[q], :]       y [Q, D], x [T, D] dtype    rows [Q] */
    void (*gather_rows)(struct device *dev, void *y, const void *x, const int32_t *rows, int Q,
                        int D, enum dtype dtype);

    /* ---- LoRA ----------------------------------------------------------------------------- */

    /* h[t, i, r] = dot(A[r, :], x[t, :]) for each token t with an adapter, slice i of the site
     * that the adapter changes, r < that linear's rank; the rest of h is not written.
     *   h [T, n_slices, max_rank] f32    x [T, K] dtype
     * The next op may make it if it is the product of x, together with what lora_expand adds to its
     * result; what h holds after that is not defined. */
    void (*lora_shrink)(struct device *dev, float *h, const void *x, const struct lora_view *lora,
                        const struct lora_site *site, int layer, enum dtype dtype);

    /* y[t, offset[i] + n] = round(y + scale * dot(B[n, :], h[t, i, :])) for the same t and i; with
     * g, b_bias and bias_delta as struct lora_factors says.
     *   y [T, N] dtype, in and out    h as lora_shrink wrote it
     * The next op may add it as it reads y; what y holds after that is not defined. */
    void (*lora_expand)(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                        const struct lora_site *site, int layer, enum dtype dtype);

    /* ---- the next token ------------------------------------------------------------------- */

    /* ids[q] = the token drawn from logits[q, :] by sampling[q]; -1 where a logit is NaN or
     * +infinity, or all are -infinity. The logits are not changed.
     *   penalties (history), then greedy: the largest, lowest id of equals; else divide by the
     *   temperature, keep the top_k largest, then the smallest set of most likely ones that
     *   reaches top_p, then those of at least min_p times the largest probability (equals of the
     *   last one kept stay), and take the largest logit + Gumbel noise, which is a draw from the
     *   softmax. noise(v) = -log(-log(u)), u in (0, 1) from philox4x32-10 (Salmon et al. 2011)
     *   with key = seed and counter = (v / 4, draw), word v % 4.
     *   ids [Q]    logits [Q, V] f32 */
    void (*sample)(struct device *dev, int32_t *ids, const float *logits,
                   const struct sample_view *view, int V);

    /* Log-probabilities under softmax(logits[q, :]): of target[q] (0 where target[q] < 0), and
     * the n largest with their ids, equals by lower id first.
     *   logprob [Q]    top_ids, top_logprobs [Q, n] (n may be 0)    target [Q] */
    void (*logprobs)(struct device *dev, float *logprob, int32_t *top_ids, float *top_logprobs,
                     const float *logits, const int32_t *target, int Q, int V, int n);

    /* ---- recordings ----------------------------------------------------------------------- */

    /* A run of ops that comes again with the same arguments can be replayed as one. replay()
     * returns true if it has started what was recorded under `key` (host, 1 to 512 bytes); then
     * the caller leaves the ops out. Else it calls them, and record_end() after the last. The key
     * holds whatever may differ between two runs: pointers, counts, sizes; what the pointers point
     * to may change freely. Only ops between the two; the CPU records nothing. */
    bool (*replay)(struct device *dev, const void *key, size_t bytes);
    void (*record_end)(struct device *dev);

    /* ---- the clock ------------------------------------------------------------------------ */

    /* Note the time when all ops before this are done, as number `mark`, below MARKS. Among the
     * ops of a recording it is noted anew at each replay. */
    void (*mark)(struct device *dev, int mark);
    /* From one mark to a later one, after sync(). */
    struct lap (*elapsed)(struct device *dev, int from, int to);

    /* ---- the rest of PEFT ----------------------------------------------------------------- */

    /* y[t, :] = own embedding[ids[t], :] for tokens whose adapter replaces that row, and
     * h[t, r] = A[ids[t], r] for those with factors of the embedding, whose A is [V, R].
     *   y [T, D] dtype    h [T, max_rank] f32 for lora_expand    ids [T] */
    void (*lora_embed)(struct device *dev, void *y, float *h, const int32_t *ids,
                       const struct lora_view *lora, int D, enum dtype dtype);

    /* logits[t, n] = dot(w[n, :], x[t, :]) for tokens whose adapter has its own head w, or rows n
     * of one.       logits [T, V] f32    x [T, D] dtype */
    void (*lora_head)(struct device *dev, float *logits, const void *x,
                      const struct lora_view *lora, int V, int D, enum dtype dtype);

    /* add_rms_norm and head_norm in which a token's weights are those of its own adapter, where it
     * has some: own[slot].norms[layer][norm]. */
    void (*lora_add_rms_norm)(struct device *dev, void *y, float *x, const void *delta,
                              enum dtype delta_dtype, const float *weight,
                              const struct lora_view *lora, int layer, enum lora_norm norm, int T,
                              int D, float eps, enum dtype dtype);
    void (*lora_head_norm)(struct device *dev, void *qkv, const float *q_weight,
                           const float *k_weight, const struct lora_view *lora, int layer,
                           const struct heads *heads, int T, float eps, enum dtype dtype);

    /* norm[n] = sqrt(sum_k (w[n, k] + scale * dot(B[n, :], A[:, k]))^2), the squares summed in
     * double: what DoRA divides by. Used when an adapter is loaded.
     *   norm [N] f32    w [N, K]    A [R, K], B [N, R] f32 */
    void (*lora_row_norms)(struct device *dev, float *norm, const struct matrix *w, const float *a,
                           const float *b, int R, float scale);

    /* ---- draft and extend ----------------------------------------------------------------- */

    /* With start[b] the sum of extend_len before b, for each request b and j < extend_len[b],
     * t = start[b] + j < capacity:
     *   token_kv_len[t] = kv_len[b] - extend_len[b] + 1 + j    clamped: min(that, topk)
     *   token_position[t] = token_kv_len[t] - 1, token_request[t] = b, token_adapter[t] = adapter[b]
     * Lengths and totals stay on the device: nothing waits. */
    void (*extend_metadata)(struct device *dev, const struct extend_view *extend);

    /* ---- lora_expand and the op that reads its result, in one ------------------------------- */

    /* lora_expand(gate_up), silu_mul; what gate_up holds after that is undefined. */
    void (*lora_expand_silu_mul)(struct device *dev, void *y, void *gate_up,
                                 enum dtype gate_up_dtype, const float *h,
                                 const struct lora_view *lora, const struct lora_site *site,
                                 int layer, int T, enum dtype dtype);

    /* ---- the pool of adapters ------------------------------------------------------------- */

    /* Copy `from` (host) to the device beside the ops, which neither wait for it nor may touch `to`
     * meanwhile. Returns when it has arrived: OK, ENOMEM or EDEVICE. Thread: one for each lane below
     * UPLOAD_LANES, none of which need be the device's. */
    mlora_status (*upload_beside)(struct device *dev, int lane, void *to, const void *from,
                                  size_t bytes);

    /* Move within the device towards lower addresses; the two may overlap. */
    void (*move)(struct device *dev, void *to, const void *from, size_t bytes);

    /* ---- ops from elsewhere --------------------------------------------------------------- */

    /* The stream (cudaStream_t) in which ops run, its device made current; NULL after a failure.
     * The CPU has none: the entry is NULL. */
    void *(*stream)(struct device *dev);

    /* ---- profilers from elsewhere --------------------------------------------------------- */

    /* The launches from here on belong to a range of that name, inside the one that is open; NULL
     * ends the inmost. The CPU has none: the entry is NULL. */
    void (*range)(struct device *dev, const char *name);

    /* ---- without waiting ------------------------------------------------------------------ */

    /* A download that returns at once: `to`, memory of alloc_host, holds the data when wait() has
     * returned for the same fence, which stands for the last fetch() under its number. */
    void (*fetch)(struct device *dev, void *to, const void *from, size_t bytes, int fence);
    /* Wait for all ops before that fetch(); later ones may go on. Returns as sync. */
    mlora_status (*wait)(struct device *dev, int fence);
};

struct device {
    const struct kernels *ops;
    const char *backend;     /* "cpu" or "cuda" */
    char description[96];    /* such as "avx512, 8 threads" */
    struct profile *profile; /* NULL, or what times its ops: kernels/profile.h */
    struct custom *custom;   /* NULL, or its ops from shared objects: kernels/custom.h */
    int exact_tokens;        /* up to which a step's products are f32: product_dtype() */
};

/* What the results of a step's products (of qkv, o, gate_up and down) are kept in until the op
 * after them has read them, `dtype` being that of the activations: f32 in steps of as many tokens as
 * the device says, on the CPU in all. Among such steps a token's result depends on T by the order of
 * sums at most, on the CPU not at all. */
static inline enum dtype product_dtype(const struct device *dev, int T, enum dtype dtype)
{
    return T <= dev->exact_tokens ? DTYPE_F32 : dtype;
}

/* n_threads 0: one per core. Returns OK or ENOMEM. */
mlora_status cpu_device_open(struct device **out, int n_threads);

/* cache_dir: a folder in which measurements of this GPU are kept for the next process, made where
 * it is missing; NULL: they are made again each time. A damaged file there is as good as none.
 * Returns OK, ENOMEM, or EUNSUPPORTED: built without CUDA, there is no usable GPU, or a library
 * that it needs is missing. */
mlora_status cuda_device_open(struct device **out, int ordinal, const char *cache_dir);

#endif
