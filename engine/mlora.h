/* mlora: one Llama base model in memory, many LoRA adapters, and every request in a batch names
 * its own.
 *
 *     static void on_event(void *user, const mlora_event *event)
 *     {
 *         fwrite(event->text, 1, event->text_bytes, stdout);
 *     }
 *
 *     mlora_options options;
 *     mlora_options_default(&options);
 *     options.model = "Llama-3.1-8B";
 *     mlora_engine *engine;
 *     if (mlora_open(&engine, &options) != MLORA_OK) return fail(mlora_error());
 *     mlora_adapter_load(engine, "adapters/sql", "sql");
 *
 *     mlora_request request;
 *     mlora_request_default(engine, &request);
 *     request.adapter = "sql";
 *     request.prompt = "How many owls live near the bridge?\n";
 *     request.on_event = on_event;
 *     mlora_submit(engine, &request, NULL);
 *     for (int n_active = 1; n_active > 0;)
 *         if (mlora_step(engine, &n_active) != MLORA_OK) return fail(mlora_error());
 *     mlora_close(engine);
 *
 * Threads: one thread at a time calls the functions of an engine ("the engine's thread"); where
 * a function may be called from any thread at any time, it says so. Different engines are
 * independent. The library starts no thread but the CPU backend's workers and the loader of
 * adapters, prints nothing, never exits, installs no signal handler and reads no environment
 * variable.
 *
 * Strings are UTF-8 and end with NUL unless a byte count is beside them. What a caller passes in
 * is copied before the call returns, unless "borrowed" is said. */
#ifndef MLORA_H
#define MLORA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MLORA_API __attribute__((visibility("default")))
#else
#define MLORA_API
#endif

/* ---- status ------------------------------------------------------------------------------- */

/* Every call that can fail returns one of these. Zero is success, errors are negative. */
typedef enum mlora_status {
    MLORA_OK = 0,
    MLORA_EINVAL = -1,       /* the caller broke a rule written in this header                */
    MLORA_ENOMEM = -2,       /* host or device memory ran out                                 */
    MLORA_EIO = -3,          /* a file could not be opened or read                            */
    MLORA_EFORMAT = -4,      /* a file was read, but is not what it claims to be              */
    MLORA_EUNSUPPORTED = -5, /* valid, but mlora does not serve it; the text says what to do  */
    MLORA_ENOTFOUND = -6,    /* no adapter of that name; the text has the nearest names       */
    MLORA_EDEVICE = -7,      /* the device failed; the engine can only be closed              */
    MLORA_EBUSY = -8         /* the queue of requests is full: try again later                */
} mlora_status;

/* What failed last on this thread, in one line without a newline, for example
 * "adapters/sql/adapter_config.json: layer_replication is set: ...". Never NULL. The library owns the
 * text; it is valid until the next mlora_ call on the same thread. Thread: any. */
MLORA_API const char *mlora_error(void);

/* The short name of a status, such as "EFORMAT"; static. Thread: any. */
MLORA_API const char *mlora_status_name(mlora_status status);

/* The library's version, such as "0.1.0"; static. Thread: any. */
MLORA_API const char *mlora_version(void);

/* ---- engine ------------------------------------------------------------------------------- */

typedef struct mlora_engine mlora_engine;

typedef enum mlora_backend {
    MLORA_BACKEND_AUTO = 0, /* CUDA where it was built in and there is a GPU, else CPU */
    MLORA_BACKEND_CPU = 1,
    MLORA_BACKEND_CUDA = 2
} mlora_backend;

/* A type of numbers: that of activations and of the KV cache, or of adapters' factors. Weights keep
 * the type in which they are stored. */
typedef enum mlora_dtype {
    MLORA_DTYPE_AUTO = 0, /* of activations: f32 on the CPU, bf16 on a GPU; of factors: as stored */
    MLORA_DTYPE_F32 = 1,
    MLORA_DTYPE_BF16 = 2
} mlora_dtype;

/* How the adapters' products are made on a GPU. Every way gives the same results up to the order
 * of sums; a backend that has one way (the CPU) takes any. */
