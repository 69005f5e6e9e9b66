/* A PEFT adapter directory to factors on the device, exactly as PEFT would apply them, or a
 * refusal with the reason. */
#ifndef MLORA_LORA_ADAPTER_H
#define MLORA_LORA_ADAPTER_H

#include <stdbool.h>

#include "engine/base/buffer.h"
#include "engine/base/hash.h"
#include "engine/mlora.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/safetensors.h"
#include "model/weights.h"

/* How a factor of the file becomes the matrix of the formula. */
enum factor_form {
    FORM_PLAIN,
    FORM_TRANSPOSED, /* the embedding's, and a tied head's */
    FORM_BLOCKS,     /* BD-LoRA: `parts` blocks on a diagonal, stored one below the other     */
    FORM_GROUPS,     /* QA-LoRA: each column stands for the mean of `parts` inputs, times the
                        number of groups */
};

/* One linear that the adapter changes: y += scale * B (A x), and what struct lora_factors has
 * besides. */
struct adapter_linear {
    int rank;    /* 0: it has no factors */
    float scale; /* alpha / rank, or alpha / sqrt(rank) with rsLoRA */
    double alpha;
    int64_t in, out;            /* widths of x and y */
    const struct tensor *a, *b; /* in the adapter's file */
    enum factor_form a_form, b_form;
    int parts;        /* of FORM_BLOCKS and FORM_GROUPS */
    int64_t b_row;    /* its first row of b, and of the vectors: 0 but in a fused linear */
    enum dtype dtype; /* of both on the device */
    const struct tensor *b_bias, *magnitude, *bias; /* vectors, or NULL */
};

/* Rows of the embedding or the head that are replaced. */
struct adapter_rows {
    const struct tensor *tensor; /* [n, D] in the adapter's file; NULL: none */
    int32_t *ids;                /* [n] ascending */
    int32_t *row;                /* [n] of the tensor, for ids[i] */
    int n;
};

/* What a directory holds, read and checked, without the values themselves. */
struct adapter_plan {
    char *directory;
    struct safetensors file;
    struct adapter_linear
        *linears; /* [L + 1, LORA_LINEARS]: in the last LORA_EMBEDDING, LORA_HEAD */
    int n_layers; /* L */
    int max_rank;
    bool rslora;
    char *base_model; /* base_model_name_or_path, for showing; may be NULL */

    /* In the place of weights of the base: */
    const struct tensor **norms;           /* [L * LORA_NORMS + 1], NULL where it has none */
    const struct tensor *embedding, *head; /* [V, D] or NULL; one tensor may be both */
    bool embedding_is_copy, head_is_copy;  /* maybe the base's own: then it is not loaded */
    struct adapter_rows embedding_rows, head_rows;
    bool head_has_embedding_rows; /* tied: the same rows are replaced in both */

    int32_t *invocation; /* [n_invocation] ids from which on an aLoRA counts; NULL: everywhere */
    int n_invocation;

    int64_t bytes;          /* of all of it on the device */
    struct buffer warnings; /* a line each */

    struct hash_key hash_key; /* of adapter.content: a secret of the caller, set after reading */
};

/* Read adapter_config.json and the names and shapes in adapter_model.safetensors, match targets,
 * ranks and alphas as PEFT does, and check every shape against `config`.
 * `lenient`: tensors that no target matches, and unknown ones, become warnings.
 * `config` NULL, for looking at an adapter without its base: layers are counted from the names,
 * and shapes are checked against each other only.
 * Returns OK, EIO, EFORMAT, EUNSUPPORTED, ENOMEM, or EINVAL (`config` is NULL and a fused linear
 * needs it); on failure `out` is zeroed. */
mlora_status adapter_plan_read(struct adapter_plan *out, const char *directory,
                               const struct model_config *config, bool lenient);
void adapter_plan_free(struct adapter_plan *plan); /* accepts zeroes */

/* Have the factors of a plan that was read loaded in another type, rounded to nearest; AUTO: in that
 * of the file. Those that are not in the file as they are used (of pooled inputs) stay f32. */
void adapter_plan_convert(struct adapter_plan *plan, mlora_dtype dtype);

/* Bytes of linears[index] on the device, each part rounded up so that the next one is aligned; of
 * a fused linear A is counted once. Of the whole plan. */
int64_t adapter_linear_bytes(const struct adapter_plan *plan, int index);
int64_t adapter_bytes(const struct adapter_plan *plan);

/* Add all of the plan that outputs depend on, but for the tensors' values. */
void adapter_hash_plan(struct hasher *hasher, const struct adapter_plan *plan);

/* An adapter: its image is one block, laid out on the host as it will be on the device. The
 * pointers below are addresses of the image as if it began at `origin`; adapter_place() says what
 * they are elsewhere. What is not the image is small and stays; the image may be dropped and read
 * again. */
struct adapter {
    struct lora_factors *factors; /* [L + 1, LORA_LINEARS] host array */
    struct lora_own own;
    const float **norms; /* [L * LORA_NORMS + 1] what own.norms holds; NULL: it has none */
    char *memory;        /* [bytes] host: the image; NULL: dropped */
    uintptr_t origin;
    int64_t bytes;
    int n_layers;
    int max_rank;
    bool changes_embedding, changes_head, changes_norms, expands_more, is_plain; /* of lora_view */
    int32_t *invocation; /* [n_invocation] as in the plan */
    int n_invocation;
    char *warnings;         /* a line each, "" if none */
    struct hash128 content; /* of all that its outputs depend on: equal adapters have equal ones */

    /* What was found with the base's weights when it was loaded first. */
    struct buffer derived;
    bool base_has_embedding, base_has_head;
};

/* Read the values. `base`, the weights that the adapter is for, may be NULL where the plan needs
 * none: DoRA divides by norms of the base, biases are taken less the base's, copies of the embedding
 * are compared with it; for that `dev` is used.
 * Returns OK, EIO, ENOMEM, EDEVICE, or EUNSUPPORTED (the device's kernels do not serve it); on
 * failure `out` is zeroed and nothing stays allocated. Values are taken as they are, NaN too. */
mlora_status adapter_load(struct adapter *out, struct device *dev, const struct adapter_plan *plan,
                          const struct model_config *config, const struct weights *base);

/* Read the image again after adapter_drop_image(), from a plan of the same directory; no device is
 * needed. Returns OK, EIO, ENOMEM, or EFORMAT (the content is another than before); on failure the
 * adapter is as it was. Thread: any that has the adapter alone. */
mlora_status adapter_load_again(struct adapter *adapter, const struct adapter_plan *plan);
char *adapter_image_alloc(int64_t bytes); /* contents undefined; NULL: out of memory */
void adapter_drop_image(struct adapter *adapter);
void adapter_free(struct adapter *adapter); /* accepts zeroes */

/* The factors [L + 1, LORA_LINEARS], the own weights, and where there are some the norms
 * [L * LORA_NORMS + 1], of an image that lies at `base`. own->norms is where the norms belong. */
void adapter_place(const struct adapter *adapter, const char *base, struct lora_factors *factors,
                   struct lora_own *own, const float **norms);

/* The position in a prompt [n] from which on the adapter counts: 0; of an aLoRA that of the last
 * invocation sequence; INT_MAX where there is none, and the base model answers. */
int adapter_first_position(const struct adapter *adapter, const int32_t *prompt, int n);

#endif
