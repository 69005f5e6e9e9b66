/* Files that may be hostile: opened without following surprises, read with checked lengths.
 * Nothing is mapped: a file that is cut short while it is read gives an error, not a SIGBUS. */
#ifndef MLORA_BASE_FILE_H
#define MLORA_BASE_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/buffer.h"

struct file {
    int fd; /* -1 when closed */
    int64_t bytes;
    char *path; /* owned, for messages */
};

/* Open a regular file for reading. Returns OK, EIO (missing, unreadable, a directory, a FIFO or
 * a device) or ENOMEM. On failure `out` is closed. */
mlora_status file_open(struct file *out, const char *path);

/* Read exactly `bytes` at `offset`. Returns OK or EIO (also when the file has become shorter). */
mlora_status file_read_at(const struct file *file, void *out, size_t bytes, int64_t offset);

void file_close(struct file *file); /* accepts a zeroed or closed one */

/* Read a whole regular file of at most `max_bytes` onto the end of `out`.
 * Returns OK, EIO, EFORMAT (larger than `max_bytes`) or ENOMEM. */
mlora_status file_read_all(struct buffer *out, const char *path, int64_t max_bytes);

int file_exists(const char *path); /* 1 if there is anything at `path` */
int file_is_directory(const char *path);

/* "directory/name" as a fresh string, freed by the caller with free(); NULL when out of memory. */
char *path_join(const char *directory, const char *name);

#endif
