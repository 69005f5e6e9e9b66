#include "tools/setup.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "tools/child.h"
#include "tools/io.h"
#include "tools/shape.h"
#include "tools/text.h"

/* ---- flags -------------------------------------------------------------------------------- */

static mlora_status add_source(struct setup *setup, const char *item, size_t bytes)
{
    struct adapter_source source = {0};
    char *text = strndup(item, bytes);
    struct adapter_source *sources =
        realloc(setup->sources, ((size_t)setup->n_sources + 1) * sizeof *sources);

    if (sources) setup->sources = sources;
    if (!text || !sources) {
        free(text);
        return error_set(MLORA_ENOMEM, "out of memory");
    }
    const char *equals = file_is_directory(text) ? NULL : strchr(text, '=');
    if (equals) {
        source.name = strndup(text, (size_t)(equals - text));
        source.path = strdup(equals + 1);
        free(text);
    } else {
        source.path = text;
    }
    setup->sources[setup->n_sources++] = source;
    if (!source.path || (equals && !source.name)) return error_set(MLORA_ENOMEM, "out of memory");
    return MLORA_OK;
}

static mlora_status add_adapters(void *target, const char *text)
{
    for (;;) {
        const size_t bytes = strcspn(text, ",");
        const mlora_status status = bytes ? add_source(target, text, bytes) : MLORA_OK;
        if (status != MLORA_OK || !text[bytes]) return status;
        text += bytes + 1;
    }
}

static mlora_status add_op(void *target, const char *text)
{
    struct setup *setup = target;
    const char *equals = strchr(text, '=');
    mlora_op_source *ops = realloc(setup->ops, ((size_t)setup->n_ops + 1) * sizeof *ops);

    if (!ops) return error_set(MLORA_ENOMEM, "out of memory");
    setup->ops = ops;
    ops[setup->n_ops++] = (mlora_op_source){
        .name = equals ? strndup(text, (size_t)(equals - text)) : NULL,
        .path = strdup(equals ? equals + 1 : text),
    };
    const mlora_op_source *added = &ops[setup->n_ops - 1];
    if (!added->path || (equals && !added->name)) return error_set(MLORA_ENOMEM, "out of memory");
    if (!added->path[0] || (added->name && !added->name[0]))
        return error_set(MLORA_EINVAL, "\"%s\" names no file or no op: OP=FILE is needed", text);
    return MLORA_OK;
}

