/* The linears of an adapter: each tensor to its place, then each place against the configuration and
 * the base. */
#include <inttypes.h>
#include <limits.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/plan.h"

static const char *const outside_names[] = {"embed_tokens", "lm_head"};

/* ---- placing ------------------------------------------------------------------------------ */

static struct pair *pair_at(const struct reader *r, int layer, int linear)
{
    return &r->pairs[(size_t)layer * LORA_LINEARS + (size_t)linear];
}

static const struct tensor **place_in(struct pair *pair, enum tensor_kind kind)
{
    switch (kind) {
    case TENSOR_A:
        return &pair->a;
    case TENSOR_B:
        return &pair->b;
    case TENSOR_LORA_BIAS:
        return &pair->b_bias;
    case TENSOR_MAGNITUDE:
        return &pair->magnitude;
    default:
        return &pair->bias;
    }
}

static const struct tensor *any_of(const struct pair *pair)
{
    const struct tensor *const all[] = {pair->a, pair->b, pair->b_bias, pair->magnitude,
                                        pair->bias};
    for (int i = 0; i < 5; i++)
        if (all[i]) return all[i];
    return NULL;
}

static mlora_status both(const struct reader *r, const struct tensor *one,
                         const struct tensor *other, const struct tensor_name *name)
{
    char of_layer[32] = "";

    if (name->layer != LAYER_OUTSIDE)
        snprintf(of_layer, sizeof of_layer, " of layer %d", name->layer);
    return error_set(MLORA_EFORMAT, "%s: %.200s and %.200s are both for %s%s; keep one of them",
                     r->plan->file.file.path, one->name, other->name, name->linear, of_layer);
}

mlora_status plan_place(struct reader *r, const struct tensor *tensor,
                        const struct tensor_name *name)
{
    const int layer = name->layer == LAYER_OUTSIDE ? r->plan->n_layers : name->layer;
    const struct tensor **place = name->kind == TENSOR_WHOLE    ? &r->whole[name->first_linear]
                                  : name->kind == TENSOR_COPY   ? &r->copy[name->first_linear]
                                  : name->kind == TENSOR_TOKENS ? &r->tokens[name->first_linear]
                                                                : NULL;

    if (place) {
        if (*place) return both(r, *place, tensor, name);
        *place = tensor;
        return MLORA_OK;
    }
    if (name->n_linears > 1 && !r->base)
        return error_set(MLORA_EINVAL,
                         "%s: %.200s is of a fused linear, whose parts depend on the base; give "
                         "the base model to look at it with",
                         r->plan->file.file.path, tensor->name);
    for (int i = 0; i < name->n_linears; i++) {
        struct pair *pair = pair_at(r, layer, name->first_linear + i);

        place = place_in(pair, name->kind);
        if (*place || (pair->linear && pair->linear != name->linear))
            return both(r, *place ? *place : any_of(pair), tensor, name);
        *place = tensor;
        pair->linear = name->linear;
        pair->first = name->first_linear;
    }
    snprintf(r->prefix, sizeof r->prefix, "%s", name->prefix);
    return MLORA_OK;
}

/* ---- widths ------------------------------------------------------------------------------- */

/* Of a linear of the base, outside the layers too. */
static int64_t base_inputs(const struct reader *r, int layer, int index)
{
    if (layer < r->plan->n_layers) return linear_inputs(r->base, (enum lora_linear)index);
    return index == LORA_EMBEDDING ? r->base->vocab_size : r->base->hidden_size;
}

static int64_t base_outputs(const struct reader *r, int layer, int index)
{
    if (layer < r->plan->n_layers) return linear_outputs(r->base, (enum lora_linear)index);
    return index == LORA_EMBEDDING ? r->base->hidden_size : r->base->vocab_size;
}

mlora_status plan_other_base(const struct reader *r, const struct tensor *tensor, int64_t rows,
                             int64_t columns)
{
    return error_set(MLORA_EFORMAT,
                     "%s: %.200s is [%" PRId64 ", %" PRId64 "], the base needs [%" PRId64
                     ", %" PRId64 "]: the adapter was trained for another base "
                     "(base_model_name_or_path: %.200s); load it with that one",
                     r->plan->file.file.path, tensor->name, tensor->shape[0], tensor->shape[1],
                     rows, columns, reader_base(r));
}

