/* What transformers + PEFT say, said by mlora: every golden file of the fixtures. */
#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/safetensors.h"

enum { CASES = 3 };

static mlora_dtype dtype; /* of the activations in this test */
static struct answer answers[32];
static mlora_lora_mode mode_under_test; /* for messages */

/* Where the two best logits are closer than this, rounding may choose either. */
static double margin(void)
{
    return dtype == MLORA_DTYPE_BF16 ? 0.25 : 1e-3;
}

static json_t *read_golden(const char *model, const char *name)
{
    char path[512];
    json_error_t error;
    snprintf(path, sizeof path, "%s/golden/%s.json", model, name);
    json_t *golden = json_load_file(path, 0, &error);
    cr_assert(golden, "%s: %s", path, error.text);
    return golden;
}

/* f32 sums in another order than the reference: 1e-3. In bf16 what goes into a product has 8 bits,
 * and logits of size 10 have gone through 4 layers: 0.05. */
static double logprob_tolerance(void)
{
    return dtype == MLORA_DTYPE_BF16 ? 0.05 : 1e-3;
}

/* Of unlikely tokens: where an adapter makes them so sensitive that the reference itself is farther
 * off in bf16, no farther than that. */
static double unlikely_tolerance(const char *model, const char *name)
{
    if (dtype != MLORA_DTYPE_BF16) return logprob_tolerance();
    json_t *errors = read_golden(model, "bf16");
    const double of_reference = json_number_value(json_object_get(errors, name));
    json_decref(errors);
    cr_assert_gt(of_reference, 0, "%s %s", model, name);
    return fmax(logprob_tolerance(), of_reference);
}

/* A f32 tensor of a golden safetensors file, freed by the caller. */
static void *read_tensor(const char *model, const char *file, const char *name, int64_t *n)
{
    char path[512];
    struct safetensors shard = {0};
    snprintf(path, sizeof path, "%s/golden/%s.safetensors", model, file);
    cr_assert_eq(safetensors_open(&shard, path), MLORA_OK, "%s", mlora_error());
    const struct tensor *tensor = safetensors_find(&shard, name);
    cr_assert(tensor, "%s has no %s", path, name);
    void *data = malloc((size_t)tensor->bytes);
    cr_assert_eq(tensor_read(&shard, tensor, data), MLORA_OK);
    *n = tensor->bytes / 4;
    safetensors_close(&shard);
    return data;
}

/* The alternatives to the first generated token against softmax(logits); `of_unlikely`: what is
 * allowed below one in fifty. */
static void expect_distribution(const struct answer *answer, const float *logits, int64_t V,
                                double of_unlikely, const char *what)
{
    double max = -INFINITY, sum = 0;
    for (int64_t v = 0; v < V; v++) max = fmax(max, logits[v]);
    for (int64_t v = 0; v < V; v++) sum += exp(logits[v] - max);
    cr_assert_eq(answer->n_first_top, ANSWER_TOP, "%s", what);
    for (int i = 0; i < answer->n_first_top; i++) {
        const mlora_token_logprob *top = &answer->first_top[i];
        const double want = logits[top->id] - max - log(sum);
        const double tolerance = want < log(0.02) ? of_unlikely : logprob_tolerance();
        cr_assert_float_eq(top->logprob, want, tolerance,
                           "%s: alternative %d, id %d: %f, the reference %f", what, i, top->id,
                           (double)top->logprob, want);
    }
}

