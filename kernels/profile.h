/* Where a step's time goes: the table of a device's ops is replaced by one whose entries note the
 * time before and after, and count bytes and operations by the op's formula. An op that is not in
 * that table runs as before, untimed. */
#ifndef MLORA_KERNELS_PROFILE_H
#define MLORA_KERNELS_PROFILE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/kernels.h"

enum { PROFILE_SHAPE = 32 };

/* What the calls of one op of one shape add up to. */
struct profile_line {
    const char *op;            /* its name in struct kernels */
    char shape[PROFILE_SHAPE]; /* such as "28672 x 4096"; "": it has none */
    int64_t n_calls;
    int64_t n_launches; /* of kernels; -1: not known */
    double seconds;
    double bytes; /* that have to be read and written */
    double flops;
};

/* Put the profile between the device and its callers until the device is closed; it is off at
 * first. `has_ranges`: each op is launched by itself, never replayed, inside a range that has its
 * name, for a profiler that watches the process. Returns OK or ENOMEM. */
mlora_status profile_open(struct device *dev, bool has_ranges);

/* Time from now on, and begin with nothing. Not during a step. */
void profile_start(struct device *dev);

/* The ops from here on belong to that decoder layer, -1: to none. Nothing without a profile. */
void profile_layer(struct device *dev, int layer);

/* Whether ops are timed: one step after another then, as a step's marks are read at its end. */
bool profile_is_on(const struct device *dev);

/* The lines since profile_start(), in the order of their first call. They live until the next op. */
const struct profile_line *profile_lines(const struct device *dev, int *n_lines);

#endif
