#include "tokenizer/unicode.h"

#include <string.h>

static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */

bool unicode_is_python_space(uint32_t c)
{
    return (unicode_classes(c) & UNICODE_SPACE) || (c >= 0x1c && c <= 0x1f);
}

/* The bytes that a character with this first byte has, and the range of its second byte, which
 * excludes overlong forms, surrogates and what lies beyond U+10FFFF. 0: cannot start one. */
static size_t lead(unsigned char first, unsigned char *low, unsigned char *high)
{
    *low = 0x80;
    *high = 0xbf;
    if (first < 0x80) return 1;
    if (first < 0xc2) return 0;
    if (first < 0xe0) return 2;
    if (first < 0xf0) {
        if (first == 0xe0) *low = 0xa0;
        if (first == 0xed) *high = 0x9f;
        return 3;
    }
    if (first < 0xf5) {
        if (first == 0xf0) *low = 0x90;
        if (first == 0xf4) *high = 0x8f;
        return 4;
    }
    return 0;
}

/* The longest start of a character at `text`: sets `need` to the bytes that the whole one has
 * and returns how many of them are there. 0: no character starts so. */
static size_t prefix(const char *text, size_t bytes, size_t *need)
{
    const unsigned char *at = (const unsigned char *)text;
    unsigned char low, high;

    *need = bytes ? lead(at[0], &low, &high) : 0;
    if (*need == 0) return 0;
    size_t n = 1;
    while (n < *need && n < bytes && at[n] >= low && at[n] <= high) {
        low = 0x80; /* the special ranges are for the second byte only */
        high = 0xbf;
        n++;
    }
    return n;
}

size_t utf8_decode(const char *text, size_t bytes, uint32_t *c)
{
    const unsigned char *at = (const unsigned char *)text;
    size_t need;

    if (bytes && at[0] < 0x80) {
        *c = at[0];
        return 1;
    }
    *c = 0xfffd;
    if (prefix(text, bytes, &need) != need || need == 0) return 0;
    uint32_t value = at[0] & (0x7fu >> need);
    for (size_t i = 1; i < need; i++) value = value << 6 | (at[i] & 0x3f);
    *c = value;
    return need;
}

size_t utf8_decode_back(const char *text, size_t end, uint32_t *c)
{
    size_t start = end - 1;
    while (start > 0 && ((unsigned char)text[start] & 0xc0) == 0x80) start--;
    return utf8_decode(text + start, end - start, c);
}

size_t utf8_encode(char out[4], uint32_t c)
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

bool utf8_valid(const char *text, size_t bytes)
{
    uint32_t c;

    for (size_t i = 0; i < bytes;) {
        const size_t n = utf8_decode(text + i, bytes - i, &c);
        if (n == 0) return false;
        i += n;
    }
    return true;
}

/* Append `text` with U+FFFD for every ill-formed part, either its maximal length or one byte. */
static mlora_status append_repaired(struct buffer *out, const char *text, size_t bytes,
                                    bool maximal)
{
    size_t start = 0; /* of what is valid and not yet appended */
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < bytes && status == MLORA_OK;) {
        size_t need;
        const size_t n = prefix(text + i, bytes - i, &need);
        if (n == need && n > 0) {
            i += n;
            continue;
        }
        status = buffer_append(out, text + start, i - start);
        if (status == MLORA_OK) status = buffer_append(out, replacement, 3);
        i += maximal && n > 1 ? n : 1;
        start = i;
    }
    if (status == MLORA_OK) status = buffer_append(out, text + start, bytes - start);
    return status;
}

mlora_status utf8_append_each(struct buffer *out, const char *text, size_t bytes)
{
    return append_repaired(out, text, bytes, false);
}

mlora_status utf8_append_lossy(struct buffer *out, const char *text, size_t bytes)
{
    return append_repaired(out, text, bytes, true);
}

size_t utf8_incomplete(const char *text, size_t bytes)
{
    for (size_t back = 1; back <= 3 && back <= bytes; back++) {
        size_t need;
        const size_t n = prefix(text + bytes - back, back, &need);
        if (n == back && need > n) return back;
    }
    return 0;
}
