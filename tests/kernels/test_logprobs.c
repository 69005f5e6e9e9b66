#include "tests/support.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

TestSuite(logprobs, .init = device_open, .fini = device_close);

Test(logprobs, gives_the_target_and_the_most_likely)
{
    /* Probabilities 0.1, 0.4, 0.25, 0.25, shifted; equals by lower id */
    const float logits[2][4] = {{logf(0.1f) + 7, logf(0.4f) + 7, logf(0.25f) + 7, logf(0.25f) + 7},
                                {0, 0, 0, 0}};
    const int32_t target[2] = {0, -1};
    float logprob[2], top[2][3];
    int32_t ids[2][3];
    float *got = device_memory(sizeof logprob), *got_top = device_memory(sizeof top);
    int32_t *got_ids = device_memory(sizeof ids);

    dev->ops->logprobs(dev, got, got_ids, got_top, upload(logits, sizeof logits),
                       upload(target, sizeof target), 2, 4, 3);
    download(logprob, got, sizeof logprob);
    download(top, got_top, sizeof top);
    download(ids, got_ids, sizeof ids);
    cr_expect_float_eq(logprob[0], logf(0.1f), 1e-6);
    cr_expect_eq(logprob[1], 0);
    cr_expect_arr_eq(ids, ((int32_t[2][3]){{1, 2, 3}, {0, 1, 2}}), sizeof ids);
    cr_expect_float_eq(top[0][0], logf(0.4f), 1e-6);
    cr_expect_float_eq(top[0][2], logf(0.25f), 1e-6);
    cr_expect_float_eq(top[1][2], logf(0.25f), 1e-6);
}

Test(logprobs, is_right_for_large_vocabularies_and_any_n)
{
    enum { Q = 3, V = 32003 };
    static const int counts[] = {0, 1, 5, 128};
    struct numbers numbers = {1};
    float *logits = next_floats(&numbers, Q * V, DTYPE_F32);
    for (int i = 0; i < Q * V; i++) logits[i] = 30 * logits[i];
    logits[5] = -INFINITY;
    const int32_t target[Q] = {5, 31999, 0};
    const float *device_logits = upload(logits, Q * V * sizeof *logits);

    for (int c = 0; c < 4; c++) {
        const int n = counts[c];
        float *got = device_memory(Q * sizeof *got), logprob[Q];
        float *got_top = device_memory((size_t)(Q * n) * sizeof *got_top), top[Q * 128];
        int32_t *got_ids = device_memory((size_t)(Q * n) * sizeof *got_ids), ids[Q * 128];
        dev->ops->logprobs(dev, got, got_ids, got_top, device_logits, upload(target, sizeof target),
                           Q, V, n);
        download(logprob, got, sizeof logprob);
        download(top, got_top, (size_t)(Q * n) * sizeof *top);
        download(ids, got_ids, (size_t)(Q * n) * sizeof *ids);
        for (int q = 0; q < Q; q++) {
            const float *row = logits + q * V;
            double sum = 0;
            for (int v = 0; v < V; v++) sum += exp((double)row[v] - 30);
            const double all = 30 + log(sum);
            const float want = (float)((double)row[target[q]] - all);
            if (q == 0)
                cr_expect_eq(logprob[q], -INFINITY);
            else
                /* each exponential is within 4 units of 2^-24, the log of their sum likewise */
                expect_near(&logprob[q], &want, 1, 8 * 0x1p-24, 2 * 0x1p-24, "logprob");
            for (int i = 0; i < n; i++) {
                const int id = ids[q * n + i];
                int n_before = 0; /* tokens that belong before this one */
                for (int v = 0; v < V; v++)
                    n_before += row[v] > row[id] || (row[v] == row[id] && v < id);
                cr_assert_eq(n_before, i);
                const float value = (float)((double)row[id] - all);
                expect_near(&top[q * n + i], &value, 1, 8 * 0x1p-24, 2 * 0x1p-24, "top");
            }
        }
    }
    free(logits);
}
