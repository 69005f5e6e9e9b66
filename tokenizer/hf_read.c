/* Reading tokenizer.json: what changes ids or text is understood or refused by name, the rest
 * (offsets, padding, truncation) is left aside. */
#include "tokenizer/hf.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"

enum { JSON_BYTES_MAX = 256 * 1024 * 1024, ADDED_MAX = 1 << 20, DEPTH_MAX = 8 };

/* ---- model -------------------------------------------------------------------------------- */

/* Refuse a model setting that is not null, false, 0 or empty: it would change the ids. */
static mlora_status check_unset(const json_t *model, const char *key, const char *path)
{
    const json_t *value = json_object_get(model, key);
    if (!value || json_is_null(value) || json_is_false(value)) return MLORA_OK;
    if (json_is_number(value) && json_number_value(value) == 0) return MLORA_OK;
    if (json_is_string(value) && json_string_length(value) == 0) return MLORA_OK;
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: model.%s is set, which is not supported; it must be "
                     "null",
                     path, key);
}

static mlora_status read_vocab(struct bpe *bpe, const json_t *model, const char *path)
{
    json_t *vocab = json_object_get(model, "vocab");
    const char *text;
    json_t *id;

    if (!json_is_object(vocab) || json_object_size(vocab) == 0)
        return error_set(MLORA_EFORMAT, "%s: model.vocab is %s, an object of tokens is needed",
                         path, json_object_size(vocab) ? json_kind(vocab) : "empty or missing");
    if (json_object_size(vocab) > VOCAB_ID_MAX)
        return error_set(MLORA_EFORMAT, "%s: model.vocab has %zu tokens, at most %d are taken",
                         path, json_object_size(vocab), VOCAB_ID_MAX);
    mlora_status status = vocab_reserve(&bpe->vocab, (int)json_object_size(vocab));
    json_object_foreach(vocab, text, id)
    {
        if (status == MLORA_OK && !json_is_integer(id))
            return error_set(MLORA_EFORMAT,
                             "%s: model.vocab: the id of \"%.64s\" is %s, an "
                             "integer is needed",
                             path, text, json_kind(id));
        if (status == MLORA_OK)
            status = vocab_add(&bpe->vocab, text, strlen(text), json_integer_value(id));
        if (status != MLORA_OK) return error_prefix(status, "%s: model.vocab", path);
    }
    return status;
}

/* A merge is "left right" or ["left", "right"]. */
static mlora_status read_merge(struct bpe *bpe, const json_t *merge, uint32_t rank,
                               const char *path)
{
    const json_t *left = json_array_get(merge, 0), *right = json_array_get(merge, 1);
    const char *text = json_string_value(merge);
    const char *space = text ? strchr(text, ' ') : NULL;
    mlora_status status;

    if (json_array_size(merge) == 2 && json_is_string(left) && json_is_string(right))
        status = bpe_add_merge(bpe, rank, json_string_value(left), json_string_length(left),
                               json_string_value(right), json_string_length(right));
    else if (space && !strchr(space + 1, ' '))
        status =
            bpe_add_merge(bpe, rank, text, (size_t)(space - text), space + 1, strlen(space + 1));
    else
        return error_set(MLORA_EFORMAT,
                         "%s: model.merges[%u] is neither \"left right\" nor "
                         "[\"left\", \"right\"]",
                         path, rank);
    return status == MLORA_OK ? status : error_prefix(status, "%s: model", path);
}

