/* Fairness between adapters: rules by hand, then floods of one adapter against the others. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "tests/engine/schedule.h"

static struct schedule schedule;

static void close_schedule(void)
{
    schedule_close(&schedule);
}

TestSuite(fair, .fini = close_schedule);

/* Add n requests of an account, numbered from `id` on. */
static void add(struct request **out, uint64_t id, uint64_t account, int n, int n_prompt,
                int max_total)
{
    for (int i = 0; i < n; i++) {
        out[i] = schedule_request(id + (uint64_t)i, account, n_prompt, max_total);
        schedule_add(&schedule, out[i]);
    }
}

static int64_t served(const struct request *request)
{
    return schedule.scheduler.fair.accounts[request->account].served;
}

static void end_all(void)
{
    struct request *any;
    while ((any = scheduler_any(&schedule.scheduler)) != NULL) schedule_end(&schedule, any);
}

Test(fair, takes_turns_between_adapters_in_spite_of_who_came_first)
{
    struct request *a[4], *b[2];
    schedule_open(&schedule, 3, 100, 100, false);
    add(a, 1, 1, 4, 10, 30);
    add(b, 5, 2, 2, 10, 30);

    const struct plan *plan = scheduler_plan(&schedule.scheduler, &schedule.kv);
    cr_assert_eq(plan->n_rows, 3);
    cr_expect_eq(plan->rows[0].request, a[0]);
    cr_expect_eq(plan->rows[1].request, b[0], "the second place is b's");
    cr_expect_eq(plan->rows[2].request, a[1]);
    cr_expect_eq(served(a[0]), 20);
    cr_expect_eq(served(b[0]), 10);
    schedule_carry_out(&schedule, plan);
    schedule_step(&schedule);
    cr_expect_eq(served(a[0]), 24, "two for each token of the output");
    cr_expect_eq(served(b[0]), 12);
    end_all();
}

Test(fair, gives_turns_of_the_steps_tokens_to_long_prompts)
{
    struct request *a[1], *b[1];
    schedule_open(&schedule, 4, 100, 1000, false);
    add(a, 1, 1, 1, 5000, 5001);
    for (int i = 0; i < 10; i++) schedule_step(&schedule);
    add(b, 2, 2, 1, 150, 160);

    schedule_step(&schedule); /* b begins where a is */
    schedule_step(&schedule);
    schedule_step(&schedule);
    schedule_step(&schedule);
    cr_expect_eq(b[0]->n_computed, 150, "two of four steps were its own");
    cr_expect_eq(a[0]->n_computed, 1250);
    end_all();
}

Test(fair, who_asked_for_nothing_has_earned_nothing)
{
    struct request *a[4], *b[4], *c[1];
    schedule_open(&schedule, 2, 100, 100, false);
    add(c, 100, 3, 1, 5, 10); /* c was here before all others, and little was served to it */
    schedule_step(&schedule);
    schedule_end(&schedule, c[0]);
    add(a, 1, 1, 4, 10, 1000);
    for (int i = 0; i < 200; i++) schedule_step(&schedule);
    cr_assert_gt(served(a[0]), 800);
    add(b, 10, 2, 4, 10, 100);
    add(c, 101, 3, 1, 10, 100);
    schedule_step(&schedule);
    cr_expect_geq(served(b[0]), 800);
    cr_expect_geq(served(c[0]), 800);
    end_all();
}

Test(fair, what_is_computed_again_is_not_charged_again)
{
    struct request *a[2];
    schedule_open(&schedule, 2, 64, 3, false);
    add(a, 1, 1, 2, 16, 48);
    schedule_step(&schedule); /* 32 */
    schedule_step(&schedule); /* the second is set back: 2 */
    cr_expect_eq(schedule.scheduler.n_preemptions, 1);
    cr_expect_eq(served(a[0]), 34);
    schedule_end(&schedule, a[0]);
    schedule_step(&schedule); /* 17 tokens, of which one is new: the output's */
    cr_expect_eq(a[1]->n_computed, 17);
    cr_expect_eq(served(a[1]), 36);
    schedule_end(&schedule, a[1]);
}

Test(fair, an_adapter_that_fills_the_machine_makes_room_for_another)
{
    struct request *a[4], *b[1];
    int n = 0;
    schedule_open(&schedule, 4, 16, 1000, true);
    add(a, 1, 1, 4, 4, 4000);
    for (int i = 0; i < 50; i++) schedule_step(&schedule);
    add(b, 10, 2, 1, 4, 20);
    while (b[0]->n_computed == 0 && n < 1000) {
        schedule_step(&schedule);
        n++;
    }
    cr_expect_eq(n, 1, "at once: two of the four places are b's by right, but it took %d steps", n);
    cr_expect_eq(schedule.scheduler.n_preemptions, 1);
    cr_expect_not(schedule.scheduler.running[3] == a[3], "a's that came last gave way");
    end_all();
}

