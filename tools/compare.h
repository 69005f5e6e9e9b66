/* One prompt, an answer from the base and from every adapter. */
#ifndef MLORA_TOOLS_COMPARE_H
#define MLORA_TOOLS_COMPARE_H

#include <stdio.h>

#include "tools/job.h"

/* Make `jobs`, which holds one job, one for the base and one for each loaded adapter. */
mlora_status compare_expand(struct jobs *jobs, mlora_engine *engine);

/* Print the answers side by side, as many in a row as `columns` has room for; one under another
 * where there is room for one only. */
void compare_print(FILE *out, const struct jobs *jobs, int columns, bool terminal);

#endif
