/* Reading options into their targets. Everything is first collected, then set, so that what the
 * environment says comes before the command line and only where that is silent. */
#include "tools/options.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tools/text.h"

enum { MAX_OPTIONS = 64, MAX_NAMES = 128, FIRST_LONG = 256 };

/* Every option of a command in one list, as getopt_long wants them. */
struct table {
    const struct option_spec *specs[MAX_OPTIONS];
    void *targets[MAX_OPTIONS];
    bool given[MAX_OPTIONS]; /* on the command line */
    int n;
    struct option names[MAX_NAMES]; /* val: FIRST_LONG + the option's number */
    int n_names;
    char letters[3 * MAX_OPTIONS];
};

/* An option as it was found. */
struct found {
    int option;       /* in the table */
    const char *text; /* NULL for a flag */
};

static const struct option_spec help_spec = {.name = "help", .letter = 'h', .kind = OPTION_FLAG};

static void table_add_name(struct table *table, const char *name, bool has_argument)
{
    if (table->n_names == MAX_NAMES - 1) return; /* the tables are ours: tests see them all */
    table->names[table->n_names++] = (struct option){
        .name = name,
        .has_arg = has_argument ? required_argument : no_argument,
        .val = FIRST_LONG + table->n,
    };
}

static void table_add(struct table *table, const struct option_spec *spec, void *target)
{
    const bool has_argument = spec->kind != OPTION_FLAG;
    const size_t at = strlen(table->letters);

    if (table->n == MAX_OPTIONS) return;
    if (spec->letter) {
        table->letters[at] = spec->letter;
        table->letters[at + 1] = has_argument ? ':' : '\0';
    }
    table_add_name(table, spec->name, has_argument);
    for (int i = 0; i < 4 && spec->aliases[i]; i++)
        table_add_name(table, spec->aliases[i], has_argument);
    table->specs[table->n] = spec;
    table->targets[table->n++] = target;
}

static void table_build(struct table *table, const struct command *command, void *const *targets)
{
    *table = (struct table){.letters = ":"}; /* ":": a missing argument is told apart */
    table_add(table, &help_spec, NULL);
    for (int g = 0; command->groups[g].title; g++)
        for (const struct option_spec *spec = command->groups[g].specs; spec->name; spec++)
            table_add(table, spec, targets[g]);
}

/* ---- values ------------------------------------------------------------------------------- */

/* A range in words: "from 0 to 1", "above 0". */
static const char *range_text(char *out, size_t bytes, const struct option_spec *spec)
{
    const double huge = spec->kind == OPTION_INT ? 1e15 : HUGE_VAL;
    char min[32], max[32];

    snprintf(min, sizeof min, "%.10g", spec->min);
    snprintf(max, sizeof max, "%.10g", spec->max);
    if (spec->above_min && spec->max >= huge)
        snprintf(out, bytes, "above %s", min);
    else if (spec->above_min)
        snprintf(out, bytes, "above %s and at most %s", min, max);
    else if (spec->max >= huge)
        snprintf(out, bytes, "%s or more", min);
    else
        snprintf(out, bytes, "from %s to %s", min, max);
    return out;
}

static bool in_range(const struct option_spec *spec, double value)
{
    return value >= spec->min && value <= spec->max && !(spec->above_min && value == spec->min);
}

static mlora_status refuse_range(const struct option_spec *spec, const char *where,
                                 const char *found)
{
    char range[96];

    return error_set(MLORA_EINVAL, "%s is %s, must be %s", where, found,
                     range_text(range, sizeof range, spec));
}

mlora_status option_read_int(int64_t *out, const char *text, double min, double max,
                             const char *where)
{
    const struct option_spec range = {.kind = OPTION_INT, .min = min, .max = max};
    char *end;

    errno = 0;
    *out = strtoll(text, &end, 10);
    if (end == text || *end || isspace((unsigned char)text[0]))
        return error_set(MLORA_EINVAL, "%s is \"%s\", a whole number is needed", where, text);
    const bool fits = errno != ERANGE && in_range(&range, (double)*out);
    return fits ? MLORA_OK : refuse_range(&range, where, text);
}

static mlora_status set_number(const struct option_spec *spec, double *out, const char *text,
                               const char *where)
{
    char *end;

    *out = strtod(text, &end);
    if (end == text || *end || isspace((unsigned char)text[0]))
        return error_set(MLORA_EINVAL, "%s is \"%s\", a number is needed", where, text);
    return in_range(spec, *out) ? MLORA_OK : refuse_range(spec, where, text);
}

int option_choice(const char *choices, int index, const char **word)
{
    for (; index > 0 && choices; index--) {
        choices = strchr(choices, '|');
        if (choices) choices++;
    }
    *word = choices;
    return choices ? (int)strcspn(choices, "|") : 0;
}

