/* Handle and Recorder: from ``x + y`` to a record in the batch. Twins: gpuremote.client.recording. */

#include "native.h"

#include <pythread.h>
#include <time.h>

#define CALL_HEAD 4 /* ops.plan.layout_of: the plan's number u32, then 8 bytes per operand here */
#define MOST 3      /* operands */

PyTypeObject *Handle_Type, *Recorder_Type;

static int recorder_traverse(PyObject *self, visitproc visit, void *arg)
{
    Recorder *r = (Recorder *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(r->lock);
    Py_VISIT(r->acquire);
    Py_VISIT(r->release);
    Py_VISIT(r->dropped);
    Py_VISIT(r->drop);
    Py_VISIT(r->plans);
    Py_VISIT(r->buffer);
    Py_VISIT(r->origins);
    Py_VISIT(r->on_buffered);
    Py_VISIT(r->own);
    Py_VISIT(r->staged);
    Py_VISIT(r->kinds);
    Py_VISIT(r->made);
    Py_VISIT(r->lane);
    Py_VISIT(r->watcher);
    return 0;
}

static int recorder_clear(PyObject *self)
{
    Recorder *r = (Recorder *)self;
    Py_CLEAR(r->lock);
    Py_CLEAR(r->acquire);
    Py_CLEAR(r->release);
    Py_CLEAR(r->dropped);
    Py_CLEAR(r->drop);
    Py_CLEAR(r->plans);
    Py_CLEAR(r->buffer);
    Py_CLEAR(r->origins);
    Py_CLEAR(r->on_buffered);
    Py_CLEAR(r->own);
    Py_CLEAR(r->staged);
    Py_CLEAR(r->kinds);
    Py_CLEAR(r->made);
    Py_CLEAR(r->lane);
    Py_CLEAR(r->watcher);
    return 0;
}

static void recorder_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    recorder_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Set an attribute that is called for every op, and what of it is called. */
static int keep_bound(PyObject **place, PyObject *value, PyObject **method, PyObject *name)
{
    PyObject *bound = value == NULL ? NULL : PyObject_GetAttr(value, name);
    if (value != NULL && bound == NULL)
        return -1;
    Py_XSETREF(*place, Py_XNewRef(value));
    Py_XSETREF(*method, bound);
    return 0;
}

static int recorder_set_lock(PyObject *self, PyObject *value, void *unused)
{
    Recorder *r = (Recorder *)self;
    return keep_bound(&r->lock, value, &r->acquire, name_acquire)
                   || keep_bound(&r->lock, value, &r->release, name_release)
               ? -1
               : 0;
}

static int recorder_set_dropped(PyObject *self, PyObject *value, void *unused)
{
    Recorder *r = (Recorder *)self;
    return keep_bound(&r->dropped, value, &r->drop, name_append);
}

static PyObject *given(PyObject *value, const char *name)
{
    if (value == NULL)
        PyErr_SetString(PyExc_AttributeError, name);
    return Py_XNewRef(value);
}

static PyObject *recorder_get_lock(PyObject *self, void *unused)
{
    return given(((Recorder *)self)->lock, "lock");
}

static PyObject *recorder_get_dropped(PyObject *self, void *unused)
{
    return given(((Recorder *)self)->dropped, "dropped");
}

static long long now_ns(void) /* _clock.now_ns, as Linux has it */
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* As client.origin.take. */
static PyObject *take_origin(Recorder *r, PyObject *number, PyObject *plan, PyObject *frame)
{
    PyFrameObject *inner = (PyFrameObject *)frame, *outer;
    if (r->depth == 1 || r->depth == 2) {
        outer = r->depth == 1 ? NULL : PyFrame_GetBack(inner);
        PyObject *origin = PyTuple_New(outer == NULL ? 4 : 6);
        PyObject *at = origin == NULL ? NULL : PyLong_FromLong(PyFrame_GetLasti(inner));
        PyObject *back = at == NULL || outer == NULL ? NULL : PyLong_FromLong(PyFrame_GetLasti(outer));
        if (at != NULL && (outer == NULL || back != NULL)) {
            PyTuple_SET_ITEM(origin, 0, Py_NewRef(number));
            PyTuple_SET_ITEM(origin, 1, Py_NewRef(plan));
            PyTuple_SET_ITEM(origin, 2, (PyObject *)PyFrame_GetCode(inner));
            PyTuple_SET_ITEM(origin, 3, at);
            if (outer != NULL) {
                PyTuple_SET_ITEM(origin, 4, (PyObject *)PyFrame_GetCode(outer));
                PyTuple_SET_ITEM(origin, 5, back);
            }
        }
        else {
            Py_CLEAR(origin);
            Py_XDECREF(at);
            Py_XDECREF(back);
        }
        Py_XDECREF(outer);
        return origin;
    }
    return PyObject_CallMethodObjArgs((PyObject *)r, name__take_origin, number, plan, frame, NULL);
}

static int number_of(PyObject *plan, PyObject *name, long long *number)
{
    PyObject *value = PyObject_GetAttr(plan, name);
    *number = value == NULL ? -1 : PyLong_AsLongLong(value);
    Py_XDECREF(value);
    return *number == -1 && PyErr_Occurred() ? -1 : 0;
}

int recording_lock(Recorder *r)
{
    PyObject *held = PyObject_CallNoArgs(r->acquire);
    unsigned long me = PyThread_get_thread_ident();
    if (held != NULL && r->thread != me) {
        r->thread = me;
        r->alone = looking_now();
    }
    Py_XDECREF(held);
    return held == NULL ? -1 : 0;
}

int recording_let_go(Recorder *r, int failed)
{
    PyObject *type, *error, *traceback;
    if (failed)
        PyErr_Fetch(&type, &error, &traceback);
    PyObject *answer = PyObject_CallNoArgs(r->release);
    Py_XDECREF(answer);
    if (failed) {
        if (answer == NULL)
            PyErr_Clear();
        PyErr_Restore(type, error, traceback);
    }
    return failed || answer == NULL ? -1 : 0;
}

/* A record is in the buffer: send it if it is time, or say that it is there. */
static int see_to_it(Recorder *r)
{
    if (now_ns() >= r->flush_after)
        return tell((PyObject *)r, name__flush_by_time, NULL);
    if (!r->told && r->on_buffered != NULL && r->on_buffered != Py_None) {
        r->told = 1;
        PyObject *answer = PyObject_CallNoArgs(r->on_buffered);
        Py_XDECREF(answer);
        return answer == NULL ? -1 : 0;
    }
    return 0;
}

/* The steps of an issue that the lock guards. 0: done. */
static int append(Recorder *r, PyObject *plan, const char *record, Py_ssize_t size,
                  PyObject *frame, long long *number)
{
    if (r->special && tell((PyObject *)r, name__prepare, NULL) < 0)
        return -1;
    long long ident, step;
    PyObject *inplace = PyObject_GetAttr(plan, name_inplace);
    if (inplace == NULL)
        return -1;
    int writes = PyObject_IsTrue(inplace);
    Py_DECREF(inplace);
    if (writes < 0 || number_of(plan, name_id, &ident) < 0 || number_of(plan, name_step, &step) < 0)
        return -1;
    PyObject *renewed = NULL;
    if (ident < r->oldest) {
        renewed = PyObject_CallMethodOneArg((PyObject *)r, name__renewed, plan);
        if (renewed == NULL)
            return -1;
        if (!PyBytes_Check(renewed) || PyBytes_GET_SIZE(renewed) != CALL_HEAD) {
            PyErr_SetString(PyExc_TypeError, "_renewed() gives a plan's number");
            Py_DECREF(renewed);
            return -1;
        }
    }
    PyObject *buffer = r->buffer;
    int failed = -1;
    if (buffer == NULL || !PyByteArray_Check(buffer) || size < CALL_HEAD || r->origins == NULL
        || !PyList_Check(r->origins))
        PyErr_SetString(PyExc_TypeError, "there is nothing to append a record to");
    else {
        /* Nothing stands between these lines that may collect garbage: a finaliser may issue. */
        Py_ssize_t before = PyByteArray_GET_SIZE(buffer);
        *number = r->next;
        failed = PyByteArray_Resize(buffer, before + size);
        if (!failed) {
            char *at = PyByteArray_AS_STRING(buffer) + before;
            memcpy(at, record, (size_t)size);
            if (renewed != NULL)
                memcpy(at, PyBytes_AS_STRING(renewed), CALL_HEAD);
            r->next += step;
            r->writes += writes;
        }
    }
    Py_XDECREF(renewed);
    if (failed)
        return -1;
    PyObject *named = PyLong_FromLongLong(*number);
    PyObject *origin = named == NULL ? NULL : take_origin(r, named, plan, frame);
    Py_XDECREF(named);
    failed = origin == NULL ? -1 : PyList_Append(r->origins, origin);
    Py_XDECREF(origin);
    if (failed)
        return -1;
    return see_to_it(r);
}

/* As client.origin.caller, from where Python called. */
static PyFrameObject *caller(Recorder *r)
{
    PyFrameObject *first = PyEval_GetFrame(), *frame = (PyFrameObject *)Py_XNewRef(first);
    while (frame != NULL && r->own != NULL && PyUnicode_Check(r->own)) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        Py_ssize_t own = PyUnicode_Tailmatch(code->co_filename, r->own, 0, PY_SSIZE_T_MAX, -1);
        Py_DECREF(code);
        if (own <= 0)
            break;
        PyFrameObject *back = PyFrame_GetBack(frame);
        Py_DECREF(frame);
        frame = back;
    }
    return frame != NULL ? frame : (PyFrameObject *)Py_XNewRef(first);
}

