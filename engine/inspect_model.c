/* A model directory described: its configuration, what its weight files hold, its tokenizer. */
#include "engine/inspect_parts.h"
#include "model/weights.h"

enum { ELEMENT_BYTES_BF16 = 2 };

static void put_rope(struct description *object, const struct rope_config *rope)
{
    static const char *const kinds[] = {[ROPE_DEFAULT] = "default",
                                        [ROPE_LINEAR] = "linear",
                                        [ROPE_LLAMA3] = "llama3",
                                        [ROPE_YARN] = "yarn"};
    describe_text(object, "rope", kinds[rope->kind]);
    describe_number(object, "rope_theta", rope->theta);
    describe_number(object, "rope_factor", rope->kind == ROPE_DEFAULT ? 1 : rope->factor);
}

static void put_config(struct description *object, const struct model_config *config)
{
    json_t *eos = json_array();

    describe_integer(object, "n_layers", config->n_layers);
    describe_integer(object, "hidden_size", config->hidden_size);
    describe_integer(object, "n_heads", config->n_heads);
    describe_integer(object, "n_kv_heads", config->n_kv_heads);
    describe_integer(object, "head_dim", config->head_dim);
    describe_integer(object, "intermediate_size", config->mlp_size);
    describe_integer(object, "vocab_size", config->vocab_size);
    describe_integer(object, "max_position", config->max_position);
    put_rope(object, &config->rope);
    describe_bool(object, "tied", config->tied);
    describe(object, "sliding_window",
             config->window > 0 ? json_integer(config->window) : json_null());
    /* K and V of every layer in bf16 */
    describe_integer(object, "kv_bytes_per_token",
                     (int64_t)2 * ELEMENT_BYTES_BF16 * config->n_layers * config->n_kv_heads *
                         config->head_dim);
    for (int i = 0; i < config->n_eos; i++)
        if (json_array_append_new(eos, json_integer(config->eos[i])) != 0) object->failed = true;
    describe(object, "eos_ids", eos);
}

static void put_weights(struct description *object, const struct checkpoint *checkpoint,
                        int64_t device_bytes, int64_t n_parameters)
{
    json_t *dtypes = json_array();
    int64_t file_bytes = 0;

    for (int f = 0; f < checkpoint->n_files; f++) {
        file_bytes += checkpoint->files[f].file.bytes;
        for (int i = 0; i < checkpoint->files[f].n_tensors; i++)
            describe_once(object, dtypes, json_string(checkpoint->files[f].tensors[i].dtype));
    }
    describe_integer(object, "n_parameters", n_parameters);
    describe(object, "weight_dtypes", dtypes);
    describe_integer(object, "file_bytes", file_bytes);
    describe_integer(object, "device_bytes", device_bytes);
}

static mlora_status put_tokenizer(struct description *object, const char *dir)
{
    const char *file = directory_has(dir, "tokenizer.json")    ? "tokenizer.json"
                       : directory_has(dir, "tokenizer.model") ? "tokenizer.model"
                                                               : NULL;
    bool has_template = directory_has(dir, "chat_template.jinja");

    describe_text(object, "tokenizer", file);
    if (!has_template && directory_has(dir, "tokenizer_config.json")) {
        json_t *config = NULL;
        const mlora_status status = directory_json(&config, dir, "tokenizer_config.json");
        if (status != MLORA_OK) return status;
        const json_t *value = json_object_get(config, "chat_template");
        has_template = value && !json_is_null(value);
        json_decref(config);
    }
    describe_bool(object, "chat_template", has_template);
    return MLORA_OK;
}

/* {"kind": "model", "path", "architecture", "n_parameters", "weight_dtypes": ["BF16"],
 *  "file_bytes", "device_bytes", "n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim",
 *  "intermediate_size", "vocab_size", "max_position" (tokens), "rope": "default" | "linear" |
 *  "llama3" | "yarn", "rope_theta", "rope_factor", "tied", "sliding_window" (tokens or null),
 *  "kv_bytes_per_token" (in bf16), "eos_ids", "tokenizer" (file or null), "chat_template"} */
mlora_status inspect_model(struct description *object, const char *dir)
{
    struct model_config config;
    struct checkpoint checkpoint = {0};
    int64_t device_bytes, n_parameters;

    mlora_status status = model_config_read(&config, dir);
    if (status != MLORA_OK) return status;
    status = checkpoint_open(&checkpoint, dir);
    if (status != MLORA_OK) return status;
    status = weights_measure(&device_bytes, &n_parameters, &checkpoint, dir, &config);
    if (status != MLORA_OK) goto done;

    describe_text(object, "kind", "model");
    describe_text(object, "path", dir);
    describe_text(object, "architecture", config.architecture);
    put_weights(object, &checkpoint, device_bytes, n_parameters);
    put_config(object, &config);
    status = put_tokenizer(object, dir);

done:
    checkpoint_close(&checkpoint);
    return status;
}
