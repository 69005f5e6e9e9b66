/* --config: shapes of random weights, by name and by file. */
#include <criterion/criterion.h>
#include <stdio.h>

#include "tests/tools/run.h"

Test(shape, is_found_by_name_and_by_file)
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
    snprintf(command, sizeof command,
             "--version >/dev/null; alone=$(mktemp -d); cp ${MLORA_BIN:-build/mlora} $alone/mlora; "
             "$alone/mlora bench generate %s --config llama-test; status=$?; rm -r $alone; "
             "exit $status",
             flags);
    outcome = run(NULL, command);
    expect_refusal(&outcome,
                   "--config llama-test: the folder of shapes is not where the program was "
                   "installed or built: start it from there, or give the path of a config.json");
    snprintf(command, sizeof command, "bench generate %s --config llama-test -m " LLAMA2, flags);
    outcome = run(NULL, command);
    expect_refusal(&outcome, "--config and --model both say what the model is: give one");
    outcome = run(NULL, "bench generate --config llama-test");
    expect_refusal(&outcome, "--config is the shape of random weights: give --load-format dummy "
                             "with it, or --model DIR instead");
}
