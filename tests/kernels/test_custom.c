/* Ops from shared objects in the place of mlora's own. The shared objects are tests/ops. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/op_case.h"

#define OP(name) MLORA_TEST_OPS "/" name ".so"

static struct device *open_cpu(void)
{
    struct device *cpu = NULL;
    cr_assert_eq(cpu_device_open(&cpu, 2), MLORA_OK, "%s", error_text());
    return cpu;
}

static struct device *open_with(const char *path)
{
    const mlora_op_source source = {.path = path};
    struct device *cpu = open_cpu();
    cr_assert_eq(custom_open(cpu, &source, 1), MLORA_OK, "%s", error_text());
    return cpu;
}

static void expect_refused(const mlora_op_source *sources, int n, mlora_status status,
                           const char *text)
{
    struct device *cpu = open_cpu();
    const struct kernels *before = cpu->ops;

    cr_expect_eq(custom_open(cpu, sources, n), status, "%s", text);
    cr_expect_str_eq(error_text(), text);
    cr_expect(cpu->ops == before && !cpu->custom, "the device is as it was");
    cpu->ops->close(cpu);
}

/* ---- calls ---------------------------------------------------------------------------------- */

static void expect_agrees(const char *path, enum custom_kind kind, const struct op_types *types,
                          int turn)
{
    const struct op_sizes sizes = {.T = 1 + 6 * turn,
                                   .D = 40 + turn,
                                   .F = 24 + 3 * turn,
                                   .N = 16 + 5 * turn,
                                   .K = 30 + 7 * turn,
                                   .H = 4,
                                   .G = 2,
                                   .d = 8,
                                   .R = 5 + turn,
                                   .more = turn % 2 == 1};
    struct device *cpu = open_with(path), *definition = open_cpu();
    struct op_case got, want;
    struct op_difference difference;

    cr_assert(custom_op(cpu, kind), "%s", path);
    cr_assert_eq(op_case_make(&got, cpu, kind, &sizes, types, false, 7), MLORA_OK);
    cr_assert_eq(op_case_make(&want, definition, kind, &sizes, types, true, 7), MLORA_OK);
    op_case_run(&got, cpu->ops);
    cr_assert_eq(op_case_compare(&difference, &got, &want), MLORA_OK);
    cr_expect_gt(difference.error, 1, "%s: what was not computed differs", path);
    op_case_run(&want, definition->ops);
    cr_assert_eq(op_case_compare(&difference, &got, &want), MLORA_OK);
    cr_expect_leq(difference.error, 1, "%s: %s[%zu] is %g, not %g", path, difference.tensor,
                  difference.index, difference.got, difference.want);
    op_case_free(&got);
    op_case_free(&want);
    cpu->ops->close(cpu);
    definition->ops->close(definition);
}

Test(custom, each_kind_of_op_gets_what_the_definition_says)
{
    static const struct op_types types[] = {{DTYPE_F32, DTYPE_F32}, {DTYPE_BF16, DTYPE_BF16}};
    char path[256];

    for (int kind = 0; kind < CUSTOM_KINDS; kind++) {
        snprintf(path, sizeof path, "%s/plain_%s.so", MLORA_TEST_OPS,
                 custom_name((enum custom_kind)kind));
        for (int turn = 0; turn < 4; turn++)
            for (int i = 0; i < 2; i++)
                expect_agrees(path, (enum custom_kind)kind, &types[i], turn);
    }
}

Test(custom, an_op_changes_the_result_as_it_is_defined)
{
    /* max(gate + up, 0) in the place of silu(gate) up */
    const float gate_up[] = {1, -2, 0.5f, /**/ 2, 1, -0.25f, -3, 4, 0, /**/ 1, -1.5f, 0};
    const float want[] = {3, 0, 0.25f, 0, 2.5f, 0};
    float got[6] = {0};
    struct device *cpu = open_with(OP("add_relu"));

    cpu->ops->silu_mul(cpu, got, gate_up, DTYPE_F32, 2, 3, DTYPE_F32);
    cr_assert_eq(cpu->ops->sync(cpu), MLORA_OK);
    cr_expect_arr_eq(got, want, sizeof want);
    custom_builtin(cpu)->silu_mul(cpu, got, gate_up, DTYPE_F32, 2, 3, DTYPE_F32);
    cr_expect_float_eq(got[0], 2 / (1 + expf(-1)), 1e-6, "the built-in one is still there");
    cpu->ops->close(cpu);
}

Test(custom, the_op_that_holds_two_is_made_of_the_replaced_one)
{
    /* one adapter of rank 1 on the gate: gate += 2 * 3 * h */
    const float b[] = {3}, h[] = {0.5f, 0};
    const int32_t slot[] = {0}, order[] = {0}, start[] = {0, 1};
    struct lora_factors factors[LORA_LINEARS] = {{0}};
    factors[LORA_GATE] = (struct lora_factors){.a = b, .b = b, .R = 1, .scale = 2};
    const struct lora_view lora = {.factors = factors,
                                   .L = 1,
                                   .n_segments = 1,
                                   .n_tokens = 1,
                                   .max_rank = 1,
                                   .max_segment = 1,
                                   .slot = slot,
                                   .segment_slot = slot,
                                   .segment_start = start,
                                   .order = order};
    const struct lora_site site = {
        .linear = LORA_GATE, .n_slices = 2, .K = 1, .N = 2, .offset = {0, 1}, .width = {1, 1}};
    float gate_up[] = {1, 10}, y = 0;
    struct device *cpu = open_with(OP("add_relu"));

    cpu->ops->lora_expand_silu_mul(cpu, &y, gate_up, DTYPE_F32, h, &lora, &site, 0, 1, DTYPE_F32);
    cr_assert_eq(cpu->ops->sync(cpu), MLORA_OK);
    cr_expect_eq(y, 14, "1 + 3 + 10, not %g", (double)y);
    cpu->ops->close(cpu);
}

