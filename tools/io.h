/* What commands read and print besides their answers: input files, ids, the line of an error. */
#ifndef MLORA_TOOLS_IO_H
#define MLORA_TOOLS_IO_H

#include <stdint.h>
#include <stdio.h>

#include "engine/base/buffer.h"

/* Print "mlora: ..." on stderr; returns the exit status: 2 for what the user can mend, 1 for
 * memory and devices, 0 for OK. */
int fail(mlora_status status);

/* Print the warnings of an adapter, a line each, on stderr. `name` may be NULL, as may `lines`. */
void print_warnings(const char *name, const char *lines);

/* Read all of a file, a pipe, or "-", which is standard input, onto the end of `out`. */
mlora_status read_input(struct buffer *out, const char *path);

/* Ids in text, separated by spaces, commas or brackets: "[1, 5, 7]". `*ids` is fresh, freed with
 * free(). `where` begins the message. */
mlora_status read_ids(int32_t **ids, int *n_ids, const char *text, const char *where);

/* Whether all that was printed has arrived; if not, says so and returns 1. */
int finish_output(FILE *out);

double seconds(void); /* a clock that only goes forward */

#endif
