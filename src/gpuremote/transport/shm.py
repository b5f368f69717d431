"""Messages over a Unix socket, and their payload through memory that both processes see.

::

    kind SHARED   body = count u16 | count sizes u64 | count places (segment u32, block u32,
                  offset u64) | bytes that are there u64 | header
    kind FILLED   body = bytes that are there by now u64; on the channel of the SHARED
    kind DROPPED  body = segment u32, which the sender no longer uses
    kind PIECE    body = segment u32, block u32, offset u64, bytes u64; on the channel of an OPEN

The top bit of a place's segment (``YOURS``) says that the memory is the receiver's own, which it
gave away before. That payload is only lent, and there is nothing to give back. The next bit
(``LED``), of a payload of one region, says that the sender writes how much is there into a counter
as well, in the first page of the segment. A receiver that looks there copies right behind it.

These frames come among those of ``transport.tcp``: a payload for which there is no room in shared
memory as a whole is sent as there, and the bytes of a PIECE stand for those of a DATA frame where
the sender has a block for them, of a few that it uses again and again. A place of an empty region
is all zeros. New segments come with their descriptors over a second socket, before the frame that
names them.

What a program has in ordinary memory is copied once, by the sender. Memory from ``allocate`` that
is sent whole is not copied at all: it is given away. The receiver keeps it where it lies
(``Incoming.adopt``), or copies it to where it belongs.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Final, NamedTuple

from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost, ProtocolError
from gpuremote.memory.host import copy_bytes, host_memory
from gpuremote.memory.shared import Arena, Loans, Place
from gpuremote.transport._filling import Fill, Pair
from gpuremote.transport._framing import (
    FRAME,
    MAX_OPEN,
    MAX_REGIONS,
    check_frame,
    check_header,
    decode_sizes,
    encode_sizes,
)
from gpuremote.transport._loan import SharedPayload
from gpuremote.transport._outgoing import Flow
from gpuremote.transport._pieces import PIECE, Window
from gpuremote.transport._sending import BURST
from gpuremote.transport._side import Side
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.tcp import TcpConnection

__all__ = ["ShmConnection", "pair"]

SHARED: Final = 16
FILLED: Final = 17
DROPPED: Final = 18
PIECE_AT: Final = 19

CHUNK: Final = 4 << 20
"""Bytes that are copied before the receiver is told of them, so that both copy at a time."""
LEAST_LED: Final = 256 << 10
"""Bytes of a payload of one region from which on the receiver is told of it before it is copied."""
LEAST_PIECE: Final = 256 << 10
"""Bytes that are worth a block, of a payload that goes through a few of them."""
PATIENCE: Final = 200_000
"""Nanoseconds without news from the sender after which the receiver waits for a frame."""
MAX_STAGED: Final = 64 << 20
"""Bytes of a payload that are copied into shared memory as a whole. Of a larger one that would be a
second copy, so it goes through a few blocks, or through the socket."""
YOURS: Final = 1 << 31
LED: Final = 1 << 30
ALIGNMENT: Final = 64
SHARE: Final = 0.5
"""Part of this machine's memory that the segments of one connection may take."""
_PLACE: Final = struct.Struct("<IIQ")
_NUMBER: Final = struct.Struct("<Q")
_ONE: Final = struct.Struct("<IBBHHQIIQQ")
"""A SHARED frame with one region, up to its header."""
_NOTHING: Final = bytes(4)
_DROPPED: Final = struct.Struct("<I")
_PIECE: Final = struct.Struct("<IIQQ")
_LONGEST: Final = {
    SHARED: MAX_OPEN + _PLACE.size * MAX_REGIONS + _NUMBER.size,
    FILLED: _NUMBER.size,
    DROPPED: _DROPPED.size,
    PIECE_AT: _PIECE.size,
}
"""Bytes of the body of each kind of frame."""


class _Lent(NamedTuple):
    """Memory of this end that the other one has, as long as it was not lent again since."""

    arena: Arena
    place: Place
    times: int