int recording_append(Recorder *r, PyObject *record, PyObject *name, PyObject **number)
{
    if (r->special && tell((PyObject *)r, name__prepare, NULL) < 0)
        return -1;
    Py_ssize_t size = PyBytes_GET_SIZE(record);
    if (r->buffer == NULL || !PyByteArray_Check(r->buffer) || r->origins == NULL
        || !PyList_Check(r->origins)) {
        PyErr_SetString(PyExc_TypeError, "there is nothing to append a record to");
        return -1;
    }
    Py_ssize_t before = PyByteArray_GET_SIZE(r->buffer);
    *number = PyLong_FromLongLong(r->next);
    if (*number == NULL || PyByteArray_Resize(r->buffer, before + size) < 0)
        return -1;
    memcpy(PyByteArray_AS_STRING(r->buffer) + before, PyBytes_AS_STRING(record), (size_t)size);
    r->last = r->next++;
    if (PyUnicode_GET_LENGTH(name)) {
        r->named++;
        PyFrameObject *frame = caller(r);
        PyObject *origin =
            frame == NULL ? NULL : take_origin(r, *number, name, (PyObject *)frame);
        Py_XDECREF(frame);
        int failed = origin == NULL ? -1 : PyList_Append(r->origins, origin);
        Py_XDECREF(origin);
        if (failed)
            return -1;
    }
    if (PyByteArray_GET_SIZE(r->buffer) >= r->full)
        return tell((PyObject *)r, name_flush, NULL);
    return see_to_it(r);
}

