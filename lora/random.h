/* An adapter of random factors on all seven linears, for measuring speed without training one. */
#ifndef MLORA_LORA_RANDOM_H
#define MLORA_LORA_RANDOM_H

#include "lora/adapter.h"

/* rank 1 to LORA_RANK_MAX, bf16 factors, scale 1 / rank; the same seed gives the same adapter.
 * Returns OK, ENOMEM or EDEVICE; on failure `out` is zeroed and nothing stays allocated. */
mlora_status adapter_random(struct adapter *out, struct device *dev,
                            const struct model_config *config, int rank, uint64_t seed);

#endif
