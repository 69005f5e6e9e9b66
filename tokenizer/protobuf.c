#include "tokenizer/protobuf.h"

static bool take_varint(struct protobuf *message, uint64_t *out)
{
    *out = 0;
    for (int shift = 0; shift < 64 && message->bytes > 0; shift += 7) {
        const unsigned char byte = *message->data++;
        message->bytes--;
        *out |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return true;
    }
    return false;
}

static bool take_fixed(struct protobuf *message, size_t bytes, uint64_t *out)
{
    *out = 0;
    if (message->bytes < bytes) return false;
    for (size_t i = 0; i < bytes; i++) *out |= (uint64_t)message->data[i] << 8 * i;
    message->data += bytes;
    message->bytes -= bytes;
    return true;
}

static bool take_bytes(struct protobuf *message, struct protobuf_field *out)
{
    uint64_t bytes;
    if (!take_varint(message, &bytes) || bytes > message->bytes) return false;
    out->data = message->data;
    out->bytes = (size_t)bytes;
    message->data += bytes;
    message->bytes -= (size_t)bytes;
    return true;
}

bool protobuf_next(struct protobuf *message, struct protobuf_field *out)
{
    uint64_t tag;
    bool good = false;

    *out = (struct protobuf_field){0};
    if (message->broken || message->bytes == 0) return false;
    if (take_varint(message, &tag) && tag >> 3 != 0 && tag >> 3 <= UINT32_MAX >> 3) {
        out->number = (uint32_t)(tag >> 3);
        out->wire = (int)(tag & 7);
        switch (out->wire) {
        case PROTOBUF_VARINT:
            good = take_varint(message, &out->value);
            break;
        case PROTOBUF_FIXED64:
            good = take_fixed(message, 8, &out->value);
            break;
        case PROTOBUF_FIXED32:
            good = take_fixed(message, 4, &out->value);
            break;
        case PROTOBUF_BYTES:
            good = take_bytes(message, out);
            break;
        default:
            break; /* groups are long gone */
        }
    }
    message->broken = !good;
    return good;
}
