/* Opening and closing an engine: choose a device, read the model, size the memory. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/draft.h"
#include "engine/outputs.h"
#include "kernels/op_case.h"
#include "kernels/profile.h"
#include "lora/merge.h"

enum { DEFAULT_NUM_SEQS = 64, DEFAULT_BATCH_TOKENS = 512, DEFAULT_QUEUE = 16384 };
enum { MAX_MIB = 1 << 24 };
enum { MAX_NUM_SEQS = 4096, MAX_BATCH_TOKENS = 1 << 16, MAX_THREADS = 1024 };

static mlora_status check_option(const char *name, int value, int min, int max)
{
    if (value >= min && value <= max) return MLORA_OK;
    return error_set(MLORA_EINVAL, "option %s is %d, must be from %d to %d (0: default)", name,
                     value, min, max);
}

static mlora_status check_options(const mlora_options *o)
{
    if (!o->model || !o->model[0])
        return error_set(MLORA_EINVAL, "option model is missing: the directory of a model");

    const struct {
        const char *name;
        int value, max;
    } ranges[] = {
        {"backend", (int)o->backend, MLORA_BACKEND_CUDA},
        {"dtype", (int)o->dtype, MLORA_DTYPE_BF16},
        {"lora_mode", (int)o->lora_mode, MLORA_LORA_FUSED},
        {"lora_dtype", (int)o->lora_dtype, MLORA_DTYPE_BF16},
        {"n_threads", o->n_threads, MAX_THREADS},
        {"max_model_len", o->max_model_len, 1 << 24},
        {"max_num_seqs", o->max_num_seqs, MAX_NUM_SEQS},
        {"max_batch_tokens", o->max_batch_tokens, MAX_BATCH_TOKENS},
        {"kv_blocks", o->kv_blocks, 1 << 26},
        {"max_queue", o->max_queue, 1 << 24},
        {"speculate", (int)o->speculate, MLORA_SPECULATE_DRAFT},
        {"max_draft", o->max_draft, MAX_DRAFT},
        {"adapter_memory", o->adapter_memory, MAX_MIB},
        {"adapter_host_memory", o->adapter_host_memory, MAX_MIB},
        {"n_ops", o->n_ops, CUSTOM_KINDS},
        {"profile", o->profile, 2},
    };
    if (o->n_ops > 0 && !o->ops)
        return error_set(MLORA_EINVAL, "option n_ops is %d, ops is NULL", o->n_ops);
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        const mlora_status status = check_option(ranges[i].name, ranges[i].value, 0, ranges[i].max);
        if (status != MLORA_OK) return status;
    }
    if ((o->speculate == MLORA_SPECULATE_DRAFT) != (o->draft_model && o->draft_model[0]))
        return error_set(MLORA_EINVAL, o->draft_model
                                           ? "option draft_model needs speculate draft"
                                           : "option speculate draft needs draft_model: the "
                                             "directory of a smaller model");
    if (!(o->gpu_memory_utilization >= 0 && o->gpu_memory_utilization <= 1))
        return error_set(MLORA_EINVAL,
                         "option gpu_memory_utilization is %g, must be above 0 and at most 1 (0: "
                         "default)",
                         (double)o->gpu_memory_utilization);
    return MLORA_OK;
}

static mlora_status open_device(struct device **out, const mlora_options *options)
{
    if (options->backend != MLORA_BACKEND_CPU) {
        const mlora_status status = cuda_device_open(out, 0, options->cache_dir);
        if (status != MLORA_EUNSUPPORTED || options->backend == MLORA_BACKEND_CUDA) return status;
    }
    return cpu_device_open(out, options->n_threads);
}

mlora_status engine_try_op(const mlora_op_source *op, mlora_backend backend)
{
    const mlora_options options = {.backend = backend, .n_threads = 1};
    struct device *dev;

    mlora_status status = check_option("backend", (int)backend, 0, MLORA_BACKEND_CUDA);
    if (status == MLORA_OK) status = open_device(&dev, &options);
    return status == MLORA_OK ? op_case_try(dev, op) : status;
}

/* The end tokens of the model's files and of the tokenizer, each once. */
static mlora_status collect_eos(struct mlora_engine *engine)
{
    const int32_t own = tokenizer_eos(engine->tokenizer);

    engine->eos = malloc((EOS_MAX + 1) * sizeof *engine->eos);
    if (!engine->eos) return error_set(MLORA_ENOMEM, "out of memory: end tokens");
    memcpy(engine->eos, engine->config.eos, (size_t)engine->config.n_eos * sizeof *engine->eos);
    engine->n_eos = engine->config.n_eos;
    if (own < 0) return MLORA_OK;
    for (int i = 0; i < engine->n_eos; i++)
        if (engine->eos[i] == own) return MLORA_OK;
    engine->eos[engine->n_eos++] = own;
    return MLORA_OK;
}