/* The prompts of one golden file, greedy, in one batch. */
static void check_greedy(mlora_engine *engine, const char *model, const char *name)
{
    const char *adapter = strcmp(name, "base") == 0 ? NULL : name;
    json_t *golden = read_golden(model, name);
    const json_t *cases = json_object_get(golden, "cases");

    cr_assert_eq(json_array_size(cases), CASES);
    for (int c = 0; c < CASES; c++) {
        const json_t *want = json_array_get(cases, (size_t)c);
        const char *prompt = json_string_value(json_object_get(want, "prompt"));
        mlora_request request = greedy(adapter, prompt, 48, &answers[c]);
        request.n_logprobs = ANSWER_TOP;
        request.prompt_logprobs = 1;
        submit(engine, &request);
    }
    run_all(engine);

    for (int c = 0; c < CASES; c++) {
        const struct answer *got = &answers[c];
        const json_t *want = json_array_get(cases, (size_t)c);
        const json_t *ids = json_object_get(want, "greedy_ids");
        const json_t *logprobs = json_object_get(want, "greedy_logprobs");
        const json_t *margins = json_object_get(want, "top1_minus_top2_logit");
        const json_t *prompt_ids = json_object_get(want, "prompt_ids");
        char what[128], tensor[64];
        int64_t V;

        snprintf(what, sizeof what, "%s %s case %d, mode %d", model, name, c, (int)mode_under_test);
        cr_assert_eq(got->n_prompt, (int)json_array_size(prompt_ids), "%s", what);
        for (int i = 0; i < got->n_prompt; i++)
            cr_assert_eq(got->prompt[i].id,
                         json_integer_value(json_array_get(prompt_ids, (size_t)i)), "%s", what);
        cr_assert(got->n > 0 && !got->order_broken, "%s", what);

        int i = 0;
        for (; i < got->n; i++) {
            const double gap = json_number_value(json_array_get(margins, (size_t)i));
            const int64_t id = json_integer_value(json_array_get(ids, (size_t)i));
            if (got->ids[i] != id) {
                cr_assert_lt(gap, margin(),
                             "%s: token %d is %d, the reference %lld by a margin of %f", what, i,
                             got->ids[i], (long long)id, gap);
                break; /* another text follows a near tie */
            }
            const double logprob = json_number_value(json_array_get(logprobs, (size_t)i));
            cr_assert_float_eq(got->logprobs[i], logprob, logprob_tolerance(),
                               "%s: token %d: %f, %f", what, i, (double)got->logprobs[i], logprob);
        }
        if (i == got->n) {
            cr_assert_eq(got->n, (int)json_array_size(ids), "%s", what);
            const int64_t last = json_integer_value(json_array_get(ids, (size_t)got->n - 1));
            const int64_t eos = json_integer_value(json_object_get(golden, "eos_token_id"));
            cr_assert_eq(got->finish, last == eos ? MLORA_FINISH_STOP : MLORA_FINISH_LENGTH);
        }

        snprintf(tensor, sizeof tensor, "prompt%d.last_logits", c);
        float *logits = read_tensor(model, name, tensor, &V);
        expect_distribution(got, logits, V, unlikely_tolerance(model, name), what);
        free(logits);
    }
    json_decref(golden);
}

/* promptK.all_logits_argmax: every prefix of the sequence as a prompt of its own. */
static void check_argmax(mlora_engine *engine, const char *model, const char *name)
{
    const char *adapter = strcmp(name, "base") == 0 ? NULL : name;
    json_t *golden = read_golden(model, name);
    static struct answer of_prefix[128];
    static int32_t sequence[128];

    for (int c = 0; c < CASES; c++) {
        const json_t *want = json_array_get(json_object_get(golden, "cases"), (size_t)c);
        const char *parts[] = {"prompt_ids", "greedy_ids"};
        char tensor[64];
        int64_t n_argmax;
        int n = 0;

        for (int p = 0; p < 2; p++) {
            const json_t *ids = json_object_get(want, parts[p]);
            for (size_t i = 0; i < json_array_size(ids); i++)
                sequence[n++] = (int32_t)json_integer_value(json_array_get(ids, i));
        }
        snprintf(tensor, sizeof tensor, "prompt%d.all_logits_argmax", c);
        int32_t *argmax = read_tensor(model, name, tensor, &n_argmax);
        cr_assert_eq(n_argmax, n);

        for (int i = 0; i < n; i++) {
            mlora_request request = greedy(adapter, NULL, 1, &of_prefix[i]);
            request.ids = sequence;
            request.n_ids = i + 1;
            request.n_logprobs = 2;
            submit(engine, &request);
        }
        run_all(engine);
        for (int i = 0; i < n; i++) {
            const struct answer *got = &of_prefix[i];
            if (got->ids[0] == argmax[i]) continue;
            cr_assert_eq(got->first_top[1].id, argmax[i], "%s %s case %d position %d: %d, not %d",
                         model, name, c, i, got->ids[0], argmax[i]);
            cr_assert_lt(got->first_top[0].logprob - got->first_top[1].logprob, margin());
        }
        free(argmax);
    }
    json_decref(golden);
}

static const char *const llama2_names[] = {"pirate", "json",    "sql",   "mood",
                                           "shout",  "spanish", "count", "mood-dora"};