/* _append(encoded, name='', /) */
static PyObject *recorder_append(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Recorder *r = (Recorder *)self;
    static PyObject *nameless;
    if (nameless == NULL && (nameless = PyUnicode_FromString("")) == NULL)
        return NULL;
    if (count < 1 || count > 2 || !PyBytes_Check(args[0])
        || (count == 2 && !PyUnicode_Check(args[1])) || r->acquire == NULL) {
        PyErr_SetString(PyExc_TypeError, "_append() takes a record and the name of an op");
        return NULL;
    }
    PyObject *number = NULL;
    if (recording_lock(r) < 0)
        return NULL;
    int failed = recording_append(r, args[0], count == 2 ? args[1] : nameless, &number);
    if (recording_let_go(r, failed) < 0)
        Py_CLEAR(number);
    return number;
}

static int issue(Recorder *r, PyObject *plan, const char *record, Py_ssize_t size, PyObject *frame,
                 long long *number)
{
    if (r->acquire == NULL || !PyFrame_Check(frame)) {
        PyErr_SetString(PyExc_TypeError, "issue() takes a lock, and the frame that called");
        return -1;
    }
    if (recording_lock(r) < 0)
        return -1;
    if (recording_let_go(r, append(r, plan, record, size, frame, number)) < 0)
        return -1;
    return r->special ? tell((PyObject *)r, name__follow_up, NULL) : 0;
}

