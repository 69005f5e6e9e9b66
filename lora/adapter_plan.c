/* An adapter's two files, held against each other and against the base. The tensors say which
 * linears have factors, the configuration which of them count and with what scale: whatever one
 * of them has and the other does not is an error or a warning, never left out in silence. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/plan.h"

enum { NAMES_SHOWN = 5 };

/* ---- names -------------------------------------------------------------------------------- */

/* Control characters, which may be in a hostile file's names, are shown as '?'. */
mlora_status name_list_add(struct name_list *list, const char *name)
{
    const size_t begin = list->text.bytes;

    list->n++;
    if (list->n > NAMES_SHOWN) return MLORA_OK;
    const mlora_status status =
        buffer_printf(&list->text, "%s%.120s", list->n > 1 ? ", " : "", name);
    for (size_t i = begin; i < list->text.bytes; i++)
        if ((unsigned char)list->text.data[i] < 0x20 || list->text.data[i] == 0x7f)
            list->text.data[i] = '?';
    return status;
}

const char *name_list_rest(const struct name_list *list)
{
    return list->n > NAMES_SHOWN ? ", ..." : "";
}

const char *reader_base(const struct reader *r)
{
    return r->peft->base_model ? r->peft->base_model : "not given";
}

/* ---- sorting tensors ---------------------------------------------------------------------- */

static mlora_status refuse_tensor(const struct reader *r, const struct tensor *tensor,
                                  const char *what)
{
    return error_set(MLORA_EUNSUPPORTED, "%s: %.200s is %s; %s", r->plan->file.file.path,
                     tensor->name, what, MERGE);
}

static mlora_status sort_tensor(struct reader *r, const struct tensor *tensor)
{
    struct tensor_name name;

    mlora_status status = tensor_name_parse(&name, tensor->name);
    if (status != MLORA_OK) return status;
    switch (name.kind) {
    case TENSOR_SAMPLER:
        return r->peft->has_sampler ? MLORA_OK : name_list_add(&r->unknown, tensor->name);
    case TENSOR_UNKNOWN:
        return name_list_add(&r->unknown, tensor->name);
    case TENSOR_NORM:
        return plan_norm(r, tensor, &name);
    case TENSOR_DIAGONAL:
        return refuse_tensor(r, tensor,
                             "a diagonal between A and B (kasa_config), which is not served");
    case TENSOR_FULL_WEIGHT:
        return refuse_tensor(r, tensor,
                             "a whole weight that replaces the base's (modules_to_save), which is "
                             "served of embed_tokens, lm_head and norms only");
    default:
        return plan_place(r, tensor, &name);
    }
}

/* Layers of the base, or one more than the highest in the names. */
static mlora_status count_layers(struct reader *r)
{
    const struct safetensors *file = &r->plan->file;
    const int limit = r->base ? r->base->n_layers : LAYERS_MAX;
    int n_layers = r->base ? r->base->n_layers : 0;

    for (int i = 0; i < file->n_tensors; i++) {
        struct tensor_name name;
        const mlora_status status = tensor_name_parse(&name, file->tensors[i].name);
        if (status != MLORA_OK) return status;
        if (name.kind == TENSOR_UNKNOWN || name.layer == LAYER_OUTSIDE) continue;
        if (name.layer >= limit)
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s is for layer %d, %s %d layers: the adapter was trained "
                             "for another base (base_model_name_or_path: %.200s); load it with "
                             "that one",
                             file->file.path, file->tensors[i].name, name.layer,
                             r->base ? "the base has" : "a base has at most", limit,
                             reader_base(r));
        if (name.layer >= n_layers) n_layers = name.layer + 1;
    }
    r->plan->n_layers = n_layers;
    return MLORA_OK;
}

/* ---- the whole ---------------------------------------------------------------------------- */