/* The factors of one linear, and what the checks below find out. */
struct factors {
    const struct pair *pair;
    const char *module;
    const struct peft_module *peft;
    int layer, index;
    bool fused;
    int n_linears; /* 1, or those of the fused one */
    int64_t in, out;
    enum factor_form a_form, b_form;
    int parts;
};

static mlora_status check_pair(const struct reader *r, const struct factors *f)
{
    const struct pair *pair = f->pair;
    const struct tensor *matrices[] = {pair->a, pair->b};
    const char *path = r->plan->file.file.path;

    if (!pair->a || !pair->b)
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has no lora_%s beside it; the file is incomplete: save the "
                         "adapter again",
                         path, any_of(pair)->name, pair->a ? "B" : "A");
    for (int i = 0; i < 2; i++)
        if (matrices[i]->n_dims != 2)
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s has %d dimensions, a matrix is needed; save the adapter "
                             "again",
                             path, matrices[i]->name, matrices[i]->n_dims);
    return MLORA_OK;
}

static mlora_status check_rank(const struct reader *r, const struct factors *f)
{
    const char *path = r->plan->file.file.path;
    const int rank = f->peft->rank;
    const int64_t rank_a = f->pair->a->shape[0];
    const int64_t columns = f->pair->b->shape[1];
    const int64_t rank_b =
        f->b_form == FORM_BLOCKS && columns <= LORA_RANK_MAX ? columns * f->parts : columns;

    if (rank_a != rank || rank_b != rank)
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has rank %" PRId64 " and lora_B %" PRId64 ", "
                         "adapter_config.json says %d for %s (r, rank_pattern); the files do not "
                         "belong together: save the adapter again",
                         path, f->pair->a->name, rank_a, rank_b, rank, f->module);
    if (rank > LORA_RANK_MAX)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %s has rank %d (r, rank_pattern), at most %d is served; %s",
                         r->peft->path, f->module, rank, LORA_RANK_MAX, MERGE);
    return MLORA_OK;
}

/* What use_bdlora and use_qalora say of this module's factors. */
static mlora_status find_form(const struct reader *r, struct factors *f)
{
    const struct peft_config *peft = r->peft;
    const bool embedding = f->layer == r->plan->n_layers && f->index == LORA_EMBEDDING;
    const bool a_blocks = peft_config_has_blocks(peft->blocks_a, f->module);
    const bool b_blocks = peft_config_has_blocks(peft->blocks_b, f->module);
    const int64_t in = r->base ? base_inputs(r, f->layer, f->index) : 0;

    f->a_form = f->b_form = FORM_PLAIN;
    f->parts = 1;
    if (embedding) {
        f->a_form = FORM_TRANSPOSED;
    } else if (a_blocks || b_blocks) {
        f->parts = peft->n_blocks;
        if (a_blocks && b_blocks)
            return error_set(MLORA_EFORMAT,
                             "%s: use_bdlora: %s is of target_modules_bd_a and of "
                             "target_modules_bd_b; leave it in one of them",
                             peft->path, f->module);
        *(a_blocks ? &f->a_form : &f->b_form) = FORM_BLOCKS;
        const int64_t rows = a_blocks ? f->pair->a->shape[0] : f->pair->b->shape[0];
        if (rows % f->parts != 0 || f->fused)
            return error_set(MLORA_EFORMAT,
                             "%s: use_bdlora: nblocks is %d, which does not divide the %" PRId64
                             " rows of %.200s%s; save the adapter again",
                             peft->path, f->parts, rows,
                             a_blocks ? f->pair->a->name : f->pair->b->name,
                             f->fused ? ", a fused linear" : "");
    } else if (peft->group > 1 && f->pair->a->shape[1] != in) { /* else PEFT did not pool it */
        f->a_form = FORM_GROUPS;
        f->parts = peft->group;
    }
    return MLORA_OK;
}

