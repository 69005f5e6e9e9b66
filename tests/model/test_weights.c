/* Weights on a device that is nothing but malloc: what is joined, widened and tied, and what is
 * refused before anything is allocated. */
#include "model/weights.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tests/model/files.h"

/* ---- a device ----------------------------------------------------------------------------- */

struct fake {
    struct device device;
    int n_live, n_allocs;
    int fail_at; /* the allocation that fails, from 1; 0: none */
    bool lost;   /* sync fails */
    size_t free_bytes;
};

static mlora_status fake_alloc(struct device *dev, size_t bytes, void **out)
{
    struct fake *fake = (struct fake *)dev;
    if (++fake->n_allocs == fake->fail_at) return error_set(MLORA_ENOMEM, "the device is full");
    fake->n_live++;
    *out = malloc(bytes);
    return MLORA_OK;
}

static void fake_free(struct device *dev, void *memory)
{
    if (memory) ((struct fake *)dev)->n_live--;
    free(memory);
}

/* The ring of the readers is not among what the weights hold. */
static mlora_status fake_alloc_host(struct device *dev, size_t bytes, void **out)
{
    (void)dev;
    *out = malloc(bytes);
    return MLORA_OK;
}

static void fake_free_host(struct device *dev, void *memory)
{
    (void)dev;
    free(memory);
}

static void fake_upload(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    memcpy(to, from, bytes);
}

static mlora_status fake_sync(struct device *dev)
{
    return ((struct fake *)dev)->lost ? error_set(MLORA_EDEVICE, "upload: lost") : MLORA_OK;
}

static void fake_memory(struct device *dev, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = ((struct fake *)dev)->free_bytes;
}

static const struct kernels fake_ops = {.alloc = fake_alloc,
                                        .free = fake_free,
                                        .alloc_host = fake_alloc_host,
                                        .free_host = fake_free_host,
                                        .upload = fake_upload,
                                        .sync = fake_sync,
                                        .memory = fake_memory};

static struct fake new_fake(void)
{
    return (struct fake){.device = {.ops = &fake_ops, .backend = "fake"}, .free_bytes = 1 << 30};
}

/* ---- a model of two layers ---------------------------------------------------------------- */

/* D 4, H 2, G 1, d 2, F 3, V 5. Every value says where it is from. */
struct tiny {
    struct model_config config;
    const char *prefix;
    const char *k_dtype;   /* of layer 1's k_proj; the rest is BF16 */
    const char *left_out;  /* a name that is not written, "" for none */
    const char *misshapen; /* a name that gets a row too many */
    const char *odd_dtype; /* a name that is stored as U8 */
    const char *added[8];  /* further tensors */
};

static struct tiny new_tiny(void)
{
    struct tiny tiny = {.prefix = "model.", .k_dtype = "BF16"};
    tiny.config = (struct model_config){.architecture = "LlamaForCausalLM",
                                        .hidden_size = 4,
                                        .mlp_size = 3,
                                        .n_layers = 2,
                                        .n_heads = 2,
                                        .n_kv_heads = 1,
                                        .head_dim = 2,
                                        .vocab_size = 5,
                                        .max_position = 16,
                                        .rope = {.theta = 100.0}};
    return tiny;
}

static void add(struct builder *builder, const struct tiny *tiny, const char *name,
                const char *dtype, int rows, int cols, float first)
{
    float values[64];
    if (tiny->left_out && strcmp(name, tiny->left_out) == 0) return;
    if (tiny->misshapen && strcmp(name, tiny->misshapen) == 0) rows++;
    if (tiny->odd_dtype && strcmp(name, tiny->odd_dtype) == 0) dtype = "U8";
    for (int i = 0; i < 64; i++) values[i] = first + (float)i;
    if (strcmp(dtype, "U8") == 0) { /* a byte an element */
        const size_t begin = builder->data.bytes;
        for (int i = 0; i < rows * (cols ? cols : 1); i++) buffer_append(&builder->data, "", 1);
        buffer_printf(&builder->header,
                      ",\"%s\":{\"dtype\":\"U8\",\"shape\":[%d,%d],"
                      "\"data_offsets\":[%zu,%zu]}",
                      name, rows, cols, begin, builder->data.bytes);
        return;
    }
    builder_add(builder, name, dtype, rows, cols, values);
}

