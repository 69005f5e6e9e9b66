/* Bytes that grow: text being built, a file being read. */
#ifndef MLORA_BASE_BUFFER_H
#define MLORA_BASE_BUFFER_H

#include <stddef.h>

#include "engine/mlora.h" /* mlora_status */

struct buffer {
    char *data;   /* [capacity], always followed by a NUL that is not counted; NULL when empty */
    size_t bytes; /* in use */
    size_t capacity;
};

/* Add `bytes` of `data` at the end. Returns OK or ENOMEM; on failure the buffer is unchanged. */
mlora_status buffer_append(struct buffer *buffer, const void *data, size_t bytes);

/* Add formatted text at the end. Returns OK or ENOMEM. */
__attribute__((format(printf, 2, 3))) mlora_status buffer_printf(struct buffer *buffer,
                                                                 const char *format, ...);

/* Make room for `bytes` more without changing what is in use. Returns OK or ENOMEM. */
mlora_status buffer_reserve(struct buffer *buffer, size_t bytes);

/* The text, "" when empty: valid until the next change. */
const char *buffer_text(const struct buffer *buffer);

void buffer_free(struct buffer *buffer); /* accepts a zeroed buffer; leaves it zeroed */

#endif
