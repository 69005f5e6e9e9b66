/* LoRA as gathered, batched products, the way of frameworks: each token's factors are copied
 * beside the others', filled up with zeros to the largest rank, and cublasLt multiplies them all
 * in one call. Bound by that copy; a mode to compare the others with. Where all factors are plain
 * bf16 the copies are, too, and h goes in as three parts; else all is f32, so that factors of any
 * type keep every bit. Chunks of tokens keep the copy within CHUNK_BYTES. */
#include "kernels/cuda/blas.cuh"
#include "kernels/cuda/lora.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { GATHER_BLOCK = 256, GATHER_UNITS = 4 * GATHER_BLOCK, CHUNK_BYTES = 64 << 20 };

enum { PARTS = 3 }; /* of h, in bf16 */

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

/* Either, of plain factors, in units of eight elements: rows of `units`, of which the factor has its
 * own number; where `is_a`, it has f.R rows, else all.
 *
 *   to [n, rows, units]    grid (rows units / GATHER_UNITS, n)    block GATHER_BLOCK */
static __global__ void gather_plain_kernel(uint4 *to, const __grid_constant__ struct lora_args args,
                                           int slice, int first, int rows, int units, bool is_a)
{
    grid_begin();
    const int t = lora_token(args, first + blockIdx.y);
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    const uint4 *from = (const uint4 *)(is_a ? f.a : f.b);
    const int own_rows = is_a ? f.R : rows, own = is_a ? units : f.R / GROUP;
    uint4 bits[GATHER_UNITS / GATHER_BLOCK];

#pragma unroll
    for (int j = 0; j < GATHER_UNITS / GATHER_BLOCK; j++) {
        const int i = blockIdx.x * GATHER_UNITS + j * GATHER_BLOCK + threadIdx.x;
        const int row = i / units, unit = i % units;
        bits[j] = make_uint4(0, 0, 0, 0);
        if (f.a && row < own_rows && unit < own) bits[j] = from[(size_t)row * own + unit];
    }
#pragma unroll
    for (int j = 0; j < GATHER_UNITS / GATHER_BLOCK; j++) {
        const int i = blockIdx.x * GATHER_UNITS + j * GATHER_BLOCK + threadIdx.x;
        if (i < rows * units) to[(size_t)blockIdx.y * rows * units + i] = bits[j];
    }
}

/* to[j, k] = x[token first + j, k]        to [n, K] W    grid (K / GATHER_BLOCK, n) */
template <typename W, typename X>
static __global__ void gather_x_kernel(W *to, const X *x,
                                       const __grid_constant__ struct lora_args args, int first)
{
    grid_begin();
    const int k = blockIdx.x * GATHER_BLOCK + threadIdx.x;
    if (k >= args.K) return;
    const int t = lora_token(args, first + blockIdx.y);
    to[(size_t)blockIdx.y * args.K + k] = narrow<W>(widen(x[(size_t)t * args.K + k]));
}

/* h[t, slice, r] = sum[j, r], r below the rank of t's adapter, t = token first + j
 *
 *   sum [n, max_rank]    grid n    block GATHER_BLOCK */
static __global__ void store_h_kernel(float *h, const float *sum,
                                      const __grid_constant__ struct lora_args args, int slice,
                                      int first)
{
    grid_begin();
    const int t = lora_token(args, first + blockIdx.x);
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    for (int r = threadIdx.x; f.a && r < f.R; r += GATHER_BLOCK)
        h[lora_h_row(args, t, slice) + r] = sum[(size_t)blockIdx.x * args.max_rank + r];
}

/* Element r of a row of R: in f32, or in rows of bf16 that add up to it. */
static __device__ void keep_row(float *to, float value, int r, int)
{
    to[r] = value;
}
static __device__ void keep_row(bf16 *to, float value, int r, int R)
{
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        to[i * R + r] = narrow<bf16>(value);
        value -= widen(to[i * R + r]);
    }
}

/* Row j, or its PARTS: h[t, slice, :], then zeros, t = token first + j
 *
 *   to [n, max_rank], or [n, PARTS, max_rank] bf16    grid n    block GATHER_BLOCK */
template <typename W>
static __global__ void gather_h_kernel(W *to, const float *h,
                                       const __grid_constant__ struct lora_args args, int slice,
                                       int first)
{
    enum { ROWS = sizeof(W) == sizeof(float) ? 1 : PARTS };
    grid_begin();
    const int t = lora_token(args, first + blockIdx.x), R = args.max_rank;
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    for (int r = threadIdx.x; r < R; r += GATHER_BLOCK)
        keep_row(to + (size_t)blockIdx.x * ROWS * R,
                 f.a && r < f.R ? h[lora_h_row(args, t, slice) + r] : 0.0f, r, R);
}

