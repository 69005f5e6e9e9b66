/* mlora bench: the tables say what was run, and their numbers agree with each other. Speeds are
 * looked at, not asserted. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/buffer.h"
#include "engine/base/file.h"
#include "tests/tools/run.h"

#define SHAPE "tools/shapes/llama-test"

/* Run a bench on the CPU with --json; its report, freed with json_decref(). */
static json_t *bench(const char *name, const char *arguments)
{
    char path[64];

    snprintf(path, sizeof path, "build/bench-%s-%d.json", name, (int)getpid());
    struct outcome outcome =
        run(NULL, "bench %s --backend cpu %s --json %s", name, arguments, path);
    cr_assert_eq(outcome.status, 0, "%s", outcome.err);
    outcome_free(&outcome);
    json_t *report = golden(path);
    unlink(path);
    return report;
}

static const json_t *cases(const json_t *report, size_t n)
{
    const json_t *rows = json_object_get(report, "cases");
    cr_assert_eq(json_array_size(rows), n, "%zu cases", json_array_size(rows));
    return rows;
}

static double number(const json_t *row, const char *key)
{
    const json_t *value = json_object_get(row, key);
    cr_assert(json_is_number(value), "%s is not a number", key);
    return json_number_value(value);
}

static const char *text(const json_t *row, const char *key)
{
    const char *value = json_string_value(json_object_get(row, key));
    cr_assert(value, "%s is not a string", key);
    return value;
}

/* ---- reports -------------------------------------------------------------------------------- */

Test(bench, a_report_says_where_and_how_it_was_made)
{
    json_t *report = bench("metadata", "--batch-size 3");
    const json_t *machine = json_object_get(report, "machine");

    cr_expect_str_eq(text(report, "bench"), "metadata");
    cr_expect_str_eq(text(report, "backend"), "cpu");
    cr_expect_eq(strncmp(text(report, "command"), "mlora bench metadata --backend cpu", 34), 0);
    cr_expect(strlen(text(report, "version")) > 0);
    cr_expect(strlen(text(report, "device")) > 0);
    cr_expect(strlen(text(machine, "system")) > 0);
    cr_expect_geq(number(machine, "cores"), 1);
    cr_expect(strlen(text(machine, "compiler")) > 0);
    cr_expect_gt(number(report, "bytes_per_second"), 1e8);
    json_decref(report);
}

/* ---- generate ------------------------------------------------------------------------------- */

Test(bench, runs_every_case_to_its_last_token)
{
    size_t i;
    const json_t *row, *base = NULL;
    static const struct {
        const char *mode;
        int batch, adapters;
    } want[] = {{"base", 1, 0}, {"auto", 1, 2}, {"loop", 1, 2},
                {"base", 3, 0}, {"auto", 3, 2}, {"loop", 3, 2}};

    json_t *report = bench("generate", "--config llama-test --load-format dummy --modes auto,loop "
                                       "--batch-size 1,3 --num-adapters 0,2 --rank 3 "
                                       "--prompt-tokens 5 --max-new-tokens 7 --repeat 2");
    json_array_foreach(cases(report, 6), i, row)
    {
        const double speed = number(row, "tokens/s");
        cr_expect_str_eq(text(row, "mode"), want[i].mode);
        cr_expect_eq(number(row, "batch"), want[i].batch);
        cr_expect_eq(number(row, "adapters"), want[i].adapters);
        cr_expect_eq(number(row, "rank"), want[i].adapters ? 3 : 0);
        cr_expect_eq(number(row, "tokens"), 7 * want[i].batch);
        cr_expect_float_eq(speed, number(row, "tokens") / number(row, "seconds"), 1e-6 * speed);
        cr_expect_geq(speed, number(row, "min"));
        cr_expect_leq(speed, number(row, "max"));
        cr_expect_gt(number(row, "ms/step"), 0);
        cr_expect_geq(number(row, "x slowest"), 1);
        cr_expect_gt(number(row, "% of limit"), 0);
        cr_expect_gt(number(row, "peak bytes"), 1e6);
        if (want[i].adapters == 0) {
            base = row;
            cr_expect_eq(number(row, "% of base"), 100);
            cr_expect(json_is_null(json_object_get(row, "added us/layer")));
            /* 11 tokens of each request are kept, in one block of 16 */
            const json_t *model = json_object_get(report, "model");
            cr_expect_eq(number(row, "used bytes"),
                         number(model, "weight_bytes") +
                             16 * want[i].batch * number(model, "kv_bytes_per_token"));
            continue;
        }
        const double base_speed = number(base, "tokens/s");
        cr_expect_float_eq(number(row, "% of base"), 100 * speed / base_speed, 1e-6);
        /* two layers */
        cr_expect_float_eq(number(row, "added us/layer"),
                           1e3 * (number(row, "ms/step") - number(base, "ms/step")) / 2, 1e-6);
        cr_expect_gt(number(row, "used bytes"), number(base, "used bytes"));
    }
    json_decref(report);
}

