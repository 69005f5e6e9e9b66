/* config.json and generation_config.json. The four families are one decoder with a few switches:
 * a row of a table says how each reads its keys, with the defaults of its class in transformers. A
 * key that would change the arithmetic in a way that is not served is refused by name, so that a
 * model is never run wrongly; keys that change nothing are not looked at. */
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "model/fields.h"
#include "model/rope.h"

enum { CONFIG_BYTES_MAX = 16 << 20 };

/* ---- families ----------------------------------------------------------------------------- */

enum bias_rule { BIAS_NEVER, BIAS_BY_KEY, BIAS_QKV };
enum window_rule { WINDOW_NEVER, WINDOW_ALL_LAYERS, WINDOW_SOME_LAYERS };

struct family {
    const char *model_type;
    const char *architecture;
    const char *alias[2]; /* other names of it in the wild */
    int kv_heads;         /* where the key is absent; 0: as many as heads */
    int head_dim;         /* where the key is absent; 0: hidden_size / heads */
    int max_position;     /* where the key is absent */
    int bos, eos;         /* where the keys are absent; -1: none */
    enum bias_rule bias;  /* of q, k, v (and o, by key) */
    enum window_rule window;
    bool mlp_bias; /* obeys the key mlp_bias */
    bool qk_norm;
};

static const struct family families[] = {
    {.model_type = "llama",
     .architecture = "LlamaForCausalLM",
     .alias = {"LLaMAForCausalLM", "LlamaModel"},
     .max_position = 2048,
     .bos = 1,
     .eos = 2,
     .bias = BIAS_BY_KEY,
     .mlp_bias = true},
    {.model_type = "mistral",
     .architecture = "MistralForCausalLM",
     .alias = {"MistralModel"},
     .kv_heads = 8,
     .max_position = 131072,
     .bos = 1,
     .eos = 2,
     .window = WINDOW_ALL_LAYERS},
    {.model_type = "qwen2",
     .architecture = "Qwen2ForCausalLM",
     .alias = {"Qwen2Model"},
     .kv_heads = 32,
     .max_position = 32768,
     .bos = -1,
     .eos = -1,
     .bias = BIAS_QKV,
     .window = WINDOW_SOME_LAYERS},
    {.model_type = "qwen3",
     .architecture = "Qwen3ForCausalLM",
     .alias = {"Qwen3Model"},
     .kv_heads = 32,
     .head_dim = 128,
     .max_position = 32768,
     .bos = -1,
     .eos = -1,
     .bias = BIAS_BY_KEY,
     .window = WINDOW_SOME_LAYERS,
     .qk_norm = true},
};

enum { N_FAMILIES = sizeof families / sizeof families[0] };

static bool same(const char *a, const char *b)
{
    return a && b && strcmp(a, b) == 0;
}

static mlora_status refuse_family(const char *path, const char *key, const char *value)
{
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: %s is \"%.80s\", served are LlamaForCausalLM, MistralForCausalLM, "
                     "Qwen2ForCausalLM and Qwen3ForCausalLM",
                     path, key, value);
}

