#include "lora/registry.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/random.h"
#include "tests/lora/adapter_files.h"

/* Random adapters of the small model: the bytes of one of rank 1, worked by hand: A and B of each
 * linear together, 2 (K + N) bytes: q and o 32, k and v 24, gate, up and down 40: 256 each with
 * padding, 7 linears, 2 layers. */
enum { LAYERS = 2, FACTORS = (LAYERS + 1) * LORA_LINEARS, ONE = 2 * 7 * 256, ROOM = 4 };

static struct registry registry;
static struct model_config config;
static void *memory; /* of the pool */

static void open_with(int64_t device_bytes, int64_t host_bytes)
{
    struct device *dev = host_device();
    config = small_model();
    cr_assert_eq(dev->ops->alloc(dev, (size_t)device_bytes, &memory), MLORA_OK);
    cr_assert_eq(registry_open(&registry, dev, &config, memory, device_bytes, host_bytes),
                 MLORA_OK);
}

static void open_registry(void)
{
    open_with((int64_t)ROOM * ONE, 1 << 20);
}

static void close_registry(void)
{
    registry_close(&registry);
    host_device()->ops->free(host_device(), memory);
    cr_expect_eq(host_device_allocations(), 0, "device memory leaked");
}

/* The same with other bounds. */
static void open_again(int64_t device_bytes, int64_t host_bytes)
{
    registry_close(&registry);
    host_device()->ops->free(host_device(), memory);
    open_with(device_bytes, host_bytes);
}

static mlora_status try_add(const char *name, int rank, uint64_t seed)
{
    struct source source = {.seed = seed};
    struct adapter adapter;

    cr_assert_eq(adapter_random(&adapter, &config, rank, seed), MLORA_OK);
    const mlora_status status = registry_add(&registry, name, &adapter, &source);
    cr_expect_eq(adapter.factors == NULL, status == MLORA_OK, "it stays the caller's on failure");
    adapter_free(&adapter);
    return status;
}

static void add(const char *name, int rank)
{
    cr_assert_eq(try_add(name, rank, (uint64_t)(unsigned char)name[0]), MLORA_OK, "%s",
                 error_text());
}

static struct registered *acquire(const char *name)
{
    struct registered *entry;
    cr_assert_eq(registry_acquire(&registry, name, &entry), MLORA_OK, "%s", error_text());
    return entry;
}

/* Steps until it is on the device. */
static void bring(struct registered *entry)
{
    registry_want(entry);
    for (int i = 0; !registry_ready(entry); i++) {
        cr_assert_lt(i, 1000, "%s does not come", entry->name);
        registry_wait(&registry);
        registry_begin_step(&registry);
        registry_want(entry);
    }
}

static bool on_device(const char *name)
{
    return registry_find(&registry, name)->resident.state == RESIDENT_HERE;
}

/* What the tables say is at the factors of an adapter is what its seed gives. */
static void expect_content(const struct registered *entry, int rank, uint64_t seed)
{
    const struct lora_factors *factors =
        registry.pool.dev_table + (size_t)entry->resident.slot * FACTORS;
    struct adapter want;

    cr_assert_eq(adapter_random(&want, &config, rank, seed), MLORA_OK);
    cr_assert_eq(adapter_random_image(&want, seed), MLORA_OK);
    for (int i = 0; i < LAYERS * LORA_LINEARS; i++) {
        const enum lora_linear linear = (enum lora_linear)(i % LORA_LINEARS);
        const size_t a = 2 * (size_t)rank * (size_t)linear_inputs(&config, linear);
        const size_t b = 2 * (size_t)rank * (size_t)linear_outputs(&config, linear);
        const char *image = want.memory + ((uintptr_t)want.factors[i].a - want.origin);
        cr_assert_eq(factors[i].R, rank);
        cr_assert_arr_eq(factors[i].a, image, a, "%s: A of %d", entry->name, i);
        cr_assert_arr_eq(factors[i].b, image + a, b, "%s: B of %d", entry->name, i);
    }
    adapter_free(&want);
}

TestSuite(registry, .init = open_registry, .fini = close_registry, .timeout = 60);

/* ---- names ---------------------------------------------------------------------------------- */

