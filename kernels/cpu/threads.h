/* A pool of worker threads that share out the parts of one op at a time.
 *
 * A step of a small model is hundreds of ops of some microseconds, so workers look for the next
 * op for a moment before they sleep. Which thread does which part is left to chance (whoever is
 * free takes the next one): ops are written so that no result depends on it. */
#ifndef MLORA_KERNELS_CPU_THREADS_H
#define MLORA_KERNELS_CPU_THREADS_H

#include "engine/mlora.h" /* mlora_status */

struct threads;

/* Do items [begin, end) of the op. `thread`, below threads_count(), is the caller's number: it
 * chooses the scratch memory that no other thread uses now. */
typedef void (*threads_fn)(void *context, int begin, int end, int thread);

/* `n_threads` counts the caller of threads_run(): n_threads - 1 are started.
 * Returns OK or ENOMEM. Freed with threads_close(). */
mlora_status threads_open(struct threads **out, int n_threads);
void threads_close(struct threads *threads); /* accepts NULL */

int threads_count(const struct threads *threads);

/* Call `fn` on all of 0 to n_items - 1, in parts of `grain` items, and wait until all are done. */
void threads_run(struct threads *threads, int n_items, int grain, threads_fn fn, void *context);

#endif
