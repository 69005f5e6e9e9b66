/* Steps of the same shape are recorded once as a CUDA graph and replayed: hundreds of launches
 * become one, and the kernels follow each other without gaps. The first run under a key is an
 * ordinary one, in which scratch grows and matmul plans are made; the second is recorded. */
#include "kernels/cuda/cuda.cuh"

#include <stdlib.h>

enum { RECORDINGS = 128, KEY_BYTES = 512 };

struct recording {
    unsigned char key[KEY_BYTES];
    size_t bytes;         /* of the key; 0: unused */
    cudaGraphExec_t exec; /* NULL: seen once, not recorded */
    uint64_t used_at;
};

struct recordings {
    struct recording items[RECORDINGS];
    struct recording *open; /* being recorded; NULL: none */
    uint64_t clock;
};

/* The one of that key, or the one that was used longest ago, emptied for it. */
static struct recording *find_recording(struct recordings *all, const void *key, size_t bytes,
                                        bool *found)
{
    struct recording *oldest = &all->items[0];

    for (int i = 0; i < RECORDINGS; i++) {
        struct recording *item = &all->items[i];
        *found = item->bytes == bytes && memcmp(item->key, key, bytes) == 0;
        if (*found) return item;
        if (item->used_at < oldest->used_at) oldest = item;
    }
    if (oldest->exec) cudaGraphExecDestroy(oldest->exec);
    oldest->exec = NULL;
    oldest->bytes = bytes;
    memcpy(oldest->key, key, bytes);
    return oldest;
}

bool cuda_replay(struct device *dev, const void *key, size_t bytes)
{
    struct cuda_device *cuda = cuda_begin(dev);
    bool found;

    assert(bytes > 0 && bytes <= KEY_BYTES);
    if (!cuda || cuda->recordings->open) return false;
    struct recording *item = find_recording(cuda->recordings, key, bytes, &found);
    item->used_at = ++cuda->recordings->clock;
    if (item->exec) {
        cuda_check(cuda, cudaGraphLaunch(item->exec, cuda->stream), "a recorded step");
        return true;
    }
    if (found) {
        cuda_check(cuda, cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal),
                   "recording a step");
        cuda->recordings->open = item;
    }
    return false;
}

void cuda_record_end(struct device *dev)
{
    struct cuda_device *cuda = (struct cuda_device *)dev;
    struct recording *item = cuda->recordings->open;
    cudaGraph_t graph = NULL;

    if (!item) return;
    cuda->recordings->open = NULL;
    cuda_check(cuda, cudaStreamEndCapture(cuda->stream, &graph), "recording a step");
    if (graph) cuda_check(cuda, cudaGraphInstantiate(&item->exec, graph, 0), "recording a step");
    if (graph) cudaGraphDestroy(graph);
    if (item->exec) cuda_check(cuda, cudaGraphLaunch(item->exec, cuda->stream), "a recorded step");
}

mlora_status recordings_open(struct recordings **out)
{
    *out = (struct recordings *)calloc(1, sizeof **out);
    return *out ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory for recorded steps");
}

void recordings_close(struct recordings *recordings)
{
    for (int i = 0; recordings && i < RECORDINGS; i++)
        if (recordings->items[i].exec) cudaGraphExecDestroy(recordings->items[i].exec);
    free(recordings);
}
