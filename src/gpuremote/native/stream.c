/* Stream: sends and receives small messages on a socket. Twin: gpuremote.transport._stream. */

#include "native.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

PyTypeObject *Stream_Type;

static int stream_traverse(PyObject *self, visitproc visit, void *arg)
{
    Stream *s = (Stream *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(s->stats);
    Py_VISIT(s->rx);
    Py_VISIT(s->expected);
    Py_VISIT(s->place);
    Py_VISIT(s->answer);
    Py_VISIT(s->landing.frame);
    Py_VISIT(s->landing.place);
    return 0;
}

static int stream_clear_references(PyObject *self)
{
    Stream *s = (Stream *)self;
    Py_CLEAR(s->stats);
    Py_CLEAR(s->rx);
    Py_CLEAR(s->expected);
    Py_CLEAR(s->place);
    Py_CLEAR(s->answer);
    receiving_forget(s);
    return 0;
}

static void stream_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lending_end((Stream *)self);
    stream_clear_references(self);
    type->tp_free(self);
    Py_DECREF(type);
}

void stream_raise(PyObject *self, PyObject *method)
{
    PyObject *error = PyObject_CallMethodNoArgs(self, method);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
}

void stream_reword(PyObject *self, PyObject *method)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    PyObject *given = PyObject_CallMethodOneArg(self, method, error);
    if (given == error)
        PyErr_Restore(Py_NewRef(type), Py_NewRef(error), Py_XNewRef(traceback));
    else if (given != NULL)
        PyErr_SetObject((PyObject *)Py_TYPE(given), given);
    Py_XDECREF(given);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
}

int stream_leave(Stream *s)
{
    if (!s->closed)
        return 0;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    int failed = tell((PyObject *)s, name__release, NULL);
    if (type != NULL) {
        if (failed)
            PyErr_Clear();
        PyErr_Restore(type, error, traceback);
    }
    return failed;
}

/* The rest of a message of ``total`` bytes, of which ``count`` are here, if it is there. What is
   missing then, an end or an error too, the next receive sees. -1: a signal's exception is set. */
static int take_rest(Stream *s, char *into, Py_ssize_t *count, Py_ssize_t total)
{
    while (*count < total) {
        Py_ssize_t more = recv(s->fd, into + *count, (size_t)(total - *count), MSG_DONTWAIT);
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (more <= 0)
            break;
        s->receives++;
        s->bytes_received += more;
        *count += more;
    }
    return 0;
}

int stream_look(Stream *s, long looks)
{
    if (s->closed || !s->plain)
        return 1;
    int ready;
    s->rx_busy = 1;
    Py_BEGIN_ALLOW_THREADS;
    ready = looking_look(s, POLLIN, looks, &s->closed);
    Py_END_ALLOW_THREADS;
    s->rx_busy = 0;
    if (stream_leave(s) < 0 || PyErr_CheckSignals() < 0)
        return -1;
    return ready || s->closed;
}

/* Whether a message of ``size`` bytes, frame and all, is one of those that are numbered. */
static int is_numbered(const char *message, Py_ssize_t size)
{
    uint64_t seq = 1;
    if (size >= FRAME + HEADER)
        memcpy(&seq, message + FRAME + 8, 8);
    return seq != 0;
}

/* Whether what came with the message before is the head of the payload that is expected: it is at the
   beginning of the buffer then, as if it had come by itself. */
static int bring_ahead(Stream *s, PyObject *expected)
{
    Py_ssize_t at = s->ahead;
    s->ahead = 0;
    if (!at || s->start != at || s->end != at + UPLOAD_HEAD || expected == NULL
        || PyBytes_GET_SIZE(expected) + FRAME != UPLOAD_HEAD)
        return 0;
    char *rx = PyMemoryView_GET_BUFFER(s->rx)->buf;
    memmove(rx, rx + at, UPLOAD_HEAD);
    s->start = 0;
    s->end = UPLOAD_HEAD;
    if (!receiving_is_expected(s))
        return 0; /* the twin takes it from there */
    s->end = 0;
    return 1;
}

