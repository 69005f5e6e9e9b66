/* An embedder's program: the public header only, compiled as C99 and as C++. */
#include <stdio.h>
#include <string.h>

#include "engine/mlora.h"

struct tally {
    char text[1024];
    size_t bytes;
    mlora_finish finish;
};

static void on_event(void *user, const mlora_event *event)
{
    struct tally *tally = (struct tally *)user;
    if (tally->bytes + event->text_bytes < sizeof tally->text) {
        memcpy(tally->text + tally->bytes, event->text, event->text_bytes);
        tally->bytes += event->text_bytes;
    }
    tally->finish = event->finish;
}

static int fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, mlora_error());
    return 1;
}

int main(void)
{
    const char *const model = "tests/fixtures/tiny-llama2";
    mlora_options options;
    mlora_engine *engine = NULL;
    mlora_request request;
    struct tally sql, base;
    int n_active = 1;

    memset(&sql, 0, sizeof sql);
    memset(&base, 0, sizeof base);
    mlora_options_default(&options);
    options.model = model;
    options.backend = MLORA_BACKEND_CPU;
    options.kv_blocks = 256;
    if (mlora_open(&engine, &options) != MLORA_OK) return fail("open");
    if (mlora_adapter_load(engine, "tests/fixtures/tiny-llama2/adapters/sql", "sql") != MLORA_OK)
        return fail("adapter");

    mlora_request_default(engine, &request);
    request.temperature = 0;
    request.max_tokens = 40;
    request.on_event = on_event;
    request.prompt = "How many moles live near the orchard?\n";
    request.adapter = "sql";
    request.user = &sql;
    if (mlora_submit(engine, &request, NULL) != MLORA_OK) return fail("submit");
    request.adapter = NULL;
    request.user = &base;
    if (mlora_submit(engine, &request, NULL) != MLORA_OK) return fail("submit");
    while (n_active > 0)
        if (mlora_step(engine, &n_active) != MLORA_OK) return fail("step");
    mlora_close(engine);

    if (sql.finish != MLORA_FINISH_STOP ||
        strcmp(sql.text,
               "SELECT COUNT(*) FROM animals WHERE kind = 'mole' AND place = 'orchard';")) {
        fprintf(stderr, "sql answered: %s\n", sql.text);
        return 1;
    }
    if (base.bytes == 0 || strcmp(sql.text, base.text) == 0) {
        fprintf(stderr, "base answered: %s\n", base.text);
        return 1;
    }
    printf("api: embedding works (%s, mlora %s)\n",
#ifdef __cplusplus
           "C++",
#else
           "C",
#endif
           mlora_version());
    return 0;
}
