#include "engine/speculate.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/draft.h"
#include "engine/scheduler.h"

/* Guesses are computed while that costs little: while a step takes as long as reading the weights
 * takes, whatever its tokens are. On the CPU that ends early. */
enum { CUDA_TOKENS = 64, CPU_TOKENS = 8 };

mlora_status speculation_open(struct speculation *out, const mlora_options *options,
                              const char *backend, int max_num_seqs, int max_batch_tokens)
{
    const int max_tokens = strcmp(backend, "cuda") == 0 ? CUDA_TOKENS : CPU_TOKENS;

    *out = (struct speculation){
        .mode = options->speculate,
        .max_draft = options->max_draft ? options->max_draft : DEFAULT_DRAFT,
        .max_tokens = max_tokens < max_batch_tokens ? max_tokens : max_batch_tokens,
    };
    if (out->mode == MLORA_SPECULATE_OFF) return MLORA_OK;
    out->guesses = calloc((size_t)max_num_seqs, sizeof *out->guesses);
    if (out->mode == MLORA_SPECULATE_DRAFT) out->draft = calloc(1, sizeof *out->draft);
    if (!out->guesses || (out->mode == MLORA_SPECULATE_DRAFT && !out->draft))
        return error_set(MLORA_ENOMEM, "out of memory: guesses for %d requests", max_num_seqs);
    return MLORA_OK;
}

void speculation_close(struct speculation *speculation)
{
    if (speculation->draft) draft_close(speculation->draft);
    free(speculation->draft);
    free(speculation->guesses);
    *speculation = (struct speculation){0};
}

int speculation_max_draws(const struct speculation *speculation, int max_num_seqs)
{
    const bool more =
        speculation->mode != MLORA_SPECULATE_OFF && speculation->max_tokens > max_num_seqs;
    return more ? speculation->max_tokens : max_num_seqs;
}

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

/* Of a step: longer rows, and more of them in the products and the draws. */
static const double COST = 1.0 / 16;

/* Plain steps for each that guesses have lost, so that those that fail take no more than this part of
 * the time; up to a bound, since the clock may have stood still for others. */
enum { STEPS_FOR_ONE = 64, MAX_REST = 512, MAX_BARREN = 3 /* a rest of 2^3 */ };

void speculate_clock(struct speculation *s, double seconds)
{
    if (s->longest > 0)
        s->seconds = seconds;
    else
        s->plain += (seconds - s->plain) * (s->plain > 0 ? 0.25 : 1);
}

/* What the last step with guesses took beyond a plain one, in plain ones: as the clock says, or by
 * estimate. */
static double cost_of_guesses(const struct speculation *s)
{
    if (s->ignores_clock || s->seconds <= 0 || s->plain <= 0)
        return COST + s->longest * s->pass_cost;
    return s->seconds / s->plain - 1;
}

void speculate_judge(struct speculation *s)
{
    const double gained = (double)(s->n_accepted - s->before);

    if (s->longest == 0) return;
    const double lost = cost_of_guesses(s) - gained / s->n_rows; /* plain steps */
    if (gained > 0 && lost <= 0) {
        s->misses = 0;
    } else {
        const double paid = fmin(STEPS_FOR_ONE * lost, MAX_REST);
        if (s->misses < MAX_MISSES) s->misses++;
        s->rest = 1 << s->misses;
        if (paid > s->rest) s->rest = (int)paid;
    }
    s->longest = 0;
    s->seconds = 0;
}

void speculate_looked(struct speculation *s, bool found, bool plans_ahead)
{
    if (!plans_ahead || s->mode != MLORA_SPECULATE_NGRAM) return;
    s->barren = found ? 0 : s->barren + (s->barren < MAX_BARREN);
    if (!found) s->rest = 1 << s->barren;
}

bool speculate_rests(const struct speculation *speculation, const struct plan *plan)
{
    if (speculation->mode == MLORA_SPECULATE_OFF) return true;
    if (speculation->longest > 0) return false; /* the step on its way is to be judged */
    if (speculation->rest > 0 || plan->n_rows >= speculation->max_tokens) return true;
    for (int q = 0; q < plan->n_rows; q++)
        if (plan->rows[q].request && plan->rows[q].request->pace.wait == 0) return false;
    return true;
}

void speculate_skip(struct speculation *speculation, const struct plan *next)
{
    if (speculation->rest > 0) speculation->rest--;
    for (int q = 0; q < next->n_rows; q++)
        if (can_draft(&next->rows[q])) pace_next(&next->rows[q].request->pace, 0);
}

/* Who may guess, and how far. Returns their number. */
static int plan_guesses(struct speculation *speculation, const struct plan *plan)
{
    int room = speculation->max_tokens - plan->n_tokens;
    int n_able = 0, n = 0;

    for (int q = 0; q < plan->n_rows; q++) n_able += can_draft(&plan->rows[q]);
    if (n_able > 0 && speculation->rest > 0) {
        speculate_skip(speculation, plan);
        return 0;
    }
    for (int q = 0; q < plan->n_rows && room > 0; q++) {
        struct plan_row *row = &plan->rows[q];
        if (!can_draft(row)) continue;
        const int share = (room + n_able - 1) / n_able; /* what one leaves is for those after it */
        const int length = wanted(speculation, row, share);
        n_able--;
        if (length == 0) continue;
        room -= length;
        speculation->guesses[n++] = (struct guess){row, length};
    }
    return n;
}

mlora_status speculate_plan(struct speculation *speculation, struct scheduler *scheduler,
                            struct kvcache *kv, bool plans_ahead)
{
    struct guess *guesses = speculation->guesses;
    mlora_status status = MLORA_OK;

    if (speculation->mode == MLORA_SPECULATE_OFF) return MLORA_OK;
    speculate_judge(speculation);
    const int n = plan_guesses(speculation, &scheduler->plan);
    if (speculation->mode == MLORA_SPECULATE_DRAFT)
        status = draft_run(speculation->draft, &scheduler->plan, guesses, n);
    for (int i = 0; i < n && status == MLORA_OK; i++) {
        struct request *request = guesses[i].row->request;
        if (speculation->mode == MLORA_SPECULATE_NGRAM)
            guesses[i].n = ngram_draft(request->tokens, request->n_tokens, guesses[i].n);
        if (guesses[i].n > 0 &&
            kvcache_extend(kv, &request->kv, request->n_tokens + guesses[i].n)) {
            scheduler_add_drafts(scheduler, guesses[i].row, guesses[i].n);
            if (guesses[i].n > speculation->longest) speculation->longest = guesses[i].n;
        } else if (speculation->draft) {
            draft_rewind(speculation->draft, request);
        }
    }
    if (n > 0) speculate_looked(speculation, speculation->longest > 0, plans_ahead);
    speculation->before = speculation->n_accepted;
    speculation->n_rows = scheduler->plan.n_rows;
    return status;
}

void speculate_learn(struct speculation *speculation, struct request *request, int n_drafted,
                     int n_accepted)
{
    speculation->n_drafted += n_drafted;
    speculation->n_accepted += n_accepted;
    request->n_drafted += n_drafted;
    request->n_accepted += n_accepted;
    pace_learn(&request->pace, n_drafted, n_accepted);
    if (speculation->draft) draft_rewind(speculation->draft, request);
}
