/* An upload over a socket to a server on this host, for Recorder.put_at_hand: its record, and the
   bytes right behind that. Twin: client.uploading.Uploader.put. */

#include "native.h"

#include <pythread.h>

#define PAYLOAD 2       /* wire.frames.Kind */
#define FLUSH_NS 150000 /* client.issuing */
#define MOST ((Py_ssize_t)8 << 20)

/* Call a method while an exception is set, which stays. */
static void tell_anyway(PyObject *object, PyObject *name, PyObject *argument, PyObject *other)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (argument == NULL || tell(object, name, argument, other, NULL) < 0)
        PyErr_WriteUnraisable(object);
    PyErr_Restore(type, error, traceback);
}

/* Send the records in the buffer, as Issuer._send_records. -1: error. */
static int send_records(Recorder *r)
{
    if (r->far || r->watcher != Py_None)
        return tell((PyObject *)r, name_flush, NULL); /* others look at what is sent */
    Py_ssize_t size = PyByteArray_GET_SIZE(r->buffer);
    PyObject *fresh = PyByteArray_FromStringAndSize(NULL, 0);
    PyObject *body = fresh == NULL ? NULL : PyBytes_FromStringAndSize(NULL, 8 + size);
    PyObject *none = body == NULL ? NULL : PyLong_FromLong(0);
    if (none == NULL) {
        Py_XDECREF(fresh);
        Py_XDECREF(body);
        return -1;
    }
    uint64_t first = (uint64_t)r->first;
    memcpy(PyBytes_AS_STRING(body), &first, 8);
    memcpy(PyBytes_AS_STRING(body) + 8, PyByteArray_AS_STRING(r->buffer), (size_t)size);
    r->first = r->next;
    Py_SETREF(r->buffer, fresh);
    r->told = 0;
    r->flush_after = looking_now() + FLUSH_NS;
    int failed = lane_send(r->lane, BATCH, body, 0, 0) < 0 ? -1 : 0;
    if (failed)
        tell_anyway(r->lane, name_interrupted, body, none);
    else {
        PyObject *last = PyLong_FromLongLong(r->next - 1);
        failed = last == NULL ? -1 : tell((PyObject *)r, name__keep_origins, last, NULL);
        Py_XDECREF(last);
    }
    Py_DECREF(none);
    Py_DECREF(body);
    return failed;
}

/* Give the connection a payload that is kept as ``entry``. As Peer._transmit. -1: error. */
static int send_bytes(Lane *l, PyObject *entry, PyObject *region, unsigned long long number,
                      const Py_buffer *from)
{
    Stream *s = (Stream *)l->connection;
    char header[HEADER + 8];
    if (PyObject_SetAttr(entry, name_started, Py_True) < 0)
        return -1;
    lane_header(header, PAYLOAD, 0, 0, l->sent, l->complete);
    memcpy(header + HEADER, &number, 8);
    l->messages_sent++;
    Py_INCREF(s);
    int failed = sending_message(s, header, sizeof header, from, region);
    Py_DECREF(s);
    return failed;
}

/* The record and the bytes of an array, with the lock held. -1: error. */
static int post(Recorder *r, PyObject *record, PyObject *array, const Py_buffer *from,
                PyObject **number, PyObject **wait)
{
    static PyObject *put;
    if (put == NULL && (put = PyUnicode_InternFromString("put")) == NULL)
        return -1;
    Lane *l = (Lane *)r->lane;
    *wait = wait_make((unsigned long long)r->next, put, Py_None);
    if (*wait == NULL || lane_count_trip(l, put) < 0 || recording_free_dropped(r) < 0)
        return -1;
    r->flush_after = LLONG_MAX; /* it goes out right now */
    if (recording_append(r, record, put, number) < 0
        || PyDict_SetItem(l->waits, *number, *wait) < 0 || send_records(r) < 0)
        return -1;
    /* The server is at it by now, and looks for the bytes. */
    PyObject *pair = PyObject_CallMethodObjArgs((PyObject *)r, name__lend, *number, array, *wait, NULL);
    if (pair == NULL)
        return -1;
    int failed = 0;
    if (l->connection != NULL && is_stream(l->connection) && stream_clear((Stream *)l->connection))
        failed = send_bytes(l, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1),
                            PyLong_AsUnsignedLongLong(*number), from);
    else if (l->connection != NULL && l->connection != Py_None)
        failed = tell(r->lane, name__transmit, PyTuple_GET_ITEM(pair, 0), NULL);
    if (failed && !(failed = lane_survive(r->lane)))
        ; /* it comes over the next connection */
    else if (failed)
        tell_anyway(r->lane, name_spoil, PyTuple_GET_ITEM(pair, 0), NULL);
    Py_DECREF(pair);
    return failed;
}

int uploading_send(Recorder *r, PyObject *array, PyObject *kind, PyObject *make, PyObject *finish,
                   PyObject **made)
{
    Py_buffer from;
    Lane *l = (Lane *)r->lane;
    PyObject *record = PyTuple_GET_ITEM(kind, 1), *connection = PyTuple_GET_ITEM(kind, 2);
    if (connection != l->connection || !is_stream(connection) || !stream_clear((Stream *)connection)
        || !((Stream *)connection)->same_host || l->waits == NULL || !PyDict_CheckExact(l->waits)
        || PyList_GET_SIZE(r->staged) || r->watcher == NULL
        || r->buffer == NULL || !PyByteArray_Check(r->buffer)
        || PyByteArray_GET_SIZE(r->buffer) + PyBytes_GET_SIZE(record) + 64 >= r->full)
        return 0;
    if (PyObject_GetBuffer(array, &from, PyBUF_C_CONTIGUOUS) < 0) {
        PyErr_Clear();
        return 0;
    }
    if (from.len < 1 || from.len > MOST || recording_lock(r) < 0) {
        PyBuffer_Release(&from);
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *number = NULL, *wait = NULL;
    int failed = post(r, record, array, &from, &number, &wait);
    if (!failed && (l->credit <= 0 || l->connection != connection || ((Stream *)connection)->pending))
        failed = tell((PyObject *)r, name__posted, NULL);
    if (failed && wait != NULL)
        tell_anyway((PyObject *)r, name_cancel, wait, NULL);
    PyBuffer_Release(&from);
    failed = recording_let_go(r, failed);
    if (!failed && r->stalled)
        failed = tell((PyObject *)r, name__relieve, NULL);
    if (!failed)
        *made = recording_handle(make, r, PyLong_AsLongLong(number), PyTuple_GET_ITEM(kind, 0));
    if (!failed && *made != NULL) {
        PyObject *answer = PyObject_CallOneArg(finish, wait);
        if (answer == NULL)
            Py_CLEAR(*made);
        Py_XDECREF(answer);
    }
    Py_XDECREF(number);
    Py_XDECREF(wait);
    return *made == NULL ? -1 : 1;
}
