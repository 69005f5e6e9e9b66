#include "engine/inspect.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"
#include "lora/adapter.h"
#include "lora/tensor_name.h"
#include "model/weights.h"

enum { CONFIG_BYTES_MAX = 16 << 20, ELEMENT_BYTES_BF16 = 2 };

/* ---- building ----------------------------------------------------------------------------- */

/* An object that is being filled; the first failure, which is lack of memory, stays in `failed`. */
struct object {
    json_t *json;
    bool failed;
};

static void put(struct object *object, const char *key, json_t *value)
{
    if (json_object_set_new(object->json, key, value) != 0) object->failed = true;
}

/* Text from outside may not be UTF-8, as JSON must be. */
static json_t *text_or_null(const char *text)
{
    json_t *value = text ? json_string(text) : json_null();
    if (value || !text) return value;

    char *ascii = strdup(text);
    if (!ascii) return NULL;
    for (char *c = ascii; *c; c++)
        if ((unsigned char)*c >= 0x80) *c = '?';
    value = json_string(ascii);
    free(ascii);
    return value;
}

static void put_text(struct object *object, const char *key, const char *text)
{
    put(object, key, text_or_null(text));
}

static void put_integer(struct object *object, const char *key, int64_t value)
{
    put(object, key, json_integer(value));
}

static void put_number(struct object *object, const char *key, double value)
{
    put(object, key, json_real(value));
}

static void put_bool(struct object *object, const char *key, bool value)
{
    put(object, key, json_boolean(value));
}

/* Add `value` to an array unless it is there. */
static void add_once(struct object *object, json_t *array, json_t *value)
{
    for (size_t i = 0; i < json_array_size(array); i++)
        if (value && json_equal(json_array_get(array, i), value)) {
            json_decref(value);
            return;
        }
    if (json_array_append_new(array, value) != 0) object->failed = true;
}

static int append_bytes(const char *bytes, size_t n, void *buffer)
{
    return buffer_append(buffer, bytes, n) == MLORA_OK ? 0 : -1;
}

static mlora_status finish(struct buffer *json, const struct object *object, const char *dir)
{
    /* 9 digits give every f32 back */
    if (!object->failed && json_dump_callback(object->json, append_bytes, json,
                                              JSON_INDENT(2) | JSON_REAL_PRECISION(9)) == 0)
        return MLORA_OK;
    return error_set(MLORA_ENOMEM, "%s: out of memory for its description", dir);
}

/* Whether `dir`/`name` is there; false too when out of memory for its path. */
static bool has_file(const char *dir, const char *name)
{
    char *path = path_join(dir, name);
    const bool exists = path && file_exists(path);
    free(path);
    return exists;
}

static mlora_status read_json(json_t **out, const char *dir, const char *name)
{
    char *path = path_join(dir, name);
    if (!path) return error_set(MLORA_ENOMEM, "%s: out of memory for a path", dir);
    const mlora_status status = json_read_file(out, path, CONFIG_BYTES_MAX);
    free(path);
    return status;
}

/* ---- a model ------------------------------------------------------------------------------ */

static void put_rope(struct object *object, const struct rope_config *rope)
{
    static const char *const kinds[] = {[ROPE_DEFAULT] = "default",
                                        [ROPE_LINEAR] = "linear",
                                        [ROPE_LLAMA3] = "llama3",
                                        [ROPE_YARN] = "yarn"};
    put_text(object, "rope", kinds[rope->kind]);
    put_number(object, "rope_theta", rope->theta);
    put_number(object, "rope_factor", rope->kind == ROPE_DEFAULT ? 1 : rope->factor);
}

