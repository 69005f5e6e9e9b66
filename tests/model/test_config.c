/* config.json and generation_config.json: against what transformers makes of them
 * (tests/fixtures/config/cases.json), and against files that are broken or not served. */
#include "model/config.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "tests/model/files.h"

TestSuite(config, .init = directory_open, .fini = directory_close);

static const char base[] =
    "{'architectures':['LlamaForCausalLM'],'model_type':'llama','hidden_size':64,"
    "'intermediate_size':96,'num_hidden_layers':2,'num_attention_heads':4,'vocab_size':100}";

static json_t *parsed(const char *text)
{
    json_error_t error;
    json_t *value = json_loads(quoted(text), JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, &error);
    cr_assert_not_null(value, "%s: %s", text, error.text);
    return value;
}

/* The base file with `changes`, an object whose keys replace its own or are added. */
static mlora_status parse_changed(struct model_config *out, const char *changes)
{
    json_t *config = parsed(base), *object = parsed(changes);
    cr_assert_eq(json_object_update(config, object), 0);
    const mlora_status status = model_config_parse(out, config, "dir/config.json");
    json_decref(object);
    json_decref(config);
    return status;
}

/* ---- against transformers ----------------------------------------------------------------- */

static int expected_int(const json_t *expect, const char *key)
{
    const json_t *value = json_object_get(expect, key);
    cr_assert(json_is_integer(value) || json_is_boolean(value), "%s", key);
    return json_is_integer(value) ? (int)json_integer_value(value) : json_is_true(value);
}

static void compare_rope(const struct model_config *config, const json_t *expect, const char *name)
{
    const json_t *frequencies = json_object_get(expect, "frequency");
    float *frequency = malloc((size_t)config->head_dim * sizeof *frequency);

    cr_assert_eq((int)json_array_size(frequencies), config->head_dim / 2, "%s", name);
    model_config_rope(config, frequency);
    for (int i = 0; i < config->head_dim / 2; i++) {
        const double want = json_number_value(json_array_get(frequencies, (size_t)i));
        /* two units in the last place of f32: powf of torch and pow rounded may differ by one */
        cr_expect(fabs(frequency[i] - want) <= 2.4e-7 * want, "%s: frequency[%d] is %.9g, not %.9g",
                  name, i, frequency[i], want);
    }
    free(frequency);
    cr_expect_float_eq(config->rope.attention_factor,
                       json_number_value(json_object_get(expect, "amplitude")), 1e-12, "%s", name);
}

static void compare(const struct model_config *config, const json_t *expect, const char *name)
{
    const json_t *windows = json_object_get(expect, "windows");
    const json_t *eos = json_object_get(expect, "eos");

    cr_expect_str_eq(config->architecture,
                     json_string_value(json_object_get(expect, "architecture")), "%s", name);
    cr_expect_eq(config->vocab_size, expected_int(expect, "vocab_size"), "%s", name);
    cr_expect_eq(config->hidden_size, expected_int(expect, "hidden_size"), "%s", name);
    cr_expect_eq(config->mlp_size, expected_int(expect, "mlp_size"), "%s", name);
    cr_expect_eq(config->n_layers, expected_int(expect, "n_layers"), "%s", name);
    cr_expect_eq(config->head_dim, expected_int(expect, "head_dim"), "%s", name);
    cr_expect_eq(config->n_heads * config->head_dim, expected_int(expect, "q_rows"), "%s", name);
    cr_expect_eq(config->n_kv_heads * config->head_dim, expected_int(expect, "k_rows"), "%s", name);
    cr_expect_eq(config->qkv_bias, expected_int(expect, "qkv_bias"), "%s", name);
    cr_expect_eq(config->o_bias, expected_int(expect, "o_bias"), "%s", name);
    cr_expect_eq(config->mlp_bias, expected_int(expect, "mlp_bias"), "%s", name);
    cr_expect_eq(config->qk_norm, expected_int(expect, "qk_norm"), "%s", name);
    cr_expect_eq(config->tied, expected_int(expect, "tied"), "%s", name);
    cr_expect_eq(config->max_position, expected_int(expect, "max_position"), "%s", name);
    cr_expect_eq(config->rms_norm_eps, json_number_value(json_object_get(expect, "rms_norm_eps")),
                 "%s", name);
    cr_expect_eq(config->bos, expected_int(expect, "bos"), "%s", name);

    cr_expect_eq(config->n_eos, (int)json_array_size(eos), "%s", name);
    for (int i = 0; i < config->n_eos; i++)
        cr_expect_eq(config->eos[i], json_integer_value(json_array_get(eos, (size_t)i)), "%s",
                     name);
    for (int l = 0; l < config->n_layers; l++)
        cr_expect_eq(config->layer_has_window[l] ? config->window : 0,
                     json_integer_value(json_array_get(windows, (size_t)l)), "%s: layer %d", name,
                     l);
    compare_rope(config, expect, name);
}

