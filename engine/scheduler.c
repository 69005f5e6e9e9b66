#include "engine/scheduler.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

mlora_status scheduler_open(struct scheduler *out, int max_running, int max_batch_tokens)
{
    *out = (struct scheduler){.max_running = max_running, .max_batch_tokens = max_batch_tokens};
    out->running = calloc((size_t)max_running, sizeof(*out->running));
    out->plan.rows = calloc((size_t)max_running, sizeof *out->plan.rows);
    out->next.rows = calloc((size_t)max_running, sizeof *out->next.rows);
    if (!out->running || !out->plan.rows || !out->next.rows) {
        scheduler_close(out);
        return error_set(MLORA_ENOMEM, "out of memory: %d concurrent requests", max_running);
    }
    return MLORA_OK;
}

void scheduler_close(struct scheduler *scheduler)
{
    fair_close(&scheduler->fair);
    free(scheduler->running);
    free(scheduler->plan.rows);
    free(scheduler->next.rows);
    *scheduler = (struct scheduler){0};
}

/* ---- who is there --------------------------------------------------------------------------- */

mlora_status scheduler_add(struct scheduler *s, struct request *request)
{
    return fair_add(&s->fair, request);
}

static int find_running(const struct scheduler *s, const struct request *request)
{
    int i = 0;

    while (i < s->n_running && s->running[i] != request) i++;
    return i;
}

static void start_running(struct scheduler *s, struct request *request)
{
    int i = s->n_running++;

    for (; i > 0 && request_before(request, s->running[i - 1]); i--)
        s->running[i] = s->running[i - 1];
    s->running[i] = request;
    s->fair.accounts[request->account].n_running++;
}

static void stop_running(struct scheduler *s, int i, struct kvcache *kv)
{
    struct request *request = s->running[i];

    kvcache_release(kv, &request->kv);
    s->fair.accounts[request->account].n_running--;
    s->n_running--;
    memmove(&s->running[i], &s->running[i + 1], (size_t)(s->n_running - i) * sizeof(*s->running));
}

static void drop_row(struct plan *plan, const struct request *request)
{
    for (int q = 0; q < plan->n_rows; q++)
        if (plan->rows[q].request == request) plan->rows[q].request = NULL;
}

void scheduler_remove(struct scheduler *s, struct request *request, struct kvcache *kv)
{
    const int i = find_running(s, request);

    drop_row(&s->plan, request);
    drop_row(&s->next, request);
    if (i < s->n_running)
        stop_running(s, i, kv);
    else
        fair_take(&s->fair, request);
}

struct request *scheduler_find(const struct scheduler *s, uint64_t id)
{
    for (int i = 0; i < s->n_running; i++)
        if (s->running[i]->id == id) return s->running[i];
    for (int i = 0; i < s->fair.n_accounts; i++)
        for (struct request *at = s->fair.accounts[i].first; at; at = at->next)
            if (at->id == id) return at;
    return NULL;
}

struct request *scheduler_any(const struct scheduler *s)
{
    if (s->n_running > 0) return s->running[0];
    for (int i = 0; i < s->fair.n_accounts; i++)
        if (s->fair.accounts[i].first) return s->fair.accounts[i].first;
    return NULL;
}

/* ---- adapters ------------------------------------------------------------------------------- */

struct request *scheduler_failed(const struct scheduler *s)
{
    for (int i = 0; i < s->fair.n_accounts; i++)
        for (struct request *at = s->fair.accounts[i].first; at; at = at->next)
            if (at->adapter && registry_failure(at->adapter)) return at;
    return NULL;
}

/* Each account's first request speaks for it: the others of an adapter want the same. */
void scheduler_want_adapters(struct scheduler *s)
{
    const struct account *least = NULL;
    int n_waiting = 0;

    for (int i = 0; i < s->n_running; i++)
        if (s->running[i]->adapter) registry_keep(s->running[i]->adapter);
    for (int i = 0; i < s->fair.n_accounts; i++) {
        const struct account *account = &s->fair.accounts[i];
        if (!account->first || !account->first->adapter) continue;
        n_waiting += !request_ready(account->first);
        if (!least || account->served < least->served) least = account;
    }
    const int n_places = s->max_running - s->n_running;
    s->n_adapter_waits += n_waiting < n_places ? n_waiting : n_places;
    if (least) registry_want(least->first->adapter);
    for (int i = 0; i < s->fair.n_accounts; i++) {
        const struct account *account = &s->fair.accounts[i];
        if (account->first && account->first->adapter) registry_want(account->first->adapter);
    }
    for (int i = 0; i < s->fair.n_accounts; i++) {
        struct account *account = &s->fair.accounts[i];
        account->has_no_room = account->first && account->first->adapter &&
                               registry_has_no_room(account->first->adapter);
    }
}

