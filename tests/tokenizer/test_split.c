#include "tokenizer/split.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"

#define LLAMA3                                                                                     \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+" \
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* Cut `text` and compare with the parts, which are joined by "|" in `expected`. */
static void expect_cuts(const char *pattern, enum split_kind kind, const char *text,
                        const char *expected)
{
    struct split split;
    struct split_work work = {0};
    const size_t bytes = strlen(text);
    struct buffer got = {0};

    cr_assert_eq(split_from_regex(&split, pattern, strlen(pattern), "file"), MLORA_OK, "%s",
                 error_text());
    cr_expect_eq(split.kind, kind);
    for (size_t at = 0, start, end; at < bytes; at = end) {
        bool found;
        cr_assert_eq(split_next(&split, &work, text, bytes, at, &start, &end, &found), MLORA_OK);
        if (!found) break;
        if (got.bytes) buffer_append(&got, "|", 1);
        buffer_append(&got, text + start, end - start);
    }
    cr_expect_str_eq(buffer_text(&got), expected);
    buffer_free(&got);
    split_work_free(&work);
    split_free(&split);
}

Test(split, cuts_as_llama3_does)
{
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "Hello world", "Hello| world");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "it'S don'\xc5\xbf", "it|'S| don|'\xc5\xbf"); /* long s */
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "12345 6", "123|45| |6");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "a   b", "a|  | b");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "a  \n \n b", "a|  \n \n| b");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "ok!!\n\nx", "ok|!!\n\n|x");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, " ,x", " ,|x");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "\tx \n", "\tx| \n");
    expect_cuts(LLAMA3, SPLIT_LLAMA3, "x  ", "x|  ");
}

Test(split, cuts_as_gpt2_does)
{
    expect_cuts(GPT2, SPLIT_GPT2, "it'S it's", "it|'|S| it|'s");
    expect_cuts(GPT2, SPLIT_GPT2, " 12345 a\n\nb", " 12345| a|\n|\n|b");
    expect_cuts(GPT2, SPLIT_GPT2, "  !?", " | !?");
}

Test(split, gives_other_patterns_to_pcre2)
{
    expect_cuts("\\s?\\p{Lu}+|\\d{1,2}", SPLIT_REGEX, "AB 123 C", "AB|12|3| C");
    expect_cuts("[^\\s]+", SPLIT_REGEX, "a\xe1\xa0\x8e b", "a\xe1\xa0\x8e|b"); /* U+180E */
}

static void expect_refused(const char *pattern, mlora_status status, const char *part)
{
    struct split split;
    cr_expect_eq(split_from_regex(&split, pattern, strlen(pattern), "t.json"), status, "%s",
                 pattern);
    cr_expect(strstr(error_text(), part), "%s: %s", pattern, error_text());
    cr_expect(strstr(error_text(), "t.json"), "%s", error_text());
    split_free(&split);
}

Test(split, refuses_what_the_two_libraries_read_differently)
{
    expect_refused("a*", MLORA_EUNSUPPORTED, "a way to match nothing");
    expect_refused("\\w+", MLORA_EUNSUPPORTED, "\\w");
    expect_refused("\\h+", MLORA_EUNSUPPORTED, "\\h");
    expect_refused("^a", MLORA_EUNSUPPORTED, "^ or $");
    expect_refused("\\p{N}{1,3}+", MLORA_EUNSUPPORTED, "a + after {}");
    expect_refused("[a[b]]", MLORA_EUNSUPPORTED, "a bracket inside a class");
    expect_refused("[a&&b]", MLORA_EUNSUPPORTED, "&& inside a class");
    expect_refused("(?P<n>a)", MLORA_EUNSUPPORTED, "a special group");
    expect_refused("(*UTF)a", MLORA_EUNSUPPORTED, "(*");
    expect_refused("(a", MLORA_EFORMAT, "is not valid");
    expect_refused("\\", MLORA_EFORMAT, "backslash");
    expect_refused("", MLORA_EFORMAT, "0 bytes long");
}

Test(split, stops_a_pattern_that_never_ends)
{
    struct split split;
    struct split_work work = {0};
    size_t start, end;
    bool found;
    char *text = malloc(4000);

    memset(text, 'a', 4000);
    cr_assert_eq(split_from_regex(&split, "(?:a|aa)+[bc]", 13, "file"), MLORA_OK);
    cr_expect_eq(split_next(&split, &work, text, 4000, 0, &start, &end, &found), MLORA_EINVAL);
    cr_expect(strstr(error_text(), "shorten the text"));
    split_work_free(&work);
    split_free(&split);
    free(text);
}
