/* copy: flat bytes from one place in memory to another. Twin: memory.host._python_copy. */

#define _GNU_SOURCE
#include "native.h"
#include "ways.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* From here on a copy may go past the caches. */
#define PAST_CACHES ((Py_ssize_t)2 << 20)
/* From here on if it is another process that reads them: what this one has in its caches stays
   there, its code above all. */
#define PAST_CACHES_AWAY ((Py_ssize_t)256 << 10)
/* From here on more than one processor may copy, as one alone may not keep the memory busy. To start
   a thread takes some 30 us, in which half a MiB is copied. */
#define SHARED_OUT ((Py_ssize_t)8 << 20)
/* From here on if another process reads them: it does not copy at the same time. */
#define SHARED_OUT_AWAY ((Py_ssize_t)4 << 20)
/* From here on hardly any of them are still in a cache. */
#define IN_NO_CACHE ((Py_ssize_t)32 << 20)
#define MOST 4
/* Bytes that a thread takes at a time: one that came late, or has to share its processor, takes
   fewer. */
#define PIECE ((size_t)512 << 10)
/* The ways of copies of the sizes between these: the smaller, the more of them find their memory in a
   cache by the time that they come to it again. Of the first steps nothing is learnt, as they find memory
   that nobody has touched before. A way past the caches wins the first comparisons, as nothing is in
   them yet: so what is small begins with what is the fastest later on. */
#define SIZES                                                                                       \
    {                                                                                               \
        {.run = 24, .ways = WAYS_CACHED, .warms = 1, .best = WAY_CACHED},                             \
            {.run = 8, .ways = WAYS_ALONE, .warms = 1}, {.run = 4, .ways = WAYS_SHARED, .warms = 1},  \
            {.run = 1, .ways = WAYS_SHARED, .warms = 4},                                              \
    }
/* Below this, letting go of the interpreter's lock costs more than it gives others. */
#define WITH_LOCK ((Py_ssize_t)64 << 10)

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e9 * (double)now.tv_sec + (double)now.tv_nsec;
}

/* A copy that several threads share: each takes the next piece. A thread that comes when there are
   none left touches nothing but this, and nobody waits for it: the last one to go frees it. */
typedef struct {
    char *to;
    const char *from;
    size_t size;
    int way;
    size_t taken;
    pthread_mutex_t lock; /* of what is below */
    pthread_cond_t gone;
    size_t copied;
    int owners;
} Shared;

static void copy_pieces(Shared *shared)
{
    size_t at, copied = 0;
    while ((at = __atomic_fetch_add(&shared->taken, PIECE, __ATOMIC_RELAXED)) < shared->size) {
        size_t left = shared->size - at, size = left < PIECE ? left : PIECE;
        copy_one_way(shared->to + at, shared->from + at, size, shared->way);
        copied += size;
    }
    pthread_mutex_lock(&shared->lock);
    shared->copied += copied;
    if (shared->copied == shared->size)
        pthread_cond_signal(&shared->gone);
    pthread_mutex_unlock(&shared->lock);
}

static void let_go(Shared *shared)
{
    pthread_mutex_lock(&shared->lock);
    int left = --shared->owners;
    pthread_mutex_unlock(&shared->lock);
    if (left == 0) {
        pthread_cond_destroy(&shared->gone);
        pthread_mutex_destroy(&shared->lock);
        free(shared);
    }
}

static void *help(void *argument)
{
    copy_pieces(argument);
    let_go(argument);
    return NULL;
}

/* How many processors this thread may use, and into attributes that threads go to the others: one
   that waits here for its turn is of no use, and those who look for messages there give way. */
static int processors(pthread_attr_t *elsewhere)
{
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        int count = CPU_COUNT(&allowed);
#ifdef __GLIBC__ /* musl has no such attribute */
        int here = sched_getcpu();
        if (here >= 0 && count > 1) {
            CPU_CLR(here, &allowed);
            pthread_attr_setaffinity_np(elsewhere, sizeof allowed, &allowed);
        }
#endif
        return count < MOST ? count : MOST;
    }
#endif
    return 1;
}

/* Each processor copies a part; all of it is there on return. */
static void share_out(char *to, const char *from, size_t size, int way)
{
    pthread_attr_t elsewhere;
    pthread_attr_init(&elsewhere);
    pthread_attr_setdetachstate(&elsewhere, PTHREAD_CREATE_DETACHED);
    int helpers = processors(&elsewhere) - 1;
    Shared *shared = helpers > 0 ? malloc(sizeof *shared) : NULL;
    if (shared == NULL) {
        pthread_attr_destroy(&elsewhere);
        copy_one_way(to, from, size, way);
        return;
    }
    *shared = (Shared){.to = to, .from = from, .size = size, .way = way, .owners = 1};
    pthread_mutex_init(&shared->lock, NULL);
    pthread_cond_init(&shared->gone, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    while (helpers-- > 0) {
        pthread_t thread;
        pthread_mutex_lock(&shared->lock);
        shared->owners++;
        pthread_mutex_unlock(&shared->lock);
        if (pthread_create(&thread, &elsewhere, help, shared) != 0) {
            let_go(shared);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&elsewhere);
    copy_pieces(shared);
    pthread_mutex_lock(&shared->lock);
    while (shared->copied < size)
        pthread_cond_wait(&shared->gone, &shared->lock);
    pthread_mutex_unlock(&shared->lock);
    let_go(shared);
}

void copy_flat(char *to, const char *from, Py_ssize_t size, int away)
{
    Py_ssize_t past = away ? PAST_CACHES_AWAY : PAST_CACHES;
    Py_ssize_t shared_out = away ? SHARED_OUT_AWAY : SHARED_OUT;
    if (size <= WITH_LOCK) {
        memcpy(to, from, (size_t)size);
    } else if (size < past) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(to, from, (size_t)size);
        Py_END_ALLOW_THREADS
    } else {
        /* touched with the interpreter's lock only */
        static Choice known[2][4] = {SIZES, SIZES};
        int kind = (size >= PAST_CACHES) + (size >= shared_out) + (size >= IN_NO_CACHE);
        Choice *ways = &known[away][kind];
        if (kind > 1)
            choosing_begin_like(ways, &known[away][5 - kind]);
        int way = choosing_way(ways);
        double taken;
        Py_BEGIN_ALLOW_THREADS
        taken = nanoseconds();
        if (way < WAY_SHARED)
            copy_one_way(to, from, (size_t)size, way);
        else
            share_out(to, from, (size_t)size, way);
        taken = nanoseconds() - taken;
        Py_END_ALLOW_THREADS
        choosing_learn(ways, way, (double)size / (taken + 1));
    }
}

/* copy(target, source, away): two flat buffers of equal size that do not overlap; away: another
   process will read them. */
PyObject *copy_bytes(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer to, from;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "copy() takes target, source and away");
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &to, PyBUF_WRITABLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[1], &from, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&to);
        return NULL;
    }
    int failed = to.len != from.len;
    if (failed)
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fit into %zd exactly", from.len, to.len);
    else
        copy_flat(to.buf, from.buf, to.len, args[2] == Py_True);
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* address(view): of the first byte of a flat view. */
PyObject *copy_address(PyObject *module, PyObject *view)
{
    Py_buffer buffer;
    if (PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *address = PyLong_FromVoidPtr(buffer.buf);
    PyBuffer_Release(&buffer);
    return address;
}
