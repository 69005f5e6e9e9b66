/* mlora generate: one batch for many adapters gives each what the reference gives it alone. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "tests/tools/run.h"

/* Where the reference's two best logits are nearer than this, the order of sums decides. */
static const double margin_needed = 1e-3;

/* ---- against the reference ---------------------------------------------------------------- */

/* Add a JSON line for every case of a golden file, and keep the cases in the same order. */
static void add_cases(struct buffer *lines, json_t *cases, const char *model, const char *name)
{
    char path[256];
    size_t i;
    json_t *item;

    snprintf(path, sizeof path, "%s/golden/%s.json", model, name);
    json_t *file = golden(path);
    json_array_foreach(json_object_get(file, "cases"), i, item)
    {
        json_t *line = json_pack("{s:O, s:O}", "adapter", json_object_get(file, "adapter"),
                                 "prompt", json_object_get(item, "prompt"));
        char *text = json_dumps(line, 0);
        buffer_printf(lines, "%s\n", text);
        json_object_set(item, "adapter", json_object_get(file, "adapter"));
        json_array_append(cases, item);
        json_decref(line);
        free(text);
    }
    json_decref(file);
}

/* The answer has the case's ids, up to where the reference itself was undecided. */
static void expect_answer(const json_t *answer, const json_t *item, int index)
{
    const json_t *ids = json_object_get(answer, "ids");
    const json_t *expected = json_object_get(item, "greedy_ids");
    const json_t *margins = json_object_get(item, "top1_minus_top2_logit");
    const json_t *usage = json_object_get(answer, "usage");
    const size_t n = json_array_size(expected);
    size_t i = 0;

    cr_expect_eq(json_integer_value(json_object_get(answer, "index")), index);
    cr_expect(json_equal(json_object_get(answer, "adapter"), json_object_get(item, "adapter")));
    cr_expect(json_equal(json_object_get(answer, "prompt"), json_object_get(item, "prompt")));
    cr_expect_eq(json_integer_value(json_object_get(usage, "prompt_tokens")),
                 (json_int_t)json_array_size(json_object_get(item, "prompt_ids")));
    for (; i < n && json_real_value(json_array_get(margins, i)) > margin_needed; i++)
        cr_expect(json_equal(json_array_get(ids, i), json_array_get(expected, i)),
                  "answer %d differs at token %zu", index, i);
    if (i < n) return; /* two continuations are right from here on */

    const char *text = json_string_value(json_object_get(answer, "text"));
    const char *reference = json_string_value(json_object_get(item, "greedy_text"));
    const char *why = json_string_value(json_object_get(answer, "finish_reason"));
    while (*text == ' ' && *reference != ' ') text++; /* the reference decodes without the prompt */
    cr_expect_eq(json_array_size(ids), n);
    cr_expect_str_eq(text, reference);
    cr_expect_str_eq(why, n < 48 ? "stop" : "length");
    cr_expect_eq(json_integer_value(json_object_get(usage, "completion_tokens")), (json_int_t)n);
}

static void expect_goldens(const char *model, const char *const *names)
{
    struct buffer lines = {0};
    json_t *cases = json_array();
    size_t i;
    const json_t *item;

    for (; *names; names++) add_cases(&lines, cases, model, *names);
    struct outcome outcome = run(buffer_text(&lines),
                                 "generate --json -q --model %s --adapters %s/adapters -i - "
                                 "--temperature 0 -n 48 --dtype f32 --backend cpu",
                                 model, model);
    cr_assert_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect_str_eq(outcome.err, "");
    cr_expect_eq(count_lines(outcome.out), (int)json_array_size(cases));
    json_array_foreach(cases, i, item)
    {
        json_t *answer = output_line_json(&outcome, (int)i);
        expect_answer(answer, item, (int)i);
        json_decref(answer);
    }
    json_decref(cases);
    outcome_free(&outcome);
    buffer_free(&lines);
}

Test(generate, mixes_adapters_and_the_base_in_one_batch)
{
    expect_goldens(LLAMA2, (const char *const[]){"base", "sql", "mood", "pirate", "json", "shout",
                                                 "spanish", "count", NULL});
    expect_goldens(LLAMA3, (const char *const[]){"mood", "base", "pirate", "json", NULL});
}

