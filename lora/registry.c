#include "lora/registry.h"

#include <assert.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/distance.h"
#include "engine/base/error.h"

enum { FIRST_ENTRIES = 8, NEAREST_MAX = 3 };

mlora_status registry_open(struct registry *out, struct device *dev,
                           const struct model_config *config, char *memory, int64_t device_bytes,
                           int64_t host_bytes)
{
    *out = (struct registry){.host_capacity = host_bytes};
    if (pthread_mutex_init(&out->lock, NULL) != 0)
        return error_set(MLORA_ENOMEM, "out of memory: a lock for the adapters");
    mlora_status status = pool_open(&out->pool, dev, config->n_layers, memory, device_bytes);
    if (status == MLORA_OK) status = loader_open(&out->loader, dev, config);
    if (status != MLORA_OK) {
        pool_close(&out->pool);
        pthread_mutex_destroy(&out->lock);
        *out = (struct registry){0};
        return status;
    }
    out->dev = dev;
    return MLORA_OK;
}

static void free_entry(struct registered *entry)
{
    adapter_free(&entry->adapter);
    free(entry->source.directory);
    free(entry->failure);
    free(entry);
}

void registry_close(struct registry *registry)
{
    if (!registry->dev) return;
    loader_close(&registry->loader); /* nothing is on its way any more */
    for (int i = 0; i < registry->n_entries; i++) {
        assert(registry->entries[i]->resident.users == 0);
        free_entry(registry->entries[i]);
    }
    pool_close(&registry->pool);
    pthread_mutex_destroy(&registry->lock);
    free(registry->entries);
    free(registry->buckets);
    *registry = (struct registry){0};
}

/* ---- names -------------------------------------------------------------------------------- */

/* Where the list of names that hash like this one begins (FNV-1a). */
static struct registered **bucket_of(const struct registry *registry, const char *name)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return &registry->buckets[hash & (registry->n_buckets - 1)];
}

/* The listed entry of that name; the lock is held, or this is the engine's thread. */
static struct registered *find(const struct registry *registry, const char *name)
{
    struct registered *entry = registry->n_buckets > 0 ? *bucket_of(registry, name) : NULL;

    while (entry && strcmp(entry->name, name) != 0) entry = entry->next_named;
    return entry;
}

/* The lock is held for these two. */
static void list(struct registry *registry, struct registered *entry)
{
    struct registered **bucket = bucket_of(registry, entry->name);

    entry->listed = true;
    entry->next_named = *bucket;
    *bucket = entry;
}

static void unlist(struct registry *registry, struct registered *entry)
{
    struct registered **at = bucket_of(registry, entry->name);

    while (*at != entry) at = &(*at)->next_named;
    *at = entry->next_named;
    entry->listed = false;
    entry->resident.pinned = false;
    registry->n_unlisted++;
}

static mlora_status check_name(const char *name)
{
    const size_t bytes = strlen(name);

    if (bytes == 0 || bytes > ADAPTER_NAME_MAX)
        return error_set(MLORA_EINVAL, "an adapter's name has %zu bytes, must have 1 to %d", bytes,
                         ADAPTER_NAME_MAX);
    for (const unsigned char *c = (const unsigned char *)name; *c; c++)
        if (*c < 0x20 || *c == 0x7f)
            return error_set(MLORA_EINVAL, "adapter name \"%s\" holds a control character", name);
    if (strcmp(name, "base") == 0)
        return error_set(MLORA_EINVAL,
                         "adapter name \"base\" means the base model: choose another");
    return MLORA_OK;
}

