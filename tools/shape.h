/* Shapes of known models, for weights that are random: folders with a config.json. */
#ifndef MLORA_TOOLS_SHAPE_H
#define MLORA_TOOLS_SHAPE_H

#include "engine/mlora.h"

/* The folder of `config`, which is the name of a shape that came with mlora, or the path of a
 * config.json, and the tokenizer for it; both fresh strings, freed by the caller with free().
 * Returns OK, EINVAL or ENOMEM. */
mlora_status shape_find(char **folder, char **tokenizer, const char *config);

#endif