/* y[t, offset + n] = round(y + scale * the sum of sum[j, :, n])    t = token first + j
 *
 *   y [T, N] X    sum [n, rows, width]    grid (width / GATHER_BLOCK, n)    block GATHER_BLOCK */
template <typename X>
static __global__ void add_sums_kernel(X *y, const float *sum, int rows,
                                       const __grid_constant__ struct lora_args args, int slice,
                                       int first)
{
    grid_begin();
    const int n = blockIdx.x * GATHER_BLOCK + threadIdx.x, N = args.width[slice];
    if (n >= N) return;
    const int t = lora_token(args, first + blockIdx.y);
    const struct lora_factors f = lora_factors_of_token(args, t, slice);
    if (!f.a) return;
    float total = 0.0f;
    for (int i = rows - 1; i >= 0; i--) total += sum[((size_t)blockIdx.y * rows + i) * N + n];
    X *out = y + (size_t)t * args.N + args.offset[slice] + n;
    *out = narrow<X>(widen(*out) + f.scale * total);
}

/* ---- launchers ---------------------------------------------------------------------------- */

/* The memory of a chunk of n tokens: w [n, N, K], x [n, rows, K], both of one type, sum [n, rows, N]. */
struct chunk {
    int n;
    size_t w, x, sum; /* bytes, of which each part begins aligned */
};

/* As many tokens as take CHUNK_BYTES together, or one. x has one row for shrink, and h's parts for
 * expand. */
static struct chunk chunk_of(const struct lora_args *args, int N, int K, int rows, bool is_plain)
{
    const size_t size = is_plain ? sizeof(bf16) : sizeof(float);
    const size_t w = (size_t)N * K * size, x = (size_t)rows * K * size;
    const size_t sum = (size_t)rows * N * sizeof(float), pad = 255;
    struct chunk chunk = {};

    chunk.n = max_int(1, min_int(args->n_tokens, (int)(CHUNK_BYTES / (w + x + sum))));
    chunk.w = (chunk.n * w + pad) / (pad + 1) * (pad + 1);
    chunk.x = (chunk.n * x + pad) / (pad + 1) * (pad + 1);
    chunk.sum = chunk.n * sum;
    return chunk;
}

static struct chunk shrink_chunk(const struct lora_args *args, bool is_plain)
{
    return chunk_of(args, args->max_rank, args->K, 1, is_plain);
}

static struct chunk expand_chunk(const struct lora_args *args, int slice, bool is_plain)
{
    return chunk_of(args, args->width[slice], args->max_rank, is_plain ? PARTS : 1, is_plain);
}

size_t lora_gathered_bytes(const struct lora_args *args)
{
    size_t most = 0;
    for (int is_plain = 0; is_plain < 2; is_plain++)
        for (int i = -1; i < args->n_slices; i++) { /* -1: shrink */
            const struct chunk chunk =
                i < 0 ? shrink_chunk(args, is_plain) : expand_chunk(args, i, is_plain);
            const size_t bytes = chunk.w + chunk.x + chunk.sum;
            if (bytes > most) most = bytes;
        }
    return most;
}

static bool chunk_memory(void **w, void **x, float **sum, struct cuda_device *cuda, const char *op,
                         const struct chunk *chunk)
{
    char *memory = (char *)cuda_scratch(cuda, chunk->w + chunk->x + chunk->sum, op);
    if (!memory) return false;
    *w = memory;
    *x = memory + chunk->w;
    *sum = (float *)(memory + chunk->w + chunk->x);
    return true;
}

/* Whether the copies are bf16, in units of eight elements. */
static bool has_plain_copies(const struct lora_args *args, bool is_plain)
{
    return is_plain && args->K % GROUP == 0 && args->max_rank % GROUP == 0;
}

static void gather_plain(struct cuda_device *cuda, const char *op, void *to,
                         const struct lora_args *args, int slice, int first, int n, bool is_a)
{
    const int rows = is_a ? args->max_rank : args->width[slice];
    const int units = (is_a ? args->K : args->max_rank) / GROUP;
    cuda_launch(cuda, op, gather_plain_kernel, dim3(ceil_div(rows * units, GATHER_UNITS), n),
                GATHER_BLOCK, 0, 1, (uint4 *)to, *args, slice, first, rows, units, is_a);
}

