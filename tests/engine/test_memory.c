/* One budget for adapters and KV blocks: who gets what, that nothing is in two hands, and that what is
 * moved stays what it was. */
#include "engine/memory.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "tests/engine/harness.h"
#include "tests/engine/schedule.h"

/* ---- how the budget is cut ------------------------------------------------------------------ */

Test(memory, gives_each_what_it_can_use_and_shares_the_rest)
{
    /* room for 100 blocks of 1,024 bytes, of which KV can use 1,000 */
    struct memory_plan plan = memory_plan(100 * 1024 + 100, 1024, 1000, 10, 50 * 1024);
    cr_expect_eq(plan.n_blocks, 100);
    cr_expect_eq(plan.n_kept, 10);
    cr_expect_eq(plan.adapter_bytes, 0);
    cr_expect_eq(plan.adapter_limit, 50 * 1024);

    /* KV can use 40: the rest is never its own */
    plan = memory_plan(100 * 1024, 1024, 40, 10, 80 * 1024);
    cr_expect_eq(plan.n_blocks, 40);
    cr_expect_eq(plan.adapter_bytes, 60 * 1024);

    /* both are said: nothing to share */
    plan = memory_plan(40 * 1024 + 5 * 1024, 1024, 40, 10, 5 * 1024);
    cr_expect_eq(plan.n_blocks, 40);
    cr_expect_eq(plan.adapter_bytes, plan.adapter_limit);
}

/* ---- any order ------------------------------------------------------------------------------ */

enum {
    BLOCKS = 48,
    KEPT = 8,
    PART = 128,
    BLOCK_BYTES = 2 * PART, /* of one layer */
    BEFORE = 1024,          /* of adapters alone */
    LIMIT = BEFORE + 36 * BLOCK_BYTES + 128,
    RUNS = 6,
    ADAPTERS = 12,
    LAYERS = 1,
    STEPS = 20000
};

static struct device *dev;
static struct kv_cache cache;
static struct schedule schedule;
static struct pool pool;
static struct memory memory;
static struct request *runs[RUNS];
static struct lora_factors factors[(LAYERS + 1) * LORA_LINEARS];
static struct adapter adapters[ADAPTERS];
static struct resident residents[ADAPTERS];

static void open_all(void)
{
    const struct memory_plan plan = {BLOCKS, KEPT, BEFORE, LIMIT};

    cr_assert_eq(cpu_device_open(&dev, 1), MLORA_OK);
    schedule_open(&schedule, RUNS, 1000, BLOCKS, true);
    cache = (struct kv_cache){.n_blocks = BLOCKS, .stride = 2 * LAYERS, .part_bytes = PART};
    cache.memory = calloc(1, BEFORE + BLOCKS * BLOCK_BYTES);
    cache.blocks = cache.memory + BEFORE;
    cr_assert_eq(pool_open(&pool, dev, LAYERS, cache.memory, BEFORE), MLORA_OK);
    memory_share(&memory, &plan, dev, &cache, &schedule.kv, &schedule.scheduler, &pool);
}

static void close_all(void)
{
    pool_close(&pool);
    free(cache.memory);
    schedule_close(&schedule);
    dev->ops->close(dev);
}

/* What stands in a block is said by what its tokens are computed from. */
static void write_block(int run, int i)
{
    char *block = cache.blocks + (size_t)runs[run]->kv.blocks[i] * BLOCK_BYTES;
    const int32_t content[2] = {runs[run]->tokens[0], i};

    for (int at = 0; at < BLOCK_BYTES; at += (int)sizeof content)
        memcpy(block + at, content, sizeof content);
}

