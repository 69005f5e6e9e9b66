/* The public functions: check arguments, then call the engine. */
#include "engine/mlora.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/engine.h"
#include "engine/inspect.h"
#include "engine/merge.h"
#include "kernels/profile.h"
#include "lora/random.h"
#include "tokenizer/chat.h"
#include "tokenizer/unicode.h"

enum { DEFAULT_MAX_TOKENS = 256 };

/* ---- status --------------------------------------------------------------------------------- */

const char *mlora_error(void)
{
    return error_text();
}

const char *mlora_status_name(mlora_status status)
{
    switch (status) {
    case MLORA_OK:
        return "OK";
    case MLORA_EINVAL:
        return "EINVAL";
    case MLORA_ENOMEM:
        return "ENOMEM";
    case MLORA_EIO:
        return "EIO";
    case MLORA_EFORMAT:
        return "EFORMAT";
    case MLORA_EUNSUPPORTED:
        return "EUNSUPPORTED";
    case MLORA_ENOTFOUND:
        return "ENOTFOUND";
    case MLORA_EDEVICE:
        return "EDEVICE";
    case MLORA_EBUSY:
        return "EBUSY";
    }
    return "unknown";
}

const char *mlora_version(void)
{
    return MLORA_VERSION;
}

static mlora_status null_argument(const char *function, const char *argument)
{
    return error_set(MLORA_EINVAL, "%s: %s is NULL", function, argument);
}

/* ---- engine --------------------------------------------------------------------------------- */

void mlora_options_default(mlora_options *options)
{
    if (options) *options = (mlora_options){0};
}

mlora_status mlora_open(mlora_engine **out, const mlora_options *options)
{
    if (!out) return null_argument("mlora_open", "out");
    *out = NULL;
    if (!options) return null_argument("mlora_open", "options");
    return engine_open(out, options);
}

mlora_status mlora_op_try(const mlora_op_source *op, mlora_backend backend)
{
    if (!op) return null_argument("mlora_op_try", "op");
    return engine_try_op(op, backend);
}

void mlora_close(mlora_engine *engine)
{
    engine_close(engine);
}

void mlora_engine_info(const mlora_engine *engine, mlora_info *out)
{
    *out = (mlora_info){
        .architecture = engine->config.architecture,
        .backend = engine->dev->backend,
        .device = engine->dev->description,
        .dtype = dtype_name(engine->model.dtype),
        .n_parameters = engine->weights.n_parameters,
        .weight_bytes = engine->weights.bytes,
        .kv_bytes = engine->kv_cache.bytes,
        .kv_bytes_per_token = kv_block_bytes(&engine->model) / KV_BLOCK,
        .n_layers = engine->config.n_layers,
        .vocab_size = engine->config.vocab_size,
        .max_model_len = engine->max_model_len,
        .max_num_seqs = engine->scheduler.max_running,
        .max_batch_tokens = engine->scheduler.max_batch_tokens,
        .kv_blocks = engine->kvcache.n_blocks,
        .max_queue = engine->max_queue,
        .adapter_bytes = engine->registry.pool.limit,
    };
}

void mlora_engine_stats(const mlora_engine *engine, mlora_stats *out)
{
    *out = engine->stats;
    out->n_preemptions = engine->scheduler.n_preemptions;
    out->n_drafted_tokens = engine->speculation.n_drafted;
    out->n_accepted_tokens = engine->speculation.n_accepted;
    out->n_running = engine->scheduler.n_running;
    out->n_waiting = engine->scheduler.fair.n_waiting;
    out->n_cached_tokens = engine->scheduler.n_found;
    out->n_missed_tokens = engine->scheduler.n_missed;
    out->n_free_kv_blocks = memory_free_blocks(&engine->memory);
    out->n_adapter_loads = engine->registry.n_loads;
    out->n_adapter_evictions = engine->registry.pool.n_evictions;
    out->n_adapter_waits = engine->scheduler.n_adapter_waits;
    out->adapter_bytes_used = engine->registry.pool.arena.used;
    out->adapter_host_bytes_used = engine->registry.host_bytes;
}

