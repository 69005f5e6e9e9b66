/* The factors of an adapter from its file to one block of device memory. Where A and B of a
 * linear have different types, both are widened to f32: the arithmetic is the same, as products
 * are summed in f32 in any case. */
#include "lora/adapter.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { ALIGNMENT = 256 };

static int64_t aligned(int64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static bool shares_a(const struct adapter_plan *plan, int index)
{
    const struct adapter_linear *linear = &plan->linears[index];
    return index > 0 && linear->rank > 0 && linear[-1].a == linear->a &&
           linear[-1].dtype == linear->dtype;
}

void adapter_factor_bytes(const struct adapter_plan *plan, int index, int64_t *a, int64_t *b)
{
    const struct adapter_linear *linear = &plan->linears[index];

    *a = *b = 0;
    if (linear->rank == 0) return;
    const int64_t element = (int64_t)dtype_bytes(linear->dtype);
    if (!shares_a(plan, index)) *a = aligned(linear->rank * linear->a->shape[1] * element);
    *b = aligned(linear->b_rows * linear->rank * element);
}

/* A host buffer for what is read and another for what it is widened to; both only grow. */
struct staging {
    struct buffer read, wide;
};

static void widen(float *out, const void *from, enum dtype dtype, int64_t n)
{
    const uint16_t *half = from;

    for (int64_t i = 0; i < n; i++)
        out[i] = dtype == DTYPE_BF16 ? bf16_to_f32(half[i]) : f16_to_f32(half[i]);
}

/* Copy `rows` rows of `tensor` from number `row` on to device memory, as `dtype`. */
static mlora_status upload_rows(struct device *dev, void *to, const struct adapter_plan *plan,
                                const struct tensor *tensor, int64_t row, int64_t rows,
                                enum dtype dtype, struct staging *staging)
{
    enum dtype stored;
    const int64_t columns = tensor->shape[1];

    mlora_status status = tensor_dtype(&stored, &plan->file, tensor);
    if (status != MLORA_OK) return status;
    const int64_t pitch = columns * (int64_t)dtype_bytes(stored);
    const size_t bytes = (size_t)(rows * pitch);
    status = buffer_reserve(&staging->read, bytes);
    if (status != MLORA_OK) return status;
    status =
        file_read_at(&plan->file.file, staging->read.data, bytes, tensor->offset + row * pitch);
    if (status != MLORA_OK) return status;
    if (stored == dtype) {
        dev->ops->upload(dev, to, staging->read.data, bytes);
        return MLORA_OK;
    }

    const size_t wide_bytes = (size_t)(rows * columns) * sizeof(float);
    status = buffer_reserve(&staging->wide, wide_bytes);
    if (status != MLORA_OK) return status;
    widen((float *)(void *)staging->wide.data, staging->read.data, stored, rows * columns);
    dev->ops->upload(dev, to, staging->wide.data, wide_bytes);
    return MLORA_OK;
}

/* Upload linears[index] to `*at`, which moves behind it. */
static mlora_status load_linear(struct adapter *adapter, struct device *dev,
                                const struct adapter_plan *plan, int index, char **at,
                                struct staging *staging)
{
    const struct adapter_linear *linear = &plan->linears[index];
    struct lora_factors *factors = &adapter->factors[index];
    int64_t a_bytes, b_bytes;
    mlora_status status = MLORA_OK;

    if (linear->rank == 0) return MLORA_OK;
    adapter_factor_bytes(plan, index, &a_bytes, &b_bytes);
    *factors = (struct lora_factors){.a = a_bytes ? *at : factors[-1].a,
                                     .b = *at + a_bytes,
                                     .R = linear->rank,
                                     .dtype = linear->dtype,
                                     .scale = linear->scale};
    if (a_bytes)
        status = upload_rows(dev, *at, plan, linear->a, 0, linear->rank, linear->dtype, staging);
    if (status == MLORA_OK)
        status = upload_rows(dev, *at + a_bytes, plan, linear->b, linear->b_row, linear->b_rows,
                             linear->dtype, staging);
    *at += a_bytes + b_bytes;
    return status;
}

mlora_status adapter_load(struct adapter *out, struct device *dev, const struct adapter_plan *plan)
{
    const int n = plan->n_layers * LORA_LINEARS;
    struct adapter adapter = {
        .bytes = plan->bytes, .n_layers = plan->n_layers, .max_rank = plan->max_rank};
    struct staging staging = {0};
    mlora_status status = MLORA_OK;

    adapter.factors = calloc((size_t)n + 1, sizeof *adapter.factors);
    adapter.warnings = strdup(buffer_text(&plan->warnings));
    if (!adapter.factors || !adapter.warnings) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory for %d linears", plan->directory, n);
        goto done;
    }
    status = dev->ops->alloc(dev, (size_t)plan->bytes, &adapter.memory);
    if (status != MLORA_OK) {
        status = error_prefix(status, "%s: %" PRId64 " bytes for the factors", plan->directory,
                              plan->bytes);
        goto done;
    }

    char *at = adapter.memory;
    for (int i = 0; i < n && status == MLORA_OK; i++)
        status = load_linear(&adapter, dev, plan, i, &at, &staging);
    const mlora_status sync = dev->ops->sync(dev); /* a failed upload is reported here */
    if (status == MLORA_OK) status = sync;

done:
    buffer_free(&staging.read);
    buffer_free(&staging.wide);
    if (status != MLORA_OK) adapter_free(&adapter, dev);
    *out = adapter;
    return status;
}

void adapter_free(struct adapter *adapter, struct device *dev)
{
    if (adapter->memory) dev->ops->free(dev, adapter->memory);
    free(adapter->factors);
    free(adapter->warnings);
    *adapter = (struct adapter){0};
}
