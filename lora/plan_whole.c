/* What an adapter has in the place of whole weights of the base: embedding, head, rows of them, and
 * norms. PEFT keeps what modules_to_save names beside the base's own; what else the file has, it
 * writes into the base, where a tied head is the embedding. */
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/plan.h"

static const char *const names[] = {"embed_tokens", "lm_head"};

/* ---- norms -------------------------------------------------------------------------------- */

mlora_status plan_norm(struct reader *r, const struct tensor *tensor,
                       const struct tensor_name *name)
{
    const bool of_head = name->layer != LAYER_OUTSIDE &&
                         (name->first_linear == NORM_Q || name->first_linear == NORM_K);
    const int layer = name->layer == LAYER_OUTSIDE ? r->plan->n_layers : name->layer;
    const struct tensor **place = &r->plan->norms[layer * LORA_NORMS + name->first_linear];
    const int64_t n = !r->base ? 0 : of_head ? r->base->head_dim : r->base->hidden_size;
    enum dtype dtype;

    if (of_head && r->base && !r->base->qk_norm) return name_list_add(&r->unknown, tensor->name);
    if (*place)
        return error_set(MLORA_EFORMAT, "%s: %.200s and %.200s are both for %s; keep one of them",
                         r->plan->file.file.path, (*place)->name, tensor->name, name->linear);
    if (tensor->n_dims != 1 || tensor->shape[0] < 1 || (r->base && tensor->shape[0] != n))
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has %" PRId64 " values, the base needs %" PRId64
                         ": the adapter was trained for another base (base_model_name_or_path: "
                         "%.200s); load it with that one",
                         r->plan->file.file.path, tensor->name,
                         tensor->n_dims ? tensor->shape[0] : 0, n, reader_base(r));
    *place = tensor;
    return tensor_dtype(&dtype, &r->plan->file, tensor);
}

/* ---- embedding and head ------------------------------------------------------------------- */

static mlora_status check_whole(const struct reader *r, const struct tensor *tensor)
{
    const char *path = r->plan->file.file.path;
    enum dtype dtype;

    if (tensor->n_dims != 2 || tensor->bytes == 0 || tensor->shape[0] > INT_MAX ||
        tensor->shape[1] > INT_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has %d dimensions and %" PRId64 " bytes, a matrix is needed; "
                         "save the adapter again",
                         path, tensor->name, tensor->n_dims, tensor->bytes);
    if (r->base && tensor->shape[1] == r->base->hidden_size &&
        tensor->shape[0] != r->base->vocab_size)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %.200s has %" PRId64 " rows, the base's vocabulary is %d: the "
                         "adapter was trained with a resized embedding, which is not served; %s",
                         path, tensor->name, tensor->shape[0], r->base->vocab_size, MERGE);
    if (r->base && tensor->shape[1] != r->base->hidden_size)
        return plan_other_base(r, tensor, r->base->vocab_size, r->base->hidden_size);
    return tensor_dtype(&dtype, &r->plan->file, tensor);
}

/* The tensor that stands for embedding or head, and whether PEFT writes it into the base. */
static mlora_status find_whole(const struct reader *r, int which, bool wrapped,
                               const struct tensor **out, bool *is_copy)
{
    const struct tensor *whole = r->whole[which], *copy = r->copy[which];

    *out = whole ? whole : copy;
    *is_copy = *out && !wrapped;
    if (wrapped && !whole)
        return error_set(MLORA_EFORMAT,
                         "%s: modules_to_save of adapter_config.json names %s, which is not there; "
                         "the file is incomplete: save the adapter again",
                         r->plan->file.file.path, names[which]);
    if (whole && copy && !wrapped)
        return error_set(MLORA_EFORMAT, "%s: %.200s and %.200s are both for %s; keep one of them",
                         r->plan->file.file.path, whole->name, copy->name, names[which]);
    return *out ? check_whole(r, *out) : MLORA_OK;
}

static mlora_status plan_matrices(struct reader *r)
{
    struct adapter_plan *plan = r->plan;
    const bool tied = r->base && r->base->tied;
    const bool ties = tied && r->peft->tie && peft_config_saves_embedding(r->peft);
    char module[MODULE_NAME_MAX];

    module_name(module, r->prefix, LAYER_OUTSIDE, names[LORA_EMBEDDING]);
    const bool wraps_embedding = ties || peft_config_saves(r->peft, module);
    const bool wraps_head = !ties && peft_config_saves(r->peft, names[LORA_HEAD]);

    mlora_status status =
        find_whole(r, LORA_EMBEDDING, wraps_embedding, &plan->embedding, &plan->embedding_is_copy);
    if (status != MLORA_OK) return status;
    if (ties) { /* one trained matrix in both places */
        plan->head = plan->embedding;
        return MLORA_OK;
    }
    status = find_whole(r, LORA_HEAD, wraps_head, &plan->head, &plan->head_is_copy);
    if (status != MLORA_OK || !tied) return status;
    if (!plan->head && plan->embedding_is_copy) { /* written into both, which are one */
        plan->head = plan->embedding;
        plan->head_is_copy = true;
    } else if (!plan->embedding && plan->head_is_copy) {
        plan->embedding = plan->head;
        plan->embedding_is_copy = true;
    }
    return MLORA_OK;
}

