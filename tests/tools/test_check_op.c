/* mlora check-op and --op, with the shared objects of tests/ops. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "tests/tools/run.h"

#define OP(name) MLORA_TEST_OPS "/" name ".so"
#define GENERATE                                                                                   \
    "generate --model " LLAMA2 " --backend cpu --temperature 0 -n 6 -q -p 'There was once a' "

Test(check_op, compares_with_the_definition_and_times)
{
    struct outcome outcome = run(NULL, "check-op " OP("linear") " --cases 5 --tokens 1 --json -");

    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect(strstr(outcome.out, "matmul of " OP("linear") " against the built-in definition"));
    const char *text = strchr(outcome.out, '{');
    cr_assert(text);
    json_t *report = json_loads(text, 0, NULL);
    const json_t *checks = json_object_get(report, "checks");
    cr_assert_eq(json_array_size(checks), 5, "every pair of types");
    for (size_t i = 0; i < json_array_size(checks); i++) {
        const json_t *row = json_array_get(checks, i);
        cr_expect_eq(json_integer_value(json_object_get(row, "wrong")), 0);
        cr_expect_leq(json_number_value(json_object_get(row, "worst, 1 is allowed")), 1);
    }
    const json_t *time = json_array_get(json_object_get(report, "cases"), 0);
    cr_expect_gt(json_number_value(json_object_get(time, "us")), 0);
    cr_expect_gt(json_number_value(json_object_get(time, "built-in us")), 0);
    cr_expect_gt(json_number_value(json_object_get(time, "limit us")), 0);
    cr_expect_gt(json_number_value(json_object_get(time, "% of limit")), 0);
    /* The longer of the two; at one token memory's, but for a slow build of the built-in product. */
    const double flops = json_number_value(json_object_get(report, "flops_per_second"));
    const double us = json_number_value(json_object_get(time, "us"));
    cr_assert_gt(flops, 0);
    const double memory = 1e12 * json_number_value(json_object_get(time, "MB")) /
                          json_number_value(json_object_get(report, "bytes_per_second"));
    const double arithmetic =
        1e9 * us * json_number_value(json_object_get(time, "GFLOP/s")) / flops;
    cr_expect_str_eq(json_string_value(json_object_get(time, "of")),
                     memory > arithmetic ? "memory" : "arithmetic", "at one token");
    cr_expect_float_eq(json_number_value(json_object_get(time, "limit us")),
                       memory > arithmetic ? memory : arithmetic, 1e-6 * us);
    json_decref(report);
    outcome_free(&outcome);
}

Test(check_op, compares_another_function_with_its_own_reference)
{
    struct outcome outcome = run(NULL, "check-op " OP("add_relu") " --cases 4 --tokens 1");

    cr_expect_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect(strstr(outcome.out, "silu_mul of " OP("add_relu") " against its own reference"));
    outcome_free(&outcome);
}

Test(check_op, says_which_op_needs_a_gpu_that_is_not_here)
{
    setenv("CUDA_VISIBLE_DEVICES", "", 1);
    struct outcome outcome = run(NULL, "check-op " OP("other_backend"));
    expect_refusal_with(&outcome, OP("other_backend") ": is for the backend cuda: GPU 0: ");
}

Test(check_op, says_where_an_op_is_wrong)
{
    struct outcome outcome = run(NULL, "check-op " OP("wrong") " --cases 4");

    cr_expect_eq(outcome.status, 2);
    cr_expect(strstr(outcome.err, "mlora: " OP("wrong") ": silu_mul is wrong: y[7] is "), "%s",
              outcome.err);
    cr_expect_not(strstr(outcome.out, "GB/s"), "what is wrong is not timed");
    outcome_free(&outcome);
}

Test(check_op, refuses_a_library_that_crashes_by_name)
{
    struct outcome outcome = run(NULL, "check-op " OP("crash_load"));
    expect_refusal(&outcome,
                   OP("crash_load") ": crashed when it was tried: SIGSEGV (Segmentation fault)");
    outcome = run(NULL, "check-op " OP("crash_call"));
    expect_refusal(&outcome, OP("crash_call") ": crashed when it was tried: SIGABRT (Aborted)");
    outcome = run(NULL, "check-op " OP("exit_call"));
    expect_refusal(&outcome, OP("exit_call") ": it ended the process that tried it, exit status 3");
    outcome = run(NULL, "check-op");
    expect_refusal(&outcome, "check-op needs one shared object: mlora check-op ./my_op.so");
}

Test(generate, uses_an_op_from_a_file)
{
    struct outcome without = run(NULL, GENERATE);
    struct outcome same = run(NULL, GENERATE "--op silu_mul=" OP("plain_silu_mul"));
    struct outcome other = run(NULL, GENERATE "--op " OP("add_relu"));

    cr_expect_eq(same.status, 0, "%s", same.err);
    cr_expect_eq(other.status, 0, "%s", other.err);
    cr_expect_str_eq(same.out, without.out);
    cr_expect_str_neq(other.out, without.out);
    outcome_free(&without);
    outcome_free(&same);
    outcome_free(&other);
}

Test(generate, refuses_an_op_by_name_before_it_can_do_harm)
{
    struct outcome outcome = run(NULL, GENERATE "--op silu_mul=" OP("crash_load"));
    expect_refusal(&outcome,
                   OP("crash_load") ": crashed when it was tried: SIGSEGV (Segmentation fault)");
    outcome = run(NULL, GENERATE "--op silu_mul=" OP("crash_call"));
    expect_refusal(&outcome, OP("crash_call") ": crashed when it was tried: SIGABRT (Aborted)");
    outcome = run(NULL, GENERATE "--op silu_mul=" OP("old_abi"));
    expect_refusal(&outcome, OP("old_abi") ": its ABI version is 777, 2 is needed: build it with "
                                           "this mlora's kernels/mlora_op.h");
    outcome = run(NULL, GENERATE "--op silu_mul=" OP("no_symbol"));
    expect_refusal_with(&outcome, OP("no_symbol") ": has no symbol mlora_op_export");
    outcome = run(NULL, GENERATE "--op silu=" OP("plain_silu_mul"));
    expect_refusal_with(&outcome, "unknown op \"silu\": silu_mul, ");
    outcome = run(NULL, GENERATE "--op silu_mul=no/such.so");
    expect_refusal_with(&outcome, "no/such.so: No such file or directory");
    outcome = run(NULL, GENERATE "--op silu_mul=");
    expect_refusal(&outcome, "--op: \"silu_mul=\" names no file or no op: OP=FILE is needed");
}
