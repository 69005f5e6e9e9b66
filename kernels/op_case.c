#include "kernels/op_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { SLOTS = 3, SEGMENTS = SLOTS + 2, ROWS = 2, POOL = 1 << 20 };

/* ---- making --------------------------------------------------------------------------------- */

/* A case being made: after the first failure nothing happens any more. */
struct maker {
    struct op_case *c;
    struct op_types types;
    bool as_f32;
    int n_adapters; /* that tokens have */
    mlora_status status;
};

static void *put(struct maker *maker, const void *from, size_t bytes)
{
    struct op_case *c = maker->c;
    void *memory = NULL;

    if (maker->status == MLORA_OK) maker->status = c->dev->ops->alloc(c->dev, bytes, &memory);
    if (maker->status != MLORA_OK) return NULL;
    c->memory[c->n_memory++] = memory;
    c->dev->ops->upload(c->dev, memory, from, bytes);
    return memory;
}

/* In [-1, 1). */
static float next_value(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
    return (float)((double)(*state >> 40) / (1 << 23) - 1.0);
}

static enum dtype stored_as(const struct maker *maker, enum dtype dtype)
{
    return maker->as_f32 ? DTYPE_F32 : dtype;
}

/* n random numbers of that type; beyond a pool of them they come again. */
static void *random_array(struct maker *maker, size_t n, enum dtype dtype)
{
    const enum dtype stored = stored_as(maker, dtype);
    const size_t size = dtype_bytes(stored), bytes = n * size;
    const size_t first = n < POOL ? n : POOL;
    char *host = malloc(bytes);

    if (!host && maker->status == MLORA_OK)
        maker->status = error_set(MLORA_ENOMEM, "out of memory for random numbers");
    if (maker->status != MLORA_OK) {
        free(host);
        return NULL;
    }
    for (size_t i = 0; i < first; i++)
        dtype_store(host, stored, i, dtype_rounded(dtype, next_value(&maker->c->state)));
    for (size_t done = first * size; done < bytes;) {
        const size_t piece = done < bytes - done ? done : bytes - done;
        memcpy(host + done, host, piece);
        done += piece;
    }
    void *memory = put(maker, host, bytes);
    free(host);
    return memory;
}

/* A tensor that is compared afterwards. Outputs hold random numbers first, too. */
static void *tensor(struct maker *maker, const char *name, size_t n, enum dtype dtype,
                    bool is_output)
{
    struct op_case *c = maker->c;
    void *data = random_array(maker, n, dtype);

    c->tensors[c->n_tensors++] =
        (struct op_tensor){name, data, n, stored_as(maker, dtype), is_output};
    return data;
}

static double size_of(const struct op_types *types)
{
    return (double)dtype_bytes(types->activations);
}

static void make_silu_mul(struct maker *maker)
{
    struct op_case *c = maker->c;
    const size_t T = (size_t)c->sizes.T, F = (size_t)c->sizes.F;
    const enum dtype dtype = maker->types.activations;

    tensor(maker, "y", T * F, dtype, true);
    tensor(maker, "gate_up", T * 2 * F, dtype, false);
    c->bytes = 3.0 * (double)(T * F) * size_of(&maker->types);
}

static void make_add_rms_norm(struct maker *maker)
{
    struct op_case *c = maker->c;
    const size_t T = (size_t)c->sizes.T, D = (size_t)c->sizes.D;
    const enum dtype dtype = maker->types.activations;
    const double element = size_of(&maker->types);

    tensor(maker, "y", T * D, dtype, true);
    tensor(maker, "x", T * D, DTYPE_F32, true);
    if (c->sizes.more) tensor(maker, "delta", T * D, dtype, false);
    c->vector = random_array(maker, D, DTYPE_F32);
    c->bytes =
        (double)(T * D) * (c->sizes.more ? 2 * (4 + element) : 4 + element) + 4.0 * (double)D;
}

static void make_matmul(struct maker *maker)
{
    struct op_case *c = maker->c;
    const size_t T = (size_t)c->sizes.T, N = (size_t)c->sizes.N, K = (size_t)c->sizes.K;

    tensor(maker, "y", T * N, maker->types.activations, true);
    tensor(maker, "x", T * K, maker->types.activations, false);
    void *w = tensor(maker, "w", N * K, maker->types.weights, false);
    if (c->sizes.more) c->vector = random_array(maker, N, DTYPE_F32);
    c->w = (struct matrix){w, stored_as(maker, maker->types.weights), c->sizes.N, c->sizes.K};
    c->bytes = (double)(N * K) * (double)dtype_bytes(maker->types.weights) +
               (double)(T * (N + K)) * size_of(&maker->types);
    c->flops = 2.0 * (double)T * (double)N * (double)K;
}

