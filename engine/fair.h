/* Fairness between adapters: each has an account that is charged for the tokens it gets, and who
 * got least is next (virtual token counters: S-LoRA's VTC, arXiv:2401.00588). An account that
 * comes back after a while without waiting requests is lifted to the others: time in which it
 * asked for nothing earns nothing. */
#ifndef MLORA_ENGINE_FAIR_H
#define MLORA_ENGINE_FAIR_H

#include "engine/request.h"

struct account {
    uint64_t key;
    int64_t served;               /* virtual tokens: see fair_charge() */
    struct request *first, *last; /* waiting, by priority, then arrival */
    struct request *head;         /* the first of them that is ready; NULL: none */
    int n_running;
    bool has_no_room; /* the adapter of the first one was wanted, and the device is full */
    bool counts;      /* it asked for something at the last refresh: its `served` is of now */
};

struct fair {
    struct account *accounts; /* [n_accounts]; idle ones may be given to others */
    int n_accounts, capacity;
    int n_waiting;
    int share; /* of the places, for each account that runs or asks for something */
};

void fair_close(struct fair *fair); /* accepts zeroes */

/* Let a request wait on its account, which is opened if there is none. Returns OK or ENOMEM. */
mlora_status fair_add(struct fair *fair, struct request *request);

/* Let a request of the account that ran before wait again. */
void fair_put_back(struct fair *fair, struct request *request);

/* Take a waiting request out, to run it or to end it. False: it did not wait. */
bool fair_take(struct fair *fair, struct request *request);

/* Find every account's head and lift those that ask for something again: that have a head, or no
 * room. Once before a step is planned, in which n_places can run. */
void fair_refresh(struct fair *fair, int n_places);

/* How many waiting requests have a right to a place by their account's share of them, at most `max`:
 * of accounts that were served at most as much as `served`. */
int fair_n_entitled(const struct fair *fair, int64_t served, int max);

/* The account without room that was served least; -1: none. */
int fair_least_without_room(const struct fair *fair);

/* Nobody of an account that was served more than `served` runs anew in this step. */
void fair_hold_back(struct fair *fair, int64_t served);

/* The head that is next: of the account that was served least; of accounts within `window` virtual
 * tokens of that one the head that comes before the others: by whether the account has less than its
 * share of the places; by priority; where many adapters run already, by whether the own one does, as
 * each more makes steps slower; by what was served; by arrival. NULL: none is ready. */
struct request *fair_next(const struct fair *fair, int64_t window);

/* The account with running requests that was served most; -1: none runs. */
int fair_most_served(const struct fair *fair);

/* The request computes its tokens up to `n_tokens`: one virtual token for each of the prompt, two
 * for each of the output, which costs a pass of its own; nothing for what was charged before. */
void fair_charge(struct fair *fair, struct request *request, int n_tokens);

#endif
