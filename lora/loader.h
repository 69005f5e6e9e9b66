/* The threads that bring adapters to the device beside the steps. One of them reads and converts an adapter
 * that is no longer in host memory; then all that are idle copy parts of it, since one alone writes less
 * than the bus carries. They start when a load has more parts than threads are idle, up to as many as the
 * device has lanes for. */
#ifndef MLORA_LORA_LOADER_H
#define MLORA_LORA_LOADER_H

#include <pthread.h>
#include <stdbool.h>

#include "kernels/kernels.h"
#include "lora/adapter.h"

/* Where an adapter's image comes from. */
struct source {
    char *directory; /* owned; NULL: random factors, of */
    uint64_t seed;
    bool lenient;
    mlora_dtype dtype;        /* of the factors */
    struct hash_key hash_key; /* of the plan */
};

/* Read the plan of an adapter in a directory. Returns what adapter_plan_read returns. */
mlora_status source_plan(struct adapter_plan *out, const struct source *source,
                         const struct model_config *config);

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

    /* The loader's. */
    size_t taken; /* bytes that are copied, or being copied */
    int n_copying;
};

struct loader;

struct loader_thread {
    struct loader *loader;
    pthread_t thread;
};

struct loader {
    struct device *dev;
    const struct model_config *config;
    pthread_mutex_t lock;
    pthread_cond_t pushed, finished;
    struct load *first, *last; /* that wait, in order */
    struct load *copying;      /* of which parts are left to be copied, in order */
    struct load *done;         /* that have arrived or failed */
    int n_idle;                /* threads that wait for one */
    bool stop;

    /* The engine's thread only. */
    int n_coming; /* pushed and not taken yet */
    int n_threads;
    struct loader_thread threads[UPLOAD_LANES]; /* [n_threads] each on the lane of its index */
};

mlora_status loader_open(struct loader *out, struct device *dev, const struct model_config *config);
void loader_close(struct loader *loader); /* accepts zeroes; what waits is forgotten */

/* Thread of these three: the engine's. The load is the caller's and stays in place until taken.
 * push returns OK, or ENOMEM (no thread starts). */
mlora_status loader_push(struct loader *loader, struct load *load);
struct load *loader_take(struct loader *loader); /* one that is finished, or NULL */
void loader_wait(struct loader *loader);         /* until there is one to take, if any is coming */

#endif