/* "no adapter "x"; the nearest are a, b, c"; the lock is held. */
static mlora_status not_found(const struct registry *registry, const char *name)
{
    const struct registered *nearest[NEAREST_MAX] = {0};
    int distance[NEAREST_MAX];
    int n = 0;

    if (strlen(name) > ADAPTER_NAME_MAX)
        return error_set(MLORA_ENOTFOUND, "no adapter has a name of more than %d bytes",
                         ADAPTER_NAME_MAX);
    for (int i = 0; i < registry->n_entries; i++) {
        const struct registered *entry = registry->entries[i];
        if (!entry->listed) continue;
        const int far = edit_distance(name, entry->name);
        int at = n < NEAREST_MAX ? n++ : NEAREST_MAX;
        while (at > 0 && distance[at - 1] > far) {
            if (at < NEAREST_MAX) {
                nearest[at] = nearest[at - 1];
                distance[at] = distance[at - 1];
            }
            at--;
        }
        if (at < NEAREST_MAX) {
            nearest[at] = entry;
            distance[at] = far;
        }
    }
    if (n == 0) return error_set(MLORA_ENOTFOUND, "no adapter \"%s\": none is loaded", name);
    return error_set(MLORA_ENOTFOUND, "no adapter \"%s\"; the nearest %s: %s%s%s%s%s", name,
                     n == 1 ? "is" : "are", nearest[0]->name, n > 1 ? ", " : "",
                     n > 1 ? nearest[1]->name : "", n > 2 ? ", " : "",
                     n > 2 ? nearest[2]->name : "");
}

/* ---- adding and removing ------------------------------------------------------------------ */

/* Room for one more, as many buckets as entries; the lock is held. */
static mlora_status reserve_entry(struct registry *registry)
{
    if (registry->n_entries < registry->capacity) return MLORA_OK;
    const int capacity = registry->capacity ? 2 * registry->capacity : FIRST_ENTRIES;
    struct registered **entries = realloc(registry->entries, (size_t)capacity * sizeof(*entries));
    if (entries) registry->entries = entries;
    struct registered **buckets = entries ? calloc((size_t)capacity, sizeof(*buckets)) : NULL;
    if (!buckets) return error_set(MLORA_ENOMEM, "out of memory: %d adapters", capacity);
    free(registry->buckets);
    registry->buckets = buckets;
    registry->n_buckets = (size_t)capacity;
    registry->capacity = capacity;
    for (int i = 0; i < registry->n_entries; i++)
        if (registry->entries[i]->listed) list(registry, registry->entries[i]);
    return MLORA_OK;
}

/* Any adapter must find room beside the pinned ones, or its requests would wait for ever: with
 * `bytes` more, pinned or not, and without `gone`. */
static mlora_status check_fit(const struct registry *registry, const char *name, int64_t bytes,
                              bool pinned, const struct registered *gone)
{
    int64_t pinned_bytes = pinned ? bytes : 0, largest = pinned ? 0 : bytes;
    const char *largest_name = name;

    for (int i = 0; i < registry->n_entries; i++) {
        const struct registered *entry = registry->entries[i];
        const int64_t own = arena_round(entry->adapter.bytes);
        if (!entry->listed || entry == gone) continue;
        if (entry->resident.pinned) {
            pinned_bytes += own;
        } else if (own > largest) {
            largest = own;
            largest_name = entry->name;
        }
    }
    const int64_t room = registry->pool.limit;
    if (pinned_bytes + largest <= room) return MLORA_OK;
    if (pinned_bytes == 0 || (!pinned && bytes > room))
        return error_set(MLORA_ENOMEM,
                         "adapter \"%s\" needs %" PRId64 " bytes on the device, the pool for "
                         "adapters holds %" PRId64 ": raise adapter_memory",
                         name, bytes, room);
    return error_set(MLORA_ENOMEM,
                     "the pool for adapters holds %" PRId64 " bytes: the pinned ones take %" PRId64
                     " and adapter \"%s\" needs %" PRId64 ": pin fewer or raise adapter_memory",
                     room, pinned_bytes, largest_name, largest);
}

/* Drop the images that were used longest ago, until the rest is within bounds. */
static void trim_images(struct registry *registry)
{
    while (registry->host_bytes > registry->host_capacity) {
        struct registered *oldest = NULL;
        for (int i = 0; i < registry->n_entries; i++) {
            struct registered *entry = registry->entries[i];
            if (entry->loading || !entry->adapter.memory) continue;
            if (!oldest || entry->resident.used_at < oldest->resident.used_at) oldest = entry;
        }
        if (!oldest) return;
        registry->host_bytes -= oldest->adapter.bytes;
        adapter_drop_image(&oldest->adapter);
    }
}

