/* Model directories: one file, shards with an index, and indexes that lie or attack. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "model/safetensors.h"
#include "tests/model/files.h"

TestSuite(checkpoint, .init = directory_open, .fini = directory_close);

static mlora_status open_and_close(const char *path)
{
    struct checkpoint checkpoint;
    const mlora_status status = checkpoint_open(&checkpoint, path);
    if (status != MLORA_OK) cr_expect(!checkpoint.files && !checkpoint.n_files);
    checkpoint_close(&checkpoint);
    return status;
}

static void write_shard(const char *file, const char *tensor)
{
    const float value[] = {1};
    struct builder builder = {0};
    builder_add(&builder, tensor, "F32", 1, 0, value);
    builder_write(&builder, file);
}

static void write_index(const char *text)
{
    write_file("model.safetensors.index.json", quoted(text), strlen(text));
}

Test(checkpoint, opens_the_fixtures)
{
    struct checkpoint checkpoint;
    const struct safetensors *file;

    cr_assert_eq(checkpoint_open(&checkpoint, "tests/fixtures/tiny-llama2"), MLORA_OK);
    cr_expect_eq(checkpoint.n_files, 1);
    cr_expect_eq(checkpoint.bytes, 7901696); /* 3950848 parameters of 2 bytes */
    const struct tensor *norm = checkpoint_find(&checkpoint, "model.norm.weight", &file);
    cr_assert_not_null(norm);
    cr_expect_eq(norm->shape[0], 256);
    checkpoint_close(&checkpoint);

    cr_assert_eq(checkpoint_open(&checkpoint, "tests/fixtures/tiny-llama3"), MLORA_OK);
    cr_expect_eq(checkpoint.n_files, 2);
    cr_assert_not_null(checkpoint_find(&checkpoint, "model.norm.weight", &file));
    cr_assert_not_null(checkpoint_find(&checkpoint, "model.embed_tokens.weight", &file));
    cr_expect_null(checkpoint_find(&checkpoint, "lm_head.weight", &file)); /* tied */
    checkpoint_close(&checkpoint);
}

Test(checkpoint, one_file_wins_over_an_index)
{
    write_shard("model.safetensors", "w");
    write_index("{'weight_map':{'w':'none.safetensors'}}");
    cr_expect_eq(open_and_close(directory), MLORA_OK, "%s", error_text());
}

Test(checkpoint, a_tensor_that_the_index_leaves_out_is_found)
{
    struct checkpoint checkpoint;
    const struct safetensors *file;
    const float value[] = {1};
    struct builder builder = {0};

    builder_add(&builder, "a", "F32", 1, 0, value);
    builder_add(&builder, "extra", "F32", 1, 0, value);
    builder_write(&builder, "1.safetensors");
    write_shard("2.safetensors", "b");
    write_index("{'weight_map':{'b':'2.safetensors','a':'1.safetensors'}}");
    cr_assert_eq(checkpoint_open(&checkpoint, directory), MLORA_OK, "%s", error_text());
    cr_expect_not_null(checkpoint_find(&checkpoint, "extra", &file));
    cr_expect_eq(checkpoint.bytes, 12);
    checkpoint_close(&checkpoint);
}