static mlora_status set_choice(const struct option_spec *spec, int *out, const char *text,
                               const char *where)
{
    const char *word;
    int n;

    for (int i = 0; (n = option_choice(spec->choices, i, &word)) > 0; i++) {
        if ((int)strlen(text) != n || strncmp(text, word, (size_t)n) != 0) continue;
        *out = i;
        return MLORA_OK;
    }
    return error_set(MLORA_EINVAL, "%s is \"%s\", must be one of %s", where, text, spec->choices);
}

/* What a flag is in the environment: MLORA_JSON=1. */
static mlora_status set_flag(bool *out, const char *text, const char *where)
{
    static const char *const words[][2] = {
        {"0", "1"}, {"false", "true"}, {"no", "yes"}, {"off", "on"}};

    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        for (int value = 0; value < 2; value++) {
            if (strcasecmp(text, words[i][value]) != 0) continue;
            *out = value;
            return MLORA_OK;
        }
    }
    return error_set(MLORA_EINVAL, "%s is \"%s\", must be 0 or 1", where, text);
}

static mlora_status set_each(const struct option_spec *spec, void *target, const char *text,
                             const char *where)
{
    const mlora_status status = spec->each(target, text);

    return status == MLORA_OK ? status : error_prefix(status, "%s", where);
}

static mlora_status set(const struct option_spec *spec, void *target, const char *text,
                        const char *where)
{
    void *at = (char *)target + spec->offset;

    switch (spec->kind) {
    case OPTION_FLAG:
        return set_flag((bool *)at, text ? text : "1", where);
    case OPTION_INT:
        return option_read_int((int64_t *)at, text, spec->min, spec->max, where);
    case OPTION_NUMBER:
        return set_number(spec, (double *)at, text, where);
    case OPTION_TEXT:
        *(const char **)at = text;
        return MLORA_OK;
    case OPTION_CHOICE:
        return set_choice(spec, (int *)at, text, where);
    case OPTION_EACH:
        return set_each(spec, target, text, where);
    }
    return MLORA_OK;
}

/* ---- arguments ---------------------------------------------------------------------------- */

/* What getopt_long does not know: say what was probably meant. */
static mlora_status refuse_unknown(const struct table *table, const struct command *command,
                                   const char *argument)
{
    char name[64];
    struct nearest nearest = {.wanted = name};
    const char *longer[2] = {NULL, NULL}; /* names that it begins */

    if (strncmp(argument, "--", 2) != 0)
        return error_set(MLORA_EINVAL, "unknown flag %s; mlora %s --help lists the flags", argument,
                         command->name);
    snprintf(name, sizeof name, "%.*s", (int)strcspn(argument + 2, "="), argument + 2);
    for (int i = 0; i < table->n_names; i++) {
        nearest_offer(&nearest, table->names[i].name);
        if (strncmp(table->names[i].name, name, strlen(name)) != 0) continue;
        longer[longer[0] != NULL] = table->names[i].name;
    }
    if (longer[1])
        return error_set(MLORA_EINVAL, "--%s could be --%s or --%s", name, longer[0], longer[1]);
    if (nearest.best)
        return error_set(MLORA_EINVAL, "unknown flag --%s; did you mean --%s?", name, nearest.best);
    return error_set(MLORA_EINVAL, "unknown flag --%s; mlora %s --help lists the flags", name,
                     command->name);
}

/* The option that getopt_long returned: by number, or by letter. */
static int table_find(const struct table *table, int code)
{
    for (int i = 0; i < table->n && code != 0; i++)
        if (code == FIRST_LONG + i || code == table->specs[i]->letter) return i;
    return -1;
}

/* Walk the arguments; `found` has room for all of them. */
static mlora_status collect(struct table *table, const struct command *command, int argc,
                            char **argv, struct found *found, int *n_found)
{
    int code;

    optind = 0; /* glibc: start anew */
    opterr = 0;
    while ((code = getopt_long(argc, argv, table->letters, table->names, NULL)) != -1) {
        const int option = table_find(table, code == '?' || code == ':' ? optopt : code);
        if (code == ':' && option >= 0)
            return error_set(MLORA_EINVAL, "--%s needs a value: %s", table->specs[option]->name,
                             table->specs[option]->argument);
        if (code == '?' && option >= 0)
            return error_set(MLORA_EINVAL, "--%s takes no value", table->specs[option]->name);
        if (code == '?') {
            const char letter[] = {'-', (char)optopt, '\0'};
            return refuse_unknown(table, command, optopt ? letter : argv[optind - 1]);
        }
        table->given[option] = true;
        found[(*n_found)++] = (struct found){option, optarg};
    }
    return MLORA_OK;
}

