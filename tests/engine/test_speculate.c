/* Guesses change nothing but the number of steps: the tokens, log-probabilities, text and end of a
 * request are to the bit those it gets without, whatever its sampling and its neighbours. */
#include "engine/speculate.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "tests/engine/harness.h"
#include "tests/support.h"

/* ---- the distribution ----------------------------------------------------------------------- */

enum { V = 5, CHAIN = 2000, DRAWS = 100000 };

/* Of a chain in which the token before says how likely each next one is. */
static const float chain_logits[V][V] = {
    {0, 2, 1, -1, 0}, {1, 0, 3, 0, 0}, {2, 1, 0, 1, -2}, {0, 0, 0, 0, 0}, {-1, 0, 1, 2, 3}};

/* What one draw reads and writes on the device, made once and used again. */
struct draw_memory {
    float *logits;
    struct sampling *sampling;
    int32_t *no_history, *ids;
};

static struct draw_memory draw_memory(void)
{
    const int32_t no_history[MAX_DRAFT + 2] = {0};
    return (struct draw_memory){
        .logits = device_memory(sizeof(float[MAX_DRAFT + 1][V])),
        .sampling = device_memory(sizeof(struct sampling[MAX_DRAFT + 1])),
        .no_history = upload(no_history, sizeof no_history),
        .ids = device_memory(sizeof(int32_t[MAX_DRAFT + 1])),
    };
}

/* As a step does it: the positions after the last token and after each of n guesses are drawn
 * together, and those that count are appended. Returns the number of right guesses. */
static int extend_chain(const struct draw_memory *memory, int32_t *tokens, int *n_tokens, int n,
                        uint64_t seed, float temperature)
{
    float logits[MAX_DRAFT + 1][V];
    struct sampling sampling[MAX_DRAFT + 1];
    int32_t drawn[MAX_DRAFT + 1];

    for (int j = 0; j <= n; j++) {
        memcpy(logits[j], chain_logits[tokens[*n_tokens - 1 + j]], sizeof logits[j]);
        sampling[j] = (struct sampling){.temperature = temperature,
                                        .top_p = 1,
                                        .seed = seed,
                                        .repetition_penalty = 1,
                                        .draw = (uint32_t)(*n_tokens - 1 + j)};
    }
    dev->ops->upload(dev, memory->logits, logits, (size_t)(n + 1) * sizeof logits[0]);
    dev->ops->upload(dev, memory->sampling, sampling, (size_t)(n + 1) * sizeof sampling[0]);
    const struct sample_view view = {n + 1, memory->sampling, memory->no_history,
                                     memory->no_history, memory->no_history};
    dev->ops->sample(dev, memory->ids, memory->logits, &view, V);
    download(drawn, memory->ids, (size_t)(n + 1) * sizeof *drawn);

    const int right = count_accepted(tokens + *n_tokens, drawn, n);
    memcpy(tokens + *n_tokens, drawn, (size_t)(right + 1) * sizeof *drawn);
    *n_tokens += right + 1;
    return right;
}

static double p_of(int before, int v, double temperature)
{
    double sum = 0;
    for (int u = 0; u < V; u++) sum += exp((double)chain_logits[before][u] / temperature);
    return exp((double)chain_logits[before][v] / temperature) / sum;
}

TestSuite(speculate_draws, .init = device_open, .fini = device_close);

Test(speculate_draws, of_100000_tokens_follow_the_model)
{
    static int32_t tokens[CHAIN + MAX_DRAFT + 1], plain[CHAIN + MAX_DRAFT + 1];
    static double seen[V][V], from[V];
    const struct draw_memory memory = draw_memory();
    const double temperature = 0.8;
    long n_drafted = 0, n_accepted = 0;
    double chi = 0;

    for (int c = 0; c < DRAWS / CHAIN; c++) {
        int n = 1, n_plain = 1;
        struct pace pace = {0};
        tokens[0] = plain[0] = c % V;
        while (n <= CHAIN) {
            const int drafts = ngram_draft(tokens, n, pace_next(&pace, 8));
            const int right =
                extend_chain(&memory, tokens, &n, drafts, (uint64_t)c, (float)temperature);
            if (drafts > 0) pace_learn(&pace, drafts, right);
            n_drafted += drafts;
            n_accepted += right;
        }
        while (n_plain <= CHAIN)
            extend_chain(&memory, plain, &n_plain, 0, (uint64_t)c, (float)temperature);
        cr_assert_arr_eq(tokens, plain, CHAIN * sizeof *tokens, "chain %d", c);
        for (int i = 1; i <= CHAIN; i++) {
            seen[tokens[i - 1]][tokens[i]]++;
            from[tokens[i - 1]]++;
        }
    }
    for (int b = 0; b < V; b++)
        for (int v = 0; v < V; v++) {
            const double want = from[b] * p_of(b, v, temperature);
            chi += (seen[b][v] - want) * (seen[b][v] - want) / want;
        }
    cr_expect_lt(chi, 45.3, "chi-squared %g with 20 degrees of freedom: 45.3 is 1 in 1000", chi);
    cr_expect_gt(n_accepted, 10000);
    cr_expect_gt(n_drafted - n_accepted, 10000);
}

