/* What the tokenizer tests share: fixture cases, and small files that a test writes itself. */
#ifndef MLORA_TESTS_TOKENIZER_FILES_H
#define MLORA_TESTS_TOKENIZER_FILES_H

#include <jansson.h>

#include "tokenizer/tokenizer.h"

/* A fixture's JSON (strings may hold NUL); fails the test if it cannot be read. json_decref. */
json_t *fixture_json(const char *path);

/* A fresh directory, and a file in it; both are removed by files_remove(). Only one at a time. */
const char *files_directory(void);
void files_write(const char *name, const void *data, size_t bytes);
void files_write_text(const char *name, const char *text);
void files_copy(const char *name, const char *from);
void files_remove(void);

/* Open what must open. */
struct tokenizer *open_tokenizer(const char *path);

/* Open what must be refused: the status must be `status` and the text must hold `part`. */
void expect_refused(const char *path, mlora_status status, const char *part);

/* Encode and compare with `ids`, a JSON array of integers. */
void expect_ids(const struct tokenizer *tokenizer, const char *text, size_t bytes, int flags,
                const json_t *ids, const char *where);

/* Encode a NUL-terminated text; the ids as text "1 2 3" in `out`. */
void encode_to_text(char *out, size_t out_bytes, const struct tokenizer *tokenizer,
                    const char *text, int flags);

#endif
