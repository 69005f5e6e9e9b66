/* tokenizer.json files that are damaged or not supported: each is refused with a reason. Each
 * test changes one part of a small good file. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tests/tokenizer/files.h"

static const char good[] =
    "{\"version\": \"1.0\","
    " \"added_tokens\": [{\"id\": 5, \"content\": \"<e>\", \"normalized\": false, "
    "\"special\": true}],"
    " \"normalizer\": null, \"pre_tokenizer\": null, \"post_processor\": null, \"decoder\": null,"
    " \"model\": {\"type\": \"BPE\", \"unk_token\": \"?\", \"vocab\": {\"?\": 0, \"a\": 1, "
    "\"b\": 2, \"ab\": 3, \"<\": 4}, \"merges\": [\"a b\"]}}";

/* Write the good file with the first `from` in it replaced by `to`. */
static void write_changed(const char *from, const char *to)
{
    struct buffer text = {0};
    const char *at = strstr(good, from);
    cr_assert(at, "%s", from);
    buffer_append(&text, good, (size_t)(at - good));
    buffer_append(&text, to, strlen(to));
    buffer_append(&text, at + strlen(from), strlen(at + strlen(from)));
    files_write("tokenizer.json", text.data, text.bytes);
    buffer_free(&text);
}

static void refuse(const char *from, const char *to, mlora_status status, const char *part)
{
    write_changed(from, to);
    expect_refused(files_directory(), status, part);
}

static void expect_encoded(const char *from, const char *to, const char *text, const char *ids)
{
    char got[128];
    write_changed(from, to);
    struct tokenizer *tokenizer = open_tokenizer(files_directory());
    encode_to_text(got, sizeof got, tokenizer, text, 0);
    cr_expect_str_eq(got, ids, "%s for \"%s\", expected %s", got, text, ids);
    tokenizer_close(tokenizer);
}

TestSuite(hf, .fini = files_remove);

#define BAD MLORA_EFORMAT
#define NO  MLORA_EUNSUPPORTED

Test(hf, reads_a_small_file)
{
    expect_encoded("null", "null", "abba<e>", "3 2 1 5");
    expect_encoded("[\"a b\"]", "[[\"a\", \"b\"]]", "ab", "3"); /* the other spelling of merges */
    expect_encoded("[\"a b\"]", "[]", "ab", "1 2");
    expect_encoded("\"merges\"", "\"ignore_merges\": true, \"merges\"", "ab", "3");
    expect_encoded("\"merges\"", "\"fuse_unk\": true, \"merges\"", "xya", "0 1");
    expect_encoded("null", "null", "xya", "0 0 1");
    expect_encoded("\"version\"", "\"truncation\": {\"max_length\": 1}, \"version\"", "aa", "1 1");
}

Test(hf, refuses_damaged_files)
{
    files_write_text("tokenizer.json", "{\"model\": ");
    expect_refused(files_directory(), BAD, "is not valid JSON");
    files_write_text("tokenizer.json", "[]");
    expect_refused(files_directory(), BAD, "a JSON object is needed");
    files_write_text("tokenizer.json", "{}");
    expect_refused(files_directory(), BAD, "model is missing");
    refuse("\"1.0\"", "\"2.0\"", NO, "version is \"2.0\"");
    refuse("\"model\": {", "\"model\": 3, \"x\": {", BAD, "model is an integer");
    refuse("\"version\"", "\"version\": \"1.0\", \"version\"", BAD, "duplicate");
}

Test(hf, refuses_deep_nesting)
{
    char *deep = malloc(1 << 20);
    memset(deep, '[', (1 << 20) - 1);
    deep[(1 << 20) - 1] = '\0';
    refuse("null", deep, BAD, "is not valid JSON");
    free(deep);
    struct buffer nested = {0};
    for (int i = 0; i < 20; i++)
        buffer_printf(&nested, "{\"type\": \"Sequence\", \"normalizers\": [");
    for (int i = 0; i < 20; i++) buffer_printf(&nested, "]}");
    refuse("null", nested.data, BAD, "normalizer is nested more than 8 deep");
    buffer_free(&nested);
}

