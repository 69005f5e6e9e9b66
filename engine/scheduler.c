#include "engine/scheduler.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

mlora_status scheduler_open(struct scheduler *out, int max_running, int max_batch_tokens)
{
    *out = (struct scheduler){.max_running = max_running, .max_batch_tokens = max_batch_tokens};
    out->running = calloc((size_t)max_running, sizeof(*out->running));
    out->plan.rows = calloc((size_t)max_running, sizeof *out->plan.rows);
    if (!out->running || !out->plan.rows) {
        scheduler_close(out);
        return error_set(MLORA_ENOMEM, "out of memory: %d concurrent requests", max_running);
    }
    return MLORA_OK;
}

void scheduler_close(struct scheduler *scheduler)
{
    free(scheduler->running);
    free(scheduler->plan.rows);
    *scheduler = (struct scheduler){0};
}

/* ---- queues --------------------------------------------------------------------------------- */

void scheduler_add(struct scheduler *s, struct request *request)
{
    request->next = NULL;
    if (s->last_waiting)
        s->last_waiting->next = request;
    else
        s->first_waiting = request;
    s->last_waiting = request;
    s->n_waiting++;
}

static void put_first(struct scheduler *s, struct request *request)
{
    request->next = s->first_waiting;
    s->first_waiting = request;
    if (!s->last_waiting) s->last_waiting = request;
    s->n_waiting++;
}

static struct request *take_first(struct scheduler *s)
{
    struct request *request = s->first_waiting;
    s->first_waiting = request->next;
    if (!s->first_waiting) s->last_waiting = NULL;
    s->n_waiting--;
    return request;
}

void scheduler_remove(struct scheduler *s, struct request *request, struct kvcache *kv)
{
    kvcache_release(kv, request->blocks, &request->n_blocks);
    for (int i = 0; i < s->n_running; i++) {
        if (s->running[i] != request) continue;
        s->n_running--;
        memmove(&s->running[i], &s->running[i + 1],
                (size_t)(s->n_running - i) * sizeof(*s->running));
        return;
    }

    struct request *before = NULL;
    for (struct request *at = s->first_waiting; at; before = at, at = at->next) {
        if (at != request) continue;
        if (before)
            before->next = at->next;
        else
            s->first_waiting = at->next;
        if (s->last_waiting == at) s->last_waiting = before;
        s->n_waiting--;
        return;
    }
}

/* ---- planning ------------------------------------------------------------------------------- */

static int n_pending(const struct request *request)
{
    return request->n_tokens - request->n_computed;
}

/* Set the request that was admitted last back to the front of the queue. */
static void preempt_last(struct scheduler *s, struct kvcache *kv)
{
    struct request *last = s->running[--s->n_running];

    kvcache_release(kv, last->blocks, &last->n_blocks);
    last->n_computed = 0;
    put_first(s, last);
    s->n_preemptions++;
}

static void add_row(struct scheduler *s, struct request *request, int n_tokens)
{
    s->plan.rows[s->plan.n_rows++] = (struct plan_row){
        .request = request,
        .n_tokens = n_tokens,
        .samples = n_tokens == n_pending(request),
    };
    s->plan.n_tokens += n_tokens;
}

/* Reserve blocks for `n_tokens` more of running request i, setting later ones back while blocks
 * are missing. A request that is alone always fits: the cache holds at least one whole sequence.
 * False if request i itself was set back. */
static bool reserve(struct scheduler *s, struct kvcache *kv, int i, int n_tokens)
{
    struct request *request = s->running[i];

    while (
        !kvcache_extend(kv, request->blocks, &request->n_blocks, request->n_computed + n_tokens)) {
        const bool itself = s->n_running - 1 == i;
        assert(!(itself && i == 0));
        preempt_last(s, kv);
        if (itself) return false;
    }
    return true;
}

const struct plan *scheduler_plan(struct scheduler *s, struct kvcache *kv)
{
    const int64_t n_preemptions = s->n_preemptions;

    s->plan.n_rows = 0;
    s->plan.n_tokens = 0;

    /* Blocks first, in order of admission, so that whoever is set back is not in the plan. */
    int left = s->max_batch_tokens;
    for (int i = 0; i < s->n_running; i++)
        if (n_pending(s->running[i]) == 1) left--; /* its token is certain: max_running <= budget */
    for (int i = 0; i < s->n_running; i++) {
        const int pending = n_pending(s->running[i]);
        const int piece = pending == 1 ? 1 : pending < left ? pending : left;
        if (piece == 0) continue;
        if (!reserve(s, kv, i, piece)) break;
        if (pending > 1) left -= piece;
        add_row(s, s->running[i], piece);
    }

    if (s->n_preemptions != n_preemptions) return &s->plan; /* memory is short: admit nobody */
    left = s->max_batch_tokens - s->plan.n_tokens;
    while (s->first_waiting && s->n_running < s->max_running && left > 0) {
        struct request *request = s->first_waiting;
        const int pending = n_pending(request);
        const int piece = pending < left ? pending : left;
        if (kvcache_blocks_for(pending) > kv->n_free) break;
        if (!kvcache_extend(kv, request->blocks, &request->n_blocks, piece)) break;
        take_first(s);
        s->running[s->n_running++] = request;
        add_row(s, request, piece);
        left -= piece;
    }
    return &s->plan;
}
