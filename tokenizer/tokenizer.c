#include "tokenizer/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "tokenizer/inside.h"
#include "tokenizer/settings.h"
#include "tokenizer/unicode.h"

mlora_status ids_push(struct ids *ids, int32_t id)
{
    if (ids->n == ids->capacity) {
        if (ids->capacity > INT32_MAX / 2)
            return error_set(MLORA_ENOMEM, "more than %d token ids", ids->capacity);
        const int capacity = ids->capacity ? 2 * ids->capacity : 64;
        int32_t *data = realloc(ids->data, (size_t)capacity * sizeof *data);
        if (!data) return error_set(MLORA_ENOMEM, "out of memory: %d token ids", capacity);
        ids->data = data;
        ids->capacity = capacity;
    }
    ids->data[ids->n++] = id;
    return MLORA_OK;
}

void ids_free(struct ids *ids)
{
    free(ids->data);
    *ids = (struct ids){0};
}

/* ---- opening ------------------------------------------------------------------------------ */

/* The file that `path` means, and the directory whose other files belong to it. Both fresh. */
static mlora_status choose_file(char **file, char **directory, const char *path)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer.model"};

    *file = *directory = NULL;
    if (file_is_directory(path)) {
        *directory = strdup(path);
        for (int i = 0; i < 2; i++) {
            *file = path_join(path, names[i]);
            if (!*file || !*directory) return error_set(MLORA_ENOMEM, "out of memory: a path");
            if (file_exists(*file)) return MLORA_OK;
            free(*file);
            *file = NULL;
        }
        return error_set(MLORA_EIO,
                         "%s: has neither tokenizer.json nor tokenizer.model; name a "
                         "tokenizer with --tokenizer FILE",
                         path);
    }
    const char *slash = strrchr(path, '/');
    *file = strdup(path);
    *directory = slash ? strndup(path, (size_t)(slash - path) + 1) : strdup(".");
    return *file && *directory ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory: a path");
}

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), n_end = strlen(end);
    return n >= n_end && strcmp(text + n - n_end, end) == 0;
}

/* JSON by name, or else by its first character: a .model begins with the tag of a field. */
static mlora_status is_json_file(bool *out, const char *path)
{
    struct file file = {0};
    char first[64] = {0};

    *out = ends_with(path, ".json");
    if (*out || ends_with(path, ".model")) return MLORA_OK;
    mlora_status status = file_open(&file, path);
    if (status != MLORA_OK) return status;
    const size_t bytes =
        file.bytes < (int64_t)sizeof first - 1 ? (size_t)file.bytes : sizeof first - 1;
    status = file_read_at(&file, first, bytes, 0);
    *out = first[strspn(first, " \t\r\n")] == '{';
    file_close(&file);
    return status;
}

/* tokenizer.model knows its own pieces only. */
static mlora_status check_added(const struct sentencepiece *model, const struct settings *settings,
                                const char *path)
{
    for (int i = 0; i < settings->n_added; i++) {
        const char *text = settings->added[i];
        if (sentencepiece_find(model, text, strlen(text)) >= 0) continue;
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: the added token \"%.64s\" of added_tokens.json or "
                         "tokenizer_config.json is not in the model; save the tokenizer as "
                         "tokenizer.json",
                         path, text);
    }
    return MLORA_OK;
}

/* Take over the name of the begin or end token, where none is configured that of tokenizer.model. */
static mlora_status take_name(char **out, char **configured, const char *fallback)
{
    *out = *configured;
    *configured = NULL;
    if (*out || !fallback) return MLORA_OK;
    *out = strdup(fallback);
    return *out ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory: a token's name");
}

static int32_t find_name(const struct tokenizer *tokenizer, const char *name)
{
    return name ? tokenizer_find(tokenizer, name, strlen(name)) : -1;
}

static mlora_status take_ends(struct tokenizer *tokenizer, struct settings *settings)
{
    const struct sentencepiece *model = &tokenizer->model;
    const char *bos = model->bos_text ? model->bos_text : "<s>";
    const char *eos = model->eos_text ? model->eos_text : "</s>";
    const bool json = tokenizer->is_json;

    mlora_status status = take_name(&tokenizer->bos_text, &settings->bos_text, json ? NULL : bos);
    if (status == MLORA_OK)
        status = take_name(&tokenizer->eos_text, &settings->eos_text, json ? NULL : eos);
    tokenizer->bos = find_name(tokenizer, tokenizer->bos_text);
    tokenizer->eos = find_name(tokenizer, tokenizer->eos_text);
    tokenizer->adds_bos = settings->adds_bos && tokenizer->bos >= 0;
    tokenizer->adds_eos = settings->adds_eos && tokenizer->eos >= 0;
    return status;
}

