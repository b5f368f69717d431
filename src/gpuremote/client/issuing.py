"""Issuing: ops become records in a batch, results get their numbers. Nothing here waits for an
answer, and everything here is on the hot path of every op."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final, Protocol

from gpuremote._clock import now_ns
from gpuremote.client.current import current_stream
from gpuremote.client.origin import OWN, Origin, caller, take
from gpuremote.client.recording import Recorder
from gpuremote.client.stats import SessionStats
from gpuremote.errors import GpuRemoteError, LimitExceeded
from gpuremote.ops.meta import Meta, MetaTable
from gpuremote.ops.plan import Plan, define, encode_definition
from gpuremote.ops.spec import OpSpec
from gpuremote.ops.torch_call import encode
from gpuremote.rpc.peer import Peer, Region, Sink
from gpuremote.wire import caps
from gpuremote.wire.batch import FIRST_PLAN, FREE_SPAN, Op, blob_record, fixed_record, free_record
from gpuremote.wire.batch import PREFIX as BATCH_PREFIX
from gpuremote.wire.frames import NUMBER, SEPARATE, Kind, pack_info
from gpuremote.wire.repeats import Repeats, learn

__all__ = ["Issuer", "Tape"]

FLUSH_BYTES: Final = 48 * caps.KiB
"""A batch of this size goes out whatever happens."""
_BATCH: Final = int(Kind.BATCH)
FLUSH_NS: Final = 150_000
"""A batch goes out once so many nanoseconds have passed since the last one ..."""
FLUSH_NS_MAX: Final = 1_200_000
"""... and after twice as many each time, up to this, while the program issues without a pause:
every send costs as much as several ops."""
NEVER: Final = (1 << 63) - 1
_pack_number = BATCH_PREFIX.pack
_FREES: Final = 4096
"""Handles per FREE record."""
_NO_STREAM: Final[dict[int, int]] = {}


class Tape(Protocol):
    """Records that something else writes, in place of :meth:`Issuer.issue`, and without Python.

    It is open or closed. While it is open, records get their numbers from it; it is closed before
    one gets its number here. So at any time one of the two gives them.

    Attributes
    ----------
    taken : tuple or None
        To read it closes the tape and empties it: number of the first record, the one after the
        last, the records, and where the ops were issued. None: there was nothing.
    freed : list of int
        To read it empties it: handles that were dropped.
    """

    @property
    def taken(self) -> tuple[int, int, bytes, Sequence[Origin]] | None: ...

    @property
    def freed(self) -> list[int]: ...

    def open(self, next_: int, due_at: int, pressing: bool, threads: set[int] | None, /) -> None:
        """Open it: records are numbered from ``next_`` on, and sent at a time (nanoseconds of
        ``_clock.now_ns``), or each at once. Threads that write are noted. One that is open is left
        as it is: there may be records on it."""


class Issuer(Recorder):
    """The half of a session's core that turns ops into records.

    Parameters
    ----------
    sink : Sink
        Takes what the server sends.
    depth : int
        Frames kept per op, so that an error can say where the op was issued.
    sync : bool
        Debugging: the driver waits after every op.

    Attributes
    ----------
    lock : threading.RLock
        Guards everything here.
    plans : dict
        By op, operands and parameters.
    short : dict
        The same plans under keys of a front end, which has others than these; it bounds them.
    dead : GpuRemoteError or None
        Why nothing can be issued any more.
    writes : float
        Ops in place that were issued: as long as it stays, no array changes. NaN: others write to
        them too.
    dropped : deque of int
        Handles of arrays that were collected; finalisers only append to it. So do those of
        streams and events, to ``dropped_streams`` and ``dropped_events``.
    idle_pause : int
        Set by the driver: nanoseconds for which the first record after a wait is kept.
    on_stall : callable
        Set by the driver: make progress until ``peer.credit`` is positive (or raise).
    on_output : callable
        Set by the driver: something was left for the kernel to take later.
    on_buffered : callable or None
        Set by the driver: records lie in the buffer and nothing in here will send them.
    on_check : callable
        Debugging: wait for everything issued, raise what failed.
    on_plans_cleared : callable
        The plans were forgotten, as there were too many.
    """

    def __init__(self, sink: Sink, depth: int, sync: bool) -> None:
        self.lock = threading.RLock()
        self.peer = Peer(sink, self.lock)
        self._post = self.peer.post
        self.stats = SessionStats()
        self.metas = MetaTable()
        self.plans = {}
        self.short: dict[Any, Plan] = {}
        self.dropped = deque()
        self.dropped_streams: deque[int] = deque()
        self.dropped_events: deque[int] = deque()
        self.dead: GpuRemoteError | None = None
        self.writes = 0.0
        self.on_stall: Callable[[], None] = _nothing
        self.on_output: Callable[[], None] = _nothing
        self.on_buffered = None
        self.on_check: Callable[[], None] = _nothing
        self.on_plans_cleared: Callable[[], None] = _nothing
        self._watcher = None
        self._watched: set[int] | None = None
        self.sync = sync
        self._streams = False
        self._stalled = False
        self._special = sync
        """Whether an op has to look at any of dead, sync, streams, stalled: one test for all."""
        self._stream = 0
        self._held = {Op.STREAM_DROP: 0, Op.EVENT_DROP: 0}
        self._depth = depth
        self._next = 1
        self._last = 0
        """Number of the latest record that was appended: known also to whom Ctrl-C kept from
        being told."""
        self._next_plan = FIRST_PLAN
        self._oldest = FIRST_PLAN
        """The first plan that the server has not been told to forget."""
        self._buffer = bytearray()
        self._first = 1
        """Number of the first record in the buffer."""
        self.flush_after = 0
        self.idle_pause = 0
        self._pause = FLUSH_NS
        self._told = False
        self._named = 0
        self._full = FLUSH_BYTES
        self._own = OWN
        self._lane = self.peer
        self._freed = 0
        self._withdrawn = 0
        self._filling = 0
        """Copies to memory that will be staged, which are under way."""
        self._unused_from = self._unused_to = 0
        """Between these numbers there are only records of what was staged, and of what was freed:
        no op uses the arrays made there as long as the second is that of the next record."""
        self._staged = []
        """Arrays whose records are out or in the buffer, and where their bytes lie: memory that
        the server sees too, of which it has not been told."""
        self._origins = []
        self._kept: deque[tuple[int, Sequence[Origin]]] = deque()
        self._tape: Tape | None = None
        self.repeats: Repeats | None = None
        """Where the server can expand what it made."""
        self.far = False
        """Whether messages go a way on which bytes count."""

    def _take_origin(self, number: int, op: object, frame: FrameType) -> Origin:
        return take(number, op, frame, self._depth)

    def _renewed(self, plan: Any) -> bytes:
        """Define a plan once more that another thread has cleared while this one was about to use
        it; its id. Graphs name other plans, and nobody else knows them: they are told by
        ``on_plans_cleared``."""
        ident = self._next_plan
        definition = encode_definition(plan) if isinstance(plan, Plan) else encode(plan)
        self.add_plan(("renewed", ident), plan, [ident, *definition[1:]])
        return ident.to_bytes(4, "little")

    def call(self, plan: Plan, values: Sequence[Any]) -> int:
        """Issue a plan call; the number that names its (first) result."""
        record = plan.pack(plan.id, *values)
        number = self.issue(plan, record, caller(sys._getframe(1)))
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()
        return number

    def record_call(self, plan: Any, values: Sequence[Any]) -> int:
        """Issue a call of a torch op; the number that names its first storage."""
        number = self.issue(plan, plan.layout.pack(plan.id, *values), caller(sys._getframe(1)))
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()
        return number

    def record(self, op: Op, *values: int, name: str = "", blob: Any = None) -> int:
        """Issue a record of a fixed kind; its number."""
        number = self._record(op, values, name, blob)
        if self._stalled:
            self._relieve()
        return number

    def _record(self, op: Op, values: tuple[int, ...], name: str = "", blob: Any = None) -> int:
        encoded = (
            fixed_record(op, *values)
            if blob is None
            else blob_record(op, *values, blob=pack_info(blob))
        )
        return self._append(encoded, name)

    def plan(
        self,
        key: Any,
        spec: OpSpec,
        operands: Sequence[Meta | str],
        params: dict[str, Any],
        device: int,
    ) -> Plan:
        """Define a plan that was not seen before, and remember it by ``key``."""
        with self.lock:
            plan = define(self.next_plan(), spec, operands, params, device, self.metas)
            self.add_plan(key, plan, encode_definition(plan))
        return plan

    def next_plan(self) -> int:
        """The number of the plan that is to be added next; with the lock held until it is."""
        if self.dead is not None:
            raise copy.copy(self.dead)
        if len(self.plans) >= caps.MAX_PLANS - 1:
            self.plans.clear()
            self.short.clear()
            self._oldest = self._next_plan
            self.on_plans_cleared()
            if self.repeats is not None:
                self.repeats.forget()
            self._record(Op.CLEAR_PLANS, ())
        return self._next_plan

    def add_plan(self, key: Any, plan: Any, definition: Any) -> None:
        """Send a plan, and remember it by ``key``."""
        if self.repeats is not None:
            learn(self.repeats, self._next_plan, plan)
        self._next_plan += 1
        self._record(Op.DEFINE, (), blob=definition)
        self.plans[key] = plan
        self.stats.plans += 1

    def use_tape(self, make: Callable[[Callable[[], None], Callable[[], None]], Tape]) -> Tape:
        """Have records written on a tape too; ``make`` gets what opens it, and what sends what is
        on it."""
        with self.lock:
            self._tape = tape = make(self._open_tape, self._send_tape)
            self._special = True
        return tape

    def watch(self, told: Callable[[bytes], None] | None, threads: set[int] | None) -> None:
        """Have ``told`` called with each batch that goes out, and the threads that issue noted in
        ``threads``; None: no longer."""
        with self.lock:
            if self.dead is None:
                self.flush()
            self._watcher = told
            self._watched = threads
            self._special = self._is_special()

    def _is_special(self) -> bool:
        return (
            self.sync
            or self._streams
            or self.dead is not None
            or self._tape is not None
            or self._watched is not None
        )

    def _open_tape(self) -> None:
        with self.lock:
            if self.dead is not None:
                raise copy.copy(self.dead)
            if not self._told and self.on_buffered is not None:
                self._told = True
                self.on_buffered()
            assert self._tape is not None
            pressing = self.sync or self._stalled
            self._tape.open(self._next, self.flush_after, pressing, self._watched)

    def _send_tape(self) -> None:
        with self.lock:
            self._prepare()
            if len(self._buffer) >= FLUSH_BYTES:
                self.flush()
            elif now_ns() >= self.flush_after:
                self._flush_by_time()
        self._follow_up()

    @property
    def unsent(self) -> bool:
        """Whether records lie in the buffer, of which the driver was told."""
        return self._told

    def _merge(self) -> None:
        """Take what is on the tape; after this numbers are given here."""
        tape = self._tape
        assert tape is not None
        # As in ``_send_records``: no call stands between what empties it and what keeps it.
        taken = tape.taken
        if taken is not None:
            self._next = taken[1]
            self._buffer += taken[2]
            first, last, _, origins = taken
            self._keep_origins(first - 1)
            self._kept.append((last - 1, origins))
            self.stats.ops += len(origins)
        self.dropped += tape.freed

    def _keep_origins(self, last: int) -> None:
        """Of the ops up to number ``last``, which are on their way."""
        if self._origins:
            self._kept.append((last, self._origins))
            self.stats.ops += len(self._origins) - self._named
            self._origins = []
            self._named = 0

    def claim(self, drop: Op, most: int, what: str) -> None:
        """Count one more stream or event (``drop`` is the record that gives it back).

        Raises
        ------
        LimitExceeded
            There are as many as a session may have.
        """
        with self.lock:
            if self._held[drop] >= most:
                self._drop_streams()
            if self._held[drop] >= most:
                raise LimitExceeded(
                    f"this session has {most} {what} already, the most there may be: drop some"
                )
            self._held[drop] += 1

    def use_streams(self) -> None:
        """From now on look at the current stream with every op."""
        with self.lock:
            self._streams = self._special = True

    def _prepare(self) -> None:
        if self.dead is not None:
            raise copy.copy(self.dead)
        if self._watched is not None:
            self._watched.add(threading.get_ident())
        if self._tape is not None:
            self._merge()
        if self._streams:
            wanted = current_stream.get(_NO_STREAM).get(id(self), 0)
            if wanted != self._stream:
                record = fixed_record(Op.STREAM_USE, wanted)
                self._stream = wanted
                self._buffer += record
                self._next += 1

    def _follow_up(self) -> None:
        if self._stalled:
            self._relieve()
        if self.sync:
            self.on_check()

    def _stop(self, error: GpuRemoteError) -> None:
        """Nothing can be issued any more."""
        if self.dead is None:
            self.dead = error
        self._special = True
        self._origins = []
        self._staged = []
        self._kept.clear()

    # -- sending --------------------------------------------------------------------------------

    def _flush_by_time(self) -> None:
        pause = self._pause
        self._pause = min(2 * pause, FLUSH_NS_MAX)
        self.flush(pause)

    def flush(self, pause: int = FLUSH_NS) -> None:
        """Send what lies in the buffer, and give back the handles that were dropped."""
        with self.lock:
            if self._tape is not None and self.dead is None:
                self._merge()
            if self.dropped_streams or self.dropped_events:
                self._drop_streams()
            if not self._staged:
                self._send_records(pause)
                return
            with self.peer.together():
                self._send_records(pause)
                if self._staged:  # still: what was dropped is not told
                    self._send_staged()
            self._posted()

    def _send_records(self, pause: int) -> None:
        while True:
            if self.dropped:
                self._free_dropped()
            buffer = self._buffer
            if not buffer:
                self._told = False
                return
            body = _pack_number(self._first) + buffer
            repeats = self.repeats
            squeezed = repeats.squeeze(body) if self.far and repeats is not None else None
            sent, arg = (body, 0) if squeezed is None else squeezed
            spared = len(body) - len(sent)
            fresh = bytearray()
            # No call stands between these lines (nor where a record gets its number): Ctrl-C
            # comes before all of them or after.
            self._first = self._next
            self._buffer = fresh
            if squeezed is not None and repeats is not None:
                repeats.fresh = False
            self.peer.credit -= spared
            try:
                out = self._post(_BATCH, sent, arg)
            except BaseException:
                self.peer.interrupted(sent, arg)
                raise
            if self._watcher is not None:
                self._watcher(body)
            if repeats is not None:
                self.stats.repeated = repeats.repeated
            self._keep_origins(self._next - 1)
            self._told = False
            self.flush_after = now_ns() + pause
            if not out:
                self._posted()

    def _send_staged(self) -> None:
        """Tell the server where the bytes lie of the arrays that the records before made."""
        staged = self._staged
        body = b"".join([NUMBER.pack(number) for number, _ in staged])
        regions = [Region(view) for _, view in staged]
        try:
            self.peer.post_payload(Kind.PAYLOAD, body, regions, arg=SEPARATE)
        except BaseException:
            if self.peer.holds(body):
                self._staged = []
            raise
        # No call stands between: Ctrl-C comes above or below.
        self._staged = []

    def _free_dropped(self) -> None:
        if self._tape is not None:
            self._merge()  # before a number is given here
        dropped = self.dropped
        handles = [dropped.popleft() for _ in range(min(len(dropped), _FREES))]
        if len(handles) > 1 and max(handles) - min(handles) >= FREE_SPAN:
            end = min(handles) + FREE_SPAN
            dropped.extend([handle for handle in handles if handle >= end])
            handles = [handle for handle in handles if handle < end]
        record = free_record(handles)
        self._buffer += record
        number = self._next
        self._next = number + 1
        self._freed += len(handles)
        if number == self._unused_to and not self._special:
            self._unused_to = number + 1
            self._withdraw_unused(handles)

    @property
    def uploading(self) -> bool:
        """Whether the program is in an upload through memory that the server sees, and what is
        unsent is of such uploads alone: it may be withdrawn yet."""
        return self._filling > 0 and self._next == self._unused_to

    def _withdraw_unused(self, handles: list[int]) -> None:
        """Of these, which were freed, what was staged with this batch and nothing has used: the
        server, which has not been told where it lies, need not be. Its memory is there for the next
        one while it is in the caches."""
        least = max(self._unused_from, self._first)
        unused = {handle for handle in handles if handle >= least}
        for one in [one for one in self._staged if one[0] in unused]:
            with contextlib.suppress(ValueError):  # a finaliser has flushed it
                self._staged.remove(one)
                self._withdrawn += 1

    def _drop_streams(self) -> None:
        if self._tape is not None:
            self._merge()
        for queue, op in (
            (self.dropped_events, Op.EVENT_DROP),
            (self.dropped_streams, Op.STREAM_DROP),
        ):
            while queue:
                ident = queue.popleft()
                if op is Op.STREAM_DROP and ident == self._stream:
                    self._stream = 0  # the server falls back to the default stream as well
                self._held[op] -= 1
                self._buffer += fixed_record(op, ident)
                self._next += 1

    def _posted(self) -> None:
        """After every message: see to what the kernel did not take, and to the credit."""
        connection = self.peer.connection
        if connection is None or connection.pending_output:
            self.on_output()
        if self.peer.credit <= 0:
            self._stalled = self._special = True

    def _relieve(self) -> None:
        """The server is behind: wait until it grants credit."""
        if self.lock._is_owned():  # type: ignore[attr-defined]
            # Of an outer level, which sees to it: another thread may need the lock to take in
            # what brings the credit.
            return
        self.stats.credit_waits += 1
        self._stalled = False
        self._special = self._is_special()
        self.on_stall()

    # -- where ops were issued ------------------------------------------------------------------

    def on_executed(self, number: int) -> None:
        """What was executed without a failure needs no origin any more."""
        kept = self._kept
        while kept and kept[0][0] <= number:
            kept.popleft()

    def _origin_of(self, number: int) -> Origin | None:
        for last, origins in self._kept:
            if number <= last:
                return next((o for o in origins if o[0] == number), None)
        return next((o for o in self._origins if o[0] == number), None)


def _nothing() -> None:
    pass
