/* The weights of a model on the device. Projections that read the same input are one matrix:
 * q, k, v and gate, up are joined while they are read. */
#ifndef MLORA_MODEL_WEIGHTS_H
#define MLORA_MODEL_WEIGHTS_H

#include "kernels/kernels.h"
#include "model/config.h"
#include "model/safetensors.h"

struct layer_weights {
    float *attention_norm; /* [D] */
    struct matrix qkv;     /* [(H + 2 G) d, D] rows of q, then k, then v */
    float *qkv_bias;       /* [(H + 2 G) d] or NULL */
    float *q_norm;         /* [d] or NULL */
    float *k_norm;         /* [d] or NULL */
    struct matrix o;       /* [D, H d] */
    float *o_bias;         /* [D] or NULL */
    float *mlp_norm;       /* [D] */
    struct matrix gate_up; /* [2 F, D] rows of gate, then up */
    float *gate_up_bias;   /* [2 F] or NULL */
    struct matrix down;    /* [D, F] */
    float *down_bias;      /* [D] or NULL */
};

struct weights {
    struct matrix embedding;      /* [V, D] */
    struct matrix head;           /* [V, D]; the same memory as embedding where they are tied */
    float *final_norm;            /* [D] */
    float *rope_frequency;        /* [d / 2] */
    struct layer_weights *layers; /* [L] host array */
    int n_layers;
    int64_t bytes; /* on the device */
    int64_t n_parameters;
};

/* Read a checkpoint to the device. Every shape is checked against `config` before anything is
 * allocated; missing and unknown tensors are listed in the error. Matrices keep their stored
 * type; the parts of a joined matrix must have one type, else all are widened to f32; norms and
 * biases are widened to f32. `progress` (may be NULL) is called with bytes read and in all.
 * Returns OK, EIO, EFORMAT, EUNSUPPORTED, ENOMEM or EDEVICE; on failure nothing stays allocated. */
mlora_status weights_load(struct weights *out, struct device *dev, const char *directory,
                          const struct model_config *config, mlora_progress_fn progress,
                          void *user);

/* Weights of the shapes that `config` gives, random: matrices normal with a deviation of 0.02 in
 * bf16, norms 1, biases 0. For measuring speed without a checkpoint. Returns OK, ENOMEM or
 * EDEVICE; on failure nothing stays allocated. */
mlora_status weights_random(struct weights *out, struct device *dev,
                            const struct model_config *config);
void weights_free(struct weights *weights, struct device *dev); /* accepts zeroes */

/* What weights_load would put on the device, from the headers of the files alone, checked in the
 * same way. Returns OK, EFORMAT, EUNSUPPORTED or ENOMEM. */
mlora_status weights_measure(int64_t *device_bytes, int64_t *n_parameters,
                             const struct checkpoint *checkpoint, const char *directory,
                             const struct model_config *config);

/* The shapes of the linears that adapters may change. */
int linear_inputs(const struct model_config *config, enum lora_linear linear);  /* K */
int linear_outputs(const struct model_config *config, enum lora_linear linear); /* N */

/* The base's matrix of one linear: its rows of a joined one. `*bias` [N] receives its bias, or NULL. */
struct matrix weights_linear(const struct weights *weights, const struct model_config *config,
                             int layer, enum lora_linear linear, const float **bias);

/* The name of a linear within a layer, as in tensor names: "self_attn.q_proj". */
const char *linear_name(enum lora_linear linear);

#endif
