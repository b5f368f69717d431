/* The end of a server that has made ready for an upload like the one before: its memory is there
   when its record comes, and where the bytes go is known before they do. Twin:
   gpuremote.server.session (WorkerSession._batch, _put and _bytes_follow). */

#include "native.h"

#define PAYLOAD 2         /* wire.frames.Kind */
#define MANY (1 << 16)    /* handles; nearer to wire.caps.MAX_HANDLES the twin counts them */

/* What Lane.ready holds. */
enum { RECORD, SLOT, ARRIVAL, VIEW, NBYTES, QUOTA, ARRIVING, READY };

Py_ssize_t arriving_size(Lane *l)
{
    PyObject *ready = l->ready;
    if (ready == NULL || !PyTuple_CheckExact(ready) || PyTuple_GET_SIZE(ready) != READY
        || !PyBytes_CheckExact(PyTuple_GET_ITEM(ready, RECORD)))
        return 0;
    return FRAME + HEADER + 8 + 18 + PyBytes_GET_SIZE(PyTuple_GET_ITEM(ready, RECORD));
}

static int is_ready(Lane *l)
{
    PyObject *ready = l->ready;
    return l->direct && l->credit > 0 && ready != NULL && PyTuple_CheckExact(ready)
           && PyTuple_GET_SIZE(ready) == READY && PyBytes_CheckExact(PyTuple_GET_ITEM(ready, RECORD))
           && PyMemoryView_Check(PyTuple_GET_ITEM(ready, VIEW))
           && PyDict_CheckExact(PyTuple_GET_ITEM(ready, ARRIVING))
           && !PyDict_GET_SIZE(PyTuple_GET_ITEM(ready, ARRIVING)) && !PyDict_GET_SIZE(l->arriving)
           && l->table != NULL && PyDict_CheckExact(l->table)
           && PyDict_GET_SIZE(l->table) < MANY && l->queue != NULL && !PyObject_Size(l->queue);
}

/* Tell the connection where the next payload goes, and what to answer then. As Peer.expect. */
static int expect(Lane *l, Stream *s, unsigned long long number, PyObject *view)
{
    char header[HEADER + 8], answer[HEADER + 24];
    uint64_t report[3] = {(uint64_t)l->granted, number, l->seen + 1};
    lane_header(header, PAYLOAD, 0, 0, l->seen + 1, 0);
    memcpy(header + HEADER, &number, 8);
    lane_header(answer, ACK, 0, 0, 0, l->complete);
    memcpy(answer + HEADER, report, sizeof report);
    return receiving_hint(s, header, sizeof header, view, answer, sizeof answer);
}

int arriving_welcome(Lane *l, PyObject *connection, const char *body, Py_ssize_t size)
{
    if (!is_stream(connection) || !is_ready(l))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *ready = l->ready, *record = PyTuple_GET_ITEM(ready, RECORD);
    Py_ssize_t end = size - PyBytes_GET_SIZE(record), offset = 8;
    uint64_t turn;
    if (end < 8 || memcmp(body + end, PyBytes_AS_STRING(record), (size_t)(size - end)))
        return 0;
    memcpy(&turn, body, 8);
    while (offset < end) {
        Py_ssize_t taken = calls_extent_of_free(body + offset, end - offset);
        if (!taken)
            return 0;
        offset += taken;
    }
    int room = storage_room(PyTuple_GET_ITEM(ready, QUOTA), PyTuple_GET_ITEM(ready, NBYTES));
    if (turn != l->turn || room <= 0)
        return room < 0 ? -1 : 0;
    l->ready = NULL;
    int failed = -1;
    for (offset = 8; offset < end; l->turn++) {
        Py_ssize_t taken = calls_free(l->table, body + offset, end - offset);
        if (taken <= 0)
            goto over;
        offset += taken;
    }
    PyObject *storage = storage_make(PyTuple_GET_ITEM(ready, QUOTA), PyTuple_GET_ITEM(ready, NBYTES));
    PyObject *number = storage == NULL ? NULL : PyLong_FromUnsignedLongLong(l->turn);
    if (number != NULL && !PyObject_SetAttr(PyTuple_GET_ITEM(ready, ARRIVAL), name_storage, storage)
        && !PyDict_SetItem(l->table, number, PyTuple_GET_ITEM(ready, SLOT))
        && !PyDict_SetItem(PyTuple_GET_ITEM(ready, ARRIVING), number, PyTuple_GET_ITEM(ready, ARRIVAL)))
        failed = expect(l, (Stream *)connection, l->turn++, PyTuple_GET_ITEM(ready, VIEW)) < 0;
    Py_XDECREF(number);
    Py_XDECREF(storage);
over:
    Py_DECREF(ready);
    return failed ? -1 : 1;
}
