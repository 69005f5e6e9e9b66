#include "tokenizer/hf.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

/* ---- encoding ----------------------------------------------------------------------------- */

/* Cut text[start, end) of `out` at the added tokens of `search`. */
static mlora_status cut_at_added(const struct hf *hf, const struct added_search *search,
                                 struct pieces *out, size_t start, size_t end, bool first,
                                 const struct added_scope *scope)
{
    const char *text = buffer_text(&out->text) + start;
    const size_t bytes = end - start;
    size_t taken = 0, position = 0;
    struct added_span span;
    mlora_status status = MLORA_OK;

    while (status == MLORA_OK &&
           added_next(search, &hf->added, text, bytes, scope, taken, &position, &span)) {
        if (taken < span.start)
            status = pieces_push(
                out, (struct piece){start + taken, start + span.start, -1, first && taken == 0});
        if (status == MLORA_OK)
            status = pieces_push(
                out, (struct piece){start + span.start, start + span.end, span.id, false});
        taken = span.end;
    }
    if (taken < bytes && status == MLORA_OK)
        status = pieces_push(out, (struct piece){start + taken, end, -1, first && taken == 0});
    return status;
}

/* Normalize every text piece of `in` and cut it at the tokens that are searched there. */
static mlora_status normalize(const struct hf *hf, struct pieces *out, const struct pieces *in,
                              const struct added_scope *scope)
{
    struct buffer marks = {0};
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < in->n && status == MLORA_OK; i++) {
        const struct piece *piece = &in->data[i];
        if (piece->id >= 0) {
            status = pieces_push(out, (struct piece){0, 0, piece->id, false});
            continue;
        }
        const size_t start = out->text.bytes;
        struct added_scope inner = {.plain = scope->plain};
        marks.bytes = 0;
        bool moved = false;
        status = normalizer_apply(
            &hf->normalizer, &out->text, in->text.data + piece->start, piece->end - piece->start,
            scope->written ? scope->written + piece->start : NULL, &marks, &moved);
        if (scope->written) inner.written = buffer_text(&marks);
        if (status == MLORA_OK)
            status = cut_at_added(hf, &hf->normalized, out, start, out->text.bytes,
                                  piece->first && !moved, &inner);
    }
    buffer_free(&marks);
    return status;
}

/* NFC cannot tell which of its output a template wrote, so a special token that is searched
 * behind it could be forged by a message. */
static mlora_status check_chat(const struct hf *hf)
{
    bool nfc = false;
    for (int i = 0; i < hf->normalizer.n; i++) nfc |= hf->normalizer.steps[i].kind == NORMALIZE_NFC;
    for (int i = 0; i < hf->added.n && nfc; i++)
        if (hf->added.tokens[i].special && hf->added.tokens[i].normalized)
            return error_set(MLORA_EUNSUPPORTED,
                             "the tokenizer searches the special token \"%.64s\" in text after "
                             "NFC, where a message could forge it; set its \"normalized\" to false "
                             "in tokenizer.json",
                             hf->added.tokens[i].text);
    return MLORA_OK;
}

mlora_status hf_encode(const struct hf *hf, struct ids *out, const char *text, size_t bytes,
                       int flags, const char *written)
{
    const struct added_scope scope = {.plain = flags & ENCODE_NO_PARSE_SPECIAL, .written = written};
    const bool with_template = !(flags & ENCODE_NO_SPECIAL);
    struct pieces raw = {0}, pieces = {0};
    struct bpe_work work = {0};

    mlora_status status = written ? check_chat(hf) : MLORA_OK;
    if (status == MLORA_OK) status = buffer_append(&raw.text, text, bytes);
    if (status == MLORA_OK) status = cut_at_added(hf, &hf->raw, &raw, 0, bytes, true, &scope);
    if (status == MLORA_OK) status = normalize(hf, &pieces, &raw, &scope);
    if (status == MLORA_OK) status = pretokenizer_apply(&hf->pretokenizer, &pieces);

    for (int i = 0; i < hf->prefix.n && with_template && status == MLORA_OK; i++)
        status = ids_push(out, hf->prefix.data[i]);
    for (size_t i = 0; i < pieces.n && status == MLORA_OK; i++) {
        const struct piece *piece = &pieces.data[i];
        if (piece->id >= 0)
            status = ids_push(out, piece->id);
        else
            status = bpe_encode(&hf->bpe, &work, out, pieces.text.data + piece->start,
                                piece->end - piece->start, scope.plain || written);
    }
    for (int i = 0; i < hf->suffix.n && with_template && status == MLORA_OK; i++)
        status = ids_push(out, hf->suffix.data[i]);

    bpe_work_free(&work);
    pieces_free(&raw);
    pieces_free(&pieces);
    return status;
}

/* ---- decoding ----------------------------------------------------------------------------- */

/* The text by which an id takes part in decoding, and whether it is a special token's. */
static const char *token_text(const struct hf *hf, int32_t id, size_t *bytes, bool *special)
{
    const int index = hf->added_of[id];
    *special = false;
    if (index < 0) return vocab_text(&hf->bpe.vocab, id, bytes);

    const struct added_token *token = &hf->added.tokens[index];
    /* the reference compares texts: one that the normalizer has changed is not seen as special */
    *special = token->special && token->bytes == token->pattern_bytes &&
               memcmp(token->text, token->pattern, token->bytes) == 0;
    *bytes = token->pattern_bytes;
    return token->pattern;
}

mlora_status hf_decode(const struct hf *hf, struct buffer *out, const int32_t *ids, int n,
                       bool keep_special)
{
    struct pieces tokens = {0};
    mlora_status status = buffer_reserve(&tokens.text, 0);

    for (int i = 0; i < n && status == MLORA_OK; i++) {
        size_t bytes;
        bool special;
        const char *text = token_text(hf, ids[i], &bytes, &special);
        if (!text || (special && !keep_special)) continue; /* a gap in the ids has no text */
        const size_t start = tokens.text.bytes;
        status = buffer_append(&tokens.text, text, bytes);
        if (status == MLORA_OK)
            status = pieces_push(&tokens, (struct piece){start, tokens.text.bytes, 0, false});
    }
    if (status == MLORA_OK) status = decoder_apply(&hf->decoder, &tokens, out);
    pieces_free(&tokens);
    return status;
}

mlora_status hf_piece(const struct hf *hf, struct buffer *out, int32_t id)
{
    size_t bytes;
    bool special;
    const char *text = token_text(hf, id, &bytes, &special);
    const int index = hf->added_of[id];
    if (!text || (index >= 0 && hf->added.tokens[index].special)) return MLORA_OK;
    return decoder_piece(&hf->decoder, out, text, bytes);
}

int32_t hf_find(const struct hf *hf, const char *text, size_t bytes)
{
    for (int i = 0; i < hf->added.n; i++) {
        const struct added_token *token = &hf->added.tokens[i];
        if (token->bytes == bytes && memcmp(token->text, text, bytes) == 0) return token->id;
    }
    return vocab_find(&hf->bpe.vocab, text, bytes);
}

void hf_free(struct hf *hf)
{
    added_search_free(&hf->raw);
    added_search_free(&hf->normalized);
    added_free(&hf->added);
    normalizer_free(&hf->normalizer);
    pretokenizer_free(&hf->pretokenizer);
    bpe_free(&hf->bpe);
    decoder_free(&hf->decoder);
    ids_free(&hf->prefix);
    ids_free(&hf->suffix);
    free(hf->added_of);
    *hf = (struct hf){0};
}
