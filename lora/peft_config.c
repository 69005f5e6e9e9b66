#include "lora/peft_config.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "lora/peft_fields.h"

enum { CONFIG_BYTES_MAX = 4 << 20, LAYER_PATTERNS_MAX = 16, BLOCKS_MAX = 1 << 20 };

#define ALPHA_MAX 1e30 /* a scale is an f32 */

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

    if (layers && peft_field_is_off(layers)) layers = NULL;
    if (pattern && peft_field_is_off(pattern)) pattern = NULL;
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

/* modules_to_save, which are no targets. */
static mlora_status read_saved(struct peft_config *config)
{
    const json_t *names = json_object_get(config->json, "modules_to_save");
    const size_t n = json_array_size(names);

    if (!names || peft_field_is_off(names)) return MLORA_OK;
    if (!json_is_array(names) || n > PATTERNS_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: modules_to_save is %s, a list of at most %d module names is needed; "
                         "save the adapter with PEFT again",
                         config->path, json_is_array(names) ? "a longer list" : json_kind(names),
                         PATTERNS_MAX);
    mlora_status status = check_strings(names, config->path, "modules_to_save");
    if (status != MLORA_OK) return status;
    config->saved = names;
    config->saved_patterns = calloc(n, sizeof *config->saved_patterns);
    if (!config->saved_patterns) return error_set(MLORA_ENOMEM, "%s: out of memory", config->path);
    for (size_t i = 0; i < n && status == MLORA_OK; i++) {
        status = pattern_compile(&config->saved_patterns[i], "(^|.*\\.)",
                                 json_string_value(json_array_get(names, i)), "($|\\..*)",
                                 config->path, "modules_to_save");
        if (status == MLORA_OK) config->n_saved_patterns++;
    }
    return status;
}

static mlora_status not_tokens(const struct peft_config *config, const char *field)
{
    return error_set(MLORA_EFORMAT,
                     "%s: %s is not a list of token ids%s; save the adapter with PEFT again",
                     config->path, field,
                     strcmp(field, "trainable_token_indices") == 0
                         ? ", nor an object of module names to such lists"
                         : "");
}

static bool is_token_list(const json_t *value)
{
    if (!json_is_array(value)) return false;
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *id = json_array_get(value, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > INT_MAX)
            return false;
    }
    return true;
}

static mlora_status read_tokens(struct peft_config *config)
{
    const json_t *tokens = json_object_get(config->json, "trainable_token_indices");
    const json_t *invocation = json_object_get(config->json, "alora_invocation_tokens");

    if (tokens && !peft_field_is_off(tokens)) {
        for (void *it = json_object_iter((json_t *)tokens); it;
             it = json_object_iter_next((json_t *)tokens, it))
            if (!is_token_list(json_object_iter_value(it)))
                return not_tokens(config, "trainable_token_indices");
        if (!json_is_object(tokens) && !is_token_list(tokens))
            return not_tokens(config, "trainable_token_indices");
        config->tokens = tokens;
    }
    if (invocation && !peft_field_is_off(invocation)) {
        if (!is_token_list(invocation)) return not_tokens(config, "alora_invocation_tokens");
        config->invocation = invocation;
    }
    return MLORA_OK;
}

/* use_bdlora: {"target_modules_bd_a": [part of a name], "target_modules_bd_b", "nblocks"}. */
static mlora_status read_blocks(struct peft_config *config)
{
    const json_t *object = json_object_get(config->json, "use_bdlora");
    const char *const lists[] = {"target_modules_bd_a", "target_modules_bd_b"};
    const char *path = config->path;
    int64_t n_blocks;

    if (!object || peft_field_is_off(object)) return MLORA_OK;
    if (!json_is_object(object))
        return error_set(MLORA_EFORMAT,
                         "%s: use_bdlora is %s, an object with target_modules_bd_a, "
                         "target_modules_bd_b and nblocks is needed; save the adapter with PEFT "
                         "again",
                         path, json_kind(object));
    for (int i = 0; i < 2; i++) {
        const json_t *list = json_object_get(object, lists[i]);
        if (!list || json_is_null(list)) continue;
        if (!json_is_array(list))
            return error_set(MLORA_EFORMAT,
                             "%s: use_bdlora: %s is %s, a list of module names is needed; save "
                             "the adapter with PEFT again",
                             path, lists[i], json_kind(list));
        const mlora_status status = check_strings(list, path, lists[i]);
        if (status != MLORA_OK) return status;
        *(i ? &config->blocks_b : &config->blocks_a) = list;
    }
    if (json_get_int(&n_blocks, object, "nblocks", 1, 1, BLOCKS_MAX, path) != MLORA_OK) {
        char shown[32] = "";
        const json_t *value = json_object_get(object, "nblocks");
        if (json_is_integer(value)) snprintf(shown, sizeof shown, "%lld", (long long)n_blocks);
        return error_set(MLORA_EFORMAT,
                         "%s: use_bdlora: nblocks is %s, an integer from 1 to %d is needed; save "
                         "the adapter with PEFT again",
                         path, shown[0] ? shown : json_kind(value), BLOCKS_MAX);
    }
    config->n_blocks = (int)n_blocks;
    return MLORA_OK;
}

static mlora_status read_flags(struct peft_config *config)
{
    const json_t *json = config->json;
    const char *path = config->path;
    bool qalora;
    int64_t group;

    mlora_status status = json_get_bool(&config->dora, json, "use_dora", false, path);
    if (status != MLORA_OK) return status;
    status = json_get_bool(&config->lora_bias, json, "lora_bias", false, path);
    if (status != MLORA_OK) return status;
    status = json_get_bool(&config->tie, json, "ensure_weight_tying", false, path);
    if (status != MLORA_OK) return status;
    status = json_get_bool(&qalora, json, "use_qalora", false, path);
    if (status != MLORA_OK) return status;
    status = json_get_int(&group, json, "qalora_group_size", 16, 1, 1 << 20, path);
    if (status != MLORA_OK) return status;
    config->group = qalora ? (int)group : 1;
    return MLORA_OK;
}

/* A value of another type or range than PEFT writes. */
static mlora_status with_remedy(mlora_status status)
{
    return status == MLORA_EFORMAT ? error_remedy(status, "save the adapter with PEFT again")
                                   : status;
}

static mlora_status read_all(struct peft_config *config)
{
    static const char *const samplers[] = {"monteclora_config", "velora_config"};
    const char *path = config->path;

    mlora_status status = peft_fields_check(config->json, path);
    if (status != MLORA_OK) return status;
    status = with_remedy(read_numbers(config));
    if (status != MLORA_OK) return status;
    status = with_remedy(read_flags(config));
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

    for (int i = 0; i < 2; i++) {
        const json_t *value = json_object_get(config->json, samplers[i]);
        config->has_sampler |= value && !peft_field_is_off(value);
    }
    status = read_layers(config);
    if (status != MLORA_OK) return status;
    status = read_saved(config);
    if (status == MLORA_OK) status = read_blocks(config);
    return status == MLORA_OK ? read_tokens(config) : status;
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
    for (int i = 0; i < config->n_saved_patterns; i++) pattern_free(config->saved_patterns[i]);
    free(config->saved_patterns);
    buffer_free(&config->warnings);
    json_decref(config->json);
    free(config->path);
    *config = (struct peft_config){0};
}
