/* Running the program as a user does: a line of arguments for the shell, what was printed, and
 * the exit status. The program is $MLORA_BIN, or build/mlora. */
#ifndef MLORA_TESTS_TOOLS_RUN_H
#define MLORA_TESTS_TOOLS_RUN_H

#include <jansson.h>

#define LLAMA2 "tests/fixtures/tiny-llama2"
#define LLAMA3 "tests/fixtures/tiny-llama3"
#define FOUR_ADAPTERS                                                                              \
    "--adapters sql=" LLAMA2 "/adapters/sql,mood=" LLAMA2 "/adapters/mood "                        \
    "--adapters pirate=" LLAMA2 "/adapters/pirate,count=" LLAMA2 "/adapters/count "

struct outcome {
    int status; /* of exit; 128 + the signal's number if it was killed */
    char *out, *err;
};

/* Run `mlora ARGUMENTS` with `input` (NULL: nothing) on stdin. The arguments are a line of the
 * shell. Freed with outcome_free(). */
__attribute__((format(printf, 2, 3))) struct outcome run(const char *input, const char *arguments,
                                                         ...);
void outcome_free(struct outcome *outcome);

/* Expect exit status 2, nothing on stdout, and exactly the line "mlora: TEXT" on stderr. */
void expect_refusal(struct outcome *outcome, const char *text);

/* The same, where the line has to hold `text`. */
void expect_refusal_with(struct outcome *outcome, const char *text);

/* Standard output as JSON: of the whole, or of line `index`. Fails the test if it is not. */
json_t *output_json(const struct outcome *outcome);
json_t *output_line_json(const struct outcome *outcome, int index);

/* A golden file; freed with json_decref(). */
json_t *golden(const char *path);

int count_lines(const char *text);

#endif
