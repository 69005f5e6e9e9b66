#include "tests/tokenizer/files.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/base/file.h"

static char directory[64];

json_t *fixture_json(const char *path)
{
    json_error_t error;
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    cr_assert(json, "%s: %s", path, error.text);
    return json;
}

const char *files_directory(void)
{
    if (*directory) return directory;
    strcpy(directory, P_tmpdir "/mlora-test-XXXXXX");
    cr_assert(mkdtemp(directory));
    return directory;
}

void files_write(const char *name, const void *data, size_t bytes)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", files_directory(), name);
    FILE *file = fopen(path, "wb");
    cr_assert(file, "%s", path);
    cr_assert_eq(fwrite(data, 1, bytes, file), bytes);
    fclose(file);
}

void files_write_text(const char *name, const char *text)
{
    files_write(name, text, strlen(text));
}

void files_copy(const char *name, const char *from)
{
    struct buffer data = {0};
    cr_assert_eq(file_read_all(&data, from, 1 << 24), MLORA_OK, "%s", error_text());
    files_write(name, data.data, data.bytes);
    buffer_free(&data);
}

void files_remove(void)
{
    DIR *list = *directory ? opendir(directory) : NULL;
    for (struct dirent *entry; list && (entry = readdir(list));) {
        char path[400];
        snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        unlink(path);
    }
    if (list) closedir(list);
    if (*directory) rmdir(directory);
    *directory = '\0';
}

struct tokenizer *open_tokenizer(const char *path)
{
    struct tokenizer *tokenizer;
    cr_assert_eq(tokenizer_open(&tokenizer, path), MLORA_OK, "%s", error_text());
    return tokenizer;
}

void expect_refused(const char *path, mlora_status status, const char *part)
{
    struct tokenizer *tokenizer;
    const mlora_status got = tokenizer_open(&tokenizer, path);
    cr_expect_eq(got, status, "%d, expected %d with \"%s\": %s", got, status, part, error_text());
    cr_expect_null(tokenizer);
    cr_expect(strstr(error_text(), part), "\"%s\" is not in: %s", part, error_text());
    tokenizer_close(tokenizer);
}

void expect_ids(const struct tokenizer *tokenizer, const char *text, size_t bytes, int flags,
                const json_t *ids, const char *where)
{
    struct ids got = {0};
    cr_assert_eq(tokenizer_encode(tokenizer, &got, text, bytes, flags), MLORA_OK, "%s",
                 error_text());
    bool same = (size_t)got.n == json_array_size(ids);
    for (int i = 0; i < got.n && same; i++)
        same = got.data[i] == json_integer_value(json_array_get(ids, (size_t)i));
    cr_expect(same, "%s: other ids for \"%.*s\"", where, (int)bytes, text);
    ids_free(&got);
}

void encode_to_text(char *out, size_t out_bytes, const struct tokenizer *tokenizer,
                    const char *text, int flags)
{
    struct ids ids = {0};
    cr_assert_eq(tokenizer_encode(tokenizer, &ids, text, strlen(text), flags), MLORA_OK, "%s",
                 error_text());
    *out = '\0';
    size_t used = 0;
    for (int i = 0; i < ids.n && used + 16 < out_bytes; i++)
        used += (size_t)snprintf(out + used, out_bytes - used, "%s%d", i ? " " : "", ids.data[i]);
    ids_free(&ids);
}
