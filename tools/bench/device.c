/* The device that a bench measures, and what it can do at best. */
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "engine/base/error.h"
#include "kernels/kernels.h"
#include "tools/bench/bench.h"

mlora_status bench_device_open(struct device **out, const struct setup *setup, const char *backend)
{
    *out = NULL;
    if (strcmp(backend, "cpu") != 0) {
        const mlora_status status = cuda_device_open(out, 0, NULL);
        if (status != MLORA_EUNSUPPORTED || strcmp(backend, "cuda") == 0) return status;
    }
    return cpu_device_open(out, (int)setup->n_threads);
}

mlora_status bench_bandwidth(double *out, struct device *dev)
{
    const bool cuda = strcmp(dev->backend, "cuda") == 0;
    const size_t bytes = (size_t)1 << (cuda ? 29 : 26); /* more than caches hold */
    enum { RUNS = 5 };
    void *from = NULL, *to = NULL;
    double best = 0;

    mlora_status status = dev->ops->alloc(dev, bytes, &from);
    if (status == MLORA_OK) status = dev->ops->alloc(dev, bytes, &to);
    if (status == MLORA_OK && !cuda) memset(from, 1, bytes); /* or all pages are the one of zeros */
    for (int i = 0; i <= RUNS && status == MLORA_OK; i++) {
        dev->ops->mark(dev, 0);
        dev->ops->copy(dev, to, from, bytes);
        dev->ops->mark(dev, 1);
        status = dev->ops->sync(dev);
        if (status != MLORA_OK || i == 0) continue;
        const double speed = 2 * (double)bytes / dev->ops->elapsed(dev, 0, 1).seconds;
        if (speed > best) best = speed;
    }
    if (from) dev->ops->free(dev, from);
    if (to) dev->ops->free(dev, to);
    *out = best;
    return status;
}

int64_t bench_memory(struct device *dev)
{
    size_t free_bytes, total_bytes;
    struct rusage usage;

    if (strcmp(dev->backend, "cuda") == 0) {
        dev->ops->memory(dev, &free_bytes, &total_bytes);
        return (int64_t)(total_bytes - free_bytes);
    }
    getrusage(RUSAGE_SELF, &usage);
    return (int64_t)usage.ru_maxrss * 1024;
}
