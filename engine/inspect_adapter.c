/* An adapter directory described: whether it is served, each module that it changes and how, and who
 * computes something else with it. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/inspect_parts.h"
#include "lora/adapter.h"
#include "lora/tensor_name.h"

enum { AS_BYTES = 64 };

/* A number of the configuration as it is there; LoraConfig's default when it is not. */
static void put_setting(struct description *object, const char *key, const json_t *config,
                        const char *field, json_int_t fallback)
{
    json_t *value = json_object_get(config, field);
    describe(object, key, json_is_number(value) ? json_incref(value) : json_integer(fallback));
}

/* `layer` LAYER_OUTSIDE is shown as null. */
static struct description new_row(int layer, const char *module)
{
    struct description row = {.json = json_object()};
    describe(&row, "layer", layer == LAYER_OUTSIDE ? json_null() : json_integer(layer));
    describe_text(&row, "module", module);
    return row;
}

static void add_row(struct description *object, json_t *rows, const struct description *row)
{
    if (row->failed) object->failed = true;
    if (json_array_append_new(rows, row->json) != 0) object->failed = true;
}

/* ---- how a module is served ---------------------------------------------------------------- */

/* What "as" of a module says, in words that its columns have room for. */
enum form {
    AS_LORA,
    AS_DORA,
    AS_QALORA,
    AS_BDLORA,
    AS_ALORA,
    AS_BIAS,
    AS_B_BIAS,
    AS_TIED,
    AS_WHOLE,
    AS_COPY,
    AS_ROWS,
    AS_EMBEDDING,
    FORMS
};

static const struct {
    const char *name, *how;
} forms[FORMS] = {
    [AS_LORA] = {"LoRA", "y + scale B (A x) in f32, rounded once"},
    [AS_DORA] = {"DoRA", "g (W x + scale B (A x)); g = magnitude / norm of W + scale B A"},
    [AS_QALORA] = {"QA-LoRA",
                   "LoRA over means of groups of inputs; A is expanded when it is loaded"},
    [AS_BDLORA] = {"BD-LoRA", "LoRA with a factor of blocks, expanded when it is loaded"},
    [AS_ALORA] = {"aLoRA", "LoRA from the last invocation tokens on; the base before them"},
    [AS_BIAS] = {" + bias", "the adapter's bias in place of the base's"},
    [AS_B_BIAS] = {" + B bias", "the factor B has a bias (lora_bias)"},
    [AS_TIED] = {", tied", "the factors of the tied embedding, the other way round"},
    [AS_WHOLE] = {"whole", "in place of the base's"},
    [AS_COPY] = {"whole if changed", "in place of the base's, left out where it equals it"},
    [AS_ROWS] = {"rows", "of trainable tokens, in place of the base's"},
    [AS_EMBEDDING] = {"as embed_tokens", "what embed_tokens has, as the two are tied"},
};

/* The modules of an adapter, and what is found on the way. */
struct modules {
    json_t *rows, *ranks;
    bool uses[FORMS];
};

/* Add a form's name to `as`. */
static void add_form(struct modules *modules, char as[AS_BYTES], enum form form)
{
    const size_t n = strlen(as);
    modules->uses[form] = true;
    snprintf(as + n, AS_BYTES - n, "%s", forms[form].name);
}

static void name_linear(struct modules *modules, char as[AS_BYTES], const struct adapter_plan *plan,
                        const struct adapter_linear *linear, bool is_head)
{
    const bool blocks = linear->a_form == FORM_BLOCKS || linear->b_form == FORM_BLOCKS;

    as[0] = '\0';
    if (linear->rank > 0)
        add_form(modules, as,
                 linear->magnitude               ? AS_DORA
                 : linear->a_form == FORM_GROUPS ? AS_QALORA
                 : blocks                        ? AS_BDLORA
                 : plan->n_invocation > 0        ? AS_ALORA
                                                 : AS_LORA);
    if (linear->b_form == FORM_TRANSPOSED && is_head) add_form(modules, as, AS_TIED);
    if (linear->b_bias) add_form(modules, as, AS_B_BIAS);
    if (linear->bias) add_form(modules, as, AS_BIAS);
    if (linear->rank == 0) memmove(as, as + 3, strlen(as) - 2); /* "bias" alone */
}