static void put_config(struct object *object, const struct model_config *config)
{
    json_t *eos = json_array();

    put_integer(object, "n_layers", config->n_layers);
    put_integer(object, "hidden_size", config->hidden_size);
    put_integer(object, "n_heads", config->n_heads);
    put_integer(object, "n_kv_heads", config->n_kv_heads);
    put_integer(object, "head_dim", config->head_dim);
    put_integer(object, "intermediate_size", config->mlp_size);
    put_integer(object, "vocab_size", config->vocab_size);
    put_integer(object, "max_position", config->max_position);
    put_rope(object, &config->rope);
    put_bool(object, "tied", config->tied);
    put(object, "sliding_window", config->window > 0 ? json_integer(config->window) : json_null());
    /* K and V of every layer in bf16 */
    put_integer(object, "kv_bytes_per_token",
                (int64_t)2 * ELEMENT_BYTES_BF16 * config->n_layers * config->n_kv_heads *
                    config->head_dim);
    for (int i = 0; i < config->n_eos; i++)
        if (json_array_append_new(eos, json_integer(config->eos[i])) != 0) object->failed = true;
    put(object, "eos_ids", eos);
}

static void put_weights(struct object *object, const struct checkpoint *checkpoint,
                        int64_t device_bytes, int64_t n_parameters)
{
    json_t *dtypes = json_array();
    int64_t file_bytes = 0;

    for (int f = 0; f < checkpoint->n_files; f++) {
        file_bytes += checkpoint->files[f].file.bytes;
        for (int i = 0; i < checkpoint->files[f].n_tensors; i++)
            add_once(object, dtypes, json_string(checkpoint->files[f].tensors[i].dtype));
    }
    put_integer(object, "n_parameters", n_parameters);
    put(object, "weight_dtypes", dtypes);
    put_integer(object, "file_bytes", file_bytes);
    put_integer(object, "device_bytes", device_bytes);
}

static mlora_status put_tokenizer(struct object *object, const char *dir)
{
    const char *file = has_file(dir, "tokenizer.json")    ? "tokenizer.json"
                       : has_file(dir, "tokenizer.model") ? "tokenizer.model"
                                                          : NULL;
    bool has_template = has_file(dir, "chat_template.jinja");

    put_text(object, "tokenizer", file);
    if (!has_template && has_file(dir, "tokenizer_config.json")) {
        json_t *config = NULL;
        const mlora_status status = read_json(&config, dir, "tokenizer_config.json");
        if (status != MLORA_OK) return status;
        const json_t *value = json_object_get(config, "chat_template");
        has_template = value && !json_is_null(value);
        json_decref(config);
    }
    put_bool(object, "chat_template", has_template);
    return MLORA_OK;
}

/* {"kind": "model", "path", "architecture", "n_parameters", "weight_dtypes": ["BF16"],
 *  "file_bytes", "device_bytes", "n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim",
 *  "intermediate_size", "vocab_size", "max_position" (tokens), "rope": "default" | "linear" |
 *  "llama3" | "yarn", "rope_theta", "rope_factor", "tied", "sliding_window" (tokens or null),
 *  "kv_bytes_per_token" (in bf16), "eos_ids", "tokenizer" (file or null), "chat_template"} */
static mlora_status inspect_model(struct object *object, const char *dir)
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

    put_text(object, "kind", "model");
    put_text(object, "path", dir);
    put_text(object, "architecture", config.architecture);
    put_weights(object, &checkpoint, device_bytes, n_parameters);
    put_config(object, &config);
    status = put_tokenizer(object, dir);

done:
    checkpoint_close(&checkpoint);
    return status;
}

/* ---- an adapter --------------------------------------------------------------------------- */

/* A number of the configuration as it is there; LoraConfig's default when it is not. */
static void put_setting(struct object *object, const char *key, const json_t *config,
                        const char *field, json_int_t fallback)
{
    json_t *value = json_object_get(config, field);
    put(object, key, json_is_number(value) ? json_incref(value) : json_integer(fallback));
}

/* `layer` LAYER_OUTSIDE is shown as null. */
static struct object new_row(int layer, const char *module)
{
    struct object row = {.json = json_object()};
    put(&row, "layer", layer == LAYER_OUTSIDE ? json_null() : json_integer(layer));
    put_text(&row, "module", module);
    return row;
}

static void add_row(struct object *object, json_t *rows, const struct object *row)
{
    if (row->failed) object->failed = true;
    if (json_array_append_new(rows, row->json) != 0) object->failed = true;
}

