#include "lora/loader.h"

#include <stdio.h>
#include <string.h>

#include "engine/base/error.h"
#include "lora/random.h"

mlora_status source_plan(struct adapter_plan *out, const struct source *source,
                         const struct model_config *config)
{
    const mlora_status status = adapter_plan_read(out, source->directory, config, source->lenient);

    if (status != MLORA_OK) return status;
    out->hash_key = source->hash_key;
    adapter_plan_convert(out, source->dtype);
    return MLORA_OK;
}

mlora_status source_read(const struct source *source, struct adapter *adapter,
                         const struct model_config *config)
{
    struct adapter_plan plan;

    if (!source->directory) return adapter_random_image(adapter, source->seed);
    mlora_status status = source_plan(&plan, source, config);
    if (status == MLORA_OK) status = adapter_load_again(adapter, &plan);
    adapter_plan_free(&plan);
    return status;
}

/* ---- the threads -------------------------------------------------------------------------- */

enum { PART_BYTES = 16 << 20 }; /* that a thread copies at a time */

static size_t bytes_of(const struct load *load)
{
    return (size_t)load->adapter->bytes;
}

static void fail(struct load *load, mlora_status status)
{
    load->status = status;
    snprintf(load->error, sizeof load->error, "%s", error_text());
}

/* The functions below are called, and return, with the lock; what takes long is done without it. */

static void finish(struct loader *loader, struct load *load)
{
    load->next = loader->done;
    loader->done = load;
    pthread_cond_signal(&loader->finished);
}

/* Make the image of the first load that waits, if it has none, and let it be copied. */
static void read_first(struct loader *loader)
{
    struct load *load = loader->first, **at = &loader->copying;
    mlora_status status = MLORA_OK;

    loader->first = load->next;
    if (!load->adapter->memory) {
        pthread_mutex_unlock(&loader->lock);
        status = source_read(load->source, load->adapter, loader->config);
        pthread_mutex_lock(&loader->lock);
    }
    if (status != MLORA_OK) {
        fail(load, status);
        finish(loader, load);
        return;
    }
    while (*at) at = &(*at)->next;
    *at = load;
    load->next = NULL;
    pthread_cond_broadcast(&loader->pushed);
}

/* Copy a part of the first load that has some left. Who is the last to end finishes the load. */
static void copy_part(struct loader *loader, int lane)
{
    struct load *load = loader->copying;
    struct device *dev = loader->dev;
    const size_t at = load->taken, left = bytes_of(load) - at;
    const size_t n = left < PART_BYTES ? left : (size_t)PART_BYTES;

    load->taken += n;
    load->n_copying++;
    if (n == left) loader->copying = load->next;
    pthread_mutex_unlock(&loader->lock);
    const mlora_status status =
        dev->ops->upload_beside(dev, lane, load->to + at, load->adapter->memory + at, n);
    pthread_mutex_lock(&loader->lock);
    if (status != MLORA_OK) fail(load, status);
    load->n_copying--;
    if (load->taken == bytes_of(load) && load->n_copying == 0) finish(loader, load);
}

static void *run(void *argument)
{
    const struct loader_thread *self = argument;
    struct loader *loader = self->loader;
    const int lane = (int)(self - loader->threads);

    pthread_mutex_lock(&loader->lock);
    for (;;) {
        loader->n_idle++;
        while (!loader->first && !loader->copying && !loader->stop)
            pthread_cond_wait(&loader->pushed, &loader->lock);
        loader->n_idle--;
        if (loader->stop) break;
        if (loader->copying)
            copy_part(loader, lane);
        else
            read_first(loader);
    }
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

/* ---- the engine's side -------------------------------------------------------------------- */

mlora_status loader_open(struct loader *out, struct device *dev, const struct model_config *config)
{
    *out = (struct loader){0};
    if (pthread_mutex_init(&out->lock, NULL) != 0) goto failed;
    if (pthread_cond_init(&out->pushed, NULL) != 0) goto no_pushed;
    if (pthread_cond_init(&out->finished, NULL) != 0) goto no_finished;
    out->dev = dev;
    out->config = config;
    return MLORA_OK;

no_finished:
    pthread_cond_destroy(&out->pushed);
no_pushed:
    pthread_mutex_destroy(&out->lock);
failed:
    return error_set(MLORA_ENOMEM, "out of memory: a lock for the loader of adapters");
}

void loader_close(struct loader *loader)
{
    if (!loader->dev) return;
    pthread_mutex_lock(&loader->lock);
    loader->stop = true;
    pthread_cond_broadcast(&loader->pushed);
    pthread_mutex_unlock(&loader->lock);
    for (int i = 0; i < loader->n_threads; i++) pthread_join(loader->threads[i].thread, NULL);
    pthread_cond_destroy(&loader->finished);
    pthread_cond_destroy(&loader->pushed);
    pthread_mutex_destroy(&loader->lock);
    *loader = (struct loader){0};
}

/* One more thread. */
static mlora_status start(struct loader *loader)
{
    struct loader_thread *next = &loader->threads[loader->n_threads];

    next->loader = loader;
    const int error = pthread_create(&next->thread, NULL, run, next);
    if (error != 0)
        return error_set(MLORA_ENOMEM, "the loader of adapters: no thread: %s", strerror(error));
    loader->n_threads++;
    return MLORA_OK;
}

mlora_status loader_push(struct loader *loader, struct load *load)
{
    const size_t n_parts = 1 + bytes_of(load) / PART_BYTES; /* or one less */

    pthread_mutex_lock(&loader->lock);
    size_t n_idle = loader->first ? 0 : (size_t)loader->n_idle;
    pthread_mutex_unlock(&loader->lock);
    for (; n_idle < n_parts && loader->n_threads < UPLOAD_LANES; n_idle++) {
        const mlora_status status = start(loader);
        if (status == MLORA_OK) continue;
        if (loader->n_threads == 0) return status;
        break; /* it waits */
    }
    load->next = NULL;
    load->status = MLORA_OK;
    load->taken = 0;
    load->n_copying = 0;
    pthread_mutex_lock(&loader->lock);
    if (loader->first)
        loader->last->next = load;
    else
        loader->first = load;
    loader->last = load;
    pthread_cond_signal(&loader->pushed);
    pthread_mutex_unlock(&loader->lock);
    loader->n_coming++;
    return MLORA_OK;
}

struct load *loader_take(struct loader *loader)
{
    if (loader->n_coming == 0) return NULL;
    pthread_mutex_lock(&loader->lock);
    struct load *load = loader->done;
    if (load) loader->done = load->next;
    pthread_mutex_unlock(&loader->lock);
    if (load) loader->n_coming--;
    return load;
}

void loader_wait(struct loader *loader)
{
    if (loader->n_coming == 0) return;
    pthread_mutex_lock(&loader->lock);
    while (!loader->done) pthread_cond_wait(&loader->finished, &loader->lock);
    pthread_mutex_unlock(&loader->lock);
}