/* ---- the engine ----------------------------------------------------------------------------- */

static const char *const adapters[] = {"pirate", "json", "sql", "mood", NULL, "spanish"};
enum { N_ADAPTERS = 6, REQUESTS = 24 };

static const char *const prompts[] = {
    "Tim has a red hat. Tim has a red hat. Tim has a red hat. Tim has a",
    "How many owls live near the bridge?\nHow many owls live near the",
    "one two three one two three one two three one",
    "Rosa laughed and went home.",
};

static struct answer without[REQUESTS], with[REQUESTS];

/* Of every adapter, greedy and sampled, with penalties, log-probabilities, stop strings. */
static mlora_request request_number(int i, struct answer *answer)
{
    static const char *const stop[] = {"the", "."};
    mlora_request request =
        greedy(adapters[i % N_ADAPTERS], prompts[i % 4], 6 + 3 * (i % 11), answer);

    request.seed = 77 + i;
    request.ignore_eos = i % 4 != 3;
    request.n_logprobs = i % 3;
    request.prompt_logprobs = i % 5 == 0;
    if (i % 5 == 1) request.temperature = 0.5f;
    if (i % 5 == 2) {
        request.temperature = 1.0f;
        request.top_k = 10;
        request.top_p = 0.9f;
    }
    if (i % 5 == 3) {
        request.repetition_penalty = 1.05f;
        request.frequency_penalty = 0.05f;
    }
    if (i % 7 == 6) {
        request.stop = stop;
        request.n_stop = 2;
    }
    return request;
}

static mlora_options small_options(mlora_speculate speculate, int max_num_seqs, int kv_blocks)
{
    mlora_options options = options_for(LLAMA2);

    options.dtype = MLORA_DTYPE_F32;
    options.speculate = speculate;
    options.max_num_seqs = max_num_seqs;
    options.kv_blocks = kv_blocks;
    return options;
}

/* An engine whose guesses cost nothing, so that it makes as many as it can. */
static mlora_engine *open_eager(const mlora_options *options)
{
    mlora_engine *engine = open_engine(options);

    engine->speculation.pass_cost = 0;
    engine->speculation.ignores_clock = true;
    return engine;
}

static mlora_engine *open_with_adapters(const mlora_options *options)
{
    mlora_engine *engine = open_eager(options);

    for (int i = 0; i < N_ADAPTERS; i++)
        if (adapters[i]) load_adapter(engine, LLAMA2, adapters[i]);
    return engine;
}

static void run_requests(const mlora_options *options, struct answer *answers, mlora_stats *stats)
{
    mlora_engine *engine = open_with_adapters(options);

    for (int i = 0; i < REQUESTS; i++) {
        const mlora_request request = request_number(i, &answers[i]);
        submit(engine, &request);
    }
    run_all(engine);
    mlora_engine_stats(engine, stats);
    cr_expect_eq(stats->n_free_kv_blocks, options->kv_blocks, "a KV block leaked");
    mlora_close(engine);
}

static void expect_same_answers(const char *how)
{
    for (int i = 0; i < REQUESTS; i++) {
        char what[64];
        snprintf(what, sizeof what, "%s: request %d", how, i);
        expect_same_answer(&with[i], &without[i], what);
    }
}

static void expect_right_and_wrong(const mlora_stats *stats)
{
    cr_expect_gt(stats->n_accepted_tokens, 0);
    cr_expect_gt(stats->n_drafted_tokens, stats->n_accepted_tokens);
}

Test(speculate, changes_no_answer)
{
    mlora_options options = small_options(MLORA_SPECULATE_OFF, 1, 256);
    mlora_stats plain, stats;

    run_requests(&options, without, &plain);
    cr_expect_eq(plain.n_drafted_tokens, 0);
    options.speculate = MLORA_SPECULATE_NGRAM;
    run_requests(&options, with, &stats);
    expect_same_answers("one by one");
    expect_right_and_wrong(&stats);
    cr_expect_lt(stats.n_steps, plain.n_steps);
    cr_expect_eq(stats.n_generated_tokens, plain.n_generated_tokens);

    options = small_options(MLORA_SPECULATE_NGRAM, 4, 256);
    run_requests(&options, with, &stats);
    expect_same_answers("four together");
    expect_right_and_wrong(&stats);

    options = small_options(MLORA_SPECULATE_NGRAM, 4, 7);
    options.max_model_len = 7 * 16;
    run_requests(&options, with, &stats);
    expect_same_answers("short of blocks");
    expect_right_and_wrong(&stats);
    cr_expect_gt(stats.n_preemptions, 0);
}

