/* The safetensors files of a model directory as one: model.safetensors, or the shards that an
 * index names. An index is a file from outside: its names may not lead out of the directory. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"
#include "model/safetensors.h"

enum { SHARDS_MAX = 4096, CHECKPOINT_TENSORS_MAX = 1000000, INDEX_BYTES_MAX = 100000000 };

static const char single_name[] = "model.safetensors";
static const char index_name[] = "model.safetensors.index.json";

/* Open `directory`/`name` as the next file of the checkpoint, in which there is room for it. */
static mlora_status open_shard(struct checkpoint *checkpoint, const char *directory,
                               const char *name)
{
    char *path = path_join(directory, name);
    if (!path) return error_set(MLORA_ENOMEM, "%s: out of memory for a path", directory);

    struct safetensors *file = &checkpoint->files[checkpoint->n_files];
    const mlora_status status = safetensors_open(file, path);
    free(path);
    if (status != MLORA_OK) return status;
    checkpoint->n_files++;
    for (int i = 0; i < file->n_tensors; i++) checkpoint->bytes += file->tensors[i].bytes;
    return MLORA_OK;
}

/* ---- the index ---------------------------------------------------------------------------- */

static mlora_status check_shard_name(const char *tensor, const json_t *value, const char *path)
{
    const char *name = json_string_value(value);

    if (!name)
        return error_set(MLORA_EFORMAT, "%s: weight_map: %.200s is %s, a file name is needed", path,
                         tensor, json_kind(value));
    if (name[0] == '\0' || strchr(name, '/') || strchr(name, '\\') || strcmp(name, ".") == 0 ||
        strcmp(name, "..") == 0)
        return error_set(MLORA_EFORMAT,
                         "%s: weight_map: %.200s is in \"%.200s\", needed is the bare name of a "
                         "file beside the index; do not trust this model",
                         path, tensor, name);
    const size_t n = strlen(name), suffix = strlen(".safetensors");
    if (n > 255 || n <= suffix || strcmp(name + n - suffix, ".safetensors") != 0)
        return error_set(MLORA_EFORMAT,
                         "%s: weight_map: %.200s is in \"%.200s\", needed is a name of at most 255 "
                         "bytes that ends in .safetensors",
                         path, tensor, name);
    return MLORA_OK;
}

