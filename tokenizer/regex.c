#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/regex.h"

#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"

enum {
    MATCH_LIMIT = 20 * 1000 * 1000, /* steps of one match: a second or so */
    DEPTH_LIMIT = 10 * 1000,
    HEAP_LIMIT = 64 * 1024, /* KiB */
    PATTERN_BYTES_MAX = 4096
};

/* Unicode's White_Space, which is Oniguruma's \s; PCRE2's has U+180E too. */
#define SPACE_CLASS "\\t-\\r\\x{85}\\p{Z}"

static mlora_status refuse(const char *path, const char *what, const char *pattern)
{
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: the pre_tokenizer's pattern has %s, which is not supported in "
                     "patterns other than those of Llama-3, Qwen2 and GPT-2: %.200s",
                     path, what, pattern);
}

/* Rewrite the escape at `at` ("\\" and what follows). Returns OK and moves *used behind it. */
static mlora_status translate_escape(struct buffer *out, const char *at, size_t left, bool in_class,
                                     size_t *used, const char *path, const char *pattern)
{
    if (left < 2) return error_set(MLORA_EFORMAT, "%s: a pattern ends in a backslash", path);
    *used = 2;
    switch (at[1]) {
    case 's':
        return buffer_printf(out, in_class ? "%s" : "[%s]", SPACE_CLASS);
    case 'S':
        if (in_class) return refuse(path, "\\S inside a class", pattern);
        return buffer_printf(out, "[^%s]", SPACE_CLASS);
    case 'p':
    case 'P': {
        const char *close = memchr(at, '}', left);
        if (left < 4 || at[2] != '{' || !close || close - at > 32)
            return refuse(path, "\\p without a name in braces", pattern);
        if (at[3] == '^') return refuse(path, "\\p{^...}", pattern);
        *used = (size_t)(close - at) + 1;
        return buffer_append(out, at, *used);
    }
    case 'r':
    case 'n':
    case 't':
    case 'd':
        return buffer_append(out, at, 2);
    default:
        break;
    }
    if ((at[1] >= '0' && at[1] <= '9') || (at[1] >= 'A' && at[1] <= 'Z') ||
        (at[1] >= 'a' && at[1] <= 'z') || (unsigned char)at[1] >= 0x80) {
        const char what[] = {'\\', at[1], '\0'};
        return refuse(path, (unsigned char)at[1] < 0x80 ? what : "an escape that is not ASCII",
                      pattern);
    }
    return buffer_append(out, at, 2);
}

/* Copy a pattern to PCRE2's syntax, and refuse what the two libraries read differently. */
static mlora_status translate(struct buffer *out, const char *pattern, size_t bytes,
                              const char *path)
{
    static const char *const groups[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    mlora_status status = MLORA_OK;
    size_t class_start = 0; /* of the class that we are in, 0: none; counts from 1 */

    for (size_t i = 0, used; i < bytes && status == MLORA_OK; i += used) {
        const char c = pattern[i];
        used = 1;
        if (c == '\\') {
            status = translate_escape(out, pattern + i, bytes - i, class_start > 0, &used, path,
                                      pattern);
            continue;
        }
        if (class_start) {
            const bool first = i == class_start || (i == class_start + 1 && pattern[i - 1] == '^');
            if (c == '[' || (c == ']' && first))
                return refuse(path, "a bracket inside a class", pattern);
            if (c == '&' && i + 1 < bytes && pattern[i + 1] == '&')
                return refuse(path, "&& inside a class", pattern);
            if (c == ']') class_start = 0;
        } else if (c == '[') {
            class_start = i + 1;
        } else if (c == '^' || c == '$') {
            return refuse(path, "^ or $", pattern);
        } else if (c == '}' && i + 1 < bytes && pattern[i + 1] == '+') {
            return refuse(path, "a + after {}", pattern);
        } else if (c == '(' && i + 1 < bytes && pattern[i + 1] == '?') {
            bool known = false;
            for (size_t g = 0; g < sizeof groups / sizeof *groups; g++)
                known |= strncmp(pattern + i, groups[g], strlen(groups[g])) == 0;
            if (!known) return refuse(path, "a special group", pattern);
        } else if (c == '(' && i + 1 < bytes && pattern[i + 1] == '*') {
            return refuse(path, "(*", pattern);
        }
        status = buffer_append(out, &c, 1);
    }
    return status;
}

mlora_status regex_compile(void **out, const char *pattern, size_t bytes, const char *path)
{
    struct buffer translated = {0};
    int code;
    PCRE2_SIZE offset;
    uint32_t match_empty = 0;

    *out = NULL;
    if (bytes == 0 || bytes > PATTERN_BYTES_MAX)
        return error_set(MLORA_EFORMAT, "%s: a pattern is %zu bytes long, must be 1 to %d", path,
                         bytes, PATTERN_BYTES_MAX);
    mlora_status status = translate(&translated, pattern, bytes, path);
    if (status != MLORA_OK) goto done;

    pcre2_code *regex =
        pcre2_compile((PCRE2_SPTR)translated.data, translated.bytes,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &offset, NULL);
    if (!regex) {
        PCRE2_UCHAR message[128];
        pcre2_get_error_message(code, message, sizeof message);
        status = error_set(MLORA_EFORMAT, "%s: a pattern is not valid: %s: %.200s", path,
                           (const char *)message, pattern);
        goto done;
    }
    *out = regex;
    pcre2_pattern_info(regex, PCRE2_INFO_MATCHEMPTY, &match_empty);
    if (match_empty) {
        regex_free(regex);
        *out = NULL;
        status = refuse(path, "a way to match nothing", pattern);
    }

done:
    buffer_free(&translated);
    return status;
}

mlora_status regex_next(const void *regex, void **match, void **context, const char *text,
                        size_t bytes, size_t from, size_t *start, size_t *end, bool *found)
{
    if (!*match) *match = pcre2_match_data_create_from_pattern(regex, NULL);
    if (!*context) {
        *context = pcre2_match_context_create(NULL);
        if (*context) {
            pcre2_set_match_limit(*context, MATCH_LIMIT);
            pcre2_set_depth_limit(*context, DEPTH_LIMIT);
            pcre2_set_heap_limit(*context, HEAP_LIMIT);
        }
    }
    if (!*match || !*context) return error_set(MLORA_ENOMEM, "out of memory: a pattern's match");

    const int code =
        pcre2_match(regex, (PCRE2_SPTR)text, bytes, from, PCRE2_NO_UTF_CHECK, *match, *context);
    *found = code >= 0;
    if (code == PCRE2_ERROR_NOMATCH) return MLORA_OK;
    if (code == PCRE2_ERROR_NOMEMORY)
        return error_set(MLORA_ENOMEM, "out of memory: a pattern's match");
    if (code < 0)
        return error_set(MLORA_EINVAL, "the text needs more steps than the tokenizer's split "
                                       "pattern is given; shorten the text");
    const PCRE2_SIZE *span = pcre2_get_ovector_pointer(*match);
    *start = span[0];
    *end = span[1];
    *found = *end > *start; /* a lookaround may still match nothing: then there is no cut */
    return MLORA_OK;
}

void regex_work_free(void *match, void *context)
{
    pcre2_match_data_free(match);
    pcre2_match_context_free(context);
}

void regex_free(void *regex)
{
    pcre2_code_free(regex);
}
