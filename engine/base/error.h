/* The text of the last failure: one line per thread, set where the fact is known. */
#ifndef MLORA_BASE_ERROR_H
#define MLORA_BASE_ERROR_H

#include "engine/mlora.h" /* mlora_status */

/* Set this thread's error text and return `status`, so that a failure is one statement:
 * `return error_set(MLORA_EFORMAT, "%s: ...", path)`. The text is one line: what file, what
 * field, what was found, what is needed, what to do. Control characters that come from files
 * are shown as '?'; text beyond 1023 bytes is cut at a whole character. */
__attribute__((format(printf, 2, 3))) mlora_status error_set(mlora_status status,
                                                             const char *format, ...);

/* Put "context: " before the current text and return `status`: for a caller that knows which
 * of several files or lines failed. */
__attribute__((format(printf, 2, 3))) mlora_status error_prefix(mlora_status status,
                                                                const char *format, ...);

/* Put "; remedy" after the current text and return `status`. */
mlora_status error_remedy(mlora_status status, const char *remedy);

/* The text, never NULL, "" before any failure. Valid until the next error_set on this thread. */
const char *error_text(void);

#endif
