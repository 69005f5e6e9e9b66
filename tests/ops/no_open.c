/* Cannot be opened. */
#include "kernels/mlora_op.h"

static int open_nothing(void **state)
{
    *state = 0;
    return 5;
}

static int run(const mlora_op_call *call, const void *arguments)
{
    (void)call, (void)arguments;
    return 0;
}

MLORA_OP_EXPORT = {
    .abi = MLORA_OP_ABI, .name = "matmul", .backend = "cpu", .run = run, .open = open_nothing};
