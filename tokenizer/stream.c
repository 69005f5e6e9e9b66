#include "tokenizer/stream.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"
#include "tokenizer/unicode.h"

mlora_status stream_open(struct stream *out, const struct tokenizer *tokenizer,
                         const char *const *stop, int n_stop)
{
    struct stream stream = {.tokenizer = tokenizer};

    *out = (struct stream){0};
    stream.stop = calloc((size_t)n_stop + 1, sizeof *stream.stop);
    stream.stop_bytes = calloc((size_t)n_stop + 1, sizeof *stream.stop_bytes);
    if (!stream.stop || !stream.stop_bytes) goto out_of_memory;
    for (int i = 0; i < n_stop; i++) {
        if (!*stop[i]) continue; /* an empty string would stop before the first token */
        char *copy = strdup(stop[i]);
        if (!copy) goto out_of_memory;
        stream.stop[stream.n_stop] = copy;
        stream.stop_bytes[stream.n_stop++] = strlen(copy);
    }
    *out = stream;
    return MLORA_OK;

out_of_memory:
    stream_close(&stream);
    return error_set(MLORA_ENOMEM, "out of memory: stop strings");
}

/* Find the stop string that is complete first, the longest of those that end together: the same
 * one, however the text is cut into tokens. */
static const char *find_stop(const struct stream *stream, const char *text, size_t bytes)
{
    const char *best = NULL, *best_end = NULL;

    for (int i = 0; i < stream->n_stop; i++) {
        const char *at = memmem(text, bytes, stream->stop[i], stream->stop_bytes[i]);
        if (!at) continue;
        const char *end = at + stream->stop_bytes[i];
        if (best && (end > best_end || (end == best_end && at >= best))) continue;
        best = at;
        best_end = end;
    }
    return best;
}

/* How many bytes at the end of the text may be the beginning of a stop string. */
static size_t undecided(const struct stream *stream, const char *text, size_t bytes)
{
    size_t most = 0;

    for (int i = 0; i < stream->n_stop; i++) {
        size_t n = stream->stop_bytes[i] - 1;
        if (n > bytes) n = bytes;
        while (n > most && memcmp(text + bytes - n, stream->stop[i], n) != 0) n--;
        if (n > most) most = n;
    }
    return most;
}

/* Release the whole characters among what is held, `final`: also what is incomplete. */
static mlora_status release(struct stream *stream, struct buffer *out, bool final)
{
    struct buffer *held = &stream->held;
    const size_t tail = final ? 0 : utf8_incomplete(buffer_text(held), held->bytes);
    struct buffer whole = {0}, rest = {0};

    mlora_status status = utf8_append_lossy(&whole, buffer_text(held), held->bytes - tail);
    if (status != MLORA_OK) goto done;
    const char *text = buffer_text(&whole);
    const char *stop = find_stop(stream, text, whole.bytes);
    if (stop) {
        stream->stopped = true;
        status = buffer_append(out, text, (size_t)(stop - text));
        held->bytes = 0;
        goto done;
    }
    const size_t keep = final ? 0 : undecided(stream, text, whole.bytes);
    status = buffer_append(&rest, text + whole.bytes - keep, keep);
    if (status == MLORA_OK)
        status = buffer_append(&rest, buffer_text(held) + held->bytes - tail, tail);
    if (status == MLORA_OK) status = buffer_append(out, text, whole.bytes - keep);
    if (status != MLORA_OK) goto done;
    const struct buffer old = *held;
    *held = rest;
    rest = old;

done:
    buffer_free(&whole);
    buffer_free(&rest);
    return status;
}

mlora_status stream_push(struct stream *stream, struct buffer *out, int32_t id)
{
    if (stream->stopped) return MLORA_OK;
    const mlora_status status = tokenizer_piece(stream->tokenizer, &stream->held, id);
    return status == MLORA_OK ? release(stream, out, false) : status;
}

mlora_status stream_finish(struct stream *stream, struct buffer *out)
{
    return stream->stopped ? MLORA_OK : release(stream, out, true);
}

void stream_close(struct stream *stream)
{
    for (int i = 0; i < stream->n_stop; i++) free(stream->stop[i]);
    free(stream->stop);
    free(stream->stop_bytes);
    buffer_free(&stream->held);
    *stream = (struct stream){0};
}
