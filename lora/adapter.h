/* A PEFT adapter directory to factors on the device, exactly as PEFT would apply them, or a
 * refusal with the reason. */
#ifndef MLORA_LORA_ADAPTER_H
#define MLORA_LORA_ADAPTER_H

#include <stdbool.h>

#include "engine/base/buffer.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/safetensors.h"

/* One linear of one layer that the adapter changes: y += scale * B (A x). */
struct adapter_linear {
    int rank;    /* 0: this linear is left alone */
    float scale; /* alpha / rank, or alpha / sqrt(rank) with rsLoRA */
    double alpha;
    const struct tensor *a, *b; /* in the adapter's file */
    int64_t b_row, b_rows;      /* its rows of b: all of them but in a fused linear (qkv_proj) */
    enum dtype dtype;           /* of both on the device */
};

/* What a directory holds, read and checked, without the factors themselves. */
struct adapter_plan {
    char *directory;
    struct safetensors file;
    struct adapter_linear *linears; /* [L, LORA_LINEARS] */
    int n_layers;
    int max_rank;
    bool rslora;
    char *base_model;       /* base_model_name_or_path, for showing; may be NULL */
    int64_t bytes;          /* of all factors on the device */
    struct buffer warnings; /* a line each */
};

/* Read adapter_config.json and the names and shapes in adapter_model.safetensors, match targets,
 * ranks and alphas as PEFT does, and check every shape against `config`.
 * `lenient`: tensors that no target matches, and unknown ones, become warnings.
 * `config` NULL, for looking at an adapter without its base: layers are counted from the names,
 * and shapes are checked against each other only.
 * Returns OK, EIO, EFORMAT, EUNSUPPORTED, ENOMEM, or EINVAL (`config` is NULL and a fused linear
 * needs it); on failure `out` is zeroed. */
mlora_status adapter_plan_read(struct adapter_plan *out, const char *directory,
                               const struct model_config *config, bool lenient);
void adapter_plan_free(struct adapter_plan *plan); /* accepts zeroes */

/* Bytes that the factors of linears[index] take on the device, each rounded up so that the next
 * one is aligned. `*a` is 0 where the linear shares A with the one before it (fused linears). */
void adapter_factor_bytes(const struct adapter_plan *plan, int index, int64_t *a, int64_t *b);

/* The factors on the device. */
struct adapter {
    struct lora_factors *factors; /* [L, LORA_LINEARS] host array of device pointers */
    void *memory;                 /* one device allocation that holds all of them */
    int64_t bytes;
    int n_layers;
    int max_rank;
    char *warnings; /* a line each, "" if none */
};

/* Read the factors and upload them. Returns OK, EIO, ENOMEM or EDEVICE; on failure `out` is
 * zeroed and nothing stays allocated. Values are taken as they are, NaN too. */
mlora_status adapter_load(struct adapter *out, struct device *dev, const struct adapter_plan *plan);
void adapter_free(struct adapter *adapter, struct device *dev); /* accepts zeroes */

#endif
