/* Where a text is cut: the next match of a pattern. The splits of Llama-3, Qwen2 and GPT-2 are
 * recognised by their exact text and written by hand over the pinned character classes; other
 * regular expressions go through PCRE2 with limits. */
#ifndef MLORA_TOKENIZER_SPLIT_H
#define MLORA_TOKENIZER_SPLIT_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/mlora.h" /* mlora_status */

enum split_kind {
    SPLIT_LLAMA3, /* numbers of up to three digits */
    SPLIT_QWEN2,  /* numbers of one digit */
    SPLIT_GPT2,
    SPLIT_REGEX,
    SPLIT_STRING,
    SPLIT_DIGIT /* each numeric character */
};

struct split {
    enum split_kind kind;
    char *string; /* of SPLIT_STRING, owned */
    size_t string_bytes;
    void *regex; /* of SPLIT_REGEX, a pcre2_code, owned */
};

/* Make a split from a regular expression in Oniguruma's Ruby syntax, which is what the reference
 * reads. Returns OK, EFORMAT (no valid expression), EUNSUPPORTED (a construct that PCRE2 reads
 * differently, by name) or ENOMEM. */
mlora_status split_from_regex(struct split *out, const char *pattern, size_t bytes,
                              const char *path);

/* Make a split from a string that is searched as it is, not empty. Returns OK or ENOMEM. */
mlora_status split_from_string(struct split *out, const char *string, size_t bytes);

/* Memory for the matches of one text; NULL for kinds other than SPLIT_REGEX is fine. */
struct split_work {
    void *match; /* a pcre2_match_data */
    void *context;
};

/* Find the first match at or after `from` in valid UTF-8. `*found` is false when there is none.
 * A match is never empty. Returns OK, EINVAL (a regular expression took too long) or ENOMEM. */
mlora_status split_next(const struct split *split, struct split_work *work, const char *text,
                        size_t bytes, size_t from, size_t *start, size_t *end, bool *found);

void split_work_free(struct split_work *work);
void split_free(struct split *split); /* accepts zeroes */

#endif