/* ---- rows ----------------------------------------------------------------------------------- */

static int n_pending(const struct request *request)
{
    return request->n_tokens - request->n_computed;
}

static void add_row(struct scheduler *s, struct request *request, int n_tokens)
{
    const bool samples = n_tokens == n_pending(request);

    s->plan.rows[s->plan.n_rows++] = (struct plan_row){
        .request = request,
        .first = request->n_computed,
        .n_tokens = n_tokens,
        .samples = samples,
        .n_draws = samples && request->n_tokens < request->max_total,
        .feed = -1,
    };
    s->plan.n_tokens += n_tokens;
    request->is_planned = true;
    fair_charge(&s->fair, request, request->n_computed + n_tokens);
}

void scheduler_add_drafts(struct scheduler *s, struct plan_row *row, int n)
{
    assert(row->samples && row->n_drafts == 0 &&
           row->request->n_tokens + n < row->request->max_total);
    row->n_drafts = n;
    row->n_draws += n;
    row->n_tokens += n;
    s->plan.n_tokens += n;
}

void scheduler_computed(struct scheduler *s, struct kvcache *kv, const struct plan_row *row,
                        int n_accepted)
{
    struct request *request = row->request;
    const struct kv_source source = request_source(request);

    request->n_computed += row->n_tokens - row->n_drafts + n_accepted;
    fair_charge(&s->fair, request, request->n_computed);
    kvcache_remember(kv, &request->kv, &source, request->n_computed);
    if (n_accepted < row->n_drafts) kvcache_trim(kv, &request->kv, request->n_computed + 1);
}

/* ---- setting back --------------------------------------------------------------------------- */

/* Running request i, which has no row in the plan yet, waits again. */
static void preempt(struct scheduler *s, struct kvcache *kv, int i)
{
    struct request *request = s->running[i];

    assert(!request->is_planned);
    stop_running(s, i, kv);
    request->n_computed = 0;
    fair_put_back(&s->fair, request);
    s->n_preemptions++;
}

/* Reserve the block of running request i's next token, setting back those after it while blocks
 * are missing. A request that is alone always fits: the cache holds at least one whole sequence.
 * False if the request itself was set back. */
static bool reserve(struct scheduler *s, struct kvcache *kv, int i)
{
    struct request *request = s->running[i];

    while (!kvcache_extend(kv, &request->kv, request->n_tokens)) {
        const bool itself = s->n_running - 1 == i;
        assert(!(itself && i == 0));
        preempt(s, kv, s->n_running - 1);
        s->short_of_blocks = true;
        if (itself) return false;
    }
    return true;
}

/* Half a step's tokens is as far as adapters may get apart before one gives way, and half of that
 * as far as a priority reaches. */
static int64_t slack(const struct scheduler *s)
{
    return s->max_batch_tokens / 2;
}

/* An adapter that fills the machine gives places, or blocks, to those that wait and got less: at once
 * to those that have less than their share of the places, and to others when they got so much less
 * that what is computed again is less than what was gained. */
