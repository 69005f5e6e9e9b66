/* Where the parts of an adapter are, in an image that is elsewhere and in a prompt. */
#include "lora/adapter.h"

#include <limits.h>
#include <string.h>

/* Where a part of the image is when the image is at `base`. */
static const void *placed(const struct adapter *adapter, const char *base, const void *at)
{
    return at ? base + ((uintptr_t)at - adapter->origin) : NULL;
}

void adapter_place(const struct adapter *adapter, const char *base, struct lora_factors *factors,
                   struct lora_own *own, const float **norms)
{
    *own = adapter->own;
    own->embedding.data = placed(adapter, base, own->embedding.data);
    own->head.data = placed(adapter, base, own->head.data);
    struct lora_rows *const rows[] = {&own->embedding_rows, &own->head_rows};
    for (int i = 0; i < 2; i++) {
        rows[i]->ids = placed(adapter, base, rows[i]->ids);
        rows[i]->data = placed(adapter, base, rows[i]->data);
    }
    own->norms = placed(adapter, base, own->norms);
    for (int i = 0; adapter->norms && i <= adapter->n_layers * LORA_NORMS; i++)
        norms[i] = placed(adapter, base, adapter->norms[i]);

    for (int i = 0; i < (adapter->n_layers + 1) * LORA_LINEARS; i++) {
        struct lora_factors *f = &factors[i];
        *f = adapter->factors[i];
        f->a = placed(adapter, base, f->a);
        f->b = placed(adapter, base, f->b);
        f->g = placed(adapter, base, f->g);
        f->b_bias = placed(adapter, base, f->b_bias);
        f->bias_delta = placed(adapter, base, f->bias_delta);
    }
}

int adapter_first_position(const struct adapter *adapter, const int32_t *prompt, int n)
{
    const int m = adapter->n_invocation;

    if (m == 0) return 0;
    for (int at = n - m; at >= 0; at--)
        if (memcmp(prompt + at, adapter->invocation, (size_t)m * sizeof *prompt) == 0) return at;
    return INT_MAX;
}
