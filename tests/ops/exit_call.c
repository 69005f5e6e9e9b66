/* Ends the process when it is called first. */
#include <unistd.h>

#include "kernels/mlora_op.h"

static int run(const mlora_op_call *call, const void *arguments)
{
    (void)call, (void)arguments;
    _exit(3);
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "silu_mul", .backend = "cpu", .run = run};