Test(generate, gives_log_probabilities_of_the_reference)
{
    json_t *file = golden(LLAMA2 "/golden/sql.json");
    const json_t *item = json_array_get(json_object_get(file, "cases"), 0);
    const json_t *expected = json_object_get(item, "greedy_logprobs");
    struct outcome outcome =
        run(NULL, "generate --json -q --model " LLAMA2 " " FOUR_ADAPTERS "--adapter sql -e "
                  "-p 'How many moles live near the orchard?\\n' --temperature 0 --logprobs 2");
    json_t *answer = output_json(&outcome);
    const json_t *logprobs = json_object_get(answer, "logprobs");
    size_t i;
    const json_t *token;

    cr_assert_eq(json_array_size(logprobs), json_array_size(expected));
    json_array_foreach(logprobs, i, token)
    {
        const json_t *top = json_object_get(token, "top");
        const double logprob = json_number_value(json_object_get(token, "logprob"));
        cr_expect_float_eq(logprob, json_real_value(json_array_get(expected, i)), 1e-3);
        cr_assert_eq(json_array_size(top), 2);
        cr_expect_eq(json_number_value(json_object_get(json_array_get(top, 0), "logprob")),
                     logprob);
    }
    json_decref(answer);
    json_decref(file);
    outcome_free(&outcome);
}

Test(generate, renders_chats_as_the_reference_does)
{
    static const char *const models[] = {LLAMA2, LLAMA3};

    for (int m = 0; m < 2; m++) {
        char path[256];
        size_t i;
        const json_t *item;
        snprintf(path, sizeof path, "%s/golden/chat.json", models[m]);
        json_t *file = golden(path);
        json_array_foreach(file, i, item)
        {
            json_t *line = json_pack("{s:O}", "messages", json_object_get(item, "messages"));
            char *text = json_dumps(line, 0);
            struct outcome outcome = run(text, "generate --json -q -m %s -i - -n 1", models[m]);
            json_t *answer = output_json(&outcome);
            cr_expect(
                json_equal(json_object_get(answer, "prompt"), json_object_get(item, "prompt")),
                "%s", outcome.out);
            json_decref(answer);
            json_decref(line);
            free(text);
            outcome_free(&outcome);
        }
        json_decref(file);
    }
}

/* ---- requests ----------------------------------------------------------------------------- */

Test(generate, prints_text_under_each_adapters_name_in_order)
{
    struct outcome outcome = run(
        NULL, "generate -q -m " LLAMA2 " " FOUR_ADAPTERS "--temp 0 -n 6 -e -p 'There was once a' "
              "--adapter sql -p 'List the maps of Quill.\\n' --adapter base -p 'Near the'");

    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect_str_eq(outcome.err, "");
    const char *first = strstr(outcome.out, "[base] There was once a\n");
    const char *second = strstr(outcome.out, "\n\n[sql] List the maps of Quill.\nSELECT");
    const char *third = strstr(outcome.out, "\n\n[base] Near the\n");
    cr_expect(first == outcome.out && second > first && third > second, "%s", outcome.out);
    outcome_free(&outcome);
}

Test(generate, prints_one_answer_bare_and_says_defaults_and_timings_on_stderr)
{
    struct outcome outcome = run(NULL, "generate -m " LLAMA2 " " FOUR_ADAPTERS "--adapter sql "
                                       "--temperature 0 -e -p 'List the maps of Quill.\\n'");

    cr_expect_eq(strncmp(outcome.out, "SELECT ", 7), 0, "%s", outcome.out);
    cr_expect_eq(count_lines(outcome.out), 1);
    cr_expect_eq(count_lines(outcome.err), 2, "%s", outcome.err);
    cr_expect(
        strstr(outcome.err, "mlora: from generation_config.json: top_p 0.9, max_tokens 64\n"));
    cr_expect(strstr(outcome.err, "8 prompt tokens") && strstr(outcome.err, "first token after"));
    outcome_free(&outcome);
}