Test(bench, a_sweep_runs_all_combinations)
{
    size_t i;
    const json_t *row;

    json_t *report = bench("generate", "--config llama-test --load-format dummy --max-new-tokens 2 "
                                       "--repeat 1 --sweep batch=1,2 adapters=1,2 rank=2,4");
    json_array_foreach(cases(report, 2 + 8), i, row)
    {
        cr_expect_eq(number(row, "batch"), i < 5 ? 1 : 2);
        cr_expect_eq(number(row, "adapters"), i % 5 == 0 ? 0 : i % 5 < 3 ? 1 : 2);
        cr_expect_eq(number(row, "rank"), i % 5 == 0 ? 0 : i % 5 % 2 == 1 ? 2 : 4);
    }
    json_decref(report);
}

/* The spelling of the classic benchmark of the modes, its numbers made small. */
Test(bench, runs_all_modes_beside_the_base)
{
    static const char *const modes[] = {"base", "loop", "gbmm", "bgmv", "sgmv", "fused", "auto"};
    size_t i;
    const json_t *row;
    double slowest = HUGE_VAL;

    json_t *report = bench("generate", "--config llama-test --load-format dummy "
                                       "--modes loop,gbmm,bgmv,sgmv,fused,auto --batch-size 4 "
                                       "--max-new-tokens 3 --num-adapters 3 --rank 2 "
                                       "--temperature 0.7 --top-p 0.9 --repeat 1");
    json_array_foreach(cases(report, 7), i, row)
    {
        cr_expect_str_eq(text(row, "mode"), modes[i]);
        cr_expect_eq(number(row, "tokens"), 12);
        if (i > 0 && number(row, "tokens/s") < slowest) slowest = number(row, "tokens/s");
    }
    json_array_foreach(json_object_get(report, "cases"), i, row)
    {
        if (i > 0)
            cr_expect_float_eq(number(row, "x slowest"), number(row, "tokens/s") / slowest, 1e-6);
    }
    const json_t *work = json_object_get(report, "workload");
    cr_expect_eq(number(work, "max_new_tokens"), 3);
    cr_expect_eq(number(work, "temperature"), 0.7);
    cr_expect_eq(number(work, "top_p"), 0.9);
    json_decref(report);
}

/* ---- kernels -------------------------------------------------------------------------------- */

/* Times and limits are there, and the share is one by the other. */
static void expect_times(const json_t *row)
{
    cr_expect_gt(number(row, "us"), 0);
    cr_expect_gt(number(row, "limit us"), 0);
    cr_expect_float_eq(number(row, "% of limit"), 100 * number(row, "limit us") / number(row, "us"),
                       1e-6 * number(row, "% of limit"));
}

