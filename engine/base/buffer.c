#include "engine/base/buffer.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

mlora_status buffer_reserve(struct buffer *buffer, size_t bytes)
{
    if (bytes > SIZE_MAX / 2 - buffer->bytes - 1)
        return error_set(MLORA_ENOMEM,
                         "a buffer of more than half the address space was asked for");

    const size_t need = buffer->bytes + bytes + 1; /* and the NUL */
    if (need <= buffer->capacity) return MLORA_OK;

    size_t capacity = buffer->capacity ? buffer->capacity : 64;
    while (capacity < need) capacity *= 2;
    char *data = realloc(buffer->data, capacity);
    if (!data) return error_set(MLORA_ENOMEM, "out of memory: %zu bytes for a buffer", capacity);
    data[buffer->bytes] = '\0';
    buffer->data = data;
    buffer->capacity = capacity;
    return MLORA_OK;
}

mlora_status buffer_append(struct buffer *buffer, const void *data, size_t bytes)
{
    const mlora_status status = buffer_reserve(buffer, bytes);
    if (status != MLORA_OK) return status;
    if (bytes) memcpy(buffer->data + buffer->bytes, data, bytes);
    buffer->bytes += bytes;
    buffer->data[buffer->bytes] = '\0';
    return MLORA_OK;
}

mlora_status buffer_printf(struct buffer *buffer, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    const int bytes = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (bytes < 0) return error_set(MLORA_EINVAL, "text cannot be formatted");

    const mlora_status status = buffer_reserve(buffer, (size_t)bytes);
    if (status != MLORA_OK) return status;
    va_start(args, format);
    vsnprintf(buffer->data + buffer->bytes, (size_t)bytes + 1, format, args);
    va_end(args);
    buffer->bytes += (size_t)bytes;
    return MLORA_OK;
}

const char *buffer_text(const struct buffer *buffer)
{
    return buffer->data ? buffer->data : "";
}

void buffer_free(struct buffer *buffer)
{
    free(buffer->data);
    *buffer = (struct buffer){0};
}
