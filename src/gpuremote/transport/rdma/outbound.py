"""The payloads that an RDMA connection sends. Private."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from gpuremote._types import BytesLike
from gpuremote.errors import ProtocolError
from gpuremote.transport.base import Region, TransportStats
from gpuremote.transport.rdma import frames
from gpuremote.transport.rdma.control import Control
from gpuremote.transport.rdma.gpu import Stages
from gpuremote.transport.rdma.lanes import OutLane, lane_of
from gpuremote.transport.rdma.payload import Outgoing, OutPiece, eager

__all__ = ["Outbound"]

_MODULUS: Final = 1 << 32


class Outbound:
    """Announces payloads, writes the pieces that the peer asks for, and says when memory is free.

    Attributes
    ----------
    ended : deque of callable
        To be called: the memory of what they belong to is free.
    """

    def __init__(
        self,
        control: Control,
        lanes: Sequence[OutLane],
        stats: TransportStats,
        stages: Stages,
    ) -> None:
        self._stages = stages
        self.ended: deque[Callable[[], None]] = deque()
        self._control = control
        self._lanes = lanes
        self._stats = stats
        self._channel = 0
        self._open: dict[int, Outgoing] = {}
        for lane in lanes:
            lane.finished = self._written

    @property
    def busy(self) -> bool:
        """Whether a payload has not been written completely."""
        return bool(self._open)

    @property
    def pending(self) -> bool:
        """Whether there is payload that no card was told of."""
        return any(out.unposted and not out.dropped for out in list(self._open.values()))

    def send(
        self, header: BytesLike, regions: Sequence[Region], done: Callable[[], None] | None
    ) -> None:
        """Queue a message with regions."""
        sizes = [region.nbytes for region in regions]
        if eager(len(header), sizes):
            views = [region.view for region in regions if region.nbytes]
            begin = frames.encode_eager(len(header), sizes)
            self._control.add(frames.EAGER, begin, header, *views, done=done)
            self._stats.payload_sent += sum(sizes)
            return
        channel = self._channel
        self._channel = (channel + 1) % _MODULUS
        sources = [region.source for region in regions if region.nbytes]
        self._open[channel] = Outgoing(channel, sources, done)
        self._control.add(frames.OPEN, frames.encode_open(channel, sizes), header)

    def pump(self) -> None:
        for lane in self._lanes:
            lane.pump()

    def asked(self, wanted: frames.Piece) -> None:
        """The peer says where a piece goes."""
        outgoing = self._open.get(wanted.channel)
        if outgoing is None or outgoing.dropped:
            raise ProtocolError(f"a piece of channel {wanted.channel}, which is not open")
        lane = lane_of(self._lanes, wanted.lane)
        rail = lane.rail
        piece = outgoing.cut(wanted, rail.registry, rail.max_message, self._stages)
        outgoing.pieces += 1
        lane.add(piece)

    def _written(self, piece: OutPiece) -> None:
        outgoing = piece.outgoing
        for held in piece.held:
            held.release()
        outgoing.pieces -= 1
        outgoing.left -= piece.size
        if outgoing.dropped:
            self._end_dropped(outgoing)
            return
        self._stats.payload_sent += piece.size
        if outgoing.left < 0:
            raise ProtocolError("more of a payload was asked for than there is")
        if not outgoing.left:
            del self._open[outgoing.channel]
            if outgoing.done is not None:
                self.ended.append(outgoing.done)

    def drop(self, channel: int) -> None:
        """The peer wants no more of a payload."""
        outgoing = self._open.get(channel)
        if outgoing is None:
            # It was written completely while the peer said so.
            self._control.add(frames.DROPPED, frames.encode_channel(channel))
            return
        outgoing.dropped = True
        for lane in self._lanes:
            lane.drop_unposted()
        self._end_dropped(outgoing)

    def _end_dropped(self, outgoing: Outgoing) -> None:
        if not outgoing.pieces and self._open.pop(outgoing.channel, None) is not None:
            self._control.add(frames.DROPPED, frames.encode_channel(outgoing.channel))
            if outgoing.done is not None:
                self.ended.append(outgoing.done)

    def renewed(self, end: frames.LaneEnd) -> None:
        """The peer's end of a lane is there again."""
        lane_of(self._lanes, end.lane).renew(end.queue_pair, end.psn, end.pieces)

    def clear(self) -> None:
        """Let go of everything; nothing will be sent any more."""
        self.ended.clear()
        self._open.clear()
        for lane in self._lanes:
            lane.clear()