static const char *const llama3_names[] = {"pirate", "json", "mood"};
enum { N_LLAMA2 = 8, N_LLAMA3 = 3, N_MIXED = 7 }; /* PEFT itself cannot mix DoRA with others */

/* A GPU makes the adapters' products in several ways; the CPU in one. */
static int last_mode(void)
{
    return backend_under_test() == MLORA_BACKEND_CUDA ? MLORA_LORA_FUSED : MLORA_LORA_AUTO;
}

static mlora_engine *open_in(enum mlora_dtype type, int mode, const char *model,
                             const char *const *names, int n)
{
    mlora_options options = options_for(model);
    options.dtype = dtype = type;
    options.lora_mode = mode_under_test = (mlora_lora_mode)mode;
    mlora_engine *engine = open_engine(&options);
    for (int i = 0; i < n; i++) load_adapter(engine, model, names[i]);
    return engine;
}

static void check_model(enum mlora_dtype type, const char *model, const char *const *names, int n,
                        void (*check)(mlora_engine *, const char *, const char *))
{
    for (int mode = 0; mode <= last_mode(); mode++) {
        mlora_engine *engine = open_in(type, mode, model, names, n);
        if (mode == 0) check(engine, model, "base");
        for (int i = 0; i < n; i++) check(engine, model, names[i]);
        mlora_close(engine);
    }
}

Test(golden, llama2_generates_what_transformers_and_peft_generate)
{
    check_model(MLORA_DTYPE_F32, LLAMA2, llama2_names, N_LLAMA2, check_greedy);
}

Test(golden, llama3_generates_what_transformers_and_peft_generate)
{
    check_model(MLORA_DTYPE_F32, LLAMA3, llama3_names, N_LLAMA3, check_greedy);
}

Test(golden, llama2_in_bf16_generates_the_same_within_rounding)
{
    check_model(MLORA_DTYPE_BF16, LLAMA2, llama2_names, N_LLAMA2, check_greedy);
}

Test(golden, llama3_in_bf16_generates_the_same_within_rounding)
{
    check_model(MLORA_DTYPE_BF16, LLAMA3, llama3_names, N_LLAMA3, check_greedy);
}

Test(golden, llama2_predicts_what_the_reference_predicts_at_every_position)
{
    check_model(MLORA_DTYPE_F32, LLAMA2, llama2_names, N_LLAMA2, check_argmax);
}

Test(golden, llama3_predicts_what_the_reference_predicts_at_every_position)
{
    check_model(MLORA_DTYPE_F32, LLAMA3, llama3_names, N_LLAMA3, check_argmax);
}

Test(golden, llama2_in_bf16_predicts_the_same_but_near_ties)
{
    check_model(MLORA_DTYPE_BF16, LLAMA2, llama2_names, N_LLAMA2, check_argmax);
}

Test(golden, llama3_in_bf16_predicts_the_same_but_near_ties)
{
    check_model(MLORA_DTYPE_BF16, LLAMA3, llama3_names, N_LLAMA3, check_argmax);
}

static void check_mixed_batch(enum mlora_dtype type, int mode)
{
    mlora_engine *engine = open_in(type, mode, LLAMA2, llama2_names, N_MIXED);

    for (int i = 0; i <= N_MIXED; i++) {
        const char *adapter = i < N_MIXED ? llama2_names[i] : "base";
        mlora_request request = greedy(adapter, "There was once a", 1, &answers[i]);
        request.n_logprobs = ANSWER_TOP;
        submit(engine, &request);
    }
    run_all(engine);
    for (int i = 0; i <= N_MIXED; i++) {
        const char *name = i < N_MIXED ? llama2_names[i] : "base";
        int64_t V;
        float *logits = read_tensor(LLAMA2, "mixed_batch", name, &V);
        expect_distribution(&answers[i], logits, V, unlikely_tolerance(LLAMA2, name), name);
        free(logits);
    }
    mlora_close(engine);
}

Test(golden, a_mixed_batch_gives_what_pefts_own_mixed_batch_gives)
{
    for (int mode = 0; mode <= last_mode(); mode++) check_mixed_batch(MLORA_DTYPE_F32, mode);
}

Test(golden, a_mixed_batch_in_bf16_gives_the_same_within_rounding)
{
    for (int mode = 0; mode <= last_mode(); mode++) check_mixed_batch(MLORA_DTYPE_BF16, mode);
}
