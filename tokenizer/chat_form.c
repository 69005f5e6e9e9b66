#include "tokenizer/chat_form.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/error.h"

/* ---- canonical spelling -------------------------------------------------------------------- */

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v';
}

static bool is_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* Append the string literal at `at`, and return what follows it. */
static const char *append_literal(struct buffer *out, const char *at, const char *end,
                                  mlora_status *status)
{
    const char quote = *at++;
    *status = buffer_append(out, "'", 1);
    for (; at < end && *at != quote && *status == MLORA_OK; at++) {
        if (*at == '\\' && at + 1 < end) {
            const bool plain_quote = at[1] == '"'; /* needs no escape between single quotes */
            *status = buffer_append(out, at + plain_quote, plain_quote ? 1 : 2);
            at++;
        } else if (*at == '\n') {
            *status = buffer_append(out, "\\n", 2);
        } else if (*at == '\'') {
            *status = buffer_append(out, "\\'", 2);
        } else {
            *status = buffer_append(out, at, 1);
        }
    }
    if (*status == MLORA_OK) *status = buffer_append(out, "'", 1);
    return at < end ? at + 1 : at;
}

/* Append what stands between the braces of a tag. */
static mlora_status append_tag(struct buffer *out, const char *at, const char *end)
{
    static const char *const members[] = {"role", "content"};
    mlora_status status = MLORA_OK;

    while (at < end && status == MLORA_OK) {
        if (*at == '\'' || *at == '"') {
            at = append_literal(out, at, end, &status);
            continue;
        }
        if (*at == '.') {
            size_t n = 0;
            for (int i = 0; i < 2 && n == 0; i++) {
                const size_t bytes = strlen(members[i]);
                if ((size_t)(end - at) <= bytes || strncmp(at + 1, members[i], bytes) != 0)
                    continue;
                if (at + 1 + bytes == end || !is_name(at[1 + bytes])) n = bytes;
            }
            if (n > 0) {
                status = buffer_printf(out, "['%.*s']", (int)n, at + 1);
                at += n + 1;
                continue;
            }
        }
        if (!is_space(*at)) status = buffer_append(out, at, 1);
        at++;
    }
    return status;
}

/* The end of the tag that begins at `at`: where its closing brace pair stands, NULL if nowhere.
 * Strings may hold braces. */
static const char *tag_end(const char *at, char kind)
{
    const char close = kind == '{' ? '}' : kind;
    for (at += 2; *at && at[1]; at++) {
        if (at[0] == close && at[1] == '}') return at;
        if (kind == '#' || (*at != '\'' && *at != '"')) continue;
        const char quote = *at;
        for (at++; *at && *at != quote; at++)
            if (*at == '\\' && at[1]) at++;
        if (!*at) return NULL;
    }
    return NULL;
}

/* Append the text between two tags as Jinja leaves it. */
static mlora_status append_raw(struct buffer *out, const char *start, const char *end, char before,
                               bool strip_start, bool strip_end, char after)
{
    if (strip_start)
        while (start < end && is_space(*start)) start++;
    else if ((before == '%' || before == '#') && start < end && *start == '\n')
        start++; /* trim_blocks */
    if (strip_end)
        while (start < end && is_space(end[-1])) end--;
    if (!strip_end && (after == '%' || after == '#')) { /* lstrip_blocks */
        const char *line = end;
        while (line > start && (line[-1] == ' ' || line[-1] == '\t')) line--;
        if (line == start ? before == 0 || (start[-1] == '\n') : line[-1] == '\n') end = line;
    }
    return buffer_append(out, start, (size_t)(end - start));
}

