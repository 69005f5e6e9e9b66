/* A line is a prompt, or a command that begins with a slash. In a chat the messages so far are
 * kept, whichever adapter answers next. */
#include "tools/interactive.h"

#include <histedit.h>
#include <locale.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/error.h"
#include "tools/answers.h"
#include "tools/io.h"
#include "tools/text.h"

struct session {
    mlora_engine *engine;
    struct job_settings settings;
    char *system;     /* message of a chat, owned; NULL: none */
    char *adapter;    /* owned; NULL: the base model */
    json_t *messages; /* of the chat so far, as {"role", "content"} */
    bool timings;
    bool quit;
    char prompt[300]; /* of the line editor */
};

static const char help[] =
    "/adapter NAME   answer with this adapter; base: the base model\n"
    "/adapters       list what is loaded\n"
    "/help           print this\n"
    "/quit           leave, as Ctrl-D does\n"
    "A line that ends with \\ goes on in the next. Ctrl-C stops an answer.\n";
static const char chat_help[] = "/system TEXT    begin anew with this system message\n"
                                "/reset          forget the conversation\n";

/* ---- answering ---------------------------------------------------------------------------- */

static mlora_status add_message(json_t *messages, const char *role, const struct buffer *text)
{
    json_t *message =
        json_pack("{s:s, s:s%}", "role", role, "content", buffer_text(text), text->bytes);

    if (!message) return error_set(MLORA_EINVAL, "the text is not UTF-8");
    return json_array_append_new(messages, message) == 0
               ? MLORA_OK
               : error_set(MLORA_ENOMEM, "out of memory for the conversation");
}

/* Give the job the whole conversation: the system message and the messages so far. */
static mlora_status set_messages(const struct session *session, struct job *job)
{
    const size_t n = json_array_size(session->messages);

    job->messages = calloc(n + 1, sizeof *job->messages);
    if (!job->messages) return error_set(MLORA_ENOMEM, "out of memory for the conversation");
    if (session->system)
        job->messages[job->n_messages++] = (mlora_message){"system", session->system};
    for (size_t i = 0; i < n; i++) {
        const json_t *message = json_array_get(session->messages, i);
        job->messages[job->n_messages++] =
            (mlora_message){json_string_value(json_object_get(message, "role")),
                            json_string_value(json_object_get(message, "content"))};
    }
    return MLORA_OK;
}

/* Answer one prompt, and keep both in the conversation if there is one. */
static mlora_status answer(struct session *session, const struct buffer *prompt)
{
    struct jobs jobs = {0};
    const bool chat = session->settings.chat;
    const size_t n_before = json_array_size(session->messages);
    mlora_status status = MLORA_OK;

    struct job *job = jobs_add(&jobs, session->adapter, NULL);
    if (!job) return error_set(MLORA_ENOMEM, "out of memory for a request");
    if (chat) {
        status = add_message(session->messages, "user", prompt);
        if (status == MLORA_OK) status = set_messages(session, job);
    } else {
        status = buffer_append(&job->prompt, prompt->data, prompt->bytes);
    }
    struct answers answers = {
        .out = stdout, .engine = session->engine, .jobs = &jobs, .terminal = isatty(STDOUT_FILENO)};
    const struct stopwatch since = stopwatch_start(session->engine);
    if (status == MLORA_OK) status = jobs_submit(session->engine, &jobs, &session->settings);
    if (status == MLORA_OK) status = jobs_run(session->engine, &jobs, answers_show, &answers);
    if (status == MLORA_OK) {
        (void)report_failures(&jobs);
        if (session->timings) print_timings(session->engine, &jobs, &since);
        if (chat) status = add_message(session->messages, "assistant", &job->text);
    } else if (chat) { /* a message without an answer would upset the template */
        while (json_array_size(session->messages) > n_before)
            json_array_remove(session->messages, n_before);
    }
    jobs_free(&jobs);
    return status;
}

/* ---- commands ----------------------------------------------------------------------------- */

static void name_prompt(struct session *session)
{
    snprintf(session->prompt, sizeof session->prompt, "%s> ",
             session->adapter ? session->adapter : "base");
}

static mlora_status use_adapter(struct session *session, const char *name)
{
    struct nearest nearest = {.wanted = name};
    char *adapter = NULL;

    if (strcmp(name, "base") != 0) {
        int found = -1;
        for (int i = 0; i < mlora_adapter_count(session->engine) && found < 0; i++) {
            const char *loaded = mlora_adapter_name(session->engine, i);
            if (strcmp(loaded, name) == 0)
                found = i;
            else
                nearest_offer(&nearest, loaded);
        }
        if (found < 0)
            return error_set(MLORA_ENOTFOUND, "no adapter \"%s\"; %s%s", name,
                             nearest.best ? "did you mean " : "/adapters lists them",
                             nearest.best ? nearest.best : "");
        adapter = strdup(name);
        if (!adapter) return error_set(MLORA_ENOMEM, "out of memory");
    }
    free(session->adapter);
    session->adapter = adapter;
    name_prompt(session);
    return MLORA_OK;
}

static void list_adapters(const struct session *session)
{
    printf("%s base\n", session->adapter ? " " : "*");
    for (int i = 0; i < mlora_adapter_count(session->engine); i++) {
        const char *name = mlora_adapter_name(session->engine, i);
        const bool current = session->adapter && strcmp(session->adapter, name) == 0;
        printf("%s %s\n", current ? "*" : " ", name);
    }
}

