/* Random schedules without a model: requests come, run, are set back, cancelled and end in any
 * order, with blocks short and prompts that share beginnings, and after every step everything is
 * looked at. A block is stood for by what was written into it, token by token. In half of them a step
 * is started, whenever it can be, before what the one before it has drawn is known. */
#include <criterion/criterion.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "tests/engine/schedule.h"

/* An adapter on its way to the device. */
static struct registered away = {.resident = {.state = RESIDENT_COMING}};

enum { SCHEDULES = 10000, REQUESTS = 8, BLOCKS_MAX = 16 };

/* What computed the keys and values at one place of a block: all that they depend on. */
struct cell {
    uint64_t adapter; /* 0: base */
    uint64_t before;  /* a hash of all that is before it */
    int32_t id;
};

struct world {
    struct schedule schedule;
    uint64_t random;
    bool guesses, ahead;
    struct cell cells[BLOCKS_MAX][KV_BLOCK];
    struct request *requests[REQUESTS]; /* NULL: not there yet, or gone */
    int n_added, n_ended;
};

/* Totals of all schedules: that what is tested does happen. */
static struct {
    long n_steps, n_preemptions, n_found, n_shared, n_cancelled, n_partial, n_right, n_wrong,
        n_ahead, n_in_vain;
} seen;

static struct cell cell_of(const struct request *r, int position, uint64_t before)
{
    const bool changed = position >= r->adapter_from;
    return (struct cell){changed ? r->content.word[0] : 0, before, r->tokens[position]};
}

static uint64_t after(struct cell cell)
{
    return ((cell.before ^ (uint64_t)cell.id) * 0x100000001b3u ^ cell.adapter) *
               0x9e3779b97f4a7c15u +
           1;
}

static bool same(struct cell a, struct cell b)
{
    return a.adapter == b.adapter && a.before == b.before && a.id == b.id;
}

static void add_request(struct world *w)
{
    const int n = 1 + random_below(&w->random, 80);
    const int adapter = random_below(&w->random, 3);
    struct request *r = schedule_request((uint64_t)w->n_added + 1, (uint64_t)adapter, n,
                                         n + 1 + random_below(&w->random, 40));

    for (int i = 0; i < n; i++) /* of few beginnings */
        r->tokens[i] = random_below(&w->random, 40) == 0 ? 7 : adapter == 2 ? 0 : i / 16 % 2;
    if (adapter == 1 && random_below(&w->random, 2)) r->adapter_from = random_below(&w->random, n);
    if (random_below(&w->random, 4) == 0) r->priority = random_below(&w->random, 3) - 1;
    r->adapter = random_below(&w->random, 8) == 0 ? &away : NULL;
    r->prompt_logprobs = random_below(&w->random, 8) == 0;
    w->requests[w->n_added++] = r;
    schedule_add(&w->schedule, r);
}

/* Every block has as many users as requests have it, a free block has none and is in the list. */
static void check_blocks(const struct world *w)
{
    const struct kvcache *kv = &w->schedule.kv;
    int users[BLOCKS_MAX] = {0}, n_used = 0, n_free = 0;

    for (int i = 0; i < w->n_added; i++) {
        const struct request *r = w->requests[i];
        for (int b = 0; r && b < r->kv.n_blocks; b++) users[r->kv.blocks[b]]++;
    }
    for (int b = 0; b < kv->n_blocks; b++) {
        cr_assert_eq(users[b], kv->blocks[b].n_users, "block %d", b);
        n_used += users[b] > 0;
        seen.n_shared += users[b] > 1;
    }
    for (int32_t b = kv->first_free; b >= 0; b = kv->blocks[b].next) {
        cr_assert_eq(users[b], 0);
        n_free++;
    }
    cr_assert_eq(n_free, kv->n_free);
    cr_assert_eq(n_used + n_free, kv->n_blocks, "a block leaked");
}

/* What a request reads is what it would have computed itself. */
static void check_content(const struct world *w, const struct request *r)
{
    uint64_t before = 0;

    for (int p = 0; p < r->n_computed; p++) {
        const struct cell want = cell_of(r, p, before);
        const struct cell got = w->cells[r->kv.blocks[p / KV_BLOCK]][p % KV_BLOCK];
        cr_assert(same(got, want), "request %d reads what is not its own at %d", (int)r->id, p);
        before = after(want);
    }
}