/* ---- a draft model -------------------------------------------------------------------------- */

Test(speculate, with_a_draft_model_changes_no_answer)
{
    mlora_options options = small_options(MLORA_SPECULATE_OFF, 1, 256);
    mlora_stats plain, stats;

    run_requests(&options, without, &plain);
    options.speculate = MLORA_SPECULATE_DRAFT;
    options.draft_model = LLAMA2;
    options.max_draft = 4;
    run_requests(&options, with, &stats);
    expect_same_answers("one by one");
    expect_right_and_wrong(&stats);
    cr_expect_lt(stats.n_steps, plain.n_steps);

    options.max_num_seqs = 4;
    options.kv_blocks = 7;
    options.max_model_len = 7 * 16;
    options.max_batch_tokens = 16; /* it follows long prompts in several steps */
    run_requests(&options, with, &stats);
    expect_same_answers("short of blocks");
    expect_right_and_wrong(&stats);
    cr_expect_gt(stats.n_preemptions, 0);
}

/* A model that guesses its own greedy tokens is always right: lengths of 2, then 4 guesses, and a
 * token after each. */
Test(speculate, by_the_model_itself_is_right)
{
    static struct answer answer;
    mlora_options options = small_options(MLORA_SPECULATE_DRAFT, 1, 64);
    mlora_request request = greedy(NULL, "There was once a", 32, &answer);
    mlora_stats stats;

    options.draft_model = LLAMA2;
    options.max_draft = 4;
    request.ignore_eos = 1;
    mlora_engine *engine = open_eager(&options);
    submit(engine, &request);
    run_all(engine);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(answer.n, 32);
    cr_expect_eq(answer.finish, MLORA_FINISH_LENGTH);
    cr_expect_eq(stats.n_drafted_tokens, stats.n_accepted_tokens);
    /* 1 of the prompt's step, 3, 5 times 5, then 3 are left: 2 guesses and a token */
    cr_expect_eq(stats.n_steps, 8);
    cr_expect_eq(stats.n_accepted_tokens, 24);
    mlora_close(engine);
}

/* One token after another, with the model's own guesses, so that a stop string, an end token and
 * the limit come at every place of a run. */
Test(speculate, ends_at_every_place_of_a_run)
{
    static struct answer plain, answer;
    mlora_options options = small_options(MLORA_SPECULATE_OFF, 1, 64);
    mlora_engine *alone = open_engine(&options);
    options.speculate = MLORA_SPECULATE_DRAFT;
    options.draft_model = LLAMA2;
    mlora_engine *engine = open_eager(&options);

    for (int n = 0; n <= 20; n++) {
        char what[32];
        snprintf(what, sizeof what, "%d tokens", n);
        mlora_request request = greedy(NULL, "There was once a", n, &plain);
        submit(alone, &request);
        run_all(alone);
        request = greedy(NULL, "There was once a", n, &answer);
        submit(engine, &request);
        run_all(engine);
        expect_same_answer(&answer, &plain, what);
    }
    for (size_t at = 0; at + 3 < plain.bytes; at += 3) {
        const char word[4] = {plain.text[at], plain.text[at + 1], plain.text[at + 2], 0};
        const char *const stop[] = {word};
        static struct answer stopped;
        mlora_request request = greedy(NULL, "There was once a", 20, &stopped);
        request.stop = stop;
        request.n_stop = 1;
        submit(alone, &request);
        run_all(alone);
        request.user = memset(&answer, 0, sizeof answer);
        submit(engine, &request);
        run_all(engine);
        cr_expect_eq(stopped.finish, MLORA_FINISH_STOP);
        expect_same_answer(&answer, &stopped, word);
    }
    mlora_close(alone);
    mlora_close(engine);
}

struct cancelling {
    mlora_engine *engine;
    struct answer answer;
};

static void cancel_third(void *user, const mlora_event *event)
{
    struct cancelling *cancelling = user;

    collect(&cancelling->answer, event);
    if (cancelling->answer.n == 3) mlora_cancel(cancelling->engine, event->id);
}

Test(speculate, can_be_cancelled_inside_a_run)
{
    static struct cancelling cancelling;
    static struct answer plain;
    mlora_options options = small_options(MLORA_SPECULATE_DRAFT, 2, 64);
    mlora_stats stats;

    options.draft_model = LLAMA2;
    mlora_engine *engine = open_eager(&options);
    mlora_request request = greedy(NULL, "There was once a", 40, &plain);
    request.ignore_eos = 1;
    submit(engine, &request);
    run_all(engine);
    cancelling.engine = engine;
    request.on_event = cancel_third;
    request.user = &cancelling;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(cancelling.answer.finish, MLORA_FINISH_CANCEL);
    cr_expect_lt(cancelling.answer.n, 40);
    cr_expect_arr_eq(cancelling.answer.ids, plain.ids,
                     (size_t)cancelling.answer.n * sizeof *plain.ids);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_free_kv_blocks, options.kv_blocks);
    mlora_close(engine);
}