Test(config, means_what_it_means_to_transformers)
{
    json_t *root = NULL;
    cr_assert_eq(json_read_file(&root, "tests/fixtures/config/cases.json", 1 << 20), MLORA_OK, "%s",
                 error_text());
    const json_t *cases = json_object_get(root, "cases");
    cr_expect_gt(json_array_size(cases), 40);

    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *one = json_array_get(cases, i);
        const char *name = json_string_value(json_object_get(one, "name"));
        struct model_config config;
        cr_assert_eq(model_config_parse(&config, json_object_get(one, "config"), name), MLORA_OK,
                     "%s", error_text());
        compare(&config, json_object_get(one, "expect"), name);
    }
    json_decref(root);
}

/* ---- directories -------------------------------------------------------------------------- */

Test(config, reads_the_fixtures)
{
    struct model_config config;

    cr_assert_eq(model_config_read(&config, "tests/fixtures/tiny-llama2"), MLORA_OK, "%s",
                 error_text());
    cr_expect_eq(config.hidden_size, 256);
    cr_expect_eq(config.mlp_size, 688);
    cr_expect_eq(config.n_layers, 4);
    cr_expect_eq(config.n_heads, 4);
    cr_expect_eq(config.n_kv_heads, 2);
    cr_expect_eq(config.head_dim, 64);
    cr_expect_eq(config.max_position, 1024);
    cr_expect_eq(config.rms_norm_eps, 1e-5);
    cr_expect_eq(config.rope.kind, ROPE_DEFAULT);
    cr_expect(!config.tied && !config.qkv_bias && config.window == 0);
    cr_expect_eq(config.bos, 1);
    cr_expect(config.n_eos == 1 && config.eos[0] == 2, "the same in both files is one");
    cr_expect(config.has_generation_config && config.do_sample);
    cr_expect_eq(config.temperature, 0.7);
    cr_expect_eq(config.top_p, 0.9);
    cr_expect_eq(config.top_k, 0);
    cr_expect_eq(config.max_new_tokens, 64);

    cr_assert_eq(model_config_read(&config, "tests/fixtures/tiny-llama3"), MLORA_OK, "%s",
                 error_text());
    cr_expect(config.tied);
    cr_expect_eq(config.n_heads * config.head_dim, 384);
    cr_expect_eq(config.hidden_size, 192);
    cr_expect_eq(config.rope.kind, ROPE_LLAMA3);
    cr_expect_eq(config.rope.theta, 500000.0);
    cr_expect_eq(config.rope.original_max_position, 256.0);
    cr_expect_eq(config.rope.attention_factor, 1.0);
}

Test(config, without_generation_config_sampling_is_neutral)
{
    struct model_config config;
    const char *text = quoted(base);
    write_file("config.json", text, strlen(text));
    cr_assert_eq(model_config_read(&config, directory), MLORA_OK, "%s", error_text());
    cr_expect(!config.has_generation_config && !config.do_sample);
    cr_expect(config.temperature == 1.0 && config.top_p == 1.0 && config.min_p == 0.0);
    cr_expect(config.repetition_penalty == 1.0 && config.top_k == 0 && config.max_new_tokens == 0);
}

