/* The commands of the program, each in its own cmd_ file. */
#ifndef MLORA_TOOLS_COMMANDS_H
#define MLORA_TOOLS_COMMANDS_H

#include "tools/options.h"

extern const struct command command_generate, command_score, command_tokenize, command_inspect,
    command_merge, command_bench, command_check_op;

#endif
