/* Weights times activations. Few tokens on sm_90a: matmul_sm90.cu. One token elsewhere: bound by
 * reading w once, a warp reads a row of it end to end. More: cublasLt, under the algorithm that
 * plans.cu has chosen. What cublasLt does not offer (mixed types, rows that are not 16-byte aligned)
 * is made to fit, or done by a plain tile kernel.
 *
 * f16 weights with bf16 activations: a row of x is scaled by a power of two so that its largest
 * element is near 2^14, where its 8 bits fit an f16 exactly down to 2^-38 of that element; the
 * f32 result is scaled back. */
#include <math.h>

#include "kernels/cuda/blas.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

static __device__ void store_as(void *y, enum dtype dtype, size_t i, float value)
{
    if (dtype == DTYPE_F32)
        ((float *)y)[i] = value;
    else
        ((bf16 *)y)[i] = narrow<bf16>(value);
}

/* Longer rows are cublasLt's: a warp takes too long over one. */
enum { MATVEC_BLOCK = 256, MATVEC_K = 8192 };

/* This lane's part of dot(row, x); WHOLE: rows are 16-byte aligned */
template <typename X, typename W, bool WHOLE>
static __device__ float matvec_sum(const W *row, const X *x, int K, int lane)
{
    float sum = 0.0f;
#pragma unroll 8
    for (int k = lane * GROUP; k < K; k += WARP * GROUP) {
        float a[GROUP], b[GROUP];
        load_some(a, row + k, K - k, WHOLE);
        load_some(b, x + k, K - k, WHOLE);
#pragma unroll
        for (int e = 0; e < GROUP; e++) sum += a[e] * b[e];
    }
    return sum;
}

/* One token: y[n] = dot(w[n, :], x) + bias[n]
 *
 *   y [N] y_dtype    x [K] X    w [N, K] W    bias [N] or NULL
 *   grid N / 8    block MATVEC_BLOCK, a warp for a row of w */
template <typename X, typename W>
static __global__ void __launch_bounds__(MATVEC_BLOCK)
    matvec_kernel(void *y, enum dtype y_dtype, const X *x, const W *__restrict__ w,
                  const float *__restrict__ bias, int N, int K, bool aligned)
{
    grid_begin();
    const int lane = threadIdx.x % WARP;
    const int n = blockIdx.x * (MATVEC_BLOCK / WARP) + threadIdx.x / WARP;
    if (n >= N) return;

    const W *row = w + (size_t)n * K;
    const float sum = warp_sum(aligned ? matvec_sum<X, W, true>(row, x, K, lane)
                                       : matvec_sum<X, W, false>(row, x, K, lane));
    if (lane == 0) store_as(y, y_dtype, n, sum + (bias ? bias[n] : 0.0f));
}

enum { TILE = 64, TILE_K = 16, TILE_BLOCK = 256, TILE_PAD = 4 };

/* The same for any T and types, without tensor cores: 64 x 64 outputs a block, 4 x 4 a thread.
 *
 *   y [T, N] y_dtype    x [T, K] X    w [N, K] W    bias [N] or NULL
 *   grid (N / TILE, T / TILE)    block TILE_BLOCK    shared two tiles of TILE x TILE_K */
