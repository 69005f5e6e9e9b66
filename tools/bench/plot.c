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

static bool is_addon(const json_t *row)
{
    return strcmp(text_of(row, "kernel"), "lora") == 0;
}

/* The panel in which a row of `bench kernels` stands: one for each set of adapters. */
static void name_panel(char out[NAME_MAX_BYTES], const json_t *row)
{
    const int adapters = (int)number(row, "adapters");
    snprintf(out, NAME_MAX_BYTES, "%d adapter%s, rank %d", adapters, adapters == 1 ? "" : "s",
             (int)number(row, "rank"));
}

/* The points of a way in a panel: tokens, time, limit. Returns how many. */
static int write_points(FILE *out, const json_t *rows, const char *panel, const char *way)
{
    char name[NAME_MAX_BYTES];
    size_t i;
    const json_t *row;
    int n = 0;

    json_array_foreach(rows, i, row)
    {
        if (!is_addon(row) || strcmp(text_of(row, "case"), way) != 0) continue;
        name_panel(name, row);
        if (strcmp(name, panel) != 0) continue;
        fprintf(out, "%g %g %g\n", number(row, "tokens"), number(row, "us"),
                number(row, "limit us"));
        n++;
    }
    return n;
}

/* All ways and the limit of one panel; `index` of `n_panels`. */
static void plot_panel(FILE *out, const json_t *rows, const struct series *ways, const char *panel,
                       int index, int n_panels)
{
    int n_points[SERIES_MAX];

    for (int w = 0; w < ways->n; w++) {
        fprintf(out, "$p%dw%d << EOD\n", index, w);
        n_points[w] = write_points(out, rows, panel, ways->names[w]);
        fprintf(out, "EOD\n");
    }
    fprintf(out, "set title \"%s\" noenhanced\nset format y '%s'\n%s\n", panel,
            index == 0 ? "%g" : "",
            index == 0 ? "set ylabel 'microseconds a layer'" : "unset ylabel");
    if (index == n_panels - 1)
        fprintf(out, "set key at screen 0.99,0.84 right top noenhanced\n");
    else
        fprintf(out, "unset key\n");
    const char *comma = "plot ";
    for (int w = 0; w < ways->n; w++) {
        const bool is_auto = strcmp(ways->names[w], "auto") == 0;
        if (n_points[w] == 0) continue;
        fprintf(out,
                "%s$p%dw%d using 1:2 with linespoints pt %d ps 0.8 lw %g lc rgb '%s' title '%s'",
                comma, index, w, is_auto ? 7 : 6, is_auto ? 3.0 : 1.6,
                is_auto ? "#111111" : colors[w % COLORS], ways->names[w]);
        comma = ", ";
    }
    for (int w = 0, said = 0; w < ways->n; w++) {
        if (n_points[w] == 0 || said++) continue;
        fprintf(out, ", $p%dw%d using 1:3 with lines dt 3 lw 2 lc rgb '#888888' title 'limit'",
                index, w);
    }
    fprintf(out, "\n");
}

/* Time of one layer's adapters over the tokens of a step, and the memory's limit dotted. */
static mlora_status plot_kernels(FILE *out, const json_t *report, const json_t *rows)
{
    struct series panels = {.n = 0}, ways = {.n = 0};
    double least = 1e30, most = 0, first = 1e30, last = 0; /* microseconds, tokens */
    char name[NAME_MAX_BYTES];
    const char *phase = "";
    size_t i;
    const json_t *row;

    json_array_foreach(rows, i, row)
    {
        if (!is_addon(row)) continue;
        name_panel(name, row);
        find_series(&panels, name);
        find_series(&ways, text_of(row, "case"));
        phase = text_of(row, "phase");
        if (number(row, "limit us") < least) least = number(row, "limit us");
        if (number(row, "us") > most) most = number(row, "us");
        if (number(row, "tokens") < first) first = number(row, "tokens");
        if (number(row, "tokens") > last) last = number(row, "tokens");
    }
    if (panels.n == 0)
        return error_set(MLORA_EINVAL, "--plot draws the adapters' products: there is none in "
                                       "this report");
    fprintf(out,
            "set multiplot layout 1,%d margins 0.09,0.83,0.13,0.80 spacing 0.015 title "
            "\"What adapters add to one layer, %s\\n{/*0.8 %s}\"\n",
            panels.n, phase, text_of(report, "device"));
    fprintf(out,
            "set grid ytics lc rgb '#dddddd'\nset border 3 lc rgb '#777777'\nset tics nomirror\n"
            "set logscale xy\nset xrange [%g:%g]\nset yrange [%g:%g]\nset xlabel 'tokens'\n"
            "set xtics 1,%d\nunset mxtics\n",
            0.8 * first, 1.25 * last, 0.7 * least, 1.5 * most, last > 16 * first ? 4 : 2);
    for (int p = 0; p < panels.n; p++) plot_panel(out, rows, &ways, panels.names[p], p, panels.n);
    fprintf(out, "unset multiplot\n");
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
    fprintf(
        out,
        "set logscale xy\nset autoscale xfix\nset xlabel 'requests that run together'\nset ylabel "
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

typedef mlora_status (*picture)(FILE *out, const json_t *report, const json_t *rows);

static picture find_picture(const char *bench)
{
    static const struct {
        const char *bench;
        picture write;
    } pictures[] = {
        {"generate", plot_generate},
        {"kernels", plot_kernels},
        {"adapters", plot_adapters},
        {"latency", plot_latency},
    };

    for (size_t i = 0; i < sizeof pictures / sizeof *pictures; i++)
        if (strcmp(pictures[i].bench, bench) == 0) return pictures[i].write;
    return NULL;
}

mlora_status plot_check(const char *bench, const char *path)
{
    if (!terminal(path))
        return error_set(MLORA_EINVAL, "--plot is \"%s\", must end in .svg or .png", path);
    if (!find_picture(bench))
        return error_set(MLORA_EINVAL,
                         "there is no picture of bench %s; generate, kernels, adapters and latency "
                         "have one",
                         bench);

    if (system("command -v gnuplot >/dev/null 2>&1") != 0)
        return error_set(MLORA_EUNSUPPORTED,
                         "--plot needs gnuplot, which is not installed: "
                         "tools/install-packages plot gets it; or write --json and "
                         "draw it elsewhere with mlora bench plot");
    return MLORA_OK;
}

mlora_status plot_report(const json_t *report, const char *path)
{
    const char *bench = text_of(report, "bench");
    mlora_status status = plot_check(bench, path);

    if (status != MLORA_OK) return status;
    if (strpbrk(path, "'\n"))
        return error_set(MLORA_EINVAL, "--plot is \"%s\", a name without quotes is needed", path);

    FILE *pipe = popen("gnuplot", "w");
    if (!pipe) return error_set(MLORA_EIO, "gnuplot cannot be started");
    fprintf(pipe, "set terminal %s\nset output '%s'\n", terminal(path), path);
    status = find_picture(bench)(pipe, report, json_object_get(report, "cases"));
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
    mlora_status status = MLORA_OK;
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
