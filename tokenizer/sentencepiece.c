#include "tokenizer/sentencepiece.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tokenizer/merge_heap.h"
#include "tokenizer/unicode.h"

static const char mark[] = "\xe2\x96\x81"; /* U+2581, which stands for a space */
enum { MARK_BYTES = 3 };

/* ---- normalizing --------------------------------------------------------------------------- */

/* The unit that starts at `text`: a user-defined piece as it is, or one character. */
static size_t unit(const struct sentencepiece *model, const char *text, size_t bytes, bool *user)
{
    uint32_t c;
    const int index = added_longest(&model->user_search, &model->user, text, bytes);
    *user = index >= 0;
    if (*user) return model->user.tokens[index].bytes;
    const size_t n = utf8_decode(text, bytes, &c);
    return n ? n : 1;
}

static mlora_status append_space(const struct sentencepiece *model, struct buffer *out)
{
    return model->escape_whitespaces ? buffer_append(out, mark, MARK_BYTES)
                                     : buffer_append(out, " ", 1);
}

static mlora_status append_unit(const struct sentencepiece *model, struct buffer *out,
                                const char *text, size_t bytes)
{
    mlora_status status = MLORA_OK;
    for (size_t i = 0; i < bytes && status == MLORA_OK; i++)
        status = text[i] == ' ' ? append_space(model, out) : buffer_append(out, text + i, 1);
    return status;
}

static mlora_status normalize(const struct sentencepiece *model, struct buffer *out,
                              const char *text, size_t bytes, bool prefix)
{
    const bool trim = model->remove_extra_whitespaces;
    const size_t start = out->bytes;
    bool after_space = trim, user;
    size_t i = 0;

    for (size_t n; trim && i < bytes; i += n) {
        n = unit(model, text + i, bytes - i, &user);
        if (n != 1 || text[i] != ' ') break;
    }
    if (i == bytes) return MLORA_OK;

    mlora_status status = buffer_reserve(out, bytes - i + MARK_BYTES);
    if (status == MLORA_OK && prefix) status = append_space(model, out);
    for (size_t n; i < bytes && status == MLORA_OK; i += n) {
        n = unit(model, text + i, bytes - i, &user);
        size_t skip = 0;
        while (after_space && skip < n && text[i + skip] == ' ') skip++;
        if (skip == n) continue;
        status = append_unit(model, out, text + i + skip, n - skip);
        after_space = trim && text[i + n - 1] == ' ';
    }
    const char *space = model->escape_whitespaces ? mark : " ";
    const size_t space_bytes = model->escape_whitespaces ? MARK_BYTES : 1;
    while (trim && status == MLORA_OK && out->bytes - start >= space_bytes &&
           memcmp(out->data + out->bytes - space_bytes, space, space_bytes) == 0)
        out->bytes -= space_bytes;
    return status;
}

/* ---- merging ------------------------------------------------------------------------------- */

struct symbol {
    size_t start;
    uint32_t bytes;         /* 0: merged into the one before */
    int32_t previous, next; /* index, -1: none */
    bool frozen;            /* a user-defined piece, never merged */
};

struct work {
    const struct sentencepiece *model;
    const char *text; /* normalized */
    struct symbol *symbols;
    size_t n_symbols;
    struct merge_heap heap;
    uint32_t *left_bytes; /* [n_ids] how an unused piece was put together last; may be NULL */
};