/* A new entry under `name`, in the place of `old`, which may be NULL. */
static mlora_status add(struct registry *registry, const char *name, struct adapter *adapter,
                        struct source *source, struct registered *old)
{
    const bool pinned = old && old->resident.pinned;
    const int64_t bytes = arena_round(adapter->bytes);

    mlora_status status = check_fit(registry, name, bytes, pinned, old);
    if (status != MLORA_OK) return status;
    struct registered *entry = calloc(1, sizeof *entry);
    if (!entry) return error_set(MLORA_ENOMEM, "out of memory: adapter \"%s\"", name);

    pthread_mutex_lock(&registry->lock);
    status = reserve_entry(registry);
    if (status == MLORA_OK) {
        strcpy(entry->name, name); /* its length was checked */
        entry->registry = registry;
        entry->adapter = *adapter;
        entry->source = *source;
        entry->resident.adapter = &entry->adapter;
        entry->resident.slot = -1;
        entry->resident.pinned = pinned;
        entry->resident.used_at = registry->pool.step;
        *adapter = (struct adapter){0};
        *source = (struct source){0};
        if (old) unlist(registry, old);
        list(registry, entry);
        registry->entries[registry->n_entries++] = entry;
        if (entry->adapter.memory) registry->host_bytes += entry->adapter.bytes;
    }
    pthread_mutex_unlock(&registry->lock);
    if (status != MLORA_OK) free(entry);
    trim_images(registry);
    return status;
}

mlora_status registry_check_name(struct registry *registry, const char *name)
{
    const mlora_status status = check_name(name);
    if (status != MLORA_OK || !find(registry, name)) return status;
    return error_set(MLORA_EINVAL, "adapter name \"%s\" is taken: unload or replace it", name);
}

mlora_status registry_add(struct registry *registry, const char *name, struct adapter *adapter,
                          struct source *source)
{
    const mlora_status status = registry_check_name(registry, name);
    return status == MLORA_OK ? add(registry, name, adapter, source, NULL) : status;
}

mlora_status registry_replace(struct registry *registry, const char *name, struct adapter *adapter,
                              struct source *source)
{
    struct registered *old = find(registry, name);

    if (!old) return not_found(registry, name);
    return add(registry, name, adapter, source, old);
}

mlora_status registry_remove(struct registry *registry, const char *name)
{
    struct registered *entry = find(registry, name);

    if (!entry) return not_found(registry, name);
    pthread_mutex_lock(&registry->lock);
    unlist(registry, entry);
    pthread_mutex_unlock(&registry->lock);
    return MLORA_OK;
}

mlora_status registry_pin(struct registry *registry, const char *name, bool pin)
{
    struct registered *entry = find(registry, name);

    if (!entry) return not_found(registry, name);
    if (pin && !entry->resident.pinned) {
        const mlora_status status =
            check_fit(registry, name, arena_round(entry->adapter.bytes), true, entry);
        if (status != MLORA_OK) return status;
    }
    entry->resident.pinned = pin;
    if (pin) registry_prefetch(entry);
    return MLORA_OK;
}

void registry_sweep(struct registry *registry)
{
    int kept = 0;

    if (registry->n_unlisted == 0) return;
    pthread_mutex_lock(&registry->lock);
    for (int i = 0; i < registry->n_entries; i++) {
        struct registered *entry = registry->entries[i];
        if (entry->listed || atomic_load(&entry->resident.users) > 0 || entry->loading) {
            registry->entries[kept++] = entry;
            continue;
        }
        if (entry->resident.state != RESIDENT_AWAY) pool_remove(&registry->pool, &entry->resident);
        if (entry->adapter.memory) registry->host_bytes -= entry->adapter.bytes;
        free_entry(entry);
        registry->n_unlisted--;
    }
    registry->n_entries = kept;
    pthread_mutex_unlock(&registry->lock);
}