static void check_blocks(void)
{
    int n_users[BLOCKS] = {0}, n_used = 0;

    for (int r = 0; r < RUNS; r++)
        for (int i = 0; runs[r] && i < runs[r]->kv.n_blocks; i++) {
            const int32_t b = runs[r]->kv.blocks[i], content[2] = {runs[r]->tokens[0], i};
            const char *block = cache.blocks + (size_t)b * BLOCK_BYTES;
            cr_assert(b >= schedule.kv.n_lent && b < BLOCKS, "block %d is lent", b);
            n_used += n_users[b]++ == 0;
            for (int at = 0; at < BLOCK_BYTES; at += (int)sizeof content)
                cr_assert_arr_eq(block + at, content, sizeof content);
        }
    for (int b = 0; b < BLOCKS; b++) cr_assert_eq(schedule.kv.blocks[b].n_users, n_users[b]);
    cr_assert_eq(schedule.kv.n_free + schedule.kv.n_lent + n_used, BLOCKS, "a block leaked");
    int n_free = 0, n_held = 0;
    for (int32_t b = schedule.kv.first_free; b >= 0; b = schedule.kv.blocks[b].next) {
        cr_assert_geq(b, schedule.kv.n_lent);
        n_held += schedule.kv.prefix.entries[b].number != 0;
        n_free++;
    }
    cr_assert_eq(n_free, schedule.kv.n_free);
    cr_assert_eq(n_held, schedule.kv.n_held);
    cr_assert_leq(schedule.kv.n_lent, BLOCKS - KEPT);
}

static void check_adapters(void)
{
    int64_t used = 0;

    for (int a = 0; a < ADAPTERS; a++) {
        const struct resident *one = &residents[a];
        if (one->state == RESIDENT_AWAY) continue;
        used += one->extent.bytes;
        cr_assert_leq(one->extent.at + one->extent.bytes, BEFORE + schedule.kv.n_lent * BLOCK_BYTES,
                      "it lies in KV's blocks");
        cr_assert_leq(one->extent.at + one->extent.bytes, LIMIT);
        for (int64_t i = 0; i < one->adapter->bytes; i++)
            cr_assert_eq(pool_address(&pool, one)[i], (char)(a + 1));
    }
    cr_assert_eq(used, pool.arena.used);
    cr_assert_leq(pool.arena.capacity, BEFORE + schedule.kv.n_lent * BLOCK_BYTES);
}

/* Requests get longer, end, and find what is there; adapters come, are used and leave. */
Test(memory, moves_between_blocks_and_adapters_and_loses_nothing)
{
    uint64_t random = 11;
    int lent_most = 0, lent_least = BLOCKS, n_moved = 0, n_found = 0, n_refused = 0;

    open_all();
    for (int a = 0; a < ADAPTERS; a++) {
        adapters[a] = (struct adapter){
            .n_layers = LAYERS, .factors = factors, .bytes = 200 + 350 * (int64_t)a};
        residents[a] = (struct resident){.adapter = &adapters[a], .slot = -1};
    }
    for (int step = 0; step < STEPS; step++) {
        const int what = random_below(&random, 8), r = random_below(&random, RUNS);
        const int a = random_below(&random, ADAPTERS);
        const bool calm = step / 500 % 2; /* now many adapters are wanted, now few */

        pool.step++;
        if (what < 3 && !runs[r]) { /* a request of one of 9 contents, of up to 10 blocks */
            const int n = 1 + random_below(&random, 10 * KV_BLOCK);
            struct request *request = schedule_request((uint64_t)step + 1, 1, n, 12 * KV_BLOCK);
            const int32_t content = 100 + random_below(&random, 9);
            for (int i = 0; i < 12 * KV_BLOCK; i++) request->tokens[i] = content;
            const struct kv_source source = request_source(request);
            const int found = kvcache_find(&schedule.kv, &request->kv, &source, n);
            n_found += found;
            schedule.scheduler.running[schedule.scheduler.n_running++] = request;
            runs[r] = request;
            if (kvcache_extend(&schedule.kv, &request->kv, n)) {
                for (int i = found / KV_BLOCK; i < request->kv.n_blocks; i++) write_block(r, i);
                kvcache_remember(&schedule.kv, &request->kv, &source, n);
            } else {
                cr_assert_lt(memory_free_blocks(&memory), BLOCKS);
                n_refused++;
            }
        } else if (what == 3 && runs[r]) {
            for (int i = 0; i < schedule.scheduler.n_running; i++)
                if (schedule.scheduler.running[i] == runs[r])
                    schedule.scheduler.running[i] =
                        schedule.scheduler.running[--schedule.scheduler.n_running];
            kvcache_release(&schedule.kv, &runs[r]->kv);
            free(runs[r]->kv.blocks);
            free(runs[r]->tokens);
            free(runs[r]);
            runs[r] = NULL;
        } else if (what < 7 && !calm && residents[a].state == RESIDENT_AWAY) {
            bool placed = false;
            cr_assert_eq(pool_place(&pool, &residents[a], what == 6, &placed), MLORA_OK);
            if (placed) {
                memset(pool_address(&pool, &residents[a]), a + 1, (size_t)adapters[a].bytes);
                pool_arrived(&pool, &residents[a]);
            }
        } else if (what == 7) {
            residents[a].users = residents[a].users ? 0 : !calm && a % 3 == 0;
            if (residents[a].state == RESIDENT_HERE) pool_keep(&pool, &residents[a]);
        }
        check_blocks();
        check_adapters();
        if (schedule.kv.n_lent > lent_most) lent_most = schedule.kv.n_lent;
        if (step > 400 && schedule.kv.n_lent < lent_least) lent_least = schedule.kv.n_lent;
        for (int i = 0; i < RUNS; i++)
            n_moved += runs[i] && runs[i]->kv.n_blocks > 1 &&
                       runs[i]->kv.blocks[0] > runs[i]->kv.blocks[1];
    }
    cr_expect_geq(lent_most, 36, "the limit: %d", lent_most);
    cr_expect_leq(lent_least, 4, "%d", lent_least);
    cr_expect_gt(n_moved, 0);
    cr_expect_gt(n_found, 0);
    cr_expect_gt(n_refused, 0);
    for (int r = 0; r < RUNS; r++) {
        if (!runs[r]) continue;
        kvcache_release(&schedule.kv, &runs[r]->kv);
        free(runs[r]->kv.blocks);
        free(runs[r]->tokens);
        free(runs[r]);
    }
    schedule.scheduler.n_running = 0;
    close_all();
}

