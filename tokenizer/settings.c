#include "tokenizer/settings.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"
#include "tokenizer/unicode.h"

enum { BYTES_MAX = 32 * 1024 * 1024, TEMPLATE_BYTES_MAX = 1024 * 1024 };

static mlora_status copy(char **out, const char *text)
{
    free(*out);
    *out = strdup(text);
    return *out ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory: %zu bytes", strlen(text));
}

/* Read `directory/name` if it is there; `*out` stays NULL if not. */
static mlora_status read_optional(json_t **out, char **path, const char *directory,
                                  const char *name)
{
    *out = NULL;
    *path = path_join(directory, name);
    if (!*path) return error_set(MLORA_ENOMEM, "out of memory: a path");
    return file_exists(*path) ? json_read_file(out, *path, BYTES_MAX) : MLORA_OK;
}

/* A token is "<s>" or {"content": "<s>", ...}. */
static mlora_status read_token(char **out, const json_t *json, const char *key, const char *path)
{
    const json_t *value = json_object_get(json, key);
    if (*out || !value || json_is_null(value)) return MLORA_OK; /* the first file wins */
    if (json_is_object(value)) value = json_object_get(value, "content");
    if (!json_is_string(value))
        return error_set(MLORA_EFORMAT,
                         "%s: %s is %s, a string or an object with a content is "
                         "needed",
                         path, key, json_kind(value));
    return copy(out, json_string_value(value));
}

/* A template, or a list of {"name", "template"} of which "default" is meant. */
static mlora_status read_template(char **out, const json_t *json, const char *path)
{
    const json_t *value = json_object_get(json, "chat_template");
    if (*out || !value || json_is_null(value)) return MLORA_OK;
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *entry = json_array_get(value, i);
        const char *name = json_string_value(json_object_get(entry, "name"));
        const char *text = json_string_value(json_object_get(entry, "template"));
        if (name && text && strcmp(name, "default") == 0) return copy(out, text);
    }
    if (json_is_array(value)) return MLORA_OK; /* none is the default */
    if (!json_is_string(value))
        return error_set(MLORA_EFORMAT, "%s: chat_template is %s, a string or a list is needed",
                         path, json_kind(value));
    return copy(out, json_string_value(value));
}

static mlora_status add_token(struct settings *settings, const char *text)
{
    char **added =
        realloc(settings->added, ((size_t)settings->n_added + 1) * sizeof *settings->added);
    if (!added) return error_set(MLORA_ENOMEM, "out of memory: added tokens");
    settings->added = added;
    added[settings->n_added] = strdup(text);
    if (!added[settings->n_added]) return error_set(MLORA_ENOMEM, "out of memory: added tokens");
    settings->n_added++;
    return MLORA_OK;
}

static mlora_status read_config(struct settings *out, json_t *json, const char *path)
{
    json_t *tokens = json_object_get(json, "added_tokens_decoder"), *token;
    const char *id;

    mlora_status status = read_token(&out->bos_text, json, "bos_token", path);
    if (status == MLORA_OK) status = read_token(&out->eos_text, json, "eos_token", path);
    if (status == MLORA_OK)
        status = json_get_bool(&out->adds_bos, json, "add_bos_token", true, path);
    if (status == MLORA_OK)
        status = json_get_bool(&out->adds_eos, json, "add_eos_token", false, path);
    if (status == MLORA_OK) status = json_get_bool(&out->legacy, json, "legacy", false, path);
    if (status == MLORA_OK) status = read_template(&out->chat_template, json, path);
    json_object_foreach(tokens, id, token)
    {
        const char *content = json_string_value(json_object_get(token, "content"));
        if (content && status == MLORA_OK) status = add_token(out, content);
    }
    return status;
}

static mlora_status read_template_file(struct settings *out, const char *directory)
{
    struct buffer text = {0};
    char *path = path_join(directory, "chat_template.jinja");
    if (!path) return error_set(MLORA_ENOMEM, "out of memory: a path");

    mlora_status status = MLORA_OK;
    if (file_exists(path)) {
        status = file_read_all(&text, path, TEMPLATE_BYTES_MAX);
        if (status == MLORA_OK && (!utf8_valid(buffer_text(&text), text.bytes) ||
                                   strlen(buffer_text(&text)) != text.bytes))
            status = error_set(MLORA_EFORMAT, "%s: is not UTF-8 text", path);
        if (status == MLORA_OK) status = copy(&out->chat_template, buffer_text(&text));
    }
    buffer_free(&text);
    free(path);
    return status;
}

mlora_status settings_read(struct settings *out, const char *directory)
{
    json_t *config = NULL, *map = NULL, *added = NULL, *id;
    char *config_path = NULL, *map_path = NULL, *added_path = NULL;
    const char *text;

    *out = (struct settings){.adds_bos = true};
    mlora_status status = read_template_file(out, directory);
    if (status == MLORA_OK)
        status = read_optional(&config, &config_path, directory, "tokenizer_config.json");
    if (status == MLORA_OK && config) status = read_config(out, config, config_path);
    if (status == MLORA_OK)
        status = read_optional(&map, &map_path, directory, "special_tokens_map.json");
    if (status == MLORA_OK) status = read_token(&out->bos_text, map, "bos_token", map_path);
    if (status == MLORA_OK) status = read_token(&out->eos_text, map, "eos_token", map_path);
    if (status == MLORA_OK)
        status = read_optional(&added, &added_path, directory, "added_tokens.json");
    json_object_foreach(added, text, id)
    {
        if (status == MLORA_OK) status = add_token(out, text);
    }
    json_decref(config);
    json_decref(map);
    json_decref(added);
    free(config_path);
    free(map_path);
    free(added_path);
    return status;
}

void settings_free(struct settings *settings)
{
    for (int i = 0; i < settings->n_added; i++) free(settings->added[i]);
    free(settings->added);
    free(settings->bos_text);
    free(settings->eos_text);
    free(settings->chat_template);
    *settings = (struct settings){0};
}
