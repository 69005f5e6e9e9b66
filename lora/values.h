/* The values of an adapter's tensors on the host: read, widened, brought into the form of the
 * formula. Internal to lora/. */
#ifndef MLORA_LORA_VALUES_H
#define MLORA_LORA_VALUES_H

#include "lora/adapter.h"

/* Buffers that are used again from tensor to tensor; zeroes are empty. What a call hands out is
 * valid until the next one. */
struct values {
    struct buffer read, wide, shaped;
    struct hasher *hasher; /* is given the bytes of all that is read; NULL: none */
};

void values_free(struct values *values);

/* Rows [row, row + rows) of a matrix as `dtype`, which is the stored one or f32. */
mlora_status values_read(struct values *values, const struct safetensors *file,
                         const struct tensor *tensor, int64_t row, int64_t rows, enum dtype dtype,
                         const void **out);

/* Elements [first, first + n) of a tensor in f32. */
mlora_status values_vector(struct values *values, const struct safetensors *file,
                           const struct tensor *tensor, int64_t first, int64_t n, const void **out);

/* Bring the stored matrix `*data` [rows, columns] into its form; see enum factor_form. */
mlora_status values_shape(struct values *values, const void **data, int64_t rows, int64_t columns,
                          enum factor_form form, int parts, enum dtype dtype);

/* Rows of a matrix that are read at once where all would be too large for host memory. */
int64_t values_piece_rows(int64_t columns);

/* Whether a tensor has the values of `base`, a matrix on the device. */
mlora_status values_equal(bool *equal, struct values *values, struct device *dev,
                          const struct safetensors *file, const struct tensor *tensor,
                          const struct matrix *base);

/* DoRA's scale of each output: g [linear->out] = magnitude / norm of the row of w, the base's
 * weight on the device, with the adapter's product added. Of an embedding: of the columns. */
mlora_status values_dora(struct values *values, struct device *dev, const struct safetensors *file,
                         const struct adapter_linear *linear, const struct matrix *w,
                         bool embedding, float *g);

#endif
