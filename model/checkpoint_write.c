/* The tensors are listed first, under the names that transformers gives them; a header follows from
 * the list, and then the data in the same order, read from the device in pieces. */
#include "model/checkpoint_write.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"

enum {
    NAME_BYTES = 96,
    TENSORS_OF_LAYER = 18, /* 7 weights, 7 biases, 4 norms */
    TENSORS_OF_MODEL = 3,
    HEADER_ALIGNMENT = 8,
    PIECE_ELEMENTS = 1 << 21,
};

static const int64_t shard_bytes_max = (int64_t)5 << 30;

/* A tensor to write: an array on the device [N, K], or [N] where it is a vector. */
struct item {
    char name[NAME_BYTES];
    struct matrix from;
    bool is_vector;
    enum dtype dtype; /* in the file */
    int shard;
};

struct writer {
    struct device *dev;
    const struct checkpoint *like;
    struct item *items;
    int n_items, n_shards;
    int64_t bytes; /* of all tensors */
    void *stored;  /* [PIECE_ELEMENTS] as on the device  */
    void *out;     /* [PIECE_ELEMENTS] as in the file    */
};

/* ---- files -------------------------------------------------------------------------------- */

static mlora_status write_all(int fd, const char *path, const void *data, size_t bytes)
{
    const char *at = data;

    while (bytes > 0) {
        const ssize_t n = write(fd, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return error_set(MLORA_EIO, "%s: cannot be written: %s", path, strerror(errno));
        at += n;
        bytes -= (size_t)n;
    }
    return MLORA_OK;
}

static mlora_status create(int *fd, const char *path)
{
    *fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (*fd < 0) return error_set(MLORA_EIO, "%s: cannot be created: %s", path, strerror(errno));
    return MLORA_OK;
}

/* A disk that is full may say so only now. */
static mlora_status finish(int fd, const char *path, mlora_status status)
{
    if (status == MLORA_OK && fsync(fd) != 0)
        status = error_set(MLORA_EIO, "%s: cannot be written: %s", path, strerror(errno));
    if (close(fd) != 0 && status == MLORA_OK)
        status = error_set(MLORA_EIO, "%s: cannot be written: %s", path, strerror(errno));
    return status;
}

mlora_status file_write_new(const char *path, const void *data, size_t bytes)
{
    int fd;

    const mlora_status status = create(&fd, path);
    if (status != MLORA_OK) return status;
    return finish(fd, path, write_all(fd, path, data, bytes));
}

/* ---- the list ----------------------------------------------------------------------------- */

static int64_t item_bytes(const struct item *item)
{
    return (int64_t)item->from.N * item->from.K * (int64_t)dtype_bytes(item->dtype);
}

/* Names in the checkpoint may lack "model."; those that are written have it. */
__attribute__((format(printf, 4, 5))) static mlora_status
add(struct writer *writer, struct matrix from, bool is_vector, const char *format, ...)
{
    struct item *item = &writer->items[writer->n_items];
    const struct safetensors *file;
    va_list args;

    if (!from.data) return MLORA_OK;
    *item = (struct item){.from = from, .is_vector = is_vector};
    va_start(args, format);
    vsnprintf(item->name, sizeof item->name, format, args);
    va_end(args);

    const bool inside = strncmp(item->name, "model.", 6) == 0;
    const struct tensor *tensor = checkpoint_find(writer->like, item->name, &file);
    if (!tensor && inside) tensor = checkpoint_find(writer->like, item->name + 6, &file);
    item->dtype = writer->items[0].dtype;
    if (tensor) {
        const mlora_status status = tensor_dtype(&item->dtype, file, tensor);
        if (status != MLORA_OK) return status;
    }
    writer->n_items++;
    return MLORA_OK;
}

static struct matrix vector(const float *data, int N)
{
    return (struct matrix){data, DTYPE_F32, N, 1};
}

static mlora_status list_layer(struct writer *writer, const struct weights *weights,
                               const struct model_config *config, int layer)
{
    const struct layer_weights *w = &weights->layers[layer];
    const int D = config->hidden_size, d = config->head_dim;
    const struct {
        const char *name;
        struct matrix from;
    } norms[] = {{"input_layernorm", vector(w->attention_norm, D)},
                 {"self_attn.q_norm", vector(w->q_norm, d)},
                 {"self_attn.k_norm", vector(w->k_norm, d)},
                 {"post_attention_layernorm", vector(w->mlp_norm, D)}};
    mlora_status status = MLORA_OK;

    for (int i = 0; i < LORA_LINEARS && status == MLORA_OK; i++) {
        const enum lora_linear linear = (enum lora_linear)i;
        const float *bias;
        const struct matrix matrix = weights_linear(weights, config, layer, linear, &bias);
        const struct matrix bias_vector = vector(bias, matrix.N);
        status =
            add(writer, matrix, false, "model.layers.%d.%s.weight", layer, linear_name(linear));
        if (status == MLORA_OK)
            status = add(writer, bias_vector, true, "model.layers.%d.%s.bias", layer,
                         linear_name(linear));
    }
    for (size_t i = 0; i < sizeof norms / sizeof *norms && status == MLORA_OK; i++)
        status =
            add(writer, norms[i].from, true, "model.layers.%d.%s.weight", layer, norms[i].name);
    return status;
}

static mlora_status list_items(struct writer *writer, const struct weights *weights,
                               const struct model_config *config)
{
    const bool tied = weights->head.data == weights->embedding.data;
    int64_t in_shard = 0;

    mlora_status status = add(writer, weights->embedding, false, "model.embed_tokens.weight");
    for (int l = 0; l < weights->n_layers && status == MLORA_OK; l++)
        status = list_layer(writer, weights, config, l);
    if (status == MLORA_OK)
        status = add(writer, vector(weights->final_norm, config->hidden_size), true,
                     "model.norm.weight");
    if (status == MLORA_OK && !tied) status = add(writer, weights->head, false, "lm_head.weight");

    for (int i = 0; i < writer->n_items; i++) {
        const int64_t bytes = item_bytes(&writer->items[i]);
        if (in_shard > 0 && in_shard + bytes > shard_bytes_max) {
            writer->n_shards++;
            in_shard = 0;
        }
        writer->items[i].shard = writer->n_shards;
        in_shard += bytes;
        writer->bytes += bytes;
    }
    writer->n_shards++;
    return status;
}

/* ---- a shard ------------------------------------------------------------------------------ */

static void shard_name(char *out, size_t bytes, int shard, int n_shards)
{
    if (n_shards == 1)
        snprintf(out, bytes, "model.safetensors");
    else
        snprintf(out, bytes, "model-%05d-of-%05d.safetensors", shard + 1, n_shards);
}

/* Length and JSON, padded with blanks so that the data is aligned. */
static mlora_status write_header(const struct writer *writer, int fd, const char *path, int shard)
{
    static const char *const names[] = {
        [DTYPE_F32] = "F32", [DTYPE_F16] = "F16", [DTYPE_BF16] = "BF16"};
    struct buffer header = {0};
    unsigned char length[8];
    int64_t at = 0;

    mlora_status status = buffer_printf(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < writer->n_items && status == MLORA_OK; i++) {
        const struct item *item = &writer->items[i];
        char columns[16] = "";
        if (item->shard != shard) continue;
        if (!item->is_vector) snprintf(columns, sizeof columns, ",%d", item->from.K);
        status = buffer_printf(
            &header,
            ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%d%s],\"data_offsets\":[%" PRId64 ",%" PRId64
            "]}",
            item->name, names[item->dtype], item->from.N, columns, at, at + item_bytes(item));
        at += item_bytes(item);
    }
    if (status == MLORA_OK) status = buffer_printf(&header, "}");
    while (status == MLORA_OK && header.bytes % HEADER_ALIGNMENT != 0)
        status = buffer_append(&header, " ", 1);
    for (size_t i = 0; i < sizeof length; i++)
        length[i] = (unsigned char)((uint64_t)header.bytes >> (8 * i));
    if (status == MLORA_OK) status = write_all(fd, path, length, sizeof length);
    if (status == MLORA_OK) status = write_all(fd, path, header.data, header.bytes);
    buffer_free(&header);
    return status;
}

