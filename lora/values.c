#include "lora/values.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

enum { PIECE_BYTES = 8 << 20 };

void values_free(struct values *values)
{
    buffer_free(&values->read);
    buffer_free(&values->wide);
    buffer_free(&values->shaped);
}

/* ---- reading ------------------------------------------------------------------------------ */

/* `n` elements from number `first` on. */
static mlora_status read_elements(struct values *values, const struct safetensors *file,
                                  const struct tensor *tensor, int64_t first, int64_t n,
                                  enum dtype dtype, const void **out)
{
    enum dtype stored;

    mlora_status status = tensor_dtype(&stored, file, tensor);
    if (status != MLORA_OK) return status;
    const size_t element = dtype_bytes(stored), bytes = (size_t)n * element;
    status = buffer_reserve(&values->read, bytes);
    if (status != MLORA_OK) return status;
    status = file_read_at(&file->file, values->read.data, bytes,
                          tensor->offset + first * (int64_t)element);
    *out = values->read.data;
    if (status == MLORA_OK && values->hasher) {
        const int64_t what[2] = {(int64_t)stored, n};
        hash_add(values->hasher, what, sizeof what);
        hash_add(values->hasher, values->read.data, bytes);
    }
    if (status != MLORA_OK || stored == dtype) return status;

    status = buffer_reserve(&values->wide, (size_t)n * sizeof(float));
    if (status != MLORA_OK) return status;
    float *wide = (float *)(void *)values->wide.data;
    dtype_widen(wide, values->read.data, stored, (size_t)n);
    *out = wide;
    if (dtype == DTYPE_F32) return MLORA_OK;
    dtype_narrow(values->read.data, dtype, wide, (size_t)n); /* no element is smaller than these */
    *out = values->read.data;
    return MLORA_OK;
}

mlora_status values_read(struct values *values, const struct safetensors *file,
                         const struct tensor *tensor, int64_t row, int64_t rows, enum dtype dtype,
                         const void **out)
{
    const int64_t columns = tensor->shape[1];
    return read_elements(values, file, tensor, row * columns, rows * columns, dtype, out);
}

mlora_status values_vector(struct values *values, const struct safetensors *file,
                           const struct tensor *tensor, int64_t first, int64_t n, const void **out)
{
    return read_elements(values, file, tensor, first, n, DTYPE_F32, out);
}

int64_t values_piece_rows(int64_t columns)
{
    const int64_t rows = PIECE_BYTES / (int64_t)sizeof(float) / (columns > 0 ? columns : 1);
    return rows > 0 ? rows : 1;
}

/* ---- forms -------------------------------------------------------------------------------- */

static void transpose(char *out, const char *in, int64_t rows, int64_t columns, size_t element)
{
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + (size_t)(c * rows + r) * element, in + (size_t)(r * columns + c) * element,
                   element);
}

/* Block i of rows goes to block i of columns. */
static void spread_blocks(char *out, const char *in, int64_t rows, int64_t columns,
                          int64_t n_blocks, size_t element)
{
    const size_t pitch = (size_t)columns * element;

    memset(out, 0, (size_t)(rows * n_blocks) * pitch);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t block = r / (rows / n_blocks);
        memcpy(out + (size_t)(r * n_blocks + block) * pitch, in + (size_t)r * pitch, pitch);
    }
}

/* The mean of a group of inputs, times the number of groups. */
static void spread_groups(float *out, const float *in, int64_t rows, int64_t columns, int64_t group)
{
    const float factor = (float)((double)columns / (double)group);

    for (int64_t i = 0; i < rows * columns; i++)
        for (int64_t j = 0; j < group; j++) out[i * group + j] = in[i] * factor;
}

mlora_status values_shape(struct values *values, const void **data, int64_t rows, int64_t columns,
                          enum factor_form form, int parts, enum dtype dtype)
{
    const size_t element = dtype_bytes(dtype);

    if (form == FORM_PLAIN) return MLORA_OK;
    const mlora_status status =
        buffer_reserve(&values->shaped, (size_t)(rows * columns) * (size_t)parts * element);
    if (status != MLORA_OK) return status;
    if (form == FORM_TRANSPOSED)
        transpose(values->shaped.data, *data, rows, columns, element);
    else if (form == FORM_BLOCKS)
        spread_blocks(values->shaped.data, *data, rows, columns, parts, element);
    else
        spread_groups((float *)(void *)values->shaped.data, *data, rows, columns, parts);
    *data = values->shaped.data;
    return MLORA_OK;
}

/* ---- against the base --------------------------------------------------------------------- */

/* Rows of a matrix on the device, in f32. */
static mlora_status base_rows(struct buffer *stored, struct buffer *wide, struct device *dev,
                              const struct matrix *w, int64_t row, int64_t rows)
{
    const size_t n = (size_t)(rows * w->K), element = dtype_bytes(w->dtype);

    mlora_status status = buffer_reserve(stored, n * element);
    if (status == MLORA_OK) status = buffer_reserve(wide, n * sizeof(float));
    if (status != MLORA_OK) return status;
    dev->ops->download(dev, stored->data,
                       (const char *)w->data + (size_t)row * (size_t)w->K * element, n * element);
    dtype_widen((float *)(void *)wide->data, stored->data, w->dtype, n);
    return MLORA_OK;
}

