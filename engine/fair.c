#include "engine/fair.h"

#include <stdlib.h>

#include "engine/base/error.h"

enum { FIRST_CAPACITY = 64, OUTPUT_WEIGHT = 2 };

enum { MANY_ADAPTERS = 8 }; /* that run: of rank 16 as many cost a step about 3 % */

void fair_close(struct fair *fair)
{
    free(fair->accounts);
    *fair = (struct fair){0};
}

/* ---- accounts ------------------------------------------------------------------------------- */

static bool is_idle(const struct account *account)
{
    return !account->first && account->n_running == 0;
}

/* For something that it could have by now. */
static bool asks(const struct account *account)
{
    return account->head || (account->first && account->has_no_room);
}

static int64_t most_served(const struct fair *fair, bool running_only)
{
    int64_t most = -1;

    for (int i = 0; i < fair->n_accounts; i++) {
        const struct account *account = &fair->accounts[i];
        if (running_only && account->n_running == 0) continue;
        if (account->served > most) most = account->served;
    }
    return most;
}

/* Where an account begins that begins now: with the one that waits and was served least; where
 * nobody waits, with the one that runs and was served most. */
static int64_t level(const struct fair *fair)
{
    int64_t least = -1;

    for (int i = 0; i < fair->n_accounts; i++) {
        const struct account *account = &fair->accounts[i];
        if (!account->counts || !asks(account)) continue;
        if (least < 0 || account->served < least) least = account->served;
    }
    if (least < 0) least = most_served(fair, true);
    if (least < 0) least = most_served(fair, false);
    return least < 0 ? 0 : least;
}

/* An idle account that is not above the level would be lifted to it: nothing is lost with it. */
static int find_idle(const struct fair *fair)
{
    const int64_t now = level(fair);

    for (int i = 0; i < fair->n_accounts; i++)
        if (is_idle(&fair->accounts[i]) && fair->accounts[i].served <= now) return i;
    return -1;
}

static mlora_status open_account(struct fair *fair, uint64_t key, int *out)
{
    int at = -1;

    for (int i = 0; i < fair->n_accounts; i++) {
        if (fair->accounts[i].key != key) continue;
        *out = i;
        return MLORA_OK;
    }
    if (fair->n_accounts == fair->capacity) at = find_idle(fair);
    if (at < 0 && fair->n_accounts == fair->capacity) {
        const int capacity = fair->capacity ? 2 * fair->capacity : FIRST_CAPACITY;
        struct account *grown = realloc(fair->accounts, (size_t)capacity * sizeof *grown);
        if (!grown) return error_set(MLORA_ENOMEM, "out of memory: accounts of adapters");
        fair->accounts = grown;
        fair->capacity = capacity;
    }
    if (at < 0) at = fair->n_accounts++;
    fair->accounts[at] = (struct account){.key = key};
    *out = at;
    return MLORA_OK;
}

/* ---- waiting -------------------------------------------------------------------------------- */

void fair_put_back(struct fair *fair, struct request *request)
{
    struct account *account = &fair->accounts[request->account];
    struct request **at = &account->first;

    if (account->last && request_before(account->last, request)) at = &account->last->next;
    while (*at && request_before(*at, request)) at = &(*at)->next;
    request->next = *at;
    *at = request;
    if (!request->next) account->last = request;
    fair->n_waiting++;
}

mlora_status fair_add(struct fair *fair, struct request *request)
{
    const mlora_status status = open_account(fair, request->account_key, &request->account);

    if (status == MLORA_OK) fair_put_back(fair, request);
    return status;
}

/* The first ready request from `request` on. */
static struct request *first_ready(struct request *request)
{
    while (request && !request_ready(request)) request = request->next;
    return request;
}

bool fair_take(struct fair *fair, struct request *request)
{
    struct account *account = &fair->accounts[request->account];
    struct request *before = NULL, *at = account->first;

    for (; at && at != request; at = at->next) before = at;
    if (!at) return false;
    *(before ? &before->next : &account->first) = at->next;
    if (account->last == at) account->last = before;
    if (account->head == at) account->head = first_ready(at->next);
    if (!asks(account)) account->counts = false;
    at->next = NULL;
    fair->n_waiting--;
    return true;
}

