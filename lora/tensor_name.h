/* Names of tensors in an adapter's file to what they are: which linear of which layer, and which
 * part of its adaptation. The same tensor is written under many names in the wild. */
#ifndef MLORA_LORA_TENSOR_NAME_H
#define MLORA_LORA_TENSOR_NAME_H

#include "engine/mlora.h" /* mlora_status */

enum tensor_kind {
    /* Of a linear: */
    TENSOR_A,         /* lora_A, or lora_embedding_A                           */
    TENSOR_B,         /* lora_B, or lora_embedding_B                           */
    TENSOR_LORA_BIAS, /* of the factor B                                       */
    TENSOR_MAGNITUDE, /* DoRA                                                  */
    TENSOR_BIAS,      /* that replaces the base's                              */
    TENSOR_WHOLE,     /* embed_tokens or lm_head as a whole                    */
    TENSOR_COPY,      /* the same, of the base: save_embedding_layers          */
    TENSOR_TOKENS,    /* rows of embed_tokens or lm_head                       */
    /* Others: */
    TENSOR_NORM,
    TENSOR_SAMPLER, /* of MonteCLoRA and VeLoRA; used in training only */
    TENSOR_UNKNOWN,
    /* Known, and not served: */
    TENSOR_DIAGONAL,    /* KaSA */
    TENSOR_FULL_WEIGHT, /* a linear of a layer as a whole: modules_to_save */
};

enum { MODULE_PREFIX_MAX = 64, MODULE_NAME_MAX = 128 };

/* The layer of what is outside the layers. */
enum { LAYER_OUTSIDE = -1 };

struct tensor_name {
    enum tensor_kind kind;
    int layer;          /* or LAYER_OUTSIDE */
    int first_linear;   /* enum lora_linear; outside LORA_EMBEDDING or LORA_HEAD; of a norm its
                           enum lora_norm */
    int n_linears;      /* 1; 3 of qkv_proj, 2 of gate_up_proj: fused, their B one over another */
    const char *linear; /* "self_attn.q_proj", "embed_tokens", "lm_head"; static */
    char prefix[MODULE_PREFIX_MAX]; /* of the base's modules: "model." */
};

/* Prefixes and wrappers that savers leave in names are looked through: base_model.model. missing
 * or doubled, _orig_mod., _fsdp_wrapped_module., language_model., the adapter's own name.
 * Returns OK or ENOMEM; a name that says nothing is TENSOR_UNKNOWN. */
mlora_status tensor_name_parse(struct tensor_name *out, const char *name);

/* "model.layers.3.self_attn.q_proj", "model.embed_tokens" or "lm_head", as PEFT names the module. */
void module_name(char out[MODULE_NAME_MAX], const char *prefix, int layer, const char *linear);

#endif
