/* A CUDA device that works for a caller: its ops run on the caller's stream, with the caller's
 * memory as scratch, so that nothing is allocated and the caller may record them in a graph. */
#ifndef MLORA_KERNELS_LEND_H
#define MLORA_KERNELS_LEND_H

#include "kernels/kernels.h"

struct loan {
    void *stream; /* cudaStream_t; NULL: the default stream */
    void *workspace;
    size_t workspace_bytes;
    /* What cuda_take_back() restores: */
    void *own_stream;
    int current_device; /* the thread's */
};

/* From here to cuda_take_back() ops go to the loan's stream. The first one begins when all work of
 * the stream before it is done and seen; further ones may overlap as among themselves. */
void cuda_lend(struct device *dev, struct loan *loan);

/* Returns OK, or EDEVICE with what failed between the two; the device goes on. */
mlora_status cuda_take_back(struct device *dev, const struct loan *loan);

/* Scratch that an op takes on this device: lora_shrink and lora_expand in the view's mode,
 * attention. */
size_t cuda_lora_bytes(struct device *dev, const struct lora_view *lora,
                       const struct lora_site *site);
size_t cuda_attention_bytes(struct device *dev, const struct kv_view *kv,
                            const struct batch_view *batch, const struct heads *heads,
                            enum dtype dtype);

/* 90 for compute capability 9.0. */
int cuda_capability(struct device *dev);
int cuda_multiprocessors(struct device *dev);

/* Architectures that were compiled, such as "800,900"; "" without CUDA. Static. */
const char *cuda_architectures(void);

#endif
