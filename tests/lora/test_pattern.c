/* Every expected answer here is that of Python's re, which is what PEFT calls. */
#include "lora/pattern.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { STEPS = 1000000 };

struct match_case {
    const char *pattern, *subject;
    bool matches;
};

/* clang-format off */
static const struct match_case whole[] = { /* re.fullmatch(pattern, subject) */
    {".*\\.(self_attn|mlp)\\.(q_proj|v_proj|gate_proj|up_proj|down_proj)", "model.layers.3.self_attn.q_proj", true},
    {".*\\.(self_attn|mlp)\\.(q_proj|v_proj|gate_proj|up_proj|down_proj)", "model.layers.11.mlp.down_proj", true},
    {".*\\.(self_attn|mlp)\\.(q_proj|v_proj|gate_proj|up_proj|down_proj)", "lm_head", false},
    {"q_proj", "model.layers.3.self_attn.q_proj", false},
    {".*q_proj", "model.layers.3.self_attn.q_proj", true},
    {".*q_pro", "model.layers.3.self_attn.q_proj", false},
    {"model\\.layers\\.(3|4)\\..*", "model.layers.3.self_attn.q_proj", true},
    {"model\\.layers\\.(3|4)\\..*", "model.layers.11.mlp.down_proj", false},
    {"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.(?:self_attn|mlp)\\.(?:(?:q_proj|down_proj)))", "model.layers.3.self_attn.q_proj", true},
    {"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.(?:self_attn|mlp)\\.(?:(?:q_proj|down_proj)))", "model.layers.11.mlp.down_proj", true},
    {"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.(?:self_attn|mlp)\\.(?:(?:q_proj|down_proj)))", "lm_head", false},
    {"a|ab", "ab", true},
    {"a|ab", "a", true},
    {"a|ab", "b", false},
    {".*\\.\\d+\\..*(?<!q)_proj", "model.layers.3.self_attn.q_proj", false},
    {".*\\.\\d+\\..*(?<!q)_proj", "model.layers.11.mlp.down_proj", true},
    {".*\\.\\d{,1}\\..*", "model.layers.3.self_attn.q_proj", true},
    {".*\\.\\d{,1}\\..*", "model.layers.11.mlp.down_proj", false},
    {".*\\.\\d{,}\\..*", "model.layers.3.self_attn.q_proj", true},
    {".*\\.\\d{,}\\..*", "model.layers.11.mlp.down_proj", true},
    {".*layers\\.(?!3\\.).*", "model.layers.3.self_attn.q_proj", false},
    {".*layers\\.(?!3\\.).*", "model.layers.11.mlp.down_proj", true},
    {"(?i).*Q_PROJ", "model.layers.3.self_attn.q_proj", true},
    {"(?i).*Q_PROJ", "model.layers.11.mlp.down_proj", false},
    {"(?P<x>l)m_hea(?P=x)?d", "lm_head", true},
    {"(l)m_head\\1?", "lm_head", true},
    {"(l)m_head\\1?", "lm_headl", true},
    {"[^.]+", "lm_head", true},
    {"[^.]+", "model.layers.3.self_attn.q_proj", false},
    {"[]a-z_]+", "lm_head", true},
    {"[[:alpha:]]+", "a:]", false},
    {"[[:alpha:]]+", "alpha", false},
    {"[[:alpha:]]+", ":a]]", false},
    {"lm\\x5fhead", "lm_head", true},
    {"lm_head\\Z", "lm_head", true},
    {"\\Alm_head$", "lm_head", true},
    {"lm_head(?#the (head)", "lm_head", true},
    {"model\\.layers\\.[0-5]\\.self_attn\\.(q|k)_proj", "model.layers.3.self_attn.q_proj", true},
    {"model\\.layers\\.[0-5]\\.self_attn\\.(q|k)_proj", "model.layers.11.mlp.down_proj", false},
    {".*\\.v", "model.layers.3.self_attn.q_proj", false},
    {"x{2}", "xx", true},
    {"x{2}", "xxx", false},
    {"x{,2}", "", true},
    {"x{,2}", "xx", true},
    {"x{,2}", "xxx", false},
    {"x{,2", "x{,2", true},
    {"x{,2", "xx", false},
    {"(a)?(?(1)b|c)", "ab", true},
    {"(a)?(?(1)b|c)", "c", true},
    {"(a)?(?(1)b|c)", "ac", false},
    {"\\w+", "lm_head", true},
    {"\\w+", "model.layers.3.self_attn.q_proj", false},
    {"", "lm_head", false},
    {"(?>a+)b", "aab", true},
    {"a++b", "aab", true},
    {"\\v?lm_head", "lm_head", true},
    {"[\\v]?lm_head", "lm_head", true},
    {"[\\v]?lm_head", "\vlm_head", true},
    {"l.*?d", "lm_head", true},
};