Test(hf, refuses_a_bad_vocabulary)
{
    refuse("\"b\": 2", "\"b\": \"2\"", BAD, "the id of \"b\" is a string");
    refuse("\"b\": 2", "\"b\": -2", BAD, "token \"b\" has id -2, must be from 0 to 4194303");
    refuse("\"b\": 2", "\"b\": 99999999999", BAD, "token \"b\" has id 99999999999");
    refuse("\"b\": 2", "\"b\": 1", BAD, "id 1 is given to two tokens, the second is \"b\"");
    refuse("\"vocab\": {", "\"vocab\": {}, \"x\": {", BAD, "model.vocab is empty or missing");
    refuse("\"unk_token\": \"?\"", "\"unk_token\": \"!\"", BAD,
           "model.unk_token \"!\" is not in model.vocab");
}

Test(hf, refuses_bad_merges)
{
    refuse("a b", "a c", BAD, "merges[0] needs the token \"c\"");
    refuse("a b", "c a", BAD, "merges[0] needs the token \"c\"");
    refuse("a b", "b a", BAD, "merges[0] needs the token \"ba\"");
    refuse("a b", "ab", BAD, "model.merges[0] is neither");
    refuse("a b", "a b c", BAD, "model.merges[0] is neither");
    refuse("[\"a b\"]", "[[\"a\"]]", BAD, "model.merges[0] is neither");
    refuse("[\"a b\"]", "{}", BAD, "model.merges is an object");
}

Test(hf, refuses_other_models_and_settings_by_name)
{
    refuse("BPE", "Unigram", NO, "model.type is \"Unigram\", only BPE is supported");
    refuse("\"merges\"", "\"dropout\": 0.1, \"merges\"", NO, "model.dropout is set");
    refuse("\"merges\"", "\"end_of_word_suffix\": \"</w>\", \"merges\"", NO,
           "model.end_of_word_suffix is set");
    refuse("\"merges\"", "\"continuing_subword_prefix\": \"##\", \"merges\"", NO,
           "model.continuing_subword_prefix is set");
    refuse("\"merges\"", "\"fuse_unk\": 1, \"merges\"", BAD, "fuse_unk is an integer");
}

Test(hf, refuses_unknown_parts_by_name)
{
    refuse("\"normalizer\": null", "\"normalizer\": {\"type\": \"Lowercase\"}", NO,
           "normalizer \"Lowercase\" is not supported; known are");
    refuse("\"normalizer\": null",
           "\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"Regex\": \"a\"}, "
           "\"content\": \"b\"}",
           NO, "normalizer Replace has a Regex pattern");
    refuse("\"normalizer\": null",
           "\"normalizer\": {\"type\": \"Replace\", \"pattern\": {\"String\": \"\"}, "
           "\"content\": \"b\"}",
           BAD, "normalizer Replace has an empty pattern");
    refuse("\"normalizer\": null", "\"normalizer\": {}", BAD, "normalizer has no type");
    refuse("\"pre_tokenizer\": null", "\"pre_tokenizer\": {\"type\": \"Whitespace\"}", NO,
           "pre_tokenizer \"Whitespace\" is not supported; known are");
    refuse("\"pre_tokenizer\": null",
           "\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"_\", "
           "\"prepend_scheme\": \"first\", \"add_prefix_space\": false}",
           BAD, "add_prefix_space is false, but prepend_scheme is \"first\"");
    refuse("\"pre_tokenizer\": null",
           "\"pre_tokenizer\": {\"type\": \"Metaspace\", \"replacement\": \"__\"}", BAD,
           "replacement is \"__\", one character is needed");
    refuse("\"pre_tokenizer\": null",
           "\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"a\"}, "
           "\"behavior\": \"Odd\"}",
           BAD, "behavior is Odd");
    refuse("\"pre_tokenizer\": null",
           "\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {}, "
           "\"behavior\": \"Removed\"}",
           BAD, "pattern is an object");
    refuse("\"decoder\": null", "\"decoder\": {\"type\": \"WordPiece\"}", NO,
           "decoder \"WordPiece\" is not supported; known are");
    refuse("\"decoder\": null", "\"decoder\": {\"type\": \"Strip\", \"content\": \"ab\"}", BAD,
           "decoder Strip: content is \"ab\"");
    refuse("\"post_processor\": null", "\"post_processor\": {\"type\": \"BertProcessing\"}", NO,
           "post_processor \"BertProcessing\" is not supported; known are");
}

