/* Adapters that are served: what is planned of them, and what their images hold. */
#include "lora/adapter.h"

#include <criterion/criterion.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "model/weights.h"
#include "tests/lora/adapter_files.h"

#define LLAMA2 "tests/fixtures/tiny-llama2"
#define LLAMA3 "tests/fixtures/tiny-llama3"

/* ---- the fixtures ------------------------------------------------------------------------- */

/* Ranks and scales of the linears q, k, v, o, gate, up, down; the same in every layer but where
 * a test says otherwise. Worked from adapter_config.json: alpha / r. */
static const struct {
    const char *model, *name;
    int n_layers;
    int rank[LORA_LINEARS];
    double scale[LORA_LINEARS];
} fixtures[] = {
    {LLAMA2, "pirate", 4, {8, 0, 8, 8, 0, 8, 8}, {2, 0, 2, 2, 0, 2, 2}},
    {LLAMA2, "json", 4, {16, 16, 16, 16, 16, 16, 16}, {2, 2, 2, 2, 2, 2, 2}},
    {LLAMA2, "mood", 4, {4, 4, 4, 4, 0, 0, 0}, {2, 2, 2, 2, 0, 0, 0}},
    {LLAMA2, "shout", 4, {64, 64, 64, 64, 64, 64, 64}, {1, 1, 1, 1, 1, 1, 1}},
    {LLAMA2, "count", 4, {16, 0, 16, 0, 16, 16, 16}, {1, 0, 1, 0, 1, 1, 1}},
    /* rank and alpha 24 for down_proj; rank 2 for layer 0's q_proj, below */
    {LLAMA2, "spanish", 4, {8, 8, 8, 8, 8, 8, 24}, {2, 2, 2, 2, 2, 2, 1}},
    /* rsLoRA: 32 / sqrt(32) = sqrt(32) */
    {LLAMA2,
     "sql",
     4,
     {32, 32, 32, 32, 32, 32, 32},
     {5.656854249492381, 5.656854249492381, 5.656854249492381, 5.656854249492381, 5.656854249492381,
      5.656854249492381, 5.656854249492381}},
    {LLAMA3, "pirate", 3, {8, 0, 8, 8, 0, 8, 8}, {2, 0, 2, 2, 0, 2, 2}},
    {LLAMA3, "json", 3, {16, 16, 16, 16, 16, 16, 16}, {2, 2, 2, 2, 2, 2, 2}},
    {LLAMA3, "mood", 3, {4, 4, 4, 4, 0, 0, 0}, {2, 2, 2, 2, 0, 0, 0}},
};

static char *fixture_path(const char *model, const char *name)
{
    struct buffer path = {0};
    buffer_printf(&path, "%s/adapters/%s", model, name);
    return path.data;
}

static void read_fixture(struct adapter_plan *plan, const char *model, const char *name)
{
    struct model_config config;
    char *path = fixture_path(model, name);

    cr_assert_eq(model_config_read(&config, model), MLORA_OK, "%s", error_text());
    cr_assert_eq(adapter_plan_read(plan, path, &config, false), MLORA_OK, "%s", error_text());
    free(path);
}

Test(adapter, fixtures_have_their_ranks_and_scales)
{
    for (size_t f = 0; f < sizeof fixtures / sizeof fixtures[0]; f++) {
        const char *name = fixtures[f].name;
        struct adapter_plan plan;

        read_fixture(&plan, fixtures[f].model, name);
        cr_assert_eq(plan.n_layers, fixtures[f].n_layers);
        cr_expect_str_eq(buffer_text(&plan.warnings), "", "%s", name);
        cr_expect_eq(plan.rslora, strcmp(name, "sql") == 0);
        cr_expect_str_eq(plan.base_model, strrchr(fixtures[f].model, '/') + 1);
        for (int i = 0; i < plan.n_layers * LORA_LINEARS; i++) {
            int rank = fixtures[f].rank[i % LORA_LINEARS];
            double scale = fixtures[f].scale[i % LORA_LINEARS];
            if (strcmp(name, "spanish") == 0 && i == LORA_Q) {
                rank = 2; /* layers\.0\.self_attn\.q_proj */
                scale = 8;
            }
            cr_expect_eq(plan.linears[i].rank, rank, "%s %d", name, i);
            cr_expect_eq(plan.linears[i].scale, (float)scale, "%s %d", name, i);
            if (rank > 0) cr_expect_eq(plan.linears[i].dtype, DTYPE_BF16);
        }
        adapter_plan_free(&plan);
    }
}

