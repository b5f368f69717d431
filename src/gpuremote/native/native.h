/* gpuremote._native: what every small message goes through, in C.

   A call that waits for a few bytes costs some 20 µs in the kernel; the same steps in Python
   cost twice that, as their code is cold after each switch to another process; and an op that
   waits for nothing is done in a microsecond. This module holds the common case of such steps
   and nothing else: everything rare is left to the Python
   method named beside it. Each type has a twin in Python, which is used where this module was
   not built and which says what the steps mean:

       Stream  gpuremote.transport._stream
       Lane    gpuremote.rpc.lane
       Wait    gpuremote.client.waits
       Slot, Storage, Tally  gpuremote.server.storage
       Handle, Recorder, known  gpuremote.client.recording
       take_calls  gpuremote.server.calls
       gather  gpuremote.server.runs
       run_plan  gpuremote.server.execute
       run_calls  gpuremote.server.streams
       Single  gpuremote.backend.array_namespace
       Looking  gpuremote.transport._looking
       Loops  gpuremote.backend.fused
       Segment, Shelf  gpuremote.memory.shelves
       await_answer  gpuremote.client.blocking_driver
       Lane.ready  gpuremote.server.session
       put_at_hand  none: gpuremote.client.device takes all its steps in Python as well
       Repeats  none: gpuremote.wire.repeats does without where this module is not built
       fits    gpuremote.memory.host
       copy    gpuremote.memory.host
       doze    gpuremote.client.tail

   Lending (lending.c) and what is fastest (choosing.c) have none: Python does without. No code here
   runs without the interpreter lock, apart from a receive that waits, the bytes of a payload and a
   copy, so that a step is one step for other threads and for signals. */

#ifndef GPUREMOTE_NATIVE_H
#define GPUREMOTE_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sys/socket.h>
#include <structmember.h>

/* transport._framing: length u32, kind u8 (MESSAGE = 1), flags u8, channel u16. */
#define FRAME 8
#define PLAIN ((uint64_t)1 << 32)
/* wire.frames: kind u8, flags u8, reserved u16, arg u32, seq u64, ack u64. */
#define HEADER 24
#include "choosing.h"
#include "looking.h"

/* Messages up to this size, frame and all, are put together on the stack. */
#define SMALL 4096
/* Messages up to this size are sent with the interpreter's lock held, some 30 us of it. */
#define MIDDLING ((Py_ssize_t)256 << 10)

#define OPEN 2  /* transport._framing */
#define DATA 3
#define MAX_CHUNK (4 << 20)
#define BURST ((Py_ssize_t)8 << 20)       /* transport._sending */
#define LONG_BURST ((Py_ssize_t)64 << 20) /* transport.base */
#define LONGEST ((Py_ssize_t)256 << 20)   /* the same, within a host, where nobody waits meanwhile */
#define ALONE_NS 1000000000 /* how long only one thread has used a session that is taken for its own */
#define BATCH 1  /* wire.frames.Kind */
#define PAYLOAD 2
#define RESULT 3
#define ACK 5
#define MAX_LIMIT ((uint64_t)1 << 62) /* rpc.peer */
#define BYTES 0  /* wire.frames.ResultForm */
#define FREE 1   /* wire.batch.Op */
#define GET 2
#define FREE_NEAR 24
#define MAX_FREES 65536 /* wire.caps */
#define KINDS 9
#define FLUSH_NS 150000 /* client.issuing */

/* How far what was expected has come. */
typedef struct {
    PyObject *frame, *place; /* the OPEN frame that came, and where the bytes go */
    int channel;
    Py_ssize_t placed, left, chunk;
} Landing;

#define LENT_KINDS 12 /* below 256 KiB, 512 KiB, ... 256 MiB, and that */

