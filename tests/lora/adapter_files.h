/* Adapter directories written for one test, and a device that is plain host memory. */
#ifndef TESTS_LORA_ADAPTER_FILES_H
#define TESTS_LORA_ADAPTER_FILES_H

#include <stdbool.h>
#include <stddef.h>

#include "kernels/kernels.h"
#include "model/config.h"

/* A model small enough for hand-written shapes: two layers, q and o 8 x 8, k and v 4 x 8,
 * gate and up 12 x 8, down 8 x 12. */
struct model_config small_model(void);

/* A fresh directory under the system's temporary one. The path is freed by directory_remove. */
char *directory_make(void);
void directory_remove(char *directory);
void directory_write(const char *directory, const char *name, const void *data, size_t bytes);

/* adapter_config.json: that of a plain LoRA of rank 2 and alpha 4 on q_proj and v_proj, with the
 * members of the JSON object `changes` put over it. */
void write_config(const char *directory, const char *changes);

/* adapter_model.safetensors: the tensors for that configuration and small_model(), of zeroes,
 * changed by `edits`, a list separated by ';' of "-NAME" (leave out), "NAME DTYPE 2x8" (add or
 * replace). In names "@" stands for "base_model.model.model.layers.". */
void write_tensors(const char *directory, const char *edits);

/* One tensor with values: `bytes` of `data`. */
struct tensor_data {
    const char *name, *dtype;
    int rows, columns;
    const void *data;
};
void write_tensor_data(const char *directory, const struct tensor_data *tensors, int n);

/* alloc and free count; the ops of a model are not there. */
struct device *host_device(void);
int host_device_allocations(void);        /* that were not freed */
void host_device_fail(bool fail);         /* allocations fail from now on */
void host_device_fail_uploads(bool fail); /* the same of uploads beside */

/* Uploads beside wait for one another from now on until n of them are under way, or have waited for
 * too long; whether they met. */
void host_device_meet(int n);
bool host_device_met(void);

#endif
