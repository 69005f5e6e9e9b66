/* Reading tokenizer.model: the fields of ModelProto that encoding needs, by their numbers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "tokenizer/protobuf.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/unicode.h"

enum { MODEL_BYTES_MAX = 64 * 1024 * 1024, PIECE_BYTES_MAX = ADDED_BYTES_MAX };
enum { MODEL_UNIGRAM = 1, MODEL_BPE = 2 };

/* What the trainer and normalizer specifications say beyond the model's own fields. */
struct settings {
    uint64_t model_type;
    bool suffix; /* whitespace goes behind words */
};

static mlora_status wrong_wire(const char *path, const char *field)
{
    return error_set(MLORA_EFORMAT,
                     "%s: %s has the wrong wire type; the file is damaged or no "
                     "SentencePiece model",
                     path, field);
}

static mlora_status truncated(const char *path, const char *message)
{
    return error_set(MLORA_EFORMAT, "%s: %s is cut short or damaged; fetch the file again", path,
                     message);
}

static mlora_status copy_text(char **out, const struct protobuf_field *field)
{
    free(*out);
    *out = malloc(field->bytes + 1);
    if (!*out) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes of text", field->bytes);
    memcpy(*out, field->data, field->bytes);
    (*out)[field->bytes] = '\0';
    return MLORA_OK;
}

static mlora_status read_trainer(struct sentencepiece *model, struct settings *settings,
                                 const struct protobuf_field *spec, const char *path)
{
    struct protobuf message = {.data = spec->data, .bytes = spec->bytes};
    struct protobuf_field field;
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK && protobuf_next(&message, &field)) {
        int wire = PROTOBUF_VARINT;
        switch (field.number) {
        case 3:
            settings->model_type = field.value;
            break;
        case 24:
            settings->suffix = field.value != 0;
            break;
        case 35:
            model->byte_fallback = field.value != 0;
            break;
        case 44:
        case 46:
        case 47:
            wire = PROTOBUF_BYTES;
            break;
        default:
            continue;
        }
        if (field.wire != wire) return wrong_wire(path, "trainer_spec");
        if (field.number == 44) status = copy_text(&model->unknown_text, &field);
        if (field.number == 46) status = copy_text(&model->bos_text, &field);
        if (field.number == 47) status = copy_text(&model->eos_text, &field);
    }
    return status == MLORA_OK && message.broken ? truncated(path, "trainer_spec") : status;
}

static mlora_status read_normalizer(struct sentencepiece *model, const struct protobuf_field *spec,
                                    bool reverse, const char *path)
{
    struct protobuf message = {.data = spec->data, .bytes = spec->bytes};
    struct protobuf_field field;
    const char *const name = reverse ? "denormalizer_spec" : "normalizer_spec";

    while (protobuf_next(&message, &field)) {
        if (field.number < 2 || field.number > 5) continue;
        if (field.wire != (field.number == 2 ? PROTOBUF_BYTES : PROTOBUF_VARINT))
            return wrong_wire(path, name);
        if (field.number == 2 && field.bytes > 0)
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: %s.precompiled_charsmap is not empty (%zu bytes), only the "
                             "identity is supported; save the tokenizer as tokenizer.json",
                             path, name, field.bytes);
        if (reverse) continue;
        if (field.number == 3) model->add_dummy_prefix = field.value != 0;
        if (field.number == 4) model->remove_extra_whitespaces = field.value != 0;
        if (field.number == 5) model->escape_whitespaces = field.value != 0;
    }
    return message.broken ? truncated(path, name) : MLORA_OK;
}

/* Make room for one more piece. */
static mlora_status grow(struct sentencepiece *model)
{
    if (model->n_ids < model->capacity) return MLORA_OK;
    const int capacity = model->capacity ? 2 * model->capacity : 1024;
    float *scores = realloc(model->scores, (size_t)capacity * sizeof *scores);
    if (scores) model->scores = scores;
    uint8_t *types = realloc(model->types, (size_t)capacity);
    if (types) model->types = types;
    if (!scores || !types) return error_set(MLORA_ENOMEM, "out of memory: %d pieces", capacity);
    model->capacity = capacity;
    return MLORA_OK;
}