Test(generate, a_seed_gives_the_same_text_whatever_shares_the_batch)
{
    struct outcome alone = run(NULL, "generate -q --json -m " LLAMA2 " --seed 7 --temp 1 -n 24 "
                                     "--adapters pirate=" LLAMA2 "/adapters/pirate "
                                     "--adapter pirate -p 'Tell me about Nico'");
    struct outcome shared =
        run(NULL, "generate -q --json -m " LLAMA2 " --seed 7 --temp 1 -n 24 " FOUR_ADAPTERS
                  "-p 'Near the' --adapter sql -p 'How many' "
                  "--adapter pirate -p 'Tell me about Nico'");
    struct outcome other = run(NULL, "generate -q --json -m " LLAMA2 " --seed 8 --temp 1 -n 24 "
                                     "--adapters pirate=" LLAMA2 "/adapters/pirate "
                                     "--adapter pirate -p 'Tell me about Nico'");
    json_t *a = output_json(&alone), *b = output_line_json(&shared, 2), *c = output_json(&other);

    cr_expect(json_equal(json_object_get(a, "ids"), json_object_get(b, "ids")));
    cr_expect(!json_equal(json_object_get(a, "ids"), json_object_get(c, "ids")));
    json_decref(a);
    json_decref(b);
    json_decref(c);
    outcome_free(&alone);
    outcome_free(&shared);
    outcome_free(&other);
}

Test(generate, runs_more_requests_than_sequences)
{
    struct buffer lines = {0};

    for (int i = 0; i < 9; i++)
        buffer_printf(
            &lines, "{\"prompt\": \"Near the\", \"max_tokens\": %d, \"temperature\": 0}\n", 9 - i);
    struct outcome outcome = run(buffer_text(&lines), "generate -q --json -m " LLAMA2
                                                      " --max-num-seqs 2 --ignore-eos --input -");
    for (int i = 0; i < 9; i++) {
        json_t *answer = output_line_json(&outcome, i);
        cr_expect_eq(json_array_size(json_object_get(answer, "ids")), (size_t)(9 - i));
        cr_expect_str_eq(json_string_value(json_object_get(answer, "finish_reason")), "length");
        json_decref(answer);
    }
    outcome_free(&outcome);
    buffer_free(&lines);
}

Test(generate, says_how_many_guesses_were_right)
{
    const char *const how[] = {"off", "ngram", "draft --draft-model " LLAMA2 " --max-draft 3"};
    char *texts[3];

    for (int i = 0; i < 3; i++) {
        struct outcome outcome =
            run(NULL,
                "generate --json -m " LLAMA2 " --ignore-eos --temperature 0 -n 60 --speculate %s"
                " -p 'one two three one two three one two'",
                how[i]);
        json_t *answer = output_line_json(&outcome, 0);
        const json_t *usage = json_object_get(answer, "usage");
        const int n_drafted = (int)json_integer_value(json_object_get(usage, "drafted_tokens"));
        const int n_accepted = (int)json_integer_value(json_object_get(usage, "accepted_tokens"));
        char summary[64];

        texts[i] = strdup(json_string_value(json_object_get(answer, "text")));
        cr_expect_eq(n_drafted > 0, i > 0, "%s", how[i]);
        cr_expect_leq(n_accepted, n_drafted);
        cr_expect(i < 2 || n_accepted > 0, "%s", how[i]);
        snprintf(summary, sizeof summary, ", %d of %d guesses right", n_accepted, n_drafted);
        cr_expect_eq(strstr(outcome.err, summary) != NULL, i > 0, "%s", outcome.err);
        cr_expect_str_eq(texts[i], texts[0], "%s", how[i]);
        json_decref(answer);
        outcome_free(&outcome);
    }
    for (int i = 0; i < 3; i++) free(texts[i]);

    struct outcome refused = run(NULL, "generate -m " LLAMA2 " -p x --speculate draft");
    cr_expect(strstr(refused.err, "speculate draft needs draft_model"), "%s", refused.err);
    outcome_free(&refused);
}

