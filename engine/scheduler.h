/* Who runs in this step, and with how many tokens. Requests join and leave between steps; a
 * prompt longer than what is left of the step's tokens is computed in pieces. */
#ifndef MLORA_ENGINE_SCHEDULER_H
#define MLORA_ENGINE_SCHEDULER_H

#include "engine/fair.h"
#include "engine/kvcache.h"
#include "engine/request.h"

/* A row of the step's batch: n_tokens of a request. */
struct plan_row {
    struct request *request; /* NULL: it has ended since this was planned */
    int first;               /* position of the row's first token: those before it are computed */
    int n_tokens;
    int n_drafts; /* of those: guesses after the request's last token */
    bool samples; /* the row reaches the request's last token */
    int n_draws;  /* tokens drawn after it, if it may have more: after its last and each guess */
    int feed;     /* its one token is that draw of the step before; -1: the request has it */
};

struct plan {
    struct plan_row *rows; /* [n_rows], room for max_num_seqs */
    int n_rows;
    int n_tokens;
};

struct scheduler {
    struct request *
        *running; /* [n_running] by priority, then arrival: the last is set back first */
    int n_running;
    int max_running;
    int max_batch_tokens;
    struct fair fair;     /* who waits */
    struct plan plan;     /* of the step on its way, or the last one */
    struct plan next;     /* of the one after it, where that is planned ahead */
    int n_ahead;          /* steps in a row that were planned so */
    bool short_of_blocks; /* in the step being planned: nobody is admitted any more */
    int64_t n_preemptions;
    int64_t n_found, n_missed; /* prompt tokens looked for in the cache */
    int64_t n_adapter_waits;   /* places of steps that were left to requests whose adapter comes */
};

mlora_status scheduler_open(struct scheduler *out, int max_running, int max_batch_tokens);
void scheduler_close(struct scheduler *scheduler); /* holds no requests any more; accepts zeroes */

mlora_status scheduler_add(struct scheduler *scheduler, struct request *request); /* or ENOMEM */

/* Choose the step's rows and reserve their KV blocks:
 *   1. running requests that draw a token, one token each, so that their streams keep their pace;
 *   2. pieces of prompts, of running and of waiting requests, while tokens are left: next is who
 *      belongs to the adapter that was served least, see engine/fair.h. A waiting one is admitted
 *      if there are free blocks for all of its tokens; what the cache holds of them is not computed.
 * When blocks run out, the running request of the lowest priority that came last is set back: it
 * waits again, and is computed again with the same result. So is one of an adapter that got much
 * more than a waiting one, when there is no room for that.
 * The plan lives until the next call. */
const struct plan *scheduler_plan(struct scheduler *scheduler, struct kvcache *kv);

/* Put the rows of the plan in order of their adapters' slots, then of arrival: kernels share what they
 * read for neighbours. What a request gets does not depend on it. */
void scheduler_group_rows(struct scheduler *scheduler);

/* Plan the step after `plan` while that is on its way: the next token of each of its requests, but
 * of those that will have reached their length. False, and nothing is planned: its outcome decides
 * what comes next, as there are guesses or penalties; or others are to run, as prompts go on, there
 * is a place for one that waits, or some have waited for several such steps; or nobody goes on, or
 * blocks are missing. */
bool scheduler_plan_next(struct scheduler *scheduler, struct kvcache *kv);

/* The step of `plan` is over: `next` takes its place, and is empty where it was not planned. */
void scheduler_advance(struct scheduler *scheduler);

/* Lengthen a row that draws a token by `n` guesses, which stand after the request's tokens and have
 * their blocks. */
void scheduler_add_drafts(struct scheduler *scheduler, struct plan_row *row, int n);

/* A row of the plan was computed, and `n_accepted` of its guesses were right: its tokens but for
 * the wrong guesses count, and their blocks can be found. */
void scheduler_computed(struct scheduler *scheduler, struct kvcache *kv, const struct plan_row *row,
                        int n_accepted);

/* Take a request out, running or waiting, and give its blocks back. A step on its way may still
 * write to them: what is started after it comes after it. */
void scheduler_remove(struct scheduler *scheduler, struct request *request, struct kvcache *kv);

/* By its id; NULL: there is none. */
struct request *scheduler_find(const struct scheduler *scheduler, uint64_t id);

/* A waiting request whose adapter could not be brought to the device; NULL: there is none. */
struct request *scheduler_failed(const struct scheduler *scheduler);

/* After planning: running requests keep their adapters on the device, those of waiting ones are
 * brought, of who got least first. */
void scheduler_want_adapters(struct scheduler *scheduler);

/* Any request, running or waiting; NULL: none is left. */
struct request *scheduler_any(const struct scheduler *scheduler);

#endif
