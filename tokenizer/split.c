#include "tokenizer/split.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

/* ---- the splits written by hand ------------------------------------------------------------ */

/* A character and where the next one begins. */
struct at {
    uint32_t c;
    int classes; /* 0 past the end, like those of a character in no class */
    size_t next;
};

static struct at look(const char *text, size_t bytes, size_t i)
{
    struct at at = {.next = i};
    if (i >= bytes) return at;
    at.next = i + utf8_decode(text + i, bytes - i, &at.c);
    if (at.next == i) at.next++; /* not reached: the text is valid */
    at.classes = unicode_classes(at.c);
    return at;
}

static bool is_letter(struct at at)
{
    return at.classes & UNICODE_LETTER;
}

/* [^\s\p{L}\p{N}], in a text that has a character here */
static bool is_other(struct at at)
{
    return !(at.classes & (UNICODE_LETTER | UNICODE_NUMBER | UNICODE_SPACE));
}

/* The end of the run of characters of `classes` that begins at `i`, at most `limit` long. */
static size_t run(const char *text, size_t bytes, size_t i, int classes, size_t limit)
{
    while (i < bytes && limit-- > 0) {
        const struct at at = look(text, bytes, i);
        if (!(at.classes & classes)) break;
        i = at.next;
    }
    return i;
}

static size_t run_of_others(const char *text, size_t bytes, size_t i)
{
    while (i < bytes) {
        const struct at at = look(text, bytes, i);
        if (!is_other(at)) break;
        i = at.next;
    }
    return i;
}

/* 's 't 're 've 'm 'll 'd at `i`: where it ends, or `i`. With `fold`, case does not matter, and
 * U+017F is an s. */
static size_t contraction(const char *text, size_t bytes, size_t i, bool fold)
{
    static const char *const two[] = {"re", "ve", "ll"};
    char letters[2] = {0};
    size_t ends[2] = {i, i};

    if (text[i] != '\'') return i;
    size_t at = i + 1;
    for (int k = 0; k < 2 && at < bytes; k++) {
        const struct at next = look(text, bytes, at);
        uint32_t c = next.c;
        if (fold && c == 0x17f) c = 's';
        if (fold && c >= 'A' && c <= 'Z') c += 'a' - 'A';
        if (c >= 0x80) break;
        letters[k] = (char)c;
        ends[k] = at = next.next;
    }
    if (letters[0] && strchr("stmd", letters[0])) return ends[0];
    for (int k = 0; k < 3; k++)
        if (letters[0] == two[k][0] && letters[1] == two[k][1]) return ends[1];
    return i;
}