Test(registry, holds_more_adapters_than_the_device_and_swaps_them)
{
    char name[16];

    for (int i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(try_add(name, 1, (uint64_t)i), MLORA_OK);
    }
    cr_expect_eq(registry_count(&registry), 100);
    cr_expect_null(registry_at(&registry, 100));
    for (int i = 0; i < 300; i++) {
        const int which = i * 37 % 100;
        snprintf(name, sizeof name, "a%d", which);
        cr_assert_str_eq(registry_at(&registry, which)->name, name);
        struct registered *entry = acquire(name);
        bring(entry);
        expect_content(entry, 1, (uint64_t)which);
        registry_release(entry);
        registry_begin_step(&registry);
    }
    cr_expect_leq(registry.pool.arena.used, ROOM * ONE);
    cr_expect_eq(registry.n_loads, 300);
    cr_expect_eq(registry.pool.n_evictions, 300 - ROOM);
}

Test(registry, keeps_an_adapter_while_it_is_used)
{
    add("x", 1);
    struct registered *old = acquire("x"), *none;
    bring(old);
    cr_assert_eq(registry_remove(&registry, "x"), MLORA_OK);
    registry_sweep(&registry);
    cr_expect_eq(registry_acquire(&registry, "x", &none), MLORA_ENOTFOUND);

    add("x", 2); /* the name is free again, the old one lives on */
    struct registered *new = acquire("x");
    bring(new);
    cr_expect_neq(old->resident.slot, new->resident.slot);
    expect_content(old, 1, 'x');
    expect_content(new, 2, 'x');

    const int slot = old->resident.slot;
    registry_release(old);
    registry_sweep(&registry);
    add("y", 1);
    struct registered *other = acquire("y");
    bring(other);
    cr_expect_eq(other->resident.slot, slot, "its slot is used again");
    registry_release(new);
    registry_release(other);
}

Test(registry, replaces_for_new_requests_only)
{
    struct source source = {.seed = 7};
    struct adapter adapter;

    add("x", 1);
    cr_assert_eq(registry_pin(&registry, "x", true), MLORA_OK);
    struct registered *old = acquire("x");
    cr_assert_eq(adapter_random(&adapter, &config, 1, 7), MLORA_OK);
    cr_expect_eq(registry_replace(&registry, "y", &adapter, &source), MLORA_ENOTFOUND);
    cr_expect_not_null(adapter.factors, "it stays the caller's");
    cr_assert_eq(registry_replace(&registry, "x", &adapter, &source), MLORA_OK);
    cr_expect_eq(registry_count(&registry), 1);
    struct registered *new = acquire("x");
    cr_expect_neq(old, new);
    cr_expect(new->resident.pinned);
    cr_expect_not(old->resident.pinned);
    bring(old);
    bring(new);
    expect_content(old, 1, 'x');
    expect_content(new, 1, 7);
    registry_release(old);
    registry_release(new);
    registry_sweep(&registry);
    cr_expect_eq(registry.n_entries, 1);
}

Test(registry, refuses_names_that_would_confuse)
{
    char long_name[300];

    memset(long_name, 'a', sizeof long_name);
    long_name[299] = '\0';
    add("taken", 1);
    const char *const names[] = {"", "base", "taken", "a\nb", long_name};
    for (int i = 0; i < 5; i++)
        cr_expect_eq(try_add(names[i], 1, 1), MLORA_EINVAL, "\"%s\"", names[i]);
    try_add("taken", 1, 1);
    cr_expect_str_eq(error_text(), "adapter name \"taken\" is taken: unload or replace it");
}

Test(registry, names_the_nearest_when_there_is_none)
{
    struct registered *entry;

    add("pirate", 1);
    add("sql", 1);
    add("mood", 1);
    add("spanish", 1);
    cr_expect_eq(registry_acquire(&registry, "pirat", &entry), MLORA_ENOTFOUND);
    cr_expect_null(entry);
    cr_expect_eq(strncmp(error_text(), "no adapter \"pirat\"; the nearest are: pirate, ",
                         strlen("no adapter \"pirat\"; the nearest are: pirate, ")),
                 0, "%s", error_text());
    cr_expect_eq(registry_acquire(&registry, "mod", &entry), MLORA_ENOTFOUND);
    cr_expect_str_eq(error_text(), "no adapter \"mod\"; the nearest are: mood, sql, pirate");
}

/* ---- the device ----------------------------------------------------------------------------- */

Test(registry, the_least_recently_used_leaves)
{
    const char *const names[] = {"a", "b", "c", "d"};
    add("e", 1);
    for (int i = 0; i < ROOM; i++) {
        add(names[i], 1);
        struct registered *entry = acquire(names[i]);
        bring(entry);
        registry_begin_step(&registry);
        registry_release(entry);
    }
    struct registered *a = acquire("a"), *e = acquire("e");
    cr_assert(registry_ready(a));
    registry_want(a); /* used again */
    registry_begin_step(&registry);
    bring(e);
    cr_expect(on_device("a"));
    cr_expect_not(on_device("b"));
    cr_expect(on_device("c"));
    cr_expect(on_device("d"));
    registry_release(a);
    registry_release(e);
}

