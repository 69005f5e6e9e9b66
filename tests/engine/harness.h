/* Running requests through the public API and keeping what comes back. */
#ifndef TESTS_ENGINE_HARNESS_H
#define TESTS_ENGINE_HARNESS_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/mlora.h"

#define LLAMA2 "tests/fixtures/tiny-llama2"
#define LLAMA3 "tests/fixtures/tiny-llama3"

enum { ANSWER_TOKENS = 1024, ANSWER_BYTES = 1 << 14, ANSWER_TOP = 128 };

/* Everything that one request was told. */
struct answer {
    char text[ANSWER_BYTES];
    size_t bytes;
    int32_t ids[ANSWER_TOKENS];
    float logprobs[ANSWER_TOKENS];
    float margin[ANSWER_TOKENS]; /* of the two best, where two alternatives were asked for */
    int n;
    mlora_token_logprob first_top[ANSWER_TOP]; /* alternatives to the first token */
    int n_first_top;
    mlora_token_logprob prompt[ANSWER_TOKENS];
    int n_prompt;
    mlora_finish finish;
    int n_events;
    bool order_broken; /* an event came after the last, or prompt scores after a token */
};

/* The backend that the tests are for: MLORA_BACKEND=cuda, else the CPU. */
mlora_backend backend_under_test(void);

/* Options for the backend under test with `model`; small limits that fit the fixtures. */
mlora_options options_for(const char *model);

/* Open an engine, or fail the test. */
mlora_engine *open_engine(const mlora_options *options);
mlora_engine *open_model(const char *model);

/* Load model/adapters/name as `name`, or fail the test. */
void load_adapter(mlora_engine *engine, const char *model, const char *name);

/* A greedy request for `answer`. */
mlora_request greedy(const char *adapter, const char *prompt, int max_tokens,
                     struct answer *answer);

/* Fills the struct answer that `user` points to. */
void collect(void *user, const mlora_event *event);

/* Submit, or fail the test; step until nothing is active, or fail the test. */
uint64_t submit(mlora_engine *engine, const mlora_request *request);
void run_all(mlora_engine *engine);

/* Same ids, text and end; the same log-probabilities, on the CPU to the bit, and else as near as
 * f32 is. */
void expect_same_answer(const struct answer *got, const struct answer *want, const char *what);

#endif