Test(bench, kernels_has_the_adapters_beside_their_baselines)
{
    static const char *const ways[] = {"loop rows", "cheat_bmm", "auto"};
    size_t i;
    const json_t *row;

    json_t *report = bench("kernels", "--model " SHAPE " --only lora --batch-size 4 "
                                      "--num-adapters 2 --rank 8");
    json_array_foreach(cases(report, 3), i, row)
    {
        cr_expect_str_eq(text(row, "kernel"), "lora");
        cr_expect_str_eq(text(row, "case"), ways[i]);
        expect_times(row);
        /* two adapters: rank 8 x the widths in and out of q, k, v, o, gate, up, down, in bf16 */
        const double widths =
            (128 + 128) + 2 * (128 + 64) + (128 + 128) + 2 * (128 + 256) + (256 + 128);
        cr_expect_float_eq(number(row, "MB"), 1e-6 * 2 * 8 * 2 * widths, 1e-9);
    }
    json_decref(report);
}

/* Inputs of bf16, results of f32, and the factors of two adapters. */
Test(bench, kernels_counts_the_bytes_of_inputs_and_results_at_prefill)
{
    enum { T = 16, K = 128 + 128 + 128 + 256, N = 256 + 128 + 512 + 128, FACTORS = 2 * 8 * 2048 };
    json_t *report = bench("kernels", "--model " SHAPE " --only lora --phase prefill --dtype bf16 "
                                      "--batch-size 16 --num-adapters 2 --rank 8");

    cr_expect_float_eq(number(json_array_get(cases(report, 1), 0), "MB"),
                       1e-6 * (2 * FACTORS + T * (2 * K + 2 * 4 * N)), 1e-9);
    json_decref(report);
}

Test(bench, kernels_has_the_ops_of_both_phases)
{
    size_t i;
    const json_t *row;

    json_t *report = bench("kernels", "--model " SHAPE " --only base --batch-size 2");
    /* five products, attention over 300 and 1,024, norm, silu, three ways to sample */
    json_array_foreach(cases(report, 12), i, row)
    {
        cr_expect_str_eq(text(row, "phase"), "decode");
        expect_times(row);
    }
    cr_expect_gt(number(report, "flops_per_second"), 0);
    json_decref(report);

    report = bench("kernels", "--config llama-test --phase prefill --batch-size 16 "
                              "--num-adapters 2 --rank 4");
    json_array_foreach(cases(report, 1 + 7), i, row)
    {
        cr_expect_str_eq(text(row, "phase"), "prefill");
        expect_times(row);
    }
    json_decref(report);
}

Test(bench, metadata_times_every_way_for_random_and_static_lengths)
{
    static const char *const columns[] = {"host us",     "linear us",     "binary us",
                                          "adaptive us", "by request us", "step us"};
    size_t i;
    const json_t *row;

    json_t *report = bench("metadata", "--batch-size 1,40 --extend 3");
    json_array_foreach(cases(report, 4), i, row)
    {
        cr_expect_eq(number(row, "requests"), i < 2 ? 1 : 40);
        if (i % 2 == 1) cr_expect_eq(number(row, "tokens"), 3 * number(row, "requests"));
        for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
            cr_expect_gt(number(row, columns[c]), 0);
    }
    json_decref(report);
}

/* ---- requests that follow one another ------------------------------------------------------- */

Test(bench, latency_times_every_token_of_every_request)
{
    static const char *const kinds[] = {"none", "warm", "cold"};
    size_t i;
    const json_t *row;

    json_t *report = bench("latency", "--model " LLAMA2 " --adapters sql=" LLAMA2 "/adapters/sql "
                                      "--concurrency 1,3 --requests 5 --prompt-tokens 4 "
                                      "--max-new-tokens 3");
    json_array_foreach(cases(report, 6), i, row)
    {
        cr_expect_str_eq(text(row, "adapter"), kinds[i % 3]);
        cr_expect_eq(number(row, "concurrency"), i < 3 ? 1 : 3);
        cr_expect_eq(number(row, "tokens"), 15);
        cr_expect_gt(number(row, "first ms p50"), 0);
        cr_expect_leq(number(row, "first ms p50"), number(row, "first ms p99"));
        cr_expect_gt(number(row, "next ms p50"), 0);
        cr_expect_leq(number(row, "next ms p50"), number(row, "next ms p99"));
    }
    json_decref(report);
}

