/* Names of tensors in an adapter's file to what they are: which linear of which layer, and which
 * part of its adaptation. The same tensor is written under many names in the wild. */
#ifndef MLORA_LORA_TENSOR_NAME_H
#define MLORA_LORA_TENSOR_NAME_H

#include "engine/mlora.h" /* mlora_status */

enum tensor_kind {
    TENSOR_A,              /* lora_A of a linear of a layer */
    TENSOR_B,              /* lora_B of it */
    TENSOR_SAMPLER,        /* of MonteCLoRA; used in training only */
    TENSOR_EMBEDDING_COPY, /* embed_tokens or lm_head as a whole */
    TENSOR_UNKNOWN,
    /* Known, and not served: */
    TENSOR_LORA_BIAS,
    TENSOR_MAGNITUDE,      /* DoRA */
    TENSOR_DIAGONAL,       /* KaSA */
    TENSOR_EMBEDDING_LORA, /* on embed_tokens */
    TENSOR_HEAD_LORA,      /* on lm_head */
    TENSOR_TOKENS,         /* trainable tokens */
    TENSOR_BIAS,           /* of the base */
    TENSOR_FULL_WEIGHT,    /* a norm or linear as a whole: modules_to_save */
};

enum { MODULE_PREFIX_MAX = 64, MODULE_NAME_MAX = 128 };

struct tensor_name {
    enum tensor_kind kind;
    /* For TENSOR_A and TENSOR_B: */
    int layer;
    int first_linear;   /* enum lora_linear */
    int n_linears;      /* 1; 3 of qkv_proj, 2 of gate_up_proj: fused, their B one over another */
    const char *linear; /* within the layer: "self_attn.q_proj"; static */
    char prefix[MODULE_PREFIX_MAX]; /* of the base's modules: "model." */
};

/* Prefixes and wrappers that savers leave in names are looked through: base_model.model. missing
 * or doubled, _orig_mod., _fsdp_wrapped_module., language_model., the adapter's own name.
 * Returns OK or ENOMEM; a name that says nothing is TENSOR_UNKNOWN. */
mlora_status tensor_name_parse(struct tensor_name *out, const char *name);

/* "model.layers.3.self_attn.q_proj", as PEFT names the module. */
void module_name(char out[MODULE_NAME_MAX], const char *prefix, int layer, const char *linear);

#endif
