#include "lora/registry.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { FIRST_SLOTS = 8, NEAREST_MAX = 3 };

static size_t slot_factors(const struct registry *registry)
{
    return ((size_t)registry->n_layers + 1) * LORA_LINEARS;
}

mlora_status registry_open(struct registry *out, struct device *dev, int n_layers)
{
    *out = (struct registry){.dev = dev, .n_layers = n_layers};
    if (pthread_mutex_init(&out->lock, NULL) != 0) {
        *out = (struct registry){0};
        return error_set(MLORA_ENOMEM, "out of memory: a lock for the adapters");
    }
    return MLORA_OK;
}

void registry_close(struct registry *registry)
{
    if (!registry->dev) return;
    for (int i = 0; i < registry->n_entries; i++) {
        assert(registry->entries[i]->users == 0);
        adapter_free(&registry->entries[i]->adapter, registry->dev);
        free(registry->entries[i]);
    }
    if (registry->dev_table) registry->dev->ops->free(registry->dev, registry->dev_table);
    if (registry->dev_own) registry->dev->ops->free(registry->dev, registry->dev_own);
    pthread_mutex_destroy(&registry->lock);
    free(registry->entries);
    free(registry->table);
    free(registry->own);
    free(registry->slot_taken);
    *registry = (struct registry){0};
}

/* ---- names -------------------------------------------------------------------------------- */

/* The listed entry of that name; the lock is held. */
static struct registered *find(const struct registry *registry, const char *name)
{
    for (int i = 0; i < registry->n_entries; i++)
        if (registry->entries[i]->listed && strcmp(registry->entries[i]->name, name) == 0)
            return registry->entries[i];
    return NULL;
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

/* Insertions, deletions and substitutions between two names (Levenshtein). */
static int edit_distance(const char *a, const char *b)
{
    int row[ADAPTER_NAME_MAX + 1];
    const int n = (int)strlen(b);

    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; a[i]; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 1; j <= n; j++) {
            const int substitute = diagonal + (a[i] != b[j - 1]);
            const int insert = row[j - 1] + 1, delete = row[j] + 1;
            diagonal = row[j];
            row[j] = substitute < insert ? substitute : insert;
            if (delete < row[j]) row[j] = delete;
        }
    }
    return row[n];
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

/* A table of twice the size, on the host and on the device, with the `used` bytes of the old one,
 * which is freed. On failure the old one stays. */
static mlora_status grow(struct device *dev, void **host, void **on_device, size_t used,
                         size_t bytes)
{
    void *new_host = calloc(1, bytes), *new_device = NULL;

    const mlora_status status =
        new_host
            ? dev->ops->alloc(dev, bytes, &new_device)
            : error_set(MLORA_ENOMEM, "out of memory: a table of %zu bytes for adapters", bytes);
    if (status != MLORA_OK) {
        free(new_host);
        return status;
    }
    if (used) memcpy(new_host, *host, used);
    dev->ops->upload(dev, new_device, new_host, bytes);
    if (*on_device) dev->ops->free(dev, *on_device);
    free(*host);
    *host = new_host;
    *on_device = new_device;
    return MLORA_OK;
}

/* Twice as many slots. */
static mlora_status grow_tables(struct registry *registry)
{
    struct device *dev = registry->dev;
    const size_t old = (size_t)registry->n_slots;
    const size_t n = old ? 2 * old : FIRST_SLOTS;
    const size_t per_slot = slot_factors(registry) * sizeof *registry->table;
    void *table = registry->table, *dev_table = registry->dev_table;
    void *own = registry->own, *dev_own = registry->dev_own;

    bool *taken = realloc(registry->slot_taken, n * sizeof *taken);
    if (!taken) return error_set(MLORA_ENOMEM, "out of memory: a table for %zu adapters", n);
    registry->slot_taken = taken;
    mlora_status status = grow(dev, &table, &dev_table, old * per_slot, n * per_slot);
    registry->table = table;
    registry->dev_table = dev_table;
    if (status != MLORA_OK) return status;
    status = grow(dev, &own, &dev_own, old * sizeof *registry->own, n * sizeof *registry->own);
    registry->own = own;
    registry->dev_own = dev_own;
    if (status != MLORA_OK) return status;
    memset(taken + old, 0, (n - old) * sizeof *taken);
    registry->n_slots = (int)n;
    return MLORA_OK;
}

