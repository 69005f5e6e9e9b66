/* What an adapter is, in a hash: the plan here, and the tensors' bytes as they are read. */
#include "lora/adapter.h"

static void add_int(struct hasher *hasher, int64_t value)
{
    hash_add(hasher, &value, sizeof value);
}

static void add_linear(struct hasher *hasher, const struct adapter_linear *linear)
{
    add_int(hasher, linear->rank);
    hash_add(hasher, &linear->scale, sizeof linear->scale);
    add_int(hasher, linear->dtype);
    add_int(hasher, linear->a_form);
    add_int(hasher, linear->b_form);
    add_int(hasher, linear->parts);
    add_int(hasher, linear->b_row);
    add_int(hasher, linear->b_bias != NULL);
    add_int(hasher, linear->magnitude != NULL);
    add_int(hasher, linear->bias != NULL);
}

static void add_rows(struct hasher *hasher, const struct adapter_rows *rows)
{
    const size_t n = rows->tensor ? (size_t)rows->n : 0;

    add_int(hasher, (int64_t)n);
    hash_add(hasher, rows->ids, n * sizeof *rows->ids);
    hash_add(hasher, rows->row, n * sizeof *rows->row);
}

void adapter_hash_plan(struct hasher *hasher, const struct adapter_plan *plan)
{
    add_int(hasher, plan->n_layers);
    for (int i = 0; i < (plan->n_layers + 1) * LORA_LINEARS; i++)
        add_linear(hasher, &plan->linears[i]);
    for (int i = 0; i <= plan->n_layers * LORA_NORMS; i++) add_int(hasher, plan->norms[i] != NULL);
    add_int(hasher, plan->embedding != NULL);
    add_int(hasher, plan->head != NULL);
    add_int(hasher, plan->embedding && plan->embedding == plan->head);
    add_rows(hasher, &plan->embedding_rows);
    add_rows(hasher, &plan->head_rows);
    add_int(hasher, plan->head_has_embedding_rows);
    add_int(hasher, plan->n_invocation);
    if (plan->invocation)
        hash_add(hasher, plan->invocation, (size_t)plan->n_invocation * sizeof *plan->invocation);
}
