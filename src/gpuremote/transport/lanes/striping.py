"""Cuts payload into pieces, each for whichever lane takes it first. Private."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Final, NamedTuple

from gpuremote import _clock
from gpuremote._types import BytesLike
from gpuremote.transport.base import Region, TransportStats
from gpuremote.transport.lanes.compression import GAIN, Codec, Rule
from gpuremote.transport.lanes.frames import Piece, encode_piece
from gpuremote.transport.lanes.lane import OutLane

__all__ = ["Source", "Striping"]

LARGEST: Final = 1 << 20
"""Bytes of a piece."""
SMALLEST: Final = 64 << 10
SHARES: Final = 4
"""Pieces that each lane could still have of what is left: towards the end of a payload they get
smaller, so that no lane is still at work when the others have nothing to do."""
WINDOW: Final = 0.02
MEANINGFUL: Final = 512 << 10
"""Seconds, and bytes, of lanes at their limit that make up one measurement; a round trip if that
is longer."""
COMPRESSING: Final = 4
"""Times the bytes of a piece that count for one step where it is compressed, so that it takes a few
milliseconds at most."""
_IOV: Final = 256


class Source:
    """A payload that is to be cut.

    Attributes
    ----------
    parts : int
        Pieces that are not out yet, and the announcement.
    """

    __slots__ = ("cut", "done", "ends", "number", "parts", "total", "views")

    def __init__(
        self, number: int, regions: Sequence[Region], done: Callable[[], None] | None
    ) -> None:
        self.number = number
        self.views = [region.view for region in regions if region.nbytes]
        self.ends = list(accumulate(view.nbytes for view in self.views))
        self.total = self.ends[-1]
        self.cut = 0
        self.done = done
        self.parts = 1

    def piece(self, size: int) -> tuple[int, list[memoryview]]:
        """The next ``size`` bytes, or fewer if they are scattered: where they begin, and they."""
        begin = at = self.cut
        end = min(self.total, begin + size)
        index = bisect_right(self.ends, at)
        found: list[memoryview] = []
        while at < end and len(found) < _IOV:
            view = self.views[index]
            start = at - (self.ends[index] - view.nbytes)
            part = view[start : start + end - at]
            found.append(part)
            at += len(part)
            index += 1
        self.cut = at
        return begin, found


class _Ready(NamedTuple):
    """A piece that may go out."""

    source: Source
    parts: list[BytesLike]
    wire: int
    raw: int
    codec: int
    cost: int


class Striping:
    """What is to go out over the lanes.

    Parameters
    ----------
    lanes : sequence of OutLane
    stats : TransportStats
    codec : Codec or None
    rule : Rule
        When to use it.
    ended : deque
        Takes the callbacks of what is out.
    """

    def __init__(
        self,
        lanes: Sequence[OutLane],
        stats: TransportStats,
        codec: Codec | None,
        rule: Rule,
        ended: deque[Callable[[], None]],
    ) -> None:
        self._lanes = lanes
        self._stats = stats
        self._codec = codec
        self.rule = rule
        self._ended = ended
        self._sources: deque[Source] = deque()
        self._ready: deque[_Ready] = deque()  # cut, and not taken by any lane so far
        self._open = 0
        self._next = 0
        # The lanes have been at their limit, and what they take is counted from then on.
        self._since: float | None = None
        self._bytes: int | None = None  # that they had taken before
        stats.extra.update(lanes_raw=0, lanes_wire=0, pieces=0, pieces_compressed=0)

    @property
    def waiting(self) -> bool:
        """Whether there is something for a lane to begin with."""
        return bool(self._sources or self._ready)

    @property
    def pending(self) -> bool:
        return self.waiting or any(lane.pending for lane in self._lanes)

    @property
    def open(self) -> int:
        """Payloads of which something is lent still."""
        return self._open

    def add(self, source: Source) -> None:
        """Take a payload on."""
        self._sources.append(source)
        self._open += 1

    def pump(self, budget: int) -> None:
        """Send what the lanes take now, up to ``budget`` bytes. Raises OSError."""
        free = deque(lane for lane in self._lanes if lane.go_on())
        while free and budget > 0 and (ready := self._cut()) is not None:
            lane = free[0]
            if not lane.give(ready.parts, partial(self.part_out, ready.source)):
                self._ready.appendleft(ready)
                free.popleft()
                continue
            self._count(ready)
            budget -= ready.cost
            if lane.busy:
                free.popleft()
            else:
                free.rotate(-1)
        self._measure(limited=not free and self.waiting)

    def _cut(self) -> _Ready | None:
        """The next piece; several payloads take turns."""
        if self._ready:
            return self._ready.popleft()
        if not self._sources:
            return None
        source = self._sources.popleft()
        share = (source.total - source.cut) // (SHARES * len(self._lanes))
        offset, views = source.piece(min(LARGEST, max(SMALLEST, share)))
        source.parts += 1
        if source.cut < source.total:
            self._sources.append(source)
        raw = sum(map(len, views))
        tries = self._codec is not None and len(views) == 1 and self.rule.try_next()
        packed = self._compressed(views[0], raw) if tries else None
        body: list[BytesLike] = [*views] if packed is None else [packed]
        wire = raw if packed is None else len(packed)
        number = 0 if packed is None or self._codec is None else self._codec.number
        head = encode_piece(Piece(source.number, offset, raw, wire, number))
        cost = COMPRESSING * raw if tries else raw
        return _Ready(source, [head, *body], wire, raw, number, cost)

    def _compressed(self, view: memoryview, raw: int) -> bytes | None:
        assert self._codec is not None
        begin = _clock.now()
        packed = self._codec.compress(view)
        self.rule.compressed(raw, len(packed), _clock.now() - begin)
        return packed if len(packed) < GAIN * raw else None

    def _count(self, ready: _Ready) -> None:
        stats = self._stats
        stats.payload_sent += ready.raw
        stats.extra["lanes_raw"] += ready.raw
        stats.extra["lanes_wire"] += ready.wire
        stats.extra["pieces"] += 1
        stats.extra["pieces_compressed"] += ready.codec != 0

    def part_out(self, source: Source) -> None:
        """A piece of it, or the announcement, is no longer read."""
        source.parts -= 1
        if source.parts or source.cut < source.total:
            return
        self._open -= 1
        if source.done is not None:
            self._ended.append(source.done)

    def _measure(self, *, limited: bool) -> None:
        """How much the lanes take while they are what is waited for."""
        if not limited:
            self._since = self._bytes = None
            return
        now, delay = _clock.now(), self.rule.delay
        if self._since is None:
            # Until the first acknowledgements the kernels' buffers fill, at any rate.
            self._since = now + delay
        if now < self._since:
            return
        total = sum(lane.sent for lane in self._lanes)
        if self._bytes is None:
            self._since, self._bytes = now, total
        elif now - self._since >= max(WINDOW, delay) and total - self._bytes >= MEANINGFUL:
            self.rule.sent(total - self._bytes, now - self._since)
            self._since, self._bytes = now, total

    def clear(self) -> None:
        """Let go of what was lent."""
        self._sources.clear()
        self._ready.clear()
