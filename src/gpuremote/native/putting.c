/* Recorder.put_at_hand: an upload for which a block of shared memory is at hand, or of what lies in
   one already, or over a socket within this host, in one step. What was copied just now has pushed
   the code of the program's next steps out of the caches, so each of them takes several times as
   long there as elsewhere. */

#include "native.h"

/* client.uploading: STAGED, STAGED_BYTES, MOST_STAGED, ALMOST_FULL. */
#define STAGED 8
#define STAGED_BYTES ((Py_ssize_t)64 << 20)
#define MOST_STAGED (8 * STAGED)
#define RESERVE 1024
#define MAX_BULK 1024 /* wire.caps */
/* client.blocking_driver: uploads that nothing was heard of, before it is looked for that. */
#define RECEIPTS 1

/* Messages with payload that the other end has not got completely. */
static Py_ssize_t unheard(Recorder *r)
{
    if (r->lane == NULL || !PyObject_TypeCheck(r->lane, Lane_Type))
        return PY_SSIZE_T_MAX;
    PyObject *bulk = ((Lane *)r->lane)->bulk;
    return bulk == NULL || !PyDict_CheckExact(bulk) ? PY_SSIZE_T_MAX : PyDict_GET_SIZE(bulk);
}

/* Whether the memory of an array is its own, or that of one that it is a view of: it is not
   session.empty's then. -1: error. */
static int is_of_arrays(PyObject *array)
{
    PyObject *base = PyObject_GetAttr(array, name_base);
    if (base != NULL && Py_IS_TYPE(base, Py_TYPE(array)))
        Py_SETREF(base, PyObject_GetAttr(base, name_base));
    Py_XDECREF(base);
    return base == NULL ? -1 : base == Py_None;
}

/* What Uploader.note_kind has noted of such arrays: 1; 0: nothing, or its memory is another's;
   -1: error. */
static int kind_of(Recorder *r, PyObject *array, PyObject *device, PyObject **kind)
{
    int is = is_of_arrays(array);
    if (is <= 0)
        return is;
    PyObject *shape = PyObject_GetAttr(array, name_shape);
    PyObject *dtype = shape == NULL ? NULL : PyObject_GetAttr(array, name_dtype);
    PyObject *key = dtype == NULL ? NULL : PyTuple_Pack(3, shape, dtype, device);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    if (key == NULL)
        return -1;
    PyObject *found = PyDict_GetItemWithError(r->kinds, key);
    Py_DECREF(key);
    if (found == NULL || !PyTuple_CheckExact(found) || PyTuple_GET_SIZE(found) != 3
        || !PyBytes_Check(PyTuple_GET_ITEM(found, 1)))
        return PyErr_Occurred() ? -1 : 0;
    *kind = Py_NewRef(found);
    return 1;
}

/* Tell the server of what is staged if that is much without the latest one, as Uploader.allocate does,
   with the lock held. -1: error. */
static int tell_much(Recorder *r)
{
    Py_ssize_t bytes = 0;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(r->staged) - 1; k++) {
        PyObject *one = PyList_GET_ITEM(r->staged, k);
        PyObject *view = PyTuple_Check(one) && PyTuple_GET_SIZE(one) == 2 ? PyTuple_GET_ITEM(one, 1) : one;
        bytes += PyMemoryView_Check(view) ? PyMemoryView_GET_BUFFER(view)->len : 0;
    }
    return bytes >= STAGED_BYTES ? tell((PyObject *)r, name_flush, NULL) : 0;
}

/* A view of a block with the bytes of the array: 1; 0: there is none at hand; -1: error. */
static int copy_in(Recorder *r, PyObject *shelf, PyObject *array, PyObject **view)
{
    Py_buffer from;
    if (PyObject_GetBuffer(array, &from, PyBUF_C_CONTIGUOUS) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError) && !PyErr_ExceptionMatches(PyExc_BufferError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    int taken = recording_lock(r);
    if (!taken) {
        if (!r->special && PyList_GET_SIZE(r->staged) && r->buffer != NULL && PyByteArray_Check(r->buffer))
            taken = recording_free_dropped(r);
        if (!taken)
            taken = tell_much(r);
        if (!taken)
            taken = shelf_take(shelf, from.len, view);
        r->filling++;
        if (recording_let_go(r, taken < 0) < 0)
            taken = -1;
        if (taken > 0)
            copy_flat(PyMemoryView_GET_BUFFER(*view)->buf, from.buf, from.len, 1);
        r->filling--;
    }
    if (taken < 0)
        Py_CLEAR(*view);
    PyBuffer_Release(&from);
    return taken;
}

/* As Issuer._withdraw_unused, of one. */
static int withdraw_unused(Recorder *r, uint64_t ident)
{
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(r->staged); k++) {
        PyObject *one = PyList_GET_ITEM(r->staged, k);
        if (PyTuple_Check(one) && PyTuple_GET_SIZE(one) == 2
            && PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(one, 0)) == ident) {
            r->withdrawn++;
            return PyList_SetSlice(r->staged, k, k + 1, NULL);
        }
    }
    return PyErr_Occurred() ? -1 : 0;
}

