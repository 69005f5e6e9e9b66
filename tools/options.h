/* The command line: one table of options per command says everything about them. The table is
 * what parses arguments and MLORA_ variables, checks the fields of JSON requests, prints --help
 * and makes the shell completion. */
#ifndef MLORA_TOOLS_OPTIONS_H
#define MLORA_TOOLS_OPTIONS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "engine/mlora.h"

enum option_kind {
    OPTION_FLAG,   /* bool: true when given; takes no argument                     */
    OPTION_INT,    /* int64_t in [min, max]                                        */
    OPTION_NUMBER, /* double in [min, max]                                         */
    OPTION_TEXT,   /* const char *, borrowed from the arguments or the environment */
    OPTION_CHOICE, /* int: the index of the word in `choices`                      */
    OPTION_EACH    /* any number of times, in order: `each` is called with every one */
};

struct option_spec {
    const char *name;       /* "max-tokens"; NULL ends a table */
    char letter;            /* 'n', or 0 */
    const char *aliases[4]; /* other long names, as other programs spell it */
    enum option_kind kind;
    size_t offset;        /* of the value in the target; not for OPTION_EACH */
    const char *argument; /* its name in --help: "N", "DIR" */
    double min, max;
    bool above_min;      /* min itself is not allowed */
    const char *choices; /* "auto|cpu|cuda" */
    mlora_status (*each)(void *target, const char *text);
    const char *fallback; /* the default, in words; NULL: not said */
    const char *help;
};

/* What "not given" looks like in a target whose defaults come from elsewhere. */
#define OPTION_UNSET INT64_MIN /* int64_t; doubles use NAN */

struct option_group {
    const char *title; /* in --help; NULL ends a list of groups */
    const struct option_spec *specs;
};

struct command {
    const char *name;
    const char *summary; /* a line of the list of commands */
    const char *usage;   /* after "mlora NAME " */
    const char *description;
    const struct option_group *groups;
    const char *examples;              /* lines, shown as they are; may be NULL */
    int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns the exit status */
};

/* What is left of the arguments. */
struct operands {
    char **values; /* [n], in argv */
    int n;
    bool help; /* --help was given: nothing was set */
};

/* Set `targets[i]` from the options of `command->groups[i]`: first those in the environment that
 * are not on the command line, then the command line, in order. Permutes argv.
 * Returns OK, EINVAL (with the nearest name, or the range) or ENOMEM. */
mlora_status options_parse(const struct command *command, void *const *targets, int argc,
                           char **argv, struct operands *out);

/* Set the option that `key` names ("max_tokens" for "max-tokens") from a JSON value. `where`
 * begins the message. `*known` says whether there is such an option; if not, nothing is set. */
mlora_status options_set_json(const struct option_spec *specs, void *target, const char *key,
                              const json_t *value, const char *where, bool *known);

/* Print what --help prints: at most 80 columns. */
void options_help(FILE *out, const struct command *command);

/* Print the completion script of bash. `commands` ends with NULL. */
void options_complete_bash(FILE *out, const struct command *const *commands);

/* The number that `text` holds, whole, as a message that begins with `where` needs it. */
mlora_status option_read_int(int64_t *out, const char *text, double min, double max,
                             const char *where);

/* The words of "a|b|c", one by one: the length of number `index`, 0 past the last. */
int option_choice(const char *choices, int index, const char **word);

#endif
