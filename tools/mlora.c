/* mlora: the command line. Picks the command; each is one cmd_ file over engine/mlora.h. */
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/commands.h"
#include "tools/io.h"
#include "tools/text.h"

static const struct command *const commands[] = {
    &command_generate, &command_score, &command_tokenize, &command_inspect,
    &command_merge,    &command_bench, &command_check_op, NULL};

static void print_help(void)
{
    printf("mlora %s: one Llama model, many LoRA adapters, one batch.\n\n"
           "Usage: mlora COMMAND [FLAGS]\n\nCommands:\n",
           mlora_version());
    for (int i = 0; commands[i]; i++)
        printf("  %-12s %s\n", commands[i]->name, commands[i]->summary);
    printf("  %-12s %s\n", "completion", "print the completion script of bash");
    printf("  %-12s %s\n\n", "help", "print this, or the flags of a command");
    printf("mlora COMMAND --help lists the flags of a command.\n");
}

static const struct command *find_command(const char *name)
{
    for (int i = 0; commands[i]; i++)
        if (strcmp(commands[i]->name, name) == 0) return commands[i];
    return NULL;
}

static int refuse_command(const char *name)
{
    static const char *const others[] = {"completion", "help", "--help", "--version"};
    struct nearest nearest = {.wanted = name};

    for (int i = 0; commands[i]; i++) nearest_offer(&nearest, commands[i]->name);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) nearest_offer(&nearest, others[i]);
    if (nearest.best)
        return fail(error_set(MLORA_EINVAL, "unknown command \"%s\"; did you mean \"%s\"?", name,
                              nearest.best));
    return fail(error_set(MLORA_EINVAL, "unknown command \"%s\"; mlora help lists them", name));
}

static int help(int argc, char **argv)
{
    if (argc < 2) {
        print_help();
        return finish_output(stdout);
    }
    const struct command *command = find_command(argv[1]);
    if (!command) return refuse_command(argv[1]);
    options_help(stdout, command);
    return finish_output(stdout);
}

static int completion(int argc, char **argv)
{
    if (argc != 2 || strcmp(argv[1], "bash") != 0)
        return fail(error_set(MLORA_EINVAL, "usage: mlora completion bash"));
    options_complete_bash(stdout, commands);
    return finish_output(stdout);
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "help";

    signal(SIGPIPE, SIG_DFL); /* a reader that leaves ends the program quietly */
    if (strcmp(name, "--version") == 0 || strcmp(name, "-V") == 0) {
        printf("mlora %s\n", mlora_version());
        return finish_output(stdout);
    }
    if (strcmp(name, "help") == 0 || strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0)
        return help(argc - 1, argv + 1);
    if (strcmp(name, "completion") == 0) return completion(argc - 1, argv + 1);
    const struct command *command = find_command(name);
    return command ? command->run(argc - 1, argv + 1) : refuse_command(name);
}
