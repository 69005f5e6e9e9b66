/* Adapters that come and go while requests run: more of them than the device holds, replaced ones,
 * ones that cannot be read again. */
#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A random adapter of rank 16 has 16 * 2 * 4624 bytes in each of 4 layers, 4624 being K + N of all
 * linears together: 578 KiB, so that a pool of 5 MiB holds 8. */
enum { N_ADAPTERS = 200, RANK = 16, POOL_MIB = 5, IN_POOL = 8, TOKENS = 6 };

static struct answer alone[N_ADAPTERS], together[N_ADAPTERS], extra[8];

static const char *prompt_of(int i)
{
    static const char *const prompts[] = {
        "There was once a", "How many owls live near the bridge?\n", "Rosa laughed and went home."};
    return prompts[i % 3];
}

static void random_adapters(mlora_engine *engine, int n)
{
    char name[16];
    for (int i = 0; i < n; i++) {
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(mlora_adapter_random(engine, name, RANK, (uint64_t)i + 1), MLORA_OK, "%s",
                     mlora_error());
    }
}

static void expect_answers(const struct answer *got, const struct answer *want, int n)
{
    for (int i = 0; i < n; i++) {
        char what[32];
        snprintf(what, sizeof what, "adapter %d", i);
        if (backend_under_test() == MLORA_BACKEND_CPU)
            expect_same_answer(&got[i], &want[i], what);
        else /* bits depend on the neighbours there, the first token's but for near ties do not */
            cr_expect_float_eq(got[i].logprobs[0], want[i].logprobs[0], 0.05, "%s", what);
    }
}

Test(adapters, by_the_hundred_in_a_pool_of_eight_answer_as_alone, .timeout = 120)
{
    mlora_options options = options_for(LLAMA2);
    mlora_stats stats;
    mlora_info info;
    char name[16];

    options.adapter_memory = 256; /* all of them */
    mlora_engine *engine = open_engine(&options);
    random_adapters(engine, N_ADAPTERS);
    for (int i = 0; i < N_ADAPTERS; i++) {
        snprintf(name, sizeof name, "a%d", i);
        const mlora_request request = greedy(name, prompt_of(i), TOKENS, &alone[i]);
        submit(engine, &request);
        run_all(engine);
    }
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_adapter_loads, N_ADAPTERS);
    cr_expect_eq(stats.n_adapter_evictions, 0);
    mlora_close(engine);

    options.adapter_memory = POOL_MIB;
    options.adapter_host_memory = 20;
    engine = open_engine(&options);
    mlora_engine_info(engine, &info);
    cr_expect_eq(info.adapter_bytes, POOL_MIB << 20);
    random_adapters(engine, N_ADAPTERS);
    for (int i = 0; i < N_ADAPTERS; i++) {
        const int which = i * 77 % N_ADAPTERS;
        snprintf(name, sizeof name, "a%d", which);
        const mlora_request request = greedy(name, prompt_of(which), TOKENS, &together[which]);
        submit(engine, &request);
        if (i % 8 == 7) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK, "%s", mlora_error());
        mlora_engine_stats(engine, &stats);
        cr_assert_leq(stats.adapter_bytes_used, POOL_MIB << 20);
        cr_assert_leq(stats.adapter_host_bytes_used, (int64_t)20 << 20);
    }
    run_all(engine);
    mlora_engine_stats(engine, &stats);
    cr_expect_geq(stats.n_adapter_loads, N_ADAPTERS);
    cr_expect_geq(stats.n_adapter_evictions, N_ADAPTERS - IN_POOL);
    mlora_close(engine);
    expect_answers(together, alone, N_ADAPTERS);
}

/* Files of different ranks and targets under many names, images dropped and read again. */
static void check_files_read_again(mlora_dtype dtype)
{
    static const char *const adapters[] = {"pirate", "json", "mood", "spanish", "count"};
    enum { N = 40 };
    mlora_options options = options_for(LLAMA2);
    char dir[128], name[16];

    options.lora_dtype = dtype;
    for (int pass = 0; pass < 2; pass++) {
        options.adapter_memory = pass ? 2 : 64;
        options.adapter_host_memory = pass ? 1 : 64;
        mlora_engine *engine = open_engine(&options);
        for (int i = 0; i < N; i++) {
            snprintf(dir, sizeof dir, "%s/adapters/%s", LLAMA2, adapters[i % 5]);
            snprintf(name, sizeof name, "a%d", i);
            cr_assert_eq(mlora_adapter_load(engine, dir, name), MLORA_OK, "%s", mlora_error());
        }
        for (int i = 0; i < N; i++) {
            struct answer *answer = pass ? &together[i] : &alone[i];
            snprintf(name, sizeof name, "a%d", i);
            const mlora_request request = greedy(name, prompt_of(i), TOKENS, answer);
            submit(engine, &request);
            if (pass == 0) run_all(engine);
        }
        run_all(engine);
        mlora_close(engine);
    }
    expect_answers(together, alone, N);
}