mlora_status mlora_engine_profile(mlora_engine *engine, char **json)
{
    int n_lines;

    if (!json) return null_argument("mlora_engine_profile", "json");
    *json = NULL;
    if (!engine) return null_argument("mlora_engine_profile", "engine");
    if (!engine->dev->profile)
        return error_set(MLORA_EINVAL,
                         "there is no profile: open the engine with option profile 1");

    const struct profile_line *lines = profile_lines(engine->dev, &n_lines);
    json_t *all = json_array();
    bool ok = all != NULL;
    for (int i = 0; i < n_lines && ok; i++) {
        const struct profile_line *line = &lines[i];
        json_t *launches = line->n_launches < 0 ? json_null() : json_integer(line->n_launches);
        json_t *item =
            json_pack("{s:s, s:s, s:I, s:o, s:f, s:f, s:f}", "op", line->op, "shape", line->shape,
                      "calls", (json_int_t)line->n_calls, "launches", launches, "seconds",
                      line->seconds, "bytes", line->bytes, "flops", line->flops);
        ok = json_array_append_new(all, item) == 0;
    }
    *json = ok ? json_dumps(all, JSON_COMPACT) : NULL;
    json_decref(all);
    if (!*json) return error_set(MLORA_ENOMEM, "out of memory: a profile");
    profile_start(engine->dev);
    return MLORA_OK;
}

mlora_status mlora_step(mlora_engine *engine, int *n_active)
{
    if (n_active) *n_active = 0;
    if (!engine) return null_argument("mlora_step", "engine");
    return engine_step(engine, n_active);
}

/* ---- adapters ------------------------------------------------------------------------------- */

/* List it under `name`, in the place of another with `replace`, or free it after a failure. */
static mlora_status add_adapter(mlora_engine *engine, const char *name, struct adapter *adapter,
                                struct source *source, bool replace)
{
    mlora_status status = workspace_fit_rank(&engine->workspace, engine->dev, adapter->max_rank);

    if (status == MLORA_OK)
        status = replace ? registry_replace(&engine->registry, name, adapter, source)
                         : registry_add(&engine->registry, name, adapter, source);
    adapter_free(adapter); /* empty if it was added */
    free(source->directory);
    return status;
}

/* Weights that an adapter was folded into are no base for another. */
static mlora_status check_unmerged(const mlora_engine *engine)
{
    if (!engine->merged) return MLORA_OK;
    return error_set(MLORA_EINVAL, "an adapter is merged into the weights (option merge), so no "
                                   "other can be loaded; open the model without merge");
}

/* An op from a file takes one set of norms for all tokens. */
static mlora_status check_norms(const mlora_engine *engine, const struct adapter_plan *plan,
                                const char *dir)
{
    const int n = plan->n_layers * LORA_NORMS + 1;

    for (int i = 0; i < n && !engine->dev->ops->lora_add_rms_norm; i++)
        if (plan->norms[i])
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: has norms of its own, and the op add_rms_norm is replaced by one "
                             "that cannot tell tokens apart: leave that op out",
                             dir);
    return MLORA_OK;
}

static mlora_status load_adapter(mlora_engine *engine, const char *dir, const char *name,
                                 bool replace)
{
    struct adapter_plan plan = {0};
    struct adapter adapter = {0};
    struct source source = {.directory = strdup(dir),
                            .lenient = engine->lenient,
                            .dtype = engine->lora_dtype,
                            .hash_key = engine->hash_key};

    mlora_status status = source.directory ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory");
    if (status == MLORA_OK) status = check_unmerged(engine);
    if (status == MLORA_OK) status = source_plan(&plan, &source, &engine->config);
    if (status == MLORA_OK) status = check_norms(engine, &plan, dir);
    if (status == MLORA_OK)
        status = adapter_load(&adapter, engine->dev, &plan, &engine->config, &engine->weights);
    adapter_plan_free(&plan);
    if (status == MLORA_OK) return add_adapter(engine, name, &adapter, &source, replace);
    free(source.directory);
    return status;
}

mlora_status mlora_adapter_load(mlora_engine *engine, const char *dir, const char *name)
{
    if (!engine) return null_argument("mlora_adapter_load", "engine");
    if (!dir) return null_argument("mlora_adapter_load", "dir");
    if (!name) return null_argument("mlora_adapter_load", "name");
    return load_adapter(engine, dir, name, false);
}

mlora_status mlora_adapter_replace(mlora_engine *engine, const char *dir, const char *name)
{
    if (!engine) return null_argument("mlora_adapter_replace", "engine");
    if (!dir) return null_argument("mlora_adapter_replace", "dir");
    if (!name) return null_argument("mlora_adapter_replace", "name");
    const mlora_status status = load_adapter(engine, dir, name, true);
    if (status == MLORA_OK) engine_sweep(engine);
    return status;
}

