/* The reader of safetensors files against whole and broken ones: most of the broken ones differ
 * from a good file in one place. */
#include "model/safetensors.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "tests/model/files.h"

TestSuite(safetensors, .init = directory_open, .fini = directory_close);

static mlora_status open_and_close(const char *path)
{
    struct safetensors file;
    const mlora_status status = safetensors_open(&file, path);
    if (status != MLORA_OK) {
        const struct safetensors zero = {0};
        cr_expect_eq(memcmp(&file, &zero, sizeof zero), 0, "what failed to open is zeroed");
    }
    safetensors_close(&file);
    return status;
}

/* ---- good files --------------------------------------------------------------------------- */

Test(safetensors, finds_tensors_by_name_and_reads_them)
{
    const float a[] = {1, 2, 3, 4, 5, 6}, b[] = {7, 8};
    struct builder builder = {0};
    struct safetensors file;
    float got[6];

    builder_add(&builder, "z", "F32", 2, 3, a);
    builder_add(&builder, "a", "BF16", 2, 0, b);
    const char *path = builder_write(&builder, "good.safetensors");
    cr_assert_eq(safetensors_open(&file, path), MLORA_OK, "%s", error_text());
    cr_expect_eq(file.n_tensors, 2);
    cr_expect_null(safetensors_find(&file, "b"));

    const struct tensor *z = safetensors_find(&file, "z");
    cr_assert_not_null(z);
    cr_expect_eq(z->n_dims, 2);
    cr_expect_eq(z->shape[0], 2);
    cr_expect_eq(z->shape[1], 3);
    cr_expect_eq(z->bytes, 24);
    cr_assert_eq(tensor_read(&file, z, got), MLORA_OK);
    cr_expect_arr_eq(got, a, sizeof a);

    enum dtype dtype;
    uint16_t bits[2];
    const struct tensor *other = safetensors_find(&file, "a");
    cr_assert_eq(tensor_dtype(&dtype, &file, other), MLORA_OK);
    cr_expect_eq(dtype, DTYPE_BF16);
    cr_assert_eq(tensor_read(&file, other, bits), MLORA_OK);
    cr_expect_eq(bf16_to_f32(bits[1]), 8.0f);
    safetensors_close(&file);
}

Test(safetensors, accepts_what_the_format_allows)
{
    static const struct {
        const char *what, *header;
        size_t data_bytes;
    } good[] = {
        {"no tensors", "{}", 0},
        {"padding", "{}      ", 0},
        {"metadata", "{'__metadata__':{'format':'pt'}}", 0},
        {"no metadata", "{'__metadata__':null}", 0},
        {"a scalar", "{'a':{'dtype':'F32','shape':[],'data_offsets':[0,4]}}", 4},
        {"an empty tensor", "{'a':{'dtype':'F32','shape':[0,7],'data_offsets':[0,0]}}", 0},
        {"an empty tensor before another",
         "{'b':{'dtype':'U8','shape':[1],'data_offsets':[0,1]},"
         "'a':{'dtype':'U8','shape':[0],'data_offsets':[0,0]}}",
         1},
        {"any order",
         "{'a':{'dtype':'U8','shape':[1],'data_offsets':[2,3]},"
         "'b':{'dtype':'U8','shape':[2],'data_offsets':[0,2]}}",
         3},
        {"unknown keys of a tensor",
         "{'a':{'dtype':'U8','shape':[1],'data_offsets':[0,1],'note':{'x':[1]}}}", 1},
        {"half bytes that add up", "{'a':{'dtype':'F4','shape':[2],'data_offsets':[0,1]}}", 1},
        {"six bits that add up", "{'a':{'dtype':'F6_E2M3','shape':[4],'data_offsets':[0,3]}}", 3},
        {"the longest type name", "{'a':{'dtype':'F8_E4M3FNUZ','shape':[3],'data_offsets':[0,3]}}",
         3},
        {"eight dimensions", "{'a':{'dtype':'U8','shape':[1,1,1,1,1,1,1,2],'data_offsets':[0,2]}}",
         2},
        {"the empty name", "{'':{'dtype':'U8','shape':[1],'data_offsets':[0,1]}}", 1},
    };

    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        const char *path =
            write_safetensors("x.safetensors", quoted(good[i].header), good[i].data_bytes);
        cr_expect_eq(open_and_close(path), MLORA_OK, "%s: %s", good[i].what, error_text());
    }
}

