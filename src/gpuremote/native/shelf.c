/* Segment, Shelf: blocks of memory that two processes see. Twins: gpuremote.memory.shelves. */

#include "native.h"

#include <time.h>

#define SWEEP 32 /* gpuremote.memory.shelves */

typedef struct {
    Py_ssize_t used; /* bytes of the block that is out; 0: no reference here */
    uint32_t sent;
    char given; /* sent whole: no longer this process's own */
} Place;

typedef struct {
    PyObject_HEAD
    PyObject *mapping;
    char *memory;
    long long ident;
    Py_ssize_t block, blocks, offset;
    double left_at;
    Place *places;
} Segment;

typedef struct {
    Segment *segment;
    Py_ssize_t index;
} Spot;

/* ``idle``: nobody has them, the latest last. ``lent``: a ring of those to which nobody here
   refers, while the other process has not given them back. Each has room for all blocks. */
typedef struct {
    PyObject_HEAD
    Spot *idle, *lent;
    size_t idles, first, lents, room, blocks;
    long long looks;
    char closed;
} Shelf;

/* What a view of a block refers to. */
typedef struct {
    PyObject_HEAD
    Shelf *shelf;
    Spot spot;
} Block;

PyTypeObject *Segment_Type, *Shelf_Type, *Block_Type;

/* -- segments --------------------------------------------------------------------------------- */

static int segment_init(PyObject *self, PyObject *args, PyObject *names)
{
    Segment *s = (Segment *)self;
    PyObject *mapping;
    unsigned long long address;
    if (!PyArg_ParseTuple(args, "LnnOKn", &s->ident, &s->block, &s->blocks, &mapping, &address,
                          &s->offset))
        return -1;
    if (s->places != NULL || s->blocks < 1 || s->block < 1
        || (s->places = PyMem_Calloc((size_t)s->blocks, sizeof *s->places)) == NULL) {
        PyErr_SetString(PyExc_ValueError, "no segment can be like that");
        return -1;
    }
    s->mapping = Py_NewRef(mapping);
    s->memory = (char *)(uintptr_t)address;
    return 0;
}