/* A line for each form that is in the table. */
static void put_forms(struct description *object, const struct modules *modules)
{
    json_t *list = json_array();

    for (int f = 0; f < FORMS; f++) {
        const char *name = forms[f].name + strspn(forms[f].name, " ,+");
        if (modules->uses[f] &&
            json_array_append_new(list, json_sprintf("%s: %s", name, forms[f].how)) != 0)
            object->failed = true;
    }
    describe(object, "how", list);
}

/* ---- modules ------------------------------------------------------------------------------- */

static void put_linear(struct description *object, struct modules *modules,
                       const struct adapter_plan *plan, int i)
{
    static const char *const outside[] = {
        [LORA_EMBEDDING] = "embed_tokens", [LORA_HEAD] = "lm_head"};
    const struct adapter_linear *linear = &plan->linears[i];
    const int layer = i / LORA_LINEARS, index = i % LORA_LINEARS;
    char as[AS_BYTES];

    if (linear->rank == 0 && !linear->bias) return;
    struct description row = layer < plan->n_layers
                                 ? new_row(layer, linear_name((enum lora_linear)index))
                                 : new_row(LAYER_OUTSIDE, outside[index]);
    name_linear(modules, as, plan, linear, layer == plan->n_layers && index == LORA_HEAD);
    describe_text(&row, "as", as);
    describe_integer(&row, "rank", linear->rank);
    if (linear->rank > 0) {
        describe_number(&row, "alpha", linear->alpha);
        describe_number(&row, "scale", linear->scale);
        describe_text(&row, "dtype", dtype_name(linear->dtype));
        describe_once(object, modules->ranks, json_integer(linear->rank));
    }
    describe_integer(&row, "bytes", adapter_linear_bytes(plan, i));
    describe_integer(&row, "out", linear->out);
    if (linear->rank > 0) describe_integer(&row, "in", linear->in);
    add_row(object, modules->rows, &row);
}

/* A row for a tensor that stands in the place of one of the base. */
static void put_tensor(struct description *object, struct modules *modules, int layer,
                       const char *module, const struct tensor *tensor, enum form form)
{
    char dtype[sizeof tensor->dtype] = "", as[AS_BYTES] = "";
    if (!tensor) return;
    struct description row = new_row(layer, module);
    for (size_t i = 0; tensor->dtype[i]; i++) /* as dtype_name() writes it */
        dtype[i] = (char)tolower((unsigned char)tensor->dtype[i]);
    add_form(modules, as, form);
    describe_text(&row, "as", as);
    describe_text(&row, "dtype", dtype);
    describe_integer(&row, "bytes", tensor->bytes);
    describe_integer(&row, "out", tensor->shape[0]);
    add_row(object, modules->rows, &row);
}

static void put_whole(struct description *object, struct modules *modules,
                      const struct adapter_plan *plan)
{
    static const char *const norms[LORA_NORMS] = {[NORM_ATTENTION] = "input_layernorm",
                                                  [NORM_MLP] = "post_attention_layernorm",
                                                  [NORM_Q] = "self_attn.q_norm",
                                                  [NORM_K] = "self_attn.k_norm"};
    const int n_norms = plan->n_layers * LORA_NORMS;
    const bool tied = plan->head_has_embedding_rows;

    put_tensor(object, modules, LAYER_OUTSIDE, "embed_tokens", plan->embedding,
               plan->embedding_is_copy ? AS_COPY : AS_WHOLE);
    put_tensor(object, modules, LAYER_OUTSIDE, "embed_tokens", plan->embedding_rows.tensor,
               AS_ROWS);
    put_tensor(object, modules, LAYER_OUTSIDE, "lm_head", plan->head,
               plan->head == plan->embedding ? AS_EMBEDDING
               : plan->head_is_copy          ? AS_COPY
                                             : AS_WHOLE);
    put_tensor(object, modules, LAYER_OUTSIDE, "lm_head",
               tied ? plan->embedding_rows.tensor : plan->head_rows.tensor,
               tied ? AS_EMBEDDING : AS_ROWS);
    for (int i = 0; i < n_norms; i++)
        put_tensor(object, modules, i / LORA_NORMS, norms[i % LORA_NORMS], plan->norms[i],
                   AS_WHOLE);
    put_tensor(object, modules, LAYER_OUTSIDE, "norm", plan->norms[n_norms], AS_WHOLE);
}