void fair_refresh(struct fair *fair, int n_places)
{
    int n_active = 0;

    for (int i = 0; i < fair->n_accounts; i++) {
        struct account *account = &fair->accounts[i];
        account->head = first_ready(account->first);
        if (!asks(account)) account->counts = false;
        n_active += asks(account) || account->n_running > 0;
    }
    fair->share = n_active > 0 ? n_places / n_active : n_places;
    const int64_t now = level(fair);
    for (int i = 0; i < fair->n_accounts; i++) {
        struct account *account = &fair->accounts[i];
        if (account->counts || !asks(account)) continue;
        if (account->served < now) account->served = now;
        account->counts = true;
    }
}

/* ---- who is next ---------------------------------------------------------------------------- */

/* Whether the head of `a` is next rather than that of `b`. */
static bool head_before(const struct account *a, const struct account *b, int share, bool crowded)
{
    if ((a->n_running < share) != (b->n_running < share)) return a->n_running < share;
    if (a->head->priority != b->head->priority) return a->head->priority < b->head->priority;
    if (crowded && (a->n_running > 0) != (b->n_running > 0)) return a->n_running > 0;
    if (a->served != b->served) return a->served < b->served;
    return a->head->id < b->head->id;
}

struct request *fair_next(const struct fair *fair, int64_t window)
{
    const struct account *next = NULL;
    int64_t least = INT64_MAX;
    int n_running = 0;

    for (int i = 0; i < fair->n_accounts; i++) {
        n_running += fair->accounts[i].n_running > 0;
        if (fair->accounts[i].head && fair->accounts[i].served < least)
            least = fair->accounts[i].served;
    }
    for (int i = 0; i < fair->n_accounts; i++) {
        const struct account *account = &fair->accounts[i];
        if (!account->head || account->served - least > window) continue;
        if (!next || head_before(account, next, fair->share, n_running >= MANY_ADAPTERS))
            next = account;
    }
    return next ? next->head : NULL;
}

int fair_n_entitled(const struct fair *fair, int64_t served, int max)
{
    int n = 0;

    for (int i = 0; i < fair->n_accounts && n < max; i++) {
        const struct account *account = &fair->accounts[i];
        int room = fair->share - account->n_running;
        if (account->served > served) continue;
        for (const struct request *at = account->head; at && room > 0 && n < max; at = at->next) {
            if (!request_ready(at)) continue;
            room--;
            n++;
        }
    }
    return n;
}

int fair_least_without_room(const struct fair *fair)
{
    int least = -1;

    for (int i = 0; i < fair->n_accounts; i++) {
        const struct account *account = &fair->accounts[i];
        if (!account->first || !account->has_no_room) continue;
        if (least < 0 || account->served < fair->accounts[least].served) least = i;
    }
    return least;
}

void fair_hold_back(struct fair *fair, int64_t served)
{
    for (int i = 0; i < fair->n_accounts; i++)
        if (fair->accounts[i].served > served) fair->accounts[i].head = NULL;
}

int fair_most_served(const struct fair *fair)
{
    int most = -1;

    for (int i = 0; i < fair->n_accounts; i++) {
        if (fair->accounts[i].n_running == 0) continue;
        if (most < 0 || fair->accounts[i].served > fair->accounts[most].served) most = i;
    }
    return most;
}

void fair_charge(struct fair *fair, struct request *request, int n_tokens)
{
    if (n_tokens <= request->n_charged) return;
    const int n_new = n_tokens - request->n_charged;
    const int n_prompt =
        request->n_prompt > request->n_charged ? request->n_prompt - request->n_charged : 0;
    const int n_of_prompt = n_new < n_prompt ? n_new : n_prompt;

    fair->accounts[request->account].served +=
        n_of_prompt + (int64_t)OUTPUT_WEIGHT * (n_new - n_of_prompt);
    request->n_charged = n_tokens;
}
