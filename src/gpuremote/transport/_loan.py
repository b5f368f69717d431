"""A payload that lies in memory which both ends see. Private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import TypeAlias

from gpuremote._speed import native
from gpuremote.errors import InternalError, InvalidBuffer
from gpuremote.memory.device import DeviceTarget
from gpuremote.memory.host import copy_bytes
from gpuremote.transport.base import Incoming, Target, TransportStats, flat_view

__all__ = ["SharedPayload"]

LARGE = 32 << 20
"""Bytes of a payload from which on it does not stay in caches while it is copied."""
AT_ONCE = 16 << 20
"""Bytes that ``into`` copies itself, so that most payloads are in place when it returns."""


_Part: TypeAlias = tuple[int, memoryview, memoryview]


class SharedPayload(Incoming):
    """A message whose regions the sender has put (or is about to put) into shared memory.

    Parameters
    ----------
    header : memoryview
    sizes : tuple of int
    views : list of memoryview
        Where each region lies.
    behind : callable
        Called with this when there is something to be copied that ``into`` left.
    untouched : callable
        Returns when no other thread is writing to the buffers.
    stats : TransportStats
        Where bytes that are there, and bytes that are copied, are counted.
    counter : memoryview or None
        Where the sender writes how much is there, for a payload of one region.
    patience : int
        Nanoseconds without news from there that :meth:`copy` waits for.
    lent : sequence
        ``Connection.lent`` takes them: where regions lie that are this end's own memory. Then all
        of it may be copied and not kept.

    Attributes
    ----------
    total, said, there : int
        Bytes in all, of those the ones of which the sender has said that they are there, and the
        ones of which this end knows it.
    undecided : bool
        Whether ``into`` or ``discard`` has yet to be called.
    """

    __slots__ = (
        "_adopted",
        "_behind",
        "_counted",
        "_counter",
        "_done",
        "_eager",
        "_lent",
        "_lock",
        "_pairs",
        "_patience",
        "_stats",
        "_untouched",
        "_views",
        "header",
        "lent_from",
        "received",
        "said",
        "sizes",
        "there",
        "total",
        "undecided",
    )

    def __init__(
        self,
        header: memoryview,
        sizes: tuple[int, ...],
        views: list[memoryview],
        behind: Callable[[SharedPayload], None],
        untouched: Callable[[], None],
        stats: TransportStats,
        lent: Sequence[object] = (),
        counter: memoryview | None = None,
        patience: int = 0,
    ) -> None:
        self.header = header
        self.sizes = sizes
        self.total = sum(sizes)
        self.there = self.said = 0
        self._counter = counter
        self._patience = patience
        self._eager = counter is not None  # more may be there than is known
        self.received = 0
        self.undecided = True
        self._views: list[memoryview] | None = views
        self._stats = stats
        self._counted = 0
        self._lent = bool(lent)
        self.lent_from = lent[0] if len(lent) == len(sizes) == 1 else None
        self._adopted = False
        # What is to be copied: from which byte of the payload on, to where, from where; last
        # first. How far that is ``received`` alone says, as an interruption may come anywhere.
        self._pairs: list[_Part] | None = None
        self._behind = behind
        self._untouched = untouched
        # Another thread may discard while the receiving one copies.
        self._lock = Lock()
        self._done: Callable[[Incoming], None] | None = None

    def adopt(self) -> list[memoryview] | None:
        if self._lent:
            return None
        self._adopted = self._views is not None
        return self._views

    def into(
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if not self.undecided:
            raise InternalError("where this payload goes was already said")
        if len(buffers) != len(self.sizes):
            raise InvalidBuffer(f"{len(buffers)} buffers for a payload of {len(self.sizes)}")
        sources = self._views
        if sources is None:  # another thread has ended the connection: nothing comes over it
            self.undecided = False
            return
        if self._adopted and all(a is b for a, b in zip(buffers, sources, strict=True)):
            self._views = None
            self._settle(None, done)
            return
        pairs: list[_Part] = []
        start = 0
        for number, (buffer, size) in enumerate(zip(buffers, self.sizes, strict=True)):
            view = buffer.host() if isinstance(buffer, DeviceTarget) else flat_view(buffer)
            if view.nbytes != size:
                raise InvalidBuffer(
                    f"buffer {number} has {view.nbytes} bytes and the payload brings {size}"
                )
            if size:
                if view.readonly:
                    raise InvalidBuffer(f"buffer {number} is read-only")
                pairs.append((start, view, sources[number]))
                start += size
        pairs.reverse()
        self._views = None
        self._settle(pairs, done)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        self._views = None
        self._adopted = False
        self._settle(None, done)
        self._untouched()

    def _settle(
        self,
        pairs: list[_Part] | None,
        done: Callable[[Incoming], None] | None,
    ) -> None:
        with self._lock:
            self._pairs = pairs
            self._done = done
            self.undecided = False
            if pairs is None:
                self.received = self.there
        if self.behind:
            try:
                self.copy(AT_ONCE)
            except BaseException:  # Ctrl-C: the rest is copied by the next step
                self._behind(self)
                raise
        if self.left == 0:
            self.report()
        elif self.behind:
            self._behind(self)

    # -- for the connection ----------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Bytes that are not in place yet."""
        return self.total - self.received

    @property
    def behind(self) -> bool:
        """Whether something is there, or may be, that is to be copied."""
        return (
            self._pairs is not None
            and self.received < self.total
            and (self.received < self.there or self._eager)
        )

    def filled(self, said: int) -> bool:
        """The sender says that so many bytes are in place; whether there is something to be
        copied."""
        with self._lock:
            self.said = said
            self.there = max(self.there, said)
            self._eager = self._counter is not None
            if self._pairs is None and not self.undecided:
                self.received = self.there
        self._count()
        return self.behind

    def _count(self) -> None:
        new = self.there - self._counted
        self._counted = self.there
        self._stats.payload_received += new
        self._stats.extra["shared_received"] += new

    def copy(self, limit: int) -> None:
        """Copy about ``limit`` bytes of those that are there, or come meanwhile."""
        copied = 0
        while self.behind and copied < limit:
            with self._lock:
                pairs = self._pairs
                while pairs and self.received >= pairs[-1][0] + pairs[-1][1].nbytes:
                    pairs.pop()
                if not pairs:
                    break
                start, target, source = pairs[-1]
                begin = self.received - start
            most = min(target.nbytes - begin, limit - copied)
            count = min(most, self.there - self.received)
            if count > 0:
                copy_bytes(target[begin : begin + count], source[begin : begin + count])
            else:
                count = self._follow(target[begin : begin + most], source[begin : begin + most])
            copied += count
            self._stats.extra["copied_out"] += count
            with self._lock:
                if self._pairs is not pairs:
                    break  # discarded meanwhile
                self.received += count
                self.there = max(self.there, self.received)
        self._count()

    def _follow(self, target: memoryview, source: memoryview) -> int:
        """Copy what the sender has written by now, and what it writes meanwhile: so many bytes."""
        large = self.total >= LARGE
        count: int = native.follow(
            target, source, self._counter, self.received, self._patience, large
        )
        self._eager = count == len(target)
        return count

    def release(self) -> None:
        """Let go of the buffers and the callback."""
        self._views = self._pairs = self._done = None

    def report(self) -> None:
        """Every byte is in place: say so, once."""
        with self._lock:
            done, self._done = self._done, None
            self._views = self._pairs = None
        if done is not None:
            done(self)
