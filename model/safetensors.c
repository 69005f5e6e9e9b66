/* A safetensors file is: u64 little-endian n | n bytes of JSON | data. The JSON maps each tensor's
 * name to its dtype, shape and byte range within the data. The checks are those of the reference
 * reader, in its order, and a few limits of our own. What passes has every byte of the file in
 * exactly one place: there is no room for anything hidden. */
#include "model/safetensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "engine/base/json.h"

enum {
    HEADER_BYTES_MAX =
        16 << 20, /* the largest checkpoints need a tenth; the format allows 100 MB */
    TENSORS_MAX = 1000000,
    NAME_BYTES_MAX = 4096,
    LENGTH_BYTES = 8, /* of n */
};

/* clang-format off */
static const struct {
    const char *name;
    int bits;
} dtypes[] = {
    {"F32", 32},     {"BF16", 16},       {"F16", 16},        {"F64", 64},   {"BOOL", 8},
    {"U8", 8},       {"I8", 8},          {"U16", 16},        {"I16", 16},   {"U32", 32},
    {"I32", 32},     {"U64", 64},        {"I64", 64},        {"C64", 64},   {"F4", 4},
    {"F6_E2M3", 6},  {"F6_E3M2", 6},     {"F8_E5M2", 8},     {"F8_E4M3", 8}, {"F8_E8M0", 8},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
};
/* clang-format on */

/* Bits of an element; 0: the format has no such type. */
static int dtype_bits(const char *name)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(dtypes[i].name, name) == 0) return dtypes[i].bits;
    return 0;
}

/* ---- one tensor --------------------------------------------------------------------------- */

/* The bytes that dtype and shape ask for. */
static mlora_status tensor_size(int64_t *bytes, const struct tensor *tensor, const char *path)
{
    int64_t bits = 1;
    bool overflow = false;

    for (int i = 0; i < tensor->n_dims; i++)
        overflow |= __builtin_mul_overflow(bits, tensor->shape[i], &bits);
    overflow |= __builtin_mul_overflow(bits, (int64_t)dtype_bits(tensor->dtype), &bits);
    if (overflow)
        return error_set(MLORA_EFORMAT,
                         "%s: tensor %.200s: the product of its shape is more than 63 bits hold; "
                         "the header is damaged",
                         path, tensor->name);
    if (bits % 8 != 0)
        return error_set(MLORA_EFORMAT,
                         "%s: tensor %.200s: its shape and dtype %s make %" PRId64
                         " bits, which is not a whole number of bytes",
                         path, tensor->name, tensor->dtype, bits);
    *bytes = bits / 8;
    return MLORA_OK;
}

static mlora_status parse_shape(struct tensor *tensor, const json_t *shape, const char *path)
{
    if (!json_is_array(shape))
        return error_set(MLORA_EFORMAT, "%s: tensor %.200s: shape is %s, an array is needed", path,
                         tensor->name, json_kind(shape));
    if (json_array_size(shape) > TENSOR_RANK_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: tensor %.200s: shape has %zu dimensions, at most %d are read", path,
                         tensor->name, json_array_size(shape), TENSOR_RANK_MAX);
    tensor->n_dims = (int)json_array_size(shape);
    for (int i = 0; i < tensor->n_dims; i++) {
        const json_t *n = json_array_get(shape, (size_t)i);
        if (!json_is_integer(n) || json_integer_value(n) < 0)
            return error_set(MLORA_EFORMAT,
                             "%s: tensor %.200s: shape[%d] is %s, an integer of 0 or more is "
                             "needed",
                             path, tensor->name, i, json_is_integer(n) ? "negative" : json_kind(n));
        tensor->shape[i] = json_integer_value(n);
    }
    return MLORA_OK;
}

