"""The control queue pair of an RDMA connection: small messages into the peer's receive ring, never
more than there is room for. Private."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gpuremote._types import BytesLike
from gpuremote.errors import ProtocolError
from gpuremote.transport.base import TransportStats
from gpuremote.transport.rdma.frames import CREDIT, FRAME, check_frame
from gpuremote.transport.rdma.memory import Registered, anonymous
from gpuremote.transport.rdma.rail import Rail
from gpuremote.transport.verbs.base import Access, Completion, QueuePair

__all__ = ["RECEIVES", "SLOT", "Control", "Frame", "Ring"]

SLOT: Final = 16 << 10
"""Bytes of a slot."""
RECEIVES: Final = 64
"""Slots of the receive ring."""
SENDS: Final = 32
"""Slots for what is being sent."""
SIGNALED: Final = 8
"""Every so many sends one reports that it, and those before it, ended."""
RESERVE: Final = 4
"""Slots of the peer's ring for credit alone. Credit goes out by itself when half of the ring was
emptied, and with everything else: more than two are never on their way unanswered."""

_MODULUS: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Ring:
    """The size of a receive ring."""

    receives: int
    slot: int


class _Slot:
    """A received slot. It is posted again when nobody looks at it any more."""

    __slots__ = ("begin", "end", "number", "users")

    def __init__(self, number: int, begin: int, end: int) -> None:
        self.number = number
        self.begin = begin
        self.end = end
        self.users = 1


class Frame:
    """A frame that arrived.

    Attributes
    ----------
    kind : int
    body : memoryview
        Valid until :meth:`Control.let_go`.
    """

    __slots__ = ("body", "kind", "slot")

    def __init__(self, kind: int, body: memoryview, slot: _Slot | None) -> None:
        self.kind = kind
        self.body = body
        self.slot = slot


class _Queued:
    """A frame that waits to be sent: as long as the peer has no room nothing of it is copied."""

    __slots__ = ("buffers", "done", "left", "offset")

    def __init__(
        self, buffers: list[BytesLike], size: int, done: Callable[[], None] | None
    ) -> None:
        self.buffers = buffers  # last first
        self.offset = 0
        self.left = size
        self.done = done

    def copy(self, target: memoryview) -> int:
        """Move what fits; how much it was."""
        put = 0
        room = min(target.nbytes, self.left)
        while put < room:
            source = memoryview(self.buffers[-1])
            count = min(source.nbytes - self.offset, room - put)
            target[put : put + count] = source[self.offset : self.offset + count]
            put += count
            self.offset += count
            if self.offset == source.nbytes:
                self.buffers.pop()
                self.offset = 0
        self.left -= put
        return put


class Control:
    """One end. Its methods are called under the connection's lock.

    Parameters
    ----------
    rail : Rail
        Where its queue pair lives.
    pair : QueuePair
    stats : TransportStats
    """

    def __init__(self, rail: Rail, pair: QueuePair, stats: TransportStats) -> None:
        self.pair = pair
        self.ended: list[Callable[[], None]] = []
        """What is to be called, as what it belongs to was copied."""
        self._rail = rail
        self._stats = stats
        self._memory, self._base = anonymous((RECEIVES + SENDS) * SLOT)
        self._registered = Registered(
            rail.device.register(self._base, self._memory.nbytes, Access.WRITE_HERE),
            self._base,
            self._memory.nbytes,
        )
        self._ring = Ring(RECEIVES, SLOT)
        self._closed = False
        # Sending.
        self._queue: deque[_Queued] = deque()
        self._free = list(range(SENDS))
        self._posted: deque[tuple[int, int]] = deque()  # work request and slot
        self._sent = 0
        self._theirs = 0  # slots that the peer has emptied
        # Receiving.
        self._arrived: deque[_Slot] = deque()
        self._consumed = 0
        self._reported = 0
        self._partial: bytearray | None = None  # of a frame that is larger than a slot
        self._partial_kind = 0
        self._partial_left = 0

    @staticmethod
    def depths() -> tuple[int, int]:
        """Sends and receives of its queue pair."""
        return SENDS, RECEIVES

    def prime(self, ring: Ring) -> None:
        """Fill the receive ring; before the peer may send."""
        self._ring = ring
        for number in range(RECEIVES):
            self._post_receive(number)

    @property
    def pending(self) -> bool:
        """Whether frames wait."""
        return bool(self._queue)

    @property
    def unread(self) -> bool:
        """Whether slots were received that :meth:`take` has not come to the end of."""
        return bool(self._arrived)

    @property
    def idle(self) -> bool:
        """Whether everything sent was acknowledged, as far as it reports."""
        return not self._queue and not self._posted

    # -- sending -------------------------------------------------------------------------------

    def add(
        self,
        kind: int,
        *parts: BytesLike,
        done: Callable[[], None] | None = None,
    ) -> None:
        """Queue a frame; ``parts`` must not change until ``done``."""
        size = sum(len(part) for part in parts)
        buffers: list[BytesLike] = [part for part in reversed(parts) if len(part)]
        buffers.append(FRAME.pack(size, kind, 0, 0))
        self._queue.append(_Queued(buffers, FRAME.size + size, done))

    def pump(self, *, last: bool = False) -> None:
        """Send what there is room for.

        Parameters
        ----------
        last : bool
            Whether the last of it is to report its end.

        Raises
        ------
        VerbsError
        """
        slot = min(SLOT, self._ring.slot)
        while self._queue and self._free and self._room() > RESERVE:
            number = self._free.pop()
            begin = (RECEIVES + number) * SLOT
            end = begin + CREDIT.size
            limit = begin + slot
            while self._queue and end < limit:
                queued = self._queue[0]
                untouched = queued.offset == 0 and queued.left <= slot - CREDIT.size
                if untouched and queued.left > limit - end:
                    break  # it fits into the next one as a whole
                end += queued.copy(self._memory[end:limit])
                if not queued.left:
                    self._queue.popleft()
                    if queued.done is not None:
                        self.ended.append(queued.done)
            self._post(number, begin, end, last=last and not self._queue)
        # So that the peer goes on although there is nothing to tell it.
        if self._consumed - self._reported >= RECEIVES // 2 and self._free and self._room() > 0:
            begin = (RECEIVES + self._free[-1]) * SLOT
            self._post(self._free.pop(), begin, begin + CREDIT.size, last=False)

    def _room(self) -> int:
        return self._ring.receives - (self._sent - self._theirs)

    def _post(self, number: int, begin: int, end: int, *, last: bool) -> None:
        CREDIT.pack_into(self._memory, begin, self._consumed % _MODULUS)
        self._reported = self._consumed
        self._sent += 1
        # One that does not report its end does so if it fails.
        signaled = last or not self._sent % SIGNALED
        work = self._rail.works.add(self, -1 - number)
        self._posted.append((work, number))
        size = end - begin
        self.pair.post_send(
            work, self._base + begin, size, self._registered.lkey, signaled=signaled
        )
        self._stats.sends += 1
        self._stats.bytes_sent += size

    # -- completions ---------------------------------------------------------------------------

    def completed(self, work: int, tag: int, completion: Completion) -> None:
        if tag >= 0:
            self._received(tag, completion.size)
            return
        # Sends end in order.
        while self._posted and self._posted[0][0] <= work:
            earlier, number = self._posted.popleft()
            self._free.append(number)
            if earlier != work:
                self._rail.works.pop(earlier)

    def describe(self, work: int, tag: int) -> str:
        return "a message's receive" if tag >= 0 else "a message's send"

    def refused(self, completion: Completion) -> bool:
        return False

    def _received(self, number: int, size: int) -> None:
        begin = number * SLOT
        if size < CREDIT.size:
            raise ProtocolError(f"a slot of {size} bytes")
        self._stats.bytes_received += size
        (consumed,) = CREDIT.unpack_from(self._memory, begin)
        more = (consumed - self._theirs) % _MODULUS
        if more > self._sent - self._theirs:
            raise ProtocolError("credit for more than was sent")
        self._theirs += more
        if size == CREDIT.size:
            self._post_receive(number)
            self._consumed += 1
        else:
            self._arrived.append(_Slot(number, begin + CREDIT.size, begin + size))

    def _post_receive(self, number: int) -> None:
        work = self._rail.works.add(self, number)
        address = self._base + number * SLOT
        self.pair.post_receive(work, address, SLOT, self._registered.lkey)

    # -- receiving -----------------------------------------------------------------------------

    def take(self) -> Frame | None:
        """The next frame that is complete.

        Raises
        ------
        ProtocolError
        """
        while self._arrived:
            slot = self._arrived[0]
            if self._partial is not None:
                frame = self._go_on(self._partial, slot)
            else:
                frame = self._begin(slot)
            if slot.begin == slot.end:
                self._arrived.popleft()
                self._leave(slot)
            if frame is not None:
                return frame
        return None

    def _begin(self, slot: _Slot) -> Frame | None:
        if slot.end - slot.begin < FRAME.size:
            raise ProtocolError("the rest of a slot is no frame")
        length, kind, zero, zeros = FRAME.unpack_from(self._memory, slot.begin)
        check_frame(length, kind, zero, zeros)
        slot.begin += FRAME.size
        end = slot.begin + length
        if end <= slot.end:
            body = self._memory[slot.begin : end].toreadonly()
            slot.begin = end
            slot.users += 1
            return Frame(kind, body, slot)
        self._partial = bytearray()
        self._partial_kind = kind
        self._partial_left = length
        return self._go_on(self._partial, slot)

    def _go_on(self, partial: bytearray, slot: _Slot) -> Frame | None:
        """More of a frame that is larger than a slot."""
        count = min(self._partial_left, slot.end - slot.begin)
        partial += self._memory[slot.begin : slot.begin + count]
        slot.begin += count
        self._partial_left -= count
        if self._partial_left:
            return None
        self._partial = None
        return Frame(self._partial_kind, memoryview(partial), None)

    def let_go(self, frame: Frame) -> None:
        """Nobody looks at its body any more."""
        slot, frame.slot = frame.slot, None
        if slot is not None:
            self._leave(slot)

    def _leave(self, slot: _Slot) -> None:
        slot.users -= 1
        if not slot.users and not self._closed:
            self._post_receive(slot.number)
            self._consumed += 1

    def close(self) -> None:
        """After the queue pair: its memory stays for those who look at what was received."""
        self._closed = True
        self._registered.close()
        self._queue.clear()
