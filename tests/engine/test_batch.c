/* The rule above all others: a request's output does not depend on its neighbours. */
#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const adapters[] = {"pirate", "json",    "sql",   "mood",
                                       "shout",  "spanish", "count", NULL};
enum { N_ADAPTERS = 8, REQUESTS = 48 };

static const char *const prompts[] = {
    "There was once a",
    "How many owls live near the bridge?\n",
    "Rosa laughed and went home.",
    "One snowy morning Uma the kind otter found a silver lantern near the windmill, and then",
    "a",
};
enum { N_PROMPTS = 5 };

static struct answer alone[REQUESTS], together[REQUESTS];

/* Requests of every adapter, greedy and sampled, short and long, with and without penalties. */
static mlora_request request_number(int i, struct answer *answer)
{
    mlora_request request =
        greedy(adapters[i % N_ADAPTERS], prompts[i % N_PROMPTS], 4 + i % 17, answer);
    request.prompt_logprobs = i % 5 == 0;
    request.seed = 1000 + i;
    if (i % 3 == 1) request.temperature = 0.9f;
    if (i % 3 == 2) {
        request.temperature = 1.2f;
        request.top_k = 40;
        request.top_p = 0.9f;
        request.min_p = 0.01f;
        request.repetition_penalty = 1.1f;
        request.presence_penalty = 0.2f;
        request.frequency_penalty = 0.1f;
    }
    return request;
}

static mlora_engine *open_with_adapters(const mlora_options *options)
{
    mlora_engine *engine = open_engine(options);
    for (int i = 0; adapters[i]; i++) load_adapter(engine, LLAMA2, adapters[i]);
    return engine;
}

static void run_alone(const mlora_options *options)
{
    mlora_options without = *options;
    without.no_prefix_cache = 1;
    mlora_engine *engine = open_with_adapters(&without);
    for (int i = 0; i < REQUESTS; i++) {
        const mlora_request request = request_number(i, &alone[i]);
        submit(engine, &request);
        run_all(engine);
    }
    mlora_close(engine);
}

/* Submit all in a shuffled order, some of them while others run, and compare with each alone. */
static void run_together(const mlora_options *options, unsigned seed, mlora_stats *stats)
{
    mlora_engine *engine = open_with_adapters(options);
    int order[REQUESTS];

    for (int i = 0; i < REQUESTS; i++) order[i] = i;
    for (int i = REQUESTS - 1; i > 0; i--) {
        seed = seed * 1664525u + 1013904223u;
        const int j = (int)(seed >> 8) % (i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
    for (int i = 0; i < REQUESTS; i++) {
        const mlora_request request = request_number(order[i], &together[order[i]]);
        submit(engine, &request);
        if (i % 4 == 3) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK, "%s", mlora_error());
    }
    run_all(engine);
    mlora_engine_stats(engine, stats);
    cr_expect_eq(stats->n_free_kv_blocks, options->kv_blocks, "a KV block leaked");
    mlora_close(engine);

    for (int i = 0; i < REQUESTS; i++) {
        char what[64];
        snprintf(what, sizeof what, "request %d", i);
        expect_same_answer(&together[i], &alone[i], what);
    }
}

/* On a GPU the kernels choose by the sizes of a step how they sum, so bits may differ with the
 * neighbours, by rounding: bf16 has 8 bits, logits are about 10, four layers deep. */
Test(batch, gives_each_request_what_it_gets_alone_within_rounding)
{
    const mlora_options options = options_for(LLAMA2);
    mlora_engine *engine = open_with_adapters(&options);

    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < REQUESTS; i++) {
            struct answer *answer = pass ? &together[i] : &alone[i];
            mlora_request request =
                greedy(adapters[i % N_ADAPTERS], prompts[i % N_PROMPTS], 4 + i % 17, answer);
            request.n_logprobs = 2;
            submit(engine, &request);
            if (pass == 0) run_all(engine);
        }
        run_all(engine);
    }
    for (int i = 0; i < REQUESTS; i++) {
        const struct answer *one = &alone[i], *many = &together[i];
        for (int t = 0; t < one->n && t < many->n; t++) {
            if (one->ids[t] != many->ids[t]) {
                cr_assert_lt(one->margin[t], 0.25, "request %d token %d: %d alone, %d together", i,
                             t, one->ids[t], many->ids[t]);
                break; /* another text follows a near tie */
            }
            cr_assert_float_eq(one->logprobs[t], many->logprobs[t], 0.05,
                               "request %d token %d: %f alone, %f together", i, t,
                               (double)one->logprobs[t], (double)many->logprobs[t]);
        }
    }
    mlora_close(engine);
}

