/* Receiving: payload of a Stream, right to where it goes. Twin: transport.tcp._read_payload. */

#include "native.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Payload that is being received. */
typedef struct {
    char *to;          /* where its next byte goes */
    Py_ssize_t room;   /* bytes that go there */
    Py_ssize_t chunk;  /* bytes that are missing of the DATA frame under way */
    Py_ssize_t left;   /* and of the payload */
    int channel;       /* on which more frames of it may follow; -1: not here */
    /* Counted: */
    Py_ssize_t placed, bytes, calls;
} Run;

/* Wait, without the lent memory, for more of a payload: 1 if it is there; -1: error. */
static int wait_for_more(Stream *s, double wait)
{
    unsigned long me = s->rx_touching;
    struct pollfd watched = {.fd = s->fd, .events = POLLIN};
    /* Not while it sleeps: a thread that discards or aborts waits for this one. */
    s->rx_touching = 0;
    int ready = stream_more_soon(s);
    if (ready == 0 && !s->hands_off) {
        long long begin = looking_now();
        Py_BEGIN_ALLOW_THREADS;
        ready = poll(&watched, 1, (int)(wait * 1000));
        Py_END_ALLOW_THREADS;
        looking_waited(&s->gaps, looking_now() - begin, ready > 0);
    }
    s->rx_touching = me;
    if (PyErr_CheckSignals() < 0 || PyErr_Occurred())
        return -1;
    return ready > 0;
}

/* Whether what is in the buffer is the head of the run's next frame, and nothing else. */
static int goes_on(const char *head, Run *run)
{
    uint32_t length;
    uint16_t channel;
    memcpy(&length, head, 4);
    memcpy(&channel, head + 6, 2);
    if (head[4] != DATA || head[5] || channel != run->channel || length == 0
        || length > run->left || length > MAX_CHUNK)
        return 0; /* another frame, or none that any sender makes: _parse says which */
    run->chunk = length;
    return 1;
}

/* Receive as long as more is there or comes within ``wait`` seconds, up to ``burst`` bytes. What
   came behind the payload is in the buffer then. -1: error. */
