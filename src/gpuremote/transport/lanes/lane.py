"""One of the further connections that carry the payload of a connection with lanes. Private."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost
from gpuremote.transport._stream import NOW
from gpuremote.transport.base import TransportStats
from gpuremote.transport.lanes.compression import Codec, codec_numbered
from gpuremote.transport.lanes.frames import PIECE, Piece, decode_piece
from gpuremote.transport.tls import TlsSocket

if TYPE_CHECKING:
    from gpuremote.transport.lanes.payload import Run, SpreadPayload

__all__ = ["InLane", "Lane", "OutLane"]

SCRATCH: Final = 256 << 10
"""Bytes that are read at a time where nobody wants them."""


class OutLane:
    """The sending half.

    Attributes
    ----------
    busy : bool
        Some of a piece is out, and some is not.
    """

    def __init__(self, line: socket.socket | TlsSocket, stats: TransportStats) -> None:
        self._line = line
        self._tls = line if isinstance(line, TlsSocket) else None
        self._stats = stats
        self._left: list[memoryview] = []
        self._done: Callable[[], None] | None = None
        self.sent = 0
        """Bytes in all."""

    @property
    def busy(self) -> bool:
        return bool(self._left)

    @property
    def pending(self) -> bool:
        """Whether something was not taken by the kernel yet."""
        return bool(self._left) or (self._tls is not None and self._tls.pending)

    def give(self, parts: Sequence[BytesLike], done: Callable[[], None]) -> bool:
        """Begin with a piece; False if the kernel takes nothing at all, and so it is not begun.

        Parameters
        ----------
        done : callable
            Called when nothing of it is read any more.
        """
        self._left = [memoryview(part) for part in parts]
        if not self._send():
            self._left = []
            return False
        self._done = done
        self._over()
        return True

    def go_on(self) -> bool:
        """Send more of what was begun; whether a further piece can be begun now."""
        while self._left:
            if not self._send():
                return False
        self._over()
        return self._tls is None or not self._tls.pending or self._tls.flush()

    def _send(self) -> int:
        try:
            sent = self._line.sendmsg(self._left, (), NOW)
        except BlockingIOError:
            return 0
        self._stats.sends += 1
        self._stats.bytes_sent += sent
        self.sent += sent
        left, count = self._left, sent
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
        return sent

    def _over(self) -> None:
        if not self._left and self._done is not None:
            done, self._done = self._done, None
            done()

    def clear(self) -> None:
        """Let go of what was lent."""
        self._left = []
        self._done = None


class InLane:
    """The receiving half.

    Parameters
    ----------
    find : callable
        The payload of a number, None while it is not announced; ProtocolError if there is none.

    Attributes
    ----------
    stalled : bool
        What comes next belongs to a payload that was not announced yet: it is left where it is.
    ended : bool
        The peer sends no more.
    """

    def __init__(
        self,
        line: socket.socket | TlsSocket,
        stats: TransportStats,
        codec: Codec | None,
        find: Callable[[int], SpreadPayload | None],
    ) -> None:
        self._line = line
        self._stats = stats
        self._codec = codec
        self._find = find
        self._head = memoryview(bytearray(PIECE.size))
        self._have = 0  # bytes of it
        self._piece: Piece | None = None
        self._payload: SpreadPayload | None = None
        self._run: Run | None = None
        self._packed: memoryview | None = None  # a compressed piece
        self._filled = 0  # and how much of that is there
        self._scratch = memoryview(b"")
        self.stalled = False
        self.ended = False
        self.received = 0
        """Bytes in all."""

    @property
    def number(self) -> int:
        """Of the payload that comes at present; 0 without one."""
        return self._piece.number if self._piece is not None else 0

    @property
    def between(self) -> bool:
        """Whether no piece has begun."""
        return not self._have and self._piece is None

    def read(self, complete: Callable[[SpreadPayload], None]) -> int:
        """One receive call at most; the bytes that came.

        Parameters
        ----------
        complete : callable
            Called with a payload that has all of its bytes.

        Raises
        ------
        ConnectionLost, OSError
        ProtocolError
        """
        if self._have == PIECE.size and not self._begin():
            return 0
        try:
            if self._run is None:
                return self._read_head()
            if self._packed is not None:
                return self._read_packed(complete)
            return self._read_raw(complete)
        except BlockingIOError:
            return 0

    def _begin(self) -> bool:
        """The head is there; whether the payload is."""
        piece = self._piece
        if piece is None:
            piece = self._piece = decode_piece(self._head)
        payload = self._find(piece.number)
        self.stalled = payload is None
        if payload is None:
            return False
        if piece.codec:
            codec_numbered(piece.codec, self._codec)
            self._packed = memoryview(bytearray(piece.wire))
            self._filled = 0
        self._run = payload.claim(piece.offset, piece.raw)
        self._payload = payload
        self._have = 0
        return True

    def _read_head(self) -> int:
        return self._count(self._line.recv_into(self._head[self._have :], 0, NOW), head=True)

    def _count(self, count: int, *, head: bool = False) -> int:
        if not count:
            self.ended = True
            if not self.between:
                raise ConnectionLost("the peer closed a lane in the middle of a payload")
            return 0
        self._stats.receives += 1
        self._stats.bytes_received += count
        self.received += count
        if head:
            self._have += count
        return count

    def _read_raw(self, complete: Callable[[SpreadPayload], None]) -> int:
        payload, run = self._payload, self._run
        assert payload is not None
        assert run is not None
        left = run.end - run.at
        targets = payload.targets_of(run)
        if targets is None:
            if not self._scratch:
                self._scratch = memoryview(bytearray(SCRATCH))
            targets = [self._scratch[: min(left, SCRATCH)]]
        room = sum(map(len, targets))
        if room == left:
            targets.append(self._head)
        count = self._count(self._line.recvmsg_into(targets, 0, NOW)[0])
        placed = min(count, room)
        self._have = count - placed
        self._place(payload, run, placed, complete)
        return count

    def _read_packed(self, complete: Callable[[SpreadPayload], None]) -> int:
        payload, run, packed = self._payload, self._run, self._packed
        assert payload is not None
        assert run is not None
        assert packed is not None
        count = self._count(self._line.recv_into(packed[self._filled :], 0, NOW))
        self._filled += count
        if self._filled == len(packed):
            self._unpack(payload, run, packed)
            self._place(payload, run, run.end - run.at, complete)
        return count

    def _unpack(self, payload: SpreadPayload, run: Run, packed: memoryview) -> None:
        assert self._codec is not None
        targets = payload.targets_of(run)
        if targets is None:
            return
        if len(targets) == 1:
            self._stats.payload_copied += self._codec.decompress(packed, targets[0])
            return
        whole = memoryview(bytearray(run.end - run.at))
        self._codec.decompress(packed, whole)
        self._stats.payload_copied += len(whole)
        at = 0
        start = run.at
        while targets:
            for target in targets:
                target[:] = whole[at : at + len(target)]
                at += len(target)
            run.at = start + at  # for the next ones
            targets = payload.targets_of(run) or []
        run.at = start

    def _place(
        self,
        payload: SpreadPayload,
        run: Run,
        count: int,
        complete: Callable[[SpreadPayload], None],
    ) -> None:
        self._stats.payload_received += count
        ends = run.at + count == run.end
        payload.arrived(run, count)
        if ends:
            self._piece = self._payload = self._run = self._packed = None
            if not payload.left:
                complete(payload)

    def clear(self) -> None:
        """Let go of what belongs to others."""
        self._payload = self._run = self._packed = None


class Lane:
    """A connection beside the first one.

    Parameters
    ----------
    line : socket.socket or TlsSocket
        Owned from now on; set up as ``tune`` does.
    stats : TransportStats
        Of all lanes together.
    codec : Codec or None
        For what comes in.
    find : callable
        As for :class:`InLane`.

    Attributes
    ----------
    watched : int
        Events that are waited for.
    """

    def __init__(
        self,
        line: socket.socket | TlsSocket,
        stats: TransportStats,
        codec: Codec | None,
        find: Callable[[int], SpreadPayload | None],
    ) -> None:
        self.tls = line if isinstance(line, TlsSocket) else None
        self.sock = line.raw if isinstance(line, TlsSocket) else line
        self.sock.setblocking(False)
        self.fd = self.sock.fileno()
        self.incoming = InLane(line, stats, codec, find)
        self.outgoing = OutLane(line, stats)
        self.watched = 0

    def readable(self, announced: int) -> bool:
        """Whether a read makes progress that the descriptor does not tell of, now that so many
        payloads were announced."""
        incoming = self.incoming
        if incoming.stalled:
            return incoming.number < announced
        return self.tls is not None and self.tls.readable and not incoming.ended

    def clear(self) -> None:
        """Let go of what was lent."""
        self.incoming.clear()
        self.outgoing.clear()
