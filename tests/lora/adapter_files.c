#include "tests/lora/adapter_files.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"

enum { TENSORS_MAX = 64 };

struct model_config small_model(void)
{
    return (struct model_config){.architecture = "LlamaForCausalLM",
                                 .hidden_size = 8,
                                 .mlp_size = 12,
                                 .n_layers = 2,
                                 .n_heads = 2,
                                 .n_kv_heads = 1,
                                 .head_dim = 4,
                                 .vocab_size = 10,
                                 .max_position = 64};
}

/* ---- directories -------------------------------------------------------------------------- */

char *directory_make(void)
{
    char *path = strdup("/tmp/mlora-adapter-XXXXXX");
    cr_assert_not_null(mkdtemp(path));
    return path;
}

void directory_remove(char *directory)
{
    DIR *files = opendir(directory);
    cr_assert_not_null(files);
    for (struct dirent *entry; (entry = readdir(files));) {
        char *path = path_join(directory, entry->d_name);
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            cr_assert_eq(unlink(path), 0);
        free(path);
    }
    closedir(files);
    cr_assert_eq(rmdir(directory), 0);
    free(directory);
}

void directory_write(const char *directory, const char *name, const void *data, size_t bytes)
{
    char *path = path_join(directory, name);
    FILE *file = fopen(path, "wb");

    cr_assert_not_null(file);
    cr_assert_eq(fwrite(data, 1, bytes, file), bytes);
    cr_assert_eq(fclose(file), 0);
    free(path);
}

void write_config(const char *directory, const char *changes)
{
    json_t *config = json_loads("{\"peft_type\": \"LORA\", \"task_type\": \"CAUSAL_LM\", "
                                "\"base_model_name_or_path\": \"org/small\", \"r\": 2, "
                                "\"lora_alpha\": 4, \"bias\": \"none\", "
                                "\"target_modules\": [\"q_proj\", \"v_proj\"]}",
                                0, NULL);
    json_error_t error = {.text = ""};
    json_t *over = json_loads(changes, JSON_REJECT_DUPLICATES, &error);

    cr_assert_not_null(over, "%s: %s", changes, error.text);
    cr_assert_eq(json_object_update(config, over), 0);
    char *text = json_dumps(config, JSON_INDENT(2));
    directory_write(directory, "adapter_config.json", text, strlen(text));
    free(text);
    json_decref(over);
    json_decref(config);
}

/* ---- tensors ------------------------------------------------------------------------------ */

struct entry {
    char name[256], dtype[12], shape[64]; /* shape as in the header: "2,8" */
    size_t bytes;
};

struct entries {
    struct entry list[TENSORS_MAX];
    int n;
};

static size_t element_bytes(const char *dtype)
{
    if (strcmp(dtype, "F64") == 0) return 8;
    if (strcmp(dtype, "F32") == 0) return 4;
    return dtype[0] == 'I' || strncmp(dtype, "F8", 2) == 0 ? 1 : 2;
}

static void expand_name(char out[256], const char *name)
{
    const char *at = strchr(name, '@');
    if (at)
        snprintf(out, 256, "%.*sbase_model.model.model.layers.%s", (int)(at - name), name, at + 1);
    else
        snprintf(out, 256, "%s", name);
}

static void leave_out(struct entries *entries, const char *name)
{
    int n = 0;
    for (int i = 0; i < entries->n; i++)
        if (strcmp(entries->list[i].name, name) != 0) entries->list[n++] = entries->list[i];
    entries->n = n;
}

/* "NAME DTYPE 2x8" */
static void add(struct entries *entries, const char *text)
{
    struct entry entry = {.bytes = 1};
    char name[256] = "", shape[64] = "", full[256];

    cr_assert_geq(sscanf(text, "%255s %11s %63s", name, entry.dtype, shape), 2, "%s", text);
    expand_name(full, name);
    snprintf(entry.name, sizeof entry.name, "%s", full);
    for (char *c = shape; *c; c++)
        if (*c == 'x') *c = ',';
    snprintf(entry.shape, sizeof entry.shape, "%s", shape);
    for (char *at = shape; *at; at += *at == ',') entry.bytes *= strtoul(at, &at, 10);
    entry.bytes *= element_bytes(entry.dtype);
    leave_out(entries, full);
    cr_assert_lt(entries->n, TENSORS_MAX);
    entries->list[entries->n++] = entry;
}

static void write_file(const char *directory, const char *header, const void *data, size_t bytes)
{
    struct buffer file = {0};
    const uint64_t n = strlen(header);

    for (int i = 0; i < 8; i++) {
        const unsigned char byte = (unsigned char)(n >> 8 * i);
        buffer_append(&file, &byte, 1);
    }
    buffer_append(&file, header, n);
    buffer_append(&file, data, bytes);
    directory_write(directory, "adapter_model.safetensors", file.data, file.bytes);
    buffer_free(&file);
}