Test(bench, adapters_asks_for_popular_ones_more_often)
{
    size_t i;
    const json_t *row;

    json_t *report =
        bench("adapters", "--config llama-test --load-format dummy --num-adapters 1,30 "
                          "--batch-size 3 --requests 20 --max-new-tokens 2 --rank 2");
    const json_t *rows = cases(report, 2);
    json_array_foreach(rows, i, row)
    {
        cr_expect_eq(number(row, "tokens"), 36, "the last two are fewer than three");
        cr_expect_eq(number(row, "loads"), 0, "it was warmed up before");
        cr_expect_eq(number(row, "waits"), 0);
    }
    cr_expect_eq(number(json_array_get(rows, 0), "asked for"), 1);
    cr_expect_eq(number(json_array_get(rows, 0), "% of first"), 100);
    cr_expect_eq(number(json_array_get(rows, 0), "% by bytes read"), 100);
    /* of 3 requests with up to 3 adapters, beside the model's weights */
    cr_expect_lt(number(json_array_get(rows, 1), "% by bytes read"), 100);
    cr_expect_gt(number(json_array_get(rows, 1), "% by bytes read"), 90);
    /* 20 draws from 30 that were all as likely would be 15 different ones */
    cr_expect_gt(number(json_array_get(rows, 1), "asked for"), 3);
    cr_expect_lt(number(json_array_get(rows, 1), "asked for"), 15);
    json_decref(report);
}

/* Of 16 requests of 10 tokens, 5 more or less: the same for every case, and not 10 each. */
Test(bench, adapters_may_have_requests_of_different_lengths)
{
    json_t *report = bench("adapters", "--config llama-test --load-format dummy --num-adapters 1,4 "
                                       "--batch-size 3 --requests 16 --max-new-tokens 10 "
                                       "--vary 0.5 --rank 2");
    const json_t *rows = cases(report, 2);
    const double n_tokens = number(json_array_get(rows, 0), "tokens");

    cr_expect_geq(n_tokens, 14 * 5);
    cr_expect_leq(n_tokens, 16 * 15 - 1);
    cr_expect_neq(n_tokens, 14 * 10);
    cr_expect_eq(number(json_array_get(rows, 1), "tokens"), n_tokens);
    json_decref(report);
}

Test(bench, load_adds_up_to_the_first_token)
{
    size_t i;
    const json_t *row;

    json_t *report =
        bench("load", "--model " LLAMA2 " --adapters sql=" LLAMA2 "/adapters/sql --repeat 2");
    json_array_foreach(cases(report, 2), i, row)
    {
        const double parts = number(row, "open seconds") + number(row, "adapter seconds") +
                             1e-3 * number(row, "first token ms");
        cr_expect_eq(number(row, "adapters"), 1);
        cr_expect_float_eq(number(row, "total seconds"), parts, 1e-9);
        cr_expect_gt(number(row, "resident bytes"), number(row, "weight bytes"));
    }
    json_decref(report);
}

/* ---- profile -------------------------------------------------------------------------------- */

