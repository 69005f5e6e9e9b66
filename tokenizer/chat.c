#include "tokenizer/chat.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/base/error.h"
#include "tokenizer/chat_form.h"
#include "tokenizer/inside.h"
#include "tokenizer/unicode.h"

/* ---- writing a prompt ---------------------------------------------------------------------- */

/* The prompt as it grows. The first failure stays in `status`, and the rest is left out. */
struct prompt {
    const struct tokenizer *tokenizer;
    struct buffer text;
    struct buffer written; /* a byte for each of `text`: 1 what the template wrote, 0 a message */
    mlora_status status;
};

static void append(struct prompt *prompt, const char *text, size_t bytes, char mark)
{
    const size_t start = prompt->text.bytes;

    if (prompt->status == MLORA_OK) prompt->status = utf8_append_each(&prompt->text, text, bytes);
    const size_t n = prompt->text.bytes - start;
    if (prompt->status == MLORA_OK) prompt->status = buffer_reserve(&prompt->written, n);
    if (prompt->status != MLORA_OK || n == 0) return;
    memset(prompt->written.data + prompt->written.bytes, mark, n);
    prompt->written.bytes += n;
}

static void write_text(struct prompt *prompt, const char *text)
{
    append(prompt, text, strlen(text), 1);
}

static void write_message(struct prompt *prompt, const char *text)
{
    append(prompt, text, strlen(text), 0);
}

static void write_end_token(struct prompt *prompt)
{
    if (prompt->tokenizer->eos_text)
        write_text(prompt, prompt->tokenizer->eos_text);
    else if (prompt->status == MLORA_OK)
        prompt->status = error_set(MLORA_EUNSUPPORTED,
                                   "the chat template writes eos_token, which "
                                   "neither tokenizer_config.json nor special_tokens_map.json "
                                   "names");
}

static void write_begin_token(struct prompt *prompt)
{
    if (prompt->tokenizer->bos_text) write_text(prompt, prompt->tokenizer->bos_text);
}

/* Take whitespace off the end, down to byte `start`, as Python's strip() does. */
static void strip_end(struct prompt *prompt, size_t start)
{
    uint32_t c;

    if (prompt->status != MLORA_OK) return;
    while (prompt->text.bytes > start) {
        const size_t n = utf8_decode_back(prompt->text.data, prompt->text.bytes, &c);
        if (!unicode_is_python_space(c)) break;
        prompt->text.bytes -= n;
        prompt->written.bytes -= n;
    }
}

static void write_stripped(struct prompt *prompt, const char *text)
{
    const size_t start = prompt->text.bytes;
    uint32_t c;

    for (size_t n; (n = utf8_decode(text, strlen(text), &c)) && unicode_is_python_space(c);)
        text += n;
    write_message(prompt, text);
    strip_end(prompt, start);
}

/* ---- rules that families share --------------------------------------------------------------- */

static bool is(const struct chat_message *message, const char *role)
{
    return strcmp(message->role, role) == 0;
}

static mlora_status check_roles(const struct chat_message *messages, int n)
{
    if (n < 1) return error_set(MLORA_EINVAL, "a chat needs at least one message");
    for (int i = 0; i < n; i++)
        if (!is(&messages[i], "system") && !is(&messages[i], "user") &&
            !is(&messages[i], "assistant"))
            return error_set(MLORA_EINVAL,
                             "message %d has the role \"%.32s\", one of system, "
                             "user, assistant is needed",
                             i + 1, messages[i].role);
    return MLORA_OK;
}

/* Of families with an optional system message first and then turns of user and assistant. */
static mlora_status check_turns(const struct chat_message *messages, int n, bool alternates,
                                bool takes_system)
{
    const int start = is(&messages[0], "system") ? 1 : 0;

    if (start == 1 && !takes_system)
        return error_set(MLORA_EINVAL, "message 1 is a system message, which the model's chat "
                                       "template does not take; put it into the user's message");
    if (start == n) return error_set(MLORA_EINVAL, "a chat needs a message of the user");
    for (int i = start; i < n; i++) {
        const bool users_turn = (i - start) % 2 == 0;
        if (is(&messages[i], "system"))
            return error_set(MLORA_EINVAL,
                             "message %d is a system message, which the model's "
                             "chat template takes only at the beginning",
                             i + 1);
        if (alternates && is(&messages[i], "user") != users_turn)
            return error_set(MLORA_EINVAL,
                             "message %d is the %s's, the model's chat template "
                             "wants user and assistant to take turns",
                             i + 1, messages[i].role);
    }
    return MLORA_OK;
}

/* ---- families ------------------------------------------------------------------------------ */

