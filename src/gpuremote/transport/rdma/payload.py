"""Payloads of an RDMA connection, on their way out and in. Private."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple, Protocol

from gpuremote.errors import InternalError, ProtocolError
from gpuremote.transport._incoming import fitting
from gpuremote.transport.base import Incoming, TransportStats
from gpuremote.transport.rdma.frames import MAX_SEGMENTS, Piece, Segment
from gpuremote.transport.rdma.memory import Registered, Registry, address_of
from gpuremote.transport.verbs.base import Access

__all__ = [
    "EagerIncoming",
    "InPiece",
    "OutPiece",
    "Outgoing",
    "RdmaIncoming",
    "Receiver",
    "Write",
    "eager",
]

EAGER: Final = 8 << 10
"""Payload bytes that travel with their header, as two copies cost less than a round trip."""
EAGER_MANY: Final = 2 << 20
"""The same for many small regions, as copying one costs less than registering it."""


def eager(header: int, sizes: Sequence[int]) -> bool:
    """Whether a payload travels with its header."""
    total = sum(sizes)
    return header + total <= EAGER_MANY and total <= EAGER * len(sizes)


class _Run:
    """Several views as if they were one."""

    __slots__ = ("_starts", "total", "views")

    def __init__(self, views: list[memoryview]) -> None:
        self.views = views
        ends = list(accumulate(view.nbytes for view in views))
        self._starts = [0, *ends[:-1]]
        self.total = ends[-1]

    def parts(self, offset: int, size: int) -> Iterator[tuple[memoryview, int, int]]:
        """The views that these bytes are in: view, offset and size within it."""
        index = bisect_right(self._starts, offset) - 1
        offset -= self._starts[index]
        while size:
            view = self.views[index]
            count = min(view.nbytes - offset, size)
            yield view, offset, count
            size -= count
            offset = 0
            index += 1

    def end_of_parts(self, offset: int, count: int) -> int:
        """Where ``count`` parts, from ``offset`` on, end."""
        index = bisect_right(self._starts, offset) - 1 + count
        return self._starts[index] if index < len(self._starts) else self.total


class Write(NamedTuple):
    """One work request."""

    piece: OutPiece
    address: int
    size: int
    lkey: int
    remote: int
    rkey: int
    last: bool


class OutPiece:
    """A part of a payload that the peer has asked for."""

    __slots__ = ("held", "number", "outgoing", "posted", "registry", "size", "writes")

    def __init__(self, outgoing: Outgoing, number: int, size: int, registry: Registry) -> None:
        self.outgoing = outgoing
        self.registry = registry
        self.number = number
        self.size = size
        self.writes: list[Write] = []
        self.held: list[Registered] = []
        self.posted = 0  # bytes that the card knows of


class Outgoing:
    """A payload that was announced.

    Attributes
    ----------
    left : int
        Bytes that were not written yet.
    unposted : int
        Bytes that no card was told of yet.
    pieces : int
        Pieces that the peer asked for and that have not ended.
    dropped : bool
        The peer wants no more of it.
    """

    def __init__(
        self, channel: int, views: list[memoryview], done: Callable[[], None] | None
    ) -> None:
        self._run = _Run(views)
        self.channel = channel
        self.left = self.unposted = self._run.total
        self.pieces = 0
        self.dropped = False
        self.done = done

    def cut(self, wanted: Piece, registry: Registry, largest: int) -> OutPiece:
        """The work requests for a piece.

        Parameters
        ----------
        wanted : Piece
        registry : Registry
            Of the rail it goes out on.
        largest : int
            Bytes of one work request.

        Raises
        ------
        ProtocolError
            It is no part of the payload.
        VerbsError
            Memory can't be registered; what was is released.
        """
        if wanted.offset + wanted.size > self._run.total:
            raise ProtocolError(
                f"bytes {wanted.offset} to {wanted.offset + wanted.size} of a payload of "
                f"{self._run.total} were asked for"
            )
        piece = OutPiece(self, wanted.number, wanted.size, registry)
        targets = iter(wanted.segments)
        target = Segment(0, 0, 0)
        try:
            for view, offset, size in self._run.parts(wanted.offset, wanted.size):
                source = registry.acquire(view, offset, size, Access.READ_HERE)
                piece.held.append(source)
                address = address_of(view) + offset  # a slab's begins before it
                while size:
                    if not target.size:
                        target = next(targets)
                    count = min(size, target.size, largest)
                    piece.writes.append(
                        Write(
                            piece,
                            address,
                            count,
                            source.lkey,
                            target.address,
                            target.rkey,
                            False,
                        )
                    )
                    address += count
                    size -= count
                    target = Segment(target.address + count, target.size - count, target.rkey)
        except BaseException:
            for held in piece.held:
                registry.release(held)
            raise
        piece.writes[-1] = piece.writes[-1]._replace(last=True)
        return piece


class InPiece:
    """A part of a payload that was asked for."""

    __slots__ = ("held", "incoming", "lane", "number", "offset", "size")

    def __init__(self, incoming: RdmaIncoming, number: int, lane: int) -> None:
        self.incoming = incoming
        self.number = number
        self.lane = lane
        self.offset = 0
        self.size = 0
        self.held: list[Registered] = []


class Receiver(Protocol):
    """The connection, as a payload sees it."""

    def place(self, incoming: RdmaIncoming) -> None: ...

    def drop(self, incoming: RdmaIncoming, done: Callable[[Incoming], None] | None) -> None: ...


class RdmaIncoming(Incoming):
    """A payload that the receiver asks for, piece by piece. Its fields belong to the connection.

    Attributes
    ----------
    planned : int
        Bytes that were asked for.
    undecided : bool
        Whether ``into`` or ``discard`` has yet to be called.
    dropped : bool
        Whether ``discard`` was, before it was complete.
    reported : bool
        Whether its end was told.
    """

    __slots__ = (
        "_finished",
        "_receiver",
        "_run",
        "channel",
        "done",
        "dropped",
        "header",
        "pieces",
        "planned",
        "received",
        "reported",
        "sizes",
        "total",
        "undecided",
    )

    def __init__(
        self, header: memoryview, sizes: tuple[int, ...], channel: int, receiver: Receiver
    ) -> None:
        self.header = header
        self.sizes = sizes
        self.channel = channel
        self.total = sum(sizes)
        self.received = 0
        self.planned = 0
        self.undecided = True
        self.dropped = False
        self.reported = False
        self.done: Callable[[Incoming], None] | None = None
        self.pieces: dict[int, InPiece] = {}
        self._finished: dict[int, int] = {}  # offset to size, of what came before its turn
        self._run: _Run | None = None
        self._receiver = receiver

    def into(
        self, buffers: Sequence[memoryview], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if not self.undecided:
            raise InternalError("where this payload goes was already said")
        self._run = _Run(fitting(self.sizes, buffers))
        self.undecided = False
        self.done = done
        self._receiver.place(self)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        self._receiver.drop(self, done)

    # -- for the connection --------------------------------------------------------------------

    def plan(self, piece: InPiece, largest: int, registry: Registry) -> Piece:
        """What to ask for next.

        Raises
        ------
        VerbsError
            Memory can't be registered; nothing was planned.
        """
        run = self._run
        assert run is not None
        begin = self.planned
        end = min(begin + largest, run.end_of_parts(begin, MAX_SEGMENTS))
        segments = []
        try:
            for view, offset, size in run.parts(begin, end - begin):
                held = registry.acquire(view, offset, size, Access.WRITE_HERE | Access.WRITE_THERE)
                piece.held.append(held)
                segments.append(Segment(held.address, size, held.rkey))
        except BaseException:
            for held in piece.held:
                registry.release(held)
            raise
        piece.offset, piece.size = begin, end - begin
        self.planned = end
        self.pieces[piece.number] = piece
        return Piece(self.channel, piece.number, piece.lane, begin, end - begin, tuple(segments))

    def arrived(self, piece: InPiece) -> bool:
        """A piece is in place; whether it was the last one."""
        del self.pieces[piece.number]
        self._finished[piece.offset] = piece.size
        while (size := self._finished.pop(self.received, 0)) > 0:
            self.received += size
        return self.received == self.total

    def let_go(self) -> None:
        """Of the buffers."""
        self._run = None


class EagerIncoming(Incoming):
    """A message whose payload came along (or that has none to come)."""

    __slots__ = ("_payload", "_settled", "_stats", "header", "received", "sizes")

    def __init__(
        self,
        header: memoryview,
        sizes: tuple[int, ...],
        payload: memoryview,
        stats: TransportStats,
    ) -> None:
        self.header = header
        self.sizes = sizes
        self.received = 0
        self._payload = payload
        self._settled = False
        self._stats = stats

    @property
    def undecided(self) -> bool:
        return not self._settled and self._payload.nbytes > 0

    def into(
        self, buffers: Sequence[memoryview], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if self._settled:
            raise InternalError("where this payload goes was already said")
        views = fitting(self.sizes, buffers)
        start = 0
        for view in views:
            view[:] = self._payload[start : start + view.nbytes]
            start += view.nbytes
        self._stats.payload_copied += start
        self._settle(done)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        if not self._settled:
            self._settle(done)

    def _settle(self, done: Callable[[Incoming], None] | None) -> None:
        self._settled = True
        self.received = self._payload.nbytes
        self._stats.payload_received += self.received
        if done is not None:
            done(self)
