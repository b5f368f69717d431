/* The end of a server that has made ready for an upload like the one before: its memory is there
   when its record comes, and where the bytes go is known before they do. Twin:
   gpuremote.server.session (WorkerSession._batch, _put and _bytes_follow). */

#include "native.h"

#define IN_A_LOOP 3 /* as server.arrivals has it */
#define MANY (1 << 16) /* handles; nearer to wire.caps.MAX_HANDLES the twin counts them */

/* What Lane.ready holds: server.arrivals.Prepared. */
enum { RECORD, BATCH_SIZE, META, NBYTES, QUOTA, ARRIVING, ARRIVAL, MEMORY, PLACE, CONNECTION, READY };

static int is_one(PyObject *ready)
{
    return ready != NULL && PyTuple_Check(ready) && PyTuple_GET_SIZE(ready) == READY
           && PyBytes_CheckExact(PyTuple_GET_ITEM(ready, RECORD))
           && PyLong_CheckExact(PyTuple_GET_ITEM(ready, BATCH_SIZE))
           && PyDict_CheckExact(PyTuple_GET_ITEM(ready, ARRIVING));
}

Py_ssize_t arriving_size(Lane *l)
{
    if (!is_one(l->ready))
        return 0;
    return FRAME + HEADER + PyLong_AsSsize_t(PyTuple_GET_ITEM(l->ready, BATCH_SIZE));
}

static int is_ready(Lane *l)
{
    return l->direct && l->credit > 0 && is_one(l->ready)
           && PyTuple_GET_ITEM(l->ready, CONNECTION) == l->connection
           && !PyDict_GET_SIZE(PyTuple_GET_ITEM(l->ready, ARRIVING))
           && !PyDict_GET_SIZE(l->arriving) && l->table != NULL && PyDict_CheckExact(l->table)
           && PyDict_GET_SIZE(l->table) < MANY && l->queue != NULL && !PyObject_Size(l->queue);
}

/* Whether nobody else knows of memory: the array is referred to by what holds it here and by its view,
   and what it is made from (to which NumPy's views of the array refer, not to the array) by what is
   made from it. -1: error. */
static int is_alone(PyObject *array)
{
    int alone = Py_REFCNT(array) == 2;
    PyObject *object = Py_NewRef(array);
    while (alone > 0 && Py_IS_TYPE(object, Py_TYPE(array))) {
        PyObject *base = PyObject_GetAttr(object, name_base);
        Py_DECREF(object);
        if (base == NULL)
            return -1;
        object = base;
        alone = base == Py_None || Py_REFCNT(base) == 2; /* this one among them */
    }
    Py_DECREF(object);
    return alone;
}

/* Such memory, borrowed; NULL: there is none, or an error. */
static PyObject *spare(PyObject *memory)
{
    if (!PyList_CheckExact(memory))
        return NULL;
    for (Py_ssize_t k = PyList_GET_SIZE(memory); k-- > 0;) {
        PyObject *pair = PyList_GET_ITEM(memory, k);
        if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2
            || !PyMemoryView_Check(PyTuple_GET_ITEM(pair, 1))
            || Py_REFCNT(PyTuple_GET_ITEM(pair, 1)) != 1)
            continue;
        int alone = is_alone(PyTuple_GET_ITEM(pair, 0));
        if (alone)
            return alone > 0 ? pair : NULL;
    }
    return NULL;
}

/* Whether nothing is left to be done for an array that is here: its memory is kept already, or will
   not be. */
static int is_settled(PyObject *memory, PyObject *array)
{
    if (!PyList_CheckExact(memory) || PyList_GET_SIZE(memory) >= IN_A_LOOP)
        return 1;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(memory); k++)
        if (PyTuple_GET_ITEM(PyList_GET_ITEM(memory, k), 0) == array)
            return 1;
    return 0;
}

static int set(PyObject *object, PyObject *name, PyObject *value)
{
    return object == NULL || value == NULL ? -1 : PyObject_SetAttr(object, name, value);
}

