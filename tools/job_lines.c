/* Jobs from JSON lines: {"adapter": "sql", "prompt": "...", "max_tokens": 64}. Every field is
 * checked here, so that a message can name the line; sampling fields by the flags' own table. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tools/job.h"
#include "tools/text.h"

static mlora_status read_id_array(struct job *job, const json_t *value, const char *where)
{
    const size_t n = json_array_size(value); /* 0 if it is not an array */

    if (n == 0 || n > INT32_MAX / 8)
        return error_set(MLORA_EINVAL, "%s: ids is %s, an array of token ids is needed", where,
                         json_is_array(value) ? "empty" : json_kind(value));
    job->ids = malloc(n * sizeof *job->ids);
    if (!job->ids) return error_set(MLORA_ENOMEM, "out of memory: %zu ids", n);
    job->n_ids = (int)n;
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(value, i);
        if (!json_is_integer(id))
            return error_set(MLORA_EINVAL, "%s: ids[%zu] is %s, an integer is needed", where, i,
                             json_kind(id));
        if (json_integer_value(id) < 0 || json_integer_value(id) > INT32_MAX)
            return error_set(MLORA_EINVAL, "%s: ids[%zu] is %lld, must be an id of the vocabulary",
                             where, i, (long long)json_integer_value(id));
        job->ids[i] = (int32_t)json_integer_value(id);
    }
    return MLORA_OK;
}

static mlora_status read_messages(struct job *job, const json_t *value, const char *where)
{
    const size_t n = json_array_size(value);

    if (n == 0 || n > INT32_MAX / 8)
        return error_set(MLORA_EINVAL,
                         "%s: messages is %s, an array of {\"role\", \"content\"} "
                         "is needed",
                         where, json_is_array(value) ? "empty" : json_kind(value));
    job->messages = calloc(n, sizeof *job->messages);
    if (!job->messages) return error_set(MLORA_ENOMEM, "out of memory: %zu messages", n);
    job->n_messages = (int)n;
    for (size_t i = 0; i < n; i++) {
        const json_t *message = json_array_get(value, i);
        const char *role = json_string_value(json_object_get(message, "role"));
        const char *content = json_string_value(json_object_get(message, "content"));
        if (!role || !content || json_object_size(message) != 2)
            return error_set(MLORA_EINVAL,
                             "%s: messages[%zu] must be an object with the strings "
                             "\"role\" and \"content\", and nothing else",
                             where, i);
        job->messages[i] = (mlora_message){role, content};
    }
    return MLORA_OK;
}

static mlora_status read_adapter(struct job *job, const json_t *value, const char *where)
{
    free(job->adapter);
    job->adapter = NULL;
    if (json_is_null(value)) return MLORA_OK;
    if (!json_is_string(value))
        return error_set(MLORA_EINVAL, "%s: adapter is %s, a name or null is needed", where,
                         json_kind(value));
    const char *name = json_string_value(value);
    if (!*name || strcmp(name, "base") == 0) return MLORA_OK;
    job->adapter = strdup(name);
    return job->adapter ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory");
}

static mlora_status refuse_field(const char *key, const char *where)
{
    static const char *const others[] = {"adapter", "prompt", "messages", "ids"};
    struct nearest nearest = {.wanted = key};
    char names[16][32]; /* of the sampling fields, with underscores */

    for (size_t i = 0; i < sizeof others / sizeof *others; i++) nearest_offer(&nearest, others[i]);
    for (int i = 0; i < 16 && sampling_specs[i].name; i++) {
        snprintf(names[i], sizeof names[i], "%s", sampling_specs[i].name);
        for (char *c = names[i]; *c; c++)
            if (*c == '-') *c = '_';
        nearest_offer(&nearest, names[i]);
    }
    if (nearest.best)
        return error_set(MLORA_EINVAL, "%s: unknown field \"%s\"; did you mean \"%s\"?", where, key,
                         nearest.best);
    return error_set(MLORA_EINVAL, "%s: unknown field \"%s\"; mlora generate --help lists them",
                     where, key);
}

static mlora_status read_field(struct job *job, const char *key, const json_t *value,
                               const char *where)
{
    bool known;

    if (strcmp(key, "adapter") == 0) return read_adapter(job, value, where);
    if (strcmp(key, "ids") == 0) return read_id_array(job, value, where);
    if (strcmp(key, "messages") == 0) return read_messages(job, value, where);
    if (strcmp(key, "prompt") == 0) {
        if (!json_is_string(value))
            return error_set(MLORA_EINVAL, "%s: prompt is %s, a string is needed", where,
                             json_kind(value));
        job->has_prompt = true;
        return buffer_append(&job->prompt, json_string_value(value), json_string_length(value));
    }
    const mlora_status status =
        options_set_json(sampling_specs, &job->sampling, key, value, where, &known);
    return known ? status : refuse_field(key, where);
}

static mlora_status read_line(struct job *job, const char *line, size_t bytes, const char *where)
{
    json_error_t error;
    const char *key;
    json_t *value;

    job->line = json_loadb(line, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!job->line)
        return error_set(MLORA_EINVAL, "%s: is not JSON: column %d: %s", where, error.column,
                         error.text);
    if (!json_is_object(job->line))
        return error_set(MLORA_EINVAL,
                         "%s: holds %s, an object such as {\"prompt\": \"...\"} is "
                         "needed",
                         where, json_kind(job->line));
    json_object_foreach(job->line, key, value)
    {
        const mlora_status status = read_field(job, key, value, where);
        if (status != MLORA_OK) return status;
    }
    if (job->has_prompt + (job->ids != NULL) + (job->messages != NULL) != 1)
        return error_set(MLORA_EINVAL, "%s: one of prompt, messages and ids is needed", where);
    return MLORA_OK;
}

mlora_status jobs_add_lines(struct jobs *jobs, const struct buffer *text, const char *path,
                            const char *adapter)
{
    const char *at = buffer_text(text), *end = at + text->bytes;
    const bool standard = strcmp(path, "-") == 0;
    char where[512];

    for (int number = 1; at < end; number++) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        const size_t bytes = (size_t)((newline ? newline : end) - at);
        if (strspn(at, " \t\r") < bytes) { /* not blank */
            snprintf(where, sizeof where, "%s line %d", standard ? "stdin" : path, number);
            struct job *job = jobs_add(jobs, adapter, where);
            if (!job) return error_set(MLORA_ENOMEM, "out of memory for %s", where);
            const mlora_status status = read_line(job, at, bytes, where);
            if (status != MLORA_OK) return status;
        }
        at += bytes + 1;
    }
    return MLORA_OK;
}
