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

static const struct {
    const char *name;
    enum lora_norm norm;
} norms[] = {
    {"input_layernorm", NORM_ATTENTION},
    {"post_attention_layernorm", NORM_MLP},
    {"self_attn.q_norm", NORM_Q},
    {"self_attn.k_norm", NORM_K},
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

/* ".weight", or ".modules_to_save.default.weight" in files that kept how PEFT holds it. */
static bool is_whole_weight(const char *text)
{
    if (!skip(&text, ".")) return false;
    if (skip(&text, "modules_to_save.")) return is_weight(text, "weight");
    return strcmp(text, "weight") == 0;
}

/* What follows "layers.N.self_attn.q_proj." or "lm_head." */
static enum tensor_kind kind_of_part(const char *part)
{
    if (skip(&part, "lora_A.")) return is_weight(part, "weight") ? TENSOR_A : TENSOR_UNKNOWN;
    if (skip(&part, "lora_B.")) {
        if (is_weight(part, "bias")) return TENSOR_LORA_BIAS;
        return is_weight(part, "weight") ? TENSOR_B : TENSOR_UNKNOWN;
    }
    if (skip(&part, "lora_magnitude_vector")) return TENSOR_MAGNITUDE;
    if (skip(&part, "lora_diag")) return TENSOR_DIAGONAL;
    if (skip(&part, "lora_monteclora_sampler.") || skip(&part, "lora_velora_"))
        return TENSOR_SAMPLER;
    if (strcmp(part, "bias") == 0 || strcmp(part, "base_layer.bias") == 0) return TENSOR_BIAS;
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

    out->layer = layer;
    for (size_t i = 0; i < sizeof linears / sizeof linears[0]; i++) {
        const char *part = rest;
        if (!skip(&part, linears[i].name) || !skip(&part, ".")) continue;
        out->kind = kind_of_part(part);
        out->first_linear = linears[i].first;
        out->n_linears = linears[i].n;
        out->linear = linears[i].name;
        return;
    }
    for (size_t i = 0; i < sizeof norms / sizeof norms[0]; i++) {
        const char *part = rest;
        if (!skip(&part, norms[i].name) || !is_whole_weight(part)) continue;
        out->kind = TENSOR_NORM;
        out->first_linear = (int)norms[i].norm;
        out->linear = norms[i].name;
        return;
    }
    if (strstr(rest, "norm") && ends_with(rest, ".weight") && !strstr(rest, "lora_"))
        out->kind = TENSOR_FULL_WEIGHT;
}

/* What follows "embed_tokens" or "lm_head". */
static enum tensor_kind kind_of_embedding(const char *rest)
{
    if (is_whole_weight(rest)) return TENSOR_WHOLE;
    if (!skip(&rest, ".")) return TENSOR_UNKNOWN;
    if (strcmp(rest, "base_layer.weight") == 0 ||
        strcmp(rest, "token_adapter.base_layer.weight") == 0)
        return TENSOR_COPY;
    if (skip(&rest, "token_adapter.trainable_tokens_delta") ||
        skip(&rest, "trainable_tokens_delta"))
        return *rest == '\0' || *rest == '.' ? TENSOR_TOKENS : TENSOR_UNKNOWN;
    if (skip(&rest, "lora_embedding_A"))
        return *rest == '\0' || *rest == '.' ? TENSOR_A : TENSOR_UNKNOWN;
    if (skip(&rest, "lora_embedding_B"))
        return *rest == '\0' || *rest == '.' ? TENSOR_B : TENSOR_UNKNOWN;
    const enum tensor_kind kind = kind_of_part(rest);
    return kind == TENSOR_FULL_WEIGHT ? TENSOR_UNKNOWN : kind;
}

/* What belongs to no layer: embed_tokens, lm_head and the last norm. */
static void parse_outside(struct tensor_name *out, const char *rest)
{
    const bool head = skip(&rest, "lm_head");

    if (head || skip(&rest, "embed_tokens")) {
        out->kind = kind_of_embedding(rest);
        out->first_linear = head ? LORA_HEAD : LORA_EMBEDDING;
        out->n_linears = 1;
        out->linear = head ? "lm_head" : "embed_tokens";
    } else if (skip(&rest, "norm") && is_whole_weight(rest)) {
        out->kind = TENSOR_NORM;
        out->first_linear = NORM_FINAL;
        out->linear = "norm";
    }
}

mlora_status tensor_name_parse(struct tensor_name *out, const char *name)
{
    struct buffer plain = {0};

    *out = (struct tensor_name){.kind = TENSOR_UNKNOWN, .layer = LAYER_OUTSIDE};
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
        parse_outside(out, rest);

done:
    buffer_free(&plain);
    return status;
}

void module_name(char out[MODULE_NAME_MAX], const char *prefix, int layer, const char *linear)
{
    if (layer != LAYER_OUTSIDE)
        snprintf(out, MODULE_NAME_MAX, "%.63slayers.%d.%.32s", prefix, layer, linear);
    else
        snprintf(out, MODULE_NAME_MAX, "%.63s%.32s", strcmp(linear, "lm_head") == 0 ? "" : prefix,
                 linear);
}
