"""Messages that arrive over a stream. Private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

from gpuremote.errors import InternalError, InvalidBuffer
from gpuremote.memory.device import DeviceTarget
from gpuremote.memory.host import copy_bytes
from gpuremote.transport.base import Incoming, Target, flat_view

__all__ = ["Message", "Payload", "fitting", "fitting_targets"]

_IOV: Final = 256
"""Buffers of one receive call; fewer than the system's limit of 1024."""
_LONG: Final = 1 << 20
"""Bytes whose copy is worth letting go of the interpreter's lock."""


def fitting(sizes: Sequence[int], buffers: Sequence[Target]) -> list[memoryview]:
    """Flat host views of the buffers that get any bytes, after a look at each of them.

    Raises
    ------
    InvalidBuffer
        As in :func:`fitting_targets`.
    """
    return [
        target if isinstance(target, memoryview) else target.host()
        for target in fitting_targets(sizes, buffers)
    ]


def fitting_targets(sizes: Sequence[int], buffers: Sequence[Target]) -> list[Target]:
    """The same for who writes to the memory of a GPU as well.

    Raises
    ------
    InvalidBuffer
        One is read-only or of another size, or there are more or fewer than sizes.
    """
    if len(buffers) != len(sizes):
        raise InvalidBuffer(f"{len(buffers)} buffers for a payload of {len(sizes)}")
    views: list[Target] = []
    for number, (buffer, size) in enumerate(zip(buffers, sizes, strict=True)):
        view = buffer if isinstance(buffer, DeviceTarget) else flat_view(buffer)
        if view.nbytes != size:
            raise InvalidBuffer(
                f"buffer {number} has {view.nbytes} bytes and the payload brings {size}"
            )
        if size:
            if isinstance(view, memoryview) and view.readonly:
                raise InvalidBuffer(f"buffer {number} is read-only")
            views.append(view)
    return views


class Message(Incoming):
    """A message without payload."""

    __slots__ = ("header",)

    sizes = ()
    received = 0

    def __init__(self, header: memoryview) -> None:
        self.header = header

    def into(
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
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

    Parameters
    ----------
    header : memoryview
    sizes : tuple of int
    channel : int
        On which the bytes come.
    untouched : callable
        Returns when no other thread is writing to the buffers.

    Attributes
    ----------
    left : int
        Payload bytes that have not arrived.
    undecided : bool
        Whether ``into`` or ``discard`` has yet to be called.
    """

    __slots__ = (
        "_done",
        "_landed",
        "_lock",
        "_offset",
        "_placed",
        "_released",
        "_reported",
        "_untouched",
        "_views",
        "channel",
        "header",
        "left",
        "received",
        "sizes",
        "told",
        "undecided",
    )

    def __init__(
        self,
        header: memoryview,
        sizes: tuple[int, ...],
        channel: int,
        untouched: Callable[[], None],
    ) -> None:
        self.header = header
        self.sizes = sizes
        self.channel = channel
        self.received = 0
        self.left = sum(sizes)
        self.undecided = self.left > 0
        self._placed = False
        self._released = False
        # Views not filled yet, last first; None: what comes is dropped.
        self._views: list[memoryview] | None = None
        self._offset = 0
        self._untouched = untouched
        # Another thread may discard while the receiving one completes: one of them reports.
        self._lock = Lock()
        self._done: Callable[[Incoming], None] | None = None
        self._reported = False
        self._landed: memoryview | None = None
        self.told = False

    def landed(self, view: memoryview, count: int) -> None:
        """``count`` bytes are in ``view`` already, where they were expected to go."""
        self._landed = view
        self._offset = self.received = count
        self.left -= count

    def into(
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if self._placed:
            raise InternalError("where this payload goes was already said")
        landed, self._landed = self._landed, None
        if landed is not None:
            if len(buffers) == 1 and buffers[0] is landed:
                self._settle([landed], done)
                return
            # It goes elsewhere after all: so does what has come.
            landed = landed[: self.received]
            self.left += self.received
            self.received = self._offset = 0
        first = buffers[0] if len(buffers) == 1 == len(self.sizes) else None
        if (
            type(first) is memoryview
            and first.format == "B"
            and first.ndim == 1
            and first.c_contiguous
            and first.nbytes == self.left
            and not first.readonly
        ):
            views = [first]  # nearly every one
        else:
            views = fitting(self.sizes, buffers)
            views.reverse()
        if landed is not None:
            self._views = views
            self.put(landed)
        self._settle(views, done)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        self._landed = None
        self._settle(None, done)
        self._untouched()

    def _settle(
        self, views: list[memoryview] | None, done: Callable[[Incoming], None] | None
    ) -> None:
        with self._lock:
            if self.left:
                self._views = views
                self._done = done
                done = None
            elif self._reported:
                done = None
            self._placed = True
            self.undecided = False
        if done is not None:
            done(self)

    # -- for the connection ------------------------------------------------------------------

    @property
    def dropped(self) -> bool:
        return self._views is None

    def release(self) -> None:
        """Let go of the buffers and the callback: the connection is over. Bytes that another thread
        has at hand are not counted as received, as they have no place any more."""
        with self._lock:
            self._released = True
            self._views = None
            self._done = None

    def head(self) -> tuple[memoryview, int] | None:
        """The view that is being filled, and where its next byte goes; None if they are dropped."""
        views = self._views
        return None if views is None else (views[-1], self._offset)

    def targets(self, limit: int) -> list[memoryview] | None:
        """Where the next ``limit`` bytes, or some of them, go; None if they are dropped."""
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
        """``count`` bytes arrived, and are in their place if they have one."""
        views = self._views
        if views is not None:
            offset = self._offset + count
            while views and offset >= views[-1].nbytes:
                offset -= views.pop().nbytes
            self._offset = offset
        with self._lock:
            if not self._released:
                self.received += count
                self.left -= count

    def report(self) -> None:
        """Every byte arrived: say so, once."""
        with self._lock:
            done, self._done = self._done, None
            self._views = None
            self._reported = done is not None
        if done is not None:
            done(self)

    def put(self, source: memoryview) -> int:
        """Copy ``source``, the next bytes, to their place; returns how many had one."""
        put = 0
        while put < source.nbytes:
            targets = self.targets(source.nbytes - put)
            if targets is None:
                break
            before = put
            for target in targets:
                size = target.nbytes
                if size < _LONG:
                    target[:] = source[put : put + size]
                else:
                    copy_bytes(target, source[put : put + size])
                put += size
            self.advance(put - before)
        if put < source.nbytes:
            self.advance(source.nbytes - put)
        return put
