/* One thread-local line: the library's only mutable global. */
#include "engine/base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { TEXT_BYTES = 1024 };

static _Thread_local char text[TEXT_BYTES];

/* Make what was printed one safe line: control characters may come from hostile files. */
static void make_one_line(void)
{
    for (unsigned char *c = (unsigned char *)text; *c; c++)
        if (*c < 0x20 || *c == 0x7f) *c = '?';

    size_t end = strlen(text);
    if (end < TEXT_BYTES - 1) return;
    while (end > 0 && ((unsigned char)text[end - 1] & 0xc0) == 0x80) end--; /* continuation bytes */
    if (end > 0) text[end - 1] = '\0';
}

mlora_status error_set(mlora_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    make_one_line();
    return status;
}

mlora_status error_prefix(mlora_status status, const char *format, ...)
{
    char old[TEXT_BYTES];
    char prefix[TEXT_BYTES];
    va_list args;

    memcpy(old, text, sizeof old);
    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    return error_set(status, "%s: %s", prefix, old);
}

mlora_status error_remedy(mlora_status status, const char *remedy)
{
    char old[TEXT_BYTES];

    memcpy(old, text, sizeof old);
    return error_set(status, "%s; %s", old, remedy);
}

const char *error_text(void)
{
    return text;
}