mlora_status mlora_adapter_random(mlora_engine *engine, const char *name, int rank, uint64_t seed)
{
    struct adapter adapter = {0};
    struct source source = {.seed = seed};

    if (!engine) return null_argument("mlora_adapter_random", "engine");
    if (!name) return null_argument("mlora_adapter_random", "name");
    if (rank < 1 || rank > LORA_RANK_MAX)
        return error_set(MLORA_EINVAL, "rank is %d, must be from 1 to %d", rank, LORA_RANK_MAX);
    mlora_status status = check_unmerged(engine);
    if (status == MLORA_OK) status = adapter_random(&adapter, &engine->config, rank, seed);
    return status == MLORA_OK ? add_adapter(engine, name, &adapter, &source, false) : status;
}

mlora_status mlora_adapter_unload(mlora_engine *engine, const char *name)
{
    if (!engine) return null_argument("mlora_adapter_unload", "engine");
    if (!name) return null_argument("mlora_adapter_unload", "name");

    const mlora_status status = registry_remove(&engine->registry, name);
    engine_sweep(engine);
    return status;
}

mlora_status mlora_adapter_pin(mlora_engine *engine, const char *name, int pin)
{
    if (!engine) return null_argument("mlora_adapter_pin", "engine");
    if (!name) return null_argument("mlora_adapter_pin", "name");
    /* It is brought, to where a step on its way may still write; what fails there the step tells. */
    if (pin) engine->dev->ops->sync(engine->dev);
    return registry_pin(&engine->registry, name, pin != 0);
}

mlora_status mlora_adapter_describe(const mlora_engine *engine, const char *name,
                                    mlora_adapter_info *out)
{
    if (!engine) return null_argument("mlora_adapter_describe", "engine");
    if (!name) return null_argument("mlora_adapter_describe", "name");
    if (!out) return null_argument("mlora_adapter_describe", "out");

    const struct registered *entry = registry_find(&engine->registry, name);
    if (!entry) return error_set(MLORA_ENOTFOUND, "no adapter \"%s\"", name);
    *out = (mlora_adapter_info){
        .max_rank = entry->adapter.max_rank,
        .bytes = entry->adapter.bytes,
        .content_hash = entry->adapter.content.word[0],
        .on_device = entry->resident.state == RESIDENT_HERE,
        .pinned = entry->resident.pinned,
        .n_requests = atomic_load(&entry->resident.users),
        .error = registry_failure(entry),
    };
    return MLORA_OK;
}

int mlora_adapter_count(const mlora_engine *engine)
{
    return registry_count(&engine->registry);
}

const char *mlora_adapter_name(const mlora_engine *engine, int index)
{
    const struct registered *entry = registry_at(&engine->registry, index);
    return entry ? entry->name : NULL;
}

const char *mlora_adapter_warnings(const mlora_engine *engine, const char *name)
{
    if (!name) return engine->merged;
    const struct registered *entry = registry_find(&engine->registry, name);
    if (!entry) return NULL;
    return entry->adapter.warnings ? entry->adapter.warnings : "";
}

/* ---- requests ------------------------------------------------------------------------------- */

void mlora_request_default(const mlora_engine *engine, mlora_request *request)
{
    *request = (mlora_request){
        .max_tokens = DEFAULT_MAX_TOKENS,
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
        .seed = -1,
        .n_logprobs = -1,
    };
    if (!engine || !engine->config.has_generation_config) return;

    const struct model_config *config = &engine->config;
    request->repetition_penalty = (float)config->repetition_penalty;
    if (config->max_new_tokens > 0) request->max_tokens = config->max_new_tokens;
    request->temperature = 0; /* as transformers: greedy unless do_sample is true */
    if (!config->do_sample) return;
    request->temperature = (float)config->temperature;
    request->top_k = config->top_k;
    request->top_p = (float)config->top_p;
    request->min_p = (float)config->min_p;
}