mlora_status chat_canonical(struct buffer *out, const char *template)
{
    const char *raw = template; /* where the text before the next tag begins */
    char before = 0;            /* kind of the tag before it */
    bool strip_start = false;
    mlora_status status = MLORA_OK;

    for (const char *at = template; *at && status == MLORA_OK; at++) {
        const char kind = at[1];
        if (*at != '{' || (kind != '{' && kind != '%' && kind != '#')) continue;
        const char *end = tag_end(at, kind);
        if (!end) break; /* not closed: taken as text */
        const char *start = at + 2, *inner_end = end;
        const bool strip_end = *start == '-';
        if (start < end && (*start == '-' || *start == '+')) start++;
        const bool strips_next = inner_end > start && inner_end[-1] == '-';
        if (strips_next) inner_end--;

        status = append_raw(out, raw, at, before, strip_start, strip_end, kind);
        if (kind != '#') {
            if (status == MLORA_OK) status = buffer_append(out, at, 2);
            if (status == MLORA_OK) status = append_tag(out, start, inner_end);
            if (status == MLORA_OK) status = buffer_append(out, end, 2);
        }
        strip_start = strips_next;
        before = kind;
        raw = end + 2;
        at = end + 1;
    }
    const char *end = raw + strlen(raw);
    if (end > raw && end[-1] == '\n') end--; /* Jinja takes one off the end of a template */
    if (status == MLORA_OK) status = append_raw(out, raw, end, before, strip_start, false, 0);
    return status;
}

/* ---- families ------------------------------------------------------------------------------ */

#define KNOWN       "known are Llama-2, Llama-3, ChatML, Mistral and Zephyr"
#define BEGIN       "{{bos_token}}"
#define REFUSAL     "{{raise_exception(*"
#define ALTERNATION "(message['role']=='user')!=(loop.index0%2==0)"

static mlora_status unknown_form(const char *family)
{
    return error_set(MLORA_EUNSUPPORTED,
                     "the chat template is of the %s family, but in a form that is not known, so "
                     "its prompts would not be exact; send a prompt without --chat",
                     family);
}

static bool has(const char *canonical, const char *expression)
{
    return strstr(canonical, expression) != NULL;
}

static bool starts(const char *text, const char *start)
{
    return strncmp(text, start, strlen(start)) == 0;
}

/* Whether a template writes nothing but the expressions of `known`, which ends with NULL; one
 * that ends in "*" is a beginning. Of a template with tools, whose expressions for them are many,
 * only the text outside of tags is looked at. */
static bool writes_only(const char *c, const char *const *known)
{
    const bool tools = has(c, "tools");

    while (*c) {
        const char *end = *c == '{' && (c[1] == '{' || c[1] == '%') ? tag_end(c, c[1]) : NULL;
        size_t bytes = 0;
        if (!end) return false;
        for (int i = 0; known[i] && bytes == 0; i++) {
            const size_t n = strlen(known[i]);
            const bool beginning = known[i][n - 1] == '*';
            if (!beginning && starts(c, known[i])) bytes = n;
            if (beginning && strncmp(c, known[i], n - 1) == 0) bytes = (size_t)(end + 2 - c);
        }
        if (bytes == 0 && (c[1] == '%' || tools)) bytes = (size_t)(end + 2 - c);
        if (bytes == 0) return false;
        c += bytes;
    }
    return true;
}

static mlora_status read_llama2(struct chat_form *form, const char *c)
{
    static const char with_bos[] = "{{bos_token+'[INST] '+content.strip()+' [/INST]'}}",
                      without_bos[] = "{{'[INST] '+content.strip()+' [/INST]'}}",
                      answer[] = "{{' '+content.strip()+' '+eos_token}}";
    static const char *const known[] = {with_bos, without_bos, answer, BEGIN, REFUSAL, NULL};

    form->family = CHAT_LLAMA2;
    form->bos_before_users = has(c, with_bos);
    form->begins_with_bos = starts(c, BEGIN);
    form->alternates = has(c, ALTERNATION);
    if ((!form->bos_before_users && !has(c, without_bos)) || !has(c, answer) ||
        has(c, "system_message='") || !writes_only(c, known) ||
        !has(c, "'<<SYS>>\\n'+system_message+'\\n<</SYS>>\\n\\n'+message['content']"))
        return unknown_form("Llama-2");
    return MLORA_OK;
}