mlora_status values_equal(bool *equal, struct values *values, struct device *dev,
                          const struct safetensors *file, const struct tensor *tensor,
                          const struct matrix *base)
{
    const int64_t piece = values_piece_rows(base->K);
    struct buffer stored = {0}, wide = {0};
    mlora_status status = MLORA_OK;

    *equal = true;
    for (int64_t row = 0; row < base->N && *equal && status == MLORA_OK; row += piece) {
        const int64_t rows = base->N - row < piece ? base->N - row : piece;
        const void *own = NULL;
        status = values_vector(values, file, tensor, row * base->K, rows * base->K, &own);
        if (status == MLORA_OK) status = base_rows(&stored, &wide, dev, base, row, rows);
        if (status == MLORA_OK)
            *equal = memcmp(own, wide.data, (size_t)(rows * base->K) * sizeof(float)) == 0;
    }
    buffer_free(&stored);
    buffer_free(&wide);
    return status;
}

/* ---- DoRA --------------------------------------------------------------------------------- */

/* Device memory for a while. */
struct borrowed {
    struct device *dev;
    void *memory[4]; /* A, B, norms, and the embedding's transpose */
};

static mlora_status borrow(struct borrowed *borrowed, int i, size_t bytes)
{
    return borrowed->dev->ops->alloc(borrowed->dev, bytes, &borrowed->memory[i]);
}

/* The embedding [V, D] as f32 [D, V] in borrowed->memory[3]: its norms are those of columns. */
static mlora_status borrow_transpose(struct borrowed *borrowed, const struct matrix *w,
                                     struct matrix *out)
{
    const size_t N = (size_t)w->K, K = (size_t)w->N;
    struct buffer stored = {0}, wide = {0};
    float *turned = malloc(N * K * sizeof *turned);

    mlora_status status = turned ? borrow(borrowed, 3, N * K * sizeof *turned)
                                 : error_set(MLORA_ENOMEM, "out of memory for DoRA");
    if (status == MLORA_OK) status = base_rows(&stored, &wide, borrowed->dev, w, 0, w->N);
    if (status == MLORA_OK) {
        transpose((char *)turned, wide.data, w->N, w->K, sizeof *turned);
        borrowed->dev->ops->upload(borrowed->dev, borrowed->memory[3], turned,
                                   N * K * sizeof *turned);
        *out = (struct matrix){borrowed->memory[3], DTYPE_F32, w->K, w->N};
    }
    buffer_free(&stored);
    buffer_free(&wide);
    free(turned);
    return status;
}

/* A or B in f32, as the product needs them. */
static mlora_status borrow_factor(struct borrowed *borrowed, int i, struct values *values,
                                  const struct safetensors *file, const struct tensor *tensor,
                                  int64_t row, int64_t rows, enum factor_form form)
{
    const void *data;

    mlora_status status = values_read(values, file, tensor, row, rows, DTYPE_F32, &data);
    if (status == MLORA_OK)
        status = values_shape(values, &data, rows, tensor->shape[1], form, 1, DTYPE_F32);
    const size_t bytes = (size_t)(rows * tensor->shape[1]) * sizeof(float);
    if (status == MLORA_OK) status = borrow(borrowed, i, bytes);
    if (status == MLORA_OK)
        borrowed->dev->ops->upload(borrowed->dev, borrowed->memory[i], data, bytes);
    return status;
}

mlora_status values_dora(struct values *values, struct device *dev, const struct safetensors *file,
                         const struct adapter_linear *linear, const struct matrix *w,
                         bool embedding, float *g)
{
    const bool turned = linear->b_form == FORM_TRANSPOSED; /* of what is tied */
    /* the embedding's A is the other way round on the device than in the product */
    const enum factor_form a_form = !embedding                          ? linear->a_form
                                    : linear->a_form == FORM_TRANSPOSED ? FORM_PLAIN
                                                                        : FORM_TRANSPOSED;
    struct borrowed borrowed = {.dev = dev};
    struct matrix rows = *w;
    const void *magnitude;

    mlora_status status = MLORA_OK;
    if (embedding) status = borrow_transpose(&borrowed, w, &rows);
    if (status == MLORA_OK)
        status =
            borrow_factor(&borrowed, 0, values, file, linear->a, 0, linear->a->shape[0], a_form);
    if (status == MLORA_OK)
        status = borrow_factor(&borrowed, 1, values, file, linear->b, linear->b_row,
                               turned ? linear->rank : linear->out, linear->b_form);
    if (status == MLORA_OK) status = borrow(&borrowed, 2, (size_t)linear->out * sizeof *g);
    if (status != MLORA_OK) goto done;

    dev->ops->lora_row_norms(dev, borrowed.memory[2], &rows, borrowed.memory[0], borrowed.memory[1],
                             linear->rank, linear->scale);
    dev->ops->download(dev, g, borrowed.memory[2], (size_t)linear->out * sizeof *g);
    status = dev->ops->sync(dev);
    if (status != MLORA_OK) goto done;
    status = values_vector(values, file, linear->magnitude, linear->b_row, linear->out, &magnitude);
    for (int64_t i = 0; i < linear->out && status == MLORA_OK; i++)
        g[i] = ((const float *)magnitude)[i] / g[i];

done:
    for (int i = 0; i < 4; i++)
        if (borrowed.memory[i]) dev->ops->free(dev, borrowed.memory[i]);
    return status;
}