/* By the first of `architectures` and by `model_type`: one must be there, both must agree. */
static mlora_status find_family(const struct family **out, const json_t *config, const char *path)
{
    const json_t *list = json_object_get(config, "architectures");
    const json_t *type = json_object_get(config, "model_type");
    const char *architecture = json_string_value(json_array_get(list, 0));
    const char *model_type = json_string_value(type);
    const struct family *by_architecture = NULL, *by_type = NULL;

    if (!json_is_neutral(list) && !architecture)
        return error_set(MLORA_EFORMAT, "%s: architectures is %s, an array of strings is needed",
                         path, json_is_array(list) ? "an array of other values" : json_kind(list));
    if (!json_is_neutral(type) && !model_type)
        return error_set(MLORA_EFORMAT, "%s: model_type is %s, a string is needed", path,
                         json_kind(type));
    if (!architecture && !model_type)
        return error_set(MLORA_EFORMAT,
                         "%s: has neither architectures nor model_type; is this the config.json "
                         "of a Hugging Face model?",
                         path);

    for (int i = 0; i < N_FAMILIES; i++) {
        const struct family *family = &families[i];
        if (same(architecture, family->architecture) || same(architecture, family->alias[0]) ||
            same(architecture, family->alias[1]))
            by_architecture = family;
        if (same(model_type, family->model_type)) by_type = family;
    }
    if (architecture && !by_architecture) return refuse_family(path, "architectures", architecture);
    if (model_type && !by_type) return refuse_family(path, "model_type", model_type);
    if (by_architecture && by_type && by_architecture != by_type)
        return error_set(MLORA_EFORMAT,
                         "%s: architectures is \"%s\" but model_type is \"%s\": they must name the "
                         "same family",
                         path, architecture, model_type);
    *out = by_architecture ? by_architecture : by_type;
    return MLORA_OK;
}

/* ---- keys that change the arithmetic ------------------------------------------------------ */

/* Of other decoders, found in files that call themselves one of ours. */
/* clang-format off */
static const struct {
    const char *key;
    double neutral; /* this number changes nothing; null, false and empty never do */
} foreign[] = {
    {"partial_rotary_factor", 1},   {"rotary_pct", 1},             {"rope_interleaved", NAN},
    {"rope_interleave", NAN},       {"rope_local_base_freq", NAN}, {"no_rope_layers", NAN},
    {"alibi", NAN},                 {"use_alibi", NAN},            {"query_pre_attn_scalar", NAN},
    {"embedding_multiplier", 1},    {"residual_multiplier", 1},    {"attention_multiplier", NAN},
    {"logits_scaling", 1},          {"logit_scale", 1},            {"scale_emb", 1},
    {"scale_depth", NAN},           {"attn_logit_softcapping", 0}, {"final_logit_softcapping", 0},
    {"attn_temperature_tuning", 0}, {"attention_chunk_size", 0},   {"clip_qkv", NAN},
    {"qk_layernorm", NAN},          {"use_qk_norm", NAN},          {"use_parallel_residual", NAN},
    {"num_experts", 0},             {"num_local_experts", 0},      {"n_routed_experts", 0},
    {"moe_num_experts", 0},         {"q_lora_rank", 0},            {"kv_lora_rank", 0},
    {"block_configs", NAN},         {"pruned_heads", NAN},         {"is_encoder_decoder", NAN},
    {"add_cross_attention", NAN},   {"vision_config", NAN},        {"cross_attention_layers", NAN},
    {"audio_config", NAN},
};
/* clang-format on */

static mlora_status refuse_foreign(const json_t *config, const char *path)
{
    static const char *const quantised[] = {"quantization_config", "quantization",
                                            "compression_config"};
    char text[80];

    for (size_t i = 0; i < sizeof foreign / sizeof foreign[0]; i++) {
        const json_t *value = json_object_get(config, foreign[i].key);
        if (json_is_neutral(value)) continue;
        if (json_is_number(value) && json_number_value(value) == foreign[i].neutral) continue;
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %s is %s: it changes the model's arithmetic and is not served", path,
                         foreign[i].key, json_short_text(value, text, sizeof text));
    }
    for (size_t i = 0; i < sizeof quantised / sizeof quantised[0]; i++) {
        const json_t *value = json_object_get(config, quantised[i]);
        if (json_is_neutral(value)) continue;
        const char *method = json_string_value(json_object_get(value, "quant_method"));
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %s is there (%s%.40s): quantised weights are not served; use the "
                         "model in BF16, F16 or F32",
                         path, quantised[i], method ? "quant_method " : "",
                         method ? method : json_short_text(value, text, sizeof text));
    }

    const json_t *act = json_object_get(config, "hidden_act");
    if (!act || json_is_null(act) || same(json_string_value(act), "silu") ||
        same(json_string_value(act), "swish"))
        return MLORA_OK;
    return error_set(MLORA_EUNSUPPORTED, "%s: hidden_act is %s, served is \"silu\"", path,
                     json_short_text(act, text, sizeof text));
}