static bool changes_nothing(const struct adapter_plan *plan)
{
    if (plan->max_rank > 0 || plan->embedding || plan->head || plan->embedding_rows.tensor ||
        plan->head_rows.tensor)
        return false;
    for (int i = 0; i < (plan->n_layers + 1) * LORA_LINEARS; i++)
        if (plan->linears[i].bias) return false;
    for (int i = 0; i <= plan->n_layers * LORA_NORMS; i++)
        if (plan->norms[i]) return false;
    return true;
}

/* What was left over, as an error or as warnings. */
static mlora_status report(const struct reader *r)
{
    struct buffer *warnings = &r->plan->warnings;
    const char *path = r->plan->file.file.path;
    mlora_status status = MLORA_OK;

    if (r->unknown.n > 0 && !r->lenient)
        return error_set(
            MLORA_EUNSUPPORTED,
            "%s: holds tensors of no kind that is served (%d): %s%s; remove them, or load "
            "the adapter as lenient to leave them out",
            path, r->unknown.n, r->unknown.text.data, name_list_rest(&r->unknown));
    if (r->untargeted.n > 0 && !r->lenient)
        return error_set(MLORA_EFORMAT,
                         "%s: has factors of linears that target_modules, exclude_modules and "
                         "layers_to_transform of adapter_config.json leave out (%d): %s%s; correct "
                         "these fields, or load the adapter as lenient to ignore the factors, as "
                         "PEFT does",
                         path, r->untargeted.n, r->untargeted.text.data,
                         name_list_rest(&r->untargeted));
    if (changes_nothing(r->plan))
        return error_set(MLORA_EFORMAT,
                         "%s: holds no lora_A and lora_B for any linear that target_modules names; "
                         "save the adapter again",
                         path);
    if (r->unknown.n > 0)
        status = buffer_printf(warnings, "%s: left out tensors of no known kind (%d): %s%s\n", path,
                               r->unknown.n, r->unknown.text.data, name_list_rest(&r->unknown));
    if (status == MLORA_OK && r->untargeted.n > 0)
        status = buffer_printf(warnings,
                               "%s: left out the factors of linears that target_modules does not "
                               "name (%d): %s%s\n",
                               path, r->untargeted.n, r->untargeted.text.data,
                               name_list_rest(&r->untargeted));
    if (status == MLORA_OK && r->absent.n > 0)
        status = buffer_printf(warnings,
                               "%s: linears that target_modules names have no factors, and stay as "
                               "in the base (%d): %s%s\n",
                               path, r->absent.n, r->absent.text.data, name_list_rest(&r->absent));
    return status;
}

/* The tokens that an aLoRA waits for. */
static mlora_status copy_invocation(struct adapter_plan *plan, const json_t *ids)
{
    if (!ids) return MLORA_OK;
    plan->n_invocation = (int)json_array_size(ids);
    plan->invocation = calloc((size_t)plan->n_invocation + 1, sizeof *plan->invocation);
    if (!plan->invocation)
        return error_set(MLORA_ENOMEM, "%s: out of memory for %d tokens", plan->directory,
                         plan->n_invocation);
    for (int i = 0; i < plan->n_invocation; i++)
        plan->invocation[i] = (int32_t)json_integer_value(json_array_get(ids, (size_t)i));
    return MLORA_OK;
}

static mlora_status read_tensors(struct reader *r)
{
    struct adapter_plan *plan = r->plan;

    mlora_status status = count_layers(r);
    if (status != MLORA_OK) return status;
    const size_t n = ((size_t)plan->n_layers + 1) * LORA_LINEARS;
    r->pairs = calloc(n, sizeof *r->pairs);
    plan->linears = calloc(n, sizeof *plan->linears);
    plan->norms = calloc((size_t)plan->n_layers * LORA_NORMS + 1, sizeof *plan->norms);
    if (!r->pairs || !plan->linears || !plan->norms)
        return error_set(MLORA_ENOMEM, "%s: out of memory for %d layers", plan->directory,
                         plan->n_layers);

    for (int i = 0; i < plan->file.n_tensors; i++) {
        status = sort_tensor(r, &plan->file.tensors[i]);
        if (status != MLORA_OK) return status;
    }
    for (int layer = 0; layer <= plan->n_layers; layer++)
        for (int i = 0; i < (layer < plan->n_layers ? LORA_LINEARS : LORA_HEAD + 1); i++) {
            status = plan_linear(r, layer, i);
            if (status != MLORA_OK) return status;
        }
    status = plan_whole(r);
    if (status == MLORA_OK) status = copy_invocation(plan, r->peft->invocation);
    return status == MLORA_OK ? report(r) : status;
}

