/* A step that is started before the one before it has been seen: the tokens that it goes on from are
 * those that the device has just drawn. Nobody can tell by what requests get. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "engine/engine.h"
#include "tests/engine/harness.h"

static struct answer plain[4], got[4];

static mlora_engine *open_ahead(bool plans_ahead)
{
    mlora_engine *engine = open_model(LLAMA2);

    mlora_request request = greedy("sql", "Select", 1, &got[0]);

    load_adapter(engine, LLAMA2, "sql");
    submit(engine, &request); /* which brings it to the device */
    run_all(engine);
    engine->plans_ahead = plans_ahead;
    return engine;
}

static bool is_ahead(const mlora_engine *engine)
{
    return engine->scheduler.plan.n_rows > 0;
}

static void step(mlora_engine *engine)
{
    cr_assert_eq(mlora_step(engine, NULL), MLORA_OK, "%s", mlora_error());
}

/* Of different lengths, with one that stops at a text and one that is sampled. */
static void submit_some(mlora_engine *engine, struct answer *answers, int n_logprobs)
{
    static const char *const stop[] = {"e"};
    const char *const prompts[] = {"There", "Once", "Select", "How"};

    for (int i = 0; i < 4; i++) {
        mlora_request request = greedy(i == 2 ? "sql" : NULL, prompts[i], 5 + 9 * i, &answers[i]);
        request.n_logprobs = n_logprobs;
        request.seed = i;
        if (i == 1) request.temperature = 0.8f;
        if (i == 3) request.stop = stop, request.n_stop = 1;
        submit(engine, &request);
    }
}

Test(ahead, changes_no_answer)
{
    for (int n_logprobs = -1; n_logprobs <= 2; n_logprobs += 3) {
        mlora_stats stats[2];
        int n_ahead = 0;

        for (int ahead = 0; ahead < 2; ahead++) {
            struct answer *answers = ahead ? got : plain;
            mlora_engine *engine = open_ahead(ahead);
            submit_some(engine, answers, n_logprobs);
            for (int n_active = 1; n_active > 0; n_ahead += is_ahead(engine))
                cr_assert_eq(mlora_step(engine, &n_active), MLORA_OK, "%s", mlora_error());
            cr_expect_not(is_ahead(engine), "nothing is left on its way");
            mlora_engine_stats(engine, &stats[ahead]);
            mlora_close(engine);
        }
        cr_expect_gt(n_ahead, 10);
        cr_expect_eq(stats[1].n_generated_tokens, stats[0].n_generated_tokens);
        cr_expect_eq(stats[1].n_steps, stats[0].n_steps);
        cr_expect_eq(stats[1].n_free_kv_blocks, stats[0].n_free_kv_blocks);
        cr_expect_eq(plain[3].finish, MLORA_FINISH_STOP);
        for (int i = 0; i < 4; i++) {
            cr_expect_gt(plain[i].n, 0);
            expect_same_answer(&got[i], &plain[i], "ahead");
        }
    }
}

Test(ahead, cancels_in_the_next_step_without_another_token)
{
    mlora_engine *engine = open_ahead(true);
    mlora_request request = greedy(NULL, "Once", 30, &got[0]);

    const uint64_t id = submit(engine, &request);
    for (int i = 0; i < 5; i++) step(engine);
    cr_assert(is_ahead(engine));
    cr_expect_eq(got[0].n, 5);
    mlora_cancel(engine, id);
    step(engine);
    cr_expect_eq(got[0].n, 5);
    cr_expect_eq(got[0].finish, MLORA_FINISH_CANCEL);
    cr_expect_not(is_ahead(engine));

    request = greedy(NULL, "Once", 30, &got[0]);
    submit(engine, &request);
    for (int i = 0; i < 5; i++) step(engine);
    request = greedy(NULL, "There", 30, &got[1]);
    cr_assert(is_ahead(engine));
    mlora_cancel(engine, submit(engine, &request));
    mlora_cancel(engine, 1 << 20); /* of nobody */
    step(engine);
    cr_expect_eq(got[1].n, 0, "one that had only been submitted");
    cr_expect_eq(got[1].finish, MLORA_FINISH_CANCEL);
    cr_expect_eq(engine->n_cancelled, 0);
    mlora_close(engine);
}

Test(ahead, a_request_that_comes_meanwhile_joins_in_the_step_after)
{
    mlora_engine *engine = open_ahead(true);
    mlora_request request = greedy(NULL, "Once", 30, &got[0]);

    submit(engine, &request);
    for (int i = 0; i < 5; i++) step(engine);
    request = greedy(NULL, "Select", 4, &got[1]);
    submit(engine, &request);
    cr_assert(is_ahead(engine));
    step(engine); /* the one that was on its way */
    cr_expect_not(is_ahead(engine));
    cr_expect_eq(got[1].n, 0);
    step(engine);
    cr_expect_eq(got[1].n, 1);
    cr_expect_eq(got[0].n, 7, "the other keeps its pace");
    run_all(engine);
    cr_expect_eq(got[0].n, 30);
    cr_expect_eq(got[1].n, 4);
    mlora_close(engine);
}

Test(ahead, an_adapter_can_go_and_an_engine_be_closed_meanwhile)
{
    mlora_engine *engine = open_ahead(true);
    mlora_engine *alone = open_ahead(false);
    mlora_request request = greedy("sql", "Select", 12, &got[0]);

    submit(engine, &request);
    for (int i = 0; i < 5; i++) step(engine);
    cr_assert(is_ahead(engine));
    cr_expect_eq(mlora_adapter_unload(engine, "sql"), MLORA_OK);
    cr_expect_eq(mlora_adapter_random(engine, "sql", 8, 1), MLORA_OK);
    run_all(engine);
    request = greedy("sql", "Select", 12, &plain[0]);
    submit(alone, &request);
    run_all(alone);
    expect_same_answer(&got[0], &plain[0], "its adapter is unloaded");
    mlora_close(alone);

    request = greedy("sql", "Select", 12, &got[1]);
    submit(engine, &request);
    for (int i = 0; i < 5; i++) step(engine);
    cr_expect(is_ahead(engine));
    mlora_close(engine);
    cr_expect_eq(got[1].finish, MLORA_RUNNING, "an engine that is closed tells nobody");
}

Test(ahead, waits_for_what_a_penalty_or_a_guess_depends_on)
{
    mlora_engine *engine = open_ahead(true);
    mlora_request request = greedy(NULL, "Once", 30, &got[0]);

    request.repetition_penalty = 1.2f;
    const uint64_t id = submit(engine, &request);
    for (int i = 0; i < 5; i++) {
        step(engine);
        cr_expect_not(is_ahead(engine));
    }
    mlora_cancel(engine, id);
    run_all(engine);
    mlora_close(engine);
}
