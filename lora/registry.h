/* Names to adapters, any number of them. What a request began with is what it ends with: an adapter
 * stays while a request uses it, also after its name is gone or belongs to another (each load is a
 * generation of its own that never changes).
 *
 * An adapter is on the disk always, in host memory as an image while that is within bounds, and on
 * the device while the pool has room (pool.h); the loader brings it there when a request wants it.
 *
 * Thread: the engine's, but for registry_acquire() and registry_release(): any. */
#ifndef MLORA_LORA_REGISTRY_H
#define MLORA_LORA_REGISTRY_H

#include <pthread.h>
#include <stdbool.h>

#include "lora/adapter.h"
#include "lora/loader.h"
#include "lora/pool.h"

enum { ADAPTER_NAME_MAX = 255 }; /* bytes */

struct registered {
    char name[ADAPTER_NAME_MAX + 1];
    struct registry *registry;
    struct adapter adapter; /* all but the image is immutable */
    struct source source;
    struct resident resident;
    struct load load;
    bool loading;                  /* the loader has it */
    bool had_image;                /* when the loader got it */
    bool listed;                   /* its name can be asked for */
    struct registered *next_named; /* the next listed one in the same bucket */
    bool failed;                   /* it could not be brought; a new request tries again... */
    char *failure;                 /* ... why */
};

struct registry {
    struct device *dev;
    pthread_mutex_t lock;        /* entries, their names and listed: submit() runs on any thread */
    struct registered **entries; /* [n_entries] in order of loading */
    int n_entries, capacity;
    int n_unlisted;              /* of those: they wait for their users to end */
    struct registered **buckets; /* [n_buckets] listed entries by name */
    size_t n_buckets;            /* a power of two, or 0 */
    struct pool pool;
    struct loader loader;
    int64_t host_bytes, host_capacity; /* of images */
    int64_t n_loads;                   /* that arrived on the device */
    bool any_failed;                   /* since the engine looked last */
};

/* `memory`, device [device_bytes], is for those that are on the device (it may grow: pool_share());
 * `host_bytes` bounds the images in host memory, which those on their way may exceed. `memory`
 * and `config` are borrowed. Returns OK or ENOMEM. */
mlora_status registry_open(struct registry *out, struct device *dev,
                           const struct model_config *config, char *memory, int64_t device_bytes,
                           int64_t host_bytes);
void registry_close(struct registry *registry); /* accepts zeroes; no user may be left */

/* OK, or EINVAL: empty, too long, not UTF-8 text, "base", or taken. */
mlora_status registry_check_name(struct registry *registry, const char *name);

/* Put an adapter under `name`. Takes over `adapter` and `source` and zeroes them; on failure they
 * stay the caller's. Returns OK, EINVAL (name), ENOMEM (also: it does not fit into the pool). */
mlora_status registry_add(struct registry *registry, const char *name, struct adapter *adapter,
                          struct source *source);

/* The same for a name that is there: new requests get the new one, and are as pinned as before.
 * Returns OK, ENOTFOUND, ENOMEM. */
mlora_status registry_replace(struct registry *registry, const char *name, struct adapter *adapter,
                              struct source *source);

/* The name can no longer be asked for. Returns OK or ENOTFOUND. */
mlora_status registry_remove(struct registry *registry, const char *name);

/* A pinned one does not leave the device once it is there. Returns OK, ENOTFOUND, or ENOMEM (some
 * adapter would find no room beside the pinned ones). */
mlora_status registry_pin(struct registry *registry, const char *name, bool pin);

/* Find by name and count one more user. Returns OK, or ENOTFOUND with the nearest names in the
 * text. */
mlora_status registry_acquire(struct registry *registry, const char *name, struct registered **out);
void registry_release(struct registered *entry);

/* Free what is neither listed nor used. Not during a step. */
void registry_sweep(struct registry *registry);

/* Listed entries by order of loading; NULL past the end, or for an unknown name. */
int registry_count(const struct registry *registry);
const struct registered *registry_at(const struct registry *registry, int index);
const struct registered *registry_find(const struct registry *registry, const char *name);

/* ---- to the device: in this order in each step ---- */

/* A step begins, the device is idle: what the loader has brought can be used from now on. */
void registry_begin_step(struct registry *registry);

/* The adapter of a request that runs in this step: it stays until the step is over. */
void registry_keep(struct registered *entry);

/* A request for it was queued: begin to bring it, if room can be had that nobody waits for. */
void registry_prefetch(struct registered *entry);

/* Whether a request for it can run: it is on the device. */
static inline bool registry_ready(const struct registered *entry)
{
    return entry->resident.state == RESIDENT_HERE;
}

/* Whether it was wanted and there is no room for it. */
static inline bool registry_has_no_room(const struct registered *entry)
{
    return entry->resident.state == RESIDENT_AWAY && !entry->failed;
}

/* A request waits for it: if it is there it stays for this step, else it is brought, and what is not
 * kept leaves for it. So: running ones are kept first, then the most urgent is asked for first, each
 * in each step. */
void registry_want(struct registered *entry);

/* Why it could not be brought; NULL: it did not fail. Valid until the next call for `entry`. */
const char *registry_failure(const struct registered *entry);

/* There is nothing to run: wait until the loader has brought something, if anything is coming. */
void registry_wait(struct registry *registry);

#endif
