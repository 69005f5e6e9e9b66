/* Engines with ops from shared objects (tests/ops), which are for the CPU. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "tests/engine/harness.h"

#define OP(name) MLORA_TEST_OPS "/" name ".so"

static struct answer plain, custom;

static mlora_options options_with(const mlora_op_source *ops, int n)
{
    mlora_options options = options_for(LLAMA2);
    options.backend = MLORA_BACKEND_CPU;
    options.ops = ops;
    options.n_ops = n;
    return options;
}

/* The answer of an adapter, "" for the base, in a batch with another's. */
static void ask(struct answer *out, const mlora_options *options, const char *adapter)
{
    static struct answer neighbour;
    mlora_engine *engine = open_engine(options);

    load_adapter(engine, LLAMA2, "sql");
    load_adapter(engine, LLAMA2, "mood");
    mlora_request beside = greedy("mood", "Rosa the owl smiled by the meadow.\n", 8, &neighbour);
    mlora_request request = greedy(adapter, "How many owls live near the bridge?\n", 12, out);
    request.n_logprobs = 5;
    submit(engine, &request);
    submit(engine, &beside);
    run_all(engine);
    mlora_close(engine);
}

Test(custom, an_op_that_computes_the_same_gives_the_same_bits)
{
    const mlora_op_source op = {"silu_mul", OP("plain_silu_mul")};
    const mlora_options without = options_with(NULL, 0), with = options_with(&op, 1);

    ask(&plain, &without, "sql");
    ask(&custom, &with, "sql");
    expect_same_answer(&custom, &plain, "with a silu_mul of one's own");
}

static void check_all_together(mlora_dtype dtype, double tolerance)
{
    const mlora_op_source ops[] = {
        {"silu_mul", OP("plain_silu_mul")},       {"add_rms_norm", OP("plain_add_rms_norm")},
        {"matmul", OP("plain_matmul")},           {"rope", OP("plain_rope")},
        {"lora_shrink", OP("plain_lora_shrink")}, {NULL, OP("plain_lora_expand")},
    };
    mlora_options without = options_with(NULL, 0), with = options_with(ops, 6);

    without.dtype = with.dtype = dtype;
    ask(&plain, &without, "sql");
    ask(&custom, &with, "sql");
    cr_expect_str_eq(custom.text, plain.text);
    cr_assert_eq(custom.n, plain.n);
    for (int i = 0; i < plain.n; i++)
        cr_expect_float_eq(custom.logprobs[i], plain.logprobs[i], tolerance);
}

/* In bf16 the results of products are rounded for them. */
Test(custom, all_of_them_together_give_the_same_answer)
{
    check_all_together(MLORA_DTYPE_F32, 1e-3);
    check_all_together(MLORA_DTYPE_BF16, 0.05);
}

Test(custom, a_linear_that_doubles_the_logits_doubles_what_lies_between_them)
{
    const mlora_op_source op = {"matmul", OP("double_head")};
    const mlora_options without = options_with(NULL, 0), with = options_with(&op, 1);

    ask(&plain, &without, "");
    ask(&custom, &with, "");
    cr_assert_eq(custom.n_first_top, 5);
    for (int i = 1; i < 5; i++) {
        const float want = plain.first_top[0].logprob - plain.first_top[i].logprob;
        cr_expect_eq(custom.first_top[i].id, plain.first_top[i].id);
        cr_expect_float_eq(custom.first_top[0].logprob - custom.first_top[i].logprob, 2 * want,
                           1e-3 * (1 + fabs((double)want)));
    }
}

Test(custom, another_function_gives_another_answer_alone_and_with_an_adapter)
{
    const mlora_op_source op = {NULL, OP("add_relu")};
    const mlora_options without = options_with(NULL, 0), with = options_with(&op, 1);
    static const char *const adapters[] = {"", "sql"};

    for (int i = 0; i < 2; i++) {
        ask(&plain, &without, adapters[i]);
        ask(&custom, &with, adapters[i]);
        cr_expect_neq(custom.logprobs[0], plain.logprobs[0]);
        cr_expect_neq(strcmp(custom.text, plain.text), 0);
    }
}

