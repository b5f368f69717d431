/* run_plan: one call of a plan that makes one new array of a known shape. Twin:
   gpuremote.server.execute, which every other call is left to. Where an operand has the shape and
   dtype of an elementwise result and nothing can name it any more, the result is put in its place,
   as NumPy does with the temporary values of an expression: that spares memory, and a quarter of
   the time of an addition. The twin does not.

   Single: the function of a plan whose kernel's result is the plan's. Twin:
   gpuremote.backend.array_namespace. */

#include "native.h"

typedef struct {
    PyObject_HEAD
    PyObject *kernel;
    int elementwise; /* it takes ``out``, which may be an operand */
} Single;

PyTypeObject *Single_Type;

static PyObject *single_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *kernel;
    int elementwise;
    if (!PyArg_ParseTuple(args, "Op", &kernel, &elementwise))
        return NULL;
    Single *single = (Single *)type->tp_alloc(type, 0);
    if (single != NULL) {
        single->kernel = Py_NewRef(kernel);
        single->elementwise = elementwise;
    }
    return (PyObject *)single;
}

static PyObject *single_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    PyObject *values;
    if (!PyArg_ParseTuple(args, "O", &values))
        return NULL;
    PyObject *list = PySequence_Fast(values, "values are a sequence");
    PyObject *result = list == NULL ? NULL
                                    : PyObject_Vectorcall(((Single *)self)->kernel,
                                                          PySequence_Fast_ITEMS(list),
                                                          (size_t)PySequence_Fast_GET_SIZE(list),
                                                          NULL);
    PyObject *results = result == NULL ? NULL : PyTuple_Pack(1, result);
    Py_XDECREF(result);
    Py_XDECREF(list);
    return results;
}

static int single_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Single *)self)->kernel);
    return 0;
}

static int single_clear(PyObject *self)
{
    Py_CLEAR(((Single *)self)->kernel);
    return 0;
}

static void single_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    single_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef single_members[] = {
    {"kernel", T_OBJECT, offsetof(Single, kernel), READONLY, NULL},
    {"elementwise", T_INT, offsetof(Single, elementwise), READONLY, NULL},
    {NULL},
};

static PyType_Slot single_slots[] = {
    {Py_tp_doc, "The function of a plan with one result, which its kernel gives."},
    {Py_tp_new, single_new},
    {Py_tp_call, single_call},
    {Py_tp_members, single_members},
    {Py_tp_dealloc, single_dealloc},
    {Py_tp_traverse, single_traverse},
    {Py_tp_clear, single_clear},
    {0, NULL},
};

PyType_Spec single_spec = {
    "gpuremote._native.Single",
    sizeof(Single),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    single_slots,
};

/* Operands of a call that is run here. */
#define MOST 8
/* Bytes from which on a result is put in the place of an operand: less is in the cache anyway. */
#define WORTHWHILE (32 << 10)

typedef struct {
    Py_ssize_t count;
    PyObject *items[MOST + 1];
} Values;

static void let_go(Values *values)
{
    while (values->count > 0)
        Py_DECREF(values->items[--values->count]);
}

/* Whether each operand is there, and is what the plan was made for; its values then. 0: Python has
   to look. -1: error. */
static int values_of(PyObject *op, PyObject *operands, Values *values)
{
    Py_ssize_t count = PyList_GET_SIZE(operands);
    PyObject *checks = PyObject_GetAttr(op, name_checks);
    int fits = checks == NULL ? -1 : PyList_Check(checks) && count <= MOST;
    for (Py_ssize_t k = 0; fits > 0 && k < PyList_GET_SIZE(checks); k++) {
        PyObject *check = PyList_GET_ITEM(checks, k); /* (position, meta) */
        Py_ssize_t position = PyLong_AsSsize_t(PyTuple_GET_ITEM(check, 0));
        fits = position >= 0 && position < count
               && slot_meta(PyList_GET_ITEM(operands, position)) == PyTuple_GET_ITEM(check, 1);
    }
    Py_XDECREF(checks);
    for (Py_ssize_t k = 0; fits > 0 && k < count; k++) {
        PyObject *value = PyList_GET_ITEM(operands, k);
        if (Py_IS_TYPE(value, Slot_Type))
            value = slot_value(value);
        fits = value != NULL && value != Py_None;
        /* Its own reference: another stream may take the value from the slot meanwhile. */
        if (fits)
            values->items[values->count++] = Py_NewRef(value);
    }
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

/* What the function of a plan with one result gives. */
static PyObject *result_of(PyObject *function, Values *values)
{
    if (Py_IS_TYPE(function, Single_Type))
        return PyObject_Vectorcall(((Single *)function)->kernel, values->items,
                                   (size_t)values->count, NULL);
    PyObject *list = PyList_New(values->count), *result = NULL;
    for (Py_ssize_t k = 0; list != NULL && k < values->count; k++)
        PyList_SET_ITEM(list, k, Py_NewRef(values->items[k]));
    PyObject *results = list == NULL ? NULL : PyObject_CallOneArg(function, list);
    if (results != NULL && (!PyTuple_Check(results) || PyTuple_GET_SIZE(results) != 1))
        PyErr_SetString(PyExc_ValueError, "a plan of one result has to give a tuple of one");
    else if (results != NULL)
        result = Py_NewRef(PyTuple_GET_ITEM(results, 0));
    Py_XDECREF(results);
    Py_XDECREF(list);
    return result;
}

/* Whether nothing can name an operand after this call, and its memory is its own and such as the
   result's: then the result may be put there. -1: error. */
static int is_spent(PyObject *operands, Py_ssize_t position, PyObject *meta, PyObject *nbytes)
{
    PyObject *slot = PyList_GET_ITEM(operands, position);
    Py_ssize_t uses = 0;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(operands); k++)
        uses += PyList_GET_ITEM(operands, k) == slot;
    PyObject *value = slot_value(slot);
    /* Its value is held by the slot, and for each use by this call. */
    if (slot_meta(slot) != meta || value == NULL || Py_REFCNT(slot) != uses
        || Py_REFCNT(value) != 1 + uses)
        return 0;
    int spent = storage_is_free(slot_storage(slot), nbytes);
    if (spent <= 0)
        return spent;
    PyObject *base = PyObject_GetAttr(value, name_base);
    if (base == NULL)
        return -1;
    Py_DECREF(base);
    Py_buffer memory;
    /* Not what came from elsewhere: a client may look at what it has given away. */
    if (base != Py_None)
        return 0;
    if (PyObject_GetBuffer(value, &memory, PyBUF_CONTIG) < 0) {
        PyErr_Clear();
        return 0;
    }
    PyBuffer_Release(&memory);
    return 1;
}