Test(generate, waits_for_room_in_a_short_queue_and_counts_what_it_found)
{
    struct buffer lines = {0};

    for (int i = 0; i < 9; i++)
        buffer_printf(&lines,
                      "{\"ids\": [1, 300, 301, 302, 303, 304, 305, 306, 307, 308, 309, 310, "
                      "311, 312, 313, 314, 315, 316], \"max_tokens\": 2, \"priority\": 1}\n");
    for (int cache = 0; cache < 2; cache++) {
        struct outcome outcome =
            run(buffer_text(&lines),
                "generate -q --json -m " LLAMA2
                " --max-num-seqs 1 --max-queue 1 --ignore-eos --temperature 0 --input - %s",
                cache ? "" : "--no-prefix-cache");
        for (int i = 0; i < 9; i++) {
            json_t *answer = output_line_json(&outcome, i);
            const json_t *usage = json_object_get(answer, "usage");
            cr_expect_eq(json_array_size(json_object_get(answer, "ids")), 2);
            cr_expect_eq(json_integer_value(json_object_get(usage, "cached_tokens")),
                         cache && i > 0 ? 16 : 0);
            json_decref(answer);
        }
        outcome_free(&outcome);
    }
    struct outcome refused = run(NULL, "generate -m " LLAMA2 " -p x --max-queue 0");
    cr_expect(strstr(refused.err, "--max-queue is 0, must be from 1 to 16777216"), "%s",
              refused.err);
    outcome_free(&refused);
    buffer_free(&lines);
}

Test(generate, ends_before_a_stop_string)
{
    struct outcome outcome = run(NULL, "generate -q --json -m " LLAMA2 " " FOUR_ADAPTERS
                                       "--adapter sql --temperature 0 --stop ' WHERE' -e "
                                       "-p 'How many moles live near the orchard?\\n'");
    json_t *answer = output_json(&outcome);

    cr_expect_str_eq(json_string_value(json_object_get(answer, "text")),
                     "SELECT COUNT(*) FROM animals");
    cr_expect_str_eq(json_string_value(json_object_get(answer, "finish_reason")), "stop");
    json_decref(answer);
    outcome_free(&outcome);
}

Test(generate, writes_to_a_file)
{
    char path[] = "/tmp/mlora-test-output-XXXXXX";
    const int fd = mkstemp(path);

    cr_assert_geq(fd, 0);
    struct outcome outcome =
        run(NULL, "generate -q --json -m " LLAMA2 " -n 2 -p x --output %s", path);
    json_t *answer = golden(path);
    cr_expect_str_eq(outcome.out, "");
    cr_expect_eq(json_integer_value(json_object_get(answer, "index")), 0);
    json_decref(answer);
    outcome_free(&outcome);
    remove(path);
}

Test(generate, compares_all_adapters_side_by_side_or_one_under_another)
{
    setenv("COLUMNS", "80", 1);
    struct outcome wide = run(NULL, "generate -q -m " LLAMA2 " " FOUR_ADAPTERS
                                    "--temperature 0 -n 20 --compare -p 'Tell me about Nico'");
    setenv("COLUMNS", "40", 1);
    struct outcome narrow = run(NULL, "generate -q -m " LLAMA2 " " FOUR_ADAPTERS
                                      "--temperature 0 -n 20 --compare -p 'Tell me about Nico'");

    cr_expect_eq(
        strncmp(wide.out, "base                       sql                        mood\n", 59), 0,
        "%s", wide.out);
    cr_expect_eq(strncmp(narrow.out, "base\n---", 8), 0, "%s", narrow.out);
    cr_expect(strstr(narrow.out, "\n\npirate\n---") && strstr(narrow.out, "\n\ncount\n---"));
    for (const char *line = wide.out; *line; line += strcspn(line, "\n") + 1)
        cr_expect_leq(strcspn(line, "\n"), 80);
    outcome_free(&wide);
    outcome_free(&narrow);
}

Test(generate, leaves_out_a_refused_adapter_of_a_folder_only)
{
    struct outcome folder = run(NULL, "generate -m " LLAMA2 " --adapters tests/fixtures/refused "
                                      "-n 1 -p x");
    cr_expect_eq(folder.status, 0);
    cr_expect(strstr(folder.err, "mlora: warning: left out: adapter pissa: "));
    cr_expect(strstr(folder.err, "init_lora_weights"));
    outcome_free(&folder);
    struct outcome named =
        run(NULL, "generate -m " LLAMA2 " --adapters d=tests/fixtures/refused/pissa -n 1 -p x");
    expect_refusal_with(&named, "init_lora_weights");
}

/* ---- refusals ----------------------------------------------------------------------------- */

