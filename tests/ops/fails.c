/* Fails at its third call: what the state is for, and what a failure does to the engine. */
#include <stdlib.h>

#include "kernels/mlora_op.h"

static int open_count(void **state)
{
    *state = calloc(1, sizeof(int));
    return *state ? 0 : 1;
}

static int run(const mlora_op_call *call, const void *arguments)
{
    int *n_calls = call->state;

    (void)arguments;
    return ++*n_calls == 3 ? 42 : 0;
}

MLORA_OP_EXPORT = {.abi = MLORA_OP_ABI,
                   .name = "silu_mul",
                   .backend = "cpu",
                   .run = run,
                   .open = open_count,
                   .close = free};
