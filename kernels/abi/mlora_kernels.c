/* The C ABI over the table of ops: check what the host can see, put the caller's structs in the
 * order of views.h, lend the caller's stream and workspace to the device, call the op. */
#include "kernels/mlora_kernels.h"

#include <stdio.h>
#include <stdlib.h>

#include "engine/base/error.h"
#include "kernels/lend.h"

enum { TOKENS_MAX = 65535, SEGMENTS_MAX = 32768, WIDTH_MAX = 1 << 20, ALIGNMENT = 256 };

/* The two headers must agree, or a pointer to one struct is not one to the other. */
#define SAME(name, theirs, ours) _Static_assert((int)(theirs) == (int)(ours), #name)
SAME(factors, sizeof(mlora_kernels_factors), sizeof(struct lora_factors));
SAME(scale, offsetof(mlora_kernels_factors, scale), offsetof(struct lora_factors, scale));
SAME(bias_delta, offsetof(mlora_kernels_factors, bias_delta),
     offsetof(struct lora_factors, bias_delta));
SAME(linears, MLORA_KERNELS_LINEARS, LORA_LINEARS);
SAME(slices, MLORA_KERNELS_SLICES, LORA_SLICES_MAX);
SAME(f16, MLORA_KERNELS_F16, DTYPE_F16);
SAME(bf16, MLORA_KERNELS_BF16, DTYPE_BF16);
SAME(loop, MLORA_KERNELS_LOOP, MLORA_LORA_LOOP);
SAME(gbmm, MLORA_KERNELS_GBMM, MLORA_LORA_GBMM);
SAME(bgmv, MLORA_KERNELS_BGMV, MLORA_LORA_BGMV);
SAME(sgmv, MLORA_KERNELS_SGMV, MLORA_LORA_SGMV);
SAME(fused, MLORA_KERNELS_FUSED, MLORA_LORA_FUSED);
SAME(linear, MLORA_KERNELS_LINEAR, EXTEND_LINEAR);
SAME(by_request, MLORA_KERNELS_BY_REQUEST, EXTEND_BY_REQUEST);
SAME(einval, MLORA_KERNELS_EINVAL, MLORA_EINVAL);
SAME(enomem, MLORA_KERNELS_ENOMEM, MLORA_ENOMEM);
SAME(eunsupported, MLORA_KERNELS_EUNSUPPORTED, MLORA_EUNSUPPORTED);
SAME(edevice, MLORA_KERNELS_EDEVICE, MLORA_EDEVICE);
SAME(cpu, MLORA_KERNELS_CPU, MLORA_BACKEND_CPU);
SAME(cuda, MLORA_KERNELS_CUDA, MLORA_BACKEND_CUDA);

struct mlora_kernels {
    struct device *dev;
    int backend;
};

const char *mlora_kernels_error(void)
{
    return error_text();
}

int mlora_kernels_version(void)
{
    return MLORA_KERNELS_VERSION;
}

/* ---- the handle --------------------------------------------------------------------------- */

int mlora_kernels_open(mlora_kernels **out, int version, int backend, int ordinal)
{
    if (!out) return error_set(MLORA_EINVAL, "open: out is NULL");
    *out = NULL;
    if (version != MLORA_KERNELS_VERSION)
        return error_set(MLORA_EINVAL,
                         "open: the caller was made for version %d of libmlora_kernels, this is "
                         "version %d: compile it with the mlora_kernels.h of this library",
                         version, MLORA_KERNELS_VERSION);
    if (backend != MLORA_KERNELS_CPU && backend != MLORA_KERNELS_CUDA)
        return error_set(MLORA_EINVAL, "open: backend is %d, must be MLORA_KERNELS_CPU or _CUDA",
                         backend);
    if (ordinal < 0)
        return error_set(MLORA_EINVAL, "open: ordinal is %d, must be 0 or more", ordinal);

    mlora_kernels *kernels = calloc(1, sizeof *kernels);
    if (!kernels) return error_set(MLORA_ENOMEM, "open: out of memory");
    kernels->backend = backend;
    const mlora_status status = backend == MLORA_KERNELS_CUDA
                                    ? cuda_device_open(&kernels->dev, ordinal, NULL)
                                    : cpu_device_open(&kernels->dev, ordinal);
    if (status != MLORA_OK) {
        free(kernels);
        return status;
    }
    *out = kernels;
    return MLORA_OK;
}

