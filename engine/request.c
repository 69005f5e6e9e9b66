#include "engine/request.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "engine/base/error.h"

enum { STOP_MAX = 16, STOP_BYTES_MAX = 1024, LOGPROBS_MAX = 128 };

/* ---- checks --------------------------------------------------------------------------------- */

/* `needed` says the range in words. NaN is never inside. */
static mlora_status check_float(const char *name, float value, float min, float max,
                                bool open_below, const char *needed)
{
    if (isfinite(value) && value <= max && (open_below ? value > min : value >= min))
        return MLORA_OK;
    return error_set(MLORA_EINVAL, "%s is %g, must be %s", name, (double)value, needed);
}

static mlora_status check_sampling(const mlora_request *r)
{
    const struct {
        const char *name;
        float value, min, max;
        bool open_below;
        const char *needed;
    } ranges[] = {
        {"temperature", r->temperature, 0, 1e4f, false, "0 (greedy) or more"},
        {"top_p", r->top_p, 0, 1, true, "above 0 and at most 1"},
        {"min_p", r->min_p, 0, 1, false, "from 0 to 1"},
        {"repetition_penalty", r->repetition_penalty, 0, 1e4f, true, "above 0 (1: none)"},
        {"presence_penalty", r->presence_penalty, -1e4f, 1e4f, false, "a number (0: none)"},
        {"frequency_penalty", r->frequency_penalty, -1e4f, 1e4f, false, "a number (0: none)"},
    };

    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        const mlora_status status =
            check_float(ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max,
                        ranges[i].open_below, ranges[i].needed);
        if (status != MLORA_OK) return status;
    }
    if (r->top_k < 0)
        return error_set(MLORA_EINVAL, "top_k is %d, must be 0 (all) or more", r->top_k);
    if (r->n_logprobs < -1 || r->n_logprobs > LOGPROBS_MAX)
        return error_set(MLORA_EINVAL, "n_logprobs is %d, must be from -1 (none) to %d",
                         r->n_logprobs, LOGPROBS_MAX);
    return MLORA_OK;
}

static mlora_status check_stop(const mlora_request *r)
{
    if (r->n_stop < 0 || r->n_stop > STOP_MAX || (r->n_stop > 0 && !r->stop))
        return error_set(MLORA_EINVAL, "%d stop strings, at most %d are allowed", r->n_stop,
                         STOP_MAX);
    for (int i = 0; i < r->n_stop; i++) {
        const size_t bytes = r->stop[i] ? strlen(r->stop[i]) : 0;
        if (bytes == 0 || bytes > STOP_BYTES_MAX)
            return error_set(MLORA_EINVAL, "stop string %d has %zu bytes, must have 1 to %d", i + 1,
                             bytes, STOP_BYTES_MAX);
    }
    return MLORA_OK;
}

static mlora_status check_prompt(const mlora_request *r, const struct ids *prompt, int vocab_size,
                                 int max_model_len)
{
    if (prompt->n == 0)
        return error_set(MLORA_EINVAL, "the prompt has no tokens, at least one is needed");
    for (int i = 0; i < prompt->n; i++)
        if (prompt->data[i] < 0 || prompt->data[i] >= vocab_size)
            return error_set(MLORA_EINVAL, "prompt token %d is id %d, the model has ids 0 to %d", i,
                             prompt->data[i], vocab_size - 1);
    const int room = r->max_tokens != 0; /* at least one token is generated */
    if (prompt->n + room > max_model_len)
        return error_set(MLORA_EINVAL,
                         "the prompt has %d tokens, the context holds %d with the "
                         "output: shorten the prompt%s",
                         prompt->n, max_model_len, room ? "" : " or raise max_model_len");
    return MLORA_OK;
}

/* ---- creating ------------------------------------------------------------------------------- */

static uint64_t fresh_seed(void)
{
    uint64_t seed = 0;
    if (getrandom(&seed, sizeof seed, 0) != (ssize_t)sizeof seed) seed = 0x9e3779b97f4a7c15u;
    return seed;
}

mlora_status request_create(struct request **out, const mlora_request *from,
                            const struct ids *prompt, const struct tokenizer *tokenizer,
                            int vocab_size, int max_model_len)
{
    struct request *r = NULL;

    *out = NULL;
    mlora_status status = check_sampling(from);
    if (status == MLORA_OK) status = check_stop(from);
    if (status == MLORA_OK) status = check_prompt(from, prompt, vocab_size, max_model_len);
    if (status != MLORA_OK) return status;

    r = calloc(1, sizeof *r);
    if (!r) goto no_memory;
    const int room = max_model_len - prompt->n;
    const int n_new = from->max_tokens < 0 || from->max_tokens > room ? room : from->max_tokens;
    r->max_total = prompt->n + n_new;
    r->tokens = malloc((size_t)r->max_total * sizeof *r->tokens);
    r->kv.blocks = malloc((size_t)kvcache_blocks_for(r->max_total) * sizeof *r->kv.blocks);
    if (!r->tokens || !r->kv.blocks) goto no_memory;

    memcpy(r->tokens, prompt->data, (size_t)prompt->n * sizeof *r->tokens);
    r->n_prompt = prompt->n;
    r->n_tokens = prompt->n;
    r->sampling = (struct sampling){
        .temperature = from->temperature,
        .top_p = from->top_p,
        .min_p = from->min_p,
        .repetition_penalty = from->repetition_penalty,
        .presence_penalty = from->presence_penalty,
        .frequency_penalty = from->frequency_penalty,
        .top_k = from->top_k,
        .seed = from->seed < 0 ? fresh_seed() : (uint64_t)from->seed,
    };
    r->priority = from->priority;
    r->ignore_eos = from->ignore_eos != 0;
    r->n_logprobs = from->n_logprobs;
    r->prompt_logprobs = from->prompt_logprobs != 0;
    r->on_event = from->on_event;
    r->user = from->user;

    status = stream_open(&r->stream, tokenizer, from->stop, from->n_stop);
    if (status != MLORA_OK) {
        request_free(r);
        return status;
    }
    *out = r;
    return MLORA_OK;

no_memory:
    request_free(r);
    return error_set(MLORA_ENOMEM, "out of memory: a request of %d prompt tokens", prompt->n);
}

void request_free(struct request *request)
{
    if (!request) return;
    stream_close(&request->stream);
    buffer_free(&request->text);
    free(request->tokens);
    free(request->kv.blocks);
    free(request);
}

bool request_ready(const struct request *request)
{
    return !request->adapter || registry_ready(request->adapter);
}

bool request_before(const struct request *a, const struct request *b)
{
    return a->priority != b->priority ? a->priority < b->priority : a->id < b->id;
}

struct kv_source request_source(const struct request *request)
{
    return (struct kv_source){request->tokens, request->content, request->adapter_from};
}

int request_n_output(const struct request *request)
{
    return request->n_tokens - request->n_prompt;
}

bool request_has_penalty(const struct request *request)
{
    return request->sampling.repetition_penalty != 1.0f ||
           request->sampling.presence_penalty != 0.0f ||
           request->sampling.frequency_penalty != 0.0f;
}
