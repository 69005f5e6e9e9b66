#include "tokenizer/normalizer.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tokenizer/sequence.h"
#include "tokenizer/unicode.h"

/* ---- reading ------------------------------------------------------------------------------ */

static mlora_status copy_string(char **out, size_t *bytes, const json_t *value, const char *key,
                                const char *path)
{
    if (!json_is_string(value))
        return error_set(MLORA_EFORMAT, "%s: normalizer: %s is %s, a string is needed", path, key,
                         json_kind(value));
    *bytes = json_string_length(value);
    *out = malloc(*bytes + 1);
    if (!*out) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes of text", *bytes);
    memcpy(*out, json_string_value(value), *bytes + 1);
    return MLORA_OK;
}

static mlora_status read_replace(struct normalizer_step *step, const json_t *value,
                                 const char *path)
{
    const json_t *pattern = json_object_get(value, "pattern");
    if (json_object_get(pattern, "Regex"))
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: normalizer Replace has a Regex pattern, only String is supported",
                         path);
    mlora_status status = copy_string(&step->pattern, &step->pattern_bytes,
                                      json_object_get(pattern, "String"), "pattern.String", path);
    if (status == MLORA_OK)
        status = copy_string(&step->content, &step->content_bytes,
                             json_object_get(value, "content"), "content", path);
    if (status == MLORA_OK && step->pattern_bytes == 0)
        status = error_set(MLORA_EFORMAT, "%s: normalizer Replace has an empty pattern", path);
    return status;
}

static mlora_status read_step(void *target, const char *type, const json_t *value, const char *path)
{
    struct normalizer *out = target;
    struct normalizer_step *step = &out->steps[out->n++];
    if (strcmp(type, "Prepend") == 0) {
        step->kind = NORMALIZE_PREPEND;
        return copy_string(&step->content, &step->content_bytes, json_object_get(value, "prepend"),
                           "prepend", path);
    }
    if (strcmp(type, "Replace") == 0) {
        step->kind = NORMALIZE_REPLACE;
        return read_replace(step, value, path);
    }
    if (strcmp(type, "NFC") == 0) {
        step->kind = NORMALIZE_NFC;
        return MLORA_OK;
    }
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: normalizer \"%.64s\" is not supported; known are Sequence, Prepend, "
                     "Replace and NFC",
                     path, type);
}

mlora_status normalizer_read(struct normalizer *out, const json_t *value, const char *path)
{
    *out = (struct normalizer){0};
    if (!value || json_is_null(value)) return MLORA_OK;
    out->steps = calloc(SEQUENCE_STEPS_MAX, sizeof *out->steps);
    if (!out->steps) return error_set(MLORA_ENOMEM, "out of memory: the normalizer");
    struct sequence_reader reader = {
        .what = "normalizer", .list = "normalizers", .read = read_step, .out = out};
    return sequence_read(&reader, value, path);
}

void normalizer_free(struct normalizer *normalizer)
{
    for (int i = 0; i < normalizer->n; i++) {
        free(normalizer->steps[i].pattern);
        free(normalizer->steps[i].content);
    }
    free(normalizer->steps);
    *normalizer = (struct normalizer){0};
}

/* ---- applying ----------------------------------------------------------------------------- */

/* A text with its marks, which are NULL or as long. */
struct marked {
    struct buffer text;
    struct buffer marks;
};

static mlora_status append(struct marked *out, const char *text, size_t bytes, const char *marks)
{
    mlora_status status = buffer_append(&out->text, text, bytes);
    if (status == MLORA_OK && marks) status = buffer_append(&out->marks, marks, bytes);
    return status;
}

/* Append a text all of whose bytes get the same mark. */
static mlora_status append_new(struct marked *out, const char *text, size_t bytes, bool with_marks,
                               bool mark)
{
    mlora_status status = buffer_append(&out->text, text, bytes);
    if (status != MLORA_OK || !with_marks || bytes == 0) return status;
    status = buffer_reserve(&out->marks, bytes);
    if (status != MLORA_OK) return status;
    memset(out->marks.data + out->marks.bytes, mark, bytes);
    out->marks.bytes += bytes;
    return MLORA_OK;
}

static mlora_status replace(const struct normalizer_step *step, struct marked *out,
                            const char *text, size_t bytes, const char *marks)
{
    size_t at = 0;
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK) {
        const char *found = memmem(text + at, bytes - at, step->pattern, step->pattern_bytes);
        const size_t start = found ? (size_t)(found - text) : bytes;
        status = append(out, text + at, start - at, marks ? marks + at : NULL);
        if (!found || status != MLORA_OK) break;
        const bool mark = marks && !memchr(marks + start, 0, step->pattern_bytes);
        status = append_new(out, step->content, step->content_bytes, marks != NULL, mark);
        at = start + step->pattern_bytes;
    }
    return status;
}

struct decomposed {
    int32_t c;
    int32_t combining_class;
    size_t order; /* where it stood: keeps the sort stable */
};

