#include "kernels/profile.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { LINES_MAX = 128, NOTES_MAX = MARKS };

/* What is read from the device to count with when the step is over. */
enum note_kind { NOTE_PLAIN, NOTE_ATTENTION, NOTE_SHRINK, NOTE_EXPAND };

/* One call of an op, until its time is known. */
struct note {
    const char *op;
    int line, from, to; /* marks */
    enum note_kind kind;
    double bytes, flops; /* without what `kind` adds */
    /* NOTE_ATTENTION */
    struct batch_view batch;
    struct heads heads;
    double kv_bytes; /* of an element of the cache */
    /* NOTE_SHRINK, NOTE_EXPAND */
    struct lora_view lora;
    struct lora_site site;
    int layer;
};

struct profile {
    const struct kernels *ops; /* the device's own */
    struct kernels timed;
    bool on;
    bool has_ranges, in_layer; /* ranges for profilers; one of a layer is open */
    uint64_t n_recordings;
    struct profile_line lines[LINES_MAX];
    int n_lines;
    struct note notes[NOTES_MAX];
    int n_notes, n_marks;
    bool fresh;         /* the last mark is not where the next op begins */
    double own_seconds; /* what a mark itself takes, between two ops of a recording */
};

/* ---- notes ---------------------------------------------------------------------------------- */

static struct profile_line *find_line(struct profile *profile, const char *op, const char *shape)
{
    for (int i = 0; i < profile->n_lines; i++) {
        struct profile_line *line = &profile->lines[i];
        if (strcmp(line->op, op) == 0 && strcmp(line->shape, shape) == 0) return line;
    }
    if (profile->n_lines == LINES_MAX) return &profile->lines[LINES_MAX - 1];
    struct profile_line *line = &profile->lines[profile->n_lines++];
    *line = (struct profile_line){.op = op};
    snprintf(line->shape, sizeof line->shape, "%s", shape);
    return line;
}

/* Begin a range of that name; NULL ends it. */
static void open_range(struct device *dev, const char *name)
{
    const struct profile *profile = dev->profile;
    if (profile->has_ranges && profile->ops->range) profile->ops->range(dev, name);
}

/* Before an op: NULL when it is not to be timed. */
static struct note *begin(struct device *dev, const char *op, double bytes, double flops)
{
    struct profile *profile = dev->profile;

    if (!profile->on || profile->n_notes == NOTES_MAX || profile->n_marks + 2 > MARKS) return NULL;
    if (profile->fresh) profile->ops->mark(dev, profile->n_marks++);
    profile->fresh = false;
    struct note *note = &profile->notes[profile->n_notes++];
    *note = (struct note){.op = op, .from = profile->n_marks - 1, .bytes = bytes, .flops = flops};
    open_range(dev, op);
    return note;
}

/* After it. */
__attribute__((format(printf, 3, 4))) static void end(struct device *dev, struct note *note,
                                                      const char *shape, ...)
{
    struct profile *profile = dev->profile;
    char text[PROFILE_SHAPE];
    va_list args;

    if (!note) return;
    va_start(args, shape);
    vsnprintf(text, sizeof text, shape, args);
    va_end(args);
    note->line = (int)(find_line(profile, note->op, text) - profile->lines);
    note->to = profile->n_marks++;
    profile->ops->mark(dev, note->to); /* starts what the op has left to the next one */
    open_range(dev, NULL);
}