typedef enum mlora_lora_mode {
    MLORA_LORA_AUTO = 0, /* whichever is fastest for the adapters and tokens of the step         */
    MLORA_LORA_LOOP = 1, /* one adapter after another                                            */
    MLORA_LORA_GBMM = 2, /* factors gathered for every token, then batched products (cuBLAS)     */
    MLORA_LORA_BGMV = 3, /* tokens one by one, factors read where they lie                       */
    MLORA_LORA_SGMV = 4, /* tokens sorted by adapter, on tensor cores (those of f32: as bgmv)    */
    MLORA_LORA_FUSED = 5 /* the second product inside rope, activation and residual kernels      */
} mlora_lora_mode;

/* Where guesses of the next tokens come from. They are computed together and kept as far as they
 * are what is drawn, so that a step may give several tokens: the same ones as without (on a GPU up
 * to rounding, which depends on how many tokens a step has). */
typedef enum mlora_speculate {
    MLORA_SPECULATE_OFF = 0,
    MLORA_SPECULATE_NGRAM = 1, /* what followed the last tokens where they stood before */
    MLORA_SPECULATE_DRAFT = 2  /* a second model, mlora_options.draft_model             */
} mlora_speculate;

/* An op of the engine that comes from a shared object, written against kernels/mlora_op.h. */
typedef struct mlora_op_source {
    const char *name; /* silu_mul, add_rms_norm, matmul, rope, lora_shrink or lora_expand; NULL: */
                      /* what the file says it is                                             */
    const char *path; /* the shared object */
} mlora_op_source;

/* Called now and then while weights are read: `done` of `total` bytes. */
typedef void (*mlora_progress_fn)(void *user, int64_t done, int64_t total);

/* Set by mlora_options_default(); zero or NULL means default in every field. */
typedef struct mlora_options {
    const char *model;     /* directory in Hugging Face layout; required                          */
    const char *tokenizer; /* tokenizer.json or tokenizer.model; default: the model's own         */
    mlora_backend backend;
    mlora_dtype dtype;
    mlora_lora_mode lora_mode;
    /* The type of adapters' factors; AUTO: as their files have them, for what PEFT gives. BF16 rounds
     * those of f32 and f16, as other engines do: half the memory of f32, and the kernels for bf16.
     * Not of an adapter that is merged. */
    mlora_dtype lora_dtype;
    int n_threads;        /* CPU backend: worker threads; default: one per core                   */
    int max_model_len;    /* tokens of one sequence, prompt and output; default: the model's      */
                          /* limit, or less where the KV cache would not hold it                  */
    int max_num_seqs;     /* requests that run at the same time; default 64                       */
    int max_batch_tokens; /* tokens of one step; default 512; at least max_num_seqs               */
    int kv_blocks;       /* KV cache, at most, in blocks of 16 tokens; default: what max_num_seqs */
                         /* sequences can use                                                    */
    int max_queue;       /* requests that may wait beside max_num_seqs that run; default 16384   */
    int no_prefix_cache; /* 1: KV of tokens that were computed before is not used again          */
    mlora_speculate speculate;
    /* With MLORA_SPECULATE_DRAFT: directory of a smaller model with the same vocabulary, and its own
     * tokenizer files to tell. It gets as many KV blocks as the model. */
    const char *draft_model;
    int max_draft; /* tokens of a guess, at most 32; default 8. Fewer where guesses fail, and none */
    /* in steps with so many tokens that guesses would slow it down                 */
    /* Memory of the device that weights, KV cache and adapters may take together, as a part of all
     * of it; default 0.9. What the weights leave of it serves KV cache or adapters, whichever is
     * short; one sequence of max_model_len always fits, in at most half of it. On the CPU both
     * together take at most half of the free memory. */
    float gpu_memory_utilization;
    /* MiB of the device for adapters, at most; default: all that they need and requests do not. More
     * of them may be loaded: those in use are there, the others come when they are. With kv_blocks,
     * too, each has just what is said for it. */
    int adapter_memory;
    /* MiB of host memory for adapters that are not on the device, or may leave it; default a quarter
     * of the machine's. Those beyond it are read from their files again. */
    int adapter_host_memory;
    int lenient; /* 1: adapter tensors that no target matches, and unknown ones, are     */
                 /* left out with a warning (mlora_adapter_warnings) instead of refused  */
    const char
        *merge; /* directory of an adapter that is folded into the weights while they are   */
                /* loaded: requests that name no adapter are answered by it, at the cost of */
                /* the base alone; no other adapter can be loaded                           */
    int random_weights; /* 1: of `model` only config.json and the tokenizer are read, and the      */
                        /* weights are random: for measuring speed                              */
    const char
        *cache_dir; /* folder for what was measured on this GPU, for the next process;       */
                    /* made if need be; NULL: nothing is kept                               */
    int profile; /* 1: mlora_engine_profile() can be called; 2: each op is launched by itself, in */
                 /* an NVTX range of its name and layer, for Nsight; 0: no profile                */
    const mlora_op_source
        *ops;  /* [n_ops] that stand in the place of mlora's own. They run in this */
    int n_ops; /* process: see mlora_op_try()                                     */
    mlora_progress_fn on_progress;
    void *user; /* given to on_progress */
} mlora_options;

