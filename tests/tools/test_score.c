/* mlora score against the reference: log-probabilities of greedy continuations. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "tests/tools/run.h"

/* f32 sums in another order than the reference's, over some thousand terms, four layers deep */
static const double tolerance = 1e-3;

/* "1,409,280": the prompt's ids and then the answer's. */
static void add_ids(struct buffer *out, const json_t *ids)
{
    size_t i;
    const json_t *id;

    json_array_foreach(ids, i, id)
        buffer_printf(out, "%s%d", out->bytes ? "," : "", (int)json_integer_value(id));
}

static void expect_case(const char *model, const char *adapter, const json_t *item)
{
    struct buffer ids = {0};
    const json_t *prompt_ids = json_object_get(item, "prompt_ids");
    const json_t *logprobs = json_object_get(item, "greedy_logprobs");
    const size_t n_prompt = json_array_size(prompt_ids);
    size_t i;
    const json_t *expected;

    add_ids(&ids, prompt_ids);
    add_ids(&ids, json_object_get(item, "greedy_ids"));
    struct outcome outcome =
        run(NULL,
            "score --json --model %s --adapters a=%s/adapters/%s "
            "--adapter %s --ids %s --dtype f32 --backend cpu",
            model, model, adapter ? adapter : "pirate", adapter ? "a" : "base", buffer_text(&ids));
    json_t *object = output_json(&outcome);
    const json_t *tokens = json_object_get(object, "tokens");
    cr_assert_eq(json_array_size(tokens), n_prompt + json_array_size(logprobs));
    cr_expect(json_is_null(json_object_get(json_array_get(tokens, 0), "logprob")));
    json_array_foreach(logprobs, i, expected)
    {
        const json_t *token = json_array_get(tokens, n_prompt + i);
        cr_expect_float_eq(json_number_value(json_object_get(token, "logprob")),
                           json_real_value(expected), tolerance, "%s %s token %zu", model,
                           adapter ? adapter : "base", i);
    }
    json_decref(object);
    outcome_free(&outcome);
    buffer_free(&ids);
}

static void expect_golden(const char *model, const char *name)
{
    char path[256];
    size_t i;
    const json_t *item;

    snprintf(path, sizeof path, "%s/golden/%s.json", model, name);
    json_t *file = golden(path);
    json_array_foreach(json_object_get(file, "cases"), i, item)
        expect_case(model, json_is_null(json_object_get(file, "adapter")) ? NULL : name, item);
    json_decref(file);
}

Test(score, gives_the_log_probabilities_of_the_reference)
{
    expect_golden(LLAMA2, "base");
    expect_golden(LLAMA2, "sql");
    expect_golden(LLAMA2, "spanish");
    expect_golden(LLAMA3, "base");
    expect_golden(LLAMA3, "json");
}

Test(score, prints_one_object_with_tokens_and_what_comes_next)
{
    struct outcome outcome =
        run(NULL, "score --json --model " LLAMA2 " --top 3 -e --prompt "
                  "'How many moles live near the orchard?\\n' " FOUR_ADAPTERS "--adapter sql");
    json_t *object = output_json(&outcome);
    const json_t *tokens = json_object_get(object, "tokens");
    const json_t *next = json_object_get(object, "next");

    cr_expect_eq(json_object_size(object), 3);
    cr_expect_str_eq(json_string_value(json_object_get(object, "adapter")), "sql");
    cr_assert_eq(json_array_size(tokens), 10);
    cr_expect_eq(json_integer_value(json_object_get(json_array_get(tokens, 0), "id")), 1);
    cr_expect_str_eq(json_string_value(json_object_get(json_array_get(tokens, 0), "text")), "<s>");
    cr_assert_eq(json_array_size(next), 3);
    cr_expect_eq(json_integer_value(json_object_get(json_array_get(next, 0), "id")), 2011);
    cr_expect_float_eq(json_number_value(json_object_get(json_array_get(next, 0), "logprob")),
                       -2.610842, tolerance); /* golden/sql.json, its first token */
    json_decref(object);
    outcome_free(&outcome);
}

Test(score, prints_a_table_for_people)
{
    struct outcome outcome = run(NULL, "score --model " LLAMA2 " --ids 1,5,7 --top 2");

    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect(strstr(outcome.out, "logprob") && strstr(outcome.out, "perplexity"));
    cr_expect(strstr(outcome.out, "\"<s>\"") && strstr(outcome.out, "next:"));
    outcome_free(&outcome);
}

Test(score, refuses_what_is_not_one_prompt)
{
    struct outcome outcome = run(NULL, "score --model " LLAMA2);
    expect_refusal(&outcome,
                   "no prompt: give one of --prompt TEXT, --prompt-file FILE and --ids 1,5,7");
    outcome = run(NULL, "score --model " LLAMA2 " --prompt x --ids 1");
    expect_refusal(&outcome,
                   "two prompts: give one of --prompt TEXT, --prompt-file FILE and --ids 1,5,7");
    outcome = run(NULL, "score --model " LLAMA2 " --ids 1,two");
    expect_refusal(&outcome, "--ids is \"two\", a whole number is needed");
    outcome = run(NULL, "score --model " LLAMA2 " --ids 1,999999");
    expect_refusal_with(&outcome, "999999");
    outcome = run(NULL, "score --model " LLAMA2 " " FOUR_ADAPTERS "--adapter moood --prompt x");
    expect_refusal_with(&outcome, "mood");
}
