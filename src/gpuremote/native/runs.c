/* gather: which calls at the head of a queue can run as one. Twin: gpuremote.server.runs. */

#include "native.h"

#define PART 3   /* as in gpuremote.server.runs */
#define LOOSE 16

/* What a run has of the calls before. */
typedef struct {
    PyObject *run, *wiring, *inputs, *numbers, *slots, *known, *written, *shared;
} Run;

static int run_open(Run *r, PyObject *run)
{
    r->run = run;
    r->wiring = PyObject_GetAttr(run, name_wiring);
    r->inputs = PyObject_GetAttr(run, name_inputs);
    r->numbers = PyObject_GetAttr(run, name_numbers);
    r->slots = PyObject_GetAttr(run, name__slots);
    r->known = PyObject_GetAttr(run, name__known);
    r->written = PyObject_GetAttr(run, name__written);
    r->shared = PyObject_GetAttr(run, name__shared);
    if (PyErr_Occurred())
        return -1;
    if (!PyList_CheckExact(r->wiring) || !PyList_CheckExact(r->inputs)
        || !PyList_CheckExact(r->numbers) || !PyList_CheckExact(r->slots)
        || !PyDict_CheckExact(r->known) || !PySet_Check(r->written)) {
        PyErr_SetString(PyExc_TypeError, "gather() takes a run");
        return -1;
    }
    return 0;
}

static void run_close(Run *r)
{
    Py_XDECREF(r->wiring);
    Py_XDECREF(r->inputs);
    Py_XDECREF(r->numbers);
    Py_XDECREF(r->slots);
    Py_XDECREF(r->known);
    Py_XDECREF(r->written);
    Py_XDECREF(r->shared);
}

/* Whether the attribute is this very object, or equal to it: -1: error. */
static int has(PyObject *object, PyObject *name, PyObject *wanted)
{
    PyObject *found = PyObject_GetAttr(object, name);
    int same = found == NULL ? -1 : found == wanted;
    if (!same)
        same = PyObject_RichCompareBool(found, wanted, Py_EQ);
    Py_XDECREF(found);
    return same;
}

/* How the call refers to an operand that is an array: 1: *ref is it, and *linked set if a call of
   this run makes it; 0: the call can't be in this run; -1: error. */
static int refer(Run *r, PyObject *operand, PyObject *expected, PyObject **ref, int *linked)
{
    PyObject *key = PyLong_FromVoidPtr(operand);
    if (key == NULL)
        return -1;
    *ref = Py_XNewRef(PyDict_GetItemWithError(r->known, key));
    Py_DECREF(key);
    if (*ref == NULL) {
        if (PyErr_Occurred())
            return -1;
        *ref = PyObject_CallMethodObjArgs(r->run, name__input, operand, expected, NULL);
        return *ref == NULL ? -1 : *ref != Py_None;
    }
    long at = PyLong_AsLong(*ref);
    if (at == -1 && PyErr_Occurred())
        return -1;
    if (at < 0)
        return slot_meta(operand) == expected;
    PyObject *before = at < PyList_GET_SIZE(r->wiring) ? PyList_GET_ITEM(r->wiring, at) : NULL;
    if (before == NULL || !PyTuple_CheckExact(before) || PyTuple_GET_SIZE(before) != 2) {
        PyErr_SetString(PyExc_TypeError, "a run's wiring has pairs");
        return -1;
    }
    PyObject *result = PyObject_GetAttr(PyTuple_GET_ITEM(before, 0), name_result);
    Py_XDECREF(result); /* the op keeps it */
    *linked = 1;
    return result == NULL ? -1 : result == expected;
}

/* The refs of a call, as a tuple in *refs. As refer. */
static int refer_all(Run *r, PyObject *op, PyObject *operands, PyObject **refs, int *linked)
{
    PyObject *expected = PyObject_GetAttr(op, name_expected);
    if (expected == NULL)
        return -1;
    int good = 1;
    Py_ssize_t count = PyTuple_CheckExact(expected) ? PyTuple_GET_SIZE(expected) : -1;
    if (count < 0 || !PyList_CheckExact(operands) || PyList_GET_SIZE(operands) != count) {
        PyErr_SetString(PyExc_TypeError, "a call has as many operands as its op");
        good = -1;
    }
    *refs = good < 0 ? NULL : PyTuple_New(count);
    if (*refs == NULL)
        good = -1;
    for (Py_ssize_t k = 0; good > 0 && k < count; k++) {
        PyObject *operand = PyList_GET_ITEM(operands, k), *ref = NULL;
        if (PyTuple_GET_ITEM(expected, k) == Py_None) {
            if (PyList_Append(r->inputs, operand) < 0
                || (ref = PyLong_FromSsize_t(-PyList_GET_SIZE(r->inputs))) == NULL)
                good = -1;
        }
        else
            good = refer(r, operand, PyTuple_GET_ITEM(expected, k), &ref, linked);
        if (ref != NULL)
            PyTuple_SET_ITEM(*refs, k, ref);
    }
    Py_DECREF(expected);
    return good;
}

