#include "tools/table.h"

#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "tools/text.h"

enum { MAX_COLUMNS = 20, COLUMN_GAP = 2 };

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), n_end = strlen(end);

    return n >= n_end && strcmp(text + n - n_end, end) == 0;
}

/* What was chosen is shown as it is; what was measured, to three digits. */
static bool is_setting(const char *key)
{
    return strcmp(key, "alpha") == 0 || strcmp(key, "scale") == 0 || strncmp(key, "rope_", 5) == 0;
}

static mlora_status add_number(struct buffer *out, const char *key, const json_t *value)
{
    char text[HUMAN_BYTES];

    if (ends_with(key, "bytes") || strstr(key, "bytes_per"))
        return buffer_printf(out, "%s", human_bytes(text, json_integer_value(value)));
    if (ends_with(key, "parameters"))
        return buffer_printf(out, "%s", human_count(text, json_integer_value(value)));
    if (json_is_integer(value))
        return buffer_printf(out, "%lld", (long long)json_integer_value(value));
    const double real = json_real_value(value), size = fabs(real);
    if (is_setting(key)) return buffer_printf(out, "%.6g", real);
    if (size >= 0.1) return buffer_printf(out, "%.*f", size < 10 ? 2 : size < 1000 ? 1 : 0, real);
    return buffer_printf(out, "%.2g", real);
}

mlora_status table_cell(struct buffer *out, const char *key, const json_t *value)
{
    mlora_status status = MLORA_OK;
    size_t i;
    const json_t *item;

    switch (json_typeof(value)) {
    case JSON_STRING:
        return buffer_printf(out, "%s", json_string_value(value));
    case JSON_TRUE:
        return buffer_printf(out, "yes");
    case JSON_FALSE:
        return buffer_printf(out, "no");
    case JSON_NULL:
        return buffer_printf(out, "-");
    case JSON_INTEGER:
    case JSON_REAL:
        return add_number(out, key, value);
    case JSON_ARRAY:
        json_array_foreach(value, i, item)
        {
            if (i > 0) status = buffer_printf(out, ", ");
            if (status == MLORA_OK) status = table_cell(out, key, item);
            if (status != MLORA_OK) return status;
        }
        return MLORA_OK;
    case JSON_OBJECT:
        return buffer_printf(out, "{%zu}", json_object_size(value));
    }
    return MLORA_OK;
}

/* ---- layers ------------------------------------------------------------------------------- */

/* Rows that are equal but for their layer. */
struct group {
    const json_t *row;  /* the first of them */
    char *signature;    /* the row without its layer */
    int first, last, n; /* layers; n 0: the row has none */
};

static char *row_signature(const json_t *row)
{
    json_t *rest = json_copy((json_t *)row);

    if (!rest) return NULL;
    json_object_del(rest, "layer");
    char *text = json_dumps(rest, JSON_COMPACT);
    json_decref(rest);
    return text;
}

/* Put the row into its group, or begin one. */
static void group_add(struct group *groups, int *n_groups, const json_t *row)
{
    const json_t *layer = json_object_get(row, "layer");
    const int number = (int)json_integer_value(layer);
    char *signature = row_signature(row);

    for (int g = 0; g < *n_groups && json_is_integer(layer) && signature; g++) {
        if (strcmp(groups[g].signature, signature) != 0) continue;
        if (number < groups[g].first) groups[g].first = number;
        if (number > groups[g].last) groups[g].last = number;
        groups[g].n++;
        free(signature);
        return;
    }
    if (!signature) return;
    groups[(*n_groups)++] = (struct group){row, signature, number, number, json_is_integer(layer)};
}

static mlora_status add_layers(struct buffer *out, const struct group *group)
{
    if (group->n == 0) return buffer_printf(out, "-");
    if (group->n == 1) return buffer_printf(out, "%d", group->first);
    const bool all = group->last - group->first + 1 == group->n;
    return all ? buffer_printf(out, "%d-%d", group->first, group->last)
               : buffer_printf(out, "%d of %d-%d", group->n, group->first, group->last);
}

