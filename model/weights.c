/* A checkpoint to the device. A plan comes first: which tensors of the files, joined in which
 * order, make which array. It is checked as a whole, so that a damaged or foreign model fails
 * before anything is allocated; then the arrays are read one after another in pieces. */
#include "model/weights.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum {
    PARTS_MAX = 3,
    ARRAYS_OF_LAYER = 12,
    ARRAYS_OF_MODEL = 3,
    NAME_BYTES = 96,
    PIECE_BYTES = 8 << 20, /* read and uploaded at once */
    NAMES_SHOWN = 5,
};

/* ---- linears ------------------------------------------------------------------------------ */

const char *linear_name(enum lora_linear linear)
{
    static const char *const names[LORA_LINEARS] = {
        [LORA_Q] = "self_attn.q_proj", [LORA_K] = "self_attn.k_proj", [LORA_V] = "self_attn.v_proj",
        [LORA_O] = "self_attn.o_proj", [LORA_GATE] = "mlp.gate_proj", [LORA_UP] = "mlp.up_proj",
        [LORA_DOWN] = "mlp.down_proj"};
    return names[linear];
}

int linear_inputs(const struct model_config *config, enum lora_linear linear)
{
    if (linear == LORA_O) return config->n_heads * config->head_dim;
    return linear == LORA_DOWN ? config->mlp_size : config->hidden_size;
}

int linear_outputs(const struct model_config *config, enum lora_linear linear)
{
    switch (linear) {
    case LORA_Q:
        return config->n_heads * config->head_dim;
    case LORA_K:
    case LORA_V:
        return config->n_kv_heads * config->head_dim;
    case LORA_GATE:
    case LORA_UP:
        return config->mlp_size;
    default:
        return config->hidden_size;
    }
}

struct matrix weights_linear(const struct weights *weights, const struct model_config *config,
                             int layer, enum lora_linear linear, const float **bias)
{
    const struct layer_weights *w = &weights->layers[layer];
    const struct {
        enum lora_linear first;
        const struct matrix *matrix;
        const float *bias;
    } joined[] = {{LORA_DOWN, &w->down, w->down_bias},
                  {LORA_GATE, &w->gate_up, w->gate_up_bias},
                  {LORA_O, &w->o, w->o_bias},
                  {LORA_Q, &w->qkv, w->qkv_bias}};
    int i = 0;
    size_t row = 0;

    while (linear < joined[i].first) i++;
    for (int l = (int)joined[i].first; l < (int)linear; l++)
        row += (size_t)linear_outputs(config, (enum lora_linear)l);

    struct matrix out = *joined[i].matrix;
    out.data = (const char *)out.data + row * (size_t)out.K * dtype_bytes(out.dtype);
    out.N = linear_outputs(config, linear);
    *bias = joined[i].bias ? joined[i].bias + row : NULL;
    return out;
}

/* ---- the plan ----------------------------------------------------------------------------- */

/* A tensor of the files, which becomes some rows of an array. */
struct part {
    char name[NAME_BYTES];
    int rows;
    const struct tensor *tensor;    /* NULL: missing */
    const struct safetensors *file; /* that it is in */
    enum dtype dtype;
};

/* A matrix [N, K], or a vector [N] of f32: one of the two pointers is NULL. */
struct array {
    struct matrix *matrix;
    float **vector;
    int N, K; /* K is 1 for a vector */
    enum dtype dtype;
    int n_parts;
    struct part parts[PARTS_MAX];
};

struct plan {
    const char *prefix; /* of all names but the head's: "model." or nothing */
    struct array *arrays;
    int n_arrays;
    int64_t read_bytes, device_bytes, n_parameters;
};

static int64_t array_bytes(const struct array *array)
{
    return (int64_t)array->N * array->K * (int64_t)dtype_bytes(array->dtype);
}

static struct array *add_array(struct plan *plan, struct matrix *matrix, float **vector, int K)
{
    struct array *array = &plan->arrays[plan->n_arrays++];
    *array = (struct array){.matrix = matrix, .vector = vector, .K = K};
    return array;
}

__attribute__((format(printf, 3, 4))) static void add_part(struct array *array, int rows,
                                                           const char *format, ...)
{
    struct part *part = &array->parts[array->n_parts++];
    va_list args;

    va_start(args, format);
    vsnprintf(part->name, sizeof part->name, format, args);
    va_end(args);
    part->rows = rows;
    array->N += rows;
}