Test(adapters, from_files_that_are_read_again_answer_as_alone, .timeout = 120)
{
    check_files_read_again(MLORA_DTYPE_AUTO);
}

Test(adapters, from_files_that_are_read_and_converted_again_answer_as_alone, .timeout = 120)
{
    check_files_read_again(MLORA_DTYPE_F32);
}

Test(adapters, in_f32_answer_as_they_are_stored_and_take_twice_the_room)
{
    static struct answer answers[2];
    mlora_adapter_info info[2];

    for (int i = 0; i < 2; i++) {
        mlora_options options = options_for(LLAMA2);
        options.lora_dtype = i == 0 ? MLORA_DTYPE_AUTO : MLORA_DTYPE_F32;
        mlora_engine *engine = open_engine(&options);
        load_adapter(engine, LLAMA2, "sql");
        cr_assert_eq(mlora_adapter_describe(engine, "sql", &info[i]), MLORA_OK);
        const mlora_request request = greedy("sql", prompt_of(1), 24, &answers[i]);
        submit(engine, &request);
        run_all(engine);
        mlora_close(engine);
    }
    cr_expect_eq(info[1].bytes, 2 * info[0].bytes);
    expect_answers(&answers[1], &answers[0], 1); /* on the CPU the bits */
    cr_expect_str_eq(answers[1].text, answers[0].text);
    for (int i = 0; i < answers[0].n; i++) /* in bf16 as near as to a golden */
        cr_expect_float_eq(answers[1].logprobs[i], answers[0].logprobs[i], 0.05, "token %d", i);
}

Test(adapters, replaced_while_a_request_runs_leave_it_as_it_was)
{
    mlora_options options = options_for(LLAMA2);
    mlora_engine *engine = open_engine(&options);
    mlora_adapter_info info;

    load_adapter(engine, LLAMA2, "mood");
    load_adapter(engine, LLAMA2, "pirate");
    mlora_request request = greedy("mood", prompt_of(0), 24, &alone[0]);
    submit(engine, &request);
    request = greedy("pirate", prompt_of(0), 24, &alone[1]);
    submit(engine, &request);
    run_all(engine);

    request = greedy("mood", prompt_of(0), 24, &together[0]);
    submit(engine, &request);
    for (int i = 0; i < 4; i++) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK);
    cr_assert_eq(mlora_adapter_replace(engine, LLAMA2 "/adapters/pirate", "mood"), MLORA_OK, "%s",
                 mlora_error());
    cr_assert_eq(mlora_adapter_unload(engine, "pirate"), MLORA_OK);
    request = greedy("mood", prompt_of(0), 24, &together[1]);
    submit(engine, &request);
    run_all(engine);
    expect_answers(together, alone, 2);
    cr_expect_eq(mlora_adapter_count(engine), 1);

    /* failures leave what is there */
    cr_assert_eq(mlora_adapter_describe(engine, "mood", &info), MLORA_OK);
    const uint64_t hash = info.content_hash;
    cr_expect_eq(info.max_rank, 8);
    cr_expect_eq(info.n_requests, 0);
    cr_expect_eq(mlora_adapter_replace(engine, LLAMA2 "/adapters/none", "mood"), MLORA_EIO);
    cr_expect_eq(mlora_adapter_replace(engine, LLAMA3 "/adapters/mood", "mood"), MLORA_EFORMAT);
    cr_expect_eq(mlora_adapter_replace(engine, LLAMA2 "/adapters/mood", "moot"), MLORA_ENOTFOUND);
    cr_expect_str_eq(mlora_error(), "no adapter \"moot\"; the nearest is: mood");
    cr_assert_eq(mlora_adapter_describe(engine, "mood", &info), MLORA_OK);
    cr_expect_eq(info.content_hash, hash);
    cr_expect_eq(mlora_adapter_describe(engine, "moot", &info), MLORA_ENOTFOUND);
    mlora_close(engine);
}

/* The copy of a fixture in a directory of its own. */
static char *copy_adapter(const char *name)
{
    char command[600], *directory = strdup("/tmp/mlora-adapters-XXXXXX");

    cr_assert_not_null(mkdtemp(directory));
    snprintf(command, sizeof command, "cp %s/adapters/%s/* %s/", LLAMA2, name, directory);
    cr_assert_eq(system(command), 0);
    return directory;
}

struct told {
    mlora_finish finish;
    char error[512];
};

static void keep_error(void *user, const mlora_event *event)
{
    struct told *told = user;
    told->finish = event->finish;
    if (event->error) snprintf(told->error, sizeof told->error, "%s", event->error);
}

