/* The values of an adapter from its file to one block of device memory. The same walk is made
 * twice: without memory it counts the bytes, with memory it fills them. Where A and B of a linear
 * have different types, both are widened to f32: the arithmetic is the same, as products are summed
 * in f32 in any case. */
#include "lora/adapter.h"

#include <assert.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/values.h"

enum { ALIGNMENT = 256 };

struct loader {
    struct device *dev;
    const struct adapter_plan *plan;
    const struct model_config *config;
    const struct weights *base; /* NULL: not needed */
    struct values values;       /* host buffers */
    char *memory;               /* NULL: counting only */
    int64_t at;                 /* bytes placed */
    struct lora_own own;
    bool base_has_embedding, base_has_head; /* the copies in the file are the base's own */
};

static void *place(struct loader *loader, int64_t bytes)
{
    void *at = loader->memory ? loader->memory + loader->at : NULL;
    loader->at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

/* Place `n` floats and upload them. */
static const float *put_floats(struct loader *loader, const float *from, int64_t n)
{
    float *to = place(loader, n * (int64_t)sizeof *to);
    if (to) loader->dev->ops->upload(loader->dev, to, from, (size_t)n * sizeof *to);
    return to;
}

/* Place and upload elements [first, first + n) of a tensor in f32. */
static mlora_status put_vector(struct loader *loader, const struct tensor *tensor, int64_t first,
                               int64_t n, const float **out)
{
    const void *values = NULL;
    mlora_status status = MLORA_OK;

    if (loader->memory)
        status = values_vector(&loader->values, &loader->plan->file, tensor, first, n, &values);
    *out = status == MLORA_OK ? put_floats(loader, values, n) : NULL;
    return status;
}

/* ---- linears ------------------------------------------------------------------------------ */

static bool shares_a(const struct adapter_plan *plan, int index)
{
    const struct adapter_linear *linear = &plan->linears[index];
    return index % LORA_LINEARS > 0 && index < plan->n_layers * LORA_LINEARS &&
           linear[-1].rank > 0 && linear[-1].a == linear->a && linear[-1].dtype == linear->dtype;
}

/* Place rows [row, row + rows) of a factor, in their form, as `dtype`. */
static mlora_status put_matrix(struct loader *loader, const struct tensor *tensor, int64_t row,
                               int64_t rows, enum factor_form form, int parts, enum dtype dtype,
                               const void **out)
{
    const int64_t columns =
        tensor->shape[1] * (form == FORM_BLOCKS || form == FORM_GROUPS ? parts : 1);
    const int64_t bytes = rows * columns * (int64_t)dtype_bytes(dtype);
    void *to = place(loader, bytes);
    const void *values;

    *out = to;
    if (!to) return MLORA_OK;
    mlora_status status =
        values_read(&loader->values, &loader->plan->file, tensor, row, rows, dtype, &values);
    if (status == MLORA_OK)
        status = values_shape(&loader->values, &values, rows, tensor->shape[1], form, parts, dtype);
    if (status == MLORA_OK) loader->dev->ops->upload(loader->dev, to, values, (size_t)bytes);
    return status;
}

/* The base's bias of a linear, on the device, and its matrix; a copy in the file counts for it. */
static struct matrix base_linear(const struct loader *loader, int index, const float **bias)
{
    const int layer = index / LORA_LINEARS, linear = index % LORA_LINEARS;

    *bias = NULL;
    if (layer < loader->plan->n_layers)
        return weights_linear(loader->base, loader->config, layer, (enum lora_linear)linear, bias);
    if (linear == LORA_HEAD) return loader->own.head.data ? loader->own.head : loader->base->head;
    return loader->own.embedding.data ? loader->own.embedding : loader->base->embedding;
}

/* g = magnitude / norm of the base's rows with the product added; of the embedding, columns. */
static mlora_status put_dora(struct loader *loader, const struct adapter_linear *linear, int index,
                             const float **out)
{
    const bool embedding = index == loader->plan->n_layers * LORA_LINEARS + LORA_EMBEDDING;
    const float *bias;

    *out = NULL;
    if (!linear->magnitude) return MLORA_OK;
    if (!loader->memory) {
        place(loader, linear->out * (int64_t)sizeof(float));
        return MLORA_OK;
    }
    assert(loader->base);
    const struct matrix w = base_linear(loader, index, &bias);
    float *g = malloc((size_t)linear->out * sizeof *g);
    if (!g) return error_set(MLORA_ENOMEM, "%s: out of memory for DoRA", loader->plan->directory);
    const mlora_status status =
        values_dora(&loader->values, loader->dev, &loader->plan->file, linear, &w, embedding, g);
    if (status == MLORA_OK) *out = put_floats(loader, g, linear->out);
    free(g);
    return status;
}

/* The saved bias less the base's; NULL where they are equal. */
static mlora_status put_bias(struct loader *loader, const struct adapter_linear *linear, int index,
                             const float **out)
{
    const float *base_bias;
    const void *values;
    float *base = NULL;
    bool equal = true;

    *out = NULL;
    if (!linear->bias) return MLORA_OK;
    if (!loader->memory) {
        place(loader, linear->out * (int64_t)sizeof(float));
        return MLORA_OK;
    }
    assert(loader->base);
    base_linear(loader, index, &base_bias);
    assert(base_bias); /* the plan was checked against the same configuration */
    mlora_status status = values_vector(&loader->values, &loader->plan->file, linear->bias,
                                        linear->b_row, linear->out, &values);
    if (status != MLORA_OK) return status;
    base = malloc((size_t)linear->out * sizeof *base);
    if (!base) return error_set(MLORA_ENOMEM, "%s: out of memory", loader->plan->directory);
    loader->dev->ops->download(loader->dev, base, base_bias, (size_t)linear->out * sizeof *base);
    for (int64_t i = 0; i < linear->out; i++) {
        base[i] = ((const float *)values)[i] - base[i];
        equal &= base[i] == 0.0f;
    }
    const float *delta = put_floats(loader, base, linear->out);
    *out = equal ? NULL : delta;
    free(base);
    return MLORA_OK;
}

static mlora_status load_linear(struct loader *loader, struct lora_factors *factors, int index)
{
    const struct adapter_plan *plan = loader->plan;
    const struct adapter_linear *linear = &plan->linears[index];
    mlora_status status = MLORA_OK;

    *factors = (struct lora_factors){0};
    if (linear->rank > 0) {
        factors->R = linear->rank;
        factors->dtype = (int32_t)linear->dtype;
        factors->scale = linear->scale;
        if (shares_a(plan, index))
            factors->a = factors[-1].a;
        else
            status = put_matrix(loader, linear->a, 0, linear->a->shape[0], linear->a_form,
                                linear->parts, linear->dtype, &factors->a);
        if (status != MLORA_OK) return status;
        status = put_matrix(loader, linear->b, linear->b_row,
                            linear->b_form == FORM_TRANSPOSED ? linear->rank : linear->out,
                            linear->b_form, linear->parts, linear->dtype, &factors->b);
        if (status != MLORA_OK) return status;
    }
    if (linear->b_bias)
        status = put_vector(loader, linear->b_bias, linear->b_row, linear->out, &factors->b_bias);
    if (status != MLORA_OK) return status;
    status = put_dora(loader, linear, index, &factors->g);
    return status == MLORA_OK ? put_bias(loader, linear, index, &factors->bias_delta) : status;
}

int64_t adapter_linear_bytes(const struct adapter_plan *plan, int index)
{
    struct loader loader = {.plan = plan};
    struct lora_factors factors[2] = {0};

    load_linear(&loader, &factors[1], index); /* counting cannot fail */
    return loader.at;
}

/* ---- whole weights ------------------------------------------------------------------------ */

static mlora_status put_whole(struct loader *loader, const struct tensor *tensor,
                              struct matrix *out)
{
    enum dtype dtype;

    mlora_status status = tensor_dtype(&dtype, &loader->plan->file, tensor);
    if (status != MLORA_OK) return status;
    char *to = place(loader, tensor->bytes);
    *out = (struct matrix){to, dtype, (int)tensor->shape[0], (int)tensor->shape[1]};
    const int64_t pitch = tensor->shape[1] * (int64_t)dtype_bytes(dtype);
    const int64_t piece = values_piece_rows(tensor->shape[1]);
    for (int64_t row = 0; row < tensor->shape[0] && to && status == MLORA_OK; row += piece) {
        const int64_t left = tensor->shape[0] - row, rows = left < piece ? left : piece;
        const void *values;
        status =
            values_read(&loader->values, &loader->plan->file, tensor, row, rows, dtype, &values);
        if (status == MLORA_OK)
            loader->dev->ops->upload(loader->dev, to + row * pitch, values, (size_t)(rows * pitch));
    }
    return status;
}

static mlora_status put_rows(struct loader *loader, const struct adapter_rows *rows,
                             struct lora_rows *out)
{
    const struct tensor *tensor = rows->tensor;
    const int64_t n = rows->n, D = tensor ? tensor->shape[1] : 0;
    enum dtype dtype;

    *out = (struct lora_rows){0};
    if (!tensor) return MLORA_OK;
    mlora_status status = tensor_dtype(&dtype, &loader->plan->file, tensor);
    if (status != MLORA_OK) return status;
    const size_t pitch = (size_t)D * dtype_bytes(dtype);
    int32_t *ids = place(loader, n * (int64_t)sizeof *ids);
    char *data = place(loader, n * (int64_t)pitch);
    *out = (struct lora_rows){ids, data, rows->n, (int32_t)dtype};
    if (!data) return MLORA_OK;

    const void *values;
    status = values_read(&loader->values, &loader->plan->file, tensor, 0, n, dtype, &values);
    if (status != MLORA_OK) return status;
    loader->dev->ops->upload(loader->dev, ids, rows->ids, (size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++)
        loader->dev->ops->upload(loader->dev, data + (size_t)i * pitch,
                                 (const char *)values + (size_t)rows->row[i] * pitch, pitch);
    return MLORA_OK;
}

/* The weights of each norm, and the table of them. */
static mlora_status put_norms(struct loader *loader, const float *const **out)
{
    const struct adapter_plan *plan = loader->plan;
    const size_t n = (size_t)plan->n_layers * LORA_NORMS + 1;
    mlora_status status = MLORA_OK;
    int n_own = 0;

    *out = NULL;
    for (size_t i = 0; i < n; i++) n_own += plan->norms[i] != NULL;
    if (n_own == 0) return MLORA_OK;
    const float **table = calloc(n, sizeof *table);
    if (!table) return error_set(MLORA_ENOMEM, "%s: out of memory", plan->directory);
    for (size_t i = 0; i < n && status == MLORA_OK; i++)
        if (plan->norms[i])
            status = put_vector(loader, plan->norms[i], 0, plan->norms[i]->shape[0], &table[i]);
    void *to = place(loader, (int64_t)(n * sizeof *table));
    if (to) loader->dev->ops->upload(loader->dev, to, table, n * sizeof *table);
    *out = to;
    free(table);
    return status;
}

static mlora_status load_own(struct loader *loader, struct lora_own *own)
{
    const struct adapter_plan *plan = loader->plan;
    const bool embedding = plan->embedding && !loader->base_has_embedding;
    const bool head = plan->head && !loader->base_has_head;
    mlora_status status = MLORA_OK;

    *own = (struct lora_own){0};
    if (embedding) status = put_whole(loader, plan->embedding, &own->embedding);
    if (status != MLORA_OK) return status;
    if (head && embedding && plan->head == plan->embedding)
        own->head = own->embedding;
    else if (head)
        status = put_whole(loader, plan->head, &own->head);
    if (status == MLORA_OK) status = put_rows(loader, &plan->embedding_rows, &own->embedding_rows);
    if (status == MLORA_OK) status = put_rows(loader, &plan->head_rows, &own->head_rows);
    if (plan->head_has_embedding_rows) own->head_rows = own->embedding_rows;
    return status == MLORA_OK ? put_norms(loader, &own->norms) : status;
}

/* ---- the whole ---------------------------------------------------------------------------- */

/* `factors` NULL: only bytes are counted. */
static mlora_status load_all(struct loader *loader, struct lora_factors *factors)
{
    const int n = (loader->plan->n_layers + 1) * LORA_LINEARS;
    struct lora_factors none[2] = {0}; /* the one before, and this one */

    mlora_status status = load_own(loader, &loader->own);
    for (int i = 0; i < n && status == MLORA_OK; i++)
        status = load_linear(loader, factors ? &factors[i] : &none[1], i);
    return status;
}

int64_t adapter_bytes(const struct adapter_plan *plan)
{
    struct loader loader = {.plan = plan};
    load_all(&loader, NULL);
    return loader.at;
}

/* Whether the file's copies of embedding and head are what the base has already. */
static mlora_status compare_copies(struct loader *loader)
{
    const struct adapter_plan *plan = loader->plan;
    mlora_status status = MLORA_OK;

    if (plan->embedding_is_copy)
        status = values_equal(&loader->base_has_embedding, &loader->values, loader->dev,
                              &plan->file, plan->embedding, &loader->base->embedding);
    if (status != MLORA_OK || !plan->head_is_copy) return status;
    if (plan->head == plan->embedding) {
        loader->base_has_head = loader->base_has_embedding;
        return MLORA_OK;
    }
    return values_equal(&loader->base_has_head, &loader->values, loader->dev, &plan->file,
                        plan->head, &loader->base->head);
}

static void note_changes(struct adapter *adapter)
{
    const struct lora_factors *outside = &adapter->factors[adapter->n_layers * LORA_LINEARS];
    const struct lora_own *own = &adapter->own;

    adapter->changes_embedding =
        outside[LORA_EMBEDDING].a || own->embedding.data || own->embedding_rows.n > 0;
    adapter->changes_head = outside[LORA_HEAD].a || own->head.data || own->head_rows.n > 0;
    adapter->changes_norms = own->norms != NULL;
    for (int i = 0; i < (adapter->n_layers + 1) * LORA_LINEARS; i++) {
        const struct lora_factors *factors = &adapter->factors[i];
        adapter->expands_more |= factors->g || factors->b_bias || factors->bias_delta;
    }
}

static mlora_status copy_plan(struct adapter *adapter, const struct adapter_plan *plan)
{
    const size_t n = ((size_t)plan->n_layers + 1) * LORA_LINEARS;

    adapter->factors = calloc(n, sizeof *adapter->factors);
    adapter->warnings = strdup(buffer_text(&plan->warnings));
    if (plan->invocation)
        adapter->invocation = malloc((size_t)plan->n_invocation * sizeof *adapter->invocation + 1);
    if (!adapter->factors || !adapter->warnings || (plan->invocation && !adapter->invocation))
        return error_set(MLORA_ENOMEM, "%s: out of memory for %zu linears", plan->directory, n);
    if (plan->invocation)
        memcpy(adapter->invocation, plan->invocation,
               (size_t)plan->n_invocation * sizeof *adapter->invocation);
    adapter->n_invocation = plan->n_invocation;
    adapter->n_layers = plan->n_layers;
    adapter->max_rank = plan->max_rank;
    return MLORA_OK;
}

mlora_status adapter_load(struct adapter *out, struct device *dev, const struct adapter_plan *plan,
                          const struct model_config *config, const struct weights *base)
{
    struct adapter adapter = {0};
    struct loader loader = {.dev = dev, .plan = plan, .config = config, .base = base};
    struct hasher hasher;
    mlora_status status;

    *out = (struct adapter){0};
    status = copy_plan(&adapter, plan);
    if (status != MLORA_OK) goto done;
    status = compare_copies(&loader);
    if (status != MLORA_OK) goto done;
    status = load_all(&loader, NULL);
    if (status != MLORA_OK) goto done;
    adapter.bytes = loader.at;
    status = dev->ops->alloc(dev, (size_t)adapter.bytes, &adapter.memory);
    if (status != MLORA_OK) {
        status = error_prefix(status, "%s: %" PRId64 " bytes for the factors", plan->directory,
                              adapter.bytes);
        goto done;
    }
    loader.memory = adapter.memory;
    loader.at = 0;
    hash_begin(&hasher, plan->hash_key);
    adapter_hash_plan(&hasher, plan);
    loader.values.hasher = &hasher;
    status = load_all(&loader, adapter.factors);
    adapter.own = loader.own;
    adapter.content = hash_end(&hasher);
    const mlora_status sync = dev->ops->sync(dev); /* a failed upload is reported here */
    if (status == MLORA_OK) status = sync;
    note_changes(&adapter);

done:
    values_free(&loader.values);
    if (status != MLORA_OK) adapter_free(&adapter, dev);
    *out = adapter;
    return status;
}

void adapter_free(struct adapter *adapter, struct device *dev)
{
    if (adapter->memory) dev->ops->free(dev, adapter->memory);
    free(adapter->factors);
    free(adapter->invocation);
    free(adapter->warnings);
    *adapter = (struct adapter){0};
}

int adapter_first_position(const struct adapter *adapter, const int32_t *prompt, int n)
{
    const int m = adapter->n_invocation;

    if (m == 0) return 0;
    for (int at = n - m; at >= 0; at--)
        if (memcmp(prompt + at, adapter->invocation, (size_t)m * sizeof *prompt) == 0) return at;
    return INT_MAX;
}