/* clang-format off */
#define AT(member) .offset = offsetof(struct setup, member)
const struct option_spec setup_specs[] = {
    {.name = "model", .letter = 'm', .kind = OPTION_TEXT, AT(model), .argument = "DIR",
     .help = "the base model: a directory in Hugging Face layout"},
    {.name = "adapters", .aliases = {"lora-modules", "adapter-dir"}, .kind = OPTION_EACH,
     .each = add_adapters, .argument = "NAME=DIR,...",
     .help = "LoRA adapters to load, or a folder whose sub-folders are adapters; repeatable"},
    {.name = "merge", .kind = OPTION_TEXT, AT(merge), .argument = "NAME",
     .help = "fold this one of --adapters, or the adapter in this directory, into the weights: "
             "then it answers in the place of base, and no other is loaded"},
    {.name = "load-format", .kind = OPTION_CHOICE, AT(load_format), .choices = "auto|dummy",
     .help = "dummy: random weights, for measuring speed; only config.json and the tokenizer "
             "are read", .fallback = "auto"},
    {.name = "config", .kind = OPTION_TEXT, AT(config), .argument = "NAME|FILE",
     .help = "the shape of dummy weights: llama-2-7b, llama-3.1-8b, llama-3.1-70b, llama-3.2-1b, "
             "llama-3.2-3b, tinyllama, or a config.json", .fallback = "the model's"},
    {.name = "tokenizer", .kind = OPTION_TEXT, AT(tokenizer), .argument = "FILE",
     .help = "tokenizer.json or tokenizer.model", .fallback = "the model's own"},
    {.name = "backend", .kind = OPTION_CHOICE, AT(backend), .choices = "auto|cpu|cuda",
     .help = "where to compute", .fallback = "cuda if there is one"},
    {.name = "dtype", .kind = OPTION_CHOICE, AT(dtype), .choices = "auto|f32|bf16",
     .help = "of activations and KV cache", .fallback = "f32 on the CPU, bf16 on a GPU"},
    {.name = "mode", .kind = OPTION_CHOICE, AT(lora_mode),
     .choices = "auto|loop|gbmm|bgmv|sgmv|fused",
     .help = "how a GPU makes the adapters' products; the CPU has one way",
     .fallback = "the fastest for each step"},
    {.name = "lora-dtype", .kind = OPTION_CHOICE, AT(lora_dtype), .choices = "auto|f32|bf16",
     .help = "of adapters; bf16 rounds f32 and f16 ones, as other engines do, for less memory and "
             "more speed", .fallback = "as stored, for what PEFT gives"},
    {.name = "threads", .letter = 't', .kind = OPTION_INT, AT(n_threads), .argument = "N",
     .min = 1, .max = 4096, .help = "worker threads of the CPU backend",
     .fallback = "one per core"},
    {.name = "max-model-len", .letter = 'c', .aliases = {"ctx-size"}, .kind = OPTION_INT,
     AT(max_model_len), .argument = "N", .min = 1, .max = INT_MAX,
     .help = "tokens of one sequence, prompt and answer", .fallback = "the model's limit"},
    {.name = "max-num-seqs", .kind = OPTION_INT, AT(max_num_seqs), .argument = "N", .min = 1,
     .max = 65536, .help = "requests that run at the same time; more wait", .fallback = "64"},
    {.name = "max-batch-tokens", .kind = OPTION_INT, AT(max_batch_tokens), .argument = "N",
     .min = 1, .max = 1 << 20, .help = "tokens of one step", .fallback = "512"},
    {.name = "kv-blocks", .kind = OPTION_INT, AT(kv_blocks), .argument = "N", .min = 1,
     .max = INT_MAX, .help = "KV cache, at most, in blocks of 16 tokens",
     .fallback = "what the requests can use"},
    {.name = "max-queue", .kind = OPTION_INT, AT(max_queue), .argument = "N", .min = 1,
     .max = 1 << 24, .help = "requests that may wait beside those that run",
     .fallback = "16384"},
    {.name = "no-prefix-cache", .kind = OPTION_FLAG, AT(no_prefix_cache),
     .help = "compute every prompt from its first token, also where one began alike before"},
    {.name = "speculate", .kind = OPTION_CHOICE, AT(speculate), .choices = "off|ngram|draft",
     .help = "guess next tokens and compute them together, for the same output in fewer steps: "
             "what followed the last ones before, or what a draft model says",
     .fallback = "off"},
    {.name = "draft-model", .kind = OPTION_TEXT, AT(draft_model), .argument = "DIR",
     .help = "of --speculate draft: a smaller model with the same vocabulary"},
    {.name = "max-draft", .kind = OPTION_INT, AT(max_draft), .argument = "N", .min = 1,
     .max = 32, .help = "tokens that are guessed at once", .fallback = "8"},
    {.name = "gpu-memory-utilization", .kind = OPTION_NUMBER, AT(gpu_memory_utilization),
     .argument = "P", .min = 0, .max = 1, .above_min = true,
     .help = "part of the GPU's memory that may be used; what the weights leave of it serves KV "
             "cache and adapters, whichever is short", .fallback = "0.9"},
    {.name = "adapter-memory", .kind = OPTION_INT, AT(adapter_memory), .argument = "MIB", .min = 1,
     .max = 1 << 24, .help = "of the device for adapters, at most; those in use are there",
     .fallback = "what requests do not need"},
    {.name = "adapter-host-memory", .kind = OPTION_INT, AT(adapter_host_memory), .argument = "MIB",
     .min = 1, .max = 1 << 24, .help = "of the host for adapters; others are read again",
     .fallback = "a quarter of it"},
    {.name = "op", .kind = OPTION_EACH, .each = add_op, .argument = "OP=FILE",
     .help = "a shared object in the place of silu_mul, add_rms_norm, matmul, rope, lora_shrink or "
             "lora_expand (see kernels/mlora_op.h); repeatable"},
    {.name = "lenient", .kind = OPTION_FLAG, AT(lenient),
     .help = "leave out adapter tensors that fit nothing, with a warning"},
    {.name = "quiet", .letter = 'q', .kind = OPTION_FLAG, AT(quiet),
     .help = "nothing on stderr but errors"},
    {.name = NULL},
};
/* clang-format on */

