"""Queue pairs for payload, each for one direction. Private.

The receiver asks for a piece of a payload, on a lane of its choice; the sender writes it there. A
lane fails when the receiver has taken memory back that was still being written to: then both ends
make their queue pair anew, and the pieces that are still wanted are written again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from gpuremote.errors import ProtocolError
from gpuremote.transport.base import TransportStats
from gpuremote.transport.rdma.payload import InPiece, OutPiece, Write
from gpuremote.transport.rdma.rail import Rail, random_psn
from gpuremote.transport.verbs.base import Completion, Status

__all__ = ["PIECES", "InLane", "OutLane", "lane_of"]

SENDS: Final = 64
"""Writes that a card has at a time, for each lane."""
SIGNALED: Final = 16
"""Every so many writes one reports that it, and those before it, ended."""
PIECES: Final = 16
"""Pieces that are asked for at a time, for each lane."""
_REFUSED: Final = (Status.REM_ACCESS_ERR, Status.REM_INV_REQ_ERR, Status.REM_OP_ERR)


def _nobody(piece: object) -> None:
    raise AssertionError(f"{piece} on a lane that has no connection yet")


class OutLane:
    """The writing end.

    Parameters
    ----------
    number : int
    rail : Rail
    stats : TransportStats

    Attributes
    ----------
    finished : callable
        Called with each piece that has been written.
    pieces : dict of int to OutPiece
        Those that have not ended, in the order in which they were asked for.
    failed : bool
        It waits for the other end to be made again.
    """

    def __init__(self, number: int, rail: Rail, stats: TransportStats) -> None:
        self.number = number
        self.rail = rail
        self.pair = rail.queue_pair(SENDS, 1)
        self.psn = random_psn()
        self.pieces: dict[int, OutPiece] = {}
        self.failed = False
        self._stats = stats
        self.finished: Callable[[OutPiece], None] = _nobody
        self._queue: deque[Write] = deque()
        self._posted: deque[tuple[int, Write]] = deque()
        self._quiet = 0  # posted since one that reports its end

    @property
    def pending(self) -> bool:
        """Whether writes wait."""
        return bool(self._queue)

    def add(self, piece: OutPiece) -> None:
        if len(self.pieces) >= PIECES or piece.number in self.pieces:
            raise ProtocolError(f"more than {PIECES} pieces were asked for on a lane")
        self.pieces[piece.number] = piece
        if not self.failed:
            self._queue.extend(piece.writes)

    def pump(self) -> None:
        """Post what there is room for.

        Raises
        ------
        VerbsError
        """
        self._load_ahead()
        while self._queue and len(self._posted) < SENDS and not self.failed:
            write = self._queue[0]
            address, lkey = write.address, write.lkey
            if write.load is not None:
                source = write.load.source(self.rail.registry)
                if source is None:
                    return  # nothing overtakes it
                address, lkey = source.address, source.lkey
            self._queue.popleft()
            piece = write.piece
            self._quiet += 1
            # A slab is wanted back as soon as it was sent.
            signaled = write.last or write.load is not None or self._quiet >= SIGNALED
            if signaled:
                self._quiet = 0
            work = self.rail.works.add(self, 0)
            self._posted.append((work, write))
            self.pair.post_write(
                work,
                address,
                write.size,
                lkey,
                write.remote,
                write.rkey,
                signaled=signaled,
                immediate=piece.number if write.last else None,
            )
            self._stats.sends += 1
            piece.posted += write.size
            piece.outgoing.unposted -= write.size

    def _load_ahead(self) -> None:
        """Begin to copy what is staged and comes next, as far as there are slabs."""
        for write in self._queue:
            if write.load is not None and not write.load.begin():
                return

    def completed(self, work: int, tag: int, completion: Completion) -> None:
        # Writes end in order.
        while self._posted and self._posted[0][0] <= work:
            earlier, write = self._posted.popleft()
            if earlier != work:
                self.rail.works.pop(earlier)
            if write.load is not None:
                write.load.end()
            self._stats.bytes_sent += write.size
            if write.last:
                del self.pieces[write.piece.number]
                self.finished(write.piece)

    def clear(self) -> None:
        """Nothing is written any more."""
        self.pieces.clear()
        self._queue.clear()
        self._posted.clear()

    def drop_unposted(self) -> None:
        """End the pieces of dropped payloads of which the card knows nothing."""
        for piece in [p for p in self.pieces.values() if p.outgoing.dropped and not p.posted]:
            del self.pieces[piece.number]
            self._queue = deque(write for write in self._queue if write.piece is not piece)
            piece.end_loads()
            self.finished(piece)

    def describe(self, work: int, tag: int) -> str:
        sizes = [write.size for posted, write in self._posted if posted == work]
        return f"a write of {sizes[0] if sizes else 0} bytes"

    def refused(self, completion: Completion) -> bool:
        """After a write failed: whether the peer may have had a reason. Then the lane has a new
        queue pair, of which the peer has to be told."""
        if completion.status not in _REFUSED or self.failed:
            return False
        self.failed = True
        self.rail.works.drop(self)
        self.rail.discard(self.pair)
        self.pair = self.rail.queue_pair(SENDS, 1)
        self.psn = random_psn()
        self._posted.clear()
        self._queue.clear()
        self._quiet = 0
        for piece in self.pieces.values():
            piece.end_loads()
        return True

    def renew(self, queue_pair: int, psn: int, wanted: tuple[int, ...]) -> None:
        """The peer's end is there again; write what it still wants."""
        if not self.failed:
            raise ProtocolError("the other end of a lane was made again without need")
        self.rail.connect(self.pair, self.psn, queue_pair, psn)
        self.failed = False
        for piece in list(self.pieces.values()):
            if piece.number in wanted:
                piece.outgoing.unposted += piece.posted
                piece.posted = 0
                self._queue.extend(piece.writes)
            else:
                del self.pieces[piece.number]
                self.finished(piece)