void mlora_kernels_close(mlora_kernels *kernels)
{
    if (!kernels) return;
    kernels->dev->ops->close(kernels->dev);
    free(kernels);
}

int mlora_kernels_info(const mlora_kernels *kernels, mlora_kernels_facts *out)
{
    if (!kernels || !out) return error_set(MLORA_EINVAL, "info: an argument is NULL");
    const bool is_cuda = kernels->backend == MLORA_KERNELS_CUDA;
    *out = (mlora_kernels_facts){
        .version = MLORA_KERNELS_VERSION,
        .backend = kernels->backend,
        .capability = is_cuda ? cuda_capability(kernels->dev) : 0,
        .n_multiprocessors = is_cuda ? cuda_multiprocessors(kernels->dev) : 0,
        .max_rank = LORA_RANK_MAX,
        .max_slices = LORA_SLICES_MAX,
        .max_tokens = TOKENS_MAX,
        .kv_block = KV_BLOCK,
        .extend_linear_max = EXTEND_LINEAR_MAX,
        .extend_block = EXTEND_BLOCK,
    };
    snprintf(out->description, sizeof out->description, "%s", kernels->dev->description);
    snprintf(out->architectures, sizeof out->architectures, "%s", cuda_architectures());
    return MLORA_OK;
}

/* ---- what every op does ------------------------------------------------------------------- */

/* Whether min <= value <= max; the text says which field of what. */
static bool in_range(const char *op, const char *field, long long value, long long min,
                     long long max)
{
    if (value >= min && value <= max) return true;
    error_set(MLORA_EINVAL, "%s: %s is %lld, must be %lld to %lld", op, field, value, min, max);
    return false;
}

static bool is_there(const char *op, const char *field, const void *pointer)
{
    if (pointer) return true;
    error_set(MLORA_EINVAL, "%s: %s is NULL", op, field);
    return false;
}

/* Whether an array is there and lies where its elements may: a GPU ends the process's context where
 * they do not. */
static bool is_array(const char *op, const char *field, const void *pointer, size_t element_bytes)
{
    if (!is_there(op, field, pointer)) return false;
    if ((uintptr_t)pointer % element_bytes == 0) return true;
    error_set(MLORA_EINVAL, "%s: %s is not aligned to %zu bytes, the size of an element", op, field,
              element_bytes);
    return false;
}

static bool is_array_or_null(const char *op, const char *field, const void *pointer,
                             size_t element_bytes)
{
    return !pointer || is_array(op, field, pointer, element_bytes);
}

static size_t activation_bytes(int dtype)
{
    return dtype_bytes((enum dtype)dtype);
}

static bool is_activation(const char *op, const char *field, int dtype)
{
    if (dtype == DTYPE_F32 || dtype == DTYPE_BF16) return true;
    error_set(MLORA_EINVAL, "%s: %s is %d, must be MLORA_KERNELS_F32 or _BF16", op, field, dtype);
    return false;
}

/* Take the caller's stream and all of the workspace but its first `own` bytes; `needed` is what
 * the _workspace function says. */
