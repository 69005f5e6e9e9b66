/* What an op was to add to y, left to the op that reads y next: parts of a product that blocks have
 * summed over different k, and what adapters add, made while the product ran. rope, silu_mul and
 * add_rms_norm add it as they read y, which costs no launch and no second way through memory; before
 * any other op it is added by itself. */
#include "kernels/cuda/cuda.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { ADD_BLOCK = 256 };

/* y[t, n] = round(y[t, n] + what is added), eight elements a thread
 *
 *   y [T, N] Y, in and out    grid (N / (GROUP ADD_BLOCK), T)    block ADD_BLOCK */
template <typename Y>
static __global__ void add_kernel(Y *y, struct addend addend, int N, bool aligned)
{
    grid_begin();
    const int n = (blockIdx.x * ADD_BLOCK + threadIdx.x) * GROUP;
    const size_t t = blockIdx.y;
    addend = addend_of(addend, t);
    if (n >= N || !is_added(addend)) return;
    float value[GROUP];
    load_some(value, y + t * N + n, N - n, aligned);
    add_some<Y>(value, addend, t * N + n, N - n, aligned);
    store_some(y + t * N + n, value, N - n, aligned);
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_catch_up(struct cuda_device *cuda)
{
    if (cuda->held_y) matmul_make_held(cuda);
    if (cuda->held_rope.qkv) rope_make_held(cuda);
    if (cuda->left.x) lora_make_left(cuda);
    if (cuda->deferred.y) cuda_add_deferred(cuda);
}

struct cuda_device *cuda_begin_adding(struct device *dev, const void *y, struct addend *addend)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;

    memset(addend, 0, sizeof *addend);
    if (!cuda->deferred.y || cuda->deferred.y != y) return cuda_begin(dev);
    *addend = cuda->deferred.addend;
    memset(&cuda->deferred, 0, sizeof cuda->deferred);
    cuda = cuda_begin(dev);
    if (cuda && addend->z) cuda_join(cuda);
    return cuda;
}

struct cuda_device *cuda_begin_beside(struct device *dev)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    const struct deferred deferred = cuda->deferred;

    memset(&cuda->deferred, 0, sizeof cuda->deferred);
    struct cuda_device *begun = cuda_begin(dev);
    cuda->deferred = deferred;
    return begun;
}

struct cuda_device *cuda_begin_product(struct device *dev)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    const struct left left = cuda->left;

    cuda->left.x = NULL;
    struct cuda_device *begun = cuda_begin(dev);
    cuda->left = left;
    return begun;
}

void cuda_defer(struct cuda_device *cuda, void *y, enum dtype y_dtype, int T, int N,
                const struct addend *addend)
{
    struct deferred *deferred = &cuda->deferred;

    if (deferred->y && deferred->y != y) cuda_add_deferred(cuda);
    deferred->y = y;
    deferred->y_dtype = y_dtype;
    deferred->T = T;
    deferred->N = N;
    if (addend->parts) {
        deferred->addend.parts = addend->parts;
        deferred->addend.n_parts = addend->n_parts;
        deferred->addend.part = addend->part;
    }
    if (addend->z) {
        deferred->addend.z = addend->z;
        deferred->addend.slot = addend->slot;
    }
}

void cuda_add_deferred(struct cuda_device *cuda)
{
    const struct deferred deferred = cuda->deferred;
    const dim3 grid(ceil_div(deferred.N, GROUP * ADD_BLOCK), deferred.T);
    const bool aligned = deferred.N % GROUP == 0 && is_aligned(deferred.y);

    memset(&cuda->deferred, 0, sizeof cuda->deferred);
    if (deferred.addend.z) cuda_join(cuda);
    with_activation(deferred.y_dtype, [&](auto type) {
        using Y = decltype(type);
        cuda_launch(cuda, "add", add_kernel<Y>, grid, ADD_BLOCK, 0, 1, (Y *)deferred.y,
                    deferred.addend, deferred.N, aligned);
    });
}