/* `n` linears from `first` on, which read the same input, as one matrix; `bias` NULL: none. */
static void plan_linears(struct plan *plan, struct matrix *matrix, float **bias, int layer,
                         const struct model_config *config, enum lora_linear first, int n)
{
    struct array *weight = add_array(plan, matrix, NULL, linear_inputs(config, first));
    for (int i = 0; i < n; i++) {
        const enum lora_linear linear = (enum lora_linear)((int)first + i);
        add_part(weight, linear_outputs(config, linear), "%slayers.%d.%s.weight", plan->prefix,
                 layer, linear_name(linear));
    }
    if (!bias) return;
    struct array *joined = add_array(plan, NULL, bias, 1);
    for (int i = 0; i < n; i++) {
        const enum lora_linear linear = (enum lora_linear)((int)first + i);
        add_part(joined, linear_outputs(config, linear), "%slayers.%d.%s.bias", plan->prefix, layer,
                 linear_name(linear));
    }
}

static void plan_norm(struct plan *plan, float **vector, int layer, const char *name, int rows)
{
    add_part(add_array(plan, NULL, vector, 1), rows, "%slayers.%d.%s.weight", plan->prefix, layer,
             name);
}

/* The table of tensor names: all that is read of a model. */
static void plan_model(struct plan *plan, struct weights *weights,
                       const struct model_config *config)
{
    const int D = config->hidden_size, V = config->vocab_size;

    add_part(add_array(plan, &weights->embedding, NULL, D), V, "%sembed_tokens.weight",
             plan->prefix);
    for (int l = 0; l < config->n_layers; l++) {
        struct layer_weights *w = &weights->layers[l];
        plan_norm(plan, &w->attention_norm, l, "input_layernorm", D);
        plan_linears(plan, &w->qkv, config->qkv_bias ? &w->qkv_bias : NULL, l, config, LORA_Q, 3);
        if (config->qk_norm) {
            plan_norm(plan, &w->q_norm, l, "self_attn.q_norm", config->head_dim);
            plan_norm(plan, &w->k_norm, l, "self_attn.k_norm", config->head_dim);
        }
        plan_linears(plan, &w->o, config->o_bias ? &w->o_bias : NULL, l, config, LORA_O, 1);
        plan_norm(plan, &w->mlp_norm, l, "post_attention_layernorm", D);
        plan_linears(plan, &w->gate_up, config->mlp_bias ? &w->gate_up_bias : NULL, l, config,
                     LORA_GATE, 2);
        plan_linears(plan, &w->down, config->mlp_bias ? &w->down_bias : NULL, l, config, LORA_DOWN,
                     1);
    }
    add_part(add_array(plan, NULL, &weights->final_norm, 1), D, "%snorm.weight", plan->prefix);
    if (!config->tied) add_part(add_array(plan, &weights->head, NULL, D), V, "lm_head.weight");
}

/* ---- the plan against the files ----------------------------------------------------------- */

/* The first few of some names, for a message. */
struct name_list {
    char text[NAMES_SHOWN * 128];
    int n;
};

static void list_name(struct name_list *list, const char *name)
{
    const size_t used = strlen(list->text);
    if (list->n++ < NAMES_SHOWN)
        snprintf(list->text + used, sizeof list->text - used, "%s%.100s", used ? ", " : "", name);
    else if (list->n == NAMES_SHOWN + 1)
        snprintf(list->text + used, sizeof list->text - used, ", ...");
}

static mlora_status check_shape(const struct part *part, const struct array *array)
{
    const struct tensor *tensor = part->tensor;
    const int n_dims = array->matrix ? 2 : 1;
    char found[TENSOR_RANK_MAX * 22 + 2] = "", needed[48];

    if (tensor->n_dims == n_dims && tensor->shape[0] == part->rows &&
        (n_dims == 1 || tensor->shape[1] == array->K))
        return MLORA_OK;
    for (int i = 0, used = 0; i < tensor->n_dims; i++)
        used += snprintf(found + used, sizeof found - (size_t)used, "%s%" PRId64, i ? ", " : "",
                         tensor->shape[i]);
    snprintf(needed, sizeof needed, n_dims == 2 ? "%d, %d" : "%d", part->rows, array->K);
    return error_set(MLORA_EFORMAT,
                     "%s: tensor %s has shape [%s], config.json makes it [%s]; are the two of the "
                     "same model?",
                     part->file->file.path, part->name, found, needed);
}