Test(bench, profile_puts_the_greatest_loss_first)
{
    size_t i;
    const json_t *row;
    double share = 0, before = HUGE_VAL;
    int n_phases = 0, n_products = 0;

    json_t *report = bench("profile", "--config llama-test --load-format dummy --batch-size 2 "
                                      "--num-adapters 1 --rank 4 --context 6 --prompt-tokens 8 "
                                      "--steps 2");
    json_array_foreach(json_object_get(report, "cases"), i, row)
    {
        const char *op = text(row, "op");
        cr_expect_str_eq(text(row, "phase"), n_phases == 0 ? "decode" : "prefill");
        if (strcmp(op, "all") == 0) {
            cr_expect_float_eq(share, 100, 1e-6, "%g %%", share);
            share = 0;
            before = HUGE_VAL;
            n_phases++;
            continue;
        }
        share += number(row, "% of step");
        cr_expect_leq(number(row, "lost us"), before);
        before = number(row, "lost us");
        if (n_phases > 0 || strcmp(op, "matmul") != 0) continue;
        n_products += (int)number(row, "calls");
        /* 128 x 128, two tokens, the model's two layers: bf16 weights, f32 in and out */
        if (strcmp(text(row, "shape"), "128 x 128, T 2") == 0)
            cr_expect_float_eq(number(row, "MB"), 2e-6 * (2 * 128 * 128 + 4 * 2 * 256), 1e-9);
    }
    cr_expect_eq(n_phases, 2);
    cr_expect_eq(n_products, 2 * 4 + 1); /* four in each layer, and the head */
    json_decref(report);
}

/* The CPU has no ranges: the same table. */
Test(bench, profile_launches_op_by_op_for_other_profilers)
{
    json_t *report = bench("profile", "--config llama-test --load-format dummy --batch-size 2 "
                                      "--num-adapters 1 --rank 4 --context 6 --prompt-tokens 8 "
                                      "--steps 1 --nvtx");
    const json_t *rows = json_object_get(report, "cases");
    cr_assert_gt(json_array_size(rows), 10);
    cr_expect_gt(number(json_array_get(rows, 0), "us"), 0);
    json_decref(report);
}

/* ---- the tables of BENCHMARKS.md ------------------------------------------------------------- */

static bool has(const char *program)
{
    char line[64];
    snprintf(line, sizeof line, "command -v %s >/dev/null 2>&1", program);
    return system(line) == 0;
}

/* The text of a file that a script has written. */
static char *text_of(const char *path)
{
    struct buffer text = {0};
    cr_assert_eq(file_read_all(&text, path, 1 << 24), MLORA_OK, "%s", path);
    cr_assert_eq(buffer_append(&text, "", 1), MLORA_OK);
    return text.data;
}

static void expect_in(const char *text, const char *part)
{
    cr_expect(strstr(text, part) != NULL, "\"%s\" is not in:\n%s", part, text);
}

/* Some parts of the script on the CPU, one of them with a model that does not exist: its failure is
 * said, the others are there, and what they say is what the Markdown says. */