static mlora_status write_llama2(struct prompt *prompt, const struct chat_form *form,
                                 const struct chat_message *messages, int n)
{
    const mlora_status status = check_turns(messages, n, form->alternates, true);
    if (status != MLORA_OK) return status;

    const int first = is(&messages[0], "system") ? 1 : 0;
    for (int i = first; i < n; i++) {
        const bool user = is(&messages[i], "user");
        if (user && form->bos_before_users) write_begin_token(prompt);
        write_text(prompt, user ? "[INST] " : " ");
        if (i == first && first == 1) {
            const size_t start = prompt->text.bytes;
            write_text(prompt, "<<SYS>>\n");
            write_message(prompt, messages[0].content);
            write_text(prompt, "\n<</SYS>>\n\n");
            write_message(prompt, messages[i].content);
            strip_end(prompt, start); /* the whole is stripped, not the message */
        } else {
            write_stripped(prompt, messages[i].content);
        }
        write_text(prompt, user ? " [/INST]" : " ");
        if (!user) write_end_token(prompt);
    }
    return MLORA_OK;
}

/* "21 Nov 2026", in UTC and in English whatever the locale. */
static void write_today(struct prompt *prompt)
{
    static const char months[][4] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                     "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    const time_t now = time(NULL);
    struct tm day = {0};
    struct buffer text = {0};

    gmtime_r(&now, &day);
    prompt->status =
        buffer_printf(&text, "%02d %s %d", day.tm_mday, months[day.tm_mon], day.tm_year + 1900);
    write_text(prompt, buffer_text(&text));
    buffer_free(&text);
}

static void write_llama3_message(struct prompt *prompt, const struct chat_message *message)
{
    write_text(prompt, "<|start_header_id|>");
    write_text(prompt, message->role);
    write_text(prompt, "<|end_header_id|>\n\n");
    write_stripped(prompt, message->content);
    write_text(prompt, "<|eot_id|>");
}

static void write_llama3(struct prompt *prompt, const struct chat_form *form,
                         const struct chat_message *messages, int n)
{
    int first = 0;

    if (form->date != DATE_NONE) { /* there is always a system message, with the dates in it */
        write_text(prompt, "<|start_header_id|>system<|end_header_id|>\n\n"
                           "Cutting Knowledge Date: December 2023\nToday Date: ");
        if (form->date == DATE_TODAY && prompt->status == MLORA_OK)
            write_today(prompt);
        else
            write_text(prompt, form->fixed_date);
        write_text(prompt, "\n\n");
        if (is(&messages[0], "system")) write_stripped(prompt, messages[first++].content);
        write_text(prompt, "<|eot_id|>");
    }
    for (int i = first; i < n; i++) write_llama3_message(prompt, &messages[i]);
    write_text(prompt, "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

static mlora_status write_mistral(struct prompt *prompt, const struct chat_form *form,
                                  const struct chat_message *messages, int n)
{
    const mlora_status status =
        check_turns(messages, n, form->alternates, form->system != SYSTEM_REFUSED);
    if (status != MLORA_OK) return status;

    const int first = is(&messages[0], "system") ? 1 : 0;
    for (int i = first; i < n; i++) {
        if (is(&messages[i], "user")) {
            const bool here = form->system == SYSTEM_IN_FIRST ? i == first : i == n - 1;
            write_text(prompt, form->before_user);
            if (first == 1 && here) {
                write_message(prompt, messages[0].content);
                write_text(prompt, "\n\n");
            }
            write_message(prompt, messages[i].content);
            write_text(prompt, form->after_user);
            continue;
        }
        write_text(prompt, form->before_answer);
        if (form->trims)
            write_stripped(prompt, messages[i].content);
        else
            write_message(prompt, messages[i].content);
        write_end_token(prompt);
        write_text(prompt, form->after_answer);
    }
    return MLORA_OK;
}

static void write_zephyr(struct prompt *prompt, const struct chat_form *form,
                         const struct chat_message *messages, int n)
{
    for (int i = 0; i < n; i++) {
        write_text(prompt, "<|");
        write_text(prompt, messages[i].role);
        write_text(prompt, "|>\n");
        write_message(prompt, messages[i].content);
        write_end_token(prompt);
        write_text(prompt, form->after_message);
    }
    write_text(prompt, form->generation);
}

/* An answer of a model that thinks: the reasoning stays only in answers after the last question,
 * that is in the last of them or where there is some. */
static void write_thought(struct prompt *prompt, const struct chat_message *message, bool recent,
                          bool last)
{
    static const char open[] = "<think>", close[] = "</think>";
    const char *content = message->content, *reasoning = content, *reasoning_end = content;
    const char *found = strstr(content, close);

    if (found) {
        reasoning_end = found;
        while (reasoning_end > reasoning && reasoning_end[-1] == '\n') reasoning_end--;
        for (const char *at; (at = memmem(reasoning, (size_t)(reasoning_end - reasoning), open,
                                          sizeof open - 1)) != NULL;)
            reasoning = at + sizeof open - 1;
        while (reasoning < reasoning_end && *reasoning == '\n') reasoning++;
        for (const char *at = content; (at = strstr(at, close)) != NULL;)
            content = at += sizeof close - 1;
        while (*content == '\n') content++;
    }
    if (recent && (last || reasoning < reasoning_end)) {
        write_text(prompt, "<think>\n");
        append(prompt, reasoning, (size_t)(reasoning_end - reasoning), 0);
        write_text(prompt, "\n</think>\n\n");
        while (*content == '\n') content++;
    }
    write_message(prompt, content);
}

static bool ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), n_end = strlen(end);
    return n >= n_end && strcmp(text + n - n_end, end) == 0;
}

