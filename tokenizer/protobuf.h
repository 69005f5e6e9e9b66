/* Reading protobuf's wire format: fields one after another, every length checked. */
#ifndef MLORA_TOKENIZER_PROTOBUF_H
#define MLORA_TOKENIZER_PROTOBUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A message that is being read; borrows its bytes. */
struct protobuf {
    const unsigned char *data;
    size_t bytes; /* left */
    bool broken;  /* a length or a number runs over the end, or a field number is 0 */
};

enum { PROTOBUF_VARINT = 0, PROTOBUF_FIXED64 = 1, PROTOBUF_BYTES = 2, PROTOBUF_FIXED32 = 5 };

struct protobuf_field {
    uint32_t number;
    int wire;                  /* PROTOBUF_ */
    uint64_t value;            /* of VARINT, FIXED32, FIXED64 */
    const unsigned char *data; /* of BYTES, [bytes] */
    size_t bytes;
};

/* Take the next field. False at the end, and when the message is broken. */
bool protobuf_next(struct protobuf *message, struct protobuf_field *out);

#endif