Test(bench, one_script_makes_the_reports_and_another_their_tables, .timeout = 120)
{
    const char *program = getenv("MLORA_BIN");
    char cell[96], line[512];
    size_t i;
    const json_t *row;

    if (!has("python3") || !has("bash") || !has("timeout")) cr_skip("needs bash and python3");
    cr_assert_eq(system("rm -rf build/bench-run build/bench-run.tar.gz"), 0);
    snprintf(line, sizeof line,
             "MLORA=%s PYTHON=python3 BACKEND=cpu LARGE=llama-test SMALL=no-such-shape TOKENS=16 "
             "BATCH=3 PARTS='metadata generate modes prefill-d64 load' "
             "tools/reference/benchmarks build/bench-run >build/bench-run.log 2>&1",
             program ? program : "build/mlora");
    cr_expect_neq(system(line), 0);
    char *log = text_of("build/bench-run.log"), *tables = text_of("build/bench-run/tables.md");
    expect_in(log, "## metadata: ");
    expect_in(log, "## generate: ");
    expect_in(log, "no-such-shape");
    expect_in(log, "tables: attention-prefill: not in build/bench-run: prefill, prefill-d64");
    expect_in(tables, "## machine");
    expect_in(tables, "## load");
    expect_in(tables, "## metadata");
    expect_in(tables, "| gbmm | ");
    json_t *report = golden("build/bench-run/generate.json");
    json_array_foreach(cases(report, 1 + 3), i, row)
    {
        /* three digits of what was measured */
        const double speed = number(row, "tokens/s");
        if (speed >= 100 && speed < 999) {
            snprintf(cell, sizeof cell, " | %.0f | ", speed);
            expect_in(tables, cell);
        }
        snprintf(cell, sizeof cell, "| 3 | %d x r16 | ", (int)number(row, "adapters"));
        expect_in(tables, number(row, "adapters") > 0 ? cell : "| 3 | none | ");
    }
    json_decref(report);
    free(log);
    free(tables);

    /* each has its place in BENCHMARKS.md */
    cr_assert_eq(system("cp BENCHMARKS.md build/bench-run.md"), 0);
    cr_expect_eq(system("tools/reference/tables build/bench-run --into build/bench-run.md "
                        "2>build/bench-run.log"),
                 0);
    tables = text_of("build/bench-run.md");
    expect_in(tables, "mlora bench metadata --batch-size 1,8,64,128,256,1024,4096 --backend cpu");
    expect_in(tables, "| 4,096 | static | ");
    free(tables);
    cr_expect_eq(system("rm -rf build/bench-run build/bench-run.tar.gz build/bench-run.log "
                        "build/bench-run.md"),
                 0);
}

/* Every table that the script can make has one place. */
Test(bench, benchmarks_md_has_a_place_for_every_table)
{
    char *made = text_of("tools/reference/tables"), *page = text_of("BENCHMARKS.md");
    char *at = strstr(made, "\nTABLES = (");
    int n = 0;

    cr_assert(at);
    char *end = strchr(at, ')');
    cr_assert(end);
    *end = '\0';
    for (char *name = strtok(strchr(at, '(') + 1, ", \n"); name; name = strtok(NULL, ", \n"), n++) {
        char place[96];
        for (char *c = name; *c; c++)
            if (*c == '_') *c = '-';
        snprintf(place, sizeof place, "<!-- table %s -->", name);
        expect_in(page, place);
    }
    cr_expect_gt(n, 10);
    free(made);
    free(page);
}

/* ---- pictures ------------------------------------------------------------------------------- */

/* How the file begins, or what is said where there is no gnuplot. */
static void expect_picture(const char *arguments, const char *file, const char *begins)
{
    char start[16] = "";

    unlink(file);
    struct outcome outcome = run(NULL, "%s", arguments);
    if (!has("gnuplot")) {
        expect_refusal_with(&outcome, "--plot needs gnuplot, which is not installed");
        return;
    }
    cr_assert_eq(outcome.status, 0, "%s", outcome.err);
    cr_expect_str_eq(outcome.err, "");
    outcome_free(&outcome);
    FILE *picture = fopen(file, "r");
    cr_assert(picture, "%s was not made", file);
    cr_assert_eq(fread(start, 1, sizeof start - 1, picture), sizeof start - 1);
    fclose(picture);
    cr_expect_eq(strncmp(start, begins, strlen(begins)), 0);
    unlink(file);
}

Test(bench, draws_what_it_measures)
{
    expect_picture(
        "bench generate --backend cpu --config llama-test --load-format dummy --batch-size 2 "
        "--num-adapters 1 --max-new-tokens 2 --repeat 1 --plot build/bench-1.svg",
        "build/bench-1.svg", "<?xml");
    expect_picture("bench kernels --backend cpu --model " SHAPE " --only lora --batch-size 1,2 "
                   "--num-adapters 1 --rank 2 --plot build/bench-2.png",
                   "build/bench-2.png", "\x89PNG");
    expect_picture("bench kernels --backend cpu --model " SHAPE " --only lora --phase prefill "
                   "--batch-size 4,8 --num-adapters 1 --rank 2 --plot build/bench-3.svg",
                   "build/bench-3.svg", "<?xml");
    expect_picture("bench adapters --backend cpu --config llama-test --load-format dummy "
                   "--num-adapters 1,2 --batch-size 2 --max-new-tokens 2 --rank 2 "
                   "--plot build/bench-4.svg",
                   "build/bench-4.svg", "<?xml");
    expect_picture("bench latency --backend cpu --config llama-test --load-format dummy "
                   "--concurrency 1,2 --requests 2 --prompt-tokens 2 --max-new-tokens 2 --rank 2 "
                   "--num-adapters 1 --plot build/bench-5.svg",
                   "build/bench-5.svg", "<?xml");
}