/* Of one chunk. */
static void shrink_chunk_of(struct cuda_device *cuda, float *h, void *w, void *rows, float *sum,
                            const struct lora_args *args, int first, int n, bool is_plain)
{
    const char *op = "lora_shrink";
    const int K = args->K, R = args->max_rank;
    const struct product one = {1, R, K, is_plain ? DTYPE_BF16 : DTYPE_F32, DTYPE_F32};

    for (int slice = 0; slice < args->n_slices; slice++) {
        if (is_plain)
            gather_plain(cuda, op, w, args, slice, first, n, true);
        else
            cuda_launch(cuda, op, gather_a_kernel, dim3(ceil_div(K, GATHER_BLOCK), R, n),
                        GATHER_BLOCK, 0, 1, (float *)w, *args, slice, first);
        blas_batched(cuda, op, sum, w, rows, n, &one);
        cuda_launch(cuda, op, store_h_kernel, n, GATHER_BLOCK, 0, 1, h, (const float *)sum, *args,
                    slice, first);
    }
}

void lora_shrink_gathered(struct cuda_device *cuda, float *h, const void *x,
                          const struct lora_args *args, enum dtype dtype, bool is_plain)
{
    const char *op = "lora_shrink";
    const bool copies = has_plain_copies(args, is_plain) && dtype == DTYPE_BF16;
    const struct chunk chunk = shrink_chunk(args, copies);
    const int blocks = ceil_div(args->K, GATHER_BLOCK);
    void *w, *rows;
    float *sum;
    if (!chunk_memory(&w, &rows, &sum, cuda, op, &chunk)) return;

    for (int first = 0; first < args->n_tokens; first += chunk.n) {
        const int n = min_int(chunk.n, args->n_tokens - first);
        if (copies)
            cuda_launch(cuda, op, gather_x_kernel<bf16, bf16>, dim3(blocks, n), GATHER_BLOCK, 0, 1,
                        (bf16 *)rows, (const bf16 *)x, *args, first);
        else
            with_activation(dtype, [&](auto type) {
                using X = decltype(type);
                cuda_launch(cuda, op, gather_x_kernel<float, X>, dim3(blocks, n), GATHER_BLOCK, 0,
                            1, (float *)rows, (const X *)x, *args, first);
            });
        shrink_chunk_of(cuda, h, w, rows, sum, args, first, n, copies);
    }
}

/* Of one chunk and slice. */
static void expand_chunk_of(struct cuda_device *cuda, void *y, const float *h, void *w, void *rows,
                            float *sum, const struct lora_args *args, int slice, int first, int n,
                            bool is_plain, enum dtype dtype)
{
    const char *op = "lora_expand";
    const int R = args->max_rank, N = args->width[slice], parts = is_plain ? PARTS : 1;
    const struct product one = {parts, N, R, is_plain ? DTYPE_BF16 : DTYPE_F32, DTYPE_F32};

    if (is_plain) {
        cuda_launch(cuda, op, gather_h_kernel<bf16>, n, GATHER_BLOCK, 0, 1, (bf16 *)rows, h, *args,
                    slice, first);
        gather_plain(cuda, op, w, args, slice, first, n, false);
    } else {
        cuda_launch(cuda, op, gather_h_kernel<float>, n, GATHER_BLOCK, 0, 1, (float *)rows, h,
                    *args, slice, first);
        cuda_launch(cuda, op, gather_b_kernel, dim3(ceil_div(N * R, GATHER_BLOCK), n), GATHER_BLOCK,
                    0, 1, (float *)w, *args, slice, first);
    }
    blas_batched(cuda, op, sum, w, rows, n, &one);
    with_activation(dtype, [&](auto type) {
        using X = decltype(type);
        cuda_launch(cuda, op, add_sums_kernel<X>, dim3(ceil_div(N, GATHER_BLOCK), n), GATHER_BLOCK,
                    0, 1, (X *)y, (const float *)sum, parts, *args, slice, first);
    });
}

void lora_expand_gathered(struct cuda_device *cuda, void *y, const float *h,
                          const struct lora_args *args, enum dtype dtype, bool is_plain)
{
    const bool copies = has_plain_copies(args, is_plain);

    for (int slice = 0; slice < args->n_slices; slice++) {
        const struct chunk chunk = expand_chunk(args, slice, copies);
        void *w, *rows;
        float *sum;
        if (!chunk_memory(&w, &rows, &sum, cuda, "lora_expand", &chunk)) return;
        for (int first = 0; first < args->n_tokens; first += chunk.n)
            expand_chunk_of(cuda, y, h, w, rows, sum, args, slice, first,
                            min_int(chunk.n, args->n_tokens - first), copies, dtype);
    }
}
