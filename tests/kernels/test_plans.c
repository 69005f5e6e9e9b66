/* What a GPU's matmuls keep in a folder: it is made, read again, and never believed too much. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/buffer.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "tests/support.h"

enum { T = 90, N = 64, K = 128 };

static char folder[] = "build/plans-XXXXXX";

/* The path of the only file in the folder, NULL: none. */
static char *kept_file(void)
{
    struct dirent **entries = NULL;
    char *path = NULL;
    const int n = scandir(folder, &entries, NULL, alphasort);

    cr_assert_leq(n, 3, "one file, and the folder's own two");
    for (int i = 0; i < n; i++) {
        if (entries[i]->d_name[0] != '.') path = path_join(folder, entries[i]->d_name);
        free(entries[i]);
    }
    free(entries);
    return path;
}

static void *sent(struct device *gpu, const void *from, size_t bytes)
{
    void *to;
    cr_assert_eq(gpu->ops->alloc(gpu, bytes, &to), MLORA_OK);
    gpu->ops->upload(gpu, to, from, bytes);
    return to;
}

/* A product of small whole numbers, which is exact in any order of summation. */
static void check_product(void)
{
    uint16_t x0[T * K], w0[N * K];
    float got[T * N];
    struct device *gpu;

    cr_assert_eq(cuda_device_open(&gpu, 0, folder), MLORA_OK, "%s", error_text());
    for (int i = 0; i < T * K; i++) x0[i] = bf16_from_f32((float)(i * 7 % 5 - 2));
    for (int i = 0; i < N * K; i++) w0[i] = bf16_from_f32((float)(i * 11 % 7 - 3));
    void *x = sent(gpu, x0, sizeof x0), *w = sent(gpu, w0, sizeof w0);
    void *y = sent(gpu, got, sizeof got);
    const struct matrix matrix = {w, DTYPE_BF16, N, K};
    gpu->ops->matmul(gpu, y, DTYPE_F32, x, &matrix, NULL, T, DTYPE_BF16);
    gpu->ops->download(gpu, got, y, sizeof got);
    cr_assert_eq(gpu->ops->sync(gpu), MLORA_OK, "%s", error_text());
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            float want = 0;
            for (int k = 0; k < K; k++)
                want += bf16_to_f32(x0[t * K + k]) * bf16_to_f32(w0[n * K + k]);
            cr_expect_eq(got[t * N + n], want);
        }
    gpu->ops->free(gpu, x);
    gpu->ops->free(gpu, w);
    gpu->ops->free(gpu, y);
    gpu->ops->close(gpu);
}

static void damage(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    cr_assert(file);
    fputs(text, file);
    fclose(file);
}

Test(plans, are_kept_and_read_and_a_damaged_file_is_made_again)
{
    const char *backend = getenv("MLORA_BACKEND");
    struct buffer first = {0}, second = {0};
    struct device *gpu;

    cr_assert(mkdtemp(folder));
    if (!backend || strcmp(backend, "cuda") != 0) { /* a failed open leaves nothing behind */
        if (cuda_device_open(&gpu, -1, folder) == MLORA_OK) cr_assert_fail("GPU -1 was opened");
        cr_expect_null(kept_file());
        rmdir(folder);
        return;
    }
    check_product();
    char *path = kept_file();
    cr_assert(path);
    cr_assert_eq(file_read_all(&first, path, 1 << 20), MLORA_OK);
    cr_expect(strstr(buffer_text(&first), "mlora matmul plans 1, "));
    check_product(); /* nothing is timed again: the file stays as it is */
    cr_assert_eq(file_read_all(&second, path, 1 << 20), MLORA_OK);
    cr_expect_str_eq(buffer_text(&first), buffer_text(&second));

    char *line = strchr(first.data, '\n') + 1; /* its title, then a candidate that is another */
    snprintf(line, first.bytes - (size_t)(line - first.data),
             "128 64 128 2 0 23 0123456789abcdef\n");
    const char *const texts[] = {"", "mlora", "\n\n-1 -1 99999999999\n", first.data};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        damage(path, texts[i]);
        check_product();
        second.bytes = 0;
        cr_assert_eq(file_read_all(&second, path, 1 << 20), MLORA_OK);
        cr_expect(strstr(buffer_text(&second), "\n128 64 128 2 0 "), "%s", buffer_text(&second));
        cr_expect_null(strstr(buffer_text(&second), "0123456789abcdef"));
    }
    unlink(path);
    rmdir(folder);
    free(path);
    buffer_free(&first);
    buffer_free(&second);
}
