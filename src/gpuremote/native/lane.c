/* Lane: numbers, sends and takes in reliable messages. Twin: gpuremote.rpc.lane. */

#include "native.h"

#define RESULT 3 /* wire.frames.Kind */
#define BYTES 0  /* wire.frames.ResultForm */
#define KINDS 9

typedef struct {
    PyObject_HEAD
    PyObject *connection, *lock, *sink, *waits;
    PyObject *plain; /* deque of (seq, kind, flags, arg, body) */
    PyObject *bulk, *arriving;
    unsigned long long sent, seen, complete;
    long long credit, got, granted, unreported, ack_after, low_credit;
    long long messages_sent, messages_received, copied;
} Lane;

PyTypeObject *Lane_Type;

static int lane_traverse(PyObject *self, visitproc visit, void *arg)
{
    Lane *l = (Lane *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(l->connection);
    Py_VISIT(l->lock);
    Py_VISIT(l->sink);
    Py_VISIT(l->waits);
    Py_VISIT(l->plain);
    Py_VISIT(l->bulk);
    Py_VISIT(l->arriving);
    return 0;
}

static int lane_clear(PyObject *self)
{
    Lane *l = (Lane *)self;
    Py_CLEAR(l->connection);
    Py_CLEAR(l->lock);
    Py_CLEAR(l->sink);
    Py_CLEAR(l->waits);
    Py_CLEAR(l->plain);
    Py_CLEAR(l->bulk);
    Py_CLEAR(l->arriving);
    return 0;
}

static void lane_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lane_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static void put_header(char *at, unsigned kind, unsigned flags, uint32_t arg, uint64_t seq,
                       uint64_t ack)
{
    memset(at, 0, HEADER);
    at[0] = (char)kind;
    at[1] = (char)flags;
    memcpy(at + 4, &arg, 4);
    memcpy(at + 8, &seq, 8);
    memcpy(at + 16, &ack, 8);
}

/* An exception of a send is set: if the connection broke, the message is kept for the next. */
static int survive(PyObject *self)
{
    static PyObject *lost;
    if (lost == NULL) {
        PyObject *type, *error, *traceback;
        PyErr_Fetch(&type, &error, &traceback);
        PyObject *module = PyImport_ImportModule("gpuremote.errors");
        lost = module == NULL ? NULL : PyObject_GetAttrString(module, "ConnectionLost");
        Py_XDECREF(module);
        if (lost == NULL)
            PyErr_Clear();
        PyErr_Restore(type, error, traceback);
    }
    if (lost == NULL || !PyErr_ExceptionMatches(lost))
        return -1;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    int failed = tell(self, name_lost, error, NULL);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return failed;
}

/* post(kind, body, arg=0, flags=0, /) */
static PyObject *lane_post(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Lane *l = (Lane *)self;
    Py_buffer bytes;
    if (count < 2 || count > 4) {
        PyErr_SetString(PyExc_TypeError, "post() takes kind, body, arg and flags");
        return NULL;
    }
    PyObject *body = args[1];
    unsigned kind = (unsigned)PyLong_AsUnsignedLong(args[0]);
    unsigned arg = count > 2 ? (unsigned)PyLong_AsUnsignedLong(args[2]) : 0;
    unsigned flags = count > 3 ? (unsigned)PyLong_AsUnsignedLong(args[3]) : 0;
    if (PyErr_Occurred() || PyObject_GetBuffer(body, &bytes, PyBUF_SIMPLE) < 0)
        return NULL;
    int failed = -1;
    char data[SMALL];
    Py_ssize_t size = HEADER + bytes.len;
    PyObject *connection = Py_XNewRef(l->connection);
    PyObject *kept = Py_BuildValue("(KIIIO)", l->sent + 1, kind, flags, arg, body);
    if (kept != NULL)
        failed = tell(l->plain, name_append, kept, NULL);
    Py_XDECREF(kept);
    if (failed)
        goto over;
    l->sent++;
    l->credit -= size;
    if (connection == NULL || connection == Py_None)
        goto over;
    l->messages_sent++;
    if (PyObject_TypeCheck(connection, Stream_Type) && size <= SMALL - FRAME) {
        int clear = stream_clear((Stream *)connection);
        if (clear > 0) {
            put_header(data + FRAME, kind, flags, arg, l->sent, l->complete);
            memcpy(data + FRAME + HEADER, bytes.buf, (size_t)bytes.len);
            failed = stream_put((Stream *)connection, data, FRAME + size);
            goto sent;
        }
        if (clear < 0) {
            failed = -1;
            goto over;
        }
    }
    PyObject *message = PyBytes_FromStringAndSize(NULL, size);
    failed = -1;
    if (message != NULL) {
        put_header(PyBytes_AS_STRING(message), kind, flags, arg, l->sent, l->complete);
        memcpy(PyBytes_AS_STRING(message) + HEADER, bytes.buf, (size_t)bytes.len);
        failed = tell(connection, name_send, message, NULL);
        Py_DECREF(message);
    }
sent:
    if (failed)
        failed = survive(self);
over:
    PyBuffer_Release(&bytes);
    Py_XDECREF(connection);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

static int tell_number(PyObject *self, PyObject *method, uint64_t number)
{
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int failed = value == NULL ? -1 : tell(self, method, value, NULL);
    Py_XDECREF(value);
    return failed;
}

/* Forget the messages without payload that the other end has. */
static int settle(PyObject *self, uint64_t ack)
{
    Lane *l = (Lane *)self;
    while (PyObject_Length(l->plain) > 0) {
        PyObject *first = PySequence_GetItem(l->plain, 0);
        if (first == NULL)
            return -1;
        uint64_t seq = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(first, 0));
        Py_DECREF(first);
        if (PyErr_Occurred())
            return -1;
        if (seq > ack)
            break;
        if (tell(l->plain, name_popleft, NULL) < 0)
            return -1;
    }
    if (l->bulk != NULL && PyDict_GET_SIZE(l->bulk) > 0)
        return tell_number(self, name__settle_up_to, ack);
    return 0;
}

/* The bytes of a small array, for a program that waits for them: 1 if this was it. */
static int deliver(Lane *l, const char *body, Py_ssize_t size)
{
    if (l->waits == NULL || !PyDict_CheckExact(l->waits) || size < 8)
        return 0;
    uint64_t number;
    memcpy(&number, body, 8);
    PyObject *key = PyLong_FromUnsignedLongLong(number);
    if (key == NULL)
        return -1;
    int taken = 0;
    PyObject *wait = Py_XNewRef(PyDict_GetItemWithError(l->waits, key));
    if (wait == NULL)
        taken = PyErr_Occurred() ? -1 : 0;
    else if (wait_takes(wait, body + 8, size - 8)) {
        l->copied += size - 8;
        taken = PyDict_DelItem(l->waits, key) < 0 || wait_finish(wait) < 0 ? -1 : 1;
    }
    Py_XDECREF(wait);
    Py_DECREF(key);
    return taken;
}

static int take_in(PyObject *self, PyObject *connection, Py_ssize_t total)
{
    Lane *l = (Lane *)self;
    if (l->connection != connection)
        return 0; /* given up meanwhile: the message comes again over the next one */
    const char *message = (const char *)PyMemoryView_GET_BUFFER(((Stream *)connection)->rx)->buf;
    message += FRAME;
    Py_ssize_t size = total - FRAME;
    unsigned kind = size < HEADER ? 0 : (unsigned char)message[0];
    uint32_t arg = 0;
    uint64_t seq = 0, ack = 0;
    if (kind) {
        memcpy(&arg, message + 4, 4);
        memcpy(&seq, message + 8, 8);
        memcpy(&ack, message + 16, 8);
    }
    if (kind == 0 || kind > KINDS || message[1] || seq != l->seen + 1 || ack > l->sent) {
        /* Peer.dispatch knows every kind. */
        PyObject *incoming = stream_whole((Stream *)connection, total);
        int failed =
            incoming == NULL ? -1 : tell(self, name_dispatch, incoming, connection, NULL);
        Py_XDECREF(incoming);
        return failed;
    }
    l->messages_received++;
    if (settle(self, ack) < 0)
        return -1;
    /* Counted as here first, so that an answer carries the acknowledgement. */
    l->seen = seq;
    l->got += size;
    l->unreported++;
    if (PyDict_GET_SIZE(l->arriving) == 0)
        l->complete = seq;
    else if (tell_number(self, name__finish, seq) < 0)
        return -1;
    int delivered = 0;
    if (kind == RESULT && arg == BYTES)
        delivered = deliver(l, message + HEADER, size - HEADER);
    if (delivered < 0)
        return -1;
    if (!delivered) {
        PyObject *body = PySequence_GetSlice(((Stream *)connection)->rx, FRAME + HEADER, total);
        PyObject *what = PyLong_FromUnsignedLong(kind), *detail = PyLong_FromUnsignedLong(arg);
        int failed = -1;
        if (body != NULL && what != NULL && detail != NULL)
            failed = tell(l->sink, name_on_message, what, detail, body, NULL);
        Py_XDECREF(body);
        Py_XDECREF(what);
        Py_XDECREF(detail);
        if (failed)
            return -1;
    }
    if (l->unreported >= l->ack_after || l->granted - l->got < l->low_credit)
        return tell(self, name__report_if_due, NULL);
    return 0;
}

/* take(connection, wait=0.0, looks=1, /) */
static PyObject *lane_take(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Lane *l = (Lane *)self;
    if (count < 1 || count > 3) {
        PyErr_SetString(PyExc_TypeError, "take() takes a connection, wait and looks");
        return NULL;
    }
    PyObject *connection = args[0];
    double wait = count > 1 ? PyFloat_AsDouble(args[1]) : 0.0;
    long looks = count > 2 ? PyLong_AsLong(args[2]) : 1;
    if (PyErr_Occurred())
        return NULL;
    PyObject *incoming = NULL;
    Py_ssize_t total = 0;
    enum taken found;
    int native = PyObject_TypeCheck(connection, Stream_Type);
    do {
        Py_CLEAR(incoming);
        if (native)
            found = stream_take((Stream *)connection, wait, &total, &incoming);
        else {
            PyObject *seconds = PyFloat_FromDouble(wait);
            if (seconds != NULL)
                incoming = PyObject_CallMethodOneArg(connection, name_receive, seconds);
            Py_XDECREF(seconds);
            found = incoming == NULL ? FAILED : OTHER;
        }
        if (found == OTHER && incoming == Py_None)
            found = NOTHING;
    } while (found == NOTHING && --looks > 0);
    if (found == FAILED)
        return NULL;
    if (found == NOTHING) {
        Py_XDECREF(incoming);
        Py_RETURN_FALSE;
    }
    if (tell(l->lock, name_acquire, NULL) < 0) {
        /* Ctrl-C in the wait for the lock: the message comes again over the next connection. */
        PyObject *type, *error, *traceback;
        PyErr_Fetch(&type, &error, &traceback);
        if (tell(connection, name_abort, NULL) < 0)
            PyErr_Clear();
        PyErr_Restore(type, error, traceback);
        Py_XDECREF(incoming);
        return NULL;
    }
    int failed = found == MESSAGE ? take_in(self, connection, total)
                                  : tell(self, name_dispatch, incoming, connection, NULL);
    Py_XDECREF(incoming);
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (tell(l->lock, name_release, NULL) < 0) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(traceback);
        return NULL;
    }
    PyErr_Restore(type, error, traceback);
    if (failed)
        return NULL;
    Py_RETURN_TRUE;
}

