/* Opening and closing a GPU, its memory, and its first failure. One stream: ops run in the order
 * of the calls. Nothing here or in the ops is global: any number of devices can be open. */
#include "kernels/cuda/cuda.cuh"

#include <stdio.h>
#include <stdlib.h>

enum { STAGING_HALF = 1 << 20, STAGING_ALIGNMENT = 256 };

/* Results of products are f32 in steps of so many tokens: in all steps, where options do not ask for
 * larger ones. Were they rounded in some of these, a request among many would get something else
 * than alone, by more than sums in another order give, whichever of the four products it is. The
 * largest differences of a log-probability between both, of the test models and on the CPU with
 * results rounded in steps of more than 64 tokens: qkv 0.082, o 0.083, gate_up 0.094, down 0.062,
 * all four 0.11, and for none of them, but sums that are off by 2^-20, 0.035.
 *
 * That costs 2 bytes more of each result, to be written and read again: of a decode step of an 8B
 * model on an H200 1.4 % at 128 tokens and 3 % at 256, with seven adapters of rank 16, which read and
 * write results once more, 6.5 and 7.6 %. */
enum { EXACT_TOKENS = 512 };

/* ---- failures ----------------------------------------------------------------------------- */

void cuda_fail(struct cuda_device *cuda, const char *op, const char *what)
{
    if (!cuda->failure[0]) snprintf(cuda->failure, sizeof cuda->failure, "%s: %s", op, what);
}

void cuda_check(struct cuda_device *cuda, cudaError_t error, const char *op)
{
    if (error != cudaSuccess) cuda_fail(cuda, op, cudaGetErrorString(error));
}

struct cuda_device *cuda_begin(struct device *dev)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    if (cuda->failure[0]) return NULL;
    cuda_check(cuda, cudaSetDevice(cuda->ordinal), "cudaSetDevice");
    cuda_catch_up(cuda);
    return cuda->failure[0] ? NULL : cuda;
}

void *cuda_grow(struct cuda_device *cuda, struct grown *grown, size_t bytes, const char *op)
{
    if (bytes <= grown->bytes) return grown->memory[grown->n - 1];

    const size_t twice = 2 * grown->bytes;
    const size_t wanted = bytes > twice ? bytes : twice;
    void *memory = NULL;
    if (grown->n == GROWN || cudaMalloc(&memory, wanted) != cudaSuccess) {
        char what[96];
        cudaGetLastError(); /* it is told here; the next op shall not find it again */
        snprintf(what, sizeof what, "out of GPU memory: %zu bytes of scratch", wanted);
        cuda_fail(cuda, op, what);
        return NULL;
    }
    grown->memory[grown->n++] = memory;
    grown->bytes = wanted;
    return memory;
}

void *cuda_scratch(struct cuda_device *cuda, size_t bytes, const char *op)
{
    if (cuda->is_lent && bytes > cuda->scratch.bytes) {
        cuda_fail(cuda, op, "the workspace is smaller than what its size function said");
        return NULL;
    }
    return cuda_grow(cuda, &cuda->scratch, bytes, op);
}

/* ---- memory ------------------------------------------------------------------------------- */

static mlora_status device_alloc(struct device *dev, size_t bytes, void **out)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    size_t free_bytes = 0, total_bytes = 0;

    *out = NULL;
    cudaError_t error = cudaSetDevice(cuda->ordinal);
    if (error == cudaSuccess) error = cudaMalloc(out, bytes > 0 ? bytes : 1);
    if (error == cudaSuccess) return MLORA_OK;
    cudaGetLastError(); /* it is told here */
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return error_set(MLORA_ENOMEM,
                     "%s: %zu bytes of GPU memory asked, %zu of %zu free: use a smaller model or "
                     "KV cache",
                     cudaGetErrorString(error), bytes, free_bytes, total_bytes);
}

static void device_free(struct device *dev, void *memory)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    if (cudaSetDevice(cuda->ordinal) == cudaSuccess) cudaFree(memory); /* waits for all ops */
}

static mlora_status device_alloc_host(struct device *dev, size_t bytes, void **out)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;

    *out = NULL;
    cudaError_t error = cudaSetDevice(cuda->ordinal);
    if (error == cudaSuccess)
        error = cudaHostAlloc(out, bytes > 0 ? bytes : 1, cudaHostAllocDefault);
    if (error == cudaSuccess) return MLORA_OK;
    cudaGetLastError(); /* it is told here */
    return error_set(MLORA_ENOMEM,
                     "%s: %zu bytes of pinned host memory asked: close other programs",
                     cudaGetErrorString(error), bytes);
}

static void device_free_host(struct device *dev, void *memory)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    if (cudaSetDevice(cuda->ordinal) != cudaSuccess) return;
    cudaStreamSynchronize(cuda->stream);
    cudaFreeHost(memory);
}