/* The order of scores, the highest first, as that of whole numbers. */
static uint32_t order_of(float score)
{
    uint32_t bits;
    score += 0.0f; /* -0 is 0 */
    memcpy(&bits, &score, sizeof bits);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

/* Put the pair on the heap if it makes a piece. */
static mlora_status consider(struct work *work, int32_t left, int32_t right)
{
    if (left < 0 || right < 0) return MLORA_OK;
    const struct symbol *a = &work->symbols[left], *b = &work->symbols[right];
    if (a->frozen || b->frozen) return MLORA_OK;
    const uint32_t bytes = a->bytes + b->bytes;
    const int32_t id = vocab_find(&work->model->pieces, work->text + a->start, bytes);
    if (id < 0) return MLORA_OK;
    if (work->left_bytes && work->model->types[id] == PIECE_UNUSED) work->left_bytes[id] = a->bytes;
    const struct merge_candidate pair = {order_of(work->model->scores[id]), left, bytes};
    return merge_heap_push(&work->heap, pair);
}

static mlora_status merge_all(struct work *work)
{
    mlora_status status = MLORA_OK;

    for (size_t i = 1; i < work->n_symbols && status == MLORA_OK; i++)
        status = consider(work, (int32_t)i - 1, (int32_t)i);
    while (work->heap.n > 0 && status == MLORA_OK) {
        const struct merge_candidate top = merge_heap_pop(&work->heap);
        struct symbol *left = &work->symbols[top.left];
        if (left->bytes == 0 || left->next < 0) continue;
        struct symbol *right = &work->symbols[left->next];
        if (left->bytes + right->bytes != top.result) continue; /* they have grown */
        left->bytes = top.result;
        left->next = right->next;
        if (right->next >= 0) work->symbols[right->next].previous = top.left;
        right->bytes = 0;
        status = consider(work, left->previous, top.left);
        if (status == MLORA_OK) status = consider(work, top.left, left->next);
    }
    return status;
}

/* Append a symbol's ids: its piece, the parts of an unused piece, or an unknown one's bytes.
 * The depth is at most a piece's bytes. */
static mlora_status append_ids(const struct work *work, struct ids *out, const char *text,
                               uint32_t bytes, bool *after_unknown)
{
    const struct sentencepiece *model = work->model;
    const int32_t id = vocab_find(&model->pieces, text, bytes);
    mlora_status status = MLORA_OK;

    if (id >= 0 && model->types[id] == PIECE_UNUSED && work->left_bytes[id]) {
        const uint32_t left = work->left_bytes[id];
        status = append_ids(work, out, text, left, after_unknown);
        if (status != MLORA_OK) return status;
        return append_ids(work, out, text + left, bytes - left, after_unknown);
    }
    if (id >= 0) {
        *after_unknown = false;
        return ids_push(out, id);
    }
    if (model->byte_fallback) {
        for (uint32_t i = 0; i < bytes && status == MLORA_OK; i++)
            status = ids_push(out, model->byte_id[(unsigned char)text[i]]);
        return status;
    }
    if (*after_unknown) return MLORA_OK; /* a run of unknown characters is one token */
    *after_unknown = true;
    return ids_push(out, model->unknown);
}

/* Encode a stretch that merges alone. */
static mlora_status encode_word(struct work *work, struct ids *out, const char *text, size_t bytes,
                                bool *after_unknown)
{
    work->text = text;
    work->n_symbols = work->heap.n = 0;
    for (size_t i = 0, n; i < bytes; i += n) {
        const int32_t k = (int32_t)work->n_symbols++;
        struct symbol *symbol = &work->symbols[k];
        n = unit(work->model, text + i, bytes - i, &symbol->frozen);
        symbol->start = i;
        symbol->bytes = (uint32_t)n;
        symbol->previous = k - 1;
        symbol->next = i + n < bytes ? k + 1 : -1;
    }
    mlora_status status = merge_all(work);
    for (int32_t i = 0; i >= 0 && status == MLORA_OK; i = work->symbols[i].next)
        status = append_ids(work, out, text + work->symbols[i].start, work->symbols[i].bytes,
                            after_unknown);
    return status;
}

/* The bytes before the first mark that follows something else. Short stretches stay in the
 * cache, which makes a long text several times faster. */
static size_t word_bytes(const char *text, size_t bytes)
{
    size_t from = 0;
    while (bytes - from >= MARK_BYTES && memcmp(text + from, mark, MARK_BYTES) == 0)
        from += MARK_BYTES;
    const char *next = memmem(text + from, bytes - from, mark, MARK_BYTES);
    return next ? (size_t)(next - text) : bytes;
}

static mlora_status encode_normalized(const struct sentencepiece *model, struct ids *out,
                                      const char *text, size_t bytes)
{
    struct work work = {.model = model};
    bool after_unknown = false;
    size_t n_characters = 0;
    mlora_status status = MLORA_OK;

    if (bytes == 0) return MLORA_OK;
    if (bytes > INT32_MAX)
        return error_set(MLORA_EINVAL, "a text of %zu bytes is too long to encode", bytes);
    for (size_t i = 0; i < bytes; i++) n_characters += ((unsigned char)text[i] & 0xc0) != 0x80;
    work.symbols = malloc(n_characters * sizeof *work.symbols);
    if (model->n_unused) work.left_bytes = calloc((size_t)model->n_ids, sizeof *work.left_bytes);
    if (!work.symbols || (model->n_unused && !work.left_bytes))
        status = error_set(MLORA_ENOMEM, "out of memory: a text of %zu bytes", bytes);
    for (size_t n; bytes > 0 && status == MLORA_OK; text += n, bytes -= n) {
        n = model->separable ? word_bytes(text, bytes) : bytes;
        status = encode_word(&work, out, text, n, &after_unknown);
    }
    free(work.symbols);
    merge_heap_free(&work.heap);
    free(work.left_bytes);
    return status;
}

static mlora_status encode_part(const struct sentencepiece *model, struct ids *out,
                                const char *text, size_t bytes, bool prefix)
{
    struct buffer normalized = {0};
    mlora_status status =
        normalize(model, &normalized, text, bytes, prefix && model->add_dummy_prefix);
    if (status == MLORA_OK)
        status = encode_normalized(model, out, buffer_text(&normalized), normalized.bytes);
    buffer_free(&normalized);
    return status;
}

mlora_status sentencepiece_encode(const struct sentencepiece *model, struct ids *out,
                                  const char *text, size_t bytes, const char *written)
{
    if (!written) return encode_part(model, out, text, bytes, true);

    const struct added_scope scope = {.written = written};
    size_t taken = 0, position = 0;
    struct added_span span;
    mlora_status status = MLORA_OK;
    while (status == MLORA_OK && added_next(&model->control_search, &model->control, text, bytes,
                                            &scope, taken, &position, &span)) {
        if (taken < span.start)
            status = encode_part(model, out, text + taken, span.start - taken,
                                 taken == 0 || model->prefix_after_control);
        if (status == MLORA_OK) status = ids_push(out, span.id);
        taken = span.end;
    }
    if (taken < bytes && status == MLORA_OK)
        status = encode_part(model, out, text + taken, bytes - taken,
                             taken == 0 || model->prefix_after_control);
    return status;
}

/* ---- decoding ----------------------------------------------------------------------------- */

/* The byte of a byte piece, -1 for others. */
static int piece_byte(const struct sentencepiece *model, int32_t id)
{
    if (model->types[id] != PIECE_BYTE) return -1;
    for (int i = 0; i < 256; i++)
        if (model->byte_id[i] == id) return i;
    return -1;
}

/* Append a normal piece's text with spaces for marks. */
static mlora_status append_unmarked(struct buffer *out, const char *text, size_t bytes)
{
    mlora_status status = MLORA_OK;
    while (bytes > 0 && status == MLORA_OK) {
        const char *found = memmem(text, bytes, mark, MARK_BYTES);
        const size_t n = found ? (size_t)(found - text) : bytes;
        status = buffer_append(out, text, n);
        if (found && status == MLORA_OK) status = buffer_append(out, " ", 1);
        text += n + (found ? MARK_BYTES : 0);
        bytes -= n + (found ? MARK_BYTES : 0);
    }
    return status;
}

static const char *piece_text(const struct sentencepiece *model, int32_t id, size_t *bytes)
{
    const char *text = vocab_text(&model->pieces, id, bytes);
    return text ? text : vocab_text(&model->reserved, id, bytes);
}

static mlora_status append_unknown(const struct sentencepiece *model, struct buffer *out)
{
    const char *text = model->unknown_text ? model->unknown_text : " \xe2\x81\x87 ";
    return buffer_append(out, text, strlen(text));
}

mlora_status sentencepiece_decode(const struct sentencepiece *model, struct buffer *out,
                                  const int32_t *ids, int n, bool keep_special)
{
    const bool drops_space = model->add_dummy_prefix || model->remove_extra_whitespaces;
    const size_t start = out->bytes;
    bool at_start = true, dropped = false;
    struct buffer run = {0}; /* bytes of byte pieces in a row */
    mlora_status status = MLORA_OK;

    for (int i = 0; i < n && status == MLORA_OK; i++) {
        size_t bytes = 0;
        const char *text = piece_text(model, ids[i], &bytes);
        const int byte = piece_byte(model, ids[i]);
        if (byte >= 0) {
            const char raw = (char)byte;
            status = buffer_append(&run, &raw, 1);
            continue;
        }
        status = utf8_append_each(out, buffer_text(&run), run.bytes);
        run.bytes = 0;
        if (status != MLORA_OK) break;
        if (dropped || out->bytes > start) at_start = false;
        dropped = false;
        if (model->types[ids[i]] == PIECE_CONTROL) {
            if (keep_special) status = buffer_append(out, text, bytes);
            continue;
        }
        if (ids[i] == model->unknown) {
            status = append_unknown(model, out);
            continue;
        }
        if (at_start && drops_space && bytes >= MARK_BYTES && memcmp(text, mark, MARK_BYTES) == 0) {
            text += MARK_BYTES;
            bytes -= MARK_BYTES;
            dropped = !model->remove_extra_whitespaces; /* then all of them go */
        }
        status = append_unmarked(out, text, bytes);
    }
    if (status == MLORA_OK) status = utf8_append_each(out, buffer_text(&run), run.bytes);
    buffer_free(&run);
    return status;
}

mlora_status sentencepiece_piece(const struct sentencepiece *model, struct buffer *out, int32_t id)
{
    size_t bytes = 0;
    const char *text = piece_text(model, id, &bytes);
    const int byte = piece_byte(model, id);
    const char raw = (char)byte;

    if (byte >= 0) return buffer_append(out, &raw, 1);
    if (model->types[id] == PIECE_CONTROL) return MLORA_OK;
    if (id == model->unknown) return append_unknown(model, out);
    return append_unmarked(out, text, bytes);
}

int32_t sentencepiece_find(const struct sentencepiece *model, const char *text, size_t bytes)
{
    const int32_t id = vocab_find(&model->reserved, text, bytes);
    return id >= 0 ? id : vocab_find(&model->pieces, text, bytes);
}
