#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdlib.h>

TestSuite(metadata, .init = device_open, .fini = device_close);

Test(metadata, gives_each_token_its_row_and_position)
{
    const int32_t row_start[4] = {0, 3, 4, 6}; /* a whole prompt, a decode, the end of a prompt */
    const int32_t kv_len[3] = {3, 9, 7};
    const int32_t want_row[6] = {0, 0, 0, 1, 2, 2};
    const int32_t want_position[6] = {0, 1, 2, 8, 5, 6};
    int32_t row[6], position[6];
    const struct batch_view batch = {
        .T = 6,
        .Q = 3,
        .max_row = 3,
        .max_kv = 9,
        .row_start = upload(row_start, sizeof row_start),
        .kv_len = upload(kv_len, sizeof kv_len),
        .position = device_memory(sizeof position),
        .row = device_memory(sizeof row),
    };

    dev->ops->metadata(dev, &batch);
    download(row, batch.row, sizeof row);
    download(position, batch.position, sizeof position);
    cr_expect_arr_eq(row, want_row, sizeof row);
    cr_expect_arr_eq(position, want_position, sizeof position);
}

Test(metadata, puts_in_what_the_step_before_has_drawn)
{
    const int32_t row_start[4] = {0, 2, 3, 4}, kv_len[3] = {2, 9, 7};
    const int32_t drawn[3] = {70, -1, 90}; /* the second draw has failed */
    int32_t ids[4] = {5, -3, -2, -1};
    const int32_t want[4] = {5, 90, 0, 70};
    const struct batch_view batch = {
        .T = 4,
        .Q = 3,
        .max_row = 2,
        .max_kv = 9,
        .ids = upload(ids, sizeof ids),
        .drawn = upload(drawn, sizeof drawn),
        .row_start = upload(row_start, sizeof row_start),
        .kv_len = upload(kv_len, sizeof kv_len),
        .position = device_memory(sizeof ids),
        .row = device_memory(sizeof ids),
    };

    dev->ops->metadata(dev, &batch);
    download(ids, batch.ids, sizeof ids);
    cr_expect_arr_eq(ids, want, sizeof ids);
}

/* ---- draft and extend --------------------------------------------------------------------- */

enum { UNWRITTEN = -77, TAIL = -5, TOPK = 40 };

/* One call of extend_metadata, inputs and outputs on the host. */
struct extension {
    int bs, capacity;
    int32_t *extend_len, *kv_len, *adapter;                             /* [bs] */
    int32_t *kv, *clamped, *position, *request, *token_adapter, *start; /* [capacity], [bs + 1] */
    int32_t total;
};

static void *fetch(const void *from, int n)
{
    void *to = zeros((size_t)n + 1, sizeof(int32_t));
    if (n > 0) download(to, from, (size_t)n * sizeof(int32_t));
    return to;
}

/* Memory for n numbers that nobody has written yet. */
static int32_t *unwritten(int n)
{
    int32_t *host = zeros((size_t)n + 1, sizeof *host);
    for (int i = 0; i <= n; i++) host[i] = UNWRITTEN;
    int32_t *memory = upload(host, ((size_t)n + 1) * sizeof *host);
    free(host);
    return memory;
}

static const void *upload_lengths(const int32_t *lengths, int n, bool as_int64)
{
    if (!as_int64) return upload(lengths, ((size_t)n + 1) * sizeof *lengths);
    int64_t *wide = zeros((size_t)n + 1, sizeof *wide);
    for (int i = 0; i < n; i++) wide[i] = lengths[i];
    const void *memory = upload(wide, ((size_t)n + 1) * sizeof *wide);
    free(wide);
    return memory;
}

static void extend(struct extension *e, enum extend_search search, bool int64, bool fills_tail)
{
    const struct extend_view view = {
        .bs = e->bs,
        .capacity = e->capacity,
        .topk = TOPK,
        .search = search,
        .has_int64_lengths = int64,
        .fills_tail = fills_tail,
        .tail = TAIL,
        .extend_len = upload_lengths(e->extend_len, e->bs, int64),
        .kv_len = upload_lengths(e->kv_len, e->bs, int64),
        .adapter = upload(e->adapter, ((size_t)e->bs + 1) * sizeof *e->adapter),
        .total = unwritten(1),
        .request_start = unwritten(e->bs + 1),
        .token_kv_len = unwritten(e->capacity),
        .clamped_kv_len = unwritten(e->capacity),
        .token_position = unwritten(e->capacity),
        .token_request = unwritten(e->capacity),
        .token_adapter = unwritten(e->capacity),
    };

    dev->ops->extend_metadata(dev, &view);
    download(&e->total, view.total, sizeof e->total);
    e->start = fetch(view.request_start, e->bs + 1);
    e->kv = fetch(view.token_kv_len, e->capacity + 1); /* one more: it stays as it was */
    e->clamped = fetch(view.clamped_kv_len, e->capacity);
    e->position = fetch(view.token_position, e->capacity);
    e->request = fetch(view.token_request, e->capacity);
    e->token_adapter = fetch(view.token_adapter, e->capacity);
}

static void free_outputs(struct extension *e)
{
    int32_t *const outputs[] = {e->start,    e->kv,      e->clamped,
                                e->position, e->request, e->token_adapter};
    for (size_t i = 0; i < sizeof outputs / sizeof outputs[0]; i++) free(outputs[i]);
}

