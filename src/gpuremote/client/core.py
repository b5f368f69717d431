"""A session's core: issues (see ``client.issuing``), takes in what the server answers, and knows
who waits for what. It never waits itself; a driver does.

Two drivers use it unchanged: ``client.aio`` and ``client.blocking``.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import struct
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from gpuremote._clock import now_ns
from gpuremote.client.issuing import FLUSH_NS, NEVER
from gpuremote.client.known import Known
from gpuremote.client.origin import describe
from gpuremote.client.stats import SessionStats
from gpuremote.client.uploading import Uploader
from gpuremote.client.waits import Wait
from gpuremote.errors import (
    GpuRemoteError,
    ProtocolError,
    SessionClosed,
    SessionLost,
    error_from_wire,
)
from gpuremote.rpc.peer import Connection
from gpuremote.transport.base import Incoming
from gpuremote.wire import caps
from gpuremote.wire.batch import ALL_STREAMS, Op
from gpuremote.wire.frames import NUMBER, Kind, ResultForm, pack_info, unpack_info
from gpuremote.wire.state import SessionState, State, Stimulus

__all__ = ["Core"]

log = logging.getLogger("gpuremote.client")

_BATCH: Final = int(Kind.BATCH)
_RESULT: Final = int(Kind.RESULT)
_BYTES: Final = int(ResultForm.BYTES)
_unpack_number = NUMBER.unpack_from
_GET: Final = int(Op.GET)
_pack_get = struct.Struct("<QIQ").pack
"""A batch with one GET."""
LATE: Final = 4 << 20
"""Bytes of a result of which the server may hear with the next message, within milliseconds, that
they are here. It keeps them until then."""
MAX_FAILURES: Final = 256
"""Failures kept for a ``synchronize``; of more only the number is kept."""
VIEW: Final = "view"
"""The kind of a wait for memory, in place of bytes to be put somewhere."""
MAX_NEAR: Final = 256
"""Arrays of which is known that they lie in memory of this process."""
MAX_LINKS: Final = 4096
"""Copies to other servers whose failure is still passed on to the receiving session."""


class Core(Uploader):
    """The client's side of one session, without a driver.

    Parameters
    ----------
    peer_name : str
        Address of the server, for error texts.
    stack_depth : int
        Frames kept per op, so that an error can say where the op was issued.
    sync : bool
        Debugging: the driver waits after every op.
    download_policy : str
        What an implicit download does: ``"error"``, ``"warn"`` or ``"allow"``.
    dedupe : {"auto", "on", "off"}
        Whether large uploads are looked for at the server.
    """

    def __init__(
        self,
        peer_name: str,
        *,
        stack_depth: int = 2,
        sync: bool = False,
        download_policy: str = "error",
        dedupe: str = "off",
    ) -> None:
        super().__init__(self, stack_depth, sync)
        self.peer.on_lost = self.part
        self.state = SessionState()
        self.peer_name = peer_name
        self.session = b""
        self.advertised = peer_name
        self.encrypted = False
        self.devices: list[Any] = []
        self.owner: Any = None
        self.download_policy = download_policy
        self.known = Known(dedupe)
        self.draining = False
        self.wait: Callable[..., Any] = _nothing
        self.driver: object = None
        """Set by the driver: wait (or what to await) for a ``Wait``, with an optional timeout."""
        self.new_future: Callable[[], Any] = _nothing
        self.on_check = self._check
        self.on_sync: Callable[[Wait], None] = _ignore
        self.on_deferred: Callable[[], None] = _nothing
        self.poll: Callable[[], None] = _nothing
        self.deferred: deque[int] = deque()
        self.sources: weakref.WeakSet[Core] = weakref.WeakSet()
        self._linked: dict[int, tuple[Core, int]] = {}
        self.peer.wait_type = Wait
        self._ask = self.peer.ask
        self.peer.waits = self._waits
        self._failures: dict[int, GpuRemoteError] = {}
        self._more_failures = 0
        self.near_arrays: dict[int, tuple[object, float]] = {}
        self._farewell = Wait(0, "close")
        _cores.add(self)

    def _check(self) -> None:
        """Debugging: wait until everything issued has run, and raise here what failed."""
        wait = self.ask(Op.SYNC, ALL_STREAMS, kind="debug")
        self.on_sync(wait)
        failure = self.take_failures()
        if failure is not None:
            raise failure

    # -- asking ---------------------------------------------------------------------------------

    def ask(
        self,
        op: Op,
        *values: int,
        kind: str,
        into: memoryview | None = None,
        name: str = "",
        blob: Any = None,
    ) -> Wait:
        """Issue a record that has an answer, and send everything up to it."""
        with self.lock:
            self.flush_after = NEVER
            wait = Wait(0, kind, into)
            try:
                try:
                    wait.number = number = self._record(op, values, name, blob)
                finally:
                    self.flush_after = 0
                self._waits[number] = wait
                self.trips[kind] = self.trips.get(kind, 0) + 1
                self.flush()
            except BaseException:
                self.cancel(wait)
                raise
        if self._stalled:
            self._relieve_for(wait)
        return wait

    def _relieve_for(self, wait: Wait) -> None:
        """As ``_relieve``; who does not come back from it waits for nothing."""
        try:
            self._relieve()
        except BaseException:
            self.cancel(wait)
            raise

    def ask_bytes(self, handle: int, into: memoryview, kind: str) -> Wait:
        """Ask for an array's bytes, and send everything up to it. As :meth:`ask`, in short."""
        with self.lock:
            if self._special:
                self._prepare()
            if self._buffer or self.dropped or self._staged or self._watcher is not None:
                wait = self.ask(Op.GET, handle, kind=kind, into=into)
            else:
                number = self._next
                body = _pack_get(number, _GET, handle)
                # As in ``flush``: no call between the number and the post.
                self._first = self._next = number + 1
                try:
                    wait = self._ask(number, kind, into, _BATCH, body)
                except BaseException:
                    self.peer.interrupted(body, 0)
                    if number in self._waits:
                        self.cancel(self._waits[number])
                    raise
                if not wait.posted:
                    self._posted()
        if self._stalled:
            self._relieve_for(wait)
        return wait

    def expect(self, wait: Wait) -> None:
        """The next message is most likely the answer to ``wait``; from the thread that receives."""
        with self.lock:
            connection, into = self.peer.connection, wait.into
            if (
                into is not None
                and connection is not None
                and connection.expects
                and into.nbytes > self.peer.small
                and not wait.done
            ):
                wait.into = into = into.cast("B")
                body = NUMBER.pack(wait.number)
                self.peer.expect(Kind.RESULT, body, into, arg=ResultForm.PAYLOAD)

    def note_near(self, handle: int, place: object, writes: float) -> None:
        """The answer to a GET was that array ``handle`` lies in memory of this process; the GET was
        issued when there had been so many ``writes``."""
        with self.lock:
            known = self.near_arrays
            if self.peer.connection is not None:
                if len(known) >= MAX_NEAR:
                    del known[next(iter(known))]
                known[handle] = (place, writes)

    def near(self, handle: int) -> memoryview | None:
        """The bytes of an array that lies in memory of this process, if no array has been written
        to since that was found out: then nothing that is still to be executed changes them."""
        with self.lock:
            place, writes = self.near_arrays.get(handle, (None, math.nan))
            connection = self.peer.connection
            if writes == self.writes and connection is not None and not self.sync:
                found = connection.lent(place)
                if found is not None:
                    return found
            self.near_arrays.pop(handle, None)
        return None

    def cancel(self, wait: Wait) -> None:
        """The program no longer waits. On return nothing touches its buffers any more."""
        with self.lock:
            if wait.done or wait.cancelled:
                return
            wait.cancelled = True
            self.lent.discard(wait)
            if wait.entries is not None:
                numbers = [n for n, other in self._waits.items() if other is wait]
                for entry in wait.entries:
                    self.peer.cancel(entry)
                for number in numbers:
                    self._waits.pop(number, None)
                    if self.dead is None:
                        self._record(Op.CANCEL, (number,))
                if self.peer.connection is None:
                    self.on_output()
            elif wait.into is not None:
                # The answer may come at any time, or be coming: it is dropped from now on.
                if self.peer.drop_arriving(wait):
                    del self._waits[wait.number]
                if self.peer.connection is not None:
                    self.peer.connection.expect(b"", None, b"")
                wait.into = None

    # -- the peer's sink ------------------------------------------------------------------------

    def on_message(self, kind: int, arg: int, body: memoryview) -> bool:
        if kind == _RESULT:
            number = _unpack_number(body)[0] if len(body) >= 8 else self._next
            wait = self._waits.pop(number, None)
            if wait is None or wait.cancelled:
                self._check_asked(number)
                return False
            into = wait.into
            if arg == _BYTES and into is not None and into.nbytes == len(body) - 8:
                into.cast("B")[:] = body[8:]
                self.stats.payload_copied += len(body) - 8
                wait.finish()
            elif arg == _BYTES and wait.kind == VIEW:
                wait.finish(memoryview(bytes(body[8:])))
            elif arg == ResultForm.INFO and into is None:
                try:
                    wait.finish(unpack_info(body[8:]))
                except ProtocolError:
                    self._waits[wait.number] = wait
                    raise
            else:
                self._waits[wait.number] = wait  # it ends with the session
                raise ProtocolError(f"a RESULT of form {arg} with {len(body) - 8} bytes")
        elif kind == Kind.FAILURE:
            self._failure(unpack_info(body))
        elif kind == Kind.GOODBYE:
            self._said_goodbye(unpack_info(body))
        elif kind == Kind.NOTICE:
            self._noticed(unpack_info(body))
        else:
            raise ProtocolError(f"a server does not send messages of kind {kind}")
        return False

    def _noticed(self, notice: Any) -> None:
        match notice:
            case {"event": "draining"}:
                self.draining = True
            case {"event": "op by op", "graph": str(graph), "reason": str(reason)}:
                log.warning("%s: a %s runs op by op: %s", self.peer_name, graph, reason)

    def _check_asked(self, number: int) -> None:
        """An answer that nobody waits for is to a question that Ctrl-C or a timeout ended."""
        if number >= self._next:
            raise ProtocolError("a RESULT that nobody asked for")

    def on_payload(
        self, kind: int, arg: int, body: memoryview, incoming: Incoming
    ) -> tuple[Sequence[memoryview], object] | None:
        sizes = incoming.sizes
        if kind != Kind.RESULT or len(body) != 8 or len(sizes) != 1:
            raise ProtocolError("a payload that is no RESULT")
        number = NUMBER.unpack_from(body)[0]
        wait = self._waits.get(number)
        if wait is not None and wait.kind == VIEW and not wait.cancelled:
            place = incoming.adopt() or [np.empty(sizes[0], np.uint8).data]
            wait.value = place[0]
            return place, wait
        if wait is None or wait.cancelled or wait.into is None:
            self._check_asked(number)
            self._waits.pop(number, None)
            return None
        if wait.into.nbytes != sizes[0]:
            raise ProtocolError(f"{sizes[0]} bytes came for an array of {wait.into.nbytes}")
        wait.value = incoming.lent_from
        into = wait.into
        return [into if into.ndim == 1 and into.format == "B" else into.cast("B")], wait

    def on_payload_done(self, token: object) -> bool:
        assert isinstance(token, Wait)
        return self._result_is_here(token)

    def on_landed(self, number: int, view: memoryview) -> bool | None:
        wait = self._waits.get(number)
        if wait is None or wait.cancelled or wait.into is not view:
            return None
        return self._result_is_here(wait)

    def _result_is_here(self, wait: Wait) -> bool:
        """Whether it is soon enough to tell the server with the next message."""
        self._waits.pop(wait.number, None)
        wait.finish(wait.value)
        if (
            wait.number != self._next - 1  # an op behind it may want to write there
            or self.on_buffered is None
            or wait.into is None
            or wait.into.nbytes > LATE
        ):
            return False
        self.on_buffered()
        return True

    def on_payload_cancelled(self, token: object) -> None:
        raise ProtocolError("a server does not cancel results")

    def executed(self) -> int:
        return 0

    def _failure(self, body: Any) -> None:
        match body:
            case [int(number), int(root), int(code), str(text), str(op)]:
                pass
            case _:
                raise ProtocolError("a malformed FAILURE")
        error = self._failures.get(root) or self._build(root, code, text, op)
        wait = self._waits.pop(number, None)
        if wait in self.lent:
            wait = None  # nobody will hear of it by that
        if wait is not None and wait.entries is not None and not wait.cancelled:
            # The memory is lent until the transport is through with it, so the caller learns
            # of this then.
            self._failures.pop(root, None)
            wait.refusal = wait.refusal or error
        elif wait is not None and not wait.cancelled:
            # Raised to the one that waits, so it need not be raised again.
            self._failures.pop(root, None)
            wait.finish(error=error)
        elif number == root:
            if len(self._failures) < MAX_FAILURES:
                self._failures[root] = error
            else:
                self._more_failures += 1
            linked = self._linked.pop(root, None)
            if linked is not None:
                # The other session has a lock of its own: only leave word there.
                linked[0].deferred.append(linked[1])
                linked[0].on_deferred()

    def link_failure(self, number: int, other: Core, expected: int) -> None:
        """If record ``number`` fails, ``other`` no longer expects what it should have brought."""
        with self.lock:
            if len(self._linked) >= MAX_LINKS:
                self._linked.pop(next(iter(self._linked)))
            self._linked[number] = (other, expected)
        other.sources.add(self)

    def run_deferred(self) -> None:
        """Tell the server of copies that will not come; their results then fail."""
        while self.deferred:
            number = self.deferred.popleft()
            if self.dead is None:
                self.record(Op.CANCEL, number)
                self.flush()

    def _build(self, root: int, code: int, text: str, op: str) -> GpuRemoteError:
        where = self._origin_of(root)
        return error_from_wire(
            code,
            text,
            op=op,
            peer=self.peer_name,
            origin=describe(where) if where is not None else None,
        )

    def take_failures(self) -> GpuRemoteError | None:
        """The first failure that nobody was told of yet, with a note on the others."""
        with self.lock:
            if not self._failures:
                return None
            first, *others = self._failures.values()
            extra = len(others) + self._more_failures
            self._failures.clear()
            self._more_failures = 0
        if extra:
            names = ", ".join(sorted({str(other.op) for other in others}))
            first.add_note(f"{extra} more ops failed since the last wait ({names})")
        return first

    # -- the end --------------------------------------------------------------------------------

    def say_goodbye(self) -> Wait:
        """Ask the server to end the session once everything issued has been executed.

        The answer is not an error in any case: a server that can't be reached ends the session
        by itself when its grace period is over.
        """
        with self.lock:
            if self.state.value is State.OPEN:
                self.flush()
                self.state.advance(Stimulus.GOODBYE)
                self.peer.post(Kind.GOODBYE, pack_info([0, ""]))
                self._posted()
            else:
                self._farewell.finish()
        return self._farewell

    def _said_goodbye(self, body: Any) -> None:
        match body:
            case [int(code), str(text)]:
                self._farewell.finish()
                if code:
                    self.die(error_from_wire(code, text, peer=self.peer_name))
            case _:
                raise ProtocolError("a malformed GOODBYE")

    def die(self, error: GpuRemoteError) -> None:
        """Fail everything that waits, and everything that will be issued."""
        with self.lock:
            error.peer = error.peer or self.peer_name
            # Copies: an error that was raised holds the frames it passed, and their buffers.
            self._stop(copy.copy(error))
            waits = dict(self._waits)
            self._waits.clear()
            self.lent.clear()
            linked, self._linked = self._linked, {}
            self.peer.forget()
            self._farewell.finish()
            for wait in waits.values():
                wait.finish(error=copy.copy(error))
        for other, number in linked.values():
            # Where its bytes have come after all, the server takes no notice.
            other.deferred.append(number)
            other.on_deferred()

    def close(self) -> None:
        """After this nothing can be issued."""
        self.die(SessionClosed("the session was closed", peer=self.peer_name))
        with self.lock:
            connection, self.peer.connection = self.peer.connection, None
        if connection is not None:
            self.peer.on_lost(connection)
            connection.close(1.0)

    @property
    def waiting(self) -> int:
        """Answers that are still to come."""
        return len(self._waits)

    def settled(self) -> None:
        """A wait has ended: without another, the next record goes out soon."""
        if not self._waits:
            self.flush_after = now_ns() + self.idle_pause if self.idle_pause else 0
            self._pause = FLUSH_NS

    @property
    def full(self) -> bool:
        """Whether as many uploads are on their way as the server takes at a time."""
        return self.peer.bulk_in_flight >= caps.MAX_BULK and self.dead is None

    @property
    def behind(self) -> bool:
        """Whether the server has yet to take half of what it allows to be on its way."""
        return self.peer.credit < caps.WINDOW_BYTES // 2

    def part(self, connection: Connection) -> None:
        """A connection ends: its counters are added to the session's, and which arrays lie in
        memory of this process nobody knows of the next one."""
        _add(self.stats, connection)
        self.near_arrays.clear()

    def snapshot(self) -> SessionStats:
        """The counters up to now."""
        with self.lock:
            if self._tape is not None and self.dead is None:
                self._merge()
            found = copy.copy(self.stats)
            found.round_trips = Counter(self.trips)
            found.records = self._next - 1
            found.ops += len(self._origins) - self._named
            found.freed = self._freed
            found.withdrawn = self._withdrawn
            found.batches = self.peer.batches
            found.messages_sent = self.peer.messages_sent
            found.messages_received = self.peer.messages_received
            found.payload_copied += self.peer.copied
            if self.peer.connection is not None:
                _add(found, self.peer.connection)
        return found


def _add(stats: SessionStats, connection: Connection) -> None:
    found = connection.stats
    stats.bytes_sent += found.bytes_sent
    stats.bytes_received += found.bytes_received
    stats.payload_sent += found.payload_sent
    stats.payload_received += found.payload_received
    stats.payload_copied += found.payload_copied
    stats.payload_lent += found.payload_lent


_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def _disown() -> None:
    """After a fork the sockets belong to the parent: in the child no session can be used."""
    for core in list(_cores):
        core.lock = core.peer.lock = threading.RLock()
        # Not aborted: a shutdown would end the parent's connection as well.
        core.peer.connection = None
        core.on_output = _nothing
        core._farewell.finish()  # nobody will say it
        core._stop(SessionLost("this session belongs to the process that was forked"))


os.register_at_fork(after_in_child=_disown)


def _nothing() -> None:
    pass


def _ignore(wait: Wait) -> None:
    pass
