/* What a chat template writes, learnt from its text: the family, and the few places where members
 * of a family differ. The template is brought to a canonical spelling, in which the expressions
 * of each family are looked for; it is never executed. */
#ifndef MLORA_TOKENIZER_CHAT_FORM_H
#define MLORA_TOKENIZER_CHAT_FORM_H

#include <stdbool.h>

#include "engine/base/buffer.h"

enum chat_family { CHAT_LLAMA2, CHAT_LLAMA3, CHAT_CHATML, CHAT_MISTRAL, CHAT_ZEPHYR };

enum chat_system { SYSTEM_REFUSED, SYSTEM_IN_FIRST, SYSTEM_IN_LAST }; /* Mistral */
enum chat_date { DATE_NONE, DATE_FIXED, DATE_TODAY };                 /* Llama-3.1 and later */

struct chat_form {
    enum chat_family family;
    bool begins_with_bos;     /* once, before everything */
    bool alternates;          /* user and assistant must take turns */
    bool bos_before_users;    /* Llama-2 */
    bool trims;               /* whitespace around a message goes; of Mistral: assistant only */
    bool prompts_after_users; /* ChatML: no generation prompt after an assistant's message */
    bool thinks;              /* ChatML of Qwen3: reasoning of earlier answers is left out */
    enum chat_system system;
    enum chat_date date;
    char fixed_date[32];
    const char *before_user, *after_user, *before_answer, *after_answer; /* Mistral */
    const char *after_message, *generation;                              /* ChatML, Zephyr */
    char *default_system; /* owned: ChatML, what stands in for a system message; NULL: nothing */
};

/* Returns OK, EUNSUPPORTED (an unknown family, or an unknown form of a known one) or ENOMEM;
 * freed with chat_form_free also after a failure. */
mlora_status chat_form_read(struct chat_form *out, const char *template);
void chat_form_free(struct chat_form *form); /* accepts zeroes */

/* Append the canonical spelling: whitespace as Jinja's trim_blocks and lstrip_blocks leave it,
 * none inside tags but in strings, strings in single quotes with line ends as \n, m['x'] for m.x
 * of roles and contents, no comments. Returns OK or ENOMEM. */
mlora_status chat_canonical(struct buffer *out, const char *template);

#endif