static const struct match_case suffix[] = { /* re.match(rf"(.*\.)?({pattern})$", subject) */
    {"down_proj", "model.layers.11.mlp.down_proj", true},
    {"down_proj", "model.layers.3.self_attn.q_proj", false},
    {"layers\\.0\\.self_attn\\.q_proj", "model.layers.0.self_attn.q_proj", true},
    {"layers\\.0\\.self_attn\\.q_proj", "model.layers.10.self_attn.q_proj", false},
    {"self_attn.q_proj", "model.layers.3.self_attn.q_proj", true},
    {"self_attn.q_proj", "model.layers.3.xself_attn.q_proj", false},
    {"^model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj", true},
    {"^self_attn.q_proj", "model.layers.3.self_attn.q_proj", false},
    {"q_proj|k_proj", "model.layers.3.self_attn.q_proj", true},
    {"q_proj|k_proj", "model.layers.11.mlp.down_proj", false},
    {".*self_attn.*", "model.layers.3.self_attn.q_proj", true},
    {".*self_attn.*", "model.layers.11.mlp.down_proj", false},
    {"proj", "model.layers.3.self_attn.q_proj", false},
    {"layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj", false},
    {"layers\\.\\d+\\.mlp\\.\\w+", "model.layers.11.mlp.down_proj", true},
    {"layers\\.\\d+\\.mlp\\.\\w+", "model.layers.3.self_attn.q_proj", false},
    {"model.layers.3.self_attn.q_proj$", "model.layers.3.self_attn.q_proj", true},
    {"q_proj)|(k_proj", "model.layers.3.self_attn.q_proj", true},
    {"model", "model", true},
    {"model", "model.layers.3.self_attn.q_proj", false},
    {"", "x.", true},
    {"", "model.layers.3.self_attn.q_proj", false},
    {"(\\w+)\\.q_proj", "model.layers.3.self_attn.q_proj", true},
    {"q_proj\\b", "model.layers.3.self_attn.q_proj", true},
};

static const struct {
    const char *pattern, *subject;
    const char *digits; /* NULL: no match */
} layers[] = { /* re.match(rf".*?\.{pattern}\.(\d+)\.", subject).group(1) */
    {"[^.]*", "model.layers.3.self_attn.q_proj", "3"},
    {"[^.]*", "model.layers.11.mlp.down_proj", "11"},
    {"[^.]*", "model.layers.3", NULL},
    {"[^.]*", "layers.3.self_attn.q_proj", NULL},
    {"[^.]*", "model.layers.3.mlp.experts.7.q_proj", "3"},
    {"layers", "model.layers.3.self_attn.q_proj", "3"},
    {"layers", "model.layers.11.mlp.down_proj", "11"},
    {"layers", "model.layers.3", NULL},
    {"layers", "layers.3.self_attn.q_proj", NULL},
    {"layers", "model.layers.3.mlp.experts.7.q_proj", "3"},
    {"h", "model.layers.3.self_attn.q_proj", NULL},
    {"h", "model.layers.11.mlp.down_proj", NULL},
    {"h", "model.layers.3", NULL},
    {"h", "layers.3.self_attn.q_proj", NULL},
    {"h", "model.layers.3.mlp.experts.7.q_proj", NULL},
    {"experts", "model.layers.3.self_attn.q_proj", NULL},
    {"experts", "model.layers.11.mlp.down_proj", NULL},
    {"experts", "model.layers.3", NULL},
    {"experts", "layers.3.self_attn.q_proj", NULL},
    {"experts", "model.layers.3.mlp.experts.7.q_proj", "7"},
    {"l.*s", "model.layers.3.self_attn.q_proj", "3"},
    {"l.*s", "model.layers.11.mlp.down_proj", "11"},
    {"l.*s", "model.layers.3", NULL},
    {"l.*s", "layers.3.self_attn.q_proj", NULL},
    {"l.*s", "model.layers.3.mlp.experts.7.q_proj", "7"},
};
/* clang-format on */

static void expect_match(const struct match_case *c, const char *before, const char *after,
                         enum pattern_anchor anchor)
{
    struct pattern *pattern;
    bool matches;

    cr_assert_eq(pattern_compile(&pattern, before, c->pattern, after, "file", "field"), MLORA_OK,
                 "%s: %s", c->pattern, error_text());
    cr_assert_eq(pattern_match(&matches, NULL, pattern, c->subject, anchor, STEPS), MLORA_OK);
    cr_expect_eq(matches, c->matches, "\"%s\" on \"%s\"", c->pattern, c->subject);
    pattern_free(pattern);
}

Test(pattern, matches_whole_names_as_python_does)
{
    for (size_t i = 0; i < sizeof whole / sizeof whole[0]; i++)
        expect_match(&whole[i], "", "", PATTERN_WHOLE);
}

Test(pattern, matches_the_last_parts_of_names_as_python_does)
{
    for (size_t i = 0; i < sizeof suffix / sizeof suffix[0]; i++)
        expect_match(&suffix[i], "(.*\\.)?(", ")$", PATTERN_START);
}