static mlora_status push_added(struct added *added, const struct protobuf_field *text, int32_t id)
{
    if ((added->n & (added->n - 1)) == 0) { /* full: its capacity is the next power of two */
        const size_t capacity = added->n ? 2 * (size_t)added->n : 1;
        struct added_token *tokens = realloc(added->tokens, capacity * sizeof *tokens);
        if (!tokens) return error_set(MLORA_ENOMEM, "out of memory: %zu pieces", capacity);
        added->tokens = tokens;
    }
    struct added_token *token = &added->tokens[added->n++];
    *token = (struct added_token){
        .bytes = text->bytes, .pattern_bytes = text->bytes, .id = id, .special = true};
    mlora_status status = copy_text(&token->text, text);
    if (status == MLORA_OK) status = copy_text(&token->pattern, text);
    return status;
}

static mlora_status read_piece(struct sentencepiece *model, const struct protobuf_field *whole,
                               const char *path)
{
    struct protobuf message = {.data = whole->data, .bytes = whole->bytes};
    struct protobuf_field field, text = {0};
    float score = 0;
    uint64_t type = PIECE_NORMAL;
    const int32_t id = model->n_ids;

    while (protobuf_next(&message, &field)) {
        static const int wires[] = {0, PROTOBUF_BYTES, PROTOBUF_FIXED32, PROTOBUF_VARINT};
        if (field.number > 3) continue;
        if (field.wire != wires[field.number]) return wrong_wire(path, "a piece");
        if (field.number == 1) text = field;
        if (field.number == 3) type = field.value;
        if (field.number == 2) {
            const uint32_t bits = (uint32_t)field.value;
            memcpy(&score, &bits, sizeof score);
        }
    }
    if (message.broken) return truncated(path, "a piece");
    if (text.bytes == 0 || text.bytes > PIECE_BYTES_MAX)
        return error_set(MLORA_EFORMAT, "%s: piece %d is %zu bytes long, must be 1 to %d", path,
                         (int)id, text.bytes, PIECE_BYTES_MAX);
    if (!utf8_valid((const char *)text.data, text.bytes) || memchr(text.data, 0, text.bytes))
        return error_set(MLORA_EFORMAT, "%s: piece %d is not UTF-8 text", path, (int)id);
    if (type < PIECE_NORMAL || type > PIECE_BYTE)
        return error_set(MLORA_EFORMAT, "%s: piece %d has type %llu, must be 1 to 6", path, (int)id,
                         (unsigned long long)type);
    if (score != score) /* the order of merges would not be one */
        return error_set(MLORA_EFORMAT, "%s: piece %d has a score that is not a number", path,
                         (int)id);

    const bool normal = type == PIECE_NORMAL || type == PIECE_USER_DEFINED || type == PIECE_UNUSED;
    mlora_status status = grow(model);
    if (status == MLORA_OK) {
        status = vocab_add(normal ? &model->pieces : &model->reserved, (const char *)text.data,
                           text.bytes, id);
        if (status != MLORA_OK) return error_prefix(status, "%s: piece %d", path, (int)id);
    }
    if (status == MLORA_OK && type == PIECE_USER_DEFINED)
        status = push_added(&model->user, &text, id);
    if (status == MLORA_OK && type == PIECE_CONTROL)
        status = push_added(&model->control, &text, id);
    if (status != MLORA_OK) return status;
    model->scores[id] = score;
    model->types[id] = (uint8_t)type;
    model->n_unused += type == PIECE_UNUSED;
    model->n_ids++;
    return MLORA_OK;
}

/* One unknown piece; all 256 byte pieces if and only if byte_fallback. */
static mlora_status check_reserved(struct sentencepiece *model, const char *path)
{
    int n_bytes = 0;

    model->unknown = -1;
    for (int id = 0; id < model->n_ids; id++) {
        if (model->types[id] == PIECE_UNKNOWN && model->unknown >= 0)
            return error_set(MLORA_EFORMAT,
                             "%s: pieces %d and %d are both of type UNKNOWN, one "
                             "is needed",
                             path, (int)model->unknown, id);
        if (model->types[id] == PIECE_UNKNOWN) model->unknown = id;
        if (model->types[id] == PIECE_BYTE) n_bytes++;
    }
    if (model->unknown < 0)
        return error_set(MLORA_EFORMAT, "%s: no piece is of type UNKNOWN, one is needed", path);
    if (n_bytes > 0 && !model->byte_fallback)
        return error_set(MLORA_EFORMAT,
                         "%s: there are %d byte pieces, but "
                         "trainer_spec.byte_fallback is false",
                         path, n_bytes);
    for (int i = 0; i < 256 && model->byte_fallback; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", i);
        const int32_t id = vocab_find(&model->reserved, name, 6);
        if (id < 0 || model->types[id] != PIECE_BYTE)
            return error_set(MLORA_EFORMAT,
                             "%s: the byte piece %s is missing, byte_fallback "
                             "needs all 256",
                             path, name);
        model->byte_id[i] = id;
    }
    if (model->byte_fallback && n_bytes != 256)
        return error_set(MLORA_EFORMAT,
                         "%s: there are %d byte pieces, <0x00> to <0xFF> are "
                         "needed",
                         path, n_bytes);
    return MLORA_OK;
}

