#include "tokenizer/pretokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tokenizer/sequence.h"
#include "tokenizer/unicode.h"

#define GPT2_PATTERN                                                                               \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* ---- reading ------------------------------------------------------------------------------ */

static mlora_status read_behavior(enum split_behavior *out, const json_t *value, const char *path)
{
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const char *name;
    const mlora_status status = json_get_string(&name, value, "behavior", NULL, path);
    if (status != MLORA_OK) return status;
    for (int i = 0; name && i < 5; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *out = (enum split_behavior)i;
        return MLORA_OK;
    }
    return error_set(MLORA_EFORMAT,
                     "%s: pre_tokenizer Split: behavior is %s, one of Isolated, "
                     "Removed, MergedWithPrevious, MergedWithNext, Contiguous is needed",
                     path, name ? name : "missing");
}

static mlora_status read_split(struct pretokenizer_step *step, const json_t *value,
                               const char *path)
{
    const json_t *pattern = json_object_get(value, "pattern");
    const json_t *regex = json_object_get(pattern, "Regex");
    const json_t *string = json_object_get(pattern, "String");

    mlora_status status = read_behavior(&step->behavior, value, path);
    if (status == MLORA_OK) status = json_get_bool(&step->invert, value, "invert", false, path);
    if (status != MLORA_OK) return status;
    step->cuts = true;
    if (json_is_string(regex))
        return split_from_regex(&step->split, json_string_value(regex), json_string_length(regex),
                                path);
    if (json_is_string(string) && json_string_length(string) > 0)
        return split_from_string(&step->split, json_string_value(string),
                                 json_string_length(string));
    return error_set(MLORA_EFORMAT,
                     "%s: pre_tokenizer Split: pattern is %s, an object with a "
                     "Regex or a String that is not empty is needed",
                     path, json_kind(pattern));
}

static mlora_status read_byte_level(struct pretokenizer_step *step, const json_t *value,
                                    const char *path)
{
    step->kind = PRETOKENIZE_BYTE_LEVEL;
    mlora_status status =
        json_get_bool(&step->add_prefix_space, value, "add_prefix_space", true, path);
    if (status == MLORA_OK) status = json_get_bool(&step->cuts, value, "use_regex", true, path);
    if (status == MLORA_OK && step->cuts)
        status = split_from_regex(&step->split, GPT2_PATTERN, sizeof GPT2_PATTERN - 1, path);
    return status;
}

mlora_status metaspace_read(char replacement[5], enum prepend_scheme *scheme, const json_t *value,
                            const char *where, const char *path)
{
    static const char *const names[] = {"always", "first", "never"};
    const char *text = NULL, *name;
    bool add_prefix_space;
    uint32_t c;

    mlora_status status = json_get_string(&text, value, "replacement", NULL, path);
    if (status == MLORA_OK)
        status = json_get_string(&name, value, "prepend_scheme", "always", path);
    if (status == MLORA_OK)
        status = json_get_bool(&add_prefix_space, value, "add_prefix_space", true, path);
    if (status != MLORA_OK) return error_prefix(status, "%s Metaspace", where);

    const size_t bytes = text ? strlen(text) : 0;
    if (bytes == 0 || utf8_decode(text, bytes, &c) != bytes)
        return error_set(MLORA_EFORMAT,
                         "%s: %s Metaspace: replacement is \"%.32s\", one character "
                         "is needed",
                         path, where, text ? text : "");
    memcpy(replacement, text, bytes + 1);

    int found = -1;
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) found = i;
    if (found < 0)
        return error_set(MLORA_EFORMAT,
                         "%s: %s Metaspace: prepend_scheme is \"%.32s\", one of "
                         "always, first, never is needed",
                         path, where, name);
    *scheme = (enum prepend_scheme)found;
    if (add_prefix_space) return MLORA_OK;
    if (*scheme != PREPEND_NEVER)
        return error_set(MLORA_EFORMAT,
                         "%s: %s Metaspace: add_prefix_space is false, but "
                         "prepend_scheme is \"%s\"; it must be \"never\"",
                         path, where, name);
    return MLORA_OK;
}

static mlora_status read_metaspace(struct pretokenizer_step *step, const json_t *value,
                                   const char *path)
{
    step->kind = PRETOKENIZE_METASPACE;
    step->behavior = SPLIT_MERGED_WITH_NEXT;
    mlora_status status =
        metaspace_read(step->replacement, &step->scheme, value, "pre_tokenizer", path);
    if (status == MLORA_OK) status = json_get_bool(&step->cuts, value, "split", true, path);
    if (status == MLORA_OK && step->cuts)
        status = split_from_string(&step->split, step->replacement, strlen(step->replacement));
    return status;
}