static void write_tiny(const struct tiny *tiny)
{
    static const struct {
        const char *name;
        int rows, cols;
        float first;
    } tensors[] = {
        {"input_layernorm.weight", 4, 0, 1},    {"self_attn.q_proj.weight", 4, 4, 100},
        {"self_attn.k_proj.weight", 2, 4, 120}, {"self_attn.v_proj.weight", 2, 4, 140},
        {"self_attn.o_proj.weight", 4, 4, 160}, {"post_attention_layernorm.weight", 4, 0, 5},
        {"mlp.gate_proj.weight", 3, 4, 180},    {"mlp.up_proj.weight", 3, 4, 200},
        {"mlp.down_proj.weight", 4, 3, 220},
    };
    static const struct {
        const char *name;
        int rows;
        float first;
    } biases[] = {
        {"self_attn.q_proj.bias", 4, 10},   {"self_attn.k_proj.bias", 2, 20},
        {"self_attn.v_proj.bias", 2, 30},   {"self_attn.o_proj.bias", 4, 40},
        {"mlp.gate_proj.bias", 3, 50},      {"mlp.up_proj.bias", 3, 60},
        {"mlp.down_proj.bias", 4, 70},      {"self_attn.q_norm.weight", 2, 80},
        {"self_attn.k_norm.weight", 2, 90},
    };
    const struct model_config *config = &tiny->config;
    struct builder builder = {0};
    char name[128];

    snprintf(name, sizeof name, "%sembed_tokens.weight", tiny->prefix);
    add(&builder, tiny, name, "BF16", 5, 4, 0);
    snprintf(name, sizeof name, "%snorm.weight", tiny->prefix);
    add(&builder, tiny, name, "F16", 4, 0, 9);
    if (!config->tied) add(&builder, tiny, "lm_head.weight", "F16", 5, 4, 64);
    for (int l = 0; l < 2; l++) {
        for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
            const bool is_k = l == 1 && i == 2;
            snprintf(name, sizeof name, "%slayers.%d.%s", tiny->prefix, l, tensors[i].name);
            add(&builder, tiny, name, is_k ? tiny->k_dtype : "BF16", tensors[i].rows,
                tensors[i].cols, tensors[i].first);
        }
        for (size_t i = 0; i < sizeof biases / sizeof biases[0]; i++) {
            const bool wanted = i < 3   ? config->qkv_bias
                                : i < 4 ? config->o_bias
                                : i < 7 ? config->mlp_bias
                                        : config->qk_norm;
            snprintf(name, sizeof name, "%slayers.%d.%s", tiny->prefix, l, biases[i].name);
            if (wanted) add(&builder, tiny, name, "BF16", biases[i].rows, 0, biases[i].first);
        }
    }
    for (int i = 0; i < 8 && tiny->added[i]; i++)
        add(&builder, tiny, tiny->added[i], "F32", 2, 2, 0);
    builder_write(&builder, "model.safetensors");
}

static mlora_status load_tiny(struct weights *weights, struct fake *fake, const struct tiny *tiny)
{
    write_tiny(tiny);
    return weights_load(weights, &fake->device, directory, &tiny->config, NULL, NULL);
}

/* Loading fails with this status and these two parts of text, and nothing stays allocated. */
static void expect_refusal(const struct tiny *tiny, mlora_status status, const char *part,
                           const char *other_part)
{
    struct fake fake = new_fake();
    struct weights weights;
    cr_expect_eq(load_tiny(&weights, &fake, tiny), status);
    expect_text("refusal", part, other_part);
    cr_expect_eq(fake.n_allocs, 0, "refused before anything is allocated");
    weights_free(&weights, &fake.device); /* accepts what a failure leaves */
}

