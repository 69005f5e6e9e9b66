#include "tests/kernels/sequences.h"

#include <criterion/criterion.h>
#include <stdlib.h>

void sequences_build(struct sequences *out, struct numbers *numbers, int Q, const int *kv_len,
                     const int *n_new, int G, int d, enum dtype kv_dtype)
{
    int32_t row_start[SEQUENCES_MAX + 1] = {0}, lengths[SEQUENCES_MAX];

    *out = (struct sequences){.Q = Q};
    out->batch.Q = Q;
    for (int q = 0; q < Q; q++) {
        const int n_blocks = (kv_len[q] + KV_BLOCK - 1) / KV_BLOCK;
        lengths[q] = out->kv_len[q] = kv_len[q];
        out->n_new[q] = n_new[q];
        for (int j = 0; j < n_new[q]; j++) {
            out->row[row_start[q] + j] = q;
            out->position[row_start[q] + j] = kv_len[q] - n_new[q] + j;
        }
        row_start[q + 1] = row_start[q] + n_new[q];
        out->n_blocks += n_blocks;
        if (n_new[q] > out->batch.max_row) out->batch.max_row = n_new[q];
        if (kv_len[q] > out->batch.max_kv) out->batch.max_kv = kv_len[q];
        if (n_blocks + 1 > out->kv.max_blocks) out->kv.max_blocks = n_blocks + 1;
    }
    out->T = out->batch.T = row_start[Q];
    cr_assert(out->T <= TOKENS_MAX);

    /* Shuffled block numbers, 1 to n_blocks; entries past a row's length would be out of range. */
    int32_t *order = zeros((size_t)out->n_blocks, sizeof *order);
    for (int i = 0; i < out->n_blocks; i++) {
        const int j = next_int(numbers, 0, i);
        order[i] = order[j];
        order[j] = i + 1;
    }
    const size_t n_entries = (size_t)(Q * out->kv.max_blocks);
    out->table = zeros(n_entries, sizeof *out->table);
    for (int q = 0, i = 0; q < Q; q++)
        for (int b = 0; b < out->kv.max_blocks; b++)
            out->table[q * out->kv.max_blocks + b] =
                b * KV_BLOCK < kv_len[q] ? order[i++] : INT32_MAX;
    free(order);

    const size_t n = (size_t)((out->n_blocks + 2) * G * KV_BLOCK * d);
    float *nothing = zeros(n, sizeof *nothing);
    out->kv.dtype = kv_dtype;
    out->kv.k = upload_as(kv_dtype, nothing, n);
    out->kv.v = upload_as(kv_dtype, nothing, n);
    out->kv.block_table = upload(out->table, n_entries * sizeof *out->table);
    free(nothing);

    out->batch.row_start = upload(row_start, (size_t)(Q + 1) * sizeof row_start[0]);
    out->batch.kv_len = upload(lengths, (size_t)Q * sizeof lengths[0]);
    out->batch.row = device_memory((size_t)out->T * sizeof(int32_t));
    out->batch.position = device_memory((size_t)out->T * sizeof(int32_t));
    dev->ops->metadata(dev, &out->batch);
}

void sequences_free(struct sequences *sequences)
{
    free(sequences->table);
    sequences->table = NULL;
}

size_t sequences_slot(const struct sequences *sequences, int q, int p, int g, int G, int d)
{
    const int block = sequences->table[q * sequences->kv.max_blocks + p / KV_BLOCK];
    return (size_t)(((block * G + g) * KV_BLOCK + p % KV_BLOCK) * d);
}