/* ---- columns ------------------------------------------------------------------------------ */

struct column {
    const char *key;
    int width;
    bool number; /* to the right */
};

/* The keys of all rows, in the order in which they are met. */
static int find_columns(struct column *columns, const json_t *rows)
{
    int n = 0;
    size_t i;
    const json_t *row, *value;
    const char *key;

    json_array_foreach(rows, i, row)
    {
        json_object_foreach((json_t *)row, key, value)
        {
            int c = 0;
            while (c < n && strcmp(columns[c].key, key) != 0) c++;
            if (c == MAX_COLUMNS) continue;
            if (c == n) columns[n++] = (struct column){key, (int)strlen(key), true};
            if (!json_is_number(value)) columns[c].number = false;
        }
    }
    return n;
}

static mlora_status cell(struct buffer *out, const struct group *group, const char *key)
{
    const json_t *value = json_object_get(group->row, key);

    out->bytes = 0;
    if (strcmp(key, "layer") == 0) return add_layers(out, group);
    return value ? table_cell(out, key, value) : buffer_printf(out, "-");
}

static void print_cell(FILE *out, const struct column *column, const char *text, size_t bytes,
                       bool last)
{
    const int pad = column->width - text_width(text, bytes);

    if (column->number) fprintf(out, "%*s", pad, "");
    fwrite(text, 1, bytes, out);
    if (!column->number && !last) fprintf(out, "%*s", pad, "");
    fprintf(out, "%*s", last ? 0 : COLUMN_GAP, "");
    if (last) fputc('\n', out);
}

/* How many of the columns fit; at least one. */
static int columns_within(const struct column *columns, int n, int width)
{
    int fit = 0;

    for (int used = 0; fit < n; fit++) {
        used += columns[fit].width + (fit > 0 ? COLUMN_GAP : 0);
        if (used > width) break;
    }
    return fit > 0 ? fit : 1;
}

void table_print(FILE *out, const json_t *rows)
{
    table_print_within(out, rows, INT_MAX);
}

void table_print_within(FILE *out, const json_t *rows, int width)
{
    struct column columns[MAX_COLUMNS];
    const int n_columns = find_columns(columns, rows);
    struct group *groups = calloc(json_array_size(rows) + 1, sizeof *groups);
    struct buffer text = {0};
    int n_groups = 0;
    size_t i;
    const json_t *row;

    if (!groups) return;
    json_array_foreach(rows, i, row)
    {
        group_add(groups, &n_groups, row);
    }
    for (int c = 0; c < n_columns; c++) {
        for (int g = 0; g < n_groups; g++) {
            if (cell(&text, &groups[g], columns[c].key) != MLORA_OK) continue;
            const int cell_width = text_width(buffer_text(&text), text.bytes);
            if (cell_width > columns[c].width) columns[c].width = cell_width;
        }
    }
    const int n_shown = columns_within(columns, n_columns, width);
    for (int c = 0; c < n_shown; c++)
        print_cell(out, &columns[c], columns[c].key, strlen(columns[c].key), c + 1 == n_shown);
    for (int g = 0; g < n_groups; g++) {
        for (int c = 0; c < n_shown; c++) {
            if (cell(&text, &groups[g], columns[c].key) != MLORA_OK) text.bytes = 0;
            print_cell(out, &columns[c], buffer_text(&text), text.bytes, c + 1 == n_shown);
        }
    }
    for (int c = n_shown; c < n_columns; c++)
        fprintf(out, "%s%s%s", c == n_shown ? "(too narrow for " : ", ", columns[c].key,
                c + 1 == n_columns ? ": --json has them)\n" : "");
    for (int g = 0; g < n_groups; g++) free(groups[g].signature);
    free(groups);
    buffer_free(&text);
}
