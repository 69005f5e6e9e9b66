/* One prompt through the base model and any number of adapters, in one batch.
 *
 *     mixed_batch MODEL_DIR PROMPT ADAPTER_DIR... */
#include <stdio.h>
#include <string.h>

#include "engine/mlora.h"

enum { MAX_ANSWERS = 16, MAX_BYTES = 4096 };

struct answer {
    char text[MAX_BYTES];
    size_t bytes;
};

static void on_event(void *user, const mlora_event *event)
{
    struct answer *answer = user;
    if (answer->bytes + event->text_bytes > sizeof answer->text) return;
    memcpy(answer->text + answer->bytes, event->text, event->text_bytes);
    answer->bytes += event->text_bytes;
}

int main(int argc, char **argv)
{
    static struct answer answers[MAX_ANSWERS];
    mlora_options options;
    mlora_engine *engine = NULL;
    mlora_request request;
    int n_active = 1;

    if (argc < 3 || argc > 2 + MAX_ANSWERS) {
        fprintf(stderr, "usage: mixed_batch MODEL_DIR PROMPT ADAPTER_DIR...\n");
        return 2;
    }
    mlora_options_default(&options);
    options.model = argv[1];
    mlora_status status = mlora_open(&engine, &options);
    for (int i = 2; i < argc && status == MLORA_OK; i++) { /* 2: the base model, no adapter */
        if (i > 2) status = mlora_adapter_load(engine, argv[i], argv[i]);
        mlora_request_default(engine, &request);
        request.adapter = i > 2 ? argv[i] : NULL;
        request.prompt = argv[2];
        request.temperature = 0;
        request.on_event = on_event;
        request.user = &answers[i - 2];
        if (status == MLORA_OK) status = mlora_submit(engine, &request, NULL);
    }
    while (status == MLORA_OK && n_active > 0) status = mlora_step(engine, &n_active);
    if (status != MLORA_OK) fprintf(stderr, "mixed_batch: %s\n", mlora_error());
    for (int i = 2; i < argc && status == MLORA_OK; i++)
        printf("[%s]\n%.*s\n\n", i > 2 ? argv[i] : "base", (int)answers[i - 2].bytes,
               answers[i - 2].text);
    mlora_close(engine);
    return status == MLORA_OK ? 0 : 1;
}
