/* Which modules a configuration targets, and with what rank and alpha: expected values follow
 * from PEFT's rules, worked by hand. */
#include "lora/peft_config.h"

#include <criterion/criterion.h>
#include <string.h>

#include "engine/base/error.h"
#include "tests/lora/adapter_files.h"

#define Q    "model.layers.3.self_attn.q_proj"
#define K    "model.layers.3.self_attn.k_proj"
#define O    "model.layers.11.self_attn.o_proj"
#define DOWN "model.layers.11.mlp.down_proj"

enum { N_MODULES = 224 };

struct match_case {
    const char *changes; /* over r 2, lora_alpha 4, target_modules ["q_proj", "v_proj"] */
    const char *module;
    int rank; /* 0: not targeted */
    double alpha;
};

/* clang-format off */
static const struct match_case cases[] = {
    {"{}", Q, 2, 4},
    {"{}", K, 0, 0},
    {"{}", DOWN, 0, 0},
    {"{}", "q_proj", 2, 4},
    {"{}", "model.layers.3.self_attn.xq_proj", 0, 0},
    {"{\"r\": null, \"lora_alpha\": null}", Q, 8, 8},
    {"{\"lora_alpha\": 2.5}", Q, 2, 2.5},
    {"{\"lora_alpha\": -1}", Q, 2, -1},
    /* targets */
    {"{\"target_modules\": null}", Q, 2, 4},
    {"{\"target_modules\": null}", K, 0, 0},
    {"{\"target_modules\": []}", Q, 0, 0},
    {"{\"target_modules\": [\"self_attn.q_proj\"]}", Q, 2, 4},
    {"{\"target_modules\": [\"attn.q_proj\"]}", Q, 0, 0},
    {"{\"target_modules\": [\"" Q "\"]}", Q, 2, 4},
    {"{\"target_modules\": [\"" Q "\"]}", "model.layers.4.self_attn.q_proj", 0, 0},
    {"{\"target_modules\": [\".*\"]}", Q, 0, 0},
    {"{\"target_modules\": [\"\"]}", Q, 0, 0},
    {"{\"target_modules\": \"all-linear\"}", DOWN, 2, 4},
    {"{\"target_modules\": \"All-Linear\"}", Q, 2, 4},
    {"{\"target_modules\": \"q_proj\"}", Q, 0, 0},
    {"{\"target_modules\": \".*q_proj\"}", Q, 2, 4},
    {"{\"target_modules\": \".*\\\\.[0-5]\\\\..*\"}", Q, 2, 4},
    {"{\"target_modules\": \".*\\\\.[0-5]\\\\..*\"}", DOWN, 0, 0},
    {"{\"target_modules\": \"\"}", Q, 0, 0},
    /* exclusions */
    {"{\"exclude_modules\": [\"q_proj\"]}", Q, 0, 0},
    {"{\"exclude_modules\": [\"k_proj\"]}", Q, 2, 4},
    {"{\"exclude_modules\": \"q_proj\"}", Q, 2, 4},
    {"{\"exclude_modules\": \".*\\\\.3\\\\..*\"}", Q, 0, 0},
    {"{\"exclude_modules\": \".*\\\\.3\\\\..*\", \"target_modules\": \"all-linear\"}", Q, 0, 0},
    {"{\"exclude_modules\": \".*\\\\.3\\\\..*\", \"target_modules\": \"all-linear\"}", DOWN, 2, 4},
    {"{\"exclude_modules\": []}", Q, 2, 4},
    /* layers */
    {"{\"layers_to_transform\": 3}", Q, 2, 4},
    {"{\"layers_to_transform\": 2}", Q, 0, 0},
    {"{\"layers_to_transform\": 0}", Q, 0, 0},
    {"{\"layers_to_transform\": [1, 3]}", Q, 2, 4},
    {"{\"layers_to_transform\": [1, 2]}", Q, 0, 0},
    {"{\"layers_to_transform\": []}", Q, 2, 4},
    {"{\"layers_to_transform\": [-1]}", Q, 0, 0},
    {"{\"layers_to_transform\": [2], \"target_modules\": [\"" Q "\"]}", Q, 2, 4}, /* a whole name */
    {"{\"layers_to_transform\": [3], \"layers_pattern\": \"layers\"}", Q, 2, 4},
    {"{\"layers_to_transform\": [3], \"layers_pattern\": [\"h\", \"layers\"]}", Q, 2, 4},
    {"{\"layers_to_transform\": [3], \"layers_pattern\": \"h\"}", Q, 0, 0},
    {"{\"layers_to_transform\": [3], \"layers_pattern\": \"\"}", Q, 2, 4},
    {"{\"layers_to_transform\": [3], \"layers_pattern\": []}", Q, 2, 4},
    {"{\"layers_to_transform\": [1], \"layers_pattern\": \"layers\", \"target_modules\": [\"o_proj\"]}", O, 0, 0},
    {"{\"layers_to_transform\": [11], \"layers_pattern\": \"layers\", \"target_modules\": [\"o_proj\"]}", O, 2, 4},
    /* patterns of ranks and alphas */
    {"{\"rank_pattern\": {\"q_proj\": 7}}", Q, 7, 4},
    {"{\"rank_pattern\": {\"k_proj\": 7}}", Q, 2, 4},
    {"{\"rank_pattern\": {\"k_proj\": 7}}", K, 0, 0},
    {"{\"rank_pattern\": {\"q_proj\": 7, \"layers.3.self_attn.q_proj\": 9}}", Q, 7, 4},
    {"{\"rank_pattern\": {\"layers.3.self_attn.q_proj\": 9, \"q_proj\": 7}}", Q, 9, 4},
    {"{\"rank_pattern\": {\"layers.3.self_attn.q_proj\": 9, \"q_proj\": 7}}", "model.layers.4.self_attn.q_proj", 7, 4},
    {"{\"rank_pattern\": {\".*\\\\.(0|1|2|3)\\\\..*\": 16}}", Q, 16, 4},
    {"{\"rank_pattern\": {\"^model.layers.3.self_attn.q_proj\": 5}}", Q, 5, 4},
    {"{\"rank_pattern\": {\"proj\": 5}}", Q, 2, 4},
    {"{\"rank_pattern\": null, \"alpha_pattern\": null}", Q, 2, 4},
    {"{\"alpha_pattern\": {\"q_proj\": 3}}", Q, 2, 3},
    {"{\"alpha_pattern\": {\"q_proj\": 0.5}}", Q, 2, 0.5},
    {"{\"alpha_pattern\": {\"q_proj\": 3, \"self_attn.q_proj\": 5}}", Q, 2, 3},
    {"{\"alpha_pattern\": {\"v_proj\": 3}, \"rank_pattern\": {\"q_proj\": 3}}", Q, 3, 4},
};
/* clang-format on */