int recording_free_dropped(Recorder *r)
{
    Py_ssize_t count = r->dropped == NULL ? 0 : PyObject_Size(r->dropped);
    if (count != 1)
        return count < 0 ? -1 : count ? tell((PyObject *)r, name_free_dropped, NULL) : 0;
    char record[18] = {FREE_NEAR, 0, 0, 0, 1};
    Py_ssize_t before = PyByteArray_GET_SIZE(r->buffer);
    PyObject *handle = PyObject_CallMethodNoArgs(r->dropped, name_popleft);
    uint64_t ident = handle == NULL ? 0 : PyLong_AsUnsignedLongLong(handle);
    Py_XDECREF(handle);
    if (PyErr_Occurred() || PyByteArray_Resize(r->buffer, before + (Py_ssize_t)sizeof record) < 0)
        return -1;
    memcpy(record + 8, &ident, sizeof ident);
    memcpy(PyByteArray_AS_STRING(r->buffer) + before, record, sizeof record);
    int unused = r->next == r->unused_to && !r->special;
    r->next++;
    r->freed++;
    if (unused)
        r->unused_to = r->next;
    int untold = (long long)ident >= r->unused_from && (long long)ident >= r->first;
    return unused && untold ? withdraw_unused(r, ident) : 0;
}

/* The steps of Uploader.put_staged, with the lock held: the number. 1: it has to take them itself;
   -1: error. */
static int stage_now(Recorder *r, PyObject *record, PyObject *view, Py_ssize_t most,
                     PyObject **number)
{
    static PyObject *put;
    if (put == NULL && (put = PyUnicode_InternFromString("put")) == NULL)
        return -1;
    if (r->special || !PyList_Check(r->staged) || PyList_GET_SIZE(r->staged) >= most
        || r->buffer == NULL || !PyByteArray_Check(r->buffer)
        || PyByteArray_GET_SIZE(r->buffer) + PyBytes_GET_SIZE(record) >= r->full - RESERVE)
        return 1;
    if (recording_free_dropped(r) < 0)
        return -1;
    long long due = r->flush_after;
    r->last = 0;
    r->flush_after = LLONG_MAX; /* it goes out with what comes next */
    int failed = recording_append(r, record, put, number);
    r->flush_after = due;
    PyObject *staged = failed ? NULL : PyTuple_Pack(2, *number, view);
    failed = staged == NULL ? -1 : PyList_Append(r->staged, staged);
    Py_XDECREF(staged);
    /* Whatever else was recorded before it or, by a finaliser, behind it may use what was staged. */
    long long made = failed ? 0 : PyLong_AsLongLong(*number);
    if (made != r->unused_to)
        r->unused_from = made;
    r->unused_to = r->next == made + 1 ? r->next : 0;
    if (failed && r->last) { /* Ctrl-C, in whatever is told that there are records */
        PyObject *last = PyLong_FromLongLong(r->last);
        payload_tell_anyway((PyObject *)r, name__take_back, last);
        Py_XDECREF(last);
    }
    return failed;
}

/* Upload what lies in ``view``: the array, or NULL. */
static PyObject *stage(Recorder *r, PyObject *meta, PyObject *record, PyObject *view,
                       Py_ssize_t most, PyObject *make)
{
    PyObject *number = NULL, *made = NULL;
    if (recording_lock(r) < 0)
        return NULL;
    int left = stage_now(r, record, view, most, &number);
    if (recording_let_go(r, left < 0) < 0)
        Py_CLEAR(number);
    else if (left)
        number = PyObject_CallMethodObjArgs((PyObject *)r, name_put_staged, meta, view, NULL);
    else {
        if (!r->stalled || tell((PyObject *)r, name__relieve, NULL) == 0)
            made = recording_handle(make, r, PyLong_AsLongLong(number), meta);
        if (made == NULL)
            payload_tell_anyway((PyObject *)r, name__take_back, number);
        Py_CLEAR(number);
    }
    if (number != NULL)
        made = recording_handle(make, r, PyLong_AsLongLong(number), meta);
    Py_XDECREF(number);
    return made;
}