/* What the weights leave for the KV cache and adapters. */
static int64_t memory_budget(const struct mlora_engine *engine, const mlora_options *options)
{
    const double utilization =
        options->gpu_memory_utilization > 0 ? (double)options->gpu_memory_utilization : 0.9;
    size_t free_bytes, total_bytes;

    engine->dev->ops->memory(engine->dev, &free_bytes, &total_bytes);
    if (strcmp(engine->dev->backend, "cpu") == 0) return (int64_t)(free_bytes / 2);
    const int64_t kept = (int64_t)((1.0 - utilization) * (double)total_bytes);
    return (int64_t)free_bytes > kept ? (int64_t)free_bytes - kept : 0;
}

/* How long a sequence may be, and so how many KV blocks are kept for one: what was asked for, or
 * what fits into half of the budget. `most` is what KV can use at most. */
static mlora_status size_kv(struct mlora_engine *engine, const mlora_options *options,
                            int max_num_seqs, int64_t budget, int64_t *most)
{
    const int limit = engine->config.max_position;
    const struct draft_model *draft = engine->speculation.draft;
    const int64_t blocks_max = kv_blocks_max(&engine->model);
    const int64_t per_block =
        kv_block_bytes(&engine->model) + (draft ? kv_block_bytes(&draft->model) : 0);

    if (options->max_model_len > limit)
        return error_set(MLORA_EINVAL,
                         "option max_model_len is %d, the model's "
                         "max_position_embeddings is %d",
                         options->max_model_len, limit);
    if (options->kv_blocks > blocks_max)
        return error_set(MLORA_EINVAL,
                         "option kv_blocks is %d, must be at most %lld for this model",
                         options->kv_blocks, (long long)blocks_max);
    const int longest = options->max_model_len ? options->max_model_len : limit;
    const int64_t one = kvcache_blocks_for(longest);
    const int64_t useful = one * max_num_seqs < blocks_max ? one * max_num_seqs : blocks_max;

    int64_t blocks = options->kv_blocks;
    if (blocks == 0) {
        const int64_t fit = budget / 2 / per_block;
        blocks = useful < fit ? useful : fit;
    }
    if (blocks < 1)
        return error_set(MLORA_ENOMEM,
                         "a KV block needs %lld bytes, half of the memory that the weights leave "
                         "is %lld",
                         (long long)per_block, (long long)(budget / 2));
    if (blocks < one && options->max_model_len)
        return error_set(MLORA_EINVAL,
                         "max_model_len %d needs %lld KV blocks of %d tokens, there "
                         "are %lld: lower max_model_len or raise kv_blocks",
                         longest, (long long)one, KV_BLOCK, (long long)blocks);

    engine->max_model_len = blocks < one ? (int)blocks * KV_BLOCK : longest;
    /* the blocks of a draft model are as many, and stay its own */
    *most = options->kv_blocks || draft ? blocks : useful;
    return MLORA_OK;
}

/* KV and adapters share what is left of the budget; where options say how much either gets, that is
 * as much as it gets. */
static mlora_status size_memory(struct mlora_engine *engine, const mlora_options *options,
                                int max_num_seqs, struct memory_plan *out)
{
    const int64_t mib = 1 << 20, block = kv_block_bytes(&engine->model);
    const struct draft_model *draft = engine->speculation.draft;
    int64_t budget = memory_budget(engine, options), most = 0;

    const mlora_status status = size_kv(engine, options, max_num_seqs, budget, &most);
    if (status != MLORA_OK) return status;
    if (draft) budget -= most * kv_block_bytes(&draft->model);
    const int64_t n_kept = kvcache_blocks_for(engine->max_model_len);
    int64_t adapters = options->adapter_memory * mib;
    if (adapters == 0) adapters = (budget - n_kept * block) / mib * mib;
    if (adapters < mib) adapters = mib;

    const int64_t least = (options->kv_blocks ? options->kv_blocks : n_kept) * block +
                          (options->adapter_memory ? adapters : mib);
    const int64_t all = most * block + adapters;
    if (budget < least) budget = least;
    *out = memory_plan(budget < all ? budget : all, block, (int)most, (int)n_kept, adapters);
    return MLORA_OK;
}

