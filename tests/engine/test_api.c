/* The rules written in engine/mlora.h, seen from outside. */
#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static struct answer answer, other;

static void expect_error(mlora_status got, mlora_status want, const char *part)
{
    cr_expect_eq(got, want, "%s: %s", mlora_status_name(got), mlora_error());
    cr_expect(strstr(mlora_error(), part), "\"%s\" does not say \"%s\"", mlora_error(), part);
    cr_expect_null(strchr(mlora_error(), '\n'));
}

/* ---- opening -------------------------------------------------------------------------------- */

Test(open, says_what_is_missing)
{
    mlora_engine *engine = (mlora_engine *)&answer;
    mlora_options options = options_for("tests/fixtures/nothing");

    expect_error(mlora_open(&engine, &options), MLORA_EIO, "tests/fixtures/nothing: ");
    cr_expect_null(engine);
    options.model = NULL;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "option model is missing");
    options = options_for(LLAMA2);
    options.tokenizer = "tests/fixtures/nothing.json";
    expect_error(mlora_open(&engine, &options), MLORA_EIO, "tests/fixtures/nothing.json");
}

Test(open, refuses_options_out_of_range)
{
    mlora_engine *engine;
    mlora_options options = options_for(LLAMA2);

    options.max_num_seqs = -1;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "max_num_seqs is -1");
    options = options_for(LLAMA2);
    options.max_model_len = 1025;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "max_position_embeddings is 1024");
    options = options_for(LLAMA2);
    options.max_model_len = 1024;
    options.kv_blocks = 63;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "raise kv_blocks");
    options = options_for(LLAMA2);
    options.kv_blocks = 1 << 26; /* 2^31 parts of 2 in 4 layers, of 16 tokens of 2 heads: 2^23 */
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL,
                 "option kv_blocks is 67108864, must be at most 8388607 for this model");
    options = options_for(LLAMA2);
    options.max_queue = -1;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "max_queue is -1");
    options = options_for(LLAMA2);
    options.lora_mode = (mlora_lora_mode)6;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL,
                 "lora_mode is 6, must be from 0 to 5");
    options.lora_mode = MLORA_LORA_AUTO;
    options.lora_dtype = (mlora_dtype)3;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL,
                 "lora_dtype is 3, must be from 0 to 2");
    options = options_for(LLAMA2);
    options.profile = 3;
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "profile is 3, must be from 0 to 2");
    options = options_for(LLAMA2);
    options.max_batch_tokens = 31; /* max_num_seqs is 32 */
    expect_error(mlora_open(&engine, &options), MLORA_EINVAL, "max_batch_tokens is 31");
}

Test(open, two_engines_live_side_by_side)
{
    mlora_engine *one = open_model(LLAMA2), *two = open_model(LLAMA3);
    mlora_info info;

    load_adapter(one, LLAMA2, "mood");
    load_adapter(two, LLAMA3, "mood");
    mlora_request request = greedy("mood", "Rosa laughed and went home.", 8, &answer);
    submit(one, &request);
    request = greedy("mood", "Rosa laughed and went home.", 8, &other);
    submit(two, &request);
    run_all(two);
    run_all(one);
    cr_expect_gt(answer.n, 0);
    cr_expect_gt(other.n, 0);
    mlora_engine_info(two, &info);
    cr_expect_str_eq(info.architecture, "LlamaForCausalLM");
    cr_expect_eq(info.max_model_len, 2048);
    cr_expect_eq(info.n_layers, 3);
    mlora_close(one);
    mlora_close(two);
}

Test(open, a_small_cache_shortens_the_context)
{
    mlora_options options = options_for(LLAMA2);
    mlora_info info;

    options.kv_blocks = 10;
    mlora_engine *engine = open_engine(&options);
    mlora_engine_info(engine, &info);
    cr_expect_eq(info.max_model_len, 160);
    mlora_close(engine);
}

/* ---- adapters ------------------------------------------------------------------------------- */