static void check_plan(const struct world *w, const struct plan *plan)
{
    const struct scheduler *s = &w->schedule.scheduler;
    int n_tokens = 0, n_ready = 0;

    for (int i = 0; i < w->n_added; i++) n_ready += w->requests[i] && request_ready(w->requests[i]);
    cr_assert(plan->n_rows > 0 || n_ready == 0, "somebody always runs");
    cr_assert_leq(s->n_running, s->max_running);
    for (int q = 0; q < plan->n_rows; q++) {
        const struct request *r = plan->rows[q].request;
        cr_assert(request_ready(r));
        cr_assert_geq(plan->rows[q].n_tokens, 1);
        cr_assert_geq(r->kv.n_blocks * KV_BLOCK, r->n_computed + plan->rows[q].n_tokens);
        cr_assert_eq(plan->rows[q].samples,
                     r->n_computed + plan->rows[q].n_tokens - plan->rows[q].n_drafts ==
                         r->n_tokens);
        cr_assert(!r->prompt_logprobs || r->n_prompt_delivered == r->n_prompt ||
                      r->n_computed <= r->n_prompt_delivered,
                  "a prompt's scores need all of it");
        for (int p = 0; p < q; p++) cr_assert_neq(plan->rows[p].request, r);
        n_tokens += plan->rows[q].n_tokens;
        seen.n_partial += !plan->rows[q].samples;
    }
    cr_assert_eq(n_tokens, plan->n_tokens);
    cr_assert_leq(n_tokens, s->max_batch_tokens);
    for (int i = 0, q; i < s->n_running; i++) { /* running streams keep their pace */
        const struct request *r = s->running[i];
        if (r->n_tokens - r->n_computed > 1) continue;
        for (q = 0; q < plan->n_rows && plan->rows[q].request != r;) q++;
        cr_assert_lt(q, plan->n_rows, "request %d was held back", (int)r->id);
    }
}

/* Guesses, right and wrong ones, for some of the rows. */
static void guess(struct world *w)
{
    struct scheduler *s = &w->schedule.scheduler;

    for (int q = 0; q < s->plan.n_rows; q++) {
        struct plan_row *row = &s->plan.rows[q];
        struct request *r = row->request;
        const int room = s->max_batch_tokens - s->plan.n_tokens;
        const int left = r->max_total - r->n_tokens - 1;
        int n = random_below(&w->random, 20), right = 0;
        if (n > room) n = room;
        if (n > left) n = left;
        if (!row->samples || n <= 0) continue;
        if (!kvcache_extend(&w->schedule.kv, &r->kv, r->n_tokens + n)) continue;
        const int wrong_at = random_below(&w->random, 2 * n);
        for (int i = 0; i < n; i++) {
            r->tokens[r->n_tokens + i] = schedule_next_token(r, r->n_tokens + i);
            if (i == wrong_at) r->tokens[r->n_tokens + i]++;
            right += i < wrong_at;
        }
        scheduler_add_drafts(s, row, n);
        seen.n_right += right;
        seen.n_wrong += n - right;
    }
}

/* Compute the row's tokens into the request's blocks. */
static void compute_row(struct world *w, const struct plan_row *row)
{
    struct request *r = row->request;
    const int end = row->first + row->n_tokens;
    uint64_t before = 0;

    for (int p = 0; p < end; p++) {
        const struct cell cell = cell_of(r, p, before);
        if (p >= row->first) w->cells[r->kv.blocks[p / KV_BLOCK]][p % KV_BLOCK] = cell;
        before = after(cell);
    }
    if (r->n_prompt_delivered < r->n_prompt)
        r->n_prompt_delivered = end < r->n_prompt ? end : r->n_prompt;
}

static void end_request(struct world *w, int i)
{
    struct request *r = w->requests[i];

    for (int n = r->n_prompt; n < r->n_tokens; n++) /* nothing lost, nothing doubled */
        cr_assert_eq(r->tokens[n], schedule_next_token(r, n));
    schedule_end(&w->schedule, r);
    w->requests[i] = NULL;
    w->n_ended++;
}

