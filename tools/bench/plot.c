/* Reports as pictures: a script for gnuplot with the rows in it. Also `mlora bench plot`, which
 * draws a report that was written with --json, on another machine, say. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tools/bench/bench.h"

static const char colors[][8] = {"#0b6e99", "#d9730d", "#4d9a5b", "#ad1a72", "#8a6d3b",
                                 "#6940a5", "#c4314b", "#5b6770", "#1f3a5f"};
enum { COLORS = sizeof colors / sizeof *colors, SERIES_MAX = 64, NAME_MAX_BYTES = 64 };

static const char *terminal(const char *path)
{
    const char *dot = strrchr(path, '.');

    if (dot && strcmp(dot, ".svg") == 0)
        return "svg size 900,520 font 'Helvetica,14' background '#ffffff'";
    if (dot && strcmp(dot, ".png") == 0)
        return "pngcairo size 1350,780 font 'Helvetica,15' background '#ffffff'";
    return NULL;
}

mlora_status plot_check(const char *path)
{
    if (!terminal(path))
        return error_set(MLORA_EINVAL, "--plot is \"%s\", must end in .svg or .png", path);
    if (system("command -v gnuplot >/dev/null 2>&1") != 0)
        return error_set(MLORA_EUNSUPPORTED,
                         "--plot needs gnuplot, which is not installed: "
                         "tools/install-packages plot gets it; or write --json and "
                         "draw it elsewhere with mlora bench plot");
    return MLORA_OK;
}

static const char *text_of(const json_t *row, const char *key)
{
    const char *text = json_string_value(json_object_get(row, key));
    return text ? text : "";
}

static double number(const json_t *row, const char *key)
{
    return json_number_value(json_object_get(row, key));
}

/* The device and what is drawn, above a picture. */
static void write_title(FILE *out, const json_t *report, const char *what)
{
    fprintf(out, "set title \"%s\\n{/*0.8 %s}\" noenhanced\n", what, text_of(report, "device"));
    fprintf(out, "set title enhanced\nset grid ytics lc rgb '#dddddd'\n"
                 "set border 3 lc rgb '#777777'\nset tics nomirror\n");
}

/* ---- bars: generate ------------------------------------------------------------------------- */

/* What a row shares with its neighbours, said once below the first of them. */
static void name_group(char out[NAME_MAX_BYTES], const json_t *row)
{
    const int adapters = (int)number(row, "adapters");

    snprintf(out, NAME_MAX_BYTES, "batch %d", (int)number(row, "batch"));
    if (adapters > 0) snprintf(out, NAME_MAX_BYTES, "%d x r%d", adapters, (int)number(row, "rank"));
}

/* Tokens/s of each row, with the spread of its repetitions; its share of the base above the bar. */
static mlora_status plot_generate(FILE *out, const json_t *report, const json_t *rows)
{
    char group[NAME_MAX_BYTES], before[NAME_MAX_BYTES] = "";
    size_t i;
    const json_t *row;
    double most = 0;

    write_title(out, report, "Tokens/s of a mixed batch, by mode; % of the base model alone");
    fprintf(out, "$data << EOD\n");
    json_array_foreach(rows, i, row)
    {
        name_group(group, row);
        fprintf(out, "%zu \"%s\\n{/*0.8 %s}\" %.6g %.6g %.6g \"%.0f%%\" %s\n", i,
                text_of(row, "mode"), strcmp(group, before) == 0 ? "" : group,
                number(row, "tokens/s"), number(row, "min"), number(row, "max"),
                number(row, "% of base"), number(row, "adapters") > 0 ? "0x0b6e99" : "0x9aa5ad");
        snprintf(before, sizeof before, "%s", group);
        if (number(row, "max") > most) most = number(row, "max");
    }
    fprintf(out,
            "EOD\nset ylabel 'tokens/s'\nset yrange [0:%g]\nset xrange [-0.6:%g]\nunset key\n"
            "set boxwidth 0.7\nset style fill solid 0.9\nset bmargin 4\nset xtics scale 0\n"
            "plot $data using 1:3:7:xtic(2) with boxes lc rgb variable, "
            "'' using 1:4:(0):($5-$4) with vectors heads size graph 0.008,90 lw 1.5 lc "
            "rgb '#333333', "
            "'' using 1:5:6 with labels offset 0,0.9 tc rgb '#333333'\n",
            1.15 * most, (double)json_array_size(rows) - 0.4);
    return MLORA_OK;
}

/* ---- lines ---------------------------------------------------------------------------------- */

struct series {
    char names[SERIES_MAX][NAME_MAX_BYTES];
    int n;
};

static int find_series(struct series *series, const char *name)
{
    for (int i = 0; i < series->n; i++)
        if (strcmp(series->names[i], name) == 0) return i;
    if (series->n == SERIES_MAX) return SERIES_MAX - 1;
    snprintf(series->names[series->n], NAME_MAX_BYTES, "%s", name);
    return series->n++;
}

