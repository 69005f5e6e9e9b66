/* Error text, buffers, files and JSON: the ground that all messages stand on. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/buffer.h"
#include "engine/base/distance.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"

static char directory[] = "/tmp/mlora-base-XXXXXX";

static void make_directory(void)
{
    cr_assert_not_null(mkdtemp(directory));
}

static void remove_directory(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    cr_assert_eq(system(command), 0);
}

/* A file in the test's directory; the path lives until the next call. */
static const char *write_file(const char *name, const char *text, size_t bytes)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    cr_assert_not_null(file);
    cr_assert_eq(fwrite(text, 1, bytes, file), bytes);
    fclose(file);
    return path;
}

static void expect_text(const char *part)
{
    cr_expect(strstr(error_text(), part), "\"%s\" does not say \"%s\"", error_text(), part);
}

TestSuite(base, .init = make_directory, .fini = remove_directory);

Test(base, an_error_is_one_line_whatever_a_file_put_into_it)
{
    cr_expect_eq(error_set(MLORA_EIO, "bad\nname\x1b[31m %d", 7), MLORA_EIO);
    cr_expect_str_eq(error_text(), "bad?name?[31m 7");
    cr_expect_eq(error_prefix(MLORA_EIO, "line %d", 3), MLORA_EIO);
    cr_expect_str_eq(error_text(), "line 3: bad?name?[31m 7");
}

Test(base, a_long_error_is_cut_at_a_whole_character)
{
    char text[2048] = "x";
    for (size_t i = 1; i + 2 < sizeof text; i += 2) memcpy(text + i, "\xc3\xa9", 3); /* é */
    error_set(MLORA_EIO, "%s", text);
    const char *cut = error_text();
    cr_expect_leq(strlen(cut), 1023);
    cr_expect_gt(strlen(cut), 1000);
    cr_expect_eq(strlen(cut) % 2, 1, "x and whole pairs of bytes");
}

Test(base, buffers_grow_and_end_with_nul)
{
    struct buffer buffer = {0};
    cr_expect_str_eq(buffer_text(&buffer), "");
    for (int i = 0; i < 1000; i++) cr_assert_eq(buffer_printf(&buffer, "%d,", i), MLORA_OK);
    cr_expect_eq(strlen(buffer_text(&buffer)), buffer.bytes);
    cr_expect_eq(buffer.bytes, 10 * 2 + 90 * 3 + 900 * 4);
    cr_expect_eq(buffer_append(&buffer, "a\0b", 3), MLORA_OK);
    cr_expect_arr_eq(buffer.data + buffer.bytes - 3, "a\0b", 4);
    cr_expect_eq(buffer_reserve(&buffer, (size_t)-1), MLORA_ENOMEM);
    buffer_free(&buffer);
    cr_expect_null(buffer.data);
    buffer_free(&buffer);
}

Test(base, only_regular_files_are_opened)
{
    struct file file = {0};
    char path[256];

    cr_expect_eq(file_open(&file, directory), MLORA_EIO);
    expect_text("is not a regular file");
    snprintf(path, sizeof path, "%s/fifo", directory);
    cr_assert_eq(mkfifo(path, 0600), 0);
    cr_expect_eq(file_open(&file, path), MLORA_EIO, "and does not wait for a writer");
    cr_expect_eq(file_open(&file, "/dev/zero"), MLORA_EIO);
    cr_expect_eq(file_open(&file, "no/such/file"), MLORA_EIO);
    expect_text("no/such/file: cannot be opened: No such file or directory");
    file_close(&file);
}

Test(base, a_file_that_becomes_shorter_is_an_error)
{
    const char *path = write_file("short", "0123456789", 10);
    struct file file = {0};
    char bytes[10];

    cr_assert_eq(file_open(&file, path), MLORA_OK);
    cr_expect_eq(file.bytes, 10);
    cr_expect_eq(file_read_at(&file, bytes, 4, 6), MLORA_OK);
    cr_expect_arr_eq(bytes, "6789", 4);
    cr_assert_eq(truncate(path, 5), 0);
    cr_expect_eq(file_read_at(&file, bytes, 10, 0), MLORA_EIO);
    expect_text("ends at byte 5, 5 bytes are missing");
    file_close(&file);
}

