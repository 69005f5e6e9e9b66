/* Any bytes as config.json, then a NUL and generation_config.json. What is accepted must hold the
 * promises that the rest of the engine builds on. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static json_t *parse(const char *text, size_t bytes)
{
    json_error_t error;
    json_t *value = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (json_is_object(value)) return value;
    json_decref(value);
    return NULL;
}

static void check(const struct model_config *config)
{
    float frequency[512];

    if (config->n_layers < 1 || config->n_layers > LAYERS_MAX) abort();
    if (config->head_dim < 2 || config->head_dim > 1024 || config->head_dim % 2) abort();
    if (config->n_kv_heads < 1 || config->n_heads % config->n_kv_heads) abort();
    if (config->n_eos < 0 || config->n_eos > EOS_MAX) abort();
    if (config->window < 0 || config->max_position < 1) abort();
    if (!(config->temperature >= 0) || !(config->top_p > 0 && config->top_p <= 1)) abort();
    model_config_rope(config, frequency);
    for (int i = 0; i < config->head_dim / 2; i++)
        if (!isfinite(frequency[i]) || frequency[i] < 0) abort();
    if (!isfinite(config->rope.attention_factor)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model_config config;
    const char *text = (const char *)data;
    const char *nul = size ? memchr(text, 0, size) : NULL;
    const size_t config_bytes = nul ? (size_t)(nul - text) : size;

    json_t *root = parse(text, config_bytes);
    if (root && model_config_parse(&config, root, "config.json") == MLORA_OK) {
        json_t *generation = nul ? parse(nul + 1, size - config_bytes - 1) : NULL;
        if (generation)
            model_config_parse_generation(&config, generation, "generation_config.json");
        json_decref(generation);
        check(&config);
    }
    json_decref(root);
    return 0;
}