static mlora_status read_digits(struct pretokenizer_step *step, const json_t *value,
                                const char *path)
{
    bool individual;
    const mlora_status status = json_get_bool(&individual, value, "individual_digits", false, path);
    step->cuts = true;
    step->split.kind = SPLIT_DIGIT;
    step->behavior = individual ? SPLIT_ISOLATED : SPLIT_CONTIGUOUS;
    return status;
}

static mlora_status read_step(void *target, const char *type, const json_t *value, const char *path)
{
    struct pretokenizer *out = target;
    struct pretokenizer_step *step = &out->steps[out->n++];
    if (strcmp(type, "Split") == 0) return read_split(step, value, path);
    if (strcmp(type, "ByteLevel") == 0) return read_byte_level(step, value, path);
    if (strcmp(type, "Metaspace") == 0) return read_metaspace(step, value, path);
    if (strcmp(type, "Digits") == 0) return read_digits(step, value, path);
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: pre_tokenizer \"%.64s\" is not supported; known are Sequence, Split, "
                     "ByteLevel, Metaspace and Digits",
                     path, type);
}

mlora_status pretokenizer_read(struct pretokenizer *out, const json_t *value, const char *path)
{
    *out = (struct pretokenizer){0};
    if (!value || json_is_null(value)) return MLORA_OK;
    out->steps = calloc(SEQUENCE_STEPS_MAX, sizeof *out->steps);
    if (!out->steps) return error_set(MLORA_ENOMEM, "out of memory: the pre_tokenizer");
    struct sequence_reader reader = {
        .what = "pre_tokenizer", .list = "pretokenizers", .read = read_step, .out = out};
    return sequence_read(&reader, value, path);
}

void pretokenizer_free(struct pretokenizer *pretokenizer)
{
    for (int i = 0; i < pretokenizer->n; i++) split_free(&pretokenizer->steps[i].split);
    free(pretokenizer->steps);
    *pretokenizer = (struct pretokenizer){0};
}

/* ---- the byte-level alphabet ---------------------------------------------------------------- */

/* Bytes that are printable in Latin-1 stand for themselves, the 68 others for U+0100 and up. */
static bool is_printable(int byte)
{
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xff && byte != 0xad);
}

uint32_t byte_level_character(unsigned char byte)
{
    if (is_printable(byte)) return byte;
    if (byte <= 0x20) return 0x100u + byte;
    if (byte <= 0xa0) return 0x100u + 0x21 + (byte - 0x7f);
    return 0x100u + 0x21 + 0x22; /* U+00AD, the soft hyphen, is the last */
}

int byte_level_byte(uint32_t c)
{
    if (c < 0x100) return is_printable((int)c) ? (int)c : -1;
    if (c <= 0x120) return (int)(c - 0x100);
    if (c <= 0x142) return (int)(c - 0x121) + 0x7f;
    return c == 0x143 ? 0xad : -1;
}

/* ---- applying ----------------------------------------------------------------------------- */

/* Parts of a piece as they are being put together: the last one may still grow. */
struct parts {
    struct pieces *out;
    struct piece whole; /* the piece that is cut, in out->text */
    struct piece last;
    bool has_last;
    bool last_is_match;
};

static mlora_status flush(struct parts *parts)
{
    if (!parts->has_last) return MLORA_OK;
    parts->has_last = false;
    return pieces_push(parts->out, parts->last);
}

/* Take the next stretch, [start, end) of the whole, as the behavior says. MergedWithNext is the
 * mirror image of MergedWithPrevious: a match takes what follows if that is no match. */
static mlora_status take(struct parts *parts, enum split_behavior behavior, size_t start,
                         size_t end, bool match)
{
    bool grow = false;

    switch (behavior) {
    case SPLIT_ISOLATED:
        break;
    case SPLIT_REMOVED:
        if (match) return MLORA_OK;
        break;
    case SPLIT_CONTIGUOUS:
        grow = parts->has_last && match == parts->last_is_match;
        break;
    case SPLIT_MERGED_WITH_PREVIOUS:
        grow = parts->has_last && match && !parts->last_is_match;
        break;
    case SPLIT_MERGED_WITH_NEXT:
        grow = parts->has_last && !match && parts->last_is_match;
        break;
    }
    if (!grow) {
        const mlora_status status = flush(parts);
        if (status != MLORA_OK) return status;
        parts->last = (struct piece){.start = parts->whole.start + start,
                                     .id = -1,
                                     .first = parts->whole.first && start == 0};
        parts->has_last = true;
    }
    parts->last.end = parts->whole.start + end;
    parts->last_is_match = match;
    return MLORA_OK;
}