static void expect_row(const struct matrix *matrix, int row, const float *want)
{
    for (int k = 0; k < matrix->K; k++) {
        const size_t i = (size_t)row * (size_t)matrix->K + (size_t)k;
        const float got = dtype_load(matrix->data, matrix->dtype, i);
        cr_expect_eq(got, want[k], "row %d, column %d: %g, not %g", row, k, got, want[k]);
    }
}

TestSuite(weights, .init = directory_open, .fini = directory_close);

/* ---- loading ------------------------------------------------------------------------------ */

Test(weights, projections_with_one_input_are_joined_in_order)
{
    const struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    cr_assert_eq(load_tiny(&weights, &fake, &tiny), MLORA_OK, "%s", error_text());
    const struct layer_weights *layer = &weights.layers[1];
    cr_expect(layer->qkv.N == 8 && layer->qkv.K == 4 && layer->qkv.dtype == DTYPE_BF16);
    expect_row(&layer->qkv, 0, (float[]){100, 101, 102, 103}); /* q */
    expect_row(&layer->qkv, 3, (float[]){112, 113, 114, 115});
    expect_row(&layer->qkv, 4, (float[]){120, 121, 122, 123}); /* k */
    expect_row(&layer->qkv, 6, (float[]){140, 141, 142, 143}); /* v */
    expect_row(&layer->o, 3, (float[]){172, 173, 174, 175});
    cr_expect(layer->gate_up.N == 6 && layer->gate_up.K == 4);
    expect_row(&layer->gate_up, 2, (float[]){188, 189, 190, 191}); /* gate */
    expect_row(&layer->gate_up, 3, (float[]){200, 201, 202, 203}); /* up */
    cr_expect(layer->down.N == 4 && layer->down.K == 3);
    expect_row(&layer->down, 1, (float[]){223, 224, 225});
    cr_expect_arr_eq(layer->attention_norm, ((float[]){1, 2, 3, 4}), 16);
    cr_expect_arr_eq(layer->mlp_norm, ((float[]){5, 6, 7, 8}), 16);
    cr_expect_arr_eq(weights.final_norm, ((float[]){9, 10, 11, 12}), 16);
    expect_row(&weights.embedding, 4, (float[]){16, 17, 18, 19});
    cr_expect_eq(weights.head.dtype, DTYPE_F16, "stays as it is stored");
    expect_row(&weights.head, 0, (float[]){64, 65, 66, 67});
    cr_expect(!layer->qkv_bias && !layer->o_bias && !layer->gate_up_bias && !layer->down_bias);
    cr_expect(!layer->q_norm && !layer->k_norm);
    cr_expect_eq(weights.rope_frequency[0], 1.0f);

    /* a layer: 4 + 32 + 16 + 4 + 24 + 12 */
    cr_expect_eq(weights.n_parameters, 2 * 92 + 4 + 20 + 20);
    /* matrices of 2 bytes, norms of 4, one rotary frequency of 4 */
    cr_expect_eq(weights.bytes, 2 * (84 * 2 + 8 * 4) + 4 * 4 + 40 * 2 + 4);
    weights_free(&weights, &fake.device);
    cr_expect_eq(fake.n_live, 0);
}

Test(weights, parts_of_different_types_are_widened_to_f32)
{
    static const char *const types[] = {"F32", "F16"};

    for (int i = 0; i < 2; i++) {
        struct tiny tiny = new_tiny();
        struct fake fake = new_fake();
        struct weights weights;
        tiny.k_dtype = types[i];
        cr_assert_eq(load_tiny(&weights, &fake, &tiny), MLORA_OK, "%s", error_text());
        cr_expect_eq(weights.layers[0].qkv.dtype, DTYPE_BF16);
        cr_expect_eq(weights.layers[1].qkv.dtype, DTYPE_F32);
        expect_row(&weights.layers[1].qkv, 3, (float[]){112, 113, 114, 115});
        expect_row(&weights.layers[1].qkv, 4, (float[]){120, 121, 122, 123});
        expect_row(&weights.layers[1].qkv, 7, (float[]){144, 145, 146, 147});
        weights_free(&weights, &fake.device);
        cr_expect_eq(fake.n_live, 0);
    }
}