/* The byte range is stored as it is in the file: relative to the start of the data. */
static mlora_status parse_offsets(struct tensor *tensor, const json_t *offsets, const char *path)
{
    const json_t *begin = json_array_get(offsets, 0);
    const json_t *end = json_array_get(offsets, 1);

    if (!json_is_array(offsets) || json_array_size(offsets) != 2 || !json_is_integer(begin) ||
        !json_is_integer(end) || json_integer_value(begin) < 0 || json_integer_value(end) < 0)
        return error_set(MLORA_EFORMAT,
                         "%s: tensor %.200s: data_offsets is %s, an array of two integers of 0 or "
                         "more is needed",
                         path, tensor->name,
                         json_is_array(offsets) ? "an array of other values" : json_kind(offsets));
    tensor->offset = json_integer_value(begin);
    if (__builtin_sub_overflow(json_integer_value(end), tensor->offset, &tensor->bytes) ||
        tensor->bytes < 0)
        return error_set(MLORA_EFORMAT,
                         "%s: tensor %.200s: data_offsets end at %lld, before their begin at "
                         "%" PRId64,
                         path, tensor->name, (long long)json_integer_value(end), tensor->offset);
    return MLORA_OK;
}

static mlora_status parse_tensor(struct tensor *tensor, const char *name, const json_t *info,
                                 const char *path)
{
    const size_t name_bytes = strlen(name);
    const char *dtype = NULL;

    if (name_bytes > NAME_BYTES_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: the name of tensor %.80s... is %zu bytes, at most %d are read", path,
                         name, name_bytes, NAME_BYTES_MAX);
    tensor->name = strdup(name);
    if (!tensor->name) return error_set(MLORA_ENOMEM, "%s: out of memory for tensor names", path);
    if (!json_is_object(info))
        return error_set(MLORA_EFORMAT, "%s: tensor %.200s is %s, an object is needed", path, name,
                         json_kind(info));

    const json_t *type = json_object_get(info, "dtype");
    dtype = json_string_value(type);
    if (!dtype)
        return error_set(MLORA_EFORMAT, "%s: tensor %.200s: dtype is %s, a string is needed", path,
                         name, json_kind(type));
    if (!dtype_bits(dtype))
        return error_set(MLORA_EFORMAT,
                         "%s: tensor %.200s: dtype \"%.40s\" is not a type of the safetensors "
                         "format (F32, F16, BF16, ...)",
                         path, name, dtype);
    strcpy(tensor->dtype, dtype); /* fits: all names of the table do */

    mlora_status status = parse_shape(tensor, json_object_get(info, "shape"), path);
    if (status != MLORA_OK) return status;
    return parse_offsets(tensor, json_object_get(info, "data_offsets"), path);
}

/* ---- the header --------------------------------------------------------------------------- */

static int compare_offsets(const void *a, const void *b)
{
    const struct tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? -1 : 1;
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct tensor *)a)->name, ((const struct tensor *)b)->name);
}

/* Tensors must follow one another from the first byte of the data to the last of the file. */
static mlora_status check_layout(struct tensor *tensors, int n_tensors, int64_t data_bytes,
                                 const char *path)
{
    int64_t end = 0;

    qsort(tensors, (size_t)n_tensors, sizeof *tensors, compare_offsets);
    for (int i = 0; i < n_tensors; i++) {
        const struct tensor *tensor = &tensors[i];
        int64_t bytes = 0;

        if (tensor->offset != end)
            return error_set(MLORA_EFORMAT,
                             "%s: tensor %.200s: data_offsets begin at %" PRId64 ", but the tensor "
                             "before it ends at %" PRId64 ": tensors may not %s; the file is "
                             "damaged",
                             path, tensor->name, tensor->offset, end,
                             tensor->offset < end ? "overlap" : "leave holes");
        mlora_status status = tensor_size(&bytes, tensor, path);
        if (status != MLORA_OK) return status;
        if (bytes != tensor->bytes)
            return error_set(MLORA_EFORMAT,
                             "%s: tensor %.200s: data_offsets span %" PRId64 " bytes, its shape "
                             "and dtype %s need %" PRId64,
                             path, tensor->name, tensor->bytes, tensor->dtype, bytes);
        end += bytes; /* no overflow: offset + bytes came from one integer */
    }
    if (end > data_bytes)
        return error_set(MLORA_EFORMAT,
                         "%s: is truncated: its tensors need %" PRId64 " bytes of data, the file "
                         "has %" PRId64 "; download it again",
                         path, end, data_bytes);
    if (end < data_bytes)
        return error_set(MLORA_EFORMAT,
                         "%s: has %" PRId64 " bytes after its last tensor, which the format does "
                         "not allow; download it again",
                         path, data_bytes - end);
    return MLORA_OK;
}