/* Whether the run's rules admit a call that writes in place or can fail, and what the run writes
   to. As refer. */
static int admitted(Run *r, PyObject *op, PyObject *operands, PyObject *refs, int *linked)
{
    PyObject *special = PyObject_GetAttr(op, name_special);
    int good = special == NULL ? -1 : 1;
    if (special == Py_True) {
        PyObject *answer = NULL;
        if (PyList_GET_SIZE(operands) && PyTuple_GET_SIZE(refs))
            answer = PyObject_CallMethodObjArgs(r->run, name__admits, op,
                                                PyList_GET_ITEM(operands, 0),
                                                PyTuple_GET_ITEM(refs, 0), NULL);
        else
            PyErr_SetString(PyExc_TypeError, "an op that writes in place has an operand");
        good = answer == NULL ? -1 : answer == Py_True;
        Py_XDECREF(answer);
    }
    Py_XDECREF(special);
    if (good > 0 && PySet_GET_SIZE(r->written)) {
        PyObject *apart = PyObject_CallMethodOneArg(r->written, name_isdisjoint, r->shared);
        good = apart == NULL ? -1 : apart == Py_True;
        Py_XDECREF(apart);
        *linked = 1;
    }
    return good;
}

/* Enter a call, as the next. -1: error. */
static int enter(Run *r, PyObject *number, PyObject *op, PyObject *refs, PyObject *outs)
{
    PyObject *slot = PyList_CheckExact(outs) && PyList_GET_SIZE(outs) ? PyList_GET_ITEM(outs, 0)
                                                                      : Py_None;
    int failed = 0;
    if (slot != Py_None) {
        PyObject *key = PyLong_FromVoidPtr(slot);
        PyObject *at = key == NULL ? NULL : PyLong_FromSsize_t(PyList_GET_SIZE(r->wiring));
        failed = at == NULL ? -1 : PyDict_SetItem(r->known, key, at);
        Py_XDECREF(at);
        Py_XDECREF(key);
    }
    PyObject *pair = failed ? NULL : PyTuple_Pack(2, op, refs);
    if (pair == NULL || PyList_Append(r->numbers, number) < 0
        || PyList_Append(r->wiring, pair) < 0 || PyList_Append(r->slots, slot) < 0)
        failed = -1;
    Py_XDECREF(pair);
    return failed;
}

/* Look at one item of the queue. As refer; then it has been entered. */
static int look(Run *r, PyObject *item, PyObject *function, PyObject *shape, PyObject *device,
                int *linked)
{
    PyObject *arguments = PyTuple_CheckExact(item) && PyTuple_GET_SIZE(item) == 3
                              ? PyTuple_GET_ITEM(item, 2)
                              : NULL;
    if (arguments == NULL || PyTuple_GET_ITEM(item, 1) != function)
        return 0;
    if (!PyTuple_CheckExact(arguments) || PyTuple_GET_SIZE(arguments) != 4) {
        PyErr_SetString(PyExc_TypeError, "a call has four arguments");
        return -1;
    }
    PyObject *op = PyTuple_GET_ITEM(arguments, 1), *operands = PyTuple_GET_ITEM(arguments, 2);
    PyObject *refs = NULL;
    int good = has(op, name_shape, shape);
    if (good > 0)
        good = has(op, name_device, device);
    if (good > 0)
        good = refer_all(r, op, operands, &refs, linked);
    if (good > 0)
        good = admitted(r, op, operands, refs, linked);
    if (good > 0 && enter(r, PyTuple_GET_ITEM(item, 0), op, refs, PyTuple_GET_ITEM(arguments, 3)))
        good = -1;
    Py_XDECREF(refs);
    return good;
}

PyObject *runs_gather(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError,
                        "gather() takes run, queue, function, shape, device and reach");
        return NULL;
    }
    Py_ssize_t reach = PyLong_AsSsize_t(args[5]);
    Run r;
    int good = run_open(&r, args[0]) < 0 || (reach == -1 && PyErr_Occurred()) ? -1 : 1;
    Py_ssize_t looks = 0, worth = 0, loosest = 0, loose = 0, most = 0;
    Py_ssize_t length = good < 0 ? -1 : PySequence_Size(args[1]);
    if (length < 0)
        good = -1;
    while (good > 0 && looks < reach && looks < length) {
        PyObject *item = PySequence_GetItem(args[1], looks);
        int linked = 0;
        good = item == NULL ? -1 : look(&r, item, args[2], args[3], args[4], &linked);
        Py_XDECREF(item);
        looks++;
        if (good <= 0)
            break;
        loose += linked ? -1 : 1;
        Py_ssize_t allowed = looks / PART;
        if (loose <= Py_MAX(1, allowed))
            worth = looks;
        if (loose > most) {
            most = loose;
            loosest = looks - 1;
            if (loose > LOOSE + allowed)
                break;
        }
    }
    run_close(&r);
    return good < 0 ? NULL : Py_BuildValue("nnn", looks, worth, loosest);
}