/* Each row reads its sequence's keys and values once; a token attends to itself and all before. */
static void count_attention(struct note *note, struct device *dev)
{
    const int Q = note->batch.Q, window = note->heads.window;
    const double width = (double)note->heads.G * note->heads.d * note->kv_bytes;
    int32_t *host = malloc((2 * (size_t)Q + 1) * sizeof *host);

    if (!host) return;
    const int32_t *kv_len = host, *start = host + Q;
    dev->profile->ops->download(dev, host, note->batch.kv_len, (size_t)Q * sizeof *host);
    dev->profile->ops->download(dev, host + Q, note->batch.row_start,
                                ((size_t)Q + 1) * sizeof *host);
    for (int q = 0; q < Q; q++) {
        const int n = start[q + 1] - start[q];
        double seen = kv_len[q], pairs = n * (2.0 * kv_len[q] - n + 1) / 2;
        if (window > 0 && seen > window + n) seen = window + n;
        if (window > 0 && pairs > (double)n * window) pairs = (double)n * window;
        note->bytes += 2 * width * seen;
        note->flops += 4.0 * note->heads.H * note->heads.d * pairs;
    }
    free(host);
}

/* Each adapter's factors are read once; its tokens' part of h is read or written. */
static void count_lora(struct note *note, struct device *dev)
{
    const struct lora_view *lora = &note->lora;
    const size_t n = (size_t)lora->n_segments;
    int32_t *host = malloc((2 * n + 1) * sizeof *host);

    if (!host) return;
    const int32_t *slot = host, *start = host + n;
    dev->profile->ops->download(dev, host, lora->segment_slot, n * sizeof *host);
    dev->profile->ops->download(dev, host + n, lora->segment_start, (n + 1) * sizeof *host);
    for (size_t s = 0; s < n; s++) {
        if (slot[s] < 0) continue;
        struct lora_factors factors[LORA_LINEARS];
        const size_t at = ((size_t)slot[s] * (size_t)lora->L + (size_t)note->layer) * LORA_LINEARS;
        const double T = start[s + 1] - start[s];
        dev->profile->ops->download(dev, factors, &lora->factors[at], sizeof factors);
        for (int i = 0; i < note->site.n_slices; i++) {
            const struct lora_factors *f = &factors[note->site.linear + i];
            const double width = note->kind == NOTE_SHRINK ? note->site.K : note->site.width[i];
            if (!f->a) continue;
            note->bytes += width * f->R * (double)dtype_bytes((enum dtype)f->dtype);
            note->bytes += T * f->R * sizeof(float);
            note->flops += 2 * T * f->R * width;
        }
    }
    free(host);
}

/* The step is over: read the clock. */
static void take_notes(struct device *dev)
{
    struct profile *profile = dev->profile;

    for (int i = 0; i < profile->n_notes; i++) {
        struct note *note = &profile->notes[i];
        struct profile_line *line = &profile->lines[note->line];
        const struct lap lap = profile->ops->elapsed(dev, note->from, note->to);
        if (note->kind == NOTE_ATTENTION) count_attention(note, dev);
        if (note->kind == NOTE_SHRINK || note->kind == NOTE_EXPAND) count_lora(note, dev);
        line->n_calls++;
        line->n_launches = lap.launches < 0 ? -1 : line->n_launches + lap.launches;
        line->seconds +=
            lap.seconds > profile->own_seconds ? lap.seconds - profile->own_seconds : 0;
        line->bytes += note->bytes;
        line->flops += note->flops;
    }
    profile->n_notes = profile->n_marks = 0;
    profile->fresh = true;
}

/* ---- memory, recordings --------------------------------------------------------------------- */

static void timed_close(struct device *dev)
{
    struct profile *profile = dev->profile;

    dev->ops = profile->ops;
    dev->profile = NULL;
    free(profile);
    dev->ops->close(dev);
}

static void timed_upload(struct device *dev, void *to, const void *from, size_t bytes)
{
    struct note *note = begin(dev, "upload", 0, 0);
    dev->profile->ops->upload(dev, to, from, bytes);
    end(dev, note, "%s", "");
}

static void timed_download(struct device *dev, void *to, const void *from, size_t bytes)
{
    dev->profile->ops->download(dev, to, from, bytes);
    dev->profile->fresh = true; /* it has waited */
}

static mlora_status timed_sync(struct device *dev)
{
    const mlora_status status = dev->profile->ops->sync(dev);

    if (status == MLORA_OK) take_notes(dev);
    return status;
}