static mlora_status check_metadata(const json_t *metadata, const char *path)
{
    if (json_is_null(metadata)) return MLORA_OK;
    if (!json_is_object(metadata))
        return error_set(MLORA_EFORMAT, "%s: __metadata__ is %s, an object is needed", path,
                         json_kind(metadata));
    for (void *it = json_object_iter((json_t *)metadata); it;
         it = json_object_iter_next((json_t *)metadata, it))
        if (!json_is_string(json_object_iter_value(it)))
            return error_set(MLORA_EFORMAT, "%s: __metadata__: %.200s is %s, a string is needed",
                             path, json_object_iter_key(it), json_kind(json_object_iter_value(it)));
    return MLORA_OK;
}

mlora_status safetensors_parse(struct safetensors *out, const char *path, const char *header,
                               size_t header_bytes, int64_t file_bytes)
{
    struct safetensors file = {0};
    json_error_t error;
    json_t *root = NULL;
    mlora_status status = MLORA_OK;

    if (header_bytes == 0 || header[0] != '{') {
        status = error_set(MLORA_EFORMAT,
                           "%s: the header does not begin with '{': this is not a "
                           "safetensors file",
                           path);
        goto done;
    }
    root = json_loadb(header, header_bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) {
        status = json_error_code(&error) == json_error_out_of_memory ? MLORA_ENOMEM : MLORA_EFORMAT;
        status = error_set(status, "%s: the header is not valid JSON: at byte %d: %s", path,
                           error.position, error.text);
        goto done;
    }
    if (json_object_size(root) > TENSORS_MAX) {
        status = error_set(MLORA_EFORMAT, "%s: has %zu tensors, at most %d are read", path,
                           json_object_size(root), TENSORS_MAX);
        goto done;
    }
    file.tensors = calloc(json_object_size(root) + 1, sizeof *file.tensors);
    if (!file.tensors) {
        status = error_set(MLORA_ENOMEM, "%s: out of memory for %zu tensors", path,
                           json_object_size(root));
        goto done;
    }

    for (void *it = json_object_iter(root); it; it = json_object_iter_next(root, it)) {
        const char *name = json_object_iter_key(it);
        const json_t *value = json_object_iter_value(it);
        if (strcmp(name, "__metadata__") == 0)
            status = check_metadata(value, path);
        else
            status = parse_tensor(&file.tensors[file.n_tensors++], name, value, path);
        if (status != MLORA_OK) goto done;
    }

    const int64_t data_start = LENGTH_BYTES + (int64_t)header_bytes;
    status = check_layout(file.tensors, file.n_tensors, file_bytes - data_start, path);
    if (status != MLORA_OK) goto done;
    for (int i = 0; i < file.n_tensors; i++) file.tensors[i].offset += data_start;
    qsort(file.tensors, (size_t)file.n_tensors, sizeof *file.tensors, compare_names);

done:
    json_decref(root);
    if (status != MLORA_OK) safetensors_close(&file);
    *out = file;
    return status;
}

/* ---- the file ----------------------------------------------------------------------------- */

/* What people meet under the name of a safetensors file, told by its first bytes; else NULL. */
static const char *other_format(const unsigned char head[LENGTH_BYTES])
{
    /* A header of 640 bytes begins like a pickle, but then come the zeros of its length. */
    const bool is_length = (head[4] | head[5] | head[6] | head[7]) == 0;
    if (memcmp(head, "PK\003\004", 4) == 0 ||
        (head[0] == 0x80 && head[1] >= 2 && head[1] <= 5 && !is_length))
        return "a PyTorch pickle, which can run code and is never read; convert it with "
               "safetensors.torch.save_file";
    if (memcmp(head, "version ", 8) == 0)
        return "a Git LFS pointer, not the data; fetch the data with 'git lfs pull'";
    if (memcmp(head, "GGUF", 4) == 0) return "a GGUF file; get the model in safetensors format";
    if (memcmp(head, "<!DOCTYP", 8) == 0 || memcmp(head, "<html", 5) == 0)
        return "a web page; download the file again";
    return NULL;
}