static int compare_marks(const void *a, const void *b)
{
    const struct decomposed *x = a, *y = b;
    if (x->combining_class != y->combining_class)
        return x->combining_class < y->combining_class ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* Canonical order: every run of combining marks sorted by class. utf8proc's own sort takes time
 * quadratic in the length of a run, which a hostile text can choose. */
static void sort_marks(struct decomposed *all, size_t n)
{
    for (size_t start = 0; start < n;) {
        size_t end = start;
        while (end < n && all[end].combining_class != 0) end++;
        if (end - start > 1) qsort(all + start, end - start, sizeof *all, compare_marks);
        start = end + 1;
    }
}

/* Composed characters begin at U+00C0, combining marks at U+0300: text below is its own NFC. */
static bool is_simple(const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if ((unsigned char)text[i] >= 0xcc) return false;
    return true;
}

/* Take the text apart into `*all` [*n], owned by the caller. */
static mlora_status decompose(struct decomposed **all, size_t *n, const char *text, size_t bytes)
{
    enum { LONGEST = 32 }; /* code points that one decomposes into, with room */
    size_t capacity = bytes + LONGEST;

    *n = 0;
    *all = malloc(capacity * sizeof **all);
    if (!*all) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes to normalize", bytes);
    for (size_t i = 0, step; i < bytes; i += step) {
        uint32_t c;
        int32_t parts[LONGEST];
        int boundary = 0;
        step = utf8_decode(text + i, bytes - i, &c);
        const bool inert = unicode_classes(c) & UNICODE_INERT;
        utf8proc_ssize_t n_parts = 1;
        parts[0] = (int32_t)c;
        if (!inert)
            n_parts = utf8proc_decompose_char((utf8proc_int32_t)c, parts, LONGEST,
                                              UTF8PROC_STABLE | UTF8PROC_DECOMPOSE, &boundary);
        if (*n + LONGEST > capacity) {
            struct decomposed *more = realloc(*all, 2 * capacity * sizeof **all);
            if (!more) return error_set(MLORA_ENOMEM, "out of memory: text to normalize");
            *all = more;
            capacity *= 2;
        }
        for (utf8proc_ssize_t k = 0; k < n_parts; k++, ++*n) {
            const int class = inert ? 0 : utf8proc_get_property(parts[k])->combining_class;
            (*all)[*n] = (struct decomposed){parts[k], class, *n};
        }
    }
    return MLORA_OK;
}

static mlora_status nfc(struct buffer *out, const char *text, size_t bytes)
{
    struct decomposed *all = NULL;
    int32_t *composed = NULL;
    size_t n;

    mlora_status status = decompose(&all, &n, text, bytes);
    if (status != MLORA_OK) goto done;
    sort_marks(all, n);
    composed = malloc((n + 1) * sizeof *composed);
    if (!composed) {
        status = error_set(MLORA_ENOMEM, "out of memory: %zu bytes to normalize", bytes);
        goto done;
    }
    for (size_t start = 0, end; start < n && status == MLORA_OK; start = end) {
        /* what lies between inert code points composes, they stand alone */
        for (end = start; end < n; end++) {
            composed[end] = all[end].c;
            if (end > start && (unicode_classes((uint32_t)all[start].c) & UNICODE_INERT)) break;
            if (end > start && (unicode_classes((uint32_t)all[end].c) & UNICODE_INERT)) break;
        }
        const utf8proc_ssize_t n_composed = utf8proc_normalize_utf32(
            composed + start, (utf8proc_ssize_t)(end - start), UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        for (utf8proc_ssize_t i = 0; i < n_composed && status == MLORA_OK; i++) {
            char encoded[4];
            status = buffer_append(out, encoded,
                                   utf8_encode(encoded, (uint32_t)composed[start + (size_t)i]));
        }
    }

done:
    free(composed);
    free(all);
    return status;
}

static mlora_status apply_step(const struct normalizer_step *step, struct marked *out,
                               const char *text, size_t bytes, const char *marks)
{
    mlora_status status = MLORA_OK;

    switch (step->kind) {
    case NORMALIZE_PREPEND:
        if (bytes)
            status = append_new(out, step->content, step->content_bytes, marks != NULL, true);
        return status == MLORA_OK ? append(out, text, bytes, marks) : status;
    case NORMALIZE_REPLACE:
        return replace(step, out, text, bytes, marks);
    case NORMALIZE_NFC:
        if (is_simple(text, bytes)) return append(out, text, bytes, marks);
        status = nfc(&out->text, text, bytes);
        if (status == MLORA_OK && marks) status = buffer_reserve(&out->marks, out->text.bytes);
        if (status != MLORA_OK || !marks) return status;
        memset(out->marks.data, 0, out->text.bytes);
        out->marks.bytes = out->text.bytes;
        return MLORA_OK;
    }
    return status;
}

static bool moves_start(const struct normalizer_step *step, const char *text, size_t bytes)
{
    uint32_t c;

    if (step->kind != NORMALIZE_REPLACE || bytes < step->pattern_bytes ||
        memcmp(text, step->pattern, step->pattern_bytes) != 0)
        return false;
    return step->content_bytes == 0 ||
           utf8_decode(step->pattern, step->pattern_bytes, &c) < step->pattern_bytes;
}

mlora_status normalizer_apply(const struct normalizer *normalizer, struct buffer *out,
                              const char *text, size_t bytes, const char *written,
                              struct buffer *marks, bool *moved)
{
    struct marked now = {0}, next = {0};
    const char *now_marks = written;
    mlora_status status = MLORA_OK;

    *moved = false;
    for (int i = 0; i < normalizer->n && status == MLORA_OK; i++) {
        *moved |= moves_start(&normalizer->steps[i], text, bytes);
        next.text.bytes = next.marks.bytes = 0;
        status = apply_step(&normalizer->steps[i], &next, text, bytes, now_marks);
        if (status != MLORA_OK) break;
        const struct marked used = now;
        now = next;
        next = used;
        text = buffer_text(&now.text);
        bytes = now.text.bytes;
        now_marks = written ? buffer_text(&now.marks) : NULL;
    }
    if (status == MLORA_OK) status = buffer_append(out, text, bytes);
    if (status == MLORA_OK && written) status = buffer_append(marks, now_marks, bytes);

    buffer_free(&now.text);
    buffer_free(&now.marks);
    buffer_free(&next.text);
    buffer_free(&next.marks);
    return status;
}