/* Open adapter_model.safetensors; the pickle that may lie in its place is never opened. */
static mlora_status open_file(struct adapter_plan *plan, const char *directory)
{
    char *path = path_join(directory, "adapter_model.safetensors");
    char *pickle = path_join(directory, "adapter_model.bin");
    mlora_status status;

    if (!path || !pickle)
        status = error_set(MLORA_ENOMEM, "%s: out of memory for a path", directory);
    else if (file_exists(path))
        status = safetensors_open(&plan->file, path);
    else if (file_exists(pickle))
        status = error_set(MLORA_EUNSUPPORTED,
                           "%s: is a Python pickle, which can run code and is never opened, and "
                           "there is no adapter_model.safetensors beside it; load the adapter with "
                           "PEFT and save it again with safe_serialization=True",
                           pickle);
    else
        status = error_set(MLORA_EIO,
                           "%s: there is no such file; an adapter is a directory in "
                           "PEFT's layout, with adapter_config.json and adapter_model.safetensors",
                           path);
    if (status == MLORA_OK && file_exists(pickle))
        status = buffer_printf(
            &plan->warnings, "%s: not read: adapter_model.safetensors beside it is used\n", pickle);
    free(path);
    free(pickle);
    return status;
}

mlora_status adapter_plan_read(struct adapter_plan *out, const char *directory,
                               const struct model_config *config, bool lenient)
{
    struct adapter_plan plan = {0};
    struct peft_config peft = {0};
    struct reader reader = {
        .plan = &plan, .peft = &peft, .base = config, .lenient = lenient, .prefix = "model."};

    mlora_status status = peft_config_read(&peft, directory);
    if (status != MLORA_OK) goto done;
    status = buffer_append(&plan.warnings, buffer_text(&peft.warnings), peft.warnings.bytes);
    if (status != MLORA_OK) goto done;
    status = open_file(&plan, directory);
    if (status != MLORA_OK) goto done;
    plan.directory = strdup(directory);
    plan.base_model = peft.base_model ? strdup(peft.base_model) : NULL;
    plan.rslora = peft.rslora;
    if (!plan.directory || (peft.base_model && !plan.base_model)) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory", directory);
        goto done;
    }
    status = read_tensors(&reader);
    if (status == MLORA_OK) plan.bytes = adapter_bytes(&plan);

done:
    buffer_free(&reader.unknown.text);
    buffer_free(&reader.untargeted.text);
    buffer_free(&reader.absent.text);
    free(reader.pairs);
    peft_config_free(&peft);
    if (status != MLORA_OK) adapter_plan_free(&plan);
    *out = plan;
    return status;
}

void adapter_plan_convert(struct adapter_plan *plan, mlora_dtype dtype)
{
    if (dtype == MLORA_DTYPE_AUTO) return;
    for (int i = 0; i < (plan->n_layers + 1) * LORA_LINEARS; i++)
        if (plan->linears[i].rank > 0 && plan->linears[i].a_form != FORM_GROUPS)
            plan->linears[i].dtype = dtype == MLORA_DTYPE_BF16 ? DTYPE_BF16 : DTYPE_F32;
    plan->bytes = adapter_bytes(plan);
}

void adapter_plan_free(struct adapter_plan *plan)
{
    safetensors_close(&plan->file);
    buffer_free(&plan->warnings);
    free(plan->linears);
    free(plan->norms);
    free(plan->embedding_rows.ids);
    free(plan->embedding_rows.row);
    free(plan->head_rows.ids);
    free(plan->head_rows.row);
    free(plan->invocation);
    free(plan->base_model);
    free(plan->directory);
    *plan = (struct adapter_plan){0};
}
