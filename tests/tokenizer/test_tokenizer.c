/* Opening: which file is taken, and what the files beside it say. And: no text is slow. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/base/error.h"
#include "tests/tokenizer/files.h"

#define LLAMA2 "tests/fixtures/tiny-llama2/"
#define LLAMA3 "tests/fixtures/tiny-llama3/"

TestSuite(tokenizer, .fini = files_remove);

Test(tokenizer, names_what_is_missing)
{
    files_directory();
    expect_refused(files_directory(), MLORA_EIO, "has neither tokenizer.json nor tokenizer.model");
    expect_refused("tests/fixtures/none/tokenizer.json", MLORA_EIO, "cannot be opened");
    expect_refused("tests/fixtures/none", MLORA_EIO, "cannot be opened");
}

Test(tokenizer, prefers_the_json_and_takes_a_named_file)
{
    struct tokenizer *both = open_tokenizer(LLAMA2),
                     *model = open_tokenizer(LLAMA2 "tokenizer.model");
    char ids[64];
    encode_to_text(ids, sizeof ids, both, "</s>a", 0);
    cr_expect_str_eq(ids, "1 2 261"); /* parsed */
    encode_to_text(ids, sizeof ids, model, "a", 0);
    cr_expect_str_eq(ids, "1 261"); /* add_bos_token of tokenizer_config.json */
    tokenizer_close(both);
    tokenizer_close(model);
}

Test(tokenizer, recognises_a_file_of_another_name_by_its_first_character)
{
    char path[128];
    files_copy("a", LLAMA3 "tokenizer.json");
    files_copy("b", LLAMA2 "tokenizer.model");
    snprintf(path, sizeof path, "%s/a", files_directory());
    struct tokenizer *tokenizer = open_tokenizer(path);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), 1369);
    cr_expect_eq(tokenizer_bos(tokenizer), -1); /* nothing beside it says so */
    tokenizer_close(tokenizer);
    snprintf(path, sizeof path, "%s/b", files_directory());
    tokenizer = open_tokenizer(path);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), 2048);
    cr_expect_eq(tokenizer_bos(tokenizer), 1);
    tokenizer_close(tokenizer);
}

Test(tokenizer, reads_begin_and_end_tokens_in_both_spellings)
{
    files_copy("tokenizer.json", LLAMA3 "tokenizer.json");
    files_write_text("tokenizer_config.json",
                     "{\"bos_token\": {\"content\": \"<|begin_of_text|>\"}, \"eos_token\": null}");
    files_write_text("special_tokens_map.json",
                     "{\"bos_token\": \"<|pad|>\", \"eos_token\": \"<|eot_id|>\"}");
    struct tokenizer *tokenizer = open_tokenizer(files_directory());
    cr_expect_eq(tokenizer_bos(tokenizer), 1363); /* tokenizer_config.json wins */
    cr_expect_eq(tokenizer_eos(tokenizer), 1367);
    tokenizer_close(tokenizer);

    files_write_text("tokenizer_config.json", "{\"bos_token\": 7}");
    expect_refused(files_directory(), MLORA_EFORMAT, "bos_token is an integer, a string or");
    files_write_text("tokenizer_config.json", "{");
    expect_refused(files_directory(), MLORA_EFORMAT, "tokenizer_config.json: is not valid JSON");
}

Test(tokenizer, finds_the_chat_template_where_it_may_be)
{
    files_copy("tokenizer.json", LLAMA3 "tokenizer.json");
    files_write_text("tokenizer_config.json",
                     "{\"chat_template\": [{\"name\": \"tool\", \"template\": \"t\"}, "
                     "{\"name\": \"default\", \"template\": \"d\"}]}");
    struct tokenizer *tokenizer = open_tokenizer(files_directory());
    cr_expect_str_eq(tokenizer_chat_template(tokenizer), "d");
    tokenizer_close(tokenizer);

    files_write_text("chat_template.jinja", "j");
    tokenizer = open_tokenizer(files_directory());
    cr_expect_str_eq(tokenizer_chat_template(tokenizer), "j"); /* the newer place wins */
    tokenizer_close(tokenizer);

    files_write_text("chat_template.jinja", "\xff");
    expect_refused(files_directory(), MLORA_EFORMAT, "chat_template.jinja: is not UTF-8");
    files_write_text("chat_template.jinja", "j");
    files_write_text("tokenizer_config.json", "{\"chat_template\": 3}");
    tokenizer_close(open_tokenizer(files_directory())); /* not looked at any more */
}

