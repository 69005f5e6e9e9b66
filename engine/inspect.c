#include "engine/inspect.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"
#include "engine/inspect_parts.h"

enum { CONFIG_BYTES_MAX = 16 << 20 };

/* ---- building ----------------------------------------------------------------------------- */

void describe(struct description *object, const char *key, json_t *value)
{
    if (json_object_set_new(object->json, key, value) != 0) object->failed = true;
}

json_t *description_text(const char *text)
{
    json_t *value = text ? json_string(text) : json_null();
    if (value || !text) return value;

    char *ascii = strdup(text);
    if (!ascii) return NULL;
    for (char *c = ascii; *c; c++)
        if ((unsigned char)*c >= 0x80) *c = '?';
    value = json_string(ascii);
    free(ascii);
    return value;
}

void describe_text(struct description *object, const char *key, const char *text)
{
    describe(object, key, description_text(text));
}

void describe_integer(struct description *object, const char *key, int64_t value)
{
    describe(object, key, json_integer(value));
}

void describe_number(struct description *object, const char *key, double value)
{
    describe(object, key, json_real(value));
}

void describe_bool(struct description *object, const char *key, bool value)
{
    describe(object, key, json_boolean(value));
}

void describe_once(struct description *object, json_t *array, json_t *value)
{
    for (size_t i = 0; i < json_array_size(array); i++)
        if (value && json_equal(json_array_get(array, i), value)) {
            json_decref(value);
            return;
        }
    if (json_array_append_new(array, value) != 0) object->failed = true;
}

static int append_bytes(const char *bytes, size_t n, void *buffer)
{
    return buffer_append(buffer, bytes, n) == MLORA_OK ? 0 : -1;
}

static mlora_status finish(struct buffer *json, const struct description *object, const char *dir)
{
    /* 9 digits give every f32 back */
    if (!object->failed && json_dump_callback(object->json, append_bytes, json,
                                              JSON_INDENT(2) | JSON_REAL_PRECISION(9)) == 0)
        return MLORA_OK;
    return error_set(MLORA_ENOMEM, "%s: out of memory for its description", dir);
}

bool directory_has(const char *dir, const char *name)
{
    char *path = path_join(dir, name);
    const bool exists = path && file_exists(path);
    free(path);
    return exists;
}

mlora_status directory_json(json_t **out, const char *dir, const char *name)
{
    char *path = path_join(dir, name);
    if (!path) return error_set(MLORA_ENOMEM, "%s: out of memory for a path", dir);
    const mlora_status status = json_read_file(out, path, CONFIG_BYTES_MAX);
    free(path);
    return status;
}

/* ---- a directory -------------------------------------------------------------------------- */

mlora_status inspect_directory(struct buffer *json, const char *dir, const char *model_dir)
{
    struct description object = {0};
    mlora_status status;

    if (!file_is_directory(dir))
        return error_set(MLORA_EIO,
                         "%s: is not a directory; give the directory of a model or of "
                         "an adapter",
                         dir);
    object.json = json_object();
    if (!object.json) return error_set(MLORA_ENOMEM, "%s: out of memory", dir);
    if (directory_has(dir, "adapter_config.json"))
        status = inspect_adapter(&object, dir, model_dir);
    else if (directory_has(dir, "config.json"))
        status = inspect_model(&object, dir);
    else
        status = error_set(MLORA_EIO,
                           "%s: has neither config.json nor adapter_config.json; give "
                           "the directory of a model or of an adapter",
                           dir);
    if (status == MLORA_OK) status = finish(json, &object, dir);
    json_decref(object.json);
    return status;
}
