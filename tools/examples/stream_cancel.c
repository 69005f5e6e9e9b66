/* Stream an answer to the terminal, and cancel it from another thread when Enter is pressed.
 *
 *     stream_cancel MODEL_DIR PROMPT */
#include <pthread.h>
#include <stdio.h>

#include "engine/mlora.h"

struct running {
    mlora_engine *engine;
    uint64_t id;
};

static void on_event(void *user, const mlora_event *event)
{
    (void)user;
    fwrite(event->text, 1, event->text_bytes, stdout);
    fflush(stdout);
    if (event->finish == MLORA_FINISH_CANCEL) printf(" [cancelled]");
}

static void *cancel_on_enter(void *argument)
{
    struct running *running = argument;
    if (getchar() != EOF) mlora_cancel(running->engine, running->id); /* from any thread */
    return NULL;
}

int main(int argc, char **argv)
{
    mlora_options options;
    mlora_request request;
    struct running running = {NULL, 0};
    pthread_t thread;
    int n_active = 1;

    if (argc != 3) {
        fprintf(stderr, "usage: stream_cancel MODEL_DIR PROMPT\n");
        return 2;
    }
    mlora_options_default(&options);
    options.model = argv[1];
    mlora_status status = mlora_open(&running.engine, &options);
    mlora_request_default(running.engine, &request);
    request.prompt = argv[2];
    request.max_tokens = -1; /* until the model ends, the context is full, or Enter */
    request.on_event = on_event;
    if (status == MLORA_OK) status = mlora_submit(running.engine, &request, &running.id);
    if (status == MLORA_OK) pthread_create(&thread, NULL, cancel_on_enter, &running);
    while (status == MLORA_OK && n_active > 0) status = mlora_step(running.engine, &n_active);
    if (status != MLORA_OK) fprintf(stderr, "stream_cancel: %s\n", mlora_error());
    putchar('\n');
    return status == MLORA_OK ? 0 : 1; /* the thread may still read: exit ends it */
}
