/* take_calls: from the bytes of a batch into the queue of a stream, and handles that are freed out of
   the table. Twin: gpuremote.server.calls. */

#include "native.h"

#define HEAD 4 /* the plan's number u32 */

/* Bytes of an operand's field, as Executable.form names it; 0: no such field. */
static Py_ssize_t width(char code)
{
    return code == 'Q' || code == 'q' || code == 'U' || code == 'd' ? 8
           : code == 'c'                                            ? 16
           : code == '?'                                            ? 1
                                                                    : 0;
}

/* Bytes of a call of that form; -1: not one that is read here. */
static Py_ssize_t extent(PyObject *form)
{
    if (!PyBytes_Check(form))
        return -1;
    Py_ssize_t total = HEAD;
    for (Py_ssize_t k = 0; k < PyBytes_GET_SIZE(form); k++) {
        Py_ssize_t bytes = width(PyBytes_AS_STRING(form)[k]);
        if (bytes == 0)
            return -1;
        total += bytes;
    }
    return total;
}

/* The slot of a handle. */
static PyObject *named(PyObject *session, PyObject *table, uint64_t handle)
{
    PyObject *key = PyLong_FromUnsignedLongLong(handle);
    PyObject *slot = key == NULL ? NULL : Py_XNewRef(PyDict_GetItemWithError(table, key));
    if (slot == NULL && key != NULL && !PyErr_Occurred())
        slot = PyObject_CallMethodOneArg(session, name_slot, key);
    Py_XDECREF(key);
    return slot;
}

static PyObject *value_of(char code, const char *field)
{
    uint64_t whole;
    int64_t number;
    double parts[2];
    switch (code) {
    case '?':
        return PyBool_FromLong(*field != 0);
    case 'q':
        memcpy(&number, field, 8);
        return PyLong_FromLongLong(number);
    case 'U':
        memcpy(&whole, field, 8);
        return PyLong_FromUnsignedLongLong(whole);
    case 'd':
        memcpy(parts, field, 8);
        return PyFloat_FromDouble(parts[0]);
    default:
        memcpy(parts, field, 16);
        return PyComplex_FromDoubles(parts[0], parts[1]);
    }
}

static PyObject *operands_of(PyObject *session, PyObject *table, PyObject *form, const char *field)
{
    Py_ssize_t count = PyBytes_GET_SIZE(form);
    PyObject *operands = PyList_New(count);
    if (operands == NULL)
        return NULL;
    const char *codes = PyBytes_AS_STRING(form);
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *operand;
        if (codes[k] == 'Q') {
            uint64_t handle;
            memcpy(&handle, field, 8);
            operand = named(session, table, handle);
        }
        else
            operand = value_of(codes[k], field);
        if (operand == NULL) {
            Py_DECREF(operands);
            return NULL;
        }
        PyList_SET_ITEM(operands, k, operand);
        field += width(codes[k]);
    }
    return operands;
}

/* A slot for each result, under the numbers that follow ``number``. */
static PyObject *results_of(PyObject *table, unsigned long long number, Py_ssize_t count)
{
    PyObject *outs = PyList_New(count);
    for (Py_ssize_t k = 0; outs != NULL && k < count; k++) {
        PyObject *slot = Slot_Type->tp_alloc(Slot_Type, 0);
        PyObject *key = slot == NULL ? NULL : PyLong_FromUnsignedLongLong(number + (size_t)k);
        if (key == NULL || PyDict_SetItem(table, key, slot) < 0) {
            Py_XDECREF(slot);
            Py_CLEAR(outs);
        }
        else
            PyList_SET_ITEM(outs, k, slot);
        Py_XDECREF(key);
    }
    return outs;
}

/* Append (number, run, (session, plan, operands, outs)); steals operands. */
static int enqueue(PyObject *append, unsigned long long number, PyObject *session, PyObject *plan,
                   PyObject *operands, PyObject *outs)
{
    PyObject *arguments = outs == NULL ? NULL : PyTuple_Pack(4, session, plan, operands, outs);
    PyObject *run = arguments == NULL ? NULL : PyObject_GetAttr(plan, name_run);
    PyObject *key = run == NULL ? NULL : PyLong_FromUnsignedLongLong(number);
    PyObject *item = key == NULL ? NULL : PyTuple_Pack(3, key, run, arguments);
    PyObject *done = item == NULL ? NULL : PyObject_CallOneArg(append, item);
    Py_XDECREF(done);
    Py_XDECREF(item);
    Py_XDECREF(key);
    Py_XDECREF(run);
    Py_XDECREF(arguments);
    Py_DECREF(operands);
    return done == NULL ? -1 : 0;
}

/* Bytes of a handle in a FREE or FREE_NEAR record; 0: it is another one. */
static int width_of_free(const char *record, Py_ssize_t left)
{
    uint32_t ident = 0;
    if (left >= HEAD + 12)
        memcpy(&ident, record, HEAD);
    return ident == FREE ? 4 : ident == FREE_NEAR ? 2 : 0;
}

