#include "tests/support.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "kernels/cpu/device.h"

TestSuite(device, .init = device_open, .fini = device_close);

Test(device, aligns_memory_and_keeps_what_is_uploaded)
{
    static const size_t sizes[] = {0, 1, 255, 256, 257, 5 << 20};

    for (int i = 0; i < 6; i++) {
        void *memory = device_memory(sizes[i]);
        cr_expect_eq((uintptr_t)memory % 256, 0);
        cr_expect(memory);
    }
    const char text[] = "forty-two";
    char back[sizeof text];
    download(back, upload(text, sizeof text), sizeof text);
    cr_expect_str_eq(back, text);
    dev->ops->free(dev, NULL);
}

Test(device, keeps_results_of_products_in_f32_for_512_tokens_the_cpu_for_all)
{
    const int few = device_is_cpu() ? 1 << 30 : 512;

    cr_expect_eq(product_dtype(dev, few, DTYPE_BF16), DTYPE_F32);
    cr_expect_eq(product_dtype(dev, few + 1, DTYPE_BF16), device_is_cpu() ? DTYPE_F32 : DTYPE_BF16);
    cr_expect_eq(product_dtype(dev, few + 1, DTYPE_F32), DTYPE_F32);
}

Test(device, uploads_from_its_own_host_memory)
{
    enum { BYTES = 3 << 20 };
    unsigned char *back = zeros(BYTES, 1), *from;
    void *host, *memory = device_memory(BYTES);

    cr_assert_eq(dev->ops->alloc_host(dev, BYTES, &host), MLORA_OK);
    from = host;
    for (int i = 0; i < BYTES; i++) from[i] = (unsigned char)(i * 7 + i / 251);
    dev->ops->upload(dev, memory, from, BYTES);
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    download(back, memory, BYTES);
    cr_expect_arr_eq(back, from, BYTES);
    dev->ops->free_host(dev, host);
    dev->ops->free_host(dev, NULL);
    free(back);
}

Test(device, keeps_the_order_of_many_small_uploads)
{
    enum { N = 3000, BYTES = 4096 };
    static unsigned char sent[BYTES], back[N];
    unsigned char *memory = device_memory((size_t)N * BYTES);

    for (int i = 0; i < N; i++) {
        memset(sent, i % 251, sizeof sent);
        dev->ops->upload(dev, memory + (size_t)i * BYTES, sent, sizeof sent);
        memset(sent, 255, sizeof sent); /* it may be used again at once */
    }
    for (int i = 0; i < N; i += 97) {
        download(back, memory + (size_t)i * BYTES, sizeof back);
        for (size_t k = 0; k < sizeof back; k++) cr_assert_eq(back[k], i % 251);
    }
}

Test(device, fetches_what_stood_there_and_goes_on)
{
    enum { N = 4096, ROUNDS = 20 };
    int32_t *host[FENCES], numbers[N], *memory = device_memory(sizeof numbers);
    void *pinned;

    for (int f = 0; f < FENCES; f++) {
        cr_assert_eq(dev->ops->alloc_host(dev, sizeof numbers, &pinned), MLORA_OK);
        host[f] = pinned;
    }
    for (int round = 0; round <= ROUNDS;
         round++) { /* the fetch of one round is awaited in the next */
        const int fence = round % FENCES, before = 1 - fence;
        for (int i = 0; i < N; i++) numbers[i] = round * N + i;
        dev->ops->upload(dev, memory, numbers, sizeof numbers);
        dev->ops->fetch(dev, host[fence], memory, sizeof numbers, fence);
        if (round == 0) continue;
        cr_assert_eq(dev->ops->wait(dev, before), MLORA_OK);
        for (int i = 0; i < N; i++) cr_assert_eq(host[before][i], (round - 1) * N + i);
    }
    cr_assert_eq(dev->ops->sync(dev), MLORA_OK);
    for (int f = 0; f < FENCES; f++) dev->ops->free_host(dev, host[f]);
}

/* Bytes that differ from place to place. */
static unsigned char *pattern(size_t n, uint64_t seed)
{
    struct numbers numbers = {seed};
    unsigned char *bytes = zeros(n + 8, 1);
    for (size_t i = 0; i < n; i += 8) {
        const uint64_t word = next_word(&numbers);
        memcpy(bytes + i, &word, 8);
    }
    return bytes;
}

struct beside {
    void *to;
    const void *from;
    size_t bytes;
    mlora_status status;
};