static mlora_status read_model(struct bpe *bpe, const json_t *model, const char *path)
{
    const char *type, *unknown;
    const json_t *merges = json_object_get(model, "merges");

    if (!json_is_object(model))
        return error_set(MLORA_EFORMAT,
                         "%s: model is %s, an object is needed; is this a "
                         "tokenizer.json?",
                         path, json_kind(model));
    mlora_status status = json_get_string(&type, model, "type", NULL, path);
    if (status == MLORA_OK && type && strcmp(type, "BPE") != 0)
        status = error_set(MLORA_EUNSUPPORTED,
                           "%s: model.type is \"%.64s\", only BPE is "
                           "supported",
                           path, type);
    if (status == MLORA_OK) status = check_unset(model, "dropout", path);
    if (status == MLORA_OK) status = check_unset(model, "continuing_subword_prefix", path);
    if (status == MLORA_OK) status = check_unset(model, "end_of_word_suffix", path);
    if (status == MLORA_OK)
        status = json_get_bool(&bpe->fuse_unknown, model, "fuse_unk", false, path);
    if (status == MLORA_OK)
        status = json_get_bool(&bpe->byte_fallback, model, "byte_fallback", false, path);
    if (status == MLORA_OK)
        status = json_get_bool(&bpe->ignore_merges, model, "ignore_merges", false, path);
    if (status == MLORA_OK) status = json_get_string(&unknown, model, "unk_token", NULL, path);
    if (status == MLORA_OK) status = read_vocab(bpe, model, path);
    if (status != MLORA_OK) return status;

    bpe->unknown = unknown ? vocab_find(&bpe->vocab, unknown, strlen(unknown)) : -1;
    if (unknown && bpe->unknown < 0)
        return error_set(MLORA_EFORMAT, "%s: model.unk_token \"%.64s\" is not in model.vocab", path,
                         unknown);
    if (!json_is_array(merges))
        return error_set(MLORA_EFORMAT, "%s: model.merges is %s, an array is needed", path,
                         json_kind(merges));
    status = bpe_reserve_merges(bpe, json_array_size(merges));
    for (size_t i = 0; i < json_array_size(merges) && status == MLORA_OK; i++)
        status = read_merge(bpe, json_array_get(merges, i), (uint32_t)i, path);
    if (status == MLORA_OK) bpe_index(bpe);
    return status;
}

/* ---- added tokens --------------------------------------------------------------------------- */

static mlora_status read_added_token(struct added_token *out, const json_t *value,
                                     const struct normalizer *normalizer, const char *path)
{
    const char *content;
    int64_t id;
    struct buffer pattern = {0};
    bool moved;

    if (!json_is_object(value))
        return error_set(MLORA_EFORMAT, "%s: an entry of added_tokens is %s, an object is needed",
                         path, json_kind(value));
    mlora_status status = json_get_string(&content, value, "content", "", path);
    if (status == MLORA_OK) status = json_get_int(&id, value, "id", -1, -1, VOCAB_ID_MAX, path);
    if (status == MLORA_OK)
        status = json_get_bool(&out->single_word, value, "single_word", false, path);
    if (status == MLORA_OK) status = json_get_bool(&out->lstrip, value, "lstrip", false, path);
    if (status == MLORA_OK) status = json_get_bool(&out->rstrip, value, "rstrip", false, path);
    if (status == MLORA_OK)
        status = json_get_bool(&out->normalized, value, "normalized", true, path);
    if (status == MLORA_OK) status = json_get_bool(&out->special, value, "special", false, path);
    if (status != MLORA_OK) return error_prefix(status, "added_tokens");

    out->id = (int32_t)id;
    out->bytes = strlen(content);
    out->text = strdup(content);
    if (!out->text) return error_set(MLORA_ENOMEM, "out of memory: added tokens");
    if (out->normalized)
        status = normalizer_apply(normalizer, &pattern, content, out->bytes, NULL, NULL, &moved);
    else
        status = buffer_append(&pattern, content, out->bytes);
    out->pattern = pattern.data;
    out->pattern_bytes = pattern.bytes;
    return status;
}

/* The reference gives a token that the vocabulary lacks the next free id, whatever the file says;
 * a file in which the two differ would be read differently by different programs. */
static mlora_status check_added_id(struct hf *hf, const struct added_token *token, int64_t *next,
                                   const char *path)
{
    const int32_t known = vocab_find(&hf->bpe.vocab, token->text, token->bytes);
    const int64_t id = known >= 0 ? known : *next;
    if (id != token->id)
        return error_set(MLORA_EFORMAT,
                         "%s: added token \"%.64s\" has id %d, but its place in "
                         "the vocabulary is %lld",
                         path, token->text, (int)token->id, (long long)id);
    if (known < 0) *next = id + 1;
    if (id >= hf->n_ids) hf->n_ids = (int)id + 1;
    return MLORA_OK;
}