static mlora_status timed_wait(struct device *dev, int fence)
{
    const mlora_status status = dev->profile->ops->wait(dev, fence);

    if (status == MLORA_OK) take_notes(dev);
    return status;
}

/* Every step is recorded anew, as marks belong to one step: under a key that is seen first, then
 * met again, at which recording begins. */
static void begin_recording(struct device *dev)
{
    struct profile *profile = dev->profile;
    const uint64_t own[2] = {0x70726f66696c65u, profile->n_recordings++};

    profile->ops->replay(dev, own, sizeof own);
    profile->ops->replay(dev, own, sizeof own);
    profile->fresh = true;
}

static bool timed_replay(struct device *dev, const void *key, size_t bytes)
{
    if (!dev->profile->on) return dev->profile->ops->replay(dev, key, bytes);
    if (dev->profile->has_ranges) return false; /* a profiler sees only what is launched inside */
    begin_recording(dev);
    return false;
}

static void timed_record_end(struct device *dev)
{
    dev->profile->ops->record_end(dev);
    dev->profile->fresh = true;
}

/* ---- ops ------------------------------------------------------------------------------------ */

static double matrix_bytes(const struct matrix *w)
{
    return (double)w->N * w->K * (double)dtype_bytes(w->dtype);
}

static void timed_metadata(struct device *dev, const struct batch_view *batch)
{
    struct note *note = begin(dev, "metadata", 4.0 * (2 * batch->Q + 1) + 8.0 * batch->T, 0);
    dev->profile->ops->metadata(dev, batch);
    end(dev, note, "%d rows", batch->Q);
}

static void timed_embed(struct device *dev, void *y, const struct matrix *table, const int32_t *ids,
                        int T, enum dtype dtype)
{
    const double row = (double)(dtype_bytes(table->dtype) + dtype_bytes(dtype)) * table->K;
    struct note *note = begin(dev, "embed", row * T, 0);
    dev->profile->ops->embed(dev, y, table, ids, T, dtype);
    end(dev, note, "%d x %d", T, table->K);
}

static double norm_bytes(int T, int D, const void *delta, enum dtype delta_dtype, enum dtype dtype)
{
    const double added = delta ? (double)(dtype_bytes(delta_dtype) + sizeof(float)) : 0;
    return (double)T * D * ((double)(sizeof(float) + dtype_bytes(dtype)) + added); /* x is f32 */
}

static void timed_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                               enum dtype delta_dtype, const float *weight, int T, int D, float eps,
                               enum dtype dtype)
{
    struct note *note = begin(dev, "add_rms_norm", norm_bytes(T, D, delta, delta_dtype, dtype), 0);
    dev->profile->ops->add_rms_norm(dev, y, x, delta, delta_dtype, weight, T, D, eps, dtype);
    end(dev, note, "%d x %d", T, D);
}

static void timed_matmul(struct device *dev, void *y, enum dtype y_dtype, const void *x,
                         const struct matrix *w, const float *bias, int T, enum dtype dtype)
{
    const double in = (double)T * w->K * (double)dtype_bytes(dtype);
    const double out = (double)T * w->N * (double)dtype_bytes(y_dtype);
    struct note *note = begin(dev, "matmul", matrix_bytes(w) + in + out, 2.0 * T * w->N * w->K);
    dev->profile->ops->matmul(dev, y, y_dtype, x, w, bias, T, dtype);
    end(dev, note, "%d x %d, T %d", w->N, w->K, T);
}

static double head_bytes(const struct heads *heads, int T, enum dtype dtype)
{
    return (double)T * heads->d * (double)dtype_bytes(dtype);
}

static void timed_head_norm(struct device *dev, void *qkv, const float *q_weight,
                            const float *k_weight, const struct heads *heads, int T, float eps,
                            enum dtype dtype)
{
    struct note *note =
        begin(dev, "head_norm", 2 * head_bytes(heads, T, dtype) * (heads->H + heads->G), 0);
    dev->profile->ops->head_norm(dev, qkv, q_weight, k_weight, heads, T, eps, dtype);
    end(dev, note, "%d x %d heads", T, heads->H + heads->G);
}

