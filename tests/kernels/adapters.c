#include "tests/kernels/adapters.h"

#include <stdlib.h>

void adapters_upload(struct adapters *adapters, const struct lora_site *site)
{
    struct lora_factors factors[S_MAX][L][LORA_LINEARS] = {0};

    for (int s = 0; s < adapters->S; s++) {
        for (int i = 0; i < site->n_slices; i++) {
            const struct lora_factors *from = &adapters->host[s][LAYER][site->linear + i];
            struct lora_factors *to = &factors[s][LAYER][site->linear + i];
            if (!from->a) continue;
            *to = *from;
            to->a = upload_as((enum dtype)from->dtype, from->a, (size_t)(from->R * site->K));
            to->b = upload_as((enum dtype)from->dtype, from->b, (size_t)(from->R * site->width[i]));
        }
    }
    adapters->factors = upload(factors, sizeof factors);
}

void adapters_free(struct adapters *adapters)
{
    for (int s = 0; s < S_MAX; s++)
        for (int i = 0; i < LORA_LINEARS; i++) {
            free((void *)adapters->host[s][LAYER][i].a);
            free((void *)adapters->host[s][LAYER][i].b);
        }
}

struct lora_view view_of(const struct adapters *adapters, const struct lora_site *site,
                         const int32_t *slot, int T)
{
    int32_t order[T_MAX], segment_slot[S_MAX], segment_start[S_MAX + 1] = {0};
    struct lora_view view = {.factors = adapters->factors, .L = L, .is_plain = true};

    for (int s = 0; s < adapters->S; s++) {
        const int first = view.n_tokens;
        for (int t = 0; t < T; t++)
            if (slot[t] == s) order[view.n_tokens++] = t;
        if (view.n_tokens == first) continue;
        if (view.n_tokens - first > view.max_segment) view.max_segment = view.n_tokens - first;
        for (int i = 0; i < site->n_slices; i++) {
            const struct lora_factors *factors = &adapters->host[s][LAYER][site->linear + i];
            if (!factors->a) continue;
            if (factors->R > view.max_rank) view.max_rank = factors->R;
            if (factors->R % 8 != 0 || factors->dtype != DTYPE_BF16) view.is_plain = false;
        }
        segment_slot[view.n_segments] = s;
        segment_start[++view.n_segments] = view.n_tokens;
    }
    view.slot = upload(slot, (size_t)T * sizeof *slot);
    view.order = upload(order, (size_t)view.n_tokens * sizeof *order);
    view.segment_slot = upload(segment_slot, (size_t)view.n_segments * sizeof *segment_slot);
    view.segment_start = upload(segment_start, sizeof segment_start);
    return view;
}

static void adapters_make(struct adapters *adapters, struct numbers *numbers,
                          const struct lora_site *site, const int ranks[S_MAX], int n_dtypes)
{
    *adapters = (struct adapters){.S = S_MAX};
    for (int s = 0; s < S_MAX; s++) {
        for (int i = 0; i < site->n_slices; i++) {
            struct lora_factors *factors = &adapters->host[s][LAYER][site->linear + i];
            if ((s + i) % 4 == 3) continue;
            factors->R = ranks[(s + i) % S_MAX];
            factors->dtype = n_dtypes == 1 ? DTYPE_BF16 : (s + i) % n_dtypes;
            factors->scale = 0.25f * (float)(s + 1);
            factors->a =
                next_floats(numbers, (size_t)(factors->R * site->K), (enum dtype)factors->dtype);
            factors->b = next_floats(numbers, (size_t)(factors->R * site->width[i]),
                                     (enum dtype)factors->dtype);
        }
    }
    adapters_upload(adapters, site);
}

void adapters_random(struct adapters *adapters, struct numbers *numbers,
                     const struct lora_site *site)
{
    static const int ranks[S_MAX] = {1, 8, 16, 5, LORA_RANK_MAX, 64};
    adapters_make(adapters, numbers, site, ranks, 3);
}

void adapters_plain(struct adapters *adapters, struct numbers *numbers,
                    const struct lora_site *site, int rank)
{
    const int ranks[S_MAX] = {rank, 8, rank, 8, rank, 8};
    adapters_make(adapters, numbers, site, ranks, 1);
}
