/* The weights of a model: where they come from, and what follows from them. The plan of a checkpoint
 * is made first (weights_plan.c), then read (weights_read.c). */
#include "model/weights.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "model/weights_plan.h"
#include "model/weights_read.h"

/* ---- linears ------------------------------------------------------------------------------ */

const char *linear_name(enum lora_linear linear)
{
    static const char *const names[LORA_LINEARS] = {
        [LORA_Q] = "self_attn.q_proj", [LORA_K] = "self_attn.k_proj", [LORA_V] = "self_attn.v_proj",
        [LORA_O] = "self_attn.o_proj", [LORA_GATE] = "mlp.gate_proj", [LORA_UP] = "mlp.up_proj",
        [LORA_DOWN] = "mlp.down_proj"};
    return names[linear];
}

int linear_inputs(const struct model_config *config, enum lora_linear linear)
{
    if (linear == LORA_O) return config->n_heads * config->head_dim;
    return linear == LORA_DOWN ? config->mlp_size : config->hidden_size;
}

int linear_outputs(const struct model_config *config, enum lora_linear linear)
{
    switch (linear) {
    case LORA_Q:
        return config->n_heads * config->head_dim;
    case LORA_K:
    case LORA_V:
        return config->n_kv_heads * config->head_dim;
    case LORA_GATE:
    case LORA_UP:
        return config->mlp_size;
    default:
        return config->hidden_size;
    }
}

struct matrix weights_linear(const struct weights *weights, const struct model_config *config,
                             int layer, enum lora_linear linear, const float **bias)
{
    const struct layer_weights *w = &weights->layers[layer];
    const struct {
        enum lora_linear first;
        const struct matrix *matrix;
        const float *bias;
    } joined[] = {{LORA_DOWN, &w->down, w->down_bias},
                  {LORA_GATE, &w->gate_up, w->gate_up_bias},
                  {LORA_O, &w->o, w->o_bias},
                  {LORA_Q, &w->qkv, w->qkv_bias}};
    int i = 0;
    size_t row = 0;

    while (linear < joined[i].first) i++;
    for (int l = (int)joined[i].first; l < (int)linear; l++)
        row += (size_t)linear_outputs(config, (enum lora_linear)l);

    struct matrix out = *joined[i].matrix;
    out.data = (const char *)out.data + row * (size_t)out.K * dtype_bytes(out.dtype);
    out.N = linear_outputs(config, linear);
    *bias = joined[i].bias ? joined[i].bias + row : NULL;
    return out;
}

/* ---- what follows from the plan ------------------------------------------------------------- */

static mlora_status load_rope(struct weights *weights, struct device *dev,
                              const struct model_config *config)
{
    const size_t bytes = (size_t)(config->head_dim / 2) * sizeof(float);
    void *memory = NULL;

    float *frequency = malloc(bytes);
    if (!frequency) return error_set(MLORA_ENOMEM, "out of memory for rotary frequencies");
    model_config_rope(config, frequency);
    const mlora_status status = dev->ops->alloc(dev, bytes, &memory);
    if (status == MLORA_OK) dev->ops->upload(dev, memory, frequency, bytes);
    weights->rope_frequency = memory;
    weights->bytes += (int64_t)bytes;
    free(frequency);
    return status;
}

/* Say that it does not fit before the system starts to kill processes. */
static mlora_status check_memory(struct device *dev, int64_t bytes, const char *directory)
{
    size_t free_bytes = 0, total_bytes = 0;

    dev->ops->memory(dev, &free_bytes, &total_bytes);
    if ((uint64_t)bytes <= free_bytes) return MLORA_OK;
    return error_set(
        MLORA_ENOMEM, "%s: the weights need %" PRId64 " MiB, the %s device has %zu MiB free of %zu",
        directory, (bytes >> 20) + 1, dev->backend, free_bytes >> 20, total_bytes >> 20);
}

/* All arrays are there: what follows from them. */
static mlora_status finish_load(struct weights *weights, struct device *dev,
                                const struct weights_plan *plan, const struct model_config *config)
{
    weights->bytes = plan->device_bytes;
    weights->n_parameters = plan->n_parameters;
    if (config->tied) weights->head = weights->embedding;
    const mlora_status status = load_rope(weights, dev, config);
    if (status != MLORA_OK) return status;
    return dev->ops->sync(dev); /* a failed upload is reported here, not in a later step */
}

/* ---- random weights ------------------------------------------------------------------------- */

enum { POOL_VALUES = 1 << 22 }; /* random values, drawn once and used again and again */

/* Sums of four uniform numbers: normal enough, with a deviation of 0.02. */
static void fill_pool(uint16_t *pool)
{
    uint64_t state = 1;

    for (int i = 0; i < POOL_VALUES; i++) {
        float sum = -2.0f;
        state = state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        for (int k = 0; k < 4; k++) sum += (float)(state >> (16 * k) & 0xffff) / 65536.0f;
        pool[i] = bf16_from_f32(0.02f * 1.7320508f * sum);
    }
}