static void make_room(struct scheduler *s, struct kvcache *kv)
{
    const struct request *head = fair_next(&s->fair, 0);
    const int n_needed = head ? kvcache_blocks_for(head->n_tokens) : 0;

    while (head && s->n_running > 0) {
        const int most = fair_most_served(&s->fair);
        const struct account *account = &s->fair.accounts[most];
        const int n_places = s->max_running - s->n_running;
        const bool fits = n_needed <= kv->n_free;
        int n_owed = 0, i = s->n_running - 1;
        while (s->running[i]->account != most) i--;
        /* its full blocks are found again, if nobody else needs them */
        const int cost = fits && kv->shares ? KV_BLOCK : s->running[i]->n_computed;
        const int64_t below = account->served - slack(s) - cost;
        for (int a = 0; a < s->fair.n_accounts; a++)
            n_owed += s->fair.accounts[a].head && s->fair.accounts[a].served < below;
        if (account->n_running > s->fair.share) {
            const int64_t served = account->served - (cost - KV_BLOCK);
            const int n = fair_n_entitled(&s->fair, served, n_places + 1);
            if (n > n_owed) n_owed = n;
        }
        if (n_owed == 0) return;
        if (n_owed <= n_places && fits) return;
        preempt(s, kv, i);
    }
}

/* The account that was served most of those whose running requests have what an adapter could have:
 * the place of theirs, or blocks where those can be lent; -1: none. */
static int most_served_with_room(const struct scheduler *s, const struct kvcache *kv)
{
    int most = -1;

    for (int i = 0; i < s->n_running; i++) {
        const struct request *request = s->running[i];
        const bool holds = request->adapter ? !request->adapter->resident.pinned : kv->more != NULL;
        if (!holds) continue;
        if (most < 0 || s->fair.accounts[request->account].served > s->fair.accounts[most].served)
            most = request->account;
    }
    return most;
}

/* The same for an adapter that finds no room on the device. Accounts that were served more admit
 * nobody, and the one that was served most sets back all that it runs, so that its adapter can leave,
 * when it got so much more that what is computed again is less. The base has no adapter, and sets
 * back one at a time. */
static void make_room_for_adapter(struct scheduler *s, struct kvcache *kv)
{
    const int least = fair_least_without_room(&s->fair);
    const int most = most_served_with_room(s, kv);
    int64_t cost = 0;
    int n = 0;

    if (least < 0) return;
    const int64_t served = s->fair.accounts[least].served;
    fair_hold_back(&s->fair, served + slack(s));
    for (int i = s->n_running - 1; i >= 0 && most >= 0; i--) {
        const struct request *request = s->running[i];
        if (request->account != most || (n > 0 && !request->adapter)) continue;
        cost += kv->shares ? KV_BLOCK : request->n_computed;
        n++;
    }
    if (n == 0 || s->fair.accounts[most].served - slack(s) - cost <= served) return;
    for (int i = s->n_running - 1; i >= 0 && n > 0; i--) {
        if (s->running[i]->account != most) continue;
        preempt(s, kv, i);
        n--;
    }
}

/* ---- planning ------------------------------------------------------------------------------- */

/* The running request whose prompt is next; NULL: all are in the plan. */
static struct request *next_running(const struct scheduler *s)
{
    struct request *next = NULL;
    int64_t least = INT64_MAX;

    for (int i = 0; i < s->n_running; i++) {
        struct request *request = s->running[i];
        const int64_t served = s->fair.accounts[request->account].served;
        if (request->is_planned || served >= least) continue;
        least = served;
        next = request;
    }
    return next;
}

/* Take what the cache has of the request's tokens, and blocks for the rest. */
static bool take_blocks(struct scheduler *s, struct kvcache *kv, struct request *request)
{
    const struct kv_source source = request_source(request);
    const bool scores = request->prompt_logprobs && request->n_prompt_delivered < request->n_prompt;

    if (kv->n_free == 0) return false; /* the last token is always computed */
    if (!scores) request->n_computed = kvcache_find(kv, &request->kv, &source, request->n_tokens);
    if (!kvcache_extend(kv, &request->kv, request->n_tokens)) {
        kvcache_release(kv, &request->kv);
        request->n_computed = 0;
        return false;
    }
    if (request->was_admitted) return true;
    request->was_admitted = true;
    request->n_cached = request->n_charged = request->n_computed;
    if (scores || !kv->shares) return true; /* it was not looked for */
    s->n_found += request->n_cached;
    s->n_missed += request->n_prompt - request->n_cached;
    return true;
}

/* Admit a waiting request with a piece of at most `left` tokens. */
static void admit(struct scheduler *s, struct kvcache *kv, struct request *request, int left)
{
    if (!take_blocks(s, kv, request)) {
        s->short_of_blocks = true;
        return;
    }
    fair_take(&s->fair, request);
    start_running(s, request);
    add_row(s, request, n_pending(request) < left ? n_pending(request) : left);
}