/* The date of Llama-3.1 and later: written down in the template, or the day on which it is used. */
static mlora_status read_date(struct chat_form *form, const char *c)
{
    static const char set[] = "date_string='";
    const char *at = strstr(c, set);

    if (!has(c, "{{'Cutting Knowledge Date: December 2023\\n'}}") ||
        !has(c, "{{'Today Date: '+date_string+'\\n\\n'}}") || !has(c, "{{system_message}}"))
        return unknown_form("Llama-3");
    form->date = has(c, "date_string=strftime_now('%d %b %Y')") ? DATE_TODAY : DATE_FIXED;
    if (form->date == DATE_TODAY) return MLORA_OK;
    if (has(c, "strftime_now") || !at) return unknown_form("Llama-3");
    at += sizeof set - 1;
    const size_t bytes = strcspn(at, "'");
    if (bytes >= sizeof form->fixed_date || memchr(at, '\\', bytes)) return unknown_form("Llama-3");
    memcpy(form->fixed_date, at, bytes);
    form->fixed_date[bytes] = '\0';
    return MLORA_OK;
}

static mlora_status read_llama3(struct chat_form *form, const char *c)
{
#define TURN                                                                                       \
    "'<|start_header_id|>'+message['role']+'<|end_header_id|>\\n\\n'"                              \
    "+message['content']|trim+'<|eot_id|>'"
    static const char generation[] = "{{'<|start_header_id|>assistant<|end_header_id|>\\n\\n'}}";
    static const char *const known[] = {"{{content}}", "{{" TURN "}}", generation,
                                        BEGIN,         REFUSAL,        NULL};

    form->family = CHAT_LLAMA3;
    form->begins_with_bos = has(c, "bos_token");
    form->trims = true;
    if (!has(c, TURN) || !has(c, generation) || !writes_only(c, known))
        return unknown_form("Llama-3");
#undef TURN
    if (has(c, "Knowledge Date") || has(c, "date_string")) return read_date(form, c);
    return has(c, "strftime_now") ? unknown_form("Llama-3") : MLORA_OK;
}

static mlora_status read_mistral(struct chat_form *form, const char *c)
{
    static const struct {
        const char *expression, *before, *after;
        const char *with_system; /* the same with a system message in it */
    } users[] = {
        {"{{'[INST] '+message['content']+' [/INST]'}}", "[INST] ", " [/INST]",
         "{{'[INST] '+system_message+'\\n\\n'+message['content']+' [/INST]'}}"},
        {"{{' [INST] '+message['content']+' [/INST]'}}", " [INST] ", " [/INST]",
         "{{' [INST] '+system_message+'\\n\\n'+message['content']+' [/INST]'}}"},
        {"{{'[INST] '+message['content']+'[/INST]'}}", "[INST] ", "[/INST]",
         "{{'[INST] '+system_message+'\\n\\n'+message['content']+'[/INST]'}}"},
        {"{{'[INST]'+message['content']+'[/INST]'}}", "[INST]", "[/INST]",
         "{{'[INST]'+system_message+'\\n\\n'+message['content']+'[/INST]'}}"},
    };
    static const struct {
        const char *expression, *before, *after;
        bool trims;
    } answers[] = {
        {"{{message['content']+eos_token}}", "", "", false},
        {"{{message['content']+eos_token+' '}}", "", " ", false},
        {"{{' '+message['content']+eos_token}}", " ", "", false},
        {"{{' '+message['content']|trim+eos_token}}", " ", "", true},
    };
    const char *known[] = {NULL, NULL, NULL, BEGIN, REFUSAL, NULL}; /* first: user, both, answer */

    form->family = CHAT_MISTRAL;
    form->begins_with_bos = has(c, BEGIN);
    form->alternates = true;
    for (size_t i = 0; i < sizeof users / sizeof *users; i++) {
        if (!has(c, users[i].expression)) continue;
        form->before_user = users[i].before;
        form->after_user = users[i].after;
        known[0] = users[i].expression;
        known[1] = users[i].with_system;
    }
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        if (!has(c, answers[i].expression)) continue;
        form->before_answer = answers[i].before;
        form->after_answer = answers[i].after;
        form->trims = answers[i].trims;
        known[2] = answers[i].expression;
    }
    if (!known[0] || !known[2] || !form->begins_with_bos || !writes_only(c, known))
        return unknown_form("Mistral");
    if (!has(c, "system_message")) return MLORA_OK; /* such a message is refused */

    static const char *const where[] = {"{%ifloop.firstandsystem_messageisdefined%}",
                                        "{%ifloop.lastandsystem_messageisdefined%}"};
    const char *at = strstr(c, known[1]);
    for (int i = 0; i < 2; i++) {
        const size_t bytes = strlen(where[i]);
        if (at && (size_t)(at - c) >= bytes && starts(at - bytes, where[i]))
            form->system = i == 0 ? SYSTEM_IN_FIRST : SYSTEM_IN_LAST;
    }
    return form->system == SYSTEM_REFUSED ? unknown_form("Mistral") : MLORA_OK;
}

