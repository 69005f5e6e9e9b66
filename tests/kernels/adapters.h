/* What tests of the LoRA ops share: adapters of one layer, and views of tokens that use them. */
#ifndef MLORA_TESTS_KERNELS_ADAPTERS_H
#define MLORA_TESTS_KERNELS_ADAPTERS_H

#include "tests/support.h"

enum { T_MAX = 320, S_MAX = 6, L = 3, LAYER = 1 };

/* Adapters of one layer's linears, on the host and on the device. */
struct adapters {
    int S;
    struct lora_factors host[S_MAX][L][LORA_LINEARS]; /* a, b: float arrays, values of dtype */
    const struct lora_factors *factors;               /* the same on the device */
};

void adapters_upload(struct adapters *adapters, const struct lora_site *site);
void adapters_free(struct adapters *adapters);

/* Six adapters of all kinds: ranks from 1 to 512, types, linears left alone. */
void adapters_random(struct adapters *adapters, struct numbers *numbers,
                     const struct lora_site *site);

/* Six whose factors are bf16, with ranks `rank` and 8. */
void adapters_plain(struct adapters *adapters, struct numbers *numbers,
                    const struct lora_site *site, int rank);

/* The view of tokens with these slots. */
struct lora_view view_of(const struct adapters *adapters, const struct lora_site *site,
                         const int32_t *slot, int T);

#endif