Test(weights, biases_and_head_norms_are_joined_in_f32)
{
    struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    tiny.config.qkv_bias = tiny.config.o_bias = tiny.config.mlp_bias = tiny.config.qk_norm = true;
    cr_assert_eq(load_tiny(&weights, &fake, &tiny), MLORA_OK, "%s", error_text());
    const struct layer_weights *layer = &weights.layers[0];
    cr_expect_arr_eq(layer->qkv_bias, ((float[]){10, 11, 12, 13, 20, 21, 30, 31}), 32);
    cr_expect_arr_eq(layer->o_bias, ((float[]){40, 41, 42, 43}), 16);
    cr_expect_arr_eq(layer->gate_up_bias, ((float[]){50, 51, 52, 60, 61, 62}), 24);
    cr_expect_arr_eq(layer->down_bias, ((float[]){70, 71, 72, 73}), 16);
    cr_expect_arr_eq(layer->q_norm, ((float[]){80, 81}), 8);
    cr_expect_arr_eq(layer->k_norm, ((float[]){90, 91}), 8);
    weights_free(&weights, &fake.device);
    cr_expect_eq(fake.n_live, 0);
}

Test(weights, a_tied_head_is_the_embedding_whatever_lies_under_its_name)
{
    struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    tiny.config.tied = true;
    tiny.added[0] = "lm_head.weight"; /* of a shape that would not fit */
    cr_assert_eq(load_tiny(&weights, &fake, &tiny), MLORA_OK, "%s", error_text());
    cr_expect_eq(weights.head.data, weights.embedding.data);
    cr_expect_eq(weights.head.N, 5);
    cr_expect_eq(weights.n_parameters, 2 * 92 + 4 + 20, "counted once");
    weights_free(&weights, &fake.device);
    cr_expect_eq(fake.n_live, 0);
}

Test(weights, names_without_model_and_stored_frequencies_are_accepted)
{
    struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    tiny.prefix = "";
    tiny.added[0] = "layers.0.self_attn.rotary_emb.inv_freq";
    cr_assert_eq(load_tiny(&weights, &fake, &tiny), MLORA_OK, "%s", error_text());
    expect_row(&weights.layers[1].o, 0, (float[]){160, 161, 162, 163});
    weights_free(&weights, &fake.device);
}

static void count_progress(void *user, int64_t done, int64_t total)
{
    int64_t *last = user;
    cr_expect(done > last[0] && done <= total);
    last[0] = done;
    last[1] = total;
}

Test(weights, the_fixtures_load_and_progress_ends_at_the_total)
{
    static const char *const names[] = {"tests/fixtures/tiny-llama2", "tests/fixtures/tiny-llama3"};
    static const int64_t parameters[] = {3950848, 1869120};

    for (int i = 0; i < 2; i++) {
        struct model_config config;
        struct checkpoint checkpoint;
        const struct safetensors *file;
        struct fake fake = new_fake();
        struct weights weights;
        int64_t last[2] = {0, 0};

        cr_assert_eq(model_config_read(&config, names[i]), MLORA_OK, "%s", error_text());
        cr_assert_eq(weights_load(&weights, &fake.device, names[i], &config, count_progress, last),
                     MLORA_OK, "%s", error_text());
        cr_expect_eq(last[0], last[1]);
        cr_expect_eq(last[1], 2 * parameters[i]);
        cr_expect_eq(weights.n_parameters, parameters[i]);

        /* v lies behind q and k */
        cr_assert_eq(checkpoint_open(&checkpoint, names[i]), MLORA_OK);
        const struct tensor *v =
            checkpoint_find(&checkpoint, "model.layers.1.self_attn.v_proj.weight", &file);
        cr_assert_not_null(v);
        char *want = malloc((size_t)v->bytes);
        cr_assert_eq(tensor_read(file, v, want), MLORA_OK);
        const size_t rows_before =
            (size_t)(config.n_heads + config.n_kv_heads) * (size_t)config.head_dim;
        const char *got =
            (const char *)weights.layers[1].qkv.data + rows_before * (size_t)config.hidden_size * 2;
        cr_expect_eq(memcmp(got, want, (size_t)v->bytes), 0);
        free(want);
        checkpoint_close(&checkpoint);
        weights_free(&weights, &fake.device);
        cr_expect_eq(fake.n_live, 0);
    }
}