/* silu_mul of a file has one type for what it reads and what it writes. */
Test(custom, results_of_products_are_of_the_activations_type_beside_an_op_from_a_file)
{
    struct device *cpu = open_with(OP("add_relu"));

    cr_expect_eq(product_dtype(cpu, 1, DTYPE_BF16), DTYPE_BF16);
    cr_expect_eq(product_dtype(cpu, 1, DTYPE_F32), DTYPE_F32);
    cpu->ops->close(cpu);
}

Test(custom, an_op_that_fails_is_named_and_is_not_called_again)
{
    const float gate_up[2] = {1, 1};
    float y[1];
    struct device *cpu = open_with(OP("fails")); /* at its third call */

    for (int i = 0; i < 2; i++) cpu->ops->silu_mul(cpu, y, gate_up, DTYPE_F32, 1, 1, DTYPE_F32);
    cr_expect_eq(cpu->ops->sync(cpu), MLORA_OK);
    for (int i = 0; i < 2; i++) cpu->ops->silu_mul(cpu, y, gate_up, DTYPE_F32, 1, 1, DTYPE_F32);
    cr_expect_eq(cpu->ops->sync(cpu), MLORA_EDEVICE);
    cr_expect_str_eq(error_text(), OP("fails") ": op silu_mul failed: it returned 42");
    cpu->ops->close(cpu);
}

/* ---- refusals ------------------------------------------------------------------------------- */

static void expect_file_refused(const char *path, mlora_status status, const char *text)
{
    char line[512];
    snprintf(line, sizeof line, "%s: %s", path, text);
    expect_refused(&(mlora_op_source){.path = path}, 1, status, line);
}

Test(custom, refuses_what_is_no_op_by_name)
{
    expect_file_refused("no/such.so", MLORA_EIO,
                        "No such file or directory; the shared object of an op is needed");
    expect_file_refused("README.md", MLORA_EFORMAT,
                        "is not a shared object that can be loaded: invalid ELF header");
    expect_file_refused(OP("no_symbol"), MLORA_EFORMAT,
                        "has no symbol mlora_op_export: a MLORA_OP_EXPORT of kernels/mlora_op.h is "
                        "needed");
    expect_file_refused(OP("old_abi"), MLORA_EFORMAT,
                        "its ABI version is 777, 2 is needed: build it with this mlora's "
                        "kernels/mlora_op.h");
    expect_file_refused(OP("no_run"), MLORA_EFORMAT, "mlora_op_export.run is NULL");
    expect_file_refused(OP("no_open"), MLORA_EFORMAT, "op matmul did not open: it returned 5");
    expect_file_refused(OP("no_such_op"), MLORA_EFORMAT,
                        "unknown op \"sample\": silu_mul, add_rms_norm, matmul, rope, lora_shrink "
                        "and lora_expand can be replaced");
    expect_file_refused(OP("other_backend"), MLORA_EUNSUPPORTED,
                        "is for the backend cuda, the engine's is cpu: choose that backend, or "
                        "build the op for this one");
}

Test(custom, refuses_an_op_in_a_wrong_place)
{
    const mlora_op_source unknown = {"silu_mull", OP("plain_silu_mul")};
    const mlora_op_source wrong = {"matmul", OP("plain_silu_mul")};
    const mlora_op_source twice[] = {{"silu_mul", OP("plain_silu_mul")},
                                     {"silu_mul", OP("add_relu")}};
    const mlora_op_source nothing = {"rope", NULL};

    expect_refused(
        &unknown, 1, MLORA_EINVAL,
        "unknown op \"silu_mull\": silu_mul, add_rms_norm, matmul, rope, lora_shrink and "
        "lora_expand can be replaced");
    expect_refused(&wrong, 1, MLORA_EINVAL,
                   OP("plain_silu_mul") ": is the op silu_mul, it was given for matmul");
    expect_refused(twice, 2, MLORA_EINVAL,
                   OP("add_relu") ": op silu_mul is replaced by " OP("plain_silu_mul") " already");
    expect_refused(&nothing, 1, MLORA_EINVAL, "op rope has no path: its shared object is needed");
}

Test(custom, says_what_a_file_is)
{
    struct custom_about about;

    cr_assert_eq(custom_describe(&about, &(mlora_op_source){.path = OP("add_relu")}), MLORA_OK);
    cr_expect_eq(about.kind, CUSTOM_SILU_MUL);
    cr_expect_str_eq(about.backend, "cpu");
    cr_expect(about.is_another);
    cr_assert_eq(custom_describe(&about, &(mlora_op_source){.path = OP("other_backend")}),
                 MLORA_OK);
    cr_expect_str_eq(about.backend, "cuda");
    cr_expect_not(about.is_another);
}