static mlora_status check_settings(const struct settings *settings, const char *path)
{
    if (settings->model_type != MODEL_BPE)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: model_type is %s, only BPE is supported; save "
                         "the tokenizer as tokenizer.json",
                         path, settings->model_type == MODEL_UNIGRAM ? "UNIGRAM" : "WORD or CHAR");
    if (settings->suffix)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: trainer_spec.treat_whitespace_as_suffix is set, "
                         "which is not supported",
                         path);
    return MLORA_OK;
}

/* Whether no piece has a mark (U+2581) behind another character, so that words merge alone.
 * Unused pieces remember across words how they were put together. */
static bool is_separable(const struct sentencepiece *model)
{
    static const char mark[] = "\xe2\x96\x81";

    for (int id = 0; id < model->n_ids; id++) {
        size_t bytes = 0;
        const char *text = vocab_text(&model->pieces, id, &bytes);
        while (bytes >= 3 && memcmp(text, mark, 3) == 0) {
            text += 3;
            bytes -= 3;
        }
        if (bytes > 0 && memmem(text, bytes, mark, 3)) return false;
    }
    return model->n_unused == 0;
}

static mlora_status read_model(struct sentencepiece *model, const struct buffer *file,
                               const char *path)
{
    struct protobuf message = {.data = (const unsigned char *)buffer_text(file),
                               .bytes = file->bytes};
    struct settings settings = {.model_type = MODEL_UNIGRAM}; /* the format's default */
    struct protobuf_field field;
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK && protobuf_next(&message, &field)) {
        if (field.number > 3 && field.number != 5) continue;
        if (field.wire != PROTOBUF_BYTES) return wrong_wire(path, "the model");
        switch (field.number) {
        case 1:
            status = read_piece(model, &field, path);
            break;
        case 2:
            status = read_trainer(model, &settings, &field, path);
            break;
        case 3:
            status = read_normalizer(model, &field, false, path);
            break;
        default:
            status = read_normalizer(model, &field, true, path);
            break;
        }
    }
    if (status == MLORA_OK && message.broken) status = truncated(path, "the model");
    if (status == MLORA_OK && model->n_ids == 0)
        status =
            error_set(MLORA_EFORMAT, "%s: has no pieces; is this a SentencePiece model?", path);
    if (status == MLORA_OK) status = check_settings(&settings, path);
    if (status == MLORA_OK) status = check_reserved(model, path);
    model->separable = status == MLORA_OK && is_separable(model);
    return status;
}

mlora_status sentencepiece_read(struct sentencepiece *out, const char *path)
{
    struct buffer file = {0};

    *out = (struct sentencepiece){.add_dummy_prefix = true,
                                  .remove_extra_whitespaces = true,
                                  .escape_whitespaces = true,
                                  .prefix_after_control = true};
    mlora_status status = file_read_all(&file, path, MODEL_BYTES_MAX);
    if (status == MLORA_OK && file.bytes >= 8 && memcmp(file.data, "IQ== 0\n", 7) == 0)
        status = error_set(MLORA_EUNSUPPORTED,
                           "%s: is a tiktoken file, not SentencePiece; use the "
                           "model's tokenizer.json",
                           path);
    if (status == MLORA_OK) status = read_model(out, &file, path);
    if (status == MLORA_OK) status = added_search_build(&out->user_search, &out->user, false);
    if (status == MLORA_OK) status = added_search_build(&out->control_search, &out->control, false);
    buffer_free(&file);
    return status;
}

void sentencepiece_free(struct sentencepiece *model)
{
    vocab_free(&model->pieces);
    vocab_free(&model->reserved);
    free(model->scores);
    free(model->types);
    added_search_free(&model->user_search);
    added_search_free(&model->control_search);
    added_free(&model->user);
    added_free(&model->control);
    free(model->unknown_text);
    free(model->bos_text);
    free(model->eos_text);
    *model = (struct sentencepiece){0};
}
