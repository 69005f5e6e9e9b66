#include "lora/random.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "model/weights.h"

enum { ALIGNMENT = 256, VALUES_PER_WORD = 4 };

/* splitmix64 (Steele, Lea and Flood 2014): word number i, without those before it. */
static uint64_t random_word(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* n bf16 numbers, four to a word: signs and mantissas are random, all exponents that of 2^-6. So they
 * deviate by about 0.02, as trained factors do, and cost less than reading a file. */
static void fill(char *out, size_t n, uint64_t seed)
{
    for (size_t i = 0; i < n / VALUES_PER_WORD; i++) {
        const uint64_t word = (random_word(seed, i) & 0x807f807f807f807fu) | 0x3c803c803c803c80u;
        memcpy(out + i * sizeof word, &word, sizeof word);
    }
}

mlora_status adapter_random(struct adapter *out, const struct model_config *config, int rank,
                            uint64_t seed)
{
    const int L = config->n_layers;
    struct adapter adapter = {
        .n_layers = L, .max_rank = rank, .origin = ALIGNMENT, .is_plain = rank % 8 == 0};
    const uint64_t made_from[2] = {seed, (uint64_t)rank};
    uintptr_t at = adapter.origin;

    assert(rank >= 1 && rank <= LORA_RANK_MAX);
    *out = (struct adapter){0};
    adapter.factors = calloc(((size_t)L + 1) * LORA_LINEARS, sizeof *adapter.factors);
    adapter.warnings = strdup("");
    if (!adapter.factors || !adapter.warnings) {
        adapter_free(&adapter);
        return error_set(MLORA_ENOMEM, "out of memory: a random adapter of rank %d", rank);
    }
    for (int l = 0; l < L; l++)
        for (int i = 0; i < LORA_LINEARS; i++) {
            const size_t pitch = (size_t)rank * sizeof(uint16_t);
            const size_t a = pitch * (size_t)linear_inputs(config, (enum lora_linear)i);
            const size_t b = pitch * (size_t)linear_outputs(config, (enum lora_linear)i);
            adapter.factors[l * LORA_LINEARS + i] = (struct lora_factors){
                .a = (const void *)at,
                .b = (const void *)(at + a),
                .R = rank,
                .dtype = DTYPE_BF16,
                .scale = 1.0f / (float)rank,
            };
            at += (a + b + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        }
    adapter.bytes = (int64_t)(at - adapter.origin);
    adapter.content = hash_bytes((struct hash_key){{0, 0}}, made_from, sizeof made_from);
    *out = adapter;
    return MLORA_OK;
}

mlora_status adapter_random_image(struct adapter *adapter, uint64_t seed)
{
    const size_t bytes = (size_t)adapter->bytes;

    assert(!adapter->memory);
    adapter->memory = adapter_image_alloc(adapter->bytes);
    if (!adapter->memory)
        return error_set(MLORA_ENOMEM, "out of memory: %zu bytes of random factors", bytes);
    fill(adapter->memory, bytes / sizeof(uint16_t), seed);
    return MLORA_OK;
}
