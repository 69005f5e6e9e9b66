#include "kernels/cuda/blas.cuh"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- open, close -------------------------------------------------------------------------- */

#define TEXT_OF(number) #number
#define TEXT(number)    TEXT_OF(number)
#define LIBRARY         "libcublasLt.so." TEXT(CUBLAS_VER_MAJOR)

/* Where the loader looks, then where the toolkit was when this was built. */
static void *open_library(void)
{
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    return library ? library : dlopen(MLORA_CUDA_LIB "/" LIBRARY, RTLD_NOW | RTLD_LOCAL);
}

static bool find_functions(struct blas *blas)
{
    struct blas_functions *call = &blas->call;
    const struct {
        const char *name;
        void *at;
    } functions[] = {
        {"cublasLtCreate", &call->create},
        {"cublasLtDestroy", &call->destroy},
        {"cublasLtGetVersion", &call->version},
        {"cublasLtMatmul", &call->matmul},
        {"cublasLtMatmulAlgoGetHeuristic", &call->candidates},
        {"cublasLtMatmulDescInit_internal", &call->desc_init},
        {"cublasLtMatmulDescSetAttribute", &call->desc_set},
        {"cublasLtMatrixLayoutInit_internal", &call->layout_init},
        {"cublasLtMatrixLayoutSetAttribute", &call->layout_set},
        {"cublasLtMatmulPreferenceInit_internal", &call->preference_init},
        {"cublasLtMatmulPreferenceSetAttribute", &call->preference_set},
    };
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *const function = dlsym(blas->library, functions[i].name);
        if (!function) return false;
        memcpy(functions[i].at, &function, sizeof function);
    }
    return true;
}

mlora_status blas_open(struct cuda_device *cuda, const char *cache_dir, const char *gpu)
{
    struct blas *blas = (struct blas *)calloc(1, sizeof *blas);

    cuda->blas = blas;
    if (!blas) return error_set(MLORA_ENOMEM, "out of memory for cublasLt");
    blas->library = open_library();
    if (!blas->library)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s is needed for the CUDA backend and was not found, in the loader's "
                         "path or in %s: install cuBLAS %d, add its folder to LD_LIBRARY_PATH, "
                         "or use the CPU backend",
                         LIBRARY, MLORA_CUDA_LIB, CUBLAS_VER_MAJOR);
    if (!find_functions(blas))
        return error_set(MLORA_EUNSUPPORTED,
                         "%s lacks functions that the CUDA backend needs: install cuBLAS %d.%d or "
                         "later, or use the CPU backend",
                         LIBRARY, CUBLAS_VER_MAJOR, CUBLAS_VER_MINOR);
    if (cudaMalloc(&blas->workspace, BLAS_WORKSPACE) != cudaSuccess ||
        blas->call.create(&blas->handle) != CUBLAS_STATUS_SUCCESS) {
        cudaGetLastError(); /* it is told here */
        return error_set(MLORA_EUNSUPPORTED, "%s does not start on this GPU: use the CPU backend",
                         LIBRARY);
    }
    return plans_open(&blas->plans, blas, cache_dir, gpu);
}

void blas_close(struct blas *blas)
{
    if (!blas) return;
    plans_close(blas->plans);
    if (blas->handle) blas->call.destroy(blas->handle);
    cudaFree(blas->workspace);
    /* The library stays: it has registered its kernels, and another device may use it. */
    free(blas);
}

/* ---- products ----------------------------------------------------------------------------- */

static cudaDataType_t type_of(enum dtype dtype)
{
    return dtype == DTYPE_F32 ? CUDA_R_32F : dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

void blas_layouts_init(struct blas_layouts *out, const struct blas *blas,
                       const struct product *product)
{
    const struct blas_functions *call = &blas->call;
    const uint64_t T = (uint64_t)product->T, N = (uint64_t)product->N, K = (uint64_t)product->K;
    const cudaDataType_t type = type_of(product->dtype);
    const cublasOperation_t transpose = CUBLAS_OP_T;

    call->desc_init(&out->desc, sizeof out->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    call->desc_set(&out->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose);
    call->layout_init(&out->w, sizeof out->w, type, K, N, (int64_t)K);
    call->layout_init(&out->x, sizeof out->x, type, K, T, (int64_t)K);
    call->layout_init(&out->y, sizeof out->y, type_of(product->y_dtype), N, T, (int64_t)N);
}

cublasStatus_t blas_start(struct cuda_device *cuda, struct blas_layouts *layouts, void *y,
                          const void *x, const void *w, const cublasLtMatmulAlgo_t *algorithm)
{
    const struct blas *blas = cuda->blas;
    const float one = 1.0f, zero = 0.0f;

    return blas->call.matmul(blas->handle, &layouts->desc, &one, w, &layouts->w, x, &layouts->x,
                             &zero, y, &layouts->y, y, &layouts->y, algorithm, blas->workspace,
                             BLAS_WORKSPACE, cuda->stream);
}

void blas_batched(struct cuda_device *cuda, const char *op, float *y, const void *w, const void *x,
                  int n, const struct product *one)
{
    const struct blas *blas = cuda->blas;
    const struct blas_functions *call = &blas->call;
    const uint64_t workspace = BLAS_WORKSPACE;
    const int64_t strides[3] = {(int64_t)one->N * one->K, (int64_t)one->T * one->K,
                                (int64_t)one->T * one->N};
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found;
    struct blas_layouts layouts;
    int n_found = 0;

    blas_layouts_init(&layouts, blas, one);
    cublasLtMatrixLayoutOpaque_t *const of[3] = {&layouts.w, &layouts.x, &layouts.y};
    for (int i = 0; i < 3; i++) {
        call->layout_set(of[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &n, sizeof n);
        call->layout_set(of[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &strides[i],
                         sizeof strides[i]);
    }
    call->preference_init(&preference, sizeof preference);
    call->preference_set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                         sizeof workspace);
    cublasStatus_t status =
        call->candidates(blas->handle, &layouts.desc, &layouts.w, &layouts.x, &layouts.y,
                         &layouts.y, &preference, 1, &found, &n_found);
    if (status == CUBLAS_STATUS_SUCCESS && n_found > 0)
        status = blas_start(cuda, &layouts, y, x, w, &found.algo);
    if (status != CUBLAS_STATUS_SUCCESS || n_found == 0)
        cuda_fail(cuda, op, "cublasLt has no such batched product");
}