Test(tokenizer, follows_add_bos_and_add_eos_for_sentencepiece)
{
    char ids[64];
    files_copy("tokenizer.model", LLAMA2 "tokenizer.model");
    files_write_text("tokenizer_config.json",
                     "{\"add_bos_token\": false, \"add_eos_token\": true}");
    struct tokenizer *tokenizer = open_tokenizer(files_directory());
    encode_to_text(ids, sizeof ids, tokenizer, "a", 0);
    cr_expect_str_eq(ids, "261 2");
    encode_to_text(ids, sizeof ids, tokenizer, "a", ENCODE_NO_SPECIAL);
    cr_expect_str_eq(ids, "261");
    tokenizer_close(tokenizer);
}

Test(tokenizer, counts_each_ill_formed_byte_as_one_character)
{
    struct tokenizer *tokenizer = open_tokenizer(LLAMA2 "tokenizer.model");
    char bad[256], good[256];
    encode_to_text(bad, sizeof bad, tokenizer, "a\xff\xe2\x82z", 0);
    encode_to_text(good, sizeof good, tokenizer, "a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbdz", 0);
    cr_expect_str_eq(bad, good);
    tokenizer_close(tokenizer);
}

/* Processor time to encode `bytes` of a unit that comes again and again. */
static double encode_seconds(const struct tokenizer *tokenizer, const char *unit, size_t bytes)
{
    const size_t n = strlen(unit);
    char *text = malloc(bytes);
    struct ids ids = {0};
    struct timespec start, end;

    cr_assert(text);
    for (size_t i = 0; i < bytes; i++) text[i] = unit[i % n];
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
    cr_expect_eq(tokenizer_encode(tokenizer, &ids, text, bytes, 0), MLORA_OK, "%s", error_text());
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
    cr_expect_gt(ids.n, 0);
    ids_free(&ids);
    free(text);
    return (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9;
}

/* AddressSanitizer looks at all that memmem could read, to the text's end, at every call: there
 * the text is shorter. */
#ifdef __SANITIZE_ADDRESS__
enum { HOSTILE_BYTES = 1 << 17 };
#else
enum { HOSTILE_BYTES = 1 << 20 };
#endif

/* A text against an eighth of it: 8 times the time where it is linear, 64 where each character
 * looks at all others; half way between, for a machine that is busy with something else. */
static void expect_linear(const struct tokenizer *tokenizer, const char *unit, const char *where)
{
    const double part = encode_seconds(tokenizer, unit, HOSTILE_BYTES / 8);
    const double whole = encode_seconds(tokenizer, unit, HOSTILE_BYTES);
    cr_expect_lt(whole, 24 * part + 0.01, "%s: %.3f s and %.3f s for \"%s\" repeated", where, part,
                 whole, unit);
}

Test(tokenizer, encodes_a_hostile_text_in_linear_time)
{
    static const char *const paths[] = {LLAMA2 "tokenizer.model", LLAMA2, LLAMA3,
                                        "tests/fixtures/tokenizers/qwen2"};
    static const char *const units[] = {"a",        " ",          "\xf0\x9f\xa6\x8a", "ab",
                                        "the key ", "<|im_start", "\xcc\x81\xcc\x96", "\xff"};
    for (size_t p = 0; p < sizeof paths / sizeof *paths; p++) {
        struct tokenizer *tokenizer = open_tokenizer(paths[p]);
        for (size_t u = 0; u < sizeof units / sizeof *units; u++)
            expect_linear(tokenizer, units[u], paths[p]);
        tokenizer_close(tokenizer);
    }
}