static void timed_rope(struct device *dev, void *qkv, const struct rope_view *rope,
                       const struct kv_view *kv, const struct batch_view *batch,
                       const struct heads *heads, enum dtype dtype)
{
    const double n = 2 * heads->H + 3 * heads->G; /* q in and out; k in, out; v in */
    const double kept = 2.0 * heads->G * head_bytes(heads, batch->T, kv->dtype);
    struct note *note = begin(dev, "rope", n * head_bytes(heads, batch->T, dtype) + kept, 0);
    dev->profile->ops->rope(dev, qkv, rope, kv, batch, heads, dtype);
    end(dev, note, "%d x %d heads", batch->T, heads->H + 2 * heads->G);
}

static void timed_attention(struct device *dev, void *y, const void *qkv, enum dtype qkv_dtype,
                            const struct kv_view *kv, const struct batch_view *batch,
                            const struct heads *heads, enum dtype dtype)
{
    const double in = heads->H * head_bytes(heads, batch->T, qkv_dtype);
    const double out = heads->H * head_bytes(heads, batch->T, dtype);
    struct note *note = begin(dev, "attention", in + out, 0);
    dev->profile->ops->attention(dev, y, qkv, qkv_dtype, kv, batch, heads, dtype);
    if (note) {
        note->kind = NOTE_ATTENTION;
        note->batch = *batch;
        note->heads = *heads;
        note->kv_bytes = (double)dtype_bytes(kv->dtype);
    }
    end(dev, note, "%d tokens, %d rows", batch->T, batch->Q);
}

static double silu_bytes(int T, int F, enum dtype gate_up_dtype, enum dtype dtype)
{
    return (double)T * F * (double)(2 * dtype_bytes(gate_up_dtype) + dtype_bytes(dtype));
}

static void timed_silu_mul(struct device *dev, void *y, const void *gate_up,
                           enum dtype gate_up_dtype, int T, int F, enum dtype dtype)
{
    struct note *note = begin(dev, "silu_mul", silu_bytes(T, F, gate_up_dtype, dtype), 0);
    dev->profile->ops->silu_mul(dev, y, gate_up, gate_up_dtype, T, F, dtype);
    end(dev, note, "%d x %d", T, F);
}

static void timed_gather_rows(struct device *dev, void *y, const void *x, const int32_t *rows,
                              int Q, int D, enum dtype dtype)
{
    struct note *note = begin(dev, "gather_rows", 2.0 * Q * D * (double)dtype_bytes(dtype), 0);
    dev->profile->ops->gather_rows(dev, y, x, rows, Q, D, dtype);
    end(dev, note, "%d x %d", Q, D);
}

/* `width` elements of each token with an adapter are read or written. */
static struct note *begin_lora(struct device *dev, const char *op, enum note_kind kind,
                               double width, const struct lora_view *lora,
                               const struct lora_site *site, int layer, enum dtype dtype)
{
    struct note *note = begin(dev, op, lora->n_tokens * width * (double)dtype_bytes(dtype), 0);
    if (!note) return note;
    note->kind = kind;
    note->lora = *lora;
    note->site = *site;
    note->layer = layer;
    return note;
}

static void timed_lora_shrink(struct device *dev, float *h, const void *x,
                              const struct lora_view *lora, const struct lora_site *site, int layer,
                              enum dtype dtype)
{
    struct note *note =
        begin_lora(dev, "lora_shrink", NOTE_SHRINK, site->K, lora, site, layer, dtype);
    dev->profile->ops->lora_shrink(dev, h, x, lora, site, layer, dtype);
    end(dev, note, "%d slices of %d", site->n_slices, site->K);
}