static PyMemberDef lane_members[] = {
    {"connection", T_OBJECT, offsetof(Lane, connection), 0, NULL},
    {"lock", T_OBJECT_EX, offsetof(Lane, lock), 0, NULL},
    {"waits", T_OBJECT, offsetof(Lane, waits), 0, NULL},
    {"_sink", T_OBJECT_EX, offsetof(Lane, sink), 0, NULL},
    {"_plain", T_OBJECT_EX, offsetof(Lane, plain), 0, NULL},
    {"_bulk", T_OBJECT_EX, offsetof(Lane, bulk), 0, NULL},
    {"arriving", T_OBJECT_EX, offsetof(Lane, arriving), 0, NULL},
    {"sent", T_ULONGLONG, offsetof(Lane, sent), 0, NULL},
    {"_seen", T_ULONGLONG, offsetof(Lane, seen), 0, NULL},
    {"_complete", T_ULONGLONG, offsetof(Lane, complete), 0, NULL},
    {"credit", T_LONGLONG, offsetof(Lane, credit), 0, NULL},
    {"_got", T_LONGLONG, offsetof(Lane, got), 0, NULL},
    {"_granted", T_LONGLONG, offsetof(Lane, granted), 0, NULL},
    {"_unreported", T_LONGLONG, offsetof(Lane, unreported), 0, NULL},
    {"_ack_after", T_LONGLONG, offsetof(Lane, ack_after), 0, NULL},
    {"_low_credit", T_LONGLONG, offsetof(Lane, low_credit), 0, NULL},
    {"messages_sent", T_LONGLONG, offsetof(Lane, messages_sent), 0, NULL},
    {"messages_received", T_LONGLONG, offsetof(Lane, messages_received), 0, NULL},
    {"copied", T_LONGLONG, offsetof(Lane, copied), 0, NULL},
    {NULL},
};

static PyMethodDef lane_methods[] = {
    {"post", (PyCFunction)(void (*)(void))lane_post, METH_FASTCALL, NULL},
    {"take", (PyCFunction)(void (*)(void))lane_take, METH_FASTCALL, NULL},
    {NULL},
};

static PyType_Slot lane_slots[] = {
    {Py_tp_doc, "Numbers, sends and takes in reliable messages."},
    {Py_tp_dealloc, lane_dealloc},
    {Py_tp_traverse, lane_traverse},
    {Py_tp_clear, lane_clear},
    {Py_tp_members, lane_members},
    {Py_tp_methods, lane_methods},
    {0, NULL},
};

PyType_Spec lane_spec = {
    "gpuremote._native.Lane",
    sizeof(Lane),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    lane_slots,
};