/* Two rows, the second of which has a past; blocks lie in reverse. */
static void make_rope(struct maker *maker)
{
    enum { PAST = 21 };
    struct op_case *c = maker->c;
    const int T = c->sizes.T, H = c->sizes.H, G = c->sizes.G, d = c->sizes.d;
    const int first = T - T / 2, max_blocks = (T + PAST) / KV_BLOCK + 1;
    const int n_blocks = ROWS * max_blocks;
    const size_t n_cache = (size_t)n_blocks * (size_t)G * KV_BLOCK * (size_t)d;
    int32_t *host = malloc((size_t)(2 * T + n_blocks) * sizeof *host);
    float *frequency = malloc((size_t)d / 2 * sizeof *frequency);

    if (!host || !frequency) {
        maker->status = error_set(MLORA_ENOMEM, "out of memory for positions");
        goto done;
    }
    int32_t *position = host, *row = host + T, *table = host + 2 * T;
    for (int t = 0; t < T; t++) {
        row[t] = t >= first;
        position[t] = t < first ? t : PAST + t - first;
    }
    for (int i = 0; i < n_blocks; i++) table[i] = n_blocks - 1 - i;
    for (int i = 0; i < d / 2; i++) frequency[i] = powf(10000.0f, -2.0f * (float)i / (float)d);

    const enum dtype dtype = maker->types.activations;
    tensor(maker, "qkv", (size_t)T * (size_t)(H + 2 * G) * (size_t)d, dtype, true);
    void *k = tensor(maker, "k", n_cache, dtype, true);
    void *v = tensor(maker, "v", n_cache, dtype, true);
    c->batch = (struct batch_view){.T = T,
                                   .Q = ROWS,
                                   .max_row = first,
                                   .max_kv = T + PAST,
                                   .position = put(maker, position, (size_t)T * sizeof *host),
                                   .row = put(maker, row, (size_t)T * sizeof *host)};
    c->kv = (struct kv_view){k, v, put(maker, table, (size_t)n_blocks * sizeof *host), max_blocks,
                             stored_as(maker, dtype)};
    c->heads = (struct heads){H, G, d, 0, 1.0f / sqrtf((float)d)};
    c->rope = (struct rope_view){put(maker, frequency, (size_t)d / 2 * sizeof *frequency), 1.0f};
    c->bytes = (double)T * d * (2 * H + 5 * G) * size_of(&maker->types);

done:
    free(host);
    free(frequency);
}

/* Tokens take turns: slot 0, 1, 2, no adapter. After the adapters' segments come that of the base and an
 * empty one. */
static void make_segments(struct maker *maker)
{
    struct op_case *c = maker->c;
    const int T = c->sizes.T;
    int32_t *host = malloc((size_t)(2 * T + 2 * SEGMENTS + 1) * sizeof *host);

    if (!host) {
        maker->status = error_set(MLORA_ENOMEM, "out of memory for segments");
        return;
    }
    int32_t *slot = host, *order = host + T, *segment = host + 2 * T, *start = segment + SEGMENTS;
    int n = 0;
    start[0] = 0;
    for (int t = 0; t < T; t++) slot[t] = (t + 1) % (SLOTS + 1) - 1;
    for (int s = 0; s < SLOTS; s++) {
        const int before = n;
        for (int t = 0; t < T; t++)
            if (slot[t] == s) order[n++] = t;
        if (n == before) continue;
        segment[c->lora.n_segments++] = s;
        start[c->lora.n_segments] = n;
        if (n - before > c->lora.max_segment) c->lora.max_segment = n - before;
    }
    maker->n_adapters = c->lora.n_segments;
    for (int t = 0; t < T; t++)
        if (slot[t] < 0) order[n++] = t;
    while (c->lora.n_segments < maker->n_adapters + 2) {
        segment[c->lora.n_segments++] = -1;
        start[c->lora.n_segments] = n;
    }
    c->lora.n_tokens = n;
    c->lora.has_base_segments = true;
    c->lora.slot = put(maker, slot, (size_t)T * sizeof *host);
    c->lora.order = put(maker, order, ((size_t)n + 1) * sizeof *host);
    c->lora.segment_slot = put(maker, segment, SEGMENTS * sizeof *host);
    c->lora.segment_start = put(maker, start, (SEGMENTS + 1) * sizeof *host);
    free(host);
}