/* The name of the line that a row of `bench kernels` belongs to. */
static void name_kernel(char out[NAME_MAX_BYTES], const json_t *row)
{
    snprintf(out, NAME_MAX_BYTES, "%s, %d x r%d", text_of(row, "case"),
             (int)number(row, "adapters"), (int)number(row, "rank"));
}

static bool is_addon(const json_t *row)
{
    return strcmp(text_of(row, "kernel"), "lora") == 0;
}

/* Time of one layer's adapters over the tokens of a step, and the memory's limit dotted. */
static mlora_status plot_kernels(FILE *out, const json_t *report, const json_t *rows)
{
    struct series series = {.n = 0}, modes = {.n = 0}, sets = {.n = 0};
    char name[NAME_MAX_BYTES], title[128];
    const char *phase = "";
    size_t i;
    const json_t *row;

    json_array_foreach(rows, i, row)
    {
        if (!is_addon(row)) continue;
        name_kernel(name, row);
        find_series(&series, name);
        phase = text_of(row, "phase");
    }
    if (series.n == 0)
        return error_set(MLORA_EINVAL, "--plot draws the adapters' products: there is none in "
                                       "this report");
    snprintf(title, sizeof title, "What adapters add to one layer, %s", phase);
    write_title(out, report, title);
    for (int s = 0; s < series.n; s++) {
        fprintf(out, "$s%d << EOD\n", s);
        json_array_foreach(rows, i, row)
        {
            if (!is_addon(row)) continue;
            name_kernel(name, row);
            if (strcmp(series.names[s], name) == 0)
                fprintf(out, "%g %g %g\n", number(row, "tokens"), number(row, "us"),
                        number(row, "limit us"));
        }
        fprintf(out, "EOD\n");
    }
    fprintf(out, "set logscale xy\nset autoscale xfix\nset xlabel 'tokens of the step'\n"
                 "set ylabel 'microseconds a layer'\nset key outside right top noenhanced\n"
                 "set xtics (1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192)\nset offsets "
                 "graph 0.03, graph 0.03, 0, 0\nplot ");
    for (int s = 0; s < series.n; s++) { /* a color for each mode, a mark for each adapter set */
        const char *comma = strchr(series.names[s], ',');
        snprintf(name, sizeof name, "%.*s", (int)(comma - series.names[s]), series.names[s]);
        const int color = find_series(&modes, name), mark = find_series(&sets, comma);
        fprintf(out, "%s$s%d using 1:2 with linespoints pt %d ps 0.9 lw 1.8 lc rgb '%s' title '%s'",
                s ? ", " : "", s, 7 - 2 * (mark % 2) + 2 * (mark % 4 / 2), colors[color % COLORS],
                series.names[s]);
    }
    for (int s = 0; s < series.n; s++)
        fprintf(out, ", $s%d using 1:3 with lines dt 3 lw 1.5 lc rgb '#999999' %s", s,
                s == 0 ? "title 'limit of the memory'" : "notitle");
    fprintf(out, "\n");
    return MLORA_OK;
}

static mlora_status plot_adapters(FILE *out, const json_t *report, const json_t *rows)
{
    size_t i;
    const json_t *row;
    double most = 0;

    write_title(out, report, "Throughput by the number of adapters asked for");
    fprintf(out, "$data << EOD\n");
    json_array_foreach(rows, i, row)
    {
        fprintf(out, "%g %g \"%.0f%%\"\n", number(row, "adapters"), number(row, "tokens/s"),
                number(row, "% of first"));
        if (number(row, "tokens/s") > most) most = number(row, "tokens/s");
    }
    fprintf(out,
            "EOD\nset logscale x 2\nset autoscale xfix\nset yrange [0:%g]\nset xlabel 'adapters'\n"
            "set ylabel 'tokens/s'\nunset key\nset offsets graph 0.05, graph 0.05, 0, 0\n"
            "plot $data using 1:2 with linespoints pt 7 ps 0.9 lw 2.5 lc rgb '#0b6e99', "
            "'' using 1:2:3 with labels offset 0,1 tc rgb '#333333'\n",
            1.2 * most);
    return MLORA_OK;
}

