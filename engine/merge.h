/* A base model and an adapter to a checkpoint of both. */
#ifndef MLORA_ENGINE_MERGE_H
#define MLORA_ENGINE_MERGE_H

#include <stdbool.h>

#include "engine/mlora.h" /* mlora_status */

/* See mlora_merge(). */
mlora_status merge_directory(const char *model, const char *adapter, const char *output,
                             bool lenient, char **warnings);

#endif