/* Find and check the parts; what is not there is listed. */
static mlora_status resolve_array(struct array *array, const struct checkpoint *checkpoint,
                                  struct name_list *missing)
{
    for (int i = 0; i < array->n_parts; i++) {
        struct part *part = &array->parts[i];
        part->tensor = checkpoint_find(checkpoint, part->name, &part->file);
        if (!part->tensor) {
            list_name(missing, part->name);
            continue;
        }
        mlora_status status = check_shape(part, array);
        if (status != MLORA_OK) return status;
        status = tensor_dtype(&part->dtype, part->file, part->tensor);
        if (status != MLORA_OK) return status;
    }

    array->dtype = array->matrix ? array->parts[0].dtype : DTYPE_F32;
    for (int i = 1; i < array->n_parts; i++)
        if (array->parts[i].dtype != array->parts[0].dtype) array->dtype = DTYPE_F32;
    return MLORA_OK;
}

static int compare_pointers(const void *a, const void *b)
{
    const uintptr_t x = (uintptr_t) * (const struct tensor *const *)a;
    const uintptr_t y = (uintptr_t) * (const struct tensor *const *)b;
    return x < y ? -1 : x > y;
}

/* Tensors that old checkpoints carry and that say nothing: the rotary frequencies follow from
 * config.json, and a tied head is the embedding, whatever lies under its name. */
static bool is_redundant(const char *name, const struct model_config *config)
{
    static const char frequencies[] = ".rotary_emb.inv_freq";
    const size_t n = strlen(name), suffix = sizeof frequencies - 1;

    if (n >= suffix && strcmp(name + n - suffix, frequencies) == 0) return true;
    return config->tied && strcmp(name, "lm_head.weight") == 0;
}

/* List the tensors of the files that the plan has no place for. */
static mlora_status find_unknown(struct name_list *unknown, const struct plan *plan,
                                 const struct checkpoint *checkpoint,
                                 const struct model_config *config)
{
    const size_t size = sizeof(const struct tensor *);
    const struct tensor **known = malloc(((size_t)plan->n_arrays * PARTS_MAX + 1) * size);
    size_t n = 0;

    if (!known) return error_set(MLORA_ENOMEM, "out of memory for the list of tensors");
    for (int a = 0; a < plan->n_arrays; a++)
        for (int i = 0; i < plan->arrays[a].n_parts; i++)
            if (plan->arrays[a].parts[i].tensor) known[n++] = plan->arrays[a].parts[i].tensor;
    qsort(known, n, size, compare_pointers);

    for (int f = 0; f < checkpoint->n_files; f++)
        for (int i = 0; i < checkpoint->files[f].n_tensors; i++) {
            const struct tensor *tensor = &checkpoint->files[f].tensors[i];
            if (!bsearch(&tensor, known, n, size, compare_pointers) &&
                !is_redundant(tensor->name, config))
                list_name(unknown, tensor->name);
        }
    free(known);
    return MLORA_OK;
}

static mlora_status check_plan(struct plan *plan, const struct checkpoint *checkpoint,
                               const struct model_config *config, const char *directory)
{
    struct name_list missing = {0}, unknown = {0};

    for (int a = 0; a < plan->n_arrays; a++) {
        const mlora_status status = resolve_array(&plan->arrays[a], checkpoint, &missing);
        if (status != MLORA_OK) return status;
    }
    const mlora_status status = find_unknown(&unknown, plan, checkpoint, config);
    if (status != MLORA_OK) return status;
    if (missing.n > 0 || unknown.n > 0)
        return error_set(MLORA_EFORMAT,
                         "%s: the weights are not those of the %s in config.json: %d tensor%s "
                         "missing%s%s%s; %d unknown%s%s%s",
                         directory, config->architecture, missing.n, missing.n == 1 ? "" : "s",
                         missing.n ? " (" : "", missing.text, missing.n ? ")" : "", unknown.n,
                         unknown.n ? " (" : "", unknown.text, unknown.n ? ")" : "");

    for (int a = 0; a < plan->n_arrays; a++) {
        const struct array *array = &plan->arrays[a];
        plan->device_bytes += array_bytes(array);
        plan->n_parameters += (int64_t)array->N * array->K;
        for (int i = 0; i < array->n_parts; i++) plan->read_bytes += array->parts[i].tensor->bytes;
    }
    return MLORA_OK;
}

