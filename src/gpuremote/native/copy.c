/* copy: flat bytes from one place in memory to another. Twin: memory.host._python_copy. */

#define _GNU_SOURCE
#include "native.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* From here on the bytes may go past the caches: what is larger would be out of them by the time
   somebody reads it, and memory that is written around them need not be read first. The C library
   does so as well, but later by far: from some 200 MiB on. Whether it is faster depends on the
   machine and on what else runs there, so both ways are tried, and the faster one is used. */
#define PAST_CACHES ((Py_ssize_t)2 << 20)
/* From here on if it is another process that reads them: what this one has in its caches stays
   there, its code above all. */
#define PAST_CACHES_AWAY ((Py_ssize_t)256 << 10)
/* From here on more than one processor copies, as one alone does not keep the memory busy. To start
   a thread takes some 30 us, in which half a MiB is copied. */
#define SHARED_OUT ((Py_ssize_t)8 << 20)
/* From here on if another process reads them: it does not copy at the same time. */
#define SHARED_OUT_AWAY ((Py_ssize_t)4 << 20)
#define MOST 4
/* Bytes that a thread takes at a time: one that came late, or has to share its processor, takes
   fewer. */
#define PIECE ((size_t)512 << 10)
/* Below this, letting go of the interpreter's lock costs more than it gives others. */
#define WITH_LOCK ((Py_ssize_t)64 << 10)

/* What is known of either way (0: the C library's, 1: past the caches) for copies of about one
   size: bytes per nanosecond of the latest ones. The best of them counts: the others had to wait
   for pages, for a processor or for caches that were cold. */
#define LATEST 8
typedef struct {
    double rates[2][LATEST];
    unsigned counts[2];
    unsigned rest; /* copies until the other one is tried again: memory may be busier by then */
    unsigned trials;
} Ways;
#define AGAIN 64

static double best(const Ways *ways, int way)
{
    double found = 0;
    for (int i = 0; i < LATEST; i++)
        if (ways->rates[way][i] > found)
            found = ways->rates[way][i];
    return found;
}

/* Trials come in pairs, as the first one may find caches that the other way has left behind (the
   very first pair is one of each); at first after a few copies, later after more and more of them. */
static int choose(Ways *ways)
{
#ifdef __SSE2__
    int better = best(ways, 1) > best(ways, 0);
    if (ways->rest > 0) {
        ways->rest--;
        return better;
    }
    if (++ways->trials % 2 == 0)
        ways->rest = ways->trials < AGAIN / 2 ? 2 * ways->trials : AGAIN;
    return !better;
#else
    return 0;
#endif
}

static void learn(Ways *ways, int way, double rate)
{
    ways->rates[way][ways->counts[way]++ % LATEST] = rate;
}

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e9 * (double)now.tv_sec + (double)now.tv_nsec;
}

#ifdef __SSE2__
static inline void stream_line(char *to, const char *from)
{
    const __m128i *in = (const __m128i *)from;
    __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    __m128i *out = (__m128i *)to;
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
}
#endif

/* Four pages take turns, a line each: so the memory has four rows open, and the processor fetches
   ahead in four places. Page after page takes up to twice as long, and with prefetches that leave
   the caches out (prefetchnta) it did on a Xeon. */
#define ABREAST 4
#define PAGE 4096
#define LINE 64

static void copy_past_caches(char *to, const char *from, size_t size)
{
#ifdef __SSE2__
    size_t head = -(uintptr_t)to & (LINE - 1);
    head = head < size ? head : size;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    while (size >= ABREAST * PAGE) {
        for (size_t at = 0; at < PAGE; at += LINE)
            for (size_t page = at; page < ABREAST * PAGE; page += PAGE)
                stream_line(to + page, from + page);
        to += ABREAST * PAGE, from += ABREAST * PAGE, size -= ABREAST * PAGE;
    }
    for (; size >= LINE; size -= LINE, to += LINE, from += LINE)
        stream_line(to, from);
    /* Such stores come in any order: what says that they are there must not overtake them. */
    _mm_sfence();
#endif
    memcpy(to, from, size);
}

void copy_one_way(char *to, const char *from, size_t size, int way)
{
    if (way)
        copy_past_caches(to, from, size);
    else
        memcpy(to, from, size);
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
        static Ways known[3]; /* touched with the interpreter's lock only */
        Ways *ways = &known[size < PAST_CACHES ? 0 : size < shared_out ? 1 : 2];
        int way = choose(ways);
        double taken;
        Py_BEGIN_ALLOW_THREADS
        taken = nanoseconds();
        if (size < shared_out)
            copy_one_way(to, from, (size_t)size, way);
        else
            share_out(to, from, (size_t)size, way);
        taken = nanoseconds() - taken;
        Py_END_ALLOW_THREADS
        learn(ways, way, (double)size / (taken + 1));
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
