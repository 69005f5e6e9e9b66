#include <criterion/criterion.h>
#include <string.h>

#include "tokenizer/unicode.h"

Test(unicode, knows_the_classes_of_the_references)
{
    int letters = 0, numbers = 0, spaces = 0;
    for (uint32_t c = 0; c <= 0x10ffff; c++) {
        letters += (unicode_classes(c) & UNICODE_LETTER) != 0;
        numbers += (unicode_classes(c) & UNICODE_NUMBER) != 0;
        spaces += (unicode_classes(c) & UNICODE_SPACE) != 0;
    }
    cr_expect_eq(letters, 141028); /* Unicode 16 */
    cr_expect_eq(numbers, 1911);
    cr_expect_eq(spaces, 25);
    cr_expect_not(unicode_classes(0x180e) & UNICODE_SPACE); /* PCRE2 would say otherwise */
    cr_expect_eq(unicode_classes(0x110000), 0);
    cr_expect(unicode_classes('_') & UNICODE_WORD);
    cr_expect(unicode_is_python_space(0x1c));
    cr_expect_not(unicode_classes(0x1c) & UNICODE_SPACE);
}

Test(utf8, round_trips_every_code_point)
{
    for (uint32_t c = 0; c <= 0x10ffff; c++) {
        char text[4];
        uint32_t back;
        const size_t n = utf8_encode(text, c);
        const bool surrogate = c >= 0xd800 && c <= 0xdfff;
        const size_t got = utf8_decode(text, n, &back);
        if (surrogate) {
            cr_assert_eq(got, 0);
            continue;
        }
        cr_assert(got == n && back == c, "U+%04X", c);
        cr_assert(utf8_decode_back(text, n, &back) == n && back == c, "U+%04X", c);
    }
}

static void expect_repaired(const char *bytes, const char *each, const char *lossy)
{
    struct buffer out = {0};
    cr_assert_eq(utf8_append_each(&out, bytes, strlen(bytes)), MLORA_OK);
    cr_expect_str_eq(buffer_text(&out), each);
    out.bytes = 0;
    cr_assert_eq(utf8_append_lossy(&out, bytes, strlen(bytes)), MLORA_OK);
    cr_expect_str_eq(buffer_text(&out), lossy);
    buffer_free(&out);
}

#define R "\xef\xbf\xbd"

Test(utf8, replaces_ill_formed_bytes)
{
    expect_repaired("a\xff"
                    "b",
                    "a" R "b", "a" R "b");
    expect_repaired("\xf0\x9f\xa6"
                    "x",
                    R R R "x", R "x"); /* a cut character is one part */
    expect_repaired("\xe2\x82", R R, R);
    expect_repaired("\xc0\xaf", R R, R R);         /* overlong: each byte alone */
    expect_repaired("\xed\xa0\x80", R R R, R R R); /* a surrogate */
    expect_repaired("\xf4\x90\x80\x80", R R R R, R R R R);
    expect_repaired("\xc3\xa9", "\xc3\xa9", "\xc3\xa9");
}

Test(utf8, says_what_more_bytes_could_complete)
{
    cr_expect_eq(utf8_incomplete("ab", 2), 0);
    cr_expect_eq(utf8_incomplete("a\xc3", 2), 1);
    cr_expect_eq(utf8_incomplete("\xf0\x9f\xa6", 3), 3);
    cr_expect_eq(utf8_incomplete("\xf0\x9f\xa6\x8a", 4), 0);
    cr_expect_eq(utf8_incomplete("\xff", 1), 0);
    cr_expect_eq(utf8_incomplete("\xe0\x80", 2), 0); /* nothing completes an overlong form */
    cr_expect_eq(utf8_incomplete("\x80\x80\x80", 3), 0);
}
