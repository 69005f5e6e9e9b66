#include "lora/peft_config.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/base/error.h"
#include "engine/base/file.h"

enum { CONFIG_BYTES_MAX = 4 << 20, LAYER_PATTERNS_MAX = 16 };

/* Steps of pattern matching that one adapter may take in all, and the least for one match. */
enum { STEPS_MAX = 200000000, STEPS_MIN = 2000, STEPS_ONE_MAX = 200000 };

#define ALPHA_MAX 1e30 /* a scale is an f32 */
#define MERGE     "merge it into its base with PEFT's merge_and_unload and serve the result as a model"

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
    {"auto_mapping", USE_IGNORE, 0, 0},
    {"corda_config", USE_IGNORE, 0, 0},
    {"ensure_weight_tying", USE_IGNORE, 0, 0}, /* of modules_to_save and embeddings only */
    {"eva_config", USE_IGNORE, 0, 0},
    {"inference_mode", USE_IGNORE, 0, 0},
    {"loftq_config", USE_IGNORE, 0, 0},
    {"lora_dropout", USE_IGNORE, 0, 0},
    {"lora_ga_config", USE_IGNORE, 0, 0},
    {"megatron_core", USE_IGNORE, 0, 0},
    {"peft_version", USE_IGNORE, 0, 0},
    {"qalora_group_size", USE_IGNORE, 0, 0}, /* of use_qalora only */
    {"revision", USE_IGNORE, 0, 0},
    {"runtime_config", USE_IGNORE, 0, 0},
    {"velora_config", USE_IGNORE, 0, 0}, /* changes the backward pass only */
    {"use_dora", USE_REFUSE, "DoRA rescales every output of the adapted linears, which is not served yet", MERGE},
    {"lora_bias", USE_REFUSE, "the factors B have biases, which are not served yet", MERGE},
    {"modules_to_save", USE_REFUSE, "whole layers replace those of the base, which is not served yet", MERGE},
    {"trainable_token_indices", USE_REFUSE, "rows of the embedding are replaced, which is not served yet", MERGE},
    {"target_parameters", USE_REFUSE, "it adapts parameters that are no linears, as in mixtures of experts", "train with target_modules"},
    {"layer_replication", USE_REFUSE, "it repeats layers of the base, so that the model is another one", MERGE},
    {"alora_invocation_tokens", USE_REFUSE, "an activated LoRA works from its invocation tokens on only, which is not served yet", "train a plain LoRA"},
    {"use_qalora", USE_REFUSE, "QA-LoRA pools its inputs in groups, which is not served yet", "expand its A over each group and save it as a plain LoRA"},
    {"use_bdlora", USE_REFUSE, "the factors are stored as diagonal blocks, which is not served yet", "expand them to whole matrices and save them as a plain LoRA"},
    {"kasa_config", USE_REFUSE, "KaSA truncates the base's own weights and scales between A and B", MERGE},
    {"arrow_config", USE_REFUSE, "Arrow chooses among several adapters for each token", "load the adapters that it routes to, and name one in each request"},
    {"megatron_config", USE_REFUSE, "it is written for Megatron's layers", "convert it to the Hugging Face layout"},
};
/* clang-format on */

static bool is_off(const json_t *value)
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
        if (is_off(value) || (i < n && fields[i].use != USE_REFUSE)) continue;
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
    static const char *const none[] = {"none"};
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
    if (bias && !json_is_null(bias) && !is_one_of(bias, none, 1))
        return refuse(path, "bias", bias,
                      "biases of the base are replaced, which is not served yet", MERGE);
    return MLORA_OK;
}

/* ---- reading ------------------------------------------------------------------------------ */

static mlora_status check_strings(const json_t *array, const char *path, const char *field)
{
    for (size_t i = 0; i < json_array_size(array); i++)
        if (!json_is_string(json_array_get(array, i)))
            return error_set(MLORA_EFORMAT,
                             "%s: %s[%zu] is %s, the name of a module is needed; "
                             "save the adapter with PEFT again",
                             path, field, i, json_kind(json_array_get(array, i)));
    return MLORA_OK;
}

static mlora_status read_modules(struct module_set *out, const json_t *json, const char *field,
                                 const char *path)
{
    const json_t *value = json_object_get(json, field);

    if (!value || json_is_null(value)) return MLORA_OK;
    if (json_is_string(value))
        return pattern_compile(&out->pattern, "", json_string_value(value), "", path, field);
    if (!json_is_array(value))
        return error_set(MLORA_EFORMAT,
                         "%s: %s is %s, a list of module names or a pattern is "
                         "needed; save the adapter with PEFT again",
                         path, field, json_kind(value));
    if (json_array_size(value) > PATTERNS_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: %s has %zu entries, at most %d are read; use a "
                         "pattern",
                         path, field, json_array_size(value), PATTERNS_MAX);
    out->names = value;
    return check_strings(value, path, field);
}