/* Memory for KV blocks and adapters, and who has which of it. */
static mlora_status open_memory(struct mlora_engine *engine, const mlora_options *options,
                                int max_num_seqs)
{
    const int64_t ram = (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE);
    const int64_t host =
        options->adapter_host_memory ? (int64_t)options->adapter_host_memory << 20 : ram / 4;
    struct memory_plan plan;

    mlora_status status = size_memory(engine, options, max_num_seqs, &plan);
    if (status != MLORA_OK) return status;
    status = kv_cache_open(&engine->kv_cache, &engine->model, plan.n_blocks, plan.adapter_bytes);
    if (status != MLORA_OK) return status;
    status =
        kvcache_open(&engine->kvcache, plan.n_blocks, !options->no_prefix_cache, engine->hash_key);
    if (status == MLORA_OK && engine->speculation.draft)
        status = draft_open(engine->speculation.draft, plan.n_blocks, max_num_seqs,
                            engine->max_model_len);
    if (status == MLORA_OK)
        status = registry_open(&engine->registry, engine->dev, &engine->config,
                               engine->kv_cache.memory, plan.adapter_bytes, host);
    if (status == MLORA_OK)
        memory_share(&engine->memory, &plan, engine->dev, &engine->kv_cache, &engine->kvcache,
                     &engine->scheduler, &engine->registry.pool);
    return status;
}

static struct hash_key fresh_key(void)
{
    struct hash_key key = {{0}};
    /* A kernel without it leaves a key that could be guessed, and nothing else: contents that were
     * made to collide are the one thing it guards against. */
    if (getrandom(&key, sizeof key, 0) != (ssize_t)sizeof key) key = (struct hash_key){{1, 2}};
    return key;
}

/* What guesses need before memory is shared out. */
static mlora_status open_speculation(struct mlora_engine *engine, const mlora_options *options,
                                     int max_num_seqs, int max_batch_tokens)
{
    struct speculation *speculation = &engine->speculation;
    const struct draft_options draft = {
        .directory = options->draft_model,
        .model = &engine->model,
        .tokenizer = engine->tokenizer,
        .random_weights = options->random_weights != 0,
        .max_tokens = max_batch_tokens,
        .registry = &engine->registry,
        .out = &engine->out,
        .host = &engine->pass.host,
    };

    mlora_status status = speculation_open(speculation, options, engine->dev->backend, max_num_seqs,
                                           max_batch_tokens);
    if (status != MLORA_OK || !speculation->draft) return status;
    status = draft_load(speculation->draft, &draft);
    speculation->pass_cost =
        (double)speculation->draft->weights.bytes / (double)engine->weights.bytes;
    return status;
}

