#include "kernels/custom.h"

#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/cpu/device.h"

struct custom_item {
    const mlora_op *op; /* NULL: not replaced */
    int (*run)(const mlora_op_call *call, const void *arguments);
    void *library;
    void *state;
    bool is_open;
    char *path;
};

struct custom {
    const struct kernels *ops; /* the device's own */
    struct kernels table;
    struct custom_item items[CUSTOM_KINDS];
    const struct custom_item *failed; /* the first: ops from files do nothing after it */
    int failed_code;
};

static const char *const names[CUSTOM_KINDS] = {"silu_mul", "add_rms_norm", "matmul",
                                                "rope",     "lora_shrink",  "lora_expand"};

const char *custom_name(enum custom_kind kind)
{
    return names[kind];
}

mlora_status custom_find(enum custom_kind *out, const char *name)
{
    for (int i = 0; i < CUSTOM_KINDS; i++) {
        *out = (enum custom_kind)i;
        if (strcmp(names[i], name) == 0) return MLORA_OK;
    }
    return error_set(MLORA_EINVAL,
                     "unknown op \"%s\": silu_mul, add_rms_norm, matmul, rope, lora_shrink and "
                     "lora_expand can be replaced",
                     name);
}

/* ---- calls ---------------------------------------------------------------------------------- */

static void share_out(const mlora_op_call *call, int n_items, int grain, mlora_op_part part,
                      void *context)
{
    if (n_items > 0) cpu_parallel(call->device, n_items, grain > 0 ? grain : 1, part, context);
}

static void run_item(struct device *dev, enum custom_kind kind, const void *arguments)
{
    struct custom *custom = dev->custom;
    const struct custom_item *item = &custom->items[kind];
    mlora_op_call call = {.state = item->state, .device = dev};

    if (custom->failed) return;
    if (custom->ops->stream) {
        call.stream = custom->ops->stream(dev);
        if (!call.stream) return;
    } else {
        call.n_threads = threads_count(cpu_device(dev)->threads);
        call.parallel = share_out;
    }
    custom->failed_code = item->run(&call, arguments);
    if (custom->failed_code != 0) custom->failed = item;
}

static void custom_silu_mul(struct device *dev, void *y, const void *gate_up,
                            enum dtype gate_up_dtype, int T, int F, enum dtype dtype)
{
    const mlora_op_silu_mul op = {y, gate_up, T, F, (int32_t)dtype};
    assert(gate_up_dtype == dtype);
    if (T > 0) run_item(dev, CUSTOM_SILU_MUL, &op);
}

static void custom_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                                enum dtype delta_dtype, const float *weight, int T, int D,
                                float eps, enum dtype dtype)
{
    const mlora_op_add_rms_norm op = {y, x, delta, weight, T, D, eps, (int32_t)dtype};
    assert(!delta || delta_dtype == dtype);
    if (T > 0) run_item(dev, CUSTOM_ADD_RMS_NORM, &op);
}

static void custom_matmul(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                          const struct matrix *w, const float *bias, int T, enum dtype dtype)
{
    const mlora_op_matmul op = {.y = y,
                                .x = x,
                                .w = w->data,
                                .bias = bias,
                                .T = T,
                                .N = w->N,
                                .K = w->K,
                                .y_dtype = (int32_t)y_dtype,
                                .x_dtype = (int32_t)dtype,
                                .w_dtype = (int32_t)w->dtype};
    if (T > 0) run_item(dev, CUSTOM_MATMUL, &op);
}

static void custom_rope(struct device *dev, void *qkv, const struct rope_view *rope,
                        const struct kv_view *kv, const struct batch_view *batch,
                        const struct heads *heads, enum dtype dtype)
{
    _Static_assert(KV_BLOCK == MLORA_OP_KV_BLOCK, "kernels/mlora_op.h says how the cache lies");
    const mlora_op_rope op = {.qkv = qkv,
                              .k = kv->k,
                              .v = kv->v,
                              .frequency = rope->frequency,
                              .position = batch->position,
                              .row = batch->row,
                              .block_table = kv->block_table,
                              .T = batch->T,
                              .H = heads->H,
                              .G = heads->G,
                              .d = heads->d,
                              .max_blocks = kv->max_blocks,
                              .amplitude = rope->amplitude,
                              .dtype = (int32_t)dtype,
                              .kv_dtype = (int32_t)kv->dtype};
    if (batch->T > 0) run_item(dev, CUSTOM_ROPE, &op);
}