Test(base, a_file_over_its_limit_is_refused_unread)
{
    struct buffer buffer = {0};
    cr_expect_eq(file_read_all(&buffer, write_file("large", "0123456789", 10), 9), MLORA_EFORMAT);
    expect_text("is 10 bytes, more than the 9");
    cr_expect_eq(file_read_all(&buffer, write_file("fits", "0123456789", 10), 10), MLORA_OK);
    cr_expect_str_eq(buffer_text(&buffer), "0123456789");
    buffer_free(&buffer);
}

static mlora_status read_json(json_t **out, const char *text)
{
    return json_read_file(out, write_file("a.json", text, strlen(text)), 1 << 20);
}

Test(base, json_must_be_a_valid_object_without_duplicates)
{
    json_t *json;
    cr_expect_eq(read_json(&json, "{\"a\": 1, \"a\": 2}"), MLORA_EFORMAT);
    expect_text("a.json: is not valid JSON: line 1");
    cr_expect_eq(read_json(&json, "[1]"), MLORA_EFORMAT);
    expect_text("holds an array, a JSON object is needed; save it again");
    cr_expect_eq(read_json(&json, "{\"a\": \"\xff\"}"), MLORA_EFORMAT);
    cr_expect_eq(read_json(&json, "{} x"), MLORA_EFORMAT);
    cr_expect_null(json);
}

Test(base, json_values_are_checked_for_type_and_range)
{
    json_t *json;
    int64_t i;
    double d;
    bool b;
    const char *s;

    cr_assert_eq(read_json(&json, "{\"i\": 7, \"d\": 0.5, \"b\": true, \"s\": \"x\", \"n\": null}"),
                 MLORA_OK);
    cr_expect_eq(json_get_int(&i, json, "i", 1, 0, 9, "f"), MLORA_OK);
    cr_expect_eq(i, 7);
    cr_expect_eq(json_get_int(&i, json, "n", 1, 0, 9, "f"), MLORA_OK);
    cr_expect_eq(i, 1);
    cr_expect_eq(json_get_int(&i, json, "i", 1, 0, 6, "f"), MLORA_EFORMAT);
    expect_text("f: i is 7, must be from 0 to 6");
    cr_expect_eq(json_get_int(&i, json, "d", 1, 0, 6, "f"), MLORA_EFORMAT);
    expect_text("d is a number with a fraction, an integer is needed");
    cr_expect_eq(json_get_double(&d, json, "d", 0, 0, 1, "f"), MLORA_OK);
    cr_expect_eq(d, 0.5);
    cr_expect_eq(json_get_double(&d, json, "i", 0, 0, 1, "f"), MLORA_EFORMAT);
    cr_expect_eq(json_get_bool(&b, json, "b", false, "f"), MLORA_OK);
    cr_expect(b);
    cr_expect_eq(json_get_bool(&b, json, "s", false, "f"), MLORA_EFORMAT);
    cr_expect_eq(json_get_string(&s, json, "s", NULL, "f"), MLORA_OK);
    cr_expect_str_eq(s, "x");
    cr_expect_eq(json_get_string(&s, json, "missing", "y", "f"), MLORA_OK);
    cr_expect_str_eq(s, "y");
    json_decref(json);
}

Test(base, paths_join_with_one_slash)
{
    char *path = path_join("a/b", "c");
    cr_expect_str_eq(path, "a/b/c");
    free(path);
    path = path_join("a/", "c");
    cr_expect_str_eq(path, "a/c");
    free(path);
}

Test(distance, counts_bytes_put_in_left_out_changed_or_swapped)
{
    cr_expect_eq(edit_distance("kitten", "sitting"), 3);
    cr_expect_eq(edit_distance("sql", "slq"), 1);
    cr_expect_eq(edit_distance("", "mood"), 4);
    cr_expect_eq(edit_distance("mood", "mood"), 0);
    cr_expect_eq(edit_distance("ca", "abc"), 3); /* the swapped bytes are not changed again */
}

Test(distance, looks_at_the_first_bytes_of_long_names)
{
    char long_name[2 * EDIT_DISTANCE_MAX + 1];
    memset(long_name, 'x', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = '\0';
    cr_expect_eq(edit_distance(long_name, ""), EDIT_DISTANCE_MAX);
    cr_expect_eq(edit_distance(long_name, "x"), EDIT_DISTANCE_MAX - 1);
}