static void *copy_beside(void *context)
{
    struct beside *copy = context;
    for (int i = 0; i < 3 && copy->status == MLORA_OK; i++)
        copy->status = dev->ops->upload_beside(dev, 0, copy->to, copy->from, copy->bytes);
    return NULL;
}

Test(device, copies_from_another_thread_while_ops_run)
{
    static const size_t sizes[] = {0, 1, 8 << 20, (20 << 20) + 13}; /* none to several pieces */

    for (int i = 0; i < 4; i++) {
        unsigned char *want = pattern(sizes[i], (uint64_t)i), *got = zeros(sizes[i] + 1, 1);
        struct beside copy = {device_memory(sizes[i]), want, sizes[i], MLORA_OK};
        pthread_t thread;
        cr_assert_eq(pthread_create(&thread, NULL, copy_beside, &copy), 0);
        for (int k = 0; k < 50; k++) {
            const int number = k;
            int back;
            download(&back, upload(&number, sizeof number), sizeof number);
            cr_assert_eq(back, number);
        }
        pthread_join(thread, NULL);
        cr_assert_eq(copy.status, MLORA_OK);
        download(got, copy.to, sizes[i]);
        cr_expect_arr_eq(got, want, sizes[i], "%zu bytes", sizes[i]);
        free(want);
        free(got);
    }
}

Test(device, moves_memory_that_overlaps_towards_the_front)
{
    enum { BYTES = 70 << 20, LARGE = 8 << 20 };
    static const size_t distances[] = {256, LARGE, BYTES};

    for (int i = 0; i < 3; i++) {
        unsigned char *want = pattern(BYTES, (uint64_t)i), *got = zeros(BYTES, 1);
        char *memory = device_memory(distances[i] + BYTES);
        dev->ops->upload(dev, memory + distances[i], want, BYTES);
        dev->ops->move(dev, memory, memory + distances[i], BYTES);
        download(got, memory, BYTES);
        cr_expect(memcmp(got, want, BYTES) == 0, "by %zu bytes", distances[i]);
        free(want);
        free(got);
    }
}

Test(device, says_how_much_memory_there_is)
{
    size_t n_free, n_total;
    dev->ops->memory(dev, &n_free, &n_total);
    cr_expect_gt(n_free, (size_t)1 << 20);
    cr_expect_geq(n_total, n_free);
}

Test(device, refuses_more_memory_than_there_is)
{
    void *memory;
    cr_expect_eq(dev->ops->alloc(dev, SIZE_MAX - 10, &memory), MLORA_ENOMEM);
    cr_expect_null(memory);
    cr_expect(strstr(error_text(), "out of memory"), "%s", error_text());
}

Test(device, describes_the_cpu)
{
    struct device *one, *two;
    char want[96];

    cr_assert_eq(cpu_device_open(&one, 1), MLORA_OK);
    cr_assert_eq(cpu_device_open(&two, 2), MLORA_OK); /* two devices in one process */
    snprintf(want, sizeof want, "%s, 1 thread", simd_best()->name);
    cr_expect_str_eq(one->description, want);
    snprintf(want, sizeof want, "%s, 2 threads", simd_best()->name);
    cr_expect_str_eq(two->description, want);
    cr_expect_str_eq(one->backend, "cpu");
    one->ops->close(one);
    two->ops->close(two);
}

Test(device, reports_the_first_op_that_ran_out_of_scratch)
{
    struct device *cpu;
    cr_assert_eq(cpu_device_open(&cpu, 1), MLORA_OK);
    cr_expect_null(cpu_scratch(cpu, SCRATCH_OP, SIZE_MAX - 7, "attention"));
    cr_expect_null(cpu_scratch(cpu, SCRATCH_OP, 8, "matmul"));
    cr_expect_eq(cpu->ops->sync(cpu), MLORA_EDEVICE);
    cr_expect(strstr(error_text(), "attention: out of memory"), "%s", error_text());
    cpu->ops->close(cpu);
}

Test(device, cuda_opens_or_says_why_not)
{
    struct device *gpu;
    const mlora_status status = cuda_device_open(&gpu, 0, NULL);

    if (status == MLORA_OK) {
        cr_expect_str_eq(gpu->backend, "cuda");
        gpu->ops->close(gpu);
        return;
    }
    cr_expect_eq(status, MLORA_EUNSUPPORTED);
    cr_expect_null(gpu);
    cr_expect(strstr(error_text(), "GPU 0: "), "%s", error_text());
    cr_expect(strstr(error_text(), "use the CPU backend"), "%s", error_text());
}
