/* Wait: one answer that the program waits for. Twin: gpuremote.client.waits. */

#include "native.h"

typedef struct {
    PyObject_HEAD
    unsigned long long number;
    Py_ssize_t left;
    char posted, done, cancelled;
    PyObject *kind, *into, *value, *error, *notify, *future, *entries, *refusal;
} Wait;

PyTypeObject *Wait_Type;

static int wait_init(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"number", "kind", "into", NULL};
    Wait *w = (Wait *)self;
    PyObject *kind, *into = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "KU|O", names, &w->number, &kind, &into))
        return -1;
    Py_XSETREF(w->kind, Py_NewRef(kind));
    Py_XSETREF(w->into, into == Py_None ? NULL : Py_NewRef(into));
    return 0;
}

PyObject *wait_make(unsigned long long number, PyObject *kind, PyObject *into)
{
    Wait *w = (Wait *)Wait_Type->tp_alloc(Wait_Type, 0);
    if (w == NULL)
        return NULL;
    w->number = number;
    w->kind = Py_NewRef(kind);
    w->into = into == Py_None ? NULL : Py_NewRef(into);
    return (PyObject *)w;
}

void wait_posted(PyObject *wait, int posted)
{
    ((Wait *)wait)->posted = (char)posted;
}

static int wait_traverse(PyObject *self, visitproc visit, void *arg)
{
    Wait *w = (Wait *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(w->kind);
    Py_VISIT(w->into);
    Py_VISIT(w->value);
    Py_VISIT(w->error);
    Py_VISIT(w->notify);
    Py_VISIT(w->future);
    Py_VISIT(w->entries);
    Py_VISIT(w->refusal);
    return 0;
}

static int wait_clear(PyObject *self)
{
    Wait *w = (Wait *)self;
    Py_CLEAR(w->kind);
    Py_CLEAR(w->into);
    Py_CLEAR(w->value);
    Py_CLEAR(w->error);
    Py_CLEAR(w->notify);
    Py_CLEAR(w->future);
    Py_CLEAR(w->entries);
    Py_CLEAR(w->refusal);
    return 0;
}

static void wait_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    wait_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

Py_ssize_t wait_into(PyObject *wait)
{
    PyObject *into = ((Wait *)wait)->into;
    return into == NULL || !PyMemoryView_Check(into) ? 0 : PyMemoryView_GET_BUFFER(into)->len;
}

int wait_state(PyObject *wait)
{
    Wait *w = (Wait *)wait;
    return !w->done ? 0 : w->error == NULL || w->error == Py_None ? 1 : 2;
}

int wait_delivered(PyObject *wait)
{
    Wait *w = (Wait *)wait;
    if (--w->left || w->done)
        return 0;
    Py_XSETREF(w->error, Py_NewRef(w->refusal == NULL ? Py_None : w->refusal));
    return wait_finish(wait);
}

int wait_for_upload(PyObject *wait, PyObject *entry)
{
    Wait *w = (Wait *)wait;
    if (entry != NULL) {
        w->left++;
        return PyList_Append(w->entries, entry);
    }
    PyObject *entries = PyList_New(0);
    if (entries == NULL)
        return -1;
    Py_XSETREF(w->entries, entries);
    return 0;
}

int wait_takes(PyObject *wait, const char *data, Py_ssize_t size)
{
    Wait *w = (Wait *)wait;
    if (!Py_IS_TYPE(wait, Wait_Type) || w->cancelled || w->into == NULL
        || !PyMemoryView_Check(w->into))
        return 0;
    Py_buffer *into = PyMemoryView_GET_BUFFER(w->into);
    if (into->len != size || into->readonly || !PyBuffer_IsContiguous(into, 'C'))
        return 0;
    memcpy(into->buf, data, (size_t)size);
    return 1;
}

int wait_finish(PyObject *wait)
{
    Wait *w = (Wait *)wait;
    int failed = 0;
    if (w->done)
        return 0;
    w->done = 1;
    if (w->future != NULL && w->future != Py_None) {
        PyObject *future = Py_NewRef(w->future);
        PyObject *over = PyObject_CallMethodNoArgs(future, name_done);
        if (over == Py_False)
            failed = tell(future, name_set_result, Py_None, NULL);
        else if (over == NULL)
            failed = -1;
        Py_XDECREF(over);
        Py_DECREF(future);
    }
    else if (w->notify != NULL && w->notify != Py_None) {
        PyObject *notify = Py_NewRef(w->notify);
        PyObject *answer = PyObject_CallNoArgs(notify);
        Py_DECREF(notify);
        Py_XDECREF(answer);
        failed = answer == NULL ? -1 : 0;
    }
    return failed;
}

static PyObject *wait_finish_method(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"value", "error", NULL};
    Wait *w = (Wait *)self;
    PyObject *value = Py_None, *error = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|OO", names, &value, &error))
        return NULL;
    if (!w->done) {
        Py_XSETREF(w->value, Py_NewRef(value));
        Py_XSETREF(w->error, Py_NewRef(error));
        if (wait_finish(self) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *wait_take_error(PyObject *self, PyObject *unused)
{
    Wait *w = (Wait *)self;
    if (w->error == NULL || w->error == Py_None) {
        PyErr_SetString(PyExc_AssertionError, "there is no error");
        return NULL;
    }
    PyObject *error = w->error;
    w->error = NULL;
    return error;
}

static PyObject *wait_result(PyObject *self, PyObject *unused)
{
    Wait *w = (Wait *)self;
    if (w->error != NULL && w->error != Py_None) {
        PyObject *error = wait_take_error(self, NULL);
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
        return NULL;
    }
    return Py_NewRef(w->value == NULL ? Py_None : w->value);
}

static PyMemberDef wait_members[] = {
    {"number", T_ULONGLONG, offsetof(Wait, number), 0, NULL},
    {"left", T_PYSSIZET, offsetof(Wait, left), 0, NULL},
    {"posted", T_BOOL, offsetof(Wait, posted), 0, NULL},
    {"done", T_BOOL, offsetof(Wait, done), 0, NULL},
    {"cancelled", T_BOOL, offsetof(Wait, cancelled), 0, NULL},
    {"kind", T_OBJECT, offsetof(Wait, kind), 0, NULL},
    {"into", T_OBJECT, offsetof(Wait, into), 0, NULL},
    {"value", T_OBJECT, offsetof(Wait, value), 0, NULL},
    {"error", T_OBJECT, offsetof(Wait, error), 0, NULL},
    {"notify", T_OBJECT, offsetof(Wait, notify), 0, NULL},
    {"future", T_OBJECT, offsetof(Wait, future), 0, NULL},
    {"entries", T_OBJECT, offsetof(Wait, entries), 0, NULL},
    {"refusal", T_OBJECT, offsetof(Wait, refusal), 0, NULL},
    {NULL},
};

static PyMethodDef wait_methods[] = {
    {"finish", (PyCFunction)(void (*)(void))wait_finish_method, METH_VARARGS | METH_KEYWORDS, NULL},
    {"take_error", wait_take_error, METH_NOARGS, NULL},
    {"result", wait_result, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot wait_slots[] = {
    {Py_tp_doc, "One answer that the program waits for."},
    {Py_tp_init, wait_init},
    {Py_tp_dealloc, wait_dealloc},
    {Py_tp_traverse, wait_traverse},
    {Py_tp_clear, wait_clear},
    {Py_tp_members, wait_members},
    {Py_tp_methods, wait_methods},
    {0, NULL},
};

PyType_Spec wait_spec = {
    "gpuremote._native.Wait",
    sizeof(Wait),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    wait_slots,
};
