#include "engine/inspect.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"

#define LLAMA2 "tests/fixtures/tiny-llama2"
#define LLAMA3 "tests/fixtures/tiny-llama3"

/* The description as an object, or a failed test. */
static json_t *inspect(const char *dir, const char *model_dir)
{
    struct buffer text = {0};

    cr_assert_eq(inspect_directory(&text, dir, model_dir), MLORA_OK, "%s: %s", dir, error_text());
    json_t *object = json_loads(text.data, JSON_REJECT_DUPLICATES, NULL);
    cr_assert_not_null(object, "%s", text.data);
    buffer_free(&text);
    return object;
}

static void expect_text(const json_t *object, const char *key, const char *want)
{
    const char *got = json_string_value(json_object_get(object, key));
    cr_assert_not_null(got, "%s", key);
    cr_expect_str_eq(got, want, "%s", key);
}

static void expect_part(const json_t *object, const char *key, const char *want)
{
    const char *got = json_string_value(json_object_get(object, key));
    cr_assert_not_null(got, "%s", key);
    cr_expect_not_null(strstr(got, want), "%s is %s", key, got);
}

static void expect_number(const json_t *object, const char *key, double want)
{
    const json_t *got = json_object_get(object, key);
    cr_expect(json_is_number(got), "%s", key);
    cr_expect_eq(json_number_value(got), want, "%s is %.9g", key, json_number_value(got));
}

static void expect_json(const json_t *object, const char *key, const char *want)
{
    char *got = json_dumps(json_object_get(object, key), JSON_COMPACT | JSON_ENCODE_ANY);
    cr_assert_not_null(got, "%s", key);
    cr_expect_str_eq(got, want, "%s", key);
    free(got);
}

/* ---- models ------------------------------------------------------------------------------- */

Test(inspect, describes_a_model)
{
    json_t *model = inspect(LLAMA2, NULL);

    expect_text(model, "kind", "model");
    expect_text(model, "path", LLAMA2);
    expect_text(model, "architecture", "LlamaForCausalLM");
    /* 2 V D + 4 (2 D H d + 2 D G d + 3 D F + 2 D) + D, with V 2048, D 256, H d 256, G d 128, F 688 */
    expect_number(model, "n_parameters", 3950848);
    expect_json(model, "weight_dtypes", "[\"BF16\"]");
    expect_number(model, "file_bytes", 7905880);
    /* 2 bytes each, and 2 more for the 9 norms of 256, which are f32 on the device */
    expect_number(model, "device_bytes", 2 * 3950848 + 2 * 9 * 256);
    expect_number(model, "n_layers", 4);
    expect_number(model, "hidden_size", 256);
    expect_number(model, "n_heads", 4);
    expect_number(model, "n_kv_heads", 2);
    expect_number(model, "head_dim", 64);
    expect_number(model, "intermediate_size", 688);
    expect_number(model, "vocab_size", 2048);
    expect_number(model, "max_position", 1024);
    expect_text(model, "rope", "default");
    expect_number(model, "rope_theta", 10000);
    expect_number(model, "rope_factor", 1);
    expect_json(model, "tied", "false");
    expect_json(model, "sliding_window", "null");
    expect_number(model, "kv_bytes_per_token", 2 * 2 * 4 * 2 * 64); /* K and V, bf16, L, G, d */
    expect_json(model, "eos_ids", "[2]");
    expect_text(model, "tokenizer", "tokenizer.json");
    expect_json(model, "chat_template", "true");
    json_decref(model);
}

Test(inspect, describes_a_tied_model_in_shards)
{
    json_t *model = inspect(LLAMA3, NULL);

    expect_number(model, "n_parameters", 1869120);
    expect_text(model, "rope", "llama3");
    expect_number(model, "rope_theta", 500000);
    expect_number(model, "rope_factor", 8);
    expect_json(model, "tied", "true");
    expect_number(model, "kv_bytes_per_token", 2 * 2 * 3 * 2 * 64);
    expect_json(model, "eos_ids", "[1364]");
    json_decref(model);
}

/* A directory with one file of `text`; removed by remove_directory. */
static char *directory_with(const char *name, const char *text)
{
    char *directory = strdup("/tmp/mlora-inspect-XXXXXX");
    char path[512];

    cr_assert_not_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "w");
    cr_assert_not_null(file);
    fputs(text, file);
    fclose(file);
    return directory;
}

static void remove_directory(char *directory, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(rmdir(directory), 0);
    free(directory);
}

