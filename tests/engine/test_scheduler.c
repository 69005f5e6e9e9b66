/* Plans, worked by hand. */
#include "engine/scheduler.h"

#include <criterion/criterion.h>
#include <stdlib.h>

static struct scheduler scheduler;
static struct kvcache kv;

static void open_scheduler(int max_running, int max_tokens, int n_blocks)
{
    cr_assert_eq(scheduler_open(&scheduler, max_running, max_tokens), MLORA_OK);
    cr_assert_eq(kvcache_open(&kv, n_blocks), MLORA_OK);
}

static void close_scheduler(void)
{
    scheduler_close(&scheduler);
    kvcache_close(&kv);
}

/* A request with a prompt of n tokens that may grow to max_total. */
static struct request *new_request(uint64_t id, int n_prompt, int max_total)
{
    struct request *r = calloc(1, sizeof *r);
    r->id = id;
    r->n_prompt = r->n_tokens = n_prompt;
    r->max_total = max_total;
    r->blocks = calloc((size_t)kvcache_blocks_for(max_total), sizeof *r->blocks);
    r->tokens = calloc((size_t)max_total, sizeof *r->tokens);
    return r;
}

static void end_request(struct request *r)
{
    scheduler_remove(&scheduler, r, &kv);
    free(r->blocks);
    free(r->tokens);
    free(r);
}

/* What a step does to the plan's requests: computed, and one more token where one was drawn. */
static void carry_out(const struct plan *plan)
{
    for (int q = 0; q < plan->n_rows; q++) {
        struct request *r = plan->rows[q].request;
        r->n_computed += plan->rows[q].n_tokens;
        if (plan->rows[q].samples && r->n_tokens < r->max_total) r->n_tokens++;
    }
}

TestSuite(scheduler, .fini = close_scheduler);

Test(scheduler, admits_in_arrival_order_up_to_its_limit)
{
    open_scheduler(2, 100, 100);
    struct request *a = new_request(1, 10, 20), *b = new_request(2, 20, 30),
                   *c = new_request(3, 5, 10);
    scheduler_add(&scheduler, a);
    scheduler_add(&scheduler, b);
    scheduler_add(&scheduler, c);

    const struct plan *plan = scheduler_plan(&scheduler, &kv);
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, a);
    cr_expect_eq(plan->rows[1].request, b);
    cr_expect_eq(plan->n_tokens, 30);
    cr_expect(plan->rows[0].samples && plan->rows[1].samples);
    cr_expect_eq(kv.n_free, 100 - 1 - 2); /* 10 tokens: 1 block of 16; 20 tokens: 2 */
    carry_out(plan);

    end_request(a);
    plan = scheduler_plan(&scheduler, &kv);
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].n_tokens, 1, "b draws its next token");
    cr_expect_eq(plan->rows[1].request, c, "c has joined the batch that runs");
    cr_expect_eq(plan->rows[1].n_tokens, 5);
    end_request(b);
    end_request(c);
    cr_expect_eq(kv.n_free, 100);
}

Test(scheduler, cuts_long_prompts_and_never_holds_decoding_rows_back)
{
    open_scheduler(4, 8, 100);
    struct request *a = new_request(1, 3, 40), *b = new_request(2, 20, 40);
    scheduler_add(&scheduler, a);
    scheduler_add(&scheduler, b);

    const int b_pieces[] = {5, 7, 7, 1};
    for (int step = 0; step < 4; step++) {
        const struct plan *plan = scheduler_plan(&scheduler, &kv);
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
    scheduler_add(&scheduler, a);
    scheduler_add(&scheduler, b);
    scheduler_add(&scheduler, c);

    const struct plan *plan = scheduler_plan(&scheduler, &kv); /* one block each */
    cr_assert_eq(plan->n_rows, 3);
    carry_out(plan);

    plan = scheduler_plan(&scheduler, &kv); /* a needs a second block: c gives its own */
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, a);
    cr_expect_eq(plan->rows[1].request, b);
    cr_expect_eq(scheduler.first_waiting, c);
    cr_expect_eq(c->n_computed, 0);
    cr_expect_eq(c->n_tokens, 16, "what c has generated is kept");
    cr_expect_eq(scheduler.n_preemptions, 1);
    carry_out(plan);

    plan = scheduler_plan(&scheduler, &kv); /* b needs a second block: itself is the last */
    cr_assert_eq(plan->n_rows, 1);
    cr_expect_eq(plan->rows[0].request, a);
    cr_expect_eq(scheduler.first_waiting, b);
    cr_expect_eq(b->next, c, "b, admitted before c, waits before it");

    end_request(a);
    plan = scheduler_plan(&scheduler, &kv);
    cr_assert_eq(plan->n_rows, 2);
    cr_expect_eq(plan->rows[0].request, b);
    cr_expect_eq(plan->rows[0].n_tokens, 17, "prompt and output are computed again");
    end_request(b);
    end_request(c);
    cr_expect_eq(kv.n_free, 3);
}

Test(scheduler, random_schedules_leak_no_block_and_share_none)
{
    enum { N = 40, BLOCKS = 12 };
    static bool owned[BLOCKS];
    unsigned random = 1;

    for (int round = 0; round < 200; round++) {
        struct request *requests[N] = {0};
        int n_added = 0, n_done = 0;
        open_scheduler(1 + round % 6, 8 + round % 20, BLOCKS);

        while (n_done < N) {
            random = random * 1664525u + 1013904223u;
            if (n_added < N && (random >> 16) % 3 != 0) {
                const int n = 1 + (int)(random >> 20) % 100;
                const int total = n + 1 + (int)(random >> 8) % 60;
                requests[n_added] = new_request((uint64_t)n_added + 1, n, total);
                scheduler_add(&scheduler, requests[n_added++]);
            }
            const struct plan *plan = scheduler_plan(&scheduler, &kv);
            int n_owned = 0;
            for (int b = 0; b < BLOCKS; b++) owned[b] = false;
            for (int i = 0; i < scheduler.n_running; i++)
                for (int b = 0; b < scheduler.running[i]->n_blocks; b++) {
                    cr_assert_not(owned[scheduler.running[i]->blocks[b]], "a block has two owners");
                    owned[scheduler.running[i]->blocks[b]] = true;
                    n_owned++;
                }
            cr_assert_eq(n_owned + kv.n_free, BLOCKS);
            cr_assert_leq(plan->n_tokens, scheduler.max_batch_tokens);
            cr_assert(plan->n_rows > 0 || !scheduler.first_waiting, "somebody always runs");
            for (int q = 0; q < plan->n_rows; q++)
                cr_assert_geq(plan->rows[q].request->n_blocks * 16,
                              plan->rows[q].request->n_computed + plan->rows[q].n_tokens);
            carry_out(plan);
            for (int i = 0; i < n_added; i++)
                if (requests[i] && requests[i]->n_tokens == requests[i]->max_total) {
                    end_request(requests[i]);
                    requests[i] = NULL;
                    n_done++;
                }
        }
        cr_assert_eq(kv.n_free, BLOCKS);
        close_scheduler();
    }
}
