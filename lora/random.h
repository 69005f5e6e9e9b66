/* An adapter of random factors on all seven linears, for measuring speed without training one. */
#ifndef MLORA_LORA_RANDOM_H
#define MLORA_LORA_RANDOM_H

#include "lora/adapter.h"

/* rank 1 to LORA_RANK_MAX, bf16 factors, scale 1 / rank; the same seed gives the same adapter. The
 * image is left out: adapter_random_image() makes it.
 * Returns OK or ENOMEM; on failure `out` is zeroed and nothing stays allocated. */
mlora_status adapter_random(struct adapter *out, const struct model_config *config, int rank,
                            uint64_t seed);

/* Returns OK or ENOMEM. Thread: any that has the adapter alone. */
mlora_status adapter_random_image(struct adapter *adapter, uint64_t seed);

#endif