#define TEMPLATE(single, ids)                                                                      \
    "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": " single                   \
    ", \"special_tokens\": {\"x\": {\"id\": \"x\", \"ids\": " ids ", \"tokens\": [\"x\"]}}}"
#define SPECIAL  "{\"SpecialToken\": {\"id\": \"x\", \"type_id\": 0}}"
#define SEQUENCE "{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}"

Test(hf, puts_the_templates_tokens_around)
{
    expect_encoded("\"post_processor\": null", TEMPLATE("[" SPECIAL "," SEQUENCE "]", "[5]"), "a",
                   "5 1");
    expect_encoded("\"post_processor\": null",
                   TEMPLATE("[" SEQUENCE "," SPECIAL "," SPECIAL "]", "[5, 4]"), "a", "1 5 4 5 4");
    refuse("\"post_processor\": null", TEMPLATE("[" SPECIAL "]", "[5]"), NO,
           "single holds the text 0 times");
    refuse("\"post_processor\": null", TEMPLATE("[" SPECIAL "," SEQUENCE "]", "[6]"), BAD,
           "has an id that is not in the vocabulary of 6");
    refuse("\"post_processor\": null", TEMPLATE("[" SPECIAL "," SEQUENCE "]", "{}"), BAD,
           "lacks the ids of \"x\"");
    refuse("\"post_processor\": null", TEMPLATE("[\"x\"]", "[5]"), BAD,
           "single[0] is neither a SpecialToken nor the Sequence A");
}

Test(hf, refuses_bad_added_tokens)
{
    refuse("\"id\": 5", "\"id\": 6", BAD,
           "added token \"<e>\" has id 6, but its place in the "
           "vocabulary is 5");
    refuse("\"id\": 5", "\"id\": 99999999999", BAD, "id is 99999999999");
    refuse("\"content\": \"<e>\"", "\"content\": \"a\"", BAD,
           "has id 5, but its place in the "
           "vocabulary is 1");
    refuse("\"added_tokens\": [", "\"added_tokens\": [{\"id\": 5, \"content\": \"<e>\"}, ", BAD,
           "added token \"<e>\" has id 5, but its place in the vocabulary is 6");
    refuse("\"added_tokens\": [",
           "\"added_tokens\": [{\"id\": 1, \"content\": \"a\"}, {\"id\": 1, \"content\": \"a\"}, ",
           BAD, "added token \"a\" is listed twice");
    refuse("\"added_tokens\": [", "\"added_tokens\": [7, ", BAD,
           "an entry of added_tokens is an integer");
}

/* Not even merges spell a special token in plain text; one of a single character is that one. */
Test(hf, plain_text_never_becomes_a_special_token)
{
    char ids[64];
    write_changed("{\"id\": 5", "{\"id\": 3, \"content\": \"ab\", \"normalized\": false, "
                                "\"special\": true}, {\"id\": 5");
    struct tokenizer *tokenizer = open_tokenizer(files_directory());
    encode_to_text(ids, sizeof ids, tokenizer, "ab<e>", 0);
    cr_expect_str_eq(ids, "3 5");
    encode_to_text(ids, sizeof ids, tokenizer, "ab<e>", ENCODE_NO_PARSE_SPECIAL);
    cr_expect_str_eq(ids, "1 2 4 0 0");
    tokenizer_close(tokenizer);
}

Test(hf, refuses_ids_outside_the_vocabulary_when_decoding)
{
    const int32_t ids[] = {1, 6}, negative[] = {-1};
    struct buffer text = {0};
    write_changed("null", "null");
    struct tokenizer *tokenizer = open_tokenizer(files_directory());
    cr_expect_eq(tokenizer_decode(tokenizer, &text, ids, 2, false), MLORA_EINVAL);
    cr_expect(strstr(error_text(), "token id 6 is outside the vocabulary of 6"));
    cr_expect_eq(tokenizer_decode(tokenizer, &text, negative, 1, false), MLORA_EINVAL);
    cr_expect_eq(tokenizer_decode(tokenizer, &text, ids, 1, false), MLORA_OK);
    cr_expect_str_eq(buffer_text(&text), "a");
    buffer_free(&text);
    tokenizer_close(tokenizer);
}