enum taken stream_take(Stream *s, double wait, Py_ssize_t *size, PyObject **other)
{
    PyObject *self = (PyObject *)s, *expected = Py_XNewRef(s->expected);
    enum taken found = FAILED;
    s->rx_busy = 1;
    if (s->closed) {
        stream_raise(self, name__gone);
        goto over;
    }
    if (bring_ahead(s, expected)) {
        found = receiving_land(s, wait) < 0 ? FAILED : LANDED;
        goto over;
    }
    if (!s->plain || (wait > 0 && (wait < 0.5 || !s->blocking))) {
        PyObject *seconds = PyFloat_FromDouble(wait);
        *other = seconds == NULL ? NULL : PyObject_CallMethodOneArg(self, name__receive, seconds);
        Py_XDECREF(seconds);
        found = *other == NULL ? FAILED : OTHER;
        if (found == OTHER && *other != Py_None)
            receiving_expect_none(s); /* it was behind what said where it goes */
        goto over;
    }
    if (s->rx == NULL || !PyMemoryView_Check(s->rx)) {
        PyErr_SetString(PyExc_TypeError, "there is no receive buffer");
        goto over;
    }
    Py_buffer *buffer = PyMemoryView_GET_BUFFER(s->rx);
    Py_ssize_t room = s->idle < buffer->len ? s->idle : buffer->len;
    /* Up to the payload that is expected: what came along of that would have to be copied. */
    Py_ssize_t first = expected == NULL ? 0 : PyBytes_GET_SIZE(expected) + FRAME;
    Py_ssize_t most = first ? first : s->most ? s->most + UPLOAD_HEAD : 0;
    if (most && most < room)
        room = most;
    Py_ssize_t count;
    int reason;
    do {
        if (wait > 0) {
            Py_BEGIN_ALLOW_THREADS;
            count = recv(s->fd, buffer->buf, (size_t)room, 0);
            reason = errno;
            Py_END_ALLOW_THREADS;
        }
        else {
            count = recv(s->fd, buffer->buf, (size_t)room, MSG_DONTWAIT);
            reason = errno;
        }
        if (count == 0 && s->peeked)
            count = -1, reason = s->peeked;
        if (PyErr_CheckSignals() < 0) {
            /* Before nothing comes, the connection is as good as it was, whatever the signal
               raised. What has come must not be lost: it comes again over the next connection. */
            if (count < 0)
                goto unchanged;
            goto over;
        }
    } while (count < 0 && reason == EINTR);
    if (count < 0) {
        if (reason == EAGAIN || reason == EWOULDBLOCK) {
            found = NOTHING;
            goto unchanged;
        }
        errno = reason;
        PyErr_SetFromErrno(PyExc_OSError);
        goto over;
    }
    s->receives++;
    s->bytes_received += count;
    uint64_t frame = 0;
    if (count > FRAME)
        memcpy(&frame, buffer->buf, FRAME);
    if (frame - PLAIN > (uint64_t)(count - FRAME) && frame - PLAIN <= (uint64_t)(buffer->len - FRAME)
        && take_rest(s, buffer->buf, &count, FRAME + (Py_ssize_t)(frame - PLAIN)) < 0)
        goto over;
    const int ahead = !first && s->most && count > s->most
                      && frame == PLAIN + (uint64_t)(s->most - FRAME);
    if (ahead || frame == PLAIN + (uint64_t)(count - FRAME)) {
        s->messages_received++;
        *size = ahead ? s->most : count;
        found = MESSAGE;
        if (ahead) { /* the head of what it announces, and nothing of that */
            s->start = s->ahead = s->most;
            s->end = count;
            s->plain = 0;
        }
        if (expected != NULL && is_numbered(buffer->buf, count))
            receiving_expect_none(s); /* which would have been the next one */
    }
    else if (count == 0)
        stream_raise(self, name__ended);
    else if (count == first && s->expected == expected && receiving_is_expected(s))
        found = receiving_land(s, wait) < 0 ? FAILED : LANDED;
    else {
        receiving_expect_none(s);
        s->end = count;
        s->plain = 0;
        *other = PyObject_CallMethodNoArgs(self, name__take_in);
        found = *other == NULL ? FAILED : OTHER;
    }
over:
    if (found == FAILED)
        stream_reword(self, name__failed);
unchanged:
    Py_XDECREF(expected);
    s->rx_busy = 0;
    if (stream_leave(s) < 0 && found != FAILED) {
        if (found == OTHER)
            Py_CLEAR(*other);
        found = FAILED;
    }
    return found;
}

void stream_undo(PyObject *connection)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (tell(connection, name_abort, NULL) < 0)
        PyErr_Clear();
    PyErr_Restore(type, error, traceback);
}

