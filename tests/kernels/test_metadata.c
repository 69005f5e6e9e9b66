#include "tests/support.h"

#include <criterion/criterion.h>

TestSuite(metadata, .init = device_open, .fini = device_close);

Test(metadata, gives_each_token_its_row_and_position)
{
    const int32_t row_start[4] = {0, 3, 4, 6}; /* a whole prompt, a decode, the end of a prompt */
    const int32_t kv_len[3] = {3, 9, 7};
    const int32_t want_row[6] = {0, 0, 0, 1, 2, 2};
    const int32_t want_position[6] = {0, 1, 2, 8, 5, 6};
    int32_t row[6], position[6];
    const struct batch_view batch = {
        .T = 6,
        .Q = 3,
        .max_row = 3,
        .max_kv = 9,
        .row_start = upload(row_start, sizeof row_start),
        .kv_len = upload(kv_len, sizeof kv_len),
        .position = device_memory(sizeof position),
        .row = device_memory(sizeof row),
    };

    dev->ops->metadata(dev, &batch);
    download(row, batch.row, sizeof row);
    download(position, batch.position, sizeof position);
    cr_expect_arr_eq(row, want_row, sizeof row);
    cr_expect_arr_eq(position, want_position, sizeof position);
}
