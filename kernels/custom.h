/* Ops from shared objects: the table of a device's ops is replaced by a copy in which some entries
 * call functions of an op that somebody else wrote (kernels/mlora_op.h). */
#ifndef MLORA_KERNELS_CUSTOM_H
#define MLORA_KERNELS_CUSTOM_H

#include "kernels/kernels.h"
#include "kernels/mlora_op.h"

/* The ops that can be replaced. */
enum custom_kind {
    CUSTOM_SILU_MUL,
    CUSTOM_ADD_RMS_NORM,
    CUSTOM_MATMUL,
    CUSTOM_ROPE,
    CUSTOM_LORA_SHRINK,
    CUSTOM_LORA_EXPAND,
    CUSTOM_KINDS
};

const char *custom_name(enum custom_kind kind);

/* The kind of that name. Returns OK or EINVAL. */
mlora_status custom_find(enum custom_kind *out, const char *name);

/* What a file says it is. */
struct custom_about {
    enum custom_kind kind;
    char backend[8];
    bool is_another; /* function than what it replaces: it has a reference of its own */
};

/* Returns as custom_open(). Runs code of the file. */
mlora_status custom_describe(struct custom_about *out, const mlora_op_source *source);

/* Put those ops between the device and its callers until the device is closed. A source without a
 * name stands for the op that the file says it is. Returns OK, EINVAL (a name, two for one op),
 * EIO, EFORMAT (not an op of this version), EUNSUPPORTED (another backend), ENOMEM; after a failure
 * the device is as it was. Runs code of the files. */
mlora_status custom_open(struct device *dev, const mlora_op_source *sources, int n);

/* The same with the ops' references in the place of the ops, on a CPU device; an op that has none
 * stays mlora's own. */
mlora_status custom_open_references(struct device *dev, const mlora_op_source *sources, int n);

/* The op of a device that custom_open() gave, or NULL. */
const mlora_op *custom_op(const struct device *dev, enum custom_kind kind);

/* The table under the ops from files: the device's own, where there are none. */
const struct kernels *custom_builtin(const struct device *dev);

#endif
