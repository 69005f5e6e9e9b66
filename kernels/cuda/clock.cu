/* The clock: a mark is a CUDA event. Inside a recording it becomes a node of the graph, so that a
 * replayed step is timed op by op without a gap for its launches; kernels do not overlap across
 * it, which makes a timed step a little longer than a plain one.
 *
 * For the clocks of others there are ranges: NVTX, headers only, which does nothing unless a
 * profiler (nsys, ncu) has started the process. */
#include "kernels/cuda/cuda.cuh"

#include <stdlib.h>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#else /* a toolkit without it: no ranges */
#define nvtxRangePushA(name) ((void)(name))
#define nvtxRangePop()       ((void)0)
#endif

struct clock_marks {
    cudaEvent_t events[MARKS];
    int nodes[MARKS]; /* of the recording before this mark and its own; -1: outside of one */
};

static struct clock_marks *find_marks(struct cuda_device *cuda)
{
    if (!cuda->marks) cuda->marks = (struct clock_marks *)calloc(1, sizeof *cuda->marks);
    if (!cuda->marks) cuda_fail(cuda, "mark", "out of memory");
    return cuda->marks;
}

void cuda_mark(struct device *dev, int mark)
{
    struct cuda_device *cuda = cuda_begin(dev);
    struct clock_marks *marks = cuda ? find_marks(cuda) : NULL;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id;
    cudaGraph_t graph;
    size_t n_nodes = 0;

    assert(mark >= 0 && mark < MARKS);
    if (!marks) return;
    if (!marks->events[mark]) cuda_check(cuda, cudaEventCreate(&marks->events[mark]), "mark");
    if (cuda->failure[0]) return;
    cuda_check(cuda, cudaStreamGetCaptureInfo(cuda->stream, &status, &id, &graph), "mark");
    const bool recording = status == cudaStreamCaptureStatusActive;
    cuda_check(
        cuda,
        cudaEventRecordWithFlags(marks->events[mark], cuda->stream,
                                 recording ? cudaEventRecordExternal : cudaEventRecordDefault),
        "mark");
    if (recording) cuda_check(cuda, cudaGraphGetNodes(graph, NULL, &n_nodes), "mark");
    marks->nodes[mark] = recording ? (int)n_nodes : -1;
}

struct lap cuda_elapsed(struct device *dev, int from, int to)
{
    struct cuda_device *cuda = cuda_begin(dev);
    struct lap lap = {0, -1};
    float ms = 0;

    if (!cuda || !cuda->marks) return lap;
    const struct clock_marks *marks = cuda->marks;
    cuda_check(cuda, cudaEventElapsedTime(&ms, marks->events[from], marks->events[to]), "elapsed");
    lap.seconds = 1e-3 * ms;
    if (marks->nodes[from] >= 0 && marks->nodes[to] > marks->nodes[from])
        lap.launches = marks->nodes[to] - marks->nodes[from] - (to - from); /* less the marks */
    return lap;
}

void cuda_range(struct device *dev, const char *name)
{
    (void)dev;
    if (name)
        nvtxRangePushA(name);
    else
        nvtxRangePop();
}

void clock_close(struct clock_marks *marks)
{
    for (int i = 0; marks && i < MARKS; i++)
        if (marks->events[i]) cudaEventDestroy(marks->events[i]);
    free(marks);
}
