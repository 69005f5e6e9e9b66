/* config.json to numbers that the rest may trust: every dimension is checked here, once. */
#ifndef MLORA_MODEL_CONFIG_H
#define MLORA_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/json.h"

enum { EOS_MAX = 16, LAYERS_MAX = 512 };

enum rope_kind { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN };

struct rope_config {
    enum rope_kind kind;
    double theta;
    double factor;
    double low_freq_factor, high_freq_factor; /* llama3 */
    double beta_fast, beta_slow;              /* yarn */
    double attention_factor;                  /* yarn: amplitude of cos and sin; else 1 */
    double original_max_position;             /* llama3, yarn */
    bool truncate;                            /* yarn: the ramp's ends are whole numbers */
};

struct model_config {
    char architecture[32]; /* "LlamaForCausalLM", ... */
    int hidden_size;       /* D */
    int mlp_size;          /* F */
    int n_layers;          /* L */
    int n_heads;           /* H */
    int n_kv_heads;        /* G */
    int head_dim;          /* d */
    int vocab_size;        /* V */
    int max_position;      /* tokens */
    double rms_norm_eps;
    struct rope_config rope;
    bool tied;     /* lm_head is embed_tokens */
    bool qkv_bias; /* q, k and v have biases */
    bool o_bias;
    bool mlp_bias;
    bool qk_norm;                      /* q and k heads are normalised before rope */
    int window;                        /* sliding window in tokens, 0: none */
    bool layer_has_window[LAYERS_MAX]; /* [n_layers] */
    int32_t bos;                       /* -1: none */
    int32_t eos[EOS_MAX];              /* of config.json and generation_config.json */
    int n_eos;

    /* generation_config.json, or neutral values */
    bool has_generation_config;
    bool do_sample;
    double temperature, top_p, min_p, repetition_penalty;
    int top_k;
    int max_new_tokens; /* 0: not given */
};

/* Read `directory`/config.json and generation_config.json (which may be absent).
 * Returns OK, EIO, EFORMAT, or EUNSUPPORTED (a key that changes the maths and is not served; the
 * text names it and its value). */
mlora_status model_config_read(struct model_config *out, const char *directory);

/* The two halves of model_config_read on values that are parsed already; `path` is for messages.
 * The first sets all of `out`, the second adds to it. */
mlora_status model_config_parse(struct model_config *out, const json_t *config, const char *path);
mlora_status model_config_parse_generation(struct model_config *out, const json_t *generation,
                                           const char *path);

/* frequency[i] for i < d/2, as `struct rope_view` wants them; formulas at the definition. */
void model_config_rope(const struct model_config *config, float *frequency);

#endif
