#include "tests/tools/run.h"

#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/buffer.h"
#include "engine/base/file.h"

static void write_file(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");

    cr_assert(file, "%s cannot be written", path);
    fwrite(text, 1, strlen(text), file);
    fclose(file);
}

/* The content of a file, which is then removed. */
static char *take_file(const char *path)
{
    struct buffer text = {0};

    cr_assert_eq(file_read_all(&text, path, 1 << 28), MLORA_OK);
    cr_assert_eq(buffer_append(&text, "", 0), MLORA_OK); /* never NULL */
    unlink(path);
    return text.data;
}

struct outcome run(const char *input, const char *arguments, ...)
{
    const char *program = getenv("MLORA_BIN");
    char directory[] = "/tmp/mlora-test-XXXXXX";
    char in[64], out[64], err[64];
    struct buffer line = {0};
    char words[4096];
    va_list args;

    cr_assert(mkdtemp(directory));
    snprintf(in, sizeof in, "%s/in", directory);
    snprintf(out, sizeof out, "%s/out", directory);
    snprintf(err, sizeof err, "%s/err", directory);
    write_file(in, input ? input : "");
    va_start(args, arguments);
    vsnprintf(words, sizeof words, arguments, args);
    va_end(args);
    cr_assert_eq(buffer_printf(&line, "(%s %s) <%s >%s 2>%s", program ? program : "build/mlora",
                               words, in, out, err),
                 MLORA_OK);
    const int code = system(buffer_text(&line));
    struct outcome outcome = {
        .status = WIFEXITED(code) ? WEXITSTATUS(code) : 128 + WTERMSIG(code),
        .out = take_file(out),
        .err = take_file(err),
    };
    unlink(in);
    rmdir(directory);
    buffer_free(&line);
    return outcome;
}

void outcome_free(struct outcome *outcome)
{
    free(outcome->out);
    free(outcome->err);
}

int count_lines(const char *text)
{
    int n = 0;

    for (; *text; text++) n += *text == '\n';
    return n;
}

static void expect_refused(const struct outcome *outcome)
{
    cr_expect_eq(outcome->status, 2, "status %d: %s", outcome->status, outcome->err);
    cr_expect_str_eq(outcome->out, "");
    cr_expect_eq(count_lines(outcome->err), 1, "one line is needed: %s", outcome->err);
    cr_expect_eq(strncmp(outcome->err, "mlora: ", 7), 0, "%s", outcome->err);
}

void expect_refusal(struct outcome *outcome, const char *text)
{
    char line[2048];

    snprintf(line, sizeof line, "mlora: %s\n", text);
    expect_refused(outcome);
    cr_expect_str_eq(outcome->err, line);
    outcome_free(outcome);
}

void expect_refusal_with(struct outcome *outcome, const char *text)
{
    expect_refused(outcome);
    cr_expect(strstr(outcome->err, text), "\"%s\" is not in: %s", text, outcome->err);
    outcome_free(outcome);
}

json_t *output_json(const struct outcome *outcome)
{
    json_error_t error;
    json_t *value = json_loads(outcome->out, JSON_ALLOW_NUL | JSON_DECODE_ANY, &error);

    cr_assert_eq(outcome->status, 0, "status %d: %s", outcome->status, outcome->err);
    cr_assert(value, "not JSON: %s: %s", error.text, outcome->out);
    return value;
}

json_t *output_line_json(const struct outcome *outcome, int index)
{
    const char *line = outcome->out;
    json_error_t error;

    for (; index > 0 && line; index--) {
        line = strchr(line, '\n');
        if (line) line++;
    }
    cr_assert(line && *line, "a line is missing: %s%s", outcome->out, outcome->err);
    json_t *value = json_loadb(line, strcspn(line, "\n"), 0, &error);
    cr_assert(value, "not JSON: %s: %s", error.text, line);
    return value;
}

json_t *golden(const char *path)
{
    json_error_t error;
    json_t *value = json_load_file(path, JSON_ALLOW_NUL, &error);

    cr_assert(value, "%s: %s", path, error.text);
    return value;
}
