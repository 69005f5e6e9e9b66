/* How answers are shown: as text or as JSON lines, always in the order of the requests. The
 * first that is not finished streams; those behind it wait in memory, so that answers never mix. */
#ifndef MLORA_TOOLS_ANSWERS_H
#define MLORA_TOOLS_ANSWERS_H

#include <stdio.h>

#include "tools/job.h"

struct answers {
    FILE *out;
    const mlora_engine *engine;
    const struct jobs *jobs;
    bool json;
    bool logprobs;  /* with json */
    bool terminal;  /* out is one */
    int at;         /* the first job that is not wholly shown */
    bool begun;     /* its heading is printed */
    size_t printed; /* bytes of its text */
};

/* A jobs_show_fn: show what has come since the last call. `user` is a struct answers. */
mlora_status answers_show(void *user);

/* Log-probabilities as a JSON array of {"id", "text", "logprob"}; NULL when out of memory. */
json_t *logprobs_json(const mlora_engine *engine, const mlora_token_logprob *items, int n);

/* Print a JSON value and a newline, then free it. NULL is reported as out of memory. */
mlora_status print_json(FILE *out, json_t *value);

/* When a run began, and what the engine had done by then. */
struct stopwatch {
    double begin;
    mlora_stats stats;
};

struct stopwatch stopwatch_start(const mlora_engine *engine);

/* One line on stderr: how fast the jobs went since. */
void print_timings(const mlora_engine *engine, const struct jobs *jobs,
                   const struct stopwatch *since);

/* Say on stderr which jobs ended in an error. Returns the exit status: 0, 1, or 130 after
 * Ctrl-C. */
int report_failures(const struct jobs *jobs);

#endif