Test(fair, beyond_its_share_an_adapter_gets_places_when_it_got_much_less)
{
    struct request *a[6], *b[3];
    int n = 0;
    schedule_open(&schedule, 5, 16, 1000, true);
    add(a, 1, 1, 6, 4, 4000);
    for (int i = 0; i < 50; i++) schedule_step(&schedule);
    add(b, 10, 2, 3, 4, 400);
    schedule_step(&schedule);
    cr_expect_eq(schedule.scheduler.n_preemptions, 2, "two of five are b's by right");
    cr_expect_gt(b[0]->n_computed, 0);
    cr_expect_gt(b[1]->n_computed, 0);
    while (b[2]->n_computed == 0 && n < 1000) {
        schedule_step(&schedule);
        n++;
    }
    /* b gains 2 virtual tokens a step: 8 for half a step's tokens, 16 for what is computed again */
    cr_expect(n >= 8 && n <= 20, "%d steps", n);
    end_all();
}

Test(fair, priorities_order_adapters_that_got_about_the_same)
{
    struct request *a[2], *b[2];
    schedule_open(&schedule, 1, 100, 100, false);
    add(a, 1, 1, 2, 10, 12);
    add(b, 3, 2, 2, 10, 12);
    for (int i = 0; i < 2; i++) b[i]->priority = -1; /* both are the same: the order stays */
    const struct plan *plan = scheduler_plan(&schedule.scheduler, &schedule.kv);
    cr_expect_eq(plan->rows[0].request, b[0]);
    schedule_carry_out(&schedule, plan);
    schedule_end(&schedule, b[0]);
    plan = scheduler_plan(&schedule.scheduler, &schedule.kv);
    cr_expect_eq(plan->rows[0].request, b[1],
                 "10 ahead of a: less than a quarter of a step's tokens");
    end_all();
}

Test(fair, where_many_adapters_run_those_of_one_go_together)
{
    enum { MANY = 9 };
    struct request *first[MANY], *again, *others[4];
    schedule_open(&schedule, MANY + 1, 1000, 1000, false);
    for (int i = 0; i < MANY; i++) add(&first[i], (uint64_t)i + 1, (uint64_t)i + 1, 1, 10, 100);
    schedule_step(&schedule);
    for (int i = 0; i < 4; i++) add(&others[i], (uint64_t)i + 20, (uint64_t)i + 20, 1, 10, 100);
    add(&again, 30, 3, 1, 10, 100);
    schedule_step(&schedule);
    cr_expect_eq(again->n_computed, 10, "its adapter ran already");
    for (int i = 0; i < 4; i++) cr_expect_eq(others[i]->n_computed, 0);
    end_all();
}

Test(fair, forgets_idle_accounts_that_owe_nothing)
{
    schedule_open(&schedule, 2, 100, 100, false);
    for (uint64_t i = 0; i < 10000; i++) {
        struct request *r;
        add(&r, i, i, 1, 10, 12);
        schedule_step(&schedule);
        schedule_end(&schedule, r);
    }
    cr_expect_leq(schedule.scheduler.fair.capacity, 64);
}

/* ---- floods --------------------------------------------------------------------------------- */

enum { ADAPTERS = 8, SIMULATED = 10000, FLOOD = 6500, PLACES = 64, BUDGET = 512, BLOCKS = 4096 };

/* One request of a simulation, and when it ended. */
struct visit {
    int adapter, arrives, n_prompt, n_output, priority;
    int shared_end, own_end; /* step; on the shared machine, and on a machine of its own */
};

/* Run those visits for which adapter is `only`, or all (-1), on a machine that is 1/share of the
 * whole one. */
