/* Text to token ids and back: one API over tokenizer.json (byte-level and SentencePiece-style
 * BPE) and tokenizer.model (SentencePiece BPE). Immutable after loading; any thread may use it. */
#ifndef MLORA_TOKENIZER_H
#define MLORA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/buffer.h"

struct tokenizer;

/* Ids that grow while text is encoded. */
struct ids {
    int32_t *data; /* [n] */
    int n;
    int capacity;
};
mlora_status ids_push(struct ids *ids, int32_t id);
void ids_free(struct ids *ids);

/* `path`: a tokenizer.json, a tokenizer.model, or a directory that holds one; in a directory
 * tokenizer.json wins. tokenizer_config.json, chat_template.jinja beside it are read for the begin
 * and end tokens and the chat template. Returns OK, EIO, EFORMAT, EUNSUPPORTED or ENOMEM. */
mlora_status tokenizer_open(struct tokenizer **out, const char *path);
void tokenizer_close(struct tokenizer *tokenizer);

enum { ENCODE_NO_SPECIAL = 1, ENCODE_NO_PARSE_SPECIAL = 2 }; /* as MLORA_ENCODE_ */

/* Encode `bytes` of `text` onto the end of `out`, as the reference tokenizer does. Bytes that
 * are not UTF-8 count as U+FFFD each. Returns OK, ENOMEM, or EINVAL for a text of over 2 GB and
 * for one on which a split pattern of an unknown tokenizer does not end in time. */
mlora_status tokenizer_encode(const struct tokenizer *tokenizer, struct ids *out, const char *text,
                              size_t bytes, int flags);

/* Decode onto the end of `out` as the reference's decode(ids, skip_special_tokens = !keep_special)
 * does. Returns OK, EINVAL (an id outside the vocabulary) or ENOMEM. */
mlora_status tokenizer_decode(const struct tokenizer *tokenizer, struct buffer *out,
                              const int32_t *ids, int n, bool keep_special);

/* The bytes that `id` adds after earlier tokens (a leading "▁" is a space, a byte token its one
 * byte, a special token nothing), for streaming: they may be part of a character. Appended to
 * `out`. An id outside the vocabulary adds nothing. Returns OK or ENOMEM. */
mlora_status tokenizer_piece(const struct tokenizer *tokenizer, struct buffer *out, int32_t id);

int tokenizer_vocab_size(const struct tokenizer *tokenizer); /* one past the largest id */
int32_t tokenizer_bos(const struct tokenizer *tokenizer);    /* -1: none */
int32_t tokenizer_eos(const struct tokenizer *tokenizer);    /* -1: none */

/* The id of a token's exact text (as in the vocabulary or added tokens), -1 if there is none. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *text, size_t bytes);

/* The template's source; NULL if there is none. Lives with the tokenizer. */
const char *tokenizer_chat_template(const struct tokenizer *tokenizer);

#endif