Test(config, end_tokens_of_both_files_are_joined)
{
    struct model_config config;
    const char *generation = quoted("{'eos_token_id':[7,2,9,-1],'top_k':-1,'temperature':null}");
    const char *text = quoted(base);
    write_file("config.json", text, strlen(text));
    write_file("generation_config.json", generation, strlen(generation));
    cr_assert_eq(model_config_read(&config, directory), MLORA_OK, "%s", error_text());
    cr_expect_eq(config.n_eos, 3);
    cr_expect(config.eos[0] == 2 && config.eos[1] == 7 && config.eos[2] == 9);
    cr_expect_eq(config.top_k, 0);
    cr_expect_eq(config.temperature, 1.0);
}

Test(config, a_directory_that_is_no_model_is_refused)
{
    struct model_config config;

    cr_expect_eq(model_config_read(&config, path_of("none")), MLORA_EIO);
    expect_text("missing", "/none", "is not a directory");
    cr_expect_eq(model_config_read(&config, directory), MLORA_EIO);
    expect_text("empty", "config.json: is missing", "Hugging Face format is needed");
    cr_expect_eq(model_config_read(&config, "tests/fixtures/tiny-llama2/adapters/sql"), MLORA_EIO);
    expect_text("an adapter", "config.json: is missing", "this is an adapter");
    write_file("config.json", "[]", 2);
    cr_expect_eq(model_config_read(&config, directory), MLORA_EFORMAT);
    expect_text("an array", "config.json", "a JSON object is needed");
    write_file("config.json", "{", 1);
    cr_expect_eq(model_config_read(&config, directory), MLORA_EFORMAT);
    expect_text("cut", "config.json", "is not valid JSON");
}

/* ---- refusals ----------------------------------------------------------------------------- */