static void timed_lora_expand(struct device *dev, void *y, const float *h,
                              const struct lora_view *lora, const struct lora_site *site, int layer,
                              enum dtype dtype)
{
    struct note *note =
        begin_lora(dev, "lora_expand", NOTE_EXPAND, 2.0 * site->N, lora, site, layer, dtype);
    dev->profile->ops->lora_expand(dev, y, h, lora, site, layer, dtype);
    end(dev, note, "%d slices to %d", site->n_slices, site->N);
}

static void timed_lora_expand_silu_mul(struct device *dev, void *y, void *gate_up,
                                       enum dtype gate_up_dtype, const float *h,
                                       const struct lora_view *lora, const struct lora_site *site,
                                       int layer, int T, enum dtype dtype)
{
    struct note *note =
        begin_lora(dev, "lora_expand_silu_mul", NOTE_EXPAND, 0, lora, site, layer, dtype);
    if (note) note->bytes = silu_bytes(T, site->width[0], gate_up_dtype, dtype);
    dev->profile->ops->lora_expand_silu_mul(dev, y, gate_up, gate_up_dtype, h, lora, site, layer, T,
                                            dtype);
    end(dev, note, "%d slices to %d", site->n_slices, site->N);
}

static void timed_sample(struct device *dev, int32_t *ids, const float *logits,
                         const struct sample_view *view, int V)
{
    struct note *note = begin(dev, "sample", 4.0 * view->Q * V, 0);
    dev->profile->ops->sample(dev, ids, logits, view, V);
    end(dev, note, "%d x %d", view->Q, V);
}

static void timed_logprobs(struct device *dev, float *logprob, int32_t *top_ids,
                           float *top_logprobs, const float *logits, const int32_t *target, int Q,
                           int V, int n)
{
    struct note *note = begin(dev, "logprobs", 4.0 * Q * V, 0);
    dev->profile->ops->logprobs(dev, logprob, top_ids, top_logprobs, logits, target, Q, V, n);
    end(dev, note, "%d x %d", Q, V);
}

static void timed_lora_embed(struct device *dev, void *y, float *h, const int32_t *ids,
                             const struct lora_view *lora, int D, enum dtype dtype)
{
    struct note *note =
        begin(dev, "lora_embed", (double)lora->n_tokens * D * (double)dtype_bytes(dtype), 0);
    dev->profile->ops->lora_embed(dev, y, h, ids, lora, D, dtype);
    end(dev, note, "%d x %d", lora->n_tokens, D);
}

static void timed_lora_head(struct device *dev, float *logits, const void *x,
                            const struct lora_view *lora, int V, int D, enum dtype dtype)
{
    struct note *note =
        begin(dev, "lora_head", (double)lora->n_tokens * D * (double)dtype_bytes(dtype), 0);
    dev->profile->ops->lora_head(dev, logits, x, lora, V, D, dtype);
    end(dev, note, "%d x %d", lora->n_tokens, V);
}

static void timed_lora_add_rms_norm(struct device *dev, void *y, float *x, const void *delta,
                                    enum dtype delta_dtype, const float *weight,
                                    const struct lora_view *lora, int layer, enum lora_norm norm,
                                    int T, int D, float eps, enum dtype dtype)
{
    struct note *note =
        begin(dev, "lora_add_rms_norm", norm_bytes(T, D, delta, delta_dtype, dtype), 0);
    dev->profile->ops->lora_add_rms_norm(dev, y, x, delta, delta_dtype, weight, lora, layer, norm,
                                         T, D, eps, dtype);
    end(dev, note, "%d x %d", T, D);
}

static void timed_lora_head_norm(struct device *dev, void *qkv, const float *q_weight,
                                 const float *k_weight, const struct lora_view *lora, int layer,
                                 const struct heads *heads, int T, float eps, enum dtype dtype)
{
    struct note *note =
        begin(dev, "lora_head_norm", 2 * head_bytes(heads, T, dtype) * (heads->H + heads->G), 0);
    dev->profile->ops->lora_head_norm(dev, qkv, q_weight, k_weight, lora, layer, heads, T, eps,
                                      dtype);
    end(dev, note, "%d x %d heads", T, heads->H + heads->G);
}

