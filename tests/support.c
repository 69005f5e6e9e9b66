/* The device under test and its memory: one device, and a list of what to free. */
#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the device under test ---------------------------------------------------------------- */

struct device *dev;

static void **memory; /* [n_memory] of dev */
static int n_memory;

void device_open(void)
{
    const char *backend = getenv("MLORA_BACKEND");
    mlora_status status = MLORA_EINVAL;

    if (!backend || strcmp(backend, "cpu") == 0)
        status = cpu_device_open(&dev, 0);
    else if (strcmp(backend, "cuda") == 0)
        status = cuda_device_open(&dev, 0, NULL);
    cr_assert_eq(status, MLORA_OK, "MLORA_BACKEND=%s: no such device", backend ? backend : "");
}

void device_close(void)
{
    if (!dev) return;
    for (int i = 0; i < n_memory; i++) dev->ops->free(dev, memory[i]);
    free(memory);
    memory = NULL;
    n_memory = 0;
    dev->ops->close(dev);
    dev = NULL;
}

bool device_is_cpu(void)
{
    return strcmp(dev->backend, "cpu") == 0;
}

void *device_memory(size_t bytes)
{
    void **more = realloc(memory, (size_t)(n_memory + 1) * sizeof *memory);
    cr_assert(more);
    memory = more;
    cr_assert_eq(dev->ops->alloc(dev, bytes, &memory[n_memory]), MLORA_OK);
    return memory[n_memory++];
}

void *upload(const void *from, size_t bytes)
{
    void *to = device_memory(bytes);
    dev->ops->upload(dev, to, from, bytes);
    return to;
}

void *upload_as(enum dtype dtype, const float *from, size_t n)
{
    if (dtype == DTYPE_F32) return upload(from, n * sizeof *from);

    uint16_t *bits = zeros(n, sizeof *bits);
    dtype_narrow(bits, dtype, from, n);
    void *to = upload(bits, n * sizeof *bits);
    free(bits);
    return to;
}

void download(void *to, const void *from, size_t bytes)
{
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    dev->ops->download(dev, to, from, bytes);
}

void download_f32(float *to, const void *from, enum dtype dtype, size_t n)
{
    if (dtype == DTYPE_F32) {
        download(to, from, n * sizeof *to);
        return;
    }
    uint16_t *bits = zeros(n, sizeof *bits);
    download(bits, from, n * sizeof *bits);
    dtype_widen(to, bits, dtype, n);
    free(bits);
}

/* ---- numbers ------------------------------------------------------------------------------ */

uint64_t next_word(struct numbers *numbers)
{
    uint64_t z = numbers->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int next_int(struct numbers *numbers, int min, int max)
{
    return min + (int)(next_word(numbers) % (uint64_t)(max - min + 1));
}

float next_float(struct numbers *numbers)
{
    return (float)(next_word(numbers) >> 40) * 0x1p-23f - 1.0f;
}

float *next_floats(struct numbers *numbers, size_t n, enum dtype dtype)
{
    float *values = zeros(n, sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = round_to(dtype, next_float(numbers));
    return values;
}

float round_to(enum dtype dtype, float value)
{
    if (dtype == DTYPE_F16) return f16_to_f32(f16_from_f32(value));
    if (dtype == DTYPE_BF16) return bf16_to_f32(bf16_from_f32(value));
    return value;
}

void *zeros(size_t n, size_t bytes)
{
    void *array = calloc(n ? n : 1, bytes);
    cr_assert(array);
    return array;
}

/* ---- comparison --------------------------------------------------------------------------- */

void expect_near(const float *got, const float *want, size_t n, double absolute, double relative,
                 const char *what)
{
    for (size_t i = 0; i < n; i++) {
        const double error = fabs((double)got[i] - (double)want[i]);
        const double limit = absolute + relative * fabs((double)want[i]);
        if (error <= limit) continue;
        cr_assert_fail("%s: element %zu of %zu is %.9g, not %.9g: off by %.3g, limit %.3g", what, i,
                       n, (double)got[i], (double)want[i], error, limit);
    }
}

void expect_same(const float *got, const float *want, size_t n, const char *what)
{
    if (!device_is_cpu()) {
        expect_near(got, want, n, 1e-2, 1e-2, what);
        return;
    }
    for (size_t i = 0; i < n; i++)
        if (memcmp(&got[i], &want[i], sizeof got[i]) != 0)
            cr_assert_fail("%s: element %zu of %zu is %.9g, not %.9g, bit for bit", what, i, n,
                           (double)got[i], (double)want[i]);
}

double half_ulp(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? 0x1p-8 : dtype == DTYPE_F16 ? 0x1p-11 : 0x1p-24;
}