Test(pattern, gives_the_first_group)
{
    for (size_t i = 0; i < sizeof layers / sizeof layers[0]; i++) {
        struct pattern *pattern;
        struct span span;
        bool matches;

        cr_assert_eq(
            pattern_compile(&pattern, ".*?\\.", layers[i].pattern, "\\.(\\d+)\\.", "file", "field"),
            MLORA_OK);
        cr_assert_eq(
            pattern_match(&matches, &span, pattern, layers[i].subject, PATTERN_START, STEPS),
            MLORA_OK);
        cr_expect_eq(matches, layers[i].digits != NULL);
        if (layers[i].digits) {
            cr_assert_eq(span.end - span.begin, strlen(layers[i].digits));
            cr_expect_eq(
                memcmp(layers[i].subject + span.begin, layers[i].digits, span.end - span.begin), 0,
                "%s on %s", layers[i].pattern, layers[i].subject);
        }
        pattern_free(pattern);
    }
}

Test(pattern, refuses_what_python_refuses_or_reads_in_another_way)
{
    static const struct {
        const char *text, *says;
        mlora_status status;
    } cases[] = {
        {"(", "is not a valid regular expression: ", MLORA_EFORMAT},
        {"[a", "is not a valid regular expression: ", MLORA_EFORMAT},
        {"*a", "is not a valid regular expression: ", MLORA_EFORMAT},
        {"a\\", "is not a valid regular expression: ", MLORA_EFORMAT},
        {"(?<=a*)b", "is not a valid regular expression: ", MLORA_EFORMAT},
        {"(?R)", "\"(?R)\" begins no group", MLORA_EFORMAT},
        {"(?1)", "\"(?1)\" begins no group", MLORA_EFORMAT},
        {"(?&x)", "begins no group", MLORA_EFORMAT},
        {"(?P>x)", "begins no group", MLORA_EFORMAT},
        {"(?|a)", "begins no group", MLORA_EFORMAT},
        {"(?<x>a)", "begins no group", MLORA_EFORMAT},
        {"(?C)", "begins no group", MLORA_EFORMAT},
        {"(*ACCEPT)", "begins no group", MLORA_EFORMAT},
        {"(?((?=a))a)", "", MLORA_EFORMAT},
        {"(?", "begins no group", MLORA_EFORMAT},
        {"\\Ka", "uses the escape \\K", MLORA_EUNSUPPORTED},
        {"\\Qa\\E", "uses the escape \\Q", MLORA_EUNSUPPORTED},
        {"\\R", "uses the escape \\R", MLORA_EUNSUPPORTED},
        {"\\C", "uses the escape \\C", MLORA_EUNSUPPORTED},
        {"\\p{L}", "uses the escape \\p", MLORA_EUNSUPPORTED},
        {"\\x{61}", "uses the escape \\x", MLORA_EUNSUPPORTED},
        {"[\\A]", "uses the escape \\A", MLORA_EUNSUPPORTED},
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct pattern *pattern;
        cr_expect_eq(pattern_compile(&pattern, "", cases[i].text, "", "a/adapter_config.json",
                                     "target_modules"),
                     cases[i].status, "%s: %s", cases[i].text, error_text());
        cr_expect_null(pattern);
        cr_expect_not_null(strstr(error_text(), "a/adapter_config.json: target_modules: "), "%s",
                           error_text());
        cr_expect_not_null(strstr(error_text(), cases[i].text), "%s", error_text());
        cr_expect_not_null(strstr(error_text(), cases[i].says), "%s", error_text());
        cr_expect_not_null(strstr(error_text(), "list the modules by name"), "%s", error_text());
        pattern_free(pattern);
    }
}

Test(pattern, stops_at_its_limits)
{
    struct pattern *pattern;
    bool matches;

    cr_assert_eq(pattern_compile(&pattern, "", "(\\w+.?)+\\d", "", "file", "target_modules"),
                 MLORA_OK);
    cr_expect_eq(pattern_match(&matches, NULL, pattern, "model.layers.3.self_attn.q_proj",
                               PATTERN_WHOLE, STEPS),
                 MLORA_EFORMAT);
    cr_expect_not_null(strstr(error_text(),
                              "file: target_modules: the pattern \"(\\w+.?)+\\d\" takes "
                              "too long to match"),
                       "%s", error_text());
    pattern_free(pattern);
}

Test(pattern, of_too_many_bytes_is_refused)
{
    struct pattern *pattern;
    char *text = calloc(1, 20001);

    memset(text, 'a', 20000);
    cr_expect_eq(pattern_compile(&pattern, "", text, "", "file", "rank_pattern"), MLORA_EFORMAT);
    cr_expect_not_null(strstr(error_text(), "is 20000 bytes, at most 16384 are read"), "%s",
                       error_text());
    free(text);
}