static void timed_extend_metadata(struct device *dev, const struct extend_view *extend)
{
    struct note *note =
        begin(dev, "extend_metadata", 8.0 * extend->bs + 20.0 * extend->capacity, 0);
    dev->profile->ops->extend_metadata(dev, extend);
    end(dev, note, "%d requests", extend->bs);
}

/* ---- the profile ---------------------------------------------------------------------------- */

mlora_status profile_open(struct device *dev, bool has_ranges)
{
    assert(!dev->profile);
    struct profile *profile = calloc(1, sizeof *profile);
    if (!profile) return error_set(MLORA_ENOMEM, "out of memory: a profile");

    struct kernels *timed = &profile->timed;
    profile->ops = dev->ops;
    profile->has_ranges = has_ranges;
    *timed = *dev->ops;
    timed->close = timed_close;
    timed->upload = timed_upload;
    timed->download = timed_download;
    timed->sync = timed_sync;
    timed->wait = timed_wait;
    timed->replay = timed_replay;
    timed->record_end = timed_record_end;
    timed->metadata = timed_metadata;
    timed->embed = timed_embed;
    timed->add_rms_norm = timed_add_rms_norm;
    timed->matmul = timed_matmul;
    timed->head_norm = timed_head_norm;
    timed->rope = timed_rope;
    timed->attention = timed_attention;
    timed->silu_mul = timed_silu_mul;
    timed->gather_rows = timed_gather_rows;
    timed->lora_shrink = timed_lora_shrink;
    timed->lora_expand = timed_lora_expand;
    timed->sample = timed_sample;
    timed->logprobs = timed_logprobs;
    if (dev->ops->lora_embed) timed->lora_embed = timed_lora_embed;
    if (dev->ops->lora_head) timed->lora_head = timed_lora_head;
    if (dev->ops->lora_add_rms_norm) timed->lora_add_rms_norm = timed_lora_add_rms_norm;
    if (dev->ops->lora_head_norm) timed->lora_head_norm = timed_lora_head_norm;
    timed->extend_metadata = timed_extend_metadata;
    timed->lora_expand_silu_mul = timed_lora_expand_silu_mul;
    dev->profile = profile;
    dev->ops = timed;
    return MLORA_OK;
}

/* Marks with nothing between them, after some that the recording's start delays. */
static double measure_marks(struct device *dev)
{
    enum { FIRST = 16, LAST = 48 };
    const struct kernels *ops = dev->profile->ops;

    begin_recording(dev);
    for (int i = 0; i <= LAST; i++) ops->mark(dev, i);
    ops->record_end(dev);
    if (ops->sync(dev) != MLORA_OK) return 0; /* the next sync says it again */
    return ops->elapsed(dev, FIRST, LAST).seconds / (LAST - FIRST);
}

void profile_start(struct device *dev)
{
    struct profile *profile = dev->profile;

    profile->own_seconds = measure_marks(dev);
    profile->on = true;
    profile->fresh = true;
    profile->n_notes = profile->n_marks = profile->n_lines = 0;
}

bool profile_is_on(const struct device *dev)
{
    return dev->profile && dev->profile->on;
}

void profile_layer(struct device *dev, int layer)
{
    struct profile *profile = dev->profile;
    char name[PROFILE_SHAPE];

    if (!profile) return;
    if (profile->in_layer) open_range(dev, NULL);
    profile->in_layer = profile->has_ranges && profile->on && layer >= 0;
    if (!profile->in_layer) return;
    snprintf(name, sizeof name, "layer %d", layer);
    open_range(dev, name);
}

const struct profile_line *profile_lines(const struct device *dev, int *n_lines)
{
    *n_lines = dev->profile->n_lines;
    return dev->profile->lines;
}