/* ---- refusals ------------------------------------------------------------------------------- */

Test(bench, refuses_lists_and_actions_that_mean_nothing)
{
    struct outcome outcome = run(NULL, "bench generate --model " LLAMA2 " --batch-size 0");
    expect_refusal(&outcome, "--batch-size holds 0, must be from 1 to 4096");
    outcome = run(NULL, "bench generate --model " LLAMA2 " --num-adapters ''");
    expect_refusal_with(&outcome, "--num-adapters");
    outcome = run(NULL, "bench --model " LLAMA2);
    expect_refusal_with(&outcome, "mlora bench generate --model DIR");
    outcome = run(NULL, "bench kernel --model " LLAMA2);
    expect_refusal(&outcome, "unknown bench \"kernel\"; did you mean \"kernels\"?");
    outcome = run(NULL, "bench generate --model " LLAMA2 " --modes loop,fast");
    expect_refusal(&outcome, "--modes holds \"fast\", must be of auto|loop|gbmm|bgmv|sgmv|fused");
    outcome = run(NULL, "bench generate --model " LLAMA2 " --modes ''");
    expect_refusal(&outcome,
                   "--modes is empty, at least one of auto|loop|gbmm|bgmv|sgmv|fused is needed");
    outcome = run(NULL, "bench generate --model " LLAMA2 " --sweep ranks=3");
    expect_refusal(&outcome, "--sweep: \"ranks=3\" is none of batch=N,... adapters=N,... "
                             "rank=R,...");
    outcome = run(NULL, "bench metadata --plot build/no.svg");
    expect_refusal(&outcome, "there is no picture of bench metadata; generate, kernels, adapters "
                             "and latency have one");
    outcome = run(NULL, "bench load --model " LLAMA2 " now");
    expect_refusal(&outcome, "\"now\" is not a flag; mlora bench load --help lists the flags");
    outcome = run(NULL, "bench profile");
    expect_refusal_with(&outcome, "no model: give --model DIR");
}

Test(bench, refuses_pictures_that_cannot_be_drawn)
{
    struct outcome outcome = run(NULL, "bench load --model " LLAMA2 " --plot speed.jpg");
    expect_refusal(&outcome, "--plot is \"speed.jpg\", must end in .svg or .png");
    outcome = run(NULL, "bench plot only-one.json");
    expect_refusal(&outcome, "mlora bench plot needs two files: REPORT.json and PICTURE.svg or "
                             ".png");
    outcome = run(NULL, "bench plot a b c");
    expect_refusal(&outcome, "\"c\" is one file too many; mlora bench plot takes a report and the "
                             "picture to make");
    if (system("command -v gnuplot >/dev/null 2>&1") != 0) return;
    outcome = run(NULL, "bench plot tools/shapes/llama-test/config.json build/no.svg");
    expect_refusal(&outcome, "tools/shapes/llama-test/config.json: there are no cases: a report of "
                             "mlora bench --json is needed");
    outcome = run(NULL, "bench metadata --backend cpu --batch-size 1 --plot build/no.svg "
                        ">/dev/null");
    expect_refusal(&outcome, "there is no picture of bench metadata; generate, kernels, adapters "
                             "and latency have one");
}
