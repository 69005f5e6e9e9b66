/* Plans, worked by hand. */
#include <criterion/criterion.h>

#include "tests/engine/schedule.h"

/* An adapter on its way to the device. */
static struct registered away = {.resident = {.state = RESIDENT_COMING}};

static struct schedule schedule;

static void open_scheduler(int max_running, int max_tokens, int n_blocks)
{
    schedule_open(&schedule, max_running, max_tokens, n_blocks, false);
}

static void close_scheduler(void)
{
    schedule_close(&schedule);
}

static struct request *new_request(uint64_t id, int n_prompt, int max_total)
{
    return schedule_request(id, 0, n_prompt, max_total);
}

static const struct plan *plan_step(void)
{
    return scheduler_plan(&schedule.scheduler, &schedule.kv);
}

static void end_request(struct request *request)
{
    schedule_end(&schedule, request);
}

static void carry_out(const struct plan *plan)
{
    schedule_carry_out(&schedule, plan);
}

TestSuite(scheduler, .fini = close_scheduler);

Test(scheduler, admits_in_arrival_order_up_to_its_limit)
{
    open_scheduler(2, 100, 100);
    struct request *a = new_request(1, 10, 20), *b = new_request(2, 20, 30),
                   *c = new_request(3, 5, 10);
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    schedule_add(&schedule, c);

    const struct plan *plan = plan_step();
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, a);
    cr_expect_eq(plan->rows[1].request, b);
    cr_expect_eq(plan->n_tokens, 30);
    cr_expect(plan->rows[0].samples && plan->rows[1].samples);
    cr_expect_eq(schedule.kv.n_free, 100 - 1 - 2); /* 10 tokens: 1 block of 16; 20 tokens: 2 */
    carry_out(plan);

    end_request(a);
    plan = plan_step();
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].n_tokens, 1, "b draws its next token");
    cr_expect_eq(plan->rows[1].request, c, "c has joined the batch that runs");
    cr_expect_eq(plan->rows[1].n_tokens, 5);
    end_request(b);
    end_request(c);
    cr_expect_eq(schedule.kv.n_free, 100);
}

Test(scheduler, cuts_long_prompts_and_never_holds_decoding_rows_back)
{
    open_scheduler(4, 8, 100);
    struct request *a = new_request(1, 3, 40), *b = new_request(2, 20, 40);
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);

    const int b_pieces[] = {5, 7, 7, 1};
    for (int step = 0; step < 4; step++) {
        const struct plan *plan = plan_step();
        cr_assert_eq(plan->n_rows, 2);
        cr_expect_eq(plan->rows[0].n_tokens, step == 0 ? 3 : 1, "a is never held back");
        cr_expect_eq(plan->rows[1].n_tokens, b_pieces[step]);
        cr_expect_eq(plan->rows[1].samples, step == 3);
        carry_out(plan);
    }
    end_request(a);
    end_request(b);
}

Test(scheduler, sets_the_last_admitted_back_when_blocks_run_out)
{
    open_scheduler(4, 64, 3);
    struct request *a = new_request(1, 16, 48), *b = new_request(2, 15, 32),
                   *c = new_request(3, 15, 32);
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    schedule_add(&schedule, c);

    const struct plan *plan = plan_step(); /* one block each */
    cr_assert_eq(plan->n_rows, 3);
    carry_out(plan);

    plan = plan_step(); /* a needs a second block: c gives its own */
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, a);
    cr_expect_eq(plan->rows[1].request, b);
    cr_expect_eq(schedule.scheduler.fair.accounts[0].first, c);
    cr_expect_eq(c->n_computed, 0);
    cr_expect_eq(c->n_tokens, 16, "what c has generated is kept");
    cr_expect_eq(schedule.scheduler.n_preemptions, 1);
    carry_out(plan);

    plan = plan_step(); /* b needs a second block: itself is the last */
    cr_assert_eq(plan->n_rows, 1);
    cr_expect_eq(plan->rows[0].request, a);
    cr_expect_eq(schedule.scheduler.fair.accounts[0].first, b);
    cr_expect_eq(b->next, c, "b, admitted before c, waits before it");

    end_request(a);
    plan = plan_step();
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, b);
    cr_expect_eq(plan->rows[0].n_tokens, 17, "prompt and output are computed again");
    end_request(b);
    end_request(c);
    cr_expect_eq(schedule.kv.n_free, 3);
}