/* Plan the step after this one, and compute it: into the blocks that its requests have now. */
static void compute_ahead(struct world *w)
{
    struct scheduler *s = &w->schedule.scheduler;

    if (!scheduler_plan_next(s, &w->schedule.kv)) return;
    check_blocks(w);
    for (int q = 0, draw = 0, row = 0; q < s->plan.n_rows && row < s->next.n_rows; q++) {
        const struct plan_row *next = &s->next.rows[row];
        struct request *r = next->request;
        if (s->plan.rows[q].request == r) {
            cr_assert_eq(next->feed, draw);
            cr_assert_eq(next->first, r->n_tokens);
            cr_assert_lt(r->n_tokens + 1, r->max_total);
            cr_assert_geq(r->kv.n_blocks * KV_BLOCK, next->first + 1);
            r->tokens[r->n_tokens] = schedule_next_token(r, r->n_tokens); /* as the device knows */
            compute_row(w, next);
            row++;
        }
        draw += s->plan.rows[q].n_draws;
    }
    seen.n_ahead += s->next.n_rows;
}

static void step(struct world *w)
{
    struct scheduler *s = &w->schedule.scheduler;
    const struct plan *plan = &s->plan;

    seen.n_steps++;
    if (plan->n_rows == 0) {
        scheduler_plan(s, &w->schedule.kv);
        if (w->guesses) guess(w);
        check_plan(w, plan);
        check_blocks(w);
        for (int q = 0; q < plan->n_rows; q++) compute_row(w, &plan->rows[q]);
    }
    if (w->ahead) compute_ahead(w);
    schedule_carry_out(&w->schedule, plan);
    scheduler_advance(s);
    for (int i = 0; i < w->n_added; i++) {
        struct request *r = w->requests[i];
        if (!r) continue;
        check_content(w, r);
        if (r->adapter && random_below(&w->random, 4) == 0) r->adapter = NULL;
        const bool cancel = random_below(&w->random, 200) == 0;
        seen.n_cancelled += cancel;
        if (cancel || r->n_tokens == r->max_total) end_request(w, i);
    }
    for (int q = 0; q < plan->n_rows; q++) seen.n_in_vain += !plan->rows[q].request;
    check_blocks(w);
}

static void run_schedule(struct world *w, uint64_t seed)
{
    memset(w, 0, sizeof *w);
    w->random = seed;
    w->guesses = seed % 2 == 0;
    w->ahead = seed % 4 >= 2;
    const int max_running = 1 + random_below(&w->random, 6);
    schedule_open(&w->schedule, max_running, max_running + random_below(&w->random, 40),
                  8 + random_below(&w->random, BLOCKS_MAX - 7), seed % 8 != 0);

    for (int n = 0; w->n_ended < REQUESTS; n++) {
        cr_assert_lt(n, 20000, "it does not come to an end");
        if (w->n_added < REQUESTS && random_below(&w->random, 8) == 0) add_request(w);
        step(w);
    }
    cr_assert_eq(w->schedule.kv.n_free, w->schedule.kv.n_blocks);
    seen.n_preemptions += w->schedule.scheduler.n_preemptions;
    seen.n_found += w->schedule.scheduler.n_found;
    schedule_close(&w->schedule);
}

Test(schedules, ten_thousand_keep_every_block_and_every_stream)
{
    static struct world world;

    for (uint64_t i = 0; i < SCHEDULES; i++) run_schedule(&world, i + 1);
    cr_expect_gt(seen.n_steps, 10L * SCHEDULES);
    cr_expect_gt(seen.n_preemptions, SCHEDULES);
    cr_expect_gt(seen.n_found, 10 * SCHEDULES);
    cr_expect_gt(seen.n_shared, 10 * SCHEDULES);
    cr_expect_gt(seen.n_cancelled, SCHEDULES / 2);
    cr_expect_gt(seen.n_partial, 10 * SCHEDULES);
    cr_expect_gt(seen.n_right, 10 * SCHEDULES);
    cr_expect_gt(seen.n_wrong, 10 * SCHEDULES);
    cr_expect_gt(seen.n_ahead, 10 * SCHEDULES);
    cr_expect_gt(seen.n_in_vain, SCHEDULES / 20);
    cr_log_info("%ld steps, %ld set back, %ld found, %ld shared, %ld cancelled, %ld partial, "
                "%ld ahead, %ld in vain",
                seen.n_steps, seen.n_preemptions, seen.n_found, seen.n_shared, seen.n_cancelled,
                seen.n_partial, seen.n_ahead, seen.n_in_vain);
}
