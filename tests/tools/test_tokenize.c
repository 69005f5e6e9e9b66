/* mlora tokenize: every golden text through the command, both ways. */
#include <criterion/criterion.h>
#include <string.h>

#include "tests/tools/run.h"

/* The texts of a golden file as one JSON array, or their ids. */
static char *column(const json_t *file, const char *key)
{
    json_t *array = json_array();
    size_t i;
    const json_t *item;

    json_array_foreach(file, i, item) json_array_append(array, json_object_get(item, key));
    char *text = json_dumps(array, 0);
    json_decref(array);
    return text;
}

static void expect_same(const json_t *got, const json_t *file, const char *key)
{
    size_t i;
    const json_t *item;

    cr_assert_eq(json_array_size(got), json_array_size(file));
    json_array_foreach(file, i, item)
    {
        char *text = json_dumps(json_object_get(item, "text"), JSON_ENCODE_ANY);
        cr_expect(json_equal(json_array_get(got, i), json_object_get(item, key)),
                  "%s of text %zu: %s", key, i, text);
        free(text);
    }
}

static void expect_golden(const char *flags, const char *path)
{
    json_t *file = golden(path);
    char *texts = column(file, "text"), *ids = column(file, "ids");

    struct outcome encoded = run(texts, "tokenize %s --input -", flags);
    json_t *got_ids = output_json(&encoded);
    expect_same(got_ids, file, "ids");
    struct outcome decoded = run(ids, "tokenize %s --decode --input -", flags);
    json_t *got_texts = output_json(&decoded);
    expect_same(got_texts, file, "decoded");
    json_decref(got_ids);
    json_decref(got_texts);
    outcome_free(&encoded);
    outcome_free(&decoded);
    json_decref(file);
    free(texts);
    free(ids);
}

Test(tokenize, gives_the_ids_and_texts_of_the_reference)
{
    expect_golden("--model " LLAMA2, LLAMA2 "/golden/tokenizer_json.json");
    expect_golden("--no-special --tokenizer " LLAMA2 "/tokenizer.model",
                  LLAMA2 "/golden/tokenizer_sentencepiece.json");
    expect_golden("--model " LLAMA3, LLAMA3 "/golden/tokenizer_json.json");
}

Test(tokenize, takes_text_from_arguments_and_stdin)
{
    /* golden/tokenizer_json.json, "Hello world" */
    struct outcome outcome = run(NULL, "tokenize -m " LLAMA2 " Hello world");
    cr_expect_str_eq(outcome.out, "1 431 334 1974 263 287 1526\n", "%s", outcome.err);
    outcome_free(&outcome);
    outcome = run("Hello world", "tokenize -m " LLAMA2 " --json --no-special");
    cr_expect_str_eq(outcome.out, "[431, 334, 1974, 263, 287, 1526]\n", "%s", outcome.err);
    outcome_free(&outcome);
    outcome = run("[1, 431, 334, 1974, 263, 287, 1526]\n", "tokenize -m " LLAMA2 " --decode");
    cr_expect_str_eq(outcome.out, "Hello world\n", "%s", outcome.err);
    outcome_free(&outcome);
    outcome = run(NULL, "tokenize -m " LLAMA2 " --decode --json 1 431 334");
    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect_eq(outcome.out[0], '"');
    outcome_free(&outcome);
}

Test(tokenize, leaves_special_tokens_as_text_when_asked)
{
    struct outcome special = run(NULL, "tokenize -m " LLAMA3 " '<|eot_id|>' --no-special");
    struct outcome plain =
        run(NULL, "tokenize -m " LLAMA3 " '<|eot_id|>' --no-special --no-parse-special");

    cr_expect_null(strchr(special.out, ' '), "one id is needed: %s", special.out);
    cr_expect(strchr(plain.out, ' '), "several ids are needed: %s", plain.out);
    outcome_free(&special);
    outcome_free(&plain);
}

Test(tokenize, refuses_what_is_not_text_or_ids)
{
    struct outcome outcome = run(NULL, "tokenize x");
    expect_refusal(&outcome, "no tokenizer: give --model DIR or --tokenizer FILE");
    outcome = run("[\"a\", 3]", "tokenize -m " LLAMA2 " --input -");
    expect_refusal(&outcome, "stdin: item 1: holds an integer, a string is needed");
    outcome = run("{}", "tokenize -m " LLAMA2 " --input -");
    expect_refusal(&outcome, "stdin: holds an object, a JSON array is needed");
    outcome = run(NULL, "tokenize -m " LLAMA2 " --decode 1 x");
    expect_refusal(&outcome, "an id is \"x\", a whole number is needed");
    outcome = run(NULL, "tokenize -m " LLAMA2 " --decode 99999999");
    expect_refusal_with(&outcome, "99999999");
    outcome = run(NULL, "tokenize --tokenizer no/such.json x");
    expect_refusal_with(&outcome, "no/such.json");
}
