/* Every feature of PEFT's LoRA, over small random models: what PEFT says of each adapter alone, and
 * all of a model's adapters in one batch. The cases are made by tools/reference/make_peft_cases.py. */
#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define PEFT "tests/fixtures/peft"

enum { VOCAB = 64, ADAPTERS_MAX = 32 };

/* f32 sums in another order than PEFT, over two layers: 1e-4. bf16 has 8 bits, and the sums are of
 * large terms that cancel: 0.1; what is left out or applied twice is off by 1 and more. */
static const double f32_tolerance = 1e-4, bf16_tolerance = 0.1;

static struct answer alone[ADAPTERS_MAX], together[ADAPTERS_MAX];

static json_t *read_cases(void)
{
    json_error_t error;
    json_t *cases = json_load_file(PEFT "/cases.json", 0, &error);
    cr_assert(cases, "%s", error.text);
    return cases;
}

static const char *name_of(const json_t *one)
{
    return json_string_value(json_object_get(one, "name"));
}

static mlora_engine *open_with_adapters(const char *model, const json_t *cases, mlora_dtype dtype,
                                        int max_batch_tokens)
{
    char path[256];
    snprintf(path, sizeof path, PEFT "/%s", model);
    mlora_options options = options_for(path);
    options.dtype = dtype;
    options.tokenizer = LLAMA2; /* prompts are ids */
    options.max_model_len = 0;
    options.kv_blocks = 0;
    options.max_num_seqs = ADAPTERS_MAX;
    options.max_batch_tokens = max_batch_tokens;
    mlora_engine *engine = open_engine(&options);

    for (size_t i = 0; i < json_array_size(cases); i++) {
        const char *name = name_of(json_array_get(cases, i));
        char directory[512];
        if (strcmp(name, "base") == 0) continue;
        snprintf(directory, sizeof directory, "%s/adapters/%s", path, name);
        cr_assert_eq(mlora_adapter_load(engine, directory, name), MLORA_OK, "%s", mlora_error());
    }
    return engine;
}

/* Score the case's tokens, and generate a few more with all alternatives to the first. */
static void submit_case(mlora_engine *engine, const json_t *one, struct answer *answer)
{
    int32_t ids[64];
    const json_t *list = json_object_get(one, "ids");
    mlora_request request = greedy(name_of(one), NULL, 5, answer);

    for (size_t i = 0; i < json_array_size(list); i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, i));
    request.ids = ids;
    request.n_ids = (int)json_array_size(list);
    request.prompt_logprobs = 1;
    request.n_logprobs = VOCAB;
    request.ignore_eos = 1;
    submit(engine, &request);
}

/* In f32 the farthest log-probability counts, in bf16 the root of the mean square: single ones may
 * be off by more in models of random weights, which amplify what is rounded. */
static void expect_case(const json_t *one, const struct answer *got, const char *model,
                        mlora_dtype dtype)
{
    const json_t *logprobs = json_object_get(one, "logprobs"), *next = json_object_get(one, "next");
    double worst = 0, squares = 0;

    cr_assert_eq(got->n_prompt, (int)json_array_size(logprobs) + 1);
    cr_assert_eq(got->n_first_top, VOCAB);
    for (int i = 1; i < got->n_prompt + VOCAB; i++) {
        const int v = i - got->n_prompt;
        const mlora_token_logprob *token = v < 0 ? &got->prompt[i] : &got->first_top[v];
        const double want = v < 0 ? json_number_value(json_array_get(logprobs, (size_t)i - 1))
                                  : json_number_value(json_array_get(next, (size_t)token->id));
        const double error = fabs((double)token->logprob - want);
        worst = fmax(worst, error);
        squares += error * error;
    }
    const double root = sqrt(squares / (got->n_prompt - 1 + VOCAB));
    if (dtype == MLORA_DTYPE_F32)
        cr_expect_lt(worst, f32_tolerance, "%s, %s: log-probabilities are off by %g", model,
                     name_of(one), worst);
    else
        cr_expect_lt(root, bf16_tolerance, "%s, %s: log-probabilities are off by %g", model,
                     name_of(one), root);
}

static void check_model(const char *model, mlora_dtype dtype)
{
    json_t *all = read_cases();
    const json_t *cases = NULL;

    for (size_t i = 0; i < json_array_size(all); i++) {
        const json_t *entry = json_array_get(all, i);
        if (strcmp(json_string_value(json_object_get(entry, "model")), model) == 0)
            cases = json_object_get(entry, "cases");
    }
    const size_t n = json_array_size(cases);
    cr_assert(n > 1 && n <= ADAPTERS_MAX);

    mlora_engine *engine = open_with_adapters(model, cases, dtype, 0);
    for (size_t i = 0; i < n; i++) {
        submit_case(engine, json_array_get(cases, i), &alone[i]);
        run_all(engine);
        expect_case(json_array_get(cases, i), &alone[i], model, dtype);
    }
    mlora_close(engine);

    /* all of them in one batch, and prompts in pieces */
    static const int batch_tokens[] = {0, 40};
    for (int b = 0; b < 2; b++) {
        engine = open_with_adapters(model, cases, dtype, batch_tokens[b]);
        for (size_t i = 0; i < n; i++)
            submit_case(engine, json_array_get(cases, n - 1 - i), &together[n - 1 - i]);
        run_all(engine);
        for (size_t i = 0; i < n; i++) {
            if (dtype == MLORA_DTYPE_F32)
                expect_same_answer(&together[i], &alone[i], name_of(json_array_get(cases, i)));
            else
                expect_case(json_array_get(cases, i), &together[i], model, dtype);
        }
        mlora_close(engine);
    }
    json_decref(all);
}

Test(peft, is_served_exactly_over_llama)
{
    check_model("llama", MLORA_DTYPE_F32);
}

Test(peft, is_served_exactly_over_a_tied_llama)
{
    check_model("llama-tied", MLORA_DTYPE_F32);
}

Test(peft, is_served_exactly_over_qwen2_with_its_biases)
{
    check_model("qwen2", MLORA_DTYPE_F32);
}

Test(peft, is_served_exactly_over_qwen3_with_its_norms_of_heads)
{
    check_model("qwen3-tied", MLORA_DTYPE_F32);
}

Test(peft, is_served_exactly_over_mistral_whichever_way_its_targets_are_named)
{
    check_model("mistral", MLORA_DTYPE_F32);
}

Test(peft, in_bf16_is_served_within_rounding)
{
    check_model("llama", MLORA_DTYPE_BF16);
    check_model("llama-tied", MLORA_DTYPE_BF16);
    check_model("qwen2", MLORA_DTYPE_BF16);
    check_model("qwen3-tied", MLORA_DTYPE_BF16);
}
