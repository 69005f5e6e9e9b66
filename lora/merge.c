/* The adapter's image has its factors in the form of the formula. The weights are read back from the
 * device piece by piece, the factors' product is added in f32, and the sum is stored. So one loop
 * serves every kind of adapter, and either backend. */
#include "lora/merge.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/values.h"

struct merger {
    struct device *dev;
    const struct model_config *config;
    struct weights *weights;
    const struct adapter *adapter;
    struct buffer stored; /* rows as they are on the device */
    struct buffer rows;   /* the same in f32 */
};

/* Columns that are merged at once: those of all rows of A stay in the cache. */
enum { BLOCK = 512 };

/* ---- arrays in f32 ------------------------------------------------------------------------ */

/* Copy from the adapter's image, which is host memory, or from the device. */
static mlora_status copy_out(struct merger *merger, void *to, const void *from, size_t bytes)
{
    const uintptr_t at = (uintptr_t)from, image = merger->adapter ? merger->adapter->origin : 0;

    if (merger->adapter && at >= image && at - image < (uintptr_t)merger->adapter->bytes) {
        memcpy(to, from, bytes);
        return MLORA_OK;
    }
    merger->dev->ops->download(merger->dev, to, from, bytes);
    return merger->dev->ops->sync(merger->dev);
}

/* Elements [first, first + n) of an array in f32, at the end of `out`. */
static mlora_status fetch(struct merger *merger, struct buffer *out, const void *from,
                          enum dtype dtype, size_t first, size_t n)
{
    const size_t element = dtype_bytes(dtype);

    merger->stored.bytes = 0;
    mlora_status status = buffer_reserve(&merger->stored, n * element);
    if (status == MLORA_OK) status = buffer_reserve(out, n * sizeof(float));
    if (status != MLORA_OK) return status;
    status =
        copy_out(merger, merger->stored.data, (const char *)from + first * element, n * element);
    if (status != MLORA_OK) return status;

    dtype_widen((float *)(void *)(out->data + out->bytes), merger->stored.data, dtype, n);
    return MLORA_OK;
}

/* Round `n` values to the type of an array on the device, and store them from `first` on. */
static mlora_status store(struct merger *merger, void *to, enum dtype dtype, size_t first,
                          const float *values, size_t n)
{
    const size_t element = dtype_bytes(dtype);

    merger->stored.bytes = 0;
    const mlora_status status = buffer_reserve(&merger->stored, n * element);
    if (status != MLORA_OK) return status;
    dtype_narrow(merger->stored.data, dtype, values, n);
    merger->dev->ops->upload(merger->dev, (char *)to + first * element, merger->stored.data,
                             n * element);
    return merger->dev->ops->sync(merger->dev); /* the buffer is used again */
}

/* A fresh array [n]; NULL stays NULL. */
static mlora_status fetch_array(struct merger *merger, float **out, const void *from,
                                enum dtype dtype, size_t n)
{
    struct buffer values = {0};

    *out = NULL;
    if (!from) return MLORA_OK;
    const mlora_status status = fetch(merger, &values, from, dtype, 0, n);
    if (status != MLORA_OK)
        buffer_free(&values);
    else
        *out = (float *)(void *)values.data;
    return status;
}

/* ---- W + s B A ---------------------------------------------------------------------------- */

/* What is added to a weight [N, K], in the weight's own orientation. */
struct product {
    float *left;  /* [N, R] */
    float *right; /* [R, K] */
    int R;
    float scale;
    float *row_g, *column_g; /* [N], [K] of DoRA, or NULL */
};

static void product_free(struct product *product)
{
    free(product->left);
    free(product->right);
    free(product->row_g);
    free(product->column_g);
}

/* The embedding is read by rows of its table, so the product stands on its side: A^T B^T. */
static mlora_status read_product(struct merger *merger, struct product *out,
                                 const struct lora_factors *factors, const struct matrix *w,
                                 bool is_embedding)
{
    const size_t N = (size_t)w->N, K = (size_t)w->K, R = (size_t)factors->R;
    const enum dtype dtype = (enum dtype)factors->dtype;
    float *b = NULL;

    *out = (struct product){.R = factors->R, .scale = factors->scale};
    if (!is_embedding) {
        mlora_status status = fetch_array(merger, &out->left, factors->b, dtype, N * R);
        if (status == MLORA_OK) status = fetch_array(merger, &out->right, factors->a, dtype, R * K);
        if (status == MLORA_OK) status = fetch_array(merger, &out->row_g, factors->g, DTYPE_F32, N);
        return status;
    }

    mlora_status status = fetch_array(merger, &out->left, factors->a, dtype, N * R);
    if (status == MLORA_OK) status = fetch_array(merger, &b, factors->b, dtype, K * R);
    if (status == MLORA_OK) status = fetch_array(merger, &out->column_g, factors->g, DTYPE_F32, K);
    out->right = status == MLORA_OK ? malloc(K * R * sizeof *b) : NULL;
    if (status == MLORA_OK && !out->right)
        status = error_set(MLORA_ENOMEM, "out of memory for merging the embedding");
    for (size_t k = 0; k < K && status == MLORA_OK; k++)
        for (size_t r = 0; r < R; r++) out->right[r * K + k] = b[k * R + r];
    free(b);
    return status;
}