/* out [n] = the stored values, rounded to nearest where the type in the file is narrower. */
static void convert(void *out, enum dtype to, const void *in, enum dtype from, size_t n)
{
    for (size_t i = 0; i < n; i++) dtype_store(out, to, i, dtype_load(in, from, i));
}

static mlora_status write_item(const struct writer *writer, const struct item *item, int fd,
                               const char *path)
{
    const size_t n = (size_t)item->from.N * (size_t)item->from.K;
    const size_t element = dtype_bytes(item->from.dtype);

    for (size_t at = 0; at < n; at += PIECE_ELEMENTS) {
        const size_t count = n - at < PIECE_ELEMENTS ? n - at : PIECE_ELEMENTS;
        writer->dev->ops->download(writer->dev, writer->stored,
                                   (const char *)item->from.data + at * element, count * element);
        mlora_status status = writer->dev->ops->sync(writer->dev);
        if (status != MLORA_OK) return status;
        convert(writer->out, item->dtype, writer->stored, item->from.dtype, count);
        status = write_all(fd, path, writer->out, count * dtype_bytes(item->dtype));
        if (status != MLORA_OK) return status;
    }
    return MLORA_OK;
}

static mlora_status write_shard(const struct writer *writer, const char *directory, int shard)
{
    char name[64];
    int fd;

    shard_name(name, sizeof name, shard, writer->n_shards);
    char *path = path_join(directory, name);
    if (!path) return error_set(MLORA_ENOMEM, "%s: out of memory for a path", directory);
    mlora_status status = create(&fd, path);
    if (status == MLORA_OK) {
        status = write_header(writer, fd, path, shard);
        for (int i = 0; i < writer->n_items && status == MLORA_OK; i++)
            if (writer->items[i].shard == shard)
                status = write_item(writer, &writer->items[i], fd, path);
        status = finish(fd, path, status);
    }
    free(path);
    return status;
}