/* Slot s has the first R >> s rows of one A; slot 2 has nothing for the second slice. */
static void make_factors(struct maker *maker)
{
    struct op_case *c = maker->c;
    const size_t N = (size_t)c->sizes.N, K = (size_t)c->sizes.K, R = (size_t)c->sizes.R;
    const enum dtype dtype = maker->types.weights;
    struct lora_factors table[SLOTS * LORA_LINEARS] = {{0}};
    void *a[SLOTS], *b[SLOTS];
    const float *vectors = c->sizes.more ? random_array(maker, 3 * N, DTYPE_F32) : NULL;
    double factor_elements = 0;

    for (int s = 0; s < SLOTS; s++) {
        a[s] = random_array(maker, R * K, dtype);
        b[s] = random_array(maker, N * R, dtype);
        for (int i = 0; i < c->site.n_slices; i++) {
            struct lora_factors *f = &table[s * LORA_LINEARS + i];
            if (s == 2 && i == 1) continue;
            const int r = c->sizes.R >> s ? c->sizes.R >> s : 1;
            *f = (struct lora_factors){.a = a[s], .b = b[s], .R = r, .scale = 0.5f + (float)s};
            f->dtype = (int32_t)stored_as(maker, dtype);
            if (s == 1 && vectors) {
                f->g = vectors;
                f->b_bias = vectors + N;
                f->bias_delta = vectors + 2 * N;
            }
            if (s < maker->n_adapters)
                factor_elements += (double)r * (double)(c->kind == CUSTOM_LORA_SHRINK ? K : N);
        }
    }
    c->lora.factors = put(maker, table, sizeof table);
    c->lora.expands_more = vectors != NULL;
    c->bytes = factor_elements * (double)dtype_bytes(dtype);
}

static void make_lora(struct maker *maker)
{
    struct op_case *c = maker->c;
    const struct op_sizes *sizes = &c->sizes;
    const size_t T = (size_t)sizes->T;
    const enum dtype dtype = maker->types.activations;

    c->site = (struct lora_site){.linear = LORA_Q, .n_slices = LORA_SLICES_MAX, .K = sizes->K};
    for (int i = 0; i < LORA_SLICES_MAX; i++) {
        c->site.offset[i] = c->site.N;
        c->site.width[i] = sizes->N;
        c->site.N += sizes->N;
    }
    c->lora = (struct lora_view){.L = 1, .max_rank = sizes->R, .n_rows = sizes->T};
    make_segments(maker);
    make_factors(maker);
    if (sizes->more) c->site.bias = random_array(maker, (size_t)c->site.N, DTYPE_F32);
    const size_t n_h = T * LORA_SLICES_MAX * (size_t)sizes->R;
    if (c->kind == CUSTOM_LORA_SHRINK) {
        tensor(maker, "h", n_h, DTYPE_F32, true);
        tensor(maker, "x", T * (size_t)sizes->K, dtype, false);
        c->bytes += (double)c->lora.n_tokens *
                    (sizes->K * size_of(&maker->types) + 4.0 * LORA_SLICES_MAX * sizes->R);
    } else {
        tensor(maker, "y", T * (size_t)c->site.N, dtype, true);
        tensor(maker, "h", n_h, DTYPE_F32, false);
        c->bytes += (double)c->lora.n_tokens *
                    (2.0 * c->site.N * size_of(&maker->types) + 4.0 * LORA_SLICES_MAX * sizes->R);
    }
}

mlora_status op_case_make(struct op_case *out, struct device *dev, enum custom_kind kind,
                          const struct op_sizes *sizes, const struct op_types *types, bool as_f32,
                          uint64_t seed)
{
    struct maker maker = {.c = out, .types = *types, .as_f32 = as_f32, .status = MLORA_OK};

    *out = (struct op_case){.dev = dev, .kind = kind, .sizes = *sizes, .state = seed};
    out->dtype = stored_as(&maker, types->activations);
    switch (kind) {
    case CUSTOM_SILU_MUL:
        make_silu_mul(&maker);
        break;
    case CUSTOM_ADD_RMS_NORM:
        make_add_rms_norm(&maker);
        break;
    case CUSTOM_MATMUL:
        make_matmul(&maker);
        break;
    case CUSTOM_ROPE:
        make_rope(&maker);
        break;
    default:
        make_lora(&maker);
        break;
    }
    return maker.status;
}

void op_case_free(struct op_case *c)
{
    for (int i = 0; i < c->n_memory; i++) c->dev->ops->free(c->dev, c->memory[i]);
    *c = (struct op_case){0};
}