def _frame(kind: int, channel: int, body: bytes) -> bytes:
    return FRAME.pack(len(body), kind, 0, channel) + body


class ShmConnection(TcpConnection):
    """A connection between two processes of one host.

    Parameters
    ----------
    sock : socket.socket
        AF_UNIX stream, connected.
    side : socket.socket
        AF_UNIX, SOCK_SEQPACKET, connected: segments are passed over it.
    blocking : bool
        As for ``TcpConnection``.
    limit : int
        Bytes of the segments of this end; 0: half of the machine's memory.
    """

    name = "shm"
    shared = True
    expects = False

    def __init__(
        self, sock: socket.socket, side: socket.socket, *, blocking: bool, limit: int = 0
    ) -> None:
        super().__init__(sock, blocking=blocking, reason="shared memory, proved by a number in it")
        self._shares = True
        self._side = Side(side)
        most = int(SHARE * host_memory())
        self._arena = Arena(min(limit, most) if limit else most, self._side.send, self._drop)
        self._loans = Loans()
        self._fills: deque[Fill] = deque()
        self._filling: dict[int, SharedPayload] = {}  # not there completely yet
        self._copying: deque[SharedPayload] = deque()  # there, but not in place yet
        self._next_channel = 0
        self.stats.extra.update(shared_sent=0, shared_received=0, copied_in=0, copied_out=0)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "arena_bytes": self._arena.nbytes}

    def allocate(self, nbytes: int) -> memoryview | None:
        waiting = self._pending
        outer = self._hold()
        try:
            if self._closed:
                return None
            found = self._arena.allocate(nbytes)
        finally:
            self._let_go(outer)
        if self._pending and not waiting and not self._calling:
            with contextlib.suppress(ConnectionLost):  # a segment that is no longer used
                self._pump()
        return found

    def at_hand(self, nbytes: int) -> object:
        return self._arena.shelf(nbytes)

    def gives(self, view: memoryview) -> bool:
        outer = self._hold()
        try:
            place = self._arena.find(view)
            return place is not None and self._arena.whole(place)
        finally:
            self._let_go(outer)

    def lent(self, place: object) -> memoryview | None:
        outer = self._hold()
        try:
            if isinstance(place, _Lent) and place.arena is self._arena:
                view = self._arena.look(place.place)
                if self._arena.times(place.place) == place.times:
                    return view
            return None
        except ProtocolError:
            return None
        finally:
            self._let_go(outer)

    def _hold(self) -> bool:
        """Until ``_let_go`` another thread that aborts leaves the arena to this one."""
        outer, self._tx_busy = self._tx_busy, True
        return outer

    def _let_go(self, outer: bool) -> None:
        self._tx_busy = outer
        if self._closed and not outer:
            self._release()

    def _release(self) -> None:
        super()._release()
        if not self._tx_busy:
            self._fills.clear()
            self._arena.close()
        if not self._rx_busy:
            for payload in (*self._filling.values(), *self._copying):
                payload.release()
            self._filling.clear()
            self._copying.clear()
            self._loans.close()
        if not self._tx_busy and not self._rx_busy:
            self._side.close()

    # -- segments --------------------------------------------------------------------------------

    def _drop(self, ident: int) -> None:
        self._outbox.add_frame(DROPPED, 0, [_DROPPED.pack(ident)])
        self._pending = True

    # -- sending ---------------------------------------------------------------------------------

    def _send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        total = sum(region.nbytes for region in regions)
        if not total or self._closed or self._tx_failure is not None:
            super()._send(header, regions, done)
            return
        waiting = self._pending  # before room is made, which may queue DROPPED frames
        if (
            len(regions) == 1
            and LEAST_LED <= total <= MAX_STAGED
            and done is None
            and self._in_c
            and not (waiting or self._calling)
            and self._lead(header, regions[0])
        ):
            return
        outer = self._hold()
        try:
            if self._closed:
                raise self._gone()
            placed = self._place(regions)
        finally:
            self._let_go(outer)
        if self._closed:
            raise self._gone()
        if placed is None:
            if self._pending and not (waiting or self._calling):
                self._pump()
            super()._send(header, regions, done)
            return
        places, pairs = placed
        channel = self._new_channel()
        fill = Fill(channel, pairs, done)
        self._copy_in(fill, 0 if self._fills else CHUNK)
        body = encode_sizes([region.nbytes for region in regions]) + b"".join(places)
        head = body + _NUMBER.pack(fill.filled)
        fill.said = fill.filled
        self._outbox.add_frame(SHARED, channel, [head, header], None if fill.left else done)
        if fill.left:
            self._fills.append(fill)
        self._pending = True
        self.stats.messages_sent += 1
        if not waiting and not self._calling:
            self._pump()

    def _new_channel(self) -> int:
        channel = self._next_channel
        self._next_channel = (channel + 1) & 0xFFFF
        return channel

    def _lead(self, header: BytesLike, region: Region) -> bool:
        """Send a message with one region behind nothing else, and copy while the receiver does, if
        there is anything to be copied and room for it."""
        arena, view = self._arena, region.view
        nbytes = view.nbytes
        outer = self._hold()
        try:
            if self._closed:
                raise self._gone()
            if arena.find(view) is not None or (region.steady and self._loans.find(view)):
                return False
            taken = arena.take(nbytes)
            if taken is None:
                return False
            block, place = taken
            arena.lend(place, given=False)
            counter = arena.written(place)
        finally:
            self._let_go(outer)
        counter[:] = _NOTHING
        channel = self._new_channel()
        fill = Fill(channel, deque([(block, view)]), None, counter)
        length = _ONE.size - FRAME.size + len(header)
        where = place.segment | LED, place.block, place.offset
        head = _ONE.pack(length, SHARED, 0, channel, 1, nbytes, *where, 0)
        self._fills.append(fill)
        self.stats.messages_sent += 1
        if self._pending:  # a segment that is no longer used
            self._outbox.add_frame(SHARED, channel, [head[FRAME.size :], header])
        else:
            self._send_frame(head + header)
        self._pump()
        return True

    def _place(self, regions: Sequence[Region]) -> tuple[list[bytes], deque[Pair]] | None:
        """Where each region goes in shared memory, and what is to be copied there; None if there
        is no room."""
        arena = self._arena
        found: list[Place | None] = []
        room = 0
        for region in regions:
            place = arena.find(region.view) if region.nbytes else None
            if place is not None and (region.readonly or not arena.whole(place)):
                place = None
            if place is None and region.steady:
                theirs = self._loans.find(region.view)
                place = theirs and theirs._replace(segment=theirs.segment | YOURS)
            found.append(place)
            if place is None:
                room += -(-region.nbytes // ALIGNMENT) * ALIGNMENT
        if room > MAX_STAGED:
            return None
        block: memoryview | None = None
        origin: Place | None = None
        if room:
            taken = arena.take(room)
            if taken is None:
                return None
            block, origin = taken
        places: list[bytes] = []
        pairs: deque[Pair] = deque()
        used = 0
        for region, place in zip(regions, found, strict=True):
            if not region.nbytes:
                places.append(bytes(_PLACE.size))
                continue
            there = None
            given = place is not None
            if place is None:
                assert block is not None
                assert origin is not None
                place = Place(origin.segment, origin.block, used, region.nbytes)
                there = block[used : used + region.nbytes]
                used += -(-region.nbytes // ALIGNMENT) * ALIGNMENT
            if place.segment < YOURS:
                arena.lend(place, given=given)
            places.append(_PLACE.pack(place.segment, place.block, place.offset))
            pairs.append((there, region.view))
        return places, pairs

    def _copy_in(self, fill: Fill, limit: int) -> int:
        self._tx_touching, before = get_ident(), self._tx_touching
        try:
            copied = fill.copy(limit)
        finally:
            self._tx_touching = before
        stats = self.stats
        stats.extra["copied_in"] += copied
        stats.extra["shared_sent"] += fill.filled - fill.said
        stats.payload_sent += fill.filled - fill.said
        return copied

    def _pump(self) -> bool:
        budget = BURST
        while (not self._outbox.pending or super()._pump()) and self._fills and budget > 0:
            fill = self._fills[0]
            self._tx_busy = True
            try:
                if self._closed:
                    raise self._gone()
                budget -= self._copy_in(fill, CHUNK)
                self._fills.popleft()
                if fill.left:
                    self._fills.append(fill)  # several take turns
            except BaseException as error:  # Ctrl-C: who knows how far it was
                raise self._broken(error) from None
            finally:
                self._tx_busy = False
                if self._closed:
                    self._release()
            fill.said = fill.filled
            said = _NUMBER.pack(fill.filled)
            done = None if fill.left else fill.done
            if done is None and not self._outbox.pending:
                self._send_frame(_frame(FILLED, fill.channel, said))
            else:
                self._outbox.add_frame(FILLED, fill.channel, [said], done)
        self._pending = self._outbox.pending or bool(self._fills)
        return not self._pending

    def _at_once(self, nbytes: int) -> bool:
        return nbytes <= MAX_STAGED and super()._at_once(nbytes)

    def _push_flow(self, flow: Flow, budget: int) -> tuple[int, int, bool, int]:
        window = flow.window
        if not isinstance(window, Window):
            window = flow.window = Window(self._arena, PATIENCE if self.looks else 0)
        found = None if flow.chunk or flow.left < LEAST_PIECE else window.take()
        if found is None:  # one chunk through the socket: meanwhile a block may come back
            return super()._push_flow(flow, min(budget, self._chunk_size))
        return self._push_piece(flow, *found)

    def _push_piece(
        self, flow: Flow, block: memoryview, place: Place
    ) -> tuple[int, int, bool, int]:
        offset, size = flow.offset, min(flow.left, PIECE)
        copy_bytes(block[:size], flow.views[0][offset : offset + size])
        self._arena.lend(place, given=False)
        flow.offset, flow.left = offset + size, flow.left - size
        self.stats.extra["copied_in"] += size
        self.stats.extra["shared_sent"] += size
        body = _PIECE.pack(place.segment, place.block, place.offset, size)
        frame = _frame(PIECE_AT, flow.channel, body)
        sent = self._try_frame(frame)
        return sent, size, sent == len(frame), 1

    def flush(self) -> bool:
        if self._fills and self._tx_failure is None and not self._closed:
            return self._pump()
        return super().flush() and not self._fills

    # -- receiving -------------------------------------------------------------------------------

    @property
    def buffered(self) -> bool:
        return self._start != self._end or bool(self._copying)

    @property
    def restless(self) -> bool:
        return self._pending or self.buffered

    def _receive(self, wait: float) -> Incoming | None:
        if not self._copying or (self._question is not None and self._question.undecided):
            return super()._receive(wait)
        self._copy_out()
        try:
            return super()._receive(0.0)
        except (ConnectionLost, OSError):
            if self._closed:
                raise
            return None  # what has come is here all the same; the end will be seen again

    def _rest(self) -> None:
        super()._rest()
        if self._copying:
            self._plain = False  # come here again, rather than wait

    def _copy_out(self) -> None:
        """Copy a burst of what is there to where it belongs."""
        payload = self._copying.popleft()
        self._rx_touching = get_ident()
        try:
            payload.copy(BURST)
        finally:
            self._rx_touching = 0
        if payload.behind:
            self._copying.append(payload)  # several take turns
        else:
            self._finish(payload)

    def _finish(self, payload: SharedPayload) -> None:
        """Report one that is complete and in place."""
        if payload.left or payload.undecided:
            return
        payload.report()
        if self._closed:
            raise self._gone()

    def _check(self, length: int, kind: int, flags: int, channel: int) -> None:
        if flags or length > _LONGEST.get(kind, 0):
            check_frame(length, kind, flags, channel)

    def _message(self, frame: tuple[int, int, int, int], body: memoryview) -> Incoming | None:
        _, kind, _, channel = frame
        try:
            if kind == SHARED:
                return self._shared(channel, body)
            if kind == FILLED:
                self._filled(channel, *_NUMBER.unpack(body))
                return None
            if kind == PIECE_AT:
                self._piece(channel, *_PIECE.unpack(body))
                return None
            if kind == DROPPED:
                (ident,) = _DROPPED.unpack(body)
                if ident not in self._loans:
                    self._side.take(self._loans)  # it may wait there, never used
                self._loans.drop(ident)
                return None
        except struct.error as error:
            raise ProtocolError(f"a malformed frame of shared memory: {error}") from None
        return super()._message(frame, body)

    def _shared(self, channel: int, body: memoryview) -> Incoming:
        sizes, at = decode_sizes(body)
        begin = at + _PLACE.size * len(sizes) + _NUMBER.size
        total = sum(sizes)
        if len(body) < begin or channel in self._filling:
            raise ProtocolError(f"a payload in shared memory on channel {channel}")
        check_header(len(body) - begin)
        (filled,) = _NUMBER.unpack_from(body, begin - _NUMBER.size)
        if filled > total:
            raise ProtocolError(f"{filled} bytes are there of a payload of {total}")
        views = []
        lent = []
        counter = None
        for number, size in enumerate(sizes):
            segment, block, offset = _PLACE.unpack_from(body, at + number * _PLACE.size)
            place = Place(segment & ~(YOURS | LED), block, offset, size)
            if not size:
                views.append(memoryview(bytearray(0)))
            elif segment & YOURS:
                views.append(self._look(place))
                lent.append(_Lent(self._arena, place, self._arena.times(place)))
            else:
                if place.segment not in self._loans:
                    self._side.take(self._loans)
                views.append(self._loans.view(place))
                if segment & LED and self._in_c and len(sizes) == 1:
                    counter = self._loans.written(place)
        payload = SharedPayload(
            body[begin:],
            sizes,
            views,
            self._behind,
            self._wait_untouched,
            self.stats,
            lent,
            counter,
            PATIENCE if self.looks else 0,
        )
        if filled < total:
            self._filling[channel] = payload
        payload.filled(filled)
        self.stats.messages_received += 1
        self._question = payload
        return payload

    def _piece(self, channel: int, segment: int, block: int, offset: int, size: int) -> None:
        """The next bytes of a payload that goes through the socket lie in shared memory."""
        target = self._channels.get(channel)
        if target is None or not 0 < size <= target.left:
            raise ProtocolError(f"a piece of {size} bytes on channel {channel}")
        if segment not in self._loans:
            self._side.take(self._loans)
        view = self._loans.view(Place(segment, block, offset, size))
        self._rx_touching = get_ident()
        try:
            self.stats.extra["copied_out"] += target.put(view)
        finally:
            self._rx_touching = 0
        self.stats.extra["shared_received"] += size
        self._chunk = size
        self._account(target, size)

    def _look(self, place: Place) -> memoryview:
        try:
            return self._arena.look(place)
        except ProtocolError:
            if self._closed:  # by another thread, and the arena with it
                raise self._gone() from None
            raise

    def _filled(self, channel: int, count: int) -> None:
        payload = self._filling.get(channel)
        if payload is None or not payload.said < count <= payload.total:
            raise ProtocolError(f"{count} bytes are said to be there on channel {channel}")
        if count == payload.total:
            del self._filling[channel]
        if payload.filled(count):
            self._behind(payload)
        self._finish(payload)

    def _behind(self, payload: SharedPayload) -> None:
        """There is something of it to be copied."""
        if payload not in self._copying:
            self._copying.append(payload)
        self._plain = False

    def due(self) -> float | None:
        return 0.0 if self._copying else None


def pair(blocking: bool = True, limit: int = 0) -> tuple[ShmConnection, ShmConnection]:
    """Two connections that are connected to each other, inside this process."""
    socks = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    sides = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here, there = (
        ShmConnection(sock, side, blocking=blocking, limit=limit)
        for sock, side in zip(socks, sides, strict=True)
    )
    return here, there