/* The widths of x and y against the base, or without one, that they are widths at all. */
static mlora_status check_widths(const struct reader *r, struct factors *f)
{
    const struct pair *pair = f->pair;
    const int64_t a_parts = f->a_form == FORM_BLOCKS || f->a_form == FORM_GROUPS ? f->parts : 1;
    int64_t out = 0;

    if (!r->base) {
        const int64_t columns = pair->a->shape[1], rows = pair->b->shape[0];
        f->in = columns <= INT_MAX ? columns * a_parts : 0;
        f->out = rows;
        if (f->in > 0 && f->in <= INT_MAX && rows > 0 && rows <= INT_MAX) return MLORA_OK;
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has %" PRId64 " inputs and lora_B %" PRId64 " outputs, at "
                         "least 1 is needed; save the adapter again",
                         r->plan->file.file.path, pair->a->name, columns, rows);
    }
    const int first = f->layer < r->plan->n_layers ? pair->first : f->index;
    f->in = base_inputs(r, f->layer, f->index);
    f->out = base_outputs(r, f->layer, f->index);
    for (int i = 0; i < f->n_linears; i++) out += base_outputs(r, f->layer, first + i);
    if (pair->a->shape[1] != f->in / a_parts || f->in % a_parts != 0)
        return plan_other_base(r, pair->a, f->peft->rank, f->in / a_parts);
    if (pair->b->shape[0] != out) return plan_other_base(r, pair->b, out, f->peft->rank);
    return MLORA_OK;
}

/* A vector with an element for each of `n` outputs: [n], [n, 1] or [1, n]. */
static mlora_status check_vector(const struct reader *r, const struct tensor *tensor, int64_t n)
{
    enum dtype dtype;
    int64_t count = 1;

    for (int i = 0; i < tensor->n_dims; i++)
        count = tensor->shape[i] == 1 ? count : count == 1 ? tensor->shape[i] : -1;
    if (count != n || n < 1)
        return error_set(MLORA_EFORMAT,
                         "%s: %.200s has not one value for each of the %" PRId64 " outputs; save "
                         "the adapter again",
                         r->plan->file.file.path, tensor->name, n);
    return tensor_dtype(&dtype, &r->plan->file, tensor);
}

/* lora_bias and use_dora against the tensors that they mean. */
static mlora_status check_vectors(const struct reader *r, const struct factors *f)
{
    const struct {
        const struct tensor *tensor;
        bool wanted;
        const char *field, *name, *is;
    } vectors[] = {
        {f->pair->b_bias, r->peft->lora_bias, "lora_bias", "lora_B.bias", "a bias of the factor B"},
        {f->pair->magnitude, r->peft->dora, "use_dora", "lora_magnitude_vector",
         "a magnitude vector"},
    };

    for (int i = 0; i < 2; i++) {
        if (vectors[i].tensor && !vectors[i].wanted)
            return error_set(MLORA_EFORMAT,
                             "%s: %.200s is %s, but %s of adapter_config.json is not true; the "
                             "files do not belong together: save the adapter again",
                             r->plan->file.file.path, vectors[i].tensor->name, vectors[i].is,
                             vectors[i].field);
        if (!vectors[i].tensor && vectors[i].wanted)
            return error_set(MLORA_EFORMAT,
                             "%s: %s has no %s, but %s of adapter_config.json is true; the file is "
                             "incomplete: save the adapter again",
                             r->plan->file.file.path, f->module, vectors[i].name, vectors[i].field);
    }
    return MLORA_OK;
}

/* ---- planning ----------------------------------------------------------------------------- */

/* The factors are right: write them down. */
static mlora_status write_factors(struct reader *r, struct adapter_linear *linear,
                                  const struct factors *f)
{
    const struct pair *pair = f->pair;
    enum dtype a_dtype, b_dtype;

    mlora_status status = tensor_dtype(&a_dtype, &r->plan->file, pair->a);
    if (status != MLORA_OK) return status;
    status = tensor_dtype(&b_dtype, &r->plan->file, pair->b);
    if (status != MLORA_OK) return status;

    linear->rank = f->peft->rank;
    linear->alpha = f->peft->alpha;
    linear->scale = (float)peft_config_scale(r->peft, f->peft);
    linear->in = f->in;
    linear->out = f->out;
    linear->a = pair->a;
    linear->b = pair->b;
    linear->a_form = f->a_form;
    linear->b_form = f->b_form;
    linear->parts = f->parts;
    linear->dtype = a_dtype == b_dtype && f->a_form != FORM_GROUPS ? a_dtype : DTYPE_F32;
    linear->b_bias = pair->b_bias;
    linear->magnitude = pair->magnitude;
    if (linear->rank > r->plan->max_rank) r->plan->max_rank = linear->rank;
    return MLORA_OK;
}

