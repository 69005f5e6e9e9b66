/* Adapters that are not served: the status, and a message that names file, field and remedy. */
#include "lora/adapter.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "tests/lora/adapter_files.h"

#define CONFIG "adapter_config.json: "
#define P      "base_model.model.model."
#define L0     "@0.self_attn."
#define MERGE  "merge_and_unload"
#define AGAIN  "save the adapter with PEFT again"

struct refusal {
    const char *changes, *edits; /* for write_config and write_tensors */
    mlora_status status;
    const char *says, *remedy; /* parts of the message */
    bool lenient_too;          /* it is no matter of leaving tensors out */
};

/* clang-format off */
static const struct refusal configs[] = {
    /* other methods */
    {"{\"peft_type\": null}", "", MLORA_EFORMAT, CONFIG "peft_type is null", "that PEFT wrote", true},
    {"{\"peft_type\": 7}", "", MLORA_EFORMAT, CONFIG "peft_type is an integer", "that PEFT wrote", true},
    {"{\"peft_type\": \"ADALORA\"}", "", MLORA_EUNSUPPORTED, CONFIG "peft_type is \"ADALORA\"", "save_as_lora", true},
    {"{\"peft_type\": \"IA3\"}", "", MLORA_EUNSUPPORTED, CONFIG "peft_type is \"IA3\"", "save_as_lora", true},
    {"{\"peft_type\": \"LOHA\"}", "", MLORA_EUNSUPPORTED, CONFIG "peft_type is \"LOHA\"", "save_as_lora", true},
    {"{\"peft_type\": \"VERA\"}", "", MLORA_EUNSUPPORTED, CONFIG "peft_type is \"VERA\"", "save_as_lora", true},
    {"{\"peft_type\": \"XLORA\"}", "", MLORA_EUNSUPPORTED, CONFIG "peft_type is \"XLORA\"", "save_as_lora", true},
    {"{\"peft_type\": \"PREFIX_TUNING\"}", "", MLORA_EUNSUPPORTED, CONFIG "peft_type is \"PREFIX_TUNING\"", "save_as_lora", true},
    {"{\"task_type\": \"SEQ_CLS\"}", "", MLORA_EUNSUPPORTED, CONFIG "task_type is \"SEQ_CLS\"", "CAUSAL_LM", true},
    {"{\"task_type\": \"TOKEN_CLS\"}", "", MLORA_EUNSUPPORTED, CONFIG "task_type is \"TOKEN_CLS\"", "CAUSAL_LM", true},
    {"{\"task_type\": \"FEATURE_EXTRACTION\"}", "", MLORA_EUNSUPPORTED, CONFIG "task_type is \"FEATURE_EXTRACTION\"", "CAUSAL_LM", true},
    /* fields that change the result */
    {"{\"use_dora\": \"yes\"}", "", MLORA_EFORMAT, CONFIG "use_dora is a string", AGAIN, true},
    {"{\"lora_bias\": 1}", "", MLORA_EFORMAT, CONFIG "lora_bias is an integer", AGAIN, true},
    {"{\"ensure_weight_tying\": \"yes\"}", "", MLORA_EFORMAT, CONFIG "ensure_weight_tying is a string", AGAIN, true},
    {"{\"use_qalora\": 4}", "", MLORA_EFORMAT, CONFIG "use_qalora is an integer", AGAIN, true},
    {"{\"use_qalora\": true, \"qalora_group_size\": 0}", "", MLORA_EFORMAT, CONFIG "qalora_group_size is 0", AGAIN, true},
    {"{\"bias\": \"some\"}", "", MLORA_EUNSUPPORTED, CONFIG "bias is \"some\"", AGAIN, true},
    {"{\"modules_to_save\": \"lm_head\"}", "", MLORA_EFORMAT, CONFIG "modules_to_save is a string", AGAIN, true},
    {"{\"modules_to_save\": [1]}", "", MLORA_EFORMAT, CONFIG "modules_to_save[0] is an integer", AGAIN, true},
    {"{\"trainable_token_indices\": [5, \"6\"]}", "", MLORA_EFORMAT, CONFIG "trainable_token_indices is not a list of token ids", AGAIN, true},
    {"{\"trainable_token_indices\": {\"lm_head\": 5}}", "", MLORA_EFORMAT, CONFIG "trainable_token_indices is not a list of token ids", AGAIN, true},
    {"{\"alora_invocation_tokens\": [1, -2]}", "", MLORA_EFORMAT, CONFIG "alora_invocation_tokens is not a list of token ids", AGAIN, true},
    {"{\"use_bdlora\": true}", "", MLORA_EFORMAT, CONFIG "use_bdlora is true", AGAIN, true},
    {"{\"use_bdlora\": {\"nblocks\": 0}}", "", MLORA_EFORMAT, CONFIG "use_bdlora: nblocks is 0, an integer from 1", AGAIN, true},
    {"{\"use_bdlora\": {\"target_modules_bd_a\": \"q_proj\", \"nblocks\": 2}}", "", MLORA_EFORMAT, CONFIG "use_bdlora: target_modules_bd_a is a string", AGAIN, true},
    {"{\"use_bdlora\": {\"target_modules_bd_b\": [\"q_proj\", 3], \"nblocks\": 2}}", "", MLORA_EFORMAT, CONFIG "target_modules_bd_b[1] is an integer", AGAIN, true},
    {"{\"use_bdlora\": {\"nblocks\": \"2\"}}", "", MLORA_EFORMAT, CONFIG "use_bdlora: nblocks is a string", AGAIN, true},
    {"{\"modules_to_save\": [\"(\"]}", "", MLORA_EFORMAT, CONFIG "modules_to_save: the pattern \"(\" is not a valid", "list the modules by name", true},
    {"{\"layers_to_transform\": [0], \"layers_pattern\": [\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\",\"o\",\"p\",\"q\"]}", "", MLORA_EFORMAT, CONFIG "layers_pattern is a longer list", AGAIN, true},
    /* what does not go together */
    {"{\"use_dora\": true, \"lora_bias\": true}", "", MLORA_EUNSUPPORTED, CONFIG "use_dora and lora_bias are both set", "one of them", true},
    {"{\"use_dora\": true, \"alora_invocation_tokens\": [1]}", "", MLORA_EUNSUPPORTED, CONFIG "use_dora and alora_invocation_tokens are both set", "one of them", true},
    {"{\"use_dora\": true, \"use_bdlora\": {\"nblocks\": 2}}", "", MLORA_EUNSUPPORTED, CONFIG "use_dora and use_bdlora are both set", "one of them", true},
    {"{\"use_dora\": true, \"use_qalora\": true}", "", MLORA_EUNSUPPORTED, CONFIG "use_dora and use_qalora are both set", "one of them", true},
    {"{\"alora_invocation_tokens\": [1], \"use_bdlora\": {\"nblocks\": 2}}", "", MLORA_EUNSUPPORTED, CONFIG "alora_invocation_tokens and use_bdlora are both set", "one of them", true},
    {"{\"alora_invocation_tokens\": [1], \"use_qalora\": true}", "", MLORA_EUNSUPPORTED, CONFIG "alora_invocation_tokens and use_qalora are both set", "one of them", true},
    {"{\"trainable_token_indices\": [3], \"alora_invocation_tokens\": [1]}", "", MLORA_EUNSUPPORTED, CONFIG "alora_invocation_tokens and trainable_token_indices are both set", "train it without trainable_token_indices", true},
    {"{\"use_qalora\": true, \"use_bdlora\": {\"nblocks\": 2}}", "", MLORA_EUNSUPPORTED, CONFIG "use_bdlora and use_qalora are both set", "one of them", true},
    {"{\"modules_to_save\": [\"norm\"], \"alora_invocation_tokens\": [1]}", "", MLORA_EUNSUPPORTED, CONFIG "alora_invocation_tokens and modules_to_save are both set", "train it without modules_to_save", true},
    {"{\"target_parameters\": [\"experts.gate_up_proj\"]}", "", MLORA_EUNSUPPORTED, CONFIG "target_parameters is [", "train with target_modules", true},
    {"{\"layer_replication\": [[0, 2], [1, 2]]}", "", MLORA_EUNSUPPORTED, CONFIG "layer_replication is [[0,2],[1,2]]", MERGE, true},
    {"{\"kasa_config\": {\"beta\": 0.1}}", "", MLORA_EUNSUPPORTED, CONFIG "kasa_config is {", MERGE, true},
    {"{\"arrow_config\": {\"top_k\": 3}}", "", MLORA_EUNSUPPORTED, CONFIG "arrow_config is {\"top_k\":3}", "name one in each request", true},
    {"{\"megatron_config\": {\"x\": 1}}", "", MLORA_EUNSUPPORTED, CONFIG "megatron_config is {\"x\":1}", "Hugging Face layout", true},
    {"{\"some_new_field\": 1}", "", MLORA_EUNSUPPORTED, CONFIG "some_new_field is 1: this field is unknown", "remove it", true},
    {"{\"use_something\": true}", "", MLORA_EUNSUPPORTED, CONFIG "use_something is true", "remove it", true},
    /* initialisations that changed the base */
    {"{\"init_lora_weights\": \"pissa\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"pissa\"", "path_initial_model_for_weight_conversion", true},
    {"{\"init_lora_weights\": \"pissa_niter_16\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"pissa_niter_16\"", "path_initial_model_for_weight_conversion", true},
    {"{\"init_lora_weights\": \"olora\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"olora\"", "path_initial_model_for_weight_conversion", true},
    {"{\"init_lora_weights\": \"corda\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"corda\"", "path_initial_model_for_weight_conversion", true},
    {"{\"init_lora_weights\": \"lora_ga\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"lora_ga\"", "path_initial_model_for_weight_conversion", true},
    {"{\"init_lora_weights\": \"loftq\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"loftq\"", "merge it into that base", true},
    {"{\"init_lora_weights\": \"unheard_of\"}", "", MLORA_EUNSUPPORTED, CONFIG "init_lora_weights is \"unheard_of\"", "save it again", true},
    {"{\"init_lora_weights\": 3}", "", MLORA_EFORMAT, CONFIG "init_lora_weights is an integer", AGAIN, true},
    /* values of another type or range */
    {"{\"r\": 0}", "", MLORA_EFORMAT, CONFIG "r is 0, must be from 1", AGAIN, true},
    {"{\"r\": -4}", "", MLORA_EFORMAT, CONFIG "r is -4, must be from 1", AGAIN, true},
    {"{\"r\": \"8\"}", "", MLORA_EFORMAT, CONFIG "r is a string, an integer is needed", AGAIN, true},
    {"{\"r\": 2.5}", "", MLORA_EFORMAT, CONFIG "r is a number with a fraction", AGAIN, true},
    {"{\"lora_alpha\": \"big\"}", "", MLORA_EFORMAT, CONFIG "lora_alpha is a string", AGAIN, true},
    {"{\"lora_alpha\": 1e300}", "", MLORA_EFORMAT, CONFIG "lora_alpha is 1e+300", AGAIN, true},
    {"{\"use_rslora\": 1}", "", MLORA_EFORMAT, CONFIG "use_rslora is an integer", AGAIN, true},
    {"{\"fan_in_fan_out\": 1}", "", MLORA_EFORMAT, CONFIG "fan_in_fan_out is an integer", AGAIN, true},
    {"{\"base_model_name_or_path\": 1}", "", MLORA_EFORMAT, CONFIG "base_model_name_or_path is an integer", AGAIN, true},
    {"{\"target_modules\": 7}", "", MLORA_EFORMAT, CONFIG "target_modules is an integer", AGAIN, true},
    {"{\"target_modules\": [\"q_proj\", 3]}", "", MLORA_EFORMAT, CONFIG "target_modules[1] is an integer", AGAIN, true},
    {"{\"target_modules\": \"(\"}", "", MLORA_EFORMAT, CONFIG "target_modules: the pattern \"(\" is not a valid", "list the modules by name", true},
    {"{\"target_modules\": \"\\\\p{L}*\"}", "", MLORA_EUNSUPPORTED, CONFIG "target_modules: the pattern \"\\p{L}*\"", "list the modules by name", true},
    {"{\"target_modules\": \"(\\\\w+.?)+\\\\d\"}", "", MLORA_EFORMAT, "takes too long to match against model.layers.0", "list the modules by name", true},
    {"{\"exclude_modules\": {\"q_proj\": 1}}", "", MLORA_EFORMAT, CONFIG "exclude_modules is an object", AGAIN, true},
    {"{\"exclude_modules\": \"[\"}", "", MLORA_EFORMAT, CONFIG "exclude_modules: the pattern \"[\"", "list the modules by name", true},
    {"{\"layers_to_transform\": \"1\"}", "", MLORA_EFORMAT, CONFIG "layers_to_transform is a string", AGAIN, true},
    {"{\"layers_to_transform\": [0, 1.5]}", "", MLORA_EFORMAT, CONFIG "layers_to_transform is another array", AGAIN, true},
    {"{\"layers_to_transform\": [0], \"target_modules\": \".*q_proj\"}", "", MLORA_EFORMAT, CONFIG "layers_to_transform has no meaning", "list the modules by name", true},
    {"{\"layers_to_transform\": [0], \"target_modules\": \"all-linear\"}", "", MLORA_EFORMAT, CONFIG "layers_to_transform has no meaning", "list the modules by name", true},
    {"{\"layers_pattern\": \"layers\"}", "", MLORA_EFORMAT, CONFIG "layers_pattern is given without layers_to_transform", "give both, or neither", true},
    {"{\"layers_to_transform\": [0], \"layers_pattern\": 1}", "", MLORA_EFORMAT, CONFIG "layers_pattern is an integer", AGAIN, true},
    {"{\"layers_to_transform\": [0], \"layers_pattern\": [1]}", "", MLORA_EFORMAT, CONFIG "layers_pattern[0] is an integer", AGAIN, true},
    {"{\"layers_to_transform\": [0], \"layers_pattern\": \"(layers)\"}", "", MLORA_EFORMAT, CONFIG "layers_pattern has a group", "write it without groups", true},
    {"{\"rank_pattern\": [1]}", "", MLORA_EFORMAT, CONFIG "rank_pattern is an array", AGAIN, true},
    {"{\"rank_pattern\": {\"q_proj\": 0}}", "", MLORA_EFORMAT, CONFIG "rank_pattern: \"q_proj\" is out of range", AGAIN, true},
    {"{\"rank_pattern\": {\"q_proj\": 1.5}}", "", MLORA_EFORMAT, CONFIG "rank_pattern: \"q_proj\" is out of range", "an integer of 1 or more", true},
    {"{\"rank_pattern\": {\"q_proj\": \"8\"}}", "", MLORA_EFORMAT, CONFIG "rank_pattern: \"q_proj\" is a string", "an integer of 1 or more", true},
    {"{\"rank_pattern\": {\"(q_proj\": 8}}", "", MLORA_EFORMAT, CONFIG "rank_pattern: the pattern \"(q_proj\"", "correct the pattern", true},
    {"{\"alpha_pattern\": \"16\"}", "", MLORA_EFORMAT, CONFIG "alpha_pattern is a string", AGAIN, true},
    {"{\"alpha_pattern\": {\"q_proj\": null}}", "", MLORA_EFORMAT, CONFIG "alpha_pattern: \"q_proj\" is null", "a number is needed", true},
};

