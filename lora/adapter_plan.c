/* An adapter's two files, held against each other and against the base. The tensors say which
 * linears have factors, the configuration which of them count and with what scale: whatever one
 * of them has and the other does not is an error or a warning, never left out in silence. */
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/adapter.h"
#include "lora/peft_config.h"
#include "lora/tensor_name.h"
#include "model/weights.h"

#define MERGE "merge it into its base with PEFT's merge_and_unload and serve the result as a model"

enum { NAMES_SHOWN = 5 };

/* Names that go into one message. */
struct name_list {
    int n;
    struct buffer text; /* the first NAMES_SHOWN */
};

/* What the file has for one linear. */
struct pair {
    const struct tensor *a, *b;
    const char *linear; /* as the file names it; NULL: nothing */
    int first;          /* enum lora_linear: the first one of a fused linear */
};

/* Everything that the steps below share. */
struct reader {
    struct adapter_plan *plan;
    const struct peft_config *peft;
    const struct model_config *base; /* NULL: unknown */
    bool lenient;
    struct pair *pairs; /* [L, LORA_LINEARS] */
    char prefix[MODULE_PREFIX_MAX];
    struct name_list unknown, untargeted, absent;
};

/* ---- names -------------------------------------------------------------------------------- */

/* Control characters, which may be in a hostile file's names, are shown as '?'. */
static mlora_status add_name(struct name_list *list, const char *name)
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

static const char *rest_of(const struct name_list *list)
{
    return list->n > NAMES_SHOWN ? ", ..." : "";
}

static const char *base_name(const struct reader *r)
{
    return r->peft->base_model ? r->peft->base_model : "not given";
}

/* ---- tensors that are not factors of a linear --------------------------------------------- */

static mlora_status refuse_tensor(const struct reader *r, const struct tensor *tensor,
                                  enum tensor_kind kind)
{
    static const char *const what[] = {
        [TENSOR_LORA_BIAS] = "a bias of the factor B (lora_bias)",
        [TENSOR_MAGNITUDE] = "a magnitude vector (use_dora)",
        [TENSOR_DIAGONAL] = "a diagonal between A and B (kasa_config)",
        [TENSOR_EMBEDDING_LORA] = "LoRA on the embedding (target_modules: embed_tokens)",
        [TENSOR_HEAD_LORA] = "LoRA on the output layer (target_modules: lm_head)",
        [TENSOR_TOKENS] = "replaced rows of the embedding (trainable_token_indices)",
        [TENSOR_BIAS] = "a bias that replaces the base's (bias)",
        [TENSOR_FULL_WEIGHT] = "a whole weight that replaces the base's (modules_to_save)",
    };

    return error_set(MLORA_EUNSUPPORTED, "%s: %.200s is %s, which is not served yet; %s",
                     r->plan->file.file.path, tensor->name, what[kind], MERGE);
}

/* embed_tokens or lm_head as PEFT saves them beside an adapter with save_embedding_layers, which
 * it does by itself when the vocabulary was resized. Whether it is the base's own cannot be told
 * without reading both. */
static mlora_status check_embedding_copy(const struct reader *r, const struct tensor *tensor)
{
    const char *path = r->plan->file.file.path;
    const bool fits = r->base && tensor->n_dims == 2 && tensor->shape[0] == r->base->vocab_size &&
                      tensor->shape[1] == r->base->hidden_size;

    if (r->base && !fits)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %.200s has %" PRId64 " rows, the base's vocabulary is %d: the "
                         "adapter was trained with a resized embedding, which is not served; %s",
                         path, tensor->name, tensor->n_dims ? tensor->shape[0] : 0,
                         r->base->vocab_size, MERGE);
    if (!r->lenient || !fits)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %.200s is a copy of a whole embedding, which would replace the "
                         "base's; if it was not trained, save the adapter again with "
                         "save_embedding_layers=False, or load it as lenient; else %s",
                         path, tensor->name, MERGE);
    return buffer_printf(&r->plan->warnings,
                         "%s: %.200s is a copy of a whole embedding: left out, taken to be equal "
                         "to the base's\n",
                         path, tensor->name);
}

