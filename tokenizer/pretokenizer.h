/* The pre_tokenizer of a tokenizer.json: steps that cut a text into pre-tokens, which are merged
 * each for itself, and that rewrite them for the model's alphabet. */
#ifndef MLORA_TOKENIZER_PRETOKENIZER_H
#define MLORA_TOKENIZER_PRETOKENIZER_H

#include <jansson.h>

#include "tokenizer/pieces.h"
#include "tokenizer/split.h"

enum pretokenizer_kind { PRETOKENIZE_SPLIT, PRETOKENIZE_BYTE_LEVEL, PRETOKENIZE_METASPACE };

/* What becomes of the pattern's matches, in the reference's words. */
enum split_behavior {
    SPLIT_ISOLATED,
    SPLIT_REMOVED,
    SPLIT_MERGED_WITH_PREVIOUS,
    SPLIT_MERGED_WITH_NEXT,
    SPLIT_CONTIGUOUS
};

enum prepend_scheme { PREPEND_ALWAYS, PREPEND_FIRST, PREPEND_NEVER };

struct pretokenizer_step {
    enum pretokenizer_kind kind;
    bool cuts; /* `split` is in use */
    struct split split;
    enum split_behavior behavior;
    bool invert;                /* what the pattern does not match counts as its matches */
    bool add_prefix_space;      /* of BYTE_LEVEL */
    enum prepend_scheme scheme; /* of METASPACE */
    char replacement[5];        /* of METASPACE: one character */
};

struct pretokenizer {
    struct pretokenizer_step *steps; /* [n] */
    int n;
};

/* Read the value of "pre_tokenizer". Returns OK, EFORMAT, EUNSUPPORTED (a kind that is not known,
 * by name) or ENOMEM; freed with pretokenizer_free also then. */
mlora_status pretokenizer_read(struct pretokenizer *out, const json_t *value, const char *path);
void pretokenizer_free(struct pretokenizer *pretokenizer); /* accepts zeroes */

/* Replace `pieces` by what the steps make of them. Returns OK, EINVAL (see split_next) or
 * ENOMEM. */
mlora_status pretokenizer_apply(const struct pretokenizer *pretokenizer, struct pieces *pieces);

/* "replacement" of a Metaspace as NUL-terminated text, and its prepend scheme with the older
 * add_prefix_space taken into account: also for the decoder of that name. */
mlora_status metaspace_read(char replacement[5], enum prepend_scheme *scheme, const json_t *value,
                            const char *where, const char *path);

/* The character that stands for a byte in byte-level vocabularies, and back (-1: none). */
uint32_t byte_level_character(unsigned char byte);
int byte_level_byte(uint32_t c);

#endif
