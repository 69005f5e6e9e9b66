/* Schedules without a model: requests made up, and a step that only counts. */
#ifndef TESTS_ENGINE_SCHEDULE_H
#define TESTS_ENGINE_SCHEDULE_H

#include "engine/scheduler.h"

struct schedule {
    struct scheduler scheduler;
    struct kvcache kv;
};

void schedule_open(struct schedule *schedule, int max_running, int max_tokens, int n_blocks,
                   bool shares);
void schedule_close(struct schedule *schedule);

/* A request of account `account` with a prompt of n tokens, all of them 1 to begin with, that may
 * grow to max_total. */
struct request *schedule_request(uint64_t id, uint64_t account, int n_prompt, int max_total);
void schedule_add(struct schedule *schedule, struct request *request);
void schedule_end(struct schedule *schedule, struct request *request);

/* Plan a step, and do what a step does: the rows' tokens are computed, and where one was due, the
 * next token is drawn: a function of all tokens before it. Guesses are kept while they are it. */
const struct plan *schedule_step(struct schedule *schedule);
void schedule_carry_out(struct schedule *schedule, const struct plan *plan);

/* The token that follows the first n of a request. */
int32_t schedule_next_token(const struct request *request, int n);

/* A step of the generator, and a number in [0, n). */
int random_below(uint64_t *state, int n);

#endif