/* ---- reading ------------------------------------------------------------------------------ */

struct loader {
    struct device *dev;
    mlora_progress_fn progress; /* may be NULL */
    void *user;
    int64_t done, total; /* bytes read, and in all */
    void *piece;         /* [PIECE_BYTES] as stored */
    float *wide;         /* [PIECE_BYTES / 2] the same in f32 */
};

static void widen(float *out, const void *in, enum dtype dtype, size_t n)
{
    const uint16_t *half = in;

    if (dtype == DTYPE_F32) memcpy(out, in, n * sizeof *out);
    for (size_t i = 0; i < n && dtype == DTYPE_BF16; i++) out[i] = bf16_to_f32(half[i]);
    for (size_t i = 0; i < n && dtype == DTYPE_F16; i++) out[i] = f16_to_f32(half[i]);
}

/* Read a tensor piece by piece to `out`, memory of the device, as elements of `dtype`. */
static mlora_status load_part(struct loader *loader, const struct part *part, enum dtype dtype,
                              char *out)
{
    const int64_t bytes = part->tensor->bytes;

    for (int64_t at = 0; at < bytes; at += PIECE_BYTES) {
        const size_t n_bytes = (size_t)(bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES);
        const size_t n = n_bytes / dtype_bytes(part->dtype);
        const mlora_status status =
            file_read_at(&part->file->file, loader->piece, n_bytes, part->tensor->offset + at);
        if (status != MLORA_OK) return status;

        const void *from = loader->piece;
        if (part->dtype != dtype) {
            widen(loader->wide, loader->piece, part->dtype, n);
            from = loader->wide;
        }
        loader->dev->ops->upload(loader->dev, out, from, n * dtype_bytes(dtype));
        out += n * dtype_bytes(dtype);
        loader->done += (int64_t)n_bytes;
        if (loader->progress) loader->progress(loader->user, loader->done, loader->total);
    }
    return MLORA_OK;
}

/* Memory for the array, which weights_free finds from here on. */
static mlora_status alloc_array(struct device *dev, const struct array *array, char **memory)
{
    void *fresh = NULL;
    const mlora_status status = dev->ops->alloc(dev, (size_t)array_bytes(array), &fresh);

    *memory = fresh;
    if (status != MLORA_OK) return status;
    if (array->matrix)
        *array->matrix = (struct matrix){fresh, array->dtype, array->N, array->K};
    else
        *array->vector = fresh;
    return MLORA_OK;
}

static mlora_status load_array(struct loader *loader, const struct array *array)
{
    char *out;

    mlora_status status = alloc_array(loader->dev, array, &out);
    for (int i = 0; i < array->n_parts && status == MLORA_OK; i++) {
        const struct part *part = &array->parts[i];
        status = load_part(loader, part, array->dtype, out);
        out += (size_t)part->rows * (size_t)array->K * dtype_bytes(array->dtype);
    }
    return status;
}

static mlora_status load_rope(struct weights *weights, struct device *dev,
                              const struct model_config *config)
{
    const size_t bytes = (size_t)(config->head_dim / 2) * sizeof(float);
    void *memory = NULL;

    float *frequency = malloc(bytes);
    if (!frequency) return error_set(MLORA_ENOMEM, "out of memory for rotary frequencies");
    model_config_rope(config, frequency);
    const mlora_status status = dev->ops->alloc(dev, bytes, &memory);
    if (status == MLORA_OK) dev->ops->upload(dev, memory, frequency, bytes);
    weights->rope_frequency = memory;
    weights->bytes += (int64_t)bytes;
    free(frequency);
    return status;
}

/* Say that it does not fit before the system starts to kill processes. */
static mlora_status check_memory(struct device *dev, int64_t bytes, const char *directory)
{
    size_t free_bytes = 0, total_bytes = 0;

    dev->ops->memory(dev, &free_bytes, &total_bytes);
    if ((uint64_t)bytes <= free_bytes) return MLORA_OK;
    return error_set(
        MLORA_ENOMEM, "%s: the weights need %" PRId64 " MiB, the %s device has %zu MiB free of %zu",
        directory, (bytes >> 20) + 1, dev->backend, free_bytes >> 20, total_bytes >> 20);
}

