/* mlora bench: measure speed. Picks the bench; each is one file here. */
#include "tools/bench/bench.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tools/commands.h"
#include "tools/io.h"
#include "tools/text.h"

static const struct command *const benches[] = {&bench_generate, &bench_kernels,  &bench_metadata,
                                                &bench_latency,  &bench_adapters, &bench_load,
                                                &bench_profile,  &bench_plot,     NULL};

static int print_benches(void)
{
    printf("Usage: mlora bench NAME [FLAGS]\n\n");
    for (int i = 0; benches[i]; i++)
        printf("  %-10s %s\n", benches[i]->name + strlen("bench "), benches[i]->summary);
    printf("\nmlora bench NAME --help lists the flags of a bench.\n");
    return finish_output(stdout);
}

static int run(int argc, char **argv)
{
    struct nearest nearest = {.wanted = argc > 1 ? argv[1] : ""};

    if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0))
        return print_benches();
    for (int i = 0; benches[i]; i++) {
        const char *name = benches[i]->name + strlen("bench ");
        if (argc > 1 && strcmp(argv[1], name) == 0) return benches[i]->run(argc - 1, argv + 1);
        nearest_offer(&nearest, name);
    }
    if (argc > 1 && argv[1][0] != '-' && nearest.best)
        return fail(error_set(MLORA_EINVAL, "unknown bench \"%s\"; did you mean \"%s\"?", argv[1],
                              nearest.best));
    return fail(error_set(MLORA_EINVAL, "bench needs to know what to measure: mlora bench generate "
                                        "--model DIR; mlora bench --help lists the benches"));
}

static const struct option_group groups[] = {
    {"Output of every bench", bench_output_specs},
    {"Model of every bench", setup_specs},
    {NULL, NULL},
};

const struct command command_bench = {
    .name = "bench",
    .summary = "speed: generation, kernels, latency, many adapters, start-up",
    .usage = "NAME [FLAGS]",
    .description = "NAME is one of generate, kernels, metadata, latency, adapters, load, profile "
                   "or plot; mlora bench NAME --help lists its own flags.",
    .groups = groups,
    .examples = "  mlora bench generate -m llama --batch-size 1,64 --num-adapters 1,7\n"
                "  mlora bench kernels -m tools/shapes/llama-3.1-8b --phase prefill\n"
                "  mlora bench profile --load-format dummy --config llama-3.1-8b\n",
    .run = run,
};

int bench_main(const struct command *command, void *const *targets, int argc, char **argv,
               bench_action action, bench_operand operand)
{
    struct operands operands = {0};
    const char *name = command->name + strlen("bench ");
    json_t *report = report_open(name, argc, argv);

    mlora_status status = report ? options_parse(command, targets, argc, argv, &operands)
                                 : error_set(MLORA_ENOMEM, "out of memory");
    if (status == MLORA_OK && operands.help) options_help(stdout, command);
    for (int i = 0; i < operands.n && status == MLORA_OK && !operands.help; i++)
        status = operand ? operand(targets[0], operands.values[i])
                         : error_set(MLORA_EINVAL,
                                     "\"%s\" is not a flag; mlora %s --help lists the flags",
                                     operands.values[i], command->name);
    if (status == MLORA_OK && !operands.help) status = action(targets[0], report);
    int result = fail(status);
    if (finish_output(stdout) != 0) result = 1;
    json_decref(report);
    return result;
}

/* ---- arguments ------------------------------------------------------------------------------ */

mlora_status read_list(int32_t **values, int *n, const char *text, int min, int max,
                       const char *where)
{
    const mlora_status status = read_ids(values, n, text, where);

    if (status != MLORA_OK) return status;
    if (*n == 0)
        return error_set(MLORA_EINVAL, "%s is empty, at least one number is needed", where);
    for (int i = 0; i < *n; i++)
        if ((*values)[i] < min || (*values)[i] > max)
            return error_set(MLORA_EINVAL, "%s holds %d, must be from %d to %d", where,
                             (int)(*values)[i], min, max);
    return MLORA_OK;
}

int32_t list_largest(const int32_t *values, int n)
{
    int32_t most = 0;
    for (int i = 0; i < n; i++)
        if (values[i] > most) most = values[i];
    return most;
}

static const char modes_text[] = "auto|loop|gbmm|bgmv|sgmv|fused"; /* as mlora_lora_mode */
enum { MODE_NAME = 8, MODES = 6 };

const char *mode_name(int mode)
{
    static const char names[MODES][MODE_NAME] = {"auto", "loop", "gbmm", "bgmv", "sgmv", "fused"};
    return names[mode];
}

mlora_status read_modes(int32_t **modes, int *n, const char *text)
{
    *n = 0;
    *modes = calloc(strlen(text) + 1, sizeof **modes);
    if (!*modes) return error_set(MLORA_ENOMEM, "out of memory for --modes");
    while (*text) {
        const size_t bytes = strcspn(text, ",");
        int mode = 0;
        while (mode < MODES &&
               (strlen(mode_name(mode)) != bytes || strncmp(text, mode_name(mode), bytes) != 0))
            mode++;
        if (mode == MODES)
            return error_set(MLORA_EINVAL, "--modes holds \"%.*s\", must be of %s", (int)bytes,
                             text, modes_text);
        (*modes)[(*n)++] = mode;
        text += bytes + (text[bytes] == ',');
    }
    return *n > 0 ? MLORA_OK
                  : error_set(MLORA_EINVAL, "--modes is empty, at least one of %s is needed",
                              modes_text);
}