/* The last question: a user's message that is not the result of a tool. */
static int last_question(const struct chat_message *messages, int n)
{
    for (int i = n - 1; i >= 0; i--) {
        const char *content = messages[i].content;
        if (!is(&messages[i], "user")) continue;
        if (strncmp(content, "<tool_response>", 15) == 0 && ends_with(content, "</tool_response>"))
            continue;
        return i;
    }
    return n - 1;
}

static void write_chatml(struct prompt *prompt, const struct chat_form *form,
                         const struct chat_message *messages, int n)
{
    const int question = form->thinks ? last_question(messages, n) : n;

    if (form->default_system && !is(&messages[0], "system")) {
        write_text(prompt, "<|im_start|>system\n");
        write_text(prompt, form->default_system);
        write_text(prompt, "<|im_end|>\n");
    }
    for (int i = 0; i < n; i++) {
        write_text(prompt, "<|im_start|>");
        write_text(prompt, messages[i].role);
        write_text(prompt, "\n");
        if (form->thinks && is(&messages[i], "assistant"))
            write_thought(prompt, &messages[i], i > question, i == n - 1);
        else if (form->trims)
            write_stripped(prompt, messages[i].content);
        else
            write_message(prompt, messages[i].content);
        write_text(prompt, form->after_message);
    }
    if (!form->prompts_after_users || !is(&messages[n - 1], "assistant"))
        write_text(prompt, form->generation);
}

/* ---- the whole ----------------------------------------------------------------------------- */

static mlora_status write_prompt(struct prompt *prompt, const struct chat_form *form,
                                 const struct chat_message *messages, int n)
{
    mlora_status status = check_roles(messages, n);
    if (status != MLORA_OK) return status;

    if (form->begins_with_bos) write_begin_token(prompt);
    switch (form->family) {
    case CHAT_LLAMA2:
        status = write_llama2(prompt, form, messages, n);
        break;
    case CHAT_LLAMA3:
        write_llama3(prompt, form, messages, n);
        break;
    case CHAT_CHATML:
        write_chatml(prompt, form, messages, n);
        break;
    case CHAT_MISTRAL:
        status = write_mistral(prompt, form, messages, n);
        break;
    case CHAT_ZEPHYR:
        write_zephyr(prompt, form, messages, n);
        break;
    }
    return status == MLORA_OK ? prompt->status : status;
}

mlora_status chat_encode(const struct tokenizer *tokenizer, struct ids *ids, struct buffer *text,
                         const struct chat_message *messages, int n_messages)
{
    const char *template = tokenizer_chat_template(tokenizer);
    struct prompt prompt = {.tokenizer = tokenizer};
    struct chat_form form = {0};

    if (!template)
        return error_set(MLORA_EUNSUPPORTED,
                         "the model has no chat template (chat_template.jinja, "
                         "or chat_template in tokenizer_config.json); send a prompt without "
                         "--chat");
    mlora_status status = chat_form_read(&form, template);
    if (status == MLORA_OK) status = write_prompt(&prompt, &form, messages, n_messages);
    if (status == MLORA_OK)
        status = tokenizer_encode_chat(tokenizer, ids, buffer_text(&prompt.text), prompt.text.bytes,
                                       buffer_text(&prompt.written));
    if (status == MLORA_OK && text)
        status = buffer_append(text, prompt.text.data, prompt.text.bytes);

    chat_form_free(&form);
    buffer_free(&prompt.text);
    buffer_free(&prompt.written);
    return status;
}
