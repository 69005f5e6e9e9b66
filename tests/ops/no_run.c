/* An op that has nothing to call. */
#include "kernels/mlora_op.h"

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "silu_mul", .backend = "cpu"};
