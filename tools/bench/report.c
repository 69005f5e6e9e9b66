/* What was measured, where and how: the object that every bench fills, prints and writes. */
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "kernels/kernels.h"
#include "tools/bench/bench.h"
#include "tools/table.h"
#include "tools/text.h"

/* clang-format off */
#define AT(member) .offset = offsetof(struct bench_output, member)
const struct option_spec bench_output_specs[] = {
    {.name = "json", .kind = OPTION_TEXT, AT(json), .argument = "FILE",
     .help = "also write what was measured, and where, as JSON; -: stdout"},
    {.name = "plot", .kind = OPTION_TEXT, AT(plot), .argument = "FILE",
     .help = "also draw it with gnuplot, to FILE.svg or FILE.png"},
    {.name = NULL},
};
/* clang-format on */

static mlora_status no_memory(void)
{
    return error_set(MLORA_ENOMEM, "out of memory for a report");
}

json_t *report_open(const char *bench, int argc, char **argv)
{
    struct buffer command = {0};
    mlora_status status = buffer_printf(&command, "mlora bench");

    for (int i = 0; i < argc && status == MLORA_OK; i++)
        status = buffer_printf(&command, " %s", argv[i]);
    json_t *report = status == MLORA_OK
                         ? json_pack("{s:s, s:s, s:s+, s:[]}", "bench", bench, "version",
                                     mlora_version(), "command", buffer_text(&command), "", "cases")
                         : NULL;
    buffer_free(&command);
    return report;
}

/* The value of "key : value" in a file of such lines. */
static void find_line(char *out, size_t bytes, const char *path, const char *key)
{
    char line[512];
    FILE *file = fopen(path, "r");

    out[0] = '\0';
    while (file && !out[0] && fgets(line, sizeof line, file)) {
        const char *colon = strchr(line, ':');
        if (!colon || strncmp(line, key, strlen(key)) != 0) continue;
        colon += 1 + strspn(colon + 1, " ");
        snprintf(out, bytes, "%.*s", (int)strcspn(colon, "\n"), colon);
    }
    if (file) fclose(file);
}

/* The first line of what a command prints, "" where there is no such command. */
static void ask(char *out, size_t bytes, const char *command)
{
    FILE *pipe = popen(command, "r");

    out[0] = '\0';
    if (!pipe) return;
    if (fgets(out, (int)bytes, pipe)) out[strcspn(out, "\n")] = '\0';
    if (pclose(pipe) != 0) out[0] = '\0';
}

/* What nvidia-smi says of the first GPU. */
static void describe_gpu(json_t *machine)
{
    static const char *const keys[] = {"driver", "sm clock", "max sm clock", "memory clock",
                                       "power limit"};
    char gpu[256], cuda[64];

    ask(gpu, sizeof gpu,
        "nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,"
        "power.limit --format=csv,noheader -i 0 2>/dev/null");
    const char *at = gpu;
    for (size_t i = 0; i < sizeof keys / sizeof *keys && *at; i++) {
        const size_t bytes = strcspn(at, ",");
        json_object_set_new(machine, keys[i], json_stringn(at, bytes));
        at += bytes;
        at += strspn(at, ", ");
    }
    ask(cuda, sizeof cuda, "nvidia-smi --version 2>/dev/null | sed -n 's/^CUDA.*: *//p'");
    if (cuda[0]) json_object_set_new(machine, "cuda", json_string(cuda));
}

static json_t *describe_machine(bool cuda)
{
    struct utsname system = {0};
    char cpu[256];

    uname(&system);
    find_line(cpu, sizeof cpu, "/proc/cpuinfo", "model name");
    json_t *machine = json_pack("{s:s+++, s:s, s:I, s:s}", "system", system.sysname, " ",
                                system.release, "", "cpu", cpu[0] ? cpu : system.machine, "cores",
                                (json_int_t)sysconf(_SC_NPROCESSORS_ONLN), "compiler", __VERSION__);
    if (machine && cuda) describe_gpu(machine);
    return machine;
}

