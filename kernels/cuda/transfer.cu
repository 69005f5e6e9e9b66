/* Copies beside the ops: from host memory to the GPU on a stream of their own, from a thread of
 * their own, through pinned memory, so that the copy engine works while kernels run; and moves
 * within the GPU's memory.
 *
 * The bus bounds the one (the pieces are filled in turn: while one is copied over, the next is being
 * written), reading and writing memory the other. */
#include "kernels/cuda/cuda.cuh"

#include <stdlib.h>

enum { PIECES = 2, PIECE_BYTES = 8 << 20, MOVE_BYTES = 32 << 20 };

/* All of it but the struct itself is made by the first copy, on its thread. */
struct transfer {
    cudaStream_t stream;
    char *piece[PIECES]; /* [PIECE_BYTES] pinned */
    cudaEvent_t copied[PIECES];
    bool ready;
};

mlora_status transfer_open(struct transfer **out)
{
    *out = (struct transfer *)calloc(1, sizeof **out);
    return *out ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory for copies to the GPU");
}

void transfer_close(struct transfer *transfer)
{
    if (!transfer) return;
    if (transfer->stream) cudaStreamSynchronize(transfer->stream);
    for (int i = 0; i < PIECES; i++) {
        if (transfer->copied[i]) cudaEventDestroy(transfer->copied[i]);
        if (transfer->piece[i]) cudaFreeHost(transfer->piece[i]);
    }
    if (transfer->stream) cudaStreamDestroy(transfer->stream);
    free(transfer);
}

/* What is missing; parts that are there stay. */
static cudaError_t prepare(struct transfer *transfer)
{
    cudaError_t error = cudaSuccess;

    if (transfer->ready) return error;
    if (!transfer->stream)
        error = cudaStreamCreateWithFlags(&transfer->stream, cudaStreamNonBlocking);
    for (int i = 0; i < PIECES && error == cudaSuccess; i++) {
        if (!transfer->piece[i]) error = cudaMallocHost((void **)&transfer->piece[i], PIECE_BYTES);
        if (error == cudaSuccess && !transfer->copied[i])
            error = cudaEventCreateWithFlags(&transfer->copied[i],
                                             cudaEventDisableTiming | cudaEventBlockingSync);
    }
    transfer->ready = error == cudaSuccess;
    return error;
}

mlora_status cuda_upload_beside(struct device *dev, void *to, const void *from, size_t bytes)
{
    const struct cuda_device *cuda = (const struct cuda_device *)dev;
    struct transfer *transfer = cuda->transfer;

    cudaError_t error = cudaSetDevice(cuda->ordinal);
    if (error == cudaSuccess) error = prepare(transfer);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError(); /* it is told here */
        return error_set(MLORA_ENOMEM, "out of memory: %d bytes pinned for copies to the GPU",
                         PIECES * PIECE_BYTES);
    }
    int i = 0;
    for (size_t at = 0; at < bytes && error == cudaSuccess;
         at += PIECE_BYTES, i = (i + 1) % PIECES) {
        const size_t left = bytes - at, n = left < PIECE_BYTES ? left : (size_t)PIECE_BYTES;
        error = cudaEventSynchronize(transfer->copied[i]); /* at once where none was recorded */
        if (error != cudaSuccess) break;
        memcpy(transfer->piece[i], (const char *)from + at, n);
        error = cudaMemcpyAsync((char *)to + at, transfer->piece[i], n, cudaMemcpyHostToDevice,
                                transfer->stream);
        if (error == cudaSuccess) error = cudaEventRecord(transfer->copied[i], transfer->stream);
    }
    for (i = 0; i < PIECES && error == cudaSuccess; i++)
        error = cudaEventSynchronize(transfer->copied[i]);
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
