/* Steps of the same shape are recorded once as a CUDA graph and replayed: hundreds of launches
 * become one, and the kernels follow each other without gaps. The first run under a key is an
 * ordinary one, in which scratch grows and matmul plans are made; the second is recorded. */
#include "kernels/cuda/cuda.cuh"

#include <stdlib.h>

/* Of those seen once there are fewer, so that steps that do not come again push out no recording. */
enum { RECORDINGS = 128, SEEN_ONCE = RECORDINGS / 4, KEY_BYTES = 512 };

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

static bool is_older(const struct recording *item, const struct recording *than)
{
    return !than || item->used_at < than->used_at;
}

/* The one of that key, or the one that was used longest ago, of those seen once if there are enough of
 * them, emptied for it. */
static struct recording *find_recording(struct recordings *all, const void *key, size_t bytes,
                                        bool *found)
{
    struct recording *oldest = NULL, *oldest_seen = NULL; /* of all; of those seen once */
    int n_seen = 0;

    for (int i = 0; i < RECORDINGS; i++) {
        struct recording *item = &all->items[i];
        const bool is_seen = item->bytes > 0 && !item->exec;
        *found = item->bytes == bytes && memcmp(item->key, key, bytes) == 0;
        if (*found) return item;
        n_seen += is_seen;
        if (is_older(item, oldest)) oldest = item;
        if (is_seen && is_older(item, oldest_seen)) oldest_seen = item;
    }
    if (n_seen >= SEEN_ONCE) oldest = oldest_seen;
    if (oldest->exec) cudaGraphExecDestroy(oldest->exec);
    oldest->exec = NULL;
    oldest->bytes = bytes;
    memcpy(oldest->key, key, bytes);
    return oldest;
}

/* What the next launch will depend on; false: nothing is being recorded, or too much. */
static bool read_edges(struct cuda_device *cuda, struct edges *edges)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaGraphNode_t *from = NULL;
    const cudaGraphEdgeData *data = NULL;
    size_t n = 0;

    const cudaError_t error =
        cudaStreamGetCaptureInfo(cuda->stream, &status, NULL, NULL, &from, &data, &n);
    cuda_check(cuda, error, "recording a step");
    memset(edges, 0, sizeof *edges);
    if (error != cudaSuccess || status != cudaStreamCaptureStatusActive || n > EDGES / 2)
        return false;
    edges->n = n;
    for (size_t i = 0; i < n; i++) {
        edges->from[i] = from[i];
        if (data) edges->data[i] = data[i];
    }
    return true;
}

static void set_edges(struct cuda_device *cuda, struct edges *edges)
{
    cuda_check(cuda,
               cudaStreamUpdateCaptureDependencies(cuda->stream, edges->from, edges->data, edges->n,
                                                   cudaStreamSetCaptureDependencies),
               "recording a step");
}

void cuda_fork(struct cuda_device *cuda)
{
    cuda->before.n = cuda->beside.n = 0;
    if (cuda->is_hopper && !cuda->is_lent) read_edges(cuda, &cuda->before);
}

void cuda_fork_end(struct cuda_device *cuda)
{
    if (cuda->before.n > 0 && read_edges(cuda, &cuda->beside)) set_edges(cuda, &cuda->before);
}

/* The next launch may begin while the kernels of the main line end, where it waits for them itself,
 * but only after those of the branch. Where nothing has come since the fork there is no branch: it
 * goes on in line. */
static void join(struct cuda_device *cuda, bool next_waits)
{
    struct edges edges, branch = cuda->beside;
    cudaGraphNodeType type;

    cuda->beside.n = 0;
    if (branch.n == 0) return;
    if (!read_edges(cuda, &edges)) {
        cuda_fail(cuda, "recording a step", "a branch does not come back");
        return;
    }
    if (edges.n == cuda->before.n &&
        memcmp(edges.from, cuda->before.from, edges.n * sizeof edges.from[0]) == 0) {
        set_edges(cuda, &branch);
        return;
    }
    for (size_t i = 0; next_waits && i < edges.n; i++) {
        cuda_check(cuda, cudaGraphNodeGetType(edges.from[i], &type), "recording a step");
        if (type != cudaGraphNodeTypeKernel) continue;
        edges.data[i].type = cudaGraphDependencyTypeProgrammatic;
        edges.data[i].from_port = cudaGraphKernelNodePortProgrammatic;
    }
    for (size_t i = 0; i < branch.n; i++) {
        edges.from[edges.n] = branch.from[i];
        edges.data[edges.n++] = branch.data[i];
    }
    set_edges(cuda, &edges);
    cuda->edges_are_set = next_waits;
}

void cuda_join(struct cuda_device *cuda)
{
    join(cuda, true);
}

void cuda_join_for_others(struct cuda_device *cuda)
{
    join(cuda, false);
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
    cuda_catch_up(cuda);
    cuda->delta.z = NULL;
    cuda->recordings->open = NULL;
    cuda->beside.n = 0;
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
