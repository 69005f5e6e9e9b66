/* The decoder of a tokenizer.json: steps that turn a list of tokens' texts into one text. */
#ifndef MLORA_TOKENIZER_DECODER_H
#define MLORA_TOKENIZER_DECODER_H

#include <jansson.h>

#include "tokenizer/pieces.h"
#include "tokenizer/pretokenizer.h"

enum decoder_kind {
    DECODE_BYTE_LEVEL,
    DECODE_BYTE_FALLBACK,
    DECODE_REPLACE,
    DECODE_FUSE,
    DECODE_STRIP,
    DECODE_METASPACE
};

struct decoder_step {
    enum decoder_kind kind;
    char *pattern; /* of REPLACE, owned */
    size_t pattern_bytes;
    char *content; /* of REPLACE, owned */
    size_t content_bytes;
    char character[5]; /* of STRIP and METASPACE */
    int64_t strip_start, strip_stop;
    enum prepend_scheme scheme; /* of METASPACE */
};

struct decoder {
    struct decoder_step *steps; /* [n] */
    int n;
    bool joins_with_spaces; /* there is no decoder: the reference writes tokens apart */
};

/* Read the value of "decoder". Returns OK, EFORMAT, EUNSUPPORTED (a kind that is not known, by
 * name) or ENOMEM; freed with decoder_free also then. */
mlora_status decoder_read(struct decoder *out, const json_t *value, const char *path);
void decoder_free(struct decoder *decoder); /* accepts zeroes */

/* Append what `tokens`, in which every piece is a token's text, decode to. Changes `tokens`.
 * Returns OK or ENOMEM. */
mlora_status decoder_apply(const struct decoder *decoder, struct pieces *tokens,
                           struct buffer *out);

/* Append the bytes that one token's text adds after others: what looks at the beginning or the
 * end of the whole text is left out, and a byte token gives its byte. Returns OK or ENOMEM. */
mlora_status decoder_piece(const struct decoder *decoder, struct buffer *out, const char *text,
                           size_t bytes);

#endif