MLORA_API void mlora_options_default(mlora_options *options);

/* Load an op and call it once, on a few small numbers: what mlora_open() would refuse is refused. A
 * shared object may crash while it is loaded or called, so call this in a process of its own, which
 * is lost then. Returns OK, EINVAL (no such op), EIO, EFORMAT (not an op of this version),
 * EUNSUPPORTED (the op is for another backend, or there is none of that kind), ENOMEM or EDEVICE
 * (the call failed). Thread: any. */
MLORA_API mlora_status mlora_op_try(const mlora_op_source *op, mlora_backend backend);

/* Load a model and make an engine.
 *
 * out      receives the engine, or NULL on failure; freed with mlora_close()
 * options  copied
 *
 * Returns OK, EINVAL (options), EIO, EFORMAT, EUNSUPPORTED, ENOMEM or EDEVICE. Nothing stays
 * behind after a failure. Blocks while the weights are read. Thread: any. */
MLORA_API mlora_status mlora_open(mlora_engine **out, const mlora_options *options);

/* Free everything. Requests that still run end without an event. NULL is allowed.
 * Thread: the engine's, with no other call in flight. */
MLORA_API void mlora_close(mlora_engine *engine);

/* What was loaded. The strings live as long as the engine. */
typedef struct mlora_info {
    const char *architecture; /* "LlamaForCausalLM"        */
    const char *backend;      /* "cpu" or "cuda"           */
    const char *device;       /* such as "avx512, 8 threads" */
    const char *dtype;        /* of activations: "f32" or "bf16" */
    int64_t n_parameters;
    int64_t weight_bytes;       /* on the device */
    int64_t kv_bytes;           /* on the device, at most: see gpu_memory_utilization */
    int64_t kv_bytes_per_token; /* of all layers */
    int n_layers;
    int vocab_size;
    int max_model_len; /* tokens */
    int max_num_seqs;
    int max_batch_tokens;
    int kv_blocks; /* of 16 tokens, at most */
    int max_queue;
    int64_t adapter_bytes; /* on the device, at most, for all adapters that are there at a time */
} mlora_info;

/* Thread: any. */
MLORA_API void mlora_engine_info(const mlora_engine *engine, mlora_info *out);

/* ---- adapters ----------------------------------------------------------------------------- */

/* Load a LoRA adapter and make it selectable by `name` in mlora_submit().
 *
 * dir    directory in PEFT layout: adapter_config.json and adapter_model.safetensors
 * name   UTF-8, 1 to 255 bytes, not "base", not yet taken in this engine
 *
 * Returns OK, EINVAL (name), EIO, EFORMAT (damaged, or does not fit the base model),
 * EUNSUPPORTED (a kind of adapter that would not be served exactly) or ENOMEM (also: more than the
 * memory for adapters, see mlora_options). After a failure the engine is as it was before the call.
 * Blocks while the file is read. May be called while requests run. Any number can be loaded: one
 * comes to the device when a request for it is queued, and may leave when it is not in use. Its
 * files must stay as they are: they may be read again, and if the content has changed by then, the
 * requests for it end with MLORA_FINISH_ERROR.
 * Thread: the engine's. */