Test(weights, a_tensor_larger_than_a_piece_is_read_whole)
{
    struct model_config config = new_tiny().config;
    struct fake fake = new_fake();
    struct builder builder = {0};
    struct weights weights;
    char name[96];
    static const char *const layer[] = {"input_layernorm", "post_attention_layernorm"};
    static const struct {
        const char *name;
        int rows, cols;
    } linears[] = {{"self_attn.q_proj", 4, 4}, {"self_attn.k_proj", 2, 4},
                   {"self_attn.v_proj", 2, 4}, {"self_attn.o_proj", 4, 4},
                   {"mlp.gate_proj", 3, 4},    {"mlp.up_proj", 3, 4},
                   {"mlp.down_proj", 4, 3}};
    const int V = 700000; /* x 4 x f32: 11.2 MB, a piece and a part of one */
    float *values = malloc((size_t)V * 4 * sizeof *values);

    for (int i = 0; i < V * 4; i++) values[i] = (float)i;
    config.vocab_size = V;
    config.n_layers = 1;
    config.tied = true;
    builder_add(&builder, "model.embed_tokens.weight", "F32", V, 4, values);
    builder_add(&builder, "model.norm.weight", "F32", 4, 0, values);
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "model.layers.0.%s.weight", layer[i]);
        builder_add(&builder, name, "F32", 4, 0, values);
    }
    for (int i = 0; i < 7; i++) {
        snprintf(name, sizeof name, "model.layers.0.%s.weight", linears[i].name);
        builder_add(&builder, name, "F32", linears[i].rows, linears[i].cols, values);
    }
    builder_write(&builder, "model.safetensors");
    cr_assert_eq(weights_load(&weights, &fake.device, directory, &config, NULL, NULL), MLORA_OK,
                 "%s", error_text());
    cr_expect_eq(memcmp(weights.embedding.data, values, (size_t)V * 16), 0);
    weights_free(&weights, &fake.device);
    free(values);
}

/* ---- refusals ----------------------------------------------------------------------------- */

Test(weights, missing_tensors_are_named)
{
    struct tiny tiny = new_tiny();

    tiny.left_out = "model.layers.1.mlp.up_proj.weight";
    expect_refusal(&tiny, MLORA_EFORMAT, directory,
                   "1 tensor missing (model.layers.1.mlp.up_proj.weight); 0 unknown");
    tiny.left_out = "lm_head.weight";
    expect_refusal(&tiny, MLORA_EFORMAT, "LlamaForCausalLM", "1 tensor missing (lm_head.weight)");

    tiny = new_tiny();
    write_tiny(&tiny);
    tiny.config.n_layers = 4; /* 18 tensors more than there are */
    struct fake fake = new_fake();
    struct weights weights;
    cr_expect_eq(weights_load(&weights, &fake.device, directory, &tiny.config, NULL, NULL),
                 MLORA_EFORMAT);
    expect_text("many", "18 tensors missing (model.layers.2.input_layernorm.weight, ", ", ...)");
}