/* Times to the first token and between tokens, medians full and 99 % dashed. */
static mlora_status plot_latency(FILE *out, const json_t *report, const json_t *rows)
{
    static const char *const kinds[] = {"none", "warm", "cold"};
    size_t i;
    const json_t *row;

    write_title(out, report, "Waiting for tokens, by requests that run together");
    for (size_t k = 0; k < 3; k++) {
        fprintf(out, "$%s << EOD\n", kinds[k]);
        json_array_foreach(rows, i, row)
        {
            if (strcmp(text_of(row, "adapter"), kinds[k]) == 0)
                fprintf(out, "%g %g %g %g %g\n", number(row, "concurrency"),
                        number(row, "first ms p50"), number(row, "first ms p99"),
                        number(row, "next ms p50"), number(row, "next ms p99"));
        }
        fprintf(out, "EOD\n");
    }
    fprintf(out,
            "set logscale xy\nset xlabel 'requests that run together'\nset ylabel "
            "'milliseconds'\nset key outside right top\nset offsets graph 0.03, graph 0.03, 0, 0\n"
            "set xtics (1,2,4,8,16,32,64,128,256,512,1024)\nplot ");
    for (size_t k = 0; k < 3; k++)
        fprintf(out,
                "%s$%s using 1:2 with linespoints pt 7 ps 0.7 lw 2 lc rgb '%s' title 'first, %s', "
                "'' using 1:3 with lines dt 2 lw 1.5 lc rgb '%s' title '99%%'",
                k ? ", " : "", kinds[k], colors[k], k ? kinds[k] : "no adapter", colors[k]);
    fprintf(out,
            ", $warm using 1:4 with linespoints pt 5 ps 0.7 lw 2 lc rgb '%s' title 'next, "
            "warm', '' using 1:5 with lines dt 2 lw 1.5 lc rgb '%s' title '99%%'\n",
            colors[3], colors[3]);
    return MLORA_OK;
}

/* ---- gnuplot -------------------------------------------------------------------------------- */

static const struct {
    const char *bench;
    mlora_status (*write)(FILE *out, const json_t *report, const json_t *rows);
} pictures[] = {
    {"generate", plot_generate},
    {"kernels", plot_kernels},
    {"adapters", plot_adapters},
    {"latency", plot_latency},
};

mlora_status plot_report(const json_t *report, const char *path)
{
    const char *bench = text_of(report, "bench");
    const json_t *rows = json_object_get(report, "cases");
    size_t i = 0;

    mlora_status status = plot_check(path);
    if (status != MLORA_OK) return status;
    while (i < sizeof pictures / sizeof *pictures && strcmp(pictures[i].bench, bench) != 0) i++;
    if (i == sizeof pictures / sizeof *pictures)
        return error_set(MLORA_EINVAL,
                         "there is no picture of bench %s; generate, kernels, "
                         "adapters and latency have one",
                         bench);
    if (strpbrk(path, "'\n"))
        return error_set(MLORA_EINVAL, "--plot is \"%s\", a name without quotes is needed", path);

    FILE *pipe = popen("gnuplot", "w");
    if (!pipe) return error_set(MLORA_EIO, "gnuplot cannot be started");
    fprintf(pipe, "set terminal %s\nset output '%s'\n", terminal(path), path);
    status = pictures[i].write(pipe, report, rows);
    const int closed = pclose(pipe);
    if (status == MLORA_OK && closed != 0)
        status = error_set(MLORA_EIO, "%s: gnuplot could not draw it", path);
    return status;
}

/* ---- the command ---------------------------------------------------------------------------- */

struct plot {
    const char *files[2]; /* the report, the picture */
    int n_files;
};

static const struct option_spec no_specs[] = {{.name = NULL}};
static const struct option_group groups[] = {{"Flags", no_specs}, {NULL, NULL}};

static mlora_status add_file(void *target, const char *text)
{
    struct plot *plot = target;

    if (plot->n_files == 2)
        return error_set(MLORA_EINVAL,
                         "\"%s\" is one file too many; mlora bench plot takes a "
                         "report and the picture to make",
                         text);
    plot->files[plot->n_files++] = text;
    return MLORA_OK;
}

static mlora_status action(void *target, json_t *own_report)
{
    const struct plot *plot = target;
    json_error_t error;

    (void)own_report;
    if (plot->n_files != 2)
        return error_set(MLORA_EINVAL, "mlora bench plot needs two files: REPORT.json and "
                                       "PICTURE.svg or .png");
    mlora_status status = plot_check(plot->files[1]);
    if (status != MLORA_OK) return status;
    json_t *report = json_load_file(plot->files[0], 0, &error);
    if (!report)
        return error_set(MLORA_EFORMAT, "%s: line %d: %s", plot->files[0], error.line, error.text);
    if (!json_is_array(json_object_get(report, "cases")))
        status = error_set(MLORA_EFORMAT,
                           "%s: there are no cases: a report of mlora bench --json "
                           "is needed",
                           plot->files[0]);
    if (status == MLORA_OK) status = plot_report(report, plot->files[1]);
    json_decref(report);
    return status;
}

static int run(int argc, char **argv)
{
    struct plot plot = {.n_files = 0};
    void *const targets[] = {&plot};

    return bench_main(&bench_plot, targets, argc, argv, action, add_file);
}

const struct command bench_plot = {
    .name = "bench plot",
    .summary = "draw a report that was written with --json",
    .usage = "REPORT.json PICTURE.svg|PICTURE.png",
    .description = "Draw a report with gnuplot: of generate, kernels, adapters or latency.",
    .groups = groups,
    .examples = "  mlora bench plot generate.json generate.svg\n",
    .run = run,
};
