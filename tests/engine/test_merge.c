/* An adapter folded into its base: against the adapter served beside it, over every fixture of PEFT,
 * in memory and through a checkpoint on disk. */
#include "tests/engine/harness.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PEFT "tests/fixtures/peft"

enum { VOCAB = 64 };

/* Over weights in f32 the two sum in another order. Over weights in bf16 each weight is rounded once
 * more, by up to one part in 512, and log-probabilities of these models of two layers move by up to
 * 0.06. Over the same weights widened to f32 all of them are within 1e-5. */
static const double f32_tolerance = 1e-4, bf16_tolerance = 0.1;

static struct answer plain, unmerged, merged;

static void make_temporary(char *path, size_t bytes)
{
    snprintf(path, bytes, "/tmp/mlora-merge-XXXXXX");
    cr_assert(mkdtemp(path));
}

static void remove_directory(const char *path)
{
    struct dirent **entries = NULL;
    const int n = scandir(path, &entries, NULL, NULL);

    for (int i = 0; i < n; i++) {
        char file[1024];
        snprintf(file, sizeof file, "%s/%s", path, entries[i]->d_name);
        unlink(file);
        free(entries[i]);
    }
    free(entries);
    rmdir(path);
}

static int count_entries(const char *path)
{
    struct dirent **entries = NULL;
    const int n = scandir(path, &entries, NULL, NULL);

    for (int i = 0; i < n; i++) free(entries[i]);
    free(entries);
    return n - 2;
}

/* Log-probabilities of the case's tokens, and of all that may follow. */
static void score(struct answer *answer, const char *model, const char *merge, const char *load,
                  const json_t *one)
{
    mlora_options options = options_for(model);
    int32_t ids[64];
    const json_t *list = json_object_get(one, "ids");

    options.backend = MLORA_BACKEND_CPU;
    options.tokenizer = LLAMA2; /* prompts are ids */
    options.merge = merge;
    options.kv_blocks = 0;
    options.max_model_len = 0;
    mlora_engine *engine = open_engine(&options);
    if (load) cr_assert_eq(mlora_adapter_load(engine, load, "a"), MLORA_OK, "%s", mlora_error());

    mlora_request request = greedy(load ? "a" : NULL, NULL, 1, answer);
    for (size_t i = 0; i < json_array_size(list); i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, i));
    request.ids = ids;
    request.n_ids = (int)json_array_size(list);
    request.prompt_logprobs = 1;
    request.n_logprobs = VOCAB;
    request.ignore_eos = 1;
    submit(engine, &request);
    run_all(engine);
    mlora_close(engine);
}

static double difference(const struct answer *got, const struct answer *want)
{
    double worst = 0, of_id[VOCAB];

    cr_assert_eq(got->n_prompt, want->n_prompt);
    cr_assert_eq(got->n_first_top, VOCAB);
    cr_assert_eq(want->n_first_top, VOCAB);
    for (int i = 1; i < got->n_prompt; i++)
        worst = fmax(worst, fabs((double)got->prompt[i].logprob - (double)want->prompt[i].logprob));
    for (int i = 0; i < VOCAB; i++)
        of_id[want->first_top[i].id] = (double)want->first_top[i].logprob;
    for (int i = 0; i < VOCAB; i++)
        worst = fmax(worst, fabs((double)got->first_top[i].logprob - of_id[got->first_top[i].id]));
    return worst;
}

/* Every adapter of `model` but those that no checkpoint can hold; returns how many were compared. */
static int check_model(const char *model, double tolerance, const char *const *refused)
{
    json_error_t error;
    json_t *all = json_load_file(PEFT "/cases.json", 0, &error);
    const json_t *entry, *one;
    size_t i, j;
    int n = 0;

    cr_assert(all, "%s", error.text);
    json_array_foreach(all, i, entry)
    {
        if (strcmp(json_string_value(json_object_get(entry, "model")), model) != 0) continue;
        json_array_foreach(json_object_get(entry, "cases"), j, one)
        {
            const char *name = json_string_value(json_object_get(one, "name"));
            char base[256], adapter[512], parent[64], output[128];
            bool skip = strcmp(name, "base") == 0;

            for (int r = 0; refused[r]; r++) skip |= strcmp(name, refused[r]) == 0;
            if (skip) continue;
            snprintf(base, sizeof base, PEFT "/%s", model);
            snprintf(adapter, sizeof adapter, "%s/adapters/%s", base, name);
            make_temporary(parent, sizeof parent);
            snprintf(output, sizeof output, "%s/merged", parent);

            score(&unmerged, base, NULL, adapter, one);
            score(&merged, base, adapter, NULL, one);
            score(&plain, base, NULL, NULL, one);
            const double effect = difference(&plain, &unmerged);
            cr_expect_gt(effect, 2 * tolerance, "%s, %s: shows nothing, %g", model, name, effect);
            const double in_memory = difference(&merged, &unmerged);
            cr_expect_lt(in_memory, tolerance, "%s, %s: off by %g", model, name, in_memory);

            cr_assert_eq(mlora_merge(base, adapter, output, 0, NULL), MLORA_OK, "%s",
                         mlora_error());
            score(&merged, output, NULL, NULL, one);
            const double on_disk = difference(&merged, &unmerged);
            cr_expect_lt(on_disk, tolerance, "%s, %s: on disk off by %g", model, name, on_disk);
            remove_directory(output);
            remove_directory(parent);
            n++;
        }
    }
    json_decref(all);
    return n;
}

Test(merge, equals_the_adapter_beside_a_llama_in_f32)
{
    static const char *const refused[] = {"head-bias", "alora", "alora-absent", "alora-bias", NULL};
    cr_expect_geq(check_model("llama", f32_tolerance, refused), 19);
}

