/* Who has which block, and what can be found again, worked by hand. */
#include "engine/kvcache.h"

#include <criterion/criterion.h>
#include <limits.h>

enum { TOKENS = 80 };

static struct kvcache kv;
static const struct hash128 adapter_a = {{1, 0}}, adapter_b = {{1, 1}};

static void open_kv(int n_blocks)
{
    cr_assert_eq(kvcache_open(&kv, n_blocks, true, (struct hash_key){{3, 4}}), MLORA_OK);
}

static void close_kv(void)
{
    kvcache_close(&kv);
}

TestSuite(kvcache, .fini = close_kv);

/* A sequence of 80 tokens: 0, 1, 2, ... */
struct sequence {
    int32_t ids[TOKENS], blocks[TOKENS / KV_BLOCK];
    struct kv_run run;
    struct kv_source source;
};

static void make(struct sequence *s, struct hash128 adapter, int adapter_from)
{
    *s = (struct sequence){.run.blocks = s->blocks};
    for (int i = 0; i < TOKENS; i++) s->ids[i] = i;
    s->source = (struct kv_source){s->ids, adapter, adapter_from};
}

/* Find what is there of `n_tokens` and compute the rest; returns how many were found. */
static int run(struct sequence *s, int n_tokens)
{
    const int found = kvcache_find(&kv, &s->run, &s->source, n_tokens);
    cr_assert(kvcache_extend(&kv, &s->run, n_tokens));
    kvcache_remember(&kv, &s->run, &s->source, n_tokens);
    return found;
}

static int run_and_release(struct sequence *s, int n_tokens)
{
    const int found = run(s, n_tokens);
    kvcache_release(&kv, &s->run);
    return found;
}

Test(kvcache, finds_full_blocks_and_leaves_the_last_token_to_be_computed)
{
    struct sequence a, b;
    open_kv(8);
    make(&a, (struct hash128){{0}}, 0);
    make(&b, (struct hash128){{0}}, 0);

    cr_expect_eq(run(&a, 40), 0);
    cr_expect_eq(kv.n_free, 5);
    cr_expect_eq(run(&b, 40), 32, "of 40 tokens, 32 fill blocks");
    cr_expect_eq(kv.n_free, 4, "two blocks are shared");
    cr_expect_arr_eq(a.blocks, b.blocks, 2 * sizeof *a.blocks);
    cr_expect_neq(a.blocks[2], b.blocks[2]);
    kvcache_release(&kv, &b.run);
    cr_expect_eq(kv.n_free, 5, "a still uses them");
    kvcache_release(&kv, &a.run);
    cr_expect_eq(kv.n_free, 8);
    cr_expect_eq(run_and_release(&b, 33), 32, "they are found after all have gone");
    cr_expect_eq(run_and_release(&b, 32), 16, "the 32nd token is computed");
    cr_expect_eq(run_and_release(&b, 16), 0);
}

Test(kvcache, tells_tokens_that_differ_anywhere_before)
{
    struct sequence a, b;
    open_kv(16);
    make(&a, (struct hash128){{0}}, 0);
    run_and_release(&a, 80);
    for (int i = 0; i < 80; i++) {
        make(&b, (struct hash128){{0}}, 0);
        b.ids[i] = 500;
        cr_expect_eq(kvcache_find(&kv, &b.run, &b.source, 80), i / 16 * 16 < 64 ? i / 16 * 16 : 64,
                     "token %d", i);
        kvcache_release(&kv, &b.run);
    }
}

Test(kvcache, tells_adapters_apart_by_their_whole_hash)
{
    struct sequence a, b, base;
    open_kv(16);
    make(&a, adapter_a, 0);
    make(&b, adapter_b, 0);
    make(&base, (struct hash128){{0}}, 0);

    cr_expect_eq(run_and_release(&a, 40), 0);
    cr_expect_eq(run_and_release(&b, 40), 0);
    cr_expect_eq(run_and_release(&base, 40), 0);
    cr_expect_eq(run_and_release(&a, 40), 32);
    cr_expect_eq(run_and_release(&b, 40), 32);
    cr_expect_eq(run_and_release(&base, 40), 32);
}

Test(kvcache, shares_the_bases_blocks_up_to_where_an_adapter_begins)
{
    struct sequence base, a, later, never;
    open_kv(32);
    make(&base, (struct hash128){{0}}, 0);
    run_and_release(&base, 80);

    make(&a, adapter_a, 40);
    cr_expect_eq(run_and_release(&a, 80), 32, "two blocks are before token 40");
    cr_expect_eq(run_and_release(&a, 80), 64);
    make(&later, adapter_a, 41);
    cr_expect_eq(run_and_release(&later, 80), 32,
                 "token 40 was the adapter's, now it is the base's");
    make(&later, adapter_a, 48);
    cr_expect_eq(run_and_release(&later, 80), 48);
    make(&later, adapter_b, 40);
    cr_expect_eq(run_and_release(&later, 80), 32, "another adapter");
    make(&never, adapter_a, INT_MAX);
    cr_expect_eq(run_and_release(&never, 80), 64, "never used: it is the base");
    cr_expect_eq(run_and_release(&base, 80), 64);
}

