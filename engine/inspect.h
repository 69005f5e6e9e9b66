/* What a model or adapter directory is, as JSON, from its configuration and the headers of its
 * weight files alone. */
#ifndef MLORA_ENGINE_INSPECT_H
#define MLORA_ENGINE_INSPECT_H

#include "engine/base/buffer.h"

/* Append a JSON object to `json`: for the fields see inspect_model() and inspect_adapter().
 * `model_dir`, a base model to check an adapter against, may be NULL. An adapter that is refused
 * is described, with the reason, and the status is OK.
 * Returns OK, EIO (neither a model nor an adapter), EFORMAT, EUNSUPPORTED or ENOMEM. */
mlora_status inspect_directory(struct buffer *json, const char *dir, const char *model_dir);

#endif
