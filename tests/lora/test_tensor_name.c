#include "lora/tensor_name.h"

#include <criterion/criterion.h>
#include <string.h>

#include "kernels/views.h"

#define LAYERS "base_model.model.model.layers."

struct name_case {
    const char *name;
    enum tensor_kind kind;
    int layer, first_linear, n_linears;
    const char *prefix; /* NULL: "model." */
};

/* clang-format off */
static const struct name_case factors[] = {
    {LAYERS "0.self_attn.q_proj.lora_A.weight", TENSOR_A, 0, LORA_Q, 1, NULL},
    {LAYERS "0.self_attn.q_proj.lora_B.weight", TENSOR_B, 0, LORA_Q, 1, NULL},
    {LAYERS "7.self_attn.k_proj.lora_A.weight", TENSOR_A, 7, LORA_K, 1, NULL},
    {LAYERS "31.self_attn.v_proj.lora_B.weight", TENSOR_B, 31, LORA_V, 1, NULL},
    {LAYERS "79.self_attn.o_proj.lora_A.weight", TENSOR_A, 79, LORA_O, 1, NULL},
    {LAYERS "2.mlp.gate_proj.lora_A.weight", TENSOR_A, 2, LORA_GATE, 1, NULL},
    {LAYERS "2.mlp.up_proj.lora_A.weight", TENSOR_A, 2, LORA_UP, 1, NULL},
    {LAYERS "2.mlp.down_proj.lora_B.weight", TENSOR_B, 2, LORA_DOWN, 1, NULL},
    {LAYERS "1.self_attn.qkv_proj.lora_A.weight", TENSOR_A, 1, LORA_Q, 3, NULL},
    {LAYERS "1.mlp.gate_up_proj.lora_B.weight", TENSOR_B, 1, LORA_GATE, 2, NULL},
    {"model.layers.3.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {"layers.3.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {"base_model.model." LAYERS "3.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {"base_model.model.layers.3.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {"_orig_mod." LAYERS "3.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {"base_model.model._orig_mod.model.layers.3.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {LAYERS "3._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {LAYERS "3._checkpoint_wrapped_module._fsdp_wrapped_module.mlp.up_proj.lora_B.weight", TENSOR_B, 3, LORA_UP, 1, NULL},
    {LAYERS "3.self_attn.q_proj.lora_A.default.weight", TENSOR_A, 3, LORA_Q, 1, NULL},
    {LAYERS "3.self_attn.q_proj.lora_B.my-adapter.weight", TENSOR_B, 3, LORA_Q, 1, NULL},
    {"base_model.model.lm_head.lora_A.weight", TENSOR_A, LAYER_OUTSIDE, LORA_HEAD, 1, NULL},
    {"base_model.model.lm_head.lora_B.default.weight", TENSOR_B, LAYER_OUTSIDE, LORA_HEAD, 1, NULL},
    {"base_model.model.model.embed_tokens.lora_embedding_A", TENSOR_A, LAYER_OUTSIDE, LORA_EMBEDDING, 1, NULL},
    {"base_model.model.model.embed_tokens.lora_embedding_B.default", TENSOR_B, LAYER_OUTSIDE, LORA_EMBEDDING, 1, NULL},
    {LAYERS "4.mlp.down_proj.lora_magnitude_vector", TENSOR_MAGNITUDE, 4, LORA_DOWN, 1, NULL},
    {LAYERS "4.self_attn.k_proj.base_layer.bias", TENSOR_BIAS, 4, LORA_K, 1, NULL},
    {"base_model.model.language_model.model.layers.3.mlp.up_proj.lora_A.weight", TENSOR_A, 3, LORA_UP, 1, "language_model.model."},
    {"base_model.model.model.language_model.layers.3.mlp.up_proj.lora_A.weight", TENSOR_A, 3, LORA_UP, 1, "model.language_model."},
};

static const struct {
    const char *name;
    enum tensor_kind kind;
} others[] = {
    {LAYERS "0.self_attn.q_proj.lora_B.bias", TENSOR_LORA_BIAS},
    {LAYERS "0.self_attn.q_proj.lora_B.default.bias", TENSOR_LORA_BIAS},
    {LAYERS "0.self_attn.q_proj.lora_magnitude_vector", TENSOR_MAGNITUDE},
    {LAYERS "0.self_attn.q_proj.lora_magnitude_vector.weight", TENSOR_MAGNITUDE},
    {LAYERS "0.self_attn.q_proj.lora_magnitude_vector.default.weight", TENSOR_MAGNITUDE},
    {LAYERS "0.self_attn.q_proj.lora_diag", TENSOR_DIAGONAL},
    {LAYERS "0.self_attn.q_proj.lora_monteclora_sampler.std_prior", TENSOR_SAMPLER},
    {LAYERS "0.self_attn.q_proj.lora_velora_embed", TENSOR_SAMPLER},
    {LAYERS "0.self_attn.q_proj.base_layer.bias", TENSOR_BIAS},
    {LAYERS "0.self_attn.q_proj.bias", TENSOR_BIAS},
    {LAYERS "0.self_attn.q_proj.base_layer.weight", TENSOR_FULL_WEIGHT},
    {LAYERS "0.input_layernorm.weight", TENSOR_NORM},
    {LAYERS "0.post_attention_layernorm.weight", TENSOR_NORM},
    {LAYERS "0.self_attn.q_norm.modules_to_save.default.weight", TENSOR_NORM},
    {LAYERS "0.pre_feedforward_layernorm.weight", TENSOR_FULL_WEIGHT},
    {"base_model.model.model.norm.weight", TENSOR_NORM},
    {"base_model.model.model.norm.modules_to_save.default.weight", TENSOR_NORM},
    {"base_model.model.model.norm.original_module.weight", TENSOR_UNKNOWN},
    {"base_model.model.lm_head.weight", TENSOR_WHOLE},
    {"base_model.model.lm_head.base_layer.weight", TENSOR_COPY},
    {"base_model.model.lm_head.original_module.weight", TENSOR_UNKNOWN},
    {"base_model.model.lm_head.bias", TENSOR_BIAS},
    {"base_model.model.model.embed_tokens.weight", TENSOR_WHOLE},
    {"base_model.model.model.embed_tokens.base_layer.weight", TENSOR_COPY},
    {"base_model.model.lm_head.modules_to_save.weight", TENSOR_WHOLE},
    {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", TENSOR_TOKENS},
    {"base_model.model.model.embed_tokens.lora_magnitude_vector", TENSOR_MAGNITUDE},
    {"", TENSOR_UNKNOWN},
    {".", TENSOR_UNKNOWN},
    {"prompt_embeddings", TENSOR_UNKNOWN},
    {LAYERS, TENSOR_UNKNOWN},
    {LAYERS "0", TENSOR_UNKNOWN},
    {LAYERS "0.", TENSOR_UNKNOWN},
    {LAYERS "x.self_attn.q_proj.lora_A.weight", TENSOR_UNKNOWN},
    {LAYERS "03.self_attn.q_proj.lora_A.weight", TENSOR_UNKNOWN},
    {LAYERS "99999999999999999999.self_attn.q_proj.lora_A.weight", TENSOR_UNKNOWN},
    {LAYERS "-1.self_attn.q_proj.lora_A.weight", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj.lora_A", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj.lora_A.", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj.lora_A..weight", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj.lora_A.a.b.weight", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj.lora_A.weight.absmax", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_proj.lora_E", TENSOR_UNKNOWN},
    {LAYERS "0.self_attn.q_projx.lora_A.weight", TENSOR_UNKNOWN},
    {LAYERS "0.mlp.experts.0.up_proj.lora_A.weight", TENSOR_UNKNOWN},
    {"vision_tower.model.layers.0.self_attn.q_proj.lora_A.weight", TENSOR_UNKNOWN},
    {"transformer.h.0.attn.c_attn.lora_A.weight", TENSOR_UNKNOWN},
};
/* clang-format on */

Test(tensor_name, of_a_factor_says_layer_and_linear_however_it_is_written)
{
    for (size_t i = 0; i < sizeof factors / sizeof factors[0]; i++) {
        const struct name_case *c = &factors[i];
        struct tensor_name got;

        cr_assert_eq(tensor_name_parse(&got, c->name), MLORA_OK);
        cr_expect_eq(got.kind, c->kind, "%s is %d", c->name, got.kind);
        cr_expect_eq(got.layer, c->layer, "%s", c->name);
        cr_expect_eq(got.first_linear, c->first_linear, "%s", c->name);
        cr_expect_eq(got.n_linears, c->n_linears, "%s", c->name);
        cr_expect_str_eq(got.prefix, c->prefix ? c->prefix : "model.", "%s", c->name);
    }
}

Test(tensor_name, of_other_tensors_says_their_kind)
{
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        struct tensor_name got;
        cr_assert_eq(tensor_name_parse(&got, others[i].name), MLORA_OK);
        cr_expect_eq(got.kind, others[i].kind, "%s is %d", others[i].name, got.kind);
    }
}

Test(tensor_name, with_a_prefix_of_any_length_is_read)
{
    char name[4096] = "";
    struct tensor_name got;

    for (int i = 0; i < 300; i++) strcat(name, "model.");
    strcat(name, "layers.0.self_attn.q_proj.lora_A.weight");
    cr_assert_eq(tensor_name_parse(&got, name), MLORA_OK);
    cr_expect_eq(got.kind, TENSOR_UNKNOWN);
}

Test(tensor_name, makes_the_name_of_a_module)
{
    char name[MODULE_NAME_MAX];

    module_name(name, "model.", 3, "self_attn.q_proj");
    cr_expect_str_eq(name, "model.layers.3.self_attn.q_proj");
    module_name(name, "model.language_model.", 511, "mlp.gate_up_proj");
    cr_expect_str_eq(name, "model.language_model.layers.511.mlp.gate_up_proj");
    module_name(name, "model.", LAYER_OUTSIDE, "embed_tokens");
    cr_expect_str_eq(name, "model.embed_tokens");
    module_name(name, "model.", LAYER_OUTSIDE, "lm_head");
    cr_expect_str_eq(name, "lm_head");
}
