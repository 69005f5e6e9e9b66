/* What every command has in common: help, flags, refusals. */
#include <criterion/criterion.h>
#include <string.h>

#include "tests/tools/run.h"

Test(cli, help_of_each_command_fits_80_columns)
{
    static const char *const commands[] = {"generate", "score", "tokenize", "inspect", "check-op"};

    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        struct outcome help = run(NULL, "help %s", commands[i]);
        struct outcome flag = run(NULL, "%s --help", commands[i]);
        cr_expect_eq(help.status, 0);
        cr_expect_eq(flag.status, 0);
        cr_expect_str_eq(help.out, flag.out);
        cr_expect_str_eq(help.err, "");
        cr_expect(strstr(help.out, "MLORA_<FLAG>"));
        for (const char *line = help.out; *line; line += strcspn(line, "\n") + 1)
            cr_expect_leq(strcspn(line, "\n"), 80, "%.*s", (int)strcspn(line, "\n"), line);
        outcome_free(&help);
        outcome_free(&flag);
    }
}

Test(cli, says_its_version_and_its_commands)
{
    struct outcome version = run(NULL, "--version");
    struct outcome help = run(NULL, "--help");

    cr_expect_eq(version.status, 0);
    cr_expect_eq(strncmp(version.out, "mlora ", 6), 0);
    cr_expect(strstr(help.out, "  generate ") && strstr(help.out, "  tokenize "));
    outcome_free(&version);
    outcome_free(&help);
}

Test(cli, suggests_the_nearest_flag_and_command)
{
    struct outcome outcome = run(NULL, "genrate");
    expect_refusal(&outcome, "unknown command \"genrate\"; did you mean \"generate\"?");
    outcome = run(NULL, "generate --promt x");
    expect_refusal(&outcome, "unknown flag --promt; did you mean --prompt?");
    outcome = run(NULL, "generate --tmeperature=0");
    expect_refusal(&outcome, "unknown flag --tmeperature; did you mean --temperature?");
    outcome = run(NULL, "score --frobnicate");
    expect_refusal(&outcome, "unknown flag --frobnicate; mlora score --help lists the flags");
    outcome = run(NULL, "tokenize -Z");
    expect_refusal(&outcome, "unknown flag -Z; mlora tokenize --help lists the flags");
    outcome = run(NULL, "generate --top 3");
    expect_refusal(&outcome, "--top could be --top-k or --top-p");
}

Test(cli, names_the_flag_and_the_range_that_is_needed)
{
    struct outcome outcome = run(NULL, "generate --top-p 1.5");
    expect_refusal(&outcome, "--top-p is 1.5, must be above 0 and at most 1");
    outcome = run(NULL, "generate -n many");
    expect_refusal(&outcome, "--max-tokens is \"many\", a whole number is needed");
    outcome = run(NULL, "generate --temp nan");
    expect_refusal(&outcome, "--temperature is nan, must be from 0 to 100");
    outcome = run(NULL, "generate --seed 99999999999999999999");
    expect_refusal(&outcome, "--seed is 99999999999999999999, must be -1 or more");
    outcome = run(NULL, "score --top 129");
    expect_refusal(&outcome, "--top is 129, must be from 0 to 128");
    outcome = run(NULL, "generate --backend gpu");
    expect_refusal(&outcome, "--backend is \"gpu\", must be one of auto|cpu|cuda");
    outcome = run(NULL, "generate --json=1");
    expect_refusal(&outcome, "--json takes no value");
    outcome = run(NULL, "generate --model");
    expect_refusal(&outcome, "--model needs a value: DIR");
}

Test(cli, takes_flags_from_the_environment_where_the_command_line_is_silent)
{
    setenv("MLORA_TOP_P", "7", 1);
    struct outcome outcome = run(NULL, "generate -p x");
    expect_refusal(&outcome, "MLORA_TOP_P is 7, must be above 0 and at most 1");
    setenv("MLORA_MODEL", "from/environment", 1);
    outcome = run(NULL, "generate -p x --top-p 1");
    expect_refusal_with(&outcome, "from/environment");
    outcome = run(NULL, "generate -p x --top-p 1 --model from/flag");
    expect_refusal_with(&outcome, "from/flag");
}

Test(cli, refuses_a_missing_model_in_one_line)
{
    struct outcome outcome = run(NULL, "generate --prompt x");
    expect_refusal_with(&outcome,
                        "no model: give --model DIR, a directory with config.json, the "
                        "weights and the tokenizer, or --load-format dummy --config NAME");
    outcome = run(NULL, "generate --model no/such/model --prompt x");
    expect_refusal_with(&outcome, "no/such/model");
    outcome = run(NULL, "score --model no/such/model --prompt x");
    expect_refusal_with(&outcome, "no/such/model");
    outcome = run(NULL, "tokenize --model no/such/model x");
    expect_refusal_with(&outcome, "no/such/model");
    outcome = run(NULL, "inspect no/such/model");
    expect_refusal_with(&outcome, "no/such/model");
}

Test(cli, completes_flags_in_bash)
{
    struct outcome script = run(NULL, "completion bash");

    cr_expect_eq(script.status, 0);
    cr_expect(strstr(script.out, "complete -o filenames -F _mlora mlora"));
    cr_expect(strstr(script.out, "--repetition-penalty"));
    outcome_free(&script);
    struct outcome outcome = run(NULL, "completion fish");
    expect_refusal(&outcome, "usage: mlora completion bash");
}

Test(cli, reports_an_output_that_cannot_be_written)
{
    struct outcome outcome = run(NULL, "completion bash >/dev/full");

    cr_expect_eq(outcome.status, 1);
    cr_expect(strstr(outcome.err, "mlora: the output cannot be written"), "%s", outcome.err);
    outcome_free(&outcome);
}

Test(cli, ends_quietly_when_the_reader_leaves)
{
    struct outcome outcome = run(NULL, "completion bash | true");

    cr_expect_str_eq(outcome.err, "");
    outcome_free(&outcome);
}
