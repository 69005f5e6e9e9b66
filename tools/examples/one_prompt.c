/* One prompt through one adapter, printed when it is done.
 *
 *     one_prompt MODEL_DIR ADAPTER_DIR PROMPT */
#include <stdio.h>

#include "engine/mlora.h"

static void on_event(void *user, const mlora_event *event)
{
    (void)user;
    fwrite(event->text, 1, event->text_bytes, stdout);
    if (event->finish != MLORA_RUNNING) putchar('\n');
}

static int fail(void)
{
    fprintf(stderr, "one_prompt: %s\n", mlora_error());
    return 1;
}

int main(int argc, char **argv)
{
    mlora_options options;
    mlora_engine *engine;
    mlora_request request;

    if (argc != 4) {
        fprintf(stderr, "usage: one_prompt MODEL_DIR ADAPTER_DIR PROMPT\n");
        return 2;
    }
    mlora_options_default(&options);
    options.model = argv[1];
    if (mlora_open(&engine, &options) != MLORA_OK) return fail();
    if (mlora_adapter_load(engine, argv[2], "mine") != MLORA_OK) return fail();

    mlora_request_default(engine, &request);
    request.adapter = "mine";
    request.prompt = argv[3];
    request.temperature = 0;
    request.on_event = on_event;
    if (mlora_submit(engine, &request, NULL) != MLORA_OK) return fail();

    for (int n_active = 1; n_active > 0;)
        if (mlora_step(engine, &n_active) != MLORA_OK) return fail();
    mlora_close(engine);
    return 0;
}
