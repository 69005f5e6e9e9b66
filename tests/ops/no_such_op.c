/* An op in the place of one that cannot be replaced. */
#include "kernels/mlora_op.h"

static int run(const mlora_op_call *call, const void *arguments)
{
    (void)call, (void)arguments;
    return 0;
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI, .name = "sample", .backend = "cpu", .run = run};