/* A linear that is a target and has tensors. */
static mlora_status plan_factors(struct reader *r, struct adapter_linear *linear, struct factors *f)
{
    const bool outside = f->layer == r->plan->n_layers;

    f->fused = !outside && strcmp(f->pair->linear, linear_name((enum lora_linear)f->index)) != 0;
    f->n_linears = !f->fused ? 1 : f->pair->first == LORA_Q ? 3 : 2;
    mlora_status status = check_pair(r, f);
    if (status == MLORA_OK) status = find_form(r, f);
    if (status == MLORA_OK) status = check_rank(r, f);
    if (status == MLORA_OK) status = check_widths(r, f);
    if (status == MLORA_OK) status = check_vectors(r, f);
    if (status == MLORA_OK && f->pair->b_bias)
        status = check_vector(r, f->pair->b_bias, f->pair->b->shape[0]);
    if (status == MLORA_OK && f->pair->magnitude)
        status = check_vector(r, f->pair->magnitude, f->pair->b->shape[0]);
    if (status != MLORA_OK) return status;
    if (outside && f->index == LORA_EMBEDDING && r->peft->invocation)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: alora_invocation_tokens is set and %s is a target, which PEFT does "
                         "not take either; save the adapter without it",
                         r->peft->path, f->module);
    for (int i = f->pair->first; f->fused && i < f->index; i++)
        linear->b_row += linear_outputs(r->base, (enum lora_linear)i);
    return write_factors(r, linear, f);
}

static bool base_has_bias(const struct model_config *base, int index)
{
    if (index <= LORA_V) return base->qkv_bias;
    return index == LORA_O ? base->o_bias : base->mlp_bias;
}

/* A bias that replaces the base's, whatever the targets are, as PEFT loads it. */
static mlora_status plan_bias(struct reader *r, struct adapter_linear *linear,
                              const struct pair *pair, int layer, int index)
{
    const bool outside = layer == r->plan->n_layers;

    if (!pair->bias) return MLORA_OK;
    if (outside || (r->base && !base_has_bias(r->base, index)))
        return name_list_add(&r->unknown, pair->bias->name);
    if (r->peft->invocation)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: %.200s would count everywhere, the rest of the adapter from "
                         "alora_invocation_tokens on only, which is not served; train it with "
                         "bias=\"none\"",
                         r->plan->file.file.path, pair->bias->name);
    if (r->base && !linear->rank) linear->out = base_outputs(r, layer, index);
    if (!r->base) linear->out = pair->bias->n_dims > 0 ? pair->bias->shape[0] : 0;
    linear->bias = pair->bias;
    return check_vector(r, pair->bias, linear->out);
}

/* ensure_weight_tying is set and means embedding and head of a tied base. */
static mlora_status ties_factors(bool *out, const struct reader *r)
{
    *out = false;
    if (!r->peft->tie || !r->base || !r->base->tied || peft_config_saves_embedding(r->peft))
        return MLORA_OK;
    return peft_config_targets_embedding(out, r->peft);
}

/* One of embedding and head takes the factors of the other, the other way round. */
static mlora_status tie_factors(struct reader *r, int index, const struct peft_module *peft,
                                const struct adapter_linear *other)
{
    struct adapter_linear *linear = &r->plan->linears[r->plan->n_layers * LORA_LINEARS + index];
    const struct pair *pair = pair_at(r, r->plan->n_layers, index);

    *linear = (struct adapter_linear){
        .rank = other->rank,
        .alpha = peft->alpha,
        .scale = (float)peft_config_scale(r->peft, peft),
        .in = other->out,
        .out = other->in,
        .a = other->b,
        .b = other->a,
        /* the embedding's A is [V, R] on the device, as is the head's B in the file */
        .a_form = index == LORA_EMBEDDING ? FORM_PLAIN : FORM_TRANSPOSED,
        .b_form = FORM_TRANSPOSED,
        .parts = 1,
        .dtype = other->dtype,
        .magnitude = pair->magnitude,
    };
    if (!r->peft->dora) return MLORA_OK;
    if (pair->magnitude) return check_vector(r, pair->magnitude, linear->out);
    return error_set(MLORA_EFORMAT,
                     "%s: %s has no lora_magnitude_vector, but use_dora of adapter_config.json is "
                     "true; the file is incomplete: save the adapter again",
                     r->plan->file.file.path, outside_names[index]);
}

