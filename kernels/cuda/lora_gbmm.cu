/* LoRA as gathered, batched products, the way of frameworks: each token's factors are copied
 * beside the others', filled up with zeros to the largest rank, and cublasLt multiplies them all
 * in one call. Bound by that copy; a mode to compare the others with. All of it is f32, so that
 * factors of any type keep every bit. Chunks of tokens keep the copy within CHUNK_BYTES. */
#include "kernels/cuda/blas.cuh"
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { GATHER_BLOCK = 256, CHUNK_BYTES = 64 << 20 };

/* Element i of a factor. */
static __device__ float factor_at(const void *factor, int dtype, size_t i)
{
    if (dtype == DTYPE_F32) return ((const float *)factor)[i];
    return dtype == DTYPE_F16 ? widen(((const f16 *)factor)[i]) : widen(((const bf16 *)factor)[i]);
}

/* to[j, r, k] = A[r, k] of token first + j's adapter; 0 from its rank on
 *
 *   to [n, max_rank, K]    grid (K / GATHER_BLOCK, max_rank, n)    block GATHER_BLOCK */
static __global__ void gather_a_kernel(float *to, const __grid_constant__ struct lora_args args,
                                       int slice, int first)
{
    grid_begin();
    const int k = blockIdx.x * GATHER_BLOCK + threadIdx.x, r = blockIdx.y;
    if (k >= args.K) return;
    const int t = lora_token(args, first + blockIdx.z);
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    to[((size_t)blockIdx.z * args.max_rank + r) * args.K + k] =
        f.a && r < f.R ? factor_at(f.a, f.dtype, (size_t)r * args.K + k) : 0.0f;
}

/* to[j, n, r] = B[n, r] of token first + j's adapter; 0 from its rank on
 *
 *   to [n, N, max_rank], N of the slice    grid (N max_rank / GATHER_BLOCK, n) */
static __global__ void gather_b_kernel(float *to, const __grid_constant__ struct lora_args args,
                                       int slice, int first)
{
    grid_begin();
    const int R = args.max_rank, size = args.width[slice] * R;
    const int i = blockIdx.x * GATHER_BLOCK + threadIdx.x;
    if (i >= size) return;
    const int t = lora_token(args, first + blockIdx.y), n = i / R, r = i % R;
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    to[(size_t)blockIdx.y * size + i] =
        f.a && r < f.R ? factor_at(f.b, f.dtype, (size_t)n * f.R + r) : 0.0f;
}

/* to[j, k] = x[token first + j, k]        to [n, K]    grid (K / GATHER_BLOCK, n) */
template <typename X>
static __global__ void gather_x_kernel(float *to, const X *x,
                                       const __grid_constant__ struct lora_args args, int first)
{
    grid_begin();
    const int k = blockIdx.x * GATHER_BLOCK + threadIdx.x;
    if (k >= args.K) return;
    const int t = lora_token(args, first + blockIdx.y);
    to[(size_t)blockIdx.y * args.K + k] = widen(x[(size_t)t * args.K + k]);
}

/* Between h[t, slice, r] and a row of `chunk`, r below the rank of t's adapter: to h, or from it
 * with zeros after.        chunk [n, max_rank]    grid n    block GATHER_BLOCK */
static __global__ void move_h_kernel(float *chunk, float *h, bool to_h,
                                     const __grid_constant__ struct lora_args args, int slice,
                                     int first)
{
    grid_begin();
    const int t = lora_token(args, first + blockIdx.x);
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    float *here = chunk + (size_t)blockIdx.x * args.max_rank;
    float *there = h + lora_h_row(args, t, slice);
    for (int r = threadIdx.x; r < args.max_rank; r += GATHER_BLOCK) {
        const bool has = f.a && r < f.R;
        if (!to_h)
            here[r] = has ? there[r] : 0.0f;
        else if (has)
            there[r] = here[r];
    }
}

/* y[t, offset + n] = round(y + scale * sum[j, n])    t = token first + j
 *
 *   y [T, N] X    sum [n, width]    grid (width / GATHER_BLOCK, n)    block GATHER_BLOCK */
template <typename X>
static __global__ void add_sums_kernel(X *y, const float *sum,
                                       const __grid_constant__ struct lora_args args, int slice,
                                       int first)
{
    grid_begin();
    const int n = blockIdx.x * GATHER_BLOCK + threadIdx.x, N = args.width[slice];
    if (n >= N) return;
    const int t = lora_token(args, first + blockIdx.y);
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    if (!f.a) return;
    X *out = y + (size_t)t * args.N + args.offset[slice] + n;
    *out = narrow<X>(widen(*out) + f.scale * sum[(size_t)blockIdx.y * N + n]);
}