/* ---- rows --------------------------------------------------------------------------------- */

/* A token and the row of the tensor that is for it, packed so that they sort by token. */
static int compare_packed(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static mlora_status plan_rows(struct reader *r, struct adapter_rows *out, int which,
                              const json_t *ids)
{
    const struct tensor *tensor = r->tokens[which];
    const size_t n = json_array_size(ids);
    const char *path = r->plan->file.file.path;
    enum dtype dtype;
    mlora_status status = MLORA_OK;

    if (!tensor)
        return error_set(MLORA_EFORMAT,
                         "%s: trainable_token_indices of adapter_config.json has tokens of %s, "
                         "whose trainable_tokens_delta is not there; the file is incomplete: save "
                         "the adapter again",
                         path, names[which]);
    if (tensor->n_dims != 2 || tensor->bytes == 0 || tensor->shape[0] != (int64_t)n ||
        (r->base ? tensor->shape[1] != r->base->hidden_size : tensor->shape[1] > INT_MAX))
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s is not a row of the embedding for each of the %zu tokens in "
                         "trainable_token_indices; the files do not belong together: save the "
                         "adapter again",
                         path, tensor->name, n);
    status = tensor_dtype(&dtype, &r->plan->file, tensor);
    if (status != MLORA_OK) return status;

    uint64_t *packed = calloc(n + 1, sizeof *packed);
    out->ids = calloc(n + 1, sizeof *out->ids);
    out->row = calloc(n + 1, sizeof *out->row);
    if (!packed || !out->ids || !out->row) {
        free(packed);
        return error_set(MLORA_ENOMEM, "%s: out of memory for %zu tokens", path, n);
    }
    for (size_t i = 0; i < n; i++)
        packed[i] = (uint64_t)json_integer_value(json_array_get(ids, i)) << 32 | i;
    qsort(packed, n, sizeof *packed, compare_packed);
    for (size_t i = 0; i < n && status == MLORA_OK; i++) {
        out->ids[i] = (int32_t)(packed[i] >> 32);
        out->row[i] = (int32_t)(packed[i] & 0xffffffffu);
        if (i > 0 && out->ids[i] == out->ids[i - 1])
            status = error_set(MLORA_EFORMAT,
                               "%s: trainable_token_indices has token %d twice; leave it in once",
                               r->peft->path, out->ids[i]);
        else if (r->base && out->ids[i] >= r->base->vocab_size)
            status = error_set(MLORA_EUNSUPPORTED,
                               "%s: trainable_token_indices has token %d, the base's vocabulary "
                               "is %d: the adapter was trained with a resized embedding, which is "
                               "not served; %s",
                               r->peft->path, out->ids[i], r->base->vocab_size, MERGE);
    }
    out->tensor = tensor;
    out->n = (int)n;
    free(packed);
    return status;
}

static bool ends_with(const char *text, const char *suffix)
{
    const size_t n = strlen(text), m = strlen(suffix);
    return n >= m && strcmp(text + n - m, suffix) == 0;
}

/* The ids of trainable_token_indices for embedding and head, NULL where there are none. */
static mlora_status find_tokens(const struct reader *r, const json_t *ids[2])
{
    const json_t *tokens = r->peft->tokens;
    char module[MODULE_NAME_MAX];

    ids[0] = ids[1] = NULL;
    if (json_is_array(tokens)) ids[LORA_EMBEDDING] = tokens;
    if (!json_is_object(tokens)) return MLORA_OK;
    module_name(module, r->prefix, LAYER_OUTSIDE, names[LORA_EMBEDDING]);
    for (void *it = json_object_iter((json_t *)tokens); it;
         it = json_object_iter_next((json_t *)tokens, it)) {
        const char *name = json_object_iter_key(it);
        const int which = ends_with(module, name)             ? LORA_EMBEDDING
                          : ends_with(names[LORA_HEAD], name) ? LORA_HEAD
                                                              : -1;
        if (which < 0 || ids[which])
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: trainable_token_indices has tokens of %.100s, which is not "
                             "served; name embed_tokens and lm_head, each once",
                             r->peft->path, name);
        ids[which] = json_object_iter_value(it);
    }
    return MLORA_OK;
}

