/* Tensor names to checked byte ranges: one safetensors file, or the shards of an index. */
#ifndef MLORA_MODEL_SAFETENSORS_H
#define MLORA_MODEL_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/file.h"
#include "kernels/dtype.h"

enum { TENSOR_RANK_MAX = 8 };

struct tensor {
    char *name;     /* owned by its file */
    char dtype[12]; /* as in the file: "BF16" */
    int n_dims;
    int64_t shape[TENSOR_RANK_MAX];
    int64_t offset; /* of the first byte in the file */
    int64_t bytes;
};

struct safetensors {
    struct file file;
    struct tensor *tensors; /* [n_tensors], by name */
    int n_tensors;
};

/* Open and check the header by the format's own rules: no holes, no overlaps, no duplicate names,
 * sizes that match dtype and shape, an end at the end of the file. Returns OK, EIO, EFORMAT or
 * ENOMEM; on failure `out` is zeroed. The data is not read. */
mlora_status safetensors_open(struct safetensors *out, const char *path);
void safetensors_close(struct safetensors *file); /* accepts zeroes */

/* The part of safetensors_open that reads the header's JSON, from memory: for it and for tests.
 * `path` is for messages, `file_bytes` the length of the whole file. Fills `tensors` only. */
mlora_status safetensors_parse(struct safetensors *out, const char *path, const char *header,
                               size_t header_bytes, int64_t file_bytes);

/* NULL: there is none of that name. */
const struct tensor *safetensors_find(const struct safetensors *file, const char *name);

/* The element type, or EUNSUPPORTED naming file, tensor and type when it is not F32, F16, BF16. */
mlora_status tensor_dtype(enum dtype *out, const struct safetensors *file,
                          const struct tensor *tensor);

/* Read all elements, as they are stored, to `out` [tensor->bytes]. */
mlora_status tensor_read(const struct safetensors *file, const struct tensor *tensor, void *out);

/* All tensors of a checkpoint directory: model.safetensors, or the files named in
 * model.safetensors.index.json, which must be bare names beside it. Tensors that are in a shard
 * and not in the index count too, as in transformers; one name in two shards is refused. */
struct checkpoint {
    struct safetensors *files; /* [n_files] */
    int n_files;
    int64_t bytes; /* of all tensors */
};

/* Returns OK, EIO (also: no weights there), EFORMAT, EUNSUPPORTED (pickled weights only) or
 * ENOMEM; on failure `out` is zeroed. */
mlora_status checkpoint_open(struct checkpoint *out, const char *directory);
void checkpoint_close(struct checkpoint *checkpoint); /* accepts zeroes */

/* The tensor and the file it is in; NULL if there is none. */
const struct tensor *checkpoint_find(const struct checkpoint *checkpoint, const char *name,
                                     const struct safetensors **file);

#endif
