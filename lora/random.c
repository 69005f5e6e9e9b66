#include "lora/random.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "model/weights.h"

/* Uniform in (-0.035, 0.035), as bf16: the deviation of trained factors, about 0.02. */
static void fill(uint16_t *out, size_t n, uint64_t *state)
{
    for (size_t i = 0; i < n; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        out[i] = bf16_from_f32(0.07f * ((float)(*state >> 40) / 16777216.0f - 0.5f));
    }
}

mlora_status adapter_random(struct adapter *out, struct device *dev,
                            const struct model_config *config, int rank, uint64_t seed)
{
    const int L = config->n_layers;
    struct adapter adapter = {.n_layers = L, .max_rank = rank};
    const uint64_t made_from[2] = {seed, (uint64_t)rank};
    size_t layer_values = 0; /* of the factors of one layer */
    uint16_t *values = NULL;

    assert(rank >= 1 && rank <= LORA_RANK_MAX);
    for (int i = 0; i < LORA_LINEARS; i++)
        layer_values += (size_t)rank * (size_t)(linear_inputs(config, (enum lora_linear)i) +
                                                linear_outputs(config, (enum lora_linear)i));
    adapter.content = hash_bytes((struct hash_key){{0, 0}}, made_from, sizeof made_from);
    const size_t layer_bytes = layer_values * sizeof *values;
    adapter.bytes = (int64_t)layer_bytes * L;
    adapter.factors = calloc(((size_t)L + 1) * LORA_LINEARS, sizeof *adapter.factors);
    adapter.warnings = strdup("");
    values = malloc(layer_bytes);
    mlora_status status =
        adapter.factors && adapter.warnings && values
            ? dev->ops->alloc(dev, (size_t)adapter.bytes, &adapter.memory)
            : error_set(MLORA_ENOMEM, "out of memory: a random adapter of rank %d", rank);

    for (int l = 0; l < L && status == MLORA_OK; l++) {
        char *at = (char *)adapter.memory + (size_t)l * layer_bytes;
        fill(values, layer_values, &seed);
        dev->ops->upload(dev, at, values, layer_bytes);
        for (int i = 0; i < LORA_LINEARS; i++) {
            const size_t a = (size_t)rank * (size_t)linear_inputs(config, (enum lora_linear)i);
            const size_t b = (size_t)rank * (size_t)linear_outputs(config, (enum lora_linear)i);
            adapter.factors[l * LORA_LINEARS + i] =
                (struct lora_factors){.a = at,
                                      .b = at + a * sizeof *values,
                                      .R = rank,
                                      .dtype = DTYPE_BF16,
                                      .scale = 1.0f / (float)rank};
            at += (a + b) * sizeof *values;
        }
    }
    if (status == MLORA_OK) status = dev->ops->sync(dev);
    free(values);
    if (status != MLORA_OK) adapter_free(&adapter, dev);
    *out = adapter;
    return status;
}
