#include "tools/child.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/error.h"

/* What the child says at its end. */
struct verdict {
    mlora_status status;
    char text[1024];
};

/* A crash ends the child, quietly, whoever had thought to handle it. */
static void let_crash(unsigned limit_s)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
    const struct rlimit no_core = {0, 0};

    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) signal(signals[i], SIG_DFL);
    setrlimit(RLIMIT_CORE, &no_core);
    alarm(limit_s);
}

static void run_child(int out, unsigned limit_s, mlora_status (*fn)(void *), void *context)
{
    struct verdict verdict = {0};

    let_crash(limit_s);
    verdict.status = fn(context);
    if (verdict.status != MLORA_OK)
        snprintf(verdict.text, sizeof verdict.text, "%s", mlora_error());
    if (fflush(stdout) != 0 && verdict.status == MLORA_OK) {
        verdict.status = MLORA_EIO;
        snprintf(verdict.text, sizeof verdict.text, "the output cannot be written");
    }
    const ssize_t n = write(out, &verdict, sizeof verdict);
    _exit(n == (ssize_t)sizeof verdict ? 0 : 1);
}

static mlora_status judge(const char *path, int code, unsigned limit_s)
{
    if (!WIFSIGNALED(code))
        return error_set(MLORA_EFORMAT, "%s: it ended the process that tried it, exit status %d",
                         path, WEXITSTATUS(code));
    if (WTERMSIG(code) == SIGALRM)
        return error_set(MLORA_EFORMAT, "%s: did not end within %u s when it was tried", path,
                         limit_s);
    return error_set(MLORA_EFORMAT, "%s: crashed when it was tried: SIG%s (%s)", path,
                     sigabbrev_np(WTERMSIG(code)), strsignal(WTERMSIG(code)));
}

mlora_status child_run(const char *path, unsigned seconds, mlora_status (*fn)(void *context),
                       void *context)
{
    struct verdict verdict = {0};
    int ends[2], code = 0;
    size_t got = 0;
    ssize_t n;

    fflush(NULL); /* or the child would write it again */
    if (pipe(ends) != 0)
        return error_set(MLORA_EIO, "%s: no pipe to try it through: %s", path, strerror(errno));
    const pid_t pid = fork();
    if (pid < 0) {
        close(ends[0]);
        close(ends[1]);
        return error_set(MLORA_ENOMEM, "%s: no process to try it in: %s", path, strerror(errno));
    }
    if (pid == 0) {
        close(ends[0]);
        run_child(ends[1], seconds, fn, context);
    }
    close(ends[1]);
    while (got < sizeof verdict &&
           ((n = read(ends[0], (char *)&verdict + got, sizeof verdict - got)) > 0 ||
            (n < 0 && errno == EINTR)))
        got += n > 0 ? (size_t)n : 0;
    close(ends[0]);
    while (waitpid(pid, &code, 0) < 0 && errno == EINTR) continue;
    if (got < sizeof verdict || WIFSIGNALED(code)) return judge(path, code, seconds);
    verdict.text[sizeof verdict.text - 1] = '\0';
    return verdict.status == MLORA_OK ? MLORA_OK : error_set(verdict.status, "%s", verdict.text);
}
