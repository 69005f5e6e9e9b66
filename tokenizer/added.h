/* Added tokens: texts such as <|eot_id|> that are found before a text is split and merged.
 * The leftmost match wins, the longest of those that start together. They are searched by
 * narrowing a sorted list byte by byte: a text costs its bytes, times the longest token where it
 * repeats a token's beginning over and over. */
#ifndef MLORA_TOKENIZER_ADDED_H
#define MLORA_TOKENIZER_ADDED_H

#include "tokenizer/vocab.h"

enum { ADDED_BYTES_MAX = 1024 }; /* longest token */

struct added_token {
    char *text; /* owned */
    size_t bytes;
    char *pattern; /* owned: what is searched, `text` after the normalizer for normalized ones */
    size_t pattern_bytes;
    int32_t id;
    bool single_word;    /* not beside a word character */
    bool lstrip, rstrip; /* takes the whitespace before or after it */
    bool normalized;     /* searched in normalized text, others in the text as it came */
    bool special;        /* skipped by decode, and by text that must not hold special tokens */
};

struct added {
    struct added_token *tokens; /* [n] */
    int n;
};

/* The patterns of one kind, sorted. */
struct added_search {
    int *order;     /* [n] indices of tokens, by pattern */
    int first[257]; /* patterns that begin with byte b: order[first[b]] up to first[b + 1] */
    int n;
};

/* Returns OK, EFORMAT (two tokens with one pattern, or an empty or overlong one) or ENOMEM. */
mlora_status added_search_build(struct added_search *out, const struct added *added,
                                bool normalized);
void added_search_free(struct added_search *search);

/* What a search may find. */
struct added_scope {
    bool plain; /* special tokens are found, and then left as the text that they are */
    /* [bytes of the text], NULL: no limit. 1: this byte may belong to a special token. Special
     * tokens elsewhere are not even looked for, so they cannot hide one that is allowed. */
    const char *written;
};

/* A stretch of the text: a token's, or what lies between (id -1). */
struct added_span {
    size_t start, end;
    int32_t id;
};

/* Find the next token at or after *position (0 at first) and move *position behind it.
 * `taken` is where the stretch before it ended (0 at first); lstrip does not reach before it.
 * Returns false when there is none. */
bool added_next(const struct added_search *search, const struct added *added, const char *text,
                size_t bytes, const struct added_scope *scope, size_t taken, size_t *position,
                struct added_span *out);

/* Search in `patterns` only, no flags: the token's index whose pattern is the longest at `text`,
 * -1 if there is none. */
int added_longest(const struct added_search *search, const struct added *added, const char *text,
                  size_t bytes);

void added_free(struct added *added); /* accepts zeroes */

#endif
