/* Speculative decoding: guess the next tokens of a request, compute them all in one pass, and keep
 * those that would have been drawn anyway.
 *
 * Every position of a guessed run is drawn as it would be alone: from the logits after the tokens
 * before it, with its own noise, which depends on the request's seed and the number of tokens drawn
 * before (struct sampling). The guesses up to the first that differs from what was drawn are kept,
 * and the token drawn there. So the output is not only of the same distribution as without
 * speculation but the same token for token. Rejection sampling would keep a guess as often: its
 * chance is p(guess), which is the chance that a draw from p is the guess. */
#ifndef MLORA_ENGINE_SPECULATE_H
#define MLORA_ENGINE_SPECULATE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/mlora.h"

enum { MAX_DRAFT = 32, DEFAULT_DRAFT = 8 };

struct draft_model;
struct guess;
struct kvcache;
struct plan;
struct request;
struct scheduler;

/* How far a request's next guess goes: twice as far after one that was right, as far as the last
 * one was right otherwise; and after one that was wrong from its first token on there is none for
 * some steps, for twice as many each time. */
struct pace {
    int length; /* tokens; 0: nothing was learned yet */
    int wait;   /* steps without a guess */
    int misses; /* guesses in a row of which nothing was right */
};

struct speculation {
    mlora_speculate mode;
    int max_draft;  /* tokens of a guess */
    int max_tokens; /* of a step with guesses: those beyond it are no longer computed for free */
    struct draft_model *draft; /* owned by the engine; NULL: there is none */
    struct guess *guesses;     /* [max_num_seqs] of the step */
    double pass_cost;          /* of the draft model's, in steps of the model: an estimate */
    int64_t n_drafted, n_accepted;

    /* Whether guesses are worth their cost, over all requests together. */
    int rest;       /* steps in which nobody guesses */
    int misses;     /* steps with guesses in a row that were not worth it */
    int barren;     /* steps in a row for which none was found */
    int64_t before; /* n_accepted when the last one was planned; of that one: */
    int n_rows, longest;
    bool ignores_clock; /* the cost of guesses is always an estimate */
    double seconds;     /* of that one, drafts and all; 0: not known */
    double plain;       /* of steps without guesses, of late; 0: not known */
};

/* A step that held no prompt has taken so long. */
void speculate_clock(struct speculation *speculation, double seconds);

/* Judge the last step with guesses, if it was not judged yet: was what they gained, the tokens that
 * were right for each row, more than their cost? If not, all rest for some steps, for twice as many
 * each time, and the longer the more was lost, so that guesses that fail cost next to nothing. */
void speculate_judge(struct speculation *speculation);

/* For the step planned now guesses were looked for, and found or not. A step that may get guesses is not
 * planned ahead: where others are, and prompt lookup finds none, all rest for some steps, up to 8. A
 * draft model that has none is behind, and must not be kept from catching up. */
void speculate_looked(struct speculation *speculation, bool found, bool plans_ahead);

/* The draft model, if there is one, is still to be loaded. Returns OK or ENOMEM. */
mlora_status speculation_open(struct speculation *out, const mlora_options *options,
                              const char *backend, int max_num_seqs, int max_batch_tokens);
void speculation_close(struct speculation *speculation); /* accepts zeroes */

/* Tokens drawn in one step, at most. */
int speculation_max_draws(const struct speculation *speculation, int max_num_seqs);

/* How many tokens to guess now, at most `max`; counts a step of the wait. */
int pace_next(struct pace *pace, int max);
void pace_learn(struct pace *pace, int n_drafted, int n_accepted);

/* Write up to `max` guesses after tokens [n] and return how many: what followed the last place
 * before the end at which the longest suffix, of up to three tokens, stood before. */
int ngram_draft(int32_t *tokens, int n, int max);

/* How many of n guesses are right: those up to the first that was not what was drawn in its place.
 * The token drawn after them counts, too; what was drawn later does not. */
int count_accepted(const int32_t *guesses, const int32_t *drawn, int n);

/* After planning: lengthen rows of requests that draw their next token by guesses, where tokens of
 * the step and KV blocks are left for them. plans_ahead: steps without guesses are planned while the one
 * before them runs. Returns OK, ENOMEM or EDEVICE. */
mlora_status speculate_plan(struct speculation *speculation, struct scheduler *scheduler,
                            struct kvcache *kv, bool plans_ahead);

/* Whether nobody will guess in the step after this plan, whatever it draws; and that step is one
 * that was planned without guesses: it counts for all that wait. */
bool speculate_rests(const struct speculation *speculation, const struct plan *plan);
void speculate_skip(struct speculation *speculation, const struct plan *next);

/* Of a row's guesses so many were what was drawn. */
void speculate_learn(struct speculation *speculation, struct request *request, int n_drafted,
                     int n_accepted);

#endif
