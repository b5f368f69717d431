// The module gpuremote_torch.

#include "tier.h"

namespace gpuremote {
namespace {

// use(open, allocate, memory, host, generator, event): functions of gpuremote.torch. Makes the device known.
PyObject* use(PyObject*, PyObject* arguments) {
  Callbacks& to = callbacks;
  if (!PyArg_ParseTuple(arguments, "OOOOOO", &to.open, &to.allocate, &to.memory, &to.host,
                        &to.generator, &to.event))
    return nullptr;
  for (PyObject* function :
       {to.open, to.allocate, to.memory, to.host, to.generator, to.event})
    Py_INCREF(function);
  register_allocator();
  register_device();
  register_attention();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"use", use, METH_VARARGS, nullptr},
    {"set_devices", set_devices, METH_O, nullptr},
    {"device", exchange_device, METH_O, nullptr},
    {"held", held, METH_O, nullptr},
    {"held_count", held_count, METH_NOARGS, nullptr},
    {"disown", disown, METH_O, nullptr},
    {"anchors", anchors, METH_O, nullptr},
    {"number_at", number_at, METH_O, nullptr},
    {"rebind", rebind, METH_VARARGS, nullptr},
    {"tensor", storage_tensor, METH_VARARGS, nullptr},
    {"generator_of", generator_of, METH_O, nullptr},
    {"register_kernels", register_kernels, METH_VARARGS, nullptr},
    {"learn", learn, METH_VARARGS, nullptr},
    {"forget_plans", forget_plans, METH_NOARGS, nullptr},
    {"counts", counts, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "gpuremote_torch", "gpuremote.torch in C++", -1, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace gpuremote

PyMODINIT_FUNC PyInit_gpuremote_torch() {
  PyObject* module = PyModule_Create(&gpuremote::definition);
  if (module != nullptr && (gpuremote::add_tape(module) < 0 || gpuremote::add_held(module) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
