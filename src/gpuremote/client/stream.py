"""Streams and events, with CUDA's meaning.

Work in one stream runs in the order in which it was issued; work in different streams is not
ordered, unless by an event. An op that uses an array which another stream is still making
waits for it by itself.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from gpuremote.client.core import Core
from gpuremote.client.current import current_stream
from gpuremote.errors import OpError
from gpuremote.wire import caps
from gpuremote.wire.batch import Op

if TYPE_CHECKING:
    from gpuremote.client.device import Device
    from gpuremote.client.waits import Wait

__all__ = ["Event", "Stream"]

_idents = itertools.count(1)
_outer: ContextVar[tuple[tuple[dict[int, int], object], ...]] = ContextVar(
    "gpuremote_outer_streams"
)
"""What ``current_stream`` was at each ``with`` that this thread or task is inside of; and the
stream, which must not end in there."""


class Stream(AbstractContextManager["Stream"]):
    """An ordered queue of work on one device. Made by ``device.stream()``.

    ``with stream:`` puts the ops issued inside (by this thread or task) into it.
    """

    def __init__(self, core: Core, device: Device[Any]) -> None:
        core.claim(Op.STREAM_DROP, caps.MAX_STREAMS, "streams")
        self._core = core
        self.device = device
        self.ident = next(_idents) & 0x7FFFFFFF
        core.record(Op.STREAM_NEW, self.ident, device.index)
        core.use_streams()

    def __enter__(self) -> Stream:
        # Kept with the thread or task, not here: several of them may be in the same stream.
        outer = current_stream.get({})
        _outer.set((*_outer.get(()), (outer, self)))
        current_stream.set({**outer, id(self._core): self.ident})
        return self

    def __exit__(self, *exc: object) -> None:
        *others, (outer, _) = _outer.get()
        _outer.set(tuple(others))
        current_stream.set(outer)

    def __del__(self) -> None:
        if hasattr(self, "ident"):  # else the session refused it
            # Finalisers only append.
            self._core.dropped_streams.append(self.ident)

    def wait(self, event: Event) -> None:
        """Work issued here from now on starts after ``event``. Does not block the caller."""
        with self:
            self._core.record(Op.EVENT_WAIT, event.ident)

    def __repr__(self) -> str:
        return f"<stream {self.ident} on {self.device}>"


class Event:
    """A point in a stream. Made by ``stream.record()``; without a stream one in the current one."""

    def __init__(self, core: Core, stream: Stream | None) -> None:
        core.claim(Op.EVENT_DROP, caps.MAX_EVENTS, "events")
        self._core = core
        self.ident = next(_idents) & 0x7FFFFFFF
        with stream or nullcontext():
            core.record(Op.EVENT_RECORD, self.ident)

    def __del__(self) -> None:
        if hasattr(self, "ident"):
            self._core.dropped_events.append(self.ident)

    def _ask(self, op: Op, kind: str) -> Wait:
        return self._core.ask(op, self.ident, kind=kind)

    def _ask_elapsed(self, end: Event) -> Wait:
        return self._core.ask(Op.EVENT_ELAPSED, self.ident, end.ident, kind="event")

    @staticmethod
    def _milliseconds(answer: Any) -> float:
        if answer is None:
            raise OpError("one of the events has not been reached yet", op="elapsed_time")
        return float(answer)