Test(peft_config, matches_modules_as_peft_does)
{
    char *directory = directory_make();

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct peft_config config;
        struct peft_module got;

        write_config(directory, cases[i].changes);
        cr_assert_eq(peft_config_read(&config, directory), MLORA_OK, "%s: %s", cases[i].changes,
                     error_text());
        cr_assert_eq(peft_config_match(&got, &config, cases[i].module, N_MODULES), MLORA_OK);
        cr_expect_eq(got.targeted, cases[i].rank > 0, "%s: %s", cases[i].changes, cases[i].module);
        cr_expect_eq(got.rank, cases[i].rank, "%s: %s", cases[i].changes, cases[i].module);
        cr_expect_eq(got.alpha, cases[i].alpha, "%s: %s", cases[i].changes, cases[i].module);
        peft_config_free(&config);
    }
    directory_remove(directory);
}

Test(peft_config, scales_by_rank_or_by_its_root)
{
    const struct peft_module module = {.targeted = true, .rank = 16, .alpha = 24};
    struct peft_config config = {.rslora = false};

    cr_expect_eq(peft_config_scale(&config, &module), 1.5);
    config.rslora = true;
    cr_expect_eq(peft_config_scale(&config, &module), 6.0);
}

Test(peft_config, takes_what_does_not_change_the_result)
{
    static const char *const harmless[] = {
        "{\"init_lora_weights\": true}",
        "{\"init_lora_weights\": false}",
        "{\"init_lora_weights\": null}",
        "{\"init_lora_weights\": \"gaussian\"}",
        "{\"init_lora_weights\": \"orthogonal\"}",
        "{\"init_lora_weights\": \"eva\", \"eva_config\": {\"rho\": 2.0}}",
        "{\"init_lora_weights\": \"mica\"}",
        "{\"velora_config\": {\"num_groups\": 64}}",
        "{\"loftq_config\": {\"loftq_bits\": 4}, \"corda_config\": {\"corda_method\": \"ipm\"}}",
        "{\"lora_ga_config\": {\"direction\": \"ArBr\"}, \"megatron_core\": \"megatron.core\"}",
        "{\"use_dora\": false, \"lora_bias\": false, \"modules_to_save\": null}",
        "{\"modules_to_save\": [], \"trainable_token_indices\": {}, \"layer_replication\": null}",
        "{\"use_qalora\": false, \"qalora_group_size\": 16, \"use_bdlora\": null}",
        "{\"ensure_weight_tying\": true, \"lora_dropout\": 0.1, \"inference_mode\": false}",
        "{\"some_field_of_the_future\": null, \"another\": false, \"third\": []}",
        "{\"fourth\": {}, \"fifth\": \"\"}",
        "{\"task_type\": null, \"bias\": null, \"revision\": \"main\"}",
        "{\"auto_mapping\": {\"base_model_class\": \"LlamaForCausalLM\"}, \"peft_version\": "
        "\"1.0\"}",
        "{\"runtime_config\": {\"ephemeral_gpu_offload\": true}}",
    };
    char *directory = directory_make();

    for (size_t i = 0; i < sizeof harmless / sizeof harmless[0]; i++) {
        struct peft_config config;
        write_config(directory, harmless[i]);
        cr_expect_eq(peft_config_read(&config, directory), MLORA_OK, "%s: %s", harmless[i],
                     error_text());
        cr_expect_str_eq(buffer_text(&config.warnings), "");
        peft_config_free(&config);
    }
    directory_remove(directory);
}

