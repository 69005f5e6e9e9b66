/* Tokenizer files and texts of unknown origin. The first byte chooses what the rest is: a
 * tokenizer.model, a tokenizer.json, a chat template, or a text for one of the fixtures.
 *
 *   clang -fsanitize=fuzzer,address,undefined ... && ./fuzz_tokenizer    from the project root */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tokenizer/chat.h"
#include "tokenizer/chat_form.h"
#include "tokenizer/stream.h"
#include "tokenizer/tokenizer.h"

enum { N_FIXTURES = 6 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static struct tokenizer *fixture(int index)
{
    static const char *const paths[N_FIXTURES] = {"tests/fixtures/tiny-llama2/tokenizer.model",
                                                  "tests/fixtures/tiny-llama2",
                                                  "tests/fixtures/tiny-llama3",
                                                  "tests/fixtures/tokenizers/qwen2",
                                                  "tests/fixtures/tokenizers/behaviors",
                                                  "tests/fixtures/tokenizers/sentencepiece-odd"};
    static struct tokenizer *open[N_FIXTURES];
    if (!open[index] && tokenizer_open(&open[index], paths[index]) != MLORA_OK) abort();
    return open[index];
}

/* Encode, decode and stream a text; what is streamed must be UTF-8 that a stop string ends. */
static void use(const struct tokenizer *tokenizer, const char *text, size_t bytes, int flags)
{
    const char *const stop[] = {"the", "\n\n"};
    struct ids ids = {0};
    struct buffer out = {0};
    struct stream stream;

    if (tokenizer_encode(tokenizer, &ids, text, bytes, flags) == MLORA_OK) {
        if (tokenizer_decode(tokenizer, &out, ids.data, ids.n, flags & 1) != MLORA_OK) abort();
        out.bytes = 0;
        if (stream_open(&stream, tokenizer, stop, 2) != MLORA_OK) abort();
        for (int i = 0; i < ids.n; i++) stream_push(&stream, &out, ids.data[i]);
        stream_finish(&stream, &out);
        for (int i = 0; i < 2; i++)
            if (memmem(out.data, out.bytes, stop[i], strlen(stop[i]))) abort();
        stream_close(&stream);
    }
    buffer_free(&out);
    ids_free(&ids);
}

static void open_file(const char *suffix, const char *data, size_t bytes)
{
    char path[64];
    struct tokenizer *tokenizer;

    snprintf(path, sizeof path, P_tmpdir "/mlora-fuzz-%d%s", (int)getpid(), suffix);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, bytes, file) != bytes) abort();
    fclose(file);
    if (tokenizer_open(&tokenizer, path) == MLORA_OK) {
        use(tokenizer, "the <s>king's caf\xc3\xa9  \xff\xf0\x9f\xa6\x8a 42\n", 30, 0);
        use(tokenizer, data, bytes < 200 ? bytes : 200, 3);
        tokenizer_close(tokenizer);
    }
    unlink(path);
}

static void chat(const char *text)
{
    const struct chat_message messages[] = {
        {"system", text}, {"user", text}, {"assistant", "ok"}, {"user", text}};
    struct chat_form form;
    struct ids ids = {0};

    chat_form_read(&form, text);
    chat_form_free(&form);
    for (int i = 1; i <= 2; i++) {
        chat_encode(fixture(i), &ids, NULL, messages, 4);
        ids.n = 0;
    }
    ids_free(&ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < 1) return 0;
    const int choice = data[0] % (2 + 1 + N_FIXTURES);
    char *text = malloc(bytes);
    if (!text) return 0;
    memcpy(text, data + 1, bytes - 1);
    text[bytes - 1] = '\0';
    if (choice == 0)
        open_file(".model", text, bytes - 1);
    else if (choice == 1)
        open_file(".json", text, bytes - 1);
    else if (choice == 2)
        chat(text);
    else
        use(fixture(choice - 3), text, bytes - 1, data[0] >> 6);
    free(text);
    return 0;
}
