/* mlora bench: the table says what was run. Speeds are looked at, not asserted. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/tools/run.h"

Test(bench, runs_every_case_to_its_last_token)
{
    size_t i;
    const json_t *item;
    const int batches[] = {1, 1, 3, 3}, adapters[] = {0, 2, 0, 2};

    struct outcome outcome =
        run(NULL, "bench generate --backend cpu --load-format dummy --config llama-test "
                  "--batch-size 1,3 --num-adapters 0,2 --rank 3 --prompt-tokens 5 "
                  "--max-new-tokens 7 --repeat 2 --json build/bench.json");
    cr_assert_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect(strstr(outcome.out, "tokens/s"), "%s", outcome.out);
    outcome_free(&outcome);

    json_t *result = golden("build/bench.json");
    const json_t *cases = json_object_get(result, "cases");
    cr_expect_str_eq(json_string_value(json_object_get(result, "backend")), "cpu");
    cr_assert_eq(json_array_size(cases), 4);
    json_array_foreach(cases, i, item)
    {
        const double speed = json_number_value(json_object_get(item, "tokens/s"));
        cr_expect_eq(json_integer_value(json_object_get(item, "batch")), batches[i]);
        cr_expect_eq(json_integer_value(json_object_get(item, "adapters")), adapters[i]);
        cr_expect_eq(json_integer_value(json_object_get(item, "tokens")), 7 * batches[i]);
        cr_expect_geq(speed, json_number_value(json_object_get(item, "min")));
        cr_expect_leq(speed, json_number_value(json_object_get(item, "max")));
        cr_expect_gt(json_number_value(json_object_get(item, "ms/step")), 0);
        if (adapters[i] == 0)
            cr_expect_eq(json_number_value(json_object_get(item, "% of base")), 100);
    }
    json_decref(result);
}

Test(bench, refuses_lists_and_actions_that_mean_nothing)
{
    struct outcome outcome = run(NULL, "bench generate --model " LLAMA2 " --batch-size 0");
    expect_refusal(&outcome, "--batch-size holds 0, must be from 1 to 4096");
    outcome = run(NULL, "bench generate --model " LLAMA2 " --num-adapters ''");
    expect_refusal_with(&outcome, "--num-adapters");
    outcome = run(NULL, "bench --model " LLAMA2);
    expect_refusal_with(&outcome, "mlora bench generate --model DIR");
}

Test(bench, finds_shapes_by_name_and_by_file)
{
    static const char flags[] = "--backend cpu --load-format dummy --batch-size 1 --num-adapters 0 "
                                "--prompt-tokens 1 --max-new-tokens 1 --repeat 1";
    char command[512];

    snprintf(command, sizeof command,
             "bench generate %s --config tools/shapes/llama-test/config.json", flags);
    struct outcome outcome = run(NULL, command);
    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    outcome_free(&outcome);

    snprintf(command, sizeof command, "bench generate %s --config llama-9", flags);
    outcome = run(NULL, command);
    expect_refusal(&outcome,
                   "--config llama-9: no shape of that name: give llama-2-7b, llama-3.1-8b, "
                   "llama-3.1-70b, llama-3.2-1b, llama-3.2-3b or tinyllama, or the path of a "
                   "config.json");
    snprintf(command, sizeof command, "bench generate %s --config llama-test -m " LLAMA2, flags);
    outcome = run(NULL, command);
    expect_refusal(&outcome, "--config and --model both say what the model is: give one");
    outcome = run(NULL, "bench generate --config llama-test");
    expect_refusal(&outcome, "--config is the shape of random weights: give --load-format dummy "
                             "with it, or --model DIR instead");
}
