#include "lora/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"

enum {
    PATTERN_BYTES_MAX = 16384,
    PATTERN_DEPTH_MAX = 4000,
    PATTERN_HEAP_KIB = 8192,
};

struct pattern {
    pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *limits;
    char *label; /* path, field and text, for messages */
};

/* ---- from Python's re to PCRE2 ------------------------------------------------------------ */

static bool is_letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Copy the escape at `text`, which begins with a backslash; `*used` receives its bytes. Letters
 * that mean the same to both pass; Python's \v and \Z have other names in PCRE2. */
static mlora_status translate_escape(struct buffer *out, const char *text, bool in_class,
                                     size_t *used, const char *label)
{
    const char c = text[1];

    *used = c ? 2 : 1;
    if (c == 'v') return buffer_printf(out, "\\x0b");
    if (c == 'Z' && !in_class) return buffer_printf(out, "\\z");
    if (is_letter(c) && (!strchr(in_class ? "bdDsSwWnrtfax" : "AbBdDsSwWnrtfax", c) ||
                         (c == 'x' && text[2] == '{')))
        return error_set(MLORA_EUNSUPPORTED,
                         "%s uses the escape \\%c, which is not read here; write the characters "
                         "themselves, or list the modules by name",
                         label, c);
    return buffer_append(out, text, *used);
}

/* Check the group at `text`, which begins with "(?" or "(*": only forms that Python has. */
static mlora_status check_group(const char *text, const char *label)
{
    const char *kind = text + 2;
    bool known = false;

    if (text[1] == '?' && kind[0]) {
        known = strchr(":=!>#(-aiLmsux", kind[0]) != NULL;
        if (kind[0] == 'P') known = kind[1] == '<' || kind[1] == '=';
        if (kind[0] == '<') known = kind[1] == '=' || kind[1] == '!';
        if (kind[0] == '(') known = kind[1] != '?' && kind[1] != '*';
    }
    if (known) return MLORA_OK;
    return error_set(MLORA_EFORMAT,
                     "%s is not a regular expression of Python's re: \"%.4s\" begins no group that "
                     "it knows; correct the pattern, or list the modules by name",
                     label, text);
}

/* The bytes of "{,n}" at `text`, which PCRE2 takes literally and Python as "{0,n}"; 0: it is
 * something else. */
static size_t open_repeat_bytes(const char *text)
{
    size_t n = 2;

    if (text[0] != '{' || text[1] != ',') return 0;
    while (is_digit(text[n])) n++;
    return text[n] == '}' ? n + 1 : 0;
}

static mlora_status translate(struct buffer *out, const char *text, const char *label)
{
    mlora_status status = MLORA_OK;
    bool in_class = false;

    for (size_t i = 0, used; text[i] && status == MLORA_OK; i += used) {
        used = 1;
        if (text[i] == '\\') {
            status = translate_escape(out, text + i, in_class, &used, label);
        } else if (in_class) {
            in_class = text[i] != ']';
            /* Python has no [:alpha:]: its bracket is one more character of the class. */
            status =
                text[i] == '[' ? buffer_append(out, "\\[", 2) : buffer_append(out, text + i, 1);
        } else if (text[i] == '[') {
            in_class = true;
            if (text[i + used] == '^') used++;
            if (text[i + used] == ']') used++; /* a first bracket is a character, to both */
            status = buffer_append(out, text + i, used);
        } else if (text[i] == '(' && (text[i + 1] == '?' || text[i + 1] == '*')) {
            status = check_group(text + i, label);
            if (status != MLORA_OK) return status;
            used = 2;
            while (text[i + 2] == '#' && text[i + used] && text[i + used] != ')') used++;
            status = buffer_append(out, text + i, used);
        } else if (open_repeat_bytes(text + i)) {
            used = open_repeat_bytes(text + i);
            status = buffer_append(out, "{0", 2);
            if (status == MLORA_OK) status = buffer_append(out, text + i + 1, used - 1);
        } else {
            status = buffer_append(out, text + i, 1);
        }
    }
    return status;
}

/* ---- compile and match -------------------------------------------------------------------- */