MLORA_API mlora_status mlora_adapter_load(mlora_engine *engine, const char *dir, const char *name);

/* Put another adapter in the place of the one called `name`: requests that were submitted before
 * finish with the old one, those from now on get the new one. It is pinned if the old one was.
 * Returns ENOTFOUND, or as mlora_adapter_load(); after a failure the old one is still served.
 * Thread: the engine's. */
MLORA_API mlora_status mlora_adapter_replace(mlora_engine *engine, const char *dir,
                                             const char *name);

/* Make an adapter of random factors on all seven linears of every layer, for measuring speed.
 * rank is 1 to 512; the same seed gives the same factors. Returns OK, EINVAL (name, rank) or
 * ENOMEM. Thread: the engine's. */
MLORA_API mlora_status mlora_adapter_random(mlora_engine *engine, const char *name, int rank,
                                            uint64_t seed);

/* Forget the name at once; requests that use the adapter finish with it, then its memory is
 * freed. Returns OK or ENOTFOUND. Thread: the engine's. */
MLORA_API mlora_status mlora_adapter_unload(mlora_engine *engine, const char *name);

/* pin 1: bring it to the device at the next steps and let it not leave; 0: it may leave again.
 * Returns OK, ENOTFOUND, or ENOMEM: with the pinned ones on the device, there would be no room for
 * some other one. Thread: the engine's. */
MLORA_API mlora_status mlora_adapter_pin(mlora_engine *engine, const char *name, int pin);

typedef struct mlora_adapter_info {
    int max_rank;
    int64_t bytes;         /* on the device */
    uint64_t content_hash; /* in this engine: the same for the same content */
    int on_device;         /* 1: now */
    int pinned;
    int n_requests; /* that are not finished */
    const char
        *error; /* why it could not be brought to the device when it was wanted last; NULL: */
                /* nothing failed. Valid until the next call of mlora_step()               */
} mlora_adapter_info;

/* Returns OK or ENOTFOUND. Thread: the engine's. */
MLORA_API mlora_status mlora_adapter_describe(const mlora_engine *engine, const char *name,
                                              mlora_adapter_info *out);

/* The number of adapters, and the name of number `index` in order of loading (NULL past the
 * end). The name lives until that adapter is unloaded or replaced. Thread: the engine's. */
MLORA_API int mlora_adapter_count(const mlora_engine *engine);
MLORA_API const char *mlora_adapter_name(const mlora_engine *engine, int index);

/* What a lenient load left out, or what is worth knowing, a line each; "" when there is nothing;
 * NULL for an unknown name. `name` NULL: of the adapter that option merge put into the weights,
 * NULL if there is none. Lives until that adapter is unloaded or replaced. Thread: the engine's. */
MLORA_API const char *mlora_adapter_warnings(const mlora_engine *engine, const char *name);

/* ---- requests ----------------------------------------------------------------------------- */

typedef enum mlora_finish {
    MLORA_RUNNING = 0,
    MLORA_FINISH_STOP = 1,   /* an end token or a stop string    */
    MLORA_FINISH_LENGTH = 2, /* max_tokens or max_model_len      */
    MLORA_FINISH_CANCEL = 3, /* mlora_cancel()                   */
    MLORA_FINISH_ERROR = 4   /* see mlora_event.error            */
} mlora_finish;

/* A token with its natural log-probability under the model's own distribution, before penalties,
 * temperature and truncation. */
typedef struct mlora_token_logprob {
    int32_t id;
    float logprob; /* NAN for the first token of a prompt, which has nothing before it */
} mlora_token_logprob;

/* What is delivered, in this order: the prompt's log-probabilities if asked for (one or more
 * events with n_prompt_logprobs > 0), then an event for each token that was generated, then one
 * with finish != MLORA_RUNNING and token -1, which is always the last. All pointers are valid
 * during the callback only. */
