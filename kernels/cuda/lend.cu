/* A device on loan: the same kernels on another stream and with other scratch. */
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/lora.cuh"

extern "C" {
#include "kernels/lend.h"
}

extern "C" void cuda_lend(struct device *dev, struct loan *loan)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;

    loan->current_device = cuda->ordinal;
    cuda_check(cuda, cudaGetDevice(&loan->current_device), "cudaGetDevice");
    loan->own_stream = cuda->stream;
    cuda->stream = (cudaStream_t)loan->stream;
    cuda->scratch.memory[0] = loan->workspace;
    cuda->scratch.bytes = loan->workspace ? loan->workspace_bytes : 0;
    cuda->scratch.n = 1;
    cuda->is_lent = true;
    /* What an op reads before its grid_wait() the caller's last kernel may have written. */
    cuda->overlaps = false;
}

extern "C" mlora_status cuda_take_back(struct device *dev, const struct loan *loan)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    mlora_status status = MLORA_OK;

    if (loan->current_device != cuda->ordinal) cudaSetDevice(loan->current_device);
    cuda->stream = (cudaStream_t)loan->own_stream;
    cuda->scratch.memory[0] = NULL;
    cuda->scratch.bytes = 0;
    cuda->scratch.n = 0;
    cuda->is_lent = false;
    if (cuda->failure[0]) status = error_set(MLORA_EDEVICE, "%s", cuda->failure);
    cuda->failure[0] = '\0';
    return status;
}

extern "C" size_t cuda_lora_bytes(struct device *dev, const struct lora_view *lora,
                                  const struct lora_site *site)
{
    const struct lora_args args = lora_args(lora, site, 0);
    return lora->mode == MLORA_LORA_GBMM ? lora_gathered_bytes(&args)
                                         : lora_shrink_tile_bytes((struct cuda_device *)dev);
}

extern "C" size_t cuda_attention_bytes(struct device *dev, const struct kv_view *kv,
                                       const struct batch_view *batch, const struct heads *heads,
                                       enum dtype dtype)
{
    if (dtype != DTYPE_BF16 || kv->dtype != DTYPE_BF16) return 0; /* the kernel for any type */
    return attention_decode_bytes((struct cuda_device *)dev, batch->Q, heads->H, heads->G, heads->d,
                                  batch->max_kv);
}

extern "C" int cuda_capability(struct device *dev)
{
    const int ordinal = ((struct cuda_device *)dev)->ordinal;
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
    return 10 * major + minor;
}

extern "C" int cuda_multiprocessors(struct device *dev)
{
    return ((struct cuda_device *)dev)->n_sms;
}

#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...)    TEXT_OF(__VA_ARGS__)

extern "C" const char *cuda_architectures(void)
{
    return TEXT(__CUDA_ARCH_LIST__);
}
