/* One call of an op that can be replaced, on random tensors: what a stranger's op is tried, checked
 * and timed with. Two cases of the same sizes, types and seed hold the same numbers, on whatever
 * device, so that their results can be compared. */
#ifndef MLORA_KERNELS_OP_CASE_H
#define MLORA_KERNELS_OP_CASE_H

#include "kernels/custom.h"

/* The dimensions of all ops: each reads its own. */
struct op_sizes {
    int T;       /* tokens            */
    int D, F;    /* add_rms_norm, silu_mul */
    int N, K;    /* matmul and LoRA: a slice of a site is N wide */
    int H, G, d; /* rope              */
    int R;       /* LoRA: rank        */
    bool more;   /* add_rms_norm: a delta, matmul: a bias, lora_expand: g, b_bias, bias_delta */
};

struct op_types {
    enum dtype activations; /* f32 or bf16 */
    enum dtype weights;
};

enum { OP_TENSORS = 6, OP_BLOCKS = 24 };

struct op_tensor {
    const char *name;
    void *data; /* [n] dtype, on the device */
    size_t n;
    enum dtype dtype;
    bool is_output;
};

struct op_case {
    struct device *dev;
    enum custom_kind kind;
    struct op_sizes sizes;
    enum dtype dtype;
    double bytes, flops; /* that the op has to move and to do */
    struct op_tensor tensors[OP_TENSORS];
    int n_tensors;
    void *memory[OP_BLOCKS];
    int n_memory;
    uint64_t state; /* of the random numbers */
    /* What the op is called with, as far as it is not a tensor. */
    struct matrix w;
    float *vector; /* norm weight or bias */
    struct batch_view batch;
    struct kv_view kv;
    struct heads heads;
    struct rope_view rope;
    struct lora_view lora;
    struct lora_site site;
};

/* A few tokens of a few elements. */
struct op_sizes op_sizes_tiny(void);

/* Numbers are rounded to `types` and stored as such, or, where `as_f32`, as f32.
 * Returns OK or ENOMEM; freed with op_case_free(), after a failure, too. */
mlora_status op_case_make(struct op_case *out, struct device *dev, enum custom_kind kind,
                          const struct op_sizes *sizes, const struct op_types *types, bool as_f32,
                          uint64_t seed);
void op_case_free(struct op_case *c); /* accepts zeroes */

/* Call the op of that table of the case's device. */
void op_case_run(const struct op_case *c, const struct kernels *ops);

/* Where a result is furthest from what is wanted. */
struct op_difference {
    const char *tensor; /* NULL: nothing differs */
    size_t index;
    double got, want;
    double error; /* by what is allowed: above 1 is wrong; inf: an input was written, or a NaN */
};

/* `want` is the case as f32. Allowed is half a unit in the last place where the result is bf16, 1e-5
 * of it where it is f32, and 3e-5 of the largest result for the order of sums. Returns OK, ENOMEM or EDEVICE. */
mlora_status op_case_compare(struct op_difference *out, const struct op_case *got,
                             const struct op_case *want);

/* Open the op, call it once, close it. Returns as custom_open(), or EDEVICE. Closes `dev`. */
mlora_status op_case_try(struct device *dev, const mlora_op_source *source);

#endif