/* ---- adapters ----------------------------------------------------------------------------- */

Test(inspect, describes_an_adapter_by_itself)
{
    json_t *adapter = inspect(LLAMA2 "/adapters/spanish", NULL);
    const json_t *modules = json_object_get(adapter, "modules");

    expect_text(adapter, "kind", "adapter");
    expect_text(adapter, "path", LLAMA2 "/adapters/spanish");
    expect_text(adapter, "peft_type", "LORA");
    expect_text(adapter, "base_model", "tiny-llama2");
    expect_number(adapter, "rank", 8);
    expect_number(adapter, "alpha", 16);
    expect_json(adapter, "rslora", "false");
    expect_json(adapter, "served", "true");
    expect_json(adapter, "reason", "null");
    expect_json(adapter, "fits", "null");
    expect_json(adapter, "fits_reason", "null");
    expect_json(adapter, "warnings", "[]");
    expect_json(adapter, "ranks", "[2,8,24]");
    expect_number(adapter, "n_modules", 28);
    expect_number(adapter, "device_bytes", 410624);
    cr_assert_eq(json_array_size(modules), 28);

    const json_t *q = json_array_get(modules, 0), *down = json_array_get(modules, 13);
    expect_number(q, "layer", 0);
    expect_text(q, "module", "self_attn.q_proj");
    expect_number(q, "rank", 2);
    expect_number(q, "alpha", 16);
    expect_number(q, "scale", 8);
    expect_text(q, "dtype", "bf16");
    expect_number(q, "in", 256);
    expect_number(q, "out", 256);
    expect_number(q, "bytes", 2 * 2 * (256 + 256));
    expect_number(down, "layer", 1);
    expect_text(down, "module", "mlp.down_proj");
    expect_number(down, "rank", 24);
    expect_number(down, "scale", 1);
    expect_number(down, "in", 688);
    json_decref(adapter);
}

Test(inspect, says_that_an_adapter_fits)
{
    json_t *adapter = inspect(LLAMA3 "/adapters/json", LLAMA3);

    expect_json(adapter, "served", "true");
    expect_json(adapter, "fits", "true");
    expect_json(adapter, "fits_reason", "null");
    json_decref(adapter);
}

Test(inspect, says_why_an_adapter_does_not_fit)
{
    json_t *adapter = inspect(LLAMA3 "/adapters/json", LLAMA2);

    expect_json(adapter, "served", "true");
    expect_json(adapter, "reason", "null");
    expect_json(adapter, "fits", "false");
    expect_part(adapter, "fits_reason", "the base needs [");
    expect_part(adapter, "fits_reason", "base_model_name_or_path: tiny-llama3");
    expect_number(adapter, "n_modules", 21);
    json_decref(adapter);
}

Test(inspect, says_how_each_module_is_served)
{
    static const struct {
        const char *adapter, *module, *as;
        int layer; /* -1: none */
    } rows[] = {
        {"llama/adapters/plain", "self_attn.k_proj", "LoRA", 1},
        {"llama/adapters/dora-head", "lm_head", "DoRA", -1},
        {"llama/adapters/lora-bias", "mlp.up_proj", "LoRA + B bias", 0},
        {"llama/adapters/alora-bias", "mlp.up_proj", "aLoRA + B bias", 1},
        {"qwen2/adapters/bias-dora", "self_attn.k_proj", "DoRA + bias", 1},
        {"llama/adapters/bdlora", "self_attn.o_proj", "BD-LoRA", 0},
        {"llama/adapters/qalora", "mlp.down_proj", "QA-LoRA", 1},
        {"llama/adapters/alora", "self_attn.q_proj", "aLoRA", 0},
        {"llama/adapters/saved-all", "lm_head", "whole", -1},
        {"llama/adapters/saved-all", "norm", "whole", -1},
        {"llama/adapters/tokens", "embed_tokens", "rows", -1},
        {"llama-tied/adapters/tokens", "lm_head", "as embed_tokens", -1},
        {"llama-tied/adapters/embed-tied-alone", "lm_head", "LoRA, tied", -1},
        {"llama-tied/adapters/embed-copied", "embed_tokens", "whole if changed", -1},
        {"qwen2/adapters/bias-all", "self_attn.k_proj", "bias", 1},
        {"qwen2/adapters/bias-all", "self_attn.q_proj", "LoRA + bias", 1},
    };

    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char path[256], model[256];
        const json_t *row;
        size_t r;
        bool found = false;

        snprintf(path, sizeof path, "tests/fixtures/peft/%s", rows[i].adapter);
        snprintf(model, sizeof model, "%.*s", (int)(strstr(path, "/adapters") - path), path);
        json_t *adapter = inspect(path, model);
        expect_json(adapter, "fits", "true");
        json_array_foreach(json_object_get(adapter, "modules"), r, row)
        {
            const json_t *layer = json_object_get(row, "layer");
            const int number = json_is_null(layer) ? -1 : (int)json_integer_value(layer);
            if (number == rows[i].layer &&
                strcmp(json_string_value(json_object_get(row, "module")), rows[i].module) == 0 &&
                strcmp(json_string_value(json_object_get(row, "as")), rows[i].as) == 0)
                found = true;
        }
        cr_expect(found, "%s: %s is not served as %s", path, rows[i].module, rows[i].as);
        json_decref(adapter);
    }
}

