#include "tokenizer/stream.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "tests/tokenizer/files.h"

static struct tokenizer *tokenizer;

static void setup(void)
{
    tokenizer = open_tokenizer("tests/fixtures/tiny-llama2/tokenizer.model");
}

static void teardown(void)
{
    tokenizer_close(tokenizer);
}

TestSuite(stream, .init = setup, .fini = teardown);

/* Push one byte token for each byte, and check what is shown after every one against `expected`,
 * parts joined by "/"; the last part is what the end releases. */
static void expect_parts(const char *bytes, const char *const *stop, int n_stop,
                         const char *expected, bool stopped)
{
    struct stream stream;
    struct buffer all = {0};

    cr_assert_eq(stream_open(&stream, tokenizer, stop, n_stop), MLORA_OK);
    for (const char *c = bytes; *c; c++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned char)*c);
        cr_assert_eq(stream_push(&stream, &all, tokenizer_find(tokenizer, name, 6)), MLORA_OK);
        buffer_append(&all, "/", 1);
    }
    cr_expect_eq(stream.stopped, stopped);
    cr_assert_eq(stream_finish(&stream, &all), MLORA_OK);
    cr_expect_str_eq(buffer_text(&all), expected);
    buffer_free(&all);
    stream_close(&stream);
}

Test(stream, shows_whole_characters_only)
{
    expect_parts("a\xc3\xa9"
                 "b",
                 NULL, 0, "a//\xc3\xa9/b/", false);
    expect_parts("\xf0\x9f\xa6\x8a", NULL, 0, "///\xf0\x9f\xa6\x8a/", false);
}

Test(stream, replaces_ill_formed_parts_once)
{
    expect_parts("\xf0\x9f"
                 "a",
                 NULL, 0,
                 "//\xef\xbf\xbd"
                 "a/",
                 false);
    expect_parts("\xff", NULL, 0, "\xef\xbf\xbd/", false);
    expect_parts("a\xe2\x82", NULL, 0, "a///\xef\xbf\xbd", false);
}

Test(stream, holds_back_what_may_be_a_stop_string)
{
    const char *const stop[] = {"END"};
    expect_parts("xEND y", stop, 1, "x//////", true);
    expect_parts("ENE", stop, 1, "//EN/E", false);
    expect_parts("EEND", stop, 1, "/E///", true);
    expect_parts("E\xc3\xa9", stop, 1, "//E\xc3\xa9/", false);
}

Test(stream, takes_the_stop_string_that_is_complete_first)
{
    const char *const stop[] = {"abcd", "bc"};
    expect_parts("abcd", stop, 2, "//a//", true);
    const char *const nested[] = {"ab", "xab"};
    expect_parts("xab", nested, 2, "///", true); /* they end together: the longer one */
}

Test(stream, stops_alike_however_the_text_is_cut)
{
    const char *const stop[] = {"the key"};
    const char *text = "Who lost the key? And why";
    struct ids ids = {0};
    struct stream stream;
    struct buffer all = {0};

    cr_assert_eq(tokenizer_encode(tokenizer, &ids, text, strlen(text), ENCODE_NO_SPECIAL),
                 MLORA_OK);
    cr_assert_eq(stream_open(&stream, tokenizer, stop, 1), MLORA_OK);
    for (int i = 0; i < ids.n; i++) stream_push(&stream, &all, ids.data[i]);
    cr_expect(stream.stopped);
    cr_assert_eq(stream_finish(&stream, &all), MLORA_OK);
    cr_expect_str_eq(buffer_text(&all), " Who lost ");
    stream_close(&stream);
    buffer_free(&all);
    ids_free(&ids);
}

Test(stream, passes_over_special_and_unknown_ids_and_empty_stop_strings)
{
    const char *const stop[] = {""};
    struct stream stream;
    struct buffer all = {0};

    cr_assert_eq(stream_open(&stream, tokenizer, stop, 1), MLORA_OK);
    cr_assert_eq(stream_push(&stream, &all, 1), MLORA_OK); /* <s> */
    cr_assert_eq(stream_push(&stream, &all, 99999), MLORA_OK);
    cr_assert_eq(stream_push(&stream, &all, 261), MLORA_OK); /* _a */
    cr_expect_not(stream.stopped);
    cr_expect_str_eq(buffer_text(&all), " a");
    stream_close(&stream);
    buffer_free(&all);
}