/* In words, how the product of a linear is computed. */
static const char *linear_as(const struct adapter_plan *plan, const struct adapter_linear *linear,
                             bool is_head)
{
    if (linear->rank == 0) return "bias in place of the base's";
    if (linear->magnitude) return "DoRA";
    if (linear->a_form == FORM_GROUPS) return "QA-LoRA, expanded";
    if (linear->a_form == FORM_BLOCKS || linear->b_form == FORM_BLOCKS) return "BD-LoRA, expanded";
    if (linear->b_form == FORM_TRANSPOSED && is_head) return "LoRA, tied to embed_tokens";
    if (plan->n_invocation > 0) return "LoRA from the invocation tokens on";
    if (linear->b_bias)
        return linear->bias ? "LoRA with its bias, and the base's" : "LoRA with its bias";
    return linear->bias ? "LoRA, and bias in place of the base's" : "LoRA";
}

static void put_linear(struct object *object, json_t *rows, json_t *ranks,
                       const struct adapter_plan *plan, int i)
{
    static const char *const outside[] = {
        [LORA_EMBEDDING] = "embed_tokens", [LORA_HEAD] = "lm_head"};
    const struct adapter_linear *linear = &plan->linears[i];
    const int layer = i / LORA_LINEARS, index = i % LORA_LINEARS;

    if (linear->rank == 0 && !linear->bias) return;
    struct object row = layer < plan->n_layers
                            ? new_row(layer, linear_name((enum lora_linear)index))
                            : new_row(LAYER_OUTSIDE, outside[index]);
    put_text(&row, "as", linear_as(plan, linear, layer == plan->n_layers && index == LORA_HEAD));
    put_integer(&row, "rank", linear->rank);
    if (linear->rank > 0) {
        put_number(&row, "alpha", linear->alpha);
        put_number(&row, "scale", linear->scale);
        put_text(&row, "dtype", dtype_name(linear->dtype));
        put_integer(&row, "in", linear->in);
        add_once(object, ranks, json_integer(linear->rank));
    }
    put_integer(&row, "out", linear->out);
    put_integer(&row, "bytes", adapter_linear_bytes(plan, i));
    add_row(object, rows, &row);
}

/* A row for a tensor that stands in the place of one of the base. */
static void put_tensor(struct object *object, json_t *rows, int layer, const char *module,
                       const struct tensor *tensor, const char *as)
{
    char dtype[sizeof tensor->dtype] = "";
    if (!tensor) return;
    struct object row = new_row(layer, module);
    for (size_t i = 0; tensor->dtype[i]; i++) /* as dtype_name() writes it */
        dtype[i] = (char)tolower((unsigned char)tensor->dtype[i]);
    put_text(&row, "as", as);
    put_text(&row, "dtype", dtype);
    put_integer(&row, "out", tensor->shape[0]);
    put_integer(&row, "bytes", tensor->bytes);
    add_row(object, rows, &row);
}

static void put_whole(struct object *object, json_t *rows, const struct adapter_plan *plan)
{
    static const char *const norms[LORA_NORMS] = {[NORM_ATTENTION] = "input_layernorm",
                                                  [NORM_MLP] = "post_attention_layernorm",
                                                  [NORM_Q] = "self_attn.q_norm",
                                                  [NORM_K] = "self_attn.k_norm"};
    static const char whole[] = "whole, in place of the base's";
    static const char copy[] = "whole, left out if it equals the base's";
    static const char some[] = "rows in place of the base's";
    static const char tied[] = "tied to embed_tokens";
    const int n_norms = plan->n_layers * LORA_NORMS;

    put_tensor(object, rows, LAYER_OUTSIDE, "embed_tokens", plan->embedding,
               plan->embedding_is_copy ? copy : whole);
    put_tensor(object, rows, LAYER_OUTSIDE, "embed_tokens", plan->embedding_rows.tensor, some);
    put_tensor(object, rows, LAYER_OUTSIDE, "lm_head", plan->head,
               plan->head == plan->embedding ? tied
               : plan->head_is_copy          ? copy
                                             : whole);
    put_tensor(object, rows, LAYER_OUTSIDE, "lm_head",
               plan->head_has_embedding_rows ? plan->embedding_rows.tensor : plan->head_rows.tensor,
               plan->head_has_embedding_rows ? tied : some);
    for (int i = 0; i < n_norms; i++)
        put_tensor(object, rows, i / LORA_NORMS, norms[i % LORA_NORMS], plan->norms[i], whole);
    put_tensor(object, rows, LAYER_OUTSIDE, "norm", plan->norms[n_norms], whole);
}