/* ---- use ---------------------------------------------------------------------------------- */

mlora_status registry_acquire(struct registry *registry, const char *name, struct registered **out)
{
    pthread_mutex_lock(&registry->lock);
    struct registered *entry = find(registry, name);
    const mlora_status status = entry ? MLORA_OK : not_found(registry, name);
    if (entry) atomic_fetch_add(&entry->resident.users, 1);
    *out = entry;
    pthread_mutex_unlock(&registry->lock);
    return status;
}

void registry_release(struct registered *entry)
{
    const int before = atomic_fetch_sub(&entry->resident.users, 1);
    assert(before > 0);
    (void)before;
}

int registry_count(const struct registry *registry)
{
    int n = 0;
    for (int i = 0; i < registry->n_entries; i++) n += registry->entries[i]->listed;
    return n;
}

const struct registered *registry_at(const struct registry *registry, int index)
{
    for (int i = 0; i < registry->n_entries && index >= 0; i++)
        if (registry->entries[i]->listed && index-- == 0) return registry->entries[i];
    return NULL;
}

const struct registered *registry_find(const struct registry *registry, const char *name)
{
    return find(registry, name);
}

/* ---- to the device ------------------------------------------------------------------------ */

static void fail(struct registered *entry, const char *why)
{
    free(entry->failure);
    entry->failure = strdup(why);
    entry->failed = true;
    entry->registry->any_failed = true;
}

/* Begin to bring it, if there is room. */
static void start(struct registered *entry, bool force)
{
    struct registry *registry = entry->registry;
    bool placed = false;

    if (force && registry->pool.full_at == registry->pool.step) return;
    mlora_status status = pool_place(&registry->pool, &entry->resident, force, &placed);
    if (status == MLORA_OK && !placed) {
        if (force) registry->pool.full_at = registry->pool.step;
        return;
    }
    if (status == MLORA_OK) {
        entry->had_image = entry->adapter.memory != NULL;
        entry->load = (struct load){.adapter = &entry->adapter,
                                    .source = &entry->source,
                                    .to = pool_address(&registry->pool, &entry->resident)};
        status = loader_push(&registry->loader, &entry->load);
        entry->loading = status == MLORA_OK;
        if (!entry->loading) pool_remove(&registry->pool, &entry->resident);
    }
    if (status != MLORA_OK) fail(entry, error_text());
}

void registry_begin_step(struct registry *registry)
{
    struct load *load;

    registry->pool.step++;
    while ((load = loader_take(&registry->loader))) {
        struct registered *entry =
            (struct registered *)(void *)((char *)load - offsetof(struct registered, load));
        entry->loading = false;
        if (!entry->had_image && entry->adapter.memory)
            registry->host_bytes += entry->adapter.bytes;
        if (load->status == MLORA_OK) {
            pool_arrived(&registry->pool, &entry->resident);
            registry->n_loads++;
        } else {
            pool_remove(&registry->pool, &entry->resident);
            fail(entry, load->error);
        }
    }
    trim_images(registry);
}

void registry_keep(struct registered *entry)
{
    assert(entry->resident.state == RESIDENT_HERE);
    pool_keep(&entry->registry->pool, &entry->resident);
}

void registry_prefetch(struct registered *entry)
{
    entry->failed = false; /* a new request tries again */
    entry->resident.used_at = entry->registry->pool.step;
    if (entry->resident.state == RESIDENT_AWAY) start(entry, false);
}

void registry_want(struct registered *entry)
{
    pool_keep(&entry->registry->pool, &entry->resident);
    if (entry->resident.state == RESIDENT_AWAY && !entry->failed) start(entry, true);
}

const char *registry_failure(const struct registered *entry)
{
    if (!entry->failed) return NULL;
    return entry->failure ? entry->failure : "out of memory";
}

void registry_wait(struct registry *registry)
{
    loader_wait(&registry->loader);
}