/* Read n, check it, and read the n bytes after it. `*header` is freed by the caller. */
static mlora_status read_header(char **header, size_t *header_bytes, const struct file *file)
{
    unsigned char head[LENGTH_BYTES];
    uint64_t n = 0;

    if (file->bytes < LENGTH_BYTES)
        return error_set(MLORA_EFORMAT,
                         "%s: is %" PRId64 " bytes, a safetensors file has at least %d; download "
                         "it again",
                         file->path, file->bytes, LENGTH_BYTES);
    mlora_status status = file_read_at(file, head, sizeof head, 0);
    if (status != MLORA_OK) return status;
    if (other_format(head))
        return error_set(MLORA_EFORMAT, "%s: is not a safetensors file but %s", file->path,
                         other_format(head));

    for (int i = LENGTH_BYTES - 1; i >= 0; i--) n = n << 8 | head[i];
    if (n > HEADER_BYTES_MAX)
        return error_set(MLORA_EFORMAT,
                         "%s: the header's length is %" PRIu64 " bytes, at most %d are allowed: "
                         "this is not a safetensors file, or it is damaged",
                         file->path, n, HEADER_BYTES_MAX);
    if ((int64_t)n > file->bytes - LENGTH_BYTES)
        return error_set(MLORA_EFORMAT,
                         "%s: is truncated: the header needs %" PRIu64 " bytes, %" PRId64 " are "
                         "there; download it again",
                         file->path, n, file->bytes - LENGTH_BYTES);

    *header = malloc(n + 1);
    if (!*header)
        return error_set(MLORA_ENOMEM, "%s: out of memory: %" PRIu64 " bytes for the header",
                         file->path, n);
    *header_bytes = n;
    return file_read_at(file, *header, n, LENGTH_BYTES);
}

mlora_status safetensors_open(struct safetensors *out, const char *path)
{
    struct safetensors parsed = {0};
    struct file file = {0};
    char *header = NULL;
    size_t header_bytes = 0;

    *out = (struct safetensors){0};
    mlora_status status = file_open(&file, path);
    if (status != MLORA_OK) return status;
    status = read_header(&header, &header_bytes, &file);
    if (status != MLORA_OK) goto done;
    status = safetensors_parse(&parsed, path, header, header_bytes, file.bytes);
    if (status != MLORA_OK) goto done;

    parsed.file = file;
    file = (struct file){0};
    *out = parsed;

done:
    free(header);
    file_close(&file);
    return status;
}

void safetensors_close(struct safetensors *file)
{
    for (int i = 0; i < file->n_tensors; i++) free(file->tensors[i].name);
    free(file->tensors);
    file_close(&file->file);
    *file = (struct safetensors){0};
}

const struct tensor *safetensors_find(const struct safetensors *file, const char *name)
{
    const struct tensor key = {.name = (char *)name};

    if (file->n_tensors == 0) return NULL;
    return bsearch(&key, file->tensors, (size_t)file->n_tensors, sizeof key, compare_names);
}

mlora_status tensor_dtype(enum dtype *out, const struct safetensors *file,
                          const struct tensor *tensor)
{
    if (strcmp(tensor->dtype, "F32") == 0)
        *out = DTYPE_F32;
    else if (strcmp(tensor->dtype, "F16") == 0)
        *out = DTYPE_F16;
    else if (strcmp(tensor->dtype, "BF16") == 0)
        *out = DTYPE_BF16;
    else
        return error_set(MLORA_EUNSUPPORTED,
                         "%s: tensor %.200s: dtype is %s, served are F32, F16 and BF16; use a "
                         "checkpoint that is not quantised, or convert it to BF16",
                         file->file.path, tensor->name, tensor->dtype);
    return MLORA_OK;
}

mlora_status tensor_read(const struct safetensors *file, const struct tensor *tensor, void *out)
{
    return file_read_at(&file->file, out, (size_t)tensor->bytes, tensor->offset);
}
