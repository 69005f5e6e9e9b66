/* Which of cublasLt's algorithms computes a product. Its own first choice leaves up to a fifth of
 * the bandwidth where there are few tokens, so the candidates are timed, once for a shape, with
 * the weights in memory and not in the cache, as a step finds them. The choice is kept for the
 * process, so that its results do not change, and in a file for the next one. The file holds
 * numbers of candidates only, each with a hash of what it stood for: a damaged one can at worst
 * point at another candidate that cublasLt itself has offered, and mostly is not believed. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cuda/blas.cuh"

extern "C" {
#include "engine/base/buffer.h"
#include "engine/base/file.h"
}

enum { PLANS = 4096, CANDIDATES = 24, CACHE_BYTES = 1 << 20, TIMED_T = 512, TRIALS = 4 };

enum plan_state {
    PLAN_EMPTY,
    PLAN_HINTED, /* read from the file, not used yet */
    PLAN_FOUND,
    PLAN_NONE, /* cublasLt has nothing */
};

struct plan {
    struct product product; /* T: the bucket's largest */
    enum plan_state state;
    int candidate; /* its number among those that cublasLt offers; -1: not timed */
    uint64_t hash; /* of `algorithm` */
    cublasLtMatmulAlgo_t algorithm;
};

struct plans {
    struct plan table[PLANS]; /* open addressing */
    int n_plans;
    double seconds; /* spent on timing */
    char *path;     /* of the file; NULL: none */
    char *directory;
    char title[160]; /* its first line: another GPU's or library's file is not believed */
};

static const double TIMING_SECONDS = 2.0; /* in all; then the first candidates must do */

/* ---- the table ---------------------------------------------------------------------------- */

/* Products of up to so many tokens share a plan. */
static int bucket_of(int T)
{
    if (T <= 64) return ceil_div(T, 16) * 16;
    if (T <= TIMED_T) return ceil_div(T, 64) * 64;
    return ceil_div(T, 512) * 512;
}

static uint64_t hash_bytes(const void *bytes, size_t n)
{
    const unsigned char *at = (const unsigned char *)bytes;
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < n; i++) hash = (hash ^ at[i]) * 1099511628211u;
    return hash;
}

static bool same_product(const struct product *a, const struct product *b)
{
    return a->T == b->T && a->N == b->N && a->K == b->K && a->dtype == b->dtype &&
           a->y_dtype == b->y_dtype;
}

/* The plan of that product, perhaps still empty; NULL where the table is full. */
static struct plan *place_of(struct plans *plans, const struct product *product)
{
    const int parts[] = {product->T, product->N, product->K, product->dtype * 4 + product->y_dtype};
    uint64_t at = hash_bytes(parts, sizeof parts);

    for (;; at++) {
        struct plan *plan = &plans->table[at % PLANS];
        if (plan->state != PLAN_EMPTY && same_product(&plan->product, product)) return plan;
        if (plan->state != PLAN_EMPTY) continue;
        if (plans->n_plans >= PLANS / 4 * 3) return NULL;
        plans->n_plans++;
        plan->product = *product;
        return plan;
    }
}

/* ---- the file ----------------------------------------------------------------------------- */

static void read_line(struct plans *plans, const char *line)
{
    struct product product;
    int dtype, y_dtype, candidate;
    unsigned long long hash;

    if (sscanf(line, "%9d %9d %9d %1d %1d %2d %16llx", &product.T, &product.N, &product.K, &dtype,
               &y_dtype, &candidate, &hash) != 7 ||
        product.T < 1 || product.N < 1 || product.K < 1 || dtype > DTYPE_BF16 ||
        y_dtype > DTYPE_BF16 || candidate < 0 || candidate >= CANDIDATES)
        return;
    product.dtype = (enum dtype)dtype;
    product.y_dtype = (enum dtype)y_dtype;
    struct plan *plan = place_of(plans, &product);
    if (!plan) return;
    plan->state = PLAN_HINTED;
    plan->candidate = candidate;
    plan->hash = hash;
}

