/* A description under construction, and who fills it. Internal to engine/inspect*.c. */
#ifndef MLORA_ENGINE_INSPECT_PARTS_H
#define MLORA_ENGINE_INSPECT_PARTS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/mlora.h"

/* An object that is being filled; the first failure, which is lack of memory, stays in `failed`. */
struct description {
    json_t *json;
    bool failed;
};

/* Each takes `value` over. */
void describe(struct description *object, const char *key, json_t *value);
void describe_text(struct description *object, const char *key, const char *text);
void describe_integer(struct description *object, const char *key, int64_t value);
void describe_number(struct description *object, const char *key, double value);
void describe_bool(struct description *object, const char *key, bool value);

/* Add `value` to an array unless it is there. */
void describe_once(struct description *object, json_t *array, json_t *value);

/* Text from outside may not be UTF-8, as JSON must be; NULL becomes null. */
json_t *description_text(const char *text);

/* Whether `dir`/`name` is there; false too when out of memory for its path. */
bool directory_has(const char *dir, const char *name);
mlora_status directory_json(json_t **out, const char *dir, const char *name);

/* The fields are listed beside each. */
mlora_status inspect_model(struct description *object, const char *dir);
mlora_status inspect_adapter(struct description *object, const char *dir, const char *model_dir);

#endif
