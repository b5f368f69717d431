/* run_plan: one call of a plan that makes one new array of a known shape. Twin:
   gpuremote.server.execute, which every other call is left to. */

#include "native.h"

/* Whether each operand is there, and is what the plan was made for; its values then. 0: Python has
   to look. -1: error. */
static int values_of(PyObject *op, PyObject *operands, PyObject **values)
{
    Py_ssize_t count = PyList_GET_SIZE(operands);
    PyObject *list = PyList_New(count), *checks = NULL;
    if (list == NULL)
        return -1;
    int fits = 1;
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *operand = PyList_GET_ITEM(operands, k), *value = operand;
        if (Py_IS_TYPE(operand, Slot_Type) && ((value = slot_value(operand)) == NULL || value == Py_None)) {
            fits = 0;
            value = Py_None;
        }
        PyList_SET_ITEM(list, k, Py_NewRef(value));
    }
    if (fits && ((checks = PyObject_GetAttr(op, name_checks)) == NULL || !PyList_Check(checks)))
        fits = checks == NULL ? -1 : 0;
    for (Py_ssize_t k = 0; fits > 0 && k < PyList_GET_SIZE(checks); k++) {
        PyObject *check = PyList_GET_ITEM(checks, k); /* (position, meta) */
        Py_ssize_t position = PyLong_AsSsize_t(PyTuple_GET_ITEM(check, 0));
        fits = position >= 0 && position < count
               && slot_meta(PyList_GET_ITEM(operands, position)) == PyTuple_GET_ITEM(check, 1);
    }
    Py_XDECREF(checks);
    if (fits > 0)
        *values = list;
    else
        Py_DECREF(list);
    return fits;
}

/* Whether a result is what the plan says: 1, or else what Python says of it. */
static int is_right(PyObject *op, PyObject *result, PyObject *meta)
{
    PyObject *shape = PyObject_GetAttr(result, name_shape);
    PyObject *wanted = shape == NULL ? NULL : PyObject_GetAttr(meta, name_shape);
    PyObject *dtype = wanted == NULL ? NULL : PyObject_GetAttr(result, name_dtype);
    PyObject *declared = dtype == NULL ? NULL : PyObject_GetAttr(meta, name_dtype);
    int right = declared == NULL ? -1 : PyObject_RichCompareBool(shape, wanted, Py_EQ);
    if (right >= 0 && (right == 0 || dtype != declared))
        right = tell(op, name_check_result, result, meta, NULL) < 0 ? -1 : 1;
    Py_XDECREF(shape);
    Py_XDECREF(wanted);
    Py_XDECREF(dtype);
    Py_XDECREF(declared);
    return right < 0 ? -1 : 0;
}

/* Memory counted, the function called, and the result put into its slot. */
static int make(PyObject *session, PyObject *op, PyObject *meta, PyObject *values, PyObject *slot)
{
    int failed = -1;
    /* Counted before it is allocated; given back by the storage's end, also if the op fails. */
    PyObject *quota = PyObject_GetAttr(session, name_quota);
    PyObject *nbytes = quota == NULL ? NULL : PyObject_GetAttr(meta, name_nbytes);
    PyObject *storage = nbytes == NULL ? NULL : storage_make(quota, nbytes);
    PyObject *function = storage == NULL ? NULL : PyObject_GetAttr(op, name_function);
    PyObject *results = function == NULL ? NULL : PyObject_CallOneArg(function, values);
    if (results != NULL && (!PyTuple_Check(results) || PyTuple_GET_SIZE(results) != 1))
        PyErr_SetString(PyExc_ValueError, "a plan of one result has to give a tuple of one");
    else if (results != NULL && is_right(op, PyTuple_GET_ITEM(results, 0), meta) == 0) {
        slot_put(slot, PyTuple_GET_ITEM(results, 0), meta, storage);
        failed = 0;
    }
    Py_XDECREF(results);
    Py_XDECREF(function);
    Py_XDECREF(storage);
    Py_XDECREF(nbytes);
    Py_XDECREF(quota);
    return failed;
}

static int count_op(PyObject *session)
{
    PyObject *count = PyObject_GetAttr(session, name_ops_executed);
    Py_ssize_t ops = count == NULL ? -1 : PyLong_AsSsize_t(count);
    Py_XDECREF(count);
    if (ops < 0)
        return -1;
    PyObject *more = PyLong_FromSsize_t(ops + 1);
    int failed = more == NULL ? -1 : PyObject_SetAttr(session, name_ops_executed, more);
    Py_XDECREF(more);
    return failed;
}

/* The exception that is set, as an object; it is cleared. */
static PyObject *taken_error(void)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return error;
}

PyObject *execute_run_plan(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 5 || !PyList_Check(args[3]) || !PyList_Check(args[4])) {
        PyErr_SetString(PyExc_TypeError,
                        "run_plan() takes number, session, op, operands and outs");
        return NULL;
    }
    PyObject *session = args[1], *op = args[2], *operands = args[3], *outs = args[4];
    PyObject *values = NULL, *simple = PyObject_GetAttr(op, name_simple);
    PyObject *scratch = simple == NULL ? NULL : PyObject_GetAttr(op, name_scratch);
    int fits = scratch == NULL ? -1
               : simple != Py_None && scratch == Py_None && PyList_GET_SIZE(outs) == 1
                       && Py_IS_TYPE(PyList_GET_ITEM(outs, 0), Slot_Type)
                   ? values_of(op, operands, &values)
                   : 0;
    PyObject *answer = NULL;
    if (fits == 0)
        answer = PyObject_CallMethodObjArgs(op, name_run_otherwise, args[0], session, operands,
                                            outs, NULL);
    else if (fits > 0) {
        int failed = make(session, op, simple, values, PyList_GET_ITEM(outs, 0));
        if (failed && PyErr_ExceptionMatches(PyExc_Exception)) {
            PyObject *error = taken_error();
            PyObject *told = PyObject_CallMethodObjArgs(op, name_failed, args[0], session,
                                                        operands, outs, error, NULL);
            failed = told == NULL ? -1 : 0;
            Py_XDECREF(told);
            Py_XDECREF(error);
        }
        if (!failed && count_op(session) == 0)
            answer = Py_NewRef(Py_None);
    }
    Py_XDECREF(values);
    Py_XDECREF(scratch);
    Py_XDECREF(simple);
    return answer;
}