/* A piece of the prompt that is next. False: there is none. */
static bool plan_prompt(struct scheduler *s, struct kvcache *kv)
{
    const int left = s->max_batch_tokens - s->plan.n_tokens;
    const bool admits = !s->short_of_blocks && s->n_running < s->max_running;

    if (left == 0) return false;
    struct request *head = admits ? fair_next(&s->fair, slack(s) / 2) : NULL;
    struct request *running = next_running(s);
    if (!head && !running) return false;
    if (!running || (head && s->fair.accounts[head->account].served <
                                 s->fair.accounts[running->account].served))
        admit(s, kv, head, left);
    else /* it has its blocks since it was admitted */
        add_row(s, running, n_pending(running) < left ? n_pending(running) : left);
    return true;
}

const struct plan *scheduler_plan(struct scheduler *s, struct kvcache *kv)
{
    s->plan.n_rows = 0;
    s->plan.n_tokens = 0;
    s->n_ahead = 0;
    s->short_of_blocks = false;
    for (int i = 0; i < s->n_running; i++) s->running[i]->is_planned = false;
    fair_refresh(&s->fair, s->max_running);
    make_room_for_adapter(s, kv);
    make_room(s, kv);

    /* In the order of running[], so that who is set back has no row yet. */
    for (int i = 0; i < s->n_running; i++)
        if (n_pending(s->running[i]) == 1 && reserve(s, kv, i)) add_row(s, s->running[i], 1);
    while (plan_prompt(s, kv)) continue;
    return &s->plan;
}

static int slot_of(const struct plan_row *row)
{
    return row->request->adapter ? row->request->adapter->resident.slot : -1;
}

static int by_slot(const void *one, const void *other)
{
    const struct plan_row *a = one, *b = other;
    const int slot_a = slot_of(a), slot_b = slot_of(b);

    if (slot_a != slot_b) return slot_a < slot_b ? -1 : 1;
    return a->request->id < b->request->id ? -1 : a->request->id > b->request->id;
}

void scheduler_group_rows(struct scheduler *s)
{
    qsort(s->plan.rows, (size_t)s->plan.n_rows, sizeof *s->plan.rows, by_slot);
}

/* ---- planning ahead ------------------------------------------------------------------------- */

/* Those who wait may be owed a place, or blocks, of one that runs: it is looked at so often. */
enum { AHEAD_MAX = 8 };

bool scheduler_plan_next(struct scheduler *s, struct kvcache *kv)
{
    struct plan *next = &s->next;
    int n_blocks = 0, n_draws = 0, n_live = 0, n_rows = 0;

    if (s->fair.n_waiting > 0 && (s->n_running < s->max_running || s->n_ahead == AHEAD_MAX))
        return false;
    for (int q = 0; q < s->plan.n_rows; q++) {
        const struct plan_row *row = &s->plan.rows[q];
        const int n = row->first + row->n_tokens; /* tokens before the one that is drawn */
        const int feed = n_draws;
        n_draws += row->n_draws;
        if (!row->request) continue;
        n_live++;
        if (!row->samples || row->n_drafts > 0 || request_has_penalty(row->request)) return false;
        if (n + 1 >= row->request->max_total) continue;
        n_blocks += kvcache_blocks_for(n + 1) - row->request->kv.n_blocks;
        next->rows[n_rows++] = (struct plan_row){row->request,    .first = n,   .n_tokens = 1,
                                                 .samples = true, .n_draws = 1, .feed = feed};
    }
    if (n_rows == 0 || n_live < s->n_running || n_blocks > kv->n_free) return false;
    for (int q = 0; q < n_rows; q++)
        kvcache_extend(kv, &next->rows[q].request->kv, next->rows[q].first + 1);
    next->n_rows = next->n_tokens = n_rows;
    s->n_ahead++;
    return true;
}

void scheduler_advance(struct scheduler *s)
{
    const struct plan over = s->plan;

    s->plan = s->next;
    s->next = (struct plan){.rows = over.rows};
}
