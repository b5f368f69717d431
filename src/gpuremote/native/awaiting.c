/* A wait of a blocking program, where this thread alone receives. Twin: client.blocking_driver
   (BlockingDriver.wait). */

#include "native.h"

#include <pythread.h>

#define SLICE 1.0 /* client.blocking_driver */

static int is_none(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    Py_XDECREF(value);
    return value == NULL ? -1 : value == Py_None;
}

/* Have the driver see to the exception that is set: 2; -1: it, or another one, stays. */
static int caught(PyObject *driver, PyObject *connection, PyObject *wait)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    int over = tell(driver, name__caught, connection, wait, error, NULL) < 0 ? -1 : 2;
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return over;
}

int awaiting_wait(Recorder *r, PyObject *driver, PyObject *connection, PyObject *wait)
{
    int over = -1, led = 0, simple = is_none(driver, name__better_at);
    PyObject *leader = PyObject_GetAttr(driver, name__leader), *zero = PyLong_FromLong(0);
    PyObject *me = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    PyObject *looks = PyObject_GetAttr(connection, name_looks), *slice = PyFloat_FromDouble(SLICE);
    if (simple < 0 || leader == NULL || zero == NULL || me == NULL || looks == NULL || slice == NULL)
        goto over;
    over = 0;
    if (!simple || !PyDict_CheckExact(leader) || PyDict_GET_SIZE(leader)
        || ((Lane *)r->lane)->connection != connection || ((Stream *)connection)->pending)
        goto over;
    led = PyDict_SetDefault(leader, zero, me) == me;
    if (led && wait_into(wait) > ((Lane *)r->lane)->small
        && tell((PyObject *)r, name_expect, wait, NULL) < 0)
        over = caught(driver, connection, wait);
    PyObject *given[] = {connection, slice, PyDict_GET_SIZE(((Lane *)r->lane)->arriving) ? zero : looks};
    while (led && !over && !wait_state(wait)) {
        PyObject *taken = lane_take(r->lane, given, 3);
        if (taken == NULL)
            over = caught(driver, connection, wait);
        else if (taken == Py_False)
            over = 2; /* there may be more to see to */
        Py_XDECREF(taken);
    }
    if (led && PyDict_GetItemWithError(leader, zero) == me) {
        PyObject *type, *error, *traceback, *before, *after = NULL;
        PyErr_Fetch(&type, &error, &traceback);
        PyDict_DelItem(leader, zero);
        before = PyObject_GetAttr(driver, name__receives);
        if (before == NULL || (after = PyLong_FromLongLong(PyLong_AsLongLong(before) + 1)) == NULL
            || PyObject_SetAttr(driver, name__receives, after))
            PyErr_WriteUnraisable(driver);
        Py_XDECREF(after);
        Py_XDECREF(before);
        PyObject *followers = PyObject_GetAttr(driver, name__followers);
        if (followers == NULL || (PyObject_Size(followers) && tell(driver, name__call_followers, NULL) < 0))
            over = -1; /* Ctrl-C, say */
        if (followers == NULL || (over < 0 && type == NULL && !wait_state(wait)))
            payload_tell_anyway((PyObject *)r, name_cancel, wait);
        Py_XDECREF(followers);
        if (type != NULL)
            PyErr_Restore(type, error, traceback);
    }
    if (!over && wait_state(wait) == 1) {
        if (r->flush_after && !PyDict_GET_SIZE(((Lane *)r->lane)->waits)) { /* as Core.settled */
            r->flush_after = r->idle_pause ? looking_now() + r->idle_pause : 0;
            r->pause = FLUSH_NS;
        }
        over = 1;
    }
    else if (over > 0)
        over = 0;
over:
    Py_XDECREF(slice);
    Py_XDECREF(looks);
    Py_XDECREF(me);
    Py_XDECREF(zero);
    Py_XDECREF(leader);
    return over;
}

/* await_answer(driver, wait): whether it is over, without an error. */
PyObject *awaiting_await(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Recorder *r = (Recorder *)self;
    if (count != 2 || !Py_IS_TYPE(args[1], Wait_Type)) {
        PyErr_SetString(PyExc_TypeError, "await_answer() takes a driver and a wait");
        return NULL;
    }
    if (r->lane == NULL || !PyObject_TypeCheck(r->lane, Lane_Type))
        Py_RETURN_FALSE;
    Lane *l = (Lane *)r->lane;
    PyObject *connection = Py_NewRef(l->connection == NULL ? Py_None : l->connection);
    int over = 0;
    if (is_stream(connection) && l->waits != NULL && PyDict_CheckExact(l->waits)
        && l->arriving != NULL && PyDict_CheckExact(l->arriving))
        over = awaiting_wait(r, args[0], connection, args[1]);
    Py_DECREF(connection);
    return over < 0 ? NULL : PyBool_FromLong(over);
}