void write_tensors(const char *directory, const char *edits)
{
    struct entries entries = {0};
    struct buffer header = {0};
    size_t end = 0;

    for (int layer = 0; layer < 2; layer++) {
        static const char *const plain[] = {
            "q_proj.lora_A.weight F32 2x8", "q_proj.lora_B.weight F32 8x2",
            "v_proj.lora_A.weight F32 2x8", "v_proj.lora_B.weight F32 4x2"};
        for (int i = 0; i < 4; i++) {
            char text[128];
            snprintf(text, sizeof text, "@%d.self_attn.%s", layer, plain[i]);
            add(&entries, text);
        }
    }
    char *copy = strdup(edits), *rest = NULL;
    for (char *edit = strtok_r(copy, ";", &rest); edit; edit = strtok_r(NULL, ";", &rest)) {
        char name[256];
        while (*edit == ' ') edit++;
        if (*edit == '-') {
            const int before = entries.n;
            expand_name(name, edit + 1);
            leave_out(&entries, name);
            cr_assert_lt(entries.n, before, "%s", edit);
        } else if (*edit) {
            add(&entries, edit);
        }
    }
    free(copy);

    buffer_printf(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < entries.n; i++) {
        const struct entry *entry = &entries.list[i];
        buffer_printf(&header,
                      ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                      entry->name, entry->dtype, entry->shape, end, end + entry->bytes);
        end += entry->bytes;
    }
    buffer_printf(&header, "}");
    void *zeroes = calloc(end + 1, 1);
    write_file(directory, header.data, zeroes, end);
    free(zeroes);
    buffer_free(&header);
}

void write_tensor_data(const char *directory, const struct tensor_data *tensors, int n)
{
    struct buffer header = {0}, data = {0};

    for (int i = 0; i < n; i++) {
        const size_t begin = data.bytes;
        char name[256];
        expand_name(name, tensors[i].name);
        buffer_append(&data, tensors[i].data,
                      (size_t)tensors[i].rows * (size_t)tensors[i].columns *
                          element_bytes(tensors[i].dtype));
        buffer_printf(&header,
                      "%c\"%s\":{\"dtype\":\"%s\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}",
                      i ? ',' : '{', name, tensors[i].dtype, tensors[i].rows, tensors[i].columns,
                      begin, data.bytes);
    }
    buffer_printf(&header, "}");
    write_file(directory, header.data, data.data, data.bytes);
    buffer_free(&header);
    buffer_free(&data);
}

/* ---- a device ----------------------------------------------------------------------------- */

static int n_allocations;
static bool allocations_fail;
static atomic_bool uploads_fail;

static mlora_status host_alloc(struct device *dev, size_t bytes, void **out)
{
    (void)dev;
    *out = NULL;
    if (allocations_fail) return error_set(MLORA_ENOMEM, "the device is full");
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!*out) return error_set(MLORA_ENOMEM, "out of memory");
    memset(*out, 0xff, bytes);
    n_allocations++;
    return MLORA_OK;
}

static void host_free(struct device *dev, void *memory)
{
    (void)dev;
    if (memory) n_allocations--;
    free(memory);
}

static void host_upload(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    memcpy(to, from, bytes);
}

static mlora_status host_sync(struct device *dev)
{
    (void)dev;
    return MLORA_OK;
}

static atomic_int n_uploads, n_to_meet, n_met;

static mlora_status host_upload_beside(struct device *dev, int lane, void *to, const void *from,
                                       size_t bytes)
{
    (void)dev;
    cr_assert(lane >= 0 && lane < UPLOAD_LANES);
    atomic_fetch_add(&n_uploads, 1);
    for (int ms = 0; ms < 5000 && n_met < n_to_meet; ms++) { /* the others may take a while */
        if (n_uploads >= n_to_meet) n_met = n_to_meet;
        usleep(1000);
    }
    atomic_fetch_sub(&n_uploads, 1);
    if (uploads_fail) return error_set(MLORA_EDEVICE, "no way to the device");
    memcpy(to, from, bytes);
    return MLORA_OK;
}

static void host_move(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    memmove(to, from, bytes);
}

struct device *host_device(void)
{
    static const struct kernels ops = {.alloc = host_alloc,
                                       .free = host_free,
                                       .upload = host_upload,
                                       .sync = host_sync,
                                       .upload_beside = host_upload_beside,
                                       .move = host_move};
    static struct device device = {.ops = &ops, .backend = "host"};

    allocations_fail = false;
    uploads_fail = false;
    return &device;
}

int host_device_allocations(void)
{
    return n_allocations;
}

void host_device_meet(int n)
{
    n_to_meet = n;
    n_met = 0;
}

bool host_device_met(void)
{
    return n_met == n_to_meet;
}

void host_device_fail_uploads(bool fail)
{
    uploads_fail = fail;
}

void host_device_fail(bool fail)
{
    allocations_fail = fail;
}