static mlora_status compile(struct pattern *pattern, const char *text)
{
    const uint32_t options = PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C | PCRE2_DOLLAR_ENDONLY;
    PCRE2_UCHAR8 reason[128];
    PCRE2_SIZE at;
    int error;

    pattern->code =
        pcre2_compile((PCRE2_SPTR8)text, PCRE2_ZERO_TERMINATED, options, &error, &at, NULL);
    if (!pattern->code) {
        pcre2_get_error_message(error, reason, sizeof reason);
        return error_set(MLORA_EFORMAT,
                         "%s is not a valid regular expression: %s; correct the pattern, or list "
                         "the modules by name",
                         pattern->label, (const char *)reason);
    }
    pattern->match = pcre2_match_data_create_from_pattern(pattern->code, NULL);
    pattern->limits = pcre2_match_context_create(NULL);
    if (!pattern->match || !pattern->limits)
        return error_set(MLORA_ENOMEM, "%s: out of memory to match it", pattern->label);
    pcre2_set_depth_limit(pattern->limits, PATTERN_DEPTH_MAX);
    pcre2_set_heap_limit(pattern->limits, PATTERN_HEAP_KIB);
    return MLORA_OK;
}

mlora_status pattern_compile(struct pattern **out, const char *before, const char *text,
                             const char *after, const char *path, const char *field)
{
    struct buffer whole = {0}, label = {0};
    struct pattern *pattern = NULL;

    *out = NULL;
    mlora_status status =
        buffer_printf(&label, "%s: %s: the pattern \"%.100s\"", path, field, text);
    if (status != MLORA_OK) goto done;
    if (strlen(text) > PATTERN_BYTES_MAX) {
        status = error_set(MLORA_EFORMAT,
                           "%s... is %zu bytes, at most %d are read; list the "
                           "modules by name",
                           label.data, strlen(text), PATTERN_BYTES_MAX);
        goto done;
    }
    pattern = calloc(1, sizeof *pattern);
    if (!pattern) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory", label.data);
        goto done;
    }
    pattern->label = label.data;
    label = (struct buffer){0};

    status = buffer_printf(&whole, "%s", before);
    if (status != MLORA_OK) goto done;
    status = translate(&whole, text, pattern->label);
    if (status != MLORA_OK) goto done;
    status = buffer_printf(&whole, "%s", after);
    if (status != MLORA_OK) goto done;
    status = compile(pattern, whole.data);
    if (status != MLORA_OK) goto done;
    *out = pattern;
    pattern = NULL;

done:
    pattern_free(pattern);
    buffer_free(&whole);
    buffer_free(&label);
    return status;
}

void pattern_free(struct pattern *pattern)
{
    if (!pattern) return;
    pcre2_match_context_free(pattern->limits);
    pcre2_match_data_free(pattern->match);
    pcre2_code_free(pattern->code);
    free(pattern->label);
    free(pattern);
}

mlora_status pattern_match(bool *matches, struct span *group1, const struct pattern *pattern,
                           const char *subject, enum pattern_anchor anchor, uint32_t max_steps)
{
    const uint32_t options =
        PCRE2_ANCHORED | (anchor == PATTERN_WHOLE ? (uint32_t)PCRE2_ENDANCHORED : 0);
    PCRE2_UCHAR8 reason[128];

    *matches = false;
    if (group1) *group1 = (struct span){0};
    pcre2_set_match_limit(pattern->limits, max_steps);
    const int n = pcre2_match(pattern->code, (PCRE2_SPTR8)subject, PCRE2_ZERO_TERMINATED, 0,
                              options, pattern->match, pattern->limits);
    if (n == PCRE2_ERROR_NOMATCH) return MLORA_OK;
    if (n == PCRE2_ERROR_NOMEMORY)
        return error_set(MLORA_ENOMEM, "%s: out of memory to match it", pattern->label);
    if (n < 0) {
        pcre2_get_error_message(n, reason, sizeof reason);
        return error_set(MLORA_EFORMAT,
                         "%s takes too long to match against %s (%s); simplify the pattern, or "
                         "list the modules by name",
                         pattern->label, subject, (const char *)reason);
    }

    *matches = true;
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(pattern->match);
    if (group1 && n > 1 && ends[2] != PCRE2_UNSET)
        *group1 = (struct span){.begin = ends[2], .end = ends[3]};
    return MLORA_OK;
}