/* A row for each module that the adapter changes. */
static void put_modules(struct description *object, const struct adapter_plan *plan)
{
    struct modules modules = {.rows = json_array(), .ranks = json_array()};

    for (int i = 0; i < (plan->n_layers + 1) * LORA_LINEARS; i++)
        put_linear(object, &modules, plan, i);
    put_whole(object, &modules, plan);
    describe(object, "ranks", modules.ranks);
    describe_integer(object, "n_modules", (int64_t)json_array_size(modules.rows));
    describe_integer(object, "device_bytes", plan->bytes);
    describe(object, "modules", modules.rows);
    put_forms(object, &modules);
}

/* The same of an adapter that is refused: what its tensors say by themselves. Scales would need
 * the configuration, which may be what is wrong. */
static mlora_status put_raw_modules(struct description *object, const struct safetensors *file)
{
    struct raw {
        const struct tensor *a, *b;
        const char *linear;
    } *modules = calloc((size_t)LAYERS_MAX * LORA_LINEARS, sizeof *modules);
    json_t *rows = json_array();
    mlora_status status = MLORA_OK;

    if (!modules) object->failed = true;
    for (int i = 0; i < file->n_tensors && status == MLORA_OK && modules; i++) {
        const struct tensor *tensor = &file->tensors[i];
        struct tensor_name name;

        status = tensor_name_parse(&name, tensor->name);
        if (status != MLORA_OK || (name.kind != TENSOR_A && name.kind != TENSOR_B) ||
            tensor->n_dims != 2 || name.layer < 0 || name.layer >= LAYERS_MAX)
            continue;
        struct raw *raw = &modules[name.layer * LORA_LINEARS + name.first_linear];
        *(name.kind == TENSOR_A ? &raw->a : &raw->b) = tensor;
        raw->linear = name.linear;
    }
    for (int i = 0; i < LAYERS_MAX * LORA_LINEARS && modules; i++) {
        const struct raw *raw = &modules[i];
        if (!raw->a || !raw->b) continue;
        struct description row = new_row(i / LORA_LINEARS, raw->linear);
        describe_integer(&row, "rank", raw->a->shape[0]);
        describe_text(&row, "dtype", raw->a->dtype);
        describe_integer(&row, "bytes", raw->a->bytes + raw->b->bytes);
        describe_integer(&row, "out", raw->b->shape[0]);
        describe_integer(&row, "in", raw->a->shape[1]);
        add_row(object, rows, &row);
    }
    describe_integer(object, "n_modules", (int64_t)json_array_size(rows));
    describe(object, "device_bytes", json_null());
    describe(object, "modules", rows);
    free(modules);
    return status;
}

/* ---- elsewhere ----------------------------------------------------------------------------- */

/* Engines that take this adapter and compute something else, as their code was in 2026. */
enum feature {
    USES_RSLORA,
    USES_RANKS,
    USES_ALPHAS,
    USES_DORA,
    USES_SAVED_MODULES,
    USES_SAVED_MATRICES, /* of those, embedding or head */
    FEATURES
};

static const struct {
    const char *engine, *because;
    enum feature feature;
} wrong[] = {
    {"vLLM", "rank_pattern", USES_RANKS},
    {"vLLM", "alpha_pattern", USES_ALPHAS},
    {"SGLang", "use_rslora", USES_RSLORA},
    {"SGLang", "rank_pattern", USES_RANKS},
    {"SGLang", "alpha_pattern", USES_ALPHAS},
    {"SGLang", "modules_to_save", USES_SAVED_MODULES},
    {"llama.cpp", "use_rslora", USES_RSLORA},
    {"llama.cpp", "alpha_pattern", USES_ALPHAS},
    {"llama.cpp", "modules_to_save", USES_SAVED_MATRICES},
    {"LoRAX, TGI", "rank_pattern", USES_RANKS},
    {"LoRAX, TGI", "alpha_pattern", USES_ALPHAS},
    {"LoRAX, TGI", "use_dora", USES_DORA},
    {"LoRAX, TGI", "modules_to_save", USES_SAVED_MODULES},
    {"Ollama", "use_rslora", USES_RSLORA},
    {"Ollama", "alpha_pattern", USES_ALPHAS},
    {"Ollama", "use_dora", USES_DORA},
    {"Ollama", "modules_to_save", USES_SAVED_MODULES},
};