/* ---- the engine ----------------------------------------------------------------------------- */

/* Of the model, a block of 16 tokens has 64 KiB in f32, an adapter of rank 16 578 KiB. */
enum { LONG = 4, MANY = 5, KV_BLOCKS = 60, LONG_TOKENS = 200, FEW_TOKENS = 8 };

static struct answer alone[2 * LONG + MANY], shared[2 * LONG + MANY];

static void random_adapters(mlora_engine *engine)
{
    for (int i = 0; i < MANY; i++) {
        const char name[3] = {'a', (char)('0' + i), '\0'};
        cr_assert_eq(mlora_adapter_random(engine, name, 16, (uint64_t)i + 1), MLORA_OK, "%s",
                     mlora_error());
    }
}

/* Long requests of the base, or short ones of an adapter each; one by one, or together. Returns how
 * many ran at once. */
static int ask(mlora_engine *engine, struct answer *answers, bool of_adapters, bool together)
{
    static const char *const prompts[] = {"There was once a", "Rosa laughed and went home.",
                                          "How many owls live near the bridge?\n", "Select"};
    mlora_stats stats;
    int most = 0, n_active = 1;

    for (int i = 0; i < (of_adapters ? MANY : LONG); i++) {
        const char name[3] = {'a', (char)('0' + i), '\0'};
        mlora_request request = greedy(of_adapters ? name : NULL, prompts[i % 4],
                                       of_adapters ? FEW_TOKENS : LONG_TOKENS, &answers[i]);
        request.ignore_eos = 1;
        submit(engine, &request);
        if (!together) run_all(engine);
    }
    while (n_active > 0) {
        cr_assert_eq(mlora_step(engine, &n_active), MLORA_OK, "%s", mlora_error());
        mlora_engine_stats(engine, &stats);
        if (stats.n_running > most) most = stats.n_running;
    }
    return most;
}

