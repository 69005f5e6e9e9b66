/* What the files that make an adapter_plan share: the tensors of the file sorted by what they are
 * for, and what was left over. Internal to lora/. */
#ifndef MLORA_LORA_PLAN_H
#define MLORA_LORA_PLAN_H

#include "lora/adapter.h"
#include "lora/peft_config.h"
#include "lora/tensor_name.h"

#define MERGE "merge it into its base with PEFT's merge_and_unload and serve the result as a model"

/* Names that go into one message. */
struct name_list {
    int n;
    struct buffer text; /* the first few */
};

mlora_status name_list_add(struct name_list *list, const char *name);
const char *name_list_rest(const struct name_list *list); /* ", ..." if some are not shown */

/* What the file has for one linear. */
struct pair {
    const struct tensor *a, *b, *b_bias, *magnitude, *bias;
    const char *linear; /* as the file names it; NULL: nothing */
    int first;          /* enum lora_linear: the first one of a fused linear */
};

struct reader {
    struct adapter_plan *plan;
    const struct peft_config *peft;
    const struct model_config *base; /* NULL: unknown */
    bool lenient;
    struct pair *pairs; /* [L + 1, LORA_LINEARS] */
    char prefix[MODULE_PREFIX_MAX];
    /* [LORA_EMBEDDING, LORA_HEAD] whole weights, copies of the base's, replaced rows */
    const struct tensor *whole[2], *copy[2], *tokens[2];
    struct name_list unknown, untargeted, absent;
};

/* PEFT's name of the adapter's base, for messages. */
const char *reader_base(const struct reader *reader);

/* Take a tensor of a linear, or of the embedding or head as a whole. */
mlora_status plan_place(struct reader *reader, const struct tensor *tensor,
                        const struct tensor_name *name);

/* The tensors of linear `index` of `layer` (L: outside) against the configuration and the base. */
mlora_status plan_linear(struct reader *reader, int layer, int index);

/* Whole embeddings, heads, rows of them, and norms. */
mlora_status plan_norm(struct reader *reader, const struct tensor *tensor,
                       const struct tensor_name *name);
mlora_status plan_whole(struct reader *reader);

mlora_status plan_other_base(const struct reader *reader, const struct tensor *tensor, int64_t rows,
                             int64_t columns);

#endif