/* All arrays are there: what follows from them. */
static mlora_status finish_load(struct weights *weights, struct device *dev,
                                const struct plan *plan, const struct model_config *config)
{
    weights->bytes = plan->device_bytes;
    weights->n_parameters = plan->n_parameters;
    if (config->tied) weights->head = weights->embedding;
    const mlora_status status = load_rope(weights, dev, config);
    if (status != MLORA_OK) return status;
    return dev->ops->sync(dev); /* a failed upload is reported here, not in a later step */
}

static mlora_status load_all(struct weights *weights, struct device *dev, const struct plan *plan,
                             const struct model_config *config, mlora_progress_fn progress,
                             void *user)
{
    struct loader loader = {
        .dev = dev, .progress = progress, .user = user, .total = plan->read_bytes};
    mlora_status status = MLORA_OK;

    loader.piece = malloc(PIECE_BYTES);
    loader.wide = malloc((size_t)PIECE_BYTES / 2 * sizeof *loader.wide);
    if (!loader.piece || !loader.wide) {
        status = error_set(MLORA_ENOMEM, "out of memory for reading weights");
        goto done;
    }
    for (int a = 0; a < plan->n_arrays; a++) {
        status = load_array(&loader, &plan->arrays[a]);
        if (status != MLORA_OK) goto done;
    }
    status = finish_load(weights, dev, plan, config);

done:
    free(loader.wide);
    free(loader.piece);
    return status;
}

/* ---- random weights ------------------------------------------------------------------------- */

enum { POOL_VALUES = 1 << 22 }; /* random values, drawn once and used again and again */

/* Sums of four uniform numbers: normal enough, with a deviation of 0.02. */
static void fill_pool(uint16_t *pool)
{
    uint64_t state = 1;

    for (int i = 0; i < POOL_VALUES; i++) {
        float sum = -2.0f;
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        for (int k = 0; k < 4; k++) sum += (float)(state >> (16 * k) & 0xffff) / 65536.0f;
        pool[i] = bf16_from_f32(0.02f * 1.7320508f * sum);
    }
}

/* The matrix is laid with pieces of the pool that start at ever other places. */
static void fill_matrix(struct device *dev, char *out, int64_t bytes, const uint16_t *pool,
                        uint32_t *state)
{
    while (bytes > 0) {
        *state = *state * 1664525u + 1013904223u;
        const size_t start = *state % (POOL_VALUES / 2);
        const int64_t most = POOL_VALUES / 2 * (int64_t)sizeof *pool;
        const int64_t n_bytes = bytes < most ? bytes : most;
        dev->ops->upload(dev, out, pool + start, (size_t)n_bytes);
        out += n_bytes;
        bytes -= n_bytes;
    }
}

static mlora_status random_array(struct device *dev, const struct array *array,
                                 const uint16_t *pool, uint32_t *state)
{
    const bool is_norm = strstr(array->parts[0].name, "norm.weight") != NULL;
    char *out;

    mlora_status status = alloc_array(dev, array, &out);
    if (status != MLORA_OK) return status;
    if (array->matrix) {
        fill_matrix(dev, out, array_bytes(array), pool, state);
        return MLORA_OK;
    }
    float *values = malloc((size_t)array->N * sizeof *values);
    if (!values) return error_set(MLORA_ENOMEM, "out of memory: a vector of %d", array->N);
    for (int n = 0; n < array->N; n++) values[n] = is_norm ? 1.0f : 0.0f;
    dev->ops->upload(dev, out, values, (size_t)array->N * sizeof *values);
    free(values);
    return MLORA_OK;
}

/* ---- loading -------------------------------------------------------------------------------- */

/* Room for the arrays of a model, and for the layers in `weights`; the arrays are named. */
static mlora_status list_arrays(struct plan *plan, struct weights *weights, const char *prefix,
                                const struct model_config *config)
{
    const size_t L = (size_t)config->n_layers;

    weights->n_layers = config->n_layers;
    weights->layers = calloc(L, sizeof *weights->layers);
    plan->arrays = calloc(L * ARRAYS_OF_LAYER + ARRAYS_OF_MODEL, sizeof *plan->arrays);
    if (!weights->layers || !plan->arrays)
        return error_set(MLORA_ENOMEM, "out of memory for %zu layers", L);
    plan->prefix = prefix;
    plan_model(plan, weights, config);
    return MLORA_OK;
}

