#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdlib.h>

TestSuite(embed, .init = device_open, .fini = device_close);
TestSuite(gather_rows, .init = device_open, .fini = device_close);

Test(embed, picks_rows_of_the_table_in_every_pair_of_types)
{
    enum { V = 11, D = 37, T = 5 };
    const int32_t ids[T] = {10, 0, 3, 3, 7};
    struct numbers numbers = {1};

    for (enum dtype type = DTYPE_F32; type <= DTYPE_BF16; type++) {
        for (int bf16 = 0; bf16 < 2; bf16++) {
            const enum dtype dtype = bf16 ? DTYPE_BF16 : DTYPE_F32;
            float *rows = next_floats(&numbers, V * D, type);
            const struct matrix table = {upload_as(type, rows, V * D), type, V, D};
            void *y = device_memory(T * D * dtype_bytes(dtype));
            float got[T * D];

            dev->ops->embed(dev, y, &table, upload(ids, sizeof ids), T, dtype);
            download_f32(got, y, dtype, T * D);
            for (int i = 0; i < T * D; i++)
                cr_assert_eq(got[i], round_to(dtype, rows[ids[i / D] * D + i % D]));
            free(rows);
        }
    }
}

Test(gather_rows, copies_rows_in_any_order)
{
    const float x[3][2] = {{1, 2}, {3, 4}, {5, 6}};
    const int32_t rows[4] = {2, 0, 0, 1};
    const float want[4][2] = {{5, 6}, {1, 2}, {1, 2}, {3, 4}};
    float got[4][2];

    for (int bf16 = 0; bf16 < 2; bf16++) {
        const enum dtype dtype = bf16 ? DTYPE_BF16 : DTYPE_F32;
        void *y = device_memory(sizeof want);
        dev->ops->gather_rows(dev, y, upload_as(dtype, &x[0][0], 6), upload(rows, sizeof rows), 4,
                              2, dtype);
        download_f32(&got[0][0], y, dtype, 8);
        cr_expect_arr_eq(got, want, sizeof want);
    }
}
