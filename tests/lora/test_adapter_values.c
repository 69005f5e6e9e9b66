/* What images of adapters hold, by hand: types, forms and what is shared. */
#include <criterion/criterion.h>
#include <math.h>

#include "engine/base/error.h"
#include "lora/adapter.h"
#include "model/weights.h"
#include "tests/lora/adapter_files.h"

static void load_as(struct adapter *adapter, mlora_dtype dtype, const char *changes,
                    const struct tensor_data *tensors, int n)
{
    const struct model_config base = small_model();
    struct adapter_plan plan;
    char *directory = directory_make();

    write_config(directory, changes);
    write_tensor_data(directory, tensors, n);
    cr_assert_eq(adapter_plan_read(&plan, directory, &base, false), MLORA_OK, "%s", error_text());
    adapter_plan_convert(&plan, dtype);
    cr_assert_eq(adapter_load(adapter, host_device(), &plan, &base, NULL), MLORA_OK, "%s",
                 error_text());
    cr_expect_eq(adapter->bytes, plan.bytes);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

static void load_small(struct adapter *adapter, const char *changes,
                       const struct tensor_data *tensors, int n)
{
    load_as(adapter, MLORA_DTYPE_AUTO, changes, tensors, n);
}

Test(adapter_values, widens_factors_of_two_types_to_f32)
{
    const uint16_t a[8] = {0x3f80, 0xc000, 0x3e80, 0, 0x8000, 0x7f80, 0x0001, 0x4248}; /* bf16 */
    const float wide_a[8] = {1, -2, 0.25f, 0, -0.0f, INFINITY, 0x1p-133f, 50};
    const uint16_t b[8] = {0x3c00, 0xc000, 0x3400, 0, 0x8000, 0x7c00, 0x0001, 0x5240}; /* f16 */
    const float wide_b[8] = {1, -2, 0.25f, 0, -0.0f, INFINITY, 0x1p-24f, 50};
    const struct tensor_data tensors[] = {{"@0.self_attn.q_proj.lora_A.weight", "BF16", 1, 8, a},
                                          {"@0.self_attn.q_proj.lora_B.weight", "F16", 8, 1, b}};
    struct adapter adapter;

    load_small(&adapter, "{\"r\": 1}", tensors, 2);
    cr_expect_eq(adapter.factors[LORA_Q].dtype, DTYPE_F32);
    cr_expect_eq(adapter.factors[LORA_Q].scale, 4.0f);
    cr_expect_arr_eq(adapter.factors[LORA_Q].a, wide_a, sizeof wide_a);
    cr_expect_arr_eq(adapter.factors[LORA_Q].b, wide_b, sizeof wide_b);
    adapter_free(&adapter);
    cr_expect_eq(host_device_allocations(), 0);
}

Test(adapter_values, rounds_or_widens_factors_where_it_is_asked_to)
{
    const float a[8] = {1, -2, 0x1.01p0f, 0x1.03p0f, 3.14159f, -1e-40f, 1e30f, 0};
    const uint16_t a_bf16[8] = {0x3f80, 0xc000, 0x3f80, 0x3f82, 0x4049, 0x8001, 0x714a, 0};
    const uint16_t b[8] = {0x3c00, 0xc000, 0x3555, 0, 0x8000, 0x7bff, 0x0001, 0x5240}; /* f16 */
    const uint16_t b_bf16[8] = {0x3f80, 0xc000, 0x3eab, 0, 0x8000, 0x4780, 0x3380, 0x4248};
    const float b_f32[8] = {1, -2, 0x1.554p-2f, 0, -0.0f, 65504, 0x1p-24f, 50};
    const struct tensor_data tensors[] = {{"@0.self_attn.q_proj.lora_A.weight", "F32", 1, 8, a},
                                          {"@0.self_attn.q_proj.lora_B.weight", "F16", 8, 1, b}};
    struct adapter adapter;

    load_as(&adapter, MLORA_DTYPE_BF16, "{\"r\": 1}", tensors, 2);
    cr_expect_eq(adapter.factors[LORA_Q].dtype, DTYPE_BF16);
    cr_expect_arr_eq(adapter.factors[LORA_Q].a, a_bf16, sizeof a_bf16);
    cr_expect_arr_eq(adapter.factors[LORA_Q].b, b_bf16, sizeof b_bf16);
    adapter_free(&adapter);

    load_as(&adapter, MLORA_DTYPE_F32, "{\"r\": 1}", tensors, 2);
    cr_expect_eq(adapter.factors[LORA_Q].dtype, DTYPE_F32);
    cr_expect_arr_eq(adapter.factors[LORA_Q].a, a, sizeof a);
    cr_expect_arr_eq(adapter.factors[LORA_Q].b, b_f32, sizeof b_f32);
    adapter_free(&adapter);
}

Test(adapter_values, is_plain_where_its_factors_are_bf16_and_finite)
{
    uint16_t a[64] = {0x3f80}, b[64] = {0x3f80};
    struct adapter adapter;

    for (int i = 0; i < 4; i++) {
        const char *dtype = i == 3 ? "F16" : "BF16";
        const struct tensor_data tensors[] = {
            {"@0.self_attn.q_proj.lora_A.weight", dtype, 8, 8, a},
            {"@0.self_attn.q_proj.lora_B.weight", dtype, 8, 8, b}};
        a[63] = i == 1 ? 0xff80 : 0; /* -infinity */
        b[63] = i == 2 ? 0x7fc0 : 0; /* NaN */
        load_small(&adapter, "{\"r\": 8}", tensors, 2);
        cr_expect_eq(adapter.is_plain, i == 0, "case %d", i);
        adapter_free(&adapter);
    }
}

/* BD-LoRA: B [8, 1] of rank 2 in two blocks: rows 0 to 3 are of the first rank. */
Test(adapter_values, spreads_blocks_over_the_diagonal)
{
    float a[16], b[8], want[16] = {0};
    const struct tensor_data tensors[] = {{"@0.self_attn.q_proj.lora_A.weight", "F32", 2, 8, a},
                                          {"@0.self_attn.q_proj.lora_B.weight", "F32", 8, 1, b}};
    struct adapter adapter;

    for (int i = 0; i < 16; i++) a[i] = (float)i;
    for (int i = 0; i < 8; i++) want[i * 2 + i / 4] = b[i] = (float)i + 1;
    load_small(&adapter,
               "{\"use_bdlora\": {\"target_modules_bd_b\": [\"q_proj\"], \"nblocks\": 2}}", tensors,
               2);
    cr_expect_arr_eq(adapter.factors[LORA_Q].a, a, sizeof a);
    cr_expect_arr_eq(adapter.factors[LORA_Q].b, want, sizeof want);
    adapter_free(&adapter);
}

/* QA-LoRA: 8 inputs in 2 groups of 4: each column for 4 inputs, times 2 groups / 4. */
Test(adapter_values, spreads_pooled_inputs_over_their_groups)
{
    const float a[2] = {3, -5}, want[8] = {1.5f, 1.5f, 1.5f, 1.5f, -2.5f, -2.5f, -2.5f, -2.5f};
    float b[8] = {1};
    const struct tensor_data tensors[] = {{"@0.self_attn.q_proj.lora_A.weight", "F32", 1, 2, a},
                                          {"@0.self_attn.q_proj.lora_B.weight", "F32", 8, 1, b}};
    struct adapter adapter;

    for (int dtype = MLORA_DTYPE_AUTO; dtype <= MLORA_DTYPE_BF16; dtype++) {
        load_as(&adapter, (mlora_dtype)dtype,
                "{\"r\": 1, \"use_qalora\": true, \"qalora_group_size\": 4}", tensors, 2);
        cr_expect_arr_eq(adapter.factors[LORA_Q].a, want, sizeof want);
        adapter_free(&adapter);
    }
}

Test(adapter_values, splits_a_fused_linear_and_shares_its_a)
{
    float a[8], b[16]; /* [1, 8] and rows of q 8, k 4, v 4, [16, 1] */
    const struct tensor_data tensors[] = {{"@1.self_attn.qkv_proj.lora_A.weight", "F32", 1, 8, a},
                                          {"@1.self_attn.qkv_proj.lora_B.weight", "F32", 16, 1, b}};
    struct adapter adapter;

    for (int i = 0; i < 8; i++) a[i] = (float)i + 0.5f;
    for (int i = 0; i < 16; i++) b[i] = (float)i;
    load_small(&adapter, "{\"r\": 1, \"target_modules\": [\"qkv_proj\"]}", tensors, 2);

    const struct lora_factors *layer = &adapter.factors[LORA_LINEARS];
    cr_expect_arr_eq(layer[LORA_Q].a, a, sizeof a);
    cr_expect_eq(layer[LORA_K].a, layer[LORA_Q].a);
    cr_expect_eq(layer[LORA_V].a, layer[LORA_Q].a);
    cr_expect_arr_eq(layer[LORA_Q].b, b, 8 * sizeof *b);
    cr_expect_arr_eq(layer[LORA_K].b, b + 8, 4 * sizeof *b);
    cr_expect_arr_eq(layer[LORA_V].b, b + 12, 4 * sizeof *b);
    cr_expect_eq(layer[LORA_V].R, 1);
    cr_expect_null(layer[LORA_O].a);
    cr_expect_null(adapter.factors[LORA_Q].a);
    cr_expect_eq(adapter.bytes, 4 * 256); /* A once, three parts of B */
    adapter_free(&adapter);
}