Test(generate, says_how_to_give_a_prompt)
{
    struct outcome outcome = run(NULL, "generate -m " LLAMA2);

    expect_refusal(&outcome, "no prompt: give --prompt TEXT, --prompt-file FILE, or --input FILE "
                             "with JSON lines (- is standard input)");
    outcome = run("\n \n", "generate -m " LLAMA2 " --input -");
    expect_refusal(&outcome, "--input: holds no requests");
    outcome = run(NULL, "generate -m " LLAMA2 " hello");
    expect_refusal(&outcome, "unexpected \"hello\"; a prompt is given as --prompt TEXT");
    outcome = run(NULL, "generate -m " LLAMA2 " --compare -p x -p y");
    expect_refusal(&outcome, "--compare takes one prompt, there are 2");
    outcome = run(NULL, "generate -m " LLAMA2 " --adapter sql -p x --adapter sql");
    expect_refusal(&outcome, "--adapter sql: no prompt comes after it, and it is for those: put it "
                             "before its --prompt");
}

Test(generate, names_the_nearest_adapter)
{
    struct outcome outcome =
        run(NULL, "generate -m " LLAMA2 " " FOUR_ADAPTERS "--adapter pirat -p x");
    expect_refusal_with(&outcome, "pirate");
    outcome = run("{\"prompt\": \"x\"}\n{\"prompt\": \"x\", \"adapter\": \"moood\"}\n",
                  "generate -m " LLAMA2 " " FOUR_ADAPTERS "--input -");
    expect_refusal_with(&outcome, "mlora: stdin line 2: ");
}

static void expect_line_refusal(const char *line, const char *text)
{
    struct outcome outcome = run(line, "generate -m " LLAMA2 " --input -");

    expect_refusal(&outcome, text);
}

Test(generate, names_the_line_and_field_of_a_bad_request)
{
    expect_line_refusal("{\"prompt\": \"a\"}\n\n{\"promt\": \"b\"}\n",
                        "stdin line 3: unknown field \"promt\"; did you mean \"prompt\"?");
    expect_line_refusal("{\"prompt\": \"a\", \"max_token\": 3}",
                        "stdin line 1: unknown field \"max_token\"; did you mean \"max_tokens\"?");
    expect_line_refusal("{\"prompt\": \"a\", \"top_p\": 2}",
                        "stdin line 1: top_p is 2, must be above 0 and at most 1");
    expect_line_refusal("{\"prompt\": \"a\", \"seed\": \"x\"}",
                        "stdin line 1: seed is a string, a whole number is needed");
    expect_line_refusal("{\"prompt\": \"a\", \"stop\": [\"b\", 3]}",
                        "stdin line 1: stop[1] is an integer, a string is needed");
    expect_line_refusal("{\"prompt\": \"a\", \"stop\": \"\"}",
                        "stdin line 1: stop: a stop string has 0 bytes, must be 1 to 1024");
    expect_line_refusal("{\"prompt\": \"a\", \"ids\": [1]}",
                        "stdin line 1: one of prompt, messages and ids is needed");
    expect_line_refusal("{\"ids\": [1, -3]}",
                        "stdin line 1: ids[1] is -3, must be an id of the vocabulary");
    expect_line_refusal("{\"messages\": [{\"role\": \"user\"}]}",
                        "stdin line 1: messages[0] must be an object with the strings \"role\" and "
                        "\"content\", and nothing else");
    expect_line_refusal("[1]", "stdin line 1: holds an array, an object such as {\"prompt\": "
                               "\"...\"} is needed");
    expect_line_refusal(
        "{\"prompt\": \"a\", \"prompt\": \"b\"}",
        "stdin line 1: is not JSON: column 24: duplicate object key near '\"prompt\"'");
}

Test(generate, refuses_a_prompt_longer_than_the_context)
{
    struct outcome outcome =
        run(NULL, "generate -m " LLAMA2 " -c 8 -p 'one two three four five six seven eight nine'");
    expect_refusal_with(&outcome, "8");
}

Test(generate, refuses_a_prompt_that_is_not_utf8)
{
    struct outcome outcome = run("ab\xff", "generate -m " LLAMA2 " --json --prompt-file -");

    expect_refusal(&outcome, "the prompt is not UTF-8 at byte 2");
}
