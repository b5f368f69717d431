/* Repeats: calls that repeat earlier ones, named instead of sent. Used by gpuremote.wire.repeats,
   which says what goes over the wire; it has no twin, a session without it sends every call.

   Both ends keep the calls that went by, in the same order and with the same decisions, so each
   call can be predicted from one that lies ``back`` calls before it: the bytes are the same, but
   for operands that were results of a call then, which are the results of the call that stands in
   its place now. Which operands move along is seen from what came in the place before. */

#include "repeats.h"

PyTypeObject *Repeats_Type;

#define ON 1 /* of wire.repeats */
#define ANEW 2

typedef struct {
    char *data;
    size_t size, room;
} Out;

static int put(Out *out, const void *data, size_t size)
{
    if (out->room - out->size < size) {
        size_t room = 2 * out->room + size;
        char *grown = PyMem_Realloc(out->data, room);
        if (grown == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        out->data = grown;
        out->room = room;
    }
    memcpy(out->data + out->size, data, size);
    out->size += size;
    return 0;
}

static int put_repeat(Out *out, uint32_t back, uint32_t count)
{
    const uint32_t record[3] = {REPEAT, back, count};
    return put(out, record, sizeof record);
}

/* -- squeeze ---------------------------------------------------------------------------------- */

/* Whether every record of a batch can be taken here. */
static int all_known(const Repeats *r, const char *body, size_t size)
{
    if (size < PREFIX)
        return 0;
    for (size_t offset = PREFIX; offset < size;) {
        uint32_t kind;
        if (size - offset < 4)
            return 0;
        memcpy(&kind, body + offset, 4);
        const Form *form = kind >= CALL ? history_form(r, kind) : NULL;
        const size_t record =
            form != NULL ? form->size : history_fixed_size(r, kind, body + offset, size - offset);
        if (record == 0 || record > size - offset || record > LARGEST)
            return 0;
        offset += record;
    }
    return 1;
}

static uint64_t anchor_key(uint32_t plan, const char *record, const Form *form)
{
    /* By its oldest operand, which is a weight where there is one. */
    uint64_t oldest = UINT64_MAX;
    for (uint32_t k = 0; k < form->operands; k++) {
        const uint64_t handle = handle_at(record, form, k);
        oldest = handle < oldest ? handle : oldest;
    }
    return (oldest * 0x9E3779B97F4A7C15u + plan) * 0xD6E8FEB86659FD93u;
}

static int predicts(const Repeats *r, const Call *like, uint32_t plan, const Form *form,
                    const char *record)
{
    return like != NULL && like->plan == plan
           && memcmp(history_predict(r, like, form), record, form->size) == 0;
}

/* Words in which a record differs from what was predicted, as far as they lie next to each other
   or have one equal word between them; 0: there are no more. */
static size_t differing(const char *predicted, const char *record, size_t words, size_t *first)
{
    while (*first < words && memcmp(predicted + WORD * *first, record + WORD * *first, WORD) == 0)
        ++*first;
    size_t end = *first;
    for (size_t k = *first; k < words && k < end + 2; k++)
        if (memcmp(predicted + WORD * k, record + WORD * k, WORD) != 0)
            end = k + 1;
    return end - *first;
}

/* A call that differs from what ``like`` predicts: as a patch of that, where it is the shorter
   one, or as it is. */
static int put_call(const Repeats *r, Out *out, const Call *like, const Form *form,
                    const char *record)
{
    const size_t words = form->size / WORD, rest = form->size % WORD;
    if (like == NULL || words > UINT16_MAX)
        return put(out, record, form->size);
    const char *predicted = history_predict(r, like, form);
    size_t size = 2 * WORD, found;
    uint32_t head[2] = {PATCH, 0};
    for (size_t first = 0; (found = differing(predicted, record, words, &first)); first += found) {
        size += WORD + WORD * found;
        head[1]++;
    }
    if (size >= form->size
        || memcmp(predicted + form->size - rest, record + form->size - rest, rest) != 0)
        return put(out, record, form->size);
    int status = put(out, head, sizeof head);
    for (size_t first = 0; !status && (found = differing(predicted, record, words, &first));
         first += found) {
        const uint16_t where[2] = {(uint16_t)first, (uint16_t)found};
        status = put(out, where, sizeof where) || put(out, record + WORD * first, WORD * found);
    }
    return status ? -1 : 0;
}

/* One call: either one more of a run, or by itself. */
static int squeeze_call(Repeats *r, Out *out, uint32_t *run, uint64_t number, uint32_t plan,
                        const Form *form, const char *record)
{
    history_make_room(r, form->size, form->operands);
    const uint64_t key = anchor_key(plan, record, form), place = key >> 51;
    const uint64_t next = r->dropped + r->count;
    const Call *like = history_back(r, r->back);
    uint64_t other = 0; /* how far back the same lies, if that is elsewhere */
    int status = 0, same = predicts(r, like, plan, form, record);
    if (!same) {
        if (r->anchors[place].key == key)
            other = next - r->anchors[place].call;
        const Call *anchor = other != r->back ? history_back(r, other) : NULL;
        if (anchor == NULL || anchor->plan != plan)
            other = 0;
        if (*run)
            status = put_repeat(out, r->back, *run);
        *run = 0;
        /* Twice in a row, as one call by itself may lie where it does by chance: what is expected
           of its operands then would be wrong in the next step. */
        const int aligned = like != NULL && like->plan == plan;
        if (other && (!aligned || other == r->pending)) {
            like = anchor;
            r->back = (uint32_t)other;
            same = predicts(r, like, plan, form, record);
            if (!same && !status)
                status = put_repeat(out, r->back, 0);
        }
        else if (!aligned)
            like = NULL;
    }
    r->pending = (uint32_t)other;
    r->anchors[place].key = key;
    r->anchors[place].call = next;
    if (same) {
        history_add_predicted(r, number, like, form);
        ++*run;
        return status;
    }
    if (!status)
        status = put_call(r, out, like, form, record);
    history_add_sent(r, number, plan, form, record);
    return status;
}

static int squeeze_all(Repeats *r, Out *out, const char *body, size_t size)
{
    uint64_t number;
    uint32_t run = 0;
    int status = put(out, body, PREFIX);
    memcpy(&number, body, PREFIX);
    for (size_t offset = PREFIX; offset < size && !status;) {
        uint32_t kind;
        memcpy(&kind, body + offset, 4);
        const Form *form = kind >= CALL ? history_form(r, kind) : NULL;
        if (form != NULL) {
            status = squeeze_call(r, out, &run, number, kind, form, body + offset);
            number += form->results ? form->results : 1;
            offset += form->size;
            continue;
        }
        const size_t record = history_fixed_size(r, kind, body + offset, size - offset);
        if (run)
            status = put_repeat(out, r->back, run);
        run = 0;
        if (!status)
            status = put(out, body + offset, record);
        number++;
        offset += record;
    }
    return status || !run ? status : put_repeat(out, r->back, run);
}

/* squeeze(body): what to send for a batch, runs of calls named, and the ``arg`` of the message; None
   where that can't be, and changes nothing then. Who sends it sets ``fresh`` to False in one step
   with taking the batch for sent: who is interrupted before that begins anew with the next one. */
static PyObject *repeats_squeeze(PyObject *self, PyObject *body)
{
    Repeats *r = (Repeats *)self;
    Py_buffer given;
    if (r->anchors == NULL && (r->anchors = PyMem_Calloc(ANCHORS, sizeof *r->anchors)) == NULL)
        return PyErr_NoMemory();
    if (history_allocate(r) < 0 || PyObject_GetBuffer(body, &given, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *made = NULL;
    Out out = {NULL, 0, 0};
    if (!all_known(r, given.buf, (size_t)given.len))
        made = Py_NewRef(Py_None);
    else {
        const int anew = r->fresh;
        if (anew)
            history_begin_anew(r);
        r->fresh = 1;
        if (squeeze_all(r, &out, given.buf, (size_t)given.len) == 0)
            made = Py_BuildValue("y#i", out.data, (Py_ssize_t)out.size, anew ? ANEW : ON);
    }
    PyMem_Free(out.data);
    PyBuffer_Release(&given);
    return made;
}

/* -- expand ----------------------------------------------------------------------------------- */

static int wrong(const char *what)
{
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

static int expand_run(Repeats *r, Out *out, uint64_t *number, uint32_t count, size_t most)
{
    for (; count; count--) {
        const Call *like = history_back(r, r->back);
        const Form *form = like == NULL ? NULL : history_form(r, like->plan);
        if (form == NULL)
            return wrong("calls are repeated that are not kept");
        if (out->size + form->size > most)
            return wrong("a batch whose repeated calls are too long");
        history_make_room(r, form->size, form->operands);
        like = history_back(r, r->back);
        if (like == NULL)
            return wrong("calls are repeated that are not kept any more");
        if (put(out, history_predict(r, like, form), form->size) < 0)
            return -1;
        history_add_predicted(r, *number, like, form);
        *number += form->results ? form->results : 1;
    }
    return 0;
}

/* The call that a patch says; the bytes of the patch, or -1. */
static Py_ssize_t expand_patch(Repeats *r, Out *out, uint64_t *number, const char *patch,
                               size_t left, size_t most)
{
    const Call *like = history_back(r, r->back);
    const Form *form = like == NULL ? NULL : history_form(r, like->plan);
    if (form == NULL || left < 2 * WORD)
        return wrong("a call is patched that is not kept");
    if (out->size + form->size > most)
        return wrong("a batch whose repeated calls are too long");
    history_make_room(r, form->size, form->operands);
    like = history_back(r, r->back);
    if (like == NULL)
        return wrong("a call is patched that is not kept any more");
    const uint32_t plan = like->plan;
    const size_t begin = out->size;
    if (put(out, history_predict(r, like, form), form->size) < 0)
        return -1;
    char *record = out->data + begin;
    uint32_t count;
    size_t size = 2 * WORD;
    memcpy(&count, patch + WORD, WORD);
    for (; count; count--) {
        uint16_t where[2];
        if (left - size < WORD)
            return wrong("a patch that ends too soon");
        memcpy(where, patch + size, WORD);
        const size_t bytes = WORD * (size_t)where[1];
        size += WORD;
        /* The first word is the plan's. */
        if (where[0] == 0 || left - size < bytes
            || WORD * (size_t)where[0] + bytes > form->size)
            return wrong("a patch of what is not in the call");
        memcpy(record + WORD * where[0], patch + size, bytes);
        size += bytes;
    }
    history_add_sent(r, *number, plan, form, record);
    *number += form->results ? form->results : 1;
    return (Py_ssize_t)size;
}

static int expand_all(Repeats *r, Out *out, const char *body, size_t size, size_t most)
{
    uint64_t number;
    if (size < PREFIX)
        return wrong("a batch without the number of its first record");
    memcpy(&number, body, PREFIX);
    int status = put(out, body, PREFIX);
    for (size_t offset = PREFIX; offset < size && !status;) {
        uint32_t kind, count;
        const size_t left = size - offset;
        if (left < 4)
            return wrong("a batch that ends within a record");
        memcpy(&kind, body + offset, 4);
        if (kind == REPEAT) {
            if (left < REPEAT_SIZE)
                return wrong("a batch that ends within a record");
            memcpy(&r->back, body + offset + 4, 4);
            memcpy(&count, body + offset + 8, 4);
            status = expand_run(r, out, &number, count, most);
            offset += REPEAT_SIZE;
            continue;
        }
        if (kind == PATCH) {
            const Py_ssize_t patch =
                expand_patch(r, out, &number, body + offset, left, most);
            status = patch < 0 ? -1 : 0;
            offset += patch < 0 ? 0 : (size_t)patch;
            continue;
        }
        const Form *form = kind >= CALL ? history_form(r, kind) : NULL;
        const size_t record = form != NULL ? form->size : history_fixed_size(r, kind, body + offset, left);
        if (record == 0 || record > left || record > LARGEST)
            return wrong("a record that can't be in a batch with repeated calls");
        if (out->size + record > most)
            return wrong("a batch whose repeated calls are too long");
        if (form != NULL) {
            history_make_room(r, form->size, form->operands);
            history_add_sent(r, number, kind, form, body + offset);
        }
        status = put(out, body + offset, record);
        number += form != NULL && form->results ? form->results : 1;
        offset += record;
    }
    return status;
}

/* expand(body, anew, most): the batch as it was. */
static PyObject *repeats_expand(PyObject *self, PyObject *args)
{
    Repeats *r = (Repeats *)self;
    Py_buffer given;
    Py_ssize_t most;
    int anew;
    if (history_allocate(r) < 0 || !PyArg_ParseTuple(args, "y*pn", &given, &anew, &most))
        return NULL;
    Out out = {NULL, 0, 0};
    PyObject *made = NULL;
    if (anew)
        history_begin_anew(r);
    if (expand_all(r, &out, given.buf, (size_t)given.len, (size_t)most) == 0)
        made = PyBytes_FromStringAndSize(out.data, (Py_ssize_t)out.size);
    PyMem_Free(out.data);
    PyBuffer_Release(&given);
    return made;
}

/* -- the type ---------------------------------------------------------------------------------- */

/* forget(): every plan and call. */
static PyObject *repeats_forget(PyObject *self, PyObject *unused)
{
    history_forget_forms((Repeats *)self);
    history_begin_anew((Repeats *)self);
    ((Repeats *)self)->fresh = 1;
    Py_RETURN_NONE;
}

/* Repeats(sizes): of records of a fixed kind, by their kind. */
static PyObject *repeats_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    Py_buffer sizes;
    if (!PyArg_ParseTuple(args, "y*", &sizes))
        return NULL;
    Repeats *r = sizes.len == CALL ? (Repeats *)type->tp_alloc(type, 0) : NULL;
    if (r != NULL) {
        memcpy(r->sizes, sizes.buf, CALL);
        r->fresh = 1;
    }
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "Repeats() takes 64 sizes");
    PyBuffer_Release(&sizes);
    return (PyObject *)r;
}

static void repeats_dealloc(PyObject *self)
{
    Repeats *r = (Repeats *)self;
    PyTypeObject *type = Py_TYPE(self);
    history_forget_forms(r);
    PyMem_Free(r->forms);
    PyMem_Free(r->calls);
    PyMem_Free(r->links);
    PyMem_Free(r->bytes);
    PyMem_Free(r->anchors);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef repeats_methods[] = {
    {"squeeze", repeats_squeeze, METH_O, NULL},
    {"expand", repeats_expand, METH_VARARGS, NULL},
    {"learn", history_learn, METH_VARARGS, NULL},
    {"forget", repeats_forget, METH_NOARGS, NULL},
    {NULL},
};

static PyMemberDef repeats_members[] = {
    {"fresh", T_BOOL, offsetof(Repeats, fresh), 0, NULL},
    {"repeated", T_ULONGLONG, offsetof(Repeats, repeated), READONLY, NULL},
    {NULL},
};

static PyType_Slot repeats_slots[] = {
    {Py_tp_new, repeats_new},
    {Py_tp_dealloc, repeats_dealloc},
    {Py_tp_methods, repeats_methods},
    {Py_tp_members, repeats_members},
    {0, NULL},
};

PyType_Spec repeats_spec = {"gpuremote._native.Repeats", sizeof(Repeats), 0, Py_TPFLAGS_DEFAULT,
                            repeats_slots};
