/* What every command that runs a model needs: its flags, the engine, the adapters. */
#ifndef MLORA_TOOLS_SETUP_H
#define MLORA_TOOLS_SETUP_H

#include "tools/options.h"

enum load_format { LOAD_AUTO, LOAD_DUMMY };

struct setup {
    const char *model, *tokenizer;
    const char *merge;              /* the adapter that is folded into the weights */
    struct adapter_source *sources; /* [n_sources], in the order given */
    int n_sources;
    mlora_op_source *ops; /* [n_ops] names (NULL: the file's own) and paths are owned */
    int n_ops;
    bool ops_tried;            /* by setup_try_ops() */
    int backend, dtype;        /* mlora_backend, mlora_dtype */
    int lora_mode, lora_dtype; /* mlora_lora_mode, mlora_dtype */
    /* 0: default */
    int64_t n_threads, max_model_len, max_num_seqs, max_batch_tokens, kv_blocks, max_queue;
    bool no_prefix_cache;
    int speculate; /* mlora_speculate */
    const char *draft_model;
    int64_t max_draft;                           /* 0: default */
    int64_t adapter_memory, adapter_host_memory; /* MiB; 0: default */
    double gpu_memory_utilization;               /* 0: default */
    bool lenient;
    bool quiet;
    int load_format;    /* enum load_format */
    const char *config; /* of dummy weights: NULL: that of `model` */
    int profile;        /* as mlora_options; not a flag of its own: bench sets it */
};

/* An item of --adapters. */
struct adapter_source {
    char *name; /* NULL: `path` is a folder of adapters, or an adapter named like its folder */
    char *path;
};

extern const struct option_spec setup_specs[]; /* the target is a struct setup */

/* The folder with config.json that setup_open() would read, freed with free(). A --config is enough
 * here, --load-format dummy may be left out. */
mlora_status setup_folder(char **out, const struct setup *setup);

/* Open the engine, with a progress bar if stderr is a terminal, and load the adapters. An adapter
 * of a folder that is refused is said on stderr and left out; one that was named is an error. */
mlora_status setup_open(mlora_engine **out, struct setup *setup);

/* Try each of --op in a process of its own, before a GPU is in use. setup_open() does it where it was
 * not done. */
mlora_status setup_try_ops(struct setup *setup);

void setup_free(struct setup *setup);

#endif
