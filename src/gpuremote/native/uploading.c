/* An upload over a socket to a server on this host, for Recorder.put_at_hand: its record and its
   bytes, in one call of the kernel. Twin: client.uploading.Uploader.put. */

#include "native.h"

/* The other end has the bytes of a PUT: its number, who waits, and all who do. As Uploader._put_done. */
static PyObject *delivered(PyObject *whose, PyObject *unused)
{
    PyObject *number = PyTuple_GET_ITEM(whose, 0), *waits = PyTuple_GET_ITEM(whose, 2);
    if (PyDict_Contains(waits, number) > 0 && PyDict_DelItem(waits, number) < 0)
        return NULL;
    if (wait_delivered(PyTuple_GET_ITEM(whose, 1)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef delivered_method = {"delivered", delivered, METH_NOARGS, NULL};

/* The message of the records in the buffer: its bytes at ``data``, with their number in ``size`` (0:
   they were sent, or are too many). -1: error. */
static int take_records(Recorder *r, char *data, Py_ssize_t room, Py_ssize_t *size)
{
    Lane *l = (Lane *)r->lane;
    Py_ssize_t count = PyByteArray_GET_SIZE(r->buffer);
    *size = 0;
    if (!count) /* they have been sent */
        return 0;
    if (r->far || r->watcher != Py_None || FRAME + HEADER + 8 + count > room)
        return tell((PyObject *)r, name_flush, NULL); /* others look at what is sent */
    PyObject *fresh = PyByteArray_FromStringAndSize(NULL, 0);
    PyObject *body = fresh == NULL ? NULL : PyBytes_FromStringAndSize(NULL, 8 + count);
    if (body == NULL) {
        Py_XDECREF(fresh);
        return -1;
    }
    uint64_t first = (uint64_t)r->first, frame = PLAIN + (uint64_t)(HEADER + 8 + count);
    memcpy(PyBytes_AS_STRING(body), &first, 8);
    memcpy(PyBytes_AS_STRING(body) + 8, PyByteArray_AS_STRING(r->buffer), (size_t)count);
    int failed = lane_keep(l, BATCH, 0, 0, body, 8 + count);
    if (!failed) {
        r->first = r->next;
        Py_SETREF(r->buffer, Py_NewRef(fresh));
        r->told = 0;
        r->flush_after = looking_now() + FLUSH_NS;
        memcpy(data, &frame, FRAME);
        lane_header(data + FRAME, BATCH, 0, 0, l->sent, l->complete);
        memcpy(data + FRAME + HEADER, PyBytes_AS_STRING(body), (size_t)(8 + count));
        *size = FRAME + HEADER + 8 + count;
    }
    Py_DECREF(fresh);
    Py_DECREF(body);
    return failed;
}

/* The record and the bytes of an array, with the lock held. -1: error. */
static int post(Recorder *r, PyObject *record, PyObject *array, const Py_buffer *from, int lends,
                PyObject **number, PyObject **wait)
{
    static PyObject *put;
    if (put == NULL && (put = PyUnicode_InternFromString("put")) == NULL)
        return -1;
    Lane *l = (Lane *)r->lane;
    char data[SMALL];
    Py_ssize_t size;
    *wait = wait_make((unsigned long long)r->next, put, Py_None);
    if (*wait == NULL || wait_for_upload(*wait, NULL) < 0 || lane_count_trip(l, put) < 0
        || recording_free_dropped(r) < 0)
        return -1;
    long long due = r->flush_after;
    r->flush_after = LLONG_MAX; /* it goes out right now */
    int failed = recording_append(r, record, put, number) < 0
                 || PyDict_SetItem(l->waits, *number, *wait) < 0;
    PyObject *whose = failed ? NULL : PyTuple_Pack(3, *number, *wait, l->waits);
    PyObject *done = whose == NULL ? NULL : PyCFunction_New(&delivered_method, whose);
    failed = done == NULL || take_records(r, data, sizeof data, &size) < 0 ? -1 : 0;
    if (r->flush_after == LLONG_MAX)
        r->flush_after = due;
    if (!failed) {
        const Payload payload = {PAYLOAD, 0, PyLong_AsUnsignedLongLong(*number), array, from, done,
                                 *wait, Py_False, data, size, lends, 0};
        failed = payload_post(l, &payload);
    }
    Py_XDECREF(done);
    Py_XDECREF(whose);
    if (failed)
        return -1;
    PyObject *last = PyLong_FromLongLong(r->next - 1);
    failed = last == NULL ? -1 : tell((PyObject *)r, name__keep_origins, last, NULL);
    Py_XDECREF(last);
    return failed;
}

/* Whether it takes no more steps than there are here. */
static int is_plain(Recorder *r, PyObject *kind)
{
    Lane *l = (Lane *)r->lane;
    PyObject *connection = PyTuple_GET_ITEM(kind, 2);
    return connection == l->connection && payload_ready(l, connection) && l->waits != NULL
           && PyDict_CheckExact(l->waits) && !PyList_GET_SIZE(r->staged) && r->watcher != NULL
           && r->buffer != NULL
           && PyByteArray_Check(r->buffer)
           && PyByteArray_GET_SIZE(r->buffer) + PyBytes_GET_SIZE(PyTuple_GET_ITEM(kind, 1)) + 64
                  < r->full;
}

/* Nobody will have the array of an upload that failed in the middle, with the exception set. */
static void give_up(Recorder *r, PyObject *wait)
{
    PyObject *last = PyLong_FromLongLong(r->last);
    if (wait != NULL)
        payload_tell_anyway((PyObject *)r, name_cancel, wait);
    if (r->last)
        payload_tell_anyway((PyObject *)r, name__take_back, last);
    Py_XDECREF(last);
}

int uploading_send(Recorder *r, PyObject *array, PyObject *kind, PyObject *make, PyObject *driver,
                   PyObject **made)
{
    Py_buffer from;
    Lane *l = (Lane *)r->lane;
    if (!is_plain(r, kind))
        return 0;
    if (PyObject_GetBuffer(array, &from, PyBUF_C_CONTIGUOUS) < 0) {
        PyErr_Clear();
        return 0;
    }
    if (from.len < 1 || from.len > LONGEST || recording_lock(r) < 0) {
        PyBuffer_Release(&from);
        return PyErr_Occurred() ? -1 : 0;
    }
    const int keeps_waiting = from.len > LONG_BURST && looking_now() - r->alone < ALONE_NS;
    if (keeps_waiting || r->special || !is_plain(r, kind)) { /* another thread had the lock meanwhile */
        PyBuffer_Release(&from);
        return recording_let_go(r, 0);
    }
    PyObject *number = NULL, *wait = NULL, *connection = Py_NewRef(PyTuple_GET_ITEM(kind, 2));
    Stream *stream = (Stream *)connection;
    Py_ssize_t size = from.len;
    int lends;
    Choice *choice = lending_begin(stream, size, &lends);
    long long begin = looking_now();
    r->last = 0;
    int failed = post(r, PyTuple_GET_ITEM(kind, 1), array, &from, lends, &number, &wait);
    if (!failed && (l->credit <= 0 || l->connection != connection || ((Stream *)connection)->pending))
        failed = tell((PyObject *)r, name__posted, NULL);
    if (failed)
        give_up(r, wait);
    PyBuffer_Release(&from);
    failed = recording_let_go(r, failed);
    if (!failed)
        *made = recording_handle(make, r, PyLong_AsLongLong(number), PyTuple_GET_ITEM(kind, 0));
    if (*made != NULL && r->stalled && tell((PyObject *)r, name__relieve, NULL) < 0) {
        payload_tell_anyway((PyObject *)r, name_cancel, wait);
        Py_CLEAR(*made);
    }
    if (*made != NULL) {
        int over = awaiting_wait(r, driver, connection, wait);
        if (over < 0 || (!over && tell(driver, name_wait, wait, NULL) < 0))
            Py_CLEAR(*made);
        else if (over && choice != NULL)
            lending_took(choice, lends, size, looking_now() - begin);
    }
    Py_DECREF(connection);
    Py_XDECREF(number);
    Py_XDECREF(wait);
    return *made == NULL ? -1 : 1;
}
