/* mlora generate: prompts from flags, files and JSON lines, each for its own adapter, in one
 * batch. Flags are read first, then prompts, then the model; nothing runs until all is checked. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "tools/answers.h"
#include "tools/commands.h"
#include "tools/compare.h"
#include "tools/interactive.h"
#include "tools/io.h"
#include "tools/setup.h"
#include "tools/text.h"

enum source_kind { SOURCE_TEXT, SOURCE_FILE, SOURCE_LINES };

/* A --prompt, --prompt-file or --input, with the adapter that was in force. */
struct source {
    enum source_kind kind;
    const char *adapter; /* NULL: the base model */
    const char *text;    /* or path */
};

struct generate {
    struct setup setup;
    struct sampling sampling;
    struct source *sources; /* [n_sources], in the order given */
    int n_sources;
    const char *adapter; /* in force */
    const char *output, *system;
    bool json, chat, compare, escape, no_special, no_parse_special;
};

/* ---- flags -------------------------------------------------------------------------------- */

static mlora_status set_adapter(void *target, const char *name)
{
    ((struct generate *)target)->adapter = name;
    return MLORA_OK;
}

static mlora_status add_source(struct generate *generate, enum source_kind kind, const char *text)
{
    struct source *sources =
        realloc(generate->sources, ((size_t)generate->n_sources + 1) * sizeof *sources);

    if (!sources) return error_set(MLORA_ENOMEM, "out of memory");
    generate->sources = sources;
    sources[generate->n_sources++] = (struct source){kind, generate->adapter, text};
    return MLORA_OK;
}

static mlora_status add_prompt(void *target, const char *text)
{
    return add_source(target, SOURCE_TEXT, text);
}

static mlora_status add_file(void *target, const char *path)
{
    return add_source(target, SOURCE_FILE, path);
}

static mlora_status add_lines(void *target, const char *path)
{
    return add_source(target, SOURCE_LINES, path);
}

/* clang-format off */
#define AT(member) .offset = offsetof(struct generate, member)
static const struct option_spec request_specs[] = {
    {.name = "adapter", .kind = OPTION_EACH, .each = set_adapter, .argument = "NAME",
     .help = "the adapter of the prompts after it; base: none", .fallback = "base"},
    {.name = "prompt", .letter = 'p', .kind = OPTION_EACH, .each = add_prompt, .argument = "TEXT",
     .help = "a request; repeatable: all run as one batch"},
    {.name = "prompt-file", .letter = 'f', .aliases = {"file"}, .kind = OPTION_EACH,
     .each = add_file, .argument = "FILE", .help = "the same, with the text of a file; -: stdin"},
    {.name = "input", .letter = 'i', .kind = OPTION_EACH, .each = add_lines, .argument = "FILE",
     .help = "requests as JSON lines; -: stdin. Fields: prompt, messages or ids; adapter; and "
             "the sampling flags, such as max_tokens"},
    {.name = "chat", .kind = OPTION_FLAG, AT(chat),
     .help = "prompts are messages to the model's chat template"},
    {.name = "system", .kind = OPTION_TEXT, AT(system), .argument = "TEXT",
     .help = "the system message; implies --chat"},
    {.name = "escape", .letter = 'e', .kind = OPTION_FLAG, AT(escape),
     .help = "\\n, \\t, \\r and \\\\ in --prompt, --system and --stop are what C means by them"},
    {.name = "no-special", .kind = OPTION_FLAG, AT(no_special),
     .help = "do not put the begin token before a prompt"},
    {.name = "no-parse-special", .kind = OPTION_FLAG, AT(no_parse_special),
     .help = "tokens written in a prompt, such as <|eot_id|>, are plain text"},
    {.name = NULL},
};
static const struct option_spec output_specs[] = {
    {.name = "output", .letter = 'o', .kind = OPTION_TEXT, AT(output), .argument = "FILE",
     .help = "where answers go", .fallback = "stdout"},
    {.name = "json", .kind = OPTION_FLAG, AT(json),
     .help = "one line of JSON a request, in the order given"},
    {.name = "compare", .kind = OPTION_FLAG, AT(compare),
     .help = "send one prompt through the base and every adapter; show the answers side by side"},
    {.name = NULL},
};
static const struct option_group groups[] = {
    {"Requests", request_specs},
    {"Output", output_specs},
    {"Sampling (default: the model's generation_config.json, else as below)", sampling_specs},
    {"Model", setup_specs},
    {NULL, NULL},
};
/* clang-format on */