/* What cannot be read is left out, and timed again. */
static void read_cache(struct plans *plans)
{
    struct buffer text = {};
    const size_t title = strlen(plans->title);

    if (file_exists(plans->path) && file_read_all(&text, plans->path, CACHE_BYTES) == MLORA_OK &&
        text.bytes > title && memcmp(text.data, plans->title, title) == 0)
        for (const char *line = text.data + title; line;) {
            line = strchr(line, '\n');
            if (line) read_line(plans, ++line);
        }
    buffer_free(&text);
}

static bool write_text(const char *path, const struct buffer *text)
{
    FILE *file = fopen(path, "wx");
    if (!file) return false;
    const bool written = fwrite(text->data, 1, text->bytes, file) == text->bytes;
    return fclose(file) == 0 && written;
}

/* Whole or not at all; a cache that cannot be written is no failure. */
static void write_cache(const struct plans *plans)
{
    struct buffer text = {}, fresh = {};

    if (!plans->path) return;
    mkdir(plans->directory, 0777);
    mlora_status status = buffer_printf(&text, "%s", plans->title);
    for (int i = 0; i < PLANS && status == MLORA_OK; i++) {
        const struct plan *plan = &plans->table[i];
        const struct product *p = &plan->product;
        if (plan->state == PLAN_HINTED || (plan->state == PLAN_FOUND && plan->candidate >= 0))
            status =
                buffer_printf(&text, "\n%d %d %d %d %d %d %016llx", p->T, p->N, p->K, (int)p->dtype,
                              (int)p->y_dtype, plan->candidate, (unsigned long long)plan->hash);
    }
    if (status == MLORA_OK) status = buffer_printf(&text, "\n");
    if (status == MLORA_OK) status = buffer_printf(&fresh, "%s.%d", plans->path, (int)getpid());
    if (status == MLORA_OK) {
        unlink(fresh.data);
        if (!write_text(fresh.data, &text) || rename(fresh.data, plans->path) != 0)
            unlink(fresh.data);
    }
    buffer_free(&fresh);
    buffer_free(&text);
}

/* ---- kernels ------------------------------------------------------------------------------ */

enum { FLUSH_BYTES = 192 << 20, FLUSH_BLOCK = 512 }; /* more than any second-level cache holds */

/* Read `memory` from end to end, so that the caches hold nothing else.
 *
 *   memory [n]    grid any    block FLUSH_BLOCK */
static __global__ void flush_kernel(const uint4 *memory, size_t n, int *never)
{
    uint32_t all = 0;
    for (size_t i = blockIdx.x * (size_t)FLUSH_BLOCK + threadIdx.x; i < n;
         i += (size_t)gridDim.x * FLUSH_BLOCK)
        all |= memory[i].x ^ memory[i].w;
    if (all == 0x9e3779b9u) *never = 0; /* a zero over a zero: the loads must not be left out */
}

/* Numbers as activations are: between -1 and 1, none alike.
 *
 *   x [n] X    grid any    block FLUSH_BLOCK */
template <typename X> static __global__ void fill_kernel(X *x, size_t n)
{
    for (size_t i = blockIdx.x * (size_t)FLUSH_BLOCK + threadIdx.x; i < n;
         i += (size_t)gridDim.x * FLUSH_BLOCK)
        x[i] = (X)((float)(((uint32_t)i * 2654435761u) >> 8) * 0x1p-23f - 1.0f);
}

/* ---- timing ------------------------------------------------------------------------------- */

/* What a trial reads and writes. */
struct trial {
    char *memory; /* of x, y, and what is read to empty the caches */
    void *x, *y;
    cudaEvent_t start, stop;
};