typedef struct mlora_event {
    uint64_t id;                    /* of the request */
    int32_t token;                  /* that was generated; -1: none in this event */
    float logprob;                  /* of `token`; 0 unless n_logprobs >= 0 was asked for */
    const mlora_token_logprob *top; /* [n_top], most likely first: alternatives to `token` */
    int n_top;
    const mlora_token_logprob *prompt_logprobs; /* [n_prompt_logprobs], in the prompt's order */
    int n_prompt_logprobs;
    const char *text;  /* that can be shown now: whole characters; stop strings are left out. */
    size_t text_bytes; /* May be 0 with a token, and the rest comes with a later event         */
    mlora_finish finish;
    int n_prompt_tokens;     /* of the request */
    int n_cached_tokens;     /* of those: found in the KV cache, not computed */
    int n_completion_tokens; /* so far, the end token included */
    /* Tokens that were guessed so far, and those of them that were right (mlora_options.speculate).
     */
    int n_drafted_tokens, n_accepted_tokens;
    const char *error; /* with MLORA_FINISH_ERROR, a line: logits were not finite, as the model  */
                       /* or the adapter is damaged; or the adapter could not be read again      */
} mlora_event;

/* Called from mlora_step(), on the engine's thread. May call mlora_submit() and mlora_cancel();
 * no other function of the same engine. */
typedef void (*mlora_event_fn)(void *user, const mlora_event *event);

/* Set by mlora_request_default(), which takes the model's generation_config.json into account.
 * Sampling, in this order: penalties, temperature, top_k, top_p, min_p, then one draw. */
typedef struct mlora_request {
    /* The name of an adapter; NULL, "" or "base": the base model. */
    const char *adapter;

    /* Text, encoded with the tokenizer's own begin token; bytes that are not UTF-8 count as
     * U+FFFD. prompt_bytes 0: up to the NUL. */
    const char *prompt;
    size_t prompt_bytes;
    int no_special;       /* 1: no begin token is added */
    int no_parse_special; /* 1: tokens written in the text, such as <|eot_id|>, are plain text */

    /* Or ids [n_ids], taken as they are; then `prompt` is not looked at. */
    const int32_t *ids;
    int n_ids;

    /* Tokens to generate; 0: none (see prompt_logprobs); negative: until the context is full. */
    int max_tokens;
    int ignore_eos; /* 1: end tokens do not end the request */
    /* [n_stop] strings of 1 to 1024 bytes, at most 16, that end the text and are not delivered. */
    const char *const *stop;
    int n_stop;

    float temperature;        /* >= 0; 0: greedy: the most likely token, the lowest id of equals */
    int top_k;                /* keep the k most likely tokens; 0: all */
    float top_p;              /* keep the most likely that together reach p, in (0, 1]; 1: all */
    float min_p;              /* keep those at least p times as likely as the first, in [0, 1] */
    float repetition_penalty; /* > 0; 1: none; over prompt and output (CTRL, arXiv:1909.05858) */
    float presence_penalty;   /* subtracted from the logits of tokens in the output; 0: none */
    float frequency_penalty;  /* the same, times the count; 0: none */
    /* The same seed gives the same text, whatever shares the batch; negative: a fresh one. */
    int64_t seed;

    /* -1: none; 0: of each generated token; n, up to 128: and of the n most likely ones. */
    int n_logprobs;
    int prompt_logprobs; /* 1: of every prompt token; then none is taken from the cache */

    /* Lower ones run first, in any range; 0 is usual. Adapters get equal shares of the machine
     * whatever the priorities; these order an adapter's own requests, and those of adapters that
     * got about the same. When memory runs out, the highest number is set back first. */
    int priority;

    mlora_event_fn on_event;
    void *user; /* given to on_event; borrowed until the last event */
} mlora_request;

/* `engine` NULL: plain defaults (temperature 1, no truncation, max_tokens 256). Thread: any. */
MLORA_API void mlora_request_default(const mlora_engine *engine, mlora_request *request);

