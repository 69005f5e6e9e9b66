/* Who runs in this step, and with how many tokens. Requests join and leave between steps; a
 * prompt longer than the step's budget is computed in pieces. */
#ifndef MLORA_ENGINE_SCHEDULER_H
#define MLORA_ENGINE_SCHEDULER_H

#include "engine/kvcache.h"
#include "engine/request.h"

/* A row of the step's batch: the request's next n_tokens tokens after n_computed. */
struct plan_row {
    struct request *request;
    int n_tokens;
    bool samples; /* the row ends at the request's last token: a new one is drawn */
};

struct plan {
    struct plan_row *rows; /* [n_rows], room for max_num_seqs */
    int n_rows;
    int n_tokens;
};

struct scheduler {
    struct request **running; /* [n_running] in order of admission */
    int n_running;
    int max_running;
    int max_batch_tokens;
    struct request *first_waiting, *last_waiting; /* in order of arrival; preempted ones first */
    int n_waiting;
    struct plan plan;
    int64_t n_preemptions;
};

mlora_status scheduler_open(struct scheduler *out, int max_running, int max_batch_tokens);
void scheduler_close(struct scheduler *scheduler); /* accepts zeroes; holds no requests any more */

void scheduler_add(struct scheduler *scheduler, struct request *request);

/* Choose the step's rows and reserve their KV blocks:
 *   1. running requests that draw one token each, so that their streams keep their pace,
 *   2. pieces of running prompts in order of admission, while tokens are left in the budget,
 *   3. waiting requests in order of arrival, while blocks for their tokens are free.
 * When blocks run out, the request that was admitted last is set back: it waits at the front of
 * the queue and is computed again, with the same result. The plan lives until the next call. */
const struct plan *scheduler_plan(struct scheduler *scheduler, struct kvcache *kv);

/* Take a request out, running or waiting, and give its blocks back. */
void scheduler_remove(struct scheduler *scheduler, struct request *request, struct kvcache *kv);

#endif
