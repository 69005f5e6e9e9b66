/* The checkpoint is written to a fresh directory beside the output, which takes the output's name
 * when it is complete: a failure in between leaves nothing that looks like a model. */
#include "engine/merge.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/json.h"
#include "lora/merge.h"
#include "model/checkpoint_write.h"

enum { CONFIG_BYTES_MAX = 16 << 20, COPY_BYTES_MAX = 256 << 20 };

/* What makes a directory of weights a model besides config.json. */
static const char *const companions[] = {"generation_config.json",
                                         "tokenizer.json",
                                         "tokenizer.model",
                                         "tokenizer_config.json",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "chat_template.jinja",
                                         "vocab.json",
                                         "merges.txt"};

static mlora_status copy_file(const char *from, const char *to, const char *name)
{
    char *source = path_join(from, name), *target = path_join(to, name);
    struct buffer bytes = {0};

    mlora_status status =
        source && target ? MLORA_OK : error_set(MLORA_ENOMEM, "%s: out of memory for a path", to);
    if (status == MLORA_OK && file_exists(source)) {
        status = file_read_all(&bytes, source, COPY_BYTES_MAX);
        if (status == MLORA_OK) status = file_write_new(target, bytes.data, bytes.bytes);
    }
    buffer_free(&bytes);
    free(source);
    free(target);
    return status;
}

/* ---- config.json -------------------------------------------------------------------------- */

struct has_bias {
    bool qkv, o, mlp;
};

static struct has_bias find_biases(const struct weights *weights)
{
    struct has_bias has = {0};

    for (int l = 0; l < weights->n_layers; l++) {
        const struct layer_weights *w = &weights->layers[l];
        has.qkv |= w->qkv_bias != NULL;
        has.o |= w->o_bias != NULL;
        has.mlp |= w->gate_up_bias || w->down_bias;
    }
    return has;
}

/* Which architectures can say in config.json that their linears have biases. */
static mlora_status check_biases(const struct has_bias *has, const struct model_config *config,
                                 const char *adapter)
{
    const bool attention = (has->qkv && !config->qkv_bias) || (has->o && !config->o_bias);
    const bool mlp = has->mlp && !config->mlp_bias;
    const bool is_llama = strcmp(config->architecture, "LlamaForCausalLM") == 0;
    const bool is_qwen3 = strcmp(config->architecture, "Qwen3ForCausalLM") == 0;

    if ((!attention || is_llama || is_qwen3) && (!mlp || is_llama)) return MLORA_OK;
    return error_set(MLORA_EUNSUPPORTED,
                     "%s/adapter_config.json: lora_bias is set: it becomes a bias of the %s, and a "
                     "checkpoint of %s has none there; serve the adapter beside its base, or with "
                     "--merge",
                     adapter, attention ? "attention's linears" : "MLP's linears",
                     config->architecture);
}

/* Some layers have a bias now: all must, and the file that says so. */
static mlora_status write_config(const char *model, const char *output,
                                 const struct weights *weights, const struct model_config *config,
                                 const struct has_bias *has)
{
    char *source = path_join(model, "config.json"), *target = path_join(output, "config.json");
    const bool attention = (has->qkv && !config->qkv_bias) || (has->o && !config->o_bias);
    const bool parted = config->tied && weights->head.data != weights->embedding.data;
    json_t *root = NULL;
    char *text = NULL;
    bool failed = false;

    mlora_status status = source && target
                              ? json_read_file(&root, source, CONFIG_BYTES_MAX)
                              : error_set(MLORA_ENOMEM, "%s: out of memory for a path", output);
    if (status != MLORA_OK) goto done;
    if (parted) failed |= json_object_set_new(root, "tie_word_embeddings", json_false()) != 0;
    if (attention) failed |= json_object_set_new(root, "attention_bias", json_true()) != 0;
    if (has->mlp && !config->mlp_bias)
        failed |= json_object_set_new(root, "mlp_bias", json_true()) != 0;
    text = failed ? NULL : json_dumps(root, JSON_INDENT(2));
    status = text ? file_write_new(target, text, strlen(text))
                  : error_set(MLORA_ENOMEM, "%s: out of memory for config.json", output);

done:
    json_decref(root);
    free(text);
    free(source);
    free(target);
    return status;
}

