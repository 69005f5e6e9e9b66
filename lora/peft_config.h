/* adapter_config.json as PEFT writes it: which modules are targets, and with what rank and alpha.
 * A field that changes the result and is not served refuses the adapter by name. */
#ifndef MLORA_LORA_PEFT_CONFIG_H
#define MLORA_LORA_PEFT_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/buffer.h"
#include "engine/base/json.h"
#include "lora/pattern.h"

enum { PATTERNS_MAX = 2048 }; /* of one field */

/* rank_pattern or alpha_pattern: the first entry whose pattern matches wins. */
struct pattern_map {
    int n_entries;
    struct pattern **patterns; /* [n_entries] in the file's order */
    double *values;            /* [n_entries] */
};

/* target_modules or exclude_modules. */
struct module_set {
    bool all;                /* "all-linear" */
    const json_t *names;     /* array of strings, borrowed; NULL: none */
    struct pattern *pattern; /* NULL: none */
};

struct peft_config {
    char *path;   /* of the file, for messages */
    json_t *json; /* what the strings here live in */
    int rank;     /* r */
    double alpha;
    bool rslora;
    bool has_sampler; /* monteclora_config, velora_config: has tensors that only training uses */
    const char *base_model; /* base_model_name_or_path; may be NULL */
    struct module_set targets, excluded;
    struct pattern_map ranks, alphas;
    const json_t *layers;            /* layers_to_transform: array or integer; NULL: all */
    struct pattern **layer_patterns; /* [n_layer_patterns] layers_pattern */
    int n_layer_patterns;
    bool dora, lora_bias;
    bool tie;                          /* ensure_weight_tying                                   */
    int group;                         /* inputs that QA-LoRA pools; 1: it is none              */
    const json_t *blocks_a, *blocks_b; /* use_bdlora: parts of names of modules whose A, B is */
    int n_blocks;                      /* this many blocks on a diagonal                      */
    const json_t *saved;               /* modules_to_save: array of strings; NULL: none         */
    struct pattern **saved_patterns;   /* [n_saved_patterns] of them, for what is no target     */
    int n_saved_patterns;
    const json_t *tokens;     /* trainable_token_indices: array, or object of arrays; NULL: none */
    const json_t *invocation; /* alora_invocation_tokens: array of ids; NULL: none               */
    struct buffer warnings;   /* a line each */
};

/* What the file says of one module. */
struct peft_module {
    bool targeted;
    int rank;
    double alpha;
};

/* Returns OK, EIO, EFORMAT, EUNSUPPORTED or ENOMEM; on failure `out` is zeroed. */
mlora_status peft_config_read(struct peft_config *out, const char *directory);
void peft_config_free(struct peft_config *config); /* accepts zeroes */

/* Match a module such as "model.layers.3.self_attn.q_proj" as PEFT does. `n_modules`, the number
 * that will be asked about, shares out the work that patterns may cause.
 * Returns OK, EFORMAT (a pattern that takes too long) or ENOMEM. */
mlora_status peft_config_match(struct peft_module *out, const struct peft_config *config,
                               const char *module, int n_modules);

/* The same for a module that is a target by other means. */
mlora_status peft_config_rank(struct peft_module *out, const struct peft_config *config,
                              const char *module, int n_modules);

/* The module is one of modules_to_save. */
bool peft_config_saves(const struct peft_config *config, const char *module);

/* modules_to_save, or target_modules, names embed_tokens or lm_head: ensure_weight_tying then
 * ties the one to the other. The second returns OK or EFORMAT. */
bool peft_config_saves_embedding(const struct peft_config *config);
mlora_status peft_config_targets_embedding(bool *out, const struct peft_config *config);

/* The factor of the module that `list`, blocks_a or blocks_b, is about is made of blocks. */
bool peft_config_has_blocks(const json_t *list, const char *module);

/* alpha / rank, or alpha / sqrt(rank) with rsLoRA. */
double peft_config_scale(const struct peft_config *config, const struct peft_module *module);

#endif