static bool saves_matrix(const json_t *config)
{
    const json_t *saved = json_object_get(config, "modules_to_save");

    for (size_t i = 0; i < json_array_size(saved); i++) {
        const char *name = json_string_value(json_array_get(saved, i));
        if (name && (strstr(name, "embed_tokens") || strstr(name, "lm_head"))) return true;
    }
    return false;
}

/* Features that change the result of this adapter: a rank_pattern that gives every module the
 * rank of `r` is none. `plan` NULL: refused, so what the configuration says. */
static void find_features(bool uses[FEATURES], const json_t *config,
                          const struct adapter_plan *plan)
{
    const json_t *rank = json_object_get(config, "r"),
                 *alpha = json_object_get(config, "lora_alpha");
    const double r = rank ? json_number_value(rank) : 8;
    const double a = alpha ? json_number_value(alpha) : 8;

    uses[USES_RSLORA] = !plan && json_is_true(json_object_get(config, "use_rslora"));
    uses[USES_RANKS] = !plan && json_object_size(json_object_get(config, "rank_pattern")) > 0;
    uses[USES_ALPHAS] = !plan && json_object_size(json_object_get(config, "alpha_pattern")) > 0;
    uses[USES_DORA] = json_is_true(json_object_get(config, "use_dora"));
    uses[USES_SAVED_MODULES] = json_array_size(json_object_get(config, "modules_to_save")) > 0;
    uses[USES_SAVED_MATRICES] = saves_matrix(config);
    for (int i = 0; plan && i < (plan->n_layers + 1) * LORA_LINEARS; i++) {
        const struct adapter_linear *linear = &plan->linears[i];
        if (linear->rank == 0) continue;
        if (plan->rslora && linear->rank > 1) uses[USES_RSLORA] = true;
        if (linear->rank != r) uses[USES_RANKS] = true;
        if (linear->alpha != a) uses[USES_ALPHAS] = true;
    }
}

static void put_wrong_elsewhere(struct description *object, const json_t *config,
                                const struct adapter_plan *plan)
{
    bool uses[FEATURES] = {false};
    json_t *list = json_array();

    find_features(uses, config, plan);
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        if (uses[wrong[i].feature] &&
            json_array_append_new(list, json_pack("{ss ss}", "engine", wrong[i].engine, "because",
                                                  wrong[i].because)) != 0)
            object->failed = true;
    describe(object, "wrong_elsewhere", list);
}

/* ---- the whole ---------------------------------------------------------------------------- */

/* One string for each line. */
static void put_warnings(struct description *object, const char *text)
{
    json_t *list = json_array();

    for (const char *end; (end = strchr(text, '\n')); text = end + 1) {
        char *line = strndup(text, (size_t)(end - text));
        if (!line || json_array_append_new(list, description_text(line)) != 0)
            object->failed = true;
        free(line);
    }
    describe(object, "warnings", list);
}

/* What was found out about an adapter: a plan, or why there is none. */
struct verdict {
    struct adapter_plan plan; /* zeroes when refused */
    bool served;
    json_t *reason; /* why not, else null */
    json_t *fits;   /* true or false; null: not known */
    json_t *misfit; /* why it does not fit, else null */
};

/* Plan against the base if there is one; then without it, to tell an adapter that fits another
 * base from one that fits none. Only lack of memory or of the base is an error. */