static const struct refusal tensors[] = {
    /* tensors of other methods, whatever the configuration says */
    {"{}", L0 "q_proj.lora_diag F32 2", MLORA_EUNSUPPORTED, "q_proj.lora_diag is a diagonal between A and B (kasa_config)", MERGE, true},
    {"{}", "@1.mlp.up_proj.weight F32 12x8", MLORA_EUNSUPPORTED, "mlp.up_proj.weight is a whole weight that replaces the base's (modules_to_save)", MERGE, true},
    {"{\"modules_to_save\": [\"up_proj\"]}", "@1.mlp.up_proj.weight F32 12x8", MLORA_EUNSUPPORTED, "(modules_to_save)", MERGE, true},
    /* vectors and fields that do not belong together */
    {"{}", L0 "q_proj.lora_B.bias F32 8", MLORA_EFORMAT, "q_proj.lora_B.bias is a bias of the factor B, but lora_bias of adapter_config.json is not true", "save the adapter again", true},
    {"{}", L0 "q_proj.lora_magnitude_vector F32 8", MLORA_EFORMAT, "lora_magnitude_vector is a magnitude vector, but use_dora of adapter_config.json is not true", "save the adapter again", true},
    {"{\"use_dora\": true}", "", MLORA_EFORMAT, "model.layers.0.self_attn.q_proj has no lora_magnitude_vector, but use_dora", "save the adapter again", true},
    {"{\"lora_bias\": true}", "", MLORA_EFORMAT, "model.layers.0.self_attn.q_proj has no lora_B.bias, but lora_bias", "save the adapter again", true},
    {"{\"use_dora\": true}", L0 "q_proj.lora_magnitude_vector F32 2x4", MLORA_EFORMAT, "q_proj.lora_magnitude_vector has not one value for each of the 8 outputs", "save the adapter again", true},
    {"{\"use_bdlora\": {\"target_modules_bd_a\": [\"q_proj\"], \"target_modules_bd_b\": [\"q_proj\"], \"nblocks\": 2}}", "", MLORA_EFORMAT, "model.layers.0.self_attn.q_proj is of target_modules_bd_a and of target_modules_bd_b", "one of them", true},
    {"{\"use_bdlora\": {\"target_modules_bd_a\": [\"q_proj\"], \"nblocks\": 3}}", "", MLORA_EFORMAT, "nblocks is 3, which does not divide the 2 rows", "save the adapter again", true},
    {"{\"use_qalora\": true, \"qalora_group_size\": 4}", L0 "q_proj.lora_A.weight F32 2x3", MLORA_EFORMAT, "q_proj.lora_A.weight is [2, 3], the base needs [2, 2]", "load it with that one", true},
    {"{\"target_modules\": [\"qkv_proj\"], \"use_bdlora\": {\"target_modules_bd_a\": [\"qkv_proj\"], \"nblocks\": 2}}", "-" L0 "q_proj.lora_A.weight; -" L0 "q_proj.lora_B.weight; -" L0 "v_proj.lora_A.weight; -" L0 "v_proj.lora_B.weight;" L0 "qkv_proj.lora_A.weight F32 2x8; " L0 "qkv_proj.lora_B.weight F32 16x2", MLORA_EFORMAT, "qkv_proj.lora_A.weight, a fused linear", "save the adapter again", true},
    {"{}", "base_model.model.lm_head.weight F32 10x8; base_model.model.lm_head.base_layer.weight F32 10x8", MLORA_EFORMAT, "are both for lm_head", "keep one of them", true},
    /* embeddings, heads and norms */
    {"{}", P "embed_tokens.weight F32 12x8", MLORA_EUNSUPPORTED, "has 12 rows, the base's vocabulary is 10: the adapter was trained with a resized embedding", MERGE, true},
    {"{}", P "embed_tokens.weight F32 10x9", MLORA_EFORMAT, "embed_tokens.weight is [10, 9], the base needs [10, 8]", "load it with that one", true},
    {"{}", P "embed_tokens.weight F32 80", MLORA_EFORMAT, "embed_tokens.weight has 1 dimensions and 320 bytes", "save the adapter again", true},
    {"{}", P "embed_tokens.weight F32 10x8; " P "embed_tokens.base_layer.weight F32 10x8", MLORA_EFORMAT, "are both for embed_tokens", "keep one of them", true},
    {"{\"modules_to_save\": [\"lm_head\"]}", "", MLORA_EFORMAT, "modules_to_save of adapter_config.json names lm_head, which is not there", "save the adapter again", true},
    {"{\"modules_to_save\": [\"input_layernorm\"]}", "@0.input_layernorm.weight F32 8", MLORA_EFORMAT, "names model.layers.1.input_layernorm, which is not there", "save the adapter again", true},
    {"{}", P "norm.weight F32 9", MLORA_EFORMAT, "norm.weight has 9 values, the base needs 8", "load it with that one", true},
    {"{}", P "norm.weight I8 8", MLORA_EUNSUPPORTED, "norm.weight: dtype is I8", "convert it", true},
    {"{}", "@1.pre_feedforward_layernorm.weight F32 8", MLORA_EUNSUPPORTED, "(modules_to_save)", MERGE, true},
    {"{}", P "norm.weight F32 8; " P "norm.modules_to_save.weight F32 8", MLORA_EFORMAT, "are both for norm", "keep one of them", true},
    {"{}", P "embed_tokens.lora_embedding_A F32 2x10; " P "embed_tokens.lora_embedding_B F32 8x2", MLORA_EFORMAT, "leave out (1): " P "embed_tokens.lora_embedding_A", "as lenient", false},
    {"{\"target_modules\": [\"q_proj\", \"v_proj\", \"embed_tokens\"]}", P "embed_tokens.lora_embedding_A F32 2x11; " P "embed_tokens.lora_embedding_B F32 8x2", MLORA_EFORMAT, "embed_tokens.lora_embedding_A is [2, 11], the base needs [2, 10]", "load it with that one", true},
    {"{\"target_modules\": [\"q_proj\", \"v_proj\", \"lm_head\"]}", "base_model.model.lm_head.lora_A.weight F32 2x8", MLORA_EFORMAT, "lm_head.lora_A.weight has no lora_B beside it", "save the adapter again", true},
    /* tokens */
    {"{}", P "embed_tokens.token_adapter.trainable_tokens_delta F32 1x8", MLORA_EFORMAT, "that trainable_token_indices of adapter_config.json does not name", "save the adapter again", true},
    {"{\"trainable_token_indices\": [5]}", "", MLORA_EFORMAT, "tokens of embed_tokens, whose trainable_tokens_delta is not there", "save the adapter again", true},
    {"{\"trainable_token_indices\": [5, 6]}", P "embed_tokens.token_adapter.trainable_tokens_delta F32 1x8", MLORA_EFORMAT, "for each of the 2 tokens in trainable_token_indices", "save the adapter again", true},
    {"{\"trainable_token_indices\": [5, 5]}", P "embed_tokens.token_adapter.trainable_tokens_delta F32 2x8", MLORA_EFORMAT, CONFIG "trainable_token_indices has token 5 twice", "leave it in once", true},
    {"{\"trainable_token_indices\": [10]}", P "embed_tokens.token_adapter.trainable_tokens_delta F32 1x8", MLORA_EUNSUPPORTED, CONFIG "trainable_token_indices has token 10, the base's vocabulary is 10", MERGE, true},
    {"{\"trainable_token_indices\": {\"q_proj\": [1]}}", "", MLORA_EUNSUPPORTED, CONFIG "trainable_token_indices has tokens of q_proj, which is not served", "name embed_tokens and lm_head", true},
    {"{\"trainable_token_indices\": [5], \"modules_to_save\": [\"embed_tokens\"]}", P "embed_tokens.token_adapter.trainable_tokens_delta F32 1x8; " P "embed_tokens.weight F32 10x8", MLORA_EUNSUPPORTED, CONFIG "trainable_token_indices replaces rows of embed_tokens, which the adapter changes as a whole too", "save it with one of them", true},
    /* from a token on, and everywhere */
    {"{\"alora_invocation_tokens\": [1]}", P "norm.weight F32 8", MLORA_EUNSUPPORTED, "norm.weight would count everywhere", "train it without", true},
    {"{\"alora_invocation_tokens\": [1], \"target_modules\": [\"q_proj\", \"v_proj\", \"embed_tokens\"]}", P "embed_tokens.lora_embedding_A F32 2x10; " P "embed_tokens.lora_embedding_B F32 8x2", MLORA_EUNSUPPORTED, CONFIG "alora_invocation_tokens is set and model.embed_tokens is a target", "save the adapter without it", true},
    {"{}", L0 "q_proj.base_layer.bias F32 8", MLORA_EUNSUPPORTED, "of no kind that is served (1): " P "layers.0.self_attn.q_proj.base_layer.bias", "as lenient", false},
    {"{}", "base_model.model.lm_head.bias F32 10", MLORA_EUNSUPPORTED, "of no kind that is served (1): base_model.model.lm_head.bias", "as lenient", false},
    /* unknown ones, and linears that are no targets */
    {"{}", "whatever F32 1", MLORA_EUNSUPPORTED, "of no kind that is served (1): whatever;", "as lenient", false},
    {"{}", "a F32 1; b F32 1; c F32 1; d F32 1; e F32 1; f F32 1", MLORA_EUNSUPPORTED, "of no kind that is served (6): a, b, c, d, e, ...;", "as lenient", false},
    {"{}", L0 "q_proj.lora_monteclora_sampler.std_prior F32 2", MLORA_EUNSUPPORTED, "of no kind that is served (1): ", "as lenient", false},
    {"{}", "@0.mlp.experts.0.up_proj.lora_A.weight F32 2x8", MLORA_EUNSUPPORTED, "of no kind that is served (1): " P "layers.0.mlp.experts.0.up_proj.lora_A.weight;", "as lenient", false},
    {"{\"target_modules\": [\"q_proj\"]}", "", MLORA_EFORMAT, "has factors of linears that target_modules, exclude_modules and layers_to_transform of adapter_config.json leave out (2): " P "layers.0.self_attn.v_proj.lora_A.weight, ", "as lenient", false},
    {"{\"exclude_modules\": [\"v_proj\"]}", "", MLORA_EFORMAT, "leave out (2): ", "correct these fields", false},
    {"{\"layers_to_transform\": [0]}", "", MLORA_EFORMAT, "leave out (2): ", "correct these fields", false},
    /* pairs */
    {"{}", "-" L0 "q_proj.lora_B.weight", MLORA_EFORMAT, "layers.0.self_attn.q_proj.lora_A.weight has no lora_B beside it", "save the adapter again", true},
    {"{}", "-@1.self_attn.v_proj.lora_A.weight", MLORA_EFORMAT, "layers.1.self_attn.v_proj.lora_B.weight has no lora_A beside it", "save the adapter again", true},
    {"{}", "model.layers.0.self_attn.q_proj.lora_A.weight F32 2x8", MLORA_EFORMAT, "layers.0.self_attn.q_proj.lora_A.weight are both for self_attn.q_proj of layer 0", "keep one", true},
    {"{\"target_modules\": [\"qkv_proj\", \"q_proj\", \"v_proj\"]}", L0 "qkv_proj.lora_A.weight F32 2x8", MLORA_EFORMAT, "are both for", "keep one", true},
    /* shapes */
    {"{}", L0 "q_proj.lora_A.weight F32 2x9", MLORA_EFORMAT, "q_proj.lora_A.weight is [2, 9], the base needs [2, 8]: the adapter was trained for another base (base_model_name_or_path: org/small)", "load it with that one", true},
    {"{}", L0 "q_proj.lora_B.weight F32 4x2", MLORA_EFORMAT, "q_proj.lora_B.weight is [4, 2], the base needs [8, 2]", "load it with that one", true},
    {"{}", L0 "v_proj.lora_B.weight F32 8x2", MLORA_EFORMAT, "v_proj.lora_B.weight is [8, 2], the base needs [4, 2]", "load it with that one", true},
    {"{\"base_model_name_or_path\": null}", L0 "v_proj.lora_B.weight F32 8x2", MLORA_EFORMAT, "(base_model_name_or_path: not given)", "load it with that one", true},
    {"{\"target_modules\": [\"qkv_proj\", \"q_proj\", \"v_proj\"]}", "-" L0 "q_proj.lora_A.weight; -" L0 "q_proj.lora_B.weight; -" L0 "v_proj.lora_A.weight; -" L0 "v_proj.lora_B.weight;" L0 "qkv_proj.lora_A.weight F32 2x8; " L0 "qkv_proj.lora_B.weight F32 24x2", MLORA_EFORMAT, "qkv_proj.lora_B.weight is [24, 2], the base needs [16, 2]", "load it with that one", true},
    {"{}", "@2.self_attn.q_proj.lora_A.weight F32 2x8", MLORA_EFORMAT, "is for layer 2, the base has 2 layers: the adapter was trained for another base (base_model_name_or_path: org/small)", "load it with that one", true},
    {"{\"r\": 4}", "", MLORA_EFORMAT, "q_proj.lora_A.weight has rank 2 and lora_B 2, adapter_config.json says 4 for model.layers.0.self_attn.q_proj (r, rank_pattern)", "save the adapter again", true},
    {"{\"rank_pattern\": {\"1.self_attn.v_proj\": 1}}", "", MLORA_EFORMAT, "adapter_config.json says 1 for model.layers.1.self_attn.v_proj", "save the adapter again", true},
    {"{}", L0 "q_proj.lora_B.weight F32 8x3", MLORA_EFORMAT, "has rank 2 and lora_B 3, adapter_config.json says 2", "save the adapter again", true},
    {"{\"r\": 513}", "-" L0 "v_proj.lora_A.weight; -" L0 "v_proj.lora_B.weight; " L0 "q_proj.lora_A.weight F32 513x8; " L0 "q_proj.lora_B.weight F32 8x513", MLORA_EUNSUPPORTED, CONFIG "model.layers.0.self_attn.q_proj has rank 513 (r, rank_pattern), at most 512 is served", MERGE, true},
    {"{}", L0 "q_proj.lora_A.weight F32 16", MLORA_EFORMAT, "q_proj.lora_A.weight has 1 dimensions, a matrix is needed", "save the adapter again", true},
    {"{}", L0 "q_proj.lora_B.weight F32 8x2x1", MLORA_EFORMAT, "q_proj.lora_B.weight has 3 dimensions, a matrix is needed", "save the adapter again", true},
    /* types */
    {"{}", L0 "q_proj.lora_A.weight F64 2x8", MLORA_EUNSUPPORTED, "q_proj.lora_A.weight: dtype is F64", "convert it", true},
    {"{}", L0 "q_proj.lora_B.weight I8 8x2", MLORA_EUNSUPPORTED, "q_proj.lora_B.weight: dtype is I8", "not quantised", true},
    {"{}", L0 "q_proj.lora_A.weight F8_E4M3 2x8", MLORA_EUNSUPPORTED, "dtype is F8_E4M3", "not quantised", true},
};
/* clang-format on */

