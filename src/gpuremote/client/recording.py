"""From ``x + y`` to a record in the batch: what every op goes through. Private."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from gpuremote._clock import now_ns
from gpuremote._speed import native
from gpuremote._types import Shape
from gpuremote.client.origin import Origin, caller, take
from gpuremote.client.waits import Wait
from gpuremote.ops.meta import Meta
from gpuremote.ops.plan import Plan
from gpuremote.ops.spec import OpSpec
from gpuremote.rpc.lane import Lane

__all__ = ["Handle", "PythonHandle", "PythonRecorder", "Recorder", "known", "python_known"]

_INT64: Final = 1 << 63

A = TypeVar("A")


class PythonRecorder:
    """Turns ops whose plan is known into records.

    What is rare is left to the methods of ``Issuer`` that are declared below.
    """

    lock: threading.RLock
    dropped: deque[int]
    plans: dict[Any, Plan]
    on_buffered: Callable[[], None] | None
    writes: float
    flush_after: int
    _buffer: bytearray
    _staged: list[tuple[int, memoryview]]
    _kinds: dict[tuple[Shape, np.dtype[Any], int], tuple[Meta, bytes, object]]
    made: dict[int, Any]
    _watcher: Callable[[bytes], None] | None
    far: bool
    _first: int
    _lane: Lane
    _freed: int
    _unused_from: int
    _unused_to: int
    _withdrawn: int
    _filling: int
    _origins: list[Origin]
    _next: int
    _last: int
    _named: int
    _full: int
    _own: str
    _oldest: int
    _depth: int
    _special: bool
    _stalled: bool
    _told: bool

    def _append(self, encoded: bytes, name: str = "", /) -> int:
        """Issue a record that is packed already; its number. With ``name``, that of an op, it is
        noted where the program called."""
        with self.lock:
            if self._special:
                self._prepare()
            number = self._next
            self._next = number + 1
            self._last = number
            self._buffer += encoded
            if name:
                self._named += 1
                frame = caller(sys._getframe(1))
                self._origins.append(take(number, name, frame, self._depth))
            if len(self._buffer) >= self._full:
                self.flush()
            elif now_ns() >= self.flush_after:
                self._flush_by_time()
            elif not self._told and self.on_buffered is not None:
                self._told = True
                self.on_buffered()
        return number

    def issue(self, plan: Plan, record: bytes, frame: FrameType) -> int:
        """Issue a plan call that is packed already; the number that names its first result.

        ``frame`` is where the program called.
        """
        with self.lock:
            if self._special:
                self._prepare()
            if plan.id < self._oldest:
                record = self._renewed(plan) + record[4:]
            # Nothing stands between these lines that may collect garbage: a finaliser may issue.
            number = self._next
            self._buffer += record
            self._next = number + plan.step
            if plan.inplace:
                self.writes += 1
            self._origins.append(
                take(number, plan, frame, 2)
                if self._depth == 2
                else self._take_origin(number, plan, frame)
            )
            if now_ns() >= self.flush_after:
                self._flush_by_time()
            elif not self._told and self.on_buffered is not None:
                self._told = True
                self.on_buffered()
        if self._special:
            self._follow_up()
        return number

    def put_at_hand(
        self,
        array: Any,
        kind: type,
        device: int,
        make: Callable[[Any, int, Meta], A],
        driver: object,
        /,
    ) -> A | None:
        """Upload an array where ``Uploader.note_kind`` has noted such ones, as ``Device.put`` does,
        in one step; the array that ``make`` makes of it. None: it takes more steps, and nothing
        was done. ``kind`` is ``numpy.ndarray``; ``driver`` waits for uploads (None: only one
        for which nobody has to wait is taken).

        Here it always takes them.
        """
        return None

    def await_answer(self, driver: object, wait: Wait, /) -> bool:
        """Wait for an answer as ``BlockingDriver.wait`` does, in one step; whether it came. False:
        it takes more steps. Here it always does."""
        return False

    if TYPE_CHECKING:

        def _prepare(self) -> None:
            """Before a record, where it is special."""
            raise NotImplementedError

        def _follow_up(self) -> None:
            """After it, without the lock."""
            raise NotImplementedError

        def _renewed(self, plan: Any) -> bytes:
            """A plan's new number, four bytes: the server was told to forget it."""
            raise NotImplementedError

        def _take_origin(self, number: int, op: object, frame: FrameType) -> Origin:
            raise NotImplementedError

        def _flush_by_time(self) -> None:
            raise NotImplementedError

        def flush(self) -> None:
            raise NotImplementedError


class PythonHandle:
    """Names an array on the server, and gives the name back when it is collected."""

    __slots__ = ("_core", "_id", "_meta")

    def __init__(self, core: Any, ident: int, meta: Meta) -> None:
        self._core = core
        self._id = ident
        self._meta = meta

    def __del__(self) -> None:
        # May run in any thread, in the middle of anything: only append.
        self._core.dropped.append(self._id)


def python_known(spec: OpSpec, frame: FrameType, first: Any, *others: Any) -> Any:
    """The result of an op on ``first`` and up to two operands more, which are arrays of the same
    class, floats or integers of 64 bits; ``first`` itself for an op in place. None where no plan
    is known for that: nothing was issued.

    Metas are interned, so the key of a plan hashes and compares by identity.
    """
    core = first._core
    key = [spec, first._meta]
    fields = [first._id]
    for other in others:
        kind = other.__class__
        if kind is first.__class__ and other._core is core:
            key.append(other._meta)
            fields.append(other._id)
        elif kind is float or (kind is int and -_INT64 <= other < _INT64):
            key.append("f" if kind is float else "i")
            fields.append(other)
        else:
            return None
    plan = core.plans.get(tuple(key))
    if plan is None or (plan.result is None and not plan.inplace):
        return None
    number = core.issue(plan, plan.pack(plan.id, *fields), frame)
    return first if plan.inplace else first.__class__(core, number, plan.result)


Recorder = PythonRecorder
Handle = PythonHandle
known = python_known
if not TYPE_CHECKING and native is not None:
    Recorder = native.Recorder
    Handle = native.Handle
    known = native.known
