#include "engine/kvcache.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

mlora_status kvcache_open(struct kvcache *out, int n_blocks, bool shares, struct hash_key hash_key)
{
    *out = (struct kvcache){.n_blocks = n_blocks, .n_free = n_blocks, .shares = shares};
    out->blocks = malloc((size_t)n_blocks * sizeof *out->blocks);
    if (!out->blocks) {
        *out = (struct kvcache){0};
        return error_set(MLORA_ENOMEM, "out of memory: a list of %d KV blocks", n_blocks);
    }
    for (int32_t i = 0; i < n_blocks; i++)
        out->blocks[i] = (struct kv_block){0, i - 1, i + 1 < n_blocks ? i + 1 : -1};
    out->first_free = 0;
    out->last_free = n_blocks - 1;
    if (!shares) return MLORA_OK;
    const mlora_status status = prefix_open(&out->prefix, n_blocks, hash_key);
    if (status != MLORA_OK) kvcache_close(out);
    return status;
}

void kvcache_close(struct kvcache *kv)
{
    prefix_close(&kv->prefix);
    free(kv->blocks);
    *kv = (struct kvcache){0};
}

int kvcache_blocks_for(int n_tokens)
{
    return n_tokens / KV_BLOCK + (n_tokens % KV_BLOCK != 0);
}

/* ---- free blocks ---------------------------------------------------------------------------- */

static bool is_held(const struct kvcache *kv, int32_t block)
{
    return kv->shares && kv->prefix.entries[block].number != 0;
}

static void free_remove(struct kvcache *kv, int32_t block)
{
    const struct kv_block *b = &kv->blocks[block];

    *(b->prev >= 0 ? &kv->blocks[b->prev].next : &kv->first_free) = b->next;
    *(b->next >= 0 ? &kv->blocks[b->next].prev : &kv->last_free) = b->prev;
    kv->n_free--;
    kv->n_held -= is_held(kv, block);
}

/* What can be found goes after all others, so that it can be found for longest. */
static void free_add(struct kvcache *kv, int32_t block)
{
    const bool last = is_held(kv, block);
    struct kv_block *b = &kv->blocks[block];

    b->prev = last ? kv->last_free : -1;
    b->next = last ? -1 : kv->first_free;
    *(b->prev >= 0 ? &kv->blocks[b->prev].next : &kv->first_free) = block;
    *(b->next >= 0 ? &kv->blocks[b->next].prev : &kv->last_free) = block;
    kv->n_free++;
    kv->n_held += last;
}

/* The free block that is missed least, which is free no more and holds nothing. */
static int32_t take_free(struct kvcache *kv)
{
    const int32_t block = kv->first_free;

    free_remove(kv, block);
    if (kv->shares) prefix_drop(&kv->prefix, block);
    return block;
}

static void use(struct kvcache *kv, int32_t block)
{
    if (kv->blocks[block].n_users++ == 0) free_remove(kv, block);
}

static void unuse(struct kvcache *kv, int32_t block)
{
    assert(kv->blocks[block].n_users > 0);
    if (--kv->blocks[block].n_users == 0) free_add(kv, block);
}

bool kvcache_want(struct kvcache *kv, int n)
{
    if (n > kv->n_free && kv->more) kv->more(kv->context, n - kv->n_free);
    return n <= kv->n_free;
}

bool kvcache_extend(struct kvcache *kv, struct kv_run *run, int n_tokens)
{
    const int need = kvcache_blocks_for(n_tokens);

    if (!kvcache_want(kv, need - run->n_blocks)) return false;
    while (run->n_blocks < need) {
        const int32_t block = take_free(kv);
        kv->blocks[block].n_users = 1;
        run->blocks[run->n_blocks++] = block;
    }
    return true;
}