Test(checkpoint, every_bad_index_is_refused_with_its_reason)
{
    /* clang-format off */
    static const struct {
        const char *what, *index, *says;
        mlora_status status;
    } bad[] = {
        {"not JSON", "{", "is not valid JSON", MLORA_EFORMAT},
        {"an array", "[]", "a JSON object is needed", MLORA_EFORMAT},
        {"no weight_map", "{}", "weight_map is missing", MLORA_EFORMAT},
        {"weight_map a list", "{'weight_map':[]}", "weight_map is an array", MLORA_EFORMAT},
        {"weight_map empty", "{'weight_map':{}}", "weight_map is empty", MLORA_EFORMAT},
        {"a file that is a number", "{'weight_map':{'w':1}}", "weight_map: w is an integer, a file name is needed", MLORA_EFORMAT},
        {"a file that is null", "{'weight_map':{'w':null}}", "weight_map: w is null", MLORA_EFORMAT},
        {"a tensor twice", "{'weight_map':{'w':'1.safetensors','w':'1.safetensors'}}", "duplicate", MLORA_EFORMAT},
        {"the parent", "{'weight_map':{'w':'../1.safetensors'}}", "w is in \"../1.safetensors\", needed is the bare name of a file beside the index", MLORA_EFORMAT},
        {"far up", "{'weight_map':{'w':'../../../../etc/passwd'}}", "needed is the bare name", MLORA_EFORMAT},
        {"an absolute path", "{'weight_map':{'w':'/etc/passwd'}}", "needed is the bare name", MLORA_EFORMAT},
        {"a folder", "{'weight_map':{'w':'sub/1.safetensors'}}", "needed is the bare name", MLORA_EFORMAT},
        {"this folder", "{'weight_map':{'w':'./1.safetensors'}}", "needed is the bare name", MLORA_EFORMAT},
        {"backslashes", "{'weight_map':{'w':'..\\\\1.safetensors'}}", "needed is the bare name", MLORA_EFORMAT},
        {"two dots", "{'weight_map':{'w':'..'}}", "needed is the bare name", MLORA_EFORMAT},
        {"one dot", "{'weight_map':{'w':'.'}}", "needed is the bare name", MLORA_EFORMAT},
        {"no name", "{'weight_map':{'w':''}}", "needed is the bare name", MLORA_EFORMAT},
        {"a NUL", "{'weight_map':{'w':'1.safetensors\\u0000'}}", "is not valid JSON", MLORA_EFORMAT},
        {"a pickle", "{'weight_map':{'w':'pytorch_model.bin'}}", "ends in .safetensors", MLORA_EFORMAT},
        {"the suffix only", "{'weight_map':{'w':'.safetensors'}}", "ends in .safetensors", MLORA_EFORMAT},
        {"a file that is not there", "{'weight_map':{'w':'9.safetensors'}}", "9.safetensors: cannot be opened", MLORA_EIO},
        {"a tensor that is not in its file", "{'weight_map':{'w':'1.safetensors','v':'1.safetensors'}}", "weight_map says that tensor v is in 1.safetensors, but it is not", MLORA_EFORMAT},
        {"a tensor in two files", "{'weight_map':{'w':'1.safetensors','x':'2.safetensors'}}", "tensor w is in two of the files", MLORA_EFORMAT},
        {"a FIFO", "{'weight_map':{'w':'fifo.safetensors'}}", "is not a regular file", MLORA_EIO},
        {"a broken shard", "{'weight_map':{'w':'broken.safetensors'}}", "broken.safetensors: is 3 bytes", MLORA_EFORMAT},
    };
    /* clang-format on */
    const float value[] = {1};
    struct builder builder = {0};

    write_shard("1.safetensors", "w");
    builder_add(&builder, "w", "F32", 1, 0, value);
    builder_add(&builder, "x", "F32", 1, 0, value);
    builder_write(&builder, "2.safetensors");
    write_file("broken.safetensors", "abc", 3);
    cr_assert_eq(mkfifo(path_of("fifo.safetensors"), 0600), 0);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        write_index(bad[i].index);
        cr_expect_eq(open_and_close(directory), bad[i].status, "%s", bad[i].what);
        expect_text(bad[i].what, "model.safetensors.index.json", bad[i].says);
    }
}

Test(checkpoint, a_file_name_too_long_is_refused)
{
    char index[512], name[300];
    memset(name, 'n', sizeof name);
    snprintf(index, sizeof index, "{'weight_map':{'w':'%.244s.safetensors'}}", name);
    write_index(index);
    cr_expect_eq(open_and_close(directory), MLORA_EFORMAT);
    expect_text("long", "index.json", "at most 255 bytes");
}

Test(checkpoint, pickles_are_named_and_never_opened)
{
    static const char *const names[] = {"pytorch_model.bin", "pytorch_model.bin.index.json",
                                        "consolidated.00.pth", "model.pth"};

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        cr_assert_eq(mkfifo(path_of(names[i]), 0600), 0); /* opening it would wait */
        cr_expect_eq(open_and_close(directory), MLORA_EUNSUPPORTED);
        expect_text(names[i], names[i], "convert it to safetensors");
        cr_assert_eq(unlink(path_of(names[i])), 0);
    }
}

Test(checkpoint, a_directory_without_weights_is_refused)
{
    cr_expect_eq(open_and_close(directory), MLORA_EIO);
    expect_text("empty", directory, "has neither model.safetensors nor");
    cr_expect_eq(open_and_close(path_of("none")), MLORA_EIO);
    expect_text("missing", "/none", "is not a directory");
    cr_expect_eq(open_and_close(write_file("file", "x", 1)), MLORA_EIO);
    expect_text("a file", "/file", "is not a directory");
}
