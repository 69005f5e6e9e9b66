/* The prefix cache as a user sees it: what is found, and that nothing changes by it. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/engine/harness.h"

/* More than 64 tokens to begin with. */
static const char story[] =
    "One snowy morning Uma the kind otter found a silver lantern near the windmill, and then Rosa "
    "laughed and went home. Tess the hedgehog lives near the windmill. That night they slept by "
    "the orchard. And so it was. There was once a small crow named Dara, and the orchard was home. "
    "One foggy morning Dara sold a silver drum. Then Dara cried, and Rosa the owl came to help.";

static struct answer cold, warm, other;
static int n_cached; /* of the last request that ended */

static void collect_cached(void *user, const mlora_event *event)
{
    collect(user, event);
    n_cached = event->n_cached_tokens;
    cr_assert_leq(event->n_cached_tokens, event->n_prompt_tokens - 1);
}

/* Run one request, and return how many tokens of its prompt were found. */
static int ask(mlora_engine *engine, const char *adapter, const char *prompt, struct answer *answer)
{
    mlora_request request = greedy(adapter, prompt, 12, answer);
    request.on_event = collect_cached;
    submit(engine, &request);
    run_all(engine);
    return n_cached;
}

Test(prefix, is_found_again_and_changes_no_bit)
{
    mlora_options options = options_for(LLAMA2);
    mlora_stats stats;
    mlora_engine *engine = open_engine(&options);
    char longer[1024];

    load_adapter(engine, LLAMA2, "pirate");
    snprintf(longer, sizeof longer, "%s And so it was.", story);
    options.no_prefix_cache = 1;
    mlora_engine *without = open_engine(&options);
    load_adapter(without, LLAMA2, "pirate");

    for (int i = 0; i < 2; i++) {
        const char *adapter = i ? "pirate" : NULL;
        cr_expect_eq(ask(engine, adapter, story, &cold), 0);
        const int found = ask(engine, adapter, story, &warm);
        cr_expect_geq(found, 64);
        cr_expect_eq(found % 16, 0);
        if (backend_under_test() == MLORA_BACKEND_CPU) expect_same_answer(&warm, &cold, "again");
        cr_expect_geq(ask(engine, adapter, longer, &warm), 64, "the story is its beginning");
        cr_expect_eq(ask(without, adapter, story, &other), 0);
        cr_expect_eq(ask(without, adapter, story, &other), 0);
        if (backend_under_test() == MLORA_BACKEND_CPU) {
            expect_same_answer(&other, &cold, "without a cache");
            ask(without, adapter, longer, &other);
            expect_same_answer(&warm, &other, "a longer prompt");
        }
    }
    mlora_engine_stats(without, &stats);
    cr_expect_eq(stats.n_cached_tokens, 0);
    cr_expect_eq(stats.n_missed_tokens, 0, "nothing is looked for");
    mlora_close(without);
    mlora_close(engine);
}

Test(prefix, counts_what_is_found_and_missed)
{
    mlora_engine *engine = open_model(LLAMA2);
    int32_t ids[40];
    mlora_stats stats;

    for (int i = 0; i < 40; i++) ids[i] = 300 + i;
    for (int n = 40; n >= 32; n -= 8) {
        mlora_request request = greedy(NULL, NULL, 2, &cold);
        request.ids = ids;
        request.n_ids = n;
        request.on_event = collect_cached;
        submit(engine, &request);
        run_all(engine);
    }
    cr_expect_eq(n_cached, 16, "of 32 tokens, the last is computed, and so its block");
    mlora_request request = greedy(NULL, NULL, 2, &cold);
    request.ids = ids;
    request.n_ids = 40;
    request.on_event = collect_cached;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(n_cached, 32);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_cached_tokens, 0 + 16 + 32);
    cr_expect_eq(stats.n_missed_tokens, 40 + 16 + 8);
    cr_expect_eq(stats.n_prompt_tokens, 40 + 16 + 8, "only those were computed");
    mlora_close(engine);
}

