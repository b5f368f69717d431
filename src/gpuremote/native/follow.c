/* Following: a copy through memory that two processes see, where the one that reads comes right
   behind the one that writes. How far that is stands in a counter (u32) beside the memory, so it
   takes no message to say. Used by transport.shm; without it messages say the same. */

#include "native.h"
#include "ways.h"

#include <sched.h>

/* Bytes after which the counter is set: what the reader gets is in a cache still, and it is never
   much behind. */
#define STEP ((Py_ssize_t)128 << 10)
/* Looks at the counter between two offers of the processor to others: the writer may need it. */
#define LOOKS 32
/* Nanoseconds per byte that a follower stays at most, whatever the counter says: a sender needs a
   fortieth of that, and one that means harm does not keep the session longer. */
#define SLOWEST 4

typedef struct {
    Py_buffer to, from, counter;
} Views;

static int get_views(Views *views, PyObject *const *args, int counter_flags)
{
    if (PyObject_GetBuffer(args[0], &views->to, PyBUF_WRITABLE) < 0)
        return -1;
    if (PyObject_GetBuffer(args[1], &views->from, PyBUF_SIMPLE) < 0)
        goto to;
    if (PyObject_GetBuffer(args[2], &views->counter, counter_flags) < 0)
        goto from;
    if (views->to.len == views->from.len && views->counter.len == 4
        && (uintptr_t)views->counter.buf % 4 == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "%zd bytes for %zd, and a counter of %zd", views->from.len,
                 views->to.len, views->counter.len);
    PyBuffer_Release(&views->counter);
from:
    PyBuffer_Release(&views->from);
to:
    PyBuffer_Release(&views->to);
    return -1;
}

static void release_views(Views *views)
{
    PyBuffer_Release(&views->counter);
    PyBuffer_Release(&views->from);
    PyBuffer_Release(&views->to);
}

/* The ways of what is large, touched with the interpreter's lock only. Whoever follows measures what
   both take. */
static Choice leading = {.run = 4, .ways = WAYS_ALONE}, following = {.run = 4, .ways = WAYS_ALONE};

static void learn(Choice *ways, int way, Py_ssize_t size, long long since)
{
    choosing_learn(ways, way, (double)size / (double)(looking_now() - since + 1));
}

/* lead(target, source, counter, before, large): copy, and say how far it is; ``before`` bytes lie in
   front of the target. What is large goes the fastest way. */
PyObject *follow_lead(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Views views;
    unsigned long before = count == 5 ? PyLong_AsUnsignedLong(args[3]) : 0;
    if (count != 5)
        PyErr_SetString(PyExc_TypeError, "lead() takes target, source, counter, before, large");
    if (PyErr_Occurred() || get_views(&views, args, PyBUF_WRITABLE) < 0)
        return NULL;
    const int large = args[4] == Py_True, way = large ? choosing_way(&leading) : WAY_PLAIN;
    const long long begin = looking_now();
    char *to = views.to.buf;
    const char *from = views.from.buf;
    uint32_t *counter = views.counter.buf;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t done = 0, size; done < views.to.len; done += size) {
        size = views.to.len - done < STEP ? views.to.len - done : STEP;
        copy_one_way(to + done, from + done, (size_t)size, way);
        __atomic_store_n(counter, (uint32_t)(before + (unsigned long)(done + size)),
                         __ATOMIC_RELEASE);
    }
    Py_END_ALLOW_THREADS;
    if (large)
        learn(&leading, way, views.to.len, begin);
    release_views(&views);
    Py_RETURN_NONE;
}

/* follow(target, source, counter, before, patience, large): copy what the other process has written,
   and what it writes meanwhile, until all is here, or nothing more has come for ``patience`` ns, or
   it takes too long. Gives the number of bytes that are here. */
PyObject *follow_follow(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Views views;
    unsigned long before = 0;
    long long patience = 0;
    if (count == 6) {
        before = PyLong_AsUnsignedLong(args[3]);
        patience = PyErr_Occurred() ? 0 : PyLong_AsLongLong(args[4]);
    }
    else
        PyErr_SetString(PyExc_TypeError, "follow() takes 6 arguments");
    if (PyErr_Occurred() || get_views(&views, args, PyBUF_SIMPLE) < 0)
        return NULL;
    const int large = args[5] == Py_True, way = large ? choosing_way(&following) : WAY_PLAIN;
    char *to = views.to.buf;
    const char *from = views.from.buf;
    const uint32_t *counter = views.counter.buf;
    Py_ssize_t done = 0, size = views.to.len;
    const long long begin = looking_now();
    Py_BEGIN_ALLOW_THREADS;
    const long long end = begin + patience + SLOWEST * (long long)size;
    long long since = begin;
    for (unsigned looks = 1; done < size; looks++) {
        /* Whatever the other process writes there, no more than all is copied. */
        uint32_t said = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
        Py_ssize_t there = said > before ? (Py_ssize_t)(said - before) : 0;
        if (there > size)
            there = size;
        if (there > done) {
            copy_one_way(to + done, from + done, (size_t)(there - done), way);
            done = there;
            since = looking_now();
        }
        else if (looks % LOOKS == 0) {
            long long now = looking_now();
            if (now - since > patience || now > end)
                break;
            sched_yield();
        }
    }
    Py_END_ALLOW_THREADS;
    if (large && done == size)
        learn(&following, way, size, begin);
    release_views(&views);
    return PyLong_FromSsize_t(done);
}
