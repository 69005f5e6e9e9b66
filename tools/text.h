/* Text for people: widths, wrapping, shortened lines, sizes, and the nearest of several names.
 * Widths are terminal columns: a letter of Chinese takes two, a combining mark none. */
#ifndef MLORA_TOOLS_TEXT_H
#define MLORA_TOOLS_TEXT_H

#include <stdint.h>
#include <stdio.h>

#include "engine/base/buffer.h"

/* Columns that `bytes` of UTF-8 take; what is not UTF-8 counts one a byte. */
int text_width(const char *text, size_t bytes);

/* The bytes at the start of `text` that are whole UTF-8 characters: `bytes` if all are. */
size_t text_valid(const char *text, size_t bytes);

/* Where a line of at most `width` columns that starts at `text` ends: `*used` bytes are shown,
 * the next line starts at `*next`. Breaks at a newline, else at the last space, else in the
 * word; at least one character is used unless `bytes` is 0. */
void text_line(const char *text, size_t bytes, int width, size_t *used, size_t *next);

/* Write `text` wrapped to `columns`, every line but the first after `indent` spaces; `column` is
 * where the first starts. Words that are longer than a line stay whole. Ends with a newline. */
void text_wrap(FILE *out, const char *text, int indent, int column, int columns);

/* The first line of `text`, shortened to `width` columns with "..." when there is more. */
mlora_status text_shorten(struct buffer *out, const char *text, size_t bytes, int width);

/* Write text that a model made. To a terminal, control characters other than newline and tab are
 * shown as '?': a model must not move the cursor or set the window's title. */
void text_show(FILE *out, const char *text, size_t bytes, int terminal);

/* Undo \n \t \r \\ in place, as --escape asks; other backslashes stay. Returns the new length. */
size_t text_unescape(char *text, size_t bytes);

/* Columns of the terminal behind `file`, else of $COLUMNS, else 80. */
int terminal_columns(FILE *file);

/* "3.95 M", "1.1 GB" (thousands): `out` has room for HUMAN_BYTES. Returns `out`. */
enum { HUMAN_BYTES = 32 };
const char *human_bytes(char *out, int64_t bytes);
const char *human_count(char *out, int64_t count);
const char *human_rate(char *out, double per_second); /* "1234", "87.3" */

/* The best of several candidates, offered one by one: `best` is NULL when none is near enough
 * to be what was meant. */
struct nearest {
    const char *wanted;
    const char *best;
    int distance;
};
void nearest_offer(struct nearest *nearest, const char *candidate);

#endif