/* The first free slot; may grow the table. */
static mlora_status find_slot(struct registry *registry, int *slot)
{
    for (*slot = 0; *slot < registry->n_slots; (*slot)++)
        if (!registry->slot_taken[*slot]) return MLORA_OK;
    return grow_tables(registry);
}

static mlora_status reserve_entry(struct registry *registry)
{
    if (registry->n_entries < registry->capacity) return MLORA_OK;
    const int capacity = registry->capacity ? 2 * registry->capacity : FIRST_SLOTS;
    struct registered **entries = realloc(registry->entries, (size_t)capacity * sizeof(*entries));
    if (!entries) return error_set(MLORA_ENOMEM, "out of memory: %d adapters", capacity);
    registry->entries = entries;
    registry->capacity = capacity;
    return MLORA_OK;
}

mlora_status registry_add(struct registry *registry, const char *name, struct adapter *adapter)
{
    const size_t per_slot = slot_factors(registry);
    struct registered *entry = NULL;
    int slot = 0;

    mlora_status status = check_name(name);
    if (status != MLORA_OK) return status;

    pthread_mutex_lock(&registry->lock);
    if (find(registry, name))
        status = error_set(MLORA_EINVAL, "adapter name \"%s\" is taken: unload it first", name);
    if (status == MLORA_OK) status = reserve_entry(registry);
    if (status == MLORA_OK) status = find_slot(registry, &slot);
    if (status == MLORA_OK) {
        entry = calloc(1, sizeof *entry);
        if (!entry) status = error_set(MLORA_ENOMEM, "out of memory: adapter \"%s\"", name);
    }
    if (status == MLORA_OK) {
        strcpy(entry->name, name); /* its length was checked */
        entry->adapter = *adapter;
        entry->slot = slot;
        registry->slot_taken[slot] = true;
        entry->listed = true;
        *adapter = (struct adapter){0};
        registry->entries[registry->n_entries++] = entry;
        if (entry->adapter.max_rank > registry->max_rank)
            registry->max_rank = entry->adapter.max_rank;
    }
    pthread_mutex_unlock(&registry->lock);
    if (status != MLORA_OK) return status;

    struct lora_factors *factors = registry->table + (size_t)slot * per_slot;
    memcpy(factors, entry->adapter.factors, per_slot * sizeof *factors);
    registry->dev->ops->upload(registry->dev, registry->dev_table + (size_t)slot * per_slot,
                               factors, per_slot * sizeof *factors);
    registry->own[slot] = entry->adapter.own;
    registry->dev->ops->upload(registry->dev, registry->dev_own + slot, &registry->own[slot],
                               sizeof *registry->own);
    return MLORA_OK;
}

mlora_status registry_remove(struct registry *registry, const char *name)
{
    pthread_mutex_lock(&registry->lock);
    struct registered *entry = find(registry, name);
    const mlora_status status = entry ? MLORA_OK : not_found(registry, name);
    if (entry) entry->listed = false;
    pthread_mutex_unlock(&registry->lock);
    return status;
}

void registry_sweep(struct registry *registry)
{
    int kept = 0;

    pthread_mutex_lock(&registry->lock);
    registry->max_rank = 0;
    for (int i = 0; i < registry->n_entries; i++) {
        struct registered *entry = registry->entries[i];
        if (!entry->listed && entry->users == 0) {
            registry->slot_taken[entry->slot] = false;
            adapter_free(&entry->adapter, registry->dev);
            free(entry);
            continue;
        }
        if (entry->adapter.max_rank > registry->max_rank)
            registry->max_rank = entry->adapter.max_rank;
        registry->entries[kept++] = entry;
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
    if (entry) entry->users++;
    *out = entry;
    pthread_mutex_unlock(&registry->lock);
    return status;
}

void registry_release(struct registry *registry, struct registered *entry)
{
    pthread_mutex_lock(&registry->lock);
    assert(entry->users > 0);
    entry->users--;
    pthread_mutex_unlock(&registry->lock);
}

const struct registered *registry_at(struct registry *registry, int index)
{
    const struct registered *found = NULL;

    pthread_mutex_lock(&registry->lock);
    for (int i = 0; i < registry->n_entries && index >= 0; i++) {
        if (!registry->entries[i]->listed) continue;
        if (index-- == 0) found = registry->entries[i];
    }
    pthread_mutex_unlock(&registry->lock);
    return found;
}

const struct registered *registry_find(struct registry *registry, const char *name)
{
    pthread_mutex_lock(&registry->lock);
    const struct registered *entry = find(registry, name);
    pthread_mutex_unlock(&registry->lock);
    return entry;
}