mlora_status engine_open(struct mlora_engine **out, const mlora_options *options)
{
    struct mlora_engine *engine = NULL;

    *out = NULL;
    mlora_status status = check_options(options);
    if (status != MLORA_OK) return status;

    engine = calloc(1, sizeof *engine);
    if (!engine) return error_set(MLORA_ENOMEM, "out of memory: an engine");
    if (pthread_mutex_init(&engine->lock, NULL) != 0) {
        free(engine);
        return error_set(MLORA_ENOMEM, "out of memory: a lock");
    }
    engine->lenient = options->lenient != 0;
    engine->lora_dtype = options->lora_dtype;
    engine->max_queue = options->max_queue ? options->max_queue : DEFAULT_QUEUE;
    engine->hash_key = fresh_key();
    const int n_seqs = options->max_num_seqs ? options->max_num_seqs : DEFAULT_NUM_SEQS;
    int n_tokens = options->max_batch_tokens ? options->max_batch_tokens : DEFAULT_BATCH_TOKENS;
    if (n_tokens < n_seqs && options->max_batch_tokens) {
        status = error_set(MLORA_EINVAL,
                           "option max_batch_tokens is %d, must be at least "
                           "max_num_seqs, %d",
                           n_tokens, n_seqs);
        goto failed;
    }
    if (n_tokens < n_seqs) n_tokens = n_seqs;

    /* Cheap checks of files first: a wrong path fails before anything large is read. */
    status = model_config_read(&engine->config, options->model);
    if (status != MLORA_OK) goto failed;
    status = tokenizer_open(&engine->tokenizer,
                            options->tokenizer ? options->tokenizer : options->model);
    if (status != MLORA_OK) goto failed;
    status = collect_eos(engine);
    if (status != MLORA_OK) goto failed;

    status = open_device(&engine->dev, options);
    if (status != MLORA_OK) goto failed;
    status = custom_open(engine->dev, options->ops, options->n_ops);
    if (status != MLORA_OK) goto failed;
    if (options->profile) status = profile_open(engine->dev, options->profile == 2);
    if (status != MLORA_OK) goto failed;
    status = options->random_weights
                 ? weights_random(&engine->weights, engine->dev, &engine->config)
                 : weights_load(&engine->weights, engine->dev, options->model, &engine->config,
                                options->on_progress, options->user);
    if (status != MLORA_OK) goto failed;
    if (options->merge) {
        status = merge_adapter(&engine->weights, engine->dev, &engine->config, options->merge,
                               engine->lenient, &engine->merged);
        if (status != MLORA_OK) goto failed;
    }

    const bool cuda = strcmp(engine->dev->backend, "cuda") == 0;
    const bool bf16 =
        options->dtype == MLORA_DTYPE_BF16 || (options->dtype == MLORA_DTYPE_AUTO && cuda);
    engine->model = (struct model){
        .dev = engine->dev,
        .config = &engine->config,
        .weights = &engine->weights,
        .dtype = bf16 ? DTYPE_BF16 : DTYPE_F32,
    };
    status = workspace_open(&engine->workspace, &engine->model, n_tokens);
    if (status != MLORA_OK) goto failed;
    status = open_speculation(engine, options, n_seqs, n_tokens);
    if (status != MLORA_OK) goto failed;
    const int n_draws = speculation_max_draws(&engine->speculation, n_seqs);
    status = outputs_open(engine, n_draws);
    if (status != MLORA_OK) goto failed;
    status = open_memory(engine, options, n_seqs);
    if (status != MLORA_OK) goto failed;
    status = scheduler_open(&engine->scheduler, n_seqs, n_tokens);
    if (status != MLORA_OK) goto failed;
    status =
        batch_open(&engine->batch, engine->dev, n_tokens, n_seqs, n_draws, engine->max_model_len);
    if (status != MLORA_OK) goto failed;
    engine->batch.lora_mode = options->lora_mode;
    engine->batch.kv_stride = engine->kv_cache.stride;
    engine->batch.drawn = engine->out.ids;
    engine->plans_ahead = cuda;
    status = engine->dev->ops->sync(engine->dev);
    if (status != MLORA_OK) goto failed;

    *out = engine;
    return MLORA_OK;

failed:
    engine_close(engine);
    return status;
}

void engine_free_request(struct request *request)
{
    if (!request) return;
    if (request->adapter) registry_release(request->adapter);
    request_free(request);
}

/* Requests that end with the engine. */
static void free_requests(struct mlora_engine *engine)
{
    struct request *request;

    while ((request = engine->first_submitted) != NULL) {
        engine->first_submitted = request->next;
        engine_free_request(request);
    }
    while ((request = scheduler_any(&engine->scheduler)) != NULL) {
        scheduler_remove(&engine->scheduler, request, &engine->kvcache);
        engine_free_request(request);
    }
}

void engine_close(struct mlora_engine *engine)
{
    if (!engine) return;
    free_requests(engine);
    if (engine->dev) {
        speculation_close(&engine->speculation);
        batch_close(&engine->batch);
        registry_close(&engine->registry);
        kv_cache_close(&engine->kv_cache, engine->dev);
        outputs_close(engine);
        workspace_close(&engine->workspace, engine->dev);
        weights_free(&engine->weights, engine->dev);
        engine->dev->ops->close(engine->dev);
    }
    scheduler_close(&engine->scheduler);
    kvcache_close(&engine->kvcache);
    tokenizer_close(engine->tokenizer);
    pthread_mutex_destroy(&engine->lock);
    free(engine->cancelled);
    free(engine->eos);
    free(engine->merged);
    free(engine);
}
