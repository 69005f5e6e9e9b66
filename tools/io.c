#include "tools/io.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>

#include "engine/base/error.h"
#include "tools/options.h"

int fail(mlora_status status)
{
    if (status == MLORA_OK) return 0;
    fflush(stdout);
    fprintf(stderr, "mlora: %s\n", mlora_error());
    return status == MLORA_ENOMEM || status == MLORA_EDEVICE ? 1 : 2;
}

void print_warnings(const char *name, const char *lines)
{
    for (const char *line = lines; line && *line;) {
        const int bytes = (int)strcspn(line, "\n");
        fprintf(stderr, "mlora: warning: %s%s%s%.*s\n", name ? "adapter " : "", name ? name : "",
                name ? ": " : "", bytes, line);
        line += bytes + (line[bytes] == '\n');
    }
}

mlora_status read_input(struct buffer *out, const char *path)
{
    enum { CHUNK = 1 << 16, MOST = 1 << 28 };
    const bool standard = strcmp(path, "-") == 0;
    FILE *in = standard ? stdin : fopen(path, "re");
    mlora_status status = MLORA_OK;

    if (standard) path = "stdin"; /* in messages */
    if (!in) return error_set(MLORA_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    for (size_t got = 1; got > 0 && status == MLORA_OK;) {
        status = buffer_reserve(out, CHUNK);
        if (status != MLORA_OK) break;
        errno = 0;
        got = fread(out->data + out->bytes, 1, CHUNK, in);
        out->bytes += got;
        out->data[out->bytes] = '\0';
        if (ferror(in))
            status = error_set(MLORA_EIO, "%s: cannot be read: %s", path, strerror(errno));
        else if (out->bytes > MOST)
            status =
                error_set(MLORA_EINVAL, "%s: is larger than %d MiB; split it", path, MOST >> 20);
    }
    if (!standard) fclose(in);
    return status;
}

mlora_status read_ids(int32_t **ids, int *n_ids, const char *text, const char *where)
{
    static const char between[] = " ,[]\t\r\n";
    struct buffer numbers = {0};
    mlora_status status = MLORA_OK;

    *ids = NULL;
    *n_ids = 0;
    for (text += strspn(text, between); *text && status == MLORA_OK;) {
        const size_t bytes = strcspn(text, between);
        char word[24];
        int64_t value;
        snprintf(word, sizeof word, "%.*s", (int)(bytes < 23 ? bytes : 23), text);
        status = option_read_int(&value, word, 0, INT32_MAX, where);
        if (status != MLORA_OK) break;
        const int32_t id = (int32_t)value;
        status = buffer_append(&numbers, &id, sizeof id);
        text += bytes;
        text += strspn(text, between);
    }
    if (status != MLORA_OK) {
        buffer_free(&numbers);
        return status;
    }
    *n_ids = (int)(numbers.bytes / sizeof **ids);
    *ids = (int32_t *)(void *)numbers.data;
    return MLORA_OK;
}

int finish_output(FILE *out)
{
    errno = 0;
    if (fflush(out) == 0 && !ferror(out)) return 0;
    fprintf(stderr, "mlora: the output cannot be written: %s\n",
            errno ? strerror(errno) : "an earlier write failed");
    return 1;
}

double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