/* target_modules: null gives PEFT's own choice for Llama and its relatives. */
static mlora_status read_targets(struct peft_config *config)
{
    const json_t *value = json_object_get(config->json, "target_modules");

    if (!value || json_is_null(value)) {
        json_t *names = json_pack("[ss]", "q_proj", "v_proj");
        if (!names || json_object_set_new(config->json, "target_modules", names) != 0)
            return error_set(MLORA_ENOMEM, "%s: out of memory", config->path);
    } else if (json_is_string(value) && strcasecmp(json_string_value(value), "all-linear") == 0) {
        config->targets.all = true;
        return MLORA_OK;
    }
    return read_modules(&config->targets, config->json, "target_modules", config->path);
}

static mlora_status read_pattern_map(struct pattern_map *out, const json_t *json, const char *field,
                                     double min, bool whole, const char *path)
{
    const json_t *map = json_object_get(json, field);

    if (!map || json_is_null(map)) return MLORA_OK;
    if (!json_is_object(map))
        return error_set(MLORA_EFORMAT,
                         "%s: %s is %s, an object of module patterns to numbers is "
                         "needed; save the adapter with PEFT again",
                         path, field, json_kind(map));
    const size_t n = json_object_size(map);
    if (n > PATTERNS_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: %s has %zu entries, at most %d are read; join "
                         "entries of one value into one pattern",
                         path, field, n, PATTERNS_MAX);
    out->patterns = calloc(n + 1, sizeof *out->patterns);
    out->values = calloc(n + 1, sizeof *out->values);
    if (!out->patterns || !out->values)
        return error_set(MLORA_ENOMEM, "%s: out of memory for %s", path, field);

    for (void *it = json_object_iter((json_t *)map); it;
         it = json_object_iter_next((json_t *)map, it)) {
        const char *text = json_object_iter_key(it);
        const json_t *value = json_object_iter_value(it);
        const double number = json_number_value(value);

        if (!(whole ? json_is_integer(value) : json_is_number(value)) || !(number >= min) ||
            !(number <= (whole ? INT_MAX : ALPHA_MAX)))
            return error_set(MLORA_EFORMAT,
                             "%s: %s: \"%.100s\" is %s, %s is needed; save the "
                             "adapter with PEFT again",
                             path, field, text,
                             json_is_number(value) ? "out of range" : json_kind(value),
                             whole ? "an integer of 1 or more" : "a number");
        const mlora_status status =
            pattern_compile(&out->patterns[out->n_entries], "(.*\\.)?(", text, ")$", path, field);
        if (status != MLORA_OK) return status;
        out->values[out->n_entries++] = number;
    }
    return MLORA_OK;
}

static mlora_status read_layer_pattern(struct peft_config *config, const char *text)
{
    const mlora_status status =
        pattern_compile(&config->layer_patterns[config->n_layer_patterns], ".*?\\.", text,
                        "\\.(\\d+)\\.", config->path, "layers_pattern");
    if (status == MLORA_OK) config->n_layer_patterns++;
    return status;
}

/* layers_to_transform and layers_pattern; PEFT takes them with a list of targets only. */
static mlora_status read_layers(struct peft_config *config)
{
    const json_t *layers = json_object_get(config->json, "layers_to_transform");
    const json_t *pattern = json_object_get(config->json, "layers_pattern");
    const char *path = config->path;

    if (layers && is_off(layers)) layers = NULL;
    if (pattern && is_off(pattern)) pattern = NULL;
    if ((layers || pattern) && !config->targets.names)
        return error_set(MLORA_EFORMAT,
                         "%s: %s has no meaning where target_modules is a string; "
                         "list the modules by name",
                         path, layers ? "layers_to_transform" : "layers_pattern");
    if (pattern && !layers)
        return error_set(MLORA_EFORMAT,
                         "%s: layers_pattern is given without layers_to_transform; "
                         "give both, or neither",
                         path);

    const size_t n = json_is_array(layers) ? json_array_size(layers) : 0;
    bool integers = !layers || json_is_integer(layers) || json_is_array(layers);
    for (size_t i = 0; i < n; i++) integers &= json_is_integer(json_array_get(layers, i));
    if (!integers || n > PATTERNS_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: layers_to_transform is %s, a layer's number or a list "
                         "of at most %d is needed; save the adapter with PEFT again",
                         path, json_is_array(layers) ? "another array" : json_kind(layers),
                         PATTERNS_MAX);
    config->layers = layers;
    if (!layers) return MLORA_OK;

    const size_t n_patterns = json_is_array(pattern) ? json_array_size(pattern) : 1;
    if ((pattern && !json_is_array(pattern) && !json_is_string(pattern)) ||
        n_patterns > LAYER_PATTERNS_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: layers_pattern is %s, a pattern or a list of at most "
                         "16 is needed; save the adapter with PEFT again",
                         path, json_is_array(pattern) ? "a longer list" : json_kind(pattern));
    mlora_status status = check_strings(pattern, path, "layers_pattern");
    if (status != MLORA_OK) return status;
    config->layer_patterns = calloc(n_patterns, sizeof *config->layer_patterns);
    if (!config->layer_patterns) return error_set(MLORA_ENOMEM, "%s: out of memory", path);
    if (!pattern) return read_layer_pattern(config, "[^.]*"); /* any list of layers */
    if (json_is_string(pattern)) return read_layer_pattern(config, json_string_value(pattern));
    for (size_t i = 0; i < n_patterns && status == MLORA_OK; i++)
        status = read_layer_pattern(config, json_string_value(json_array_get(pattern, i)));
    return status;
}

