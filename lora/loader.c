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

static void bring(struct loader *loader, struct load *load, int lane)
{
    struct device *dev = loader->dev;
    struct adapter *adapter = load->adapter;

    load->status = MLORA_OK;
    if (!adapter->memory) load->status = source_read(load->source, adapter, loader->config);
    if (load->status == MLORA_OK)
        load->status =
            dev->ops->upload_beside(dev, lane, load->to, adapter->memory, (size_t)adapter->bytes);
    if (load->status != MLORA_OK) snprintf(load->error, sizeof load->error, "%s", error_text());
}

static void *run(void *argument)
{
    const struct loader_thread *self = argument;
    struct loader *loader = self->loader;
    const int lane = (int)(self - loader->threads);

    pthread_mutex_lock(&loader->lock);
    for (;;) {
        loader->n_idle++;
        while (!loader->first && !loader->stop) pthread_cond_wait(&loader->pushed, &loader->lock);
        loader->n_idle--;
        if (loader->stop) break;
        struct load *load = loader->first;
        loader->first = load->next;
        pthread_mutex_unlock(&loader->lock);

        bring(loader, load, lane);

        pthread_mutex_lock(&loader->lock);
        load->next = loader->done;
        loader->done = load;
        pthread_cond_signal(&loader->finished);
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
    pthread_mutex_lock(&loader->lock);
    const bool busy = loader->n_idle == 0 || loader->first;
    pthread_mutex_unlock(&loader->lock);
    if (busy && loader->n_threads < UPLOAD_LANES) {
        const mlora_status status = start(loader);
        if (status != MLORA_OK && loader->n_threads == 0) return status; /* else it waits */
    }
    load->next = NULL;
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