static mlora_status write_index(const struct writer *writer, const char *directory)
{
    json_t *map = json_object();
    bool failed = !map;

    for (int i = 0; i < writer->n_items; i++) {
        char name[64];
        shard_name(name, sizeof name, writer->items[i].shard, writer->n_shards);
        failed |= json_object_set_new(map, writer->items[i].name, json_string(name)) != 0;
    }
    json_t *index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)writer->bytes,
                              "weight_map", map);
    char *text = index && !failed ? json_dumps(index, JSON_INDENT(2)) : NULL;
    char *path = path_join(directory, "model.safetensors.index.json");
    const mlora_status status =
        text && path ? file_write_new(path, text, strlen(text))
                     : error_set(MLORA_ENOMEM, "%s: out of memory for the index", directory);
    json_decref(index);
    free(path);
    free(text);
    return status;
}

mlora_status checkpoint_write(const char *directory, struct device *dev,
                              const struct weights *weights, const struct model_config *config,
                              const struct checkpoint *like)
{
    struct writer writer = {.dev = dev, .like = like};
    const size_t n = (size_t)weights->n_layers * TENSORS_OF_LAYER + TENSORS_OF_MODEL + 1;
    mlora_status status = MLORA_OK;

    writer.items = calloc(n, sizeof *writer.items);
    writer.stored = malloc(PIECE_ELEMENTS * sizeof(float));
    writer.out = malloc(PIECE_ELEMENTS * sizeof(float));
    if (!writer.items || !writer.stored || !writer.out)
        status = error_set(MLORA_ENOMEM, "%s: out of memory for writing weights", directory);
    if (status == MLORA_OK) status = list_items(&writer, weights, config);
    for (int s = 0; s < writer.n_shards && status == MLORA_OK; s++)
        status = write_shard(&writer, directory, s);
    if (status == MLORA_OK && writer.n_shards > 1) status = write_index(&writer, directory);
    free(writer.items);
    free(writer.stored);
    free(writer.out);
    return status;
}