void setup_free(struct setup *setup)
{
    for (int i = 0; i < setup->n_sources; i++) {
        free(setup->sources[i].name);
        free(setup->sources[i].path);
    }
    for (int i = 0; i < setup->n_ops; i++) {
        free((char *)(uintptr_t)setup->ops[i].name);
        free((char *)(uintptr_t)setup->ops[i].path);
    }
    free(setup->sources);
    free(setup->ops);
    *setup = (struct setup){0};
}

/* ---- opening ------------------------------------------------------------------------------ */

static void show_progress(void *user, int64_t done, int64_t total)
{
    enum { WIDTH = 30 };
    const int filled = total > 0 ? (int)(WIDTH * (double)done / (double)total) : WIDTH;
    char now[HUMAN_BYTES], all[HUMAN_BYTES];

    fprintf(stderr, "\rloading %s [%.*s%*s] %s of %s\033[K", (const char *)user, filled,
            "##############################", WIDTH - filled, "", human_bytes(now, done),
            human_bytes(all, total));
    fflush(stderr);
}

struct trial {
    const mlora_op_source *op;
    mlora_backend backend;
};

static mlora_status try_op(void *context)
{
    const struct trial *trial = context;
    return mlora_op_try(trial->op, trial->backend);
}

mlora_status setup_try_ops(struct setup *setup)
{
    enum { LIMIT_S = 60 };
    mlora_status status = MLORA_OK;

    for (int i = 0; i < setup->n_ops && status == MLORA_OK; i++) {
        struct trial trial = {&setup->ops[i], (mlora_backend)setup->backend};
        status = child_run(trial.op->path, LIMIT_S, try_op, &trial);
    }
    setup->ops_tried = true;
    return status;
}

/* The last component of a path. */
static char *folder_name(const char *path)
{
    size_t end = strlen(path);

    while (end > 1 && path[end - 1] == '/') end--;
    size_t begin = end;
    while (begin > 0 && path[begin - 1] != '/') begin--;
    return strndup(path + begin, end - begin);
}

static mlora_status load(mlora_engine *engine, const struct setup *setup, const char *path,
                         const char *name)
{
    const mlora_status status = mlora_adapter_load(engine, path, name);

    if (status != MLORA_OK) return error_prefix(status, "adapter %s", name);
    if (setup->quiet) return status;
    print_warnings(name, mlora_adapter_warnings(engine, name));
    return status;
}

static bool holds_adapter(const char *path)
{
    char *config = path_join(path, "adapter_config.json");
    const bool yes = config && file_exists(config);

    free(config);
    return yes;
}

