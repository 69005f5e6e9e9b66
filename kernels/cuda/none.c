/* Linked instead of the CUDA backend where there is no nvcc. */
#include "engine/base/error.h"
#include "kernels/kernels.h"

mlora_status cuda_device_open(struct device **out, int ordinal, const char *cache_dir)
{
    (void)cache_dir;
    *out = NULL;
    return error_set(MLORA_EUNSUPPORTED,
                     "GPU %d: built without CUDA: install nvcc (the CUDA toolkit) and build again, "
                     "or use the CPU backend",
                     ordinal);
}