Test(weights, unknown_tensors_are_named)
{
    struct tiny tiny = new_tiny();

    tiny.added[0] = "model.layers.0.self_attn.q_proj.bias";
    tiny.added[1] = "v_head.summary.weight";
    expect_refusal(&tiny, MLORA_EFORMAT, "0 tensors missing; 2 unknown",
                   "(model.layers.0.self_attn.q_proj.bias, v_head.summary.weight)");

    tiny = new_tiny();
    tiny.config.n_layers = 1;
    expect_refusal(&tiny, MLORA_EFORMAT, "9 unknown (model.layers.1.", ", ...)");
}

Test(weights, a_wrong_shape_is_refused_with_both_shapes)
{
    struct tiny tiny = new_tiny();

    tiny.misshapen = "model.layers.0.self_attn.v_proj.weight";
    expect_refusal(&tiny, MLORA_EFORMAT,
                   "model.safetensors: tensor model.layers.0.self_attn.v_proj",
                   "has shape [3, 4], config.json makes it [2, 4]");
    tiny.misshapen = "model.norm.weight";
    expect_refusal(&tiny, MLORA_EFORMAT, "tensor model.norm.weight",
                   "has shape [5], config.json makes it [4]");
    tiny = new_tiny();
    tiny.config.vocab_size = 6;
    expect_refusal(&tiny, MLORA_EFORMAT, "model.embed_tokens.weight",
                   "has shape [5, 4], config.json makes it [6, 4]");
}

Test(weights, a_type_that_is_not_served_is_refused)
{
    struct tiny tiny = new_tiny();

    tiny.odd_dtype = "model.layers.0.mlp.down_proj.weight";
    expect_refusal(&tiny, MLORA_EUNSUPPORTED, "model.layers.0.mlp.down_proj.weight: dtype is U8",
                   "not quantised");
}

Test(weights, a_model_that_does_not_fit_is_refused_before_it_is_read)
{
    const struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    fake.free_bytes = 100;
    cr_expect_eq(load_tiny(&weights, &fake, &tiny), MLORA_ENOMEM);
    expect_text("full", "the weights need 1 MiB", "the fake device has 0 MiB free");
    cr_expect_eq(fake.n_allocs, 0);
}

Test(weights, after_any_failed_allocation_nothing_stays)
{
    struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    tiny.config.qkv_bias = tiny.config.o_bias = tiny.config.mlp_bias = tiny.config.qk_norm = true;
    cr_assert_eq(load_tiny(&weights, &fake, &tiny), MLORA_OK, "%s", error_text());
    const int n_allocs = fake.n_allocs;
    weights_free(&weights, &fake.device);

    for (int i = 1; i <= n_allocs; i++) {
        fake = new_fake();
        fake.fail_at = i;
        cr_expect_eq(weights_load(&weights, &fake.device, directory, &tiny.config, NULL, NULL),
                     MLORA_ENOMEM);
        cr_expect_eq(fake.n_live, 0, "allocation %d", i);
    }
}

Test(weights, a_device_that_fails_is_reported_at_the_end)
{
    const struct tiny tiny = new_tiny();
    struct fake fake = new_fake();
    struct weights weights;

    fake.lost = true;
    cr_expect_eq(load_tiny(&weights, &fake, &tiny), MLORA_EDEVICE);
    cr_expect_eq(fake.n_live, 0);
}

Test(weights, linears_have_the_shapes_that_adapters_need)
{
    const struct model_config config = {
        .hidden_size = 10, .mlp_size = 30, .n_heads = 4, .n_kv_heads = 2, .head_dim = 6};
    static const int inputs[] = {10, 10, 10, 24, 10, 10, 30};
    static const int outputs[] = {24, 12, 12, 10, 30, 30, 10};
    static const char *const names[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                        "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                        "mlp.down_proj"};

    for (int i = 0; i < LORA_LINEARS; i++) {
        cr_expect_eq(linear_inputs(&config, (enum lora_linear)i), inputs[i]);
        cr_expect_eq(linear_outputs(&config, (enum lora_linear)i), outputs[i]);
        cr_expect_str_eq(linear_name((enum lora_linear)i), names[i]);
    }
}