/* Queue a request. Everything in it is copied, `user` borrowed until the last event.
 *
 * id   receives a number that is never given again in this engine; may be NULL
 *
 * Returns OK, EINVAL (a value out of range, a prompt that is empty or does not fit
 * max_model_len), ENOTFOUND (adapter), EBUSY (the queue is full) or ENOMEM; on failure no event
 * comes.
 * Thread: any. Does not wait for a running step. */
MLORA_API mlora_status mlora_submit(mlora_engine *engine, const mlora_request *request,
                                    uint64_t *id);

/* End a request: its last event (MLORA_FINISH_CANCEL) comes in the next mlora_step(). An id that
 * has ended or was never given is ignored. Thread: any. */
MLORA_API void mlora_cancel(mlora_engine *engine, uint64_t id);

/* Do one step of work for all requests: new ones join, one forward pass, one token each (more
 * with mlora_options.speculate) for those that are past their prompt, events are delivered, finished ones leave.
 *
 * n_active   receives the number of requests that are not finished; may be NULL
 *
 * Returns OK, also when there was nothing to do; ENOMEM or EDEVICE: the engine can only be
 * closed. Blocks for one forward pass, or where there is nothing to run yet,
 * until an adapter has come to the device. Thread: the engine's. */
MLORA_API mlora_status mlora_step(mlora_engine *engine, int *n_active);

/* Sums since mlora_open(). */
typedef struct mlora_stats {
    int64_t n_steps;
    int64_t n_prompt_tokens; /* computed */
    int64_t n_generated_tokens;
    /* Prompt tokens that were found in the KV cache, and those that were looked for in vain. */
    int64_t n_cached_tokens, n_missed_tokens;
    int64_t n_drafted_tokens, n_accepted_tokens; /* as in mlora_event */
    int64_t n_preemptions;  /* requests set back to free KV blocks or a place, and computed again */
    double prompt_seconds;  /* in steps that held prompt tokens */
    double decode_seconds;  /* in steps that held none */
    int64_t n_decode_steps; /* of those */
    int n_running;
    int n_waiting;
    int n_free_kv_blocks;        /* that no request uses and no adapter lies in */
    int64_t n_adapter_loads;     /* to the device */
    int64_t n_adapter_evictions; /* from the device, to make room */
    int64_t n_adapter_turns;     /* adapters in a step, over all steps */
    int64_t
        n_adapter_waits; /* places in a step that were empty for an adapter on its way, as well */
    int64_t adapter_bytes_used;      /* on the device */
    int64_t adapter_host_bytes_used; /* in host memory */
} mlora_stats;

/* Thread: the engine's. */
MLORA_API void mlora_engine_stats(const mlora_engine *engine, mlora_stats *out);

/* What the ops of a step cost, with mlora_options.profile: the first call starts the clock, which
 * makes steps slower; each call gives what was spent since the one before.
 *
 * json   receives text, freed with mlora_free(): an array with an object for each op and shape:
 *        op, shape, calls, launches (of kernels; null: not known), seconds, bytes (that have to be
 *        read and written), flops
 *
 * Returns OK, EINVAL (opened without `profile`) or ENOMEM. Thread: the engine's. */
MLORA_API mlora_status mlora_engine_profile(mlora_engine *engine, char **json);

/* ---- tokenizer ---------------------------------------------------------------------------- */

/* Immutable after opening: any number of threads may use one. */
typedef struct mlora_tokenizer mlora_tokenizer;

/* `path` is tokenizer.json, tokenizer.model, or a directory that holds one (tokenizer.json wins
 * where both are there). Returns OK, EIO, EFORMAT, EUNSUPPORTED or ENOMEM. Freed with
 * mlora_tokenizer_close(). Thread: any. */
MLORA_API mlora_status mlora_tokenizer_open(mlora_tokenizer **out, const char *path);
MLORA_API void mlora_tokenizer_close(mlora_tokenizer *tokenizer);

/* The engine's own, alive until mlora_close(); not to be closed by the caller. Thread: any. */
MLORA_API const mlora_tokenizer *mlora_engine_tokenizer(const mlora_engine *engine);

