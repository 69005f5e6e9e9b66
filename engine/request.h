/* One generation: its tokens, limits, adapter and state, from submit to the last event. */
#ifndef MLORA_ENGINE_REQUEST_H
#define MLORA_ENGINE_REQUEST_H

#include <stdbool.h>

#include "engine/mlora.h"
#include "kernels/views.h"
#include "lora/registry.h"
#include "tokenizer/stream.h"

struct request {
    uint64_t id;
    struct registered *adapter; /* held; NULL: the base model */
    int adapter_from;           /* the position from which on it counts: see lora/adapter.h */

    int32_t *tokens; /* [n_tokens] prompt, then output; room for max_total */
    int n_prompt;
    int n_tokens;
    int max_total; /* n_tokens never exceeds it */

    int n_computed;  /* tokens whose keys and values are in the cache */
    int32_t *blocks; /* [n_blocks] KV blocks; room for max_total tokens */
    int n_blocks;

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
    struct request *next; /* in the inbox or the waiting queue */
};

/* Check and copy a public request. `prompt` holds the encoded prompt and is copied; the adapter
 * is not looked up here. Returns OK, EINVAL or ENOMEM; on failure *out is NULL. */
mlora_status request_create(struct request **out, const mlora_request *from,
                            const struct ids *prompt, const struct tokenizer *tokenizer,
                            int vocab_size, int max_model_len);
void request_free(struct request *request); /* its adapter and blocks are given back already */

int request_n_output(const struct request *request);
bool request_has_penalty(const struct request *request);

#endif