/* ---- prompts ------------------------------------------------------------------------------ */

static mlora_status add_job(struct jobs *jobs, const struct source *source, bool escape,
                            const char *where)
{
    struct job *job = jobs_add(jobs, source->adapter, where);

    if (!job) return error_set(MLORA_ENOMEM, "out of memory for a request");
    job->has_prompt = true;
    if (source->kind == SOURCE_FILE) return read_input(&job->prompt, source->text);
    const mlora_status status = buffer_append(&job->prompt, source->text, strlen(source->text));
    if (status == MLORA_OK && escape)
        job->prompt.bytes = text_unescape(job->prompt.data, job->prompt.bytes);
    return status;
}

static mlora_status add_jobs(struct jobs *jobs, const struct generate *generate)
{
    mlora_status status = MLORA_OK;

    for (int i = 0; i < generate->n_sources && status == MLORA_OK; i++) {
        const struct source *source = &generate->sources[i];
        char where[512];
        if (source->kind == SOURCE_LINES) {
            struct buffer lines = {0};
            status = read_input(&lines, source->text);
            if (status == MLORA_OK)
                status = jobs_add_lines(jobs, &lines, source->text, source->adapter);
            buffer_free(&lines);
            continue;
        }
        if (source->kind == SOURCE_FILE)
            snprintf(where, sizeof where, "%s", source->text);
        else
            snprintf(where, sizeof where, "prompt %d", i + 1);
        status = add_job(jobs, source, generate->escape, generate->n_sources > 1 ? where : NULL);
    }
    return status;
}

/* ---- the command -------------------------------------------------------------------------- */

static mlora_status check_flags(const struct generate *generate, const struct jobs *jobs,
                                const struct operands *operands)
{
    if (operands->n > 0)
        return error_set(MLORA_EINVAL, "unexpected \"%s\"; a prompt is given as --prompt TEXT",
                         operands->values[0]);
    if (generate->n_sources == 0 && !isatty(STDIN_FILENO))
        return error_set(MLORA_EINVAL, "no prompt: give --prompt TEXT, --prompt-file FILE, or "
                                       "--input FILE with JSON lines (- is standard input)");
    if (generate->n_sources == 0 && (generate->compare || generate->json || generate->output))
        return error_set(MLORA_EINVAL, "no prompt: --%s needs --prompt TEXT or --input FILE",
                         generate->compare ? "compare"
                         : generate->json  ? "json"
                                           : "output");
    if (generate->n_sources > 0 && /* the same text, not an equal one */
        generate->adapter != generate->sources[generate->n_sources - 1].adapter)
        return error_set(MLORA_EINVAL,
                         "--adapter %s: no prompt comes after it, and it is for those: put it "
                         "before its --prompt",
                         generate->adapter);
    if (generate->n_sources > 0 && jobs->n == 0)
        return error_set(MLORA_EINVAL, "--input: holds no requests");
    if (generate->compare && jobs->n != 1)
        return error_set(MLORA_EINVAL, "--compare takes one prompt, there are %d", jobs->n);
    return MLORA_OK;
}