/* Ops see the table of factors as it lies in the device's memory. */
#define SAME_PLACE(member)                                                                         \
    _Static_assert(offsetof(mlora_op_factors, member) == offsetof(struct lora_factors, member),    \
                   "mlora_op_factors is struct lora_factors")
SAME_PLACE(a);
SAME_PLACE(b);
SAME_PLACE(R);
SAME_PLACE(dtype);
SAME_PLACE(scale);
SAME_PLACE(g);
SAME_PLACE(b_bias);
SAME_PLACE(bias_delta);
_Static_assert(sizeof(mlora_op_factors) == sizeof(struct lora_factors),
               "mlora_op_factors is struct lora_factors");

static mlora_op_lora lora_of(const struct lora_view *lora, const struct lora_site *site, int layer)
{
    const struct lora_factors *factors =
        lora->factors + (size_t)layer * LORA_LINEARS + (size_t)site->linear;
    mlora_op_lora out = {.factors = (const mlora_op_factors *)factors,
                         .slot_pitch = lora->L * LORA_LINEARS,
                         .T = lora->n_rows,
                         .n_slices = site->n_slices,
                         .K = site->K,
                         .N = site->N,
                         .bias = site->bias,
                         .n_segments = lora->n_segments,
                         .n_tokens = lora->n_tokens,
                         .max_rank = lora->max_rank,
                         .max_segment = lora->max_segment,
                         .slot = lora->slot,
                         .segment_slot = lora->segment_slot,
                         .segment_start = lora->segment_start,
                         .order = lora->order,
                         .expands_more = lora->expands_more};

    for (int i = 0; i < LORA_SLICES_MAX; i++) {
        out.offset[i] = site->offset[i];
        out.width[i] = site->width[i];
    }
    return out;
}

static void custom_lora_shrink(struct device *dev, float *h, const void *x,
                               const struct lora_view *lora, const struct lora_site *site,
                               int layer, enum dtype dtype)
{
    const mlora_op_lora_shrink op = {h, x, lora_of(lora, site, layer), (int32_t)dtype};
    if (lora->n_tokens > 0 && lora->max_rank > 0) run_item(dev, CUSTOM_LORA_SHRINK, &op);
}

static void custom_lora_expand(struct device *dev, void *y, const float *h,
                               const struct lora_view *lora, const struct lora_site *site,
                               int layer, enum dtype dtype)
{
    const mlora_op_lora_expand op = {y, h, lora_of(lora, site, layer), (int32_t)dtype};
    if (lora->n_tokens > 0 && (lora->max_rank > 0 || lora->expands_more))
        run_item(dev, CUSTOM_LORA_EXPAND, &op);
}

/* Where one of the two is replaced, both are called. */
static void custom_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up,
                                        enum dtype gate_up_dtype, const float *h,
                                        const struct lora_view *lora, const struct lora_site *site,
                                        int layer, int T, enum dtype dtype)
{
    const struct kernels *table = &dev->custom->table;
    table->lora_expand(dev, gate_up, h, lora, site, layer, gate_up_dtype);
    table->silu_mul(dev, y, gate_up, gate_up_dtype, T, site->width[0], dtype);
}

/* ---- the device ----------------------------------------------------------------------------- */

/* `status` of the device, or what an op from a file has returned. */
static mlora_status report(const struct custom *custom, mlora_status status)
{
    if (status != MLORA_OK || !custom->failed) return status;
    return error_set(MLORA_EDEVICE, "%s: op %s failed: it returned %d", custom->failed->path,
                     custom->failed->op->name, custom->failed_code);
}

static mlora_status custom_sync(struct device *dev)
{
    return report(dev->custom, dev->custom->ops->sync(dev));
}

static mlora_status custom_wait(struct device *dev, int fence)
{
    return report(dev->custom, dev->custom->ops->wait(dev, fence));
}

static void free_custom(struct custom *custom)
{
    for (int i = 0; i < CUSTOM_KINDS; i++) {
        if (custom->items[i].library) dlclose(custom->items[i].library);
        free(custom->items[i].path);
    }
    free(custom);
}

static void close_items(struct custom *custom)
{
    for (int i = 0; i < CUSTOM_KINDS; i++) {
        struct custom_item *item = &custom->items[i];
        if (item->is_open && item->op->close) item->op->close(item->state);
        item->is_open = false;
    }
}