void kvcache_trim(struct kvcache *kv, struct kv_run *run, int n_tokens)
{
    const int keep = kvcache_blocks_for(n_tokens);

    assert(keep >= run->n_known);
    while (run->n_blocks > keep) unuse(kv, run->blocks[--run->n_blocks]);
}

/* From the end: of two blocks that follow one another, the later one is of no use alone, and is
 * to be the first to go. */
void kvcache_release(struct kvcache *kv, struct kv_run *run)
{
    while (run->n_blocks > 0) unuse(kv, run->blocks[--run->n_blocks]);
    run->n_known = 0;
    run->number = 0;
}

/* ---- blocks that are lent ------------------------------------------------------------------- */

void kvcache_lend(struct kvcache *kv, int n, kv_move_fn move, void *context)
{
    const int32_t begin = kv->n_lent, end = begin + n;

    assert(n <= kv->n_free && end <= kv->n_blocks);
    for (int32_t b = begin; b < end; b++) {
        if (kv->blocks[b].n_users > 0) continue;
        free_remove(kv, b);
        if (kv->shares) prefix_drop(&kv->prefix, b);
    }
    for (int32_t b = begin; b < end; b++) {
        if (kv->blocks[b].n_users == 0) continue;
        const int32_t to = take_free(kv); /* beyond `end`: those before it are taken */
        move(context, to, b);
        kv->blocks[to].n_users = kv->blocks[b].n_users;
        if (is_held(kv, b)) prefix_move(&kv->prefix, to, b);
        kv->blocks[b] = (struct kv_block){0, -1, to};
    }
    kv->n_lent = end;
}

void kvcache_follow(const struct kvcache *kv, struct kv_run *run)
{
    for (int i = 0; i < run->n_blocks; i++)
        if (run->blocks[i] < kv->n_lent) run->blocks[i] = kv->blocks[run->blocks[i]].next;
}

void kvcache_take_back(struct kvcache *kv, int n)
{
    assert(n <= kv->n_lent);
    for (; n > 0; n--) free_add(kv, --kv->n_lent);
}

/* ---- blocks by content ---------------------------------------------------------------------- */

/* Of block `i` of the source, after the content of that number. */
static struct prefix_key key_of(const struct kv_source *source, int i, uint64_t before)
{
    const int first = i * KV_BLOCK;
    struct prefix_key key = {.before = before};

    if (source->adapter_from < first + KV_BLOCK) {
        key.adapter = source->adapter;
        key.adapter_from = source->adapter_from > first ? source->adapter_from - first : 0;
    }
    memcpy(key.ids, source->ids + first, sizeof key.ids);
    return key;
}

int kvcache_find(struct kvcache *kv, struct kv_run *run, const struct kv_source *source,
                 int n_tokens)
{
    assert(run->n_blocks == 0);
    if (!kv->shares) return 0;
    while ((run->n_blocks + 1) * KV_BLOCK < n_tokens) {
        const struct prefix_key key = key_of(source, run->n_blocks, run->number);
        const int32_t block = prefix_find(&kv->prefix, &key);
        if (block < 0) break;
        use(kv, block);
        run->blocks[run->n_blocks++] = block;
        run->number = kv->prefix.entries[block].number;
    }
    run->n_known = run->n_blocks;
    return run->n_known * KV_BLOCK;
}

void kvcache_remember(struct kvcache *kv, struct kv_run *run, const struct kv_source *source,
                      int n_tokens)
{
    if (!kv->shares) return;
    for (; (run->n_known + 1) * KV_BLOCK <= n_tokens; run->n_known++) {
        const struct prefix_key key = key_of(source, run->n_known, run->number);
        int32_t *own = &run->blocks[run->n_known];
        const int32_t block = prefix_find(&kv->prefix, &key);
        if (block < 0) {
            prefix_put(&kv->prefix, *own, &key);
        } else if (block != *own) {
            use(kv, block);
            unuse(kv, *own);
            *own = block;
        }
        run->number = kv->prefix.entries[*own].number;
    }
}
