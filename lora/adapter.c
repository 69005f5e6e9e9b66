/* The values of an adapter from its file to its image: one block of host memory, laid out as it will
 * lie on the device. The same walk is made twice: without memory it counts the bytes, with memory it
 * fills them. Where A and B of a linear have different types, both are widened to f32: the
 * arithmetic is the same, as products are summed in f32 in any case.
 *
 * What takes the base's weights to compute (DoRA's scales, biases less the base's) is kept beside
 * the image, in the order of the walk: an image that was dropped is read again without the device. */
#include "lora/adapter.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "engine/base/error.h"
#include "lora/values.h"

enum { ALIGNMENT = 256, HUGE_PAGE = 2 << 20 };

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
    const float **norms;                    /* [L * LORA_NORMS + 1] or NULL: what own.norms holds */
    struct buffer *derived;                 /* what was computed with the base: floats */
    bool again;                             /* `derived` is there: it is read, else written */
    size_t derived_at;                      /* bytes of it that were read */
    bool has_infinite;                      /* a factor of bf16 has, or NaN */
    struct matrix lent;                     /* the adapter's own embedding or head on the device */
};

/* Room for `bytes`; what follows up to the next part is zeroed, as it counts in the hash. */
static void *place(struct loader *loader, int64_t bytes)
{
    const int64_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    char *at = loader->memory ? loader->memory + loader->at : NULL;

    loader->at += rounded;
    if (at) memset(at + bytes, 0, (size_t)(rounded - bytes));
    return at;
}

/* Place `n` floats. */
static const float *put_floats(struct loader *loader, const float *from, int64_t n)
{
    float *to = place(loader, n * (int64_t)sizeof *to);
    if (to) memcpy(to, from, (size_t)n * sizeof *to);
    return to;
}

/* Floats that were computed when the adapter was loaded first. They count for its content in the
 * place of what they were computed from. */
static const float *derived_floats(struct loader *loader, int64_t n)
{
    const char *at = loader->derived->data + loader->derived_at;
    loader->derived_at += (size_t)n * sizeof(float);
    assert(loader->derived_at <= loader->derived->bytes); /* the same plan: checked by its bytes */
    hash_add(loader->values.hasher, at, (size_t)n * sizeof(float));
    return (const float *)(const void *)at;
}

static mlora_status keep_derived(struct loader *loader, const float *values, int64_t n)
{
    hash_add(loader->values.hasher, values, (size_t)n * sizeof *values);
    return buffer_append(loader->derived, values, (size_t)n * sizeof *values);
}

/* Place elements [first, first + n) of a tensor in f32. */
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
    if (status != MLORA_OK) return status;
    memcpy(to, values, (size_t)bytes);
    if (dtype == DTYPE_BF16 && !loader->again)
        loader->has_infinite |= !bf16_all_finite(to, (size_t)(rows * columns));
    return MLORA_OK;
}

/* The base's matrix of a linear, on the device; a copy in the file, which is lent to the device until
 * the end of the load, counts for it. */
static mlora_status base_linear(struct loader *loader, int index, struct matrix *out)
{
    const int layer = index / LORA_LINEARS, linear = index % LORA_LINEARS;
    const struct kernels *op = loader->dev->ops;
    const float *bias;

    if (layer < loader->plan->n_layers) {
        *out = weights_linear(loader->base, loader->config, layer, (enum lora_linear)linear, &bias);
        return MLORA_OK;
    }
    *out = linear == LORA_HEAD ? loader->base->head : loader->base->embedding;
    const struct matrix *own = linear == LORA_HEAD ? &loader->own.head : &loader->own.embedding;
    if (!own->data) return MLORA_OK;

    const size_t bytes = (size_t)own->N * (size_t)own->K * dtype_bytes(own->dtype);
    void *memory = NULL;
    if (loader->lent.data) op->free(loader->dev, (void *)(uintptr_t)loader->lent.data);
    loader->lent.data = NULL;
    const mlora_status status = op->alloc(loader->dev, bytes, &memory);
    if (status != MLORA_OK) return status;
    op->upload(loader->dev, memory, own->data, bytes);
    loader->lent = *own;
    loader->lent.data = memory;
    *out = loader->lent;
    return MLORA_OK;
}

