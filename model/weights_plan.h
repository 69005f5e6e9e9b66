/* Which tensors of the files, joined in which order, make which array on the device. The plan is
 * checked as a whole, so that a damaged or foreign model fails before anything is allocated. */
#ifndef MLORA_MODEL_WEIGHTS_PLAN_H
#define MLORA_MODEL_WEIGHTS_PLAN_H

#include "model/weights.h"

enum { PARTS_MAX = 3, NAME_BYTES = 96 };

/* A tensor of the files, which becomes some rows of an array. */
struct part {
    char name[NAME_BYTES];
    int rows;
    const struct tensor *tensor;    /* NULL: missing */
    const struct safetensors *file; /* that it is in */
    enum dtype dtype;
};

/* A matrix [N, K], or a vector [N] of f32: one of the two pointers is NULL. */
struct array {
    struct matrix *matrix;
    float **vector;
    int N, K; /* K is 1 for a vector */
    enum dtype dtype;
    int n_parts;
    struct part parts[PARTS_MAX];
};

struct weights_plan {
    const char *prefix; /* of all names but the head's: "model." or nothing */
    struct array *arrays;
    int n_arrays;
    int64_t read_bytes, device_bytes, n_parameters;
};

int64_t array_bytes(const struct array *array); /* on the device */

/* Room for the arrays of a model, and for the layers in `weights`; the arrays are named. `prefix`
 * is borrowed. Returns OK or ENOMEM; `arrays` and `layers` are the caller's to free in any case. */
mlora_status weights_plan_list(struct weights_plan *plan, struct weights *weights,
                               const char *prefix, const struct model_config *config);

/* The same for the tensors of `checkpoint`, each checked. Returns OK, EFORMAT, EUNSUPPORTED or
 * ENOMEM. */
mlora_status weights_plan_make(struct weights_plan *plan, struct weights *weights,
                               const struct checkpoint *checkpoint, const char *directory,
                               const struct model_config *config);

#endif