Test(adapter, dora_is_planned_with_its_magnitudes)
{
    struct adapter_plan plan;

    read_fixture(&plan, LLAMA2, "mood-dora");
    cr_expect_not_null(plan.linears[LORA_Q].magnitude);
    cr_expect_not_null(plan.linears[3 * LORA_LINEARS + LORA_DOWN].magnitude);
    cr_expect_null(plan.linears[LORA_K].magnitude);
    /* A and B of rank 8 in bf16, and 256 floats */
    cr_expect_eq(adapter_linear_bytes(&plan, LORA_Q), 2 * 8 * (256 + 256) + 4 * 256);
    adapter_plan_free(&plan);
}

/* The largest rank and the bytes of spanish: layer 0 without q_proj's 8 - 2 ranks. */
Test(adapter, bytes_are_those_of_all_factors)
{
    struct adapter_plan plan;
    /* K + N of q, k, v, o, gate, up, down */
    const int64_t widths[LORA_LINEARS] = {512, 384, 384, 512, 944, 944, 944};
    int64_t elements = 0;

    for (int i = 0; i < LORA_LINEARS; i++) elements += widths[i] * (i == LORA_DOWN ? 24 : 8);
    read_fixture(&plan, LLAMA2, "spanish");
    cr_expect_eq(plan.max_rank, 24);
    cr_expect_eq(plan.bytes, 2 * (4 * elements - 6 * widths[LORA_Q])); /* all are aligned already */
    adapter_plan_free(&plan);
}

Test(adapter, fixtures_are_laid_out_as_they_are_stored)
{
    struct device *dev = host_device();

    for (size_t f = 0; f < sizeof fixtures / sizeof fixtures[0]; f++) {
        struct adapter_plan plan;
        struct adapter adapter;

        read_fixture(&plan, fixtures[f].model, fixtures[f].name);
        cr_assert_eq(adapter_load(&adapter, dev, &plan, NULL, NULL), MLORA_OK, "%s", error_text());
        cr_expect_eq(adapter.bytes, plan.bytes);
        cr_expect_eq(adapter.max_rank, plan.max_rank);
        const char *end = adapter.memory;
        for (int i = 0; i < plan.n_layers * LORA_LINEARS; i++) {
            const struct adapter_linear *linear = &plan.linears[i];
            const struct lora_factors *factors = &adapter.factors[i];
            if (linear->rank == 0) {
                cr_expect_null(factors->a);
                continue;
            }
            cr_expect_eq(factors->R, linear->rank);
            cr_expect_eq(factors->scale, linear->scale);
            cr_expect_eq(factors->dtype, DTYPE_BF16);
            for (int part = 0; part < 2; part++) {
                const struct tensor *tensor = part ? linear->b : linear->a;
                const void *at = part ? factors->b : factors->a;
                void *want = malloc((size_t)tensor->bytes);
                cr_assert_eq(tensor_read(&plan.file, tensor, want), MLORA_OK);
                cr_expect_eq((uintptr_t)at % 256, 0);
                cr_expect_eq((const char *)at, end); /* one after another */
                cr_expect_arr_eq(at, want, (size_t)tensor->bytes);
                end = (const char *)at + (tensor->bytes + 255) / 256 * 256;
                free(want);
            }
        }
        cr_expect_eq(end - (const char *)adapter.memory, plan.bytes);
        adapter_free(&adapter);
        adapter_plan_free(&plan);
        cr_expect_eq(host_device_allocations(), 0);
    }
}

/* ---- written here ------------------------------------------------------------------------- */

/* Plan what `changes` and `edits` make of the small adapter, or fail the test. */
static char *plan_small(struct adapter_plan *plan, const char *changes, const char *edits,
                        bool lenient)
{
    const struct model_config base = small_model();
    char *directory = directory_make();

    write_config(directory, changes);
    write_tensors(directory, edits);
    cr_assert_eq(adapter_plan_read(plan, directory, &base, lenient), MLORA_OK, "%s", error_text());
    return directory;
}

