/* Which modules an adapter_config.json means, by PEFT's own rules. */
#include <math.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/peft_config.h"

/* Steps of pattern matching that one adapter may take in all, and the least for one match. */
enum { STEPS_MAX = 200000000, STEPS_MIN = 2000, STEPS_ONE_MAX = 200000 };

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
    const int64_t n_patterns =
        3 + config->ranks.n_entries + config->alphas.n_entries + config->n_saved_patterns;
    const int64_t share = STEPS_MAX / (n_patterns * (n_modules > 0 ? n_modules : 1));

    if (share < STEPS_MIN) return STEPS_MIN;
    return share > STEPS_ONE_MAX ? STEPS_ONE_MAX : (uint32_t)share;
}

/* Whether the module is one of modules_to_save, or in one: then it is no target. */
static mlora_status match_saved(bool *out, const struct peft_config *config, const char *module,
                                uint32_t max_steps)
{
    mlora_status status = MLORA_OK;

    *out = false;
    for (int i = 0; i < config->n_saved_patterns && !*out && status == MLORA_OK; i++)
        status =
            pattern_match(out, NULL, config->saved_patterns[i], module, PATTERN_START, max_steps);
    return status;
}

static mlora_status match_target(bool *out, const struct peft_config *config, const char *module,
                                 uint32_t max_steps)
{
    enum match match;
    bool saved;

    *out = false;
    mlora_status status = match_modules(&match, &config->excluded, module, max_steps);
    if (status != MLORA_OK || match != MATCH_NONE) return status;
    status = match_saved(&saved, config, module, max_steps);
    if (status != MLORA_OK || saved) return status;
    status = match_modules(&match, &config->targets, module, max_steps);
    if (status != MLORA_OK) return status;
    *out = match != MATCH_NONE;
    if (match == MATCH_SUFFIX && config->layers) /* PEFT does not ask after a whole name */
        return match_layer(out, config, module, max_steps);
    return MLORA_OK;
}

mlora_status peft_config_rank(struct peft_module *out, const struct peft_config *config,
                              const char *module, int n_modules)
{
    const uint32_t max_steps = steps_of_one_match(config, n_modules);
    double rank = config->rank, alpha = config->alpha;

    *out = (struct peft_module){0};
    mlora_status status = match_value(&rank, &config->ranks, module, max_steps);
    if (status != MLORA_OK) return status;
    status = match_value(&alpha, &config->alphas, module, max_steps);
    if (status != MLORA_OK) return status;
    *out = (struct peft_module){.targeted = true, .rank = (int)rank, .alpha = alpha};
    return MLORA_OK;
}

mlora_status peft_config_match(struct peft_module *out, const struct peft_config *config,
                               const char *module, int n_modules)
{
    bool targeted;

    *out = (struct peft_module){0};
    const mlora_status status =
        match_target(&targeted, config, module, steps_of_one_match(config, n_modules));
    if (status != MLORA_OK || !targeted) return status;
    return peft_config_rank(out, config, module, n_modules);
}

bool peft_config_saves(const struct peft_config *config, const char *module)
{
    const size_t n = strlen(module);

    for (size_t i = 0; i < json_array_size(config->saved); i++) {
        const char *name = json_string_value(json_array_get(config->saved, i));
        const size_t m = json_string_length(json_array_get(config->saved, i));
        if (n >= m && strcmp(module + n - m, name) == 0) return true;
    }
    return false;
}

/* The last part of a name is an embedding's. */
static bool is_embedding_name(const char *name)
{
    const char *dot = strrchr(name, '.');
    const char *last = dot ? dot + 1 : name;
    return strcmp(last, "embed_tokens") == 0 || strcmp(last, "lm_head") == 0;
}

static bool has_embedding_name(const json_t *names)
{
    for (size_t i = 0; i < json_array_size(names); i++)
        if (is_embedding_name(json_string_value(json_array_get(names, i)))) return true;
    return false;
}

bool peft_config_saves_embedding(const struct peft_config *config)
{
    return has_embedding_name(config->saved);
}

mlora_status peft_config_targets_embedding(bool *out, const struct peft_config *config)
{
    static const char *const names[] = {"embed_tokens", "lm_head"};
    mlora_status status = MLORA_OK;

    *out = has_embedding_name(config->targets.names);
    for (int i = 0; i < 2 && config->targets.pattern && !*out && status == MLORA_OK; i++)
        status = pattern_match(out, NULL, config->targets.pattern, names[i], PATTERN_WHOLE,
                               STEPS_ONE_MAX);
    return status;
}

bool peft_config_has_blocks(const json_t *list, const char *module)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (strstr(module, json_string_value(json_array_get(list, i)))) return true;
    return false;
}

double peft_config_scale(const struct peft_config *config, const struct peft_module *module)
{
    return module->alpha / (config->rslora ? sqrt(module->rank) : module->rank);
}
