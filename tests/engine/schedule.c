#include "tests/engine/schedule.h"

#include <criterion/criterion.h>
#include <stdlib.h>

void schedule_open(struct schedule *schedule, int max_running, int max_tokens, int n_blocks,
                   bool shares)
{
    const struct hash_key key = {{1, 2}};

    cr_assert_eq(scheduler_open(&schedule->scheduler, max_running, max_tokens), MLORA_OK);
    cr_assert_eq(kvcache_open(&schedule->kv, n_blocks, shares, key), MLORA_OK);
}

void schedule_close(struct schedule *schedule)
{
    scheduler_close(&schedule->scheduler);
    kvcache_close(&schedule->kv);
}

struct request *schedule_request(uint64_t id, uint64_t account, int n_prompt, int max_total)
{
    struct request *r = calloc(1, sizeof *r);

    r->id = id;
    r->account_key = account;
    r->content.word[0] = account;
    r->n_prompt = r->n_tokens = n_prompt;
    r->max_total = max_total;
    r->sampling.repetition_penalty = 1;
    r->kv.blocks = calloc((size_t)kvcache_blocks_for(max_total), sizeof *r->kv.blocks);
    r->tokens = calloc((size_t)max_total, sizeof *r->tokens);
    for (int i = 0; i < n_prompt; i++) r->tokens[i] = 1;
    return r;
}

void schedule_add(struct schedule *schedule, struct request *request)
{
    cr_assert_eq(scheduler_add(&schedule->scheduler, request), MLORA_OK);
}

void schedule_end(struct schedule *schedule, struct request *request)
{
    scheduler_remove(&schedule->scheduler, request, &schedule->kv);
    cr_assert_eq(request->kv.n_blocks, 0);
    free(request->kv.blocks);
    free(request->tokens);
    free(request);
}

int32_t schedule_next_token(const struct request *request, int n)
{
    uint32_t hash = (uint32_t)request->content.word[0];

    for (int i = 0; i < n; i++) hash = (hash ^ (uint32_t)request->tokens[i]) * 16777619u;
    return (int32_t)(hash >> 4) % 3;
}

void schedule_carry_out(struct schedule *schedule, const struct plan *plan)
{
    for (int q = 0; q < plan->n_rows; q++) {
        struct request *r = plan->rows[q].request;
        if (!r) continue;
        const int32_t *guesses = r->tokens + r->n_tokens;
        int right = 0;
        while (right < plan->rows[q].n_drafts &&
               guesses[right] == schedule_next_token(r, r->n_tokens + right))
            right++;
        scheduler_computed(&schedule->scheduler, &schedule->kv, &plan->rows[q], right);
        if (!plan->rows[q].samples || r->n_tokens == r->max_total) continue;
        r->n_tokens += right;
        r->tokens[r->n_tokens] = schedule_next_token(r, r->n_tokens);
        r->n_tokens++;
    }
}

const struct plan *schedule_step(struct schedule *schedule)
{
    const struct plan *plan = scheduler_plan(&schedule->scheduler, &schedule->kv);

    schedule_carry_out(schedule, plan);
    return plan;
}

int random_below(uint64_t *state, int n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
    return (int)((*state >> 33) % (uint64_t)n);
}