mlora_status tokenizer_open(struct tokenizer **out, const char *path)
{
    struct settings settings = {0};
    char *file = NULL, *directory = NULL;
    struct tokenizer *tokenizer = calloc(1, sizeof *tokenizer);

    *out = NULL;
    if (!tokenizer) return error_set(MLORA_ENOMEM, "out of memory: a tokenizer");
    mlora_status status = choose_file(&file, &directory, path);
    if (status == MLORA_OK) status = is_json_file(&tokenizer->is_json, file);
    if (status == MLORA_OK)
        status = tokenizer->is_json ? hf_read(&tokenizer->hf, file)
                                    : sentencepiece_read(&tokenizer->model, file);
    if (status == MLORA_OK) status = settings_read(&settings, directory);
    if (status == MLORA_OK && !tokenizer->is_json) {
        status = check_added(&tokenizer->model, &settings, file);
        tokenizer->model.prefix_after_control = settings.legacy;
    }
    if (status == MLORA_OK) status = take_ends(tokenizer, &settings);
    if (status == MLORA_OK) {
        tokenizer->chat_template = settings.chat_template;
        settings.chat_template = NULL;
        *out = tokenizer;
        tokenizer = NULL;
    }
    settings_free(&settings);
    free(file);
    free(directory);
    tokenizer_close(tokenizer);
    return status;
}

void tokenizer_close(struct tokenizer *tokenizer)
{
    if (!tokenizer) return;
    hf_free(&tokenizer->hf);
    sentencepiece_free(&tokenizer->model);
    free(tokenizer->bos_text);
    free(tokenizer->eos_text);
    free(tokenizer->chat_template);
    free(tokenizer);
}

/* ---- text and ids --------------------------------------------------------------------------- */

static mlora_status encode_valid(const struct tokenizer *tokenizer, struct ids *out,
                                 const char *text, size_t bytes, int flags)
{
    if (tokenizer->is_json) return hf_encode(&tokenizer->hf, out, text, bytes, flags, NULL);

    const bool ends = !(flags & ENCODE_NO_SPECIAL);
    mlora_status status = MLORA_OK;
    if (ends && tokenizer->adds_bos) status = ids_push(out, tokenizer->bos);
    if (status == MLORA_OK)
        status = sentencepiece_encode(&tokenizer->model, out, text, bytes, NULL);
    if (ends && tokenizer->adds_eos && status == MLORA_OK) status = ids_push(out, tokenizer->eos);
    return status;
}

mlora_status tokenizer_encode(const struct tokenizer *tokenizer, struct ids *out, const char *text,
                              size_t bytes, int flags)
{
    struct buffer repaired = {0};

    if (utf8_valid(text, bytes)) return encode_valid(tokenizer, out, text, bytes, flags);
    mlora_status status = utf8_append_each(&repaired, text, bytes);
    if (status == MLORA_OK)
        status = encode_valid(tokenizer, out, repaired.data, repaired.bytes, flags);
    buffer_free(&repaired);
    return status;
}

mlora_status tokenizer_encode_chat(const struct tokenizer *tokenizer, struct ids *out,
                                   const char *text, size_t bytes, const char *written)
{
    if (tokenizer->is_json)
        return hf_encode(&tokenizer->hf, out, text, bytes, ENCODE_NO_SPECIAL, written);
    return sentencepiece_encode(&tokenizer->model, out, text, bytes, written);
}

mlora_status tokenizer_decode(const struct tokenizer *tokenizer, struct buffer *out,
                              const int32_t *ids, int n, bool keep_special)
{
    const int n_ids = tokenizer_vocab_size(tokenizer);
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_ids)
            return error_set(MLORA_EINVAL, "token id %d is outside the vocabulary of %d",
                             (int)ids[i], n_ids);
    if (tokenizer->is_json) return hf_decode(&tokenizer->hf, out, ids, n, keep_special);
    return sentencepiece_decode(&tokenizer->model, out, ids, n, keep_special);
}

mlora_status tokenizer_piece(const struct tokenizer *tokenizer, struct buffer *out, int32_t id)
{
    if (id < 0 || id >= tokenizer_vocab_size(tokenizer)) return MLORA_OK;
    return tokenizer->is_json ? hf_piece(&tokenizer->hf, out, id)
                              : sentencepiece_piece(&tokenizer->model, out, id);
}

int tokenizer_vocab_size(const struct tokenizer *tokenizer)
{
    return tokenizer->is_json ? tokenizer->hf.n_ids : tokenizer->model.n_ids;
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t tokenizer_eos(const struct tokenizer *tokenizer)
{
    return tokenizer->eos;
}

int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *text, size_t bytes)
{
    return tokenizer->is_json ? hf_find(&tokenizer->hf, text, bytes)
                              : sentencepiece_find(&tokenizer->model, text, bytes);
}

const char *tokenizer_chat_template(const struct tokenizer *tokenizer)
{
    return tokenizer->chat_template;
}
