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
    return intern_names() || add_type(module, &stream_spec, &Stream_Type)
                   || add_type(module, &wait_spec, &Wait_Type)
                   || add_type(module, &lane_spec, &Lane_Type)
               ? -1
               : 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    "gpuremote._native",
    "What every small message goes through, in C.",
    0,
    NULL,
    module_slots,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_def);
}