/* "FILE: what is wrong; remedy": FILE is one of the adapter's own, the remedy comes last. */
static void expect_message(const char *directory, const char *says, const char *remedy)
{
    static const char *const files[] = {
        "/adapter_config.json: ", "/adapter_model.safetensors: ", "/adapter_model.bin: "};
    const char *text = error_text(), *what = strstr(text, says);
    const size_t n = strlen(directory);
    bool names_file = false;

    for (int i = 0; i < 3; i++)
        names_file |=
            strncmp(text, directory, n) == 0 && strncmp(text + n, files[i], strlen(files[i])) == 0;
    cr_expect(names_file, "no file in: %s", text);
    cr_expect_not_null(what, "%s: not in: %s", says, text);
    cr_expect(what && strstr(what, remedy), "%s: not after it in: %s", remedy, text);
    cr_expect_null(strchr(text, '\n'));
}

static void expect_refusal_over(const struct model_config *base, const char *directory,
                                bool lenient, mlora_status status, const char *says,
                                const char *remedy)
{
    struct adapter_plan plan;

    const mlora_status got = adapter_plan_read(&plan, directory, base, lenient);
    cr_expect_eq(got, status, "%s %s: %d: %s", says, lenient ? "(lenient)" : "", got, error_text());
    cr_expect_null(plan.linears);
    expect_message(directory, says, remedy);
    adapter_plan_free(&plan);
}