static bool trial_open(struct trial *trial, struct cuda_device *cuda, const struct product *p)
{
    const size_t x_bytes = ((size_t)p->T * p->K * dtype_bytes(p->dtype) + 255) / 256 * 256;
    const size_t y_bytes = (size_t)p->T * p->N * dtype_bytes(p->y_dtype);
    const size_t n = (size_t)p->T * p->K;

    if (cudaMalloc((void **)&trial->memory, FLUSH_BYTES + x_bytes + y_bytes) != cudaSuccess ||
        cudaEventCreate(&trial->start) != cudaSuccess ||
        cudaEventCreate(&trial->stop) != cudaSuccess) {
        cudaGetLastError(); /* there is no room for a trial: that is no failure */
        return false;
    }
    cudaMemsetAsync(trial->memory, 0, FLUSH_BYTES, cuda->stream);
    trial->x = trial->memory + FLUSH_BYTES;
    trial->y = trial->memory + FLUSH_BYTES + x_bytes;
    const auto fill = [&](auto x) {
        using X = decltype(x);
        fill_kernel<X><<<cuda->n_sms, FLUSH_BLOCK, 0, cuda->stream>>>((X *)trial->x, n);
    };
    with_type(p->dtype, fill);
    cuda_check(cuda, cudaGetLastError(), "matmul");
    return true;
}

static void trial_close(struct trial *trial)
{
    if (trial->start) cudaEventDestroy(trial->start);
    if (trial->stop) cudaEventDestroy(trial->stop);
    cudaFree(trial->memory);
}

/* The best of a few runs, in ms; infinite where the algorithm is refused. Given up after the first
 * run that is far from `best`. */
static float time_algorithm(struct cuda_device *cuda, const struct trial *trial,
                            struct blas_layouts *layouts, const void *w,
                            const cublasLtMatmulAlgo_t *algorithm, float best)
{
    const size_t n = FLUSH_BYTES / sizeof(uint4);
    float least = INFINITY;

    for (int i = 0; i <= TRIALS; i++) { /* the first loads the kernel */
        float ms = INFINITY;
        flush_kernel<<<8 * cuda->n_sms, FLUSH_BLOCK, 0, cuda->stream>>>(
            (const uint4 *)trial->memory, n, cuda->counters);
        cudaEventRecord(trial->start, cuda->stream);
        if (blas_start(cuda, layouts, trial->y, trial->x, w, algorithm) != CUBLAS_STATUS_SUCCESS)
            return INFINITY;
        cudaEventRecord(trial->stop, cuda->stream);
        cuda_check(cuda, cudaEventSynchronize(trial->stop), "matmul");
        cuda_check(cuda, cudaEventElapsedTime(&ms, trial->start, trial->stop), "matmul");
        if (i > 0 && ms < least) least = ms;
        if (i > 0 && least > 1.3f * best) break;
    }
    return least;
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The fastest of the candidates; -1 where there is no room or no time for trials. */
static int fastest(struct cuda_device *cuda, const struct product *product, const void *w,
                   const cublasLtMatmulHeuristicResult_t *candidates, int n)
{
    struct plans *plans = cuda->blas->plans;
    struct trial trial = {};
    struct blas_layouts layouts;
    float best = INFINITY;
    int chosen = -1;

    if (plans->seconds > TIMING_SECONDS) return -1;
    const double start = seconds_now();
    blas_layouts_init(&layouts, cuda->blas, product);
    if (trial_open(&trial, cuda, product))
        for (int i = 0; i < n; i++) {
            const float ms = time_algorithm(cuda, &trial, &layouts, w, &candidates[i].algo, best);
            /* Less than a hundredth is noise: the one that cublasLt has put first, then. */
            if (ms < 0.99f * best) best = ms, chosen = i;
        }
    trial_close(&trial);
    plans->seconds += seconds_now() - start;
    return chosen;
}

/* ---- choosing ----------------------------------------------------------------------------- */

/* What cublasLt offers for the product, the best by its own guess first. */
static int list_candidates(const struct blas *blas, const struct product *product,
                           cublasLtMatmulHeuristicResult_t *out)
{
    const size_t workspace = BLAS_WORKSPACE;
    const uint32_t alignment = 16;
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; /* never sums of bf16 */
    cublasLtMatmulPreferenceOpaque_t preference;
    struct blas_layouts layouts;
    int n = 0;

    blas->call.preference_init(&preference, sizeof preference);
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        const void *value;
        size_t bytes;
    } wishes[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions, sizeof reductions},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment, sizeof alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment, sizeof alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment, sizeof alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, sizeof alignment},
    };
    for (size_t i = 0; i < sizeof wishes / sizeof wishes[0]; i++)
        blas->call.preference_set(&preference, wishes[i].attribute, wishes[i].value,
                                  wishes[i].bytes);
    blas_layouts_init(&layouts, blas, product);
    const cublasStatus_t status =
        blas->call.candidates(blas->handle, &layouts.desc, &layouts.w, &layouts.x, &layouts.y,
                              &layouts.y, &preference, CANDIDATES, out, &n);
    return status == CUBLAS_STATUS_SUCCESS ? n : 0;
}