/* ---- sorting tensors ---------------------------------------------------------------------- */

static struct pair *pair_at(const struct reader *r, int layer, int linear)
{
    return &r->pairs[(size_t)layer * LORA_LINEARS + (size_t)linear];
}

static mlora_status place_factor(struct reader *r, const struct tensor *tensor,
                                 const struct tensor_name *name)
{
    const char *path = r->plan->file.file.path;

    if (name->n_linears > 1 && !r->base)
        return error_set(MLORA_EINVAL,
                         "%s: %.200s is of a fused linear, whose parts depend on the base; give "
                         "the base model to look at it with",
                         path, tensor->name);
    for (int i = 0; i < name->n_linears; i++) {
        struct pair *pair = pair_at(r, name->layer, name->first_linear + i);
        const struct tensor **place = name->kind == TENSOR_A ? &pair->a : &pair->b;

        if (*place || (pair->linear && pair->linear != name->linear)) {
            const struct tensor *other = *place ? *place : pair->a ? pair->a : pair->b;
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s and %.200s are both for %s of layer %d; keep one of them",
                             path, other->name, tensor->name, name->linear, name->layer);
        }
        *place = tensor;
        pair->linear = name->linear;
        pair->first = name->first_linear;
    }
    snprintf(r->prefix, sizeof r->prefix, "%s", name->prefix);
    return MLORA_OK;
}

static mlora_status sort_tensor(struct reader *r, const struct tensor *tensor)
{
    struct tensor_name name;

    mlora_status status = tensor_name_parse(&name, tensor->name);
    if (status != MLORA_OK) return status;
    switch (name.kind) {
    case TENSOR_A:
    case TENSOR_B:
        return place_factor(r, tensor, &name);
    case TENSOR_SAMPLER:
        return r->peft->has_sampler ? MLORA_OK : add_name(&r->unknown, tensor->name);
    case TENSOR_EMBEDDING_COPY:
        return check_embedding_copy(r, tensor);
    case TENSOR_UNKNOWN:
        return add_name(&r->unknown, tensor->name);
    default:
        return refuse_tensor(r, tensor, name.kind);
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
        if (name.kind != TENSOR_A && name.kind != TENSOR_B) continue;
        if (name.layer >= limit)
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s is for layer %d, %s %d layers: the adapter was trained "
                             "for another base (base_model_name_or_path: %.200s); load it with "
                             "that one",
                             file->file.path, file->tensors[i].name, name.layer,
                             r->base ? "the base has" : "a base has at most", limit, base_name(r));
        if (name.layer >= n_layers) n_layers = name.layer + 1;
    }
    r->plan->n_layers = n_layers;
    return MLORA_OK;
}

/* ---- one linear --------------------------------------------------------------------------- */

static mlora_status check_rank(const struct reader *r, const char *module, const struct pair *pair,
                               int rank)
{
    const char *path = r->plan->file.file.path;
    const int64_t rank_a = pair->a->shape[0], rank_b = pair->b->shape[1];

    if (rank_a != rank || rank_b != rank)
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has rank %" PRId64 " and lora_B %" PRId64 ", "
                         "adapter_config.json says %d for %s (r, rank_pattern); the files do not "
                         "belong together: save the adapter again",
                         path, pair->a->name, rank_a, rank_b, rank, module);
    if (rank > LORA_RANK_MAX)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %s has rank %d (r, rank_pattern), at most %d is served; %s",
                         r->peft->path, module, rank, LORA_RANK_MAX, MERGE);
    return MLORA_OK;
}

static mlora_status other_base(const struct reader *r, const struct tensor *tensor, int64_t rows,
                               int64_t columns)
{
    return error_set(MLORA_EFORMAT,
                     "%s: %.200s is [%" PRId64 ", %" PRId64 "], the base needs [%" PRId64
                     ", %" PRId64 "]: the adapter was trained for another base "
                     "(base_model_name_or_path: %.200s); load it with that one",
                     r->plan->file.file.path, tensor->name, tensor->shape[0], tensor->shape[1],
                     rows, columns, base_name(r));
}