typedef struct {
    PyObject_HEAD
    PyObject *stats;  /* TransportStats, less what is counted below */
    PyObject *rx;     /* memoryview of the receive buffer */
    PyObject *expected, *place, *answer; /* see receiving_expect */
    Landing landing;
    Py_ssize_t idle;  /* bytes to ask for when nothing is under way */
    Py_ssize_t most;  /* the same, of a message that payload may follow; 0: as ever */
    Py_ssize_t start, end;
    Py_ssize_t ahead; /* where in the buffer lies what came with the message before; 0: nothing did */
    int fd;
    unsigned long rx_touching; /* the thread that is writing to lent memory */
    unsigned long tx_touching; /* the thread that is reading it */
    char blocking, closed, plain, pending, calling, rx_busy, tx_busy;
    char hands_off; /* another thread waits until it no longer does */
    long gap_looks; /* see more_soon */
    Looking gaps;
    char roams, same_host;
    char shares; /* payload goes through memory that both ends see, as a rule */
    Looking room; /* looking whether the kernel takes more */
    int peeked; /* errno of a look: the next receive would not be told */
    char lends_not;
    int pipe_in, pipe_out, pipe_room; /* bytes that fit in the pipe; 0: there is none */
    Choice lent[LENT_KINDS]; /* whether payloads of that size are lent, see lending.c */
    Choice *answering; /* of the array that was sent last: how, since when, and its size */
    int answer_lent;
    long long answered_at;
    Py_ssize_t answer_size;
    long long moved; /* when it last went to another processor */
    long long taken; /* nanoseconds that others had this one during looks */
    long long sends, receives, messages_sent, messages_received, bytes_sent, bytes_received,
        payload_sent, payload_received, payload_lent;
} Stream;

/* Names of attributes and methods, as Python objects: name_append, name_done, ... */
#define NAMES(X) \
    X(_admits) X(_array) X(_begun) X(_better_at) X(_broken) X(_call_followers) X(_caught) X(_ended) X(_failed) X(_finish) X(_flush_by_time) X(_follow_up) X(_followers) X(_gone) \
    X(_input) X(_keep_origins) X(_known) X(_landed) X(_leader) X(_left) X(_owing) X(_posted) X(_prepare) X(_receive) X(_receives) X(_release) X(_renewed) \
    X(_relieve) X(_report_if_due) X(_send) X(_settle) X(_settle_up_to) X(_shared) X(_slots) X(_take_back) X(_take_in) X(_take_origin) X(_take_whole) X(_view) X(_whole) \
    X(_written) X(abort) X(acquire) X(append) X(arg) X(base) X(body) X(cancel) X(cancelled) X(cast) X(check_result) X(checks) X(device) X(digest) X(dispatch) X(done) \
    X(dtype) X(expect) X(expected) X(f) X(flush) X(failed) X(form) X(free_dropped) X(function) X(held) X(i) X(id) X(inplace) X(inputs) X(interrupted) X(kept) X(kind) \
    X(isdisjoint) X(left) X(looks) X(lost) X(meta) X(n_out) X(nbytes) X(numbers) X(on_delivered) X(on_executed) X(on_message) X(ops_executed) X(ordering) X(out) \
    X(pending_output) X(popleft) X(put_staged) X(quota) X(receive) X(release) X(regions) X(reserve) X(result) X(run) \
    X(run_otherwise) X(scratch) X(send) X(seq) X(set_result) X(setflags) X(shape) X(simple) X(slot) X(special) X(source) X(spoil) X(started) X(steady) X(stir) \
    X(step) X(storage) X(target) X(told) X(wait) X(wiring)
#define DECLARE(name) extern PyObject *name_##name;
NAMES(DECLARE)
#undef DECLARE

/* A message without payload that the other end may not have. */
typedef struct {
    unsigned long long seq;
    unsigned kind, flags, arg;
    PyObject *body;
} Kept;