static mlora_status index_added(struct hf *hf)
{
    hf->added_of = malloc((size_t)hf->n_ids * sizeof *hf->added_of);
    hf->bpe.is_special = calloc((size_t)hf->bpe.vocab.n_ids, 1);
    if (!hf->added_of || !hf->bpe.is_special)
        return error_set(MLORA_ENOMEM, "out of memory: %d token ids", hf->n_ids);
    memset(hf->added_of, 0xff, (size_t)hf->n_ids * sizeof *hf->added_of);
    for (int i = 0; i < hf->added.n; i++) {
        const struct added_token *token = &hf->added.tokens[i];
        hf->added_of[token->id] = i;
        if (token->special && token->id < hf->bpe.vocab.n_ids) hf->bpe.is_special[token->id] = 1;
    }
    const mlora_status status = added_search_build(&hf->raw, &hf->added, false);
    return status == MLORA_OK ? added_search_build(&hf->normalized, &hf->added, true) : status;
}

static mlora_status read_added(struct hf *hf, const json_t *list, const char *path)
{
    const size_t n = json_array_size(list);
    int64_t next = hf->bpe.vocab.n; /* the reference counts tokens, it does not look for gaps */

    hf->n_ids = hf->bpe.vocab.n_ids;
    if (list && !json_is_null(list) && !json_is_array(list))
        return error_set(MLORA_EFORMAT, "%s: added_tokens is %s, an array is needed", path,
                         json_kind(list));
    if (n > ADDED_MAX)
        return error_set(MLORA_EFORMAT, "%s: added_tokens has %zu entries, at most %d are taken",
                         path, n, ADDED_MAX);
    hf->added.tokens = calloc(n + 1, sizeof *hf->added.tokens);
    if (!hf->added.tokens) return error_set(MLORA_ENOMEM, "out of memory: %zu added tokens", n);
    for (size_t i = 0; i < n; i++) {
        struct added_token *token = &hf->added.tokens[hf->added.n++];
        mlora_status status =
            read_added_token(token, json_array_get(list, i), &hf->normalizer, path);
        if (status == MLORA_OK && token->bytes == 0) { /* the reference passes over these */
            free(token->text);
            free(token->pattern);
            *token = (struct added_token){0};
            hf->added.n--;
            continue;
        }
        if (status == MLORA_OK) status = check_added_id(hf, token, &next, path);
        if (status != MLORA_OK) return status;
    }
    const mlora_status status = index_added(hf);
    return status == MLORA_OK ? status : error_prefix(status, "%s", path);
}

/* ---- post-processor ------------------------------------------------------------------------- */

/* Append the ids of the special token `name` of a TemplateProcessing. */
static mlora_status template_token(struct hf *hf, struct ids *out, const json_t *value,
                                   const char *name, const char *path)
{
    const json_t *token = json_object_get(json_object_get(value, "special_tokens"), name);
    const json_t *ids = json_object_get(token, "ids");
    mlora_status status = MLORA_OK;

    if (!json_is_array(ids))
        return error_set(MLORA_EFORMAT,
                         "%s: post_processor: special_tokens lacks the ids of "
                         "\"%.64s\"",
                         path, name);
    for (size_t i = 0; i < json_array_size(ids) && status == MLORA_OK; i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= hf->n_ids)
            return error_set(MLORA_EFORMAT,
                             "%s: post_processor: \"%.64s\" has an id that is not "
                             "in the vocabulary of %d",
                             path, name, hf->n_ids);
        status = ids_push(out, (int32_t)json_integer_value(id));
    }
    return status;
}

/* Read "single": special tokens before and after the one sequence, around what an earlier
 * processor has put there. */