static mlora_status read_numbers(struct peft_config *config)
{
    const json_t *json = config->json;
    const char *path = config->path;
    int64_t rank;
    bool transposed;

    mlora_status status = json_get_int(&rank, json, "r", 8, 1, INT_MAX, path);
    if (status != MLORA_OK) return status;
    config->rank = (int)rank;
    status = json_get_double(&config->alpha, json, "lora_alpha", 8, -ALPHA_MAX, ALPHA_MAX, path);
    if (status != MLORA_OK) return status;
    status = json_get_bool(&config->rslora, json, "use_rslora", false, path);
    if (status != MLORA_OK) return status;
    status = json_get_string(&config->base_model, json, "base_model_name_or_path", NULL, path);
    if (status != MLORA_OK) return status;
    status = json_get_bool(&transposed, json, "fan_in_fan_out", false, path);
    if (status != MLORA_OK || !transposed) return status;
    return buffer_printf(&config->warnings,
                         "%s: fan_in_fan_out is true: it has no meaning for Llama's linears and is "
                         "ignored, as PEFT does\n",
                         path);
}

static mlora_status read_all(struct peft_config *config)
{
    const char *path = config->path;
    const json_t *sampler;

    mlora_status status = check_kind(config->json, path);
    if (status != MLORA_OK) return status;
    status = check_fields(config->json, path);
    if (status != MLORA_OK) return status;
    status = check_init(config->json, path);
    if (status != MLORA_OK) return status;
    status = read_numbers(config);
    if (status != MLORA_OK) return status;
    status = read_targets(config);
    if (status != MLORA_OK) return status;
    status = read_modules(&config->excluded, config->json, "exclude_modules", path);
    if (status != MLORA_OK) return status;
    status = read_pattern_map(&config->ranks, config->json, "rank_pattern", 1, true, path);
    if (status != MLORA_OK) return status;
    status =
        read_pattern_map(&config->alphas, config->json, "alpha_pattern", -ALPHA_MAX, false, path);
    if (status != MLORA_OK) return status;

    sampler = json_object_get(config->json, "monteclora_config");
    config->has_sampler = sampler && !is_off(sampler);
    return read_layers(config);
}

mlora_status peft_config_read(struct peft_config *out, const char *directory)
{
    struct peft_config config = {0};
    mlora_status status;

    config.path = path_join(directory, "adapter_config.json");
    if (!config.path) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory for a path", directory);
    } else if (!file_exists(config.path)) {
        status = error_set(MLORA_EIO,
                           "%s: there is no such file; an adapter is a directory in "
                           "PEFT's layout, with adapter_config.json and adapter_model.safetensors",
                           config.path);
    } else {
        status = json_read_file(&config.json, config.path, CONFIG_BYTES_MAX);
        if (status == MLORA_OK) status = read_all(&config);
    }
    if (status != MLORA_OK) peft_config_free(&config);
    *out = config;
    return status;
}

static void pattern_map_free(struct pattern_map *map)
{
    for (int i = 0; i < map->n_entries; i++) pattern_free(map->patterns[i]);
    free(map->patterns);
    free(map->values);
}

void peft_config_free(struct peft_config *config)
{
    pattern_free(config->targets.pattern);
    pattern_free(config->excluded.pattern);
    pattern_map_free(&config->ranks);
    pattern_map_free(&config->alphas);
    for (int i = 0; i < config->n_layer_patterns; i++) pattern_free(config->layer_patterns[i]);
    free(config->layer_patterns);
    buffer_free(&config->warnings);
    json_decref(config->json);
    free(config->path);
    *config = (struct peft_config){0};
}

/* ---- matching ----------------------------------------------------------------------------- */

enum match { MATCH_NONE, MATCH_NAME, MATCH_SUFFIX, MATCH_PATTERN };

