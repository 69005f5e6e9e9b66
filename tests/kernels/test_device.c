#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdio.h>
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