Py_ssize_t calls_extent_of_free(const char *record, Py_ssize_t left)
{
    uint32_t count;
    uint64_t base;
    int width = width_of_free(record, left);
    if (!width)
        return 0;
    memcpy(&count, record + HEAD, 4);
    memcpy(&base, record + HEAD + 4, 8);
    Py_ssize_t size = HEAD + 12 + (Py_ssize_t)width * count;
    return count > MAX_FREES || size > left || base > UINT64_MAX - UINT32_MAX ? 0 : size;
}

Py_ssize_t calls_free(PyObject *table, const char *record, Py_ssize_t left)
{
    Py_ssize_t size = calls_extent_of_free(record, left);
    int width = width_of_free(record, left);
    uint64_t base = 0;
    if (size)
        memcpy(&base, record + HEAD + 4, 8);
    for (const char *at = record + HEAD + 12; at < record + size; at += width) {
        uint32_t offset = 0;
        memcpy(&offset, at, (size_t)width); /* the lower bytes come first */
        PyObject *key = PyLong_FromUnsignedLongLong(base + offset);
        PyObject *slot = key == NULL ? NULL : PyDict_GetItemWithError(table, key);
        int failed = slot == NULL ? PyErr_Occurred() != NULL : PyDict_DelItem(table, key) < 0;
        Py_XDECREF(key);
        if (failed)
            return -1;
    }
    return size;
}

/* One record of up to ``most`` numbers: the bytes that it takes; 0: nothing that is taken here; -1:
   error. */
static Py_ssize_t take(PyObject *session, PyObject *plans, PyObject *table, PyObject *append,
                       PyObject *arriving, const char *record, Py_ssize_t left,
                       unsigned long long *number, Py_ssize_t most)
{
    uint32_t ident;
    if (left < HEAD)
        return 0;
    memcpy(&ident, record, HEAD);
    if (ident == FREE || ident == FREE_NEAR) {
        if (most < 1 || PyDict_GET_SIZE(arriving) > 0)
            return 0;
        Py_ssize_t freed = calls_free(table, record, left);
        *number += freed > 0;
        return freed;
    }
    PyObject *key = PyLong_FromUnsignedLong(ident);
    PyObject *plan = key == NULL ? NULL : Py_XNewRef(PyDict_GetItemWithError(plans, key));
    Py_XDECREF(key);
    if (plan == NULL)
        return PyErr_Occurred() ? -1 : 0;
    Py_ssize_t taken = -1;
    PyObject *form = PyObject_GetAttr(plan, name_form);
    PyObject *results = form == NULL ? NULL : PyObject_GetAttr(plan, name_n_out);
    Py_ssize_t count = results == NULL ? -1 : PyLong_AsSsize_t(results);
    if (count < 0 && results != NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "a plan with fewer results than none");
    Py_ssize_t size = count < 0 ? -1 : extent(form);
    if (count >= 0 && (size < 0 || size > left || Py_MAX(1, count) > most))
        taken = 0;
    else if (count >= 0) {
        PyObject *operands = operands_of(session, table, form, record + HEAD);
        PyObject *outs = operands == NULL ? NULL : results_of(table, *number, count);
        if (operands != NULL && !enqueue(append, *number, session, plan, operands, outs)) {
            *number += count ? (size_t)count : 1;
            taken = size;
        }
        Py_XDECREF(outs);
    }
    Py_XDECREF(results);
    Py_XDECREF(form);
    Py_DECREF(plan);
    return taken;
}

PyObject *calls_take(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 9 || !PyDict_CheckExact(args[4]) || !PyDict_CheckExact(args[5])
        || !PyDict_CheckExact(args[8])) {
        PyErr_SetString(PyExc_TypeError, "take_calls() takes session, body, offset, number, plans, "
                                         "table, queue, most and arriving");
        return NULL;
    }
    Py_ssize_t offset = PyLong_AsSsize_t(args[2]);
    unsigned long long number = PyLong_AsUnsignedLongLong(args[3]), first = number;
    Py_ssize_t most = PyErr_Occurred() ? -1 : PyLong_AsSsize_t(args[7]);
    Py_buffer body;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &body, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *append = PyObject_GetAttr(args[6], name_append);
    Py_ssize_t taken = append == NULL || offset < 0 ? -1 : 1;
    while (taken > 0) {
        taken = take(args[0], args[4], args[5], append, args[8], (const char *)body.buf + offset,
                     body.len - offset, &number, most - (Py_ssize_t)(number - first));
        if (taken > 0)
            offset += taken;
    }
    Py_XDECREF(append);
    PyBuffer_Release(&body);
    if (taken < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "an offset below 0");
        return NULL;
    }
    return Py_BuildValue("nK", offset, number);
}