/* ---- launchers ---------------------------------------------------------------------------- */

/* Tokens whose gathered factor, input and output take CHUNK_BYTES together, or one. */
static int tokens_a_chunk(const struct lora_args *args, int N, int K)
{
    const size_t bytes = ((size_t)N * K + N + K) * sizeof(float);
    return max_int(1, min_int(args->n_tokens, (int)(CHUNK_BYTES / bytes)));
}

size_t lora_gathered_bytes(const struct lora_args *args)
{
    size_t most = 0;
    for (int i = -1; i < args->n_slices; i++) { /* -1: shrink */
        const size_t N = i < 0 ? args->max_rank : args->width[i];
        const size_t K = i < 0 ? args->K : args->max_rank;
        const size_t n = tokens_a_chunk(args, (int)N, (int)K), pads = 2 * 64;
        const size_t bytes = (n * N * K + n * K + n * N + pads) * sizeof(float);
        if (bytes > most) most = bytes;
    }
    return most;
}

/* Memory for n tokens: w [n, N, K], x [n, K], y [n, N]. */
static bool chunk_memory(float **w, float **x, float **y, struct cuda_device *cuda, const char *op,
                         int n, int N, int K)
{
    const size_t pad = 64; /* floats: each part begins aligned */
    const size_t w_size = ((size_t)n * N * K + pad - 1) / pad * pad;
    const size_t x_size = ((size_t)n * K + pad - 1) / pad * pad;
    *w = (float *)cuda_scratch(cuda, (w_size + x_size + (size_t)n * N) * sizeof(float), op);
    if (!*w) return false;
    *x = *w + w_size;
    *y = *x + x_size;
    return true;
}

void lora_shrink_gathered(struct cuda_device *cuda, float *h, const void *x,
                          const struct lora_args *args, enum dtype dtype)
{
    const char *op = "lora_shrink";
    const int K = args->K, R = args->max_rank, chunk = tokens_a_chunk(args, R, K);
    float *a, *rows, *sums;
    if (!chunk_memory(&a, &rows, &sums, cuda, op, chunk, R, K)) return;

    for (int first = 0; first < args->n_tokens; first += chunk) {
        const int n = min_int(chunk, args->n_tokens - first), blocks = ceil_div(K, GATHER_BLOCK);
        with_activation(dtype, [&](auto type) {
            using X = decltype(type);
            cuda_launch(cuda, op, gather_x_kernel<X>, dim3(blocks, n), GATHER_BLOCK, 0, 1, rows,
                        (const X *)x, *args, first);
        });
        for (int slice = 0; slice < args->n_slices; slice++) {
            cuda_launch(cuda, op, gather_a_kernel, dim3(blocks, R, n), GATHER_BLOCK, 0, 1, a, *args,
                        slice, first);
            blas_batched(cuda, op, sums, a, rows, n, R, K);
            cuda_launch(cuda, op, move_h_kernel, n, GATHER_BLOCK, 0, 1, sums, h, true, *args, slice,
                        first);
        }
    }
}

void lora_expand_gathered(struct cuda_device *cuda, void *y, const float *h,
                          const struct lora_args *args, enum dtype dtype)
{
    const char *op = "lora_expand";
    const int R = args->max_rank;

    for (int slice = 0; slice < args->n_slices; slice++) {
        const int N = args->width[slice], chunk = tokens_a_chunk(args, N, R);
        float *b, *rows, *sums;
        if (!chunk_memory(&b, &rows, &sums, cuda, op, chunk, N, R)) return;
        for (int first = 0; first < args->n_tokens; first += chunk) {
            const int n = min_int(chunk, args->n_tokens - first);
            cuda_launch(cuda, op, move_h_kernel, n, GATHER_BLOCK, 0, 1, rows, (float *)h, false,
                        *args, slice, first);
            cuda_launch(cuda, op, gather_b_kernel, dim3(ceil_div(N * R, GATHER_BLOCK), n),
                        GATHER_BLOCK, 0, 1, b, *args, slice, first);
            blas_batched(cuda, op, sums, b, rows, n, N, R);
            with_activation(dtype, [&](auto type) {
                using X = decltype(type);
                cuda_launch(cuda, op, add_sums_kernel<X>, dim3(ceil_div(N, GATHER_BLOCK), n),
                            GATHER_BLOCK, 0, 1, (X *)y, sums, *args, slice, first);
            });
        }
    }
}