static mlora_status judge(struct verdict *out, const char *dir, const char *model_dir)
{
    struct model_config base;
    mlora_status status;

    *out = (struct verdict){0};
    if (model_dir) {
        status = model_config_read(&base, model_dir);
        if (status != MLORA_OK) return status;
        status = adapter_plan_read(&out->plan, dir, &base, false);
        if (status == MLORA_ENOMEM) return status;
        out->served = status == MLORA_OK;
        if (!out->served) out->misfit = description_text(error_text());
    }
    if (!out->served) {
        status = adapter_plan_read(&out->plan, dir, NULL, false);
        if (status == MLORA_ENOMEM) return status;
        out->served = status == MLORA_OK;
        if (!out->served) out->reason = description_text(error_text());
    }
    if (model_dir && out->served) out->fits = json_boolean(!out->misfit);
    return MLORA_OK;
}

static void describe_or_null(struct description *object, const char *key, json_t **value)
{
    describe(object, key, *value ? *value : json_null());
    *value = NULL;
}

static mlora_status put_verdict(struct description *object, struct verdict *verdict,
                                const char *dir)
{
    struct safetensors file = {0};
    mlora_status status = MLORA_OK;
    const bool fits_or_unknown = !json_is_false(verdict->fits);

    describe_bool(object, "served", verdict->served);
    describe_or_null(object, "reason", &verdict->reason);
    describe_or_null(object, "fits", &verdict->fits);
    if (fits_or_unknown) {
        json_decref(verdict->misfit); /* a refused adapter's reason, said already */
        verdict->misfit = NULL;
    }
    describe_or_null(object, "fits_reason", &verdict->misfit);
    put_warnings(object, buffer_text(&verdict->plan.warnings));
    if (verdict->served) {
        put_modules(object, &verdict->plan);
        return MLORA_OK;
    }

    char *path = path_join(dir, "adapter_model.safetensors");
    if (!path) return error_set(MLORA_ENOMEM, "%s: out of memory for a path", dir);
    if (safetensors_open(&file, path) != MLORA_OK) file = (struct safetensors){0}; /* no rows */
    status = put_raw_modules(object, &file);
    safetensors_close(&file);
    free(path);
    return status;
}

/* {"kind": "adapter", "path", "peft_type", "base_model" (as the adapter names it), "rank",
 *  "alpha", "rslora", "served", "reason" (why not, or null), "fits": true | false | null (no base
 *  was given, or not served), "fits_reason", "warnings": [text], "ranks": [distinct],
 *  "n_modules", "device_bytes",
 *  "modules": [{"layer" (null: outside of them), "module": "self_attn.q_proj", "as" (how it is
 *  served, in short), "rank", "alpha", "scale", "dtype" (on the device), "bytes", "out", "in"}] in
 *  the order of the layers, each without what it has not,
 *  "how": [text, what each word in "as" means],
 *  "wrong_elsewhere": [{"engine", "because": field}]}
 * Of an adapter that is not served, dtype and bytes are those of the file, and alpha, scale,
 * ranks, "as" and "how" are left out. */
mlora_status inspect_adapter(struct description *object, const char *dir, const char *model_dir)
{
    struct verdict verdict = {0};
    json_t *config = NULL;

    mlora_status status = directory_json(&config, dir, "adapter_config.json");
    if (status != MLORA_OK) return status;
    status = judge(&verdict, dir, model_dir);
    if (status != MLORA_OK) goto done;

    describe_text(object, "kind", "adapter");
    describe_text(object, "path", dir);
    describe_text(object, "peft_type", json_string_value(json_object_get(config, "peft_type")));
    describe_text(object, "base_model",
                  json_string_value(json_object_get(config, "base_model_name_or_path")));
    put_setting(object, "rank", config, "r", 8);
    put_setting(object, "alpha", config, "lora_alpha", 8);
    describe_bool(object, "rslora", json_is_true(json_object_get(config, "use_rslora")));
    status = put_verdict(object, &verdict, dir);
    if (status != MLORA_OK) goto done;
    put_wrong_elsewhere(object, config, verdict.served ? &verdict.plan : NULL);

done:
    json_decref(verdict.reason);
    json_decref(verdict.fits);
    json_decref(verdict.misfit);
    adapter_plan_free(&verdict.plan);
    json_decref(config);
    return status;
}
