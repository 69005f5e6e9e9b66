/* The MLP's gate: silu(g) u. Bound by memory (at decode by L2): 6 bytes an element in bf16, 10
 * where gate_up is f32. */
#include "kernels/cuda/cuda.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { SILU_BLOCK = 256 };

/* y[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f], eight elements a thread
 *
 *   y [T, F] X    gate_up [T, 2 F] P, and what is added to it
 *   grid T F / (GROUP SILU_BLOCK)    block SILU_BLOCK */
template <typename P, typename X>
static __global__ void silu_mul_kernel(X *y, const P *gate_up, struct addend addend, int T, int F,
                                       bool aligned)
{
    grid_release();
    const int groups = ceil_div(F, GROUP); /* of a row */
    const long long item = (long long)blockIdx.x * SILU_BLOCK + threadIdx.x;
    const size_t t = item / groups;
    if (t < (size_t)T) addend = addend_of(addend, t);
    grid_wait();
    if (t >= (size_t)T) return;
    const int f = (int)(item % groups) * GROUP;

    float gate[GROUP], up[GROUP];
    load_some(gate, gate_up + t * 2 * F + f, F - f, aligned);
    load_some(up, gate_up + t * 2 * F + F + f, F - f, aligned);
    if (is_added(addend)) {
        add_some<P>(gate, addend, t * 2 * F + f, F - f, aligned);
        add_some<P>(up, addend, t * 2 * F + F + f, F - f, aligned);
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) gate[i] = silu<X>(gate[i]) * up[i];
    store_some(y + t * F + f, gate, F - f, aligned);
}

/* ---- launchers ---------------------------------------------------------------------------- */

void cuda_silu_mul(struct device *dev, void *y, const void *gate_up, enum dtype gate_up_dtype,
                   int T, int F, enum dtype dtype)
{
    struct addend addend;
    if (matmul_takes_silu((struct cuda_device *)dev, y, gate_up, gate_up_dtype, T, F, dtype))
        return;
    struct cuda_device *cuda = cuda_begin_adding(dev, gate_up, &addend);
    if (!cuda || T == 0) return;

    const long long items = (long long)T * ceil_div(F, GROUP);
    const unsigned grid = (unsigned)((items + SILU_BLOCK - 1) / SILU_BLOCK);
    const bool aligned = F % GROUP == 0 && is_aligned(y) && is_aligned(gate_up);
    with_product(gate_up_dtype, dtype, [&](auto product, auto type) {
        using P = decltype(product);
        using X = decltype(type);
        cuda_launch(cuda, "silu_mul", silu_mul_kernel<P, X>, grid, SILU_BLOCK, 0, 1, (X *)y,
                    (const P *)gate_up, addend, T, F, aligned);
    });
}