static int receive_run(Stream *s, Run *run, Py_ssize_t burst, double wait)
{
    Py_buffer *rx = PyMemoryView_GET_BUFFER(s->rx);
    s->start = s->end = 0;
    s->hands_off = 0;
    while (run->placed < burst && run->room > 0 && !s->closed && !s->hands_off) {
        struct iovec parts[2] = {{run->to, (size_t)run->room}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 1};
        if (run->room >= run->chunk) {
            /* Behind the chunk comes a frame. What else comes with it would have to be copied. */
            parts[0].iov_len = (size_t)run->chunk;
            parts[1].iov_base = rx->buf;
            parts[1].iov_len =
                (size_t)(run->left > run->chunk || run->channel < 0 ? FRAME : s->idle);
            message.msg_iovlen = 2;
        }
        Py_ssize_t count;
        int reason;
        Py_BEGIN_ALLOW_THREADS;
        count = recvmsg(s->fd, &message, MSG_DONTWAIT);
        reason = errno;
        Py_END_ALLOW_THREADS;
        run->calls++;
        if (count == 0 && s->peeked)
            count = -1, reason = s->peeked;
        if (PyErr_CheckSignals() < 0)
            return -1; /* the connection is given up: what came comes again */
        if (count < 0) {
            if (reason == EINTR)
                continue;
            int nothing = reason == EAGAIN || reason == EWOULDBLOCK;
            if (nothing && wait > 0) {
                int ready = wait_for_more(s, wait);
                if (ready < 0)
                    return -1;
                if (ready)
                    continue;
            }
            if (run->placed || nothing)
                break; /* if it is broken, the next call says so */
            errno = reason;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (count == 0) {
            if (run->placed)
                break;
            stream_raise((PyObject *)s, name__ended);
            return -1;
        }
        Py_ssize_t most = (Py_ssize_t)parts[0].iov_len, got = count < most ? count : most;
        run->bytes += count;
        s->end = count - got;
        run->placed += got, run->to += got, run->room -= got;
        run->chunk -= got, run->left -= got;
        if (run->chunk)
            continue;
        if (s->end != FRAME || !run->left || !goes_on(rx->buf, run))
            break;
        s->end = 0;
    }
    return 0;
}

static int is_place(const Py_buffer *view)
{
    return !view->readonly && PyBuffer_IsContiguous(view, 'C');
}

/* _pull(view, offset, chunk, left, channel, burst, wait): receive into ``view`` from ``offset`` on.
   ``chunk`` bytes are missing of the DATA frame under way and ``left`` of the payload; the frames
   that follow on ``channel`` are taken as well (-1: none, as other payload may come in between).
   Gives the bytes that are in place, the new ``chunk``, the calls, and the bytes that came in all. */
PyObject *receiving_pull(PyObject *self, PyObject *args)
{
    Stream *s = (Stream *)self;
    PyObject *view;
    Run run = {0};
    Py_ssize_t offset, burst;
    double wait;
    if (!PyArg_ParseTuple(args, "O!nnnind", &PyMemoryView_Type, &view, &offset, &run.chunk,
                          &run.left, &run.channel, &burst, &wait))
        return NULL;
    Py_buffer *into = PyMemoryView_GET_BUFFER(view), *rx = PyMemoryView_GET_BUFFER(s->rx);
    if (!is_place(into) || offset < 0 || run.chunk <= 0 || run.chunk > run.left
        || rx->len < s->idle || s->idle < FRAME) {
        PyErr_SetString(PyExc_ValueError, "_pull: not what its caller promises");
        return NULL;
    }
    run.to = (char *)into->buf + offset;
    run.room = into->len - offset;
    if (receive_run(s, &run, burst, wait) < 0)
        return NULL;
    return Py_BuildValue("nnnn", run.placed, run.chunk, run.calls, run.bytes);
}

/* Where the header of a message with one region begins in its OPEN frame, and what its receiver
   can't know of that: the ack. */
#define OPEN_HEADER (FRAME + 2 + 8)
#define OPEN_ACK (OPEN_HEADER + HEADER - 8)

void receiving_expect_none(Stream *s)
{
    Py_CLEAR(s->expected);
    Py_CLEAR(s->place);
    Py_CLEAR(s->answer);
}

int receiving_hint(Stream *s, const char *header, Py_ssize_t size, PyObject *place,
                   const char *answer, Py_ssize_t answer_size)
{
    const Py_buffer *view = PyMemoryView_GET_BUFFER(place);
    receiving_expect_none(s);
    if (!is_place(view) || view->len <= 0)
        return 0;
    PyObject *frame = PyBytes_FromStringAndSize(NULL, OPEN_HEADER + size);
    PyObject *text = PyBytes_FromStringAndSize(answer, answer_size);
    if (frame == NULL || text == NULL) {
        Py_XDECREF(frame);
        Py_XDECREF(text);
        return -1;
    }
    char *at = PyBytes_AS_STRING(frame);
    uint32_t length = (uint32_t)(OPEN_HEADER - FRAME + size);
    uint16_t regions = 1;
    uint64_t nbytes = (uint64_t)view->len;
    memset(at, 0, FRAME);
    memcpy(at, &length, 4);
    at[4] = OPEN;
    memcpy(at + FRAME, &regions, 2);
    memcpy(at + FRAME + 2, &nbytes, 8);
    memcpy(at + OPEN_HEADER, header, (size_t)size);
    s->expected = frame;
    s->place = Py_NewRef(place);
    s->answer = text;
    return 1;
}

/* expect(header, view, answer): see transport.base.Connection. */
PyObject *receiving_expect(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Stream *s = (Stream *)self;
    if (count != 3 || !PyBytes_CheckExact(args[0]) || !PyBytes_CheckExact(args[2])
        || !(args[1] == Py_None || PyMemoryView_Check(args[1]))) {
        PyErr_SetString(PyExc_TypeError, "expect() takes header, view and answer");
        return NULL;
    }
    if (args[1] == Py_None) {
        receiving_expect_none(s);
        Py_RETURN_TRUE;
    }
    Py_ssize_t size = PyBytes_GET_SIZE(args[0]), answer = PyBytes_GET_SIZE(args[2]);
    if (size < HEADER || size > SMALL || answer > SMALL - FRAME) {
        receiving_expect_none(s);
        PyErr_SetString(PyExc_ValueError, "expect() takes a whole header, and a short answer");
        return NULL;
    }
    int taken = receiving_hint(s, PyBytes_AS_STRING(args[0]), size, args[1],
                               PyBytes_AS_STRING(args[2]), answer);
    return taken < 0 ? NULL : PyBool_FromLong(taken);
}

/* The run of the payload whose beginning is in the buffer, if it is the one that is expected. */
static int expected_run(Stream *s, Run *run)
{
    const char *frame = PyBytes_AS_STRING(s->expected);
    const char *rx = PyMemoryView_GET_BUFFER(s->rx)->buf;
    size_t size = (size_t)PyBytes_GET_SIZE(s->expected);
    const Py_buffer *view = PyMemoryView_GET_BUFFER(s->place);
    uint16_t channel;
    memcpy(&channel, rx + 6, 2);
    *run = (Run){.to = view->buf, .room = view->len, .left = view->len, .channel = channel};
    return !memcmp(rx, frame, 6) && !memcmp(rx + FRAME, frame + FRAME, OPEN_ACK - FRAME)
           && !memcmp(rx + OPEN_ACK + 8, frame + OPEN_ACK + 8, size - OPEN_ACK - 8)
           && goes_on(rx + size, run);
}

int receiving_is_expected(Stream *s)
{
    Run run;
    return expected_run(s, &run);
}

int receiving_land(Stream *s, double wait)
{
    Run run;
    if (!expected_run(s, &run))
        Py_UNREACHABLE();
    const char *rx = PyMemoryView_GET_BUFFER(s->rx)->buf;
    PyObject *frame = s->expected;
    Py_XSETREF(s->landing.place, s->place);
    s->place = NULL;
    memcpy(PyBytes_AS_STRING(frame) + OPEN_ACK, rx + OPEN_ACK, 8);
    s->expected = NULL;
    s->rx_touching = PyThread_get_thread_ident();
    int failed = receive_run(s, &run, wait > 0 ? LONGEST : BURST, wait);
    s->rx_touching = 0;
    s->receives += run.calls;
    s->bytes_received += run.bytes;
    s->messages_received++;
    s->plain = 0; /* until _landed has looked */
    Py_XSETREF(s->landing.frame, frame);
    s->landing.channel = run.channel;
    s->landing.placed = run.placed, s->landing.left = run.left, s->landing.chunk = run.chunk;
    return failed;
}

PyObject *receiving_landed(Stream *s)
{
    Landing *landing = &s->landing;
    PyObject *place = landing->place, *frame = landing->frame;
    landing->place = landing->frame = NULL;
    PyObject *whole = PyMemoryView_FromObject(frame);
    PyObject *header = whole == NULL ? NULL : PySequence_GetSlice(whole, OPEN_HEADER, PY_SSIZE_T_MAX);
    PyObject *numbers[3] = {PyLong_FromLong(landing->channel), PyLong_FromSsize_t(landing->placed),
                            PyLong_FromSsize_t(landing->chunk)};
    PyObject *incoming = NULL;
    if (header != NULL && numbers[0] != NULL && numbers[1] != NULL && numbers[2] != NULL) {
        PyObject *given[] = {(PyObject *)s, header, place, numbers[0], numbers[1], numbers[2]};
        incoming = PyObject_VectorcallMethod(name__landed, given, 6, NULL);
    }
    for (int k = 0; k < 3; k++)
        Py_XDECREF(numbers[k]);
    Py_XDECREF(header);
    Py_XDECREF(whole);
    Py_DECREF(frame);
    Py_DECREF(place);
    return incoming;
}

const char *receiving_header(Stream *s)
{
    return PyBytes_AS_STRING(s->landing.frame) + OPEN_HEADER;
}

Py_ssize_t receiving_header_size(Stream *s)
{
    return PyBytes_GET_SIZE(s->landing.frame) - OPEN_HEADER;
}

void receiving_taken(Stream *s)
{
    s->payload_received += s->landing.placed;
    s->plain = 1; /* nothing is under way: the buffer is empty */
    receiving_forget(s);
}

void receiving_forget(Stream *s)
{
    Py_CLEAR(s->landing.frame);
    Py_CLEAR(s->landing.place);
}