/* clang-format off */
static const struct {
    const char *changes, *says;
    mlora_status status;
} bad[] = {
    {"{'architectures':null,'model_type':null}", "has neither architectures nor model_type", MLORA_EFORMAT},
    {"{'architectures':'LlamaForCausalLM'}", "architectures is a string, an array of strings is needed", MLORA_EFORMAT},
    {"{'architectures':[1]}", "architectures is an array of other values", MLORA_EFORMAT},
    {"{'architectures':['GemmaForCausalLM']}", "architectures is \"GemmaForCausalLM\", served are LlamaForCausalLM", MLORA_EUNSUPPORTED},
    {"{'architectures':['LlamaForSequenceClassification']}", "architectures is \"LlamaForSequenceClassification\"", MLORA_EUNSUPPORTED},
    {"{'architectures':['MixtralForCausalLM']}", "architectures is \"MixtralForCausalLM\"", MLORA_EUNSUPPORTED},
    {"{'model_type':'phi3'}", "model_type is \"phi3\", served are", MLORA_EUNSUPPORTED},
    {"{'model_type':1}", "model_type is an integer, a string is needed", MLORA_EFORMAT},
    {"{'model_type':'mistral'}", "model_type is \"mistral\": they must name the same family", MLORA_EFORMAT},
    {"{'hidden_size':null}", "hidden_size is null, an integer is needed", MLORA_EFORMAT},
    {"{'hidden_size':0}", "hidden_size is 0, must be from 1 to 262144", MLORA_EFORMAT},
    {"{'hidden_size':-64}", "hidden_size is -64", MLORA_EFORMAT},
    {"{'hidden_size':64.0}", "hidden_size is a number with a fraction, an integer is needed", MLORA_EFORMAT},
    {"{'hidden_size':'64'}", "hidden_size is a string", MLORA_EFORMAT},
    {"{'hidden_size':[64]}", "hidden_size is an array", MLORA_EFORMAT},
    {"{'hidden_size':9223372036854775807}", "hidden_size is 9223372036854775807, must be", MLORA_EFORMAT},
    {"{'hidden_size':66}", "hidden_size is 66, must be a multiple of num_attention_heads", MLORA_EFORMAT},
    {"{'hidden_size':60}", "is 15, must be even", MLORA_EFORMAT},
    {"{'hidden_size':4}", "is 1, must be even", MLORA_EFORMAT},
    {"{'hidden_size':3,'num_attention_heads':4}", "hidden_size is 3, must be a multiple", MLORA_EFORMAT},
    {"{'intermediate_size':0}", "intermediate_size is 0", MLORA_EFORMAT},
    {"{'intermediate_size':2147483648}", "intermediate_size is 2147483648, must be from 1", MLORA_EFORMAT},
    {"{'num_hidden_layers':0}", "num_hidden_layers is 0", MLORA_EFORMAT},
    {"{'num_hidden_layers':513}", "num_hidden_layers is 513, must be from 1 to 512", MLORA_EFORMAT},
    {"{'num_attention_heads':0}", "num_attention_heads is 0", MLORA_EFORMAT},
    {"{'num_attention_heads':true}", "num_attention_heads is true or false", MLORA_EFORMAT},
    {"{'num_key_value_heads':0}", "num_key_value_heads is 0", MLORA_EFORMAT},
    {"{'num_key_value_heads':3}", "num_attention_heads is 4, must be a multiple of num_key_value_heads, which is 3", MLORA_EFORMAT},
    {"{'num_key_value_heads':8}", "must be a multiple of num_key_value_heads, which is 8", MLORA_EFORMAT},
    {"{'head_dim':0}", "head_dim is 0, must be from 2 to 1024", MLORA_EFORMAT},
    {"{'head_dim':33}", "is 33, must be even", MLORA_EFORMAT},
    {"{'head_dim':1026}", "head_dim is 1026", MLORA_EFORMAT},
    {"{'vocab_size':0}", "vocab_size is 0", MLORA_EFORMAT},
    {"{'vocab_size':16777217}", "vocab_size is 16777217", MLORA_EFORMAT},
    {"{'max_position_embeddings':0}", "max_position_embeddings is 0", MLORA_EFORMAT},
    {"{'rms_norm_eps':0}", "rms_norm_eps is 0, must be from 1e-15 to 0.1", MLORA_EFORMAT},
    {"{'rms_norm_eps':-1e-5}", "rms_norm_eps is -1e-05", MLORA_EFORMAT},
    {"{'rms_norm_eps':'small'}", "rms_norm_eps is a string, a number is needed", MLORA_EFORMAT},
    {"{'hidden_act':'gelu'}", "hidden_act is \"gelu\", served is \"silu\"", MLORA_EUNSUPPORTED},
    {"{'hidden_act':1}", "hidden_act is 1, served is \"silu\"", MLORA_EUNSUPPORTED},
    {"{'attention_bias':1}", "attention_bias is an integer, true or false is needed", MLORA_EFORMAT},
    {"{'mlp_bias':'yes'}", "mlp_bias is a string, true or false is needed", MLORA_EFORMAT},
    {"{'tie_word_embeddings':0}", "tie_word_embeddings is an integer", MLORA_EFORMAT},
    {"{'bos_token_id':'<s>'}", "bos_token_id is a string, an integer is needed", MLORA_EFORMAT},
    {"{'bos_token_id':-2}", "bos_token_id is -2", MLORA_EFORMAT},
    {"{'eos_token_id':'</s>'}", "eos_token_id is or has a string, a token id", MLORA_EFORMAT},
    {"{'eos_token_id':[1,[2]]}", "eos_token_id is or has an array", MLORA_EFORMAT},
    {"{'eos_token_id':4294967296}", "eos_token_id is or has a number out of range", MLORA_EFORMAT},
    {"{'eos_token_id':[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}", "more than 16 end tokens", MLORA_EFORMAT},
    {"{'quantization_config':{'quant_method':'gptq','bits':4}}", "quantization_config is there (quant_method gptq): quantised weights are not served; use the model in BF16", MLORA_EUNSUPPORTED},
    {"{'quantization':{'bits':4}}", "quantization is there ({\"bits\":4})", MLORA_EUNSUPPORTED},
    {"{'compression_config':{'format':'int'}}", "compression_config is there", MLORA_EUNSUPPORTED},
    {"{'partial_rotary_factor':0.5}", "partial_rotary_factor is 0.5: it changes the model's arithmetic", MLORA_EUNSUPPORTED},
    {"{'rope_interleaved':true}", "rope_interleaved is true: it changes", MLORA_EUNSUPPORTED},
    {"{'embedding_multiplier':12.0}", "embedding_multiplier is 12.0: it changes", MLORA_EUNSUPPORTED},
    {"{'residual_multiplier':0.22}", "residual_multiplier is 0.22", MLORA_EUNSUPPORTED},
    {"{'attention_multiplier':0.015625}", "attention_multiplier is 0.015625", MLORA_EUNSUPPORTED},
    {"{'logits_scaling':8}", "logits_scaling is 8", MLORA_EUNSUPPORTED},
    {"{'logit_scale':0.0625}", "logit_scale is 0.0625", MLORA_EUNSUPPORTED},
    {"{'attn_logit_softcapping':50.0}", "attn_logit_softcapping is 50.0", MLORA_EUNSUPPORTED},
    {"{'final_logit_softcapping':30.0}", "final_logit_softcapping is 30.0", MLORA_EUNSUPPORTED},
    {"{'num_experts':8}", "num_experts is 8", MLORA_EUNSUPPORTED},
    {"{'num_local_experts':8}", "num_local_experts is 8", MLORA_EUNSUPPORTED},
    {"{'n_routed_experts':64}", "n_routed_experts is 64", MLORA_EUNSUPPORTED},
    {"{'kv_lora_rank':512}", "kv_lora_rank is 512", MLORA_EUNSUPPORTED},
    {"{'no_rope_layers':[1,1,1,0]}", "no_rope_layers is [1,1,1,0]", MLORA_EUNSUPPORTED},
    {"{'block_configs':[{'attention':{'no_op':true}}]}", "block_configs is [{", MLORA_EUNSUPPORTED},
    {"{'pruned_heads':{'1':[0]}}", "pruned_heads is {\"1\":[0]}", MLORA_EUNSUPPORTED},
    {"{'alibi':true}", "alibi is true", MLORA_EUNSUPPORTED},
    {"{'vision_config':{'depth':32}}", "vision_config is {\"depth\":32}", MLORA_EUNSUPPORTED},
    {"{'layer_types':['full_attention']}", "layer_types is an array of another length, an array of num_hidden_layers (2) strings", MLORA_EFORMAT},
    {"{'layer_types':'full_attention'}", "layer_types is a string", MLORA_EFORMAT},
    {"{'layer_types':['full_attention','linear_attention']}", "layer_types[1] is \"linear_attention\", served are", MLORA_EUNSUPPORTED},
    {"{'layer_types':['full_attention',2]}", "layer_types[1] is 2", MLORA_EUNSUPPORTED},
    {"{'layer_types':['full_attention','sliding_attention']}", "layer_types[1] is \"sliding_attention\", but sliding_window", MLORA_EUNSUPPORTED},
    {"{'architectures':['MistralForCausalLM'],'model_type':'mistral','num_key_value_heads':2,'layer_types':['sliding_attention','full_attention']}", "layer_types[1] is \"full_attention\", but", MLORA_EUNSUPPORTED},
    {"{'architectures':['Qwen2ForCausalLM'],'model_type':'qwen2','num_key_value_heads':2,'layer_types':['full_attention','sliding_attention']}", "layer_types[1] is \"sliding_attention\", but", MLORA_EUNSUPPORTED},
    {"{'architectures':['MistralForCausalLM'],'model_type':'mistral'}", "num_attention_heads is 4, must be a multiple of num_key_value_heads, which is 8", MLORA_EFORMAT},
    {"{'architectures':['MistralForCausalLM'],'model_type':'mistral','num_key_value_heads':2,'sliding_window':0}", "sliding_window is 0, must be from 1", MLORA_EFORMAT},
    {"{'architectures':['Qwen2ForCausalLM'],'model_type':'qwen2','num_key_value_heads':2,'use_sliding_window':'no'}", "use_sliding_window is a string", MLORA_EFORMAT},
    {"{'architectures':['Qwen2ForCausalLM'],'model_type':'qwen2','num_key_value_heads':2,'max_window_layers':-1}", "max_window_layers is -1", MLORA_EFORMAT},
    {"{'rope_theta':0}", "rope_theta is 0, must be from 2", MLORA_EFORMAT},
    {"{'rope_theta':'10000'}", "rope_theta is a string, a number is needed", MLORA_EFORMAT},
    {"{'rope_scaling':8.0}", "rope_scaling is a number with a fraction, an object or null is needed", MLORA_EFORMAT},
    {"{'rope_parameters':['yarn']}", "rope_parameters is an array, an object or null", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'dynamic','factor':2}}", "rope_scaling: rope_type \"dynamic\" is not served; served are default, linear, llama3 and yarn", MLORA_EUNSUPPORTED},
    {"{'rope_scaling':{'rope_type':'longrope','short_factor':[1],'long_factor':[1]}}", "rope_type \"longrope\" is not served", MLORA_EUNSUPPORTED},
    {"{'rope_scaling':{'type':'su'}}", "rope_type \"su\" is not served", MLORA_EUNSUPPORTED},
    {"{'rope_scaling':{'type':'mrope','mrope_section':[1,2]}}", "rope_type \"mrope\" is not served", MLORA_EUNSUPPORTED},
    {"{'rope_scaling':{'rope_type':1}}", "rope_scaling: rope_type is an integer, a string is needed", MLORA_EFORMAT},
    {"{'rope_scaling':{'rope_type':'default','mrope_section':[16,24,24]}}", "mrope_section is [16,24,24]: it changes the rotary embedding", MLORA_EUNSUPPORTED},
    {"{'rope_parameters':{'rope_type':'default','partial_rotary_factor':0.25}}", "rope_parameters: partial_rotary_factor is 0.25, served is 1", MLORA_EUNSUPPORTED},
    {"{'rope_parameters':{'full_attention':{'rope_type':'default'}}}", "rope_parameters: full_attention is an object", MLORA_EUNSUPPORTED},
    {"{'rope_parameters':{'rope_theta':1}}", "rope_parameters: rope_theta is 1, must be from 2", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'linear'}}", "rope_scaling: factor is missing, a number is needed", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'linear','factor':0}}", "rope_scaling: factor is 0, must be from 0.001", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'linear','factor':'8'}}", "factor is a string", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'yarn','factor':null}}", "factor is null, a number is needed", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'yarn','factor':4,'original_max_position_embeddings':0}}", "original_max_position_embeddings is 0", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'yarn','factor':4,'beta_fast':-1}}", "beta_fast is -1", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'yarn','factor':4,'truncate':1}}", "truncate is an integer, true or false", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'yarn','factor':4,'attention_factor':-1}}", "attention_factor is -1", MLORA_EFORMAT},
    {"{'rope_scaling':{'type':'yarn','factor':4,'mscale':'1'}}", "mscale is a string", MLORA_EFORMAT},
    {"{'rope_scaling':{'rope_type':'llama3','factor':8}}", "low_freq_factor is missing, a number is needed", MLORA_EFORMAT},
    {"{'rope_scaling':{'rope_type':'llama3','factor':8,'low_freq_factor':1}}", "high_freq_factor is missing", MLORA_EFORMAT},
    {"{'rope_scaling':{'rope_type':'llama3','factor':8,'low_freq_factor':4,'high_freq_factor':4}}", "high_freq_factor is 4, must be greater than low_freq_factor, which is 4", MLORA_EFORMAT},
    {"{'rope_scaling':{'rope_type':'llama3','factor':8,'low_freq_factor':0,'high_freq_factor':4}}", "low_freq_factor is 0", MLORA_EFORMAT},
};