/* ---- sizes -------------------------------------------------------------------------------- */

/* The limits are far above any model, and so low that no product of two sizes of a layer leaves
 * int64_t, nor a row of any matrix int. */
static mlora_status parse_sizes(struct model_config *out, struct fields *config,
                                const struct family *family)
{
    out->hidden_size = (int)field_need_int(config, "hidden_size", 1, 1 << 18);
    out->mlp_size = (int)field_need_int(config, "intermediate_size", 1, 1 << 20);
    out->n_layers = (int)field_need_int(config, "num_hidden_layers", 1, LAYERS_MAX);
    out->n_heads = (int)field_need_int(config, "num_attention_heads", 1, 1 << 12);
    out->vocab_size = (int)field_need_int(config, "vocab_size", 1, 1 << 24);
    out->max_position =
        (int)field_int(config, "max_position_embeddings", family->max_position, 1, 1 << 26);
    out->rms_norm_eps = field_double(config, "rms_norm_eps", 1e-6, 1e-15, 0.1);

    /* null means as many as heads; absent means what the class says */
    const int absent = family->kv_heads && !field_exists(config, "num_key_value_heads")
                           ? family->kv_heads
                           : out->n_heads;
    out->n_kv_heads = (int)field_int(config, "num_key_value_heads", absent, 1, 1 << 12);
    const int derived = family->head_dim ? family->head_dim : out->hidden_size / out->n_heads;
    out->head_dim = (int)field_int(config, "head_dim", derived, 2, 1 << 10);
    if (config->status != MLORA_OK) return config->status;

    if (out->n_heads % out->n_kv_heads != 0)
        return error_set(MLORA_EFORMAT,
                         "%s: num_attention_heads is %d, must be a multiple of "
                         "num_key_value_heads, which is %d",
                         config->path, out->n_heads, out->n_kv_heads);
    if (out->head_dim == derived && !family->head_dim && out->hidden_size % out->n_heads != 0)
        return error_set(MLORA_EFORMAT,
                         "%s: hidden_size is %d, must be a multiple of num_attention_heads, which "
                         "is %d, where head_dim is not given",
                         config->path, out->hidden_size, out->n_heads);
    if (out->head_dim % 2 != 0 || out->head_dim < 2 || out->head_dim > 1 << 10)
        return error_set(MLORA_EFORMAT,
                         "%s: head_dim (or hidden_size / num_attention_heads) is %d, must be even "
                         "and from 2 to %d",
                         config->path, out->head_dim, 1 << 10);
    return MLORA_OK;
}

/* ---- sliding windows ---------------------------------------------------------------------- */

/* What layer_types says of layer `l`: 1 sliding, 0 full, -1 neither. */
static int layer_type(const json_t *types, int l)
{
    const char *type = json_string_value(json_array_get(types, (size_t)l));
    if (same(type, "sliding_attention")) return 1;
    return same(type, "full_attention") ? 0 : -1;
}

static mlora_status parse_layer_types(struct model_config *out, const json_t *types,
                                      const struct family *family, const char *path)
{
    char text[80];

    if (!json_is_array(types) || json_array_size(types) != (size_t)out->n_layers)
        return error_set(MLORA_EFORMAT,
                         "%s: layer_types is %s, an array of num_hidden_layers (%d) strings is "
                         "needed",
                         path,
                         json_is_array(types) ? "an array of another length" : json_kind(types),
                         out->n_layers);
    for (int l = 0; l < out->n_layers; l++) {
        const int sliding = layer_type(types, l);
        if (sliding < 0)
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: layer_types[%d] is %s, served are \"full_attention\" and "
                             "\"sliding_attention\"",
                             path, l,
                             json_short_text(json_array_get(types, (size_t)l), text, sizeof text));
        if (family->window == WINDOW_SOME_LAYERS && (!sliding || out->window > 0))
            out->layer_has_window[l] = sliding;
        else if (sliding != (int)out->layer_has_window[l])
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: layer_types[%d] is %s, but sliding_window and model_type make it "
                             "the opposite",
                             path, l, sliding ? "\"sliding_attention\"" : "\"full_attention\"");
    }
    return MLORA_OK;
}

