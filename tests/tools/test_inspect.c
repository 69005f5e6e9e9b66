/* mlora inspect: a description for people, and the same as JSON. */
#include <criterion/criterion.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>

#include "tests/tools/run.h"

Test(inspect, describes_a_model)
{
    struct outcome outcome = run(NULL, "inspect " LLAMA2);

    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect(strstr(outcome.out, "architecture      LlamaForCausalLM\n"), "%s", outcome.out);
    cr_expect(strstr(outcome.out, "parameters        3.95 M\n"));
    cr_expect(strstr(outcome.out, "KV heads          2\n"));
    outcome_free(&outcome);
}

Test(inspect, describes_an_adapter_with_one_row_for_equal_layers)
{
    struct outcome outcome = run(NULL, "inspect " LLAMA2 "/adapters/mood --model " LLAMA2);

    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect(strstr(outcome.out, "fits              yes\n"), "%s", outcome.out);
    cr_expect(strstr(outcome.out, "layer  module"));
    cr_expect(strstr(outcome.out, "  0-3  self_attn.q_proj"), "%s", outcome.out);
    outcome_free(&outcome);
}

Test(inspect, says_why_an_adapter_is_not_served_or_does_not_fit)
{
    struct outcome refused = run(NULL, "inspect tests/fixtures/refused/pissa --json");
    json_t *object = output_json(&refused);
    cr_expect(json_is_false(json_object_get(object, "served")));
    cr_expect(strstr(json_string_value(json_object_get(object, "reason")), "init_lora_weights"));
    json_decref(object);
    outcome_free(&refused);

    struct outcome other = run(NULL, "inspect " LLAMA2 "/adapters/mood --model " LLAMA3);
    cr_expect_eq(other.status, 0, "%s", other.err);
    cr_expect(strstr(other.out, "fits              no\n"), "%s", other.out);
    cr_expect(strstr(other.out, "because           "), "%s", other.out);
    outcome_free(&other);
}

/* Columns of the longest line; a character of UTF-8 is one. */
static size_t widest(const char *text)
{
    size_t widest = 0, width = 0;

    for (; *text; text++) {
        width = *text == '\n' ? 0 : width + ((*text & 0xc0) != 0x80);
        if (width > widest) widest = width;
    }
    return widest;
}

Test(inspect, fits_into_80_columns_for_every_adapter)
{
    glob_t found;

    setenv("COLUMNS", "80", 1);
    cr_assert_eq(glob("tests/fixtures/peft/*/adapters/*", 0, NULL, &found), 0);
    cr_assert_eq(glob("tests/fixtures/*/adapters/*", GLOB_APPEND, NULL, &found), 0);
    cr_expect_geq(found.gl_pathc, 60);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        struct outcome outcome =
            run(NULL, "inspect %s --model %s/../..", found.gl_pathv[i], found.gl_pathv[i]);
        cr_expect_eq(outcome.status, 0, "%s", outcome.err);
        cr_expect(strstr(outcome.out, "fits              yes\n"), "%s", outcome.out);
        cr_expect_leq(widest(outcome.out), 80, "%s", outcome.out);
        outcome_free(&outcome);
    }
    globfree(&found);
}

Test(inspect, names_the_columns_that_it_has_no_room_for)
{
    setenv("COLUMNS", "80", 1);
    struct outcome outcome = run(NULL, "inspect tests/fixtures/peft/qwen2/adapters/all");

    cr_expect(strstr(outcome.out, "layer  module                    as           rank  alpha  "
                                  "scale  dtype\n"),
              "%s", outcome.out);
    cr_expect(strstr(outcome.out, "(too narrow for bytes, out, in: --json has them)\n"));
    cr_expect(strstr(outcome.out, "\nwhole: in place of the base's\n"));
    outcome_free(&outcome);
}

Test(inspect, takes_one_directory)
{
    struct outcome outcome = run(NULL, "inspect");
    expect_refusal(&outcome, "inspect takes one directory, there are 0");
    outcome = run(NULL, "inspect " LLAMA2 " " LLAMA3);
    expect_refusal(&outcome, "inspect takes one directory, there are 2");
}