/* ---- the output ---------------------------------------------------------------------------- */

static mlora_status check_output(const char *output)
{
    struct stat info;
    struct dirent **entries = NULL;

    if (lstat(output, &info) != 0) return MLORA_OK;
    if (!S_ISDIR(info.st_mode))
        return error_set(MLORA_EINVAL,
                         "%s: is there and is not a directory; give the name of a "
                         "new one as output",
                         output);
    const int n = scandir(output, &entries, NULL, NULL);
    for (int i = 0; i < n; i++) free(entries[i]);
    free(entries);
    if (n == 2) return MLORA_OK; /* . and .. */
    return error_set(MLORA_EINVAL, "%s: is not empty; give the name of a new directory as output",
                     output);
}

/* Remove a directory and the files in it. */
static void discard(const char *directory)
{
    struct dirent **entries = NULL;
    const int n = scandir(directory, &entries, NULL, NULL);

    for (int i = 0; i < n; i++) {
        char *path = path_join(directory, entries[i]->d_name);
        if (path) unlink(path); /* of . and .. it fails */
        free(path);
        free(entries[i]);
    }
    free(entries);
    rmdir(directory);
}

static mlora_status write_output(const char *model, const char *output, struct device *dev,
                                 const struct weights *weights, const struct model_config *config,
                                 const struct checkpoint *checkpoint)
{
    const struct has_bias has = find_biases(weights);
    struct buffer fresh = {0};

    size_t end = strlen(output);
    while (end > 1 && output[end - 1] == '/') end--;
    mlora_status status = buffer_printf(&fresh, "%.*s.XXXXXX", (int)end, output);
    if (status != MLORA_OK) return status;
    if (!mkdtemp(fresh.data)) {
        status = error_set(MLORA_EIO, "%s: cannot be made: %s", fresh.data, strerror(errno));
        buffer_free(&fresh);
        return status;
    }
    chmod(fresh.data, 0755);
    status = write_config(model, fresh.data, weights, config, &has);
    for (size_t i = 0; i < sizeof companions / sizeof *companions && status == MLORA_OK; i++)
        status = copy_file(model, fresh.data, companions[i]);
    if (status == MLORA_OK) status = checkpoint_write(fresh.data, dev, weights, config, checkpoint);
    if (status == MLORA_OK && rename(fresh.data, output) != 0)
        status = error_set(MLORA_EIO, "%s: cannot be given its name: %s", output, strerror(errno));
    if (status != MLORA_OK) discard(fresh.data);
    buffer_free(&fresh);
    return status;
}

mlora_status merge_directory(const char *model, const char *adapter, const char *output,
                             bool lenient, char **warnings)
{
    struct model_config config;
    struct checkpoint checkpoint = {0};
    struct weights weights = {0};
    struct device *dev = NULL;
    struct has_bias has;

    mlora_status status = check_output(output);
    if (status == MLORA_OK) status = model_config_read(&config, model);
    if (status == MLORA_OK) status = checkpoint_open(&checkpoint, model);
    if (status == MLORA_OK) status = cpu_device_open(&dev, 0);
    if (status != MLORA_OK) goto done;
    status = weights_load(&weights, dev, model, &config, NULL, NULL);
    if (status == MLORA_OK)
        status = merge_adapter(&weights, dev, &config, adapter, lenient, warnings);
    if (status != MLORA_OK) goto done;
    has = find_biases(&weights);
    status = check_biases(&has, &config, adapter);
    if (status == MLORA_OK)
        status = merge_fill_biases(&weights, dev, &config, has.qkv || has.o, has.mlp);
    if (status == MLORA_OK)
        status = write_output(model, output, dev, &weights, &config, &checkpoint);

done:
    if (status != MLORA_OK) {
        free(*warnings);
        *warnings = NULL;
    }
    if (dev) {
        weights_free(&weights, dev);
        dev->ops->close(dev);
    }
    checkpoint_close(&checkpoint);
    return status;
}
