/* copy: flat bytes from one place in memory to another. Twin: memory.host._python_copy. */

#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* From here on the bytes may go past the caches: what is larger would be out of them by the time
   somebody reads it, and memory that is written around them need not be read first. The C library
   does so as well, but later by far. On an EPYC with 32 MiB of L3 that gives 19 instead of 14 GB/s
   for 4 MiB, and 13 instead of 7 for 16 and 64 MiB; on a Xeon 3.4 instead of 10. So both are tried,
   and the faster one is used. */
#define PAST_CACHES ((Py_ssize_t)2 << 20)
/* From here on if it is another process that reads them: what this one has in its caches stays
   there, its code above all. On the EPYC a MiB of ten in turn takes 58 instead of 120 us. */
#define PAST_CACHES_AWAY ((Py_ssize_t)256 << 10)
/* From here on more than one processor copies: one alone does not keep the memory busy. There, with
   two processors, 64 MiB 15 instead of 10 GB/s and 256 MiB 15 instead of 12; to start a thread takes
   some 30 us, in which half a MiB is copied. */
#define SHARED_OUT ((Py_ssize_t)8 << 20)
#define MOST 4
/* Below this, letting go of the interpreter's lock costs more than it gives others. */
#define WITH_LOCK ((Py_ssize_t)64 << 10)

/* What is known of either way (0: the C library's, 1: past the caches) for copies of about one
   size: the bytes per nanosecond of a good one lately. */
typedef struct {
    double rate[2];
    unsigned turns;
} Ways;
#define TRIALS 6 /* of both together, before one is chosen */
#define AGAIN 64 /* copies after which the other one is tried once more: memory may be busier now */

static int choose(Ways *ways)
{
#ifdef __SSE2__
    unsigned turn = ways->turns++;
    if (turn < TRIALS)
        return turn & 1;
    int better = ways->rate[1] > ways->rate[0];
    return turn % AGAIN ? better : !better;
#else
    return 0;
#endif
}

/* A slow one may have had to wait for pages or for a processor: it counts for less. */
static void learn(Ways *ways, int way, double rate)
{
    double *known = &ways->rate[way];
    *known = rate > *known ? rate : *known + 0.1 * (rate - *known);
}

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e9 * (double)now.tv_sec + (double)now.tv_nsec;
}

static void copy_past_caches(char *to, const char *from, size_t size)
{
#ifdef __SSE2__
    size_t head = -(uintptr_t)to & 15;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= 64; size -= 64, to += 64, from += 64) {
        _mm_prefetch(from + 512, _MM_HINT_NTA);
        const __m128i *in = (const __m128i *)from;
        __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
        __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
        __m128i *out = (__m128i *)to;
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
    }
    /* Such stores come in any order: what says that they are there must not overtake them. */
    _mm_sfence();
#endif
    memcpy(to, from, size);
}

typedef struct {
    char *to;
    const char *from;
    size_t size;
    int way;
} Part;

static void *copy_part(void *argument)
{
    Part *part = argument;
    if (part->way)
        copy_past_caches(part->to, part->from, part->size);
    else
        memcpy(part->to, part->from, part->size);
    return NULL;
}

static int processors(void)
{
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        int count = CPU_COUNT(&allowed);
        return count < MOST ? count : MOST;
    }
#endif
    return 1;
}

/* Each processor copies a part; all of it is there on return. */
static void share_out(Part whole)
{
    char *to = whole.to;
    const char *from = whole.from;
    size_t size = whole.size;
    int count = processors(), started = 0;
    size_t each = (size / (size_t)count + 4095) & ~(size_t)4095;
    pthread_t threads[MOST];
    Part parts[MOST];
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    while (started < count - 1 && size > each) {
        parts[started] = (Part){to, from, each, whole.way};
        if (pthread_create(&threads[started], NULL, copy_part, &parts[started]) != 0)
            break;
        to += each, from += each, size -= each;
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    copy_part(&(Part){to, from, size, whole.way});
    while (started > 0)
        pthread_join(threads[--started], NULL);
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
    Py_ssize_t past = args[2] == Py_True ? PAST_CACHES_AWAY : PAST_CACHES;
    if (PyObject_GetBuffer(args[0], &to, PyBUF_WRITABLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[1], &from, PyBUF_SIMPLE) < 0) {
        PyBuffer_Release(&to);
        return NULL;
    }
    if (to.len != from.len) {
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fit into %zd exactly", from.len, to.len);
    } else if (to.len <= WITH_LOCK) {
        memcpy(to.buf, from.buf, (size_t)to.len);
    } else if (to.len < past) {
        Py_BEGIN_ALLOW_THREADS
        memcpy(to.buf, from.buf, (size_t)to.len);
        Py_END_ALLOW_THREADS
    } else {
        static Ways known[3]; /* touched with the interpreter's lock only */
        Ways *ways = &known[to.len < PAST_CACHES ? 0 : to.len < SHARED_OUT ? 1 : 2];
        Part whole = {to.buf, from.buf, (size_t)to.len, choose(ways)};
        double taken;
        Py_BEGIN_ALLOW_THREADS
        taken = nanoseconds();
        if (to.len < SHARED_OUT)
            copy_part(&whole);
        else
            share_out(whole);
        taken = nanoseconds() - taken;
        Py_END_ALLOW_THREADS
        learn(ways, whole.way, (double)to.len / (taken + 1));
    }
    int failed = to.len != from.len;
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}
