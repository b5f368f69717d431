/* Sending: payload of a Stream, from where it lies. Twins: transport._sending._send_one and
   transport._outgoing._Stream.push. */

#include "native.h"

#include <errno.h>
#include <poll.h>
#include <pythread.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* DATA frames of one call. */
#define FRAMES 16
/* Bytes of one call of a run that gives way; and nanoseconds that it may take, with as many as bytes
   are out: who takes less than 1 GB/s does not keep others waiting. */
#define GIVING_WAY (4 << 20)
#define GRACE_NS 2000000

/* A run of bytes that goes out in DATA frames, behind what leads it in. */
typedef struct {
    const char *lead; /* what is left of the frames before the payload's */
    Py_ssize_t lead_left;
    const char *from; /* the next byte of the payload */
    Py_ssize_t left;  /* of the payload */
    Py_ssize_t chunk; /* of that, in the DATA frame under way */
    Py_ssize_t head;  /* bytes that are left of that frame's head */
    unsigned short channel;
    char lends, gives_way;
    /* Counted: */
    Py_ssize_t bytes, payload, calls;
    long long lent;
} Run;

/* Begin the next DATA frame, if none is under way. */
static void begin_frame(Run *run, Py_ssize_t size)
{
    if (!run->chunk) {
        run->chunk = run->left < size ? run->left : size;
        run->head = FRAME;
    }
}

static Py_ssize_t take(Py_ssize_t *count, Py_ssize_t *from)
{
    Py_ssize_t taken = *count < *from ? *count : *from;
    *count -= taken, *from -= taken;
    return taken;
}

/* ``count`` bytes went out. */
static void sent(Run *run, Py_ssize_t count, Py_ssize_t size)
{
    run->bytes += count;
    run->lead += take(&count, &run->lead_left);
    while (count) {
        begin_frame(run, size);
        take(&count, &run->head);
        Py_ssize_t of_chunk = take(&count, &run->chunk);
        run->from += of_chunk, run->left -= of_chunk, run->payload += of_chunk;
    }
}

/* One call, of about ``most`` bytes. 1: the kernel took all that it was given; 0: it takes no more;
   -1: error. */