static void expect_refusal(const char *directory, bool lenient, mlora_status status,
                           const char *says, const char *remedy)
{
    const struct model_config base = small_model();
    expect_refusal_over(&base, directory, lenient, status, says, remedy);
}

/* Lenient, the same adapter is served without the tensors, and that is said: file and count. */
static void expect_warning(const char *directory, const char *says)
{
    const struct model_config base = small_model();
    struct adapter_plan plan;
    const char *count = strchr(says, '(');

    cr_expect_eq(adapter_plan_read(&plan, directory, &base, true), MLORA_OK, "%s", error_text());
    const char *line = strstr(buffer_text(&plan.warnings), "/adapter_model.safetensors: left out ");
    cr_expect_not_null(line, "%s", buffer_text(&plan.warnings));
    cr_assert_not_null(count, "%s", says);
    char number[8] = "";
    snprintf(number, sizeof number, "%.*s", (int)strcspn(count, ")") + 1, count);
    cr_expect(line && strstr(line, number), "%s: not in: %s", number, buffer_text(&plan.warnings));
    adapter_plan_free(&plan);
}

static void expect_table(const struct refusal *cases, size_t n)
{
    char *directory = directory_make();

    for (size_t i = 0; i < n; i++) {
        write_config(directory, cases[i].changes);
        write_tensors(directory, cases[i].edits);
        expect_refusal(directory, false, cases[i].status, cases[i].says, cases[i].remedy);
        if (cases[i].lenient_too)
            expect_refusal(directory, true, cases[i].status, cases[i].says, cases[i].remedy);
        else
            expect_warning(directory, cases[i].says);
    }
    directory_remove(directory);
}

