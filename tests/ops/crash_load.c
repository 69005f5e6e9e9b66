/* Crashes while it is loaded. */
#include <signal.h>

#include "kernels/mlora_op.h"

__attribute__((constructor)) static void crash(void)
{
    raise(SIGSEGV);
}