Test(custom, a_profile_changes_nothing)
{
    const mlora_op_source op = {"matmul", OP("linear")};
    mlora_options with = options_with(&op, 1);

    ask(&plain, &with, "sql");
    with.profile = 1;
    ask(&custom, &with, "sql");
    expect_same_answer(&custom, &plain, "with its ops timed");
}

Test(custom, an_op_that_fails_ends_the_engine_by_name)
{
    const mlora_op_source op = {"silu_mul", OP("fails")};
    const mlora_options with = options_with(&op, 1);
    mlora_engine *engine = open_engine(&with);
    mlora_request request = greedy("", "There was once a", 4, &custom);
    int n_active;

    submit(engine, &request);
    cr_expect_eq(mlora_step(engine, &n_active), MLORA_EDEVICE);
    cr_expect(strstr(mlora_error(), OP("fails") ": op silu_mul failed: it returned 42"), "%s",
              mlora_error());
    mlora_close(engine);
}

Test(custom, an_adapter_with_norms_of_its_own_is_refused_beside_a_norm_from_a_file)
{
    static const char dir[] = "tests/fixtures/peft/llama/adapters/saved-norms";
    const mlora_op_source op = {"add_rms_norm", OP("plain_add_rms_norm")};
    mlora_options options = options_with(&op, 1);
    mlora_engine *engine;

    options.model = "tests/fixtures/peft/llama";
    options.tokenizer = LLAMA2;
    engine = open_engine(&options);
    cr_expect_eq(mlora_adapter_load(engine, dir, "norms"), MLORA_EUNSUPPORTED);
    cr_expect_str_eq(
        mlora_error(),
        "tests/fixtures/peft/llama/adapters/saved-norms: has norms of its own, and the "
        "op add_rms_norm is replaced by one that cannot tell tokens apart: leave that "
        "op out");
    cr_expect_eq(mlora_adapter_load(engine, "tests/fixtures/peft/llama/adapters/plain", "plain"),
                 MLORA_OK, "%s", mlora_error());
    mlora_close(engine);
}

static void expect_refused(const mlora_options *options, mlora_status status, const char *text)
{
    mlora_engine *engine;

    cr_expect_eq(mlora_open(&engine, options), status, "%s", text);
    cr_expect_null(engine);
    cr_expect_str_eq(mlora_error(), text);
}

Test(custom, open_refuses_an_op_by_name)
{
    const mlora_op_source old = {"silu_mul", OP("old_abi")};
    mlora_options options = options_with(&old, 1);

    expect_refused(&options, MLORA_EFORMAT,
                   OP("old_abi") ": its ABI version is 777, 2 is needed: build it with this "
                                 "mlora's kernels/mlora_op.h");
    options.ops = NULL;
    expect_refused(&options, MLORA_EINVAL, "option n_ops is 1, ops is NULL");
    options.ops = &old;
    options.n_ops = 7;
    expect_refused(&options, MLORA_EINVAL, "option n_ops is 7, must be from 0 to 6 (0: default)");
}

Test(custom, an_op_can_be_tried)
{
    const mlora_op_source good = {"rope", OP("plain_rope")}, bad = {"rope", OP("no_symbol")};

    cr_expect_eq(mlora_op_try(&good, MLORA_BACKEND_CPU), MLORA_OK, "%s", mlora_error());
    cr_expect_eq(mlora_op_try(&bad, MLORA_BACKEND_CPU), MLORA_EFORMAT);
    cr_expect_eq(mlora_op_try(NULL, MLORA_BACKEND_CPU), MLORA_EINVAL);
    cr_expect_str_eq(mlora_error(), "mlora_op_try: op is NULL");
}
