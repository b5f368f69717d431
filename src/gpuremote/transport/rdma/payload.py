"""Payloads of an RDMA connection, on their way out and in. Private."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from gpuremote.errors import InternalError, ProtocolError
from gpuremote.memory.device import DeviceMemory, DeviceTarget
from gpuremote.memory.staging import Slab, Staging
from gpuremote.transport._incoming import fitting, fitting_targets
from gpuremote.transport.base import Incoming, Target, TransportStats
from gpuremote.transport.rdma.frames import MAX_SEGMENTS, Piece, Segment
from gpuremote.transport.rdma.gpu import Stages
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


_WRITE: Final = Access.WRITE_HERE | Access.WRITE_THERE


def eager(header: int, sizes: Sequence[int]) -> bool:
    """Whether a payload travels with its header."""
    total = sum(sizes)
    return header + total <= EAGER_MANY and total <= EAGER * len(sizes)


_View = TypeVar("_View", bound=memoryview | DeviceMemory | DeviceTarget)


class _Run(Generic[_View]):
    """Several views as if they were one."""

    __slots__ = ("_starts", "total", "views")

    def __init__(self, views: list[_View]) -> None:
        self.views = views
        ends = list(accumulate(view.nbytes for view in views))
        self._starts = [0, *ends[:-1]]
        self.total = ends[-1]

    def parts(self, offset: int, size: int) -> Iterator[tuple[_View, int, int]]:
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


class Load:
    """A part of a GPU's memory on its way to the card, through a slab."""

    __slots__ = ("_held", "_memory", "_slab", "_staging")

    def __init__(self, staging: Staging, memory: DeviceMemory) -> None:
        self._staging = staging
        self._memory = memory
        self._slab: Slab | None = None
        self._held: Registered | None = None

    def begin(self) -> bool:
        """Begin to copy, if there is a slab for it; whether it has begun.

        Raises
        ------
        CudaError
        """
        if self._slab is None:
            slab = self._staging.take()
            if slab is None:
                return False
            self._slab = slab
            self._staging.load(slab, self._memory)
        return True

    def source(self, registry: Registry) -> Registered | None:
        """The slab, when it has the bytes; else None.

        Raises
        ------
        CudaError
        VerbsError
        """
        slab = self._slab
        if slab is None or not self._staging.loaded(slab):
            return None
        if self._held is None:
            self._held = registry.acquire(slab.view, 0, self._memory.nbytes, Access.READ_HERE)
        return self._held

    def end(self) -> None:
        """The slab is not needed any more. It can begin once more."""
        held, self._held = self._held, None
        if held is not None:
            held.release()
        slab, self._slab = self._slab, None
        if slab is not None:
            self._staging.give(slab)


