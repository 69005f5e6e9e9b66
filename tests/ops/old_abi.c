/* An op of a version that there never was. */
#include <stddef.h>

#include "kernels/mlora_op.h"

MLORA_OP_EXPORT = {.abi = 777, .name = NULL, .backend = NULL};
