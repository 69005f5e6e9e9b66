#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

mlora_backend backend_under_test(void)
{
    const char *name = getenv("MLORA_BACKEND");
    return name && strcmp(name, "cuda") == 0 ? MLORA_BACKEND_CUDA : MLORA_BACKEND_CPU;
}

mlora_options options_for(const char *model)
{
    mlora_options options;
    mlora_options_default(&options);
    options.model = model;
    options.backend = backend_under_test();
    options.n_threads = 2;
    options.max_num_seqs = 32;
    options.kv_blocks = 1024;
    options.adapter_memory = 64;
    return options;
}

mlora_engine *open_engine(const mlora_options *options)
{
    mlora_engine *engine = NULL;
    cr_assert_eq(mlora_open(&engine, options), MLORA_OK, "%s", mlora_error());
    return engine;
}

mlora_engine *open_model(const char *model)
{
    const mlora_options options = options_for(model);
    return open_engine(&options);
}

void load_adapter(mlora_engine *engine, const char *model, const char *name)
{
    char dir[512];
    snprintf(dir, sizeof dir, "%s/adapters/%s", model, name);
    cr_assert_eq(mlora_adapter_load(engine, dir, name), MLORA_OK, "%s", mlora_error());
}

mlora_request greedy(const char *adapter, const char *prompt, int max_tokens, struct answer *answer)
{
    mlora_request request;
    mlora_request_default(NULL, &request);
    request.adapter = adapter;
    request.prompt = prompt;
    request.max_tokens = max_tokens;
    request.temperature = 0;
    request.n_logprobs = 0;
    request.on_event = collect;
    request.user = answer;
    memset(answer, 0, sizeof *answer);
    return request;
}

void collect(void *user, const mlora_event *event)
{
    struct answer *answer = user;

    if (answer->finish != MLORA_RUNNING) answer->order_broken = true;
    if (event->n_prompt_logprobs > 0 && answer->n > 0) answer->order_broken = true;
    answer->n_events++;

    cr_assert(answer->bytes + event->text_bytes < ANSWER_BYTES);
    memcpy(answer->text + answer->bytes, event->text, event->text_bytes);
    answer->bytes += event->text_bytes;
    answer->text[answer->bytes] = '\0';

    cr_assert(answer->n_prompt + event->n_prompt_logprobs <= ANSWER_TOKENS);
    for (int i = 0; i < event->n_prompt_logprobs; i++)
        answer->prompt[answer->n_prompt++] = event->prompt_logprobs[i];

    if (event->token >= 0) {
        cr_assert(answer->n < ANSWER_TOKENS);
        if (answer->n == 0) {
            cr_assert(event->n_top <= ANSWER_TOP);
            answer->n_first_top = event->n_top;
            if (event->n_top)
                memcpy(answer->first_top, event->top, (size_t)event->n_top * sizeof *event->top);
        }
        if (event->n_top >= 2)
            answer->margin[answer->n] = event->top[0].logprob - event->top[1].logprob;
        answer->ids[answer->n] = event->token;
        answer->logprobs[answer->n++] = event->logprob;
    }
    cr_assert_eq(event->n_completion_tokens, answer->n);
    answer->finish = event->finish;
}

uint64_t submit(mlora_engine *engine, const mlora_request *request)
{
    uint64_t id = 0;
    cr_assert_eq(mlora_submit(engine, request, &id), MLORA_OK, "%s", mlora_error());
    return id;
}

void run_all(mlora_engine *engine)
{
    for (int n_active = 1; n_active > 0;)
        cr_assert_eq(mlora_step(engine, &n_active), MLORA_OK, "%s", mlora_error());
}

/* Both in f32: four layers' sums of some hundred terms in another order. */
static const double of_order = 1e-3;

static void expect_same_logprob(float got, float want, const char *what, const char *of, int t)
{
    if (backend_under_test() == MLORA_BACKEND_CPU)
        cr_assert_eq(got, want, "%s: %s token %d: %g, not %g, bit for bit", what, of, t,
                     (double)got, (double)want);
    else
        cr_assert_float_eq(got, want, of_order, "%s: %s token %d: %g, not %g", what, of, t,
                           (double)got, (double)want);
}

void expect_same_answer(const struct answer *got, const struct answer *want, const char *what)
{
    cr_assert_eq(got->n, want->n, "%s: %d tokens, alone %d", what, got->n, want->n);
    cr_assert_arr_eq(got->ids, want->ids, (size_t)want->n * sizeof *want->ids, "%s", what);
    for (int t = 0; t < want->n; t++)
        expect_same_logprob(got->logprobs[t], want->logprobs[t], what, "generated", t);
    cr_assert_eq(got->n_prompt, want->n_prompt, "%s", what);
    for (int t = 1; t < want->n_prompt; t++)
        expect_same_logprob(got->prompt[t].logprob, want->prompt[t].logprob, what, "prompt", t);
    cr_assert_str_eq(got->text, want->text, "%s", what);
    cr_assert_eq(got->finish, want->finish, "%s", what);
    cr_assert_not(got->order_broken, "%s", what);
}
