/* Regular expressions out of adapter_config.json. They are written for Python's `re` and come
 * from strangers: what PCRE2 would read differently is translated or refused, and matching has
 * limits on time, depth and memory. */
#ifndef MLORA_LORA_PATTERN_H
#define MLORA_LORA_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/mlora.h" /* mlora_status */

struct pattern; /* not for two threads at a time */

/* Compile `before` + text + `after`: the parts around the file's own text are ours. `path` and
 * `field` say in messages where the text is from.
 * Returns OK, EFORMAT (it does not compile), EUNSUPPORTED (an escape that is not translated) or
 * ENOMEM; on failure `*out` is NULL. */
mlora_status pattern_compile(struct pattern **out, const char *before, const char *text,
                             const char *after, const char *path, const char *field);
void pattern_free(struct pattern *pattern); /* accepts NULL */

enum pattern_anchor {
    PATTERN_START, /* as re.match: from the first character on     */
    PATTERN_WHOLE, /* as re.fullmatch: from the first to the last */
};

/* A part of the subject: [begin, end). */
struct span {
    size_t begin, end;
};

/* `*matches` receives the answer and `group1` (may be NULL) the first group, empty if it took no
 * part. `max_steps` bounds the work. Returns OK, or EFORMAT when a limit was reached. */
mlora_status pattern_match(bool *matches, struct span *group1, const struct pattern *pattern,
                           const char *subject, enum pattern_anchor anchor, uint32_t max_steps);

#endif