enum {
    MLORA_ENCODE_NO_SPECIAL = 1,      /* no begin or end tokens are added               */
    MLORA_ENCODE_NO_PARSE_SPECIAL = 2 /* special tokens written in the text are plain text */
};

/* Text to ids. `*ids` is a fresh array [*n_ids], freed with mlora_free(); NULL when empty.
 * `flags` is a sum of MLORA_ENCODE_. Bytes that are not UTF-8 count as U+FFFD.
 * Returns OK or ENOMEM. Thread: any. */
MLORA_API mlora_status mlora_encode(const mlora_tokenizer *tokenizer, const char *text,
                                    size_t text_bytes, int flags, int32_t **ids, int *n_ids);

enum { MLORA_DECODE_KEEP_SPECIAL = 1 /* write special tokens out instead of leaving them out */ };

/* Ids to text. `*text` is fresh, ends with NUL, freed with mlora_free(). Bytes that do not form
 * UTF-8 become U+FFFD. Returns OK, EINVAL (an id outside the vocabulary) or ENOMEM. Thread: any. */
MLORA_API mlora_status mlora_decode(const mlora_tokenizer *tokenizer, const int32_t *ids, int n_ids,
                                    int flags, char **text, size_t *text_bytes);

/* The text that one token adds after others, for showing: a leading space is kept, a special token
 * is as it is written, bytes that are only part of a character become U+FFFD. `*text` is fresh,
 * ends with NUL, freed with mlora_free(). Returns OK, EINVAL (an id outside the vocabulary) or
 * ENOMEM. Thread: any. */
MLORA_API mlora_status mlora_token_text(const mlora_tokenizer *tokenizer, int32_t id, char **text,
                                        size_t *text_bytes);

MLORA_API int mlora_vocab_size(const mlora_tokenizer *tokenizer);

typedef struct mlora_message {
    const char *role; /* "system", "user" or "assistant" */
    const char *content;
} mlora_message;

/* Messages to the ids of a prompt by the chat template that is stored beside the tokenizer,
 * ready for the assistant's answer. Special tokens come from the template only: the text of a
 * message never becomes one.
 *
 * text   receives the prompt as text, for showing, freed with mlora_free(); may be NULL
 *
 * Returns OK, EINVAL (roles that the template does not take), EUNSUPPORTED (no template, or one
 * of an unknown family: the text says which are known) or ENOMEM. Thread: any. */
MLORA_API mlora_status mlora_chat_encode(const mlora_tokenizer *tokenizer,
                                         const mlora_message *messages, int n_messages,
                                         int32_t **ids, int *n_ids, char **text);

/* ---- looking at files --------------------------------------------------------------------- */

/* Describe a model or adapter directory without loading weights, as JSON text freed with
 * mlora_free(). The fields are listed in the README under "inspect".
 *
 * model_dir   a base model to check an adapter against; may be NULL
 *
 * Returns OK (an adapter that would be refused is described, with the reason), EIO, EFORMAT,
 * EUNSUPPORTED or ENOMEM. Thread: any. */
MLORA_API mlora_status mlora_inspect(const char *dir, const char *model_dir, char **json);

/* Fold an adapter into its base model and write the result as a Hugging Face checkpoint, which
 * transformers loads: weights in the types in which they were stored, config.json, and the files
 * of the tokenizer. Needs host memory for the whole model.
 *
 * model, adapter   directories
 * output           a directory to make, or an empty one; it appears complete or not at all
 * lenient          as in mlora_options
 * warnings         receives what mlora_adapter_warnings() would say, freed with mlora_free();
 *                  may be NULL
 *
 * Returns OK, EINVAL (output is there and not empty), EIO, EFORMAT, EUNSUPPORTED (also: an
 * adapter that no checkpoint can hold, such as an aLoRA) or ENOMEM. Thread: any. */
MLORA_API mlora_status mlora_merge(const char *model, const char *adapter, const char *output,
                                   int lenient, char **warnings);

/* Free what the library returned as "freed with mlora_free()". NULL is allowed. Thread: any. */
MLORA_API void mlora_free(void *memory);

#ifdef __cplusplus
}
#endif

#endif
