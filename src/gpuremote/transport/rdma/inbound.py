"""The payloads that an RDMA connection receives. Private."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from gpuremote.errors import ProtocolError
from gpuremote.memory.device import DeviceMemory
from gpuremote.transport.base import TransportStats
from gpuremote.transport.rdma import frames
from gpuremote.transport.rdma.control import Control
from gpuremote.transport.rdma.gpu import Stages
from gpuremote.transport.rdma.lanes import PIECES, InLane, lane_of
from gpuremote.transport.rdma.payload import InPiece, RdmaIncoming, Receiver

__all__ = ["STRIPED", "Inbound"]

STRIPED: Final = 8 << 20
"""Bytes of a payload from which on it is cut for all lanes."""
SMALLEST: Final = 1 << 20
"""Bytes of a piece that is cut for that reason."""
_MODULUS: Final = 1 << 32
_PAGE: Final = 4096


class Inbound:
    """Asks for payloads piece by piece, by turns, and knows what is in place.

    Attributes
    ----------
    arrived : deque of RdmaIncoming
        Complete, or dropped completely; to be told.
    """

    def __init__(
        self,
        control: Control,
        lanes: Sequence[InLane],
        stats: TransportStats,
        *,
        piece: int,
        receiver: Receiver,
        stages: Stages,
    ) -> None:
        self._stages = stages
        self.arrived: deque[RdmaIncoming] = deque()
        self._control = control
        self._lanes = lanes
        self._stats = stats
        self._piece = piece
        self._receiver = receiver
        self._number = 0
        self._open: dict[int, RdmaIncoming] = {}
        self._asking: deque[RdmaIncoming] = deque()  # not asked for completely
        self._dropping: dict[int, RdmaIncoming] = {}
        for lane in lanes:
            lane.arrived = self._in_place

    def begin(self, body: memoryview) -> RdmaIncoming:
        """A payload was announced."""
        channel, sizes, header = frames.decode_open(body)
        if channel in self._open:
            raise ProtocolError(f"a payload on channel {channel}, which is in use")
        incoming = self._open[channel] = RdmaIncoming(header, sizes, channel, self._receiver)
        return incoming

    def place(self, incoming: RdmaIncoming) -> None:
        """It is known where a payload goes."""
        self._asking.append(incoming)

    def ask(self) -> None:
        """Ask for what there is room for.

        Raises
        ------
        VerbsError
            Memory can't be registered.
        """
        without = 0  # payloads in a row that wait for a slab
        while without < len(self._asking):
            lane = min(self._lanes, key=lambda lane: (lane.bytes, len(lane.pieces)))
            if len(lane.pieces) >= PIECES or lane.bytes > self._piece:
                return
            incoming = self._asking.popleft()
            piece = InPiece(incoming, self._number, lane.number)
            size = self._size_of_piece(incoming)
            wanted = incoming.plan(piece, size, lane.rail.registry, self._stages)
            if wanted is None:
                self._asking.append(incoming)
                without += 1
                continue
            without = 0
            self._number = (self._number + 1) % _MODULUS
            lane.add(piece)
            self._control.add(frames.PIECE, frames.encode_piece(wanted))
            if incoming.planned < incoming.total:
                self._asking.append(incoming)

    def _size_of_piece(self, incoming: RdmaIncoming) -> int:
        if incoming.total < STRIPED:
            return self._piece
        share = -(-incoming.total // len(self._lanes))
        return min(self._piece, max(SMALLEST, -(-share // _PAGE) * _PAGE))

    def _in_place(self, piece: InPiece) -> None:
        for held in piece.held:
            held.release()
        incoming = piece.incoming
        if piece.device is not None:
            self._bring(piece, piece.device)
        self._stats.bytes_received += piece.size
        self._stats.payload_received += piece.size
        if incoming.arrived(piece):
            incoming.let_go()
            del self._open[incoming.channel]
            self.arrived.append(incoming)

    def _bring(self, piece: InPiece, memory: DeviceMemory) -> None:
        """See to it that the GPU sees what has arrived."""
        if piece.slab is not None:
            self._stages.of(memory).store(piece.slab, memory)
        elif not memory.driver.orders_writes(memory.device):
            memory.driver.flush_writes(memory.device)

    def take_back(self, incoming: RdmaIncoming) -> None:
        """Drop a payload: on return no byte of it gets into its memory."""
        for piece in list(incoming.pieces.values()):
            lane = self._lanes[piece.lane]
            for held in piece.held:
                lane.rail.registry.revoke(held)
            if piece.slab is not None and piece.device is not None:
                self._stages.of(piece.device).give(piece.slab)
            lane.remove(piece)
            lane.revoked.add(incoming.channel)
        incoming.pieces.clear()
        incoming.let_go()
        if incoming in self._asking:
            self._asking.remove(incoming)
        self._dropping[incoming.channel] = incoming
        self._control.add(frames.DROP, frames.encode_channel(incoming.channel))

    def dropped(self, channel: int) -> None:
        """The peer will write no more of it."""
        incoming = self._dropping.pop(channel, None)
        if incoming is None:
            raise ProtocolError(f"channel {channel} was dropped, which nobody had asked for")
        for lane in self._lanes:
            lane.revoked.discard(channel)
        del self._open[channel]
        incoming.received = incoming.total
        self.arrived.append(incoming)

    def renew(self, end: frames.LaneEnd) -> None:
        """The peer has made its end of a lane anew."""
        lane = lane_of(self._lanes, end.lane)
        lane.renew(end.queue_pair, end.psn)
        told = frames.encode_lane(lane.number, lane.pair.number, lane.psn, list(lane.pieces))
        self._control.add(frames.LANE_READY, told)

    def clear(self) -> None:
        """Let go of all buffers; what is complete can still be told."""
        self._asking.clear()
        self._dropping.clear()
        for incoming in self._open.values():
            incoming.let_go()
            incoming.done = None
        self._open.clear()
        for lane in self._lanes:
            lane.pieces.clear()