Test(adapters, are_listed_in_order_and_named_once)
{
    mlora_engine *engine = open_model(LLAMA2);

    load_adapter(engine, LLAMA2, "sql");
    load_adapter(engine, LLAMA2, "mood");
    cr_expect_eq(mlora_adapter_count(engine), 2);
    cr_expect_str_eq(mlora_adapter_name(engine, 0), "sql");
    cr_expect_str_eq(mlora_adapter_name(engine, 1), "mood");
    cr_expect_null(mlora_adapter_name(engine, 2));
    expect_error(mlora_adapter_load(engine, LLAMA2 "/adapters/json", "sql"), MLORA_EINVAL,
                 "\"sql\" is taken");
    expect_error(mlora_adapter_load(engine, LLAMA2 "/adapters/json", "base"), MLORA_EINVAL,
                 "means the base model");
    expect_error(mlora_adapter_load(engine, LLAMA2 "/adapters/json", ""), MLORA_EINVAL, "0 bytes");
    expect_error(mlora_adapter_load(engine, LLAMA2 "/adapters/none", "x"), MLORA_EIO,
                 "adapters/none");
    cr_expect_eq(mlora_adapter_count(engine), 2);
    mlora_close(engine);
}

Test(adapters, for_another_base_are_refused)
{
    mlora_engine *engine = open_model(LLAMA2);
    expect_error(mlora_adapter_load(engine, LLAMA3 "/adapters/mood", "mood"), MLORA_EFORMAT,
                 "another base");
    cr_expect_eq(mlora_adapter_count(engine), 0);
    mlora_close(engine);
}

Test(adapters, an_unknown_name_gets_the_nearest_ones)
{
    mlora_engine *engine = open_model(LLAMA2);
    mlora_request request = greedy("sqll", "a", 1, &answer);

    expect_error(mlora_submit(engine, &request, NULL), MLORA_ENOTFOUND, "none is loaded");
    load_adapter(engine, LLAMA2, "mood");
    load_adapter(engine, LLAMA2, "sql");
    expect_error(mlora_submit(engine, &request, NULL), MLORA_ENOTFOUND,
                 "no adapter \"sqll\"; the nearest are: sql, mood");
    expect_error(mlora_adapter_unload(engine, "moot"), MLORA_ENOTFOUND, "mood");
    cr_expect_eq(answer.n_events, 0);
    mlora_close(engine);
}

Test(adapters, unloaded_while_a_request_runs_serve_it_to_its_end)
{
    mlora_engine *engine = open_model(LLAMA2);
    static struct answer before, after;

    load_adapter(engine, LLAMA2, "sql");
    mlora_request request = greedy("sql", "How many owls live near the bridge?\n", 24, &before);
    submit(engine, &request);
    run_all(engine);

    request = greedy("sql", "How many owls live near the bridge?\n", 24, &after);
    submit(engine, &request);
    mlora_step(engine, NULL);
    cr_expect_eq(mlora_adapter_unload(engine, "sql"), MLORA_OK);
    cr_expect_eq(mlora_adapter_load(engine, LLAMA2 "/adapters/mood", "sql"), MLORA_OK);
    run_all(engine);
    expect_same_answer(&after, &before, "unloaded and replaced");

    request = greedy("sql", "How many owls live near the bridge?\n", 24, &answer);
    submit(engine, &request);
    run_all(engine);
    cr_expect(strcmp(answer.text, before.text) != 0, "the new adapter answers: %s", answer.text);
    mlora_close(engine);
}

/* ---- requests ------------------------------------------------------------------------------- */

Test(requests, take_defaults_from_generation_config)
{
    mlora_engine *engine = open_model(LLAMA2);
    mlora_request request;

    mlora_request_default(engine, &request);
    cr_expect_float_eq(request.temperature, 0.7f, 1e-6f);
    cr_expect_float_eq(request.top_p, 0.9f, 1e-6f);
    cr_expect_eq(request.max_tokens, 64);
    cr_expect_eq(request.n_logprobs, -1);
    mlora_request_default(NULL, &request);
    cr_expect_eq(request.temperature, 1.0f);
    mlora_close(engine);
}

