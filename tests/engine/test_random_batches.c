/* Hundreds of random schedules with a real model, if a small one: whatever comes, runs, is set
 * back, found in the cache or cancelled beside it, a request gets what it gets alone. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "engine/engine.h"
#include "tests/engine/harness.h"

#define MODEL "tests/fixtures/peft/llama"

enum { REQUESTS = 60, SOME = 6, ROUNDS = 80, PROMPT_MAX = 50 };

static const char *const adapters[] = {NULL,   "plain",      "dora",   "alora",
                                       "head", "saved-both", "bdlora", "alora-bias"};

static struct answer alone[REQUESTS], together[REQUESTS];
static uint64_t state;
static long n_ahead; /* steps that were started before the one before them was over */

static int below(int n)
{
    state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
    return (int)((state >> 33) % (uint64_t)n);
}

static mlora_engine *open_machine(int max_num_seqs, int max_batch_tokens, int kv_blocks,
                                  int no_prefix_cache, mlora_speculate speculate)
{
    mlora_options options = options_for(MODEL);

    options.tokenizer = LLAMA2; /* prompts are ids */
    options.n_threads = 1;
    options.max_num_seqs = max_num_seqs;
    options.max_batch_tokens = max_batch_tokens;
    options.kv_blocks = kv_blocks;
    options.no_prefix_cache = no_prefix_cache;
    options.speculate = speculate;
    mlora_engine *engine = open_engine(&options);
    for (int i = 1; i < 8; i++) load_adapter(engine, MODEL, adapters[i]);
    return engine;
}

/* Request number i, always the same; prompts of three beginnings. */
static uint64_t submit_number(mlora_engine *engine, int i, int priority, struct answer *answer)
{
    static const int32_t pattern[14] = {1, 55, 52, 9, 47, 7, 8, 52, 25, 7, 8, 11, 9, 5};
    int32_t ids[PROMPT_MAX];
    const int n = 2 + i * 37 % (PROMPT_MAX - 2);
    mlora_request request = greedy(adapters[i % 8], NULL, 1 + i % 12, answer);

    for (int t = 0; t < n; t++) ids[t] = pattern[(t + t / 14 + (t > 20 ? i % 3 : 0)) % 14];
    request.ids = ids;
    request.n_ids = n;
    request.ignore_eos = 1;
    request.priority = priority;
    request.seed = i;
    request.prompt_logprobs = i % 7 == 0;
    if (i % 3 == 1) request.temperature = 0.9f;
    if (i % 3 == 2) request.repetition_penalty = 1.2f;
    return submit(engine, &request);
}

static void expect_as_alone(int i, bool cancelled)
{
    const struct answer *got = &together[i], *want = &alone[i];
    char what[64];

    snprintf(what, sizeof what, "request %d", i);
    if (got->finish == MLORA_FINISH_CANCEL) {
        cr_assert(cancelled);
        cr_assert_arr_eq(got->ids, want->ids, (size_t)got->n * sizeof *got->ids, "%s", what);
        return;
    }
    expect_same_answer(got, want, what);
}

static void step(mlora_engine *engine, int *n_active)
{
    cr_assert_eq(mlora_step(engine, n_active), MLORA_OK, "%s", mlora_error());
    n_ahead += engine->scheduler.plan.n_rows > 0;
}

/* A few requests, some steps between them, some cancelled. */
static void run_round(mlora_engine *engine)
{
    int chosen[SOME];
    bool cancelled[SOME];

    for (int i = 0; i < SOME; i++) {
        chosen[i] = below(REQUESTS / SOME) * SOME + i; /* each at most once */
        cancelled[i] = below(16) == 0;
        const uint64_t id = submit_number(engine, chosen[i], below(3), &together[chosen[i]]);
        for (int n = below(4); n > 0; n--) step(engine, NULL);
        if (cancelled[i]) mlora_cancel(engine, id);
    }
    for (int n_active = 1; n_active > 0;) step(engine, &n_active);
    for (int i = 0; i < SOME; i++) expect_as_alone(chosen[i], cancelled[i]);
}

Test(random_batches, give_each_request_what_it_gets_alone)
{
    const struct {
        int max_num_seqs, max_batch_tokens, kv_blocks, no_prefix_cache;
        bool short_of_blocks;
        mlora_speculate speculate;
        bool plans_ahead;
    } machines[] = {{8, 64, 256, 0, false, MLORA_SPECULATE_OFF, false},
                    {8, 64, 256, 0, false, MLORA_SPECULATE_OFF, true},
                    {3, 7, 64, 0, false, MLORA_SPECULATE_OFF, false},
                    {6, 20, 4, 0, true, MLORA_SPECULATE_OFF, true},
                    {6, 20, 5, 1, true, MLORA_SPECULATE_OFF, false},
                    {4, 20, 64, 0, false, MLORA_SPECULATE_NGRAM, true},
                    {6, 20, 4, 0, true, MLORA_SPECULATE_NGRAM, false}};
    mlora_stats stats;
    if (backend_under_test() != MLORA_BACKEND_CPU) return; /* bits are promised on the CPU */

    mlora_engine *engine = open_machine(1, 512, 64, 1, MLORA_SPECULATE_OFF);
    for (int i = 0; i < REQUESTS; i++) {
        submit_number(engine, i, 0, &alone[i]);
        run_all(engine);
    }
    mlora_close(engine);
    for (size_t m = 0; m < sizeof machines / sizeof machines[0]; m++) {
        engine =
            open_machine(machines[m].max_num_seqs, machines[m].max_batch_tokens,
                         machines[m].kv_blocks, machines[m].no_prefix_cache, machines[m].speculate);
        engine->plans_ahead = machines[m].plans_ahead;
        n_ahead = 0;
        for (int round = 0; round < ROUNDS; round++) {
            run_round(engine);
            mlora_engine_stats(engine, &stats);
            cr_assert_eq(stats.n_free_kv_blocks, machines[m].kv_blocks, "a KV block leaked");
        }
        cr_expect_eq(stats.n_cached_tokens == 0, machines[m].no_prefix_cache, "machine %zu", m);
        cr_expect_eq(stats.n_accepted_tokens > 0, machines[m].speculate, "machine %zu", m);
        cr_expect_eq(n_ahead > ROUNDS, machines[m].plans_ahead, "machine %zu: %ld", m, n_ahead);
        cr_expect(stats.n_preemptions > 0 || !machines[m].short_of_blocks, "machine %zu", m);
        mlora_close(engine);
    }
}