class Write(NamedTuple):
    """One work request. What it reads lies at ``address``, or comes by ``load``."""

    piece: OutPiece
    address: int
    size: int
    lkey: int
    remote: int
    rkey: int
    last: bool
    load: Load | None = None


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

    def end_loads(self) -> None:
        """Nothing of it is being written; what is staged for it begins anew, if at all."""
        for write in self.writes:
            if write.load is not None:
                write.load.end()


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
        self,
        channel: int,
        views: list[memoryview | DeviceMemory],
        done: Callable[[], None] | None,
    ) -> None:
        self._run = _Run(views)
        self.channel = channel
        self.left = self.unposted = self._run.total
        self.pieces = 0
        self.dropped = False
        self.done = done

    def cut(self, wanted: Piece, registry: Registry, largest: int, stages: Stages) -> OutPiece:
        """The work requests for a piece.

        Parameters
        ----------
        wanted : Piece
        registry : Registry
            Of the rail it goes out on.
        largest : int
            Bytes of one work request.
        stages : Stages
            For memory that the card can't get at.

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
                source = _acquire(registry, view, offset, size)
                if source is not None:
                    piece.held.append(source)
                while size:
                    if not target.size:
                        target = next(targets)
                    count = min(size, target.size, largest)
                    load, address, lkey = None, 0, 0
                    if source is not None:
                        address, lkey = source.at(_address(view) + offset), source.lkey
                    elif isinstance(view, DeviceMemory):
                        staging = stages.of(view)
                        count = min(count, staging.size)
                        load = Load(staging, view.part(offset, count))
                    piece.writes.append(
                        Write(piece, address, count, lkey, target.address, target.rkey, False, load)
                    )
                    offset += count
                    size -= count
                    target = Segment(target.address + count, target.size - count, target.rkey)
        except BaseException:
            for held in piece.held:
                held.release()
            raise
        piece.writes[-1] = piece.writes[-1]._replace(last=True)
        return piece


def _acquire(
    registry: Registry, view: memoryview | DeviceMemory, offset: int, size: int
) -> Registered | None:
    """Registered memory to read from; None where it has to be staged."""
    if isinstance(view, DeviceMemory):
        return registry.acquire_device(view, offset, size, Access.READ_HERE)
    return registry.acquire(view, offset, size, Access.READ_HERE)


def _address(view: memoryview | DeviceMemory) -> int:
    # A slab's registration begins before what is sent from it.
    return view.pointer if isinstance(view, DeviceMemory) else address_of(view)


class InPiece:
    """A part of a payload that was asked for."""

    __slots__ = ("device", "held", "incoming", "lane", "number", "offset", "size", "slab")

    def __init__(self, incoming: RdmaIncoming, number: int, lane: int) -> None:
        self.device: DeviceMemory | None = None
        """Where it ends up, if that is in a GPU's memory."""
        self.slab: Slab | None = None
        """Where it arrives, if that is not where it ends up."""
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

    takes_device = True

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
        self._run: _Run[memoryview | DeviceTarget] | None = None
        self._receiver = receiver

    def into(
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if not self.undecided:
            raise InternalError("where this payload goes was already said")
        self._run = _Run(fitting_targets(self.sizes, buffers))
        self.undecided = False
        self.done = done
        self._receiver.place(self)

    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        self._receiver.drop(self, done)

    # -- for the connection --------------------------------------------------------------------

    def plan(
        self, piece: InPiece, largest: int, registry: Registry, stages: Stages
    ) -> Piece | None:
        """What to ask for next; None while there is no slab for it.

        Raises
        ------
        VerbsError
            Memory can't be registered; nothing was planned.
        """
        run = self._run
        assert run is not None
        begin = self.planned
        end = min(begin + largest, run.end_of_parts(begin, MAX_SEGMENTS))
        segments: list[Segment] = []
        try:
            for view, offset, size in run.parts(begin, end - begin):
                if isinstance(view, DeviceTarget):
                    if not segments:  # a piece of its own
                        segment = _place(piece, view, offset, size, registry, stages)
                        if segment is None:
                            return None
                        segments.append(segment)
                    break
                held = registry.acquire(view, offset, size, _WRITE)
                piece.held.append(held)
                segments.append(Segment(held.address, size, held.rkey))
        except BaseException:
            for held in piece.held:
                held.release()
            raise
        size = sum(segment.size for segment in segments)
        piece.offset, piece.size = begin, size
        self.planned = begin + size
        self.pieces[piece.number] = piece
        return Piece(self.channel, piece.number, piece.lane, begin, size, tuple(segments))

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


def _place(
    piece: InPiece,
    target: DeviceTarget,
    offset: int,
    size: int,
    registry: Registry,
    stages: Stages,
) -> Segment | None:
    """Where the peer writes what ends up in a GPU's memory: there, or in a slab; None while there
    is none."""
    memory = target.memory
    # Memory that is used again may still be read by kernels that ran before: a card does not wait
    # for them, a copy in their stream does.
    held = registry.acquire_device(memory, offset, size, _WRITE) if target.idle() else None
    if held is None:
        staging = stages.of(memory)
        slab = staging.take()
        if slab is None:
            return None
        size = min(size, staging.size)
        try:
            held = registry.acquire(slab.view, 0, size, _WRITE)
        except BaseException:
            staging.give(slab)
            raise
        piece.slab = slab
        address = held.address
    else:
        address = held.at(memory.pointer + offset)
    piece.device = memory.part(offset, size)
    piece.held.append(held)
    return Segment(address, size, held.rkey)


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
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
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