/* A row for each module that the adapter changes. */
static void put_modules(struct object *object, const struct adapter_plan *plan)
{
    json_t *rows = json_array(), *ranks = json_array();

    for (int i = 0; i < (plan->n_layers + 1) * LORA_LINEARS; i++)
        put_linear(object, rows, ranks, plan, i);
    put_whole(object, rows, plan);
    put(object, "ranks", ranks);
    put_integer(object, "n_modules", (int64_t)json_array_size(rows));
    put_integer(object, "device_bytes", plan->bytes);
    put(object, "modules", rows);
}

/* The same of an adapter that is refused: what its tensors say by themselves. Scales would need
 * the configuration, which may be what is wrong. */
static mlora_status put_raw_modules(struct object *object, const struct safetensors *file)
{
    struct raw {
        const struct tensor *a, *b;
        const char *linear;
    } *modules = calloc((size_t)LAYERS_MAX * LORA_LINEARS, sizeof *modules);
    json_t *rows = json_array();
    mlora_status status = MLORA_OK;

    if (!modules) object->failed = true;
    for (int i = 0; i < file->n_tensors && status == MLORA_OK && modules; i++) {
        const struct tensor *tensor = &file->tensors[i];
        struct tensor_name name;

        status = tensor_name_parse(&name, tensor->name);
        if (status != MLORA_OK || (name.kind != TENSOR_A && name.kind != TENSOR_B) ||
            tensor->n_dims != 2 || name.layer < 0 || name.layer >= LAYERS_MAX)
            continue;
        struct raw *raw = &modules[name.layer * LORA_LINEARS + name.first_linear];
        *(name.kind == TENSOR_A ? &raw->a : &raw->b) = tensor;
        raw->linear = name.linear;
    }
    for (int i = 0; i < LAYERS_MAX * LORA_LINEARS && modules; i++) {
        const struct raw *raw = &modules[i];
        if (!raw->a || !raw->b) continue;
        struct object row = new_row(i / LORA_LINEARS, raw->linear);
        put_integer(&row, "rank", raw->a->shape[0]);
        put_text(&row, "dtype", raw->a->dtype);
        put_integer(&row, "in", raw->a->shape[1]);
        put_integer(&row, "out", raw->b->shape[0]);
        put_integer(&row, "bytes", raw->a->bytes + raw->b->bytes);
        add_row(object, rows, &row);
    }
    put_integer(object, "n_modules", (int64_t)json_array_size(rows));
    put(object, "device_bytes", json_null());
    put(object, "modules", rows);
    free(modules);
    return status;
}

/* Engines that take this adapter and compute something else, as their code was in 2026. */
enum feature { USES_RSLORA, USES_RANKS, USES_ALPHAS, USES_DORA, USES_WHOLE_MODULES, FEATURES };

static const struct {
    const char *engine, *because;
    enum feature feature;
} wrong[] = {
    {"vLLM", "rank_pattern", USES_RANKS},
    {"vLLM", "alpha_pattern", USES_ALPHAS},
    {"SGLang", "use_rslora", USES_RSLORA},
    {"SGLang", "rank_pattern", USES_RANKS},
    {"SGLang", "alpha_pattern", USES_ALPHAS},
    {"SGLang", "modules_to_save", USES_WHOLE_MODULES},
    {"llama.cpp", "use_rslora", USES_RSLORA},
    {"llama.cpp", "alpha_pattern", USES_ALPHAS},
    {"llama.cpp", "modules_to_save", USES_WHOLE_MODULES},
    {"LoRAX, TGI", "rank_pattern", USES_RANKS},
    {"LoRAX, TGI", "alpha_pattern", USES_ALPHAS},
    {"LoRAX, TGI", "use_dora", USES_DORA},
    {"LoRAX, TGI", "modules_to_save", USES_WHOLE_MODULES},
    {"Ollama", "use_rslora", USES_RSLORA},
    {"Ollama", "alpha_pattern", USES_ALPHAS},
    {"Ollama", "use_dora", USES_DORA},
    {"Ollama", "modules_to_save", USES_WHOLE_MODULES},
};

