/* What the benches share: one file for each (`mlora bench NAME`), which makes rows; the report
 * around them (which machine, which command), as a table, as JSON and as a picture. */
#ifndef MLORA_TOOLS_BENCH_BENCH_H
#define MLORA_TOOLS_BENCH_BENCH_H

#include <jansson.h>

#include "model/config.h"
#include "tools/setup.h"

struct device;

extern const struct command bench_generate, bench_kernels, bench_metadata, bench_latency,
    bench_adapters, bench_load, bench_profile, bench_plot;

/* ---- the report ----------------------------------------------------------------------------- */

struct bench_output {
    const char *json, *plot; /* files; NULL: none */
};

extern const struct option_spec bench_output_specs[]; /* the target is a struct bench_output */

/* {"bench", "version", "command", "cases": []}, freed with json_decref(); NULL when memory is out.
 * Called before the options are parsed, which permutes argv. */
json_t *report_open(const char *bench, int argc, char **argv);

/* Add what a device is: backend, device, bandwidth, and the machine around it. */
mlora_status report_add_device(json_t *report, const struct device *dev, double bytes_per_second);

/* Add the model's dimensions, by their names in config.json: enough to build it elsewhere. */
mlora_status report_add_shape(json_t *report, const struct model_config *config);

/* Add what an engine has loaded. */
mlora_status report_add_engine(json_t *report, const mlora_engine *engine);

/* The two for an engine that is open: its device is opened once more and measured. */
mlora_status report_add_both(json_t *report, const mlora_engine *engine, const struct setup *setup);

/* Add a row to the cases; `row` is taken, NULL means that memory has run out. */
mlora_status report_add(json_t *report, json_t *row);

/* Print the table, and write what the options ask for. */
mlora_status report_finish(const json_t *report, const struct bench_output *output);

/* Draw a report to FILE.svg or FILE.png with gnuplot. Returns OK, EINVAL (the ending, a bench that
 * has no picture) or EUNSUPPORTED (no gnuplot). */
mlora_status plot_report(const json_t *report, const char *path);
/* The same but for the drawing: before the work. */
mlora_status plot_check(const char *bench, const char *path);

/* ---- arguments ------------------------------------------------------------------------------ */

/* A list of numbers, each from min to max. `*values` is freed with free(). */
mlora_status read_list(int32_t **values, int *n, const char *text, int min, int max,
                       const char *where);
int32_t list_largest(const int32_t *values, int n);

/* The ways to add the adapters' products: "loop,auto" to their numbers, as mlora_lora_mode. */
mlora_status read_modes(int32_t **modes, int *n, const char *text);
const char *mode_name(int mode);

/* Parse, and run `action` unless --help was given. Words that are no flags go to `operand` (NULL:
 * there may be none). Returns the exit status. */
typedef mlora_status (*bench_action)(void *bench, json_t *report);
typedef mlora_status (*bench_operand)(void *bench, const char *text);
int bench_main(const struct command *command, void *const *targets, int argc, char **argv,
               bench_action action, bench_operand operand);

/* ---- the device ----------------------------------------------------------------------------- */

/* Open the device that an engine of that backend (mlora_backend) would use. */
mlora_status bench_device_open(struct device **out, const struct setup *setup, const char *backend);

/* Bytes that a large copy reads and writes in a second. */
mlora_status bench_bandwidth(double *out, struct device *dev);

/* What this process has had at most: of the GPU now, of the host at its peak. */
int64_t bench_memory(struct device *dev);

/* ---- whole batches -------------------------------------------------------------------------- */

/* Runs of a case before those that count: adapters are loaded in the first, plans for the steps without
 * those waits are made in the second, recordings in the third. */
enum { WARM_UPS = 3 };

/* The bytes of one adapter on all seven linears, in bf16. */
double random_adapter_bytes(const struct model_config *config, int rank);

/* The least that a decode step has to read: all weights but the rows of the embedding that no token
 * asks for, the adapters that it uses, and its requests' keys and values of so many tokens together. */
double decode_step_bytes(const struct model_config *config, const mlora_info *info,
                         double adapter_bytes, double kv_tokens);

/* Load random adapters "random0", ... of that rank, or forget them. */
mlora_status adapters_make(mlora_engine *engine, int first, int n, int rank);
mlora_status adapters_drop(mlora_engine *engine, int n);

enum { ADAPTER_NAME = 32 };
void random_name(char out[ADAPTER_NAME], int64_t index);

struct workload {
    int64_t batch, n_adapters, prompt_tokens, max_tokens, seed;
    double temperature, top_p;
};

/* The next random number, whose high bits are the good ones; and in [0, 1). */
uint64_t random_next(uint64_t *state);
double random_part(uint64_t *state);

/* Request number i of the work, for the base model: a prompt that no other seed has, in `ids`
 * [prompt_tokens], which is to stay until it is submitted, and nothing that ends it early. */
void workload_request(mlora_request *out, const struct workload *work, int64_t i, int32_t *ids,
                      int vocab_size);

/* Submit all of it, the adapters taking turns by row. on_event: as in mlora_request, or NULL. */
mlora_status workload_submit(mlora_engine *engine, const struct workload *work,
                             void (*on_event)(void *user, const mlora_event *event), void *user);

struct measure {
    double seconds;           /* of the run                                                    */
    double tokens_per_second; /* generated, over all of the run: prompts, too                  */
    double ms_per_step;       /* of steps without prompt tokens                                */
    double n_decode_steps;    /* of those                                                      */
    double first_token_ms;    /* from the start to the first token of the last request         */
    int64_t n_tokens;         /* generated */
};

/* Run one batch to its end; the adapters take turns by row. */
mlora_status workload_run(struct measure *out, mlora_engine *engine, const struct workload *work);

/* ---- requests that follow one another ------------------------------------------------------- */

/* A number of requests of which `work.batch` run at any time: one that ends is followed by the
 * next. */
struct stream_load {
    struct workload work;
    int n_requests;
    /* Requests that are to run at any time: what comes after fewer of them are left does not count among
     * tokens and seconds, else the throughput would be that of a batch which ends. 0: all counts. */
    int n_running;
    double vary; /* by which part of max_tokens requests are longer or shorter, at most... */
    int draw;    /* ... each in its own way in every draw */
    /* The adapter of request i, "" for the base model, made ready if it is not; the request's time
     * begins before the call. */
    mlora_status (*adapter)(void *user, mlora_engine *engine, int i, char name[ADAPTER_NAME]);
    void *user;
};

struct stream_times {
    double seconds;
    int64_t n_tokens;
    mlora_stats stats; /* of the engine when these ended */
    double *first;     /* [n_first] seconds to each request's first token        */
    double *next;      /* [n_next] seconds between two tokens of one request     */
    size_t n_first, n_next;
};

mlora_status stream_run(struct stream_times *out, mlora_engine *engine,
                        const struct stream_load *load);
void stream_free(struct stream_times *times); /* accepts zeroes */

/* The value below which `percent` of them lie; sorts them. 0 without any. */
double percentile(double *values, size_t n, double percent);

#endif