Test(memory, serves_whichever_is_short_in_a_budget_that_would_not_do_for_both)
{
    mlora_options options = options_for(LLAMA2);
    mlora_stats stats;

    options.dtype = MLORA_DTYPE_F32;
    options.max_model_len = 256;
    mlora_engine *engine = open_engine(&options);
    random_adapters(engine);
    ask(engine, alone, false, false);
    ask(engine, alone + LONG, true, false);
    ask(engine, alone + LONG + MANY, false, false);
    mlora_close(engine);

    /* 3.75 MiB of blocks and 1 MiB for an adapter: five need 2.9 MiB, four long requests 52 blocks */
    options.kv_blocks = KV_BLOCKS;
    options.adapter_memory = 1;
    engine = open_engine(&options);
    struct memory_plan plan = {KV_BLOCKS, 16, 1 << 20, 0};
    plan.adapter_limit = plan.adapter_bytes + 44 * kv_block_bytes(&engine->model);
    memory_share(&engine->memory, &plan, engine->dev, &engine->kv_cache, &engine->kvcache,
                 &engine->scheduler, &engine->registry.pool);
    random_adapters(engine);

    cr_expect_eq(ask(engine, shared, false, true), LONG);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_preemptions, 0);
    cr_expect_eq(stats.n_free_kv_blocks, KV_BLOCKS);

    /* all come while four wait for the last: then nothing is loaded again */
    ask(engine, shared + LONG, true, true);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_adapter_loads, MANY);
    cr_expect_eq(stats.n_adapter_evictions, 0);
    cr_expect_gt(stats.adapter_bytes_used, 2 << 20);
    cr_expect_gt(engine->kvcache.n_lent, 20);
    cr_expect_lt(stats.n_free_kv_blocks, KV_BLOCKS - 20);

    cr_expect_eq(ask(engine, shared + LONG + MANY, false, true), LONG);
    mlora_engine_stats(engine, &stats);
    cr_expect_eq(stats.n_preemptions, 0);
    cr_expect_gt(stats.n_adapter_evictions, 0);
    mlora_close(engine);
    for (int i = 0; i < 2 * LONG + MANY; i++) expect_same_answer(&shared[i], &alone[i], "shared");
}

/* A request of the base that is asked again whenever it has ended. */
static void ask_again(void *user, const mlora_event *event)
{
    mlora_request request = greedy(NULL, "There was once a", 60 + (int)(event->id % 7), &alone[0]);
    request.on_event = ask_again;
    request.user = user;
    request.ignore_eos = 1;
    if (event->finish != MLORA_RUNNING) submit(user, &request);
}

/* 16 requests of four to five blocks each want more than there are, always. An adapter of rank 64 needs
 * 2.3 MiB, of which 1.3 are theirs: 21 blocks. */
Test(memory, of_requests_that_take_all_of_it_makes_room_for_an_adapter)
{
    mlora_options options = options_for(LLAMA2);
    const mlora_event ended = {.finish = MLORA_FINISH_STOP};
    mlora_stats stats;
    int n = 0;

    options.dtype = MLORA_DTYPE_F32;
    options.max_model_len = 256;
    options.max_num_seqs = 16;
    options.max_batch_tokens = 64;
    options.kv_blocks = KV_BLOCKS;
    options.adapter_memory = 1;
    options.no_prefix_cache = 1;
    mlora_engine *engine = open_engine(&options);
    struct memory_plan plan = {KV_BLOCKS, 16, 1 << 20, 4 << 20};
    memory_share(&engine->memory, &plan, engine->dev, &engine->kv_cache, &engine->kvcache,
                 &engine->scheduler, &engine->registry.pool);
    cr_assert_eq(mlora_adapter_random(engine, "a", 64, 1), MLORA_OK, "%s", mlora_error());
    for (int i = 0; i < 24; i++) ask_again(engine, &ended);
    for (int i = 0; i < 100; i++) cr_assert_eq(mlora_step(engine, NULL), MLORA_OK);
    mlora_engine_stats(engine, &stats);
    cr_expect_gt(stats.n_preemptions, 0, "they want more than there is");

    for (int i = 0; i < 5; i++) {
        struct answer *answer = &shared[i];
        const mlora_request request = greedy("a", "Rosa laughed", FEW_TOKENS, answer);
        *answer = (struct answer){0};
        submit(engine, &request);
        for (n = 0; answer->finish == MLORA_RUNNING && n < 1000; n++)
            cr_assert_eq(mlora_step(engine, NULL), MLORA_OK, "%s", mlora_error());
        cr_expect_leq(n, 60, "%d steps", n);
        cr_expect_eq(answer->n, shared[0].n);
        cr_expect_arr_eq(answer->ids, shared[0].ids, sizeof(int32_t) * (size_t)answer->n);
    }
    mlora_engine_stats(engine, &stats);
    cr_expect_geq(stats.n_adapter_loads, 1);
    mlora_close(engine);
}