/* Give every shard a number: `numbers` maps file names to integers from 0, in order of mention. */
static mlora_status number_shards(json_t *numbers, json_t *map, const char *path)
{
    for (void *it = json_object_iter(map); it; it = json_object_iter_next(map, it)) {
        const json_t *value = json_object_iter_value(it);
        const mlora_status status = check_shard_name(json_object_iter_key(it), value, path);
        if (status != MLORA_OK) return status;

        const char *name = json_string_value(value);
        if (json_object_get(numbers, name)) continue;
        const size_t n = json_object_size(numbers);
        if (n == SHARDS_MAX)
            return error_set(MLORA_EFORMAT,
                             "%s: weight_map names more than the %d files that are "
                             "read",
                             path, SHARDS_MAX);
        if (json_object_set_new(numbers, name, json_integer((json_int_t)n)) != 0)
            return error_set(MLORA_ENOMEM, "%s: out of memory for file names", path);
    }
    return MLORA_OK;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* A name in two shards would leave open which one is meant. */
static mlora_status check_unique(const struct checkpoint *checkpoint, const char *path)
{
    size_t n = 0;

    for (int f = 0; f < checkpoint->n_files; f++) n += (size_t)checkpoint->files[f].n_tensors;
    if (n > CHECKPOINT_TENSORS_MAX)
        return error_set(MLORA_EFORMAT, "%s: its files have %zu tensors, at most %d are read", path,
                         n, CHECKPOINT_TENSORS_MAX);
    char **names = malloc((n + 1) * sizeof *names);
    if (!names) return error_set(MLORA_ENOMEM, "%s: out of memory for %zu names", path, n);

    n = 0;
    for (int f = 0; f < checkpoint->n_files; f++)
        for (int i = 0; i < checkpoint->files[f].n_tensors; i++)
            names[n++] = checkpoint->files[f].tensors[i].name;
    qsort(names, n, sizeof *names, compare_strings);

    mlora_status status = MLORA_OK;
    for (size_t i = 1; i < n && status == MLORA_OK; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            status = error_set(MLORA_EFORMAT,
                               "%s: tensor %.200s is in two of the files it names; "
                               "remove the one that is stale",
                               path, names[i]);
    free(names);
    return status;
}

static mlora_status open_index(struct checkpoint *checkpoint, const char *directory,
                               const char *path)
{
    json_t *root = NULL;
    json_t *numbers = json_object();

    mlora_status status = json_read_file(&root, path, INDEX_BYTES_MAX);
    if (status != MLORA_OK) goto done;
    json_t *map = json_object_get(root, "weight_map");
    if (!json_is_object(map) || json_object_size(map) == 0) {
        status = error_set(MLORA_EFORMAT,
                           "%s: weight_map is %s, an object of tensor names and "
                           "their files is needed",
                           path, json_is_object(map) ? "empty" : json_kind(map));
        goto done;
    }
    status = number_shards(numbers, map, path);
    if (status != MLORA_OK) goto done;

    checkpoint->files = calloc(json_object_size(numbers), sizeof *checkpoint->files);
    if (!checkpoint->files) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory for the list of files", path);
        goto done;
    }
    for (void *it = json_object_iter(numbers); it; it = json_object_iter_next(numbers, it)) {
        status = open_shard(checkpoint, directory, json_object_iter_key(it));
        if (status != MLORA_OK) {
            status = error_prefix(status, "%s names it", path);
            goto done;
        }
    }

    for (void *it = json_object_iter(map); it; it = json_object_iter_next(map, it)) {
        const char *name = json_string_value(json_object_iter_value(it));
        const json_int_t number = json_integer_value(json_object_get(numbers, name));
        if (safetensors_find(&checkpoint->files[number], json_object_iter_key(it))) continue;
        status = error_set(MLORA_EFORMAT,
                           "%s: weight_map says that tensor %.200s is in %s, but it "
                           "is not; download both again",
                           path, json_object_iter_key(it), name);
        goto done;
    }
    status = check_unique(checkpoint, path);

done:
    json_decref(numbers);
    json_decref(root);
    return status;
}

/* ---- the directory ------------------------------------------------------------------------ */

static int holds(const char *directory, const char *name)
{
    char *path = path_join(directory, name);
    const int found = path && file_exists(path);
    free(path);
    return found;
}

/* Why there is nothing to open. */
static mlora_status no_weights(const char *directory)
{
    static const char *const pickles[] = {"pytorch_model.bin", "pytorch_model.bin.index.json",
                                          "consolidated.00.pth", "model.pth"};

    for (size_t i = 0; i < sizeof pickles / sizeof pickles[0]; i++)
        if (holds(directory, pickles[i]))
            return error_set(MLORA_EUNSUPPORTED,
                             "%s: has only %s, a Python pickle, which can run code and is never "
                             "read; convert it to safetensors: in transformers, load the model and "
                             "call save_pretrained(dir, safe_serialization=True)",
                             directory, pickles[i]);
    return error_set(MLORA_EIO,
                     "%s: has neither %s nor %s; is this a model in Hugging Face format?",
                     directory, single_name, index_name);
}

mlora_status checkpoint_open(struct checkpoint *out, const char *directory)
{
    struct checkpoint checkpoint = {0};
    mlora_status status;

    *out = checkpoint;
    if (!file_is_directory(directory))
        return error_set(MLORA_EIO, "%s: is not a directory; a model directory is needed",
                         directory);
    if (holds(directory, single_name)) { /* it wins over an index, as in transformers */
        checkpoint.files = calloc(1, sizeof *checkpoint.files);
        status = checkpoint.files ? open_shard(&checkpoint, directory, single_name)
                                  : error_set(MLORA_ENOMEM, "%s: out of memory", directory);
    } else if (holds(directory, index_name)) {
        char *path = path_join(directory, index_name);
        status = path ? open_index(&checkpoint, directory, path)
                      : error_set(MLORA_ENOMEM, "%s: out of memory for a path", directory);
        free(path);
    } else {
        return no_weights(directory);
    }
    if (status != MLORA_OK) checkpoint_close(&checkpoint);
    *out = checkpoint;
    return status;
}

void checkpoint_close(struct checkpoint *checkpoint)
{
    for (int i = 0; i < checkpoint->n_files; i++) safetensors_close(&checkpoint->files[i]);
    free(checkpoint->files);
    *checkpoint = (struct checkpoint){0};
}

const struct tensor *checkpoint_find(const struct checkpoint *checkpoint, const char *name,
                                     const struct safetensors **file)
{
    for (int i = 0; i < checkpoint->n_files; i++) {
        const struct tensor *tensor = safetensors_find(&checkpoint->files[i], name);
        if (!tensor) continue;
        *file = &checkpoint->files[i];
        return tensor;
    }
    return NULL;
}
