/* The loop of a person at a terminal. */
#ifndef MLORA_TOOLS_INTERACTIVE_H
#define MLORA_TOOLS_INTERACTIVE_H

#include "tools/job.h"

/* Read lines and answer them until /quit or Ctrl-D. `adapter` answers first (NULL: the base
 * model). `timings`: say after each answer how fast it went. */
mlora_status interactive(mlora_engine *engine, const struct job_settings *settings,
                         const char *adapter, bool timings);

#endif