template <typename X, typename W>
static __global__ void __launch_bounds__(TILE_BLOCK)
    matmul_tile_kernel(void *y, enum dtype y_dtype, const X *x, const W *__restrict__ w,
                       const float *__restrict__ bias, int T, int N, int K)
{
    grid_begin();
    __shared__ float x_tile[TILE_K][TILE + TILE_PAD], w_tile[TILE_K][TILE + TILE_PAD];
    const int t0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4; /* this thread's corner */
    float sum[4][4] = {};

    for (int k0 = 0; k0 < K; k0 += TILE_K) {
        for (int e = threadIdx.x; e < TILE * TILE_K; e += TILE_BLOCK) {
            const int k = e % TILE_K, r = e / TILE_K;
            x_tile[k][r] = t0 + r < T && k0 + k < K ? widen(x[(size_t)(t0 + r) * K + k0 + k]) : 0;
            w_tile[k][r] = n0 + r < N && k0 + k < K ? widen(w[(size_t)(n0 + r) * K + k0 + k]) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE_K; k++) {
            const float4 a = *(const float4 *)&x_tile[k][i], b = *(const float4 *)&w_tile[k][j];
            const float a4[4] = {a.x, a.y, a.z, a.w}, b4[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[r][c] += a4[r] * b4[c];
        }
        __syncthreads();
    }
    for (int r = 0; r < 4 && t0 + i + r < T; r++)
        for (int c = 0; c < 4 && n0 + j + c < N; c++) {
            const int n = n0 + j + c;
            store_as(y, y_dtype, (size_t)(t0 + i + r) * N + n, sum[r][c] + (bias ? bias[n] : 0));
        }
}

enum { FINISH_BLOCK = 256 };

/* y[t, n] = round(sum[t, n] * scale[t] + bias[n])
 *
 *   y [T, N] y_dtype, may be `sum`    sum [T, N]    scale [T] or NULL    bias [N] or NULL
 *   grid (N / FINISH_BLOCK, T)    block FINISH_BLOCK */
static __global__ void finish_kernel(void *y, enum dtype y_dtype, const float *sum,
                                     const float *scale, const float *__restrict__ bias, int N)
{
    grid_begin();
    const int t = blockIdx.y, n = blockIdx.x * FINISH_BLOCK + threadIdx.x;
    if (n >= N) return;
    const float value = sum[(size_t)t * N + n] * (scale ? scale[t] : 1.0f);
    store_as(y, y_dtype, (size_t)t * N + n, value + (bias ? bias[n] : 0.0f));
}

/* to[t, :] = from[t, :] / scale[t], scale[t] a power of two
 *
 *   to, from [T, K]    scale [T]    grid T    block FINISH_BLOCK */
static __global__ void to_f16_kernel(f16 *to, float *scale, const bf16 *from, int K)
{
    __shared__ float shared[FINISH_BLOCK / WARP];
    grid_begin();
    const size_t row = (size_t)blockIdx.x * K;
    float max = 0.0f;

    for (int k = threadIdx.x; k < K; k += FINISH_BLOCK)
        max = fmaxf(max, fabsf(widen(from[row + k])));
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        max = fmaxf(max, __shfl_xor_sync(~0u, max, lane));
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = max;
    __syncthreads();
    for (int i = 0; i < FINISH_BLOCK / WARP; i++) max = fmaxf(max, shared[i]);

    /* Zeros and infinities stay what they are. */
    const int exponent = max > 0.0f && max < INFINITY ? max_int(ilogbf(max) - 14, -120) : 0;
    for (int k = threadIdx.x; k < K; k += FINISH_BLOCK)
        to[row + k] = __float2half_rn(scalbnf(widen(from[row + k]), -exponent));
    if (threadIdx.x == 0) scale[blockIdx.x] = scalbnf(1.0f, exponent);
}

/* ---- launchers ---------------------------------------------------------------------------- */

/* y [T, N] y_dtype = x [T, K] w [N, K]^T, both of dtype. False where cublasLt has nothing. */
static bool blas_matmul(struct cuda_device *cuda, void *y, enum dtype y_dtype, const void *x,
                        const void *w, int T, int N, int K, enum dtype dtype)
{
    const struct product product = {T, N, K, dtype, y_dtype};
    struct blas_layouts layouts;
    cublasLtMatmulAlgo_t algorithm;

    if (!plan_find(cuda, &product, w, &algorithm)) return false;
    blas_layouts_init(&layouts, cuda->blas, &product);
    cublasStatus_t status = blas_start(cuda, &layouts, y, x, w, &algorithm);
    /* A choice made for the most tokens of the bucket may refuse this number of them. */
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_EXECUTION_FAILED &&
        plan_first(cuda, &product, &algorithm))
        status = blas_start(cuda, &layouts, y, x, w, &algorithm);
    if (status == CUBLAS_STATUS_EXECUTION_FAILED)
        cuda_fail(cuda, "matmul", "cublasLt: execution failed");
    return status == CUBLAS_STATUS_SUCCESS || status == CUBLAS_STATUS_EXECUTION_FAILED;
}

