/* What tests of the ops share: the device under test, numbers to feed it, and comparison.
 *
 * The device is the CPU, or the backend that the environment variable MLORA_BACKEND names ("cpu"
 * or "cuda"); a test fails where that cannot be opened. Use as
 *
 *     TestSuite(rope, .init = device_open, .fini = device_close); */
#ifndef MLORA_TESTS_SUPPORT_H
#define MLORA_TESTS_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

/* ---- the device under test ---------------------------------------------------------------- */

extern struct device *dev;

void device_open(void);
void device_close(void); /* frees what the functions below allocated, too */
bool device_is_cpu(void);

/* Device memory that lives until device_close(). */
void *device_memory(size_t bytes);
void *upload(const void *from, size_t bytes);
void *upload_as(enum dtype dtype, const float *from, size_t n); /* rounded to dtype */

/* Wait for the ops, fail the test if one failed, and copy. */
void download(void *to, const void *from, size_t bytes);
void download_f32(float *to, const void *from, enum dtype dtype, size_t n); /* widened */

/* ---- numbers ------------------------------------------------------------------------------ */

/* A fixed sequence for each seed (splitmix64). */
struct numbers {
    uint64_t state;
};

uint64_t next_word(struct numbers *numbers);
int next_int(struct numbers *numbers, int min, int max); /* both included */
float next_float(struct numbers *numbers);               /* in [-1, 1) */
/* n fresh floats in [-1, 1), each a value of `dtype`; freed by the test with free(). */
float *next_floats(struct numbers *numbers, size_t n, enum dtype dtype);

/* `value` rounded to `dtype`. */
float round_to(enum dtype dtype, float value);

/* The types of a product's result and of the activations that an op makes of it: a step's, on
 * either side of product_dtype(). */
static const struct {
    enum dtype product, dtype;
} product_types[] = {{DTYPE_F32, DTYPE_F32}, {DTYPE_BF16, DTYPE_BF16}, {DTYPE_F32, DTYPE_BF16}};
enum { PRODUCT_TYPES = 3 };

/* n zeros, or end the test. */
void *zeros(size_t n, size_t bytes);

/* ---- comparison --------------------------------------------------------------------------- */

/* Fail unless |got[i] - want[i]| <= absolute + relative * |want[i]| for all i < n. */
void expect_near(const float *got, const float *want, size_t n, double absolute, double relative,
                 const char *what);

/* The same bits, on the CPU; on another device, near. */
void expect_same(const float *got, const float *want, size_t n, const char *what);

/* Half a unit in the last place of a number of `dtype`, relative. */
double half_ulp(enum dtype dtype);

#endif
