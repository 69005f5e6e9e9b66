#include "tools/shape.h"

#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/base/file.h"

/* The tokenizer of shapes that have none of their own: it is small, and any ids will do. */
static const char TOKENIZER_OF[] = "llama-3.1-8b/tokenizer.json";

static const char NAMES[] = "llama-2-7b, llama-3.1-8b, llama-3.1-70b, llama-3.2-1b, "
                            "llama-3.2-3b or tinyllama";

/* Where the shapes are, seen from the program: where it was installed, or where it was built.
 * NULL: nowhere, or out of memory. */
static char *shapes_folder(void)
{
    static const char *const places[] = {"../share/mlora/shapes", "../tools/shapes",
                                         "../../tools/shapes"};
    char program[PATH_MAX];
    const ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);

    if (n < 0) return NULL;
    program[n] = 0;
    char *const slash = strrchr(program, '/');
    if (slash) *slash = 0;
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        char *folder = path_join(program, places[i]);
        if (folder && file_is_directory(folder)) return folder;
        free(folder);
    }
    return NULL;
}

static bool is_config(const char *path)
{
    const char *const slash = strrchr(path, '/');
    return strcmp(slash ? slash + 1 : path, "config.json") == 0;
}

/* dir/config.json -> dir */
static char *folder_of(const char *path)
{
    const char *const slash = strrchr(path, '/');
    return slash ? strndup(path, (size_t)(slash - path) + (slash == path)) : strdup(".");
}

/* The tokenizer of `folder`, or else the shapes' own. */
static char *tokenizer_of(const char *folder, const char *shapes)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer.model"};

    for (int i = 0; i < 2; i++) {
        char *own = path_join(folder, names[i]);
        if (!own) return NULL;
        const bool there = file_exists(own);
        free(own);
        if (there) return strdup(folder);
    }
    return shapes ? path_join(shapes, TOKENIZER_OF) : strdup(folder);
}

mlora_status shape_find(char **folder, char **tokenizer, const char *config)
{
    char *shapes = shapes_folder();
    mlora_status status = MLORA_OK;

    *folder = *tokenizer = NULL;
    if (is_config(config))
        *folder = folder_of(config);
    else if (shapes && !strchr(config, '/'))
        *folder = path_join(shapes, config);
    if (!*folder && !shapes)
        status = error_set(MLORA_EINVAL,
                           "--config %s: the folder of shapes is not where the program was "
                           "installed or built: start it from there, or give the path of a "
                           "config.json",
                           config);
    else if (!*folder || !file_is_directory(*folder))
        status = error_set(MLORA_EINVAL,
                           "--config %s: no shape of that name: give %s, or the path of a "
                           "config.json",
                           config, NAMES);
    if (status == MLORA_OK) *tokenizer = tokenizer_of(*folder, shapes);
    if (status == MLORA_OK && !*tokenizer) status = error_set(MLORA_ENOMEM, "out of memory");
    free(shapes);
    if (status == MLORA_OK) return status;
    free(*folder);
    *folder = NULL;
    return status;
}
