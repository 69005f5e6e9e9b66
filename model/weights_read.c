/* Several threads read pieces of the files into a ring of buffers, and the caller's thread sends
 * them to the device in their order. While the device takes one half of the ring, which needs no
 * copy on the host where the buffers are the device's own, the other half is read. */
#include "model/weights_read.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"

enum { PIECE_BYTES = 4 << 20, HALF_MAX = 8, READERS_MAX = 8, MESSAGE_BYTES = 512 };

enum piece_state { PIECE_NONE, PIECE_WAITING, PIECE_TAKEN, PIECE_READ };

/* Some bytes of a part, and where they go. */
struct piece {
    const struct part *part;
    int64_t at; /* in the tensor */
    size_t bytes;
    char *to; /* on the device */
    enum dtype dtype;
    char *buffer; /* [PIECE_BYTES] as stored */
    enum piece_state state;
    mlora_status status;
    char message[MESSAGE_BYTES]; /* where status is not OK */
};

struct reader {
    struct device *dev;
    const struct weights_plan *plan;
    struct piece ring[2 * HALF_MAX];
    int half;      /* pieces of a half */
    float *wide;   /* [PIECE_BYTES / 2] a piece in f32 */
    char *buffers; /* [2 half, PIECE_BYTES] */

    /* The next piece of the plan. */
    int array, part;
    int64_t at;
    char *to;

    pthread_t threads[READERS_MAX];
    int n_threads;
    pthread_mutex_t lock; /* guards what is below, and the states */
    pthread_cond_t changed;
    bool stop;
};

mlora_status array_alloc(struct device *dev, const struct array *array, char **memory)
{
    void *fresh = NULL;
    const mlora_status status = dev->ops->alloc(dev, (size_t)array_bytes(array), &fresh);

    *memory = fresh;
    if (status != MLORA_OK) return status;
    if (array->matrix)
        *array->matrix = (struct matrix){fresh, array->dtype, array->N, array->K};
    else
        *array->vector = fresh;
    return MLORA_OK;
}

/* ---- the readers ---------------------------------------------------------------------------- */

static struct piece *waiting_piece(struct reader *reader)
{
    for (int i = 0; i < 2 * reader->half; i++)
        if (reader->ring[i].state == PIECE_WAITING) return &reader->ring[i];
    return NULL;
}

static void *read_pieces(void *user)
{
    struct reader *reader = user;

    pthread_mutex_lock(&reader->lock);
    while (!reader->stop) {
        struct piece *piece = waiting_piece(reader);
        if (!piece) {
            pthread_cond_wait(&reader->changed, &reader->lock);
            continue;
        }
        piece->state = PIECE_TAKEN;
        pthread_mutex_unlock(&reader->lock);
        piece->status = file_read_at(&piece->part->file->file, piece->buffer, piece->bytes,
                                     piece->part->tensor->offset + piece->at);
        if (piece->status != MLORA_OK)
            snprintf(piece->message, sizeof piece->message, "%s", error_text());
        pthread_mutex_lock(&reader->lock);
        piece->state = PIECE_READ;
        pthread_cond_broadcast(&reader->changed);
    }
    pthread_mutex_unlock(&reader->lock);
    return NULL;
}

/* ---- the caller ----------------------------------------------------------------------------- */

/* The next piece of the plan to `piece`, PIECE_NONE after the last. Allocates an array when its
 * first piece comes. */
static mlora_status next_piece(struct reader *reader, struct piece *piece)
{
    const struct weights_plan *plan = reader->plan;

    piece->state = PIECE_NONE;
    while (reader->array < plan->n_arrays) {
        const struct array *array = &plan->arrays[reader->array];
        if (reader->part == 0 && reader->at == 0) {
            const mlora_status status = array_alloc(reader->dev, array, &reader->to);
            if (status != MLORA_OK) return status;
        }
        const struct part *part = &array->parts[reader->part];
        const int64_t left = part->tensor->bytes - reader->at;
        if (left > 0) {
            piece->part = part;
            piece->at = reader->at;
            piece->bytes = (size_t)(left < PIECE_BYTES ? left : PIECE_BYTES);
            piece->to = reader->to;
            piece->dtype = array->dtype;
            piece->state = PIECE_WAITING;
            reader->at += (int64_t)piece->bytes;
            reader->to += piece->bytes / dtype_bytes(part->dtype) * dtype_bytes(array->dtype);
        }
        if (reader->at == part->tensor->bytes) {
            reader->at = 0;
            if (++reader->part == array->n_parts) reader->part = 0, reader->array++;
        }
        if (left > 0) break;
    }
    return MLORA_OK;
}

