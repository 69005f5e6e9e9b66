/* The rotary embedding of a config.json, in the spellings of transformers 4 and 5. */
#ifndef MLORA_MODEL_ROPE_H
#define MLORA_MODEL_ROPE_H

#include "model/config.h"

/* `config` is the top level of config.json. Returns OK, EFORMAT, or EUNSUPPORTED (a kind of rope,
 * or a parameter, that is not served). */
mlora_status rope_parse(struct rope_config *out, const json_t *config, int max_position,
                        const char *path);

#endif
