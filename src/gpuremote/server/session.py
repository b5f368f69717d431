"""A session in its worker: takes the records of the client's batches to the streams that run
them, and holds what the client's handles name.

Two threads come here: whichever one receives calls the ``on_...`` methods (with the session's
lock held), and the threads of the streams run items (without it, except where they post).
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from gpuremote.backend.base import Backend
from gpuremote.errors import (
    GpuRemoteError,
    InternalError,
    InvalidHandle,
    LimitExceeded,
    OpCancelled,
    OutOfDeviceMemory,
    PeerCopyFailed,
    ProtocolError,
)
from gpuremote.ops.client_kernels import CodeBook
from gpuremote.ops.meta import Meta, MetaTable
from gpuremote.ops.torch_call import Views, is_call
from gpuremote.ops.torch_graph import is_graph
from gpuremote.rpc.peer import Peer
from gpuremote.server.answers import Answers
from gpuremote.server.arrivals import Arrival, Ready, Upload
from gpuremote.server.calls import enqueue, take_calls
from gpuremote.server.execute import Executable
from gpuremote.server.fusion import Fusion
from gpuremote.server.metas import ToldMetas
from gpuremote.server.ordering import Ordering
from gpuremote.server.sharing import Sharing
from gpuremote.server.storage import STALLED, Failure, Quota, Slot, Storage
from gpuremote.server.torch_graph import GraphExecutable
from gpuremote.server.torch_run import TorchExecutable
from gpuremote.transport.base import Incoming, Target
from gpuremote.wire import caps
from gpuremote.wire.batch import FIRST_PLAN, FREES, Op, begin, read
from gpuremote.wire.frames import NUMBER, SEPARATE, Kind
from gpuremote.wire.repeats import Expander

__all__ = ["WorkerSession"]

SCRATCH: Final = 64 << 20
"""Bytes for what nobody wants that are not counted; where it is more, it has to fit as an array."""
_HANDLES: Final = NUMBER
_TELL: Final = caps.ACK_BYTES // 32
"""Ops after which the client is told that they were executed: it remembers until then where each
was issued. (It is told with each acknowledgement of what was read, too, which may be long before.)
"""
_AT_ONCE: Final = 1024
"""Results of calls that are queued before another thread gets its turn."""
_BATCH: Final = int(Kind.BATCH)


def _check_handles(count: int) -> None:
    if count > caps.MAX_HANDLES:
        raise LimitExceeded(
            f"more than {caps.MAX_HANDLES} arrays in one session; drop some of them"
        )


class WorkerSession:
    """The server's side of one session.

    Parameters
    ----------
    backend : Backend
        Executes.
    memory_limit : int
        Bytes of device memory the session may hold.
    wake : callable
        Makes the main thread look at its stream and at the connection again.

    Attributes
    ----------
    lock : threading.RLock
        Guards the peer, the tables and the choice of queues.
    default : Stream
        The one that the main thread runs.
    goodbye : bool
        The client has ended the session.
    """

    def __init__(
        self, backend: Backend, memory_limit: int, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.lock = threading.RLock()
        self.peer = Peer(self, self.lock)
        self.backend = backend
        self.quota = Quota(memory_limit)
        self.goodbye = False
        self.metas = MetaTable()
        self._told_metas = ToldMetas(self.metas, len(backend.devices()))
        self.fusion = Fusion(backend)
        self._views = Views()
        self.ops_executed = 0
        self.graphs_compiled = 0
        self._tell_at = _TELL
        self.answers = Answers(self)
        self.ordering = Ordering(self, wake)
        self.sharing = Sharing(self)
        self.default = self.ordering.default
        self.streams = self.ordering.streams
        self._plans: dict[int, Executable] = {}
        self._code = CodeBook()
        self._table: dict[int, Slot] = {}
        self._expander = Expander(self.peer.charge)
        self._expected: dict[bytes, int] = {}
        self._arriving: dict[int, Arrival] = {}
        self._put_last = 0  # number of the latest PUT
        self.ready = Ready(self, self._arriving)
        self.peer.table = self._table
        self.peer.queue = self.default.queue
        self.peer.direct = backend.exports_memory
        self._devices = len(backend.devices())
        self._records: dict[int, Callable[..., object]] = {
            Op.DEFINE: self._define,
            **dict.fromkeys(FREES, self._free),
            Op.GET: self._get,
            Op.PUT: self._put,
            Op.PUT_INLINE: self._put_inline,
            **self.ordering.records,
            **self.sharing.records,
            Op.META: self._meta,
            Op.CANCEL: self._cancel,
            Op.SEND_TO: self._send_to,
            Op.EXPECT: self._expect,
            Op.STATS: self._stats,
            Op.COPY: self._copy,
            Op.CLEAR_PLANS: self._clear_plans,
        }
        self.send_to: Callable[[int, Any, Meta, dict[str, Any]], None] | None = None
        self.copying: Callable[[], int] = lambda: 0
        self._claimed: set[int] = set()
        self._gone: deque[bytes] = deque(maxlen=1024)
        self._announced_ticket = threading.Condition(self.lock)

    # -- the peer's sink ------------------------------------------------------------------------

    def on_message(self, kind: int, arg: int, body: memoryview) -> bool:
        if kind == _BATCH:
            return self._batch(self._expander.expand(body, arg) if arg else body)
        if kind != Kind.GOODBYE:
            raise ProtocolError(f"a client does not send messages of kind {kind}")
        self.default.queue.append((self.peer.turn, self._say_goodbye, ()))
        return False

    def on_payload(
        self, kind: int, arg: int, body: memoryview, incoming: Incoming
    ) -> tuple[Sequence[Target], object] | None:
        sizes = incoming.sizes
        if kind != Kind.PAYLOAD or len(body) != 8 * len(sizes):
            raise ProtocolError("a payload that belongs to no PUT")
        places = incoming.adopt() if self.backend.exports_memory else None
        if len(sizes) == 1 and places is None:
            arrival = self._arriving.get(number := _HANDLES.unpack_from(body)[0])
            if (
                arrival is not None
                and sizes[0] == arrival.meta.nbytes
                and self.place(number, arrival, "put", None, incoming.takes_device)
            ):
                return (arrival.target,), Upload([number])  # nearly every one
        numbers = [_HANDLES.unpack_from(body, 8 * k)[0] for k in range(len(sizes))]
        targets: list[Target | None] = []
        for k, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
            arrival = self._arriving.get(number)
            if arrival is not None and size != arrival.meta.nbytes:
                raise ProtocolError(
                    f"PUT {number} announced {arrival.meta.nbytes} bytes and {size} come"
                )
            # Without one its PUT was refused (the client has been told why) or cancelled.
            place = None if places is None else places[k]
            direct = incoming.takes_device
            if arrival is not None and self.place(number, arrival, "put", place, direct):
                targets.append(arrival.target)
            else:
                targets.append(None)
        refused = [size for size, target in zip(sizes, targets, strict=True) if target is None]
        some = refused and arg == SEPARATE and len(refused) < len(sizes)
        scratch = self._fill_gaps(targets, sizes, places) if some else None
        if refused and scratch is None:
            self._fail_arriving(
                numbers, OutOfDeviceMemory("another array of the same upload did not fit")
            )
            return None
        found = [target for target in targets if target is not None]
        return found, Upload(numbers, scratch)

    def _fill_gaps(
        self,
        targets: list[Target | None],
        sizes: Sequence[int],
        places: Sequence[memoryview] | None,
    ) -> Storage | None:
        """Where bytes go that nobody wants and that lie between others; None: there is no room."""
        gaps = [k for k, target in enumerate(targets) if target is None]
        try:
            most = max(sizes[k] for k in gaps) if places is None else 0
            scratch = Storage(self.quota, most if most > SCRATCH else 0)
            rest = memoryview(bytearray(most))
        except (OutOfDeviceMemory, MemoryError):
            return None
        for k in gaps:
            targets[k] = rest[: sizes[k]] if places is None else places[k]
        return scratch

    def on_payload_done(self, token: object) -> bool:
        assert isinstance(token, Upload)
        for number in token.numbers:
            if (arrival := self._arriving.pop(number, None)) is not None:
                arrival.fill(self.backend)
                self.sharing.keep(arrival)
                self.ready.keep(number, arrival)
        self.ordering.stir()
        return False  # the client waits for that

    def on_landed(self, number: int, view: memoryview) -> bool | None:
        arrival = self._arriving.get(number)
        placed = arrival is not None and arrival.placed and arrival.target is view
        return self.on_payload_done(Upload([number])) if placed else None

    def arriving(self, number: int) -> Arrival | None:
        """What is to be the array ``number``, if it is still waited for."""
        return self._arriving.get(number)

    def arrived(self, number: int, arrival: Arrival, error: Exception | None) -> None:
        """Every byte of it is in place, or will not come; without the lock."""
        with self.lock:
            if self._arriving.get(number) is arrival:
                del self._arriving[number]
                try:
                    if error is not None:
                        raise error
                    arrival.fill(self.backend)
                except Exception as failure:
                    arrival.slot.poison(self.failed(number, "put", failure))

    def on_payload_cancelled(self, token: object) -> None:
        assert isinstance(token, Upload)
        error = OpCancelled("the upload was cancelled by the program")
        self._fail_arriving(token.numbers, error)

    def _fail_arriving(self, numbers: list[int], error: GpuRemoteError) -> None:
        for number in numbers:
            arrival = self._arriving.pop(number, None)
            if arrival is not None:
                arrival.slot.poison(Failure.of(number, "put", error))
        self.ordering.stir()

    def on_executed(self, number: int) -> None:
        """A client executes nothing."""

    def executed(self) -> int:
        self._tell_at = self.ops_executed + _TELL
        return self.ordering.executed(self.peer.turn - 1)

    # -- records --------------------------------------------------------------------------------

    def _batch(self, body: memoryview) -> bool:
        """Take in records; whether nothing is to be done before what comes next."""
        peer, plans, table, records = self.peer, self._plans, self._table, self._records
        number, offset = begin(body)
        if number != peer.turn:
            raise ProtocolError(f"record {number} came where {peer.turn} was due")
        size = len(body)
        while offset < size:
            queue, start = self.ordering.current.queue, offset
            most = min(_AT_ONCE, caps.MAX_HANDLES - len(table))
            offset, number = take_calls(
                self, body, offset, number, plans, table, queue, most, self._arriving
            )
            # Until now whoever asked heard of too few, never of too many.
            peer.turn = number
            if offset != start:
                continue
            op, values, offset = read(body, offset, number, plans)
            if op == Op.PUT and offset == size:
                self.ready.heard(number, bytes(body[start:]), size)
            if isinstance(op, Executable):
                _check_handles(len(table) + op.n_out)
                peer.turn += op.n_out or 1
                enqueue(self, number, op, values, table, queue)
            else:
                peer.turn += 1
                records[op](number, *values)  # type: ignore[index]
            number = peer.turn
        follows = number == self._put_last + 1 and self._bytes_follow(number - 1)
        _check_handles(len(table))
        if self.streams:
            self.ordering.wake_threads()
            self.regulate()
        elif len(self.default.queue) > caps.MAX_BACKLOG or self.peer.credit <= 0:
            self.regulate()
        else:
            return follows and not self.default.queue
        return False

    def failed(self, number: int, op: str, error: Exception) -> Failure:
        """Tell the client that record ``number`` failed, and give what poisons its results."""
        known = error if isinstance(error, GpuRemoteError) else self.backend.translate_error(error)
        failure = Failure.of(number, op, known)
        with self.lock:
            self.answers.report(failure)
        return failure

    def slot(self, handle: int) -> Slot:
        """The slot of a handle; a handle that is not there gives a poisoned one."""
        found = self._table.get(handle)
        if found is None:
            found = Slot()
            error = InvalidHandle(f"array {handle} was freed, or never existed in this session")
            found.poison(Failure.of(handle, "handle", error))
        return found

    def _define(self, number: int, blob: Any) -> None:
        if len(self._plans) >= caps.MAX_PLANS:
            raise LimitExceeded(f"more than {caps.MAX_PLANS} plans in one session")
        executable: Executable
        if is_graph(blob):
            executable = GraphExecutable.from_definition(blob, self._plans)
        elif is_call(blob):
            executable = TorchExecutable.from_definition(
                blob, self._views, self.metas, self.backend, self._devices
            )
        else:
            executable = Executable.from_wire(
                blob, self.metas, self.backend, self._devices, self._code, self.fusion.executable
            )
        if executable.ident < FIRST_PLAN or executable.ident in self._plans:
            raise ProtocolError(f"plan {executable.ident} can't be defined")
        self._plans[executable.ident] = executable
        self._expander.learn(executable.ident, executable)

    def _clear_plans(self, number: int) -> None:
        self._plans.clear()
        self._expander.forget()
        self._code = CodeBook()

    def _free(self, number: int, *handles: int) -> None:
        for handle in handles:
            slot = self._table.pop(handle, None)
            arrival = self._arriving.get(handle)
            if (
                arrival is not None
                and not arrival.placed
                and not (handle in self._claimed or handle in self._expected.values())
                and sys.getrefcount(slot) <= 3  # this call's, and the arrival's
            ):
                # No op waits for what comes: its room is free for what is announced next.
                del self._arriving[handle]

    def _queue(self, number: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.ordering.current.queue.append((number, function, arguments))

    def _get(self, number: int, handle: int) -> None:
        slot = self._table.get(handle) or self.slot(handle)
        stream, answers = self.ordering.current, self.answers
        if (
            stream is self.default
            and not stream.queue
            and (answers.send_small(number, slot) or answers.send_now(number, slot))
        ):
            return
        stream.queue.append((number, answers.send_array, (slot,)))

    def _meta(self, number: int, handle: int) -> None:
        self._queue(number, self.answers.send_meta, self.slot(handle))

    def _stats(self, number: int) -> None:
        self.answers.info(number, self.stats())

    def announce(self, number: int, op: str, shape: Any, dtype: Any, device: Any) -> Arrival | None:
        """A slot for bytes that come from outside; poisoned if they can't be taken."""
        slot = self._table[number] = Slot()
        meta = self._told_metas.get(shape, dtype, device)
        try:
            storage = self.ordering.room(meta.nbytes)
        except GpuRemoteError as error:
            slot.poison(self.failed(number, op, error))
            return None
        arrival = self._arriving[number] = Arrival(slot, meta, storage)
        return arrival

    def place(
        self,
        number: int,
        arrival: Arrival,
        op: str,
        place: memoryview | None = None,
        direct: bool = False,
    ) -> bool:
        """Whether there is memory for it; otherwise it is no longer waited for."""
        try:
            arrival.place(self.backend, place, direct=direct)
        except Exception as error:
            del self._arriving[number]
            arrival.slot.poison(self.failed(number, op, error))
            return False
        return True

    def _bytes_follow(self, number: int) -> bool:
        """What comes next are the bytes of PUT ``number``. Whether nothing else is to be sent."""
        connection, arrival = self.peer.connection, self._arriving.get(number)
        if (
            arrival is not None
            and arrival.meta.nbytes
            and connection is not None
            and connection.expects
            and self.place(number, arrival, "put")
            and isinstance(arrival.target, memoryview)
        ):
            self.peer.expect(Kind.PAYLOAD, _HANDLES.pack(number), arrival.target, tell=True)
            return not connection.pending_output
        return False

    def _put(self, number: int, blob: Any) -> None:
        match blob:
            case [shape, dtype, device]:
                self.announce(number, "put", shape, dtype, device)
                self._put_last = number
            case [shape, dtype, device, True]:
                self.sharing.mark(self.announce(number, "put", shape, dtype, device))
            case _:
                raise ProtocolError(f"PUT {number} is malformed")

    def _put_inline(self, number: int, blob: Any) -> None:
        match blob:
            case [shape, dtype, device, bytes(data)]:
                arrival = self.announce(number, "put", shape, dtype, device)
            case _:
                raise ProtocolError(f"PUT_INLINE {number} is malformed")
        if arrival is None or not self.place(number, arrival, "put"):
            return
        if arrival.view.nbytes != len(data):
            raise ProtocolError(f"PUT_INLINE {number} has {len(data)} of {arrival.meta.nbytes}")
        del self._arriving[number]
        arrival.view[:] = data
        arrival.fill(self.backend)

    def _cancel(self, number: int, handle: int) -> None:
        left = {t: e for t, e in self._expected.items() if e != handle}
        if len(left) != len(self._expected):
            self._gone += self._expected.keys() - left.keys()
            self._expected = left
            self._announced_ticket.notify_all()
            error: GpuRemoteError = PeerCopyFailed("the other server could not bring the array")
        else:
            error = OpCancelled("the upload was cancelled by the program")
        if handle not in self._claimed:  # else its bytes are coming, or their loss will be told
            self._fail_arriving([handle], error)

    def _copy(self, number: int, handle: int, device: int) -> None:
        if device >= self._devices:
            raise ProtocolError(f"device {device} does not exist")
        out = self._table[number] = Slot()
        self._queue(number, self._run_copy, self.slot(handle), out, device)

    def _run_copy(self, number: int, source: Slot, out: Slot, device: int) -> object:
        if source.pending:
            return source
        if source.failure is not None:
            out.poison(source.failure)
            return None
        assert source.meta is not None
        meta = self.metas.get(source.meta.shape, source.meta.dtype, device)
        try:
            storage = Storage(self.quota, meta.nbytes)
            out.fill(self.backend.copy_to_device(source.value, device), meta, storage)
        except Exception as error:
            out.poison(self.failed(number, "copy_to", error))
        self.ops_executed += 1
        return None

    # -- copies from and to other servers -------------------------------------------------------

    def _send_to(self, number: int, handle: int, blob: Any) -> None:
        match blob:
            case {"host": str(), "port": int(), "session": bytes(), "ticket": bytes()}:
                self._queue(number, self._run_send_to, self.slot(handle), blob)
            case _:
                raise ProtocolError(f"SEND_TO {number} is malformed")

    def _run_send_to(self, number: int, slot: Slot, target: dict[str, Any]) -> object:
        if slot.pending:
            return slot
        if slot.failure is not None:
            with self.lock:
                self.answers.report(slot.failure._replace(number=number))
            return None
        assert slot.meta is not None
        if self.send_to is None:
            raise InternalError("this worker can't send to other servers")
        self.send_to(number, slot, slot.meta, target)
        return None

    def _expect(self, number: int, blob: Any) -> None:
        match blob:
            case [shape, dtype, device, bytes(ticket)] if len(ticket) >= 16:
                arrival = self.announce(number, "copy_to", shape, dtype, device)
                if arrival is not None:
                    self._expected[ticket] = number
                else:
                    self._gone.append(ticket)
                self._announced_ticket.notify_all()
            case _:
                raise ProtocolError(f"EXPECT {number} is malformed")

    def claim(self, ticket: bytes, patience: float) -> tuple[int, memoryview] | None:
        """A peer server presents a ticket: where its bytes go, once. Blocks for as long as the
        client's word of it may still be on its way."""
        with self.lock:
            self._announced_ticket.wait_for(
                lambda: ticket in self._expected or ticket in self._gone, patience
            )
            number = self._expected.pop(ticket, 0)
            self._gone.append(ticket)
            arrival = self._arriving.get(number)
            if arrival is None or not self.place(number, arrival, "copy_to"):
                return None
            self._claimed.add(number)
            return number, arrival.view

    def peer_copy_done(self, number: int, error: GpuRemoteError | None) -> None:
        """The bytes of EXPECT ``number`` are in place, or will not come."""
        with self.lock:
            self._claimed.discard(number)
            if error is None:
                self.on_payload_done(Upload([number]))
                return
            arrival = self._arriving.pop(number, None)
            if arrival is not None:
                arrival.slot.poison(self.failed(number, "copy_to", error))
            self.ordering.stir()

    # -- flow -----------------------------------------------------------------------------------

    def regulate(self) -> None:
        """Grant credit only while the backlog is small and the client reads its answers."""
        credit = self.peer.credit
        if credit < -caps.MAX_UNREAD:
            raise LimitExceeded(f"{-credit} bytes of answers were asked for and not read")
        held = (
            credit <= 0
            or self.ordering.backlog > caps.MAX_BACKLOG
            or self.sharing.asked > caps.MAX_QUESTIONS
        )
        if held != self.peer.held:
            self.peer.held = held
            if not held:
                self.peer.acknowledge()

    def run_default(self) -> None:
        """Run what the default stream can run now. Main thread only."""
        self.ordering.run_default()
        if self.peer.held:
            with self.lock:
                self.regulate()
        if self.ops_executed >= self._tell_at and not self.default.queue:
            with self.lock:
                self.peer.acknowledge()
        if self.streams:
            self.ordering.wake_threads()

    def _say_goodbye(self, number: int) -> object:
        busy = any(stream.queue for stream in list(self.streams.values()))
        if busy or self._arriving or self.copying() or self.sharing.active:
            return STALLED
        with self.lock:
            self.goodbye = True
            self.answers.goodbye()
        return None

    def stats(self) -> dict[str, Any]:
        """Counters of this session on the server; bytes where not said otherwise."""
        return {
            "ops": self.ops_executed,
            "ops_fused": self.fusion.ops,
            "graphs_compiled": self.graphs_compiled,
            "records": self.peer.turn - 1,
            "handles": len(self._table),
            "plans": len(self._plans),
            "streams": self.ordering.count,
            "memory_used": self.quota.used,
            "memory_peak": self.quota.peak,
            "memory_limit": self.quota.limit,
            "messages_received": self.peer.messages_received,
            "messages_sent": self.peer.messages_sent,
            "results_kept": self.peer.unacknowledged,
            "payload_lent": self.peer.connection.stats.payload_lent if self.peer.connection else 0,
            "uploads_taken": self.sharing.taken,
            "uploads_kept": self.sharing.kept,
        }
