#include "lora/tensor_name.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "kernels/views.h"

static const struct {
    const char *name;
    int first, n;
} linears[] = {
    {"self_attn.q_proj", LORA_Q, 1},    {"self_attn.k_proj", LORA_K, 1},
    {"self_attn.v_proj", LORA_V, 1},    {"self_attn.o_proj", LORA_O, 1},
    {"mlp.gate_proj", LORA_GATE, 1},    {"mlp.up_proj", LORA_UP, 1},
    {"mlp.down_proj", LORA_DOWN, 1},    {"self_attn.qkv_proj", LORA_Q, 3},
    {"mlp.gate_up_proj", LORA_GATE, 2},
};

/* Parts of a name that wrap a module without meaning anything. */
static const char *const wrappers[] = {
    "_orig_mod.",                  /* torch.compile */
    "_fsdp_wrapped_module.",       /* FullyShardedDataParallel */
    "_checkpoint_wrapped_module.", /* activation checkpointing */
};

/* If `*text` begins with `prefix`, move it behind. */
static bool skip(const char **text, const char *prefix)
{
    const size_t n = strlen(prefix);
    if (strncmp(*text, prefix, n) != 0) return false;
    *text += n;
    return true;
}

static bool ends_with(const char *text, const char *suffix)
{
    const size_t n = strlen(text), m = strlen(suffix);
    return n >= m && strcmp(text + n - m, suffix) == 0;
}

/* The name without wrappers, which may stand before any part. */
static mlora_status unwrap(struct buffer *out, const char *name)
{
    mlora_status status = MLORA_OK;

    while (*name && status == MLORA_OK) {
        bool wrapped = false;
        for (size_t i = 0; i < sizeof wrappers / sizeof wrappers[0]; i++)
            wrapped = wrapped || skip(&name, wrappers[i]);
        if (wrapped) continue;
        const char *dot = strchr(name, '.');
        const size_t n = dot ? (size_t)(dot + 1 - name) : strlen(name);
        status = buffer_append(out, name, n);
        name += n;
    }
    return status;
}

/* "weight", or "default.weight": what follows lora_A. in files that kept the adapter's name. */
static bool is_weight(const char *text, const char *suffix)
{
    const char *dot = strchr(text, '.');
    return strcmp(text, suffix) == 0 || (dot && dot > text && strcmp(dot + 1, suffix) == 0);
}

/* What follows "layers.N.self_attn.q_proj." */
static enum tensor_kind kind_of_part(const char *part)
{
    if (skip(&part, "lora_A.")) return is_weight(part, "weight") ? TENSOR_A : TENSOR_UNKNOWN;
    if (skip(&part, "lora_B.")) {
        if (is_weight(part, "bias")) return TENSOR_LORA_BIAS;
        return is_weight(part, "weight") ? TENSOR_B : TENSOR_UNKNOWN;
    }
    if (skip(&part, "lora_magnitude_vector")) return TENSOR_MAGNITUDE;
    if (skip(&part, "lora_diag")) return TENSOR_DIAGONAL;
    if (skip(&part, "lora_monteclora_sampler.")) return TENSOR_SAMPLER;
    if (ends_with(part, "bias")) return TENSOR_BIAS;
    if (ends_with(part, "weight") && !strstr(part, "lora_")) return TENSOR_FULL_WEIGHT;
    return TENSOR_UNKNOWN;
}

static void parse_layer(struct tensor_name *out, const char *rest)
{
    int layer = 0, n_digits = 0;

    if (rest[0] == '0' && rest[1] != '.') return;
    for (; *rest >= '0' && *rest <= '9' && n_digits < 6; rest++, n_digits++)
        layer = layer * 10 + (*rest - '0');
    if (n_digits == 0 || !skip(&rest, ".")) return;

    for (size_t i = 0; i < sizeof linears / sizeof linears[0]; i++) {
        const char *part = rest;
        if (!skip(&part, linears[i].name) || !skip(&part, ".")) continue;
        out->kind = kind_of_part(part);
        out->layer = layer;
        out->first_linear = linears[i].first;
        out->n_linears = linears[i].n;
        out->linear = linears[i].name;
        return;
    }
    if (strstr(rest, "norm") && ends_with(rest, ".weight") && !strstr(rest, "lora_"))
        out->kind = TENSOR_FULL_WEIGHT;
}

/* What belongs to no layer: embed_tokens, lm_head and the last norm. */
static enum tensor_kind kind_outside_layers(const char *rest)
{
    const bool head = skip(&rest, "lm_head.");

    if (head || skip(&rest, "embed_tokens.")) {
        if (strstr(rest, "trainable_tokens_")) return TENSOR_TOKENS;
        if (strstr(rest, "lora_magnitude_vector")) return TENSOR_MAGNITUDE;
        if (strstr(rest, "lora_")) return head ? TENSOR_HEAD_LORA : TENSOR_EMBEDDING_LORA;
        if (strcmp(rest, "weight") == 0 || strcmp(rest, "base_layer.weight") == 0)
            return TENSOR_EMBEDDING_COPY;
        if (ends_with(rest, "weight")) return TENSOR_FULL_WEIGHT;
        if (ends_with(rest, "bias")) return TENSOR_BIAS;
        return TENSOR_UNKNOWN;
    }
    return skip(&rest, "norm.") && ends_with(rest, "weight") ? TENSOR_FULL_WEIGHT : TENSOR_UNKNOWN;
}

mlora_status tensor_name_parse(struct tensor_name *out, const char *name)
{
    struct buffer plain = {0};

    *out = (struct tensor_name){.kind = TENSOR_UNKNOWN};
    mlora_status status = unwrap(&plain, name);
    if (status != MLORA_OK) goto done;

    const char *rest = buffer_text(&plain);
    while (skip(&rest, "base_model.model.")) continue;
    const char *modules = rest;
    bool text_part = false; /* of a model that sees too: its modules have longer names */
    for (;;) {
        if (skip(&rest, "language_model."))
            text_part = true;
        else if (!skip(&rest, "model."))
            break;
    }
    const size_t n = (size_t)(rest - modules);
    if (n >= sizeof out->prefix) goto done;
    snprintf(out->prefix, sizeof out->prefix, "%.*s", text_part ? (int)n : 6,
             text_part ? modules : "model.");
    if (skip(&rest, "layers."))
        parse_layer(out, rest);
    else
        out->kind = kind_outside_layers(rest);

done:
    buffer_free(&plain);
    return status;
}

void module_name(char out[MODULE_NAME_MAX], const char *prefix, int layer, const char *linear)
{
    snprintf(out, MODULE_NAME_MAX, "%.63slayers.%d.%.32s", prefix, layer, linear);
}
