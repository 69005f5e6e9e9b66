/* Regular expressions of pre-tokenizers that have no hand-written split: Oniguruma's syntax,
 * as far as PCRE2 means the same by it, and PCRE2's matching within limits. */
#ifndef MLORA_TOKENIZER_REGEX_H
#define MLORA_TOKENIZER_REGEX_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/mlora.h" /* mlora_status */

/* `*out` is owned by the caller, freed with regex_free. Returns OK, EFORMAT (not valid),
 * EUNSUPPORTED (a construct that the two libraries read differently, or that can match nothing;
 * by name) or ENOMEM. */
mlora_status regex_compile(void **out, const char *pattern, size_t bytes, const char *path);

/* The first match at or after `from`. `*match` and `*context` are made at the first call and kept
 * for the next ones; freed with regex_work_free. Returns OK, EINVAL (the limits were met) or
 * ENOMEM. */
mlora_status regex_next(const void *regex, void **match, void **context, const char *text,
                        size_t bytes, size_t from, size_t *start, size_t *end, bool *found);

void regex_work_free(void *match, void *context); /* accepts NULL */
void regex_free(void *regex);                     /* accepts NULL */

#endif