/* The widths of x and y against the base, or without one, that they are widths at all. */
static mlora_status check_widths(const struct reader *r, const struct pair *pair, int rank,
                                 int n_linears)
{
    const int64_t in = pair->a->shape[1], out = pair->b->shape[0];
    int64_t need_in, need_out = 0;

    if (!r->base) {
        if (in > 0 && in <= INT_MAX && out > 0 && out <= INT_MAX) return MLORA_OK;
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has %" PRId64 " inputs and lora_B %" PRId64 " outputs, at "
                         "least 1 is needed; save the adapter again",
                         r->plan->file.file.path, pair->a->name, in, out);
    }
    need_in = linear_inputs(r->base, (enum lora_linear)pair->first);
    for (int i = 0; i < n_linears; i++)
        need_out += linear_outputs(r->base, (enum lora_linear)(pair->first + i));
    if (in != need_in) return other_base(r, pair->a, rank, need_in);
    return out == need_out ? MLORA_OK : other_base(r, pair->b, need_out, rank);
}

static mlora_status check_pair(const struct reader *r, const struct pair *pair)
{
    const struct tensor *both[] = {pair->a, pair->b};
    const char *path = r->plan->file.file.path;

    if (!pair->a || !pair->b)
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has no lora_%s beside it; the file is incomplete: save the "
                         "adapter again",
                         path, pair->a ? pair->a->name : pair->b->name, pair->a ? "B" : "A");
    for (int i = 0; i < 2; i++)
        if (both[i]->n_dims != 2)
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s has %d dimensions, a matrix is needed; save the adapter "
                             "again",
                             path, both[i]->name, both[i]->n_dims);
    return MLORA_OK;
}

/* A linear that is a target and has tensors. */
static mlora_status plan_linear(struct reader *r, struct adapter_linear *linear, int index,
                                const struct pair *pair, const char *module,
                                const struct peft_module *peft)
{
    const bool fused = strcmp(pair->linear, linear_name((enum lora_linear)index)) != 0;
    const int n_linears = !fused ? 1 : pair->first == LORA_Q ? 3 : 2;
    const struct safetensors *file = &r->plan->file;
    enum dtype a_dtype, b_dtype;

    mlora_status status = check_pair(r, pair);
    if (status != MLORA_OK) return status;
    status = check_rank(r, module, pair, peft->rank);
    if (status != MLORA_OK) return status;
    status = check_widths(r, pair, peft->rank, n_linears);
    if (status != MLORA_OK) return status;
    status = tensor_dtype(&a_dtype, file, pair->a);
    if (status != MLORA_OK) return status;
    status = tensor_dtype(&b_dtype, file, pair->b);
    if (status != MLORA_OK) return status;

    linear->rank = peft->rank;
    linear->alpha = peft->alpha;
    linear->scale = (float)peft_config_scale(r->peft, peft);
    linear->a = pair->a;
    linear->b = pair->b;
    linear->b_rows = fused ? linear_outputs(r->base, (enum lora_linear)index) : pair->b->shape[0];
    for (int i = pair->first; fused && i < index; i++)
        linear->b_row += linear_outputs(r->base, (enum lora_linear)i);
    linear->dtype = a_dtype == b_dtype ? a_dtype : DTYPE_F32;
    if (linear->rank > r->plan->max_rank) r->plan->max_rank = linear->rank;
    return MLORA_OK;
}