/* The result in the place of an operand that is no longer needed: 1; 0: there is none; -1: error. */
static int make_in_place(PyObject *function, PyObject *operands, PyObject *meta, PyObject *nbytes,
                         Values *values, PyObject *slot)
{
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(operands); k++) {
        int spent = is_spent(operands, k, meta, nbytes);
        if (spent < 0)
            return -1;
        if (!spent)
            continue;
        PyObject *place = values->items[values->count] = values->items[k];
        PyObject *names = PyTuple_Pack(1, name_out);
        PyObject *result = names == NULL ? NULL
                                         : PyObject_Vectorcall(((Single *)function)->kernel,
                                                               values->items,
                                                               (size_t)values->count, names);
        Py_XDECREF(names);
        if (result == NULL)
            return -1;
        Py_DECREF(result);
        slot_put(slot, place, meta, slot_storage(PyList_GET_ITEM(operands, k)));
        return 1;
    }
    return 0;
}

/* Memory counted, the function called, and the result put into its slot. */
static int make(PyObject *session, PyObject *op, PyObject *meta, PyObject *operands,
                Values *values, PyObject *slot)
{
    int done = -1;
    PyObject *quota = NULL, *storage = NULL, *result = NULL;
    PyObject *nbytes = PyObject_GetAttr(meta, name_nbytes);
    PyObject *function = nbytes == NULL ? NULL : PyObject_GetAttr(op, name_function);
    if (function != NULL) {
        int tries = Py_IS_TYPE(function, Single_Type) && ((Single *)function)->elementwise
                    && PyLong_AsSsize_t(nbytes) >= WORTHWHILE;
        if (PyErr_Occurred())
            PyErr_Clear(); /* a number beyond all memory: it will not fit */
        done = tries ? make_in_place(function, operands, meta, nbytes, values, slot) : 0;
    }
    if (done == 0) {
        done = -1;
        /* Counted before it is allocated; given back by the storage's end, also if the op fails. */
        quota = PyObject_GetAttr(session, name_quota);
        storage = quota == NULL ? NULL : storage_make(quota, nbytes);
        result = storage == NULL ? NULL : result_of(function, values);
        if (result != NULL && is_right(op, result, meta) == 0) {
            slot_put(slot, result, meta, storage);
            done = 1;
        }
    }
    Py_XDECREF(result);
    Py_XDECREF(storage);
    Py_XDECREF(quota);
    Py_XDECREF(function);
    Py_XDECREF(nbytes);
    return done < 0 ? -1 : 0;
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
    Values values = {0};
    PyObject *simple = PyObject_GetAttr(op, name_simple);
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
        int failed = make(session, op, simple, operands, &values,
                          PyList_GET_ITEM(outs, 0));
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
    let_go(&values);
    Py_XDECREF(scratch);
    Py_XDECREF(simple);
    return answer;
}

/* run_calls(queue, waiting): run the items at the head of a queue that are calls of run_plan, up to
   AT_ONCE of them, as long as nobody waits for a result. Twin: gpuremote.server.streams. */
#define AT_ONCE 256

PyObject *execute_run_calls(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyDict_CheckExact(args[1])) {
        PyErr_SetString(PyExc_TypeError, "run_calls() takes queue and waiting");
        return NULL;
    }
    PyObject *queue = args[0], *waiting = args[1];
    for (int k = 0; k < AT_ONCE && PyDict_GET_SIZE(waiting) == 0; k++) {
        Py_ssize_t length = PyObject_Size(queue);
        PyObject *item = length > 0 ? PySequence_GetItem(queue, 0) : NULL;
        if (item == NULL) {
            if (length)
                return NULL;
            break;
        }
        PyObject *function = PyTuple_GET_ITEM(item, 1), *arguments = PyTuple_GET_ITEM(item, 2);
        if (!PyCFunction_Check(function)
            || PyCFunction_GET_FUNCTION(function) != (PyCFunction)(void (*)(void))execute_run_plan) {
            Py_DECREF(item);
            break;
        }
        PyObject *call[5] = {PyTuple_GET_ITEM(item, 0)};
        for (Py_ssize_t n = 0; n < 4; n++)
            call[n + 1] = PyTuple_GET_ITEM(arguments, n);
        PyObject *missing = execute_run_plan(NULL, call, 5);
        if (missing != Py_None) {
            Py_DECREF(item);
            Py_XDECREF(missing);
            if (missing == NULL)
                return NULL;
            break; /* Python asks again, and sees to it */
        }
        Py_DECREF(missing);
        int left = tell(queue, name_popleft, NULL);
        Py_DECREF(item);
        if (left < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}