typedef struct {
    PyObject_HEAD
    PyObject *connection, *lock, *acquire, *release, *sink, *waits, *wait_type, *trips, *table, *queue, *bulk, *arriving;
    PyObject *ready; /* see arriving.c */
    PyObject *kit;   /* rpc.bulk.Entry and transport.base.Region, see payloads.c */
    Kept *kept; /* a ring: ``count`` messages from ``first`` on, room for a power of two */
    size_t first, count, room;
    Looking looking;
    unsigned long long sent, seen, complete, turn, executed;
    long long small;
    char direct;
    long long credit, limit, got, granted, unreported, ack_after, low_credit;
    long long messages_sent, messages_received, batches, copied;
} Lane;

/* See recording.c: what turns ops into records, and what names an array on the server. */
typedef struct {
    PyObject_HEAD
    PyObject *lock, *acquire, *release, *dropped, *drop, *plans, *buffer, *origins, *on_buffered;
    PyObject *own; /* how the names of files of this package begin */
    PyObject *staged, *kinds, *made, *lane; /* see putting.c */
    PyObject *watcher; /* see uploading.c */
    long long first, next, last, named, oldest, full, flush_after, freed, pause, idle_pause;
    long long unused_from, unused_to, withdrawn, filling; /* see client.issuing */
    unsigned long thread; /* the latest to record from C, and since when there was no other */
    long long alone;
    double writes;
    int depth;
    char special, stalled, told, far;
} Recorder;

typedef struct {
    PyObject_HEAD
    Recorder *core;
    PyObject *meta;
    unsigned long long id;
} Handle;

enum taken { FAILED = -1, NOTHING, MESSAGE, OTHER, LANDED };

extern PyTypeObject *Stream_Type, *Lane_Type, *Wait_Type, *Slot_Type, *Handle_Type, *Recorder_Type,
    *Loops_Type, *Tally_Type, *Storage_Type, *Single_Type, *Repeats_Type, *Segment_Type,
    *Shelf_Type, *Block_Type;
extern PyType_Spec stream_spec, lane_spec, wait_spec, slot_spec, handle_spec, recorder_spec,
    loops_spec, tally_spec, storage_spec, single_spec, repeats_spec, segment_spec, shelf_spec,
    block_spec;

/* Receive once. MESSAGE: one message without payload and nothing else is in the buffer, *size
   bytes with its frame. OTHER: *other is what Stream._receive or _take_in gave (None: nothing
   yet). LANDED: what was expected, see
   receiving_land; receiving_landed has to follow. FAILED: an exception is set. */
enum taken stream_take(Stream *stream, double wait, Py_ssize_t *size, PyObject **other);

/* Look that many times whether something has come, without the interpreter's lock: 1 if so, or if
   only a receive can tell; -1: an exception is set. */
int stream_look(Stream *stream, long looks);

/* Look, with the interpreter's lock released, until there is one of ``events`` of poll (1), or that
   many times, or ``over`` (0). */
int looking_look(Stream *stream, short events, long looks, const char *over);

/* After a sleep: if this thread was woken on the processor of the peer that sent what woke it (over
   TCP within a host), go to another one before the two take turns there. */
void looking_woke(Stream *stream);

/* Whether more of a payload comes while one looks ``gap_looks`` times, without the interpreter's
   lock; -1: an exception is set. Where it does not help it is left out (``gaps``, whom the wait
   that follows is to be told). */
int stream_more_soon(Stream *stream);

/* doze(), see looking.c. */
PyObject *looking_doze(PyObject *module, PyObject *args);

/* Stream._more_soon, see looking.c. */
PyObject *looking_more_soon(PyObject *self, PyObject *unused);

/* Replace the exception that is set by what ``method`` makes of it. */
void stream_reword(PyObject *self, PyObject *method);

/* As a step ends: another thread may have closed the connection, and left the rest to this one. -1:
   error. */
int stream_leave(Stream *stream);

/* Set the exception that ``method`` gives. */
void stream_raise(PyObject *self, PyObject *method);