/* The prompt's ids: given, or encoded from text. */
static mlora_status prompt_ids(struct ids *out, const mlora_engine *engine,
                               const mlora_request *request)
{
    mlora_status status = MLORA_OK;

    if (request->ids) {
        for (int i = 0; i < request->n_ids && status == MLORA_OK; i++)
            status = ids_push(out, request->ids[i]);
        return status;
    }
    if (!request->prompt)
        return error_set(MLORA_EINVAL, "a request needs prompt or ids, both are NULL");
    const size_t bytes = request->prompt_bytes ? request->prompt_bytes : strlen(request->prompt);
    const int flags = (request->no_special ? ENCODE_NO_SPECIAL : 0) |
                      (request->no_parse_special ? ENCODE_NO_PARSE_SPECIAL : 0);
    return tokenizer_encode(engine->tokenizer, out, request->prompt, bytes, flags);
}

mlora_status mlora_submit(mlora_engine *engine, const mlora_request *from, uint64_t *id)
{
    struct ids prompt = {0};
    struct request *request = NULL;
    struct registered *adapter = NULL;

    if (!engine) return null_argument("mlora_submit", "engine");
    if (!from) return null_argument("mlora_submit", "request");

    if (from->adapter && from->adapter[0] && strcmp(from->adapter, "base") != 0) {
        if (engine->merged)
            return error_set(MLORA_ENOTFOUND,
                             "no adapter \"%.*s\": one is merged into the weights (option merge) "
                             "and answers the requests that name none; leave the name out",
                             64, from->adapter);
        const mlora_status status = registry_acquire(&engine->registry, from->adapter, &adapter);
        if (status != MLORA_OK) return status;
    }
    mlora_status status = prompt_ids(&prompt, engine, from);
    if (status == MLORA_OK)
        status = request_create(&request, from, &prompt, engine->tokenizer,
                                engine->config.vocab_size, engine->max_model_len);
    ids_free(&prompt);
    if (status != MLORA_OK) {
        if (adapter) registry_release(adapter);
        return status;
    }
    request->adapter = adapter;
    if (adapter) {
        request->adapter_from =
            adapter_first_position(&adapter->adapter, request->tokens, request->n_prompt);
        request->content = adapter->adapter.content;
        request->account_key =
            hash_bytes(engine->hash_key, adapter->name, strlen(adapter->name)).word[0];
    }
    uint64_t given = 0;
    status = engine_submit(engine, request, &given);
    if (status != MLORA_OK) engine_free_request(request);
    if (id && status == MLORA_OK) *id = given;
    return status;
}

void mlora_cancel(mlora_engine *engine, uint64_t id)
{
    if (engine && id != 0) engine_cancel(engine, id);
}

/* ---- tokenizer ------------------------------------------------------------------------------ */

/* The public handle is the internal one under another name. */
static const struct tokenizer *internal(const mlora_tokenizer *tokenizer)
{
    return (const struct tokenizer *)tokenizer;
}

mlora_status mlora_tokenizer_open(mlora_tokenizer **out, const char *path)
{
    struct tokenizer *tokenizer = NULL;

    if (!out) return null_argument("mlora_tokenizer_open", "out");
    *out = NULL;
    if (!path) return null_argument("mlora_tokenizer_open", "path");
    const mlora_status status = tokenizer_open(&tokenizer, path);
    *out = (mlora_tokenizer *)tokenizer;
    return status;
}

void mlora_tokenizer_close(mlora_tokenizer *tokenizer)
{
    tokenizer_close((struct tokenizer *)tokenizer);
}

const mlora_tokenizer *mlora_engine_tokenizer(const mlora_engine *engine)
{
    return (const mlora_tokenizer *)engine->tokenizer;
}

/* Hand `ids` over to the caller, or free them after a failure. */
static mlora_status give_ids(mlora_status status, struct ids *ids, int32_t **out, int *n_out)
{
    if (status != MLORA_OK) ids_free(ids);
    *out = ids->data;
    *n_out = ids->n;
    return status;
}

mlora_status mlora_encode(const mlora_tokenizer *tokenizer, const char *text, size_t text_bytes,
                          int flags, int32_t **ids, int *n_ids)
{
    struct ids encoded = {0};

    if (!tokenizer) return null_argument("mlora_encode", "tokenizer");
    if (!text && text_bytes > 0) return null_argument("mlora_encode", "text");
    return give_ids(
        tokenizer_encode(internal(tokenizer), &encoded, text ? text : "", text_bytes, flags),
        &encoded, ids, n_ids);
}