/* Pinned memory for `bytes` to come from, at most STAGING_HALF. */
static void *stage(struct cuda_device *cuda, size_t bytes)
{
    struct staging *staging = &cuda->staging;

    if (staging->used + bytes > STAGING_HALF) {
        cuda_check(cuda, cudaEventRecord(staging->left[staging->half], cuda->stream), "upload");
        staging->half = 1 - staging->half;
        staging->used = 0;
        cuda_check(cuda, cudaEventSynchronize(staging->left[staging->half]), "upload");
    }
    void *memory = staging->up + (size_t)staging->half * STAGING_HALF + staging->used;
    staging->used += (bytes + STAGING_ALIGNMENT - 1) / STAGING_ALIGNMENT * STAGING_ALIGNMENT;
    return memory;
}

static void device_upload(struct device *dev, void *to, const void *from, size_t bytes)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || bytes == 0) return;
    /* From pageable memory the call returns when `from` has been read. */
    if (bytes <= STAGING_HALF) from = memcpy(stage(cuda, bytes), from, bytes);
    cuda_check(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cuda->stream),
               "upload");
}

static void device_download(struct device *dev, void *to, const void *from, size_t bytes)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || bytes == 0) return;
    void *landing = bytes <= STAGING_HALF ? cuda->staging.down : to;
    cuda_check(cuda, cudaMemcpyAsync(landing, from, bytes, cudaMemcpyDeviceToHost, cuda->stream),
               "download");
    cuda_check(cuda, cudaStreamSynchronize(cuda->stream), "a kernel before download");
    if (landing != to) memcpy(to, landing, bytes);
}

static void device_copy(struct device *dev, void *to, const void *from, size_t bytes)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (!cuda || bytes == 0) return;
    cuda_check(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda->stream),
               "copy");
}

static mlora_status device_sync(struct device *dev)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (cuda) cuda_check(cuda, cudaStreamSynchronize(cuda->stream), "a kernel before sync");
    cuda = (struct cuda_device *)dev;
    return cuda->failure[0] ? error_set(MLORA_EDEVICE, "%s", cuda->failure) : MLORA_OK;
}

static void device_fetch(struct device *dev, void *to, const void *from, size_t bytes, int fence)
{
    struct cuda_device *cuda = cuda_begin(dev);

    assert(fence >= 0 && fence < FENCES);
    if (!cuda) return;
    cuda_check(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda->stream),
               "fetch");
    cuda_check(cuda, cudaEventRecord(cuda->fences[fence], cuda->stream), "fetch");
}

static mlora_status device_wait(struct device *dev, int fence)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (cuda) cuda_check(cuda, cudaEventSynchronize(cuda->fences[fence]), "a kernel before wait");
    cuda = (struct cuda_device *)dev;
    return cuda->failure[0] ? error_set(MLORA_EDEVICE, "%s", cuda->failure) : MLORA_OK;
}

static void device_memory(struct device *dev, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = 0;
    if (cuda_begin(dev)) cudaMemGetInfo(free_bytes, total_bytes);
}

/* Whoever asks starts kernels of its own. */
static void *device_stream(struct device *dev)
{
    struct cuda_device *cuda = cuda_begin(dev);
    if (cuda) cuda_join_for_others(cuda);
    return cuda ? cuda->stream : NULL;
}

/* ---- open, close -------------------------------------------------------------------------- */

static void device_close(struct device *dev)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    cudaSetDevice(cuda->ordinal);
    if (cuda->stream) cudaStreamSynchronize(cuda->stream);
    transfer_close(cuda->transfer);
    for (int i = 0; i < cuda->scratch.n; i++) cudaFree(cuda->scratch.memory[i]);
    for (int i = 0; i < cuda->deltas.n; i++) cudaFree(cuda->deltas.memory[i]);
    for (int i = 0; i < cuda->parts.n; i++) cudaFree(cuda->parts.memory[i]);
    cudaFree(cuda->counters);
    cudaFree(cuda->exchange);
    cudaFree(cuda->maps_of_memory);
    free(cuda->held);
    cudaFreeHost(cuda->staging.up);
    cudaFreeHost(cuda->staging.down);
    for (int half = 0; half < 2; half++)
        if (cuda->staging.left[half]) cudaEventDestroy(cuda->staging.left[half]);
    for (int i = 0; i < FENCES; i++)
        if (cuda->fences[i]) cudaEventDestroy(cuda->fences[i]);
    recordings_close(cuda->recordings);
    clock_close(cuda->marks);
    blas_close(cuda->blas);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    free(cuda);
}

