/* The thread that brings adapters to the device beside the steps: it reads and converts what is no
 * longer in host memory, and copies it over. It starts with the first load. */
#ifndef MLORA_LORA_LOADER_H
#define MLORA_LORA_LOADER_H

#include <pthread.h>
#include <stdbool.h>

#include "lora/adapter.h"

/* Where an adapter's image comes from. */
struct source {
    char *directory; /* owned; NULL: random factors, of */
    uint64_t seed;
    bool lenient;
    struct hash_key hash_key; /* as in the plan of the first load */
};

/* Make the image of an adapter that has none. Returns OK, EIO, EFORMAT, EUNSUPPORTED or ENOMEM. */
mlora_status source_read(const struct source *source, struct adapter *adapter,
                         const struct model_config *config);

/* One adapter on its way. From push to take the loader has the adapter's image alone. */
struct load {
    struct load *next;
    struct adapter *adapter;
    const struct source *source;
    char *to;            /* where the image goes; device memory that nothing else touches */
    mlora_status status; /* once it is taken: OK, or what failed... */
    char error[1024];    /* ... and its text */
};

struct loader {
    struct device *dev;
    const struct model_config *config;
    pthread_mutex_t lock;
    pthread_cond_t pushed, finished;
    struct load *first, *last; /* that wait, in order */
    struct load *done;         /* that have arrived or failed */
    int n_coming;              /* pushed and not taken yet: the engine's thread only */
    bool stop;
    pthread_t thread;
    bool started;
};

mlora_status loader_open(struct loader *out, struct device *dev, const struct model_config *config);
void loader_close(struct loader *loader); /* accepts zeroes; what waits is forgotten */

/* Thread of these three: the engine's. The load is the caller's and stays in place until taken.
 * push returns OK, or ENOMEM (the thread does not start). */
mlora_status loader_push(struct loader *loader, struct load *load);
struct load *loader_take(struct loader *loader); /* one that is finished, or NULL */
void loader_wait(struct loader *loader);         /* until there is one to take, if any is coming */

#endif