/* What follows is in f32: to the bit on the CPU, and on a GPU by as little as the order of a sum
 * can change, see expect_same_answer(). */
static mlora_options options_in_f32(void)
{
    mlora_options options = options_for(LLAMA2);
    options.dtype = MLORA_DTYPE_F32;
    return options;
}

Test(batch, gives_each_request_what_it_gets_alone)
{
    mlora_options options = options_in_f32();
    mlora_stats stats;

    run_alone(&options);
    run_together(&options, 1, &stats);
    cr_expect_eq(stats.n_preemptions, 0);

    options.n_threads = 1;
    run_together(&options, 2, &stats);

    options.max_num_seqs = 5; /* most of them wait */
    options.max_batch_tokens = 7;
    run_together(&options, 3, &stats);
}

/* Results of products are not rounded there however many tokens a step has. */
Test(batch, on_the_cpu_gives_the_same_bits_in_bf16_too)
{
    mlora_options options = options_for(LLAMA2);
    mlora_stats stats;

    options.backend = MLORA_BACKEND_CPU;
    options.dtype = MLORA_DTYPE_BF16;
    run_alone(&options);
    run_together(&options, 5, &stats);
}

Test(batch, preempting_and_resuming_changes_nothing)
{
    mlora_options options = options_in_f32();
    mlora_stats stats;

    run_alone(&options);
    options.max_model_len = 64;
    options.kv_blocks = 6; /* 96 tokens for all of them together */
    run_together(&options, 4, &stats);
    cr_expect_gt(stats.n_preemptions, 0, "memory was meant to be short");
}

Test(batch, a_prompt_in_pieces_is_the_prompt_in_one)
{
    mlora_options options = options_in_f32();
    static struct answer whole, pieces;
    char prompt[2000] = "";

    for (int i = 0; i < 40; i++) strcat(prompt, "Uma the otter found a red kite. ");
    mlora_engine *engine = open_with_adapters(&options);
    mlora_request request = greedy("shout", prompt, 8, &whole);
    request.prompt_logprobs = 1;
    submit(engine, &request);
    run_all(engine);
    mlora_close(engine);

    options.max_num_seqs = 3;
    options.max_batch_tokens = 3;
    engine = open_with_adapters(&options);
    request = greedy("shout", prompt, 8, &pieces);
    request.prompt_logprobs = 1;
    submit(engine, &request);
    run_all(engine);
    mlora_close(engine);

    cr_expect_gt(whole.n_prompt, 300);
    expect_same_answer(&pieces, &whole, "in pieces of 3 tokens");
}

Test(batch, the_same_seed_gives_the_same_text_and_another_seed_another)
{
    const mlora_options options = options_for(LLAMA2);
    mlora_engine *engine = open_engine(&options);
    static struct answer first, second, other;

    mlora_request request = greedy(NULL, "There was once a", 32, &first);
    request.temperature = 1.5f;
    request.seed = 7;
    submit(engine, &request);
    request.user = &second;
    submit(engine, &request);
    request.user = &other;
    request.seed = 8;
    submit(engine, &request);
    run_all(engine);
    expect_same_answer(&second, &first, "the same seed");
    cr_expect(strcmp(other.text, first.text) != 0, "%s", first.text);
    mlora_close(engine);
}
