#include "engine/base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/error.h"

mlora_status file_open(struct file *out, const char *path)
{
    struct stat info;
    struct file file = {.fd = -1};

    /* O_NONBLOCK: opening a FIFO must not wait for a writer before fstat can refuse it. */
    file.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    *out = (struct file){.fd = -1};
    if (file.fd < 0) return error_set(MLORA_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(file.fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(file.fd);
        return error_set(MLORA_EIO, "%s: is not a regular file", path);
    }
    file.path = strdup(path);
    if (!file.path) {
        close(file.fd);
        return error_set(MLORA_ENOMEM, "out of memory: a path of %zu bytes", strlen(path));
    }
    file.bytes = info.st_size;
    *out = file;
    return MLORA_OK;
}

mlora_status file_read_at(const struct file *file, void *out, size_t bytes, int64_t offset)
{
    char *at = out;

    while (bytes > 0) {
        const size_t want = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30;
        const ssize_t got = pread(file->fd, at, want, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return error_set(MLORA_EIO, "%s: cannot be read: %s", file->path, strerror(errno));
        if (got == 0)
            return error_set(MLORA_EIO,
                             "%s: ends at byte %lld, %zu bytes are missing; was it "
                             "changed while it was read?",
                             file->path, (long long)offset, bytes);
        at += got;
        offset += got;
        bytes -= (size_t)got;
    }
    return MLORA_OK;
}

void file_close(struct file *file)
{
    if (file->path) { /* a zeroed struct has fd 0, which is not ours */
        close(file->fd);
        free(file->path);
    }
    *file = (struct file){.fd = -1};
}

mlora_status file_read_all(struct buffer *out, const char *path, int64_t max_bytes)
{
    struct file file = {0};

    mlora_status status = file_open(&file, path);
    if (status != MLORA_OK) return status;
    if (file.bytes > max_bytes) {
        status = error_set(MLORA_EFORMAT,
                           "%s: is %lld bytes, more than the %lld that this kind "
                           "of file may have",
                           path, (long long)file.bytes, (long long)max_bytes);
        goto done;
    }
    status = buffer_reserve(out, (size_t)file.bytes);
    if (status != MLORA_OK) goto done;
    status = file_read_at(&file, out->data + out->bytes, (size_t)file.bytes, 0);
    if (status != MLORA_OK) goto done;
    out->bytes += (size_t)file.bytes;
    out->data[out->bytes] = '\0';

done:
    file_close(&file);
    return status;
}

int file_exists(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0;
}

int file_is_directory(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

char *path_join(const char *directory, const char *name)
{
    const size_t n = strlen(directory);
    const char *slash = n > 0 && directory[n - 1] == '/' ? "" : "/";
    struct buffer path = {0};

    if (buffer_printf(&path, "%s%s%s", directory, slash, name) != MLORA_OK) return NULL;
    return path.data;
}
