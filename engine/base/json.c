#include "engine/base/json.h"

#include "engine/base/buffer.h"
#include "engine/base/error.h"
#include "engine/base/file.h"

mlora_status json_read_file(json_t **out, const char *path, int64_t max_bytes)
{
    struct buffer text = {0};
    json_error_t error;
    json_t *value = NULL;

    *out = NULL;
    mlora_status status = file_read_all(&text, path, max_bytes);
    if (status != MLORA_OK) goto done;

    value = json_loadb(buffer_text(&text), text.bytes, JSON_REJECT_DUPLICATES, &error);
    if (!value) {
        status =
            error_set(MLORA_EFORMAT, "%s: is not valid JSON: line %d, column %d: %s; save it again",
                      path, error.line, error.column, error.text);
        goto done;
    }
    if (!json_is_object(value)) {
        status = error_set(MLORA_EFORMAT, "%s: holds %s, a JSON object is needed; save it again",
                           path, json_kind(value));
        goto done;
    }
    *out = value;
    value = NULL;

done:
    json_decref(value);
    buffer_free(&text);
    return status;
}

const char *json_kind(const json_t *value)
{
    if (!value) return "missing";
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number with a fraction";
    case JSON_TRUE:
    case JSON_FALSE:
        return "true or false";
    case JSON_NULL:
        return "null";
    }
    return "unknown";
}

/* The value of `key`, NULL if it is absent or null. */
static const json_t *get(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

mlora_status json_get_int(int64_t *out, const json_t *object, const char *key, int64_t fallback,
                          int64_t min, int64_t max, const char *path)
{
    const json_t *value = get(object, key);

    *out = fallback;
    if (!value) return MLORA_OK;
    if (!json_is_integer(value))
        return error_set(MLORA_EFORMAT, "%s: %s is %s, an integer is needed", path, key,
                         json_kind(value));
    *out = json_integer_value(value);
    if (*out < min || *out > max)
        return error_set(MLORA_EFORMAT, "%s: %s is %lld, must be from %lld to %lld", path, key,
                         (long long)*out, (long long)min, (long long)max);
    return MLORA_OK;
}

mlora_status json_get_double(double *out, const json_t *object, const char *key, double fallback,
                             double min, double max, const char *path)
{
    const json_t *value = get(object, key);

    *out = fallback;
    if (!value) return MLORA_OK;
    if (!json_is_number(value))
        return error_set(MLORA_EFORMAT, "%s: %s is %s, a number is needed", path, key,
                         json_kind(value));
    *out = json_number_value(value);
    if (!(*out >= min && *out <= max))
        return error_set(MLORA_EFORMAT, "%s: %s is %g, must be from %g to %g", path, key, *out, min,
                         max);
    return MLORA_OK;
}

mlora_status json_get_bool(bool *out, const json_t *object, const char *key, bool fallback,
                           const char *path)
{
    const json_t *value = get(object, key);

    *out = fallback;
    if (!value) return MLORA_OK;
    if (!json_is_boolean(value))
        return error_set(MLORA_EFORMAT, "%s: %s is %s, true or false is needed", path, key,
                         json_kind(value));
    *out = json_is_true(value);
    return MLORA_OK;
}

mlora_status json_get_string(const char **out, const json_t *object, const char *key,
                             const char *fallback, const char *path)
{
    const json_t *value = get(object, key);

    *out = fallback;
    if (!value) return MLORA_OK;
    if (!json_is_string(value))
        return error_set(MLORA_EFORMAT, "%s: %s is %s, a string is needed", path, key,
                         json_kind(value));
    *out = json_string_value(value);
    return MLORA_OK;
}
