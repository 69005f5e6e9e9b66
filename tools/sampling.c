#include "tools/sampling.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"
#include "tools/text.h"

static mlora_status add_stop(void *target, const char *text)
{
    struct sampling *sampling = target;

    if (sampling->n_stop == STOP_MAX)
        return error_set(MLORA_EINVAL, "more than %d stop strings", STOP_MAX);
    if (!*text || strlen(text) > 1024)
        return error_set(MLORA_EINVAL, "a stop string has %zu bytes, must be 1 to 1024",
                         strlen(text));
    sampling->stop[sampling->n_stop] = strdup(text);
    if (!sampling->stop[sampling->n_stop]) return error_set(MLORA_ENOMEM, "out of memory");
    sampling->n_stop++;
    return MLORA_OK;
}

/* clang-format off */
#define AT(member) .offset = offsetof(struct sampling, member)
const struct option_spec sampling_specs[] = {
    {.name = "max-tokens", .letter = 'n', .aliases = {"predict", "n-predict"}, .kind = OPTION_INT,
     AT(max_tokens), .argument = "N", .min = -1, .max = 1e9,
     .help = "tokens to generate; -1: until the context is full", .fallback = "256"},
    {.name = "temperature", .aliases = {"temp"}, .kind = OPTION_NUMBER, AT(temperature),
     .argument = "T", .min = 0, .max = 100, .help = "0: always the most likely token",
     .fallback = "1"},
    {.name = "top-k", .kind = OPTION_INT, AT(top_k), .argument = "K", .min = 0, .max = 1e9,
     .help = "keep the K most likely tokens; 0: all", .fallback = "0"},
    {.name = "top-p", .kind = OPTION_NUMBER, AT(top_p), .argument = "P", .min = 0, .max = 1,
     .above_min = true, .help = "keep the most likely tokens that together reach P",
     .fallback = "1"},
    {.name = "min-p", .kind = OPTION_NUMBER, AT(min_p), .argument = "P", .min = 0, .max = 1,
     .help = "keep tokens at least P times as likely as the first", .fallback = "0"},
    {.name = "repetition-penalty", .aliases = {"repeat-penalty"}, .kind = OPTION_NUMBER,
     AT(repetition_penalty), .argument = "X", .min = 0, .max = 100, .above_min = true,
     .help = "divide the logits of tokens seen before; 1: none", .fallback = "1"},
    {.name = "presence-penalty", .kind = OPTION_NUMBER, AT(presence_penalty), .argument = "X",
     .min = -100, .max = 100, .help = "subtract from the logits of tokens in the output",
     .fallback = "0"},
    {.name = "frequency-penalty", .kind = OPTION_NUMBER, AT(frequency_penalty), .argument = "X",
     .min = -100, .max = 100, .help = "the same, times how often they are there",
     .fallback = "0"},
    {.name = "seed", .letter = 's', .kind = OPTION_INT, AT(seed), .argument = "N", .min = -1,
     .max = 9223372036854775807.0,
     .help = "the same seed gives the same text; -1: a fresh one", .fallback = "-1"},
    {.name = "stop", .kind = OPTION_EACH, .each = add_stop, .argument = "TEXT",
     .help = "end before this text; up to 16 times"},
    {.name = "ignore-eos", .kind = OPTION_FLAG, AT(ignore_eos),
     .help = "go on after an end token"},
    {.name = "priority", .kind = OPTION_INT, AT(priority), .argument = "N", .min = INT_MIN,
     .max = INT_MAX, .help = "requests of a lower number come first", .fallback = "0"},
    {.name = "logprobs", .kind = OPTION_INT, AT(logprobs), .argument = "N", .min = 0, .max = 128,
     .help = "with --json: log-probability of each token and of the N most likely"},
    {.name = NULL},
};
/* clang-format on */

void sampling_init(struct sampling *sampling)
{
    *sampling = (struct sampling){
        .max_tokens = OPTION_UNSET,
        .top_k = OPTION_UNSET,
        .seed = OPTION_UNSET,
        .logprobs = OPTION_UNSET,
        .priority = OPTION_UNSET,
        .temperature = NAN,
        .top_p = NAN,
        .min_p = NAN,
        .repetition_penalty = NAN,
        .presence_penalty = NAN,
        .frequency_penalty = NAN,
    };
}

void sampling_free(struct sampling *sampling)
{
    for (int i = 0; i < sampling->n_stop; i++) free(sampling->stop[i]);
    sampling_init(sampling);
}

void sampling_unescape(struct sampling *sampling)
{
    for (int i = 0; i < sampling->n_stop; i++)
        text_unescape(sampling->stop[i], strlen(sampling->stop[i]));
}

static void apply_int(int *out, int64_t value)
{
    if (value != OPTION_UNSET) *out = (int)value; /* the table's ranges fit */
}

static void apply_number(float *out, double value)
{
    if (!isnan(value)) *out = (float)value;
}

void sampling_apply(const struct sampling *sampling, mlora_request *request)
{
    apply_int(&request->max_tokens, sampling->max_tokens);
    apply_int(&request->top_k, sampling->top_k);
    apply_int(&request->n_logprobs, sampling->logprobs);
    apply_int(&request->priority, sampling->priority);
    if (sampling->seed != OPTION_UNSET) request->seed = sampling->seed;
    apply_number(&request->temperature, sampling->temperature);
    apply_number(&request->top_p, sampling->top_p);
    apply_number(&request->min_p, sampling->min_p);
    apply_number(&request->repetition_penalty, sampling->repetition_penalty);
    apply_number(&request->presence_penalty, sampling->presence_penalty);
    apply_number(&request->frequency_penalty, sampling->frequency_penalty);
    if (sampling->ignore_eos) request->ignore_eos = 1;
    if (sampling->n_stop == 0) return;
    request->stop = (const char *const *)sampling->stop;
    request->n_stop = sampling->n_stop;
}

/* "temperature 0.7, " when the model's default differs from the plain one and is in force. */
static void announce(struct buffer *line, const char *name, double model, double plain,
                     double in_force)
{
    if (model == plain || model != in_force) return;
    (void)buffer_printf(line, "%s%s %.6g", line->bytes ? ", " : "", name, model);
}

void sampling_announce(const mlora_engine *engine, const struct sampling *sampling)
{
    mlora_request plain, model, now;
    struct buffer line = {0};

    mlora_request_default(NULL, &plain);
    mlora_request_default(engine, &model);
    now = model;
    sampling_apply(sampling, &now);
    announce(&line, "temperature", model.temperature, plain.temperature, now.temperature);
    announce(&line, "top_k", model.top_k, plain.top_k, now.top_k);
    announce(&line, "top_p", model.top_p, plain.top_p, now.top_p);
    announce(&line, "min_p", model.min_p, plain.min_p, now.min_p);
    announce(&line, "repetition_penalty", model.repetition_penalty, plain.repetition_penalty,
             now.repetition_penalty);
    announce(&line, "max_tokens", model.max_tokens, plain.max_tokens, now.max_tokens);
    if (line.bytes) fprintf(stderr, "mlora: from generation_config.json: %s\n", buffer_text(&line));
    buffer_free(&line);
}