Test(peft_config, warns_of_transposed_weights)
{
    char *directory = directory_make();
    struct peft_config config;

    write_config(directory, "{\"fan_in_fan_out\": true}");
    cr_assert_eq(peft_config_read(&config, directory), MLORA_OK);
    cr_expect_not_null(strstr(buffer_text(&config.warnings), "adapter_config.json: fan_in_fan_out "
                                                             "is true"));
    peft_config_free(&config);
    directory_remove(directory);
}

Test(peft_config, shares_out_the_work_of_many_patterns)
{
    char *directory = directory_make();
    struct buffer changes = {0};
    struct peft_config config;
    struct peft_module got;

    /* each backtracks without end on most names */
    buffer_printf(&changes, "{\"rank_pattern\": {");
    for (int i = 0; i < 1000; i++)
        buffer_printf(&changes, "%s\"(\\\\w+.?)+\\\\d%d\": 4", i ? ", " : "", i);
    buffer_printf(&changes, "}}");
    write_config(directory, changes.data);
    cr_assert_eq(peft_config_read(&config, directory), MLORA_OK, "%s", error_text());
    cr_expect_eq(peft_config_match(&got, &config, Q, N_MODULES), MLORA_EFORMAT);
    cr_expect_not_null(
        strstr(error_text(), "adapter_config.json: rank_pattern: the pattern \"(\\w"), "%s",
        error_text());
    cr_expect_not_null(strstr(error_text(), "takes too long"), "%s", error_text());
    peft_config_free(&config);
    buffer_free(&changes);
    directory_remove(directory);
}