Test(merge, equals_the_adapter_beside_a_tied_llama_within_bf16_rounding)
{
    static const char *const refused[] = {NULL};
    cr_expect_geq(check_model("llama-tied", bf16_tolerance, refused), 16);
}

Test(merge, equals_the_adapter_beside_qwen2_within_bf16_rounding)
{
    static const char *const refused[] = {"lora-bias", NULL};
    cr_expect_geq(check_model("qwen2", bf16_tolerance, refused), 5);
}

Test(merge, equals_the_adapter_beside_qwen3_in_f32)
{
    static const char *const refused[] = {NULL};
    cr_expect_geq(check_model("qwen3-tied", f32_tolerance, refused), 3);
}

Test(merge, equals_the_adapter_beside_mistral_in_f32)
{
    static const char *const refused[] = {NULL};
    cr_expect_geq(check_model("mistral", f32_tolerance, refused), 10);
}

/* ---- refusals ------------------------------------------------------------------------------- */

static void expect_refused(const char *model, const char *adapter, const char *output,
                           mlora_status status, const char *text)
{
    cr_expect_eq(mlora_merge(model, adapter, output, 0, NULL), status, "%s", mlora_error());
    cr_expect_str_eq(mlora_error(), text);
}

Test(merge, refuses_what_no_checkpoint_can_hold_and_leaves_nothing)
{
    char parent[64], output[128];

    make_temporary(parent, sizeof parent);
    snprintf(output, sizeof output, "%s/merged", parent);
    expect_refused(PEFT "/llama", PEFT "/llama/adapters/alora", output, MLORA_EUNSUPPORTED,
                   PEFT
                   "/llama/adapters/alora/adapter_config.json: alora_invocation_tokens is set: "
                   "an aLoRA counts for some tokens only and cannot be merged; serve it beside "
                   "its base");
    expect_refused(PEFT "/llama", PEFT "/llama/adapters/head-bias", output, MLORA_EUNSUPPORTED,
                   PEFT "/llama/adapters/head-bias/adapter_config.json: lora_bias is set, and "
                        "lm_head is a target: a model has no place for a bias of lm_head; serve it "
                        "beside its base");
    expect_refused(PEFT "/qwen2", PEFT "/qwen2/adapters/lora-bias", output, MLORA_EUNSUPPORTED,
                   PEFT
                   "/qwen2/adapters/lora-bias/adapter_config.json: lora_bias is set: it becomes "
                   "a bias of the attention's linears, and a checkpoint of Qwen2ForCausalLM has "
                   "none there; serve the adapter beside its base, or with --merge");
    cr_expect_eq(count_entries(parent), 0);
    remove_directory(parent);
}

Test(merge, never_writes_over_what_is_there)
{
    char parent[64], output[128], text[256];

    make_temporary(parent, sizeof parent);
    snprintf(output, sizeof output, "%s/config.json", parent);
    FILE *file = fopen(output, "w");
    cr_assert(file);
    fclose(file);
    snprintf(text, sizeof text, "%s: is not empty; give the name of a new directory as output",
             parent);
    expect_refused(PEFT "/llama", PEFT "/llama/adapters/plain", parent, MLORA_EINVAL, text);
    snprintf(text, sizeof text,
             "%s: is there and is not a directory; give the name of a new one as output", output);
    expect_refused(PEFT "/llama", PEFT "/llama/adapters/plain", output, MLORA_EINVAL, text);
    cr_expect_eq(count_entries(parent), 1);
    remove_directory(parent);

    snprintf(output, sizeof output, "%s/merged", parent); /* the parent is gone */
    cr_expect_eq(mlora_merge(PEFT "/llama", PEFT "/llama/adapters/plain", output, 0, NULL),
                 MLORA_EIO);
    cr_expect(strstr(mlora_error(), "/merged."), "%s", mlora_error());
    cr_expect(strstr(mlora_error(), ": cannot be made: No such file or directory"), "%s",
              mlora_error());
}

Test(merge, takes_an_empty_directory)
{
    char parent[64];

    make_temporary(parent, sizeof parent);
    cr_expect_eq(mlora_merge(LLAMA2, LLAMA2 "/adapters/sql", parent, 0, NULL), MLORA_OK, "%s",
                 mlora_error());
    cr_expect_gt(count_entries(parent), 3); /* weights, config and the tokenizer's files */
    mlora_close(open_model(parent));
    remove_directory(parent);
}

Test(merge, leaves_no_room_for_a_second_adapter)
{
    mlora_options options = options_for(LLAMA2);
    options.merge = LLAMA2 "/adapters/sql";
    mlora_engine *engine = open_engine(&options);
    static const char text[] = "an adapter is merged into the weights (option merge), so no other "
                               "can be loaded; open the model without merge";

    cr_expect_eq(mlora_adapter_load(engine, LLAMA2 "/adapters/mood", "mood"), MLORA_EINVAL);
    cr_expect_str_eq(mlora_error(), text);
    cr_expect_eq(mlora_adapter_random(engine, "r", 4, 1), MLORA_EINVAL);
    cr_expect_str_eq(mlora_error(), text);

    const mlora_request request = greedy("sql", "x", 1, &plain);
    cr_expect_eq(mlora_submit(engine, &request, NULL), MLORA_ENOTFOUND);
    cr_expect_str_eq(mlora_error(), "no adapter \"sql\": one is merged into the weights (option "
                                    "merge) and answers the requests that name none; leave the "
                                    "name out");
    mlora_close(engine);
}