/* w [n] += scale * left [R] right [R, K], columns 0 to n - 1 of K. The sum over R is in its order;
 * four terms at a time spare reading and writing it for each. */
static void merge_columns(float *w, const float *left, const float *right, size_t R, size_t K,
                          size_t n, float scale)
{
    float delta[BLOCK] = {0};
    size_t r = 0;

    for (; r + 4 <= R; r += 4) {
        const float *r0 = right + r * K, *r1 = r0 + K, *r2 = r1 + K, *r3 = r2 + K;
        const float l0 = left[r], l1 = left[r + 1], l2 = left[r + 2], l3 = left[r + 3];
        for (size_t k = 0; k < n; k++)
            delta[k] = delta[k] + l0 * r0[k] + l1 * r1[k] + l2 * r2[k] + l3 * r3[k];
    }
    for (; r < R; r++)
        for (size_t k = 0; k < n; k++) delta[k] += left[r] * right[r * K + k];
    for (size_t k = 0; k < n; k++) w[k] += scale * delta[k];
}

/* Rows [first, first + n) of a weight, which are `rows` [n, K]: g * (w + scale * left right). */
static void merge_rows_of(float *rows, const struct product *product, size_t first, size_t n,
                          size_t K)
{
    const size_t R = (size_t)product->R;

    for (size_t k = 0; k < K; k += BLOCK)
        for (size_t i = 0; i < n; i++)
            merge_columns(rows + i * K + k, product->left + (first + i) * R, product->right + k, R,
                          K, K - k < BLOCK ? K - k : BLOCK, product->scale);
    for (size_t i = 0; i < n && product->row_g; i++)
        for (size_t k = 0; k < K; k++) rows[i * K + k] *= product->row_g[first + i];
    for (size_t i = 0; i < n && product->column_g; i++)
        for (size_t k = 0; k < K; k++) rows[i * K + k] *= product->column_g[k];
}

/* to = from with the product in it; `product` NULL: a copy, rounded where the types differ. */
static mlora_status merge_matrix(struct merger *merger, const struct matrix *to,
                                 const struct matrix *from, const struct product *product)
{
    const size_t K = (size_t)to->K, N = (size_t)to->N;
    const size_t piece = (size_t)values_piece_rows(to->K);

    mlora_status status = MLORA_OK;
    for (size_t first = 0; first < N && status == MLORA_OK; first += piece) {
        const size_t n = N - first < piece ? N - first : piece;
        merger->rows.bytes = 0;
        status = fetch(merger, &merger->rows, from->data, from->dtype, first * K, n * K);
        if (status != MLORA_OK) return status;
        float *rows = (float *)(void *)merger->rows.data;
        if (product) merge_rows_of(rows, product, first, n, K);
        status = store(merger, (void *)to->data, to->dtype, first * K, rows, n * K);
    }
    return status;
}

static mlora_status merge_factors(struct merger *merger, const struct matrix *w,
                                  const struct lora_factors *factors, bool is_embedding)
{
    struct product product = {0};

    if (!factors->a) return MLORA_OK;
    mlora_status status = read_product(merger, &product, factors, w, is_embedding);
    if (status == MLORA_OK) status = merge_matrix(merger, w, w, &product);
    product_free(&product);
    return status;
}

/* ---- biases ------------------------------------------------------------------------------- */

/* The vector of the joined matrix that a linear is in, made of zeros where the base has none. */
static mlora_status own_bias(struct merger *merger, int layer, enum lora_linear linear)
{
    struct layer_weights *w = &merger->weights->layers[layer];
    float **const bias = linear <= LORA_V      ? &w->qkv_bias
                         : linear == LORA_O    ? &w->o_bias
                         : linear == LORA_DOWN ? &w->down_bias
                                               : &w->gate_up_bias;
    const int N = linear <= LORA_V      ? w->qkv.N
                  : linear == LORA_O    ? w->o.N
                  : linear == LORA_DOWN ? w->down.N
                                        : w->gate_up.N;
    void *memory = NULL;

    if (*bias) return MLORA_OK;
    float *zeros = calloc((size_t)N, sizeof *zeros);
    if (!zeros) return error_set(MLORA_ENOMEM, "out of memory for a bias of %d", N);
    mlora_status status = merger->dev->ops->alloc(merger->dev, (size_t)N * sizeof *zeros, &memory);
    if (status == MLORA_OK) {
        *bias = memory;
        status = store(merger, memory, DTYPE_F32, 0, zeros, (size_t)N);
        merger->weights->bytes += N * (int64_t)sizeof *zeros;
    }
    free(zeros);
    return status;
}