Test(kvcache, gives_up_the_least_recently_used_content_first_and_its_end_before_its_beginning)
{
    struct sequence a, b, c;
    open_kv(6);
    make(&a, adapter_a, 0);
    make(&b, adapter_b, 0);
    make(&c, (struct hash128){{0}}, 0);
    run_and_release(&a, 48); /* 3 blocks */
    run_and_release(&b, 32); /* 2 */
    run(&c, 20);             /* 2: one is free of content, one was a's last */
    cr_expect_eq(kv.n_free, 4);
    cr_expect_eq(kvcache_find(&kv, &a.run, &a.source, 48 + 1), 32);
    cr_expect_eq(kvcache_find(&kv, &b.run, &b.source, 48), 32, "b was not touched");
    kvcache_release(&kv, &a.run);
    kvcache_release(&kv, &b.run);
    kvcache_release(&kv, &c.run);
    cr_expect_eq(kv.n_free, 6);
}

Test(kvcache, keeps_one_block_of_what_two_compute_at_the_same_time)
{
    struct sequence a, b;
    open_kv(8);
    make(&a, adapter_a, 0);
    make(&b, adapter_a, 0);

    cr_assert(kvcache_extend(&kv, &a.run, 40) && kvcache_extend(&kv, &b.run, 40));
    cr_expect_eq(kv.n_free, 2);
    kvcache_remember(&kv, &a.run, &a.source, 40);
    kvcache_remember(&kv, &b.run, &b.source, 20);
    cr_expect_eq(kv.n_free, 3);
    cr_expect_eq(b.blocks[0], a.blocks[0]);
    cr_expect_neq(b.blocks[1], a.blocks[1], "b's second block is not full yet");
    kvcache_remember(&kv, &b.run, &b.source, 40);
    cr_expect_eq(b.blocks[1], a.blocks[1]);
    cr_expect_eq(kv.n_free, 4);
    kvcache_release(&kv, &a.run);
    kvcache_release(&kv, &b.run);
    cr_expect_eq(kv.n_free, 8);
}

Test(kvcache, takes_nothing_when_too_few_blocks_are_free)
{
    struct sequence a;
    open_kv(2);
    make(&a, adapter_a, 0);
    cr_expect_not(kvcache_extend(&kv, &a.run, 33));
    cr_expect_eq(a.run.n_blocks, 0);
    cr_expect_eq(kv.n_free, 2);
    cr_expect(kvcache_extend(&kv, &a.run, 32));
    kvcache_release(&kv, &a.run);
}

Test(kvcache, finds_nothing_when_it_does_not_share)
{
    struct sequence a;
    cr_assert_eq(kvcache_open(&kv, 8, false, (struct hash_key){{0}}), MLORA_OK);
    make(&a, adapter_a, 0);
    cr_expect_eq(run_and_release(&a, 80), 0);
    cr_expect_eq(run_and_release(&a, 80), 0);
    cr_expect_eq(kv.n_free, 8);
}

static int32_t moved_to, moved_from;

static void note_move(void *context, int32_t to, int32_t from)
{
    *(int *)context += 1;
    moved_to = to;
    moved_from = from;
}

Test(kvcache, lends_its_first_blocks_and_moves_what_is_in_use)
{
    struct sequence a, b;
    int n_moves = 0;
    open_kv(10);
    make(&a, (struct hash128){{0}}, 0);
    cr_expect_eq(run(&a, 40), 0); /* blocks 0, 1, 2, of which 0 and 1 can be found */
    cr_expect_eq(a.blocks[1], 1);
    cr_expect_eq(kv.n_free, 7);

    kvcache_lend(&kv, 2, note_move, &n_moves); /* 0 and 1 go to 3 and 4 */
    cr_expect_eq(n_moves, 2);
    cr_expect_eq(moved_from, 1);
    cr_expect_eq(moved_to, 4);
    kvcache_follow(&kv, &a.run);
    cr_expect_eq(a.blocks[0], 3);
    cr_expect_eq(a.blocks[1], 4);
    cr_expect_eq(a.blocks[2], 2);
    cr_expect_eq(kv.n_lent, 2);
    cr_expect_eq(kv.n_free, 5);

    make(&b, (struct hash128){{0}}, 0);
    cr_expect_eq(run(&b, 40), 32, "what was moved is still found");
    cr_expect_eq(b.blocks[1], 4);
    kvcache_release(&kv, &b.run);
    kvcache_release(&kv, &a.run);
    cr_expect_eq(kv.n_free, 8);
    cr_expect_eq(kv.n_held, 2);
    cr_expect_not(kvcache_want(&kv, 9));

    kvcache_lend(&kv, 3, note_move, &n_moves); /* 2, 3, 4: free, and forgotten */
    cr_expect_eq(n_moves, 2);
    cr_expect_eq(kv.n_held, 0);
    kvcache_take_back(&kv, 5);
    cr_expect_eq(kv.n_free, 10);
    cr_expect_eq(run(&b, 40), 0, "what was lent holds nothing");
    cr_expect_eq(b.blocks[0], 0);
    kvcache_release(&kv, &b.run);
}
