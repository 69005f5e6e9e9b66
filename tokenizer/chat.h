/* Messages to a prompt, by the family that the model's chat template belongs to: Llama-2, Llama-3,
 * ChatML, Mistral, Zephyr. The family is recognised from the template's text; a template is never
 * executed, and none is taken from a request. */
#ifndef MLORA_TOKENIZER_CHAT_H
#define MLORA_TOKENIZER_CHAT_H

#include "tokenizer/tokenizer.h"

struct chat_message {
    const char *role;
    const char *content;
};

/* Append the prompt's ids to `ids` and, where `text` is not NULL, its text to `text`. What the
 * template writes is parsed for special tokens; what a message holds never is, so the content of
 * a message cannot forge a special token. The ids equal those of the reference's rendered text
 * wherever no message holds a special token's text.
 * Returns OK, EINVAL (a role or an order that the family does not take), EUNSUPPORTED (no
 * template, or one of an unknown family; the text lists the known ones) or ENOMEM. */
mlora_status chat_encode(const struct tokenizer *tokenizer, struct ids *ids, struct buffer *text,
                         const struct chat_message *messages, int n_messages);

#endif
