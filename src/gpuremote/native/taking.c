/* The receiving half of Lane: takes in what a connection brings. Twin: gpuremote.rpc.lane. */

#include "native.h"

#include <sched.h>

#define IN_PAYLOAD 1                          /* wire.frames.ResultForm.PAYLOAD */
#define AT_ONCE ((Py_ssize_t)256 << 20) /* server.answers has less: there nothing is seen to meanwhile */

/* Call a method with up to three arguments: 1 if it gave True, -1: error. */
static int ask_whether(PyObject *object, PyObject *name, PyObject *a, PyObject *b, PyObject *c)
{
    PyObject *arguments[] = {object, a, b, c};
    PyObject *given = PyObject_VectorcallMethod(name, arguments, c == NULL ? 3 : 4, NULL);
    Py_XDECREF(given);
    return given == NULL ? -1 : given == Py_True;
}

static int tell_number(PyObject *self, PyObject *method, uint64_t number)
{
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int failed = value == NULL ? -1 : tell(self, method, value, NULL);
    Py_XDECREF(value);
    return failed;
}

/* The bytes of a small array, for a program that waits for them: 1 if this was it. */
static int deliver(Lane *l, const char *body, Py_ssize_t size)
{
    if (l->waits == NULL || !PyDict_CheckExact(l->waits) || size < 8)
        return 0;
    uint64_t number;
    memcpy(&number, body, 8);
    PyObject *key = PyLong_FromUnsignedLongLong(number);
    if (key == NULL)
        return -1;
    int taken = 0;
    PyObject *wait = Py_XNewRef(PyDict_GetItemWithError(l->waits, key));
    if (wait == NULL)
        taken = PyErr_Occurred() ? -1 : 0;
    else if (wait_takes(wait, body + 8, size - 8)) {
        l->copied += size - 8;
        taken = PyDict_DelItem(l->waits, key) < 0 || wait_finish(wait) < 0 ? -1 : 1;
    }
    Py_XDECREF(wait);
    Py_DECREF(key);
    return taken;
}

/* The other end has an array that was sent from where it lies: what it lies in, and a lane. As the
   callback of Answers.send_array. */
