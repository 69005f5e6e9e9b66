/* Weights on a device to the files of a Hugging Face checkpoint. */
#ifndef MLORA_MODEL_CHECKPOINT_WRITE_H
#define MLORA_MODEL_CHECKPOINT_WRITE_H

#include "model/weights.h"

/* Write model.safetensors to `directory`, or shards of at most 5 GB and their index. Each tensor has
 * the type that it has in `like`, the checkpoint that the weights were read from; one that is not
 * there has the type of the embedding. A head is written where it is not the embedding.
 * Returns OK, EIO (naming the file), EUNSUPPORTED, ENOMEM or EDEVICE. */
mlora_status checkpoint_write(const char *directory, struct device *dev,
                              const struct weights *weights, const struct model_config *config,
                              const struct checkpoint *like);

/* Write all bytes to a new file and flush them to the disk. Returns OK or EIO. */
mlora_status file_write_new(const char *path, const void *data, size_t bytes);

#endif