Test(registry, several_come_at_a_time)
{
    const char *const names[] = {"a", "b", "c", "d"};
    struct registered *all[4];

    cr_assert_leq(4, UPLOAD_LANES);
    host_device_meet(4);
    for (int i = 0; i < 4; i++) {
        add(names[i], 1);
        all[i] = acquire(names[i]);
        registry_prefetch(all[i]);
    }
    for (int i = 0; i < 4; i++) bring(all[i]);
    cr_expect(host_device_met());
    for (int i = 0; i < 4; i++) {
        expect_content(all[i], 1, (uint64_t)names[i][0]);
        registry_release(all[i]);
    }
}

/* An adapter of 50 MB, for which some threads are worth their while. */
static struct registered *add_large(const char *name)
{
    enum { RANK = 64 };
    open_again(64 << 20, 64 << 20);
    config.mlp_size = 1 << 16;
    add(name, RANK);
    return acquire(name);
}

Test(registry, several_threads_copy_a_large_one)
{
    struct registered *entry = add_large("a");

    host_device_meet(3);
    bring(entry);
    cr_expect(host_device_met());
    expect_content(entry, 64, 'a');
    registry_release(entry);
}

Test(registry, a_copy_that_fails_is_told_once_all_have_ended)
{
    struct registered *entry = add_large("a");

    host_device_fail_uploads(true);
    registry_want(entry);
    for (int i = 0; !registry_failure(entry); i++) {
        cr_assert_lt(i, 1000);
        registry_wait(&registry);
        registry_begin_step(&registry);
    }
    cr_expect_str_eq(registry_failure(entry), "no way to the device");
    cr_expect_not(registry_ready(entry));
    host_device_fail_uploads(false);
    registry_prefetch(entry); /* a new request tries again */
    bring(entry);
    expect_content(entry, 64, 'a');
    registry_release(entry);
}

Test(registry, what_runs_or_is_pinned_stays)
{
    add("a", 2);
    add("b", 1);
    add("c", 1);
    add("d", 1);
    /* rank 2: 64, 48, 80 bytes, still 256 each: as large as rank 1 */
    struct registered *all[4] = {acquire("a"), acquire("b"), acquire("c"), acquire("d")};
    for (int i = 0; i < 4; i++) bring(all[i]);
    add("e", 1);
    struct registered *e = acquire("e");
    cr_assert_eq(registry_pin(&registry, "d", true), MLORA_OK);
    for (int step = 0; step < 3; step++) {
        registry_begin_step(&registry);
        for (int i = 0; i < 3; i++) registry_keep(all[i]);
        registry_want(e);
        cr_expect_eq(e->resident.state, RESIDENT_AWAY, "nothing may leave");
    }
    for (int i = 0; i < 4; i++) cr_expect_eq(all[i]->resident.state, RESIDENT_HERE);
    registry_begin_step(&registry);
    registry_keep(all[0]);
    registry_keep(all[2]);
    registry_want(e);
    cr_expect_eq(e->resident.state, RESIDENT_COMING);
    cr_expect_eq(all[1]->resident.state, RESIDENT_AWAY);
    bring(e);
    expect_content(e, 1, 'e');
    for (int i = 0; i < 4; i++) registry_release(all[i]);
    registry_release(e);
}

Test(registry, a_queued_request_does_not_take_what_others_wait_for)
{
    add("a", 1);
    add("b", 1);
    add("c", 1);
    add("d", 1);
    add("e", 1);
    struct registered *all[4] = {acquire("a"), acquire("b"), acquire("c"), acquire("d")};
    for (int i = 0; i < 4; i++) bring(all[i]);
    registry_begin_step(&registry);
    struct registered *e = acquire("e");
    registry_prefetch(e);
    cr_expect_eq(e->resident.state, RESIDENT_AWAY);
    registry_release(all[1]); /* nobody waits for b any more */
    registry_prefetch(e);
    cr_expect_eq(e->resident.state, RESIDENT_COMING);
    cr_expect_eq(all[1]->resident.state, RESIDENT_AWAY);
    registry_release(all[0]);
    registry_release(all[2]);
    registry_release(all[3]);
    registry_release(e);
}