static void simulate(struct visit *visits, int n, int only, int share)
{
    struct request **running = calloc((size_t)n, sizeof(*running));
    int *visit_of = calloc((size_t)n, sizeof *visit_of);
    int n_here = 0, at = 0;

    schedule_open(&schedule, PLACES / share, BUDGET / share, BLOCKS / share, true);
    for (int now = 0; at < n || n_here > 0; now++) {
        for (; at < n && visits[at].arrives <= now; at++) {
            const struct visit *v = &visits[at];
            if (only >= 0 && v->adapter != only) continue;
            running[n_here] = schedule_request((uint64_t)at + 1, (uint64_t)v->adapter, v->n_prompt,
                                               v->n_prompt + v->n_output);
            running[n_here]->priority = v->priority;
            running[n_here]->tokens[0] = at; /* no beginning is like another's */
            visit_of[n_here++] = at;
            schedule_add(&schedule, running[n_here - 1]);
        }
        const struct plan *plan = schedule_step(&schedule);
        cr_assert(plan->n_rows > 0 || n_here == 0);
        for (int i = 0; i < n_here; i++) {
            if (running[i]->n_tokens < running[i]->max_total) continue;
            *(only < 0 ? &visits[visit_of[i]].shared_end : &visits[visit_of[i]].own_end) = now + 1;
            schedule_end(&schedule, running[i]);
            n_here--;
            running[i] = running[n_here];
            visit_of[i] = visit_of[n_here];
            i--;
        }
    }
    cr_expect_eq(schedule.kv.n_free, BLOCKS / share);
    schedule_close(&schedule);
    free(running);
    free(visit_of);
}

static int by_arrival(const void *a, const void *b)
{
    return ((const struct visit *)a)->arrives - ((const struct visit *)b)->arrives;
}

/* Tokens of a request: up to so many of the prompt, and of the output. */
struct sizes {
    int n_prompt, n_output;
};

static const struct sizes usual = {100, 80};

/* Adapter 0 floods with requests of one kind; the others come now and then, with about half of their
 * share at most. */
static void make_visits(struct visit *visits, struct sizes flood, struct sizes others, int priority)
{
    enum { PERIOD = 5000 };
    uint64_t random = 5;

    for (int i = 0; i < SIMULATED; i++) {
        struct visit *v = &visits[i];
        *v = (struct visit){.adapter = 1 + i % (ADAPTERS - 1), .priority = 0};
        v->arrives = random_below(&random, PERIOD);
        if (i < FLOOD) {
            v->adapter = 0;
            v->priority = priority;
            if (i < FLOOD / 2) v->arrives = 0;
        }
        const struct sizes *sizes = i < FLOOD ? &flood : &others;
        v->n_prompt = 1 + random_below(&random, sizes->n_prompt);
        v->n_output = 1 + random_below(&random, sizes->n_output);
    }
    qsort(visits, SIMULATED, sizeof *visits, by_arrival);
}

/* Nobody waits more than twice as long, from arrival to the last token, as on a machine of its own
 * that is as large as its share: an eighth of the places, of a step's tokens, of the blocks. */
static void flood(struct sizes of, struct sizes others, int priority)
{
    static struct visit visits[SIMULATED];
    long shared_sum = 0, own_sum = 0;

    make_visits(visits, of, others, priority);
    simulate(visits, SIMULATED, -1, 1);
    for (int adapter = 1; adapter < ADAPTERS; adapter++)
        simulate(visits, SIMULATED, adapter, ADAPTERS);

    for (int i = 0; i < SIMULATED; i++) {
        const struct visit *v = &visits[i];
        if (v->adapter == 0) continue;
        const int shared = v->shared_end - v->arrives, own = v->own_end - v->arrives;
        cr_assert_leq(shared, 2 * own, "request %d of adapter %d: %d steps, on its own %d", i,
                      v->adapter, shared, own);
        shared_sum += shared;
        own_sum += own;
    }
    cr_expect_leq((double)shared_sum, 1.05 * (double)own_sum, "%ld steps in all, on their own %ld",
                  shared_sum, own_sum);
}

Test(fair, a_flood_of_usual_requests_leaves_others_their_share)
{
    flood((struct sizes){80, 80}, usual, 0);
}

Test(fair, a_flood_of_urgent_requests_leaves_others_their_share)
{
    flood((struct sizes){80, 80}, usual, -5);
}

Test(fair, a_flood_of_long_outputs_leaves_others_their_share)
{
    flood((struct sizes){80, 400}, usual, 0);
}

Test(fair, a_flood_of_long_prompts_leaves_others_their_share)
{
    flood((struct sizes){1000, 20}, usual, 0);
}

Test(fair, a_flood_leaves_the_shortest_requests_their_share)
{
    flood((struct sizes){80, 80}, (struct sizes){4, 4}, 0);
}

Test(fair, a_flood_of_long_outputs_leaves_the_shortest_requests_their_share)
{
    flood((struct sizes){80, 400}, (struct sizes){4, 4}, 0);
}

Test(fair, a_flood_leaves_long_prompts_their_share)
{
    flood((struct sizes){80, 80}, (struct sizes){400, 4}, 0);
}

Test(fair, a_flood_of_long_prompts_leaves_long_prompts_their_share)
{
    flood((struct sizes){1000, 20}, (struct sizes){400, 4}, 0);
}
