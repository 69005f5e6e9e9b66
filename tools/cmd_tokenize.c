/* mlora tokenize: text to ids and back. Only the tokenizer is loaded. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "tools/answers.h"
#include "tools/commands.h"
#include "tools/io.h"

struct tokenize {
    const char *model, *tokenizer, *prompt, *input;
    bool decode, json, no_special, no_parse_special, keep_special;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct tokenize, member)
static const struct option_spec tokenize_specs[] = {
    {.name = "model", .letter = 'm', .kind = OPTION_TEXT, AT(model), .argument = "DIR",
     .help = "the directory that holds the tokenizer"},
    {.name = "tokenizer", .kind = OPTION_TEXT, AT(tokenizer), .argument = "FILE",
     .help = "tokenizer.json or tokenizer.model; goes before --model"},
    {.name = "prompt", .letter = 'p', .kind = OPTION_TEXT, AT(prompt), .argument = "TEXT",
     .help = "the text; also as an argument, or on stdin"},
    {.name = "input", .letter = 'i', .kind = OPTION_TEXT, AT(input), .argument = "FILE",
     .help = "a JSON array of strings, which gives an array of id arrays; with --decode the "
             "other way round; -: stdin"},
    {.name = "decode", .letter = 'd', .kind = OPTION_FLAG, AT(decode),
     .help = "ids to text; ids as arguments, or on stdin"},
    {.name = "json", .kind = OPTION_FLAG, AT(json),
     .help = "ids as a JSON array, text as a JSON string"},
    {.name = "no-special", .kind = OPTION_FLAG, AT(no_special),
     .help = "leave begin and end tokens out"},
    {.name = "no-parse-special", .kind = OPTION_FLAG, AT(no_parse_special),
     .help = "tokens written in the text, such as <|eot_id|>, are plain text"},
    {.name = "keep-special", .kind = OPTION_FLAG, AT(keep_special),
     .help = "with --decode: write special tokens out"},
    {.name = NULL},
};
static const struct option_group groups[] = {{"Flags", tokenize_specs}, {NULL, NULL}};
/* clang-format on */

/* ---- one text ----------------------------------------------------------------------------- */

static mlora_status encode_json(json_t **out, const mlora_tokenizer *tokenizer, const char *text,
                                size_t bytes, const struct tokenize *options)
{
    const int flags = (options->no_special ? MLORA_ENCODE_NO_SPECIAL : 0) |
                      (options->no_parse_special ? MLORA_ENCODE_NO_PARSE_SPECIAL : 0);
    int32_t *ids;
    int n_ids;

    *out = NULL;
    const mlora_status status = mlora_encode(tokenizer, text, bytes, flags, &ids, &n_ids);
    if (status != MLORA_OK) return status;
    json_t *array = json_array();
    for (int i = 0; i < n_ids; i++) json_array_append_new(array, json_integer(ids[i]));
    mlora_free(ids);
    *out = array;
    return array ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory: %d ids", n_ids);
}

static mlora_status decode_json(json_t **out, const mlora_tokenizer *tokenizer, const int32_t *ids,
                                int n_ids, const struct tokenize *options)
{
    const int flags = options->keep_special ? MLORA_DECODE_KEEP_SPECIAL : 0;
    char *text;
    size_t bytes;

    *out = NULL;
    const mlora_status status = mlora_decode(tokenizer, ids, n_ids, flags, &text, &bytes);
    if (status != MLORA_OK) return status;
    *out = json_stringn(text, bytes);
    mlora_free(text);
    return *out ? MLORA_OK : error_set(MLORA_ENOMEM, "out of memory: a text of %zu bytes", bytes);
}

/* The arguments, one after another with a space between; without any, standard input. */
static mlora_status gather_text(struct buffer *out, const struct tokenize *options,
                                const struct operands *operands)
{
    mlora_status status = MLORA_OK;

    if (options->prompt && operands->n > 0)
        return error_set(MLORA_EINVAL, "both --prompt and \"%s\" are given", operands->values[0]);
    if (options->prompt) return buffer_append(out, options->prompt, strlen(options->prompt));
    if (operands->n == 0 && isatty(STDIN_FILENO))
        return error_set(MLORA_EINVAL, "no %s: give %s as arguments or on standard input",
                         options->decode ? "ids" : "text", options->decode ? "ids" : "text");
    if (operands->n == 0) return read_input(out, "-");
    for (int i = 0; i < operands->n && status == MLORA_OK; i++)
        status = buffer_printf(out, "%s%s", i ? " " : "", operands->values[i]);
    return status;
}

static void print_ids(const json_t *ids)
{
    size_t i;
    const json_t *id;

    json_array_foreach(ids, i, id)
    {
        printf("%s%lld", i ? " " : "", (long long)json_integer_value(id));
    }
    putchar('\n');
}

