#include "model/fields.h"

#include <stdio.h>
#include <stdlib.h>

#include "engine/base/error.h"

int64_t field_int(struct fields *fields, const char *key, int64_t fallback, int64_t min,
                  int64_t max)
{
    int64_t value = fallback;

    if (fields->status == MLORA_OK)
        fields->status =
            json_get_int(&value, fields->object, key, fallback, min, max, fields->path);
    return fields->status == MLORA_OK ? value : fallback;
}

double field_double(struct fields *fields, const char *key, double fallback, double min, double max)
{
    double value = fallback;

    if (fields->status == MLORA_OK)
        fields->status =
            json_get_double(&value, fields->object, key, fallback, min, max, fields->path);
    return fields->status == MLORA_OK ? value : fallback;
}

bool field_bool(struct fields *fields, const char *key, bool fallback)
{
    bool value = fallback;

    if (fields->status == MLORA_OK)
        fields->status = json_get_bool(&value, fields->object, key, fallback, fields->path);
    return fields->status == MLORA_OK ? value : fallback;
}

const char *field_string(struct fields *fields, const char *key, const char *fallback)
{
    const char *value = fallback;

    if (fields->status == MLORA_OK)
        fields->status = json_get_string(&value, fields->object, key, fallback, fields->path);
    return fields->status == MLORA_OK ? value : fallback;
}

static void need(struct fields *fields, const char *key, const char *what)
{
    const json_t *value = json_object_get(fields->object, key);

    if (fields->status == MLORA_OK && (!value || json_is_null(value)))
        fields->status = error_set(MLORA_EFORMAT, "%s: %s is %s, %s is needed", fields->path, key,
                                   json_kind(value), what);
}

int64_t field_need_int(struct fields *fields, const char *key, int64_t min, int64_t max)
{
    need(fields, key, "an integer");
    return field_int(fields, key, min, min, max);
}

double field_need_double(struct fields *fields, const char *key, double min, double max)
{
    need(fields, key, "a number");
    return field_double(fields, key, min, min, max);
}

bool field_exists(const struct fields *fields, const char *key)
{
    return json_object_get(fields->object, key) != NULL;
}

bool json_is_neutral(const json_t *value)
{
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_object(value) && json_object_size(value) == 0) ||
           (json_is_string(value) && json_string_length(value) == 0);
}

const char *json_short_text(const json_t *value, char *text, size_t bytes)
{
    char *whole = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);

    snprintf(text, bytes, "%s", whole ? whole : json_kind(value));
    free(whole);
    return text;
}