/* Features that change the result of this adapter: a rank_pattern that gives every module the
 * rank of `r` is none. `plan` NULL: refused, so what the configuration says. */
static void find_features(bool uses[FEATURES], const json_t *config,
                          const struct adapter_plan *plan)
{
    const json_t *rank = json_object_get(config, "r"),
                 *alpha = json_object_get(config, "lora_alpha");
    const double r = rank ? json_number_value(rank) : 8;
    const double a = alpha ? json_number_value(alpha) : 8;

    uses[USES_RSLORA] = !plan && json_is_true(json_object_get(config, "use_rslora"));
    uses[USES_RANKS] = !plan && json_object_size(json_object_get(config, "rank_pattern")) > 0;
    uses[USES_ALPHAS] = !plan && json_object_size(json_object_get(config, "alpha_pattern")) > 0;
    uses[USES_DORA] = json_is_true(json_object_get(config, "use_dora"));
    uses[USES_WHOLE_MODULES] = json_array_size(json_object_get(config, "modules_to_save")) > 0;
    for (int i = 0; plan && i < (plan->n_layers + 1) * LORA_LINEARS; i++) {
        const struct adapter_linear *linear = &plan->linears[i];
        if (linear->rank == 0) continue;
        if (plan->rslora && linear->rank > 1) uses[USES_RSLORA] = true;
        if (linear->rank != r) uses[USES_RANKS] = true;
        if (linear->alpha != a) uses[USES_ALPHAS] = true;
    }
}

static void put_wrong_elsewhere(struct object *object, const json_t *config,
                                const struct adapter_plan *plan)
{
    bool uses[FEATURES] = {false};
    json_t *list = json_array();

    find_features(uses, config, plan);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        if (uses[wrong[i].feature] &&
            json_array_append_new(list, json_pack("{ss ss}", "engine", wrong[i].engine, "because",
                                                  wrong[i].because)) != 0)
            object->failed = true;
    put(object, "wrong_elsewhere", list);
}

/* One string for each line. */
static void put_warnings(struct object *object, const char *text)
{
    json_t *list = json_array();

    for (const char *end; (end = strchr(text, '\n')); text = end + 1) {
        char *line = strndup(text, (size_t)(end - text));
        if (!line || json_array_append_new(list, text_or_null(line)) != 0) object->failed = true;
        free(line);
    }
    put(object, "warnings", list);
}

/* What was found out about an adapter: a plan, or why there is none. */
struct verdict {
    struct adapter_plan plan; /* zeroes when refused */
    bool served;
    json_t *reason; /* why not, else null */
    json_t *fits;   /* true or false; null: not known */
    json_t *misfit; /* why it does not fit, else null */
};

/* Plan against the base if there is one; then without it, to tell an adapter that fits another
 * base from one that fits none. Only lack of memory or of the base is an error. */
static mlora_status judge(struct verdict *out, const char *dir, const char *model_dir)
{
    struct model_config base;
    mlora_status status;

    *out = (struct verdict){0};
    if (model_dir) {
        status = model_config_read(&base, model_dir);
        if (status != MLORA_OK) return status;
        status = adapter_plan_read(&out->plan, dir, &base, false);
        if (status == MLORA_ENOMEM) return status;
        out->served = status == MLORA_OK;
        if (!out->served) out->misfit = text_or_null(error_text());
    }
    if (!out->served) {
        status = adapter_plan_read(&out->plan, dir, NULL, false);
        if (status == MLORA_ENOMEM) return status;
        out->served = status == MLORA_OK;
        if (!out->served) out->reason = text_or_null(error_text());
    }
    if (model_dir && out->served) out->fits = json_boolean(!out->misfit);
    return MLORA_OK;
}

static void put_or_null(struct object *object, const char *key, json_t **value)
{
    put(object, key, *value ? *value : json_null());
    *value = NULL;
}