static mlora_status convert_one(const mlora_tokenizer *tokenizer, const struct tokenize *options,
                                const struct operands *operands)
{
    struct buffer text = {0};
    int32_t *ids = NULL;
    json_t *result = NULL;
    int n_ids;

    mlora_status status = gather_text(&text, options, operands);
    if (status != MLORA_OK) goto done;
    if (options->decode) {
        status = read_ids(&ids, &n_ids, buffer_text(&text), "an id");
        if (status == MLORA_OK) status = decode_json(&result, tokenizer, ids, n_ids, options);
    } else {
        status = encode_json(&result, tokenizer, buffer_text(&text), text.bytes, options);
    }
    if (status != MLORA_OK) goto done;
    if (options->json) {
        status = print_json(stdout, json_incref(result));
    } else if (options->decode) {
        fwrite(json_string_value(result), 1, json_string_length(result), stdout);
        putchar('\n');
    } else {
        print_ids(result);
    }

done:
    json_decref(result);
    free(ids);
    buffer_free(&text);
    return status;
}

/* ---- many texts --------------------------------------------------------------------------- */

static mlora_status decode_item(json_t **out, const mlora_tokenizer *tokenizer, const json_t *item,
                                const struct tokenize *options)
{
    const size_t n = json_array_size(item);
    int32_t *ids = malloc(n * sizeof *ids + 1);
    mlora_status status = MLORA_OK;

    *out = NULL;
    if (!ids) return error_set(MLORA_ENOMEM, "out of memory: %zu ids", n);
    for (size_t i = 0; i < n && status == MLORA_OK; i++) {
        const json_t *id = json_array_get(item, i);
        const json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0 || value > INT32_MAX)
            status = error_set(MLORA_EINVAL, "[%zu] is not a token id", i);
        ids[i] = (int32_t)value;
    }
    if (status == MLORA_OK) status = decode_json(out, tokenizer, ids, (int)n, options);
    free(ids);
    return status;
}

static mlora_status convert_item(json_t **out, const mlora_tokenizer *tokenizer, const json_t *item,
                                 const struct tokenize *options)
{
    *out = NULL;
    if (options->decode && !json_is_array(item))
        return error_set(MLORA_EINVAL, "holds %s, an array of ids is needed", json_kind(item));
    if (!options->decode && !json_is_string(item))
        return error_set(MLORA_EINVAL, "holds %s, a string is needed", json_kind(item));
    if (options->decode) return decode_item(out, tokenizer, item, options);
    return encode_json(out, tokenizer, json_string_value(item), json_string_length(item), options);
}

static mlora_status convert_file(const mlora_tokenizer *tokenizer, const struct tokenize *options)
{
    struct buffer text = {0};
    json_error_t error;
    json_t *items = NULL, *results = json_array();
    const json_t *item;
    size_t i;

    const char *path = strcmp(options->input, "-") == 0 ? "stdin" : options->input;
    mlora_status status = read_input(&text, options->input);
    if (status != MLORA_OK) goto done;
    items = json_loadb(buffer_text(&text), text.bytes, JSON_ALLOW_NUL, &error);
    if (!json_is_array(items)) {
        status = items ? error_set(MLORA_EINVAL, "%s: holds %s, a JSON array is needed", path,
                                   json_kind(items))
                       : error_set(MLORA_EINVAL, "%s: is not JSON: line %d, column %d: %s", path,
                                   error.line, error.column, error.text);
        goto done;
    }
    json_array_foreach(items, i, item)
    {
        json_t *result;
        status = convert_item(&result, tokenizer, item, options);
        if (status != MLORA_OK) {
            status = error_prefix(status, "%s: item %zu", path, i);
            goto done;
        }
        json_array_append_new(results, result);
    }
    status = print_json(stdout, json_incref(results));

done:
    json_decref(items);
    json_decref(results);
    buffer_free(&text);
    return status;
}

/* ---- the command -------------------------------------------------------------------------- */

static mlora_status tokenize_run(const struct tokenize *options, const struct operands *operands)
{
    const char *path = options->tokenizer ? options->tokenizer : options->model;
    mlora_tokenizer *tokenizer;

    if (!path) return error_set(MLORA_EINVAL, "no tokenizer: give --model DIR or --tokenizer FILE");
    if (options->input && (options->prompt || operands->n > 0))
        return error_set(MLORA_EINVAL, "both --input and a text are given");
    mlora_status status = mlora_tokenizer_open(&tokenizer, path);
    if (status != MLORA_OK) return status;
    status = options->input ? convert_file(tokenizer, options)
                            : convert_one(tokenizer, options, operands);
    mlora_tokenizer_close(tokenizer);
    return status;
}

static int run(int argc, char **argv)
{
    struct tokenize options = {0};
    void *const targets[] = {&options};
    struct operands operands;

    mlora_status status = options_parse(&command_tokenize, targets, argc, argv, &operands);
    if (status == MLORA_OK && operands.help)
        options_help(stdout, &command_tokenize);
    else if (status == MLORA_OK)
        status = tokenize_run(&options, &operands);
    const int result = fail(status);
    return finish_output(stdout) != 0 ? 1 : result;
}

const struct command command_tokenize = {
    .name = "tokenize",
    .summary = "text to token ids, and back",
    .usage = "(--model DIR | --tokenizer FILE) [FLAGS] [TEXT ... | --decode ID ...]",
    .description = "Print the token ids of a text, or with --decode the text of ids.",
    .groups = groups,
    .examples = "  mlora tokenize -m llama 'Hello world'\n"
                "  mlora tokenize -m llama 'Hello world' | mlora tokenize -m llama --decode\n",
    .run = run,
};
