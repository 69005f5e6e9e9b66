/* Linked instead of the CUDA backend where there is no nvcc. */
#include "engine/base/error.h"
#include "kernels/kernels.h"
#include "kernels/lend.h"

mlora_status cuda_device_open(struct device **out, int ordinal, const char *cache_dir)
{
    (void)cache_dir;
    *out = NULL;
    return error_set(MLORA_EUNSUPPORTED,
                     "GPU %d: built without CUDA: install nvcc (the CUDA toolkit) and build again, "
                     "or use the CPU backend",
                     ordinal);
}

/* There is no CUDA device to call these with. */
void cuda_lend(struct device *dev, struct loan *loan)
{
    (void)dev, (void)loan;
}

mlora_status cuda_take_back(struct device *dev, const struct loan *loan)
{
    (void)dev, (void)loan;
    return MLORA_OK;
}

size_t cuda_lora_bytes(struct device *dev, const struct lora_view *lora,
                       const struct lora_site *site)
{
    (void)dev, (void)lora, (void)site;
    return 0;
}

size_t cuda_attention_bytes(struct device *dev, const struct kv_view *kv,
                            const struct batch_view *batch, const struct heads *heads,
                            enum dtype dtype)
{
    (void)dev, (void)kv, (void)batch, (void)heads, (void)dtype;
    return 0;
}

int cuda_capability(struct device *dev)
{
    (void)dev;
    return 0;
}

int cuda_multiprocessors(struct device *dev)
{
    (void)dev;
    return 0;
}

const char *cuda_architectures(void)
{
    return "";
}