Test(safetensors, types_that_are_not_served_are_named)
{
    static const char *const types[] = {"F64", "BOOL", "U8",      "I8",      "I16",
                                        "U16", "I32",  "U32",     "I64",     "U64",
                                        "C64", "F4",   "F8_E4M3", "F8_E5M2", "F8_E8M0"};
    static const int bytes[] = {16, 2, 2, 2, 4, 4, 8, 8, 16, 16, 16, 1, 2, 2, 2};

    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        char header[128], says[64];
        struct safetensors file;
        enum dtype dtype;
        snprintf(header, sizeof header,
                 "{'w.weight':{'dtype':'%s','shape':[2],'data_offsets':[0,%d]}}", types[i],
                 bytes[i]);
        const char *path = write_safetensors("x.safetensors", quoted(header), (size_t)bytes[i]);
        cr_assert_eq(safetensors_open(&file, path), MLORA_OK, "%s", error_text());
        cr_expect_eq(tensor_dtype(&dtype, &file, &file.tensors[0]), MLORA_EUNSUPPORTED);
        snprintf(says, sizeof says, "w.weight: dtype is %s, served are F32, F16 and BF16",
                 types[i]);
        expect_text(types[i], path, says);
        safetensors_close(&file);
    }
}

/* ---- broken headers ----------------------------------------------------------------------- */

#define TENSOR(body) "{'w':{" body "}}"

