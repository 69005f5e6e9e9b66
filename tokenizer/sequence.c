#include "tokenizer/sequence.h"

#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"

enum { DEPTH_MAX = 8 };

static mlora_status read_nested(struct sequence_reader *reader, const json_t *value, int depth,
                                const char *path)
{
    const char *type = json_string_value(json_object_get(value, "type"));
    mlora_status status = MLORA_OK;

    if (depth > DEPTH_MAX)
        return error_set(MLORA_EFORMAT, "%s: %s is nested more than %d deep", path, reader->what,
                         DEPTH_MAX);
    if (!type)
        return error_set(MLORA_EFORMAT, "%s: %s has no type, a name such as \"Sequence\" is needed",
                         path, reader->what);
    if (strcmp(type, "Sequence") != 0) {
        if (reader->n++ == SEQUENCE_STEPS_MAX)
            return error_set(MLORA_EFORMAT, "%s: %s has more than %d steps", path, reader->what,
                             SEQUENCE_STEPS_MAX);
        return reader->read(reader->out, type, value, path);
    }

    const json_t *list = json_object_get(value, reader->list);
    if (!json_is_array(list))
        return error_set(MLORA_EFORMAT, "%s: %s Sequence: %s is %s, an array is needed", path,
                         reader->what, reader->list, json_kind(list));
    for (size_t i = 0; i < json_array_size(list) && status == MLORA_OK; i++)
        status = read_nested(reader, json_array_get(list, i), depth + 1, path);
    return status;
}

mlora_status sequence_read(struct sequence_reader *reader, const json_t *value, const char *path)
{
    return read_nested(reader, value, 0, path);
}