class InLane:
    """The receiving end.

    Attributes
    ----------
    arrived : callable
        Called with each piece that is in place.
    pieces : dict of int to InPiece
        Those that were asked for and are not in place.
    revoked : set of int
        Channels of which memory was taken back that the peer may have been writing to.
    """

    def __init__(self, number: int, rail: Rail) -> None:
        self.number = number
        self.rail = rail
        self.pair = rail.queue_pair(1, PIECES)
        self.psn = random_psn()
        self.pieces: dict[int, InPiece] = {}
        self.bytes = 0
        self.revoked: set[int] = set()
        self.arrived: Callable[[InPiece], None] = _nobody
        self._posted = 0

    def add(self, piece: InPiece) -> None:
        """A piece that is about to be asked for: there is a receive for its number."""
        self.pieces[piece.number] = piece
        self.bytes += piece.size
        self._prime()

    def _prime(self) -> None:
        while self._posted < len(self.pieces):
            work = self.rail.works.add(self, 0)
            self.pair.post_receive(work, self.rail.sink, 1, self.rail.sink_key)
            self._posted += 1

    def completed(self, work: int, tag: int, completion: Completion) -> None:
        self._posted -= 1
        if completion.immediate is None:
            raise ProtocolError("something else than a piece arrived on a lane")
        piece = self.pieces.get(completion.immediate)
        if piece is not None:  # else it was given up in the meantime
            self.remove(piece)
            self.arrived(piece)

    def remove(self, piece: InPiece) -> None:
        del self.pieces[piece.number]
        self.bytes -= piece.size

    def describe(self, work: int, tag: int) -> str:
        return "a receive for a piece's number"

    def refused(self, completion: Completion) -> bool:
        """After a receive failed: whether this side had caused it."""
        return bool(self.revoked)

    def renew(self, queue_pair: int, psn: int) -> None:
        """The peer has made its end anew."""
        if not self.revoked:
            raise ProtocolError("the peer's writes failed, though no memory was taken back")
        self.rail.works.drop(self)
        self.rail.discard(self.pair)
        self.pair = self.rail.queue_pair(1, PIECES)
        self.psn = random_psn()
        self._posted = 0
        self._prime()
        self.rail.connect(self.pair, self.psn, queue_pair, psn)


_Lane = TypeVar("_Lane", InLane, OutLane)


def lane_of(lanes: Sequence[_Lane], number: int) -> _Lane:
    """
    Raises
    ------
    ProtocolError
        There is no such lane.
    """
    if number >= len(lanes):
        raise ProtocolError(f"lane {number} of {len(lanes)}")
    return lanes[number]
