/* Tally, Storage: memory that is counted. Twins: gpuremote.server.storage. */

#include "native.h"

typedef struct {
    PyObject_HEAD
    long long limit, used, peak;
} Tally;

typedef struct {
    PyObject_HEAD
    PyObject *quota;
    long long nbytes, outgoing;
} Storage;

PyTypeObject *Tally_Type, *Storage_Type;

/* Bytes as a number; what is larger counts as the largest there is. -1: error. */
static int bytes_of(PyObject *number, long long *bytes)
{
    int overflow;
    *bytes = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow > 0)
        *bytes = LLONG_MAX;
    else if (*bytes < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "fewer bytes than none");
        return -1;
    }
    return 0;
}

static int tally_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    PyObject *limit;
    return PyArg_ParseTuple(args, "O", &limit) ? bytes_of(limit, &((Tally *)self)->limit) : -1;
}

static int count(Tally *t, long long nbytes)
{
    if (nbytes > t->limit - t->used)
        return 0;
    t->used += nbytes;
    t->peak = Py_MAX(t->peak, t->used);
    return 1;
}

static PyObject *tally_count(PyObject *self, PyObject *number)
{
    long long nbytes;
    return bytes_of(number, &nbytes) < 0 ? NULL : PyBool_FromLong(count((Tally *)self, nbytes));
}

static PyObject *tally_release(PyObject *self, PyObject *number)
{
    long long nbytes;
    if (bytes_of(number, &nbytes) < 0)
        return NULL;
    ((Tally *)self)->used -= nbytes;
    Py_RETURN_NONE;
}

static PyObject *tally_get_limit(PyObject *self, void *unused)
{
    return PyLong_FromLongLong(((Tally *)self)->limit);
}

static int tally_set_limit(PyObject *self, PyObject *value, void *unused)
{
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "limit can't be deleted");
        return -1;
    }
    return bytes_of(value, &((Tally *)self)->limit);
}

static int tally_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void tally_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef tally_members[] = {
    {"used", T_LONGLONG, offsetof(Tally, used), READONLY, NULL},
    {"peak", T_LONGLONG, offsetof(Tally, peak), READONLY, NULL},
    {NULL},
};

static PyGetSetDef tally_getset[] = {
    {"limit", tally_get_limit, tally_set_limit, NULL, NULL},
    {NULL},
};

static PyMethodDef tally_methods[] = {
    {"count", tally_count, METH_O, NULL},
    {"release", tally_release, METH_O, NULL},
    {NULL},
};

static PyType_Slot tally_slots[] = {
    {Py_tp_doc, "Bytes in use, and how many there may be."},
    {Py_tp_init, tally_init},
    {Py_tp_dealloc, tally_dealloc},
    {Py_tp_traverse, tally_traverse},
    {Py_tp_members, tally_members},
    {Py_tp_getset, tally_getset},
    {Py_tp_methods, tally_methods},
    {0, NULL},
};

PyType_Spec tally_spec = {
    "gpuremote._native.Tally",
    sizeof(Tally),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    tally_slots,
};

void storage_lend(PyObject *storage, int more)
{
    ((Storage *)storage)->outgoing += more;
}

int storage_room(PyObject *quota, PyObject *number)
{
    long long nbytes;
    if (!PyObject_TypeCheck(quota, Tally_Type))
        return 0;
    if (bytes_of(number, &nbytes) < 0)
        return -1;
    return nbytes <= ((Tally *)quota)->limit - ((Tally *)quota)->used;
}

PyObject *storage_make(PyObject *quota, PyObject *number)
{
    long long nbytes;
    if (!PyObject_TypeCheck(quota, Tally_Type)) {
        PyErr_SetString(PyExc_TypeError, "a storage counts in a Quota");
        return NULL;
    }
    if (bytes_of(number, &nbytes) < 0)
        return NULL;
    /* What does not fit, after all that can be spared, raises there. */
    if (!count((Tally *)quota, nbytes) && tell(quota, name_reserve, number, NULL) < 0)
        return NULL;
    Storage *storage = (Storage *)Storage_Type->tp_alloc(Storage_Type, 0);
    if (storage == NULL) {
        ((Tally *)quota)->used -= nbytes;
        return NULL;
    }
    storage->quota = Py_NewRef(quota);
    storage->nbytes = nbytes;
    return (PyObject *)storage;
}

static PyObject *storage_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *quota, *number;
    return PyArg_ParseTuple(args, "OO", &quota, &number) ? storage_make(quota, number) : NULL;
}

int storage_is_free(PyObject *storage, PyObject *number)
{
    long long nbytes;
    if (storage == NULL || !Py_IS_TYPE(storage, Storage_Type) || Py_REFCNT(storage) != 1
        || ((Storage *)storage)->outgoing)
        return 0;
    if (bytes_of(number, &nbytes) < 0)
        return -1;
    return ((Storage *)storage)->nbytes == nbytes;
}

/* split(sizes): a storage for each of them, which its bytes go over to. */
static PyObject *storage_split(PyObject *self, PyObject *sizes)
{
    Storage *whole = (Storage *)self;
    PyObject *list = PySequence_Fast(sizes, "split() takes sizes");
    PyObject *parts = list == NULL ? NULL : PyList_New(0);
    for (Py_ssize_t k = 0; parts != NULL && k < PySequence_Fast_GET_SIZE(list); k++) {
        long long nbytes;
        Storage *part = NULL;
        if (bytes_of(PySequence_Fast_GET_ITEM(list, k), &nbytes) == 0)
            part = (Storage *)Storage_Type->tp_alloc(Storage_Type, 0);
        if (part != NULL) {
            part->quota = Py_NewRef(whole->quota);
            part->nbytes = nbytes;
            whole->nbytes -= nbytes;
        }
        if (part == NULL || PyList_Append(parts, (PyObject *)part) < 0)
            Py_CLEAR(parts);
        Py_XDECREF(part);
    }
    Py_XDECREF(list);
    return parts;
}

static int storage_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Storage *)self)->quota);
    return 0;
}

static int storage_clear(PyObject *self)
{
    Storage *s = (Storage *)self;
    if (s->quota != NULL)
        ((Tally *)s->quota)->used -= s->nbytes;
    s->nbytes = 0;
    Py_CLEAR(s->quota);
    return 0;
}

static void storage_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    storage_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef storage_members[] = {
    {"nbytes", T_LONGLONG, offsetof(Storage, nbytes), READONLY, NULL},
    {"outgoing", T_LONGLONG, offsetof(Storage, outgoing), 0, NULL},
    {NULL},
};

static PyMethodDef storage_methods[] = {
    {"split", storage_split, METH_O, NULL},
    {NULL},
};

static PyType_Slot storage_slots[] = {
    {Py_tp_doc, "One allocation, shared by an array and its views."},
    {Py_tp_new, storage_new},
    {Py_tp_dealloc, storage_dealloc},
    {Py_tp_traverse, storage_traverse},
    {Py_tp_clear, storage_clear},
    {Py_tp_members, storage_members},
    {Py_tp_methods, storage_methods},
    {0, NULL},
};

PyType_Spec storage_spec = {
    "gpuremote._native.Storage",
    sizeof(Storage),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    storage_slots,
};
