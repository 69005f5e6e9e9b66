/* Copies beside the ops: from host memory to the GPU on streams of their own, from threads of their
 * own, through pinned memory, so that the copy engine works while kernels run; and moves within the
 * GPU's memory.
 *
 * A thread's writing into pinned memory bounds the one, the bus where there are several threads (the
 * pieces are filled in turn: while one is copied over, the next is being written); reading and
 * writing memory the other. */
#include "kernels/cuda/cuda.cuh"

#include <stdlib.h>

enum { PIECES = 2, PIECE_BYTES = 4 << 20, MOVE_BYTES = 32 << 20 };

/* Made by its first copy, on that one's thread. */
struct lane {
    cudaStream_t stream;
    char *piece[PIECES]; /* [PIECE_BYTES] pinned */
    cudaEvent_t copied[PIECES];
    bool ready;
};

struct transfer {
    struct lane lanes[UPLOAD_LANES];
};

mlora_status transfer_open(struct transfer **out)
{
    *out = (struct transfer *)calloc(1, sizeof **out);
    return *out ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory for copies to the GPU");
}

void transfer_close(struct transfer *transfer)
{
    if (!transfer) return;
    for (struct lane *lane = transfer->lanes; lane < transfer->lanes + UPLOAD_LANES; lane++) {
        if (lane->stream) cudaStreamSynchronize(lane->stream);
        for (int i = 0; i < PIECES; i++) {
            if (lane->copied[i]) cudaEventDestroy(lane->copied[i]);
            if (lane->piece[i]) cudaFreeHost(lane->piece[i]);
        }
        if (lane->stream) cudaStreamDestroy(lane->stream);
    }
    free(transfer);
}

/* What is missing; parts that are there stay. */
static cudaError_t prepare(struct lane *lane)
{
    cudaError_t error = cudaSuccess;

    if (lane->ready) return error;
    if (!lane->stream) error = cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking);
    for (int i = 0; i < PIECES && error == cudaSuccess; i++) {
        if (!lane->piece[i]) error = cudaMallocHost((void **)&lane->piece[i], PIECE_BYTES);
        if (error == cudaSuccess && !lane->copied[i])
            error = cudaEventCreateWithFlags(&lane->copied[i],
                                             cudaEventDisableTiming | cudaEventBlockingSync);
    }
    lane->ready = error == cudaSuccess;
    return error;
}

mlora_status cuda_upload_beside(struct device *dev, int lane_number, void *to, const void *from,
                                size_t bytes)
{
    const struct cuda_device *cuda = (const struct cuda_device *)dev;
    struct lane *lane = &cuda->transfer->lanes[lane_number];

    assert(lane_number >= 0 && lane_number < UPLOAD_LANES);
    cudaError_t error = cudaSetDevice(cuda->ordinal);
    if (error == cudaSuccess) error = prepare(lane);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* it is told here */
        return error_set(MLORA_ENOMEM, "out of memory: %d bytes pinned for copies to the GPU",
                         PIECES * PIECE_BYTES);
    }
    int i = 0;
    for (size_t at = 0; at < bytes && error == cudaSuccess;
         at += PIECE_BYTES, i = (i + 1) % PIECES) {
        const size_t left = bytes - at, n = left < PIECE_BYTES ? left : (size_t)PIECE_BYTES;
        error = cudaEventSynchronize(lane->copied[i]); /* at once where none was recorded */
        if (error != cudaSuccess) break;
        memcpy(lane->piece[i], (const char *)from + at, n);
        error = cudaMemcpyAsync((char *)to + at, lane->piece[i], n, cudaMemcpyHostToDevice,
                                lane->stream);
        if (error == cudaSuccess) error = cudaEventRecord(lane->copied[i], lane->stream);
    }
    for (i = 0; i < PIECES && error == cudaSuccess; i++)
        error = cudaEventSynchronize(lane->copied[i]);
    if (error == cudaSuccess) return MLORA_OK;
    cudaGetLastError();
    return error_set(MLORA_EDEVICE, "copying an adapter to the GPU: %s", cudaGetErrorString(error));
}

/* Where the two overlap, piece by piece by way of scratch memory. */
void cuda_move(struct device *dev, void *to, const void *from, size_t bytes)
{
    struct cuda_device *cuda = cuda_begin(dev);
    const bool apart = (char *)to + bytes <= (const char *)from;

    assert(to <= from);
    if (!cuda || bytes == 0 || to == from) return;
    if (apart) {
        cuda_check(cuda, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda->stream),
                   "move");
        return;
    }
    char *scratch = (char *)cuda_scratch(cuda, MOVE_BYTES, "move");
    for (size_t at = 0; at < bytes && scratch; at += MOVE_BYTES) {
        const size_t left = bytes - at, n = left < MOVE_BYTES ? left : (size_t)MOVE_BYTES;
        cuda_check(cuda,
                   cudaMemcpyAsync(scratch, (const char *)from + at, n, cudaMemcpyDeviceToDevice,
                                   cuda->stream),
                   "move");
        cuda_check(
            cuda,
            cudaMemcpyAsync((char *)to + at, scratch, n, cudaMemcpyDeviceToDevice, cuda->stream),
            "move");
    }
}