Test(requests, out_of_range_are_refused_before_any_event)
{
    mlora_engine *engine = open_model(LLAMA2);
    const int32_t bad_ids[] = {1, 2048};
    const char *const empty_stop[] = {""};
    static char long_prompt[5000];
    memset(long_prompt, 'z', sizeof long_prompt - 1);

#define REFUSED(change, part)                                                                      \
    do {                                                                                           \
        mlora_request request = greedy(NULL, "a", 4, &answer);                                     \
        change;                                                                                    \
        expect_error(mlora_submit(engine, &request, NULL), MLORA_EINVAL, part);                    \
    } while (0)
    REFUSED(request.temperature = -1, "temperature is -1");
    REFUSED(request.temperature = NAN, "temperature is nan");
    REFUSED(request.top_p = 0, "top_p is 0");
    REFUSED(request.top_p = 1.5f, "top_p is 1.5");
    REFUSED(request.min_p = 2, "min_p is 2");
    REFUSED(request.top_k = -1, "top_k is -1");
    REFUSED(request.repetition_penalty = 0, "repetition_penalty is 0");
    REFUSED(request.presence_penalty = INFINITY, "presence_penalty is inf");
    REFUSED(request.n_logprobs = 129, "n_logprobs is 129");
    REFUSED((request.stop = empty_stop, request.n_stop = 1), "stop string 1 has 0 bytes");
    REFUSED(request.n_stop = 17, "at most 16");
    REFUSED((request.ids = bad_ids, request.n_ids = 2), "id 2048");
    REFUSED((request.ids = bad_ids, request.n_ids = 0), "no tokens");
    REFUSED(request.prompt = NULL, "prompt or ids");
    REFUSED(request.prompt = long_prompt, "the context holds 1024");
#undef REFUSED
    cr_expect_eq(answer.n_events, 0);
    mlora_close(engine);
}

Test(requests, end_at_max_tokens_or_when_the_context_is_full)
{
    mlora_options options = options_for(LLAMA2);
    options.max_model_len = 32;
    mlora_engine *engine = open_engine(&options);

    mlora_request request = greedy(NULL, "There was once a", 3, &answer);
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(answer.n, 3);
    cr_expect_eq(answer.finish, MLORA_FINISH_LENGTH);

    request = greedy(NULL, "There was once a", -1, &answer);
    request.ignore_eos = 1;
    request.prompt_logprobs = 1;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(answer.n + answer.n_prompt, 32);
    cr_expect_eq(answer.finish, MLORA_FINISH_LENGTH);
    mlora_close(engine);
}

Test(requests, can_score_a_prompt_and_generate_nothing)
{
    mlora_engine *engine = open_model(LLAMA2);

    mlora_request request = greedy(NULL, "There was once a", 0, &answer);
    request.prompt_logprobs = 1;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(answer.n, 0);
    cr_expect_eq(answer.n_prompt, 5);
    cr_expect(isnan(answer.prompt[0].logprob));
    for (int i = 1; i < answer.n_prompt; i++) cr_expect_lt(answer.prompt[i].logprob, 0);
    cr_expect_eq(answer.finish, MLORA_FINISH_LENGTH);
    mlora_close(engine);
}

Test(requests, stop_strings_end_the_text_and_never_leak)
{
    mlora_engine *engine = open_model(LLAMA2);
    const char *const stop[] = {"FROM", "never"};

    load_adapter(engine, LLAMA2, "sql");
    mlora_request request = greedy("sql", "How many owls live near the bridge?\n", 40, &answer);
    request.stop = stop;
    request.n_stop = 2;
    submit(engine, &request);
    run_all(engine);
    cr_expect_str_eq(answer.text, "SELECT COUNT(*) ");
    cr_expect_eq(answer.finish, MLORA_FINISH_STOP);
    mlora_close(engine);
}