/* clang-format off */
static const struct {
    const char *what, *header;
    size_t data_bytes;
    const char *says;
} bad_headers[] = {
    {"nothing", "", 0, "does not begin with '{'"},
    {"a space first", " {}", 0, "does not begin with '{'"},
    {"an array", "[]", 0, "does not begin with '{'"},
    {"a string", "'a'", 0, "does not begin with '{'"},
    {"a byte order mark", "\xef\xbb\xbf{}", 0, "does not begin with '{'"},
    {"an open brace only", "{", 0, "not valid JSON"},
    {"text after the end", "{} x", 0, "not valid JSON"},
    {"two objects", "{}{}", 0, "not valid JSON"},
    {"a comma too many", "{'a':1,}", 0, "not valid JSON"},
    {"a comment", "{/**/}", 0, "not valid JSON"},
    {"not UTF-8", "{'\xff\xfe':1}", 0, "not valid JSON"},
    {"cut UTF-8", "{'\xc3", 0, "not valid JSON"},
    {"an overlong UTF-8 form", "{'\xc0\xaf':1}", 0, "not valid JSON"},
    {"a lone surrogate", "{'\\ud800':1}", 0, "not valid JSON"},
    {"a NUL in a name", "{'a\\u0000b':1}", 0, "not valid JSON"},
    {"a control character in a name", "{'a\nb':1}", 0, "not valid JSON"},
    {"an integer beyond 64 bits", TENSOR("'dtype':'U8','shape':[99999999999999999999],'data_offsets':[0,1]"), 1, "not valid JSON"},
    {"an unsigned 64-bit integer", TENSOR("'dtype':'U8','shape':[18446744073709551615],'data_offsets':[0,1]"), 1, "not valid JSON"},
    {"NaN", TENSOR("'dtype':'U8','shape':[NaN],'data_offsets':[0,1]"), 1, "not valid JSON"},
    {"a number out of range", TENSOR("'dtype':'U8','shape':[1e999],'data_offsets':[0,1]"), 1, "not valid JSON"},
    {"a name twice", "{'w':{'dtype':'U8','shape':[1],'data_offsets':[0,1]},'w':{'dtype':'U8','shape':[1],'data_offsets':[1,2]}}", 2, "duplicate"},
    {"a key twice", TENSOR("'dtype':'U8','dtype':'U8','shape':[1],'data_offsets':[0,1]"), 1, "duplicate"},
    {"metadata twice", "{'__metadata__':{},'__metadata__':{}}", 0, "duplicate"},
    {"metadata that is a string", "{'__metadata__':'pt'}", 0, "__metadata__ is a string, an object is needed"},
    {"metadata of numbers", "{'__metadata__':{'n':1}}", 0, "__metadata__: n is an integer, a string is needed"},
    {"metadata of objects", "{'__metadata__':{'n':{}}}", 0, "__metadata__: n is an object, a string is needed"},
    {"a tensor that is a number", "{'w':1}", 0, "tensor w is an integer, an object is needed"},
    {"a tensor that is null", "{'w':null}", 0, "tensor w is null, an object is needed"},
    {"a tensor that is an array", "{'w':[]}", 0, "tensor w is an array, an object is needed"},
    {"an empty tensor object", TENSOR(""), 0, "tensor w: dtype is missing, a string is needed"},
    {"no dtype", TENSOR("'shape':[1],'data_offsets':[0,1]"), 1, "dtype is missing"},
    {"dtype a number", TENSOR("'dtype':1,'shape':[1],'data_offsets':[0,1]"), 1, "dtype is an integer"},
    {"an unknown dtype", TENSOR("'dtype':'F12','shape':[1],'data_offsets':[0,1]"), 1, "dtype \"F12\" is not a type of the safetensors format"},
    {"a dtype in small letters", TENSOR("'dtype':'bf16','shape':[1],'data_offsets':[0,2]"), 2, "dtype \"bf16\" is not a type"},
    {"an empty dtype", TENSOR("'dtype':'','shape':[1],'data_offsets':[0,1]"), 1, "dtype \"\" is not a type"},
    {"a long dtype", TENSOR("'dtype':'F32F32F32F32F32F32F32','shape':[1],'data_offsets':[0,1]"), 1, "is not a type"},
    {"no shape", TENSOR("'dtype':'U8','data_offsets':[0,1]"), 1, "shape is missing, an array is needed"},
    {"shape null", TENSOR("'dtype':'U8','shape':null,'data_offsets':[0,1]"), 1, "shape is null"},
    {"shape a number", TENSOR("'dtype':'U8','shape':1,'data_offsets':[0,1]"), 1, "shape is an integer, an array is needed"},
    {"a negative dimension", TENSOR("'dtype':'U8','shape':[-1],'data_offsets':[0,1]"), 1, "shape[0] is negative"},
    {"two negative dimensions", TENSOR("'dtype':'U8','shape':[-1,-1],'data_offsets':[0,1]"), 1, "shape[0] is negative"},
    {"a dimension with a fraction", TENSOR("'dtype':'U8','shape':[1.0],'data_offsets':[0,1]"), 1, "shape[0] is a number with a fraction"},
    {"a dimension as text", TENSOR("'dtype':'U8','shape':[1,'1'],'data_offsets':[0,1]"), 1, "shape[1] is a string"},
    {"a dimension null", TENSOR("'dtype':'U8','shape':[null],'data_offsets':[0,1]"), 1, "shape[0] is null"},
    {"nine dimensions", TENSOR("'dtype':'U8','shape':[1,1,1,1,1,1,1,1,1],'data_offsets':[0,1]"), 1, "shape has 9 dimensions, at most 8 are read"},
    {"a product that overflows", TENSOR("'dtype':'U8','shape':[4294967296,4294967296],'data_offsets':[0,1]"), 1, "product of its shape"},
    {"a product that overflows to 1", TENSOR("'dtype':'U8','shape':[6700417,641,4294967297,3],'data_offsets':[0,1]"), 1, "product of its shape"},
    {"bits that overflow", TENSOR("'dtype':'F32','shape':[1152921504606846976],'data_offsets':[0,0]"), 0, "product of its shape"},
    {"half a byte", TENSOR("'dtype':'F4','shape':[3],'data_offsets':[0,2]"), 2, "12 bits, which is not a whole number of bytes"},
    {"six bits", TENSOR("'dtype':'F6_E3M2','shape':[1],'data_offsets':[0,1]"), 1, "6 bits"},
    {"no offsets", TENSOR("'dtype':'U8','shape':[1]"), 1, "data_offsets is missing, an array of two integers"},
    {"offsets null", TENSOR("'dtype':'U8','shape':[1],'data_offsets':null"), 1, "data_offsets is null"},
    {"one offset", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[0]"), 1, "data_offsets is an array of other values"},
    {"three offsets", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[0,1,2]"), 1, "data_offsets is an array of other values"},
    {"offsets with a fraction", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[0,1.0]"), 1, "data_offsets is an array of other values"},
    {"a negative begin", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[-1,0]"), 1, "data_offsets is an array of other values"},
    {"a negative end", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[0,-1]"), 1, "data_offsets is an array of other values"},
    {"an end before the begin", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[1,0]"), 1, "end at 0, before their begin at 1"},
    {"a hole at the start", TENSOR("'dtype':'U8','shape':[1],'data_offsets':[1,2]"), 2, "leave holes"},
    {"a hole in the middle", "{'a':{'dtype':'U8','shape':[1],'data_offsets':[0,1]},'w':{'dtype':'U8','shape':[1],'data_offsets':[2,3]}}", 3, "tensor w: data_offsets begin at 2, but the tensor before it ends at 1"},
    {"an overlap", "{'a':{'dtype':'U8','shape':[2],'data_offsets':[0,2]},'w':{'dtype':'U8','shape':[2],'data_offsets':[1,3]}}", 3, "overlap"},
    {"the same bytes twice", "{'a':{'dtype':'U8','shape':[2],'data_offsets':[0,2]},'w':{'dtype':'U8','shape':[2],'data_offsets':[0,2]}}", 2, "overlap"},
    {"an empty tensor inside another", "{'a':{'dtype':'U8','shape':[2],'data_offsets':[0,2]},'w':{'dtype':'U8','shape':[0],'data_offsets':[1,1]}}", 2, "overlap"},
    {"too few bytes for the shape", TENSOR("'dtype':'F32','shape':[2],'data_offsets':[0,4]"), 4, "data_offsets span 4 bytes, its shape and dtype F32 need 8"},
    {"too many bytes for the shape", TENSOR("'dtype':'BF16','shape':[2],'data_offsets':[0,8]"), 8, "span 8 bytes, its shape and dtype BF16 need 4"},
    {"bytes for an empty shape", TENSOR("'dtype':'U8','shape':[0],'data_offsets':[0,1]"), 1, "span 1 bytes, its shape and dtype U8 need 0"},
    {"no bytes for a scalar", TENSOR("'dtype':'U8','shape':[],'data_offsets':[0,0]"), 0, "span 0 bytes, its shape and dtype U8 need 1"},
    {"data missing", TENSOR("'dtype':'U8','shape':[4],'data_offsets':[0,4]"), 3, "is truncated: its tensors need 4 bytes of data, the file has 3"},
    {"no data", TENSOR("'dtype':'U8','shape':[4],'data_offsets':[0,4]"), 0, "is truncated"},
    {"petabytes", TENSOR("'dtype':'U8','shape':[1152921504606846975],'data_offsets':[0,1152921504606846975]"), 8, "is truncated"},
    {"data after the end", TENSOR("'dtype':'U8','shape':[4],'data_offsets':[0,4]"), 5, "1 bytes after its last tensor"},
    {"data without tensors", "{}", 1, "1 bytes after its last tensor"},
};
/* clang-format on */

Test(safetensors, every_broken_header_is_refused_with_its_reason)
{
    for (size_t i = 0; i < sizeof bad_headers / sizeof bad_headers[0]; i++) {
        const char *path = write_safetensors("broken.safetensors", quoted(bad_headers[i].header),
                                             bad_headers[i].data_bytes);
        cr_expect_eq(open_and_close(path), MLORA_EFORMAT, "%s", bad_headers[i].what);
        expect_text(bad_headers[i].what, path, bad_headers[i].says);
    }
}

Test(safetensors, a_header_nested_too_deep_is_refused)
{
    struct buffer header = {0};
    buffer_append(&header, "{\"a\":", 5);
    for (int i = 0; i < 100000; i++) buffer_append(&header, "[", 1);
    const char *path = write_safetensors("deep.safetensors", header.data, 0);
    cr_expect_eq(open_and_close(path), MLORA_EFORMAT);
    expect_text("deep", path, "maximum parsing depth");
    buffer_free(&header);
}

Test(safetensors, a_name_too_long_is_refused)
{
    struct buffer header = {0};
    buffer_append(&header, "{\"", 2);
    for (int i = 0; i < 4097; i++) buffer_append(&header, "n", 1);
    buffer_printf(&header, "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
    const char *path = write_safetensors("long.safetensors", header.data, 1);
    cr_expect_eq(open_and_close(path), MLORA_EFORMAT);
    expect_text("long", path, "is 4097 bytes, at most 4096");
    buffer_free(&header);
}

/* ---- broken files ------------------------------------------------------------------------- */

Test(safetensors, every_broken_file_is_refused_with_its_reason)
{
    /* clang-format off */
    static const struct {
        const char *what;
        const char *bytes;
        size_t n;
        const char *says;
    } bad[] = {
        {"empty", "", 0, "is 0 bytes, a safetensors file has at least 8"},
        {"seven bytes", "\1\0\0\0\0\0\0", 7, "is 7 bytes"},
        {"a length of 0", "\0\0\0\0\0\0\0\0", 8, "does not begin with '{'"},
        {"a length of 0 before data", "\0\0\0\0\0\0\0\0{}", 10, "does not begin with '{'"},
        {"a header that is cut", "\5\0\0\0\0\0\0\0{}", 10, "the header needs 5 bytes, 2 are there"},
        {"a header of 16 MiB", "\0\0\0\1\0\0\0\0{}", 10, "the header needs 16777216 bytes, 2 are there"},
        {"a header of 16 MiB and 1", "\1\0\0\1\0\0\0\0{}", 10, "16777217 bytes, at most 16777216"},
        {"a length of 2^63", "\0\0\0\0\0\0\0\200{}", 10, "9223372036854775808 bytes, at most"},
        {"a length of 2^64 - 1", "\377\377\377\377\377\377\377\377{}", 10, "18446744073709551615 bytes, at most"},
        {"a length of 2^64 - 8", "\370\377\377\377\377\377\377\377{}", 10, "at most 16777216"},
        {"a PyTorch archive", "PK\3\4\0\0\10\10pickle..", 16, "a PyTorch pickle, which can run code and is never read"},
        {"a bare pickle", "\200\2\212\nl\374\234F\371", 9, "a PyTorch pickle"},
        {"a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\n", 43, "git lfs pull"},
        {"GGUF", "GGUF\3\0\0\0\0\0\0\0", 12, "a GGUF file"},
        {"a web page", "<!DOCTYPE html><html>", 21, "a web page; download the file again"},
    };
    /* clang-format on */

    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        const char *path = write_file("broken.safetensors", bad[i].bytes, bad[i].n);
        cr_expect_eq(open_and_close(path), MLORA_EFORMAT, "%s", bad[i].what);
        expect_text(bad[i].what, path, bad[i].says);
    }
}

/* 640 is 0x0280, and a pickle begins with 0x80 0x02. */
Test(safetensors, are_no_pickles_for_a_header_of_640_bytes)
{
    char bytes[8 + 640] = "\x80\x02\0\0\0\0\0\0{}";

    memset(bytes + 10, ' ', sizeof bytes - 10);
    cr_expect_eq(open_and_close(write_file("640.safetensors", bytes, sizeof bytes)), MLORA_OK, "%s",
                 error_text());
}

Test(safetensors, a_file_cut_at_any_byte_is_refused)
{
    const float values[] = {1, 2, 3, 4};
    struct builder builder = {0};
    char whole[256];

    builder_add(&builder, "a", "F32", 2, 2, values);
    builder_add(&builder, "b", "BF16", 4, 0, values);
    FILE *file = fopen(builder_write(&builder, "whole.safetensors"), "rb");
    cr_assert_not_null(file);
    const size_t n = fread(whole, 1, sizeof whole, file);
    fclose(file);
    cr_expect_eq(open_and_close(path_of("whole.safetensors")), MLORA_OK);

    for (size_t cut = 0; cut < n; cut++)
        cr_expect_eq(open_and_close(write_file("cut.safetensors", whole, cut)), MLORA_EFORMAT,
                     "%zu", cut);
}

Test(safetensors, what_is_not_a_regular_file_is_refused_without_waiting)
{
    cr_expect_eq(open_and_close(path_of("none.safetensors")), MLORA_EIO);
    expect_text("missing", "none.safetensors", "cannot be opened: No such file");
    cr_expect_eq(open_and_close(directory), MLORA_EIO);
    expect_text("a directory", directory, "is not a regular file");
    cr_assert_eq(mkfifo(path_of("fifo.safetensors"), 0600), 0);
    cr_expect_eq(open_and_close(path_of("fifo.safetensors")), MLORA_EIO);
    expect_text("a FIFO", "fifo.safetensors", "is not a regular file");
    cr_expect_eq(open_and_close("/dev/zero"), MLORA_EIO);
    expect_text("a device", "/dev/zero", "is not a regular file");
}

Test(safetensors, a_file_cut_after_it_was_opened_gives_an_error)
{
    const char *path = write_safetensors(
        "x.safetensors", quoted("{'w':{'dtype':'U8','shape':[64],'data_offsets':[0,64]}}"), 64);
    struct safetensors file;
    char got[64];

    cr_assert_eq(safetensors_open(&file, path), MLORA_OK);
    cr_assert_eq(truncate(path, 80), 0);
    cr_expect_eq(tensor_read(&file, &file.tensors[0], got), MLORA_EIO);
    expect_text("cut", path, "was it changed while it was read?");
    safetensors_close(&file);
}