/* Stream._pull and Stream.expect, see receiving.c. */
PyObject *receiving_pull(PyObject *self, PyObject *args);
PyObject *receiving_expect(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* As Stream.expect: 1; 0: not such a place; -1: error. */
int receiving_hint(Stream *stream, const char *header, Py_ssize_t size, PyObject *place,
                   const char *answer, Py_ssize_t answer_size);

/* Any message may come next. */
void receiving_expect_none(Stream *stream);

/* Whether the buffer holds the beginning of the payload that is expected, up to its first byte. */
int receiving_is_expected(Stream *stream);

/* If so: receive it where it goes, as far as it comes now, which ``landing`` says. -1: error. */
int receiving_land(Stream *stream, double wait);

/* Then: it as a transport.base.Incoming, or NULL. */
PyObject *receiving_landed(Stream *stream);

/* Or, where all of it is in place: its header, and the size of that; it was taken in. */
const char *receiving_header(Stream *stream);
Py_ssize_t receiving_header_size(Stream *stream);
void receiving_taken(Stream *stream);

/* Or, where the connection is given up: let go of the memory. */
void receiving_forget(Stream *stream);

/* Stream._push and Stream._send_payload, see sending.c. */
PyObject *sending_push(PyObject *self, PyObject *args);
PyObject *sending_payload(PyObject *self, PyObject *args);

/* What comes before the payload of a message with one region: LEAD bytes, and the header. */
#define LEAD (FRAME + 2 + 8)
/* What comes before the bytes of an upload: that with its header, which has a number, and the head of
   the first DATA frame. */
#define UPLOAD_HEAD (LEAD + HEADER + 8 + FRAME)
Py_ssize_t sending_lead(char *lead, const char *header, Py_ssize_t size, const Py_buffer *from);

/* Send ``size`` bytes of ``lead``, and a payload in DATA frames on channel 0, behind nothing else:
   how many went out in all is in ``bytes``. With ``lends`` as lending_begin said; with ``gives_way``
   no more when the other end says something meanwhile, or takes its time. -1: error. */
int sending_run(Stream *stream, const char *lead, Py_ssize_t size, const Py_buffer *from, int lends,
                int gives_way, Py_ssize_t *bytes);

/* Whether a payload of ``size`` bytes, which stays as it is until the other end has it, is to be lent:
   where it is noted how long it took, which is said then (NULL: nowhere). */
Choice *lending_begin(Stream *stream, Py_ssize_t size, int *lends);
void lending_took(Choice *choice, int lends, Py_ssize_t size, long long nanoseconds);

/* The same of an array of which the other end says when it has it, one at a time. */
int lending_answers(Stream *stream, Py_ssize_t size);
void lending_answered(Stream *stream);

/* As sendmsg(2), of a head, and a head and the bytes of each frame, with these bytes lent: how many of
   them is added to ``lent``. */
ssize_t lending_sendmsg(Stream *stream, const struct msghdr *message, long long *lent);

/* Give back what lending takes; the same as Stream._end_lending. */
void lending_end(Stream *stream);
PyObject *lending_end_lending(PyObject *self, PyObject *unused);

/* What _take called MESSAGE as a transport.base.Incoming, or NULL. */
PyObject *stream_whole(Stream *stream, Py_ssize_t size);

/* Give a connection up, with an exception set, which stays: what it brought comes again over the
   next one. */
void stream_undo(PyObject *connection);

/* Whether stream_put may be used: nothing is queued, and the connection is open. */
static inline int stream_clear(Stream *stream)
{
    return stream->rx != NULL
           && !(stream->closed || stream->pending || stream->calling || stream->tx_busy);
}

/* Send a message: ``size`` bytes of data, of which the first FRAME are its frame (filled in here),
   and ``rest`` of body. -1: error. */
int stream_put(Stream *stream, char *data, Py_ssize_t size, const char *body, Py_ssize_t rest);

/* A new Wait, or NULL. */
PyObject *wait_make(unsigned long long number, PyObject *kind, PyObject *into);

/* A wait is for an upload (NULL), and for this message with a payload of it. -1: error. */
int wait_for_upload(PyObject *wait, PyObject *entry);

/* One message less to be waited for, as Uploader._put_done. -1: error. */
int wait_delivered(PyObject *wait);

/* Bytes of the memory that the answer goes to; 0: none. */
Py_ssize_t wait_into(PyObject *wait);

/* 0: it goes on; 1: it is over; 2: with an error. */
int wait_state(PyObject *wait);

/* Set Wait.posted. */
void wait_posted(PyObject *wait, int posted);

/* The header of a message, HEADER bytes at ``at``. */
void lane_header(char *at, unsigned kind, unsigned flags, uint32_t arg, uint64_t seq, uint64_t ack);

/* Number and count a message that is about to be sent, with ``size`` bytes of body and no payload,
   and keep it until the other end has it. -1: error. */
int lane_keep(Lane *lane, unsigned kind, unsigned flags, unsigned arg, PyObject *body,
              Py_ssize_t size);

/* One more round trip of this name. -1: error. */
int lane_count_trip(Lane *lane, PyObject *name);

/* Let go of the kept messages up to ``ack``. */
void lane_drop(Lane *lane, unsigned long long ack);

/* Send a message, and keep it until the other end has it. 1: it is out, and there is credit for
   more; 0: see to it; -1: error. */
int lane_send(PyObject *lane, unsigned kind, PyObject *body, unsigned arg, unsigned flags);

/* Whether the exception that is set is a gpuremote.errors.``name``, which ``kind`` keeps. */
int lane_raised(PyObject **kind, const char *name);

/* An exception of a send is set: if the connection broke, the message is kept for the next one.
   -1: it is another one, and stays set. */
int lane_survive(PyObject *lane);

/* Lane.take, see taking.c. */
PyObject *lane_take(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* PyObject_TypeCheck, quick for the one subclass of Stream there is. */
int is_stream(PyObject *object);

/* If ``wait`` is a Wait for exactly these bytes: put them in place (1), else 0. */
int wait_takes(PyObject *wait, const char *data, Py_ssize_t size);

/* Tell whoever waits that it is done. -1: error. */
int wait_finish(PyObject *wait);

/* What is in a Slot (borrowed); NULL or None if nothing is. */
PyObject *slot_value(PyObject *slot);

/* Its meta, likewise. */
PyObject *slot_meta(PyObject *slot);

/* Its storage, likewise. */
PyObject *slot_storage(PyObject *slot);

/* As Slot.fill. */
void slot_put(PyObject *slot, PyObject *value, PyObject *meta, PyObject *storage);

/* So many more transfers read the memory of a Storage. */
void storage_lend(PyObject *storage, int more);

/* Whether so many bytes fit in a Quota as it is. -1: error. */
int storage_room(PyObject *quota, PyObject *nbytes);

/* A new Storage of so many bytes of a Quota, or NULL with OutOfDeviceMemory set. */
PyObject *storage_make(PyObject *quota, PyObject *nbytes);

/* Whether a storage is known to nobody but its slot, is read by no transfer, and has so many bytes.
   -1: error. */
int storage_is_free(PyObject *storage, PyObject *nbytes);

/* run_calls and run_plan, see execute.c. */
PyObject *execute_run_calls(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *execute_run_plan(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* known, see recording.c. */
PyObject *recording_known(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* Take the lock of a recorder; let it go, where an exception that is set stays. -1: one is. */
int recording_lock(Recorder *recorder);
int recording_let_go(Recorder *recorder, int failed);

/* The steps of Recorder._append that the lock guards. 0: done. */
int recording_append(Recorder *recorder, PyObject *record, PyObject *name, PyObject **number);

/* A new array that a number names, as ``make`` makes it, or NULL. */
PyObject *recording_handle(PyObject *make, Recorder *recorder, long long number, PyObject *meta);

/* A message with a number and one payload. */
typedef struct {
    unsigned kind, arg;
    uint64_t number;
    PyObject *array; /* with the payload, which is C-contiguous */
    const Py_buffer *from;
    PyObject *done;   /* called when the other end has it */
    PyObject *wait;   /* who waits for that, or NULL */
    PyObject *steady; /* as transport.base.Region has it */
    const char *first; /* messages that go out before it, frames and all; SMALL bytes at most */
    Py_ssize_t first_size;
    int lends, gives_way; /* as sending_run has it */
} Payload;

/* Whether a connection takes such a message at once. */
int payload_ready(Lane *lane, PyObject *connection);

/* Send it, and keep it until the other end has it; what the kernel does not take is queued. With the
   lock held. -1: error. */
int payload_post(Lane *lane, const Payload *payload);

/* Call a method while an exception is set, which stays. */
void payload_tell_anyway(PyObject *object, PyObject *name, PyObject *argument);

/* Before an upload: give back what was dropped, as Uploader.free_dropped. */
int recording_free_dropped(Recorder *recorder);

/* Send an array over a socket, where that takes few steps, and wait until the server has it:
   1, and the new array; 0: nothing was done; -1: error. */
int uploading_send(Recorder *recorder, PyObject *array, PyObject *kind, PyObject *make,
                   PyObject *driver, PyObject **made);

/* As BlockingDriver.wait, where this thread alone receives over a Stream, and the answer comes: 1; 0:
   the driver has to; -1: error. */
int awaiting_wait(Recorder *recorder, PyObject *driver, PyObject *connection, PyObject *wait);

/* Recorder.await_answer, see awaiting.c. */
PyObject *awaiting_await(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* Recorder.put_at_hand, see putting.c. */
PyObject *putting_put(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* A view of a block of a Shelf (1); 0: there is none; -1: error. */
int shelf_take(PyObject *shelf, Py_ssize_t nbytes, PyObject **view);

/* take_calls, see calls.c. */
PyObject *calls_take(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* A FREE or FREE_NEAR record: its bytes; 0: it is another one, or malformed. */
Py_ssize_t calls_extent_of_free(const char *record, Py_ssize_t left);

/* The same, and take what it frees out of a table. -1: error. */
Py_ssize_t calls_free(PyObject *table, const char *record, Py_ssize_t left);

/* Bytes of a message that announces an upload like the one before, as it comes in a loop: with the
   one before it given back. 0: none is awaited. */
Py_ssize_t arriving_size(Lane *lane);

/* A batch that frees handles and announces an upload like the one before: 1: it was taken in; 0: it
   is another one; -1: error. */
int arriving_welcome(Lane *lane, PyObject *connection, const char *body, Py_ssize_t size);

/* All of an upload that was announced is in place, and the other end was told: 1: it was taken in, as
   Peer._take_whole; 0: it has more to it; -1: error. */
int arriving_landed(PyObject *lane, Stream *stream, uint64_t number, int told);

/* gather, see runs.c. */
PyObject *runs_gather(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* Copy one of the ways of ways.h. */
void copy_one_way(char *to, const char *from, size_t size, int way);

/* Copy as ``copy`` does, which lets go of the interpreter's lock for what is not small. */
void copy_flat(char *to, const char *from, Py_ssize_t size, int away);

/* lead and follow, see follow.c. */
PyObject *follow_lead(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *follow_follow(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* copy, see copy.c. */
PyObject *copy_bytes(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *copy_address(PyObject *module, PyObject *view);

/* A view of ``out`` if it is an array of the given type, shape and dtype whose memory can be written
   to in one piece, else None. NULL: error. */
PyObject *fitting(PyObject *out, PyObject *type, PyObject *shape, PyObject *dtype);

/* Call a method with the given arguments (NULL at their end), whose result does not matter. */
int tell(PyObject *object, PyObject *name, ...);

#endif
