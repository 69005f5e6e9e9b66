/* Names to adapters. An adapter stays while a request uses it, also after its name is gone or
 * belongs to another: what a request began with is what it ends with. */
#ifndef MLORA_LORA_REGISTRY_H
#define MLORA_LORA_REGISTRY_H

#include <pthread.h>
#include <stdbool.h>

#include "lora/adapter.h"

enum { ADAPTER_NAME_MAX = 255 }; /* bytes */

struct registered {
    char name[ADAPTER_NAME_MAX + 1];
    struct adapter adapter;
    int slot;    /* index of its factors in the device's table */
    int users;   /* requests that hold it */
    bool listed; /* its name can be asked for */
};

struct registry {
    struct device *dev;
    pthread_mutex_t lock;        /* entries' names, users and listed: submit() runs on any thread */
    struct registered **entries; /* [n_entries] in order of loading */
    int n_entries, capacity;
    int n_layers;
    int n_slots;                    /* of the tables                                   */
    bool *slot_taken;               /* [n_slots]                                       */
    struct lora_factors *table;     /* [n_slots, L + 1, LORA_LINEARS] host copy of...  */
    struct lora_factors *dev_table; /* ... the table that kernels read                 */
    struct lora_own *own, *dev_own; /* [n_slots] the same                              */
    int max_rank;                   /* of all entries, unlisted ones too               */
};

/* Returns OK or ENOMEM. */
mlora_status registry_open(struct registry *out, struct device *dev, int n_layers);
void registry_close(struct registry *registry); /* accepts zeroes; no user may be left */

/* Put an adapter under `name`. Takes over `adapter` and zeroes it; on failure it stays the
 * caller's. Returns OK, EINVAL (name empty, too long, not UTF-8 text, "base", or taken), ENOMEM. */
mlora_status registry_add(struct registry *registry, const char *name, struct adapter *adapter);

/* The name can no longer be asked for. Returns OK or ENOTFOUND. */
mlora_status registry_remove(struct registry *registry, const char *name);

/* Find by name and count one more user. Returns OK, or ENOTFOUND with the nearest names in the
 * text. Thread: any. */
mlora_status registry_acquire(struct registry *registry, const char *name, struct registered **out);
void registry_release(struct registry *registry, struct registered *entry); /* Thread: any. */

/* Free what is neither listed nor used. Not during a step. */
void registry_sweep(struct registry *registry);

/* Listed entries by order of loading; NULL past the end, or for an unknown name. */
const struct registered *registry_at(struct registry *registry, int index);
const struct registered *registry_find(struct registry *registry, const char *name);

#endif
