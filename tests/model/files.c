#include "tests/model/files.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/dtype.h"

char directory[64];

void directory_open(void)
{
    strcpy(directory, "/tmp/mlora-model-XXXXXX");
    cr_assert_not_null(mkdtemp(directory));
}

void directory_close(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    cr_assert_eq(system(command), 0);
}

const char *path_of(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", directory, name);
    return path;
}

const char *write_file(const char *name, const void *data, size_t bytes)
{
    const char *path = path_of(name);
    FILE *file = fopen(path, "wb");
    cr_assert_not_null(file, "%s", path);
    cr_assert_eq(fwrite(data, 1, bytes, file), bytes);
    fclose(file);
    return path;
}

const char *quoted(const char *text)
{
    static char copies[4][16384];
    static int next;
    char *copy = copies[next++ % 4];
    cr_assert_lt(strlen(text), sizeof copies[0]);
    strcpy(copy, text);
    for (char *c = copy; *c; c++)
        if (*c == '\'') *c = '"';
    return copy;
}

const char *write_safetensors(const char *name, const char *header, size_t data_bytes)
{
    struct buffer file = {0};
    char length[8];
    const size_t n = strlen(header);

    for (int i = 0; i < 8; i++) length[i] = (char)(n >> (8 * i));
    buffer_append(&file, length, sizeof length);
    buffer_append(&file, header, n);
    for (size_t i = 0; i < data_bytes; i++) buffer_append(&file, "", 1);
    const char *path = write_file(name, file.data, file.bytes);
    buffer_free(&file);
    return path;
}

void expect_text(const char *what, const char *part, const char *other_part)
{
    cr_expect(strstr(error_text(), part) && strstr(error_text(), other_part),
              "%s: \"%s\" does not say \"%s\" and \"%s\"", what, error_text(), part, other_part);
}

void builder_add(struct builder *builder, const char *name, const char *dtype, int rows, int cols,
                 const float *values)
{
    const size_t begin = builder->data.bytes;

    for (int i = 0; i < rows * (cols ? cols : 1); i++) {
        const uint16_t bf16 = bf16_from_f32(values[i]), f16 = f16_from_f32(values[i]);
        if (strcmp(dtype, "F32") == 0) buffer_append(&builder->data, &values[i], 4);
        if (strcmp(dtype, "BF16") == 0) buffer_append(&builder->data, &bf16, 2);
        if (strcmp(dtype, "F16") == 0) buffer_append(&builder->data, &f16, 2);
    }
    buffer_printf(&builder->header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%d",
                  builder->header.bytes ? "," : "{", name, dtype, rows);
    if (cols) buffer_printf(&builder->header, ",%d", cols);
    buffer_printf(&builder->header, "],\"data_offsets\":[%zu,%zu]}", begin, builder->data.bytes);
}

const char *builder_write(struct builder *builder, const char *file)
{
    struct buffer whole = {0};
    char length[8];

    buffer_append(&builder->header, "}", 1);
    for (int i = 0; i < 8; i++) length[i] = (char)(builder->header.bytes >> (8 * i));
    buffer_append(&whole, length, sizeof length);
    buffer_append(&whole, builder->header.data, builder->header.bytes);
    buffer_append(&whole, builder->data.data, builder->data.bytes);
    const char *path = write_file(file, whole.data, whole.bytes);
    buffer_free(&whole);
    buffer_free(&builder->header);
    buffer_free(&builder->data);
    return path;
}
