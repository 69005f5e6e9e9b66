/* Which fields of adapter_config.json are read, which say nothing, and which refuse the adapter. */
#include "lora/peft_fields.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/base/error.h"

#define MERGE "merge it into its base with PEFT's merge_and_unload and serve the result as a model"

/* ---- what is refused ---------------------------------------------------------------------- */

enum use { USE_READ, USE_IGNORE, USE_REFUSE };

/* Every field of LoraConfig, and what becomes of it. Refused are values other than "off": null,
 * false, "", [] and {}. A field that is not here is refused in the same way. */
/* clang-format off */
static const struct {
    const char *name;
    enum use use;
    const char *why, *remedy; /* USE_REFUSE */
} fields[] = {
    {"peft_type", USE_READ, 0, 0},
    {"task_type", USE_READ, 0, 0},
    {"r", USE_READ, 0, 0},
    {"lora_alpha", USE_READ, 0, 0},
    {"use_rslora", USE_READ, 0, 0},
    {"rank_pattern", USE_READ, 0, 0},
    {"alpha_pattern", USE_READ, 0, 0},
    {"target_modules", USE_READ, 0, 0},
    {"exclude_modules", USE_READ, 0, 0},
    {"layers_to_transform", USE_READ, 0, 0},
    {"layers_pattern", USE_READ, 0, 0},
    {"init_lora_weights", USE_READ, 0, 0},
    {"bias", USE_READ, 0, 0},
    {"base_model_name_or_path", USE_READ, 0, 0},
    {"monteclora_config", USE_READ, 0, 0},
    {"fan_in_fan_out", USE_READ, 0, 0},
    {"use_dora", USE_READ, 0, 0},
    {"lora_bias", USE_READ, 0, 0},
    {"modules_to_save", USE_READ, 0, 0},
    {"trainable_token_indices", USE_READ, 0, 0},
    {"ensure_weight_tying", USE_READ, 0, 0},
    {"alora_invocation_tokens", USE_READ, 0, 0},
    {"use_qalora", USE_READ, 0, 0},
    {"qalora_group_size", USE_READ, 0, 0},
    {"use_bdlora", USE_READ, 0, 0},
    {"auto_mapping", USE_IGNORE, 0, 0},
    {"corda_config", USE_IGNORE, 0, 0},
    {"eva_config", USE_IGNORE, 0, 0},
    {"inference_mode", USE_IGNORE, 0, 0},
    {"loftq_config", USE_IGNORE, 0, 0},
    {"lora_dropout", USE_IGNORE, 0, 0},
    {"lora_ga_config", USE_IGNORE, 0, 0},
    {"megatron_core", USE_IGNORE, 0, 0},
    {"peft_version", USE_IGNORE, 0, 0},
    {"revision", USE_IGNORE, 0, 0},
    {"runtime_config", USE_IGNORE, 0, 0},
    {"velora_config", USE_IGNORE, 0, 0}, /* changes the backward pass only */
    {"target_parameters", USE_REFUSE, "it adapts parameters that are no linears, as in mixtures of experts", "train with target_modules"},
    {"layer_replication", USE_REFUSE, "it repeats layers of the base, so that the model is another one", MERGE},
    {"kasa_config", USE_REFUSE, "KaSA truncates the base's own weights and scales between A and B", MERGE},
    {"arrow_config", USE_REFUSE, "Arrow chooses among several adapters for each token", "load the adapters that it routes to, and name one in each request"},
    {"megatron_config", USE_REFUSE, "it is written for Megatron's layers", "convert it to the Hugging Face layout"},
};
/* clang-format on */

bool peft_field_is_off(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_NULL:
    case JSON_FALSE:
        return true;
    case JSON_STRING:
        return json_string_length(value) == 0;
    case JSON_ARRAY:
        return json_array_size(value) == 0;
    case JSON_OBJECT:
        return json_object_size(value) == 0;
    default:
        return false;
    }
}

/* "PATH: FIELD is VALUE: WHY; REMEDY". */
static mlora_status refuse(const char *path, const char *field, const json_t *value,
                           const char *why, const char *remedy)
{
    char *shown = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY | JSON_ENSURE_ASCII);
    const mlora_status status = error_set(MLORA_EUNSUPPORTED, "%s: %.100s is %.80s%s: %s; %s", path,
                                          field, shown ? shown : json_kind(value),
                                          shown && strlen(shown) > 80 ? "..." : "", why, remedy);
    free(shown);
    return status;
}

static mlora_status check_fields(const json_t *json, const char *path)
{
    const size_t n = sizeof fields / sizeof fields[0];

    for (void *it = json_object_iter((json_t *)json); it;
         it = json_object_iter_next((json_t *)json, it)) {
        const char *name = json_object_iter_key(it);
        const json_t *value = json_object_iter_value(it);
        size_t i = 0;

        while (i < n && strcmp(fields[i].name, name) != 0) i++;
        if (peft_field_is_off(value) || (i < n && fields[i].use != USE_REFUSE)) continue;
        if (i < n) return refuse(path, name, value, fields[i].why, fields[i].remedy);
        return refuse(path, name, value,
                      "this field is unknown here, and could change what the adapter computes",
                      "remove it if you know that it does not, or merge the adapter into its base");
    }
    return MLORA_OK;
}