static const struct {
    const char *generation, *says;
} bad_generation[] = {
    {"{'temperature':-1}", "temperature is -1, must be from 0"},
    {"{'temperature':'hot'}", "temperature is a string"},
    {"{'top_p':0}", "top_p is 0, must be from"},
    {"{'top_p':1.5}", "top_p is 1.5"},
    {"{'top_k':-2}", "top_k is -2"},
    {"{'top_k':0.5}", "top_k is a number with a fraction"},
    {"{'min_p':2}", "min_p is 2, must be from 0 to 1"},
    {"{'repetition_penalty':0}", "repetition_penalty is 0"},
    {"{'max_new_tokens':0}", "max_new_tokens is 0"},
    {"{'max_new_tokens':4294967296}", "max_new_tokens is 4294967296"},
    {"{'do_sample':1}", "do_sample is an integer"},
    {"{'eos_token_id':{'a':1}}", "eos_token_id is or has an object"},
};
/* clang-format on */

Test(config, every_file_that_is_broken_or_not_served_is_refused_with_its_reason)
{
    struct model_config config;

    cr_expect_eq(parse_changed(&config, "{}"), MLORA_OK, "%s", error_text());
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        cr_expect_eq(parse_changed(&config, bad[i].changes), bad[i].status, "%s", bad[i].changes);
        expect_text(bad[i].changes, "dir/config.json: ", bad[i].says);
    }
}

