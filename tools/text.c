#include "tools/text.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <utf8proc.h>

#include "engine/base/distance.h"

/* One character at `text`: its length in bytes and its width in columns. */
static size_t character(const char *text, size_t bytes, int *width)
{
    utf8proc_int32_t code;
    const utf8proc_ssize_t used =
        utf8proc_iterate((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)bytes, &code);

    *width = used > 0 && code >= 0x20 ? utf8proc_charwidth(code) : 1;
    return used > 0 ? (size_t)used : 1;
}

int text_width(const char *text, size_t bytes)
{
    int columns = 0;

    for (size_t at = 0; at < bytes;) {
        int width;
        at += character(text + at, bytes - at, &width);
        columns += width;
    }
    return columns;
}

size_t text_valid(const char *text, size_t bytes)
{
    size_t at = 0;

    while (at < bytes) {
        utf8proc_int32_t code;
        const utf8proc_ssize_t used = utf8proc_iterate((const utf8proc_uint8_t *)text + at,
                                                       (utf8proc_ssize_t)(bytes - at), &code);
        if (used <= 0) break;
        at += (size_t)used;
    }
    return at;
}

void text_line(const char *text, size_t bytes, int width, size_t *used, size_t *next)
{
    size_t space = 0; /* of the last break before the limit */
    int columns = 0;

    for (size_t at = 0; at < bytes;) {
        int w;
        const size_t n = character(text + at, bytes - at, &w);
        if (text[at] == '\n') {
            *used = at;
            *next = at + 1;
            return;
        }
        if (columns + w > width && at > 0 && text[at] != ' ') {
            *used = space ? space : at;
            *next = *used;
            while (*next < bytes && text[*next] == ' ') ++*next;
            return;
        }
        if (text[at] == ' ' && columns <= width) space = at;
        columns += w;
        at += n;
    }
    *used = *next = bytes;
    while (*used > 0 && text[*used - 1] == ' ') --*used;
}

void text_wrap(FILE *out, const char *text, int indent, int column, int columns)
{
    size_t bytes = strlen(text);

    do {
        size_t used, next;
        text_line(text, bytes, columns - column, &used, &next);
        if (next == used && used < bytes) { /* in a word, such as a path: it stays whole */
            used += strcspn(text + used, " \n");
            next = used + (used < bytes);
        }
        fprintf(out, "%.*s\n", (int)used, text);
        text += next;
        bytes -= next;
        if (bytes) fprintf(out, "%*s", indent, "");
        column = indent;
    } while (bytes);
}

mlora_status text_shorten(struct buffer *out, const char *text, size_t bytes, int width)
{
    const char *newline = memchr(text, '\n', bytes);
    const size_t line = newline ? (size_t)(newline - text) : bytes;
    const int more = newline && line + 1 < bytes; /* a newline at the very end is no loss */
    size_t fits = 0;
    int columns = 0;

    if (!more && text_width(text, line) <= width) return buffer_append(out, text, line);
    while (fits < line) {
        int w;
        const size_t n = character(text + fits, line - fits, &w);
        if (columns + w > width - 3) break;
        columns += w;
        fits += n;
    }
    const mlora_status status = buffer_append(out, text, fits);
    return status == MLORA_OK ? buffer_append(out, "...", 3) : status;
}

void text_show(FILE *out, const char *text, size_t bytes, int terminal)
{
    if (!terminal) {
        fwrite(text, 1, bytes, out);
        return;
    }
    for (size_t at = 0; at < bytes;) {
        int width;
        const size_t n = character(text + at, bytes - at, &width);
        const unsigned char c = (unsigned char)text[at];
        const int c1 = n == 2 && c == 0xc2 && (unsigned char)text[at + 1] < 0xa0;
        if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7f || c1)
            putc('?', out);
        else
            fwrite(text + at, 1, n, out);
        at += n;
    }
}

size_t text_unescape(char *text, size_t bytes)
{
    static const char letters[] = "ntr\\", meanings[] = "\n\t\r\\";
    size_t to = 0;

    for (size_t from = 0; from < bytes; from++) {
        const char *letter = NULL;
        if (text[from] == '\\' && from + 1 < bytes && text[from + 1])
            letter = strchr(letters, text[from + 1]);
        if (letter) from++;
        text[to++] = letter ? meanings[letter - letters] : text[from];
    }
    text[to] = '\0';
    return to;
}

int terminal_columns(FILE *file)
{
    struct winsize size;
    const char *columns = getenv("COLUMNS");

    if (ioctl(fileno(file), TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
    const long n = columns ? strtol(columns, NULL, 10) : 0;
    return n >= 20 && n <= 1000 ? (int)n : 80;
}

/* 1234567 as "1.23 M": three digits and the unit. */
static const char *human(char *out, double value, const char *const *units)
{
    int unit = 0;

    while (value >= 999.5 && units[unit + 1]) {
        value /= 1000;
        unit++;
    }
    const int digits = unit == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(out, HUMAN_BYTES, "%.*f%s%s", digits, value, *units[unit] ? " " : "", units[unit]);
    return out;
}

const char *human_bytes(char *out, int64_t bytes)
{
    static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB", NULL};
    return human(out, (double)bytes, units);
}

const char *human_count(char *out, int64_t count)
{
    static const char *const units[] = {"", "thousand", "M", "B", NULL};
    return human(out, (double)count, units);
}

const char *human_rate(char *out, double per_second)
{
    snprintf(out, HUMAN_BYTES, "%.*f", per_second >= 100 ? 0 : 1, per_second);
    return out;
}

void nearest_offer(struct nearest *nearest, const char *candidate)
{
    const int length = (int)strlen(nearest->wanted);
    const int limit = length < 3 ? 1 : length / 3 + 1;
    const int distance = edit_distance(nearest->wanted, candidate);

    if (distance > limit || distance >= (int)strlen(candidate)) return;
    if (nearest->best && distance >= nearest->distance) return;
    nearest->best = candidate;
    nearest->distance = distance;
}