/* Tokens beside another change of the same weight are what PEFT does not take, or what depends on
 * the order in which it wraps. */
static mlora_status check_apart(const struct reader *r)
{
    const struct adapter_plan *plan = r->plan;
    const struct adapter_linear *outside = &plan->linears[plan->n_layers * LORA_LINEARS];
    const bool rows[] = {plan->embedding_rows.tensor != NULL,
                         plan->head_rows.tensor || plan->head_has_embedding_rows};
    const bool others[] = {plan->embedding || outside[LORA_EMBEDDING].rank > 0,
                           plan->head || outside[LORA_HEAD].rank > 0};

    for (int i = 0; i < 2; i++)
        if (rows[i] && others[i])
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: trainable_token_indices replaces rows of %s, which the adapter "
                             "changes as a whole too; save it with one of them",
                             r->peft->path, names[i]);
    return MLORA_OK;
}

static mlora_status plan_tokens(struct reader *r)
{
    struct adapter_plan *plan = r->plan;
    const bool tied = r->base && r->base->tied;
    const json_t *ids[2];

    mlora_status status = find_tokens(r, ids);
    if (status != MLORA_OK) return status;
    for (int i = 0; i < 2; i++)
        if (!ids[i] && r->tokens[i])
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s has rows of tokens that trainable_token_indices of "
                             "adapter_config.json does not name; the files do not belong "
                             "together: save the adapter again",
                             plan->file.file.path, r->tokens[i]->name);

    const bool same = !ids[LORA_HEAD] || json_equal(ids[LORA_EMBEDDING], ids[LORA_HEAD]);
    if (ids[LORA_EMBEDDING]) {
        status = plan_rows(r, &plan->embedding_rows, LORA_EMBEDDING, ids[LORA_EMBEDDING]);
        if (status != MLORA_OK) return status;
        plan->head_has_embedding_rows = tied && (same || r->peft->tie);
    }
    if (ids[LORA_HEAD] && !plan->head_has_embedding_rows) {
        status = plan_rows(r, &plan->head_rows, LORA_HEAD, ids[LORA_HEAD]);
        if (status != MLORA_OK) return status;
    }
    return check_apart(r);
}

/* ---- all of it ---------------------------------------------------------------------------- */

/* Modules of layers that modules_to_save names must have come, too. */
static mlora_status check_saved_layers(const struct reader *r)
{
    static const char *const of_layer[LORA_NORMS] = {
        [NORM_ATTENTION] = "input_layernorm",
        [NORM_MLP] = "post_attention_layernorm",
        [NORM_Q] = "self_attn.q_norm",
        [NORM_K] = "self_attn.k_norm",
    };
    const int L = r->plan->n_layers;
    char module[MODULE_NAME_MAX];

    for (int i = 0; i <= L * LORA_NORMS && r->base && r->peft->saved; i++) {
        const int layer = i / LORA_NORMS, norm = i % LORA_NORMS;
        if (layer < L && norm >= NORM_Q && !r->base->qk_norm) continue;
        module_name(module, r->prefix, layer < L ? layer : LAYER_OUTSIDE,
                    layer < L ? of_layer[norm] : "norm");
        if (r->plan->norms[i] || !peft_config_saves(r->peft, module)) continue;
        return error_set(MLORA_EFORMAT,
                         "%s: modules_to_save of adapter_config.json names %s, which is not there; "
                         "the file is incomplete: save the adapter again",
                         r->plan->file.file.path, module);
    }
    return MLORA_OK;
}

mlora_status plan_whole(struct reader *r)
{
    struct adapter_plan *plan = r->plan;

    mlora_status status = plan_matrices(r);
    if (status == MLORA_OK) status = check_saved_layers(r);
    if (status == MLORA_OK) status = plan_tokens(r);
    if (status != MLORA_OK || !r->peft->invocation) return status;

    const struct tensor *everywhere = plan->embedding ? plan->embedding : plan->head;
    for (int i = 0; i <= plan->n_layers * LORA_NORMS && !everywhere; i++)
        everywhere = plan->norms[i];
    if (!everywhere) return MLORA_OK;
    return error_set(MLORA_EUNSUPPORTED,
                     "%s: %.200s would count everywhere, the rest of the adapter from "
                     "alora_invocation_tokens on only, which is not served; train it without",
                     plan->file.file.path, everywhere->name);
}