Test(prefix, an_answer_is_the_beginning_of_the_next_prompt)
{
    mlora_engine *engine = open_model(LLAMA2);
    int32_t ids[64] = {1};

    mlora_request request = greedy(NULL, NULL, 40, &cold);
    request.ids = ids;
    request.n_ids = 8;
    for (int i = 1; i < 8; i++) ids[i] = 300 + i;
    request.ignore_eos = 1;
    submit(engine, &request);
    run_all(engine);
    cr_assert_eq(cold.n, 40);
    memcpy(ids + 8, cold.ids, 40 * sizeof *ids);
    request = greedy(NULL, NULL, 2, &warm);
    request.ids = ids;
    request.n_ids = 48;
    request.on_event = collect_cached;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(n_cached, 32, "the last of 48 tokens was drawn, but never computed");
    mlora_close(engine);
}

Test(prefix, belongs_to_the_content_of_an_adapter_not_to_its_name)
{
    mlora_engine *engine = open_model(LLAMA2);

    load_adapter(engine, LLAMA2, "pirate");
    load_adapter(engine, LLAMA2, "shout");
    cr_expect_eq(ask(engine, NULL, story, &cold), 0);
    cr_expect_eq(ask(engine, "pirate", story, &cold), 0, "what the base computed is not pirate's");
    cr_expect_eq(ask(engine, "shout", story, &other), 0);
    cr_expect_geq(ask(engine, "pirate", story, &warm), 64);

    /* another adapter under the same name */
    cr_assert_eq(mlora_adapter_unload(engine, "pirate"), MLORA_OK);
    cr_assert_eq(mlora_adapter_load(engine, LLAMA2 "/adapters/spanish", "pirate"), MLORA_OK, "%s",
                 mlora_error());
    cr_expect_eq(ask(engine, "pirate", story, &warm), 0);
    cr_expect_str_neq(warm.text, cold.text);

    /* the same one under another name */
    cr_assert_eq(mlora_adapter_load(engine, LLAMA2 "/adapters/pirate", "corsair"), MLORA_OK, "%s",
                 mlora_error());
    cr_expect_geq(ask(engine, "corsair", story, &warm), 64);
    if (backend_under_test() == MLORA_BACKEND_CPU) expect_same_answer(&warm, &cold, "reloaded");

    /* random ones are what their seed and rank say */
    cr_assert_eq(mlora_adapter_random(engine, "r1", 8, 1), MLORA_OK);
    cr_assert_eq(mlora_adapter_random(engine, "r2", 8, 2), MLORA_OK);
    cr_assert_eq(mlora_adapter_random(engine, "r3", 8, 1), MLORA_OK);
    cr_expect_eq(ask(engine, "r1", story, &cold), 0);
    cr_expect_eq(ask(engine, "r2", story, &cold), 0);
    cr_expect_geq(ask(engine, "r3", story, &cold), 64);
    mlora_close(engine);
}

/* A copy of an adapter with other text in the place of some in its configuration. */
static void copy_adapter(const char *from, const char *to, const char *text, const char *other_text)
{
    static char bytes[1 << 22];
    char path[512];
    const char *const names[] = {"adapter_config.json", "adapter_model.safetensors"};

    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", from, names[i]);
        FILE *in = fopen(path, "rb");
        cr_assert(in, "%s", path);
        const size_t n = fread(bytes, 1, sizeof bytes - 1, in);
        cr_assert_lt(n, sizeof bytes - 1);
        fclose(in);
        bytes[n] = '\0';
        snprintf(path, sizeof path, "%s/%s", to, names[i]);
        FILE *out = fopen(path, "wb");
        cr_assert(out, "%s", path);
        char *at = i == 0 ? strstr(bytes, text) : NULL;
        if (i == 0) cr_assert(at, "%s is not in %s", text, path);
        const size_t before = at ? (size_t)(at - bytes) : n;
        fwrite(bytes, 1, before, out);
        if (at) fprintf(out, "%s%s", other_text, at + strlen(text));
        fclose(out);
    }
}

