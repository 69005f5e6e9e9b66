/* Rows of a batch with their KV cache in scattered blocks, for the tests of rope and attention. */
#ifndef MLORA_TESTS_KERNELS_SEQUENCES_H
#define MLORA_TESTS_KERNELS_SEQUENCES_H

#include "tests/support.h"

enum { SEQUENCES_MAX = 8, TOKENS_MAX = 512 };

/* Row q holds the n_new[q] last of kv_len[q] tokens. */
struct sequences {
    int Q;
    int kv_len[SEQUENCES_MAX], n_new[SEQUENCES_MAX];
    int32_t *table; /* [Q, max_blocks] host copy; blocks are handed out in no order */
    int n_blocks;
    struct batch_view batch; /* on the device, metadata filled in */
    struct kv_view kv;       /* zeroed blocks; the first and last belong to nobody */
    int T;
    int32_t row[TOKENS_MAX], position[TOKENS_MAX]; /* host copies */
};

void sequences_build(struct sequences *out, struct numbers *numbers, int Q, const int *kv_len,
                     const int *n_new, int G, int d, enum dtype kv_dtype);
void sequences_free(struct sequences *sequences); /* host memory; the rest goes with dev */

/* Index in the cache of K[block][g][position % KV_BLOCK][0] for position p of row q. */
size_t sequences_slot(const struct sequences *sequences, int q, int p, int g, int G, int d);

#endif
