"""Messages that arrive over a TCP connection. Private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from gpuremote.errors import InternalError, InvalidBuffer
from gpuremote.transport.base import Incoming, flat_view

__all__ = ["Message", "Payload"]

_IOV: Final = 256
"""Buffers of one receive call; fewer than the system's limit of 1024."""


class Message(Incoming):
    """A message without payload."""

    __slots__ = ("header", "received", "sizes")

    def __init__(self, header: memoryview) -> None:
        self.header = header
        self.sizes = ()
        self.received = 0

    def into(
        self, buffers: Sequence[memoryview], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if len(buffers):
            raise InvalidBuffer(f"{len(buffers)} buffers for a message without payload")
        if done is not None:
            done(self)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        if done is not None:
            done(self)


class Payload(Incoming):
    """A message with regions, and where they go.

    Attributes
    ----------
    left : int
        Payload bytes that have not arrived.
    undecided : bool
        Whether neither ``into`` nor ``discard`` was called.
    done : callable or None
        To be called when nothing is left.
    """

    __slots__ = ("_offset", "_total", "_untouched", "_views", "done", "header", "left",
                 "sizes", "undecided")

    def __init__(
        self, header: memoryview, sizes: tuple[int, ...], untouched: Callable[[], None]
    ) -> None:
        self.header = header
        self.sizes = sizes
        self.left = self._total = sum(sizes)
        self.done: Callable[[Incoming], None] | None = None
        self.undecided = self.left > 0
        # Views not filled yet, last first; None: what comes is dropped.
        self._views: list[memoryview] | None = None
        self._offset = 0
        self._untouched = untouched

    @property
    def received(self) -> int:  # type: ignore[override]
        return self._total - self.left

    def into(
        self, buffers: Sequence[memoryview], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if not self.undecided and self._total:
            raise InternalError("where this payload goes was already said")
        if len(buffers) != len(self.sizes):
            raise InvalidBuffer(f"{len(buffers)} buffers for a payload of {len(self.sizes)}")
        views = []
        for number, (buffer, size) in enumerate(zip(buffers, self.sizes, strict=True)):
            view = flat_view(buffer)
            if view.nbytes != size:
                raise InvalidBuffer(
                    f"buffer {number} has {view.nbytes} bytes and the payload brings {size}"
                )
            if size:
                if view.readonly:
                    raise InvalidBuffer(f"buffer {number} is read-only")
                views.append(view)
        self.undecided = False
        views.reverse()
        self._settle(views, done)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        self.undecided = False
        self._settle(None, done)
        self._untouched()

    def _settle(
        self, views: list[memoryview] | None, done: Callable[[Incoming], None] | None
    ) -> None:
        if self.left:
            self._views = views
            self.done = done
        elif done is not None:
            done(self)

    # -- for the connection ------------------------------------------------------------------

    @property
    def dropped(self) -> bool:
        return self._views is None

    def release(self) -> None:
        """Let go of the buffers and the callback."""
        self._views = None
        self.done = None

    def targets(self, limit: int) -> list[memoryview] | None:
        """Where the next ``limit`` bytes go; None if they are dropped."""
        views = self._views
        if views is None:
            return None
        view, offset = views[-1], self._offset
        room = view.nbytes - offset
        if room >= limit:
            return [view[offset : offset + limit]]
        out = [view[offset:]]
        limit -= room
        index = len(views) - 2
        while limit and len(out) < _IOV:
            view = views[index]
            room = view.nbytes
            out.append(view if room <= limit else view[:limit])
            limit -= min(room, limit)
            index -= 1
        return out

    def advance(self, count: int) -> None:
        """``count`` bytes arrived (in their place, if they have one)."""
        self.left -= count
        views = self._views
        if views is None:
            return
        offset = self._offset + count
        while views and offset >= views[-1].nbytes:
            offset -= views.pop().nbytes
        self._offset = offset

    def put(self, source: memoryview) -> int:
        """Copy ``source``, the next bytes, to their place; returns how many had one."""
        targets = self.targets(source.nbytes)
        if targets is None:
            self.advance(source.nbytes)
            return 0
        copied = 0
        for target in targets:
            target[:] = source[copied : copied + target.nbytes]
            copied += target.nbytes
        self.advance(copied)
        if copied < source.nbytes:
            copied += self.put(source[copied:])
        return copied