static void segment_dealloc(PyObject *self)
{
    Segment *s = (Segment *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyMem_Free(s->places);
    Py_XDECREF(s->mapping);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Whether the other process has the block. */
static int is_lent(Segment *s, Py_ssize_t index)
{
    const uint32_t *returned = (const uint32_t *)s->memory + index;
    return s->places[index].sent != __atomic_load_n(returned, __ATOMIC_ACQUIRE);
}

/* The number of a block of it; -1 with IndexError. */
static Py_ssize_t index_of(Segment *s, PyObject *number)
{
    Py_ssize_t index = PyLong_AsSsize_t(number);
    if (index >= 0 && index < s->blocks)
        return index;
    if (index != -1 || !PyErr_Occurred())
        PyErr_Format(PyExc_IndexError, "block %zd of %zd", index, s->blocks);
    return -1;
}

static PyObject *segment_lent(PyObject *self, PyObject *number)
{
    Py_ssize_t index = index_of((Segment *)self, number);
    return index < 0 ? NULL : PyBool_FromLong(is_lent((Segment *)self, index));
}

static PyObject *segment_used(PyObject *self, PyObject *number)
{
    Py_ssize_t index = index_of((Segment *)self, number);
    return index < 0 ? NULL : PyLong_FromSsize_t(((Segment *)self)->places[index].used);
}

static PyObject *segment_given(PyObject *self, PyObject *number)
{
    Py_ssize_t index = index_of((Segment *)self, number);
    return index < 0 ? NULL : PyBool_FromLong(((Segment *)self)->places[index].given);
}

static PyObject *segment_times(PyObject *self, PyObject *number)
{
    Py_ssize_t index = index_of((Segment *)self, number);
    return index < 0 ? NULL : PyLong_FromUnsignedLong(((Segment *)self)->places[index].sent);
}

static PyObject *segment_lend(PyObject *self, PyObject *args)
{
    Segment *s = (Segment *)self;
    PyObject *number;
    int given;
    if (!PyArg_ParseTuple(args, "Op", &number, &given))
        return NULL;
    Py_ssize_t index = index_of(s, number);
    if (index < 0)
        return NULL;
    s->places[index].sent++;
    if (given)
        s->places[index].given = 1;
    Py_RETURN_NONE;
}

static PyObject *segment_unused(PyObject *self, PyObject *unused)
{
    Segment *s = (Segment *)self;
    for (Py_ssize_t k = 0; k < s->blocks; k++)
        if (s->places[k].used || is_lent(s, k))
            Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

static PyMemberDef segment_members[] = {
    {"ident", T_LONGLONG, offsetof(Segment, ident), READONLY, NULL},
    {"block", T_PYSSIZET, offsetof(Segment, block), READONLY, NULL},
    {"blocks", T_PYSSIZET, offsetof(Segment, blocks), READONLY, NULL},
    {"mapping", T_OBJECT_EX, offsetof(Segment, mapping), READONLY, NULL},
    {"left_at", T_DOUBLE, offsetof(Segment, left_at), 0, NULL},
    {NULL},
};

static PyMethodDef segment_methods[] = {
    {"lent", segment_lent, METH_O, NULL},
    {"used", segment_used, METH_O, NULL},
    {"given", segment_given, METH_O, NULL},
    {"times", segment_times, METH_O, NULL},
    {"lend", segment_lend, METH_VARARGS, NULL},
    {"unused", segment_unused, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot segment_slots[] = {
    {Py_tp_doc, "Blocks of one size, and who has them."},
    {Py_tp_init, segment_init},
    {Py_tp_dealloc, segment_dealloc},
    {Py_tp_members, segment_members},
    {Py_tp_methods, segment_methods},
    {0, NULL},
};

PyType_Spec segment_spec = {
    "gpuremote._native.Segment", sizeof(Segment), 0, Py_TPFLAGS_DEFAULT, segment_slots,
};

/* -- shelves ---------------------------------------------------------------------------------- */

static Spot *lent_at(Shelf *f, size_t number)
{
    return &f->lent[(f->first + number) % f->room];
}

static void empty(Shelf *f)
{
    /* What goes with the last reference is no view of a block, so nothing comes back meanwhile. */
    for (size_t k = 0; k < f->idles; k++)
        Py_DECREF(f->idle[k].segment);
    for (size_t k = 0; k < f->lents; k++)
        Py_DECREF(lent_at(f, k)->segment);
    f->idles = f->lents = f->first = 0;
}

static void shelf_dealloc(PyObject *self)
{
    Shelf *f = (Shelf *)self;
    PyTypeObject *type = Py_TYPE(self);
    empty(f);
    PyMem_Free(f->idle);
    PyMem_Free(f->lent);
    type->tp_free(self);
    Py_DECREF(type);
}

static int make_room(Shelf *f, size_t room)
{
    Spot *idle = PyMem_Calloc(room, sizeof *idle), *lent = PyMem_Calloc(room, sizeof *lent);
    if (idle == NULL || lent == NULL) {
        PyMem_Free(idle);
        PyMem_Free(lent);
        PyErr_NoMemory();
        return -1;
    }
    for (size_t k = 0; k < f->idles; k++)
        idle[k] = f->idle[k];
    for (size_t k = 0; k < f->lents; k++)
        lent[k] = *lent_at(f, k);
    PyMem_Free(f->idle);
    PyMem_Free(f->lent);
    f->idle = idle;
    f->lent = lent;
    f->room = room;
    f->first = 0;
    return 0;
}

/* add(segment): all of its blocks, before those that there are; the first one is used first. */
static PyObject *shelf_add(PyObject *self, PyObject *given)
{
    Shelf *f = (Shelf *)self;
    if (!Py_IS_TYPE(given, Segment_Type)) {
        PyErr_SetString(PyExc_TypeError, "add() takes a segment");
        return NULL;
    }
    Segment *s = (Segment *)given;
    size_t count = (size_t)s->blocks;
    if (f->blocks + count > f->room && make_room(f, 2 * (f->blocks + count)) < 0)
        return NULL;
    memmove(f->idle + count, f->idle, f->idles * sizeof *f->idle);
    for (size_t k = 0; k < count; k++)
        f->idle[k] = (Spot){(Segment *)Py_NewRef(s), (Py_ssize_t)(count - 1 - k)};
    f->idles += count;
    f->blocks += count;
    Py_RETURN_NONE;
}

/* remove(segment): none of its blocks is out. */
static PyObject *shelf_remove(PyObject *self, PyObject *segment)
{
    Shelf *f = (Shelf *)self;
    size_t idles = 0, lents = 0, removed = 0;
    for (size_t k = 0; k < f->idles; k++)
        if ((PyObject *)f->idle[k].segment == segment)
            removed++;
        else
            f->idle[idles++] = f->idle[k];
    for (size_t k = 0; k < f->lents; k++)
        if ((PyObject *)lent_at(f, k)->segment == segment)
            removed++;
        else
            *lent_at(f, lents++) = *lent_at(f, k);
    f->idles = idles;
    f->lents = lents;
    f->blocks -= removed;
    while (removed-- > 0)
        Py_DECREF(segment); /* the caller has another reference */
    Py_RETURN_NONE;
}

/* Look at ``most`` blocks, the latest first, whether one of them came back: it is idle then. */
static int sweep(Shelf *f, size_t most)
{
    if (most > f->lents)
        most = f->lents;
    for (size_t k = 0; k < most; k++) {
        Spot last = *lent_at(f, f->lents - 1);
        f->looks++;
        if (!is_lent(last.segment, last.index)) {
            f->lents--;
            f->idle[f->idles++] = last;
            return 1;
        }
        if (most > 1) { /* each in its turn */
            f->first = (f->first + f->room - 1) % f->room;
            f->lent[f->first] = last;
        }
    }
    return 0;
}

/* A block to which nobody here refers any more. */
static void put_back(Shelf *f, Spot spot)
{
    Segment *s = spot.segment;
    s->places[spot.index].used = 0;
    if (f->closed) {
        Py_DECREF(s);
        return;
    }
    struct timespec now; /* _clock.now, as Linux has it */
    clock_gettime(CLOCK_MONOTONIC, &now);
    s->left_at = (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    if (is_lent(s, spot.index))
        *lent_at(f, f->lents++) = spot;
    else
        f->idle[f->idles++] = spot;
}

int shelf_take(PyObject *self, Py_ssize_t nbytes, PyObject **view)
{
    Shelf *f = (Shelf *)self;
    *view = NULL;
    if (f->closed || !(sweep(f, 1) || f->idles || sweep(f, SWEEP)))
        return 0;
    Spot spot = f->idle[f->idles - 1];
    if (nbytes < 1 || nbytes > spot.segment->block) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of a block of %zd", nbytes, spot.segment->block);
        return -1;
    }
    /* First what may collect garbage, and with it blocks. */
    Block *block = (Block *)Block_Type->tp_alloc(Block_Type, 0);
    if (block == NULL)
        return -1;
    block->shelf = (Shelf *)Py_NewRef(f);
    if (!f->idles) { /* a finaliser was quicker */
        Py_DECREF(block);
        return 0;
    }
    spot = f->idle[--f->idles];
    Place *place = &spot.segment->places[spot.index];
    place->used = nbytes;
    place->given = 0;
    block->spot = spot;
    *view = PyMemoryView_FromObject((PyObject *)block);
    Py_DECREF(block);
    return *view == NULL ? -1 : 1;
}

/* take(nbytes): a view of a block, its segment and its number; None: there is none. */
static PyObject *shelf_take_method(PyObject *self, PyObject *number)
{
    Py_ssize_t nbytes = PyLong_AsSsize_t(number);
    PyObject *view;
    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    int taken = shelf_take(self, nbytes, &view);
    if (taken <= 0)
        return taken < 0 ? NULL : Py_NewRef(Py_None);
    Block *block = (Block *)PyMemoryView_GET_BUFFER(view)->obj;
    return Py_BuildValue("NOn", view, block->spot.segment, block->spot.index);
}

/* collect(): nothing; in the twin finalisers leave something to be done. */
static PyObject *shelf_collect(PyObject *self, PyObject *unused)
{
    Py_RETURN_NONE;
}

static PyObject *shelf_close(PyObject *self, PyObject *unused)
{
    ((Shelf *)self)->closed = 1;
    empty((Shelf *)self);
    Py_RETURN_NONE;
}

static PyMemberDef shelf_members[] = {
    {"looks", T_LONGLONG, offsetof(Shelf, looks), READONLY, NULL},
    {NULL},
};

static PyMethodDef shelf_methods[] = {
    {"add", shelf_add, METH_O, NULL},
    {"remove", shelf_remove, METH_O, NULL},
    {"take", shelf_take_method, METH_O, NULL},
    {"collect", shelf_collect, METH_NOARGS, NULL},
    {"close", shelf_close, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot shelf_slots[] = {
    {Py_tp_doc, "The blocks of one size to which nobody here refers."},
    {Py_tp_dealloc, shelf_dealloc},
    {Py_tp_members, shelf_members},
    {Py_tp_methods, shelf_methods},
    {0, NULL},
};

PyType_Spec shelf_spec = {
    "gpuremote._native.Shelf", sizeof(Shelf), 0, Py_TPFLAGS_DEFAULT, shelf_slots,
};

/* -- blocks that are out ---------------------------------------------------------------------- */

static int block_get(PyObject *self, Py_buffer *buffer, int flags)
{
    Spot spot = ((Block *)self)->spot;
    Segment *s = spot.segment;
    return PyBuffer_FillInfo(buffer, self, s->memory + s->offset + spot.index * s->block,
                             s->places[spot.index].used, 0, flags);
}

static void block_dealloc(PyObject *self)
{
    Block *b = (Block *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (b->spot.segment != NULL)
        put_back(b->shelf, b->spot);
    Py_DECREF(b->shelf);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot block_slots[] = {
    {Py_tp_doc, "A block that is out, until nobody refers to it."},
    {Py_tp_dealloc, block_dealloc},
    {Py_bf_getbuffer, block_get},
    {0, NULL},
};

PyType_Spec block_spec = {
    "gpuremote._native.Block",
    sizeof(Block),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    block_slots,
};