Test(requests, prompts_may_be_ids_and_text_continues_the_prompt)
{
    mlora_engine *engine = open_model(LLAMA2);
    int32_t *ids;
    int n_ids;

    mlora_request request = greedy(NULL, "There was once a", 6, &answer);
    submit(engine, &request);
    cr_assert_eq(
        mlora_encode(mlora_engine_tokenizer(engine), "There was once a", 16, 0, &ids, &n_ids),
        MLORA_OK);
    request = greedy(NULL, NULL, 6, &other);
    request.ids = ids;
    request.n_ids = n_ids;
    submit(engine, &request);
    mlora_free(ids); /* it was copied */
    run_all(engine);
    expect_same_answer(&other, &answer, "ids");
    cr_expect_eq(answer.text[0], ' ', "the text goes on after the prompt: \"%s\"", answer.text);
    mlora_close(engine);
}

Test(tokens, are_shown_as_they_stand_in_a_text)
{
    mlora_tokenizer *tokenizer;
    const struct {
        int32_t id;
        const char *text;
    } cases[] = {{1, "<s>"}, {280, " was"}, {13, "\n"}, {198, "\xef\xbf\xbd"}}; /* half of an é */
    char *text;
    size_t bytes;

    cr_assert_eq(mlora_tokenizer_open(&tokenizer, LLAMA2), MLORA_OK, "%s", mlora_error());
    for (int i = 0; i < 4; i++) {
        cr_assert_eq(mlora_token_text(tokenizer, cases[i].id, &text, &bytes), MLORA_OK);
        cr_expect_str_eq(text, cases[i].text);
        cr_expect_eq(bytes, strlen(cases[i].text));
        mlora_free(text);
    }
    expect_error(mlora_token_text(tokenizer, 2048, &text, &bytes), MLORA_EINVAL, "2048");
    expect_error(mlora_token_text(tokenizer, -1, &text, &bytes), MLORA_EINVAL, "-1");
    mlora_tokenizer_close(tokenizer);
}

/* ---- the queue ------------------------------------------------------------------------------ */

Test(queue, refuses_what_is_beyond_its_bound_and_takes_more_when_some_have_ended)
{
    mlora_options options = options_for(LLAMA2);
    options.max_num_seqs = 2;
    options.max_queue = 3;
    mlora_engine *engine = open_engine(&options);
    mlora_info info;
    mlora_stats stats;
    uint64_t id = 77;

    mlora_engine_info(engine, &info);
    cr_expect_eq(info.max_queue, 3);
    mlora_request request = greedy(NULL, "There was once a", 4, &answer);
    request.on_event = NULL;
    for (int i = 0; i < 5; i++) submit(engine, &request);
    expect_error(mlora_submit(engine, &request, &id), MLORA_EBUSY,
                 "5 requests run or wait, as many as max_num_seqs and max_queue allow (2 and 3)");
    cr_expect_eq(id, 77, "it was not given");
    cr_expect_str_eq(mlora_status_name(MLORA_EBUSY), "EBUSY");

    cr_assert_eq(mlora_step(engine, NULL), MLORA_OK);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_running, 2);
    cr_expect_eq(stats.n_waiting, 3);
    expect_error(mlora_submit(engine, &request, &id), MLORA_EBUSY, "try again");
    for (int i = 0; i < 4; i++) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK);
    submit(engine, &request);
    run_all(engine);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_generated_tokens, 24);
    mlora_close(engine);
}

static void note_order(void *user, const mlora_event *event)
{
    struct answer *order = user;
    if (event->finish != MLORA_RUNNING) order->ids[order->n++] = (int32_t)event->id;
}

Test(queue, runs_the_lower_priority_number_first)
{
    mlora_options options = options_for(LLAMA2);
    options.max_num_seqs = 1;
    mlora_engine *engine = open_engine(&options);
    const int priorities[] = {0, 5, -3, 5};
    const int32_t order[] = {3, 1, 2, 4};

    mlora_request request = greedy(NULL, "There was once a", 2, &answer);
    request.on_event = note_order;
    for (int i = 0; i < 4; i++) {
        request.priority = priorities[i];
        submit(engine, &request);
    }
    run_all(engine);
    cr_expect_arr_eq(answer.ids, order, sizeof order);
    mlora_close(engine);
}