Test(adapter_refusals, name_the_field_of_the_configuration)
{
    expect_table(configs, sizeof configs / sizeof configs[0]);
}

Test(adapter_refusals, name_the_tensor)
{
    expect_table(tensors, sizeof tensors / sizeof tensors[0]);
}

/* Lenient, too: there would be nothing to serve. */
Test(adapter_refusals, of_targets_that_have_no_factors)
{
    char *directory = directory_make();

    write_config(directory, "{\"target_modules\": [\"k_proj\"]}");
    write_tensors(directory, "");
    expect_refusal(directory, false, MLORA_EFORMAT, "leave out (4): ", "correct these fields");
    expect_refusal(directory, true, MLORA_EFORMAT,
                   "holds no lora_A and lora_B for any linear that target_modules names",
                   "save the adapter again");
    directory_remove(directory);
}

/* Lists that are longer than anything PEFT writes for a Llama. */
Test(adapter_refusals, of_lists_that_are_too_long)
{
    static const struct {
        const char *begin, *entry, *end, *says, *remedy;
    } lists[] = {
        {"{\"target_modules\": [", "\"q_proj\"", "]}",
         CONFIG "target_modules has 2049 entries, at most 2048 are read", "use a pattern"},
        {"{\"exclude_modules\": [", "\"q_proj\"", "]}", CONFIG "exclude_modules has 2049 entries",
         "use a pattern"},
        {"{\"modules_to_save\": [", "\"norm\"", "]}", CONFIG "modules_to_save is a longer list",
         AGAIN},
        {"{\"layers_to_transform\": [", "0", "]}", CONFIG "layers_to_transform is another array",
         AGAIN},
        {"{\"alpha_pattern\": {", "\"q%d\": 1", "}}", CONFIG "alpha_pattern has 2049 entries",
         "join entries of one value"},
    };
    char *directory = directory_make();

    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
        struct buffer changes = {0};
        buffer_printf(&changes, "%s", lists[i].begin);
        for (int n = 0; n < 2049; n++) {
            buffer_printf(&changes, "%s", n ? "," : "");
            if (strchr(lists[i].entry, '%'))
                buffer_printf(&changes, "\"q%d\": 1", n);
            else
                buffer_printf(&changes, "%s", lists[i].entry);
        }
        buffer_printf(&changes, "%s", lists[i].end);
        write_config(directory, buffer_text(&changes));
        write_tensors(directory, "");
        expect_refusal(directory, false, MLORA_EFORMAT, lists[i].says, lists[i].remedy);
        buffer_free(&changes);
    }
    directory_remove(directory);
}

