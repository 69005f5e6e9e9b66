/* Opening and closing the CPU device, and its memory: host memory, where transfers are memcpy and
 * sync has nothing to wait for. */
#include "kernels/cpu/device.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/base/error.h"

enum { ALIGNMENT = 256, HUGE_PAGE = 2 << 20, THREADS_MAX = 1024 };

/* ---- memory ------------------------------------------------------------------------------- */

/* Large blocks start at a huge page and ask for them: weights are read from end to end, and the
 * page table walks of small pages cost about a twentieth of the time of a decode step. */
static void *memory_alloc(size_t bytes)
{
    const size_t alignment = bytes >= 2 * (size_t)HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    if (bytes > SIZE_MAX / 2) return NULL;
    const size_t rounded_up = (bytes + alignment) / alignment * alignment; /* never 0 */
    void *memory = aligned_alloc(alignment, rounded_up);
#ifdef MADV_HUGEPAGE
    if (memory && alignment == HUGE_PAGE) madvise(memory, rounded_up, MADV_HUGEPAGE);
#endif
    return memory;
}

/* A block of at least MAPPED bytes: of a budget of memory, most of which may never be touched. So it
 * is not taken from malloc, and no swap is set aside for it. */
struct mapping {
    void *at;
    size_t bytes;
    struct mapping *next;
};

enum { MAPPED = 1 << 30 };

static void *map(struct cpu_device *cpu, size_t bytes)
{
    struct mapping *mapping = malloc(sizeof *mapping);
    if (!mapping) return NULL;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        free(mapping);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(at, bytes, MADV_HUGEPAGE);
#endif
    *mapping = (struct mapping){at, bytes, cpu->mapped};
    cpu->mapped = mapping;
    return at;
}

static mlora_status cpu_alloc(struct device *dev, size_t bytes, void **out)
{
    *out = bytes < (size_t)MAPPED ? memory_alloc(bytes) : map(cpu_device(dev), bytes);
    if (!*out)
        return error_set(MLORA_ENOMEM,
                         "out of memory: %zu bytes on the CPU: use a smaller model "
                         "or KV cache, or close other programs",
                         bytes);
    return MLORA_OK;
}

static void cpu_free(struct device *dev, void *memory)
{
    for (struct mapping **link = &cpu_device(dev)->mapped; *link; link = &(*link)->next) {
        struct mapping *mapping = *link;
        if (mapping->at != memory) continue;
        munmap(mapping->at, mapping->bytes);
        *link = mapping->next;
        free(mapping);
        return;
    }
    free(memory);
}

static void cpu_upload(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    if (bytes) memcpy(to, from, bytes);
}

static void cpu_download(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    if (bytes) memcpy(to, from, bytes);
}

struct copy {
    char *to;
    const char *from;
    size_t bytes;
};

enum { COPY_PIECE = 1 << 20 };

static void copy_pieces(void *context, int begin, int end, int thread)
{
    const struct copy *op = context;
    const size_t first = (size_t)begin * COPY_PIECE, last = (size_t)end * COPY_PIECE;

    (void)thread;
    memcpy(op->to + first, op->from + first, (last < op->bytes ? last : op->bytes) - first);
}

static void cpu_copy(struct device *dev, void *to, const void *from, size_t bytes)
{
    struct copy op = {to, from, bytes};
    cpu_parallel(dev, (int)((bytes + COPY_PIECE - 1) / COPY_PIECE), 1, copy_pieces, &op);
}

static mlora_status cpu_upload_beside(struct device *dev, int lane, void *to, const void *from,
                                      size_t bytes)
{
    (void)dev;
    (void)lane;
    if (bytes) memcpy(to, from, bytes);
    return MLORA_OK;
}

static void cpu_move(struct device *dev, void *to, const void *from, size_t bytes)
{
    (void)dev;
    if (bytes) memmove(to, from, bytes);
}

static mlora_status cpu_sync(struct device *dev)
{
    const struct cpu_device *cpu = cpu_device(dev);
    if (!cpu->failed_op) return MLORA_OK;
    return error_set(MLORA_EDEVICE, "%s: out of memory: %zu bytes of scratch on the CPU",
                     cpu->failed_op, cpu->failed_bytes);
}

static void cpu_fetch(struct device *dev, void *to, const void *from, size_t bytes, int fence)
{
    (void)fence;
    cpu_download(dev, to, from, bytes);
}

static mlora_status cpu_wait(struct device *dev, int fence)
{
    (void)fence;
    return cpu_sync(dev);
}

/* What the kernel says can be had without swapping (MemAvailable: free pages and caches that it
 * would drop), and all RAM. A limit on this process alone, as in a container, is not seen. */
static void cpu_memory(struct device *dev, size_t *free_bytes, size_t *total_bytes)
{
    (void)dev;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    *total_bytes = (size_t)sysconf(_SC_PHYS_PAGES) * page;
    *free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * page;

    FILE *file = fopen("/proc/meminfo", "r");
    if (!file) return;
    char line[128];
    unsigned long long kib;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) *free_bytes = (size_t)kib * 1024;
    fclose(file);
}

/* ---- what ops use ------------------------------------------------------------------------- */

