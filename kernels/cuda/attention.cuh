/* What the attention kernels share. */
#ifndef MLORA_KERNELS_CUDA_ATTENTION_CUH
#define MLORA_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/cuda.cuh"

struct attention_args {
    const int32_t *row_start;   /* [Q + 1] */
    const int32_t *kv_len;      /* [Q] */
    const int32_t *block_table; /* [Q, max_blocks] */
    int max_blocks, Q, H, G, d;
    int window;
    float scale; /* times log2(e), for exp2 */
};

/* First position that the token at `position` sees. */
static inline __device__ int first_seen(const struct attention_args &args, int position)
{
    return args.window > 0 ? max_int(0, position - args.window + 1) : 0;
}

/* bf16 activations and cache, d one of 64, 80, 96, 128, 256. Rows of one token are the decode
 * kernel's, longer ones the prefill kernel's. */
void attention_decode(struct cuda_device *cuda, bf16 *y, const bf16 *qkv, const bf16 *k,
                      const bf16 *v, const struct attention_args *args, int max_kv);
/* Scratch that attention_decode() takes. */
size_t attention_decode_bytes(const struct cuda_device *cuda, int Q, int H, int G, int d,
                              int max_kv);
void attention_prefill(struct cuda_device *cuda, bf16 *y, const bf16 *qkv, const bf16 *k,
                       const bf16 *v, const struct attention_args *args, int T);

#endif