Test(inspect, says_what_each_way_of_serving_means)
{
    json_t *adapter = inspect("tests/fixtures/peft/qwen2/adapters/bias-all", NULL);
    expect_json(adapter, "how",
                "[\"LoRA: y + scale B (A x) in f32, rounded once\","
                "\"bias: the adapter's bias in place of the base's\"]");
    json_decref(adapter);
    adapter =
        inspect("tests/fixtures/peft/llama-tied/adapters/tokens", "tests/fixtures/peft/llama-tied");
    expect_json(adapter, "how",
                "[\"LoRA: y + scale B (A x) in f32, rounded once\","
                "\"rows: of trainable tokens, in place of the base's\","
                "\"as embed_tokens: what embed_tokens has, as the two are tied\"]");
    json_decref(adapter);
}

/* An adapter that no base can serve, by its own tensors. */
Test(inspect, describes_an_adapter_that_is_refused)
{
    char *directory = directory_with("adapter_config.json",
                                     "{\"peft_type\": \"LORA\", \"r\": 8, \"use_dora\": true, "
                                     "\"init_lora_weights\": \"pissa\"}");
    char link[512], target[512], *here = realpath(LLAMA2 "/adapters/mood-dora", NULL);

    snprintf(link, sizeof link, "%s/adapter_model.safetensors", directory);
    snprintf(target, sizeof target, "%s/adapter_model.safetensors", here);
    cr_assert_eq(symlink(target, link), 0);
    json_t *adapter = inspect(directory, LLAMA2);
    const json_t *first = json_array_get(json_object_get(adapter, "modules"), 0);

    expect_json(adapter, "served", "false");
    expect_part(adapter, "reason", "/adapter_config.json: init_lora_weights is \"pissa\"");
    expect_json(adapter, "fits", "null");
    expect_json(adapter, "fits_reason", "null");
    expect_json(adapter, "device_bytes", "null");
    expect_number(adapter, "rank", 8);
    expect_number(adapter, "n_modules", 12);
    expect_number(first, "layer", 0);
    expect_text(first, "module", "self_attn.q_proj");
    expect_number(first, "rank", 8);
    expect_text(first, "dtype", "BF16");
    expect_number(first, "in", 256);
    expect_number(first, "out", 256);
    expect_json(adapter, "wrong_elsewhere",
                "[{\"engine\":\"LoRAX, TGI\",\"because\":\"use_dora\"},"
                "{\"engine\":\"Ollama\",\"because\":\"use_dora\"}]");
    json_decref(adapter);
    free(here);
    cr_assert_eq(unlink(link), 0);
    remove_directory(directory, "adapter_config.json");
}

Test(inspect, says_who_serves_an_adapter_wrongly)
{
    static const char *const plain[] = {"pirate", "json", "mood", "shout", "count"};
    json_t *sql = inspect(LLAMA2 "/adapters/sql", NULL);
    json_t *spanish = inspect(LLAMA2 "/adapters/spanish", NULL);

    expect_json(sql, "rslora", "true");
    expect_json(sql, "wrong_elsewhere",
                "[{\"engine\":\"SGLang\",\"because\":\"use_rslora\"},"
                "{\"engine\":\"llama.cpp\",\"because\":\"use_rslora\"},"
                "{\"engine\":\"Ollama\",\"because\":\"use_rslora\"}]");
    expect_number(json_array_get(json_object_get(sql, "modules"), 0), "scale", 5.65685415);
    cr_expect_eq(json_array_size(json_object_get(spanish, "wrong_elsewhere")), 8);
    json_decref(sql);
    json_decref(spanish);
    for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++) {
        char path[128];
        snprintf(path, sizeof path, LLAMA2 "/adapters/%s", plain[i]);
        json_t *adapter = inspect(path, NULL);
        expect_json(adapter, "wrong_elsewhere", "[]");
        json_decref(adapter);
    }
}

