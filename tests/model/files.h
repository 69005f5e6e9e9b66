/* What the tests of this folder share: a directory of files made for one test, and what an error
 * must say. JSON is written with ' for ", to be readable in C. */
#ifndef TESTS_MODEL_FILES_H
#define TESTS_MODEL_FILES_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/buffer.h"

void directory_open(void);  /* for TestSuite(.init) */
void directory_close(void); /* for TestSuite(.fini) */

extern char directory[64];

/* "directory/name"; lives until the next call but three. */
const char *path_of(const char *name);

/* Write a file of the directory, and return its path. */
const char *write_file(const char *name, const void *data, size_t bytes);

/* The text with " for '; lives until the next call but three. */
const char *quoted(const char *text);

/* A file of a header and `data_bytes` zeroes. */
const char *write_safetensors(const char *name, const char *header, size_t data_bytes);

/* The last error's text must hold each of the two parts. */
void expect_text(const char *what, const char *part, const char *other_part);

/* A safetensors file in the making. */
struct builder {
    struct buffer header, data;
};

/* Add a tensor of f32 values, stored as `dtype` ("F32", "F16" or "BF16"); cols 0: a vector. */
void builder_add(struct builder *builder, const char *name, const char *dtype, int rows, int cols,
                 const float *values);
const char *builder_write(struct builder *builder, const char *file); /* and free it */

#endif