static mlora_status read_zephyr(struct chat_form *form, const char *c)
{
    static const struct {
        const char *end, *generation, *after, *prompt;
    } forms[] = {
        {"+message['content']+eos_token}}\n", "{{'<|assistant|>'}}\n", "\n", "<|assistant|>\n"},
        {"+message['content']+eos_token+'\\n'}}", "{{'<|assistant|>\\n'}}", "\n",
         "<|assistant|>\n"},
        {"+message['content']+eos_token+'\\n'}}", "{{'<|assistant|>'}}", "\n", "<|assistant|>"},
    };
    static const char *const roles[] = {"user", "system", "assistant"};

    form->family = CHAT_ZEPHYR;
    if (has(c, "bos_token")) return unknown_form("Zephyr");
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        char turns[3][96];
        const char *const known[] = {turns[0], turns[1], turns[2], forms[i].generation, NULL};
        bool good = has(c, forms[i].generation);
        for (int r = 0; r < 3 && good; r++) {
            snprintf(turns[r], sizeof turns[r], "{{'<|%s|>\\n'%s", roles[r], forms[i].end);
            good = has(c, turns[r]);
        }
        if (!good || !writes_only(c, known)) continue;
        form->after_message = forms[i].after;
        form->generation = forms[i].prompt;
        return MLORA_OK;
    }
    return unknown_form("Zephyr");
}

/* Undo the escapes of a literal's text. Returns false for one that is not known. */
static bool unescape(char *out, const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] != '\\') {
            *out++ = text[i];
            continue;
        }
        if (++i == bytes) return false;
        if (text[i] == 'n')
            *out++ = '\n';
        else if (text[i] == 't')
            *out++ = '\t';
        else if (text[i] == '\\' || text[i] == '\'' || text[i] == '"')
            *out++ = text[i];
        else
            return false;
    }
    *out = '\0';
    return true;
}

/* A system message that stands in for one that is not there. Every other place that writes a
 * system turn must be of a known kind. */
static mlora_status read_default_system(struct chat_form *form, const char *c)
{
    static const char open[] = "<|im_start|>system", begin[] = "{{'<|im_start|>system\\n",
                      end[] = "<|im_end|>\\n'}}",
                      given[] = "'+messages[0]['content']+'<|im_end|>\\n'}}", tools[] = "'}}";

    for (const char *at = c; (at = strstr(at, open)) != NULL;) {
        if (at - c < 3 || !starts(at - 3, begin)) return unknown_form("ChatML");
        at += sizeof begin - 1 - 3;
        if (starts(at, given) || starts(at, tools)) continue;
        const char *stop = strstr(at, end);
        if (!stop || form->default_system) return unknown_form("ChatML");
        const size_t bytes = (size_t)(stop - at);
        form->default_system = malloc(bytes + 1);
        if (!form->default_system) return error_set(MLORA_ENOMEM, "out of memory: a template");
        for (size_t i = 0; i < bytes; i++)
            if (at[i] == '\'' && at[i - 1] != '\\') return unknown_form("ChatML");
        if (!unescape(form->default_system, at, bytes)) return unknown_form("ChatML");
        at = stop;
    }
    return MLORA_OK;
}