static mlora_status read_template(struct hf *hf, const json_t *value, const char *path)
{
    const json_t *single = json_object_get(value, "single");
    struct ids before = {0}, after = {0};
    int n_sequences = 0;
    mlora_status status = MLORA_OK;

    if (!json_is_array(single))
        return error_set(MLORA_EFORMAT,
                         "%s: post_processor TemplateProcessing: single is %s, an "
                         "array is needed",
                         path, json_kind(single));
    for (size_t i = 0; i < json_array_size(single) && status == MLORA_OK; i++) {
        const json_t *part = json_array_get(single, i);
        const json_t *token = json_object_get(part, "SpecialToken");
        const json_t *sequence = json_object_get(part, "Sequence");
        const char *name = json_string_value(json_object_get(token ? token : sequence, "id"));
        if (token && name)
            status = template_token(hf, n_sequences ? &after : &before, value, name, path);
        else if (sequence && name && strcmp(name, "A") == 0)
            n_sequences++;
        else
            status = error_set(MLORA_EFORMAT,
                               "%s: post_processor TemplateProcessing: single[%zu] "
                               "is neither a SpecialToken nor the Sequence A",
                               path, i);
    }
    if (status == MLORA_OK && n_sequences != 1)
        status = error_set(MLORA_EUNSUPPORTED,
                           "%s: post_processor TemplateProcessing: single "
                           "holds the text %d times, must be once",
                           path, n_sequences);
    for (int i = 0; i < hf->prefix.n && status == MLORA_OK; i++)
        status = ids_push(&before, hf->prefix.data[i]);
    for (int i = 0; i < after.n && status == MLORA_OK; i++)
        status = ids_push(&hf->suffix, after.data[i]);
    ids_free(&after);
    ids_free(&hf->prefix);
    hf->prefix = before;
    return status;
}

static mlora_status read_post_processor(struct hf *hf, const json_t *value, int depth,
                                        const char *path)
{
    if (!value || json_is_null(value)) return MLORA_OK;
    if (depth > DEPTH_MAX)
        return error_set(MLORA_EFORMAT, "%s: post_processor is nested more than %d deep", path,
                         DEPTH_MAX);
    const char *type = json_string_value(json_object_get(value, "type"));
    if (!type)
        return error_set(MLORA_EFORMAT,
                         "%s: post_processor has no type, a name such as "
                         "\"TemplateProcessing\" is needed",
                         path);
    if (strcmp(type, "ByteLevel") == 0) return MLORA_OK; /* offsets only */
    if (strcmp(type, "TemplateProcessing") == 0) return read_template(hf, value, path);
    if (strcmp(type, "Sequence") == 0) {
        const json_t *list = json_object_get(value, "processors");
        if (!json_is_array(list))
            return error_set(MLORA_EFORMAT,
                             "%s: post_processor Sequence: processors is %s, an "
                             "array is needed",
                             path, json_kind(list));
        mlora_status status = MLORA_OK;
        for (size_t i = 0; i < json_array_size(list) && status == MLORA_OK; i++)
            status = read_post_processor(hf, json_array_get(list, i), depth + 1, path);
        return status;
    }
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: post_processor \"%.64s\" is not supported; known are Sequence, "
                     "TemplateProcessing and ByteLevel",
                     path, type);
}

/* ---- the file ----------------------------------------------------------------------------- */

mlora_status hf_read(struct hf *out, const char *path)
{
    json_t *json = NULL;
    const char *version;

    *out = (struct hf){0};
    mlora_status status = json_read_file(&json, path, JSON_BYTES_MAX);
    if (status != MLORA_OK) return status;

    status = json_get_string(&version, json, "version", "1.0", path);
    if (status == MLORA_OK && strcmp(version, "1.0") != 0)
        status = error_set(MLORA_EUNSUPPORTED, "%s: version is \"%.32s\", only 1.0 is known", path,
                           version);
    if (status == MLORA_OK)
        status = normalizer_read(&out->normalizer, json_object_get(json, "normalizer"), path);
    if (status == MLORA_OK)
        status =
            pretokenizer_read(&out->pretokenizer, json_object_get(json, "pre_tokenizer"), path);
    if (status == MLORA_OK)
        status = decoder_read(&out->decoder, json_object_get(json, "decoder"), path);
    if (status == MLORA_OK) status = read_model(&out->bpe, json_object_get(json, "model"), path);
    if (status == MLORA_OK) status = read_added(out, json_object_get(json, "added_tokens"), path);
    if (status == MLORA_OK)
        status = read_post_processor(out, json_object_get(json, "post_processor"), 0, path);
    json_decref(json);
    return status;
}