static mlora_status begin(struct loan *loan, const mlora_kernels *kernels,
                          const mlora_kernels_run *run, const char *op, size_t needed, size_t own)
{
    *loan = (struct loan){0};
    if (kernels->backend != MLORA_KERNELS_CUDA && own == 0) return MLORA_OK;
    if (!run || (needed > 0 && !run->workspace))
        return error_set(MLORA_EINVAL, "%s: %s is NULL", op, run ? "run.workspace" : "run");
    if (run->workspace_bytes < needed)
        return error_set(MLORA_EINVAL,
                         "%s: run.workspace_bytes is %zu, %zu are needed: ask the workspace "
                         "function",
                         op, run->workspace_bytes, needed);
    if (needed > 0 && (uintptr_t)run->workspace % ALIGNMENT != 0)
        return error_set(MLORA_EINVAL, "%s: run.workspace is not aligned to %d bytes", op,
                         ALIGNMENT);
    if (kernels->backend != MLORA_KERNELS_CUDA) return MLORA_OK;
    loan->stream = run->stream;
    if (needed > own) {
        loan->workspace = (char *)run->workspace + own;
        loan->workspace_bytes = run->workspace_bytes - own;
    }
    cuda_lend(kernels->dev, loan);
    return MLORA_OK;
}

static mlora_status end(const mlora_kernels *kernels, const struct loan *loan)
{
    struct device *dev = kernels->dev;
    return kernels->backend == MLORA_KERNELS_CUDA ? cuda_take_back(dev, loan) : dev->ops->sync(dev);
}