/* issue(plan, record, frame) */
static PyObject *recorder_issue(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    long long number;
    if (count != 3 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "issue() takes a plan, a record and a frame");
        return NULL;
    }
    if (issue((Recorder *)self, args[0], PyBytes_AS_STRING(args[1]), PyBytes_GET_SIZE(args[1]),
              args[2], &number)
        < 0)
        return NULL;
    return PyLong_FromLongLong(number);
}

/* -- handles ---------------------------------------------------------------------------------- */

/* Give the handle back. A subclass with a __del__ of its own does what that says. */
static void handle_finalize(PyObject *self)
{
    Handle *h = (Handle *)self;
    Recorder *core = h->core;
    if (core == NULL || core->drop == NULL)
        return;
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *ident = PyLong_FromUnsignedLongLong(h->id);
    PyObject *answer = ident == NULL ? NULL : PyObject_CallOneArg(core->drop, ident);
    if (answer == NULL)
        PyErr_WriteUnraisable(core->drop);
    Py_XDECREF(ident);
    Py_XDECREF(answer);
    PyErr_Restore(type, error, traceback);
}

static int handle_traverse(PyObject *self, visitproc visit, void *arg)
{
    Handle *h = (Handle *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(h->core);
    Py_VISIT(h->meta);
    return 0;
}

static int handle_clear(PyObject *self)
{
    Py_CLEAR(((Handle *)self)->core);
    Py_CLEAR(((Handle *)self)->meta);
    return 0;
}

static void handle_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc(self) < 0)
        return; /* somebody has it again; a subclass was asked before, and is asked once */
    PyObject_GC_UnTrack(self);
    handle_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Handle(core, ident, meta) */
