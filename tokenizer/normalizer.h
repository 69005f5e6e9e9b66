/* The normalizer of a tokenizer.json: steps that rewrite a text before it is split. */
#ifndef MLORA_TOKENIZER_NORMALIZER_H
#define MLORA_TOKENIZER_NORMALIZER_H

#include <jansson.h>
#include <stdbool.h>

#include "engine/base/buffer.h"

enum normalizer_kind { NORMALIZE_PREPEND, NORMALIZE_REPLACE, NORMALIZE_NFC };

struct normalizer_step {
    enum normalizer_kind kind;
    char *pattern; /* of REPLACE, owned */
    size_t pattern_bytes;
    char *content; /* of PREPEND and REPLACE, owned */
    size_t content_bytes;
};

struct normalizer {
    struct normalizer_step *steps; /* [n] */
    int n;
};

/* Read the value of "normalizer". Returns OK, EFORMAT, EUNSUPPORTED (a kind that is not known, by
 * name) or ENOMEM; freed with normalizer_free also then. */
mlora_status normalizer_read(struct normalizer *out, const json_t *value, const char *path);
void normalizer_free(struct normalizer *normalizer); /* accepts zeroes */

/* Append the normalized `text`, valid UTF-8, to `out`.
 *
 * written  [bytes] 1 where the template wrote the byte, see added_scope; may be NULL
 * marks    receives as many bytes as `out` does: 1 where all that a byte was made from was
 *          written by the template; NULL where `written` is. NFC marks nothing.
 * moved    set when what begins the result does not stem from the first character of `text`, as
 *          the reference counts it: a Replace of several characters, or by nothing, began there
 *
 * Returns OK or ENOMEM. */
mlora_status normalizer_apply(const struct normalizer *normalizer, struct buffer *out,
                              const char *text, size_t bytes, const char *written,
                              struct buffer *marks, bool *moved);

#endif
