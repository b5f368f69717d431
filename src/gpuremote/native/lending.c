/* Sending without a copy: the pages of a program's buffer are lent to the socket (vmsplice and splice
   through a pipe, see splice(2)), and the peer copies right out of them. Within a host this halves the
   copying; the peer does all of it then, so that it takes longer where the bytes lie in no cache. So
   both ways are timed, and the shorter one is taken.

   Only for what stays as it is until the peer says that it has it: an upload that is waited for, or a
   server's array, as ops that would write to it wait. Without a twin: Python's way is the other one. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define LEAST (128 << 10)  /* bytes that are worth the further calls */
#define MOST (256 << 20)   /* bytes that are waited for in one step */
#define ROOM (256 << 10)   /* bytes that are lent at once: a pipe has a slot for each page */
#define CACHED (8 << 20)   /* bytes of which many lie in a cache by the next time */
#define NOT_CACHED (32 << 20) /* bytes of which hardly any do */

/* Of uploads of that many bytes, within a factor of two. */
static Choice *choice_of(Stream *s, Py_ssize_t size)
{
    int kind = 0;
    for (Py_ssize_t left = size >> 18; left && kind < LENT_KINDS - 1; left >>= 1)
        kind++;
    Choice *choice = &s->lent[kind];
    choice->ways = 3; /* 0: they are copied; 1: lent */
    choice->run = size < CACHED ? 8 : size < NOT_CACHED ? 4 : 1;
    return choice;
}

/* A pipe whose two ends are this connection's; 0: no. */
static int open_pipe(Stream *s)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return 0;
    int room = fcntl(ends[1], F_SETPIPE_SZ, ROOM);
    if (room <= 0) /* the user has many */
        room = fcntl(ends[1], F_GETPIPE_SZ);
    s->pipe_room = room > 0 ? room : PIPE_BUF;
    s->pipe_out = ends[0];
    s->pipe_in = ends[1];
    return 1;
}

void lending_end(Stream *s)
{
    if (s->pipe_room) {
        close(s->pipe_out);
        close(s->pipe_in);
        s->pipe_room = 0;
    }
}

PyObject *lending_end_lending(PyObject *self, PyObject *unused)
{
    lending_end((Stream *)self);
    Py_RETURN_NONE;
}

/* A splice to a connection that is gone raises a signal, which Python ignores. A program may not, or may
   block it, and then it would stay. */
static int is_harmless(int signal)
{
    struct sigaction now;
    sigset_t blocked;
    return !sigaction(signal, NULL, &now) && now.sa_handler == SIG_IGN
           && !pthread_sigmask(SIG_BLOCK, NULL, &blocked) && !sigismember(&blocked, signal);
}

static int can_lend(Stream *s)
{
    if (!s->lends_not && !s->pipe_room) {
        /* A splice to a socket that blocks waits for room (it has no MSG_DONTWAIT): for a moment. All
           else that is sent does not wait. */
        const struct timeval moment = {0, 1000};
        s->lends_not = setsockopt(s->fd, SOL_SOCKET, SO_SNDTIMEO, &moment, sizeof moment) < 0
                       || !open_pipe(s);
    }
    return !s->lends_not;
}

Choice *lending_begin(Stream *s, Py_ssize_t size, int *lends)
{
    *lends = 0;
    if (s->lends_not || !s->same_host || size < LEAST || size > MOST || !is_harmless(SIGPIPE))
        return NULL;
    Choice *choice = choice_of(s, size);
    *lends = choosing_way(choice) && can_lend(s);
    return choice;
}

void lending_took(Choice *choice, int lends, Py_ssize_t size, long long nanoseconds)
{
    choosing_learn(choice, lends, (double)size / (double)(nanoseconds + 1));
}

int lending_answers(Stream *s, Py_ssize_t size)
{
    s->answering = lending_begin(s, size, &s->answer_lent);
    s->answer_size = size;
    s->answered_at = looking_now();
    return s->answer_lent;
}

/* With what the program did until it said so, in either way. */
void lending_answered(Stream *s)
{
    if (s->answering != NULL)
        lending_took(s->answering, s->answer_lent, s->answer_size, looking_now() - s->answered_at);
    s->answering = NULL;
}

/* As send(2), of the pages themselves; ``full``: the kernel takes no more. -1, and nothing is to be lent
   any more: it does not lend these, or at all. */
static ssize_t lend(Stream *s, const struct iovec *part, int more, int *full)
{
    ssize_t given = vmsplice(s->pipe_in, part, 1, SPLICE_F_NONBLOCK);
    if (given < 0) {
        s->lends_not = errno != EINTR;
        *full = !s->lends_not;
        return -1;
    }
    more = more || (size_t)given < part->iov_len; /* from within a page on, the pipe takes less */
    ssize_t taken = splice(s->pipe_out, NULL, s->fd, NULL, (size_t)given,
                           SPLICE_F_NONBLOCK | (more ? SPLICE_F_MORE : 0));
    *full = taken < given;
    if (*full) { /* what was not taken must not come before what is sent next */
        int reason = errno;
        lending_end(s);
        s->lends_not = !open_pipe(s);
        errno = reason;
    }
    return taken;
}

/* Of a message that is its head, and then a head and the bytes of each frame: the parts one after the
   other from ``part`` on that are copied. The heads lie on the stack. */
static size_t heads(const Stream *s, const struct msghdr *message, const struct iovec *part)
{
    const struct iovec *first = part, *end = message->msg_iov + message->msg_iovlen;
    while (part < end && (s->lends_not || part == message->msg_iov || (part - message->msg_iov) % 2))
        part++;
    return (size_t)(part - first);
}

/* As sendmsg(2), of some of the parts; ``full``: the kernel takes no more. */
static ssize_t copy(Stream *s, struct iovec *part, size_t count, int more, int *full)
{
    struct msghdr some = {.msg_iov = part, .msg_iovlen = count};
    size_t size = 0;
    for (size_t k = 0; k < count; k++)
        size += part[k].iov_len;
    ssize_t sent =
        size ? sendmsg(s->fd, &some, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0)) : 0;
    *full = sent < (ssize_t)size;
    return sent;
}

ssize_t lending_sendmsg(Stream *s, const struct msghdr *message, long long *lent)
{
    struct iovec *part = message->msg_iov, *end = part + message->msg_iovlen;
    ssize_t sent = 0, count;
    int full = 0;
    while (part < end && !full) {
        size_t copied = heads(s, message, part);
        if (copied) {
            count = copy(s, part, copied, part + copied < end, &full);
            if (count < 0)
                return sent ? sent : count;
            sent += count, part += copied;
            continue;
        }
        struct iovec left = *part++;
        while (left.iov_len && !full) {
            size_t room = s->lends_not ? left.iov_len : (size_t)s->pipe_room;
            struct iovec some = {left.iov_base, room < left.iov_len ? room : left.iov_len};
            int more = some.iov_len < left.iov_len || part < end;
            count = s->lends_not ? -1 : lend(s, &some, more, &full);
            if (count >= 0)
                *lent += count;
            else if (s->lends_not && !full) /* memory without pages, say */
                count = copy(s, &some, 1, more, &full);
            if (count < 0)
                return sent ? sent : count;
            left.iov_base = (char *)left.iov_base + count;
            left.iov_len -= (size_t)count, sent += count;
        }
    }
    return sent;
}
