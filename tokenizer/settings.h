/* The files beside a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json
 * and chat_template.jinja. None of them has to be there. */
#ifndef MLORA_TOKENIZER_SETTINGS_H
#define MLORA_TOKENIZER_SETTINGS_H

#include <stdbool.h>

#include "engine/mlora.h" /* mlora_status */

struct settings {
    char *bos_text, *eos_text; /* owned; NULL: not named */
    bool adds_bos, adds_eos;   /* for tokenizer.model; default: begin yes, end no */
    bool legacy;               /* for tokenizer.model; default no */
    char *chat_template;       /* owned; NULL: none */
    char **added;              /* [n_added] owned: texts of added tokens */
    int n_added;
};

/* Returns OK, EIO, EFORMAT or ENOMEM; freed with settings_free also after a failure. */
mlora_status settings_read(struct settings *out, const char *directory);
void settings_free(struct settings *settings); /* accepts zeroes */

#endif