/* `value` is a string that is one of `names`. */
static bool is_one_of(const json_t *value, const char *const *names, size_t n)
{
    const char *text = json_string_value(value);
    for (size_t i = 0; text && i < n; i++)
        if (strcasecmp(text, names[i]) == 0) return true;
    return false;
}

/* Initialisations that changed the base's weights leave an adapter that fits only the changed
 * base, unless PEFT converted it when it was saved; then the field says true. */
static mlora_status check_init(const json_t *json, const char *path)
{
    static const char *const kept[] = {"gaussian", "orthogonal", "eva", "mica"};
    static const char *const loftq[] = {"loftq"};
    const json_t *value = json_object_get(json, "init_lora_weights");

    if (!value || json_is_boolean(value) || json_is_null(value)) return MLORA_OK;
    if (!json_is_string(value))
        return error_set(MLORA_EFORMAT,
                         "%s: init_lora_weights is %s, a string, true or false is "
                         "needed; save the adapter with PEFT again",
                         path, json_kind(value));
    if (is_one_of(value, kept, sizeof kept / sizeof kept[0])) return MLORA_OK;
    if (is_one_of(value, loftq, 1))
        return refuse(path, "init_lora_weights", value,
                      "the adapter fits only the base as LoftQ quantised it",
                      "merge it into that base and serve the result as a model, or train with "
                      "init_lora_weights=True");
    return refuse(path, "init_lora_weights", value,
                  "training began by changing the base's weights, and the adapter fits only those",
                  "save it again with PEFT's save_pretrained(..., "
                  "path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it");
}

static mlora_status check_kind(const json_t *json, const char *path)
{
    static const char *const lora[] = {"LORA"}, *const causal[] = {"CAUSAL_LM"};
    static const char *const biases[] = {"none", "all", "lora_only"};
    const json_t *peft_type = json_object_get(json, "peft_type");
    const json_t *task = json_object_get(json, "task_type");
    const json_t *bias = json_object_get(json, "bias");

    if (!json_is_string(peft_type))
        return error_set(MLORA_EFORMAT,
                         "%s: peft_type is %s, \"LORA\" is needed; is this the "
                         "adapter_config.json that PEFT wrote?",
                         path, json_kind(peft_type));
    if (!is_one_of(peft_type, lora, 1))
        return refuse(path, "peft_type", peft_type, "only LORA is served",
                      "make a LoRA of it with PEFT's save_as_lora, where PEFT can, or " MERGE);
    if (task && !json_is_null(task) && !is_one_of(task, causal, 1))
        return refuse(path, "task_type", task, "only CAUSAL_LM generates text on a Llama",
                      "train the adapter with task_type=\"CAUSAL_LM\"");
    if (bias && !json_is_null(bias) && !is_one_of(bias, biases, 3))
        return refuse(path, "bias", bias, "PEFT knows none, all and lora_only",
                      "save the adapter with PEFT again");
    return MLORA_OK;
}

/* ---- what does not go together -------------------------------------------------------------- */

static bool is_on(const json_t *json, const char *field)
{
    const json_t *value = json_object_get(json, field);
    return value && !peft_field_is_off(value);
}

/* Variants of which PEFT takes one at a time, and what this engine does not mix with them. */
static mlora_status check_combinations(const json_t *json, const char *path)
{
    static const char *const apart[][2] = {
        {"use_dora", "lora_bias"},
        {"use_dora", "alora_invocation_tokens"},
        {"use_dora", "use_bdlora"},
        {"use_dora", "use_qalora"},
        {"alora_invocation_tokens", "use_bdlora"},
        {"alora_invocation_tokens", "use_qalora"},
        {"use_bdlora", "use_qalora"},
    };
    static const char *const everywhere[] = {"modules_to_save", "trainable_token_indices"};

    for (size_t i = 0; i < sizeof apart / sizeof apart[0]; i++)
        if (is_on(json, apart[i][0]) && is_on(json, apart[i][1]))
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: %s and %s are both set, which PEFT does not take either; save "
                             "the adapter with one of them",
                             path, apart[i][0], apart[i][1]);
    for (size_t i = 0; i < sizeof everywhere / sizeof everywhere[0]; i++)
        if (is_on(json, "alora_invocation_tokens") && is_on(json, everywhere[i]))
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: alora_invocation_tokens and %s are both set: the adapter would "
                             "count from a token on and its whole weights everywhere, which is "
                             "not served; train it without %s",
                             path, everywhere[i], everywhere[i]);
    return MLORA_OK;
}

mlora_status peft_fields_check(const json_t *json, const char *path)
{
    mlora_status status = check_kind(json, path);
    if (status == MLORA_OK) status = check_fields(json, path);
    if (status == MLORA_OK) status = check_init(json, path);
    return status == MLORA_OK ? check_combinations(json, path) : status;
}
