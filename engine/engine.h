/* The engine: open, close, submit, step. One page says what a step is. */
#ifndef MLORA_ENGINE_ENGINE_H
#define MLORA_ENGINE_ENGINE_H

#include <pthread.h>

#include "engine/batch.h"
#include "engine/kvcache.h"
#include "engine/memory.h"
#include "engine/mlora.h"
#include "engine/scheduler.h"
#include "engine/speculate.h"
#include "lora/registry.h"
#include "model/forward.h"

/* What comes out of a step, for up to Q tokens drawn: one of each request, and of its guesses. On
 * the device, and as copies on the host. */
struct outputs {
    float *logits;       /* [Q, V], on the device only                                */
    int32_t *rows;       /* [Q] inputs of the head, for prompts' log-probabilities    */
    int32_t *ids;        /* [Q] drawn tokens, or targets                              */
    float *logprob;      /* [Q] of `ids`                                              */
    int32_t *top_ids;    /* [Q, n_top] room for TOP_MAX                               */
    float *top_logprobs; /* [Q, n_top]                                                */
};

/* A step that was started. While one is on its way the next can follow: its tokens are those that
 * the device has just drawn. So the device does not wait for the host, which sees them one step
 * later; a request that turns out to have ended has then one row too many, which is dropped. */
struct pass {
    struct outputs host; /* where its results come, behind the fence */
    int fence;
    int n_top;           /* alternatives in top_ids, -1: none */
    int n_prompt_tokens; /* of the step */
    int n_adapters;      /* in its batch */
    double start;        /* seconds */
};

struct mlora_engine {
    struct device *dev;
    struct model_config config;
    struct weights weights;
    struct model model; /* borrows the three above */
    struct workspace workspace;
    struct kv_cache kv_cache; /* device memory... */
    struct kvcache kvcache;   /* ... and who has which block of it */
    struct tokenizer *tokenizer;
    struct registry registry;
    struct memory memory; /* which the registry's pool and the cache share */
    struct scheduler scheduler;
    struct speculation speculation;
    struct batch batch;
    bool lenient;
    mlora_dtype lora_dtype;
    char *merged; /* an adapter is in the weights, so there is no other: its warnings; or NULL */
    int max_model_len;
    int max_queue;            /* requests that may wait beside max_num_seqs that run */
    struct hash_key hash_key; /* secret: see engine/base/hash.h */
    int32_t *eos;             /* [n_eos] the model's and the tokenizer's end tokens */
    int n_eos;

    struct outputs out;          /* on the device */
    struct pass pass, next;      /* of the scheduler's plan and next plan */
    double last_end;             /* of the last pass, in seconds */
    bool plans_ahead;            /* where the device works while the host plans */
    mlora_token_logprob *scored; /* [max(max Q, 128)] of the event being made */

    /* From any thread to the engine's: guarded by `lock`. */
    pthread_mutex_t lock;
    struct request *first_submitted, *last_submitted;
    uint64_t *cancelled; /* [n_cancelled] ids */
    int n_cancelled, cancelled_capacity;
    uint64_t last_id;
    int n_submitted; /* in the list above */
    int n_scheduled; /* by the scheduler, as of the last step */

    mlora_stats stats;
    bool failed; /* the device is lost */
};

mlora_status engine_open(struct mlora_engine **out, const mlora_options *options);
void engine_close(struct mlora_engine *engine);

/* See mlora_op_try(). */
mlora_status engine_try_op(const mlora_op_source *op, mlora_backend backend);

/* Hand a request over; any thread. Its adapter is held already. Returns OK with its id, or EBUSY:
 * the queue is full, and the request stays the caller's. */
mlora_status engine_submit(struct mlora_engine *engine, struct request *request, uint64_t *id);

/* Release the adapter of a request that is not scheduled, and free it. NULL is allowed. */
void engine_free_request(struct request *request);
void engine_cancel(struct mlora_engine *engine, uint64_t id);

/* Free adapters that are neither listed nor used; a step on its way may still read them, and leaves
 * them to the first one that ends with none after it. */
void engine_sweep(struct mlora_engine *engine);

mlora_status engine_step(struct mlora_engine *engine, int *n_active);

#endif