/* ensure_weight_tying: embedding and head have the same factors. The file may have them once, or
 * twice: then PEFT reads those of the head last, over the embedding's. */
static mlora_status plan_tied(struct reader *r)
{
    const int L = r->plan->n_layers, n_modules = L * LORA_LINEARS + 2;
    const int from =
        pair_at(r, L, LORA_HEAD)->a || pair_at(r, L, LORA_HEAD)->b ? LORA_HEAD : LORA_EMBEDDING;
    struct peft_module peft[2];
    char module[MODULE_NAME_MAX];
    mlora_status status = MLORA_OK;

    for (int i = 0; i < 2 && status == MLORA_OK; i++) {
        module_name(module, r->prefix, LAYER_OUTSIDE, outside_names[i]);
        status = peft_config_rank(&peft[i], r->peft, module, n_modules);
    }
    if (status != MLORA_OK) return status;
    module_name(module, r->prefix, LAYER_OUTSIDE, outside_names[from]);
    if (!pair_at(r, L, from)->a && !pair_at(r, L, from)->b)
        return name_list_add(&r->absent, module);

    struct adapter_linear *linear = &r->plan->linears[L * LORA_LINEARS + from];
    struct factors factors = {.pair = pair_at(r, L, from),
                              .module = module,
                              .peft = &peft[from],
                              .layer = L,
                              .index = from};
    status = plan_factors(r, linear, &factors);
    if (status != MLORA_OK) return status;
    if (linear->parts > 1 || linear->b_bias || r->peft->invocation)
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: ensure_weight_tying ties LoRA on embed_tokens and lm_head, and %s is "
                         "set, which PEFT does not take for an embedding either; save the adapter "
                         "without it",
                         r->peft->path,
                         r->peft->invocation  ? "alora_invocation_tokens"
                         : linear->b_bias     ? "lora_bias"
                         : r->peft->group > 1 ? "use_qalora"
                                              : "use_bdlora");
    return tie_factors(r, !from, &peft[!from], linear);
}

mlora_status plan_linear(struct reader *r, int layer, int index)
{
    const bool outside = layer == r->plan->n_layers;
    const int n_modules = r->plan->n_layers * LORA_LINEARS + 2;
    const struct pair *pair = pair_at(r, layer, index);
    const bool has_factors = pair->a || pair->b || pair->b_bias || pair->magnitude;
    struct adapter_linear *linear = &r->plan->linears[(size_t)layer * LORA_LINEARS + (size_t)index];
    char module[MODULE_NAME_MAX];
    struct peft_module peft = {0};
    bool tied = false;

    mlora_status status = MLORA_OK;
    if (outside) status = ties_factors(&tied, r);
    if (status != MLORA_OK) return status;
    if (tied) return index == LORA_EMBEDDING ? plan_tied(r) : MLORA_OK; /* both at once */

    module_name(module, r->prefix, outside ? LAYER_OUTSIDE : layer,
                outside        ? outside_names[index]
                : pair->linear ? pair->linear
                               : linear_name((enum lora_linear)index));
    if (!outside || !r->peft->targets.all) /* "all-linear" means those of layers */
        status = peft_config_match(&peft, r->peft, module, n_modules);
    if (status != MLORA_OK) return status;

    struct factors factors = {
        .pair = pair, .module = module, .peft = &peft, .layer = layer, .index = index};
    if (has_factors && peft.targeted)
        status = plan_factors(r, linear, &factors);
    else if (has_factors && (outside || index == pair->first)) /* a fused one counts once */
        status = name_list_add(&r->untargeted, any_of(pair)->name);
    else if (!has_factors && peft.targeted)
        status = name_list_add(&r->absent, module);
    return status == MLORA_OK ? plan_bias(r, linear, pair, layer, index) : status;
}