/* The same for text. */
static mlora_status give_text(mlora_status status, struct buffer *text, char **out,
                              size_t *out_bytes)
{
    if (status == MLORA_OK) status = buffer_reserve(text, 0); /* "" is text, too */
    if (status != MLORA_OK) buffer_free(text);
    *out = text->data;
    if (out_bytes) *out_bytes = text->bytes;
    return status;
}

mlora_status mlora_decode(const mlora_tokenizer *tokenizer, const int32_t *ids, int n_ids,
                          int flags, char **text, size_t *text_bytes)
{
    struct buffer decoded = {0};

    *text = NULL;
    if (!tokenizer) return null_argument("mlora_decode", "tokenizer");
    return give_text(tokenizer_decode(internal(tokenizer), &decoded, ids, n_ids,
                                      flags & MLORA_DECODE_KEEP_SPECIAL),
                     &decoded, text, text_bytes);
}

mlora_status mlora_token_text(const mlora_tokenizer *tokenizer, int32_t id, char **text,
                              size_t *text_bytes)
{
    struct buffer piece = {0}, shown = {0};

    *text = NULL;
    if (!tokenizer) return null_argument("mlora_token_text", "tokenizer");
    mlora_status status = tokenizer_piece(internal(tokenizer), &piece, id);
    if (status == MLORA_OK && piece.bytes > 0)
        status = utf8_append_lossy(&shown, piece.data, piece.bytes);
    else if (status == MLORA_OK) /* a special token, or none */
        status = tokenizer_decode(internal(tokenizer), &shown, &id, 1, true);
    buffer_free(&piece);
    return give_text(status, &shown, text, text_bytes);
}

int mlora_vocab_size(const mlora_tokenizer *tokenizer)
{
    return tokenizer ? tokenizer_vocab_size(internal(tokenizer)) : 0;
}

mlora_status mlora_chat_encode(const mlora_tokenizer *tokenizer, const mlora_message *messages,
                               int n_messages, int32_t **ids, int *n_ids, char **text)
{
    struct ids encoded = {0};
    struct buffer prompt = {0};
    struct chat_message *copies = NULL;

    *ids = NULL;
    *n_ids = 0;
    if (text) *text = NULL;
    if (!tokenizer) return null_argument("mlora_chat_encode", "tokenizer");
    if (!messages || n_messages < 1)
        return error_set(MLORA_EINVAL, "a chat needs at least one message, there are %d",
                         n_messages);
    copies = calloc((size_t)n_messages, sizeof *copies);
    if (!copies) return error_set(MLORA_ENOMEM, "out of memory: %d messages", n_messages);

    mlora_status status = MLORA_OK;
    for (int i = 0; i < n_messages && status == MLORA_OK; i++) {
        copies[i] = (struct chat_message){messages[i].role, messages[i].content};
        if (!copies[i].role || !copies[i].content)
            status = error_set(MLORA_EINVAL, "message %d has no %s", i + 1,
                               copies[i].role ? "content" : "role");
    }
    if (status == MLORA_OK)
        status =
            chat_encode(internal(tokenizer), &encoded, text ? &prompt : NULL, copies, n_messages);
    if (text) status = give_text(status, &prompt, text, NULL);
    free(copies);
    return give_ids(status, &encoded, ids, n_ids);
}

/* ---- looking at files ----------------------------------------------------------------------- */

mlora_status mlora_inspect(const char *dir, const char *model_dir, char **json)
{
    struct buffer text = {0};

    if (!json) return null_argument("mlora_inspect", "json");
    *json = NULL;
    if (!dir) return null_argument("mlora_inspect", "dir");
    const mlora_status status = inspect_directory(&text, dir, model_dir);
    if (status != MLORA_OK)
        buffer_free(&text);
    else
        *json = text.data;
    return status;
}

mlora_status mlora_merge(const char *model, const char *adapter, const char *output, int lenient,
                         char **warnings)
{
    char *lines = NULL;

    if (warnings) *warnings = NULL;
    if (!model) return null_argument("mlora_merge", "model");
    if (!adapter) return null_argument("mlora_merge", "adapter");
    if (!output) return null_argument("mlora_merge", "output");
    const mlora_status status = merge_directory(model, adapter, output, lenient != 0, &lines);
    if (warnings)
        *warnings = lines;
    else
        free(lines);
    return status;
}

void mlora_free(void *memory)
{
    free(memory);
}