static int send_some(Stream *s, Run *run, Py_ssize_t size, Py_ssize_t most)
{
    char heads[FRAMES][FRAME];
    struct iovec parts[1 + 2 * FRAMES] = {{(char *)run->lead, (size_t)run->lead_left}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 1};
    begin_frame(run, size);
    Run next = *run;
    Py_ssize_t given = run->lead_left;
    for (int k = 0; k < FRAMES && next.left > 0 && (k == 0 || given < most); k++) {
        begin_frame(&next, size);
        uint32_t length = (uint32_t)next.chunk; /* of all of it, as long as any of the head is left */
        memset(heads[k], 0, FRAME);
        memcpy(heads[k], &length, 4);
        heads[k][4] = DATA;
        memcpy(heads[k] + 6, &run->channel, 2);
        parts[message.msg_iovlen++] =
            (struct iovec){heads[k] + FRAME - next.head, (size_t)next.head};
        parts[message.msg_iovlen++] = (struct iovec){(char *)next.from, (size_t)next.chunk};
        given += next.head + next.chunk;
        next.from += next.chunk, next.left -= next.chunk, next.chunk = 0;
    }
    Py_ssize_t count;
    int reason;
    do {
        Py_BEGIN_ALLOW_THREADS;
        count = run->lends ? lending_sendmsg(s, &message, &run->lent)
                           : sendmsg(s->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        reason = errno;
        Py_END_ALLOW_THREADS;
        run->calls++;
        if (PyErr_CheckSignals() < 0)
            return -1; /* the connection is given up */
    } while (count < 0 && reason == EINTR);
    if (count >= 0) {
        sent(run, count, size);
        return count == given;
    }
    if (reason != EAGAIN && reason != EWOULDBLOCK) {
        errno = reason;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    if (run->head == FRAME)
        run->head = run->chunk = 0; /* nothing of it is out: other messages may come first */
    return 0;
}

/* Whether the other end says something, so that this end has to do with it, or takes its time. */
static int gives_way(const Stream *s, const Run *run, long long begin)
{
    struct pollfd there = {.fd = s->fd, .events = POLLIN};
    return poll(&there, 1, 0) > 0 || looking_now() - begin > GRACE_NS + run->bytes;
}

/* Send in frames of ``size`` bytes until ``burst`` bytes are out, or the kernel takes no more, nor
   does so soon: a peer on this machine makes room within microseconds, and to come back takes the
   interpreter tens of them. Whether the kernel may take more; -1: error. */
static int send_run(Stream *s, Run *run, Py_ssize_t size, Py_ssize_t burst)
{
    int more = 1;
    Py_ssize_t before = -1; /* bytes that were out at the latest look */
    const long long begin = run->gives_way ? looking_now() : 0;
    while (run->left > 0 && run->bytes < burst && !s->closed) {
        more = send_some(s, run, size, run->gives_way ? GIVING_WAY : burst - run->bytes);
        if (more < 0)
            return -1;
        if (run->gives_way && run->left > 0 && gives_way(s, run, begin))
            break;
        if (more)
            continue;
        if (!s->same_host || s->gap_looks <= 0 || !looking_due(&s->room) || run->bytes == before)
            break;
        before = run->bytes;
        Py_BEGIN_ALLOW_THREADS;
        more = looking_look(s, POLLOUT, s->gap_looks, &s->closed);
        Py_END_ALLOW_THREADS;
        looking_looked(&s->room, more);
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (!more)
            break;
    }
    if (more)
        looking_looked(&s->room, 1); /* it takes as much as it gets: worth a look again */
    return more;
}

static int is_flat(const Py_buffer *view)
{
    return PyBuffer_IsContiguous(view, 'C');
}

/* _push(view, offset, head, chunk, left, channel, size, burst): send of ``view`` from ``offset`` on
   in DATA frames of ``size`` bytes on ``channel``. Of the frame under way ``head`` bytes of its head
   and ``chunk`` bytes are left, of the payload ``left``. Gives the bytes that went out of the payload
   and in all, the new ``head`` and ``chunk``, the calls, and whether the kernel may take more. */
PyObject *sending_push(PyObject *self, PyObject *args)
{
    PyObject *view;
    Py_ssize_t offset, size, burst;
    Run run = {0};
    if (!PyArg_ParseTuple(args, "O!nnnnHnn", &PyMemoryView_Type, &view, &offset, &run.head,
                          &run.chunk, &run.left, &run.channel, &size, &burst))
        return NULL;
    Py_buffer *from = PyMemoryView_GET_BUFFER(view);
    if (!is_flat(from) || offset < 0 || run.left < 0 || offset + run.left > from->len
        || run.chunk < 0 || run.chunk > run.left || run.head < 0 || run.head > FRAME || size <= 0
        || size > MAX_CHUNK) {
        PyErr_SetString(PyExc_ValueError, "_push: not what its caller promises");
        return NULL;
    }
    run.from = (char *)from->buf + offset;
    int more = send_run((Stream *)self, &run, size, burst);
    if (more < 0)
        return NULL;
    return Py_BuildValue("nnnnnO", run.payload, run.bytes, run.head, run.chunk, run.calls,
                         more ? Py_True : Py_False);
}

Py_ssize_t sending_lead(char *lead, const char *header, Py_ssize_t size, const Py_buffer *from)
{
    uint32_t length = (uint32_t)(LEAD - FRAME + size);
    uint16_t count = 1;
    uint64_t bytes = (uint64_t)from->len;
    memset(lead, 0, FRAME);
    memcpy(lead, &length, 4);
    lead[4] = OPEN;
    memcpy(lead + FRAME, &count, 2);
    memcpy(lead + FRAME + 2, &bytes, 8);
    memcpy(lead + LEAD, header, (size_t)size);
    return LEAD + size;
}

/* _send_payload(header, view, size, burst): send a message with one region, on channel 0 and behind
   nothing else. Gives the bytes that went out in all and of the payload, and the calls. */
PyObject *sending_payload(PyObject *self, PyObject *args)
{
    PyObject *view;
    Py_buffer header;
    Py_ssize_t size, burst;
    if (!PyArg_ParseTuple(args, "y*O!nn", &header, &PyMemoryView_Type, &view, &size, &burst))
        return NULL;
    PyObject *answer = NULL;
    Py_buffer *from = PyMemoryView_GET_BUFFER(view);
    char *lead = PyMem_Malloc((size_t)(LEAD + header.len));
    if (lead == NULL)
        PyErr_NoMemory();
    else if (!is_flat(from) || from->len <= 0 || size <= 0 || size > MAX_CHUNK)
        PyErr_SetString(PyExc_ValueError, "_send_payload: not what its caller promises");
    else {
        Run run = {.lead = lead, .from = from->buf, .left = from->len};
        run.lead_left = sending_lead(lead, header.buf, header.len, from);
        if (send_run((Stream *)self, &run, size, burst) >= 0)
            answer = Py_BuildValue("nnn", run.bytes, run.payload, run.calls);
    }
    PyMem_Free(lead);
    PyBuffer_Release(&header);
    return answer;
}

int sending_run(Stream *s, const char *lead, Py_ssize_t size, const Py_buffer *from, int lends,
                int gives_way, Py_ssize_t *bytes)
{
    Run run = {.lead = lead, .lead_left = size, .from = from->buf, .left = from->len};
    run.lends = (char)lends;
    run.gives_way = (char)gives_way;
    s->tx_busy = 1;
    s->tx_touching = PyThread_get_thread_ident();
    int failed = send_run(s, &run, MAX_CHUNK, PY_SSIZE_T_MAX) < 0 ? -1 : 0;
    if (failed)
        stream_reword((PyObject *)s, name__broken);
    s->tx_touching = 0;
    s->tx_busy = 0;
    s->sends += run.calls;
    s->bytes_sent += run.bytes;
    s->payload_lent += run.lent;
    if (!run.left)
        s->payload_sent += run.payload; /* of what is queued the queue says it */
    *bytes = run.bytes;
    return stream_leave(s) < 0 ? -1 : failed;
}