/* Which layers see only the last `window` tokens.
 *   Llama    none
 *   Mistral  all; absent means 4096, null none
 *   Qwen     where use_sliding_window: the layers from max_window_layers on, or as layer_types says */
static mlora_status parse_window(struct model_config *out, struct fields *config,
                                 const struct family *family)
{
    int first = 0;

    if (family->window == WINDOW_SOME_LAYERS) {
        first = (int)field_int(config, "max_window_layers", 28, 0, 1 << 20);
        if (!field_bool(config, "use_sliding_window", false)) first = -1;
    } else if (family->window == WINDOW_NEVER) {
        first = -1;
    }
    if (first >= 0) {
        const int absent = field_exists(config, "sliding_window") ? 0 : 4096;
        out->window = (int)field_int(config, "sliding_window", absent, 1, 1 << 26);
        for (int l = first; l < out->n_layers; l++) out->layer_has_window[l] = out->window > 0;
    }
    if (config->status != MLORA_OK) return config->status;

    const json_t *types = json_object_get(config->object, "layer_types");
    if (!types || json_is_null(types)) return MLORA_OK;
    return parse_layer_types(out, types, family, config->path);
}

/* ---- tokens ------------------------------------------------------------------------------- */

static mlora_status add_eos(struct model_config *out, const json_t *value, const char *path)
{
    if (!json_is_integer(value) || json_integer_value(value) < -1 ||
        json_integer_value(value) > INT32_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: eos_token_id is or has %s, a token id or an array of them is needed",
                         path, json_is_integer(value) ? "a number out of range" : json_kind(value));
    const int32_t id = (int32_t)json_integer_value(value);
    if (id < 0) return MLORA_OK; /* -1: some files say "none" so */
    for (int i = 0; i < out->n_eos; i++)
        if (out->eos[i] == id) return MLORA_OK;
    if (out->n_eos == EOS_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: eos_token_id: config.json and generation_config.json name more than "
                         "%d end tokens",
                         path, EOS_MAX);
    out->eos[out->n_eos++] = id;
    return MLORA_OK;
}

/* `value` is an id, an array of ids, or null. */
static mlora_status add_all_eos(struct model_config *out, const json_t *value, const char *path)
{
    if (!value || json_is_null(value)) return MLORA_OK;
    if (!json_is_array(value)) return add_eos(out, value, path);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const mlora_status status = add_eos(out, json_array_get(value, i), path);
        if (status != MLORA_OK) return status;
    }
    return MLORA_OK;
}

static mlora_status parse_tokens(struct model_config *out, struct fields *config,
                                 const struct family *family)
{
    const int absent = field_exists(config, "bos_token_id") ? -1 : family->bos;
    out->bos = (int32_t)field_int(config, "bos_token_id", absent, -1, INT32_MAX);
    if (config->status != MLORA_OK) return config->status;

    if (!field_exists(config, "eos_token_id") && family->eos >= 0)
        out->eos[out->n_eos++] = family->eos;
    return add_all_eos(out, json_object_get(config->object, "eos_token_id"), config->path);
}

/* ---- the files ---------------------------------------------------------------------------- */

