/* Generated tokens to text that can be shown: whole UTF-8 characters only, and nothing that may
 * be the beginning of a stop string, until that is decided. */
#ifndef MLORA_TOKENIZER_STREAM_H
#define MLORA_TOKENIZER_STREAM_H

#include "tokenizer/tokenizer.h"

struct stream {
    const struct tokenizer *tokenizer; /* borrowed */
    char **stop;                       /* [n_stop] owned copies */
    size_t *stop_bytes;                /* [n_stop] */
    int n_stop;
    struct buffer held; /* bytes that were decoded but not yet released */
    bool stopped;       /* a stop string was met: nothing more is released */
};

/* `stop` is copied. The text continues whatever came before it: a leading "▁" is a space.
 * Returns OK or ENOMEM; on failure `out` is zeroed. */
mlora_status stream_open(struct stream *out, const struct tokenizer *tokenizer,
                         const char *const *stop, int n_stop);

/* Take the next token and append what can be shown now to `out`. Sets `stream->stopped` when a
 * stop string is complete; the text before it is released, the string and all after it never.
 * Invalid UTF-8 is released as U+FFFD, by the rule of one per maximal ill-formed part.
 * Returns OK or ENOMEM. */
mlora_status stream_push(struct stream *stream, struct buffer *out, int32_t id);

/* The request ended: release what is held (an incomplete character as U+FFFD). */
mlora_status stream_finish(struct stream *stream, struct buffer *out);

void stream_close(struct stream *stream); /* accepts zeroes */

#endif