Test(scheduler, admits_the_lower_priority_number_first_and_sets_the_higher_back_first)
{
    open_scheduler(2, 64, 3);
    struct request *a = new_request(1, 15, 48), *b = new_request(2, 15, 32),
                   *c = new_request(3, 15, 32);
    a->priority = 5;
    b->priority = 7;
    c->priority = -1;
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    schedule_add(&schedule, c);

    const struct plan *plan = plan_step();
    cr_assert_eq(plan->n_rows, 2, "there are two places");
    cr_expect_eq(plan->rows[0].request, c);
    cr_expect_eq(plan->rows[1].request, a);
    carry_out(plan);
    carry_out(plan_step()); /* 16 tokens each */

    plan =
        plan_step(); /* both need a second block, there is one: a is set back, though it came first */
    cr_assert_eq(plan->n_rows, 1);
    cr_expect_eq(plan->rows[0].request, c);
    cr_expect_eq(schedule.scheduler.n_preemptions, 1);
    carry_out(plan);
    end_request(c);

    plan = plan_step();
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, a, "before b, in spite of what it has had");
    cr_expect_eq(plan->rows[0].n_tokens, 17);
    cr_expect_eq(plan->rows[1].request, b);
    end_request(a);
    end_request(b);
    cr_expect_eq(schedule.kv.n_free, 3);
}

Test(scheduler, lets_no_request_wait_for_the_adapter_of_another)
{
    open_scheduler(4, 64, 100);
    struct request *a = schedule_request(1, 1, 10, 20), *b = schedule_request(2, 1, 10, 20),
                   *c = schedule_request(3, 2, 10, 20);
    a->adapter = &away;
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    schedule_add(&schedule, c);

    const struct plan *plan = plan_step();
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, b);
    cr_expect_eq(plan->rows[1].request, c);
    carry_out(plan);
    a->adapter = NULL;
    plan = plan_step();
    cr_assert_eq(plan->n_rows, 3);
    cr_expect_eq(plan->rows[2].request, a);
    end_request(a);
    end_request(b);
    end_request(c);
}

Test(scheduler, groups_rows_by_adapter)
{
    struct registered adapters[2] = {{.resident = {.state = RESIDENT_HERE, .slot = 3}},
                                     {.resident = {.state = RESIDENT_HERE}}};
    struct request *requests[5];
    static const int order[5] = {1, 3, 4, 0, 2};

    open_scheduler(5, 100, 100);
    for (int i = 0; i < 5; i++) requests[i] = schedule_request((uint64_t)i + 1, 0, 10, 20);
    requests[0]->adapter = requests[2]->adapter = &adapters[0];
    requests[4]->adapter = &adapters[1];
    for (int i = 0; i < 5; i++) schedule_add(&schedule, requests[i]);
    const struct plan *plan = plan_step();
    cr_assert_eq(plan->n_rows, 5);
    scheduler_group_rows(&schedule.scheduler);
    for (int i = 0; i < 5; i++)
        cr_expect_eq(plan->rows[i].request, requests[order[i]], "row %d", i);
    for (int i = 0; i < 5; i++) {
        requests[i]->adapter = NULL;
        end_request(requests[i]);
    }
}

Test(scheduler, finds_and_removes_requests_wherever_they_are)
{
    open_scheduler(1, 64, 100);
    struct request *r[4];
    for (int i = 0; i < 4; i++) {
        r[i] = schedule_request((uint64_t)i + 1, (uint64_t)i % 2, 10, 20);
        schedule_add(&schedule, r[i]);
    }
    schedule_step(&schedule);
    cr_expect_eq(schedule.scheduler.n_running, 1);
    cr_expect_eq(schedule.scheduler.fair.n_waiting, 3);
    for (uint64_t id = 1; id <= 4; id++)
        cr_expect_eq(scheduler_find(&schedule.scheduler, id), r[id - 1]);
    cr_expect_null(scheduler_find(&schedule.scheduler, 5));
    end_request(r[2]);
    cr_expect_null(scheduler_find(&schedule.scheduler, 3));
    cr_expect_eq(schedule.scheduler.fair.n_waiting, 2);

    struct request *any;
    int n = 0;
    for (; (any = scheduler_any(&schedule.scheduler)) != NULL; n++) end_request(any);
    cr_expect_eq(n, 3);
    cr_expect_eq(schedule.scheduler.fair.n_waiting, 0);
    cr_expect_eq(schedule.kv.n_free, 100);
}