mlora_status weights_random(struct weights *out, struct device *dev,
                            const struct model_config *config)
{
    struct weights weights = {0};
    struct plan plan = {0};
    uint32_t state = 1;

    *out = (struct weights){0};
    uint16_t *pool = malloc(POOL_VALUES * sizeof *pool);
    mlora_status status = pool ? list_arrays(&plan, &weights, "", config)
                               : error_set(MLORA_ENOMEM, "out of memory for random values");
    if (status != MLORA_OK) goto done;
    fill_pool(pool);
    for (int a = 0; a < plan.n_arrays && status == MLORA_OK; a++) {
        struct array *array = &plan.arrays[a];
        array->dtype = array->matrix ? DTYPE_BF16 : DTYPE_F32;
        plan.device_bytes += array_bytes(array);
        plan.n_parameters += (int64_t)array->N * array->K;
        status = random_array(dev, array, pool, &state);
    }
    if (status == MLORA_OK) status = finish_load(&weights, dev, &plan, config);

done:
    free(pool);
    free(plan.arrays);
    if (status != MLORA_OK) weights_free(&weights, dev);
    *out = weights;
    return status;
}

/* The plan for `checkpoint`, checked; `weights` receives room for its layers. */
static mlora_status make_plan(struct plan *plan, struct weights *weights,
                              const struct checkpoint *checkpoint, const char *directory,
                              const struct model_config *config)
{
    const struct safetensors *file;
    const char *prefix = checkpoint_find(checkpoint, "embed_tokens.weight", &file) ? "" : "model.";

    const mlora_status status = list_arrays(plan, weights, prefix, config);
    if (status != MLORA_OK) return status;
    return check_plan(plan, checkpoint, config, directory);
}

mlora_status weights_measure(int64_t *device_bytes, int64_t *n_parameters,
                             const struct checkpoint *checkpoint, const char *directory,
                             const struct model_config *config)
{
    struct weights weights = {0};
    struct plan plan = {0};

    const mlora_status status = make_plan(&plan, &weights, checkpoint, directory, config);
    *device_bytes = plan.device_bytes;
    *n_parameters = plan.n_parameters;
    free(plan.arrays);
    free(weights.layers);
    return status;
}

mlora_status weights_load(struct weights *out, struct device *dev, const char *directory,
                          const struct model_config *config, mlora_progress_fn progress, void *user)
{
    struct weights weights = {0};
    struct checkpoint checkpoint = {0};
    struct plan plan = {0};

    *out = (struct weights){0};
    mlora_status status = checkpoint_open(&checkpoint, directory);
    if (status != MLORA_OK) return status;
    status = make_plan(&plan, &weights, &checkpoint, directory, config);
    if (status != MLORA_OK) goto done;
    status = check_memory(dev, plan.device_bytes, directory);
    if (status != MLORA_OK) goto done;
    status = load_all(&weights, dev, &plan, config, progress, user);

done:
    free(plan.arrays);
    checkpoint_close(&checkpoint);
    if (status != MLORA_OK) weights_free(&weights, dev);
    *out = weights;
    return status;
}

void weights_free(struct weights *weights, struct device *dev)
{
    void (*release)(struct device *, void *) = dev->ops->free;

    for (int l = 0; l < weights->n_layers && weights->layers; l++) {
        struct layer_weights *w = &weights->layers[l];
        release(dev, w->attention_norm);
        release(dev, (void *)w->qkv.data);
        release(dev, w->qkv_bias);
        release(dev, w->q_norm);
        release(dev, w->k_norm);
        release(dev, (void *)w->o.data);
        release(dev, w->o_bias);
        release(dev, w->mlp_norm);
        release(dev, (void *)w->gate_up.data);
        release(dev, w->gate_up_bias);
        release(dev, (void *)w->down.data);
        release(dev, w->down_bias);
    }
    if (weights->head.data != weights->embedding.data) release(dev, (void *)weights->head.data);
    release(dev, (void *)weights->embedding.data);
    release(dev, weights->final_norm);
    release(dev, weights->rope_frequency);
    free(weights->layers);
    *weights = (struct weights){0};
}