/* What only a base with biases, or one whose head is its embedding, can bring up. */
Test(adapter_refusals, over_a_base_with_biases_and_a_tied_head)
{
#define TIED                                                                                       \
    "\"ensure_weight_tying\": true, \"target_modules\": [\"embed_tokens\", \"q_proj\", "           \
    "\"v_proj\"]"
#define EMBED P "embed_tokens.lora_embedding_A F32 2x10; " P "embed_tokens.lora_embedding_B F32 8x2"
    static const struct refusal cases[] = {
        {"{\"alora_invocation_tokens\": [1]}", L0 "q_proj.base_layer.bias F32 8",
         MLORA_EUNSUPPORTED, "q_proj.base_layer.bias would count everywhere",
         "train it with bias=\"none\"", true},
        {"{}", L0 "q_proj.base_layer.bias F32 7", MLORA_EFORMAT,
         "q_proj.base_layer.bias has not one value for each of the 8 outputs",
         "save the adapter again", true},
        {"{" TIED ", \"alora_invocation_tokens\": [1]}", EMBED, MLORA_EUNSUPPORTED,
         CONFIG "alora_invocation_tokens is set and model.embed_tokens is a target",
         "save the adapter without it", true},
        {"{" TIED ", \"use_bdlora\": {\"target_modules_bd_a\": [\"lm_head\"], \"nblocks\": 2}}",
         "base_model.model.lm_head.lora_A.weight F32 2x4; "
         "base_model.model.lm_head.lora_B.weight F32 10x2",
         MLORA_EUNSUPPORTED,
         CONFIG "ensure_weight_tying ties LoRA on embed_tokens and lm_head, and "
                "use_bdlora is set",
         "save the adapter without it", true},
        {"{" TIED ", \"use_dora\": true}",
         EMBED "; " P "embed_tokens.lora_magnitude_vector F32 8; " L0
               "q_proj.lora_magnitude_vector F32 8; " L0 "v_proj.lora_magnitude_vector F32 4; "
               "@1.self_attn.q_proj.lora_magnitude_vector F32 8; "
               "@1.self_attn.v_proj.lora_magnitude_vector F32 4",
         MLORA_EFORMAT, "lm_head has no lora_magnitude_vector, but use_dora",
         "save the adapter again", true},
    };
    struct model_config base = small_model();
    char *directory = directory_make();

    base.qkv_bias = true;
    base.tied = true;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_config(directory, cases[i].changes);
        write_tensors(directory, cases[i].edits);
        expect_refusal_over(&base, directory, false, cases[i].status, cases[i].says,
                            cases[i].remedy);
        expect_refusal_over(&base, directory, true, cases[i].status, cases[i].says,
                            cases[i].remedy);
    }
    directory_remove(directory);
}