static mlora_status set_system(struct session *session, const char *text)
{
    char *copy = *text ? strdup(text) : NULL;

    if (*text && !copy) return error_set(MLORA_ENOMEM, "out of memory");
    free(session->system);
    session->system = copy;
    json_array_clear(session->messages);
    return MLORA_OK;
}

/* What a line that begins with a slash asks for. */
static mlora_status obey(struct session *session, char *line)
{
    char *argument = line + strcspn(line, " ");

    while (*argument == ' ') *argument++ = '\0';
    for (size_t end = strlen(argument); end > 0 && argument[end - 1] == ' ';)
        argument[--end] = '\0';
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) {
        session->quit = true;
        return MLORA_OK;
    }
    if (strcmp(line, "/help") == 0) {
        printf("%s%s", help, session->settings.chat ? chat_help : "");
        return MLORA_OK;
    }
    if (strcmp(line, "/adapters") == 0 || (strcmp(line, "/adapter") == 0 && !*argument)) {
        list_adapters(session);
        return MLORA_OK;
    }
    if (strcmp(line, "/adapter") == 0) return use_adapter(session, argument);
    if (strcmp(line, "/system") == 0 && session->settings.chat)
        return set_system(session, argument);
    if (strcmp(line, "/reset") == 0 && session->settings.chat) {
        json_array_clear(session->messages);
        return MLORA_OK;
    }
    return error_set(MLORA_EINVAL, "unknown command %s; /help lists them", line);
}

/* ---- the loop ----------------------------------------------------------------------------- */

static volatile sig_atomic_t stopped_typing; /* Ctrl-C while a line was edited */

static void on_interrupt(int number)
{
    (void)number;
    stopped_typing = 1;
}

static char *editor_prompt(EditLine *editor)
{
    struct session *session;

    el_get(editor, EL_CLIENTDATA, &session);
    return session->prompt;
}

/* Read one prompt, which may be several lines. Returns 1, 0 after Ctrl-C, or -1 at the end. */
static int read_prompt(EditLine *editor, struct session *session, struct buffer *out)
{
    const struct sigaction ours = {.sa_handler = on_interrupt}; /* without SA_RESTART */
    struct sigaction before;
    int n = 0, result = -1;
    const char *line;

    out->bytes = 0;
    stopped_typing = 0;
    name_prompt(session);
    sigaction(SIGINT, &ours, &before);
    while ((line = el_gets(editor, &n)) && n > 0) {
        const int bytes = n > 0 && line[n - 1] == '\n' ? n - 1 : n;
        const bool more = bytes > 0 && line[bytes - 1] == '\\';
        if (buffer_append(out, line, (size_t)(more ? bytes - 1 : bytes)) != MLORA_OK) break;
        if (more && buffer_append(out, "\n", 1) != MLORA_OK) break;
        result = 1;
        if (!more) break;
        snprintf(session->prompt, sizeof session->prompt, "... ");
    }
    sigaction(SIGINT, &before, NULL);
    if (!stopped_typing) return result;
    el_reset(editor);
    printf("\n");
    return 0;
}

static mlora_status loop(struct session *session, EditLine *editor, History *past)
{
    struct buffer line = {0};
    HistEvent event;

    while (!session->quit) {
        const int got = read_prompt(editor, session, &line);
        if (got < 0) break;
        if (got == 0 || line.bytes == 0) continue;
        history(past, &event, H_ENTER, line.data);
        const mlora_status status =
            line.data[0] == '/' ? obey(session, line.data) : answer(session, &line);
        if (status == MLORA_EDEVICE || status == MLORA_ENOMEM) {
            buffer_free(&line);
            return status;
        }
        if (status != MLORA_OK) (void)fail(status);
    }
    buffer_free(&line);
    return MLORA_OK;
}

mlora_status interactive(mlora_engine *engine, const struct job_settings *settings,
                         const char *adapter, bool timings)
{
    struct session session = {.engine = engine, .settings = *settings, .timings = timings};
    HistEvent event;
    EditLine *editor = NULL;
    History *past = NULL;

    setlocale(LC_CTYPE, ""); /* the line editor needs to know that what is typed is UTF-8 */
    mlora_status status = use_adapter(&session, adapter ? adapter : "base");
    if (status != MLORA_OK) goto done;
    if (settings->system) status = set_system(&session, settings->system);
    if (status != MLORA_OK) goto done;
    session.messages = json_array();
    past = history_init();
    editor = el_init("mlora", stdin, stdout, stderr);
    if (!session.messages || !past || !editor) {
        status = error_set(MLORA_ENOMEM, "out of memory for the line editor");
        goto done;
    }
    history(past, &event, H_SETSIZE, 1000);
    el_set(editor, EL_EDITOR, "emacs");
    el_set(editor, EL_HIST, history, past);
    el_set(editor, EL_CLIENTDATA, &session);
    el_set(editor, EL_PROMPT, editor_prompt);
    el_source(editor, NULL);
    printf("/help lists the commands; %d adapters are loaded\n", mlora_adapter_count(engine));
    status = loop(&session, editor, past);

done:
    if (editor) el_end(editor);
    if (past) history_end(past);
    json_decref(session.messages);
    free(session.adapter);
    free(session.system);
    return status;
}
