/* The arrays of a plan from the files to the device. */
#ifndef MLORA_MODEL_WEIGHTS_READ_H
#define MLORA_MODEL_WEIGHTS_READ_H

#include "model/weights_plan.h"

/* Memory for the array, which weights_free finds from here on. Returns OK or ENOMEM. */
mlora_status array_alloc(struct device *dev, const struct array *array, char **memory);

/* Allocate and fill all arrays. `progress` (may be NULL) is called on this thread with bytes read
 * and in all. Returns OK, EIO, ENOMEM or EDEVICE. */
mlora_status weights_read(struct device *dev, const struct weights_plan *plan,
                          mlora_progress_fn progress, void *user);

#endif