/* g = magnitude / norm of the base's rows with the product added; of the embedding, columns. */
static mlora_status put_dora(struct loader *loader, const struct adapter_linear *linear, int index,
                             const float **out)
{
    const bool embedding = index == loader->plan->n_layers * LORA_LINEARS + LORA_EMBEDDING;
    struct matrix w;

    *out = NULL;
    if (!linear->magnitude) return MLORA_OK;
    if (!loader->memory) {
        place(loader, linear->out * (int64_t)sizeof(float));
        return MLORA_OK;
    }
    if (loader->again) {
        *out = put_floats(loader, derived_floats(loader, linear->out), linear->out);
        return MLORA_OK;
    }
    assert(loader->base);
    mlora_status status = base_linear(loader, index, &w);
    if (status != MLORA_OK) return status;
    float *g = malloc((size_t)linear->out * sizeof *g);
    if (!g) return error_set(MLORA_ENOMEM, "%s: out of memory for DoRA", loader->plan->directory);
    struct hasher *hasher = loader->values.hasher;
    loader->values.hasher = NULL;
    status =
        values_dora(&loader->values, loader->dev, &loader->plan->file, linear, &w, embedding, g);
    loader->values.hasher = hasher;
    if (status == MLORA_OK) status = keep_derived(loader, g, linear->out);
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
    const float *delta = NULL;
    float *base = NULL;
    bool equal = true;

    *out = NULL;
    if (!linear->bias) return MLORA_OK;
    if (!loader->memory) {
        place(loader, linear->out * (int64_t)sizeof(float));
        return MLORA_OK;
    }
    if (loader->again) {
        delta = derived_floats(loader, linear->out);
        for (int64_t i = 0; i < linear->out; i++) equal &= delta[i] == 0.0f;
        delta = put_floats(loader, delta, linear->out);
        *out = equal ? NULL : delta;
        return MLORA_OK;
    }
    assert(loader->base);
    weights_linear(loader->base, loader->config, index / LORA_LINEARS,
                   (enum lora_linear)(index % LORA_LINEARS), &base_bias);
    assert(base_bias); /* the plan was checked against the same configuration */
    struct hasher *hasher = loader->values.hasher;
    loader->values.hasher = NULL;
    mlora_status status = values_vector(&loader->values, &loader->plan->file, linear->bias,
                                        linear->b_row, linear->out, &values);
    loader->values.hasher = hasher;
    if (status != MLORA_OK) return status;
    base = malloc((size_t)linear->out * sizeof *base);
    if (!base) return error_set(MLORA_ENOMEM, "%s: out of memory", loader->plan->directory);
    loader->dev->ops->download(loader->dev, base, base_bias, (size_t)linear->out * sizeof *base);
    for (int64_t i = 0; i < linear->out; i++) {
        base[i] = ((const float *)values)[i] - base[i];
        equal &= base[i] == 0.0f;
    }
    status = keep_derived(loader, base, linear->out);
    delta = put_floats(loader, base, linear->out);
    *out = equal ? NULL : delta;
    free(base);
    return status;
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
        if (status == MLORA_OK) memcpy(to + row * pitch, values, (size_t)(rows * pitch));
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
    memcpy(ids, rows->ids, (size_t)n * sizeof *ids);
    for (int64_t i = 0; i < n; i++)
        memcpy(data + (size_t)i * pitch, (const char *)values + (size_t)rows->row[i] * pitch,
               pitch);
    return MLORA_OK;
}

/* The weights of each norm, and room for the table of them, which is filled when it is known where
 * the adapter lies. */