mlora_status merge_fill_biases(struct weights *weights, struct device *dev,
                               const struct model_config *config, bool attention, bool mlp)
{
    struct merger merger = {.dev = dev, .config = config, .weights = weights};
    mlora_status status = MLORA_OK;

    for (int l = 0; l < weights->n_layers && status == MLORA_OK; l++) {
        const bool o = attention && (config->o_bias || !config->qkv_bias); /* Qwen2: never on o */
        if (attention) status = own_bias(&merger, l, LORA_Q);
        if (status == MLORA_OK && o) status = own_bias(&merger, l, LORA_O);
        if (status == MLORA_OK && mlp) status = own_bias(&merger, l, LORA_GATE);
        if (status == MLORA_OK && mlp) status = own_bias(&merger, l, LORA_DOWN);
    }
    buffer_free(&merger.stored);
    return status;
}

/* bias + g * scale * b_bias + bias_delta, as the formula of struct lora_factors leaves it. */
static mlora_status merge_bias(struct merger *merger, int layer, enum lora_linear linear,
                               const struct lora_factors *factors)
{
    const size_t N = (size_t)linear_outputs(merger->config, linear);
    const float *at = NULL;
    float *bias = NULL, *g = NULL, *b_bias = NULL, *delta = NULL;

    if (!factors->b_bias && !factors->bias_delta) return MLORA_OK;
    mlora_status status = own_bias(merger, layer, linear);
    if (status != MLORA_OK) return status;
    weights_linear(merger->weights, merger->config, layer, linear, &at);
    status = fetch_array(merger, &bias, at, DTYPE_F32, N);
    if (status == MLORA_OK) status = fetch_array(merger, &g, factors->g, DTYPE_F32, N);
    if (status == MLORA_OK) status = fetch_array(merger, &b_bias, factors->b_bias, DTYPE_F32, N);
    if (status == MLORA_OK) status = fetch_array(merger, &delta, factors->bias_delta, DTYPE_F32, N);
    for (size_t n = 0; n < N && status == MLORA_OK; n++) {
        if (b_bias) bias[n] += (g ? g[n] : 1) * factors->scale * b_bias[n];
        if (delta) bias[n] += delta[n];
    }
    if (status == MLORA_OK) status = store(merger, (void *)at, DTYPE_F32, 0, bias, N);
    free(bias);
    free(g);
    free(b_bias);
    free(delta);
    return status;
}

/* ---- what is replaced --------------------------------------------------------------------- */

static mlora_status merge_rows(struct merger *merger, const struct matrix *w,
                               const struct lora_rows *rows)
{
    const size_t n = (size_t)rows->n, K = (size_t)w->K;
    float *values = NULL;

    if (n == 0) return MLORA_OK;
    mlora_status status = fetch_array(merger, &values, rows->data, (enum dtype)rows->dtype, n * K);
    for (size_t i = 0; i < n && status == MLORA_OK; i++)
        status =
            store(merger, (void *)w->data, w->dtype, (size_t)rows->ids[i] * K, values + i * K, K);
    free(values);
    return status;
}

static mlora_status merge_norms(struct merger *merger, const struct adapter *adapter)
{
    const int L = merger->weights->n_layers;
    const size_t n = (size_t)L * LORA_NORMS + 1;
    mlora_status status = MLORA_OK;

    for (size_t i = 0; i < n && adapter->norms && status == MLORA_OK; i++) {
        const int layer = (int)i / LORA_NORMS, norm = (int)i % LORA_NORMS;
        const bool of_head = norm == NORM_Q || norm == NORM_K;
        const size_t width =
            (size_t)(of_head ? merger->config->head_dim : merger->config->hidden_size);
        if (!adapter->norms[i]) continue;
        const struct layer_weights *w = layer < L ? &merger->weights->layers[layer] : NULL;
        float *const to = !w                       ? merger->weights->final_norm
                          : norm == NORM_ATTENTION ? w->attention_norm
                          : norm == NORM_MLP       ? w->mlp_norm
                          : norm == NORM_Q         ? w->q_norm
                                                   : w->k_norm;
        float *values = NULL;
        status = fetch_array(merger, &values, adapter->norms[i], DTYPE_F32, width);
        if (status == MLORA_OK) status = store(merger, to, DTYPE_F32, 0, values, width);
        free(values);
    }
    return status;
}

