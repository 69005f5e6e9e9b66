/* adapter_config.json and the header of adapter_model.safetensors, both from the input: the
 * configuration up to the first NUL, the header's JSON behind it. The data that the header asks
 * for is a hole in the file, so that headers which are right get as far as the plan. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "lora/adapter.h"

enum { DATA_BYTES_MAX = 1 << 28 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static char directory[] = "/dev/shm/mlora-fuzz-XXXXXX"; /* memory: a disk is ten times slower */

static void clean_up(void)
{
    char path[64];

    snprintf(path, sizeof path, "%s/adapter_config.json", directory);
    unlink(path);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", directory);
    unlink(path);
    rmdir(directory);
}

/* Where the last tensor ends, as far as the header is one. */
static int64_t data_bytes(const char *header, size_t bytes)
{
    json_t *root = json_loadb(header, bytes, 0, NULL);
    int64_t last = 0;

    for (void *it = json_object_iter(root); it; it = json_object_iter_next(root, it)) {
        const json_t *offsets = json_object_get(json_object_iter_value(it), "data_offsets");
        const int64_t end = json_integer_value(json_array_get(offsets, 1));
        if (end > last && end <= DATA_BYTES_MAX) last = end;
    }
    json_decref(root);
    return last;
}

static void write_file(const char *name, const void *first, size_t n_first, const void *second,
                       size_t n_second, int64_t hole)
{
    char path[64];

    snprintf(path, sizeof path, "%s/%s", directory, name);
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, first, n_first) != (ssize_t)n_first ||
        write(fd, second, n_second) != (ssize_t)n_second ||
        ftruncate(fd, (off_t)(n_first + n_second) + hole) != 0)
        abort();
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static int opened;
    struct model_config base = {.hidden_size = 8,
                                .mlp_size = 12,
                                .n_layers = 2,
                                .n_heads = 2,
                                .n_kv_heads = 1,
                                .head_dim = 4,
                                .vocab_size = 10};
    const uint8_t *nul = memchr(data, 0, bytes);
    const size_t n_config = nul ? (size_t)(nul - data) : bytes;
    const char *header = (const char *)data + n_config + (nul != NULL);
    const size_t n_header = bytes - n_config - (nul != NULL);
    unsigned char length[8];

    if (!opened) {
        if (!mkdtemp(directory)) abort();
        atexit(clean_up);
        opened = 1;
    }
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)n_header >> 8 * i);
    write_file("adapter_config.json", data, n_config, NULL, 0, 0);
    write_file("adapter_model.safetensors", length, 8, header, n_header,
               data_bytes(header, n_header));

    for (int i = 0; i < 3; i++) {
        struct adapter_plan plan;
        const mlora_status status = adapter_plan_read(&plan, directory, i ? &base : NULL, i == 2);
        if (status == MLORA_OK ? plan.bytes <= 0 : *error_text() == '\0') abort();
        adapter_plan_free(&plan);
    }
    return 0;
}