/* Adapters of ranks 1 to 64 in any order: what fits by its sum comes, and holds its own values after
 * others were moved past it. */
Test(registry, any_ranks_lie_side_by_side)
{
    enum { N = 40 };
    struct registered *held[6] = {0};
    char name[16];
    unsigned seed = 3;

    open_again(300000, 1 << 20);
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(try_add(name, 1 + i * 63 / (N - 1), (uint64_t)i), MLORA_OK, "%s",
                     error_text());
    }
    for (int step = 0; step < 2000; step++) {
        int64_t kept = 0;
        seed = seed * 1664525u + 1013904223u;
        const int which = (int)(seed >> 8) % N, h = (int)(seed >> 20) % 6;
        registry_begin_step(&registry);
        if (held[h]) registry_release(held[h]);
        held[h] = NULL;
        for (int i = 0; i < 6; i++) {
            if (!held[i]) continue;
            registry_keep(held[i]);
            kept += held[i]->resident.extent.bytes;
        }
        snprintf(name, sizeof name, "a%d", which);
        struct registered *entry = acquire(name);
        bool fits = kept + arena_round(entry->adapter.bytes) <= registry.pool.arena.capacity;
        for (int i = 0; i < 6; i++) fits |= held[i] == entry;
        registry_want(entry);
        if (!registry_ready(entry)) {
            cr_assert_eq(entry->resident.state, fits ? RESIDENT_COMING : RESIDENT_AWAY);
            if (fits) {
                registry_wait(&registry);
                registry_begin_step(&registry);
                cr_assert(registry_ready(entry));
            }
        }
        if (fits)
            held[h] = entry;
        else
            registry_release(entry);
        for (int i = 0; i < 6 && step % 8 == 0; i++) {
            const int number = held[i] ? atoi(held[i]->name + 1) : 0;
            if (held[i]) expect_content(held[i], 1 + number * 63 / (N - 1), (uint64_t)number);
        }
    }
    cr_expect_gt(registry.pool.n_moves, 10);
    for (int i = 0; i < 6; i++)
        if (held[i]) registry_release(held[i]);
}

Test(registry, refuses_what_would_never_fit)
{
    cr_expect_eq(try_add("large", 512, 1), MLORA_ENOMEM);
    cr_expect_str_eq(error_text(),
                     "adapter \"large\" needs 237568 bytes on the device, the pool for "
                     "adapters holds 14336: raise adapter_memory");
    add("a", 1);
    add("b", 8);
    /* of rank 8 gate, up and down have 16 * 20 bytes, the others up to 256 */
    cr_expect_eq(registry_find(&registry, "b")->adapter.bytes, 2 * (4 * 256 + 3 * 512));
    add("c", 1);
    add("d", 1);
    cr_assert_eq(registry_pin(&registry, "a", true), MLORA_OK);
    cr_assert_eq(registry_pin(&registry, "c", true), MLORA_OK);
    cr_expect_eq(registry_pin(&registry, "d", true), MLORA_ENOMEM, "b needs a third of the room");
    cr_expect_str_eq(error_text(),
                     "the pool for adapters holds 14336 bytes: the pinned ones take 10752 and "
                     "adapter \"b\" needs 5120: pin fewer or raise adapter_memory");
    cr_expect_eq(registry_pin(&registry, "none", true), MLORA_ENOTFOUND);
    cr_expect_eq(registry_pin(&registry, "c", false), MLORA_OK);
    cr_expect_eq(registry_pin(&registry, "d", true), MLORA_OK);
}

Test(registry, a_full_device_is_told_to_who_waits_for_an_adapter)
{
    add("a", 1);
    struct registered *entry = acquire("a");
    host_device_fail(true);
    registry_want(entry);
    host_device_fail(false);
    cr_assert_not_null(registry_failure(entry));
    cr_expect_str_eq(registry_failure(entry), "the device is full");
    cr_expect_eq(registry.pool.arena.used, 0);
    registry_prefetch(entry);
    bring(entry);
    registry_release(entry);
}

/* ---- host memory and files ------------------------------------------------------------------ */

static const float factor_a[16] = {1, 2, 3}, factor_b[16] = {4, 5};

/* A directory with an adapter of rank 2 on one linear. */
static char *write_adapter(void)
{
    const struct tensor_data tensors[] = {
        {"@0.self_attn.q_proj.lora_A.weight", "F32", 2, 8, factor_a},
        {"@0.self_attn.q_proj.lora_B.weight", "F32", 8, 2, factor_b}};
    char *directory = directory_make();
    write_config(directory, "{}");
    write_tensor_data(directory, tensors, 2);
    return directory;
}

