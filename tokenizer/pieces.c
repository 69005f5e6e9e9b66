#include "tokenizer/pieces.h"

#include <stdlib.h>

#include "engine/base/error.h"

mlora_status pieces_push(struct pieces *pieces, struct piece piece)
{
    if (piece.id < 0 && piece.start == piece.end) return MLORA_OK;
    if (pieces->n == pieces->capacity) {
        const size_t capacity = pieces->capacity ? 2 * pieces->capacity : 64;
        struct piece *data = realloc(pieces->data, capacity * sizeof *data);
        if (!data) return error_set(MLORA_ENOMEM, "out of memory: %zu pieces of text", capacity);
        pieces->data = data;
        pieces->capacity = capacity;
    }
    pieces->data[pieces->n++] = piece;
    return MLORA_OK;
}

void pieces_clear(struct pieces *pieces)
{
    pieces->text.bytes = 0;
    pieces->n = 0;
}

void pieces_free(struct pieces *pieces)
{
    buffer_free(&pieces->text);
    free(pieces->data);
    *pieces = (struct pieces){0};
}