/* Recordings hold kernels of the libraries: these are unloaded last. */
static void custom_close(struct device *dev)
{
    struct custom *custom = dev->custom;

    if (custom->ops->stream && custom->ops->stream(dev)) custom->ops->sync(dev);
    close_items(custom);
    dev->ops = custom->ops;
    dev->custom = NULL;
    dev->ops->close(dev);
    free_custom(custom);
}

static void fill_table(struct custom *custom, const struct kernels *ops)
{
    const struct custom_item *items = custom->items;
    struct kernels *table = &custom->table;

    custom->ops = ops;
    *table = *ops;
    table->close = custom_close;
    table->sync = custom_sync;
    table->wait = custom_wait;
    if (items[CUSTOM_SILU_MUL].op) table->silu_mul = custom_silu_mul;
    if (items[CUSTOM_ADD_RMS_NORM].op) {
        table->add_rms_norm = custom_add_rms_norm;
        table->lora_add_rms_norm = NULL; /* no op from a file knows of norms of adapters */
    }
    if (items[CUSTOM_MATMUL].op) table->matmul = custom_matmul;
    if (items[CUSTOM_ROPE].op) table->rope = custom_rope;
    if (items[CUSTOM_LORA_SHRINK].op) table->lora_shrink = custom_lora_shrink;
    if (items[CUSTOM_LORA_EXPAND].op) table->lora_expand = custom_lora_expand;
    if (items[CUSTOM_SILU_MUL].op || items[CUSTOM_LORA_EXPAND].op)
        table->lora_expand_silu_mul = custom_lora_expand_silu_mul;
}

/* ---- files ---------------------------------------------------------------------------------- */

static mlora_status load_library(void **out, const char *path)
{
    char resolved[PATH_MAX]; /* with a slash in it: a bare name would be looked for elsewhere */

    *out = NULL;
    if (!realpath(path, resolved))
        return error_set(MLORA_EIO, "%s: %s; the shared object of an op is needed", path,
                         strerror(errno));
    *out = dlopen(resolved, RTLD_NOW | RTLD_LOCAL);
    if (*out) return MLORA_OK;

    const char *why = dlerror();
    const size_t n = strlen(resolved);
    if (!why) why = "no reason was given";
    if (strncmp(why, resolved, n) == 0 && strncmp(why + n, ": ", 2) == 0) why += n + 2;
    return error_set(MLORA_EFORMAT, "%s: is not a shared object that can be loaded: %s", path, why);
}

/* What the file says it is; of another version, only `abi` is where it is looked for. */
static mlora_status check_op(const mlora_op *op, const char *path)
{
    if (!op)
        return error_set(MLORA_EFORMAT,
                         "%s: has no symbol " MLORA_OP_SYMBOL ": a MLORA_OP_EXPORT of "
                         "kernels/mlora_op.h is needed",
                         path);
    if (op->abi != MLORA_OP_ABI)
        return error_set(MLORA_EFORMAT,
                         "%s: its ABI version is %u, %d is needed: build it with this mlora's "
                         "kernels/mlora_op.h",
                         path, (unsigned)op->abi, MLORA_OP_ABI);
    if (!op->name || !op->backend || !op->run)
        return error_set(MLORA_EFORMAT, "%s: " MLORA_OP_SYMBOL ".%s is NULL", path,
                         !op->name      ? "name"
                         : !op->backend ? "backend"
                                        : "run");
    return MLORA_OK;
}