Test(adapters, that_changed_on_the_disk_end_their_requests_and_no_others)
{
    mlora_options options = options_for(LLAMA2);
    char *directory = copy_adapter("mood"), command[600];
    struct told told[2] = {{.finish = MLORA_RUNNING}};
    mlora_adapter_info info;
    char name[16];

    options.adapter_memory = 1;
    options.adapter_host_memory = 1;
    mlora_engine *engine = open_engine(&options);
    cr_assert_eq(mlora_adapter_load(engine, directory, "mine"), MLORA_OK, "%s", mlora_error());
    for (int i = 0; i < 4; i++) { /* they push it out of host memory */
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(mlora_adapter_load(engine, LLAMA2 "/adapters/count", name), MLORA_OK);
        const mlora_request request = greedy(name, prompt_of(0), TOKENS, &extra[i]);
        submit(engine, &request);
        run_all(engine);
    }
    snprintf(command, sizeof command, "cp %s/adapters/pirate/* %s/", LLAMA2, directory);
    cr_assert_eq(system(command), 0);

    mlora_request request = greedy("mine", prompt_of(0), TOKENS, &extra[5]);
    request.on_event = keep_error;
    for (int i = 0; i < 2; i++) {
        request.user = &told[i];
        submit(engine, &request);
    }
    const mlora_request other = greedy("a3", prompt_of(0), TOKENS, &extra[6]);
    submit(engine, &other);
    run_all(engine);
    for (int i = 0; i < 2; i++) {
        cr_expect_eq(told[i].finish, MLORA_FINISH_ERROR);
        cr_expect_not_null(strstr(told[i].error, "has changed since it was loaded: replace"), "%s",
                           told[i].error);
    }
    expect_answers(&extra[6], &extra[3], 1);
    cr_assert_eq(mlora_adapter_describe(engine, "mine", &info), MLORA_OK);
    cr_expect_not_null(strstr(info.error, "has changed since"));

    cr_assert_eq(mlora_adapter_replace(engine, directory, "mine"), MLORA_OK, "%s", mlora_error());
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(told[1].finish, MLORA_FINISH_LENGTH);
    mlora_close(engine);
    snprintf(command, sizeof command, "rm -r %s", directory);
    cr_expect_eq(system(command), 0);
    free(directory);
}

Test(adapters, too_large_for_the_pool_are_refused_with_both_sizes)
{
    mlora_options options = options_for(LLAMA2);
    options.adapter_memory = 1;
    mlora_engine *engine = open_engine(&options);

    cr_expect_eq(mlora_adapter_random(engine, "x", 64, 1), MLORA_ENOMEM);
    cr_expect_str_eq(mlora_error(),
                     "adapter \"x\" needs 2367488 bytes on the device, the pool for adapters holds "
                     "1048576: raise adapter_memory");
    cr_expect_eq(mlora_adapter_count(engine), 0);
    mlora_close(engine);
}

/* Pinned ones stay on the device while others swap. */
Test(adapters, that_are_pinned_stay)
{
    mlora_options options = options_for(LLAMA2);
    mlora_adapter_info info;
    char name[16];

    options.adapter_memory = POOL_MIB;
    mlora_engine *engine = open_engine(&options);
    random_adapters(engine, 20);
    cr_assert_eq(mlora_adapter_pin(engine, "a0", 1), MLORA_OK, "%s", mlora_error());
    cr_expect_eq(mlora_adapter_pin(engine, "b0", 1), MLORA_ENOTFOUND);
    for (int round = 0; round < 2; round++) {
        for (int i = 1; i < 20; i++) {
            snprintf(name, sizeof name, "a%d", i);
            const mlora_request request = greedy(name, prompt_of(i), 2, &together[i]);
            submit(engine, &request);
        }
        run_all(engine);
        cr_assert_eq(mlora_adapter_describe(engine, "a0", &info), MLORA_OK);
        cr_expect(info.on_device && info.pinned);
    }
    for (int i = 1; i < IN_POOL - 1; i++) {
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(mlora_adapter_pin(engine, name, 1), MLORA_OK, "%s", mlora_error());
    }
    cr_expect_eq(mlora_adapter_pin(engine, "a7", 1), MLORA_ENOMEM,
                 "the twelve others need a place");
    cr_expect_eq(mlora_adapter_pin(engine, "a0", 0), MLORA_OK);
    cr_expect_eq(mlora_adapter_pin(engine, "a7", 1), MLORA_OK);
    mlora_close(engine);
}

/* ---- fairness ------------------------------------------------------------------------------- */

/* A request that is asked again whenever it has ended. */
struct flood {
    mlora_engine *engine;
    char name[16]; /* its adapter */
    mlora_request request;
};