static int visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* Load each sub-folder that is an adapter; one that is refused is left out. */
static mlora_status load_folder(mlora_engine *engine, const struct setup *setup, const char *path)
{
    struct dirent **entries = NULL;
    const int n = scandir(path, &entries, visible, alphasort);
    mlora_status status = MLORA_OK;
    int n_adapters = 0;

    if (n < 0)
        return error_set(MLORA_EIO, "%s: %s; NAME=DIR or a folder of adapters is needed", path,
                         strerror(errno));
    for (int i = 0; i < n && status == MLORA_OK; i++) {
        char *sub = path_join(path, entries[i]->d_name);
        if (!sub) status = error_set(MLORA_ENOMEM, "out of memory for the path of an adapter");
        if (sub && holds_adapter(sub)) {
            n_adapters++;
            status = load(engine, setup, sub, entries[i]->d_name);
            if (status != MLORA_OK && status != MLORA_ENOMEM && status != MLORA_EDEVICE) {
                if (!setup->quiet) fprintf(stderr, "mlora: warning: left out: %s\n", mlora_error());
                status = MLORA_OK;
            }
        }
        free(sub);
    }
    for (int i = 0; i < n; i++) free(entries[i]);
    free(entries);
    if (status == MLORA_OK && n_adapters == 0)
        return error_set(MLORA_EINVAL,
                         "%s: no sub-folder holds adapter_config.json; "
                         "NAME=DIR or a folder of adapters is needed",
                         path);
    return status;
}

static mlora_status load_source(mlora_engine *engine, const struct setup *setup,
                                const struct adapter_source *source)
{
    if (source->name) return load(engine, setup, source->path, source->name);
    if (!holds_adapter(source->path)) return load_folder(engine, setup, source->path);

    char *name = folder_name(source->path);
    if (!name) return error_set(MLORA_ENOMEM, "out of memory for the name of an adapter");
    const mlora_status status = load(engine, setup, source->path, name);
    free(name);
    return status;
}

/* The directory of the adapter to merge: NAME of a NAME=DIR, or a directory itself. */
static mlora_status find_merge(const char **out, const struct setup *setup)
{
    *out = NULL;
    if (!setup->merge) return MLORA_OK;
    for (int i = 0; i < setup->n_sources; i++) {
        const char *name = setup->sources[i].name;
        if (name && strcmp(name, setup->merge) == 0) *out = setup->sources[i].path;
    }
    if (!*out && holds_adapter(setup->merge)) *out = setup->merge;
    if (*out) return MLORA_OK;
    return error_set(MLORA_EINVAL,
                     "--merge %s: is neither a name in --adapters NAME=DIR nor a directory with "
                     "adapter_config.json",
                     setup->merge);
}

/* $XDG_CACHE_HOME/mlora or ~/.cache/mlora, freed by the caller; NULL: nothing is kept. */
static char *cache_folder(void)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char *parent = NULL;

    if (cache && cache[0] == '/')
        parent = strdup(cache);
    else if (home && home[0] == '/')
        parent = path_join(home, ".cache");
    if (!parent) return NULL;
    mkdir(parent, 0700); /* mostly it is there */
    char *folder = path_join(parent, "mlora");
    free(parent);
    return folder;
}

/* The model's folder and tokenizer: as given, or those of a shape, which `*folder` and `*tokenizer`
 * then own. */
static mlora_status choose_model(mlora_options *options, char **folder, char **tokenizer,
                                 const struct setup *setup)
{
    options->model = setup->model;
    options->tokenizer = setup->tokenizer;
    options->random_weights = setup->load_format == LOAD_DUMMY;
    if (setup->config && setup->load_format != LOAD_DUMMY)
        return error_set(MLORA_EINVAL, "--config is the shape of random weights: give "
                                       "--load-format dummy with it, or --model DIR instead");
    if (setup->config && setup->model)
        return error_set(MLORA_EINVAL, "--config and --model both say what the model is: give one");
    if (setup->config) {
        const mlora_status status = shape_find(folder, tokenizer, setup->config);
        if (status != MLORA_OK) return status;
        options->model = *folder;
        if (!options->tokenizer) options->tokenizer = *tokenizer;
    }
    if (options->model) return MLORA_OK;
    return error_set(MLORA_EINVAL, "no model: give --model DIR, a directory with config.json, the "
                                   "weights and the tokenizer, or --load-format dummy --config "
                                   "NAME for random weights of that shape");
}

