/* The clock: ops are done when they return, so a mark is the time of its call. */
#include <assert.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/cpu/device.h"

void cpu_mark(struct device *dev, int mark)
{
    struct cpu_device *cpu = cpu_device(dev);
    struct timespec now;

    assert(mark >= 0 && mark < MARKS);
    if (!cpu->marks) cpu->marks = calloc(MARKS, sizeof *cpu->marks);
    if (!cpu->marks) {
        if (!cpu->failed_op) cpu->failed_op = "mark";
        cpu->failed_bytes = MARKS * sizeof *cpu->marks;
        return;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    cpu->marks[mark] = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

struct lap cpu_elapsed(struct device *dev, int from, int to)
{
    const struct cpu_device *cpu = cpu_device(dev);
    const double seconds = cpu->marks ? cpu->marks[to] - cpu->marks[from] : 0;
    return (struct lap){seconds, -1};
}
