/* Messages with one payload, and the note that they were sent: rpc.peer.Peer.post_payload in one step,
   where the connection takes it at once. */

#include "native.h"

/* Call a method while an exception is set, which stays. */
void payload_tell_anyway(PyObject *object, PyObject *name, PyObject *argument)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (argument == NULL || tell(object, name, argument, NULL) < 0)
        PyErr_WriteUnraisable(object);
    PyErr_Restore(type, error, traceback);
}

static int set(PyObject *object, PyObject *name, PyObject *value)
{
    return object == NULL || value == NULL ? -1 : PyObject_SetAttr(object, name, value);
}

static int set_number(PyObject *object, PyObject *name, unsigned long long number)
{
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int failed = set(object, name, value);
    Py_XDECREF(value);
    return failed;
}

/* An instance without what its class does at first: no code of Python's runs, so no Ctrl-C either,
   between a message that was sent and the note that it was. */
static PyObject *bare(Lane *l, Py_ssize_t which)
{
    PyTypeObject *type = (PyTypeObject *)PyTuple_GET_ITEM(l->kit, which);
    return type->tp_alloc(type, 0);
}

/* As transport.base.Region(array, steady). */
static PyObject *region_of(Lane *l, PyObject *array, PyObject *steady)
{
    PyObject *whole = PyMemoryView_FromObject(array), *code = PyUnicode_FromString("B");
    PyObject *view = whole == NULL || code == NULL
                         ? NULL
                         : PyObject_CallMethodOneArg(whole, name_cast, code);
    PyObject *region = view == NULL ? NULL : bare(l, 1);
    if (region == NULL || set(region, name__view, view) || set(region, name_source, view)
        || set(region, name_steady, steady)
        || set_number(region, name_nbytes, (size_t)PyMemoryView_GET_BUFFER(view)->len))
        Py_CLEAR(region);
    Py_XDECREF(view);
    Py_XDECREF(code);
    Py_XDECREF(whole);
    return region;
}

/* Note a message that was given to the connection, as Peer.keep: its rpc.bulk.Entry, or NULL. */
static PyObject *keep(Lane *l, const Payload *p, PyObject *region, unsigned long long seq)
{
    PyObject *entry = bare(l, 0), *key = PyLong_FromUnsignedLongLong(seq);
    PyObject *body = PyBytes_FromStringAndSize((const char *)&p->number, 8);
    PyObject *regions = PyList_New(1);
    if (regions != NULL)
        PyList_SET_ITEM(regions, 0, Py_NewRef(region));
    if (set(entry, name_seq, key) || set(entry, name_body, body) || set(entry, name_regions, regions)
        || set(entry, name_on_delivered, p->done) || set_number(entry, name_kind, p->kind)
        || set_number(entry, name_arg, p->arg) || set(entry, name_started, Py_True)
        || set(entry, name_cancelled, Py_False)
        || (p->wait != NULL && wait_for_upload(p->wait, entry) < 0)
        || PyDict_SetItem(l->bulk, key, entry) < 0)
        Py_CLEAR(entry);
    Py_XDECREF(regions);
    Py_XDECREF(body);
    Py_XDECREF(key);
    return entry;
}

/* Have the connection send what it was not given, or queue what the kernel did not take of it: -1:
   error. */
static int queue_rest(Lane *l, PyObject *connection, const Payload *p, const char *header,
                      PyObject *region, int begun, Py_ssize_t sent)
{
    PyObject *message = PyBytes_FromStringAndSize(header, HEADER + 8), *records = NULL;
    PyObject *regions = PyTuple_Pack(1, region), *count = NULL;
    int failed = message == NULL || regions == NULL ? -1 : 0;
    if (!failed && p->first_size && (!begun || sent < p->first_size)) {
        records = PyBytes_FromStringAndSize(p->first + FRAME, p->first_size - FRAME);
        count = PyLong_FromSsize_t(sent);
        failed = records == NULL || count == NULL ? -1
                 : begun                          ? tell(connection, name__left, records, count, NULL)
                                                  : tell(connection, name_send, records, NULL);
        begun = 0; /* nothing of the payload is out */
    }
    if (!failed && begun) {
        count = PyLong_FromSsize_t(sent - p->first_size);
        failed = count == NULL ? -1 : tell(connection, name__begun, message, region, count, NULL);
    }
    else if (!failed && l->connection == connection)
        failed = tell(connection, name_send, message, regions, NULL);
    Py_XDECREF(count);
    Py_XDECREF(records);
    Py_XDECREF(regions);
    Py_XDECREF(message);
    return failed;
}

int payload_ready(Lane *l, PyObject *connection)
{
    return is_stream(connection) && stream_clear((Stream *)connection)
           && ((Stream *)connection)->same_host && !((Stream *)connection)->shares
           && l->kit != NULL && PyTuple_CheckExact(l->kit) && PyTuple_GET_SIZE(l->kit) == 2
           && l->bulk != NULL && PyDict_CheckExact(l->bulk);
}

int payload_post(Lane *l, const Payload *p)
{
    char data[SMALL + LEAD + HEADER + 8], header[HEADER + 8];
    Py_ssize_t sent = 0;
    uint64_t seq = ++l->sent;
    l->credit -= HEADER + 8;
    lane_header(header, p->kind, 0, p->arg, seq, l->complete);
    memcpy(header + HEADER, &p->number, 8);
    if (p->first_size)
        memcpy(data, p->first, (size_t)p->first_size);
    PyObject *connection = Py_NewRef(l->connection == NULL ? Py_None : l->connection);
    int failed = 0, begun = payload_ready(l, connection), out = 0;
    if (connection != Py_None)
        l->messages_sent += 1 + (p->first_size > 0);
    if (begun) {
        Stream *s = (Stream *)connection;
        Py_ssize_t lead = p->first_size
                          + sending_lead(data + p->first_size, header, sizeof header, p->from);
        Py_ssize_t frames = (p->from->len + MAX_CHUNK - 1) / MAX_CHUNK;
        failed = sending_run(s, data, lead, p->from, p->lends, p->gives_way, &sent);
        out = sent == lead + p->from->len + FRAME * frames;
        /* The others are counted where they are queued as a whole. */
        s->messages_sent += (p->first_size > 0) + (sent >= p->first_size);
    }
    /* The other end may have it by now: nothing may come between, whatever the sending said. */
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *region = region_of(l, p->array, p->steady);
    PyObject *entry = region == NULL ? NULL : keep(l, p, region, seq);
    if (type != NULL)
        PyErr_Restore(type, error, traceback);
    if (!failed && entry != NULL && !out && l->connection == connection && connection != Py_None)
        failed = queue_rest(l, connection, p, header, region, begun, sent);
    if (entry == NULL) {
        stream_undo(connection); /* no memory; what is on its way can't be taken back */
        failed = -1;
    }
    else if (failed && lane_survive((PyObject *)l) < 0)
        payload_tell_anyway((PyObject *)l, name_spoil, entry);
    else
        failed = 0; /* if the connection broke, it comes over the next one */
    Py_XDECREF(entry);
    Py_XDECREF(region);
    Py_DECREF(connection);
    return failed;
}