/* Whether an array is as Uploader.note_made has noted it, over memory that is its alone. -1: error. */
static int is_made(Recorder *r, PyObject *made, PyObject *array, PyObject *type)
{
    if (!PyTuple_Check(made) || PyTuple_GET_SIZE(made) != 5
        || !PyWeakref_CheckRef(PyTuple_GET_ITEM(made, 0))
        || PyWeakref_GetObject(PyTuple_GET_ITEM(made, 0)) != array
        || PyTuple_GET_ITEM(made, 2) != ((Lane *)r->lane)->connection
        || !PyBytes_Check(PyTuple_GET_ITEM(made, 4)))
        return 0;
    PyObject *meta = PyTuple_GET_ITEM(made, 3), *view = NULL, *base = NULL;
    PyObject *shape = PyObject_GetAttr(meta, name_shape);
    PyObject *dtype = shape == NULL ? NULL : PyObject_GetAttr(meta, name_dtype);
    if (dtype != NULL)
        view = fitting(array, type, shape, dtype); /* it may have been changed since */
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    if (view != NULL)
        base = PyObject_GetAttr(array, name_base);
    int is = base == NULL ? -1 : view != Py_None && Py_REFCNT(base) == 2; /* no other array's */
    Py_XDECREF(view);
    Py_XDECREF(base);
    return is;
}

/* As Uploader.give: 1; 0: it has more steps, or that is no such array; -1: error. */
static int give(Recorder *r, PyObject *array, PyObject *type, PyObject *make, PyObject **given)
{
    PyObject *key = PyLong_FromVoidPtr(array);
    PyObject *made = key == NULL ? NULL : PyDict_GetItemWithError(r->made, key);
    int is = 0;
    if (made != NULL) {
        Py_INCREF(made);
        is = is_made(r, made, array, type);
        if (is > 0 && (PyDict_DelItem(r->made, key) < 0 || tell(array, name_setflags, Py_False, NULL) < 0))
            is = -1;
        if (is > 0) {
            *given = stage(r, PyTuple_GET_ITEM(made, 3), PyTuple_GET_ITEM(made, 4),
                           PyTuple_GET_ITEM(made, 1), MOST_STAGED, make);
            if (*given == NULL) {
                PyObject *type, *error, *traceback;
                PyErr_Fetch(&type, &error, &traceback);
                if (tell(array, name_setflags, Py_True, NULL) < 0)
                    PyErr_WriteUnraisable(array);
                PyErr_Restore(type, error, traceback);
                is = -1;
            }
        }
        Py_DECREF(made);
    }
    Py_XDECREF(key);
    return PyErr_Occurred() ? -1 : is;
}

/* put_at_hand(array, array_type, device, make, driver): a new array; None: nothing was done.
   ``driver`` waits for an upload; None: there is to be nothing to be waited for. */
PyObject *putting_put(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Recorder *r = (Recorder *)self;
    PyObject *kind, *view = NULL, *made = NULL;
    if (count != 5 || !PyType_Check(args[1]) || !PyLong_Check(args[2]) || r->acquire == NULL) {
        PyErr_SetString(PyExc_TypeError, "put_at_hand() takes an array, its type, a device, make and driver");
        return NULL;
    }
    if (r->special || !Py_IS_TYPE(args[0], (PyTypeObject *)args[1]) || r->kinds == NULL
        || !PyDict_CheckExact(r->kinds) || r->made == NULL || !PyDict_CheckExact(r->made)
        || r->staged == NULL || !PyList_Check(r->staged))
        Py_RETURN_NONE;
    Py_ssize_t unknown = unheard(r);
    if (unknown < MAX_BULK && PyDict_GET_SIZE(r->made) && !PyLong_AsLong(args[2])) {
        int given = give(r, args[0], args[1], args[3], &made);
        if (given)
            return given < 0 ? NULL : made;
    }
    if (unknown > RECEIPTS || PyList_GET_SIZE(r->staged) >= STAGED)
        Py_RETURN_NONE;
    int found = kind_of(r, args[0], args[2], &kind);
    if (found <= 0)
        return found < 0 ? NULL : Py_NewRef(Py_None);
    PyObject *way = PyTuple_GET_ITEM(kind, 2);
    found = 0;
    if (Py_IS_TYPE(way, Shelf_Type))
        found = copy_in(r, way, args[0], &view);
    else if (args[4] != Py_None)
        found = uploading_send(r, args[0], kind, args[3], args[4], &made);
    if (found > 0 && made == NULL)
        made = stage(r, PyTuple_GET_ITEM(kind, 0), PyTuple_GET_ITEM(kind, 1), view, STAGED,
                     args[3]);
    else if (!found)
        made = Py_NewRef(Py_None);
    Py_XDECREF(view);
    Py_DECREF(kind);
    return made;
}
