/* The number formats of weights and activations, and how to widen and round them. */
#ifndef MLORA_KERNELS_DTYPE_H
#define MLORA_KERNELS_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype { DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2 };

static inline size_t dtype_bytes(enum dtype dtype)
{
    return dtype == DTYPE_F32 ? 4 : 2;
}

static inline const char *dtype_name(enum dtype dtype)
{
    return dtype == DTYPE_F32 ? "f32" : dtype == DTYPE_F16 ? "f16" : "bf16";
}

static inline float bf16_to_f32(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t bf16_from_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Exact, subnormals, infinities and NaN included. */
static inline float f16_to_f32(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t rest = (uint32_t)(half & 0x7fffu) << 13;
    uint32_t bits;
    float value;

    if (rest >= 0x0f800000u) { /* infinity or NaN */
        bits = sign | 0x7f800000u | (rest & 0x007fffffu);
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    memcpy(&value, &rest, sizeof value);
    value *= 0x1p112f; /* moves the exponent's bias from 15 to 127, subnormals too */
    memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Round to nearest, ties to even; overflow gives infinity, NaN stays NaN. */
static inline uint16_t f16_from_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;

    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above */
    if (bits < 0x38800000u) {                                   /* subnormal: let addition round */
        float magnitude;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
}

/* out [n] = the values at `from`. */
static inline void dtype_widen(float *out, const void *from, enum dtype dtype, size_t n)
{
    const uint16_t *half = (const uint16_t *)from;

    if (dtype == DTYPE_F32)
        memcpy(out, from, n * sizeof *out);
    else if (dtype == DTYPE_BF16)
        for (size_t i = 0; i < n; i++) out[i] = bf16_to_f32(half[i]);
    else
        for (size_t i = 0; i < n; i++) out[i] = f16_to_f32(half[i]);
}

/* out [n] = the values, rounded to nearest. */
static inline void dtype_narrow(void *out, enum dtype dtype, const float *values, size_t n)
{
    uint16_t *half = (uint16_t *)out;

    if (dtype == DTYPE_F32)
        memcpy(out, values, n * sizeof *values);
    else if (dtype == DTYPE_BF16)
        for (size_t i = 0; i < n; i++) half[i] = bf16_from_f32(values[i]);
    else
        for (size_t i = 0; i < n; i++) half[i] = f16_from_f32(values[i]);
}

/* Whether none of the values is infinite or NaN. */
static inline bool bf16_all_finite(const uint16_t *values, size_t n)
{
    unsigned other = 0;

    for (size_t i = 0; i < n; i++) other |= (values[i] & 0x7f80u) == 0x7f80u;
    return !other;
}

/* Element i of an array, which need not be aligned. */
static inline float dtype_load(const void *array, enum dtype dtype, size_t i)
{
    const char *from = (const char *)array + i * dtype_bytes(dtype);
    uint16_t half;
    float value;

    if (dtype == DTYPE_F32) {
        memcpy(&value, from, sizeof value);
        return value;
    }
    memcpy(&half, from, sizeof half);
    return dtype == DTYPE_BF16 ? bf16_to_f32(half) : f16_to_f32(half);
}

static inline void dtype_store(void *array, enum dtype dtype, size_t i, float value)
{
    char *to = (char *)array + i * dtype_bytes(dtype);

    if (dtype == DTYPE_F32) {
        memcpy(to, &value, sizeof value);
        return;
    }
    const uint16_t half = dtype == DTYPE_BF16 ? bf16_from_f32(value) : f16_from_f32(value);
    memcpy(to, &half, sizeof half);
}

/* The value as it comes back from an array. */
static inline float dtype_rounded(enum dtype dtype, float value)
{
    float element;
    dtype_store(&element, dtype, 0, value);
    return dtype_load(&element, dtype, 0);
}

#endif
