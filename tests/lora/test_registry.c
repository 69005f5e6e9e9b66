#include "lora/registry.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

/* ---- a device of host memory that counts what is allocated ----------------------------------- */

static int n_allocated;

static mlora_status fake_alloc(struct device *dev, size_t bytes, void **out)
{
    (void)dev;
    *out = malloc(bytes);
    n_allocated++;
    return MLORA_OK;
}

static void fake_free(struct device *dev, void *memory)
{
    (void)dev;
    if (memory) n_allocated--;
    free(memory);
}

static void fake_upload(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    memcpy(to, from, bytes);
}

static const struct kernels fake_ops = {
    .alloc = fake_alloc, .free = fake_free, .upload = fake_upload};
static struct device fake = {.ops = &fake_ops, .backend = "fake"};

enum { LAYERS = 2, FACTORS = (LAYERS + 1) * LORA_LINEARS };

static struct registry registry;

static void open_registry(void)
{
    n_allocated = 0;
    cr_assert_eq(registry_open(&registry, &fake, LAYERS), MLORA_OK);
}

static void close_registry(void)
{
    registry_close(&registry);
    cr_expect_eq(n_allocated, 0, "device memory leaked");
}

/* An adapter whose every factor has rank `rank`. */
static struct adapter new_adapter(int rank)
{
    struct adapter adapter = {.n_layers = LAYERS, .max_rank = rank};
    adapter.factors = calloc(FACTORS, sizeof *adapter.factors);
    for (int i = 0; i < FACTORS; i++) adapter.factors[i].R = rank;
    fake_alloc(&fake, 8, &adapter.memory);
    return adapter;
}

static void add(const char *name, int rank)
{
    struct adapter adapter = new_adapter(rank);
    cr_assert_eq(registry_add(&registry, name, &adapter), MLORA_OK, "%s", error_text());
    cr_expect_null(adapter.factors, "the registry took it over");
}

TestSuite(registry, .init = open_registry, .fini = close_registry);

Test(registry, holds_any_number_of_adapters_each_in_its_own_slot)
{
    char name[16];
    for (int i = 0; i < 100; i++) {
        snprintf(name, sizeof name, "a%d", i);
        add(name, i + 1);
    }
    for (int i = 0; i < 100; i++) {
        const struct registered *entry = registry_at(&registry, i);
        snprintf(name, sizeof name, "a%d", i);
        cr_assert_str_eq(entry->name, name);
        for (int f = 0; f < FACTORS; f++)
            cr_assert_eq(registry.dev_table[entry->slot * FACTORS + f].R, i + 1);
    }
    cr_expect_null(registry_at(&registry, 100));
    cr_expect_eq(registry.max_rank, 100);
}

Test(registry, keeps_an_adapter_while_it_is_used)
{
    struct registered *old, *new;

    add("x", 4);
    cr_assert_eq(registry_acquire(&registry, "x", &old), MLORA_OK);
    cr_assert_eq(registry_remove(&registry, "x"), MLORA_OK);
    registry_sweep(&registry);
    cr_expect_eq(registry_acquire(&registry, "x", &new), MLORA_ENOTFOUND);

    add("x", 8); /* the name is free again, the old one lives on */
    cr_assert_eq(registry_acquire(&registry, "x", &new), MLORA_OK);
    cr_expect_neq(old->slot, new->slot);
    cr_expect_eq(old->adapter.max_rank, 4);
    cr_expect_eq(new->adapter.max_rank, 8);

    const int slot = old->slot;
    registry_release(&registry, old);
    registry_sweep(&registry);
    add("y", 2);
    cr_expect_eq(registry_find(&registry, "y")->slot, slot, "its slot is used again");
    cr_expect_eq(registry.max_rank, 8);
    registry_release(&registry, new);
}

Test(registry, refuses_names_that_would_confuse)
{
    struct adapter adapter = new_adapter(1);
    char long_name[300];

    memset(long_name, 'a', sizeof long_name);
    long_name[299] = '\0';
    add("taken", 1);
    const char *const names[] = {"", "base", "taken", "a\nb", long_name};
    for (int i = 0; i < 5; i++)
        cr_expect_eq(registry_add(&registry, names[i], &adapter), MLORA_EINVAL, "\"%s\"", names[i]);
    cr_expect_not_null(adapter.factors, "it stays the caller's");
    adapter_free(&adapter, &fake);
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