static void remove_adapter(const char *directory)
{
    char path[512];

    snprintf(path, sizeof path, "%s/adapter_config.json", directory);
    unlink(path);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", directory);
    unlink(path);
    rmdir(directory);
}

Test(prefix, the_configuration_is_part_of_an_adapters_content)
{
    mlora_engine *engine = open_model(LLAMA2);
    char directory[] = "/tmp/mlora-prefix-XXXXXX";

    cr_assert(mkdtemp(directory));
    load_adapter(engine, LLAMA2, "pirate");
    cr_expect_eq(ask(engine, "pirate", story, &cold), 0);
    copy_adapter(LLAMA2 "/adapters/pirate", directory, "\"lora_alpha\": ", "\"lora_alpha\": 1");
    const mlora_status status = mlora_adapter_load(engine, directory, "strong");
    remove_adapter(directory);
    cr_assert_eq(status, MLORA_OK, "%s", mlora_error());
    cr_expect_eq(ask(engine, "strong", story, &warm), 0, "the same tensors, another scale");
    mlora_close(engine);
}

Test(prefix, an_alora_shares_the_bases_blocks_up_to_its_invocation)
{
    mlora_engine *engine = open_model(LLAMA2);
    char directory[] = "/tmp/mlora-prefix-XXXXXX";
    int32_t ids[80];

    if (backend_under_test() != MLORA_BACKEND_CPU) return;
    cr_assert(mkdtemp(directory));
    copy_adapter(LLAMA2 "/adapters/pirate", directory, "\"alora_invocation_tokens\": null",
                 "\"alora_invocation_tokens\": [77, 78, 79]");
    const mlora_status status = mlora_adapter_load(engine, directory, "late");
    remove_adapter(directory);
    cr_assert_eq(status, MLORA_OK, "%s", mlora_error());

    for (int i = 0; i < 80; i++) ids[i] = 300 + i;
    for (int i = 0; i < 3; i++) ids[40 + i] = 77 + i; /* invoked at token 40 */
    const struct {
        const char *adapter;
        int n_cached;
    } asked[] = {{NULL, 0}, {"late", 32}, {"late", 64}, {NULL, 64}};
    for (int i = 0; i < 4; i++) {
        mlora_request request = greedy(asked[i].adapter, NULL, 4, i == 1 ? &cold : &warm);
        request.ids = ids;
        request.n_ids = 80;
        request.on_event = collect_cached;
        submit(engine, &request);
        run_all(engine);
        cr_expect_eq(n_cached, asked[i].n_cached, "request %d: %d", i, n_cached);
        if (i == 2) expect_same_answer(&warm, &cold, "with more of it found");
        if (i == 1) { /* and with nothing of it found */
            request.prompt_logprobs = 1;
            request.user = &other;
            submit(engine, &request);
            run_all(engine);
            cr_expect_eq(n_cached, 0);
            other.n_prompt = 0; /* its scores were asked for to have it computed */
            expect_same_answer(&other, &cold, "computed from the first token on");
        }
    }
    mlora_close(engine);
}

Test(prefix, a_prompt_to_be_scored_is_computed)
{
    mlora_engine *engine = open_model(LLAMA2);

    mlora_request request = greedy(NULL, story, 4, &cold);
    request.prompt_logprobs = 1;
    submit(engine, &request);
    run_all(engine);
    request.user = &warm;
    request.on_event = collect_cached;
    submit(engine, &request);
    run_all(engine);
    cr_expect_eq(n_cached, 0);
    cr_assert_eq(warm.n_prompt, cold.n_prompt);
    cr_expect_gt(warm.n_prompt, 64);
    for (int i = 1; i < cold.n_prompt && backend_under_test() == MLORA_BACKEND_CPU; i++)
        cr_expect_eq(warm.prompt[i].logprob, cold.prompt[i].logprob);
    cr_expect_geq(ask(engine, NULL, story, &other), 64, "what it computed serves others");
    mlora_close(engine);
}
