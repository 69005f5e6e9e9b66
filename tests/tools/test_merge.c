/* mlora merge, and --merge, as a user gives them. */
#include "tests/tools/run.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define SQL "How many owls live near the bridge?\\n"

static void expect_same_text(const char *arguments, const char *want)
{
    struct outcome outcome = run(NULL, "%s", arguments);
    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect_str_eq(outcome.out, want, "%s", arguments);
    outcome_free(&outcome);
}

Test(merge, writes_a_model_that_answers_as_the_adapter)
{
    char parent[] = "/tmp/mlora-merge-XXXXXX", line[1024];
    cr_assert(mkdtemp(parent));
    struct outcome want =
        run(NULL, "generate -q -m " LLAMA2 " --adapters sql=" LLAMA2
                  "/adapters/sql --temperature 0 -n 24 -e --adapter sql -p '" SQL "'");
    cr_assert_eq(want.status, 0, "%s", want.err);

    struct outcome made =
        run(NULL, "merge -m " LLAMA2 " --adapter " LLAMA2 "/adapters/sql -o %s/out", parent);
    cr_expect_eq(made.status, 0, "%s", made.err);
    cr_expect_str_eq(made.out, "");
    snprintf(line, sizeof line, "generate -q -m %s/out --temperature 0 -n 24 -e -p '" SQL "'",
             parent);
    expect_same_text(line, want.out);
    expect_same_text("generate -q -m " LLAMA2 " --adapters sql=" LLAMA2 "/adapters/sql --merge sql "
                     "--temperature 0 -n 24 -e -p '" SQL "'",
                     want.out);
    snprintf(line, sizeof line, "rm -r %s", parent);
    cr_expect_eq(system(line), 0);
    outcome_free(&made);
    outcome_free(&want);
}

Test(merge, says_which_adapters_are_not_loaded)
{
    static const char line[] = "mlora: warning: --merge sql: an adapter in the weights leaves room "
                               "for no other; not loaded: mood, " LLAMA2 "/adapters/json\n";
    struct outcome said =
        run(NULL, "score -m " LLAMA2 " --adapters mood=" LLAMA2 "/adapters/mood,sql=" LLAMA2
                  "/adapters/sql," LLAMA2 "/adapters/json --merge sql -p x");
    cr_expect_eq(said.status, 0, "%s", said.err);
    cr_expect_str_eq(said.err, line);
    struct outcome alone =
        run(NULL, "score -m " LLAMA2 " --adapters sql=" LLAMA2 "/adapters/sql --merge sql -p x");
    cr_expect_eq(alone.status, 0, "%s", alone.err);
    cr_expect_str_eq(alone.err, "");
    cr_expect_str_eq(alone.out, said.out);
    outcome_free(&said);
    outcome_free(&alone);
}

Test(merge, says_what_the_adapter_warns_of)
{
    char parent[] = "/tmp/mlora-merge-XXXXXX", line[1024], want[256];
    cr_assert(mkdtemp(parent));
    snprintf(line, sizeof line, "cp -r " LLAMA2 "/adapters/sql %s/sql && touch %s/sql/%s", parent,
             parent, "adapter_model.bin");
    cr_assert_eq(system(line), 0);
    snprintf(want, sizeof want,
             "%s/sql/adapter_model.bin: not read: adapter_model.safetensors beside it is used\n",
             parent);

    struct outcome made =
        run(NULL, "merge -m " LLAMA2 " --adapter %s/sql -o %s/out", parent, parent);
    cr_expect_eq(made.status, 0, "%s", made.err);
    snprintf(line, sizeof line, "mlora: warning: %s", want);
    cr_expect_str_eq(made.err, line);
    struct outcome served = run(NULL, "score -m " LLAMA2 " --merge %s/sql -p x", parent);
    cr_expect_eq(served.status, 0, "%s", served.err);
    snprintf(line, sizeof line, "mlora: warning: adapter %s/sql: %s", parent, want);
    cr_expect_str_eq(served.err, line);
    snprintf(line, sizeof line, "rm -r %s", parent);
    cr_expect_eq(system(line), 0);
    outcome_free(&made);
    outcome_free(&served);
}

Test(merge, says_what_is_missing)
{
    struct outcome outcome =
        run(NULL, "merge --model " LLAMA2 " --adapter " LLAMA2 "/adapters/sql");
    expect_refusal(&outcome, "no output: give --model DIR, --adapter DIR and --output DIR");
    outcome = run(NULL, "merge --model " LLAMA2 " --output /tmp/x");
    expect_refusal(&outcome, "no adapter: give --model DIR, --adapter DIR and --output DIR");
    outcome =
        run(NULL, "score -m " LLAMA2 " --merge sqm --adapters sql=" LLAMA2 "/adapters/sql -p x");
    expect_refusal(&outcome,
                   "--merge sqm: is neither a name in --adapters NAME=DIR nor a directory "
                   "with adapter_config.json");
}