/* In the order of struct kernels. */
static const struct kernels cuda_kernels = {
    device_close,         device_alloc,
    device_free,          device_alloc_host,
    device_free_host,     device_upload,
    device_download,      device_copy,
    device_sync,          device_memory,
    cuda_metadata,        cuda_embed,
    cuda_add_rms_norm,    cuda_matmul,
    cuda_head_norm,       cuda_rope,
    cuda_attention,       cuda_silu_mul,
    cuda_gather_rows,     cuda_lora_shrink,
    cuda_lora_expand,     cuda_sample,
    cuda_logprobs,        cuda_replay,
    cuda_record_end,      cuda_mark,
    cuda_elapsed,         cuda_lora_embed,
    cuda_lora_head,       cuda_lora_add_rms_norm,
    cuda_lora_head_norm,  cuda_lora_row_norms,
    cuda_extend_metadata, cuda_lora_expand_silu_mul,
    cuda_upload_beside,   cuda_move,
    device_stream,        cuda_range,
    device_fetch,         device_wait,
};

/* The parts that need the device to be current. */
static cudaError_t open_parts(struct cuda_device *cuda)
{
    const size_t bytes = COUNTERS * sizeof(int);
    struct staging *staging = &cuda->staging;

    cudaError_t error = cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMalloc((void **)&cuda->counters, bytes);
    if (error == cudaSuccess) error = cudaMemsetAsync(cuda->counters, 0, bytes, cuda->stream);
    if (error == cudaSuccess) error = matmul_open(cuda);
    if (error == cudaSuccess)
        error = cudaHostAlloc((void **)&staging->up, 2 * STAGING_HALF, cudaHostAllocDefault);
    if (error == cudaSuccess)
        error = cudaHostAlloc((void **)&staging->down, STAGING_HALF, cudaHostAllocDefault);
    for (int half = 0; half < 2 && error == cudaSuccess; half++)
        error = cudaEventCreateWithFlags(&staging->left[half], cudaEventDisableTiming);
    for (int i = 0; i < FENCES && error == cudaSuccess; i++)
        error = cudaEventCreateWithFlags(&cuda->fences[i], cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaStreamSynchronize(cuda->stream);
    return error;
}

/* A function of the driver's that is there since CUDA 12.0: the library is not linked with it. */
static void *driver_function(const char *name)
{
    cudaDriverEntryPointQueryResult result;
    void *function = NULL;
    if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result) !=
        cudaSuccess)
        cudaGetLastError(); /* the device does without */
    return function;
}

static mlora_status refuse(int ordinal, const char *why)
{
    return error_set(MLORA_EUNSUPPORTED, "GPU %d: no usable GPU: %s: use the CPU backend", ordinal,
                     why);
}

extern "C" mlora_status cuda_device_open(struct device **out, int ordinal, const char *cache_dir)
{
    struct cudaDeviceProp properties;
    int n_devices = 0;

    *out = NULL;
    cudaError_t error = cudaGetDeviceCount(&n_devices);
    if (error == cudaSuccess && (ordinal < 0 || ordinal >= n_devices))
        error = n_devices == 0 ? cudaErrorNoDevice : cudaErrorInvalidDevice;
    if (error == cudaSuccess) error = cudaSetDevice(ordinal);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, ordinal);
    if (error != cudaSuccess) {
        cudaGetLastError(); /* it is told here */
        return refuse(ordinal, cudaGetErrorString(error));
    }
    if (properties.major < 8) return refuse(ordinal, "its compute capability is below 8.0");

    struct cuda_device *cuda = (struct cuda_device *)calloc(1, sizeof *cuda);
    if (!cuda) return error_set(MLORA_ENOMEM, "out of memory for the CUDA device");
    cuda->base.ops = &cuda_kernels;
    cuda->base.backend = "cuda";
    cuda->base.exact_tokens = EXACT_TOKENS;
    snprintf(cuda->base.description, sizeof cuda->base.description, "%.64s, %.0f GiB",
             properties.name, (double)properties.totalGlobalMem / (1 << 30));
    cuda->ordinal = ordinal;
    cuda->n_sms = properties.multiProcessorCount;
    cuda->is_hopper = properties.major >= 9;
    cuda->overlaps = true;
    if (properties.major == 9) cuda->encode_tensor_map = driver_function("cuTensorMapEncodeTiled");

    error = open_parts(cuda);
    mlora_status status = error == cudaSuccess ? blas_open(cuda, cache_dir, properties.name)
                                               : refuse(ordinal, cudaGetErrorString(error));
    if (status == MLORA_OK) status = recordings_open(&cuda->recordings);
    if (status == MLORA_OK) status = transfer_open(&cuda->transfer);
    if (status != MLORA_OK) {
        device_close(&cuda->base);
        return status;
    }
    *out = &cuda->base;
    return MLORA_OK;
}