Test(metadata, expands_drafts_to_tokens)
{
    /* Two drafts accepted, a request left out, three at the start of a sequence, one far along. */
    int32_t extend_len[5] = {2, 0, 3, 1}, kv_len[5] = {10, 7, 3, 100}, adapter[5] = {4, 9, -1, 2};
    const int32_t start[5] = {0, 2, 2, 5, 6}, request[6] = {0, 0, 2, 2, 2, 3};
    const int32_t kv[6] = {9, 10, 1, 2, 3, 100}, clamped[6] = {9, 10, 1, 2, 3, 40};
    const int32_t position[6] = {8, 9, 0, 1, 2, 99}, token_adapter[6] = {4, 4, -1, -1, -1, 2};
    struct extension e = {
        .bs = 4, .capacity = 8, .extend_len = extend_len, .kv_len = kv_len, .adapter = adapter};

    extend(&e, EXTEND_ADAPTIVE, false, false);
    cr_expect_eq(e.total, 6);
    cr_expect_arr_eq(e.start, start, sizeof start);
    cr_expect_arr_eq(e.kv, kv, sizeof kv);
    cr_expect_arr_eq(e.clamped, clamped, sizeof clamped);
    cr_expect_arr_eq(e.position, position, sizeof position);
    cr_expect_arr_eq(e.request, request, sizeof request);
    cr_expect_arr_eq(e.token_adapter, token_adapter, sizeof token_adapter);
    cr_expect_eq(e.kv[6], UNWRITTEN, "the tail is left as it was");
    cr_expect_eq(e.request[7], UNWRITTEN);
    free_outputs(&e);
}

/* Check every output of a random batch by counting tokens off, request by request. */
static void check_random(int bs, int max_extend, enum extend_search search, bool int64,
                         bool is_tight)
{
    struct numbers numbers = {(uint64_t)bs * 31 + (uint64_t)max_extend};
    struct extension e = {.bs = bs};
    int t = 0, n_wrong = 0;

    e.extend_len = zeros((size_t)bs + 1, sizeof(int32_t));
    e.kv_len = zeros((size_t)bs + 1, sizeof(int32_t));
    e.adapter = zeros((size_t)bs + 1, sizeof(int32_t));
    for (int b = 0; b < bs; b++) {
        e.extend_len[b] = next_int(&numbers, 0, 2) ? next_int(&numbers, 0, max_extend) : 0;
        e.kv_len[b] = e.extend_len[b] + next_int(&numbers, 0, 100);
        e.adapter[b] = next_int(&numbers, -1, 7);
        t += e.extend_len[b];
    }
    const int total = t;
    e.capacity = is_tight ? total / 2 : total + 37;
    extend(&e, search, int64, !is_tight);

    t = 0;
    for (int b = 0; b < bs; b++) {
        n_wrong += e.start[b] != t;
        for (int j = 0; j < e.extend_len[b]; j++, t++) {
            const int kv = e.kv_len[b] - e.extend_len[b] + 1 + j;
            if (t >= e.capacity) continue;
            n_wrong += e.kv[t] != kv || e.clamped[t] != (kv < TOPK ? kv : TOPK) ||
                       e.position[t] != kv - 1 || e.request[t] != b ||
                       e.token_adapter[t] != e.adapter[b];
        }
    }
    for (; t < e.capacity; t++)
        n_wrong += e.kv[t] != TAIL || e.clamped[t] != TAIL || e.position[t] != TAIL ||
                   e.request[t] != TAIL || e.token_adapter[t] != TAIL;
    n_wrong += e.start[bs] != total || e.total != total || e.kv[e.capacity] != UNWRITTEN;
    cr_expect_eq(n_wrong, 0, "%d requests of up to %d tokens, search %d: %d wrong", bs, max_extend,
                 (int)search, n_wrong);

    free_outputs(&e);
    free(e.extend_len);
    free(e.kv_len);
    free(e.adapter);
}

Test(metadata, expands_every_size_of_batch)
{
    const int sizes[] = {0,   1,   2,   3,    15,   16,   17,   31,   32,   33,   64,   127,
                         128, 129, 255, 1000, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 9000};

    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (int search = EXTEND_ADAPTIVE; search <= EXTEND_BY_REQUEST; search++)
            check_random(sizes[i], 5, (enum extend_search)search, i % 2, false);
}

Test(metadata, expands_long_extends)
{
    for (int search = EXTEND_ADAPTIVE; search <= EXTEND_BY_REQUEST; search++) {
        check_random(7, 3000, (enum extend_search)search, false, false);
        check_random(200, 90, (enum extend_search)search, true, false);
    }
}

Test(metadata, writes_no_token_past_the_capacity)
{
    for (int search = EXTEND_ADAPTIVE; search <= EXTEND_BY_REQUEST; search++) {
        check_random(5, 9, (enum extend_search)search, false, true);
        check_random(1500, 6, (enum extend_search)search, true, true);
    }
}

Test(metadata, writes_only_what_is_wanted)
{
    const int32_t extend_len[2] = {1, 2}, kv_len[2] = {5, 6}, want[3] = {0, 1, 1};
    int32_t request[3];
    const struct extend_view view = {
        .bs = 2,
        .capacity = 3,
        .topk = TOPK,
        .fills_tail = true,
        .extend_len = upload(extend_len, sizeof extend_len),
        .kv_len = upload(kv_len, sizeof kv_len),
        .total = unwritten(1),
        .request_start = unwritten(3),
        .token_request = unwritten(3),
    };

    dev->ops->extend_metadata(dev, &view);
    download(request, view.token_request, sizeof request);
    cr_expect_arr_eq(request, want, sizeof want);
}