mlora_status model_config_parse(struct model_config *out, const json_t *config, const char *path)
{
    struct fields fields = {config, path, MLORA_OK};
    const struct family *family = NULL;

    *out = (struct model_config){
        .bos = -1, .temperature = 1.0, .top_p = 1.0, .repetition_penalty = 1.0};
    mlora_status status = find_family(&family, config, path);
    if (status != MLORA_OK) return status;
    snprintf(out->architecture, sizeof out->architecture, "%s", family->architecture);
    status = refuse_foreign(config, path);
    if (status != MLORA_OK) return status;
    status = parse_sizes(out, &fields, family);
    if (status != MLORA_OK) return status;
    status = rope_parse(&out->rope, config, out->max_position, path);
    if (status != MLORA_OK) return status;
    status = parse_window(out, &fields, family);
    if (status != MLORA_OK) return status;

    out->qk_norm = family->qk_norm;
    out->qkv_bias = family->bias == BIAS_QKV;
    if (family->bias == BIAS_BY_KEY)
        out->qkv_bias = out->o_bias = field_bool(&fields, "attention_bias", false);
    if (family->mlp_bias) out->mlp_bias = field_bool(&fields, "mlp_bias", false);
    out->tied = field_bool(&fields, "tie_word_embeddings", false);
    return parse_tokens(out, &fields, family);
}

/* What is not given stays neutral. vLLM and others take the defaults of sampling from here too. */
mlora_status model_config_parse_generation(struct model_config *out, const json_t *generation,
                                           const char *path)
{
    struct fields fields = {generation, path, MLORA_OK};

    out->has_generation_config = true;
    out->do_sample = field_bool(&fields, "do_sample", false);
    out->temperature = field_double(&fields, "temperature", 1.0, 0.0, 100.0);
    out->top_p = field_double(&fields, "top_p", 1.0, 1e-6, 1.0);
    out->min_p = field_double(&fields, "min_p", 0.0, 0.0, 1.0);
    out->repetition_penalty = field_double(&fields, "repetition_penalty", 1.0, 1e-3, 1e3);
    out->top_k = (int)field_int(&fields, "top_k", 0, -1, INT32_MAX);
    if (out->top_k < 0) out->top_k = 0; /* -1 means all, as 0 does */
    out->max_new_tokens = (int)field_int(&fields, "max_new_tokens", 0, 1, INT32_MAX);
    if (fields.status != MLORA_OK) return fields.status;
    return add_all_eos(out, json_object_get(generation, "eos_token_id"), path);
}

static mlora_status read_config(struct model_config *out, const char *directory, const char *path)
{
    json_t *config = NULL;

    if (!file_is_directory(directory))
        return error_set(MLORA_EIO, "%s: is not a directory; a model directory is needed",
                         directory);
    if (!file_exists(path)) {
        char *adapter = path_join(directory, "adapter_config.json");
        const int is_adapter = adapter && file_exists(adapter);
        free(adapter);
        return error_set(MLORA_EIO, "%s: is missing; %s", path,
                         is_adapter ? "this is an adapter, its base model is needed"
                                    : "a model directory in Hugging Face format is needed");
    }
    mlora_status status = json_read_file(&config, path, CONFIG_BYTES_MAX);
    if (status == MLORA_OK) status = model_config_parse(out, config, path);
    json_decref(config);
    return status;
}

mlora_status model_config_read(struct model_config *out, const char *directory)
{
    json_t *generation = NULL;
    mlora_status status;

    char *path = path_join(directory, "config.json");
    char *generation_path = path_join(directory, "generation_config.json");
    if (!path || !generation_path) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory for a path", directory);
        goto done;
    }
    status = read_config(out, directory, path);
    if (status != MLORA_OK || !file_exists(generation_path)) goto done;
    status = json_read_file(&generation, generation_path, CONFIG_BYTES_MAX);
    if (status != MLORA_OK) goto done;
    status = model_config_parse_generation(out, generation, generation_path);

done:
    json_decref(generation);
    free(generation_path);
    free(path);
    return status;
}