PyObject *stream_whole(Stream *s, Py_ssize_t size)
{
    PyObject *end = PyLong_FromSsize_t(size);
    PyObject *message =
        end == NULL ? NULL : PyObject_CallMethodOneArg((PyObject *)s, name__whole, end);
    Py_XDECREF(end);
    if (message == NULL)
        stream_undo((PyObject *)s);
    return message;
}

int stream_put(Stream *s, char *data, Py_ssize_t size, const char *body, Py_ssize_t rest)
{
    Py_ssize_t total = size + rest, sent;
    uint64_t frame = PLAIN + (uint64_t)(total - FRAME);
    memcpy(data, &frame, FRAME);
    if (rest) {
        struct iovec parts[2] = {{data, (size_t)size}, {(char *)body, (size_t)rest}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        sent = sendmsg(s->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    else
        sent = send(s->fd, data, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            PyErr_SetFromErrno(PyExc_OSError);
            stream_reword((PyObject *)s, name__broken);
            return -1;
        }
        sent = 0;
    }
    s->sends++;
    s->messages_sent++;
    s->bytes_sent += sent;
    if (sent == total)
        return 0;
    PyObject *header = PyBytes_FromStringAndSize(NULL, total - FRAME);
    if (header != NULL) {
        memcpy(PyBytes_AS_STRING(header), data + FRAME, (size_t)(size - FRAME));
        if (rest)
            memcpy(PyBytes_AS_STRING(header) + size - FRAME, body, (size_t)rest);
    }
    PyObject *count = PyLong_FromSsize_t(sent);
    int failed = -1;
    if (header != NULL && count != NULL)
        failed = tell((PyObject *)s, name__left, header, count, NULL);
    Py_XDECREF(header);
    Py_XDECREF(count);
    if (failed) /* half a frame is out */
        stream_reword((PyObject *)s, name__broken);
    return failed;
}

/* send(header, regions=(), done=None) */
static PyObject *stream_send(PyObject *self, PyObject *const *args, Py_ssize_t count,
                             PyObject *names)
{
    Stream *s = (Stream *)self;
    if (count == 1 && names == NULL && PyBytes_CheckExact(args[0])
        && PyBytes_GET_SIZE(args[0]) <= SMALL - FRAME && stream_clear(s)) {
        char data[SMALL];
        Py_ssize_t size = PyBytes_GET_SIZE(args[0]);
        memcpy(data + FRAME, PyBytes_AS_STRING(args[0]), (size_t)size);
        if (stream_put(s, data, size + FRAME, NULL, 0) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    PyObject *method = PyObject_GetAttr(self, name__send);
    if (method == NULL)
        return NULL;
    PyObject *answer = PyObject_Vectorcall(method, args, (size_t)count, names);
    Py_DECREF(method);
    return answer;
}

/* receive(wait=0.0) */
static PyObject *stream_receive(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"wait", NULL};
    double wait = 0.0;
    Py_ssize_t size = 0;
    PyObject *other = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|d", names, &wait))
        return NULL;
    switch (stream_take((Stream *)self, wait, &size, &other)) {
    case FAILED:
        return NULL;
    case NOTHING:
        Py_RETURN_NONE;
    case MESSAGE:
        return stream_whole((Stream *)self, size);
    case LANDED:
        return receiving_landed((Stream *)self);
    default:
        return other;
    }
}

static int add_to(PyObject *stats, const char *name, long long *count)
{
    if (!*count)
        return 0;
    PyObject *before = PyObject_GetAttrString(stats, name);
    PyObject *more = before == NULL ? NULL : PyLong_FromLongLong(*count);
    PyObject *sum = more == NULL ? NULL : PyNumber_Add(before, more);
    int failed = sum == NULL ? -1 : PyObject_SetAttrString(stats, name, sum);
    Py_XDECREF(before);
    Py_XDECREF(more);
    Py_XDECREF(sum);
    if (!failed)
        *count = 0;
    return failed;
}

static PyObject *stream_get_stats(PyObject *self, void *unused)
{
    Stream *s = (Stream *)self;
    if (s->stats == NULL) {
        PyErr_SetString(PyExc_AttributeError, "stats");
        return NULL;
    }
    if (add_to(s->stats, "sends", &s->sends) || add_to(s->stats, "receives", &s->receives)
        || add_to(s->stats, "messages_sent", &s->messages_sent)
        || add_to(s->stats, "messages_received", &s->messages_received)
        || add_to(s->stats, "bytes_sent", &s->bytes_sent)
        || add_to(s->stats, "bytes_received", &s->bytes_received)
        || add_to(s->stats, "payload_sent", &s->payload_sent)
        || add_to(s->stats, "payload_received", &s->payload_received)
        || add_to(s->stats, "payload_lent", &s->payload_lent))
        return NULL;
    return Py_NewRef(s->stats);
}

static int stream_set_stats(PyObject *self, PyObject *value, void *unused)
{
    Py_XSETREF(((Stream *)self)->stats, Py_XNewRef(value));
    return 0;
}

static PyObject *stream_buffered(PyObject *self, void *unused)
{
    return PyBool_FromLong(((Stream *)self)->start != ((Stream *)self)->end);
}

static PyObject *stream_restless(PyObject *self, void *unused)
{
    Stream *s = (Stream *)self;
    return PyBool_FromLong(s->pending || s->start != s->end);
}

static PyMemberDef stream_members[] = {
    {"_rx", T_OBJECT_EX, offsetof(Stream, rx), 0, NULL},
    {"_idle", T_PYSSIZET, offsetof(Stream, idle), 0, NULL},
    {"_start", T_PYSSIZET, offsetof(Stream, start), 0, NULL},
    {"_end", T_PYSSIZET, offsetof(Stream, end), 0, NULL},
    {"_fd", T_INT, offsetof(Stream, fd), 0, NULL},
    {"_blocking", T_BOOL, offsetof(Stream, blocking), 0, NULL},
    {"_closed", T_BOOL, offsetof(Stream, closed), 0, NULL},
    {"closed", T_BOOL, offsetof(Stream, closed), READONLY, NULL},
    {"_plain", T_BOOL, offsetof(Stream, plain), 0, NULL},
    {"pending_output", T_BOOL, offsetof(Stream, pending), READONLY, NULL},
    {"roams", T_BOOL, offsetof(Stream, roams), 0, NULL},
    {"_taken", T_LONGLONG, offsetof(Stream, taken), 0, NULL},
    {"_same_host", T_BOOL, offsetof(Stream, same_host), 0, NULL},
    {"_shares", T_BOOL, offsetof(Stream, shares), 0, NULL},
    {"_gap_looks", T_LONG, offsetof(Stream, gap_looks), 0, NULL},
    {"_pending", T_BOOL, offsetof(Stream, pending), 0, NULL},
    {"_calling", T_BOOL, offsetof(Stream, calling), 0, NULL},
    {"_rx_touching", T_ULONG, offsetof(Stream, rx_touching), 0, NULL},
    {"_hands_off", T_BOOL, offsetof(Stream, hands_off), 0, NULL},
    {"_tx_touching", T_ULONG, offsetof(Stream, tx_touching), 0, NULL},
    {"_rx_busy", T_BOOL, offsetof(Stream, rx_busy), 0, NULL},
    {"_tx_busy", T_BOOL, offsetof(Stream, tx_busy), 0, NULL},
    {NULL},
};

static PyGetSetDef stream_getset[] = {
    {"stats", stream_get_stats, stream_set_stats, NULL, NULL},
    {"buffered", stream_buffered, NULL, NULL, NULL},
    {"restless", stream_restless, NULL, NULL, NULL},
    {NULL},
};

static PyMethodDef stream_methods[] = {
    {"send", (PyCFunction)(void (*)(void))stream_send, METH_FASTCALL | METH_KEYWORDS, NULL},
    {"_push", sending_push, METH_VARARGS, NULL},
    {"_send_payload", sending_payload, METH_VARARGS, NULL},
    {"_pull", receiving_pull, METH_VARARGS, NULL},
    {"expect", (PyCFunction)(void (*)(void))receiving_expect, METH_FASTCALL, NULL},
    {"_end_lending", lending_end_lending, METH_NOARGS, NULL},
    {"_more_soon", looking_more_soon, METH_NOARGS, NULL},
    {"receive", (PyCFunction)(void (*)(void))stream_receive, METH_VARARGS | METH_KEYWORDS, NULL},
    {NULL},
};

static PyType_Slot stream_slots[] = {
    {Py_tp_doc, "Sends and receives small messages on a socket."},
    {Py_tp_dealloc, stream_dealloc},
    {Py_tp_traverse, stream_traverse},
    {Py_tp_clear, stream_clear_references},
    {Py_tp_members, stream_members},
    {Py_tp_getset, stream_getset},
    {Py_tp_methods, stream_methods},
    {0, NULL},
};

PyType_Spec stream_spec = {
    "gpuremote._native.Stream",
    sizeof(Stream),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    stream_slots,
};
