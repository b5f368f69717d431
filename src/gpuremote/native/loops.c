/* Loops: a chain of NumPy's own inner loops, block by block. Twin: gpuremote.backend.fused.

   A call of a ufunc costs as much as it computes in a few KiB. The loops behind it are called here
   without that, so that blocks can be small enough for the first level of the cache. They are the
   ones that the ufunc would take, so the bits are the same. */

#include "native.h"

#include <fenv.h>

#define MOST_PLACES 4096
#define COMPLEX_LONG_DOUBLE 16 /* NumPy's numbers of types: up to here none is an object */
#define HALF 23
#define IN_TURN 'm' /* a block of an array */
#define SCRATCH 'r' /* room for two blocks */
#define VALUE 'v'   /* one element */

/* numpy/ufuncobject.h and the part of PyUFuncObject that NumPy documents; it has not changed since
   1.0. What is read through it is compared with what Python tells (see readable). */
typedef void (*Loop)(char **args, const Py_ssize_t *dimensions, const Py_ssize_t *strides,
                     void *data);
typedef struct {
    PyObject_HEAD
    int nin, nout, nargs, identity;
    Loop *functions;
    void *const *data;
    int ntypes, reserved;
    const char *name, *types;
} UFunc;

typedef struct {
    Loop loop;
    void *data;
    int count; /* of operands, the result included */
    int places[3];
} Step;

typedef struct {
    PyObject_HEAD
    Step *steps;
    char *written; /* for each place whether a step writes to it */
    Py_ssize_t count, places, itemsize;
} Loops;

PyTypeObject *Loops_Type;

static int tells(PyObject *ufunc, const char *name, long wanted)
{
    PyObject *value = PyObject_GetAttrString(ufunc, name);
    long found = value == NULL ? -1 : PyLong_AsLong(value);
    Py_XDECREF(value);
    if (PyErr_Occurred())
        PyErr_Clear();
    return found == wanted;
}

/* Whether it is a ufunc of a NumPy whose ufuncs are what we take them for. */
static int readable(PyObject *ufunc)
{
    UFunc *u = (UFunc *)ufunc;
    return strcmp(Py_TYPE(ufunc)->tp_name, "numpy.ufunc") == 0
           && Py_TYPE(ufunc)->tp_basicsize >= (Py_ssize_t)sizeof(UFunc)
           && tells(ufunc, "nin", u->nin) && tells(ufunc, "nout", u->nout)
           && tells(ufunc, "nargs", u->nargs) && tells(ufunc, "ntypes", u->ntypes);
}

/* The loop for operands and a result of one type. -1: there is none. */
static int find_loop(Step *step, PyObject *ufunc, int type)
{
    UFunc *u = (UFunc *)ufunc;
    if (!readable(ufunc) || u->nout != 1 || u->nargs != step->count)
        return -1;
    for (int k = 0; k < u->ntypes; k++) {
        int same = 1;
        for (int arg = 0; arg < u->nargs; arg++)
            same &= u->types[k * u->nargs + arg] == type;
        if (same && u->functions[k] != NULL) {
            step->loop = u->functions[k];
            step->data = u->data == NULL ? NULL : u->data[k];
            return 0;
        }
    }
    return -1;
}

/* One of (ufunc, place, place or None, place of the result). */
static int read_step(Loops *l, Step *step, PyObject *item, int type)
{
    PyObject *ufunc, *second;
    int first, out;
    long middle;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a step is a tuple");
        return -1;
    }
    if (!PyArg_ParseTuple(item, "OiOi", &ufunc, &first, &second, &out))
        return -1;
    middle = second == Py_None ? out : PyLong_AsLong(second);
    if (PyErr_Occurred())
        return -1;
    if (first < 0 || first >= l->places || middle < 0 || middle >= l->places || out < 0
        || out >= l->places) {
        PyErr_SetString(PyExc_IndexError, "a place that there is not");
        return -1;
    }
    step->count = second == Py_None ? 2 : 3;
    step->places[0] = first;
    step->places[1] = (int)middle;
    step->places[2] = out;
    if (find_loop(step, ufunc, type) < 0) {
        PyErr_SetString(PyExc_LookupError, "no loop of NumPy's for that");
        return -1;
    }
    l->written[out] = 1;
    return 0;
}

