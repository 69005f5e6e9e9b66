/* Character classes as the reference tokenizers see them, and UTF-8. The classes come from one
 * generated two-stage table (unicode_table.c), because the libraries at hand know other versions
 * of Unicode: one letter more or less moves a token boundary. */
#ifndef MLORA_TOKENIZER_UNICODE_H
#define MLORA_TOKENIZER_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/buffer.h"

enum {
    UNICODE_LETTER = 1,   /* \p{L} of the splits */
    UNICODE_NUMBER = 2,   /* \p{N} of the splits */
    UNICODE_SPACE = 4,    /* \s */
    UNICODE_WORD = 8,     /* \w around a single_word token */
    UNICODE_NUMERIC = 16, /* of the Digits pre-tokenizer */
    UNICODE_INERT = 32,   /* newer than the NFC of the references: it is left as it is */
    UNICODE_BLOCK = 128   /* code points in a block */
};

extern const uint8_t unicode_block[0x110000 / UNICODE_BLOCK];
extern const uint8_t unicode_class[]; /* [blocks * UNICODE_BLOCK] */

/* The classes of `c`, a sum of UNICODE_; 0 beyond U+10FFFF. */
static inline int unicode_classes(uint32_t c)
{
    if (c > 0x10ffff) return 0;
    return unicode_class[unicode_block[c / UNICODE_BLOCK] * UNICODE_BLOCK + c % UNICODE_BLOCK];
}

/* What Python's str.strip() takes away; it differs from \s at U+001C to U+001F. */
bool unicode_is_python_space(uint32_t c);

/* The character that starts at `text`: its bytes, or 0 if they are not UTF-8 (then `c` is
 * U+FFFD) or `bytes` is 0. */
size_t utf8_decode(const char *text, size_t bytes, uint32_t *c);

/* The character that ends at `text + end` in valid UTF-8, end > 0: its bytes. */
size_t utf8_decode_back(const char *text, size_t end, uint32_t *c);

/* Write `c`, a code point, and return its bytes. */
size_t utf8_encode(char out[4], uint32_t c);

bool utf8_valid(const char *text, size_t bytes);

/* Append `text` with each byte that is not part of UTF-8 as one U+FFFD. */
mlora_status utf8_append_each(struct buffer *out, const char *text, size_t bytes);

/* Append `text` with each maximal ill-formed part as one U+FFFD, as Python's errors="replace". */
mlora_status utf8_append_lossy(struct buffer *out, const char *text, size_t bytes);

/* How many bytes at the end begin a character that more bytes could complete: 0 to 3. */
size_t utf8_incomplete(const char *text, size_t bytes);

#endif
