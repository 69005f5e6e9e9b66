#include <criterion/criterion.h>
#include <stdatomic.h>
#include <unistd.h>

#include "kernels/cpu/threads.h"

enum { N_MAX = 1000 };

struct visits {
    atomic_int count[N_MAX];
    atomic_int wrong_thread;
    int n_threads;
};

static void visit(void *context, int begin, int end, int thread)
{
    struct visits *visits = context;
    if (thread < 0 || thread >= visits->n_threads) atomic_fetch_add(&visits->wrong_thread, 1);
    for (int i = begin; i < end; i++) atomic_fetch_add(&visits->count[i], 1);
}

Test(threads, visit_every_item_once)
{
    static struct visits visits;

    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        struct threads *threads;
        cr_assert_eq(threads_open(&threads, n_threads), MLORA_OK);
        cr_expect_eq(threads_count(threads), n_threads);
        visits = (struct visits){.n_threads = n_threads};
        int n_rounds = 0;
        for (int n = 0; n <= N_MAX; n += 37, n_rounds++)
            threads_run(threads, n, 1 + n % 7, visit, &visits);
        for (int i = 0; i < N_MAX; i++) {
            const int want = n_rounds - (i + 37) / 37; /* rounds with n > i */
            cr_assert_eq(visits.count[i], want);
        }
        cr_expect_eq(visits.wrong_thread, 0);
        threads_close(threads);
    }
}

Test(threads, wake_after_they_have_slept)
{
    static struct visits visits = {.n_threads = 3};
    struct threads *threads;

    cr_assert_eq(threads_open(&threads, 3), MLORA_OK);
    for (int round = 1; round <= 3; round++) {
        usleep(5000); /* longer than they look for work */
        threads_run(threads, 100, 1, visit, &visits);
        for (int i = 0; i < 100; i++) cr_assert_eq(visits.count[i], round);
    }
    threads_close(threads);
}

Test(threads, close_without_work)
{
    struct threads *threads;
    cr_assert_eq(threads_open(&threads, 4), MLORA_OK);
    threads_close(threads);
    threads_close(NULL);
}