static mlora_status order_half(struct reader *reader, struct piece *pieces)
{
    mlora_status status = MLORA_OK;

    pthread_mutex_lock(&reader->lock);
    for (int i = 0; i < reader->half && status == MLORA_OK; i++)
        status = next_piece(reader, &pieces[i]);
    pthread_cond_broadcast(&reader->changed);
    pthread_mutex_unlock(&reader->lock);
    return status;
}

/* Wait until the piece is read, and start its upload. */
static mlora_status send_piece(struct reader *reader, struct piece *piece)
{
    pthread_mutex_lock(&reader->lock);
    while (piece->state != PIECE_READ) pthread_cond_wait(&reader->changed, &reader->lock);
    pthread_mutex_unlock(&reader->lock);
    if (piece->status != MLORA_OK) return error_set(piece->status, "%s", piece->message);

    const size_t n = piece->bytes / dtype_bytes(piece->part->dtype);
    const void *from = piece->buffer;
    if (piece->part->dtype != piece->dtype) {
        dtype_widen(reader->wide, piece->buffer, piece->part->dtype, n);
        from = reader->wide;
    }
    reader->dev->ops->upload(reader->dev, piece->to, from, n * dtype_bytes(piece->dtype));
    return MLORA_OK;
}

static mlora_status read_all(struct reader *reader, mlora_progress_fn progress, void *user)
{
    int64_t done = 0;

    mlora_status status = order_half(reader, reader->ring);
    if (status == MLORA_OK) status = order_half(reader, reader->ring + reader->half);
    for (int h = 0; status == MLORA_OK; h = 1 - h) {
        struct piece *pieces = reader->ring + h * reader->half;
        if (pieces[0].state == PIECE_NONE) return MLORA_OK;
        for (int i = 0; i < reader->half && pieces[i].state != PIECE_NONE; i++) {
            status = send_piece(reader, &pieces[i]);
            if (status != MLORA_OK) return status;
            done += (int64_t)pieces[i].bytes;
            if (progress) progress(user, done, reader->plan->read_bytes);
        }
        status = reader->dev->ops->sync(reader->dev); /* the buffers are the readers' again */
        if (status == MLORA_OK) status = order_half(reader, pieces);
    }
    return status;
}

/* ---- open, close ---------------------------------------------------------------------------- */

static mlora_status reader_open(struct reader *reader)
{
    const int64_t n_pieces = reader->plan->read_bytes / (2 * PIECE_BYTES) + 1;
    const long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    void *buffers = NULL;

    reader->half = n_pieces < HALF_MAX ? (int)n_pieces : HALF_MAX;
    const mlora_status status =
        reader->dev->ops->alloc_host(reader->dev, 2 * (size_t)reader->half * PIECE_BYTES, &buffers);
    if (status != MLORA_OK) return status;
    reader->buffers = buffers;
    for (int i = 0; i < 2 * reader->half; i++)
        reader->ring[i].buffer = reader->buffers + (size_t)i * PIECE_BYTES;
    reader->wide = malloc((size_t)PIECE_BYTES / 2 * sizeof *reader->wide);
    if (!reader->wide) return error_set(MLORA_ENOMEM, "out of memory for reading weights");
    while (reader->n_threads < READERS_MAX && reader->n_threads < n_cpus &&
           reader->n_threads < 2 * reader->half) {
        if (pthread_create(&reader->threads[reader->n_threads], NULL, read_pieces, reader) != 0)
            break;
        reader->n_threads++;
    }
    if (reader->n_threads == 0)
        return error_set(MLORA_ENOMEM, "no thread can be started to read the weights");
    return MLORA_OK;
}

static void reader_close(struct reader *reader)
{
    pthread_mutex_lock(&reader->lock);
    reader->stop = true;
    pthread_cond_broadcast(&reader->changed);
    pthread_mutex_unlock(&reader->lock);
    for (int i = 0; i < reader->n_threads; i++) pthread_join(reader->threads[i], NULL);
    reader->dev->ops->free_host(reader->dev, reader->buffers); /* waits for the uploads */
    free(reader->wide);
}

mlora_status weights_read(struct device *dev, const struct weights_plan *plan,
                          mlora_progress_fn progress, void *user)
{
    struct reader *reader = calloc(1, sizeof *reader);

    if (!reader) return error_set(MLORA_ENOMEM, "out of memory for reading weights");
    reader->dev = dev;
    reader->plan = plan;
    if (pthread_mutex_init(&reader->lock, NULL) != 0 ||
        pthread_cond_init(&reader->changed, NULL) != 0) {
        free(reader);
        return error_set(MLORA_ENOMEM, "out of memory for reading weights");
    }
    mlora_status status = reader_open(reader);
    if (status == MLORA_OK) status = read_all(reader, progress, user);
    reader_close(reader);
    pthread_cond_destroy(&reader->changed);
    pthread_mutex_destroy(&reader->lock);
    free(reader);
    return status;
}