static void expect_refused(const mlora_options *options, const char *text)
{
    mlora_engine *engine = NULL;

    cr_expect_eq(mlora_open(&engine, options), MLORA_EINVAL);
    cr_expect_null(engine);
    cr_expect(strstr(mlora_error(), text), "%s", mlora_error());
}

Test(speculate, refuses_another_vocabulary)
{
    mlora_options options = small_options(MLORA_SPECULATE_DRAFT, 2, 64);

    options.draft_model = LLAMA3;
    expect_refused(&options,
                   LLAMA3 ": its tokenizer has 1369 tokens, the model's has 2048: a draft "
                          "model needs the same vocabulary");
    char directory[] = "/tmp/mlora-speculate-XXXXXX", command[200];
    cr_assert_not_null(mkdtemp(directory));
    snprintf(command, sizeof command, "sed 's/<0x41>/<0xZZ>/' %s > %s/tokenizer.json",
             LLAMA2 "/tokenizer.json", directory);
    cr_assert_eq(system(command), 0);
    options.tokenizer = directory;
    options.draft_model = LLAMA2;
    expect_refused(&options,
                   LLAMA2 ": token 68 is not what it is in the model's tokenizer: a draft "
                          "model needs the same vocabulary");
    snprintf(command, sizeof command, "rm -r %s", directory);
    cr_assert_eq(system(command), 0);
    options.tokenizer = NULL;
    options.draft_model = "tests/fixtures/peft/llama";
    expect_refused(&options, "tests/fixtures/peft/llama/config.json: vocab_size is ");
    expect_refused(&options, ", the model's is 2048: a draft model needs the same vocabulary");
}

Test(speculate, refuses_options_that_do_not_fit)
{
    mlora_options options = small_options(MLORA_SPECULATE_DRAFT, 2, 64);

    expect_refused(&options,
                   "option speculate draft needs draft_model: the directory of a smaller model");
    options.speculate = MLORA_SPECULATE_NGRAM;
    options.draft_model = LLAMA2;
    expect_refused(&options, "option draft_model needs speculate draft");
    options.draft_model = NULL;
    options.max_draft = 33;
    expect_refused(&options, "option max_draft is 33, must be from 0 to 32 (0: default)");
    options.max_draft = 0;
    options.speculate = (mlora_speculate)3;
    expect_refused(&options, "option speculate is 3, must be from 0 to 2 (0: default)");
}

/* A draft model as large as the model cannot gain: it is left alone but for a try now and then. */
Test(speculate, rests_with_a_draft_model_that_is_too_large)
{
    static struct answer answer;
    mlora_options options = options_for(LLAMA2);
    mlora_request request = greedy(NULL, "There was once a", 200, &answer);
    mlora_stats stats;

    options.speculate = MLORA_SPECULATE_DRAFT;
    options.draft_model = LLAMA2;
    request.ignore_eos = 1;
    mlora_engine *engine = open_engine(&options);
    engine->speculation.ignores_clock = true; /* by the sizes of the models */
    submit(engine, &request);
    run_all(engine);
    mlora_engine_stats(engine, &stats);
    cr_expect_gt(stats.n_drafted_tokens, 0);
    cr_expect_gt(stats.n_steps, 150, "%d steps", (int)stats.n_steps);
    mlora_close(engine);
}

/* With a penalty below zero a text repeats itself, and each guess counts in the penalties of what is
 * drawn after it. */
Test(speculate, counts_guesses_in_penalties)
{
    static struct answer plain, answer;
    mlora_options options = small_options(MLORA_SPECULATE_OFF, 1, 64);
    mlora_engine *alone = open_engine(&options);
    mlora_stats stats;

    options.speculate = MLORA_SPECULATE_NGRAM;
    mlora_engine *engine = open_eager(&options);
    for (int seed = 0; seed < 6; seed++) {
        mlora_request request = greedy(NULL, prompts[0], 80, &plain);
        request.temperature = 2.0f;
        request.frequency_penalty = -2.5f;
        request.ignore_eos = 1;
        request.seed = seed;
        submit(alone, &request);
        run_all(alone);
        request.user = memset(&answer, 0, sizeof answer);
        engine->speculation.rest = engine->speculation.misses = 0; /* of the one before */
        submit(engine, &request);
        run_all(engine);
        expect_same_answer(&answer, &plain, "a text that repeats itself");
    }
    mlora_engine_stats(engine, &stats);
    expect_right_and_wrong(&stats);
    mlora_close(alone);
    mlora_close(engine);
}
