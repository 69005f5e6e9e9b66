#include "engine/speculate.h"

#include <stdbool.h>

#include "engine/scheduler.h"

/* ---- how far -------------------------------------------------------------------------------- */

enum { FIRST_LENGTH = 2, MAX_MISSES = 6 }; /* the longest wait: 2^6 steps */

int pace_next(struct pace *pace, int max)
{
    if (pace->wait > 0) {
        pace->wait--;
        return 0;
    }
    if (pace->length == 0) pace->length = FIRST_LENGTH;
    return pace->length < max ? pace->length : max;
}

void pace_learn(struct pace *pace, int n_drafted, int n_accepted)
{
    if (n_accepted == 0) {
        if (pace->misses < MAX_MISSES) pace->misses++;
        pace->wait = 1 << pace->misses;
        pace->length = 1;
        return;
    }
    pace->misses = 0;
    pace->length = n_accepted == n_drafted ? 2 * n_drafted : n_accepted;
}

/* ---- prompt lookup -------------------------------------------------------------------------- */

enum { NGRAM = 3 };

int ngram_draft(int32_t *tokens, int n, int max)
{
    int best = 0, from = 0; /* tokens in common, and what follows them */

    for (int end = n - 1; end > 0 && best < NGRAM; end--) {
        int common = 0;
        while (common < NGRAM && common < end && tokens[end - 1 - common] == tokens[n - 1 - common])
            common++;
        if (common <= best) continue;
        best = common;
        from = end;
    }
    if (best == 0 || max <= 0) return 0;
    for (int i = 0; i < max; i++) tokens[n + i] = tokens[from + i]; /* may run into the guess */
    return max;
}

int count_accepted(const int32_t *guesses, const int32_t *drawn, int n)
{
    int right = 0;

    while (right < n && drawn[right] == guesses[right]) right++;
    return right;
}

/* ---- the step ------------------------------------------------------------------------------- */

/* A row of one token after which a token is drawn and others can follow. */
static bool can_draft(const struct plan_row *row)
{
    return row->samples && row->n_tokens == 1 &&
           row->request->n_tokens + 1 < row->request->max_total;
}

/* How many tokens to guess for the row, of `room`. */
static int wanted(const struct speculation *speculation, const struct plan_row *row, int room)
{
    struct request *request = row->request;
    const int left = request->max_total - request->n_tokens - 1; /* one is drawn after them */
    int max = pace_next(&request->pace, speculation->max_draft);

    if (max > left) max = left;
    return max < room ? max : room;
}

void speculate_plan(struct speculation *speculation, struct scheduler *scheduler,
                    struct kvcache *kv)
{
    const struct plan *plan = &scheduler->plan;
    int n_able = 0;

    if (speculation->mode == MLORA_SPECULATE_OFF) return;
    for (int q = 0; q < plan->n_rows; q++) n_able += can_draft(&plan->rows[q]);
    for (int q = 0; q < plan->n_rows; q++) {
        struct plan_row *row = &plan->rows[q];
        const int room = speculation->max_tokens - plan->n_tokens;
        if (!can_draft(row)) continue;
        if (room <= 0) return;

        const int share = (room + n_able - 1) / n_able; /* what one leaves is for those after it */
        struct request *request = row->request;
        const int max = wanted(speculation, row, share);
        const int n = ngram_draft(request->tokens, request->n_tokens, max);
        n_able--;
        if (n > 0 && kvcache_extend(kv, &request->kv, request->n_tokens + n))
            scheduler_add_drafts(scheduler, row, n);
    }
}

void speculate_learn(struct speculation *speculation, struct request *request, int n_drafted,
                     int n_accepted)
{
    speculation->n_drafted += n_drafted;
    speculation->n_accepted += n_accepted;
    request->n_drafted += n_drafted;
    request->n_accepted += n_accepted;
    pace_learn(&request->pace, n_drafted, n_accepted);
}