/* ---- planning ahead ------------------------------------------------------------------------- */

static bool plan_next(void)
{
    return scheduler_plan_next(&schedule.scheduler, &schedule.kv);
}

static void advance(void)
{
    carry_out(&schedule.scheduler.plan);
    scheduler_advance(&schedule.scheduler);
}

Test(scheduler, plans_ahead_what_goes_on)
{
    open_scheduler(4, 64, 8);
    struct request *a = new_request(1, 5, 20), *b = new_request(2, 15, 17),
                   *c = new_request(3, 16, 30);
    const struct plan *next = &schedule.scheduler.next, *plan = &schedule.scheduler.plan;
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    schedule_add(&schedule, c);
    plan_step();
    cr_expect_eq(schedule.kv.n_free, 8 - 3);

    cr_assert(plan_next());
    cr_assert_eq(next->n_rows, 3);
    cr_expect_eq(next->rows[2].request, c);
    cr_expect_eq(next->rows[2].first, 16);
    cr_expect_eq(next->rows[2].feed, 2, "the third draw of the step before");
    cr_expect_eq(schedule.kv.n_free, 8 - 4, "c needs a second block");
    advance();

    cr_assert(plan_next()); /* b is at its length with what is drawn now */
    cr_assert_eq(next->n_rows, 2);
    cr_expect_eq(next->rows[0].request, a);
    cr_expect_eq(next->rows[1].request, c);
    cr_expect_eq(next->rows[1].feed, 2, "b's draw stands between");
    advance();
    cr_expect_eq(b->n_tokens, b->max_total);
    end_request(b);
    end_request(a);
    cr_expect_null(plan->rows[0].request, "its row is dropped");
    cr_assert(plan_next());
    cr_assert_eq(next->n_rows, 1);
    cr_expect_eq(next->rows[0].request, c);
    cr_expect_eq(next->rows[0].feed, 1, "what was drawn for a is skipped");
    advance();
    end_request(c);
    cr_expect_not(plan_next(), "nobody is left");
    cr_expect_eq(schedule.kv.n_free, 8);
}

Test(scheduler, does_not_plan_ahead_of_what_is_not_known)
{
    open_scheduler(2, 12, 4);
    struct request *a = new_request(1, 5, 60), *b = new_request(2, 16, 60),
                   *c = new_request(3, 5, 60);
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    plan_step();
    cr_expect_not(plan_next(), "b's prompt goes on");
    advance();
    plan_step();
    a->sampling.frequency_penalty = 1;
    cr_expect_not(plan_next(), "the penalty of what is drawn");
    a->sampling.frequency_penalty = 0;
    scheduler_add_drafts(&schedule.scheduler, &schedule.scheduler.plan.rows[0], 1);
    cr_expect_not(plan_next(), "guesses may be wrong");
    advance();
    plan_step();
    end_request(b);
    schedule_add(&schedule, c);
    cr_expect_not(plan_next(), "there is a place for c");
    advance();
    struct request *d = new_request(4, 5, 60);
    schedule_add(&schedule, d);
    plan_step();
    for (int i = 0; i < 8; i++) {
        cr_assert(plan_next(), "d waits, but there is no place");
        advance();
    }
    cr_expect_not(plan_next(), "it may be owed one");
    end_request(a);
    end_request(c);
    end_request(d);
}

Test(scheduler, does_not_plan_ahead_without_blocks)
{
    open_scheduler(2, 64, 3);
    struct request *a = new_request(1, 16, 40), *b = new_request(2, 16, 40);
    schedule_add(&schedule, a);
    schedule_add(&schedule, b);
    plan_step();
    cr_expect_not(plan_next(), "each needs a second block, one is free");
    cr_expect_eq(schedule.kv.n_free, 1, "nothing is taken");
    cr_expect_eq(schedule.scheduler.next.n_rows, 0);
    advance();
    end_request(a);
    plan_step();
    cr_expect(plan_next());
    end_request(b);
}