static mlora_status load_item(struct custom *custom, const mlora_op_source *source,
                              const char *backend)
{
    const char *path = source->path;
    enum custom_kind kind, wanted = CUSTOM_KINDS;
    void *library = NULL;

    if (!path || !path[0])
        return error_set(MLORA_EINVAL, "op %s has no path: its shared object is needed",
                         source->name ? source->name : "");
    mlora_status status = source->name ? custom_find(&wanted, source->name) : MLORA_OK;
    if (status == MLORA_OK) status = load_library(&library, path);
    if (status != MLORA_OK) return status;

    const mlora_op *op = dlsym(library, MLORA_OP_SYMBOL);
    status = check_op(op, path);
    if (status == MLORA_OK) {
        status = custom_find(&kind, op->name);
        if (status != MLORA_OK) status = error_prefix(MLORA_EFORMAT, "%s", path);
    }
    if (status != MLORA_OK) goto failed;
    if (source->name && wanted != kind) {
        status = error_set(MLORA_EINVAL, "%s: is the op %s, it was given for %s", path, op->name,
                           source->name);
        goto failed;
    }
    if (backend && strcmp(op->backend, backend) != 0) {
        status = error_set(MLORA_EUNSUPPORTED,
                           "%s: is for the backend %.16s, the engine's is %s: choose that backend, "
                           "or build the op for this one",
                           path, op->backend, backend);
        goto failed;
    }
    struct custom_item *item = &custom->items[kind];
    if (item->op) {
        status = error_set(MLORA_EINVAL, "%s: op %s is replaced by %s already", path, op->name,
                           item->path);
        goto failed;
    }
    item->path = strdup(path);
    if (!item->path) {
        status = error_set(MLORA_ENOMEM, "out of memory: an op");
        goto failed;
    }
    item->op = op;
    item->run = op->run;
    item->library = library;
    return MLORA_OK;

failed:
    dlclose(library);
    return status;
}

static mlora_status open_items(struct custom *custom)
{
    for (int i = 0; i < CUSTOM_KINDS; i++) {
        struct custom_item *item = &custom->items[i];
        const int code = item->op && item->op->open ? item->op->open(&item->state) : 0;
        if (code != 0)
            return error_set(MLORA_EFORMAT, "%s: op %s did not open: it returned %d", item->path,
                             item->op->name, code);
        item->is_open = item->op != NULL;
    }
    return MLORA_OK;
}

/* A backend of NULL: any, as nothing of it is run. */
static mlora_status load_items(struct custom **out, const mlora_op_source *sources, int n,
                               const char *backend)
{
    mlora_status status = MLORA_OK;

    *out = calloc(1, sizeof **out);
    if (!*out) return error_set(MLORA_ENOMEM, "out of memory: a table of ops");
    for (int i = 0; i < n && status == MLORA_OK; i++)
        status = load_item(*out, &sources[i], backend);
    if (status != MLORA_OK) free_custom(*out);
    return status;
}

mlora_status custom_describe(struct custom_about *out, const mlora_op_source *source)
{
    struct custom *custom;

    *out = (struct custom_about){0};
    const mlora_status status = load_items(&custom, source, 1, NULL);
    if (status != MLORA_OK) return status;
    for (int i = 0; i < CUSTOM_KINDS; i++) {
        const mlora_op *op = custom->items[i].op;
        if (!op) continue;
        out->kind = (enum custom_kind)i;
        snprintf(out->backend, sizeof out->backend, "%s", op->backend);
        out->is_another = op->reference != NULL;
    }
    free_custom(custom);
    return MLORA_OK;
}

mlora_status custom_open(struct device *dev, const mlora_op_source *sources, int n)
{
    struct custom *custom;

    if (n == 0) return MLORA_OK;
    mlora_status status = load_items(&custom, sources, n, dev->backend);
    if (status != MLORA_OK) return status;
    if (dev->ops->stream) dev->ops->stream(dev); /* open() meets the device that run() will */
    status = open_items(custom);
    if (status != MLORA_OK) {
        close_items(custom);
        free_custom(custom);
        return status;
    }
    fill_table(custom, dev->ops);
    dev->custom = custom;
    dev->ops = &custom->table;
    dev->exact_tokens = 0; /* an op from a file knows one type of activations */
    return MLORA_OK;
}

mlora_status custom_open_references(struct device *dev, const mlora_op_source *sources, int n)
{
    struct custom *custom;

    const mlora_status status = load_items(&custom, sources, n, NULL);
    if (status != MLORA_OK) return status;
    for (int i = 0; i < CUSTOM_KINDS; i++) {
        struct custom_item *item = &custom->items[i];
        if (item->op && item->op->reference)
            item->run = item->op->reference;
        else
            item->op = NULL;
    }
    fill_table(custom, dev->ops);
    dev->custom = custom;
    dev->ops = &custom->table;
    return MLORA_OK;
}

const mlora_op *custom_op(const struct device *dev, enum custom_kind kind)
{
    return dev->custom ? dev->custom->items[kind].op : NULL;
}

const struct kernels *custom_builtin(const struct device *dev)
{
    return dev->custom ? dev->custom->ops : dev->ops;
}
