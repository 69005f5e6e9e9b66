/* Reading JSON files strictly (jansson): duplicates refused, types and ranges checked, and
 * every message names the file and the key. */
#ifndef MLORA_BASE_JSON_H
#define MLORA_BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/mlora.h" /* mlora_status */

/* Parse the file, whose top level must be an object. `*out` is owned by the caller
 * (json_decref). Returns OK, EIO, EFORMAT (not JSON, not an object, over `max_bytes`), ENOMEM. */
mlora_status json_read_file(json_t **out, const char *path, int64_t max_bytes);

/* `path` is for messages. A key that is absent or null gives `fallback`; one of another type or
 * outside [min, max] is EFORMAT. */
mlora_status json_get_int(int64_t *out, const json_t *object, const char *key, int64_t fallback,
                          int64_t min, int64_t max, const char *path);
mlora_status json_get_double(double *out, const json_t *object, const char *key, double fallback,
                             double min, double max, const char *path);
mlora_status json_get_bool(bool *out, const json_t *object, const char *key, bool fallback,
                           const char *path);
/* The string lives as long as `object`; an absent or null key gives `fallback` (may be NULL). */
mlora_status json_get_string(const char **out, const json_t *object, const char *key,
                             const char *fallback, const char *path);

/* What a value is, in words: "a string", "an array", "missing". */
const char *json_kind(const json_t *value);

#endif