/* Give the head memory of its own. */
static mlora_status part_head(struct merger *merger)
{
    struct weights *weights = merger->weights;
    struct matrix head = weights->embedding;
    const size_t bytes = (size_t)head.N * (size_t)head.K * dtype_bytes(head.dtype);
    void *memory = NULL;

    mlora_status status = merger->dev->ops->alloc(merger->dev, bytes, &memory);
    if (status != MLORA_OK) return status;
    head.data = memory;
    weights->head = head;
    weights->bytes += (int64_t)bytes;
    weights->n_parameters += (int64_t)head.N * head.K;
    return merge_matrix(merger, &head, &weights->embedding, NULL);
}

static mlora_status merge_outside(struct merger *merger, const struct adapter *adapter)
{
    const struct lora_factors *outside = &adapter->factors[adapter->n_layers * LORA_LINEARS];
    const struct lora_own *own = &adapter->own;
    struct weights *weights = merger->weights;
    mlora_status status = MLORA_OK;

    if (weights->head.data == weights->embedding.data &&
        (adapter->changes_embedding || adapter->changes_head))
        status = part_head(merger);
    if (status == MLORA_OK && own->embedding.data)
        status = merge_matrix(merger, &weights->embedding, &own->embedding, NULL);
    if (status == MLORA_OK) status = merge_rows(merger, &weights->embedding, &own->embedding_rows);
    if (status == MLORA_OK)
        status = merge_factors(merger, &weights->embedding, &outside[LORA_EMBEDDING], true);
    if (status == MLORA_OK && own->head.data)
        status = merge_matrix(merger, &weights->head, &own->head, NULL);
    if (status == MLORA_OK) status = merge_rows(merger, &weights->head, &own->head_rows);
    if (status == MLORA_OK)
        status = merge_factors(merger, &weights->head, &outside[LORA_HEAD], false);
    return status == MLORA_OK ? merge_norms(merger, adapter) : status;
}

/* ---- the whole ---------------------------------------------------------------------------- */

static mlora_status check_mergeable(const struct adapter_plan *plan)
{
    const struct adapter_linear *outside = &plan->linears[plan->n_layers * LORA_LINEARS];

    if (plan->n_invocation > 0)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s/adapter_config.json: alora_invocation_tokens is set: an aLoRA counts "
                         "for some tokens only and cannot be merged; serve it beside its base",
                         plan->directory);
    if (outside[LORA_HEAD].b_bias || outside[LORA_EMBEDDING].b_bias)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s/adapter_config.json: lora_bias is set, and lm_head is a target: a "
                         "model has no place for a bias of lm_head; serve it beside its base",
                         plan->directory);
    return MLORA_OK;
}

static mlora_status merge_all(struct merger *merger, const struct adapter *adapter)
{
    for (int i = 0; i < adapter->n_layers * LORA_LINEARS; i++) {
        const int layer = i / LORA_LINEARS;
        const enum lora_linear linear = (enum lora_linear)(i % LORA_LINEARS);
        const float *bias;
        const struct matrix w =
            weights_linear(merger->weights, merger->config, layer, linear, &bias);
        mlora_status status = merge_factors(merger, &w, &adapter->factors[i], false);
        if (status == MLORA_OK) status = merge_bias(merger, layer, linear, &adapter->factors[i]);
        if (status != MLORA_OK) return status;
    }
    return merge_outside(merger, adapter);
}

mlora_status merge_adapter(struct weights *weights, struct device *dev,
                           const struct model_config *config, const char *directory, bool lenient,
                           char **warnings)
{
    struct adapter_plan plan = {0};
    struct adapter adapter = {0};
    struct merger merger = {.dev = dev, .config = config, .weights = weights, .adapter = &adapter};

    mlora_status status = adapter_plan_read(&plan, directory, config, lenient);
    if (status == MLORA_OK) status = check_mergeable(&plan);
    if (status == MLORA_OK) status = adapter_load(&adapter, dev, &plan, config, weights);
    if (status == MLORA_OK) status = merge_all(&merger, &adapter);
    *warnings = adapter.warnings;
    adapter.warnings = NULL;
    buffer_free(&merger.stored);
    buffer_free(&merger.rows);
    adapter_free(&adapter);
    adapter_plan_free(&plan);
    return status;
}
