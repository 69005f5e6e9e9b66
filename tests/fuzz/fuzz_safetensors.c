/* Any bytes as the header of a safetensors file: two bytes say how long its data is. What is
 * accepted must fill the data exactly and be found by name. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors file = {0};
    int64_t bytes = 0;

    if (size < 2) return 0;
    const int64_t data_bytes = data[0] | data[1] << 8;
    const size_t header_bytes = size - 2;
    const mlora_status status =
        safetensors_parse(&file, "fuzz.safetensors", (const char *)data + 2, header_bytes,
                          8 + (int64_t)header_bytes + data_bytes);
    if (status != MLORA_OK) return 0;

    for (int i = 0; i < file.n_tensors; i++) {
        const struct tensor *tensor = &file.tensors[i];
        if (safetensors_find(&file, tensor->name) != tensor) abort();
        if (tensor->offset < 8 + (int64_t)header_bytes || tensor->bytes < 0) abort();
        bytes += tensor->bytes;
    }
    if (bytes != data_bytes) abort();
    safetensors_close(&file);
    return 0;
}