static mlora_status match_linear(struct reader *r, int layer, int index)
{
    const struct pair *pair = pair_at(r, layer, index);
    struct adapter_linear *linear = &r->plan->linears[(size_t)layer * LORA_LINEARS + (size_t)index];
    char module[MODULE_NAME_MAX];
    struct peft_module peft;

    module_name(module, r->prefix, layer,
                pair->linear ? pair->linear : linear_name((enum lora_linear)index));
    const mlora_status status =
        peft_config_match(&peft, r->peft, module, r->plan->n_layers * LORA_LINEARS);
    if (status != MLORA_OK) return status;
    if (pair->linear && peft.targeted) return plan_linear(r, linear, index, pair, module, &peft);
    if (pair->linear && index == pair->first) /* a fused one counts once */
        return add_name(&r->untargeted, pair->a ? pair->a->name : pair->b->name);
    return !pair->linear && peft.targeted ? add_name(&r->absent, module) : MLORA_OK;
}

/* ---- the whole ---------------------------------------------------------------------------- */

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
            path, r->unknown.n, r->unknown.text.data, rest_of(&r->unknown));
    if (r->untargeted.n > 0 && !r->lenient)
        return error_set(MLORA_EFORMAT,
                         "%s: has factors of linears that target_modules, exclude_modules and "
                         "layers_to_transform of adapter_config.json leave out (%d): %s%s; correct "
                         "these fields, or load the adapter as lenient to ignore the factors, as "
                         "PEFT does",
                         path, r->untargeted.n, r->untargeted.text.data, rest_of(&r->untargeted));
    if (r->plan->max_rank == 0)
        return error_set(MLORA_EFORMAT,
                         "%s: holds no lora_A and lora_B for any linear that target_modules names; "
                         "save the adapter again",
                         path);
    if (r->unknown.n > 0)
        status = buffer_printf(warnings, "%s: left out tensors of no known kind (%d): %s%s\n", path,
                               r->unknown.n, r->unknown.text.data, rest_of(&r->unknown));
    if (status == MLORA_OK && r->untargeted.n > 0)
        status =
            buffer_printf(warnings,
                          "%s: left out the factors of linears that target_modules does not "
                          "name (%d): %s%s\n",
                          path, r->untargeted.n, r->untargeted.text.data, rest_of(&r->untargeted));
    if (status == MLORA_OK && r->absent.n > 0)
        status = buffer_printf(warnings,
                               "%s: linears that target_modules names have no factors, and stay as "
                               "in the base (%d): %s%s\n",
                               path, r->absent.n, r->absent.text.data, rest_of(&r->absent));
    return status;
}

static mlora_status read_tensors(struct reader *r)
{
    struct adapter_plan *plan = r->plan;

    mlora_status status = count_layers(r);
    if (status != MLORA_OK) return status;
    const size_t n = (size_t)plan->n_layers * LORA_LINEARS;
    r->pairs = calloc(n + 1, sizeof *r->pairs);
    plan->linears = calloc(n + 1, sizeof *plan->linears);
    if (!r->pairs || !plan->linears)
        return error_set(MLORA_ENOMEM, "%s: out of memory for %d layers", plan->directory,
                         plan->n_layers);

    for (int i = 0; i < plan->file.n_tensors; i++) {
        status = sort_tensor(r, &plan->file.tensors[i]);
        if (status != MLORA_OK) return status;
    }
    for (int layer = 0; layer < plan->n_layers; layer++)
        for (int i = 0; i < LORA_LINEARS; i++) {
            status = match_linear(r, layer, i);
            if (status != MLORA_OK) return status;
        }
    return report(r);
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

/* Bytes of the factors as adapter_load lays them out. */
static int64_t device_bytes(const struct adapter_plan *plan)
{
    int64_t bytes = 0;

    for (int i = 0; i < plan->n_layers * LORA_LINEARS; i++) {
        int64_t a, b;
        adapter_factor_bytes(plan, i, &a, &b);
        bytes += a + b;
    }
    return bytes;
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
    if (status == MLORA_OK) plan.bytes = device_bytes(&plan);

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

void adapter_plan_free(struct adapter_plan *plan)
{
    safetensors_close(&plan->file);
    buffer_free(&plan->warnings);
    free(plan->linears);
    free(plan->base_model);
    free(plan->directory);
    *plan = (struct adapter_plan){0};
}
