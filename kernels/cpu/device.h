/* The CPU device: host memory, a pool of threads, and the vector code chosen for this machine.
 * Ops are done when they return. */
#ifndef MLORA_KERNELS_CPU_DEVICE_H
#define MLORA_KERNELS_CPU_DEVICE_H

#include <stddef.h>

#include "kernels/cpu/simd.h"
#include "kernels/cpu/threads.h"
#include "kernels/kernels.h"

/* Memory that an op needs while it runs, kept for the next one and grown when it needs more. */
enum scratch_use {
    SCRATCH_OP,     /* the op's own                                        */
    SCRATCH_ROWS,   /* cpu_rows_f32()                                      */
    SCRATCH_COUNTS, /* sample: zeros between ops, kept so by the op itself */
    SCRATCH_USES
};

struct cpu_device {
    struct device base; /* first, so that a struct device * is one of these */
    struct threads *threads;
    const struct simd *simd;
    void *scratch[SCRATCH_USES];
    size_t scratch_bytes[SCRATCH_USES];
    const char *failed_op; /* the first that ran out of memory: all later ones do nothing */
    size_t failed_bytes;
    double *marks;          /* [MARKS] seconds; NULL before the first mark */
    struct mapping *mapped; /* its largest blocks of memory */
};

static inline struct cpu_device *cpu_device(struct device *device)
{
    return (struct cpu_device *)device;
}

static inline int ceil_div(int a, int b)
{
    return a / b + (a % b != 0);
}

static inline int min_int(int a, int b)
{
    return a < b ? a : b;
}

/* Element `index` of an array of `dtype`. */
static inline void *element(const void *array, enum dtype dtype, size_t index)
{
    return (char *)array + index * dtype_bytes(dtype);
}

/* Scratch memory of at least `bytes`, aligned to 64: fresh memory is zeros, else contents are
 * what the last user left. Valid until the next call for the same use. NULL when memory has run
 * out, now or in an earlier op; the op then returns and sync reports it. */
void *cpu_scratch(struct device *dev, enum scratch_use use, size_t bytes, const char *op);

/* Rows of x [., K] as f32: pointers to row index[i], or to row i where `index` is NULL, for
 * i < n_rows. Valid until the next call. NULL as above. */
const float *const *cpu_rows_f32(struct device *dev, const void *x, const int32_t *index,
                                 int n_rows, int K, enum dtype dtype, const char *op);

/* Share items 0 to n_items - 1 out to the threads, at least `grain` at a time. */
void cpu_parallel(struct device *dev, int n_items, int grain, threads_fn fn, void *context);

/* The ops, each defined in the file that the comment names; the formulas are in kernels.h. */

/* clock.c */
void cpu_mark(struct device *dev, int mark);
struct lap cpu_elapsed(struct device *dev, int from, int to);

/* metadata.c */
void cpu_extend_metadata(struct device *dev, const struct extend_view *extend);
void cpu_metadata(struct device *dev, const struct batch_view *batch);

/* embed.c */
void cpu_embed(struct device *dev, void *y, const struct matrix *table, const int32_t *ids, int T,
               enum dtype dtype);
void cpu_gather_rows(struct device *dev, void *y, const void *x, const int32_t *rows, int Q, int D,
                     enum dtype dtype);
void cpu_lora_embed(struct device *dev, void *y, float *h, const int32_t *ids,
                    const struct lora_view *lora, int D, enum dtype dtype);

/* norm.c */
void cpu_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                      enum dtype delta_dtype, const float *weight, int T, int D, float eps,
                      enum dtype dtype);
void cpu_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                   const struct heads *heads, int T, float eps, enum dtype dtype);
void cpu_lora_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                           enum dtype delta_dtype, const float *weight,
                           const struct lora_view *lora, int layer, enum lora_norm norm, int T,
                           int D, float eps, enum dtype dtype);
void cpu_lora_head_norm(struct device *dev, void *qkv, const float *q_weight, const float *k_weight,
                        const struct lora_view *lora, int layer, const struct heads *heads, int T,
                        float eps, enum dtype dtype);

/* matmul.c */
void cpu_matmul(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                const struct matrix *w, const float *bias, int T, enum dtype dtype);

/* rope.c */
void cpu_rope(struct device *dev, void *qkv, const struct rope_view *rope, const struct kv_view *kv,
              const struct batch_view *batch, const struct heads *heads, enum dtype dtype);

/* attention.c */
void cpu_attention(struct device *dev, void *y, const void *qkv, enum dtype qkv_dtype,
                   const struct kv_view *kv, const struct batch_view *batch,
                   const struct heads *heads, enum dtype dtype);

/* activation.c */
void cpu_silu_mul(struct device *dev, void *y, const void *gate_up, enum dtype gate_up_dtype, int T,
                  int F, enum dtype dtype);

/* lora.c */
void cpu_lora_shrink(struct device *dev, float *h, const void *x, const struct lora_view *lora,
                     const struct lora_site *site, int layer, enum dtype dtype);
void cpu_lora_expand(struct device *dev, void *y, const float *h, const struct lora_view *lora,
                     const struct lora_site *site, int layer, enum dtype dtype);
void cpu_lora_head(struct device *dev, float *logits, const void *x, const struct lora_view *lora,
                   int V, int D, enum dtype dtype);
void cpu_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up, enum dtype gate_up_dtype,
                              const float *h, const struct lora_view *lora,
                              const struct lora_site *site, int layer, int T, enum dtype dtype);

/* dora.c */
void cpu_lora_row_norms(struct device *dev, float *norm, const struct matrix *w, const float *a,
                        const float *b, int R, float scale);

/* sample.c */
void cpu_sample(struct device *dev, int32_t *ids, const float *logits,
                const struct sample_view *view, int V);

/* logprobs.c */
void cpu_logprobs(struct device *dev, float *logprob, int32_t *top_ids, float *top_logprobs,
                  const float *logits, const int32_t *target, int Q, int V, int n);

#endif
