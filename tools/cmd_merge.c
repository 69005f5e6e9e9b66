/* mlora merge: an adapter folded into its base, written as a checkpoint of its own. */
#include <stdio.h>

#include "engine/base/error.h"
#include "tools/commands.h"
#include "tools/io.h"

struct merge {
    const char *model, *adapter, *output;
    bool lenient;
};

/* clang-format off */
#define AT(member) .offset = offsetof(struct merge, member)
static const struct option_spec merge_specs[] = {
    {.name = "model", .letter = 'm', .kind = OPTION_TEXT, AT(model), .argument = "DIR",
     .help = "the base model"},
    {.name = "adapter", .kind = OPTION_TEXT, AT(adapter), .argument = "DIR",
     .help = "the adapter"},
    {.name = "output", .letter = 'o', .kind = OPTION_TEXT, AT(output), .argument = "DIR",
     .help = "the directory to make; it appears when all of it is written"},
    {.name = "lenient", .kind = OPTION_FLAG, AT(lenient),
     .help = "leave out adapter tensors that fit nothing"},
    {.name = NULL},
};
static const struct option_group groups[] = {{"Flags", merge_specs}, {NULL, NULL}};
/* clang-format on */

static int run(int argc, char **argv)
{
    struct merge merge = {0};
    void *const targets[] = {&merge};
    struct operands operands;
    char *warnings = NULL;

    mlora_status status = options_parse(&command_merge, targets, argc, argv, &operands);
    if (status == MLORA_OK && operands.help)
        options_help(stdout, &command_merge);
    else if (status == MLORA_OK && operands.n > 0)
        status = error_set(MLORA_EINVAL,
                           "unexpected \"%s\"; directories are given as --model, "
                           "--adapter and --output",
                           operands.values[0]);
    else if (status == MLORA_OK && (!merge.model || !merge.adapter || !merge.output))
        status = error_set(MLORA_EINVAL, "no %s: give --model DIR, --adapter DIR and --output DIR",
                           !merge.model     ? "model"
                           : !merge.adapter ? "adapter"
                                            : "output");
    else if (status == MLORA_OK)
        status = mlora_merge(merge.model, merge.adapter, merge.output, merge.lenient, &warnings);
    print_warnings(NULL, warnings);
    mlora_free(warnings);
    const int result = fail(status);
    return finish_output(stdout) != 0 ? 1 : result;
}

const struct command command_merge = {
    .name = "merge",
    .summary = "fold an adapter into its base and write a checkpoint",
    .usage = "--model DIR --adapter DIR --output DIR",
    .description = "Write a Hugging Face checkpoint whose weights are W + s B A, in the types of "
                   "the base, with its config.json and its tokenizer.",
    .groups = groups,
    .examples = "  mlora merge --model llama --adapter adapters/sql --output llama-sql\n",
    .run = run,
};