/* ---- files -------------------------------------------------------------------------------- */

Test(adapter_refusals, of_a_directory_without_a_configuration)
{
    char *directory = directory_make();

    expect_refusal(directory, false, MLORA_EIO, "/adapter_config.json: there is no such file",
                   "a directory in PEFT's layout");
    write_tensors(directory, "");
    expect_refusal(directory, false, MLORA_EIO, "/adapter_config.json: there is no such file",
                   "a directory in PEFT's layout");
    directory_remove(directory);
}

Test(adapter_refusals, of_a_directory_without_tensors)
{
    char *directory = directory_make();

    write_config(directory, "{}");
    expect_refusal(directory, false, MLORA_EIO, "/adapter_model.safetensors: there is no such file",
                   "a directory in PEFT's layout");
    directory_remove(directory);
}

Test(adapter_refusals, of_a_pickle_that_is_never_opened)
{
    char *directory = directory_make();
    char path[512];

    write_config(directory, "{}");
    snprintf(path, sizeof path, "%s/adapter_model.bin", directory);
    cr_assert_eq(mkfifo(path, 0600), 0); /* opening it to read would wait for ever */
    expect_refusal(directory, false, MLORA_EUNSUPPORTED,
                   "/adapter_model.bin: is a Python pickle, which can run code and is never opened",
                   "safe_serialization=True");
    expect_refusal(directory, true, MLORA_EUNSUPPORTED, "/adapter_model.bin", "safe_serialization");
    directory_remove(directory);
}