/* Cut a piece, whose text is in out->text already. */
static mlora_status cut(const struct pretokenizer_step *step, struct split_work *work,
                        struct pieces *out, struct piece whole)
{
    struct parts parts = {.out = out, .whole = whole};
    const char *text = buffer_text(&out->text) + whole.start;
    const size_t bytes = whole.end - whole.start;
    mlora_status status = MLORA_OK;

    for (size_t at = 0, start, end; at < bytes && status == MLORA_OK; at = end) {
        bool found;
        status = split_next(&step->split, work, text, bytes, at, &start, &end, &found);
        if (status != MLORA_OK) return status;
        if (!found) start = end = bytes;
        if (start > at) status = take(&parts, step->behavior, at, start, step->invert);
        if (found && status == MLORA_OK)
            status = take(&parts, step->behavior, start, end, !step->invert);
    }
    return status == MLORA_OK ? flush(&parts) : status;
}

/* Append a piece's text as the step rewrites it before it cuts. */
static mlora_status append_before(const struct pretokenizer_step *step, struct buffer *out,
                                  const char *text, size_t bytes, bool first)
{
    mlora_status status = MLORA_OK;

    if (step->kind == PRETOKENIZE_BYTE_LEVEL) {
        if (step->add_prefix_space && text[0] != ' ') status = buffer_append(out, " ", 1);
        return status == MLORA_OK ? buffer_append(out, text, bytes) : status;
    }
    if (step->kind != PRETOKENIZE_METASPACE) return buffer_append(out, text, bytes);

    const size_t mark_bytes = strlen(step->replacement);
    const bool marked =
        text[0] == ' ' || (bytes >= mark_bytes && memcmp(text, step->replacement, mark_bytes) == 0);
    if (!marked && (step->scheme == PREPEND_ALWAYS || (step->scheme == PREPEND_FIRST && first)))
        status = buffer_append(out, step->replacement, mark_bytes);
    while (bytes > 0 && status == MLORA_OK) {
        const char *space = memchr(text, ' ', bytes);
        const size_t n = space ? (size_t)(space - text) : bytes;
        status = buffer_append(out, text, n);
        if (space && status == MLORA_OK) status = buffer_append(out, step->replacement, mark_bytes);
        text += n + (space != NULL);
        bytes -= n + (space != NULL);
    }
    return status;
}

/* Rewrite every text piece of `in` byte by byte into the byte-level alphabet. */
static mlora_status to_byte_level(struct pieces *out, const struct pieces *in)
{
    mlora_status status = buffer_reserve(&out->text, 2 * in->text.bytes);

    for (size_t i = 0; i < in->n && status == MLORA_OK; i++) {
        struct piece piece = in->data[i];
        if (piece.id < 0) {
            const size_t start = out->text.bytes;
            for (size_t k = piece.start; k < piece.end; k++) {
                char *to = out->text.data + out->text.bytes;
                out->text.bytes +=
                    utf8_encode(to, byte_level_character((unsigned char)in->text.data[k]));
            }
            piece.start = start;
            piece.end = out->text.bytes;
        }
        status = pieces_push(out, piece);
    }
    return status;
}

static mlora_status apply_step(const struct pretokenizer_step *step, struct pieces *out,
                               const struct pieces *in)
{
    struct split_work work = {0};
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < in->n && status == MLORA_OK; i++) {
        struct piece piece = in->data[i];
        if (piece.id < 0) {
            const size_t start = out->text.bytes;
            status = append_before(step, &out->text, in->text.data + piece.start,
                                   piece.end - piece.start, piece.first);
            if (status != MLORA_OK) break;
            piece.start = start;
            piece.end = out->text.bytes;
        }
        if (piece.id < 0 && step->cuts)
            status = cut(step, &work, out, piece);
        else
            status = pieces_push(out, piece);
    }
    split_work_free(&work);
    return status;
}

static void swap(struct pieces *a, struct pieces *b)
{
    const struct pieces old = *a;
    *a = *b;
    *b = old;
}

mlora_status pretokenizer_apply(const struct pretokenizer *pretokenizer, struct pieces *pieces)
{
    struct pieces next = {0};
    mlora_status status = MLORA_OK;

    for (int i = 0; i < pretokenizer->n && status == MLORA_OK; i++) {
        const struct pretokenizer_step *step = &pretokenizer->steps[i];
        pieces_clear(&next);
        status = apply_step(step, &next, pieces);
        swap(pieces, &next);
        if (status != MLORA_OK || step->kind != PRETOKENIZE_BYTE_LEVEL) continue;
        pieces_clear(&next);
        status = to_byte_level(&next, pieces);
        swap(pieces, &next);
    }
    pieces_free(&next);
    return status;
}
