#include "tools/compare.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/text.h"

enum { NARROWEST = 24, GAP = 2 };

/* A job for `adapter` that asks what `first` asks. */
static mlora_status add_like(struct jobs *jobs, const char *adapter, const char *source)
{
    struct job *job = jobs_add(jobs, adapter, source);
    if (!job) return error_set(MLORA_ENOMEM, "out of memory for a request");

    const struct job *first = &jobs->items[0];
    json_decref(job->line);
    job->line = json_incref(first->line);
    job->has_prompt = first->has_prompt;
    mlora_status status =
        buffer_append(&job->prompt, buffer_text(&first->prompt), first->prompt.bytes);
    if (status != MLORA_OK || !first->ids) return status;
    job->ids = malloc((size_t)first->n_ids * sizeof *job->ids);
    if (!job->ids) return error_set(MLORA_ENOMEM, "out of memory for a request");
    memcpy(job->ids, first->ids, (size_t)first->n_ids * sizeof *job->ids);
    job->n_ids = first->n_ids;
    return MLORA_OK;
}

mlora_status compare_expand(struct jobs *jobs, mlora_engine *engine)
{
    free(jobs->items[0].adapter);
    jobs->items[0].adapter = NULL;
    for (int i = 0; i < mlora_adapter_count(engine); i++) {
        const mlora_status status = add_like(jobs, mlora_adapter_name(engine, i), NULL);
        if (status != MLORA_OK) return status;
    }
    return MLORA_OK;
}

/* One answer on its way down a column. */
struct column {
    const char *text;
    size_t bytes; /* left */
};

/* Print the next line of the column, padded to `width` unless it is the `last` of its row. */
static void print_cell(FILE *out, struct column *column, int width, bool last, bool terminal)
{
    size_t used = 0, next = 0;

    text_line(column->text, column->bytes, width, &used, &next);
    text_show(out, column->text, used, terminal);
    if (!last) fprintf(out, "%*s", width + GAP - text_width(column->text, used), "");
    column->text += next;
    column->bytes -= next;
}

static void print_name(FILE *out, const char *name, int width, bool last, bool terminal)
{
    const int left = width - text_width(name, strlen(name));

    fprintf(out, "%s%s%s", terminal ? "\033[1m" : "", name, terminal ? "\033[0m" : "");
    if (!last) fprintf(out, "%*s", (left > 0 ? left : 0) + GAP, "");
}

/* The jobs `from` to `to` beside each other. */
static void print_row(FILE *out, const struct jobs *jobs, int from, int to, int width,
                      bool terminal)
{
    struct column *columns = calloc((size_t)(to - from), sizeof *columns);
    if (!columns) return;

    for (int i = from; i < to; i++) {
        const struct job *job = &jobs->items[i];
        print_name(out, job_adapter_name(job), width, i + 1 == to, terminal);
        const size_t skip = strspn(buffer_text(&job->text), " \n");
        columns[i - from] = (struct column){buffer_text(&job->text) + skip, job->text.bytes - skip};
    }
    putc('\n', out);
    for (int i = from; i < to; i++) {
        for (int c = 0; c < width; c++) putc('-', out);
        if (i + 1 < to) fprintf(out, "%*s", GAP, "");
    }
    putc('\n', out);
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < to - from; i++)
            print_cell(out, &columns[i], width, i + 1 == to - from, terminal);
        putc('\n', out);
        for (int i = 0; i < to - from; i++) more |= columns[i].bytes > 0;
    }
    free(columns);
}

void compare_print(FILE *out, const struct jobs *jobs, int columns, bool terminal)
{
    int per_row = (columns + GAP) / (NARROWEST + GAP);

    if (per_row < 1) per_row = 1;
    const int n_rows = (jobs->n + per_row - 1) / per_row;
    per_row = (jobs->n + n_rows - 1) / n_rows; /* as even as can be */
    const int width = (columns + GAP) / per_row - GAP;
    for (int from = 0; from < jobs->n; from += per_row) {
        const int to = from + per_row < jobs->n ? from + per_row : jobs->n;
        if (from > 0) putc('\n', out);
        print_row(out, jobs, from, to, width, terminal);
    }
}
