/* JSON as a table for people: an array of objects, one row each; the keys are the columns. */
#ifndef MLORA_TOOLS_TABLE_H
#define MLORA_TOOLS_TABLE_H

#include <jansson.h>
#include <stdio.h>

#include "engine/base/buffer.h"

/* Add a scalar, or a list of them, as people read it: bytes as "1.2 MB" where `key` says that
 * they are bytes, true as "yes". */
mlora_status table_cell(struct buffer *out, const char *key, const json_t *value);

/* Print an array of objects. Rows that differ in nothing but their layer become one row, with
 * the layers as a range. */
void table_print(FILE *out, const json_t *rows);

/* The same in at most `width` columns of text: keys that there is no room for, from the last one
 * on, are left out and named below. */
void table_print_within(FILE *out, const json_t *rows, int width);

#endif
