/* One generation: its tokens, limits, adapter and state, from submit to the last event. */
#ifndef MLORA_ENGINE_REQUEST_H
#define MLORA_ENGINE_REQUEST_H

#include <stdbool.h>

#include "engine/kvcache.h"
#include "engine/mlora.h"
#include "engine/speculate.h"
#include "kernels/views.h"
#include "lora/registry.h"
#include "tokenizer/stream.h"

struct request {
    uint64_t id;
    struct registered *adapter; /* held; NULL: the base model */
    struct hash128 content;     /* of the adapter, when it is known; zeroes: the base model */
    int adapter_from;           /* the position from which on it counts: see lora/adapter.h */

    int32_t
        *tokens; /* [n_tokens] prompt, then output; room for max_total. A step's guesses stand */
                 /* after them                                                            */
    int n_prompt;
    int n_tokens;
    int max_total; /* n_tokens never exceeds it */

    int n_computed;   /* tokens whose keys and values are in the cache */
    struct kv_run kv; /* room for max_total tokens */
    int n_cached;     /* prompt tokens that were found there when it was first admitted */

    /* What the scheduler keeps. */
    int priority;         /* lower ones come first */
    uint64_t account_key; /* who pays: the adapter's name, hashed; 0: the base model */
    int account;          /* index in struct fair, while it is scheduled */
    int n_charged;        /* tokens that were paid for: what is computed again is free */
    bool was_admitted;    /* once, at least */
    bool is_planned;      /* it has a row in the step being planned */

    struct pace pace; /* of guesses */
    int n_drafted, n_accepted;
    int draft_sequence; /* index in struct draft_model, if that one has its id */

    struct sampling sampling;
    bool ignore_eos;
    int n_logprobs; /* -1: none */
    bool prompt_logprobs;
    int n_prompt_delivered; /* prompt log-probabilities that were delivered */

    struct stream stream;
    struct buffer text; /* of the event being made */
    mlora_finish finish;

    mlora_event_fn on_event;
    void *user;
    struct request *next; /* in the inbox, or the account's queue */
};

/* Check and copy a public request. `prompt` holds the encoded prompt and is copied; the adapter
 * is not looked up here. Returns OK, EINVAL or ENOMEM; on failure *out is NULL. */
mlora_status request_create(struct request **out, const mlora_request *from,
                            const struct ids *prompt, const struct tokenizer *tokenizer,
                            int vocab_size, int max_model_len);
void request_free(struct request *request); /* its adapter and blocks are given back already */

/* Whether it could run in the next step. */
bool request_ready(const struct request *request);

/* Whether it comes before another one: the lower priority number, then the earlier arrival. */
bool request_before(const struct request *a, const struct request *b);

/* What its keys and values are computed from. */
struct kv_source request_source(const struct request *request);

int request_n_output(const struct request *request);
bool request_has_penalty(const struct request *request);

#endif