static mlora_status read_chatml(struct chat_form *form, const char *c)
{
#define TURN "{{'<|im_start|>'+message['role']+'\\n'+message['content']"
    static const struct {
        const char *expression, *after;
        bool trims;
    } turns[] = {
        {TURN "+'<|im_end|>'+'\\n'}}", "<|im_end|>\n", false},
        {TURN "+'<|im_end|>\\n'}}", "<|im_end|>\n", false},
        {TURN "+'<|im_end|>'}}\n", "<|im_end|>\n", false},
        {TURN "|trim+'<|im_end|>'+'\\n'}}", "<|im_end|>\n", true},
        {TURN "|trim+'<|im_end|>\\n'}}", "<|im_end|>\n", true},
        {TURN "}}{%if(loop.lastandadd_generation_prompt)ornotloop.last%}{{'<|im_end|>'+'\\n'}}",
         "<|im_end|>\n", false},
        {"{{'<|im_start|>'+message['role']+'\\n'+content+'<|im_end|>'+'\\n'}}", "<|im_end|>\n",
         false},
    };
#undef TURN
    static const char answer[] = "{{'<|im_start|>assistant\\n'}}",
                      thought[] = "{{'<|im_start|>assistant\\n<think>\\n'}}";
    const char *known[] = {answer,  answer, thought, BEGIN, "{{'<|im_start|>system\\n*",
                           REFUSAL, NULL};

    form->family = CHAT_CHATML;
    for (size_t i = 0; i < sizeof turns / sizeof *turns; i++) {
        if (!has(c, turns[i].expression)) continue;
        known[0] = turns[i].expression;
        form->after_message = turns[i].after;
        form->trims = turns[i].trims;
    }
    if (has(c, answer)) form->generation = "<|im_start|>assistant\n";
    if (has(c, thought)) form->generation = "<|im_start|>assistant\n<think>\n";
    form->begins_with_bos = starts(c, BEGIN);
    form->prompts_after_users =
        has(c, "{%ifadd_generation_promptandmessages[-1]['role']!='assistant'%}");
    form->thinks = has(c, "last_query_index") && has(c, "content.split('</think>')[-1]");
    if (!form->after_message || !form->generation || has(c, "eos_token") ||
        has(c, "strftime_now") || (has(c, "bos_token") && !form->begins_with_bos) ||
        (has(c, "</think>'incontent") && !form->thinks) || !writes_only(c, known))
        return unknown_form("ChatML");
    return read_default_system(form, c);
}

mlora_status chat_form_read(struct chat_form *out, const char *template)
{
    struct buffer canonical = {0};

    *out = (struct chat_form){0};
    mlora_status status = chat_canonical(&canonical, template);
    const char *c = buffer_text(&canonical);
    if (status != MLORA_OK)
        ;
    else if (has(c, "<|start_header_id|>"))
        status = read_llama3(out, c);
    else if (has(c, "<|im_start|>"))
        status = read_chatml(out, c);
    else if (has(c, "<<SYS>>"))
        status = read_llama2(out, c);
    else if (has(c, "[INST]"))
        status = read_mistral(out, c);
    else if (has(c, "<|user|>") && has(c, "<|assistant|>") && has(c, "eos_token"))
        status = read_zephyr(out, c);
    else
        status = error_set(MLORA_EUNSUPPORTED, "the chat template is of an unknown family; " KNOWN
                                               "; send a prompt without --chat");
    buffer_free(&canonical);
    return status;
}

void chat_form_free(struct chat_form *form)
{
    free(form->default_system);
    *form = (struct chat_form){0};
}