static size_t round_up(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* ---- LoRA --------------------------------------------------------------------------------- */

/* The caller's struct as the ops read it. */
struct lora_call {
    struct lora_view view;
    struct lora_site site;
    size_t h_bytes, scratch_bytes;
};

static mlora_status check_slices(const mlora_kernels_lora *lora, const char *op)
{
    if (!in_range(op, "n_slices", lora->n_slices, 1, LORA_SLICES_MAX) ||
        !in_range(op, "linear", lora->linear, 0, LORA_LINEARS - lora->n_slices))
        return MLORA_EINVAL;
    for (int i = 0; i < lora->n_slices; i++)
        if (!in_range(op, "width", lora->width[i], 1, lora->N) ||
            !in_range(op, "offset", lora->offset[i], 0, lora->N - lora->width[i]))
            return MLORA_EINVAL;
    return MLORA_OK;
}

static mlora_status check_shapes(const mlora_kernels_lora *lora, const char *op)
{
    if (!in_range(op, "T", lora->T, 0, TOKENS_MAX) || !in_range(op, "K", lora->K, 1, WIDTH_MAX) ||
        !in_range(op, "N", lora->N, 1, WIDTH_MAX) ||
        !in_range(op, "max_rank", lora->max_rank, 1, LORA_RANK_MAX) ||
        !in_range(op, "mode", lora->mode, MLORA_KERNELS_AUTO, MLORA_KERNELS_FUSED) ||
        !in_range(op, "n_layers", lora->n_layers, 1, TOKENS_MAX) ||
        !in_range(op, "layer", lora->layer, 0, lora->n_layers - 1) ||
        !in_range(op, "n_segments", lora->n_segments, 0, SEGMENTS_MAX) ||
        !in_range(op, "n_tokens", lora->n_tokens, 0, lora->T) ||
        !in_range(op, "max_segment", lora->max_segment, 0, lora->n_tokens) ||
        !is_activation(op, "dtype", lora->dtype))
        return MLORA_EINVAL;
    if (lora->n_tokens > 0 && !in_range(op, "max_segment", lora->max_segment, 1, lora->n_tokens))
        return MLORA_EINVAL;
    return check_slices(lora, op);
}

static void lora_call_build(struct lora_call *call, const mlora_kernels *kernels,
                            const mlora_kernels_lora *lora)
{
    *call = (struct lora_call){
        .view =
            {
                .factors = (const struct lora_factors *)(const void *)lora->factors,
                .L = lora->n_layers,
                .n_segments = lora->n_segments,
                .n_tokens = lora->n_tokens,
                .max_rank = lora->max_rank,
                .max_segment = lora->max_segment,
                .mode = lora->mode,
                .slot = lora->slot,
                .segment_slot = lora->segment_slot,
                .segment_start = lora->segment_start,
                .order = lora->order,
                .expands_more = lora->expands_more != 0,
                .has_base_segments = true,
                .h_by_slice = lora->h_by_slice != 0,
                .n_rows = lora->T,
            },
        .site =
            {
                .linear = lora->linear,
                .n_slices = lora->n_slices,
                .K = lora->K,
                .N = lora->N,
                .bias = lora->bias,
            },
    };
    for (int i = 0; i < lora->n_slices; i++) {
        call->site.offset[i] = lora->offset[i];
        call->site.width[i] = lora->width[i];
    }
    const size_t n_rows = (size_t)lora->T * (size_t)lora->n_slices;
    call->h_bytes = round_up(n_rows * (size_t)lora->max_rank * sizeof(float));
    if (kernels->backend == MLORA_KERNELS_CUDA)
        call->scratch_bytes = cuda_lora_bytes(kernels->dev, &call->view, &call->site);
}

/* Check and build; OK with n_segments 0 where there is nothing to do. */
static mlora_status lora_call(struct lora_call *call, const mlora_kernels *kernels,
                              const mlora_kernels_lora *lora, const char *op)
{
    if (!is_there(op, "kernels", kernels) || !is_there(op, "lora", lora)) return MLORA_EINVAL;
    const mlora_status status = check_shapes(lora, op);
    if (status != MLORA_OK) return status;
    if (lora->n_segments > 0 && lora->n_tokens > 0 &&
        (!is_array(op, "factors", lora->factors, sizeof(void *)) ||
         !is_array(op, "slot", lora->slot, sizeof(int32_t)) ||
         !is_array(op, "segment_slot", lora->segment_slot, sizeof(int32_t)) ||
         !is_array(op, "segment_start", lora->segment_start, sizeof(int32_t)) ||
         !is_array(op, "order", lora->order, sizeof(int32_t)) ||
         !is_array_or_null(op, "bias", lora->bias, sizeof(float))))
        return MLORA_EINVAL;
    lora_call_build(call, kernels, lora);
    if (lora->n_tokens == 0) call->view.n_segments = 0;
    return MLORA_OK;
}

int mlora_kernels_lora_workspace(const mlora_kernels *kernels, const mlora_kernels_lora *lora,
                                 size_t *out)
{
    const char *op = "lora_workspace";
    struct lora_call call;

    if (!is_there(op, "kernels", kernels) || !is_there(op, "lora", lora) ||
        !is_there(op, "out", out))
        return MLORA_EINVAL;
    *out = 0;
    const mlora_status status = check_shapes(lora, op);
    if (status != MLORA_OK) return status;
    lora_call_build(&call, kernels, lora);
    *out = call.h_bytes + call.scratch_bytes;
    return MLORA_OK;
}

int mlora_kernels_lora_shrink(mlora_kernels *kernels, float *h, const void *x,
                              const mlora_kernels_lora *lora, const mlora_kernels_run *run)
{
    const char *op = "lora_shrink";
    struct lora_call call;
    struct loan loan;

    mlora_status status = lora_call(&call, kernels, lora, op);
    if (status != MLORA_OK || call.view.n_segments == 0) return status;
    if (!is_array(op, "h", h, sizeof *h) || !is_array(op, "x", x, activation_bytes(lora->dtype)))
        return MLORA_EINVAL;
    status = begin(&loan, kernels, run, op, call.scratch_bytes, 0);
    if (status != MLORA_OK) return status;
    kernels->dev->ops->lora_shrink(kernels->dev, h, x, &call.view, &call.site, lora->layer,
                                   (enum dtype)lora->dtype);
    return end(kernels, &loan);
}

int mlora_kernels_lora_expand(mlora_kernels *kernels, void *y, const float *h,
                              const mlora_kernels_lora *lora, const mlora_kernels_run *run)
{
    const char *op = "lora_expand";
    struct lora_call call;
    struct loan loan;

    mlora_status status = lora_call(&call, kernels, lora, op);
    if (status != MLORA_OK || call.view.n_segments == 0) return status;
    if (!is_array(op, "y", y, activation_bytes(lora->dtype)) || !is_array(op, "h", h, sizeof *h))
        return MLORA_EINVAL;
    status = begin(&loan, kernels, run, op, call.scratch_bytes, 0);
    if (status != MLORA_OK) return status;
    kernels->dev->ops->lora_expand(kernels->dev, y, h, &call.view, &call.site, lora->layer,
                                   (enum dtype)lora->dtype);
    return end(kernels, &loan);
}

int mlora_kernels_lora_add(mlora_kernels *kernels, void *y, const void *x,
                           const mlora_kernels_lora *lora, const mlora_kernels_run *run)
{
    const char *op = "lora_add";
    struct lora_call call;
    struct loan loan;

    mlora_status status = lora_call(&call, kernels, lora, op);
    if (status != MLORA_OK || call.view.n_segments == 0) return status;
    if (!is_array(op, "y", y, activation_bytes(lora->dtype)) ||
        !is_array(op, "x", x, activation_bytes(lora->dtype)))
        return MLORA_EINVAL;
    status = begin(&loan, kernels, run, op, call.h_bytes + call.scratch_bytes, call.h_bytes);
    if (status != MLORA_OK) return status;
    struct device *dev = kernels->dev;
    float *h = run->workspace;
    dev->ops->lora_shrink(dev, h, x, &call.view, &call.site, lora->layer, (enum dtype)lora->dtype);
    dev->ops->lora_expand(dev, y, h, &call.view, &call.site, lora->layer, (enum dtype)lora->dtype);
    return end(kernels, &loan);
}

int mlora_kernels_lora_expand_silu_mul(mlora_kernels *kernels, void *y, void *gate_up,
                                       const float *h, const mlora_kernels_lora *lora,
                                       const mlora_kernels_run *run)
{
    const char *op = "lora_expand_silu_mul";
    struct lora_call call;
    struct loan loan;

    mlora_status status = lora_call(&call, kernels, lora, op);
    if (status != MLORA_OK || lora->T == 0) return status;
    if (!is_array(op, "y", y, activation_bytes(lora->dtype)) ||
        !is_array(op, "gate_up", gate_up, activation_bytes(lora->dtype)) ||
        !is_array(op, "h", h, sizeof *h))
        return MLORA_EINVAL;
    const int F = lora->width[0];
    if (lora->n_slices != 2 || lora->width[1] != F || lora->N != 2 * F || lora->offset[0] != 0 ||
        lora->offset[1] != F)
        return error_set(MLORA_EINVAL,
                         "%s: the slices must be gate, columns 0 to N / 2 - 1 of "
                         "gate_up, and up, the other half",
                         op);
    status = begin(&loan, kernels, run, op, call.scratch_bytes, 0);
    if (status != MLORA_OK) return status;
    const enum dtype dtype = (enum dtype)lora->dtype;
    kernels->dev->ops->lora_expand_silu_mul(kernels->dev, y, gate_up, dtype, h, &call.view,
                                            &call.site, lora->layer, lora->T, dtype);
    return end(kernels, &loan);
}

/* ---- the paged cache ---------------------------------------------------------------------- */

struct paged_call {
    struct batch_view batch;
    struct kv_view kv;
    struct heads heads;
    struct rope_view rope;
    size_t scratch_bytes;
};

/* Check what both ops and the size function read but pointers. */
static mlora_status paged_call(struct paged_call *call, const mlora_kernels *kernels,
                               const mlora_kernels_paged *paged, const char *op)
{
    if (!is_there(op, "kernels", kernels) || !is_there(op, "paged", paged)) return MLORA_EINVAL;
    if (!in_range(op, "T", paged->T, 0, TOKENS_MAX) ||
        !in_range(op, "Q", paged->Q, paged->T > 0, TOKENS_MAX) ||
        !in_range(op, "G", paged->G, 1, 1024) || !in_range(op, "H", paged->H, paged->G, 1024) ||
        !in_range(op, "d", paged->d, 2, 512) ||
        !in_range(op, "max_row", paged->max_row, paged->T > 0, paged->T) ||
        !in_range(op, "max_kv", paged->max_kv, paged->max_row, 1 << 30) ||
        !in_range(op, "max_blocks", paged->max_blocks, 1, 1 << 27) ||
        !in_range(op, "window", paged->window, 0, 1 << 30) ||
        !in_range(op, "Q * G * ceil(H / G / 8)",
                  (long long)paged->Q * paged->G * ((paged->H / paged->G + 7) / 8), 0, 65536) ||
        !is_activation(op, "dtype", paged->dtype) ||
        !is_activation(op, "kv_dtype", paged->kv_dtype))
        return MLORA_EINVAL;
    if (paged->H % paged->G != 0)
        return error_set(MLORA_EINVAL, "%s: H is %d, must be a multiple of G, %d", op, paged->H,
                         paged->G);
    if (paged->d % 2 != 0)
        return error_set(MLORA_EINVAL, "%s: d is %d, must be even", op, paged->d);
    *call = (struct paged_call){
        .batch = {.T = paged->T,
                  .Q = paged->Q,
                  .max_row = paged->max_row,
                  .max_kv = paged->max_kv,
                  .row_start = paged->row_start,
                  .kv_len = paged->kv_len,
                  .position = (int32_t *)(uintptr_t)paged->position, /* only metadata writes it */
                  .row = (int32_t *)(uintptr_t)paged->row},
        .kv = {.k = paged->k,
               .v = paged->v,
               .block_table = paged->block_table,
               .max_blocks = paged->max_blocks,
               .dtype = (enum dtype)paged->kv_dtype},
        .heads = {.H = paged->H,
                  .G = paged->G,
                  .d = paged->d,
                  .window = paged->window,
                  .scale = paged->scale},
        .rope = {.frequency = paged->frequency, .amplitude = paged->amplitude},
    };
    if (kernels->backend == MLORA_KERNELS_CUDA && paged->T > 0)
        call->scratch_bytes = cuda_attention_bytes(kernels->dev, &call->kv, &call->batch,
                                                   &call->heads, (enum dtype)paged->dtype);
    return MLORA_OK;
}

static mlora_status check_paged_pointers(const mlora_kernels_paged *paged, const char *op)
{
    if (!is_array(op, "k", paged->k, activation_bytes(paged->kv_dtype)) ||
        !is_array(op, "v", paged->v, activation_bytes(paged->kv_dtype)) ||
        !is_array(op, "block_table", paged->block_table, sizeof(int32_t)) ||
        !is_array(op, "row_start", paged->row_start, sizeof(int32_t)) ||
        !is_array(op, "kv_len", paged->kv_len, sizeof(int32_t)) ||
        !is_array(op, "position", paged->position, sizeof(int32_t)) ||
        !is_array(op, "row", paged->row, sizeof(int32_t)) ||
        !is_array_or_null(op, "frequency", paged->frequency, sizeof(float)))
        return MLORA_EINVAL;
    return MLORA_OK;
}

int mlora_kernels_kv_write(mlora_kernels *kernels, void *qkv, const mlora_kernels_paged *paged,
                           const mlora_kernels_run *run)
{
    const char *op = "kv_write";
    struct paged_call call;
    struct loan loan;

    mlora_status status = paged_call(&call, kernels, paged, op);
    if (status != MLORA_OK || paged->T == 0) return status;
    status = check_paged_pointers(paged, op);
    if (status != MLORA_OK) return status;
    if (!is_array(op, "qkv", qkv, activation_bytes(paged->dtype))) return MLORA_EINVAL;
    status = begin(&loan, kernels, run, op, 0, 0);
    if (status != MLORA_OK) return status;
    kernels->dev->ops->rope(kernels->dev, qkv, &call.rope, &call.kv, &call.batch, &call.heads,
                            (enum dtype)paged->dtype);
    return end(kernels, &loan);
}

int mlora_kernels_attention_workspace(const mlora_kernels *kernels,
                                      const mlora_kernels_paged *paged, size_t *out)
{
    const char *op = "attention_workspace";
    struct paged_call call;

    if (!is_there(op, "out", out)) return MLORA_EINVAL;
    *out = 0;
    const mlora_status status = paged_call(&call, kernels, paged, op);
    if (status == MLORA_OK) *out = call.scratch_bytes;
    return status;
}

int mlora_kernels_attention(mlora_kernels *kernels, void *y, const void *qkv,
                            const mlora_kernels_paged *paged, const mlora_kernels_run *run)
{
    const char *op = "attention";
    struct paged_call call;
    struct loan loan;

    mlora_status status = paged_call(&call, kernels, paged, op);
    if (status != MLORA_OK || paged->T == 0) return status;
    status = check_paged_pointers(paged, op);
    if (status != MLORA_OK) return status;
    if (!is_array(op, "y", y, activation_bytes(paged->dtype)) ||
        !is_array(op, "qkv", qkv, activation_bytes(paged->dtype)))
        return MLORA_EINVAL;
    status = begin(&loan, kernels, run, op, call.scratch_bytes, 0);
    if (status != MLORA_OK) return status;
    const enum dtype dtype = (enum dtype)paged->dtype;
    kernels->dev->ops->attention(kernels->dev, y, qkv, dtype, &call.kv, &call.batch, &call.heads,
                                 dtype);
    return end(kernels, &loan);
}

/* ---- draft and extend --------------------------------------------------------------------- */

int mlora_kernels_extend_metadata(mlora_kernels *kernels, const mlora_kernels_extend *extend,
                                  const mlora_kernels_run *run)
{
    const char *op = "extend_metadata";
    struct loan loan;

    if (!is_there(op, "kernels", kernels) || !is_there(op, "extend", extend) ||
        !in_range(op, "bs", extend->bs, 0, 1 << 20) ||
        !in_range(op, "capacity", extend->capacity, 0, 1 << 30) ||
        !in_range(op, "search", extend->search, MLORA_KERNELS_ADAPTIVE, MLORA_KERNELS_BY_REQUEST) ||
        !is_array(op, "total", extend->total, sizeof(int32_t)) ||
        !is_array(op, "request_start", extend->request_start, sizeof(int32_t)) ||
        !is_array_or_null(op, "token_kv_len", extend->token_kv_len, sizeof(int32_t)) ||
        !is_array_or_null(op, "clamped_kv_len", extend->clamped_kv_len, sizeof(int32_t)) ||
        !is_array_or_null(op, "token_position", extend->token_position, sizeof(int32_t)) ||
        !is_array_or_null(op, "token_request", extend->token_request, sizeof(int32_t)) ||
        !is_array_or_null(op, "token_adapter", extend->token_adapter, sizeof(int32_t)))
        return MLORA_EINVAL;
    const size_t length_bytes = extend->has_int64_lengths ? sizeof(int64_t) : sizeof(int32_t);
    if (extend->bs > 0 && (!is_array(op, "extend_len", extend->extend_len, length_bytes) ||
                           !is_array(op, "kv_len", extend->kv_len, length_bytes)))
        return MLORA_EINVAL;
    if (extend->token_adapter && extend->bs > 0 &&
        !is_array(op, "adapter", extend->adapter, sizeof(int32_t)))
        return MLORA_EINVAL;
    const mlora_status status = begin(&loan, kernels, run, op, 0, 0);
    if (status != MLORA_OK) return status;
    const struct extend_view view = {
        .bs = extend->bs,
        .capacity = extend->capacity,
        .topk = extend->topk,
        .search = (enum extend_search)extend->search,
        .has_int64_lengths = extend->has_int64_lengths != 0,
        .fills_tail = extend->fills_tail != 0,
        .tail = extend->tail,
        .extend_len = extend->extend_len,
        .kv_len = extend->kv_len,
        .adapter = extend->adapter,
        .total = extend->total,
        .request_start = extend->request_start,
        .token_kv_len = extend->token_kv_len,
        .clamped_kv_len = extend->clamped_kv_len,
        .token_position = extend->token_position,
        .token_request = extend->token_request,
        .token_adapter = extend->token_adapter,
    };
    kernels->dev->ops->extend_metadata(kernels->dev, &view);
    return end(kernels, &loan);
}