/* \s+(?!\S)|\s+ at whitespace: a run leaves its last character to the word after it. */
static size_t spaces(const char *text, size_t bytes, size_t i)
{
    const size_t end = run(text, bytes, i, UNICODE_SPACE, SIZE_MAX);
    uint32_t c;

    if (end == bytes) return end;
    const size_t last = end - utf8_decode_back(text, end, &c);
    return last > i ? last : end;
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*
 * |\s*[\r\n]+|\s+(?!\S)|\s+ : some alternative matches at every character */
static size_t llama3(const char *text, size_t bytes, size_t i, size_t digits)
{
    const struct at first = look(text, bytes, i), second = look(text, bytes, first.next);
    const size_t end = contraction(text, bytes, i, true);

    if (end > i) return end;
    if (is_letter(first)) return run(text, bytes, i, UNICODE_LETTER, SIZE_MAX);
    if (first.classes & UNICODE_NUMBER) return run(text, bytes, i, UNICODE_NUMBER, digits);
    if (first.c != '\r' && first.c != '\n' && is_letter(second))
        return run(text, bytes, first.next, UNICODE_LETTER, SIZE_MAX);

    const bool space_and_other = first.c == ' ' && first.next < bytes && is_other(second);
    if (is_other(first) || space_and_other) {
        size_t at = run_of_others(text, bytes, is_other(first) ? i : first.next);
        while (at < bytes && (text[at] == '\r' || text[at] == '\n')) at++;
        return at;
    }
    /* \s*[\r\n]+ ends behind the last line end of the run */
    const size_t run_end = run(text, bytes, i, UNICODE_SPACE, SIZE_MAX);
    for (size_t at = run_end; at > i; at--)
        if (text[at - 1] == '\r' || text[at - 1] == '\n') return at;
    return spaces(text, bytes, i);
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t gpt2(const char *text, size_t bytes, size_t i)
{
    const size_t end = contraction(text, bytes, i, false);
    if (end > i) return end;

    struct at at = look(text, bytes, i);
    size_t start = i;
    if (at.c == ' ' && at.next < bytes) {
        const struct at next = look(text, bytes, at.next);
        if (!(next.classes & UNICODE_SPACE)) {
            start = at.next;
            at = next;
        }
    }
    if (is_letter(at)) return run(text, bytes, start, UNICODE_LETTER, SIZE_MAX);
    if (at.classes & UNICODE_NUMBER) return run(text, bytes, start, UNICODE_NUMBER, SIZE_MAX);
    if (is_other(at)) return run_of_others(text, bytes, start);
    return spaces(text, bytes, i);
}

/* ---- making and matching -------------------------------------------------------------------- */

#define CONTRACTIONS "'s|'t|'re|'ve|'m|'ll|'d"
#define WORDS        "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define REST         "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static const struct {
    const char *pattern;
    enum split_kind kind;
} known[] = {
    {"(?i:" CONTRACTIONS ")" WORDS "\\p{N}{1,3}" REST, SPLIT_LLAMA3},
    {"(?i:" CONTRACTIONS ")" WORDS "\\p{N}" REST, SPLIT_QWEN2},
    {CONTRACTIONS "| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", SPLIT_GPT2},
};

mlora_status split_from_regex(struct split *out, const char *pattern, size_t bytes,
                              const char *path)
{
    *out = (struct split){.kind = SPLIT_REGEX};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strlen(known[i].pattern) != bytes || memcmp(known[i].pattern, pattern, bytes) != 0)
            continue;
        out->kind = known[i].kind;
        return MLORA_OK;
    }
    return regex_compile(&out->regex, pattern, bytes, path);
}

mlora_status split_from_string(struct split *out, const char *string, size_t bytes)
{
    *out = (struct split){.kind = SPLIT_STRING, .string_bytes = bytes};
    out->string = malloc(bytes + 1);
    if (!out->string) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes of text", bytes);
    memcpy(out->string, string, bytes);
    return MLORA_OK;
}

mlora_status split_next(const struct split *split, struct split_work *work, const char *text,
                        size_t bytes, size_t from, size_t *start, size_t *end, bool *found)
{
    *start = *end = from;
    *found = from < bytes;
    if (!*found) return MLORA_OK;

    switch (split->kind) {
    case SPLIT_LLAMA3:
        *end = llama3(text, bytes, from, 3);
        break;
    case SPLIT_QWEN2:
        *end = llama3(text, bytes, from, 1);
        break;
    case SPLIT_GPT2:
        *end = gpt2(text, bytes, from);
        break;
    case SPLIT_REGEX:
        return regex_next(split->regex, &work->match, &work->context, text, bytes, from, start, end,
                          found);
    case SPLIT_STRING: {
        const char *at = memmem(text + from, bytes - from, split->string, split->string_bytes);
        *found = at != NULL;
        if (!at) break;
        *start = (size_t)(at - text);
        *end = *start + split->string_bytes;
        break;
    }
    case SPLIT_DIGIT:
        for (*found = false; *start < bytes; *start = *end) {
            const struct at at = look(text, bytes, *start);
            *end = at.next;
            *found = at.classes & UNICODE_NUMERIC;
            if (*found) break;
        }
        break;
    }
    return MLORA_OK;
}

void split_work_free(struct split_work *work)
{
    regex_work_free(work->match, work->context);
    *work = (struct split_work){0};
}

void split_free(struct split *split)
{
    free(split->string);
    regex_free(split->regex);
    *split = (struct split){0};
}