/* An Arrival; ``pair`` is its memory, or NULL if that is to be seen to. */
static PyObject *arrival_of(PyObject *ready, PyObject *slot, PyObject *storage, PyObject *pair)
{
    static PyObject *nothing;
    if (nothing == NULL && (nothing = PyBytes_FromStringAndSize(NULL, 0)) == NULL)
        return NULL;
    PyTypeObject *type = (PyTypeObject *)PyTuple_GET_ITEM(ready, ARRIVAL);
    PyObject *arrival = type->tp_alloc(type, 0);
    if (set(arrival, name_slot, slot) || set(arrival, name_meta, PyTuple_GET_ITEM(ready, META))
        || set(arrival, name_storage, storage) || set(arrival, name_digest, nothing)
        || set(arrival, name_kept, Py_False)
        || set(arrival, name__array, pair == NULL ? Py_None : PyTuple_GET_ITEM(pair, 0))
        || (pair != NULL && set(arrival, name_target, PyTuple_GET_ITEM(pair, 1))))
        Py_CLEAR(arrival);
    return arrival;
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

/* Where the bytes of an arrival go, a new reference: there is memory for it now. None: there is none,
   of which the client has been told. NULL: error. */
static PyObject *place(PyObject *ready, PyObject *number, PyObject *arrival)
{
    PyObject *given[] = {number, arrival};
    PyObject *placed = PyObject_Vectorcall(PyTuple_GET_ITEM(ready, PLACE), given, 2, NULL);
    PyObject *target = placed == NULL      ? NULL
                       : placed == Py_True ? PyObject_GetAttr(arrival, name_target)
                                           : Py_NewRef(Py_None);
    Py_XDECREF(placed);
    return target;
}

/* PUT ``l->turn``, as WorkerSession.announce and place. -1: error. */
static int announce(Lane *l, Stream *s, PyObject *ready, PyObject *pair)
{
    PyObject *storage = storage_make(PyTuple_GET_ITEM(ready, QUOTA), PyTuple_GET_ITEM(ready, NBYTES));
    PyObject *slot = storage == NULL ? NULL : Slot_Type->tp_alloc(Slot_Type, 0);
    PyObject *arrival = slot == NULL ? NULL : arrival_of(ready, slot, storage, pair);
    PyObject *number = arrival == NULL ? NULL : PyLong_FromUnsignedLongLong(l->turn);
    PyObject *target = NULL;
    int failed = -1;
    if (number != NULL && !PyDict_SetItem(l->table, number, slot)
        && !PyDict_SetItem(PyTuple_GET_ITEM(ready, ARRIVING), number, arrival)) {
        uint64_t turn = l->turn++;
        target = pair == NULL ? place(ready, number, arrival) : Py_NewRef(PyTuple_GET_ITEM(pair, 1));
        failed = target == NULL                ? -1
                 : !PyMemoryView_Check(target) ? 0
                                               : (expect(l, s, turn, target) < 0 ? -1 : 0);
    }
    Py_XDECREF(target);
    Py_XDECREF(number);
    Py_XDECREF(arrival);
    Py_XDECREF(slot);
    Py_XDECREF(storage);
    return failed;
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
    PyObject *pair = spare(PyTuple_GET_ITEM(ready, MEMORY));
    if (turn != l->turn || room <= 0 || PyErr_Occurred())
        return PyErr_Occurred() ? -1 : 0;
    Py_INCREF(ready);
    Py_XINCREF(pair);
    int failed = 0;
    for (offset = 8; offset < end && !failed; l->turn++) {
        Py_ssize_t taken = calls_free(l->table, body + offset, end - offset);
        failed = taken <= 0;
        offset += taken;
    }
    if (!failed)
        failed = announce(l, (Stream *)connection, ready, pair);
    Py_XDECREF(pair);
    Py_DECREF(ready);
    return failed ? -1 : 1;
}

int arriving_landed(PyObject *self, Stream *s, uint64_t named, int told)
{
    Lane *l = (Lane *)self;
    if (!told || !is_one(l->ready) || !l->direct || l->queue == NULL || PyObject_Size(l->queue))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *ready = l->ready, *arriving = PyTuple_GET_ITEM(ready, ARRIVING);
    PyObject *number = PyLong_FromUnsignedLongLong(named);
    PyObject *arrival = number == NULL ? NULL : Py_XNewRef(PyDict_GetItemWithError(arriving, number));
    PyObject *target = NULL, *held = NULL, *array = NULL, *slot = NULL, *storage = NULL, *meta = NULL;
    int taken = number == NULL ? -1 : 0;
    if (arrival == NULL || !Py_IS_TYPE(arrival, (PyTypeObject *)PyTuple_GET_ITEM(ready, ARRIVAL)))
        goto over;
    target = PyObject_GetAttr(arrival, name_target);
    held = PyObject_GetAttr(self, name_held);
    meta = PyObject_GetAttr(arrival, name_meta);
    array = PyObject_GetAttr(arrival, name__array);
    slot = PyObject_GetAttr(arrival, name_slot);
    storage = PyObject_GetAttr(arrival, name_storage);
    taken = target && held && meta && array && slot && storage ? 0 : -1;
    /* One that was announced by the twin may have more to it, and its memory is to be kept. */
    if (taken || target != s->landing.place || held != Py_False || meta != PyTuple_GET_ITEM(ready, META)
        || !is_settled(PyTuple_GET_ITEM(ready, MEMORY), array) || !Py_IS_TYPE(slot, Slot_Type))
        goto over;
    PyObject *kept = PyObject_GetAttr(arrival, name_kept);
    taken = kept == NULL ? -1 : kept == Py_False;
    Py_XDECREF(kept);
    if (taken <= 0)
        goto over;
    taken = -1;
    if (PyDict_DelItem(arriving, number) < 0)
        goto over;
    slot_put(slot, array, meta, storage);
    PyObject *never = PyLong_FromLong(-1);
    if (set(self, name__owing, never) == 0)
        taken = 1;
    Py_XDECREF(never);
    l->seen = l->complete = l->seen + 1;
    l->got += HEADER + 8;
    l->unreported++;
    l->messages_received++;
    if (taken > 0 && (l->unreported >= l->ack_after || l->granted - l->got < l->low_credit)
        && tell(self, name__report_if_due, NULL) < 0)
        taken = -1;
over:
    Py_XDECREF(storage);
    Py_XDECREF(slot);
    Py_XDECREF(array);
    Py_XDECREF(meta);
    Py_XDECREF(held);
    Py_XDECREF(target);
    Py_XDECREF(arrival);
    Py_XDECREF(number);
    return PyErr_Occurred() ? -1 : taken;
}