static void add_directory(const char *name, const char *directory)
{
    struct source source = {.directory = strdup(directory)};
    struct adapter_plan plan;
    struct adapter adapter;

    cr_assert_eq(adapter_plan_read(&plan, directory, &config, false), MLORA_OK);
    cr_assert_eq(adapter_load(&adapter, host_device(), &plan, &config, NULL), MLORA_OK);
    adapter_plan_free(&plan);
    cr_assert_eq(registry_add(&registry, name, &adapter, &source), MLORA_OK, "%s", error_text());
}

Test(registry, host_memory_is_bounded_and_files_are_read_again)
{
    char *directory = write_adapter();

    open_again(3 * 512, 4 * 512); /* A and B take 256 bytes each */
    for (int i = 0; i < 20; i++) {
        const char name[2] = {(char)('a' + i), '\0'};
        add_directory(name, directory);
        cr_assert_leq(registry.host_bytes, 4 * 512);
    }
    for (int i = 0; i < 60; i++) {
        const char name[2] = {(char)('a' + i * 7 % 20), '\0'};
        struct registered *entry = acquire(name);
        bring(entry);
        cr_assert_leq(registry.host_bytes, 4 * 512);
        const struct lora_factors *q =
            &registry.pool.dev_table[(size_t)entry->resident.slot * FACTORS + LORA_Q];
        cr_assert_arr_eq(q->a, factor_a, sizeof factor_a);
        cr_assert_arr_eq(q->b, factor_b, sizeof factor_b);
        registry_release(entry);
        registry_begin_step(&registry);
    }
    directory_remove(directory);
}

Test(registry, a_file_that_is_gone_fails_its_requests_until_it_is_back)
{
    char *directory = write_adapter(), moved[600];

    open_again(8 * 512, 0); /* every load reads the file */
    add_directory("x", directory);
    struct registered *entry = acquire("x");
    snprintf(moved, sizeof moved, "%s-moved", directory);
    cr_assert_eq(rename(directory, moved), 0);
    registry_want(entry);
    registry_wait(&registry);
    registry_begin_step(&registry);
    registry_want(entry);
    cr_expect_eq(entry->resident.state, RESIDENT_AWAY, "only a new request tries again");
    cr_assert_not_null(registry_failure(entry));
    cr_expect_not_null(strstr(registry_failure(entry), "adapter_config.json"), "%s",
                       registry_failure(entry));
    cr_expect(registry.any_failed);
    cr_expect_eq(registry.pool.arena.used, 0, "its room is given back");

    cr_assert_eq(rename(moved, directory), 0);
    registry_prefetch(entry); /* another request for it */
    cr_expect_null(registry_failure(entry));
    bring(entry);
    registry_release(entry);
    directory_remove(directory);
}

/* ---- threads -------------------------------------------------------------------------------- */

static void *hold_and_release(void *context)
{
    unsigned seed = *(const unsigned *)context;
    char name[16];

    for (int i = 0; i < 2000; i++) {
        struct registered *entry;
        seed = seed * 1664525u + 1013904223u;
        snprintf(name, sizeof name, "a%d", (int)(seed >> 8) % 12);
        if (registry_acquire(&registry, name, &entry) != MLORA_OK) continue;
        cr_assert_str_eq(entry->name, name);
        registry_release(entry);
    }
    return NULL;
}

Test(registry, any_thread_may_acquire_while_adapters_come_and_go)
{
    unsigned seeds[3] = {1, 2, 3};
    pthread_t threads[3];
    char name[16];

    for (int i = 0; i < 12; i++) {
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_eq(try_add(name, 1, (uint64_t)i), MLORA_OK);
    }
    for (int i = 0; i < 3; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, hold_and_release, &seeds[i]), 0);
    for (int i = 0; i < 400; i++) {
        snprintf(name, sizeof name, "a%d", i % 12);
        struct registered *entry = acquire(name);
        bring(entry);
        expect_content(entry, 1, (uint64_t)(i < 12 ? i : i - 12));
        registry_release(entry);
        cr_assert_eq(registry_remove(&registry, name), MLORA_OK);
        registry_begin_step(&registry);
        registry_sweep(&registry);
        cr_assert_eq(try_add(name, 1, (uint64_t)i), MLORA_OK, "%s", error_text());
    }
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    registry_sweep(&registry);
    cr_expect_eq(registry.n_entries, 12);
}
