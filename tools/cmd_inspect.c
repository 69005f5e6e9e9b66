/* mlora inspect: what a directory is, without loading weights. The library describes it as JSON;
 * here the JSON becomes lines for people: a name and a value, and the modules as a table. */
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/answers.h"
#include "tools/commands.h"
#include "tools/io.h"
#include "tools/table.h"
#include "tools/text.h"

struct inspect {
    const char *model;
    bool json;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct inspect, member)
static const struct option_spec inspect_specs[] = {
    {.name = "model", .letter = 'm', .kind = OPTION_TEXT, AT(model), .argument = "DIR",
     .help = "the base model that the adapter should fit"},
    {.name = "json", .kind = OPTION_FLAG, AT(json), .help = "all of it as one JSON object"},
    {.name = NULL},
};
static const struct option_group groups[] = {{"Flags", inspect_specs}, {NULL, NULL}};
/* clang-format on */

enum { LABEL_WIDTH = 18 };

/* "weight bytes" for "weight_bytes", and some names that read better. */
static void label(char *out, size_t bytes, const char *key)
{
    static const char *const better[][2] = {
        {"n_parameters", "parameters"}, {"n_layers", "layers"},
        {"hidden_size", "width"},       {"n_heads", "heads"},
        {"n_kv_heads", "KV heads"},     {"intermediate_size", "MLP width"},
        {"vocab_size", "vocabulary"},   {"max_position", "context"},
        {"file_bytes", "files"},        {"device_bytes", "on the device"},
        {"n_modules", "modules"},       {"kv_bytes_per_token", "KV of a token"},
        {"weight_dtypes", "stored as"}, {"wrong_elsewhere", "computed differently elsewhere"},
        {"base_model", "made for"},     {"fits_reason", "because"}};

    snprintf(out, bytes, "%s", key);
    for (size_t i = 0; i < sizeof better / sizeof *better; i++)
        if (strcmp(key, better[i][0]) == 0) snprintf(out, bytes, "%s", better[i][1]);
    for (char *c = out; *c; c++)
        if (*c == '_') *c = ' ';
}

static void print_lines(const char *name, const json_t *value);

static void print_label(const char *name)
{
    printf("%-*s ", LABEL_WIDTH - 1, name);
}

/* Every item of an array of strings on its own line. */
static void print_list(const char *name, const json_t *list)
{
    const int columns = terminal_columns(stdout);
    size_t i;
    const json_t *item;

    json_array_foreach(list, i, item)
    {
        struct buffer text = {0};
        print_label(i == 0 ? name : "");
        if (table_cell(&text, "", item) == MLORA_OK)
            text_wrap(stdout, buffer_text(&text), LABEL_WIDTH, LABEL_WIDTH, columns);
        buffer_free(&text);
    }
}

/* What the words in a table mean, below it. */
static void print_legend(const json_t *list)
{
    size_t i;
    const json_t *item;

    printf("\n");
    json_array_foreach(list, i, item)
    {
        text_wrap(stdout, json_string_value(item), 4, 0, terminal_columns(stdout));
    }
}

static void print_value(const char *key, const json_t *value)
{
    char name[64];
    struct buffer text = {0};

    label(name, sizeof name, key);
    if (json_is_null(value) || (json_is_array(value) && json_array_size(value) == 0)) return;
    if (json_is_object(value)) {
        print_lines(name, value);
    } else if (json_is_array(value) && json_is_object(json_array_get(value, 0))) {
        printf("\n%s:\n", name);
        table_print_within(stdout, value, terminal_columns(stdout));
    } else if (strcmp(key, "warnings") == 0) {
        print_list(name, value);
    } else if (strcmp(key, "how") == 0) {
        print_legend(value);
    } else if (table_cell(&text, key, value) == MLORA_OK) {
        print_label(name);
        text_wrap(stdout, buffer_text(&text), LABEL_WIDTH, LABEL_WIDTH, terminal_columns(stdout));
    }
    buffer_free(&text);
}

/* An object's tables, and what explains them, come after its lines. */
static void print_lines(const char *name, const json_t *object)
{
    const char *key;
    json_t *value;

    if (*name) printf("%s\n", name);
    for (int tables = 0; tables < 2; tables++) {
        json_object_foreach((json_t *)object, key, value)
        {
            const bool is_table =
                (json_is_array(value) && json_is_object(json_array_get(value, 0))) ||
                strcmp(key, "how") == 0;
            if (is_table == tables) print_value(key, value);
        }
    }
}

static mlora_status inspect_run(const struct inspect *options, const struct operands *operands)
{
    char *text = NULL;
    json_error_t error;

    if (operands->n != 1)
        return error_set(MLORA_EINVAL, "inspect takes one directory, there are %d", operands->n);
    mlora_status status = mlora_inspect(operands->values[0], options->model, &text);
    if (status != MLORA_OK) return status;
    json_t *object = json_loads(text, 0, &error);
    if (!object)
        status = error_set(MLORA_EFORMAT, "the description is not JSON: %s", error.text);
    else if (options->json)
        printf("%s\n", text);
    else
        print_lines("", object);
    json_decref(object);
    mlora_free(text);
    return status;
}

static int run(int argc, char **argv)
{
    struct inspect options = {0};
    void *const targets[] = {&options};
    struct operands operands;

    mlora_status status = options_parse(&command_inspect, targets, argc, argv, &operands);
    if (status == MLORA_OK && operands.help)
        options_help(stdout, &command_inspect);
    else if (status == MLORA_OK)
        status = inspect_run(&options, &operands);
    const int result = fail(status);
    return finish_output(stdout) != 0 ? 1 : result;
}

const struct command command_inspect = {
    .name = "inspect",
    .summary = "what a model or adapter directory holds, without loading it",
    .usage = "DIR [--model DIR] [--json]",
    .description = "Describe a model or an adapter: what it is, sizes, modules, ranks, scales, "
                   "bytes on the device, and whether it can be served; with --model, whether it "
                   "fits that model.",
    .groups = groups,
    .examples = "  mlora inspect adapters/sql --model llama\n",
    .run = run,
};
