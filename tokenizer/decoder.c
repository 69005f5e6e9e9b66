#include "tokenizer/decoder.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tokenizer/sequence.h"
#include "tokenizer/unicode.h"

/* ---- reading ------------------------------------------------------------------------------ */

static mlora_status copy_string(char **out, size_t *bytes, const json_t *value, const char *key,
                                const char *path)
{
    if (!json_is_string(value))
        return error_set(MLORA_EFORMAT, "%s: decoder: %s is %s, a string is needed", path, key,
                         json_kind(value));
    *bytes = json_string_length(value);
    *out = malloc(*bytes + 1);
    if (!*out) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes of text", *bytes);
    memcpy(*out, json_string_value(value), *bytes + 1);
    return MLORA_OK;
}

static mlora_status read_replace(struct decoder_step *step, const json_t *value, const char *path)
{
    const json_t *pattern = json_object_get(value, "pattern");
    if (json_object_get(pattern, "Regex"))
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: decoder Replace has a Regex pattern, only String is supported", path);
    mlora_status status = copy_string(&step->pattern, &step->pattern_bytes,
                                      json_object_get(pattern, "String"), "pattern.String", path);
    if (status == MLORA_OK)
        status = copy_string(&step->content, &step->content_bytes,
                             json_object_get(value, "content"), "content", path);
    if (status == MLORA_OK && step->pattern_bytes == 0)
        status = error_set(MLORA_EFORMAT, "%s: decoder Replace has an empty pattern", path);
    return status;
}

static mlora_status read_strip(struct decoder_step *step, const json_t *value, const char *path)
{
    const char *content;
    uint32_t c;

    mlora_status status = json_get_string(&content, value, "content", "", path);
    if (status == MLORA_OK)
        status = json_get_int(&step->strip_start, value, "start", 0, 0, INT32_MAX, path);
    if (status == MLORA_OK)
        status = json_get_int(&step->strip_stop, value, "stop", 0, 0, INT32_MAX, path);
    if (status != MLORA_OK) return error_prefix(status, "decoder Strip");
    const size_t bytes = strlen(content);
    if (bytes == 0 || utf8_decode(content, bytes, &c) != bytes)
        return error_set(MLORA_EFORMAT,
                         "%s: decoder Strip: content is \"%.32s\", one character "
                         "is needed",
                         path, content);
    memcpy(step->character, content, bytes + 1);
    return MLORA_OK;
}

static mlora_status read_step(void *target, const char *type, const json_t *value, const char *path)
{
    struct decoder *out = target;
    struct decoder_step *step = &out->steps[out->n++];
    if (strcmp(type, "ByteLevel") == 0) {
        step->kind = DECODE_BYTE_LEVEL;
        return MLORA_OK;
    }
    if (strcmp(type, "ByteFallback") == 0) {
        step->kind = DECODE_BYTE_FALLBACK;
        return MLORA_OK;
    }
    if (strcmp(type, "Fuse") == 0) {
        step->kind = DECODE_FUSE;
        return MLORA_OK;
    }
    if (strcmp(type, "Replace") == 0) {
        step->kind = DECODE_REPLACE;
        return read_replace(step, value, path);
    }
    if (strcmp(type, "Strip") == 0) {
        step->kind = DECODE_STRIP;
        return read_strip(step, value, path);
    }
    if (strcmp(type, "Metaspace") == 0) {
        step->kind = DECODE_METASPACE;
        return metaspace_read(step->character, &step->scheme, value, "decoder", path);
    }
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: decoder \"%.64s\" is not supported; known are Sequence, ByteLevel, "
                     "ByteFallback, Fuse, Replace, Strip and Metaspace",
                     path, type);
}

mlora_status decoder_read(struct decoder *out, const json_t *value, const char *path)
{
    *out = (struct decoder){.joins_with_spaces = !value || json_is_null(value)};
    if (out->joins_with_spaces) return MLORA_OK;
    out->steps = calloc(SEQUENCE_STEPS_MAX, sizeof *out->steps);
    if (!out->steps) return error_set(MLORA_ENOMEM, "out of memory: the decoder");
    struct sequence_reader reader = {
        .what = "decoder", .list = "decoders", .read = read_step, .out = out};
    return sequence_read(&reader, value, path);
}

void decoder_free(struct decoder *decoder)
{
    for (int i = 0; i < decoder->n; i++) {
        free(decoder->steps[i].pattern);
        free(decoder->steps[i].content);
    }
    free(decoder->steps);
    *decoder = (struct decoder){0};
}