/* "MLORA_MAX_TOKENS" for "max-tokens". */
static void variable_name(char *out, size_t bytes, const char *option)
{
    snprintf(out, bytes, "MLORA_%s", option);
    for (char *c = out; *c; c++) *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
}

static mlora_status set_from_environment(const struct table *table)
{
    char name[80];

    for (int i = 1; i < table->n; i++) { /* 0 is --help */
        variable_name(name, sizeof name, table->specs[i]->name);
        const char *text = getenv(name);
        if (table->given[i] || !text || !*text) continue;
        const mlora_status status = set(table->specs[i], table->targets[i], text, name);
        if (status != MLORA_OK) return status;
    }
    return MLORA_OK;
}

mlora_status options_parse(const struct command *command, void *const *targets, int argc,
                           char **argv, struct operands *out)
{
    struct table table;
    int n_found = 0;

    *out = (struct operands){0};
    table_build(&table, command, targets);
    size_t most = 1; /* "-abc" are three options: one per character is enough */
    for (int i = 0; i < argc; i++) most += strlen(argv[i]);
    struct found *found = calloc(most, sizeof *found);
    if (!found) return error_set(MLORA_ENOMEM, "out of memory for the arguments");

    mlora_status status = collect(&table, command, argc, argv, found, &n_found);
    if (status != MLORA_OK) goto done;
    if (table.given[0]) {
        out->help = true;
        goto done;
    }
    status = set_from_environment(&table);
    for (int i = 0; i < n_found && status == MLORA_OK; i++) {
        const struct option_spec *spec = table.specs[found[i].option];
        char where[80];
        snprintf(where, sizeof where, "--%s", spec->name);
        status = set(spec, table.targets[found[i].option], found[i].text, where);
    }
    out->values = argv + optind;
    out->n = argc - optind;

done:
    free(found);
    return status;
}

/* ---- JSON --------------------------------------------------------------------------------- */

/* "max-tokens" and "max_tokens" are the same. */
static bool same_name(const char *option, const char *key)
{
    while (*option && (*option == *key || (*option == '-' && *key == '_'))) {
        option++;
        key++;
    }
    return !*option && !*key;
}

static mlora_status set_json(const struct option_spec *spec, void *target, const json_t *value,
                             const char *where)
{
    void *at = (char *)target + spec->offset;
    char found[32];
    size_t i;
    const json_t *item;

    switch (spec->kind) {
    case OPTION_INT:
        if (!json_is_integer(value)) break;
        *(int64_t *)at = json_integer_value(value);
        snprintf(found, sizeof found, "%lld", (long long)*(int64_t *)at);
        return in_range(spec, (double)*(int64_t *)at) ? MLORA_OK : refuse_range(spec, where, found);
    case OPTION_NUMBER:
        if (!json_is_number(value)) break;
        *(double *)at = json_number_value(value);
        snprintf(found, sizeof found, "%g", *(double *)at);
        return in_range(spec, *(double *)at) ? MLORA_OK : refuse_range(spec, where, found);
    case OPTION_FLAG:
        if (!json_is_boolean(value)) break;
        *(bool *)at = json_is_true(value);
        return MLORA_OK;
    case OPTION_EACH:
        if (json_is_string(value)) return set_each(spec, target, json_string_value(value), where);
        if (!json_is_array(value)) break;
        json_array_foreach(value, i, item)
        {
            if (!json_is_string(item))
                return error_set(MLORA_EINVAL, "%s[%zu] is %s, a string is needed", where, i,
                                 json_kind(item));
            const mlora_status status = set_each(spec, target, json_string_value(item), where);
            if (status != MLORA_OK) return status;
        }
        return MLORA_OK;
    case OPTION_TEXT:
    case OPTION_CHOICE:
        break; /* no field of a request is one */
    }
    static const char *const needed[] = {
        [OPTION_FLAG] = "true or false", [OPTION_INT] = "a whole number",
        [OPTION_NUMBER] = "a number",    [OPTION_TEXT] = "a string",
        [OPTION_CHOICE] = "a string",    [OPTION_EACH] = "a string or an array of strings"};
    return error_set(MLORA_EINVAL, "%s is %s, %s is needed", where, json_kind(value),
                     needed[spec->kind]);
}

mlora_status options_set_json(const struct option_spec *specs, void *target, const char *key,
                              const json_t *value, const char *where, bool *known)
{
    char field[256];

    *known = true;
    for (const struct option_spec *spec = specs; spec->name; spec++) {
        if (!same_name(spec->name, key)) continue;
        if (json_is_null(value)) return MLORA_OK; /* as if it were not there */
        snprintf(field, sizeof field, "%s: %s", where, key);
        return set_json(spec, target, value, field);
    }
    *known = false;
    return MLORA_OK;
}
