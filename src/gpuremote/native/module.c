/* The module gpuremote._native. */

#include "native.h"

#define DEFINE(name) PyObject *name_##name;
NAMES(DEFINE)

int tell(PyObject *object, PyObject *name, ...)
{
    PyObject *arguments[5] = {object};
    size_t count = 1;
    va_list list;
    va_start(list, name);
    while (count < 5 && (arguments[count] = va_arg(list, PyObject *)) != NULL)
        count++;
    va_end(list);
    PyObject *answer = PyObject_VectorcallMethod(name, arguments, count, NULL);
    Py_XDECREF(answer);
    return answer == NULL ? -1 : 0;
}

PyObject *fitting(PyObject *out, PyObject *type, PyObject *wanted_shape, PyObject *wanted_dtype)
{
    PyObject *view = NULL;
    if (!Py_IS_TYPE(out, (PyTypeObject *)type))
        Py_RETURN_NONE;
    PyObject *shape = PyObject_GetAttr(out, name_shape);
    PyObject *dtype = shape == NULL ? NULL : PyObject_GetAttr(out, name_dtype);
    int same = dtype == NULL ? -1 : PyObject_RichCompareBool(shape, wanted_shape, Py_EQ);
    if (same > 0)
        same = PyObject_RichCompareBool(dtype, wanted_dtype, Py_EQ);
    if (same > 0)
        view = PyMemoryView_FromObject(out);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    if (same < 0 || (same && view == NULL))
        return NULL;
    if (same) {
        Py_buffer *buffer = PyMemoryView_GET_BUFFER(view);
        if (buffer->len && !buffer->readonly && PyBuffer_IsContiguous(buffer, 'C'))
            return view;
        Py_DECREF(view);
    }
    Py_RETURN_NONE;
}

/* fits(out, array_type, shape, dtype) */
static PyObject *fits(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "fits() takes out, array_type, shape and dtype");
        return NULL;
    }
    return fitting(args[0], args[1], args[2], args[3]);
}

static PyMethodDef module_methods[] = {
    {"copy", (PyCFunction)(void (*)(void))copy_bytes, METH_FASTCALL, NULL},
    {"address", copy_address, METH_O, NULL},
    {"doze", looking_doze, METH_VARARGS, NULL},
    {"lead", (PyCFunction)(void (*)(void))follow_lead, METH_FASTCALL, NULL},
    {"follow", (PyCFunction)(void (*)(void))follow_follow, METH_FASTCALL, NULL},
    {"fits", (PyCFunction)(void (*)(void))fits, METH_FASTCALL, NULL},
    {"gather", (PyCFunction)(void (*)(void))runs_gather, METH_FASTCALL, NULL},
    {"known", (PyCFunction)(void (*)(void))recording_known, METH_FASTCALL, NULL},
    {"run_calls", (PyCFunction)(void (*)(void))execute_run_calls, METH_FASTCALL, NULL},
    {"run_plan", (PyCFunction)(void (*)(void))execute_run_plan, METH_FASTCALL, NULL},
    {"take_calls", (PyCFunction)(void (*)(void))calls_take, METH_FASTCALL, NULL},
    {NULL},
};

static int intern_names(void)
{
#define INTERN(name) \
    if ((name_##name = PyUnicode_InternFromString(#name)) == NULL) \
        return -1;
    NAMES(INTERN)
    return 0;
}

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type == NULL ? -1 : PyModule_AddType(module, *type);
}

static int module_exec(PyObject *module)
{
    if (Stream_Type != NULL) {
        PyErr_SetString(PyExc_ImportError, "gpuremote._native can be loaded once in a process");
        return -1;
    }
    return intern_names() || add_type(module, &stream_spec, &Stream_Type)
                   || add_type(module, &wait_spec, &Wait_Type)
                   || add_type(module, &lane_spec, &Lane_Type)
                   || add_type(module, &slot_spec, &Slot_Type)
                   || add_type(module, &tally_spec, &Tally_Type)
                   || add_type(module, &storage_spec, &Storage_Type)
                   || add_type(module, &single_spec, &Single_Type)
                   || add_type(module, &handle_spec, &Handle_Type)
                   || add_type(module, &recorder_spec, &Recorder_Type)
                   || add_type(module, &loops_spec, &Loops_Type)
                   || add_type(module, &repeats_spec, &Repeats_Type)
                   || add_type(module, &segment_spec, &Segment_Type)
                   || add_type(module, &shelf_spec, &Shelf_Type)
                   || add_type(module, &block_spec, &Block_Type)
               ? -1
               : 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    "gpuremote._native",
    "What every small message goes through, in C.",
    0,
    module_methods,
    module_slots,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_def);
}
