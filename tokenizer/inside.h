/* What a tokenizer holds, for the files of this folder. */
#ifndef MLORA_TOKENIZER_INSIDE_H
#define MLORA_TOKENIZER_INSIDE_H

#include "tokenizer/hf.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/tokenizer.h"

struct tokenizer {
    bool is_json; /* `hf` is in use, else `model` */
    struct hf hf;
    struct sentencepiece model;
    int32_t bos, eos;        /* -1: none */
    bool adds_bos, adds_eos; /* of `model`; `hf` has its post-processor */
    char *bos_text;          /* owned: what a chat template calls bos_token and eos_token; NULL: */
    char *eos_text;          /* none */
    char *chat_template;     /* owned; NULL: none */
};

/* Encode text, valid UTF-8, in which `written` marks what a chat template wrote: special tokens
 * are found there only. No begin or end tokens are added. Returns OK, EINVAL, EUNSUPPORTED (the
 * tokenizer searches special tokens where that cannot be told) or ENOMEM. */
mlora_status tokenizer_encode_chat(const struct tokenizer *tokenizer, struct ids *out,
                                   const char *text, size_t bytes, const char *written);

#endif