static mlora_status put_norms(struct loader *loader, const float *const **out)
{
    const struct adapter_plan *plan = loader->plan;
    const size_t n = (size_t)plan->n_layers * LORA_NORMS + 1;
    mlora_status status = MLORA_OK;
    int n_own = 0;

    *out = NULL;
    for (size_t i = 0; i < n; i++) n_own += plan->norms[i] != NULL;
    if (n_own == 0) return MLORA_OK;
    if (loader->memory && !loader->norms) {
        loader->norms = calloc(n, sizeof *loader->norms);
        if (!loader->norms) return error_set(MLORA_ENOMEM, "%s: out of memory", plan->directory);
    }
    for (size_t i = 0; i < n && status == MLORA_OK; i++) {
        const float *one = NULL;
        if (!plan->norms[i]) continue;
        status = put_vector(loader, plan->norms[i], 0, plan->norms[i]->shape[0], &one);
        if (loader->norms) loader->norms[i] = one;
    }
    void *to = place(loader, (int64_t)(n * sizeof *loader->norms));
    if (to) memset(to, 0, n * sizeof *loader->norms);
    *out = to;
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

/* Of what is kept beside the image. */
static int64_t adapter_derived_bytes(const struct adapter_plan *plan)
{
    int64_t n = 0;
    for (int i = 0; i < (plan->n_layers + 1) * LORA_LINEARS; i++) {
        const struct adapter_linear *linear = &plan->linears[i];
        n += linear->out * ((linear->magnitude != NULL) + (linear->bias != NULL));
    }
    return n * (int64_t)sizeof(float);
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

static void note_changes(struct adapter *adapter, bool is_finite)
{
    const struct lora_factors *outside = &adapter->factors[adapter->n_layers * LORA_LINEARS];
    const struct lora_own *own = &adapter->own;

    adapter->changes_embedding =
        outside[LORA_EMBEDDING].a || own->embedding.data || own->embedding_rows.n > 0;
    adapter->changes_head = outside[LORA_HEAD].a || own->head.data || own->head_rows.n > 0;
    adapter->changes_norms = own->norms != NULL;
    adapter->is_plain = is_finite;
    for (int i = 0; i < (adapter->n_layers + 1) * LORA_LINEARS; i++) {
        const struct lora_factors *factors = &adapter->factors[i];
        adapter->expands_more |= factors->g || factors->b_bias || factors->bias_delta;
        adapter->is_plain &= !factors->a || (factors->dtype == DTYPE_BF16 && factors->R % 8 == 0);
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

/* ---- the image ---------------------------------------------------------------------------- */

/* Large images ask for huge pages: they are written once and read once, and small pages would cost
 * more than that. */
char *adapter_image_alloc(int64_t bytes)
{
    const size_t alignment = bytes >= 2 * (int64_t)HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    const size_t rounded_up = ((size_t)bytes + alignment) / alignment * alignment; /* never 0 */
    char *image = aligned_alloc(alignment, rounded_up);
#ifdef MADV_HUGEPAGE
    if (image && alignment == HUGE_PAGE) madvise(image, rounded_up, MADV_HUGEPAGE);
#endif
    return image;
}

/* Fill the image of `adapter`, whose bytes are known. */
static mlora_status fill_image(struct loader *loader, struct adapter *adapter)
{
    adapter->memory = adapter_image_alloc(adapter->bytes);
    if (!adapter->memory)
        return error_set(MLORA_ENOMEM, "%s: out of memory: %" PRId64 " bytes for the factors",
                         loader->plan->directory, adapter->bytes);
    struct hasher hasher;
    hash_begin(&hasher, loader->plan->hash_key);
    adapter_hash_plan(&hasher, loader->plan);
    loader->values.hasher = &hasher;
    adapter->origin = (uintptr_t)adapter->memory;
    loader->memory = adapter->memory;
    loader->at = 0;
    const mlora_status status = load_all(loader, adapter->factors);
    loader->values.hasher = NULL;
    adapter->content = hash_end(&hasher);
    adapter->own = loader->own;
    adapter->norms = loader->norms;
    return status;
}

mlora_status adapter_load(struct adapter *out, struct device *dev, const struct adapter_plan *plan,
                          const struct model_config *config, const struct weights *base)
{
    struct adapter adapter = {0};
    struct loader loader = {.dev = dev, .plan = plan, .config = config, .base = base};
    mlora_status status;

    *out = (struct adapter){0};
    loader.derived = &adapter.derived;
    status = copy_plan(&adapter, plan);
    if (status != MLORA_OK) goto done;
    status = compare_copies(&loader);
    if (status != MLORA_OK) goto done;
    adapter.base_has_embedding = loader.base_has_embedding;
    adapter.base_has_head = loader.base_has_head;
    status = load_all(&loader, NULL);
    if (status != MLORA_OK) goto done;
    adapter.bytes = loader.at;
    status = fill_image(&loader, &adapter);
    if (status != MLORA_OK) goto done;
    note_changes(&adapter, !loader.has_infinite);

done:
    if (loader.lent.data) dev->ops->free(dev, (void *)(uintptr_t)loader.lent.data);
    values_free(&loader.values);
    if (status != MLORA_OK) adapter_free(&adapter);
    *out = adapter;
    return status;
}

mlora_status adapter_load_again(struct adapter *adapter, const struct adapter_plan *plan)
{
    struct loader loader = {.plan = plan, .again = true, .derived = &adapter->derived};
    struct adapter again = {0};

    assert(!adapter->memory);
    loader.base_has_embedding = adapter->base_has_embedding;
    loader.base_has_head = adapter->base_has_head;
    mlora_status status = copy_plan(&again, plan);
    if (status == MLORA_OK) status = load_all(&loader, NULL);
    again.bytes = loader.at;
    bool same = status == MLORA_OK && again.bytes == adapter->bytes &&
                again.n_layers == adapter->n_layers &&
                adapter_derived_bytes(plan) == (int64_t)adapter->derived.bytes;
    if (same) status = fill_image(&loader, &again);
    if (same && status == MLORA_OK) same = hash_equal(again.content, adapter->content);
    if (status == MLORA_OK && !same)
        status = error_set(MLORA_EFORMAT,
                           "%s: has changed since it was loaded: replace the adapter to serve what "
                           "is there now",
                           plan->directory);
    if (status == MLORA_OK) {
        adapter->memory = again.memory;
        again.memory = NULL;
    }
    values_free(&loader.values);
    adapter_free(&again);
    return status;
}

void adapter_drop_image(struct adapter *adapter)
{
    free(adapter->memory);
    adapter->memory = NULL;
}

void adapter_free(struct adapter *adapter)
{
    free(adapter->memory);
    free(adapter->factors);
    free(adapter->norms);
    free(adapter->invocation);
    free(adapter->warnings);
    buffer_free(&adapter->derived);
    *adapter = (struct adapter){0};
}