static mlora_status put_verdict(struct object *object, struct verdict *verdict, const char *dir)
{
    struct safetensors file = {0};
    mlora_status status = MLORA_OK;
    const bool fits_or_unknown = !json_is_false(verdict->fits);

    put_bool(object, "served", verdict->served);
    put_or_null(object, "reason", &verdict->reason);
    put_or_null(object, "fits", &verdict->fits);
    if (fits_or_unknown) {
        json_decref(verdict->misfit); /* a refused adapter's reason, said already */
        verdict->misfit = NULL;
    }
    put_or_null(object, "fits_reason", &verdict->misfit);
    put_warnings(object, buffer_text(&verdict->plan.warnings));
    if (verdict->served) {
        put_modules(object, &verdict->plan);
        return MLORA_OK;
    }

    char *path = path_join(dir, "adapter_model.safetensors");
    if (!path) return error_set(MLORA_ENOMEM, "%s: out of memory for a path", dir);
    if (safetensors_open(&file, path) != MLORA_OK) file = (struct safetensors){0}; /* no rows */
    status = put_raw_modules(object, &file);
    safetensors_close(&file);
    free(path);
    return status;
}

/* {"kind": "adapter", "path", "peft_type", "base_model" (as the adapter names it), "rank",
 *  "alpha", "rslora", "served", "reason" (why not, or null), "fits": true | false | null (no base
 *  was given, or not served), "fits_reason", "warnings": [text], "ranks": [distinct],
 *  "n_modules", "device_bytes",
 *  "modules": [{"layer" (null: outside of them), "module": "self_attn.q_proj", "as" (how it is
 *  served), "rank", "alpha", "scale", "dtype" (on the device), "in", "out", "bytes"}] in the order
 *  of the layers, each without what it has not,
 *  "wrong_elsewhere": [{"engine", "because": field}]}
 * Of an adapter that is not served, dtype and bytes are those of the file, and alpha, scale and
 * ranks are left out. */
static mlora_status inspect_adapter(struct object *object, const char *dir, const char *model_dir)
{
    struct verdict verdict = {0};
    json_t *config = NULL;

    mlora_status status = read_json(&config, dir, "adapter_config.json");
    if (status != MLORA_OK) return status;
    status = judge(&verdict, dir, model_dir);
    if (status != MLORA_OK) goto done;

    put_text(object, "kind", "adapter");
    put_text(object, "path", dir);
    put_text(object, "peft_type", json_string_value(json_object_get(config, "peft_type")));
    put_text(object, "base_model",
             json_string_value(json_object_get(config, "base_model_name_or_path")));
    put_setting(object, "rank", config, "r", 8);
    put_setting(object, "alpha", config, "lora_alpha", 8);
    put_bool(object, "rslora", json_is_true(json_object_get(config, "use_rslora")));
    status = put_verdict(object, &verdict, dir);
    if (status != MLORA_OK) goto done;
    put_wrong_elsewhere(object, config, verdict.served ? &verdict.plan : NULL);

done:
    json_decref(verdict.reason);
    json_decref(verdict.fits);
    json_decref(verdict.misfit);
    adapter_plan_free(&verdict.plan);
    json_decref(config);
    return status;
}

/* ---- either ------------------------------------------------------------------------------- */

mlora_status inspect_directory(struct buffer *json, const char *dir, const char *model_dir)
{
    struct object object = {0};
    mlora_status status;

    if (!file_is_directory(dir))
        return error_set(MLORA_EIO,
                         "%s: is not a directory; give the directory of a model or of "
                         "an adapter",
                         dir);
    object.json = json_object();
    if (!object.json) return error_set(MLORA_ENOMEM, "%s: out of memory", dir);
    if (has_file(dir, "adapter_config.json"))
        status = inspect_adapter(&object, dir, model_dir);
    else if (has_file(dir, "config.json"))
        status = inspect_model(&object, dir);
    else
        status = error_set(MLORA_EIO,
                           "%s: has neither config.json nor adapter_config.json; give "
                           "the directory of a model or of an adapter",
                           dir);
    if (status == MLORA_OK) status = finish(json, &object, dir);
    json_decref(object.json);
    return status;
}
