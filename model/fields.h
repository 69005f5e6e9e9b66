/* Reading the fields of a JSON object in a row: after the first failure the rest do nothing, so
 * that a parser reads as a list of fields and looks at the status once. */
#ifndef MLORA_MODEL_FIELDS_H
#define MLORA_MODEL_FIELDS_H

#include "engine/base/json.h"

struct fields {
    const json_t *object;
    const char *path;    /* for messages: the file, and the key of an object within it */
    mlora_status status; /* of the first failure; the error text is its */
};

/* A key that is absent or null gives `fallback`; a wrong type or range is EFORMAT. After a failure
 * they return `fallback`. */
int64_t field_int(struct fields *fields, const char *key, int64_t fallback, int64_t min,
                  int64_t max);
double field_double(struct fields *fields, const char *key, double fallback, double min,
                    double max);
bool field_bool(struct fields *fields, const char *key, bool fallback);
const char *field_string(struct fields *fields, const char *key, const char *fallback);

/* The same, where the key must be there and not null. They return `min` after a failure. */
int64_t field_need_int(struct fields *fields, const char *key, int64_t min, int64_t max);
double field_need_double(struct fields *fields, const char *key, double min, double max);

/* True where the key is there, null included. */
bool field_exists(const struct fields *fields, const char *key);

/* The value says nothing: absent, null, false, an empty array, object or string. */
bool json_is_neutral(const json_t *value);

/* The value as short text for a message, at most `bytes` with the NUL. */
const char *json_short_text(const json_t *value, char *text, size_t bytes);

#endif