/* Plan, compare ranks of both layers with `want`, "22.2..." for q 2, k 2, v 0, ... */
static void expect_ranks(const char *changes, const char *edits, const char *want)
{
    struct adapter_plan plan;
    char *directory = plan_small(&plan, changes, edits, false);
    char got[2 * LORA_LINEARS + 1] = "";

    for (int i = 0; i < 2 * LORA_LINEARS; i++)
        got[i] = plan.linears[i].rank ? (char)('0' + plan.linears[i].rank) : '.';
    cr_expect_str_eq(got, want, "%s %s", changes, edits);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

#define NO_DEFAULTS                                                                                \
    "-@0.self_attn.q_proj.lora_A.weight; -@0.self_attn.q_proj.lora_B.weight;"                      \
    "-@0.self_attn.v_proj.lora_A.weight; -@0.self_attn.v_proj.lora_B.weight;"                      \
    "-@1.self_attn.q_proj.lora_A.weight; -@1.self_attn.q_proj.lora_B.weight;"                      \
    "-@1.self_attn.v_proj.lora_A.weight; -@1.self_attn.v_proj.lora_B.weight;"

Test(adapter, takes_the_tensors_that_are_targets)
{
    expect_ranks("{}", "", "2.2....2.2....");
    expect_ranks("{\"target_modules\": \"all-linear\"}", "", "2.2....2.2....");
    expect_ranks("{\"target_modules\": [\"q_proj\", \"v_proj\", \"down_proj\"]}",
                 "@1.mlp.down_proj.lora_A.weight F16 2x12; @1.mlp.down_proj.lora_B.weight F16 8x2",
                 "2.2....2.2...2");
    expect_ranks("{\"target_modules\": [\"mlp.up_proj\"], \"r\": 1}",
                 NO_DEFAULTS "@0.mlp.up_proj.lora_A.weight BF16 1x8;"
                             "@0.mlp.up_proj.lora_B.weight BF16 12x1",
                 ".....1........");
    expect_ranks("{\"layers_to_transform\": [1]}",
                 "-@0.self_attn.q_proj.lora_A.weight; -@0.self_attn.q_proj.lora_B.weight;"
                 "-@0.self_attn.v_proj.lora_A.weight; -@0.self_attn.v_proj.lora_B.weight;",
                 ".......2.2....");
    expect_ranks(
        "{\"rank_pattern\": {\"v_proj\": 3}}",
        "@0.self_attn.v_proj.lora_A.weight F32 3x8; @0.self_attn.v_proj.lora_B.weight F32 4x3;"
        "@1.self_attn.v_proj.lora_A.weight F32 3x8; @1.self_attn.v_proj.lora_B.weight F32 4x3",
        "2.3....2.3....");
}

Test(adapter, looks_through_prefixes_wrappers_and_adapter_names)
{
    static const char *const prefixes[] = {"model.layers.",
                                           "layers.",
                                           "base_model.model.base_model.model.model.layers.",
                                           "_orig_mod.base_model.model.model.layers.",
                                           "base_model.model._orig_mod.model.layers.",
                                           "base_model.model._fsdp_wrapped_module.model.layers."};

    for (size_t i = 0; i < sizeof prefixes / sizeof prefixes[0]; i++) {
        char edits[1024];
        snprintf(edits, sizeof edits,
                 NO_DEFAULTS "%s0.self_attn.q_proj.lora_A.weight F32 2x8;"
                             "%s0.self_attn.q_proj.lora_B.default.weight F32 8x2",
                 prefixes[i], prefixes[i]);
        expect_ranks("{}", edits, "2.............");
    }
}

/* A model that sees too names its modules otherwise, and its adapter's patterns with them. */
Test(adapter, of_a_language_model_part_is_matched_by_its_own_names)
{
    expect_ranks(
        "{\"target_modules\": \"model\\\\.language_model\\\\.layers\\\\..*\"}",
        NO_DEFAULTS
        "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight F32 2x8;"
        "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight F32 12x2",
        "............2.");
}

Test(adapter, notes_targets_without_tensors)
{
    struct adapter_plan plan;
    char *directory =
        plan_small(&plan, "{}",
                   "-@1.self_attn.v_proj.lora_A.weight; -@1.self_attn.v_proj.lora_B.weight", false);

    cr_expect_not_null(strstr(buffer_text(&plan.warnings),
                              "adapter_model.safetensors: linears that target_modules names have "
                              "no factors, and stay as in the base (1): "
                              "model.layers.1.self_attn.v_proj\n"),
                       "%s", buffer_text(&plan.warnings));
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, lenient_leaves_out_what_no_target_matches)
{
    struct adapter_plan plan;
    char *directory = plan_small(&plan, "{\"target_modules\": [\"q_proj\"]}", "", true);

    cr_expect_eq(plan.linears[LORA_Q].rank, 2);
    cr_expect_eq(plan.linears[LORA_V].rank, 0);
    cr_expect_not_null(
        strstr(buffer_text(&plan.warnings),
               "left out the factors of linears that target_modules does not name (2): "
               "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight, "),
        "%s", buffer_text(&plan.warnings));
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, lenient_leaves_out_unknown_tensors)
{
    struct adapter_plan plan;
    char *directory = plan_small(&plan, "{}", "extra.a F32 1; extra\\u001b.b F32 1x2", true);

    cr_expect_eq(plan.linears[LORA_Q].rank, 2);
    cr_expect_not_null(strstr(buffer_text(&plan.warnings),
                              "left out tensors of no known kind (2): extra?.b, extra.a\n"),
                       "%s", buffer_text(&plan.warnings));
    adapter_plan_free(&plan);
    directory_remove(directory);
}

/* What PEFT writes into the base, and what it keeps beside it. */
Test(adapter, tells_copies_of_embeddings_from_trained_ones)
{
    struct adapter_plan plan;
    char *directory = plan_small(
        &plan, "{}", "base_model.model.model.embed_tokens.base_layer.weight F32 10x8", false);

    cr_expect_not_null(plan.embedding);
    cr_expect(plan.embedding_is_copy);
    cr_expect_null(plan.head); /* the base is not tied */
    adapter_plan_free(&plan);
    directory_remove(directory);

    directory = plan_small(&plan, "{\"modules_to_save\": [\"embed_tokens\", \"lm_head\"]}",
                           "base_model.model.model.embed_tokens.weight F32 10x8;"
                           "base_model.model.lm_head.modules_to_save.default.weight BF16 10x8",
                           false);
    cr_expect_not_null(plan.embedding);
    cr_expect(!plan.embedding_is_copy);
    cr_expect_not_null(plan.head);
    cr_expect(!plan.head_is_copy);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, takes_norms_whether_modules_to_save_names_them_or_not)
{
    struct adapter_plan plan;
    char *directory = plan_small(&plan, "{}",
                                 "@1.input_layernorm.weight F32 8;"
                                 "base_model.model.model.norm.weight BF16 8",
                                 false);

    cr_expect_not_null(plan.norms[LORA_NORMS + NORM_ATTENTION]);
    cr_expect_not_null(plan.norms[2 * LORA_NORMS + NORM_FINAL]);
    cr_expect_null(plan.norms[LORA_NORMS + NORM_MLP]);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, sorts_the_rows_of_trained_tokens)
{
    struct adapter_plan plan;
    char *directory = plan_small(
        &plan, "{\"trainable_token_indices\": [7, 2, 9]}",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta F32 3x8", false);
    const int32_t ids[] = {2, 7, 9}, row[] = {1, 0, 2};

    cr_assert_eq(plan.embedding_rows.n, 3);
    cr_expect_arr_eq(plan.embedding_rows.ids, ids, sizeof ids);
    cr_expect_arr_eq(plan.embedding_rows.row, row, sizeof row);
    cr_expect(!plan.head_has_embedding_rows);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, accepts_every_shape_that_a_magnitude_is_written_in)
{
    static const char *const vectors[] = {"q_proj.lora_magnitude_vector F32 8",
                                          "q_proj.lora_magnitude_vector.weight F32 8x1",
                                          "q_proj.lora_magnitude_vector.default.weight BF16 1x8"};
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++) {
        struct adapter_plan plan;
        char edits[512];
        snprintf(edits, sizeof edits,
                 NO_DEFAULTS "@0.self_attn.q_proj.lora_A.weight F32 2x8;"
                             "@0.self_attn.q_proj.lora_B.weight F32 8x2; @0.self_attn.%s",
                 vectors[i]);
        char *directory = plan_small(&plan, "{\"use_dora\": true}", edits, false);
        cr_expect_not_null(plan.linears[LORA_Q].magnitude);
        adapter_plan_free(&plan);
        directory_remove(directory);
    }
}

Test(adapter, finds_where_an_invocation_begins)
{
    const int32_t prompt[] = {1, 5, 6, 2, 5, 6, 5};
    int32_t invocation[] = {5, 6};
    struct adapter adapter = {.invocation = invocation, .n_invocation = 2};

    cr_expect_eq(adapter_first_position(&adapter, prompt, 7), 4); /* the last one */
    cr_expect_eq(adapter_first_position(&adapter, prompt, 5), 1); /* the second is cut */
    cr_expect_eq(adapter_first_position(&adapter, prompt, 2), INT_MAX);
    cr_expect_eq(adapter_first_position(&adapter, prompt, 1), INT_MAX);
    adapter.n_invocation = 0; /* a plain LoRA */
    cr_expect_eq(adapter_first_position(&adapter, prompt, 7), 0);
}

Test(adapter, leaves_out_what_monteclora_trains_with)
{
    struct adapter_plan plan;
    char *directory =
        plan_small(&plan, "{\"monteclora_config\": {\"num_samples\": 8}}",
                   "@0.self_attn.q_proj.lora_monteclora_sampler.std_prior F32 2", false);

    cr_expect_eq(plan.linears[LORA_Q].rank, 2);
    cr_expect_str_eq(buffer_text(&plan.warnings), "");
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, leaves_out_what_velora_trains_with)
{
    struct adapter_plan plan;
    char *directory = plan_small(&plan, "{\"velora_config\": {\"num_groups\": 8}}",
                                 "@0.self_attn.q_proj.lora_velora_embed F32 2", false);

    cr_expect_eq(plan.linears[LORA_Q].rank, 2);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

/* The head's factors are the embedding's, the other way round: once in the file, or twice. */
Test(adapter, ties_the_heads_factors_to_the_embeddings)
{
    static const char *const edits[] = {
        "base_model.model.model.embed_tokens.lora_embedding_A F32 2x10;"
        "base_model.model.model.embed_tokens.lora_embedding_B F32 8x2",
        "base_model.model.lm_head.lora_A.weight F32 2x8;"
        "base_model.model.lm_head.lora_B.weight F32 10x2",
    };
    struct model_config base = small_model();

    base.tied = true;
    for (int i = 0; i < 2; i++) {
        struct adapter_plan plan;
        char *directory = directory_make();
        write_config(directory,
                     "{\"target_modules\": [\"q_proj\", \"v_proj\", \"embed_tokens\"], "
                     "\"ensure_weight_tying\": true, \"alpha_pattern\": {\"lm_head\": 1}}");
        write_tensors(directory, edits[i]);
        cr_assert_eq(adapter_plan_read(&plan, directory, &base, false), MLORA_OK, "%s",
                     error_text());
        const struct adapter_linear *outside = &plan.linears[2 * LORA_LINEARS];
        cr_expect_eq(outside[LORA_EMBEDDING].rank, 2);
        cr_expect_eq(outside[LORA_EMBEDDING].scale, 2);
        cr_expect_eq(outside[LORA_HEAD].rank, 2);
        cr_expect_eq(outside[LORA_HEAD].scale, 0.5f);
        cr_expect_eq(outside[LORA_HEAD].a, outside[LORA_EMBEDDING].b);
        cr_expect_eq(outside[LORA_HEAD].b, outside[LORA_EMBEDDING].a);
        adapter_plan_free(&plan);
        directory_remove(directory);
    }
}

Test(adapter, prefers_safetensors_to_a_pickle_and_says_so)
{
    const struct model_config base = small_model();
    struct adapter_plan plan;
    char *directory = directory_make();

    write_config(directory, "{}");
    write_tensors(directory, "");
    directory_write(directory, "adapter_model.bin", "PK\003\004", 4);
    cr_assert_eq(adapter_plan_read(&plan, directory, &base, false), MLORA_OK);
    cr_expect_not_null(strstr(buffer_text(&plan.warnings), "adapter_model.bin: not read"));
    adapter_plan_free(&plan);
    directory_remove(directory);
}

Test(adapter, is_read_without_a_base_by_its_own_shapes)
{
    struct adapter_plan plan;
    char *directory = directory_make();

    write_config(directory, "{}");
    write_tensors(directory, "@6.self_attn.q_proj.lora_A.weight F32 2x100;"
                             "@6.self_attn.q_proj.lora_B.weight F32 50x2");
    cr_assert_eq(adapter_plan_read(&plan, directory, NULL, false), MLORA_OK, "%s", error_text());
    cr_expect_eq(plan.n_layers, 7);
    cr_expect_eq(plan.linears[6 * LORA_LINEARS + LORA_Q].out, 50);
    adapter_plan_free(&plan);
    directory_remove(directory);
}

/* ---- images that are dropped ---------------------------------------------------------------- */

Test(adapter, reads_a_dropped_image_again_bit_for_bit)
{
    for (size_t f = 0; f < sizeof fixtures / sizeof fixtures[0]; f++) {
        struct adapter_plan plan;
        struct adapter adapter;

        read_fixture(&plan, fixtures[f].model, fixtures[f].name);
        cr_assert_eq(adapter_load(&adapter, host_device(), &plan, NULL, NULL), MLORA_OK);
        const size_t bytes = (size_t)adapter.bytes;
        char *want = malloc(bytes);
        memcpy(want, adapter.memory, bytes);
        adapter_drop_image(&adapter);
        cr_assert_null(adapter.memory);
        cr_assert_eq(adapter_load_again(&adapter, &plan), MLORA_OK, "%s", error_text());
        cr_expect_arr_eq(adapter.memory, want, bytes);
        free(want);
        adapter_free(&adapter);
        adapter_plan_free(&plan);
    }
}

Test(adapter, refuses_to_read_again_what_has_changed)
{
    const struct model_config base = small_model();
    const float a[8] = {1}, b[8] = {2}, other[8] = {3};
    struct tensor_data tensors[] = {{"@0.self_attn.q_proj.lora_A.weight", "F32", 1, 8, a},
                                    {"@0.self_attn.q_proj.lora_B.weight", "F32", 8, 1, b}};
    const struct {
        const char *config;
        const float *b;
        bool same;
    } cases[] = {
        {"{\"r\": 1}", b, true},
        {"{\"r\": 1}", other, false},                /* a value */
        {"{\"r\": 1, \"lora_alpha\": 8}", b, false}, /* the scale */
        {"{\"r\": 1, \"bias\": \"none\"}", b, true},
    };
    char *directory = directory_make();
    struct adapter_plan plan;
    struct adapter adapter;

    write_config(directory, "{\"r\": 1}");
    write_tensor_data(directory, tensors, 2);
    cr_assert_eq(adapter_plan_read(&plan, directory, &base, false), MLORA_OK);
    cr_assert_eq(adapter_load(&adapter, host_device(), &plan, &base, NULL), MLORA_OK);
    adapter_plan_free(&plan);
    for (int i = 0; i < 4; i++) {
        tensors[1].data = cases[i].b;
        write_config(directory, cases[i].config);
        write_tensor_data(directory, tensors, 2);
        adapter_drop_image(&adapter);
        cr_assert_eq(adapter_plan_read(&plan, directory, &base, false), MLORA_OK);
        const mlora_status status = adapter_load_again(&adapter, &plan);
        adapter_plan_free(&plan);
        cr_expect_eq(status, cases[i].same ? MLORA_OK : MLORA_EFORMAT, "case %d", i);
        cr_expect_eq(adapter.memory != NULL, cases[i].same);
        if (!cases[i].same)
            cr_expect_not_null(strstr(error_text(), "has changed since it was loaded"), "%s",
                               error_text());
    }
    adapter_free(&adapter);
    directory_remove(directory);
}

Test(adapter, content_decides_the_hash)
{
    struct adapter_plan plan;
    struct adapter one, same, other;

    read_fixture(&plan, LLAMA2, "mood");
    cr_assert_eq(adapter_load(&one, host_device(), &plan, NULL, NULL), MLORA_OK);
    cr_assert_eq(adapter_load(&same, host_device(), &plan, NULL, NULL), MLORA_OK);
    adapter_plan_free(&plan);
    read_fixture(&plan, LLAMA2, "json");
    cr_assert_eq(adapter_load(&other, host_device(), &plan, NULL, NULL), MLORA_OK);
    adapter_plan_free(&plan);
    cr_expect(hash_equal(one.content, same.content));
    cr_expect_not(hash_equal(one.content, other.content));
    adapter_free(&one);
    adapter_free(&same);
    adapter_free(&other);
}
