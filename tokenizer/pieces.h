/* A text on its way to ids, cut into pieces: each is text that is still to be encoded, or a token
 * that was found already. Every stage reads one list and writes the next. */
#ifndef MLORA_TOKENIZER_PIECES_H
#define MLORA_TOKENIZER_PIECES_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/base/buffer.h"

struct piece {
    size_t start, end; /* in the list's text */
    int32_t id;        /* a token's, -1: text */
    bool first;        /* begins where the whole text begins */
};

struct pieces {
    struct buffer text;
    struct piece *data; /* [n] */
    size_t n, capacity;
};

/* Returns OK or ENOMEM. An empty text piece is left out. */
mlora_status pieces_push(struct pieces *pieces, struct piece piece);

void pieces_clear(struct pieces *pieces); /* keeps the memory */
void pieces_free(struct pieces *pieces);

#endif
