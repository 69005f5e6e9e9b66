#include "model/weights_plan.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { ARRAYS_OF_LAYER = 12, ARRAYS_OF_MODEL = 3, NAMES_SHOWN = 5 };

/* ---- the plan ----------------------------------------------------------------------------- */

int64_t array_bytes(const struct array *array)
{
    return (int64_t)array->N * array->K * (int64_t)dtype_bytes(array->dtype);
}

static struct array *add_array(struct weights_plan *plan, struct matrix *matrix, float **vector,
                               int K)
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
static void plan_linears(struct weights_plan *plan, struct matrix *matrix, float **bias, int layer,
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

static void plan_norm(struct weights_plan *plan, float **vector, int layer, const char *name,
                      int rows)
{
    add_part(add_array(plan, NULL, vector, 1), rows, "%slayers.%d.%s.weight", plan->prefix, layer,
             name);
}

/* The table of tensor names: all that is read of a model. */
static void plan_model(struct weights_plan *plan, struct weights *weights,
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
static mlora_status find_unknown(struct name_list *unknown, const struct weights_plan *plan,
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

static mlora_status check_plan(struct weights_plan *plan, const struct checkpoint *checkpoint,
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

/* ---- making it ------------------------------------------------------------------------------ */

mlora_status weights_plan_list(struct weights_plan *plan, struct weights *weights,
                               const char *prefix, const struct model_config *config)
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

mlora_status weights_plan_make(struct weights_plan *plan, struct weights *weights,
                               const struct checkpoint *checkpoint, const char *directory,
                               const struct model_config *config)
{
    const struct safetensors *file;
    const char *prefix = checkpoint_find(checkpoint, "embed_tokens.weight", &file) ? "" : "model.";

    const mlora_status status = weights_plan_list(plan, weights, prefix, config);
    if (status != MLORA_OK) return status;
    return check_plan(plan, checkpoint, config, directory);
}
