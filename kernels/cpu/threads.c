/* One op at a time is published by raising `round`; each worker takes part in every round, and
 * the caller returns when all workers have reported back, so the op's fields are never written
 * while someone may read them. */
#include "kernels/cpu/threads.h"

#include <assert.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "engine/base/error.h"

/* How often a waiting thread looks before it sleeps: some tens of microseconds. */
enum { N_LOOKS = 2000 };

struct worker {
    struct threads *threads;
    pthread_t id;
    int number;
};

struct threads {
    int n_threads;
    struct worker *workers; /* [n_threads - 1] */

    /* The op: written by the caller before `round` is raised. */
    threads_fn fn;
    void *context;
    int n_items, grain;
    bool closing;

    _Alignas(64) atomic_int next;   /* first item that nobody has taken */
    _Alignas(64) atomic_uint round; /* raised for each op */
    _Alignas(64) atomic_int n_busy; /* workers that have not finished this round */

    pthread_mutex_t mutex; /* orders the two below with going to sleep */
    pthread_cond_t raised; /* `round` has changed */
    pthread_cond_t idle;   /* n_busy is zero */
};

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void take_parts(struct threads *threads, int thread)
{
    for (;;) {
        const int begin =
            atomic_fetch_add_explicit(&threads->next, threads->grain, memory_order_relaxed);
        if (begin >= threads->n_items) return;
        const int rest = threads->n_items - begin;
        const int end = rest < threads->grain ? threads->n_items : begin + threads->grain;
        threads->fn(threads->context, begin, end, thread);
    }
}

/* Wait until `round` is no longer `seen`; returns the new one. */
static unsigned wait_for_round(struct threads *threads, unsigned seen)
{
    for (int look = 0; look < N_LOOKS; look++) {
        const unsigned round = atomic_load_explicit(&threads->round, memory_order_acquire);
        if (round != seen) return round;
        pause_briefly();
    }
    pthread_mutex_lock(&threads->mutex);
    while (atomic_load_explicit(&threads->round, memory_order_acquire) == seen)
        pthread_cond_wait(&threads->raised, &threads->mutex);
    pthread_mutex_unlock(&threads->mutex);
    return atomic_load_explicit(&threads->round, memory_order_acquire);
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct threads *threads = worker->threads;
    unsigned seen = 0;

    for (;;) {
        seen = wait_for_round(threads, seen);
        if (threads->closing) return NULL;
        take_parts(threads, worker->number);
        if (atomic_fetch_sub_explicit(&threads->n_busy, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&threads->mutex);
            pthread_cond_signal(&threads->idle);
            pthread_mutex_unlock(&threads->mutex);
        }
    }
}

static void raise_round(struct threads *threads)
{
    pthread_mutex_lock(&threads->mutex);
    atomic_fetch_add_explicit(&threads->round, 1, memory_order_release);
    pthread_cond_broadcast(&threads->raised);
    pthread_mutex_unlock(&threads->mutex);
}

static void wait_until_idle(struct threads *threads)
{
    for (int look = 0; look < N_LOOKS; look++) {
        if (atomic_load_explicit(&threads->n_busy, memory_order_acquire) == 0) return;
        pause_briefly();
    }
    pthread_mutex_lock(&threads->mutex);
    while (atomic_load_explicit(&threads->n_busy, memory_order_acquire) != 0)
        pthread_cond_wait(&threads->idle, &threads->mutex);
    pthread_mutex_unlock(&threads->mutex);
}

void threads_run(struct threads *threads, int n_items, int grain, threads_fn fn, void *context)
{
    if (n_items <= 0) return;
    if (threads->n_threads == 1 || n_items <= grain) {
        fn(context, 0, n_items, 0);
        return;
    }
    assert(grain > 0 && n_items <= INT_MAX / 2);
    /* `next` ends at most n_threads grains past n_items, which must not overflow. */
    const int grain_max = (INT_MAX - n_items) / (threads->n_threads + 1);
    threads->fn = fn;
    threads->context = context;
    threads->n_items = n_items;
    threads->grain = grain < grain_max ? grain : grain_max;
    atomic_store_explicit(&threads->next, 0, memory_order_relaxed);
    atomic_store_explicit(&threads->n_busy, threads->n_threads - 1, memory_order_relaxed);
    raise_round(threads);
    take_parts(threads, 0);
    wait_until_idle(threads);
}

int threads_count(const struct threads *threads)
{
    return threads->n_threads;
}

mlora_status threads_open(struct threads **out, int n_threads)
{
    *out = NULL;
    struct threads *threads = aligned_alloc(64, sizeof *threads);
    struct worker *workers = calloc((size_t)n_threads, sizeof *workers);
    if (!threads || !workers) {
        free(threads);
        free(workers);
        return error_set(MLORA_ENOMEM, "out of memory for %d worker threads", n_threads);
    }
    *threads = (struct threads){.n_threads = 1, .workers = workers};
    pthread_mutex_init(&threads->mutex, NULL);
    pthread_cond_init(&threads->raised, NULL);
    pthread_cond_init(&threads->idle, NULL);

    /* Signals are for the threads of the program, not for ours. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (int i = 0; i < n_threads - 1 && !error; i++) {
        workers[i] = (struct worker){.threads = threads, .number = i + 1};
        error = pthread_create(&workers[i].id, NULL, work, &workers[i]);
        if (!error) threads->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        const int n_started = threads->n_threads;
        threads_close(threads);
        return error_set(MLORA_ENOMEM, "thread %d of %d cannot be started: ask for fewer threads",
                         n_started + 1, n_threads);
    }
    *out = threads;
    return MLORA_OK;
}

void threads_close(struct threads *threads)
{
    if (!threads) return;
    threads->closing = true;
    raise_round(threads);
    for (int i = 0; i < threads->n_threads - 1; i++) pthread_join(threads->workers[i].id, NULL);
    pthread_cond_destroy(&threads->idle);
    pthread_cond_destroy(&threads->raised);
    pthread_mutex_destroy(&threads->mutex);
    free(threads->workers);
    free(threads);
}