mlora_status setup_folder(char **out, const struct setup *setup)
{
    mlora_options options = {0};
    struct setup shape = *setup;
    char *folder = NULL, *tokenizer = NULL;

    *out = NULL;
    if (setup->config) shape.load_format = LOAD_DUMMY; /* no weights are read here */
    mlora_status status = choose_model(&options, &folder, &tokenizer, &shape);
    if (status == MLORA_OK) *out = folder ? folder : strdup(options.model);
    if (status == MLORA_OK && !*out) status = error_set(MLORA_ENOMEM, "out of memory for a path");
    free(tokenizer);
    return status;
}

/* Say which of --adapters are left out because another is in the weights. */
static void warn_unloaded(const struct setup *setup)
{
    int n = 0;

    for (int i = 0; i < setup->n_sources; i++) {
        const struct adapter_source *source = &setup->sources[i];
        const char *name = source->name ? source->name : source->path;
        if (strcmp(name, setup->merge) == 0) continue;
        if (n++ == 0)
            fprintf(stderr,
                    "mlora: warning: --merge %s: an adapter in the weights leaves room for no "
                    "other; not loaded: ",
                    setup->merge);
        fprintf(stderr, "%s%s", n > 1 ? ", " : "", name);
    }
    if (n > 0) fputc('\n', stderr);
}

mlora_status setup_open(mlora_engine **out, struct setup *setup)
{
    mlora_options options;
    char *folder = NULL, *tokenizer = NULL;

    *out = NULL;
    mlora_options_default(&options);
    mlora_status status = find_merge(&options.merge, setup);
    if (status == MLORA_OK && !setup->ops_tried) status = setup_try_ops(setup);
    if (status == MLORA_OK) status = choose_model(&options, &folder, &tokenizer, setup);
    if (status != MLORA_OK) return status;
    options.ops = setup->ops;
    options.n_ops = setup->n_ops;
    options.backend = (mlora_backend)setup->backend;
    options.dtype = (mlora_dtype)setup->dtype;
    options.lora_mode = (mlora_lora_mode)setup->lora_mode;
    options.lora_dtype = (mlora_dtype)setup->lora_dtype;
    options.n_threads = (int)setup->n_threads;
    options.max_model_len = (int)setup->max_model_len;
    options.max_num_seqs = (int)setup->max_num_seqs;
    options.max_batch_tokens = (int)setup->max_batch_tokens;
    options.kv_blocks = (int)setup->kv_blocks;
    options.max_queue = (int)setup->max_queue;
    options.no_prefix_cache = setup->no_prefix_cache;
    options.speculate = (mlora_speculate)setup->speculate;
    options.draft_model = setup->draft_model;
    options.max_draft = (int)setup->max_draft;
    options.gpu_memory_utilization = (float)setup->gpu_memory_utilization;
    options.adapter_memory = (int)setup->adapter_memory;
    options.adapter_host_memory = (int)setup->adapter_host_memory;
    options.lenient = setup->lenient;
    options.profile = setup->profile;
    char *cache = cache_folder();
    options.cache_dir = cache;
    const bool bar = isatty(STDERR_FILENO) && !setup->quiet;
    char *name = folder_name(options.model);
    options.user = name ? name : (void *)"model";
    if (bar) options.on_progress = show_progress;

    status = mlora_open(out, &options);
    if (bar) fprintf(stderr, "\r\033[K");
    free(name);
    free(cache);
    free(folder);
    free(tokenizer);
    if (status == MLORA_OK && setup->merge && !setup->quiet) {
        print_warnings(setup->merge, mlora_adapter_warnings(*out, NULL));
        warn_unloaded(setup);
    }
    for (int i = 0; i < setup->n_sources && status == MLORA_OK && !setup->merge; i++)
        status = load_source(*out, setup, &setup->sources[i]);
    return status;
}
