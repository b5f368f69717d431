/* Slot: what a handle names on the server. Twin: gpuremote.server.storage. */

#include "native.h"

typedef struct {
    PyObject_HEAD
    PyObject *value, *storage, *meta, *failure; /* NULL stands for None */
} Slot;

PyTypeObject *Slot_Type;

static int slot_traverse(PyObject *self, visitproc visit, void *arg)
{
    Slot *s = (Slot *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(s->value);
    Py_VISIT(s->storage);
    Py_VISIT(s->meta);
    Py_VISIT(s->failure);
    return 0;
}

static int slot_clear(PyObject *self)
{
    Slot *s = (Slot *)self;
    Py_CLEAR(s->value);
    Py_CLEAR(s->storage);
    Py_CLEAR(s->meta);
    Py_CLEAR(s->failure);
    return 0;
}

static void slot_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    slot_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject *slot_value(PyObject *slot)
{
    return Py_IS_TYPE(slot, Slot_Type) ? ((Slot *)slot)->value : NULL;
}

PyObject *slot_meta(PyObject *slot)
{
    return Py_IS_TYPE(slot, Slot_Type) ? ((Slot *)slot)->meta : NULL;
}

PyObject *slot_storage(PyObject *slot)
{
    return Py_IS_TYPE(slot, Slot_Type) ? ((Slot *)slot)->storage : NULL;
}

void slot_put(PyObject *slot, PyObject *value, PyObject *meta, PyObject *storage)
{
    Slot *s = (Slot *)slot;
    Py_XSETREF(s->meta, Py_NewRef(meta));
    Py_XSETREF(s->storage, Py_NewRef(storage));
    Py_XSETREF(s->value, Py_NewRef(value));
}

static PyObject *slot_fill(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "fill() takes value, meta and storage");
        return NULL;
    }
    slot_put(self, args[0], args[1], args[2]);
    Py_RETURN_NONE;
}

static PyObject *slot_poison(PyObject *self, PyObject *failure)
{
    Slot *s = (Slot *)self;
    Py_XSETREF(s->failure, Py_NewRef(failure));
    Py_CLEAR(s->value);
    Py_CLEAR(s->storage);
    Py_RETURN_NONE;
}

static PyObject *slot_pending(PyObject *self, void *unused)
{
    Slot *s = (Slot *)self;
    return PyBool_FromLong((s->value == NULL || s->value == Py_None)
                           && (s->failure == NULL || s->failure == Py_None));
}

static PyMemberDef slot_members[] = {
    {"value", T_OBJECT, offsetof(Slot, value), 0, NULL},
    {"storage", T_OBJECT, offsetof(Slot, storage), 0, NULL},
    {"meta", T_OBJECT, offsetof(Slot, meta), 0, NULL},
    {"failure", T_OBJECT, offsetof(Slot, failure), 0, NULL},
    {NULL},
};

static PyGetSetDef slot_getset[] = {
    {"pending", slot_pending, NULL, NULL, NULL},
    {NULL},
};

static PyMethodDef slot_methods[] = {
    {"fill", (PyCFunction)(void (*)(void))slot_fill, METH_FASTCALL, NULL},
    {"poison", slot_poison, METH_O, NULL},
    {NULL},
};

static PyType_Slot slot_slots[] = {
    {Py_tp_doc, "What a handle names."},
    {Py_tp_dealloc, slot_dealloc},
    {Py_tp_traverse, slot_traverse},
    {Py_tp_clear, slot_clear},
    {Py_tp_members, slot_members},
    {Py_tp_getset, slot_getset},
    {Py_tp_methods, slot_methods},
    {0, NULL},
};

PyType_Spec slot_spec = {
    "gpuremote._native.Slot",
    sizeof(Slot),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    slot_slots,
};