void *cpu_scratch(struct device *dev, enum scratch_use use, size_t bytes, const char *op)
{
    struct cpu_device *cpu = cpu_device(dev);
    if (cpu->failed_op) return NULL;
    if (bytes <= cpu->scratch_bytes[use]) return cpu->scratch[use];

    free(cpu->scratch[use]);
    cpu->scratch_bytes[use] = 0;
    cpu->scratch[use] = memory_alloc(bytes);
    if (!cpu->scratch[use]) {
        cpu->failed_op = op;
        cpu->failed_bytes = bytes;
        return NULL;
    }
    memset(cpu->scratch[use], 0, bytes);
    cpu->scratch_bytes[use] = bytes;
    return cpu->scratch[use];
}

void cpu_parallel(struct device *dev, int n_items, int grain, threads_fn fn, void *context)
{
    threads_run(cpu_device(dev)->threads, n_items, grain, fn, context);
}

struct widen_rows {
    const struct simd *simd;
    float *to;        /* [n_rows, K] */
    const void *from; /* [., K] dtype */
    const int32_t *index;
    enum dtype dtype;
    size_t K;
};

static void widen_rows(void *context, int begin, int end, int thread)
{
    const struct widen_rows *op = context;

    (void)thread;
    for (int i = begin; i < end; i++) {
        const size_t row = (size_t)(op->index ? op->index[i] : i);
        op->simd->widen(op->to + (size_t)i * op->K, element(op->from, op->dtype, row * op->K),
                        op->dtype, op->K);
    }
}

const float *const *cpu_rows_f32(struct device *dev, const void *x, const int32_t *index,
                                 int n_rows, int K, enum dtype dtype, const char *op)
{
    const size_t pitch = (size_t)K;
    const size_t n_wide = dtype == DTYPE_F32 ? 0 : (size_t)n_rows * pitch;
    float *wide = cpu_scratch(dev, SCRATCH_ROWS,
                              n_wide * sizeof *wide + (size_t)(n_rows + 1) * sizeof(float *), op);
    if (!wide) return NULL;

    const size_t first = (n_wide * sizeof *wide + sizeof(float *) - 1) / sizeof(float *);
    const float **row = (const float **)(void *)wide + first;
    if (dtype == DTYPE_F32) {
        for (int i = 0; i < n_rows; i++)
            row[i] = (const float *)x + (size_t)(index ? index[i] : i) * pitch;
    } else {
        struct widen_rows rows = {cpu_device(dev)->simd, wide, x, index, dtype, pitch};
        cpu_parallel(dev, n_rows, 8, widen_rows, &rows);
        for (int i = 0; i < n_rows; i++) row[i] = wide + (size_t)i * pitch;
    }
    return row;
}

/* ---- open, close -------------------------------------------------------------------------- */

static void cpu_close(struct device *dev)
{
    struct cpu_device *cpu = cpu_device(dev);
    threads_close(cpu->threads);
    for (int use = 0; use < SCRATCH_USES; use++) free(cpu->scratch[use]);
    free(cpu->marks);
    free(cpu);
}

static bool cpu_replay(struct device *dev, const void *key, size_t bytes)
{
    (void)dev, (void)key, (void)bytes;
    return false; /* a call costs nothing here */
}

static void cpu_record_end(struct device *dev)
{
    (void)dev;
}

static const struct kernels cpu_kernels = {
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .alloc_host = cpu_alloc, /* all memory here is the host's */
    .free_host = cpu_free,
    .upload = cpu_upload,
    .download = cpu_download,
    .copy = cpu_copy,
    .sync = cpu_sync,
    .memory = cpu_memory,
    .metadata = cpu_metadata,
    .embed = cpu_embed,
    .add_rms_norm = cpu_add_rms_norm,
    .matmul = cpu_matmul,
    .head_norm = cpu_head_norm,
    .rope = cpu_rope,
    .attention = cpu_attention,
    .silu_mul = cpu_silu_mul,
    .gather_rows = cpu_gather_rows,
    .lora_shrink = cpu_lora_shrink,
    .lora_expand = cpu_lora_expand,
    .sample = cpu_sample,
    .logprobs = cpu_logprobs,
    .replay = cpu_replay,
    .record_end = cpu_record_end,
    .mark = cpu_mark,
    .elapsed = cpu_elapsed,
    .lora_embed = cpu_lora_embed,
    .lora_head = cpu_lora_head,
    .lora_add_rms_norm = cpu_lora_add_rms_norm,
    .lora_head_norm = cpu_lora_head_norm,
    .lora_row_norms = cpu_lora_row_norms,
    .extend_metadata = cpu_extend_metadata,
    .lora_expand_silu_mul = cpu_lora_expand_silu_mul,
    .upload_beside = cpu_upload_beside,
    .move = cpu_move,
    .fetch = cpu_fetch,
    .wait = cpu_wait,
};

mlora_status cpu_device_open(struct device **out, int n_threads)
{
    *out = NULL;
    if (n_threads <= 0) n_threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (n_threads <= 0) n_threads = 1;
    if (n_threads > THREADS_MAX) n_threads = THREADS_MAX;

    struct cpu_device *cpu = calloc(1, sizeof *cpu);
    if (!cpu) return error_set(MLORA_ENOMEM, "out of memory for the CPU device");
    const mlora_status status = threads_open(&cpu->threads, n_threads);
    if (status != MLORA_OK) {
        free(cpu);
        return status;
    }
    cpu->simd = simd_best();
    cpu->base.ops = &cpu_kernels;
    cpu->base.backend = "cpu";
    cpu->base.exact_tokens = INT_MAX;
    snprintf(cpu->base.description, sizeof cpu->base.description, "%s, %d thread%s",
             cpu->simd->name, n_threads, n_threads == 1 ? "" : "s");
    *out = &cpu->base;
    return MLORA_OK;
}