mlora_status report_add_device(json_t *report, const struct device *dev, double bytes_per_second)
{
    json_t *device = json_pack("{s:s, s:s, s:f, s:o}", "backend", dev->backend, "device",
                               dev->description, "bytes_per_second", bytes_per_second, "machine",
                               describe_machine(strcmp(dev->backend, "cuda") == 0));
    const bool ok = device && json_object_update(report, device) == 0;

    json_decref(device);
    return ok ? MLORA_OK : no_memory();
}

mlora_status report_add_shape(json_t *report, const struct model_config *config)
{
    json_t *shape = json_pack(
        "{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:b}", "hidden_size", config->hidden_size,
        "intermediate_size", config->mlp_size, "num_hidden_layers", config->n_layers,
        "num_attention_heads", config->n_heads, "num_key_value_heads", config->n_kv_heads,
        "head_dim", config->head_dim, "vocab_size", config->vocab_size, "max_position_embeddings",
        config->max_position, "tie_word_embeddings", config->tied);
    const bool ok = shape && json_object_set_new(report, "shape", shape) == 0;
    return ok ? MLORA_OK : no_memory();
}

mlora_status report_add_engine(json_t *report, const mlora_engine *engine)
{
    mlora_info info;

    mlora_engine_info(engine, &info);
    json_t *model =
        json_pack("{s:s, s:s, s:I, s:I, s:I, s:I}", "architecture", info.architecture, "dtype",
                  info.dtype, "n_parameters", (json_int_t)info.n_parameters, "weight_bytes",
                  (json_int_t)info.weight_bytes, "kv_bytes", (json_int_t)info.kv_bytes,
                  "kv_bytes_per_token", (json_int_t)info.kv_bytes_per_token);
    const bool ok = model && json_object_set_new(report, "model", model) == 0;
    return ok ? MLORA_OK : no_memory();
}

mlora_status report_add_both(json_t *report, const mlora_engine *engine, const struct setup *setup)
{
    struct device *dev = NULL;
    double bandwidth = 0;
    mlora_info info;

    mlora_engine_info(engine, &info);
    mlora_status status = bench_device_open(&dev, setup, info.backend);
    if (status == MLORA_OK) status = bench_bandwidth(&bandwidth, dev);
    if (status == MLORA_OK) status = report_add_device(report, dev, bandwidth);
    if (status == MLORA_OK) status = report_add_engine(report, engine);
    if (dev) dev->ops->close(dev);
    return status;
}

mlora_status report_add(json_t *report, json_t *row)
{
    const bool ok = row && json_array_append_new(json_object_get(report, "cases"), row) == 0;
    return ok ? MLORA_OK : no_memory();
}

static const char *text_of(const json_t *report, const char *key)
{
    const char *text = json_string_value(json_object_get(report, key));
    return text ? text : "";
}

static void print_heading(const json_t *report)
{
    const json_t *model = json_object_get(report, "model");
    const double flops = json_number_value(json_object_get(report, "flops_per_second"));

    char count[HUMAN_BYTES];

    if (model)
        printf("%s, %s parameters, %s, ", text_of(model, "architecture"),
               human_count(count, json_integer_value(json_object_get(model, "n_parameters"))),
               text_of(model, "dtype"));
    printf("on %s: %s; it copies %.1f GB/s", text_of(report, "backend"), text_of(report, "device"),
           1e-9 * json_number_value(json_object_get(report, "bytes_per_second")));
    if (flops > 0) printf(" and multiplies %.4g GFLOP/s", 1e-9 * flops);
    printf("\n\n");
}

static mlora_status write_json(const json_t *report, const char *path)
{
    FILE *out = strcmp(path, "-") == 0 ? stdout : fopen(path, "w");

    if (!out) return error_set(MLORA_EIO, "%s: cannot be written", path);
    const bool failed = json_dumpf(report, out, JSON_INDENT(1)) != 0 || fputc('\n', out) == EOF;
    const int closed = out == stdout ? 0 : fclose(out);
    return failed || closed ? error_set(MLORA_EIO, "%s: cannot be written", path) : MLORA_OK;
}

mlora_status report_finish(const json_t *report, const struct bench_output *output)
{
    mlora_status status = MLORA_OK;

    print_heading(report);
    table_print(stdout, json_object_get(report, "cases"));
    if (output->json) status = write_json(report, output->json);
    if (status == MLORA_OK && output->plot) status = plot_report(report, output->plot);
    return status;
}