Test(config, every_required_key_that_is_missing_is_named)
{
    static const char *const keys[] = {"hidden_size", "intermediate_size", "num_hidden_layers",
                                       "num_attention_heads", "vocab_size"};
    struct model_config config;
    char says[64];

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        json_t *object = parsed(base);
        json_object_del(object, keys[i]);
        cr_expect_eq(model_config_parse(&config, object, "config.json"), MLORA_EFORMAT);
        snprintf(says, sizeof says, "%s is missing, an integer is needed", keys[i]);
        expect_text(keys[i], "config.json", says);
        json_decref(object);
    }
}

Test(config, every_bad_generation_config_is_refused_with_its_reason)
{
    struct model_config config;

    for (size_t i = 0; i < sizeof bad_generation / sizeof bad_generation[0]; i++) {
        const char *text = quoted(base), *generation = quoted(bad_generation[i].generation);
        write_file("config.json", text, strlen(text));
        write_file("generation_config.json", generation, strlen(generation));
        cr_expect_eq(model_config_read(&config, directory), MLORA_EFORMAT, "%s", generation);
        expect_text(generation, "generation_config.json", bad_generation[i].says);
    }
}

Test(config, keys_that_say_nothing_or_change_nothing_are_accepted)
{
    static const char *const good[] = {
        "{'partial_rotary_factor':1.0}",
        "{'partial_rotary_factor':null,'num_experts':0,'alibi':false,'pruned_heads':{}}",
        "{'embedding_multiplier':1,'logits_scaling':1.0,'residual_multiplier':1}",
        "{'quantization_config':null,'no_rope_layers':[]}",
        "{'attn_logit_softcapping':null,'is_encoder_decoder':false,'add_cross_attention':false}",
        "{'auto_map':{'AutoModel':'evil.py'},'pretraining_tp':4,'torch_dtype':'float16'}",
        "{'rope_scaling':{}}",
        "{'rope_scaling':null,'rope_parameters':null}",
        "{'rope_scaling':{'rope_type':'default','type':'dynamic'}}",
        "{'rope_parameters':{'rope_type':'default','partial_rotary_factor':1.0}}",
        "{'layer_types':['full_attention','full_attention']}",
        "{'layer_types':null,'hidden_act':'swish','use_cache':true,'what':{'ever':[1]}}",
        "{'architectures':null}",
        "{'architectures':['LLaMAForCausalLM'],'model_type':null}",
    };
    struct model_config config;

    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        cr_expect_eq(parse_changed(&config, good[i]), MLORA_OK, "%s", error_text());
}
