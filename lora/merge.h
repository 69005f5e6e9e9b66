/* One adapter folded into the weights of its base: W becomes W + s B A, rounded once to the type of
 * W. Afterwards every row of a batch is the adapter's, at the cost of the base alone. */
#ifndef MLORA_LORA_MERGE_H
#define MLORA_LORA_MERGE_H

#include "lora/adapter.h"

/* Read the adapter in `directory` and fold it into `weights`, which are on `dev`. Where embedding
 * and head were one and the adapter changes either, they are two afterwards; linears get the
 * biases that the adapter brings.
 * `*warnings` receives what the adapter's own load would have warned of, a line each, for free().
 * Returns OK, what adapter_plan_read and adapter_load return, or EUNSUPPORTED (an aLoRA, which
 * counts for some tokens only; a bias of the head, which no model has). On failure `weights` may
 * be half merged, and can only be freed. */
mlora_status merge_adapter(struct weights *weights, struct device *dev,
                           const struct model_config *config, const char *directory, bool lenient,
                           char **warnings);

/* Give all layers the biases, of zeros, that a checkpoint has in every layer or in none.
 * Returns OK, ENOMEM or EDEVICE. */
mlora_status merge_fill_biases(struct weights *weights, struct device *dev,
                               const struct model_config *config, bool attention, bool mlp);

#endif
