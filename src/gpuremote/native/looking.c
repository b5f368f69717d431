/* Looking for bytes instead of sleeping, see looking.h. */

#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

/* A yield that takes so long has most likely let another thread run on this processor, and when
   others had it for so long, in one look or in several one after the other, this is not the place to
   look. */
#define TAKEN_NS 10000
#define MUCH_NS (WITHIN_NS / 4)
/* Between two moves to another processor; one takes some 50 µs. */
#define STAY_NS 5000000

/* Go to another processor than this one, of those that this thread may use. A virtual machine's
   kernel takes an idle processor whose host has put it to sleep for one that is busy, and wakes
   this thread where its peer runs; there they stay, as neither is ever seen to wait. */
static void step_aside(Stream *s)
{
#ifdef __linux__
    long long now = looking_now();
    cpu_set_t allowed, others;
    int here = sched_getcpu();
    if (now - s->moved < STAY_NS || here < 0 || sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    s->moved = now;
    others = allowed;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others))
        sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

/* How often another thread was given the processor of this one. */
static long switches(void)
{
#ifdef __linux__
    struct rusage usage;
    if (!getrusage(RUSAGE_THREAD, &usage))
        return usage.ru_nivcsw + usage.ru_nvcsw;
#endif
    return 0;
}

/* Whether there is one of ``events`` of poll. For input, in a program that waits for an answer, by a
   receive that takes nothing: while that has the socket, what the peer tells of an upload's bytes is
   seen to here afterwards (thousands of pages are given back), and not by the peer itself, on its
   processor, while it is copying the last of them. */
static int there(Stream *s, short events)
{
    if (events != POLLIN || s->roams) {
        struct pollfd watched = {.fd = s->fd, .events = events};
        return poll(&watched, 1, 0) > 0;
    }
    char byte;
    if (recv(s->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0)
        return 1;
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        return 0;
    s->peeked = errno; /* which is told once */
    return 1;
}

int looking_look(Stream *s, short events, long looks, const char *over)
{
    long long begin = looking_now(), now = begin, taken = s->taken;
    long switched = s->roams ? switches() : 0;
    int ready = 0;
    for (long k = 0; k < looks && !ready && now - begin < WITHIN_NS; k++) {
        ready = there(s, events);
        if (ready || *(const volatile char *)over)
            break;
        long long before = now;
        /* Whoever else wants this processor, the peer first of all, is not kept from it. */
        sched_yield();
        now = looking_now();
        if (s->roams && now - before > TAKEN_NS && switches() != switched) {
            switched = switches();
            s->taken += now - before;
            if (s->taken > MUCH_NS)
                step_aside(s);
        }
    }
    if (now != begin && s->taken == taken)
        s->taken = 0; /* nobody else was here */
    return ready;
}

void looking_woke(Stream *s)
{
#ifdef SO_INCOMING_CPU
    int cpu = -1;
    socklen_t size = sizeof cpu;
    if (s->roams && s->same_host && !getsockopt(s->fd, SOL_SOCKET, SO_INCOMING_CPU, &cpu, &size) && cpu >= 0
        && cpu == sched_getcpu())
        step_aside(s);
#endif
}

int stream_more_soon(Stream *s)
{
    if (s->gap_looks <= 0 || !looking_due(&s->gaps))
        return 0;
    int ready;
    Py_BEGIN_ALLOW_THREADS;
    ready = looking_look(s, POLLIN, s->gap_looks, &s->hands_off);
    Py_END_ALLOW_THREADS;
    looking_looked(&s->gaps, ready);
    return PyErr_CheckSignals() < 0 ? -1 : ready;
}

/* _more_soon() */
PyObject *looking_more_soon(PyObject *self, PyObject *unused)
{
    /* No memory is lent to whoever comes here, so nobody waits for that. */
    ((Stream *)self)->hands_off = 0;
    int ready = stream_more_soon((Stream *)self);
    return ready < 0 ? NULL : PyBool_FromLong(ready);
}

/* doze(left, pause, looks): sleep ``pause`` seconds, again while the byte ``left`` is 0, up to ``looks``
   times, without the interpreter's lock; how often. Twin: gpuremote.client.tail. */
PyObject *looking_doze(PyObject *module, PyObject *args)
{
    Py_buffer left;
    double pause;
    long looks, count = 0;
    if (!PyArg_ParseTuple(args, "y*dl", &left, &pause, &looks))
        return NULL;
    const struct timespec time = {(time_t)pause, (long)((pause - (double)(time_t)pause) * 1e9)};
    Py_BEGIN_ALLOW_THREADS;
    do {
        nanosleep(&time, NULL);
        count++;
    } while (count < looks && left.len && !__atomic_load_n((char *)left.buf, __ATOMIC_ACQUIRE));
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&left);
    return PyLong_FromLong(count);
}