static mlora_status run_jobs(mlora_engine *engine, struct generate *generate, struct jobs *jobs,
                             FILE *out)
{
    const struct job_settings settings = {
        .sampling = &generate->sampling,
        .chat = generate->chat,
        .system = generate->system,
        .no_special = generate->no_special,
        .no_parse_special = generate->no_parse_special,
    };
    struct answers answers = {
        .out = out,
        .engine = engine,
        .jobs = jobs,
        .json = generate->json,
        .logprobs = generate->sampling.logprobs != OPTION_UNSET,
        .terminal = isatty(fileno(out)),
    };
    const bool columns = generate->compare && !generate->json;

    if (generate->compare) {
        const mlora_status status = compare_expand(jobs, engine);
        if (status != MLORA_OK) return status;
    }
    const struct stopwatch since = stopwatch_start(engine);
    mlora_status status = jobs_submit(engine, jobs, &settings);
    if (status != MLORA_OK) return status;
    if (!generate->setup.quiet) sampling_announce(engine, &generate->sampling);
    if (generate->n_sources == 0)
        return interactive(engine, &settings, generate->adapter, !generate->setup.quiet);
    status = jobs_run(engine, jobs, columns ? NULL : answers_show, &answers);
    if (status != MLORA_OK) return status;
    if (columns) compare_print(out, jobs, terminal_columns(out), answers.terminal);
    fflush(out);
    if (!generate->setup.quiet) print_timings(engine, jobs, &since);
    return MLORA_OK;
}

/* Everything after the flags: returns the exit status. */
static int generate_run(struct generate *generate, const struct operands *operands)
{
    mlora_engine *engine = NULL;
    struct jobs jobs = {0};
    FILE *out = stdout;

    mlora_status status = add_jobs(&jobs, generate);
    if (status == MLORA_OK) status = check_flags(generate, &jobs, operands);
    if (status == MLORA_OK) status = setup_open(&engine, &generate->setup);
    if (status == MLORA_OK && generate->output) {
        out = fopen(generate->output, "we");
        if (!out)
            status = error_set(MLORA_EIO, "%s: cannot be written: %s", generate->output,
                               strerror(errno));
    }
    if (status == MLORA_OK) status = run_jobs(engine, generate, &jobs, out);

    int result = fail(status);
    if (result == 0) result = report_failures(&jobs);
    if (out && finish_output(out) != 0) result = 1;
    if (out && out != stdout) fclose(out);
    jobs_free(&jobs);
    mlora_close(engine);
    return result;
}

static int run(int argc, char **argv)
{
    struct generate generate = {0};
    void *const targets[] = {&generate, &generate, &generate.sampling, &generate.setup};
    struct operands operands;
    int result;

    sampling_init(&generate.sampling);
    const mlora_status status = options_parse(&command_generate, targets, argc, argv, &operands);
    if (status != MLORA_OK) {
        result = fail(status);
    } else if (operands.help) {
        options_help(stdout, &command_generate);
        result = finish_output(stdout);
    } else {
        if (generate.system) generate.chat = true;
        if (generate.escape) sampling_unescape(&generate.sampling);
        result = generate_run(&generate, &operands);
    }
    sampling_free(&generate.sampling);
    setup_free(&generate.setup);
    free(generate.sources);
    return result;
}

const struct command command_generate = {
    .name = "generate",
    .summary = "answer prompts, each with its own adapter, in one batch",
    .usage = "--model DIR [--adapters NAME=DIR,...] [[--adapter NAME] --prompt TEXT ...] [FLAGS]",
    .description = "Generate text. Each prompt is answered by the adapter named before it, or by "
                   "the base model; all prompts run as one batch. With no prompt and a terminal: "
                   "an interactive loop.",
    .groups = groups,
    .examples = "  mlora generate -m llama --adapters sql=adapters/sql,mood=adapters/mood \\\n"
                "      --prompt 'Once' --adapter sql --prompt 'How many owls?' \\\n"
                "      --adapter mood --prompt 'Rosa laughed.'\n"
                "  mlora generate -m llama --adapters adapters/ --compare -p 'Who was it?'\n"
                "  mlora generate -m llama --adapters adapters/ --input requests.jsonl --json\n",
    .run = run,
};