/* The matrix is laid with pieces of the pool that start at ever other places. */
static void fill_matrix(struct device *dev, char *out, int64_t bytes, const uint16_t *pool,
                        uint32_t *state)
{
    while (bytes > 0) {
        *state = *state * 1664525u + 1013904223u;
        const size_t start = *state % (POOL_VALUES / 2);
        const int64_t most = POOL_VALUES / 2 * (int64_t)sizeof *pool;
        const int64_t n_bytes = bytes < most ? bytes : most;
        dev->ops->upload(dev, out, pool + start, (size_t)n_bytes);
        out += n_bytes;
        bytes -= n_bytes;
    }
}

static mlora_status random_array(struct device *dev, const struct array *array,
                                 const uint16_t *pool, uint32_t *state)
{
    const bool is_norm = strstr(array->parts[0].name, "norm.weight") != NULL;
    char *out;

    mlora_status status = array_alloc(dev, array, &out);
    if (status != MLORA_OK) return status;
    if (array->matrix) {
        fill_matrix(dev, out, array_bytes(array), pool, state);
        return MLORA_OK;
    }
    float *values = malloc((size_t)array->N * sizeof *values);
    if (!values) return error_set(MLORA_ENOMEM, "out of memory: a vector of %d", array->N);
    for (int n = 0; n < array->N; n++) values[n] = is_norm ? 1.0f : 0.0f;
    dev->ops->upload(dev, out, values, (size_t)array->N * sizeof *values);
    free(values);
    return MLORA_OK;
}

/* ---- loading -------------------------------------------------------------------------------- */

mlora_status weights_random(struct weights *out, struct device *dev,
                            const struct model_config *config)
{
    struct weights weights = {0};
    struct weights_plan plan = {0};
    uint32_t state = 1;

    *out = (struct weights){0};
    uint16_t *pool = malloc(POOL_VALUES * sizeof *pool);
    mlora_status status = pool ? weights_plan_list(&plan, &weights, "", config)
                               : error_set(MLORA_ENOMEM, "out of memory for random values");
    if (status != MLORA_OK) goto done;
    fill_pool(pool);
    for (int a = 0; a < plan.n_arrays && status == MLORA_OK; a++) {
        struct array *array = &plan.arrays[a];
        array->dtype = array->matrix ? DTYPE_BF16 : DTYPE_F32;
        plan.device_bytes += array_bytes(array);
        plan.n_parameters += (int64_t)array->N * array->K;
        status = random_array(dev, array, pool, &state);
    }
    if (status == MLORA_OK) status = finish_load(&weights, dev, &plan, config);

done:
    free(pool);
    free(plan.arrays);
    if (status != MLORA_OK) weights_free(&weights, dev);
    *out = weights;
    return status;
}

mlora_status weights_measure(int64_t *device_bytes, int64_t *n_parameters,
                             const struct checkpoint *checkpoint, const char *directory,
                             const struct model_config *config)
{
    struct weights weights = {0};
    struct weights_plan plan = {0};

    const mlora_status status = weights_plan_make(&plan, &weights, checkpoint, directory, config);
    *device_bytes = plan.device_bytes;
    *n_parameters = plan.n_parameters;
    free(plan.arrays);
    free(weights.layers);
    return status;
}

mlora_status weights_load(struct weights *out, struct device *dev, const char *directory,
                          const struct model_config *config, mlora_progress_fn progress, void *user)
{
    struct weights weights = {0};
    struct checkpoint checkpoint = {0};
    struct weights_plan plan = {0};

    *out = (struct weights){0};
    mlora_status status = checkpoint_open(&checkpoint, directory);
    if (status != MLORA_OK) return status;
    status = weights_plan_make(&plan, &weights, &checkpoint, directory, config);
    if (status != MLORA_OK) goto done;
    status = check_memory(dev, plan.device_bytes, directory);
    if (status != MLORA_OK) goto done;
    status = weights_read(dev, &plan, progress, user);
    if (status == MLORA_OK) status = finish_load(&weights, dev, &plan, config);

done:
    free(plan.arrays);
    checkpoint_close(&checkpoint);
    if (status != MLORA_OK) weights_free(&weights, dev);
    *out = weights;
    return status;
}

void weights_free(struct weights *weights, struct device *dev)
{
    void (*release)(struct device *, void *) = dev->ops->free;

    for (int l = 0; l < weights->n_layers && weights->layers; l++) {
        struct layer_weights *w = &weights->layers[l];
        release(dev, w->attention_norm);
        release(dev, (void *)w->qkv.data);
        release(dev, w->qkv_bias);
        release(dev, w->q_norm);
        release(dev, w->k_norm);
        release(dev, (void *)w->o.data);
        release(dev, w->o_bias);
        release(dev, w->mlp_norm);
        release(dev, (void *)w->gate_up.data);
        release(dev, w->gate_up_bias);
        release(dev, (void *)w->down.data);
        release(dev, w->down_bias);
    }
    if (weights->head.data != weights->embedding.data) release(dev, (void *)weights->head.data);
    release(dev, (void *)weights->embedding.data);
    release(dev, weights->final_norm);
    release(dev, weights->rope_frequency);
    free(weights->layers);
    *weights = (struct weights){0};
}
