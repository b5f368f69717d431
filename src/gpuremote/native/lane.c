/* Lane: numbers, sends and takes in reliable messages. Twin: gpuremote.rpc.lane. */

#include "native.h"

PyTypeObject *Lane_Type;

static Kept *at(Lane *l, size_t k)
{
    return &l->kept[(l->first + k) & (l->room - 1)];
}

void lane_drop(Lane *l, unsigned long long ack)
{
    while (l->count && at(l, 0)->seq <= ack) {
        PyObject *body = at(l, 0)->body;
        l->first = (l->first + 1) & (l->room - 1);
        l->count--;
        Py_DECREF(body);
    }
}

/* Keep a message; it gets the next number. -1: error. */
static int keep(Lane *l, unsigned kind, unsigned flags, unsigned arg, PyObject *body)
{
    if (l->count == l->room) {
        size_t room = l->room ? 2 * l->room : 16;
        Kept *kept = PyMem_New(Kept, room);
        if (kept == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (size_t k = 0; k < l->count; k++)
            kept[k] = *at(l, k);
        PyMem_Free(l->kept);
        l->kept = kept;
        l->first = 0;
        l->room = room;
    }
    l->sent++;
    l->count++;
    *at(l, l->count - 1) = (Kept){l->sent, kind, flags, arg, Py_NewRef(body)};
    return 0;
}

int lane_keep(Lane *l, unsigned kind, unsigned flags, unsigned arg, PyObject *body, Py_ssize_t size)
{
    if (keep(l, kind, flags, arg, body) < 0)
        return -1;
    l->credit -= HEADER + size;
    if (kind == BATCH)
        l->batches++;
    return 0;
}

static int lane_traverse(PyObject *self, visitproc visit, void *arg)
{
    Lane *l = (Lane *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(l->connection);
    Py_VISIT(l->lock);
    Py_VISIT(l->sink);
    Py_VISIT(l->waits);
    Py_VISIT(l->wait_type);
    Py_VISIT(l->trips);
    Py_VISIT(l->table);
    Py_VISIT(l->queue);
    Py_VISIT(l->acquire);
    Py_VISIT(l->release);
    for (size_t k = 0; k < l->count; k++)
        Py_VISIT(at(l, k)->body);
    Py_VISIT(l->bulk);
    Py_VISIT(l->ready);
    Py_VISIT(l->kit);
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
    Py_CLEAR(l->wait_type);
    Py_CLEAR(l->trips);
    Py_CLEAR(l->table);
    Py_CLEAR(l->queue);
    Py_CLEAR(l->acquire);
    Py_CLEAR(l->release);
    lane_drop(l, ~0ULL);
    Py_CLEAR(l->bulk);
    Py_CLEAR(l->ready);
    Py_CLEAR(l->kit);
    Py_CLEAR(l->arriving);
    return 0;
}

static void lane_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lane_clear(self);
    PyMem_Free(((Lane *)self)->kept);
    type->tp_free(self);
    Py_DECREF(type);
}

int is_stream(PyObject *object)
{
    static PyTypeObject *known;
    if (Py_TYPE(object) == known)
        return 1;
    if (!PyObject_TypeCheck(object, Stream_Type))
        return 0;
    if (known == NULL)
        known = (PyTypeObject *)Py_NewRef(Py_TYPE(object));
    return 1;
}

void lane_header(char *at, unsigned kind, unsigned flags, uint32_t arg, uint64_t seq,
                       uint64_t ack)
{
    memset(at, 0, HEADER);
    at[0] = (char)kind;
    at[1] = (char)flags;
    memcpy(at + 4, &arg, 4);
    memcpy(at + 8, &seq, 8);
    memcpy(at + 16, &ack, 8);
}

int lane_raised(PyObject **kind, const char *name)
{
    if (*kind == NULL) {
        PyObject *type, *error, *traceback;
        PyErr_Fetch(&type, &error, &traceback);
        PyObject *module = PyImport_ImportModule("gpuremote.errors");
        *kind = module == NULL ? NULL : PyObject_GetAttrString(module, name);
        Py_XDECREF(module);
        if (*kind == NULL)
            PyErr_Clear();
        PyErr_Restore(type, error, traceback);
    }
    return *kind != NULL && PyErr_ExceptionMatches(*kind);
}

int lane_survive(PyObject *self)
{
    static PyObject *lost;
    if (!lane_raised(&lost, "ConnectionLost"))
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

int lane_send(PyObject *self, unsigned kind, PyObject *body, unsigned arg, unsigned flags)
{
    Lane *l = (Lane *)self;
    Py_buffer bytes;
    if (PyObject_GetBuffer(body, &bytes, PyBUF_SIMPLE) < 0)
        return -1;
    int failed = -1;
    Py_ssize_t size = HEADER + bytes.len;
    PyObject *connection = Py_XNewRef(l->connection);
    if (lane_keep(l, kind, flags, arg, body, bytes.len) < 0)
        goto over;
    failed = 0;
    if (connection == NULL || connection == Py_None)
        goto over;
    l->messages_sent++;
    if (is_stream(connection) && size <= MIDDLING && stream_clear((Stream *)connection)) {
        char data[SMALL];
        lane_header(data + FRAME, kind, flags, arg, l->sent, l->complete);
        if (size <= SMALL - FRAME) {
            memcpy(data + FRAME + HEADER, bytes.buf, (size_t)bytes.len);
            failed = stream_put((Stream *)connection, data, FRAME + size, NULL, 0);
        }
        else
            failed = stream_put((Stream *)connection, data, FRAME + HEADER, bytes.buf, bytes.len);
    }
    else {
        PyObject *message = PyBytes_FromStringAndSize(NULL, size);
        failed = -1;
        if (message != NULL) {
            lane_header(PyBytes_AS_STRING(message), kind, flags, arg, l->sent, l->complete);
            memcpy(PyBytes_AS_STRING(message) + HEADER, bytes.buf, (size_t)bytes.len);
            failed = tell(connection, name_send, message, NULL);
            Py_DECREF(message);
        }
    }
    if (failed)
        failed = lane_survive(self);
over:
    PyBuffer_Release(&bytes);
    int out = 0;
    if (failed)
        out = -1;
    else if (l->credit > 0 && connection != NULL && l->connection == connection) {
        if (is_stream(connection))
            out = !((Stream *)connection)->pending;
        else if (connection != Py_None) {
            PyObject *pending = PyObject_GetAttr(connection, name_pending_output);
            out = pending == NULL ? -1 : pending == Py_False;
            Py_XDECREF(pending);
        }
    }
    Py_XDECREF(connection);
    return out;
}

/* post(kind, body, arg=0, flags=0, /) */
static PyObject *lane_post(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count < 2 || count > 4) {
        PyErr_SetString(PyExc_TypeError, "post() takes kind, body, arg and flags");
        return NULL;
    }
    unsigned kind = (unsigned)PyLong_AsUnsignedLong(args[0]);
    unsigned arg = count > 2 ? (unsigned)PyLong_AsUnsignedLong(args[2]) : 0;
    unsigned flags = count > 3 ? (unsigned)PyLong_AsUnsignedLong(args[3]) : 0;
    int out = PyErr_Occurred() ? -1 : lane_send(self, kind, args[1], arg, flags);
    return out < 0 ? NULL : PyBool_FromLong(out);
}

int lane_count_trip(Lane *l, PyObject *name)
{
    if (l->trips == NULL || !PyDict_CheckExact(l->trips))
        return 0;
    PyObject *before = PyDict_GetItemWithError(l->trips, name);
    if (before == NULL && PyErr_Occurred())
        return -1;
    PyObject *count = PyLong_FromLongLong(before == NULL ? 1 : PyLong_AsLongLong(before) + 1);
    int failed = count == NULL ? -1 : PyDict_SetItem(l->trips, name, count);
    Py_XDECREF(count);
    return failed;
}

/* ask(number, name, into, kind, body, /) */
static PyObject *lane_ask(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Lane *l = (Lane *)self;
    if (count != 5 || l->waits == NULL || !PyDict_CheckExact(l->waits)) {
        PyErr_SetString(PyExc_TypeError, "ask() takes number, name, into, kind and body");
        return NULL;
    }
    unsigned long long number = PyLong_AsUnsignedLongLong(args[0]);
    unsigned kind = (unsigned)PyLong_AsUnsignedLong(args[3]);
    PyObject *wait = NULL;
    if (!PyErr_Occurred() && lane_count_trip(l, args[1]) == 0)
        wait = wait_make(number, args[1], args[2]);
    if (wait == NULL || PyDict_SetItem(l->waits, args[0], wait) < 0) {
        Py_XDECREF(wait);
        return NULL;
    }
    int out = lane_send(self, kind, args[4], 0, 0);
    if (out < 0)
        Py_CLEAR(wait);
    else
        wait_posted(wait, out);
    return wait;
}

/* settle(ack): the other end has every message up to there. */
static PyObject *lane_settle(PyObject *self, PyObject *number)
{
    unsigned long long ack = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    lane_drop((Lane *)self, ack);
    Py_RETURN_NONE;
}

static PyObject *lane_kept(PyObject *self, PyObject *unused)
{
    Lane *l = (Lane *)self;
    size_t count = l->count, made = 0;
    Kept *copies = PyMem_New(Kept, count ? count : 1);
    if (copies == NULL)
        return PyErr_NoMemory();
    /* First copied: making objects may run finalisers, which may change the ring. */
    for (size_t k = 0; k < count; k++) {
        copies[k] = *at(l, k);
        Py_INCREF(copies[k].body);
    }
    PyObject *list = PyList_New(0);
    for (; list != NULL && made < count; made++) {
        Kept *m = &copies[made];
        PyObject *item = Py_BuildValue("(KIIIO)", m->seq, m->kind, m->flags, m->arg, m->body);
        if (item == NULL || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    for (size_t k = 0; k < count; k++)
        Py_DECREF(copies[k].body);
    PyMem_Free(copies);
    return list;
}

static PyObject *lane_get_kept_count(PyObject *self, void *unused)
{
    return PyLong_FromSize_t(((Lane *)self)->count);
}

static PyObject *lane_get_lock(PyObject *self, void *unused)
{
    Lane *l = (Lane *)self;
    return Py_NewRef(l->lock == NULL ? Py_None : l->lock);
}

static int lane_set_lock(PyObject *self, PyObject *lock, void *unused)
{
    Lane *l = (Lane *)self;
    if (lock == NULL) {
        PyErr_SetString(PyExc_AttributeError, "lock");
        return -1;
    }
    PyObject *acquire = PyObject_GetAttr(lock, name_acquire);
    PyObject *release = acquire == NULL ? NULL : PyObject_GetAttr(lock, name_release);
    if (release == NULL) {
        Py_XDECREF(acquire);
        return -1;
    }
    Py_XSETREF(l->acquire, acquire);
    Py_XSETREF(l->release, release);
    Py_XSETREF(l->lock, Py_NewRef(lock));
    return 0;
}

static PyMemberDef lane_members[] = {
    {"connection", T_OBJECT, offsetof(Lane, connection), 0, NULL},
    {"waits", T_OBJECT, offsetof(Lane, waits), 0, NULL},
    {"table", T_OBJECT, offsetof(Lane, table), 0, NULL},
    {"queue", T_OBJECT, offsetof(Lane, queue), 0, NULL},
    {"_kit", T_OBJECT, offsetof(Lane, kit), 0, NULL},
    {"ready", T_OBJECT, offsetof(Lane, ready), 0, NULL},
    {"turn", T_ULONGLONG, offsetof(Lane, turn), 0, NULL},
    {"small", T_LONGLONG, offsetof(Lane, small), 0, NULL},
    {"direct", T_BOOL, offsetof(Lane, direct), 0, NULL},
    {"trips", T_OBJECT, offsetof(Lane, trips), 0, NULL},
    {"wait_type", T_OBJECT, offsetof(Lane, wait_type), 0, NULL},
    {"_sink", T_OBJECT_EX, offsetof(Lane, sink), 0, NULL},
    {"_bulk", T_OBJECT_EX, offsetof(Lane, bulk), 0, NULL},
    {"arriving", T_OBJECT_EX, offsetof(Lane, arriving), 0, NULL},
    {"sent", T_ULONGLONG, offsetof(Lane, sent), 0, NULL},
    {"_seen", T_ULONGLONG, offsetof(Lane, seen), 0, NULL},
    {"_complete", T_ULONGLONG, offsetof(Lane, complete), 0, NULL},
    {"credit", T_LONGLONG, offsetof(Lane, credit), 0, NULL},
    {"_limit", T_LONGLONG, offsetof(Lane, limit), 0, NULL},
    {"_got", T_LONGLONG, offsetof(Lane, got), 0, NULL},
    {"_granted", T_LONGLONG, offsetof(Lane, granted), 0, NULL},
    {"_unreported", T_LONGLONG, offsetof(Lane, unreported), 0, NULL},
    {"_ack_after", T_LONGLONG, offsetof(Lane, ack_after), 0, NULL},
    {"_low_credit", T_LONGLONG, offsetof(Lane, low_credit), 0, NULL},
    {"messages_sent", T_LONGLONG, offsetof(Lane, messages_sent), 0, NULL},
    {"messages_received", T_LONGLONG, offsetof(Lane, messages_received), 0, NULL},
    {"batches", T_LONGLONG, offsetof(Lane, batches), 0, NULL},
    {"copied", T_LONGLONG, offsetof(Lane, copied), 0, NULL},
    {NULL},
};

static PyMethodDef lane_methods[] = {
    {"post", (PyCFunction)(void (*)(void))lane_post, METH_FASTCALL, NULL},
    {"ask", (PyCFunction)(void (*)(void))lane_ask, METH_FASTCALL, NULL},
    {"kept", lane_kept, METH_NOARGS, NULL},
    {"settle", lane_settle, METH_O, NULL},
    {"take", (PyCFunction)(void (*)(void))lane_take, METH_FASTCALL, NULL},
    {NULL},
};

static PyGetSetDef lane_getset[] = {
    {"lock", lane_get_lock, lane_set_lock, NULL, NULL},
    {"kept_count", lane_get_kept_count, NULL, NULL, NULL},
    {NULL},
};

static PyType_Slot lane_slots[] = {
    {Py_tp_doc, "Numbers, sends and takes in reliable messages."},
    {Py_tp_dealloc, lane_dealloc},
    {Py_tp_traverse, lane_traverse},
    {Py_tp_clear, lane_clear},
    {Py_tp_members, lane_members},
    {Py_tp_getset, lane_getset},
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
