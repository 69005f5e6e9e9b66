/* How a request's tokens are chosen, as flags and as fields of a JSON request: one table. What
 * is not given stays as the model's generation_config.json has it. */
#ifndef MLORA_TOOLS_SAMPLING_H
#define MLORA_TOOLS_SAMPLING_H

#include "tools/options.h"

enum { STOP_MAX = 16 };

struct sampling {
    int64_t max_tokens, top_k, seed, logprobs, priority; /* OPTION_UNSET: not given */
    double temperature, top_p, min_p;                    /* NAN: not given */
    double repetition_penalty, presence_penalty, frequency_penalty;
    bool ignore_eos;
    char *stop[STOP_MAX]; /* [n_stop], owned */
    int n_stop;
};

extern const struct option_spec sampling_specs[]; /* the target is a struct sampling */

void sampling_init(struct sampling *sampling); /* nothing given */
void sampling_free(struct sampling *sampling);

/* Undo the backslash escapes in the stop strings, as --escape asks. */
void sampling_unescape(struct sampling *sampling);

/* Put what is given into `request`; the stop strings are borrowed. */
void sampling_apply(const struct sampling *sampling, mlora_request *request);

/* Say on stderr, in one line, which defaults come from generation_config.json and are in force. */
void sampling_announce(const mlora_engine *engine, const struct sampling *sampling);

#endif