/* Loops(steps, places, type, itemsize) */
static int loops_init(PyObject *self, PyObject *args, PyObject *names)
{
    Loops *l = (Loops *)self;
    PyObject *steps;
    int type;
    if (l->steps != NULL) {
        PyErr_SetString(PyExc_TypeError, "a chain is made once");
        return -1;
    }
    Py_ssize_t places, itemsize;
    if (!PyArg_ParseTuple(args, "O!nin", &PyList_Type, &steps, &places, &type, &itemsize))
        return -1;
    Py_ssize_t count = PyList_GET_SIZE(steps);
    if (places < 1 || places > MOST_PLACES || itemsize < 1) {
        PyErr_SetString(PyExc_LookupError, "too many places");
        return -1;
    }
    if (type < 0 || (type > COMPLEX_LONG_DOUBLE && type != HALF)) {
        PyErr_SetString(PyExc_LookupError, "no loop of NumPy's for that"); /* objects */
        return -1;
    }
    l->steps = PyMem_Calloc((size_t)count + 1, sizeof(Step));
    l->written = PyMem_Calloc((size_t)places, 1);
    if (l->steps == NULL || l->written == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    l->places = places;
    l->itemsize = itemsize;
    for (Py_ssize_t k = 0; k < count; k++)
        if (read_step(l, &l->steps[k], PyList_GET_ITEM(steps, k), type) < 0)
            return -1;
    l->count = count;
    return 0;
}

static void loops_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyMem_Free(((Loops *)self)->steps);
    PyMem_Free(((Loops *)self)->written);
    type->tp_free(self);
    Py_DECREF(type);
}

static void run(const Loops *l, const Py_buffer *at, const char *kinds, Py_ssize_t size,
                Py_ssize_t block)
{
    Py_ssize_t length;
    for (Py_ssize_t start = 0; start < size; start += length) {
        length = size - start < 2 * block ? size - start : block;
        for (Py_ssize_t k = 0; k < l->count; k++) {
            const Step *step = &l->steps[k];
            char *args[3];
            Py_ssize_t strides[3];
            for (int arg = 0; arg < 3; arg++) {
                int place = step->places[arg];
                args[arg] = at[place].buf;
                if (kinds[place] == IN_TURN)
                    args[arg] += start * l->itemsize;
                strides[arg] = kinds[place] == VALUE ? 0 : l->itemsize;
            }
            step->loop(args, &length, strides, step->data);
        }
    }
}

/* Whether the memory holds what its place has to hold. */
static int holds(const Loops *l, Py_ssize_t place, Py_ssize_t nbytes, char kind, Py_ssize_t size,
                 Py_ssize_t block)
{
    Py_ssize_t elements = kind == IN_TURN ? size : kind == SCRATCH ? Py_MIN(2 * block, size) : 1;
    return (kind == IN_TURN || kind == SCRATCH || (kind == VALUE && !l->written[place]))
           && nbytes / l->itemsize >= elements;
}

/* run(arrays, kinds, size, block): arrays and what kinds (bytes) says of each, by place; the last
   block is what is left, less than two. False: nothing was done, as one does not lie where a loop
   can read it. */
static PyObject *loops_run(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Loops *l = (Loops *)self;
    Py_ssize_t size = count == 4 ? PyLong_AsSsize_t(args[2]) : -1;
    Py_ssize_t block = count == 4 ? PyLong_AsSsize_t(args[3]) : -1;
    if (PyErr_Occurred())
        return NULL;
    if (size < 0 || block < 1 || block > PY_SSIZE_T_MAX / 2 || !PyList_CheckExact(args[0])
        || !PyBytes_Check(args[1]) || l->places < 1 || PyList_GET_SIZE(args[0]) != l->places
        || PyBytes_GET_SIZE(args[1]) != l->places) {
        PyErr_SetString(PyExc_TypeError, "run() takes arrays, kinds, size and block");
        return NULL;
    }
    const char *kinds = PyBytes_AS_STRING(args[1]);
    Py_buffer *at = PyMem_Calloc((size_t)l->places, sizeof(Py_buffer));
    if (at == NULL)
        return PyErr_NoMemory();
    Py_ssize_t open = 0;
    int aligned = 1;
    while (open < l->places) {
        int flags = l->written[open] ? PyBUF_SIMPLE | PyBUF_WRITABLE : PyBUF_SIMPLE;
        if (PyObject_GetBuffer(PyList_GET_ITEM(args[0], open), &at[open], flags) < 0)
            break;
        if (!holds(l, open, at[open].len, kinds[open], size, block))
            PyErr_SetString(PyExc_ValueError, "too little memory for a place");
        aligned &= (uintptr_t)at[open].buf % (size_t)l->itemsize == 0;
        open++;
        if (PyErr_Occurred())
            break;
    }
    if (aligned && !PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS
        run(l, at, kinds, size, block);
        feclearexcept(FE_ALL_EXCEPT); /* nobody is told of them here, as by the ufunc */
        Py_END_ALLOW_THREADS
    }
    while (open > 0)
        PyBuffer_Release(&at[--open]);
    PyMem_Free(at);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(aligned);
}

static PyMethodDef loops_methods[] = {
    {"run", (PyCFunction)(void (*)(void))loops_run, METH_FASTCALL, NULL},
    {NULL},
};

static PyType_Slot loops_slots[] = {
    {Py_tp_doc, "A chain of NumPy's inner loops."},
    {Py_tp_dealloc, loops_dealloc},
    {Py_tp_init, loops_init},
    {Py_tp_methods, loops_methods},
    {0, NULL},
};

PyType_Spec loops_spec = {
    "gpuremote._native.Loops",
    sizeof(Loops),
    0,
    Py_TPFLAGS_DEFAULT,
    loops_slots,
};
