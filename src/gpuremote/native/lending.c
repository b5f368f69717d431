/* Sending without a copy: the pages of a program's buffer are lent to the socket (vmsplice and splice
   through a pipe, see splice(2)), and the peer copies right out of them. Within a host this halves the
   copying; the peer does all of it then, so that it takes longer where the bytes lie in no cache. So
   both ways are timed, and the shorter one is taken.

   Only for what is waited for until the peer has it: until then the buffer is not to change. Without a
   twin: Python's way is the other one. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define LEAST (128 << 10)  /* bytes that are worth the further calls */
#define MOST (32 << 20)    /* bytes of which many may lie in a cache */
#define ROOM (256 << 10)   /* bytes that are lent at once: a pipe has a slot for each page */
#define SMALLEST_PART 4096 /* heads of frames are sent: they lie on the stack */
#define RUN 4              /* uploads of a size one after the other that go the same way, at least */
#define FIRST 4            /* runs that take turns between both ways */
#define AGAIN 16           /* one run in so many goes the other way, as things change */

/* Of uploads of that many bytes, within a factor of two. */
static LentTimes *times_of(Stream *s, Py_ssize_t size)
{
    int kind = 0;
    for (size >>= 18; size && kind < LENT_KINDS - 1; size >>= 1)
        kind++;
    return &s->lent[kind];
}

/* A pipe whose two ends are this connection's; 0: no. */
static int open_pipe(Stream *s)
{
    /* A splice to a socket that blocks waits for room (it has no MSG_DONTWAIT): for a moment. */
    const struct timeval moment = {0, 1000};
    int ends[2];
    if (setsockopt(s->fd, SOL_SOCKET, SO_SNDTIMEO, &moment, sizeof moment) < 0
        || pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return 0;
    int room = fcntl(ends[1], F_SETPIPE_SZ, ROOM); /* fails where a user has many */
    s->pipe_room = room > 0 ? room : fcntl(ends[1], F_GETPIPE_SZ);
    s->pipe_out = ends[0];
    s->pipe_in = ends[1];
    return s->pipe_room > 0;
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

int lending_begin(Stream *s, Py_ssize_t size)
{
    struct sigaction now;
    if (s->lends_not || !s->same_host || size < LEAST || size > MOST)
        return 0;
    LentTimes *times = times_of(s, size);
    unsigned run = times->count++ / RUN;
    int lends = run < FIRST ? run % 2 : (times->lent < times->copied) != (run % AGAIN == 0);
    times->changed = times->lends != lends;
    times->lends = (char)lends;
    /* A splice to a connection that is gone raises a signal, which Python ignores; a program may not. */
    if (!lends || sigaction(SIGPIPE, NULL, &now) < 0 || now.sa_handler != SIG_IGN)
        return 0;
    if (!s->pipe_room && !open_pipe(s)) {
        lending_end(s);
        s->lends_not = 1;
    }
    return !s->lends_not;
}

void lending_took(Stream *s, Py_ssize_t size, int lent, long long nanoseconds)
{
    LentTimes *times = times_of(s, size);
    if (times->changed) /* the caches are still those of the other way */
        return;
    double *usual = lent ? &times->lent : &times->copied, now = (double)nanoseconds / (double)size;
    if (*usual == 0 || now < *usual)
        *usual = *usual == 0 ? now : (*usual + now) / 2;
    else /* slowly: whoever was kept from running says little of the way */
        *usual += ((now < 1.25 * *usual ? now : 1.25 * *usual) - *usual) / 8;
}

/* As send(2), of the pages themselves; ``full``: the kernel takes no more. */
static ssize_t lend(Stream *s, const char *from, size_t size, int more, int *full)
{
    struct iovec part = {(char *)from, size};
    ssize_t given = vmsplice(s->pipe_in, &part, 1, SPLICE_F_NONBLOCK), taken;
    if (given < 0) {
        /* Memory that has no pages, or a kernel that does not lend them: copied from now on. */
        s->lends_not = errno != EINTR;
        taken = send(s->fd, from, size, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0));
        *full = taken < (ssize_t)size;
        return taken;
    }
    more = more || (size_t)given < size; /* where it begins within a page, the pipe takes less */
    taken = splice(s->pipe_out, NULL, s->fd, NULL, (size_t)given,
                   SPLICE_F_NONBLOCK | (more ? SPLICE_F_MORE : 0));
    *full = taken < given;
    if (taken > 0)
        s->payload_lent += taken;
    if (*full) { /* what was not taken must not come before what is sent next */
        int reason = errno;
        lending_end(s);
        s->lends_not = !open_pipe(s);
        errno = reason;
    }
    return taken;
}

/* Parts one after the other from ``part`` on that are sent: the heads of frames lie on the stack. */
static size_t heads(const struct iovec *part, size_t count)
{
    size_t k = 0;
    while (k < count && part[k].iov_len < SMALLEST_PART)
        k++;
    return k;
}

ssize_t lending_sendmsg(Stream *s, const struct msghdr *message)
{
    struct iovec *part = message->msg_iov, *end = part + message->msg_iovlen;
    ssize_t sent = 0, count;
    while (part < end) {
        size_t copied = s->lends_not ? (size_t)(end - part) : heads(part, (size_t)(end - part));
        if (copied) {
            struct msghdr some = {.msg_iov = part, .msg_iovlen = copied};
            int more = part + copied < end ? MSG_MORE : 0;
            size_t size = 0;
            for (size_t k = 0; k < copied; k++)
                size += part[k].iov_len;
            count = sendmsg(s->fd, &some, MSG_DONTWAIT | MSG_NOSIGNAL | more);
            if (count < (ssize_t)size)
                return count > 0 ? sent + count : sent ? sent : count;
            sent += count, part += copied;
            continue;
        }
        const char *from = part->iov_base;
        size_t left = part->iov_len;
        int full = 0;
        part++;
        while (left && !full) {
            size_t room = (size_t)s->pipe_room, size = room && room < left ? room : left;
            count = lend(s, from, size, size < left || part < end, &full);
            if (count < 0)
                return sent ? sent : count;
            from += count, left -= (size_t)count, sent += count;
        }
        if (full)
            break;
    }
    return sent;
}