Test(adapter_refusals, of_a_pickle_under_another_name)
{
    char *directory = directory_make();

    write_config(directory, "{}");
    directory_write(directory, "adapter_model.safetensors", "PK\003\004\0\0\0\0\0\0", 10);
    expect_refusal(directory, false, MLORA_EFORMAT,
                   "/adapter_model.safetensors: is not a safetensors file but a PyTorch pickle",
                   "convert it");
    directory_remove(directory);
}

Test(adapter_refusals, of_a_configuration_that_is_no_json_object)
{
    static const char *const texts[][2] = {{"", "is not valid JSON"},
                                           {"{\"r\": ", "is not valid JSON"},
                                           {"[]", "a JSON object is needed"},
                                           {"{\"r\": 1, \"r\": 2}", "is not valid JSON"},
                                           {"{\"r\": 1}\xff", "is not valid JSON"},
                                           {"\xff\xfe{", "is not valid JSON"}};
    char *directory = directory_make();

    write_tensors(directory, "");
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        directory_write(directory, "adapter_config.json", texts[i][0], strlen(texts[i][0]));
        expect_refusal(directory, false, MLORA_EFORMAT, texts[i][1], "save it again");
    }
    directory_remove(directory);
}

Test(adapter_refusals, of_a_truncated_file)
{
    char *directory = directory_make();
    char path[512];
    struct stat info;

    write_config(directory, "{}");
    write_tensors(directory, "");
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", directory);
    cr_assert_eq(stat(path, &info), 0);
    cr_assert_eq(truncate(path, info.st_size - 1), 0);
    expect_refusal(directory, false, MLORA_EFORMAT, "/adapter_model.safetensors: is truncated",
                   "download it again");
    directory_remove(directory);
}

Test(adapter_refusals, of_a_file_without_factors)
{
    const char empty[] = "\x02\0\0\0\0\0\0\0{}";
    char *directory = directory_make();

    write_config(directory, "{}");
    directory_write(directory, "adapter_model.safetensors", empty, sizeof empty - 1);
    expect_refusal(directory, false, MLORA_EFORMAT,
                   "/adapter_model.safetensors: holds no lora_A and lora_B",
                   "save the adapter again");
    directory_remove(directory);
}

Test(adapter_refusals, of_a_file_that_shrinks_while_it_is_loaded)
{
    const struct model_config base = small_model();
    struct device *dev = host_device();
    struct adapter_plan plan;
    struct adapter adapter;
    char *directory = directory_make();
    char path[512];

    write_config(directory, "{}");
    write_tensors(directory, "");
    cr_assert_eq(adapter_plan_read(&plan, directory, &base, false), MLORA_OK);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", directory);
    cr_assert_eq(truncate(path, 100), 0);
    cr_expect_eq(adapter_load(&adapter, dev, &plan, &base, NULL), MLORA_EIO);
    cr_expect_not_null(strstr(error_text(), "adapter_model.safetensors: ends at byte"), "%s",
                       error_text());
    cr_expect_null(adapter.memory);
    cr_expect_eq(host_device_allocations(), 0);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter_refusals, of_a_fused_linear_without_its_base)
{
    struct adapter_plan plan;
    char *directory = directory_make();

    write_config(directory, "{}");
    write_tensors(directory, L0 "qkv_proj.lora_A.weight F32 2x8");
    cr_expect_eq(adapter_plan_read(&plan, directory, NULL, false), MLORA_EINVAL);
    cr_expect_not_null(strstr(error_text(), "qkv_proj.lora_A.weight is of a fused linear"));
    cr_expect_not_null(strstr(error_text(), "give the base model"));
    directory_remove(directory);
}