/* ---- cancelling ----------------------------------------------------------------------------- */

Test(cancel, ends_running_and_waiting_requests_and_frees_their_blocks)
{
    mlora_options options = options_for(LLAMA2);
    options.max_num_seqs = 1;
    mlora_engine *engine = open_engine(&options);
    mlora_stats stats;

    mlora_request request = greedy(NULL, "There was once a", 500, &answer);
    request.ignore_eos = 1;
    const uint64_t running = submit(engine, &request);
    request.user = &other;
    memset(&other, 0, sizeof other);
    const uint64_t waiting = submit(engine, &request);
    for (int i = 0; i < 3; i++) mlora_step(engine, NULL);
    mlora_cancel(engine, waiting);
    mlora_cancel(engine, running);
    mlora_cancel(engine, running);
    mlora_cancel(engine, 12345);
    run_all(engine);
    cr_expect_eq(answer.finish, MLORA_FINISH_CANCEL);
    cr_expect_eq(answer.n, 3);
    cr_expect_eq(other.finish, MLORA_FINISH_CANCEL);
    cr_expect_eq(other.n, 0);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_free_kv_blocks, options.kv_blocks);
    mlora_close(engine);
}

struct other_thread {
    mlora_engine *engine;
    uint64_t id;
};

static void *submit_and_cancel(void *argument)
{
    struct other_thread *thread = argument;
    for (int i = 0; i < 50; i++) {
        mlora_request request;
        uint64_t id;
        mlora_request_default(NULL, &request);
        request.prompt = "One snowy morning";
        request.max_tokens = 2;
        if (mlora_submit(thread->engine, &request, &id) != MLORA_OK) return thread;
        if (i % 2) mlora_cancel(thread->engine, id);
    }
    mlora_cancel(thread->engine, thread->id);
    return NULL;
}

Test(cancel, and_submit_work_from_any_thread_while_the_engine_steps)
{
    mlora_engine *engine = open_model(LLAMA2);
    pthread_t thread;
    void *failed = NULL;

    mlora_request request = greedy(NULL, "There was once a", -1, &answer);
    request.ignore_eos = 1;
    struct other_thread argument = {engine, submit(engine, &request)};
    cr_assert_eq(pthread_create(&thread, NULL, submit_and_cancel, &argument), 0);
    run_all(engine);
    pthread_join(thread, &failed);
    run_all(engine);
    cr_expect_null(failed);
    cr_expect(answer.finish == MLORA_FINISH_CANCEL || answer.finish == MLORA_FINISH_LENGTH);
    mlora_close(engine);
}

static void cancel_itself(void *user, const mlora_event *event)
{
    struct other_thread *self = user;
    if (event->token >= 0 && event->n_completion_tokens == 2) mlora_cancel(self->engine, event->id);
    if (event->finish != MLORA_RUNNING) self->id = (uint64_t)event->finish;
}

Test(cancel, works_from_a_callback)
{
    mlora_engine *engine = open_model(LLAMA2);
    struct other_thread self = {engine, 0};

    mlora_request request = greedy(NULL, "There was once a", 50, &answer);
    request.on_event = cancel_itself;
    request.user = &self;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(self.id, (uint64_t)MLORA_FINISH_CANCEL);
    mlora_close(engine);
}

Test(close, while_requests_run_and_wait_leaks_nothing)
{
    mlora_options options = options_for(LLAMA2);
    options.max_num_seqs = 2;
    mlora_engine *engine = open_engine(&options);

    load_adapter(engine, LLAMA2, "sql");
    for (int i = 0; i < 6; i++) {
        mlora_request request = greedy(i % 2 ? "sql" : NULL, "There was once a", 50, &answer);
        request.on_event = NULL;
        submit(engine, &request);
        if (i == 3) mlora_step(engine, NULL);
    }
    mlora_close(engine);
    mlora_close(NULL);
}