static void finish(struct cuda_device *cuda, void *y, enum dtype y_dtype, const float *sum,
                   const float *scale, const float *bias, int T, int N)
{
    const dim3 grid(ceil_div(N, FINISH_BLOCK), T);
    cuda_launch(cuda, "matmul", finish_kernel, grid, FINISH_BLOCK, 0, 1, y, y_dtype, sum, scale,
                bias, N);
}

/* Both of one type, on tensor cores (f32: without). With a bias the sum stays f32 until it is
 * added. */
static bool matmul_same(struct cuda_device *cuda, void *y, enum dtype y_dtype, const void *x,
                        const struct matrix *w, const float *bias, int T)
{
    if (!bias) return blas_matmul(cuda, y, y_dtype, x, w->data, T, w->N, w->K, w->dtype);
    float *sum = (float *)y;
    if (y_dtype != DTYPE_F32)
        sum = (float *)cuda_scratch(cuda, (size_t)T * w->N * sizeof(float), "matmul");
    if (!sum) return true;
    if (!blas_matmul(cuda, sum, DTYPE_F32, x, w->data, T, w->N, w->K, w->dtype)) return false;
    finish(cuda, y, y_dtype, sum, NULL, bias, T, w->N);
    return true;
}

static bool matmul_f16(struct cuda_device *cuda, void *y, enum dtype y_dtype, const bf16 *x,
                       const struct matrix *w, const float *bias, int T)
{
    const size_t sums = (size_t)T * w->N, scales = (size_t)ceil_div(T, 4) * 4;
    float *sum = (float *)cuda_scratch(
        cuda, (sums + 4 + scales) * sizeof(float) + (size_t)T * w->K * sizeof(f16), "matmul");
    if (!sum) return true;
    float *scale = sum + (sums + 3) / 4 * 4;
    f16 *x16 = (f16 *)(scale + scales);

    cuda_launch(cuda, "matmul", to_f16_kernel, T, FINISH_BLOCK, 0, 1, x16, scale, x, w->K);
    if (!blas_matmul(cuda, sum, DTYPE_F32, x16, w->data, T, w->N, w->K, DTYPE_F16)) return false;
    finish(cuda, y, y_dtype, sum, scale, bias, T, w->N);
    return true;
}

void cuda_matmul(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                 const struct matrix *w, const float *bias, int T, enum dtype dtype)
{
    struct cuda_device *cuda = cuda_begin_product(dev);
    if (!cuda || T == 0) return;
    assert(y_dtype != DTYPE_F16 && T <= 65535);

    const bool aligned = w->K % GROUP == 0 && is_aligned(x) && is_aligned(w->data);
    bool done = false;
    if (aligned && w->dtype == DTYPE_BF16 && dtype == DTYPE_BF16 && y_dtype == DTYPE_F32)
        done = matmul_stream(cuda, (float *)y, (const bf16 *)x, w, bias, T);
    if (done) return;
    if (cuda->left.x) lora_make_left(cuda);
    if ((T > 1 || w->K > MATVEC_K) && aligned && w->dtype == dtype)
        done = matmul_same(cuda, y, y_dtype, x, w, bias, T);
    else if (T > 1 && aligned && w->dtype == DTYPE_F16 && dtype == DTYPE_BF16)
        done = matmul_f16(cuda, y, y_dtype, (const bf16 *)x, w, bias, T);
    if (!done)
        with_activation(dtype, [&](auto x_type) {
            with_type(w->dtype, [&](auto w_type) {
                using X = decltype(x_type);
                using W = decltype(w_type);
                const dim3 grid(ceil_div(w->N, TILE), ceil_div(T, TILE));
                if (T == 1)
                    cuda_launch(cuda, "matmul", matvec_kernel<X, W>,
                                ceil_div(w->N, MATVEC_BLOCK / WARP), MATVEC_BLOCK, 0, 1, y, y_dtype,
                                (const X *)x, (const W *)w->data, bias, w->N, w->K, aligned);
                else
                    cuda_launch(cuda, "matmul", matmul_tile_kernel<X, W>, grid, TILE_BLOCK, 0, 1, y,
                                y_dtype, (const X *)x, (const W *)w->data, bias, T, w->N, w->K);
            });
        });
}