static PyObject *released(PyObject *whose, PyObject *unused)
{
    Lane *l = (Lane *)PyTuple_GET_ITEM(whose, 1);
    storage_lend(PyTuple_GET_ITEM(whose, 0), -1);
    if (is_stream(l->connection))
        lending_answered((Stream *)l->connection);
    PyObject *held = PyObject_GetAttr((PyObject *)l, name_held);
    Py_XDECREF(held);
    if (held == NULL)
        return NULL;
    if (l->direct && held == Py_False && l->queue != NULL && !PyObject_Size(l->queue))
        Py_RETURN_NONE; /* nobody waits for that */
    PyObject *ordering = PyObject_GetAttr(l->sink, name_ordering);
    int failed = ordering == NULL ? -1 : tell(ordering, name_stir, NULL);
    Py_XDECREF(ordering);
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef released_method = {"released", released, METH_NOARGS, NULL};

/* Send an array while no other is on its way, as Answers.send_now, until something else is to be done:
   1; 0: it has to queue; -1: error. */
static int send_now(Lane *l, PyObject *connection, uint64_t number, PyObject *slot, const Py_buffer *from)
{
    PyObject *storage = slot_storage(slot);
    if (from->len > AT_ONCE || PyDict_GET_SIZE(l->bulk) || !payload_ready(l, connection)
        || storage == NULL || !Py_IS_TYPE(storage, Storage_Type))
        return 0;
    PyObject *whose = PyTuple_Pack(2, storage, (PyObject *)l);
    PyObject *done = whose == NULL ? NULL : PyCFunction_New(&released_method, whose);
    int failed = done == NULL ? -1 : 0;
    if (!failed) {
        /* Ops that would write to this memory wait until the client has it all. */
        storage_lend(storage, 1);
        l->turn = number + 1;
        int lends = lending_answers((Stream *)connection, from->len);
        const Payload payload = {RESULT, IN_PAYLOAD, number, slot_value(slot), from, done, NULL,
                                 Py_True, NULL, 0, lends, 1};
        failed = payload_post(l, &payload);
        if (((Stream *)connection)->pending) /* the rest goes another way */
            ((Stream *)connection)->answering = NULL;
    }
    Py_XDECREF(done);
    Py_XDECREF(whose);
    return failed ? -1 : 1;
}

/* A batch that asks for one array, which is there and not large: answered at once, if nothing runs
   before it. 1: answered, and nothing is left to see to; 0: answered, or to be taken in as any
   other (then *other); -1: error. */
static int serve(PyObject *self, PyObject *connection, const char *body, Py_ssize_t size, int *other)
{
    Lane *l = (Lane *)self;
    uint64_t turn, handle;
    uint32_t op;
    *other = 1;
    if (size != 20 || !l->direct || l->credit <= 0 || l->table == NULL || l->queue == NULL
        || !PyDict_CheckExact(l->table) || PyObject_Size(l->queue) != 0)
        return PyErr_Occurred() ? -1 : 0;
    memcpy(&turn, body, 8);
    memcpy(&op, body + 8, 4);
    memcpy(&handle, body + 12, 8);
    if (op != GET || turn != l->turn)
        return 0;
    PyObject *key = PyLong_FromUnsignedLongLong(handle);
    PyObject *slot = key == NULL ? NULL : PyDict_GetItemWithError(l->table, key);
    PyObject *value = slot == NULL ? NULL : slot_value(slot);
    Py_XDECREF(key);
    if (value == NULL || value == Py_None)
        return PyErr_Occurred() ? -1 : 0;
    Py_buffer bytes;
    if (PyObject_GetBuffer(value, &bytes, PyBUF_SIMPLE) < 0) {
        PyErr_Clear(); /* not in one piece: the longer way sees to it */
        return 0;
    }
    PyObject *answer = NULL;
    int sent = 0;
    if (bytes.len > l->small)
        sent = send_now(l, connection, turn, slot, &bytes);
    else if ((answer = PyBytes_FromStringAndSize(NULL, 8 + bytes.len))) {
        memcpy(PyBytes_AS_STRING(answer), &turn, 8);
        memcpy(PyBytes_AS_STRING(answer) + 8, bytes.buf, (size_t)bytes.len);
    }
    PyBuffer_Release(&bytes);
    if (sent > 0) {
        *other = 0;
        return l->connection == connection && !((Stream *)connection)->pending;
    }
    if (answer == NULL)
        return PyErr_Occurred() ? -1 : 0;
    *other = 0;
    l->turn = turn + 1;
    int out = lane_send(self, RESULT, answer, BYTES, 0);
    Py_DECREF(answer);
    return out;
}

/* Whether a payload that was sent up to message ``ack`` is kept. */
static int settles(Lane *l, uint64_t ack)
{
    Py_ssize_t at = 0;
    PyObject *seq, *entry;
    while (PyDict_Next(l->bulk, &at, &seq, &entry))
        if (PyLong_AsUnsignedLongLong(seq) <= ack)
            return 1;
    PyErr_Clear();
    return 0;
}

/* The other end has message ``seq``, which had a payload. As Peer._settle. */
static int settle(Lane *l, uint64_t seq)
{
    PyObject *key = PyLong_FromUnsignedLongLong(seq);
    PyObject *entry = key == NULL ? NULL : Py_XNewRef(PyDict_GetItemWithError(l->bulk, key));
    if (entry == NULL) {
        Py_XDECREF(key);
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *none = PyTuple_New(0), *done = PyObject_GetAttr(entry, name_on_delivered);
    PyObject *cancelled = done == NULL ? NULL : PyObject_GetAttr(entry, name_cancelled);
    int failed = cancelled == NULL || none == NULL || PyDict_DelItem(l->bulk, key) < 0
                 || PyObject_SetAttr(entry, name_regions, none) < 0;
    if (!failed && done != Py_None && cancelled == Py_False) {
        PyObject *answer = PyObject_CallNoArgs(done);
        failed = answer == NULL;
        Py_XDECREF(answer);
    }
    Py_XDECREF(cancelled);
    Py_XDECREF(done);
    Py_XDECREF(none);
    Py_DECREF(entry);
    Py_DECREF(key);
    return failed ? -1 : 0;
}

/* An ACK: what was granted, executed and delivered. As Peer._unreliable. 0, or -1: error. */
static int take_ack(PyObject *self, const char *body, Py_ssize_t size, uint64_t ack)
{
    Lane *l = (Lane *)self;
    uint64_t limit, executed;
    memcpy(&limit, body, 8);
    memcpy(&executed, body + 8, 8);
    l->messages_received++;
    lane_drop(l, ack);
    if (settles(l, ack) && tell_number(self, name__settle_up_to, ack) < 0)
        return -1;
    if (limit > MAX_LIMIT)
        limit = MAX_LIMIT;
    if ((long long)limit > l->limit) {
        l->credit += (long long)limit - l->limit;
        l->limit = (long long)limit;
    }
    for (Py_ssize_t k = 16; k < size; k += 8) {
        uint64_t seq;
        memcpy(&seq, body + k, 8);
        if (PyDict_GET_SIZE(l->bulk) > 0 && settle(l, seq) < 0)
            return -1;
    }
    if (executed == l->executed)
        return 0;
    l->executed = executed;
    return tell_number(l->sink, name_on_executed, executed);
}

/* Take in the message that the buffer holds. 1: take() may go on at once; 0: it returns; -1:
   error. */
static int take_in(PyObject *self, PyObject *connection, Py_ssize_t total)
{
    Lane *l = (Lane *)self;
    if (l->connection != connection)
        return 0; /* given up meanwhile: the message comes again over the next one */
    const char *message = (const char *)PyMemoryView_GET_BUFFER(((Stream *)connection)->rx)->buf;
    message += FRAME;
    Py_ssize_t size = total - FRAME;
    unsigned kind = size < HEADER ? 0 : (unsigned char)message[0];
    uint32_t arg = 0;
    uint64_t seq = 0, ack = 0;
    if (kind) {
        memcpy(&arg, message + 4, 4);
        memcpy(&seq, message + 8, 8);
        memcpy(&ack, message + 16, 8);
    }
    if (kind == ACK && !message[1] && seq == 0 && ack <= l->sent && size >= HEADER + 16
        && !(size % 8))
        return take_ack(self, message + HEADER, size - HEADER, ack);
    if (kind == 0 || kind > KINDS || message[1] || seq != l->seen + 1 || ack > l->sent) {
        /* Peer.dispatch knows every kind. */
        PyObject *incoming = stream_whole((Stream *)connection, total);
        int quiet = -1;
        if (incoming != NULL)
            quiet = ask_whether(self, name_dispatch, incoming, connection, NULL);
        Py_XDECREF(incoming);
        return quiet;
    }
    l->messages_received++;
    lane_drop(l, ack);
    if (settles(l, ack) && tell_number(self, name__settle_up_to, ack) < 0)
        return -1;
    /* Counted as here first, so that an answer carries the acknowledgement. */
    l->seen = seq;
    l->got += size;
    l->unreported++;
    if (PyDict_GET_SIZE(l->arriving) == 0)
        l->complete = seq;
    else if (tell(self, name__finish, NULL) < 0)
        return -1;
    int quiet = 0, other = 1;
    if (kind == RESULT && arg == BYTES) {
        int delivered = deliver(l, message + HEADER, size - HEADER);
        if (delivered < 0)
            return -1;
        other = !delivered;
    }
    else if (kind == BATCH && arg == 0)
        quiet = serve(self, connection, message + HEADER, size - HEADER, &other);
    if (other && !quiet && kind == BATCH && arg == 0) {
        int welcome = arriving_welcome(l, connection, message + HEADER, size - HEADER);
        if (welcome < 0)
            return -1;
        other = !welcome;
        quiet = welcome && !((Stream *)connection)->pending;
    }
    if (quiet < 0)
        return -1;
    if (other) {
        PyObject *body = PySequence_GetSlice(((Stream *)connection)->rx, FRAME + HEADER, total);
        PyObject *what = PyLong_FromUnsignedLong(kind), *detail = PyLong_FromUnsignedLong(arg);
        quiet = -1;
        if (body != NULL && what != NULL && detail != NULL)
            quiet = ask_whether(l->sink, name_on_message, what, detail, body);
        Py_XDECREF(body);
        Py_XDECREF(what);
        Py_XDECREF(detail);
        if (quiet < 0)
            return -1;
    }
    if (l->unreported >= l->ack_after || l->granted - l->got < l->low_credit)
        return tell(self, name__report_if_due, NULL) < 0 ? -1 : quiet;
    return quiet;
}

static enum taken receive(PyObject *connection, double wait, Py_ssize_t *size, PyObject **other)
{
    enum taken found = FAILED;
    if (is_stream(connection))
        found = stream_take((Stream *)connection, wait, size, other);
    else {
        PyObject *seconds = PyFloat_FromDouble(wait);
        if (seconds != NULL)
            *other = PyObject_CallMethodOneArg(connection, name_receive, seconds);
        Py_XDECREF(seconds);
        found = *other == NULL ? FAILED : OTHER;
    }
    if (found == OTHER && *other == Py_None) {
        Py_CLEAR(*other);
        found = NOTHING;
    }
    return found;
}

/* Release the lock; an exception that is set stays. */
static int let_go(Lane *l)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *released = PyObject_CallNoArgs(l->release);
    if (released != NULL)
        PyErr_Restore(type, error, traceback);
    else {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(traceback);
    }
    Py_XDECREF(released);
    return released == NULL ? -1 : 0;
}

/* If what was expected is there as a whole, behind everything else, and whoever expected it wants it:
   take it in (1), in fewer steps than dispatch does. 0: not so; -1: error. */
static int take_whole(PyObject *self, Stream *s, PyObject *told)
{
    Lane *l = (Lane *)self;
    const char *header = receiving_header(s);
    uint64_t seq, ack;
    memcpy(&seq, header + 8, 8);
    memcpy(&ack, header + 16, 8);
    if (s->landing.left || s->end || seq != l->seen + 1 || ack > l->sent
        || PyDict_GET_SIZE(l->arriving) || receiving_header_size(s) != HEADER + 8)
        return 0;
    lane_drop(l, ack);
    if (settles(l, ack) && tell_number(self, name__settle_up_to, ack) < 0)
        return -1;
    uint64_t number;
    memcpy(&number, header + HEADER, 8);
    int simply = arriving_landed(self, s, number, told == Py_True);
    if (simply) {
        if (simply > 0)
            receiving_taken(s);
        return simply;
    }
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int taken = value == NULL ? -1 : ask_whether(self, name__take_whole, value, s->landing.place, told);
    Py_XDECREF(value);
    if (taken > 0)
        receiving_taken(s);
    return taken;
}

/* What was expected is there, or begins to come. If it is there say so before anything else is done,
   as somebody waits for it. As take_in. */
static int take_landed(PyObject *self, PyObject *connection)
{
    Lane *l = (Lane *)self;
    Stream *s = (Stream *)connection;
    PyObject *text = s->answer, *told = Py_False;
    if (l->connection == connection && !s->landing.left && text != NULL
        && PyBytes_GET_SIZE(text) > 0 && stream_clear(s)) {
        char data[SMALL];
        Py_ssize_t size = PyBytes_GET_SIZE(text);
        memcpy(data + FRAME, PyBytes_AS_STRING(text), (size_t)size);
        l->messages_sent++;
        if (stream_put(s, data, FRAME + size, NULL, 0) < 0 && lane_survive(self) < 0)
            return -1;
        told = Py_True;
    }
    if (l->connection == connection) {
        int taken = take_whole(self, s, told);
        if (taken)
            return taken < 0 ? -1 : 0;
    }
    PyObject *incoming = receiving_landed(s);
    int quiet = -1;
    if (incoming != NULL && PyObject_SetAttr(incoming, name_told, told) == 0)
        quiet = ask_whether(self, name_dispatch, incoming, connection, NULL);
    Py_XDECREF(incoming);
    return quiet;
}

/* As stream_undo; what has landed is let go of. */
static void undo(PyObject *connection, enum taken found)
{
    stream_undo(connection);
    if (found == LANDED)
        receiving_forget((Stream *)connection);
}

/* take(connection, wait=0.0, looks=0, /) */
PyObject *lane_take(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Lane *l = (Lane *)self;
    if (count < 1 || count > 3) {
        PyErr_SetString(PyExc_TypeError, "take() takes a connection, wait and looks");
        return NULL;
    }
    if (l->acquire == NULL || l->sink == NULL || l->bulk == NULL || !PyDict_CheckExact(l->bulk)
        || l->arriving == NULL || !PyDict_CheckExact(l->arriving)) {
        PyErr_SetString(PyExc_AttributeError, "this lane has not been set up");
        return NULL;
    }
    PyObject *connection = args[0];
    double wait = count > 1 ? PyFloat_AsDouble(args[1]) : 0.0;
    long looks = count > 2 ? PyLong_AsLong(args[2]) : 0;
    if (PyErr_Occurred())
        return NULL;
    int quiet;
    do {
        PyObject *incoming = NULL;
        Py_ssize_t total = 0;
        enum taken found = NOTHING;
        int waits = looks > 0;
        if (looks > 0 && looking_due(&l->looking)) {
            int there = 0;
            if (is_stream(connection))
                there = stream_look((Stream *)connection, looks);
            else {
                const long long begin = looking_now();
                for (long k = 0; k < looks && looking_now() - begin < WITHIN_NS; k++) {
                    found = receive(connection, 0.0, &total, &incoming);
                    if (found != NOTHING)
                        break;
                    Py_BEGIN_ALLOW_THREADS;
                    sched_yield();
                    Py_END_ALLOW_THREADS;
                }
                there = found != NOTHING;
            }
            if (there < 0)
                return NULL;
            looking_looked(&l->looking, there);
            waits = !there;
        }
        if (found == NOTHING) {
            long long begin = waits ? looking_now() : 0;
            if (is_stream(connection)) /* not what follows: it would have to be copied */
                ((Stream *)connection)->most = arriving_size(l);
            found = receive(connection, wait, &total, &incoming);
            if (waits) {
                int came = found != NOTHING && found != FAILED;
                looking_waited(&l->looking, looking_now() - begin, came);
                if (came && is_stream(connection))
                    looking_woke((Stream *)connection);
            }
        }
        if (found == FAILED)
            return NULL;
        if (found == NOTHING)
            Py_RETURN_FALSE;
        PyObject *held = PyObject_CallNoArgs(l->acquire);
        if (held == NULL) {
            /* Ctrl-C in the wait for the lock: the message comes again over the next one. */
            undo(connection, found);
            Py_XDECREF(incoming);
            return NULL;
        }
        Py_DECREF(held);
        if (PyErr_CheckSignals() < 0) {
            undo(connection, found);
            Py_XDECREF(incoming);
            let_go(l);
            return NULL;
        }
        if (found == MESSAGE)
            quiet = take_in(self, connection, total);
        else if (found == LANDED) {
            quiet = take_landed(self, connection);
            if (quiet < 0)
                undo(connection, found); /* Ctrl-C: its bytes are gone from the socket */
        }
        else {
            quiet = ask_whether(self, name_dispatch, incoming, connection, NULL);
            static PyObject *known;
            if (quiet < 0 && !lane_raised(&known, "GpuRemoteError")) /* Ctrl-C, say */
                undo(connection, found); /* the same: nobody may have said where its bytes go */
        }
        Py_XDECREF(incoming);
        if (let_go(l) < 0 || quiet < 0)
            return NULL;
    } while (quiet);
    Py_RETURN_TRUE;
}
