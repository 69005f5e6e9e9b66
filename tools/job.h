/* A request as the user gave it, and what came of it. A list of jobs is filled from flags and
 * JSON lines before a model is loaded; then all of it is submitted and run together. */
#ifndef MLORA_TOOLS_JOB_H
#define MLORA_TOOLS_JOB_H

#include "engine/base/buffer.h"
#include "tools/sampling.h"

struct job {
    char *source;  /* for messages: "in.jsonl line 3"; NULL: the only one */
    char *adapter; /* NULL: the base model */

    /* One of these: */
    struct buffer prompt; /* text, when has_prompt */
    bool has_prompt;
    int32_t *ids; /* [n_ids], as given or made by the chat template */
    int n_ids;
    mlora_message *messages; /* [n_messages], strings borrowed from `line` */
    int n_messages;
    json_t *line;             /* the JSON object that the job was read from */
    struct sampling sampling; /* of this job alone; goes before the flags' */

    /* What came of it. */
    struct buffer text;
    struct buffer tokens; /* struct job_token */
    struct buffer tops;   /* mlora_token_logprob: the alternatives of all tokens, in order */
    struct buffer scores; /* mlora_token_logprob: the prompt's own */
    mlora_finish finish;
    char *error; /* what failed; NULL: nothing, or there was no memory to keep it */
    int n_prompt_tokens;
    int n_cached_tokens; /* of those: not computed */
    int n_drafted_tokens, n_accepted_tokens;
    double first_token;  /* seconds() when it came; 0: none */
    mlora_status status; /* why an event could not be kept */
    uint64_t id;
};

struct job_token {
    int32_t id;
    float logprob;
    int n_top;
};

struct jobs {
    struct job *items; /* [n]; does not move while jobs run */
    int n;
};

/* What all jobs of a run share. */
struct job_settings {
    const struct sampling *sampling; /* from flags */
    bool chat;                       /* text is a user's message */
    const char *system;              /* the system message of a chat; may be NULL */
    bool no_special, no_parse_special;
    bool prompt_logprobs;
};

/* Add an empty job for the adapter (NULL, "base": the base model); valid until the next is added.
 * NULL when out of memory. */
struct job *jobs_add(struct jobs *jobs, const char *adapter, const char *source);

/* Add a job for each line of JSON in `text`; `path` is for messages, and `adapter` what lines
 * without one of their own get. */
mlora_status jobs_add_lines(struct jobs *jobs, const struct buffer *text, const char *path,
                            const char *adapter);

void jobs_free(struct jobs *jobs);

/* Called after each step: more text may have come. Returns whether to go on. */
typedef mlora_status (*jobs_show_fn)(void *user);

/* Submit all jobs. When one is refused the message names it, and nothing may be run. */
mlora_status jobs_submit(mlora_engine *engine, struct jobs *jobs,
                         const struct job_settings *settings);

/* Step until all that were submitted have finished. Ctrl-C cancels what still runs; a second one
 * ends the program. `show` may be NULL. */
mlora_status jobs_run(mlora_engine *engine, struct jobs *jobs, jobs_show_fn show, void *user);

/* Whether Ctrl-C was pressed during the last jobs_run(). */
bool jobs_interrupted(void);

/* The prompt as text, for showing: rendered if it was a chat, decoded if it was ids. */
mlora_status job_prompt_text(struct buffer *out, const mlora_engine *engine, const struct job *job);

const char *job_finish_name(mlora_finish finish);    /* "stop", "length", ... */
const char *job_adapter_name(const struct job *job); /* "base" for the base model */

#endif
