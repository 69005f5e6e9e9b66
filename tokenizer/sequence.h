/* The lists of steps in tokenizer.json: a normalizer, a pre-tokenizer or a decoder is one step,
 * or a Sequence of them, nested. */
#ifndef MLORA_TOKENIZER_SEQUENCE_H
#define MLORA_TOKENIZER_SEQUENCE_H

#include <jansson.h>

#include "engine/mlora.h" /* mlora_status */

enum { SEQUENCE_STEPS_MAX = 64 };

struct sequence_reader {
    const char *what; /* "decoder", for messages */
    const char *list; /* the key of a Sequence's array: "decoders" */
    /* Take one step that is not a Sequence. At most SEQUENCE_STEPS_MAX calls. */
    mlora_status (*read)(void *out, const char *type, const json_t *value, const char *path);
    void *out;
    int n; /* steps so far */
};

/* Read `value` and what is in it, in order; the first failure ends it. Returns OK, EFORMAT (no
 * type, no array, nested too deep, too many steps) or what read() returns. */
mlora_status sequence_read(struct sequence_reader *reader, const json_t *value, const char *path);

#endif