struct op_sizes op_sizes_tiny(void)
{
    return (struct op_sizes){
        .T = 5, .D = 16, .F = 24, .N = 8, .K = 16, .H = 2, .G = 1, .d = 8, .R = 4};
}

/* ---- running -------------------------------------------------------------------------------- */

void op_case_run(const struct op_case *c, const struct kernels *ops)
{
    struct device *dev = c->dev;
    const struct op_tensor *tensors = c->tensors;
    const int T = c->sizes.T;

    switch (c->kind) {
    case CUSTOM_SILU_MUL:
        ops->silu_mul(dev, tensors[0].data, tensors[1].data, c->dtype, T, c->sizes.F, c->dtype);
        break;
    case CUSTOM_ADD_RMS_NORM:
        ops->add_rms_norm(dev, tensors[0].data, tensors[1].data, tensors[2].data, c->dtype,
                          c->vector, T, c->sizes.D, 1e-5f, c->dtype);
        break;
    case CUSTOM_MATMUL:
        ops->matmul(dev, tensors[0].data, c->dtype, tensors[1].data, &c->w, c->vector, T, c->dtype);
        break;
    case CUSTOM_ROPE:
        ops->rope(dev, tensors[0].data, &c->rope, &c->kv, &c->batch, &c->heads, c->dtype);
        break;
    case CUSTOM_LORA_SHRINK:
        ops->lora_shrink(dev, tensors[0].data, tensors[1].data, &c->lora, &c->site, 0, c->dtype);
        break;
    default:
        ops->lora_expand(dev, tensors[0].data, tensors[1].data, &c->lora, &c->site, 0, c->dtype);
        break;
    }
}

/* ---- comparing ------------------------------------------------------------------------------ */

static void compare_tensor(struct op_difference *worst, const struct op_tensor *tensor,
                           const char *got, const char *want)
{
    const double unit = tensor->dtype == DTYPE_F32 ? 1e-5 : 1.0 / 256;
    double largest = 0;

    for (size_t i = 0; i < tensor->n; i++)
        largest = fmax(largest, fabs((double)dtype_load(want, DTYPE_F32, i)));
    for (size_t i = 0; i < tensor->n; i++) {
        const double a = (double)dtype_load(got, tensor->dtype, i);
        const double b = (double)dtype_load(want, DTYPE_F32, i);
        const double allowed = tensor->is_output ? unit * fabs(b) + 3e-5 * largest : 0;
        const double off = fabs(a - b);
        if (off == 0) continue;
        const double error = allowed > 0 && !isnan(off) ? off / allowed : (double)INFINITY;
        if (worst->tensor && error <= worst->error) continue;
        *worst = (struct op_difference){tensor->name, i, a, b, error};
    }
}

mlora_status op_case_compare(struct op_difference *out, const struct op_case *got,
                             const struct op_case *want)
{
    mlora_status status = got->dev->ops->sync(got->dev);

    *out = (struct op_difference){0};
    if (status == MLORA_OK) status = want->dev->ops->sync(want->dev);
    for (int i = 0; i < got->n_tensors && status == MLORA_OK; i++) {
        const struct op_tensor *a = &got->tensors[i], *b = &want->tensors[i];
        const size_t bytes = a->n * dtype_bytes(a->dtype);
        char *host = malloc(bytes + b->n * sizeof(float));
        if (!host) return error_set(MLORA_ENOMEM, "out of memory to compare results");
        got->dev->ops->download(got->dev, host, a->data, bytes);
        want->dev->ops->download(want->dev, host + bytes, b->data, b->n * sizeof(float));
        status = got->dev->ops->sync(got->dev);
        if (status == MLORA_OK) compare_tensor(out, a, host, host + bytes);
        free(host);
    }
    return status;
}

mlora_status op_case_try(struct device *dev, const mlora_op_source *source)
{
    const struct op_sizes sizes = op_sizes_tiny();
    const struct op_types types = {DTYPE_F32, DTYPE_F32};
    struct op_case c = {0};

    mlora_status status = custom_open(dev, source, 1);
    for (int kind = 0; kind < CUSTOM_KINDS && status == MLORA_OK; kind++) {
        if (!custom_op(dev, (enum custom_kind)kind)) continue;
        status = op_case_make(&c, dev, (enum custom_kind)kind, &sizes, &types, false, 1);
        if (status == MLORA_OK) op_case_run(&c, dev->ops);
        if (status == MLORA_OK) status = dev->ops->sync(dev);
        op_case_free(&c);
    }
    dev->ops->close(dev);
    return status;
}
