/* Work that may crash, in a process of its own: code from somebody else's shared object. */
#ifndef MLORA_TOOLS_CHILD_H
#define MLORA_TOOLS_CHILD_H

#include "engine/mlora.h"

/* Run `fn` in a child process and return what it returned, with its text. Where the child crashes,
 * ends itself or takes longer than `seconds`, the status is EFORMAT and the text begins with `path`,
 * whose fault it was, and names the signal. Called before any thread or GPU is in use here. */
mlora_status child_run(const char *path, unsigned seconds, mlora_status (*fn)(void *context),
                       void *context);

#endif
