/* Aborts when it is called first. */
#include <stdlib.h>

#include "kernels/mlora_op.h"

static int run(const mlora_op_call *call, const void *arguments)
{
    (void)call, (void)arguments;
    abort();
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "silu_mul", .backend = "cpu", .run = run};
