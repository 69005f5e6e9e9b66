/* Every golden text and every case of the small tokenizers: the reference's ids and text. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/error.h"
#include "tests/tokenizer/files.h"

#define FIXTURES "tests/fixtures/"

static void expect_text(const struct tokenizer *tokenizer, const json_t *ids, bool keep_special,
                        const json_t *text, const char *where)
{
    struct ids list = {0};
    struct buffer got = {0};
    size_t i;
    json_t *id;

    if (!text) return;
    json_array_foreach(ids, i, id) ids_push(&list, (int32_t)json_integer_value(id));
    cr_assert_eq(tokenizer_decode(tokenizer, &got, list.data, list.n, keep_special), MLORA_OK);
    const bool same = got.bytes == json_string_length(text) &&
                      memcmp(buffer_text(&got), json_string_value(text), got.bytes) == 0;
    cr_expect(same, "%s: \"%s\", expected \"%s\"", where, buffer_text(&got),
              json_string_value(text));
    buffer_free(&got);
    ids_free(&list);
}

/* Check all cases of a file; `flags` are those under which "ids" was made. */
static void check(const char *tokenizer_path, const char *cases_path, size_t expected_cases,
                  int flags)
{
    struct tokenizer *tokenizer = open_tokenizer(tokenizer_path);
    json_t *cases = fixture_json(cases_path), *entry;
    size_t i;

    if (expected_cases) cr_expect_eq(json_array_size(cases), expected_cases);
    cr_expect_gt(json_array_size(cases), 0);
    json_array_foreach(cases, i, entry)
    {
        const json_t *text = json_object_get(entry, "text"), *ids = json_object_get(entry, "ids");
        const json_t *plain = json_object_get(entry, "plain");
        const size_t bytes = json_string_length(text);
        expect_ids(tokenizer, json_string_value(text), bytes, flags, ids, cases_path);
        if (plain)
            expect_ids(tokenizer, json_string_value(text), bytes,
                       ENCODE_NO_SPECIAL | ENCODE_NO_PARSE_SPECIAL, plain, cases_path);
        expect_text(tokenizer, ids, false, json_object_get(entry, "decoded"), cases_path);
        expect_text(tokenizer, ids, true, json_object_get(entry, "decoded_with_special"),
                    cases_path);
    }
    json_decref(cases);
    tokenizer_close(tokenizer);
}

Test(reference, equals_sentencepiece_on_all_goldens)
{
    check(FIXTURES "tiny-llama2/tokenizer.model",
          FIXTURES "tiny-llama2/golden/tokenizer_sentencepiece.json", 318, ENCODE_NO_SPECIAL);
}

Test(reference, equals_llama2s_tokenizer_json_on_all_goldens)
{
    check(FIXTURES "tiny-llama2", FIXTURES "tiny-llama2/golden/tokenizer_json.json", 318, 0);
}

Test(reference, equals_llama3s_tokenizer_json_on_all_goldens)
{
    check(FIXTURES "tiny-llama3", FIXTURES "tiny-llama3/golden/tokenizer_json.json", 320, 0);
}

Test(reference, equals_every_small_tokenizer)
{
    static const char *const names[] = {"gpt2",
                                        "qwen2",
                                        "llama3",
                                        "regex",
                                        "behaviors",
                                        "sentencepiece",
                                        "sentencepiece-odd",
                                        "metaspace-always",
                                        "metaspace-first",
                                        "metaspace-never"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[128], cases[128];
        snprintf(path, sizeof path, FIXTURES "tokenizers/%s", names[i]);
        snprintf(cases, sizeof cases, FIXTURES "tokenizers/%s/cases.json", names[i]);
        check(path, cases, 0, 0);
    }
}

/* What a token adds, put together, is what decode gives (no first space is dropped: the stream
 * continues a text). */
Test(reference, pieces_put_together_are_the_text)
{
    static const char *const paths[] = {"tiny-llama2/tokenizer.model", "tiny-llama2", "tiny-llama3",
                                        "tokenizers/qwen2"};
    for (size_t p = 0; p < sizeof paths / sizeof *paths; p++) {
        char path[128];
        snprintf(path, sizeof path, FIXTURES "%s", paths[p]);
        struct tokenizer *tokenizer = open_tokenizer(path);
        const char *text = "Who lost the \xc3\xa9toile? \xf0\x9f\xa6\x8a it's  42.\n";
        struct ids ids = {0};
        struct buffer got = {0};
        cr_assert_eq(tokenizer_encode(tokenizer, &ids, text, strlen(text), 0), MLORA_OK);
        for (int i = 0; i < ids.n; i++)
            cr_assert_eq(tokenizer_piece(tokenizer, &got, ids.data[i]), MLORA_OK);
        const char *shown = buffer_text(&got);
        cr_expect_str_eq(shown + (*shown == ' '), text, "%s", path);
        cr_expect_eq(tokenizer_piece(tokenizer, &got, -1), MLORA_OK);
        cr_expect_eq(tokenizer_piece(tokenizer, &got, 1 << 30), MLORA_OK);
        buffer_free(&got);
        ids_free(&ids);
        tokenizer_close(tokenizer);
    }
}
