/* Products of two matrices by cublasLt. The library is opened when a device is, not when the
 * program starts: a program that has the CUDA backend in it runs on a machine without it. */
#ifndef MLORA_KERNELS_CUDA_BLAS_CUH
#define MLORA_KERNELS_CUDA_BLAS_CUH

#include <cublasLt.h>

#include "kernels/cuda/cuda.cuh"

enum { BLAS_WORKSPACE = 32 << 20 };

/* The functions of the library, under their names without "cublasLt". */
struct blas_functions {
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtGetVersion) version;
    decltype(&cublasLtMatmul) matmul;
    decltype(&cublasLtMatmulAlgoGetHeuristic) candidates;
    decltype(&cublasLtMatmulDescInit_internal) desc_init;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set;
    decltype(&cublasLtMatrixLayoutInit_internal) layout_init;
    decltype(&cublasLtMatrixLayoutSetAttribute) layout_set;
    decltype(&cublasLtMatmulPreferenceInit_internal) preference_init;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
};

struct plans;

struct blas {
    struct blas_functions call;
    void *library; /* of dlopen */
    cublasLtHandle_t handle;
    void *workspace; /* [BLAS_WORKSPACE] */
    struct plans *plans;
};

/* y [T, N] = x [T, K] w [N, K]^T: shapes and types. */
struct product {
    int T, N, K;
    enum dtype dtype, y_dtype; /* of x and w; of y */
};

/* The same as cublasLt has it: its matrices are column by column, so the rows of w, x and y are
 * its columns, and what it computes is y^T [N, T] = (w^T)^T x^T. */
struct blas_layouts {
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t w, x, y;
};

void blas_layouts_init(struct blas_layouts *out, const struct blas *blas,
                       const struct product *product);

/* Start the product under that algorithm; nothing is launched where it is refused. */
cublasStatus_t blas_start(struct cuda_device *cuda, struct blas_layouts *layouts, void *y,
                          const void *x, const void *w, const cublasLtMatmulAlgo_t *algorithm);

/* n small products, y[j] = x[j] w[j]^T, one after another in memory, by cublasLt's first choice.
 *
 *   y [n, T, N] f32    w [n, N, K]    x [n, T, K]    of `one` */
void blas_batched(struct cuda_device *cuda, const char *op, float *y, const void *w, const void *x,
                  int n, const struct product *one);

/* The algorithm for a product; false where cublasLt has none. The first call for a shape may time
 * several on `w`, which takes some milliseconds; never while a step is recorded. */
bool plan_find(struct cuda_device *cuda, const struct product *product, const void *w,
               cublasLtMatmulAlgo_t *algorithm);

/* cublasLt's own first choice, which is not kept. */
bool plan_first(struct cuda_device *cuda, const struct product *product,
                cublasLtMatmulAlgo_t *algorithm);

/* `cache_dir` (may be NULL, copied) keeps what was chosen from one process to the next. */
mlora_status plans_open(struct plans **out, const struct blas *blas, const char *cache_dir,
                        const char *gpu);
void plans_close(struct plans *plans); /* accepts NULL */

#endif
