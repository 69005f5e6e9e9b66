/* A second, smaller model that guesses the next tokens of requests, greedily. It has its own
 * weights, KV cache and blocks, and follows each request at its own pace: a sequence here is the
 * request's tokens with what this model has computed of them. Adapters do not reach it: a guess need
 * only be likely, whoever draws the token. */
#ifndef MLORA_ENGINE_DRAFT_H
#define MLORA_ENGINE_DRAFT_H

#include "engine/batch.h"
#include "engine/outputs.h"
#include "model/forward.h"

/* A row of the step that wants n guesses after its request's tokens. */
struct guess {
    struct plan_row *row;
    int n;
};

/* Of one running request. */
struct draft_sequence {
    struct request shadow; /* the same tokens (borrowed), this model's blocks and progress */
    uint64_t id;           /* of the request; 0: unused */
    uint64_t used_at;      /* the last step in which the request had a row */
};

struct draft_model {
    struct model_config config;
    struct weights weights;
    struct model model;
    struct workspace workspace;
    struct kv_cache kv_cache;
    struct kvcache kvcache;
    struct batch batch;
    struct plan plan;                 /* of one pass */
    struct draft_sequence *sequences; /* [max_seqs] */
    int32_t *blocks;                  /* of all sequences */
    int max_seqs, max_tokens;
    uint64_t n_steps;

    /* Borrowed of the engine: no adapter of it is used, and the outputs are free until its own
     * pass. */
    const struct registry *registry;
    const struct outputs *out, *host;
};

/* What a draft model shares with the engine's own. */
struct draft_options {
    const char *directory;
    const struct model *model; /* of the engine, with its device and types */
    const struct tokenizer *tokenizer;
    bool random_weights;
    int max_tokens; /* of a pass */
    const struct registry *registry;
    const struct outputs *out, *host;
};

/* Read it, and take the memory that its passes need. Returns OK, EINVAL (another vocabulary), EIO,
 * EFORMAT, EUNSUPPORTED or ENOMEM; the caller closes it in any case. */
mlora_status draft_load(struct draft_model *draft, const struct draft_options *options);

/* The rest of its memory: KV blocks, and sequences of up to max_seqs requests of max_model_len
 * tokens. Returns OK or ENOMEM. */
mlora_status draft_open(struct draft_model *draft, int n_blocks, int max_seqs, int max_model_len);
void draft_close(struct draft_model *draft); /* accepts zeroes */

/* Make the guesses for some rows of the plan; n becomes the number that was made: 0 while this
 * model has still to compute tokens before them, or has no memory left. Returns OK, ENOMEM or
 * EDEVICE. */
mlora_status draft_run(struct draft_model *draft, const struct plan *plan, struct guess *guesses,
                       int n_guesses);

/* The request's guesses were verified: what was computed of wrong ones does not count. */
void draft_rewind(struct draft_model *draft, const struct request *request);

#endif