static int handle_init(PyObject *self, PyObject *args, PyObject *names)
{
    Handle *h = (Handle *)self;
    PyObject *core, *meta;
    unsigned long long id;
    if (names != NULL && PyDict_GET_SIZE(names)) {
        PyErr_SetString(PyExc_TypeError, "an array takes no named arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "O!KO", Recorder_Type, &core, &id, &meta))
        return -1;
    Py_XSETREF(h->core, (Recorder *)Py_NewRef(core));
    h->id = id;
    Py_XSETREF(h->meta, Py_NewRef(meta));
    return 0;
}

/* What a record names for the given operand, and what a plan's key has for it. 0: neither. */
static int operand(Handle *first, PyObject *given, uint64_t *field, PyObject **key)
{
    if (Py_IS_TYPE(given, Py_TYPE(first))) {
        *field = ((Handle *)given)->id;
        *key = ((Handle *)given)->meta;
        return ((Handle *)given)->core == first->core && *key != NULL;
    }
    if (PyFloat_CheckExact(given)) {
        double value = PyFloat_AS_DOUBLE(given);
        memcpy(field, &value, 8);
        *key = name_f;
        return 1;
    }
    if (PyLong_CheckExact(given)) {
        int beyond;
        *field = (uint64_t)PyLong_AsLongLongAndOverflow(given, &beyond);
        *key = name_i;
        return !beyond;
    }
    return 0;
}

PyObject *recording_handle(PyObject *make, Recorder *core, long long number, PyObject *meta)
{
    PyTypeObject *type = PyType_Check(make) ? (PyTypeObject *)make : NULL;
    if (type == NULL || type->tp_init != handle_init)
        return PyObject_CallFunction(make, "OLO", core, number, meta);
    Handle *made = (Handle *)type->tp_alloc(type, 0);
    if (made == NULL)
        return NULL;
    made->core = (Recorder *)Py_NewRef(core);
    made->id = (unsigned long long)number;
    made->meta = Py_NewRef(meta);
    return (PyObject *)made;
}

PyObject *recording_known(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    Py_ssize_t operands = count - 2;
    if (operands < 1 || operands > MOST || !PyObject_TypeCheck(args[2], Handle_Type)) {
        PyErr_SetString(PyExc_TypeError, "known() takes an op, a frame and arrays");
        return NULL;
    }
    Handle *first = (Handle *)args[2];
    Recorder *core = first->core;
    if (core == NULL || core->plans == NULL || !PyDict_CheckExact(core->plans))
        Py_RETURN_NONE;
    PyObject *key = PyTuple_New(1 + operands); /* first: this may collect garbage */
    if (key == NULL)
        return NULL;
    PyTuple_SET_ITEM(key, 0, Py_NewRef(args[0]));
    char record[CALL_HEAD + 8 * MOST];
    for (Py_ssize_t k = 0; k < operands; k++) {
        uint64_t field;
        PyObject *part;
        if (!operand(first, args[2 + k], &field, &part)) {
            Py_DECREF(key);
            Py_RETURN_NONE;
        }
        PyTuple_SET_ITEM(key, 1 + k, Py_NewRef(part));
        memcpy(record + CALL_HEAD + 8 * k, &field, 8);
    }
    PyObject *plan = Py_XNewRef(PyDict_GetItemWithError(core->plans, key));
    Py_DECREF(key);
    if (plan == NULL) {
        if (PyErr_Occurred())
            return NULL;
        Py_RETURN_NONE;
    }
    PyObject *found = NULL, *result = PyObject_GetAttr(plan, name_result);
    PyObject *inplace = result == NULL ? NULL : PyObject_GetAttr(plan, name_inplace);
    long long ident, number;
    Py_INCREF(core);
    if (inplace == NULL || number_of(plan, name_id, &ident) < 0)
        ;
    else if (result == Py_None && inplace != Py_True)
        found = Py_NewRef(Py_None);
    else {
        uint32_t head = (uint32_t)ident;
        memcpy(record, &head, CALL_HEAD);
        if (!issue(core, plan, record, CALL_HEAD + 8 * operands, args[1], &number))
            found = inplace == Py_True ? Py_NewRef(args[2])
                                       : recording_handle((PyObject *)Py_TYPE(args[2]), core, number, result);
    }
    Py_DECREF(core);
    Py_XDECREF(inplace);
    Py_XDECREF(result);
    Py_DECREF(plan);
    return found;
}

/* -- types ------------------------------------------------------------------------------------ */

static PyMemberDef handle_members[] = {
    {"_core", T_OBJECT_EX, offsetof(Handle, core), READONLY, NULL},
    {"_meta", T_OBJECT_EX, offsetof(Handle, meta), 0, NULL},
    {"_id", T_ULONGLONG, offsetof(Handle, id), 0, NULL},
    {NULL},
};

static PyType_Slot handle_slots[] = {
    {Py_tp_doc, "Names an array on the server, and gives the name back."},
    {Py_tp_dealloc, handle_dealloc},
    {Py_tp_finalize, handle_finalize},
    {Py_tp_traverse, handle_traverse},
    {Py_tp_clear, handle_clear},
    {Py_tp_init, handle_init},
    {Py_tp_members, handle_members},
    {0, NULL},
};

PyType_Spec handle_spec = {
    "gpuremote._native.Handle",
    sizeof(Handle),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    handle_slots,
};

static PyMemberDef recorder_members[] = {
    {"plans", T_OBJECT_EX, offsetof(Recorder, plans), 0, NULL},
    {"_buffer", T_OBJECT_EX, offsetof(Recorder, buffer), 0, NULL},
    {"_origins", T_OBJECT_EX, offsetof(Recorder, origins), 0, NULL},
    {"on_buffered", T_OBJECT, offsetof(Recorder, on_buffered), 0, NULL},
    {"writes", T_DOUBLE, offsetof(Recorder, writes), 0, NULL},
    {"flush_after", T_LONGLONG, offsetof(Recorder, flush_after), 0, NULL},
    {"_next", T_LONGLONG, offsetof(Recorder, next), 0, NULL},
    {"_last", T_LONGLONG, offsetof(Recorder, last), 0, NULL},
    {"_named", T_LONGLONG, offsetof(Recorder, named), 0, NULL},
    {"_full", T_LONGLONG, offsetof(Recorder, full), 0, NULL},
    {"_own", T_OBJECT, offsetof(Recorder, own), 0, NULL},
    {"_staged", T_OBJECT_EX, offsetof(Recorder, staged), 0, NULL},
    {"_kinds", T_OBJECT_EX, offsetof(Recorder, kinds), 0, NULL},
    {"made", T_OBJECT_EX, offsetof(Recorder, made), 0, NULL},
    {"_watcher", T_OBJECT, offsetof(Recorder, watcher), 0, NULL},
    {"far", T_BOOL, offsetof(Recorder, far), 0, NULL},
    {"_pause", T_LONGLONG, offsetof(Recorder, pause), 0, NULL},
    {"idle_pause", T_LONGLONG, offsetof(Recorder, idle_pause), 0, NULL},
    {"_first", T_LONGLONG, offsetof(Recorder, first), 0, NULL},
    {"_lane", T_OBJECT_EX, offsetof(Recorder, lane), 0, NULL},
    {"_stalled", T_BOOL, offsetof(Recorder, stalled), 0, NULL},
    {"_freed", T_LONGLONG, offsetof(Recorder, freed), 0, NULL},
    {"_unused_from", T_LONGLONG, offsetof(Recorder, unused_from), 0, NULL},
    {"_unused_to", T_LONGLONG, offsetof(Recorder, unused_to), 0, NULL},
    {"_withdrawn", T_LONGLONG, offsetof(Recorder, withdrawn), 0, NULL},
    {"_filling", T_LONGLONG, offsetof(Recorder, filling), 0, NULL},
    {"_oldest", T_LONGLONG, offsetof(Recorder, oldest), 0, NULL},
    {"_depth", T_INT, offsetof(Recorder, depth), 0, NULL},
    {"_special", T_BOOL, offsetof(Recorder, special), 0, NULL},
    {"_told", T_BOOL, offsetof(Recorder, told), 0, NULL},
    {NULL},
};

static PyGetSetDef recorder_getset[] = {
    {"lock", recorder_get_lock, recorder_set_lock, NULL, NULL},
    {"dropped", recorder_get_dropped, recorder_set_dropped, NULL, NULL},
    {NULL},
};

static PyMethodDef recorder_methods[] = {
    {"_append", (PyCFunction)(void (*)(void))recorder_append, METH_FASTCALL, NULL},
    {"issue", (PyCFunction)(void (*)(void))recorder_issue, METH_FASTCALL, NULL},
    {"await_answer", (PyCFunction)(void (*)(void))awaiting_await, METH_FASTCALL, NULL},
    {"put_at_hand", (PyCFunction)(void (*)(void))putting_put, METH_FASTCALL, NULL},
    {NULL},
};

static PyType_Slot recorder_slots[] = {
    {Py_tp_doc, "Turns ops into records."},
    {Py_tp_dealloc, recorder_dealloc},
    {Py_tp_traverse, recorder_traverse},
    {Py_tp_clear, recorder_clear},
    {Py_tp_members, recorder_members},
    {Py_tp_getset, recorder_getset},
    {Py_tp_methods, recorder_methods},
    {0, NULL},
};

PyType_Spec recorder_spec = {
    "gpuremote._native.Recorder",
    sizeof(Recorder),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE,
    recorder_slots,
};