/* llama.cpp takes saved norms, not saved embeddings and heads. */
Test(inspect, tells_saved_norms_from_saved_matrices)
{
    json_t *norms = inspect("tests/fixtures/peft/llama/adapters/saved-norms", NULL);
    json_t *head = inspect("tests/fixtures/peft/llama/adapters/saved-head", NULL);

    expect_json(norms, "wrong_elsewhere",
                "[{\"engine\":\"SGLang\",\"because\":\"modules_to_save\"},"
                "{\"engine\":\"LoRAX, TGI\",\"because\":\"modules_to_save\"},"
                "{\"engine\":\"Ollama\",\"because\":\"modules_to_save\"}]");
    expect_json(head, "wrong_elsewhere",
                "[{\"engine\":\"SGLang\",\"because\":\"modules_to_save\"},"
                "{\"engine\":\"llama.cpp\",\"because\":\"modules_to_save\"},"
                "{\"engine\":\"LoRAX, TGI\",\"because\":\"modules_to_save\"},"
                "{\"engine\":\"Ollama\",\"because\":\"modules_to_save\"}]");
    json_decref(norms);
    json_decref(head);
}

/* ---- files -------------------------------------------------------------------------------- */

static void expect_failure(const char *dir, const char *model, mlora_status status,
                           const char *says)
{
    struct buffer text = {0};

    cr_expect_eq(inspect_directory(&text, dir, model), status, "%s", error_text());
    cr_expect_not_null(strstr(error_text(), says), "%s", error_text());
    buffer_free(&text);
}

Test(inspect, describes_an_adapter_without_tensors)
{
    char *directory = directory_with(
        "adapter_config.json", "{\"peft_type\": \"LORA\", \"r\": 4, \"modules_to_save\": null}");
    json_t *adapter = inspect(directory, NULL);

    expect_json(adapter, "served", "false");
    expect_part(adapter, "reason", "adapter_model.safetensors: there is no such file");
    expect_number(adapter, "rank", 4);
    expect_number(adapter, "alpha", 8); /* PEFT's default */
    expect_json(adapter, "base_model", "null");
    expect_json(adapter, "modules", "[]");
    json_decref(adapter);
    remove_directory(directory, "adapter_config.json");
}

Test(inspect, describes_an_adapter_of_another_method)
{
    char *directory = directory_with("adapter_config.json",
                                     "{\"peft_type\": \"IA3\", \"r\": \"?\", \"lora_alpha\": 2.5}");
    json_t *adapter = inspect(directory, NULL);

    expect_text(adapter, "peft_type", "IA3");
    expect_json(adapter, "served", "false");
    expect_part(adapter, "reason", "peft_type is \"IA3\"");
    expect_number(adapter, "rank", 8);
    expect_number(adapter, "alpha", 2.5);
    json_decref(adapter);
    remove_directory(directory, "adapter_config.json");
}

Test(inspect, shows_paths_that_are_not_utf8)
{
    char *directory = directory_with("adapter_config.json", "{\"peft_type\": \"LORA\"}");
    char link[512];

    snprintf(link, sizeof link, "%s-\xff", directory);
    cr_assert_eq(symlink(directory, link), 0);
    json_t *adapter = inspect(link, NULL);
    expect_part(adapter, "path", "-?");
    expect_part(adapter, "reason", "-?/adapter_model.safetensors");
    json_decref(adapter);
    cr_assert_eq(unlink(link), 0);
    remove_directory(directory, "adapter_config.json");
}

Test(inspect, refuses_what_is_neither_model_nor_adapter)
{
    char *broken = directory_with("adapter_config.json", "{");

    expect_failure("tests/fixtures", NULL, MLORA_EIO,
                   "tests/fixtures: has neither config.json nor adapter_config.json");
    expect_failure("tests/nowhere", NULL, MLORA_EIO, "tests/nowhere: is not a directory");
    expect_failure(LLAMA2 "/config.json", NULL, MLORA_EIO, "config.json: is not a directory");
    expect_failure(broken, NULL, MLORA_EFORMAT, "adapter_config.json: is not valid JSON");
    expect_failure(LLAMA2 "/adapters/sql", "tests/nowhere", MLORA_EIO, "tests/nowhere");
    remove_directory(broken, "adapter_config.json");
}