static bool is_recording(const struct cuda_device *cuda)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(cuda->stream, &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

static void choose(struct cuda_device *cuda, struct plan *plan, const void *w)
{
    cublasLtMatmulHeuristicResult_t candidates[CANDIDATES];
    const int n = list_candidates(cuda->blas, &plan->product, candidates);
    const auto hash = [&](int i) {
        return hash_bytes(&candidates[i].algo, sizeof candidates[i].algo);
    };
    const bool hinted =
        plan->state == PLAN_HINTED && plan->candidate < n && hash(plan->candidate) == plan->hash;
    const bool timed = !hinted && n > 1 && plan->product.T <= TIMED_T && !is_recording(cuda);

    plan->state = n > 0 ? PLAN_FOUND : PLAN_NONE;
    if (n == 0) return;
    if (!hinted) plan->candidate = timed ? fastest(cuda, &plan->product, w, candidates, n) : -1;
    const int chosen = plan->candidate < 0 ? 0 : plan->candidate;
    plan->algorithm = candidates[chosen].algo;
    plan->hash = hash(chosen);
    if (timed && plan->candidate >= 0) write_cache(cuda->blas->plans);
}

bool plan_first(struct cuda_device *cuda, const struct product *product,
                cublasLtMatmulAlgo_t *algorithm)
{
    cublasLtMatmulHeuristicResult_t candidates[CANDIDATES];
    const int n = list_candidates(cuda->blas, product, candidates);

    if (n > 0) *algorithm = candidates[0].algo;
    return n > 0;
}

bool plan_find(struct cuda_device *cuda, const struct product *product, const void *w,
               cublasLtMatmulAlgo_t *algorithm)
{
    struct plans *plans = cuda->blas->plans;
    struct product bucket = *product;

    bucket.T = bucket_of(product->T);
    struct plan *plan = place_of(plans, &bucket);
    if (!plan) return plan_first(cuda, product, algorithm); /* the table is full */
    if (plan->state == PLAN_EMPTY || plan->state == PLAN_HINTED) choose(cuda, plan, w);
    *algorithm = plan->algorithm;
    return plan->state == PLAN_FOUND;
}

/* ---- open, close -------------------------------------------------------------------------- */

/* cache_dir/matmul-<GPU>-<version of cublasLt>, with nothing in it that a path could mean. */
static mlora_status set_path(struct plans *plans, const char *cache_dir, const char *gpu,
                             size_t version)
{
    char name[128];
    const int n = snprintf(name, sizeof name, "matmul-%.80s-%zu", gpu, version);

    for (int i = 0; i < n; i++)
        if (!strchr("0123456789-_ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", name[i]))
            name[i] = '_';
    plans->directory = strdup(cache_dir);
    plans->path = path_join(cache_dir, name);
    return plans->directory && plans->path ? MLORA_OK
                                           : error_set(MLORA_ENOMEM, "out of memory for a path");
}

mlora_status plans_open(struct plans **out, const struct blas *blas, const char *cache_dir,
                        const char *gpu)
{
    struct plans *plans = (struct plans *)calloc(1, sizeof *plans);
    const size_t version = blas->call.version();

    *out = plans;
    if (!plans) return error_set(MLORA_ENOMEM, "out of memory for the matmul plans");
    snprintf(plans->title, sizeof plans->title, "mlora matmul plans 1, %.80s, cublasLt %zu", gpu,
             version);
    if (!cache_dir || !cache_dir[0]) return MLORA_OK;
    const mlora_status status = set_path(plans, cache_dir, gpu, version);
    if (status == MLORA_OK) read_cache(plans);
    return status;
}

void plans_close(struct plans *plans)
{
    if (!plans) return;
    free(plans->directory);
    free(plans->path);
    free(plans);
}
