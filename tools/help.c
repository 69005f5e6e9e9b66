/* What the option tables say to people and shells: --help and the completion script. */
#include <string.h>

#include "tools/options.h"
#include "tools/text.h"

enum { COLUMNS = 80, HELP_COLUMN = 31 };

/* "  -n, --max-tokens N" */
static int print_name(FILE *out, const struct option_spec *spec)
{
    int columns = spec->letter ? fprintf(out, "  -%c, --%s", spec->letter, spec->name)
                               : fprintf(out, "      --%s", spec->name);

    if (spec->kind == OPTION_CHOICE)
        columns += fprintf(out, " %s", spec->choices);
    else if (spec->argument)
        columns += fprintf(out, " %s", spec->argument);
    return columns;
}

static void print_option(FILE *out, const struct option_spec *spec)
{
    char text[512];
    int column = print_name(out, spec);

    if (column > HELP_COLUMN - 2) {
        putc('\n', out);
        column = 0;
    }
    fprintf(out, "%*s", HELP_COLUMN - column, "");
    snprintf(text, sizeof text, "%s%s%s%s", spec->help, spec->fallback ? " [" : "",
             spec->fallback ? spec->fallback : "", spec->fallback ? "]" : "");
    text_wrap(out, text, HELP_COLUMN, HELP_COLUMN, COLUMNS);
}

void options_help(FILE *out, const struct command *command)
{
    static const struct option_spec help = {
        .name = "help", .letter = 'h', .kind = OPTION_FLAG, .help = "print this"};
    const int indent = (int)(strlen("Usage: mlora  ") + strlen(command->name));

    fprintf(out, "Usage: mlora %s ", command->name);
    text_wrap(out, command->usage, indent, indent, COLUMNS);
    putc('\n', out);
    text_wrap(out, command->description, 0, 0, COLUMNS);
    for (int g = 0; command->groups[g].title; g++) {
        fprintf(out, "\n%s:\n", command->groups[g].title);
        for (const struct option_spec *spec = command->groups[g].specs; spec->name; spec++)
            print_option(out, spec);
    }
    putc('\n', out);
    print_option(out, &help);
    putc('\n', out);
    text_wrap(out,
              "Every flag can also be set as MLORA_<FLAG>, such as MLORA_MODEL; the command line "
              "comes first.",
              0, 0, COLUMNS);
    if (command->examples) fprintf(out, "\nExamples:\n%s", command->examples);
}

/* ---- completion --------------------------------------------------------------------------- */

/* What bash offers after an option: words, directories or files. */
static void complete_value(FILE *out, const struct option_spec *spec)
{
    const char *argument = spec->argument ? spec->argument : "";

    if (spec->kind == OPTION_CHOICE) {
        const char *word;
        fprintf(out, "COMPREPLY=($(compgen -W \"");
        for (int i = 0, n; (n = option_choice(spec->choices, i, &word)) > 0; i++)
            fprintf(out, "%s%.*s", i ? " " : "", n, word);
        fprintf(out, "\" -- \"$word\"))");
    } else if (strstr(argument, "DIR")) {
        fprintf(out, "COMPREPLY=($(compgen -d -- \"$word\"))");
    } else if (strstr(argument, "FILE")) {
        fprintf(out, "COMPREPLY=($(compgen -f -- \"$word\"))");
    } else {
        fprintf(out, "COMPREPLY=()");
    }
}

static void complete_command(FILE *out, const struct command *command)
{
    fprintf(out, "    %s)\n        case $before in\n", command->name);
    for (int g = 0; command->groups[g].title; g++) {
        for (const struct option_spec *spec = command->groups[g].specs; spec->name; spec++) {
            if (spec->kind == OPTION_FLAG) continue;
            fprintf(out, "        --%s", spec->name);
            if (spec->letter) fprintf(out, " | -%c", spec->letter);
            fprintf(out, ") ");
            complete_value(out, spec);
            fprintf(out, "; return ;;\n");
        }
    }
    fprintf(out, "        esac\n        flags=\"--help");
    for (int g = 0; command->groups[g].title; g++)
        for (const struct option_spec *spec = command->groups[g].specs; spec->name; spec++)
            fprintf(out, " --%s", spec->name);
    fprintf(out, "\"\n        ;;\n");
}

void options_complete_bash(FILE *out, const struct command *const *commands)
{
    fprintf(out, "# bash completion of mlora: source <(mlora completion bash)\n"
                 "_mlora()\n"
                 "{\n"
                 "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}\n"
                 "    local flags=\"\"\n"
                 "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
                 "        COMPREPLY=($(compgen -W \"");
    for (int i = 0; commands[i]; i++) fprintf(out, "%s ", commands[i]->name);
    fprintf(out, "help completion --help --version\" -- \"$word\"))\n"
                 "        return\n"
                 "    fi\n"
                 "    case ${COMP_WORDS[1]} in\n");
    for (int i = 0; commands[i]; i++) complete_command(out, commands[i]);
    fprintf(out, "    esac\n"
                 "    if [[ $word == -* ]]; then\n"
                 "        COMPREPLY=($(compgen -W \"$flags\" -- \"$word\"))\n"
                 "    else\n"
                 "        COMPREPLY=($(compgen -f -- \"$word\"))\n"
                 "    fi\n"
                 "}\n"
                 "complete -o filenames -F _mlora mlora\n");
}