/* ---- applying ----------------------------------------------------------------------------- */

/* The byte of a token such as <0x0A>, or -1. As in the reference, a sign may stand for a digit. */
static int fallback_byte(const char *text, size_t bytes)
{
    int value = 0, n_digits = 0;

    if (bytes != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    for (int i = 3; i < 5; i++) {
        const char c = text[i];
        if (c == '+' && i == 3) continue;
        if (c >= '0' && c <= '9')
            value = value * 16 + (c - '0');
        else if (c >= 'a' && c <= 'f')
            value = value * 16 + (c - 'a') + 10;
        else if (c >= 'A' && c <= 'F')
            value = value * 16 + (c - 'A') + 10;
        else
            return -1;
        n_digits++;
    }
    return n_digits > 0 ? value : -1;
}

static mlora_status append_replaced(struct buffer *out, const char *text, size_t bytes,
                                    const char *pattern, size_t pattern_bytes, const char *content,
                                    size_t content_bytes)
{
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK) {
        const char *found = memmem(text, bytes, pattern, pattern_bytes);
        const size_t n = found ? (size_t)(found - text) : bytes;
        status = buffer_append(out, text, n);
        if (!found) break;
        if (status == MLORA_OK) status = buffer_append(out, content, content_bytes);
        text += n + pattern_bytes;
        bytes -= n + pattern_bytes;
    }
    return status;
}

/* The bytes that byte-level text stands for; text with another character in it stays. */
static mlora_status append_bytes(struct buffer *out, const char *text, size_t bytes)
{
    const size_t start = out->bytes;

    mlora_status status = buffer_reserve(out, bytes);
    for (size_t i = 0, n; i < bytes && status == MLORA_OK; i += n) {
        uint32_t c;
        n = utf8_decode(text + i, bytes - i, &c);
        const int byte = byte_level_byte(c);
        if (byte < 0 || n == 0) {
            out->bytes = start;
            return buffer_append(out, text, bytes);
        }
        out->data[out->bytes++] = (char)byte;
    }
    if (status == MLORA_OK) out->data[out->bytes] = '\0';
    return status;
}

static mlora_status append_stripped(struct buffer *out, const struct decoder_step *step,
                                    const char *text, size_t bytes)
{
    const size_t n = strlen(step->character);
    for (int64_t i = 0; i < step->strip_start; i++) {
        if (bytes < n || memcmp(text, step->character, n) != 0) break;
        text += n;
        bytes -= n;
    }
    for (int64_t i = 0; i < step->strip_stop; i++) {
        if (bytes < n || memcmp(text + bytes - n, step->character, n) != 0) break;
        bytes -= n;
    }
    return buffer_append(out, text, bytes);
}

/* One token's text through a step that looks at no other token. */
static mlora_status append_token(struct buffer *out, const struct decoder_step *step,
                                 const char *text, size_t bytes, bool first)
{
    switch (step->kind) {
    case DECODE_REPLACE:
        return append_replaced(out, text, bytes, step->pattern, step->pattern_bytes, step->content,
                               step->content_bytes);
    case DECODE_METASPACE: {
        const bool dropped = first && step->scheme != PREPEND_NEVER;
        return append_replaced(out, text, bytes, step->character, strlen(step->character), " ",
                               dropped ? 0 : 1);
    }
    case DECODE_STRIP:
        return append_stripped(out, step, text, bytes);
    case DECODE_BYTE_LEVEL:
        return append_bytes(out, text, bytes);
    case DECODE_BYTE_FALLBACK:
    case DECODE_FUSE:
        break;
    }
    return buffer_append(out, text, bytes);
}

/* End the token that begins at `start` in out->text: it may be empty, unlike a piece. */
static mlora_status push_token(struct pieces *out, size_t start)
{
    return pieces_push(out, (struct piece){.start = start, .end = out->text.bytes, .id = 0});
}

/* A run of byte tokens [begin, end): the text that the bytes form, or U+FFFD for each of them. */
static mlora_status push_fallback(struct pieces *out, const struct pieces *in, size_t begin,
                                  size_t end)
{
    const size_t start = out->text.bytes;
    mlora_status status = MLORA_OK;

    for (size_t i = begin; i < end && status == MLORA_OK; i++) {
        const struct piece *piece = &in->data[i];
        const char byte =
            (char)fallback_byte(in->text.data + piece->start, piece->end - piece->start);
        status = buffer_append(&out->text, &byte, 1);
    }
    if (status != MLORA_OK) return status;
    if (!utf8_valid(out->text.data + start, out->text.bytes - start)) {
        out->text.bytes = start;
        for (size_t i = begin; i < end && status == MLORA_OK; i++)
            status = buffer_append(&out->text, "\xef\xbf\xbd", 3);
    }
    return status == MLORA_OK ? push_token(out, start) : status;
}