/* A list's entry is a module's whole name or its last parts; a pattern is the whole name. */
static mlora_status match_modules(enum match *out, const struct module_set *set, const char *module,
                                  uint32_t max_steps)
{
    const size_t n = strlen(module);
    bool matches = set->all;
    mlora_status status = MLORA_OK;

    *out = MATCH_NONE;
    for (size_t i = 0; i < json_array_size(set->names); i++) {
        const char *name = json_string_value(json_array_get(set->names, i));
        const size_t m = json_string_length(json_array_get(set->names, i));
        if (strcmp(module, name) == 0) {
            *out = MATCH_NAME;
            return MLORA_OK;
        }
        if (n > m && module[n - m - 1] == '.' && strcmp(module + n - m, name) == 0)
            *out = MATCH_SUFFIX;
    }
    if (set->pattern)
        status = pattern_match(&matches, NULL, set->pattern, module, PATTERN_WHOLE, max_steps);
    if (matches) *out = MATCH_PATTERN;
    return status;
}

/* Whether layers_to_transform has the module's layer, whose number the first pattern that matches
 * gives. */
static mlora_status match_layer(bool *out, const struct peft_config *config, const char *module,
                                uint32_t max_steps)
{
    struct span digits = {0};
    bool matches = false;
    long long layer = 0;

    *out = false;
    for (int i = 0; i < config->n_layer_patterns && !matches; i++) {
        const mlora_status status = pattern_match(&matches, &digits, config->layer_patterns[i],
                                                  module, PATTERN_START, max_steps);
        if (status != MLORA_OK) return status;
    }
    if (!matches) return MLORA_OK;

    bool is_number = digits.end > digits.begin && digits.end - digits.begin < 10;
    for (size_t i = digits.begin; i < digits.end && is_number; i++) {
        is_number = module[i] >= '0' && module[i] <= '9';
        layer = layer * 10 + (module[i] - '0');
    }
    if (!is_number)
        return error_set(MLORA_EFORMAT,
                         "%s: layers_pattern has a group that is no layer's number "
                         "in %s; write it without groups",
                         config->path, module);
    if (json_is_integer(config->layers)) *out = json_integer_value(config->layers) == layer;
    for (size_t i = 0; i < json_array_size(config->layers); i++)
        if (json_integer_value(json_array_get(config->layers, i)) == layer) *out = true;
    return MLORA_OK;
}

/* `*value` becomes that of the first entry that matches; else it stays. */
static mlora_status match_value(double *value, const struct pattern_map *map, const char *module,
                                uint32_t max_steps)
{
    for (int i = 0; i < map->n_entries; i++) {
        bool matches;
        const mlora_status status =
            pattern_match(&matches, NULL, map->patterns[i], module, PATTERN_START, max_steps);
        if (status != MLORA_OK) return status;
        if (!matches) continue;
        *value = map->values[i];
        return MLORA_OK;
    }
    return MLORA_OK;
}

/* Every pattern may meet every module. */
static uint32_t steps_of_one_match(const struct peft_config *config, int n_modules)
{
    const int64_t n_patterns = 3 + config->ranks.n_entries + config->alphas.n_entries;
    const int64_t share = STEPS_MAX / (n_patterns * (n_modules > 0 ? n_modules : 1));

    if (share < STEPS_MIN) return STEPS_MIN;
    return share > STEPS_ONE_MAX ? STEPS_ONE_MAX : (uint32_t)share;
}

mlora_status peft_config_match(struct peft_module *out, const struct peft_config *config,
                               const char *module, int n_modules)
{
    const uint32_t max_steps = steps_of_one_match(config, n_modules);
    double rank = config->rank, alpha = config->alpha;
    enum match match;

    *out = (struct peft_module){0};
    mlora_status status = match_modules(&match, &config->excluded, module, max_steps);
    if (status != MLORA_OK || match != MATCH_NONE) return status;
    status = match_modules(&match, &config->targets, module, max_steps);
    if (status != MLORA_OK || match == MATCH_NONE) return status;
    if (match == MATCH_SUFFIX && config->layers) { /* PEFT does not ask after a whole name */
        bool has_layer;
        status = match_layer(&has_layer, config, module, max_steps);
        if (status != MLORA_OK || !has_layer) return status;
    }

    status = match_value(&rank, &config->ranks, module, max_steps);
    if (status != MLORA_OK) return status;
    status = match_value(&alpha, &config->alphas, module, max_steps);
    if (status != MLORA_OK) return status;
    *out = (struct peft_module){.targeted = true, .rank = (int)rank, .alpha = alpha};
    return MLORA_OK;
}

double peft_config_scale(const struct peft_config *config, const struct peft_module *module)
{
    return module->alpha / (config->rslora ? sqrt(module->rank) : module->rank);
}