static void ask_again(void *user, const mlora_event *event)
{
    struct flood *flood = user;
    if (event->finish != MLORA_RUNNING) submit(flood->engine, &flood->request);
}

/* `name` has to wait for the device, on which others leave no room: steps until it has ended. */
static int steps_until_served(mlora_engine *engine, const char *name)
{
    const mlora_request request = greedy(name, prompt_of(0), TOKENS, &extra[0]);
    int n = 0;

    extra[0] = (struct answer){0};
    submit(engine, &request);
    while (extra[0].finish == MLORA_RUNNING && n++ < 1000)
        cr_assert_eq(mlora_step(engine, NULL), MLORA_OK, "%s", mlora_error());
    return n;
}

/* Three adapters fill a pool of 2 MiB; each has always requests that run. */
Test(adapters, that_fill_the_device_make_room_for_another)
{
    enum { HOT = 3, EACH = 4 };
    static struct flood floods[HOT * EACH];
    mlora_options options = options_for(LLAMA2);
    char name[16];

    options.adapter_memory = 2;
    options.max_num_seqs = 16;
    options.max_batch_tokens = 64;
    mlora_engine *engine = open_engine(&options);
    random_adapters(engine, 20);
    for (int i = 0; i < HOT * EACH; i++) {
        floods[i].engine = engine;
        snprintf(floods[i].name, sizeof floods[i].name, "a%d", i % HOT);
        floods[i].request = greedy(floods[i].name, prompt_of(i), 20 + i, &extra[1]);
        floods[i].request.on_event = ask_again;
        floods[i].request.user = &floods[i];
        floods[i].request.ignore_eos = 1;
        submit(engine, &floods[i].request);
    }
    for (int i = 0; i < 40; i++) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK);
    for (int i = HOT; i < HOT + 10; i++) {
        snprintf(name, sizeof name, "a%d", i);
        /* 8 virtual tokens a step to each of the hot: 12 steps for 32 of half a step's tokens and 16
         * for each of four that are computed again, as many while it is brought and served */
        const int n = steps_until_served(engine, name);
        cr_expect_leq(n, 40, "%s: %d steps", name, n);
    }
    mlora_close(engine);
}

/* ---- threads -------------------------------------------------------------------------------- */

struct client {
    mlora_engine *engine;
    struct answer *answers;
    int first, n;
};

static void *submit_many(void *context)
{
    const struct client *client = context;
    char name[16];

    for (int i = client->first; i < client->first + client->n; i++) {
        snprintf(name, sizeof name, "a%d", i % 20);
        const mlora_request request = greedy(name, prompt_of(i % 20), TOKENS, &client->answers[i]);
        if (mlora_submit(client->engine, &request, NULL) != MLORA_OK) return context;
    }
    return NULL;
}

Test(adapters, are_wanted_from_any_thread_while_steps_run, .timeout = 120)
{
    enum { CLIENTS = 3, EACH = 40 };
    mlora_options options = options_for(LLAMA2);
    pthread_t threads[CLIENTS];
    struct client clients[CLIENTS];
    mlora_stats stats;

    options.adapter_memory = POOL_MIB;
    options.adapter_host_memory = 6;
    mlora_engine *engine = open_engine(&options);
    random_adapters(engine, 20);
    for (int i = 0; i < 20; i++) {
        char name[16];
        snprintf(name, sizeof name, "a%d", i);
        const mlora_request request = greedy(name, prompt_of(i), TOKENS, &alone[i]);
        submit(engine, &request);
        run_all(engine);
    }
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = (struct client){engine, together, i * EACH, EACH};
        cr_assert_eq(pthread_create(&threads[i], NULL, submit_many, &clients[i]), 0);
    }
    for (int i = 0; i < 20; i++) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK);
    for (int i = 0; i < CLIENTS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        cr_expect_null(failed);
    }
    run_all(engine);
    for (int i = 0; i < CLIENTS * EACH; i++) expect_answers(&together[i], &alone[i % 20], 1);
    mlora_engine_stats(engine, &stats);
    cr_expect_leq(stats.adapter_host_bytes_used, (int64_t)6 << 20);
    mlora_close(engine);
}

/* Closing does not wait for requests: what is on its way is dropped. */
Test(adapters, on_their_way_when_the_engine_closes_leave_nothing)
{
    mlora_options options = options_for(LLAMA2);
    options.adapter_memory = POOL_MIB;
    mlora_engine *engine = open_engine(&options);
    random_adapters(engine, 20);
    for (int i = 0; i < 20; i++) {
        char name[16];
        snprintf(name, sizeof name, "a%d", i);
        const mlora_request request = greedy(name, prompt_of(i), TOKENS, &alone[i]);
        submit(engine, &request);
    }
    cr_expect_eq(mlora_step(engine, NULL), MLORA_OK);
    mlora_close(engine);
}