static mlora_status apply_fallback(struct pieces *out, const struct pieces *in)
{
    size_t run = 0; /* byte tokens before this one */
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < in->n && status == MLORA_OK; i++) {
        const char *text = in->text.data + in->data[i].start;
        const size_t bytes = in->data[i].end - in->data[i].start;
        if (fallback_byte(text, bytes) >= 0) {
            run++;
            continue;
        }
        if (run) status = push_fallback(out, in, i - run, i);
        run = 0;
        const size_t start = out->text.bytes;
        if (status == MLORA_OK) status = buffer_append(&out->text, text, bytes);
        if (status == MLORA_OK) status = push_token(out, start);
    }
    if (run && status == MLORA_OK) status = push_fallback(out, in, in->n - run, in->n);
    return status;
}

static mlora_status apply_step(const struct decoder_step *step, struct pieces *out,
                               const struct pieces *in)
{
    /* these two make one token of all */
    const bool joins = step->kind == DECODE_FUSE || step->kind == DECODE_BYTE_LEVEL;
    mlora_status status = buffer_reserve(&out->text, 0);

    if (step->kind == DECODE_BYTE_FALLBACK) return apply_fallback(out, in);
    for (size_t i = 0; i < in->n && status == MLORA_OK; i++) {
        const size_t start = out->text.bytes;
        status = append_token(&out->text, step, in->text.data + in->data[i].start,
                              in->data[i].end - in->data[i].start, i == 0);
        if (status == MLORA_OK && !joins) status = push_token(out, start);
    }
    if (!joins || status != MLORA_OK) return status;
    if (step->kind == DECODE_BYTE_LEVEL) {
        struct buffer whole = {0};
        status = utf8_append_lossy(&whole, out->text.data, out->text.bytes);
        buffer_free(&out->text);
        out->text = whole;
        if (status == MLORA_OK) status = buffer_reserve(&out->text, 0);
    }
    return status == MLORA_OK ? push_token(out, 0) : status;
}

mlora_status decoder_apply(const struct decoder *decoder, struct pieces *tokens, struct buffer *out)
{
    struct pieces next = {0};
    mlora_status status = MLORA_OK;

    for (int i = 0; i < decoder->n && status == MLORA_OK; i++) {
        pieces_clear(&next);
        status = apply_step(&decoder->steps[i], &next, tokens);
        const struct pieces old = *tokens;
        *tokens = next;
        next = old;
    }
    for (size_t i = 0; i < tokens->n && status == MLORA_OK; i++) {
        if (decoder->joins_with_spaces && i > 0) status = buffer_append(out, " ", 1);
        if (status == MLORA_OK)
            status = buffer_append(out, tokens->text.data + tokens->data[i].start,
                                   tokens->data[i].end - tokens->data[i].start);
    }
    pieces_free(&next);
    return status;
}

mlora_status decoder_piece(const struct decoder *decoder, struct buffer *out, const char *text,
                           size_t bytes)
{
    struct buffer now = {0}, next = {0};
    bool fused = false;
    mlora_status status = buffer_append(&now, text, bytes);

    if (decoder->joins_with_spaces && status == MLORA_OK) status = buffer_append(out, " ", 1);
    for (int i = 0; i < decoder->n && status == MLORA_OK; i++) {
        const struct decoder_step *step = &decoder->steps[i];
        const int byte = fallback_byte(now.data, now.bytes);
        next.bytes = 0;
        fused |= step->kind == DECODE_FUSE || step->kind == DECODE_BYTE_LEVEL;
        if (step->kind == DECODE_BYTE_FALLBACK && byte >= 0) {
            const char raw = (char)byte;
            status = buffer_append(out, &raw, 1); /* no later step means a lone byte */
            goto done;
        }
        if (step->kind == DECODE_STRIP && fused) continue; /* of the whole text */
        status = append_token(&next, step, buffer_text(&now), now.bytes, false);
        const struct buffer old = now;
        now = next;
        next = old;
    }
    if (status == MLORA_OK) status = buffer_append(out, buffer_text(&now), now.bytes);

done:
    buffer_free(&now);
    buffer_free(&next);
    return status;
}
