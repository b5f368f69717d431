"""Messages over a stream socket (TCP, or AF_UNIX).

Payload goes from the sender's memory to the kernel and from the kernel to the receiver's final
memory; only what arrives together with a header is copied once (``stats.payload_copied``).
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from threading import get_ident
from typing import Final

from gpuremote import _clock
from gpuremote._speed import native
from gpuremote.errors import ConnectionLost, InternalError, ProtocolError
from gpuremote.transport import congestion
from gpuremote.transport._framing import (
    DATA,
    FRAME,
    MAX_CHUNK,
    MAX_HEADER,
    MAX_REGIONS,
    MESSAGE,
    OPEN,
    check_frame,
    check_header,
    decode_sizes,
)
from gpuremote.transport._incoming import Message, Payload
from gpuremote.transport._loan import SharedPayload
from gpuremote.transport._looking import Looking
from gpuremote.transport._outgoing import CHUNK, Outbox
from gpuremote.transport._sending import BURST, Sender
from gpuremote.transport._sockets import (
    BLOCKING_WAIT,
    addresses,
    broken,
    drain,
    flush_until,
    join_address,
    near,
    open_tcp,
    processors,
    reset,
    same_host,
    set_blocking,
    tune,
)
from gpuremote.transport._stream import NOW, Line, Stream
from gpuremote.transport.base import LONG_BURST, Incoming, TransportStats

__all__ = ["MAX_HEADER", "MAX_REGIONS", "TcpConnection", "join_address", "open_tcp", "pair", "tune"]

LOOKS: Final = 1000
PYTHON_LOOKS: Final = 100
"""Looks, with and without the part in C, that take some 300 µs: as long as a peer needs for a MiB
that has to be woken for it. With half of that one end after the other gave up, and both slept."""
BUFFER: Final = 256 << 10
"""Bytes of the receive buffer for headers."""
IDLE: Final = 64 << 10
"""Bytes asked for when no message is under way; what of it is payload has to be copied."""

_PREFIX: Final = FRAME.size
_unpack_from = FRAME.unpack_from


class StreamConnection(Sender):
    """A connection over a connected stream socket, which it owns from now on; see ``_stream``.

    Parameters
    ----------
    sock : socket.socket
        TCP or AF_UNIX; not tuned here (see :func:`tune`).
    blocking : bool
        True if a thread waits in ``receive``: the socket stays blocking, and waiting for a
        message is one system call (1 s at most, however long ``wait`` is). False for a loop.
    reason : str
        What :func:`tune` said.
    line : Line, optional
        What the bytes go through, if it is not the socket itself.

    Notes
    -----
    Where another exception than the contract's comes out of a step (KeyboardInterrupt from a
    signal, say), nobody knows how many bytes went through: the connection is aborted. ``abort``
    and ``Incoming.discard``, called by any thread, return when no thread uses lent memory.
    """

    name = "tcp"
    # Where it is ``_in_c``.
    _pull: Callable[..., tuple[int, int, int, int]]
    _end_lending: Callable[[], None]
    _more_soon: Callable[[], bool]

    def __init__(
        self, sock: socket.socket, *, blocking: bool, reason: str = "", line: Line | None = None
    ) -> None:
        self.stats = TransportStats()
        self.reason = reason
        self.local_address, self.peer_address = addresses(sock)
        self._sock = sock
        self._line: Line = sock if line is None else line
        self._fd = sock.fileno()
        self._blocking = blocking
        set_blocking(sock, BLOCKING_WAIT if blocking else 0.0)
        self._closed = False
        # Sending side; touched by the sending thread only.
        self._tx_busy = False
        self._tx_touching = 0  # the thread that is reading lent memory
        self._tx_failure: ConnectionLost | None = None
        self._calling = False
        self.near = near(sock)
        if self.near and blocking and processors() > 1:
            self.looks = LOOKS if self._in_c else PYTHON_LOOKS
        self._gap_looks = self.looks
        self._gaps = Looking()
        # Within a host what a control message waits for is a fraction of a millisecond.
        self._same_host = same_host(sock)
        self._chunk_size = MAX_CHUNK if self._same_host else CHUNK
        self._outbox = Outbox(self._chunk_size)
        self._pending = False  # as the outbox says
        # Receiving side; touched by the receiving thread only.
        self._rx_busy = False
        self._rx_touching = 0
        self._hands_off = False
        self._rx_failure: ConnectionLost | ProtocolError | None = None
        self._plain = True  # nothing is under way: the next bytes begin a frame
        self._poll: select.poll | None = None
        self._rx = memoryview(bytearray(BUFFER))
        self._idle = IDLE
        self._rx_idle = self._rx[:IDLE]
        self._rx_prefix = self._rx[:_PREFIX]
        self._start = 0  # what the buffer holds begins here
        self._end = 0  # and ends here
        self._large: memoryview | None = None  # in place of the buffer, for one large header
        self._chunk = 0  # bytes missing of the DATA frame under way
        self._target: Payload | None = None  # and where they belong
        self._channels: dict[int, Payload] = {}
        self._question: Payload | SharedPayload | None = None  # was into() called?

    @staticmethod
    def probe() -> tuple[bool, str]:
        """Whether this transport works on this machine, and what was found."""
        return True, "sockets always work"

    def fileno(self) -> int:
        descriptor = self._sock.fileno()
        if descriptor < 0:
            raise self._gone()
        return descriptor

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "congestion": congestion.current(self._sock)}

    # -- the end -------------------------------------------------------------------------------

    def close(self, timeout: float = 1.0) -> None:
        if self._closed:
            return
        deadline = _clock.now() + timeout
        if not flush_until(self.flush, self._sock, deadline):
            self.abort()
            return
        self._closed = True
        with contextlib.suppress(OSError, ValueError):  # another thread may be closing it
            self._sock.shutdown(socket.SHUT_WR)
            if not self._rx_busy:
                drain(self._sock, self._rx, deadline)
            self._sock.shutdown(socket.SHUT_RDWR)
        self._release()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            reset(self._sock)
        self._release()

    def _release(self) -> None:
        """Give back what no thread in a step needs; such a thread comes here when it leaves."""
        self._wait_untouched()
        # They hold the frames they passed, and those this connection and the program's buffers.
        self._rx_failure = self._tx_failure = None
        if not self._tx_busy:
            self._outbox = Outbox()
            self._end_lending()
        for payload in list(self._channels.values()):
            payload.release()
        if not self._rx_busy:
            self.expect(b"", None, b"")
            self._channels = {}
            self._large = self._target = self._question = None
        if not self._tx_busy and not self._rx_busy:
            # Not under a thread about to enter a system call: the number could be reused.
            self._sock.close()

    def _wait_untouched(self) -> None:
        """Return when no other thread reads or writes lent memory; it takes microseconds, as no
        call sleeps while it has such memory (one that looks for more, or for room, ends that);
        where pages are lent to the kernel some milliseconds."""
        me = get_ident()
        deadline = 0.0
        self._hands_off = True
        while self._rx_touching not in (0, me) or (
            self._closed and self._tx_touching not in (0, me)
        ):
            if not deadline:
                deadline = _clock.now() + BLOCKING_WAIT
            elif _clock.now() > deadline:
                return
            time.sleep(0)

    # -- receiving -----------------------------------------------------------------------------

    def _receive(self, wait: float) -> Incoming | None:
        if self._rx_failure is not None:
            raise self._rx_failure
        if self._question is not None:
            if self._question.undecided:
                raise InternalError("receive() before into() or discard() of the message before")
            self._question = None
        found = None
        start, end, under_way = self._start, self._end, len(self._channels)
        if start != end:
            found = self._parse()
        if found is None:
            if self._start == start and self._end == end:
                more = self._read(wait)
            else:
                # Only where nothing is complete yet that somebody may be waiting for.
                waits = wait if len(self._channels) == under_way else 0.0
                more = self._target is not None and self._read(waits)
            found = self._parse() if more else None
        self._rest()
        return found

    def _take_in(self) -> Incoming | None:
        found = self._parse()
        self._rest()
        return found

    def _rest(self) -> None:
        """Set ``_plain`` where nothing is under way any more."""
        self._plain = self._start == self._end and not self._channels and self._large is None
        if self._plain:
            self._start = self._end = 0

    def _failed(self, error: BaseException) -> BaseException:
        """What to raise for an error of ``receive``."""
        if isinstance(error, ConnectionLost | ProtocolError):
            self._plain = False
            self._rx_failure = error
            return error
        if isinstance(error, InternalError):
            return error
        if not isinstance(error, OSError):
            self.abort()
            return error
        if self._closed:
            return self._gone()
        self._plain = False
        self._rx_failure = broken("receiving", error, self.peer_address)
        return self._rx_failure

    def _ended(self) -> ConnectionLost:
        if self._closed:
            return self._gone()
        middle = self._channels or self._start != self._end or self._large is not None
        return ConnectionLost(
            "the peer closed the connection" + (" in the middle of a message" if middle else ""),
            peer=self.peer_address,
        )

    def _ready(self, wait: float) -> bool:
        """Wait until the socket is readable."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
        return bool(self._poll.poll(wait * 1000))

    def _wait_on(self, wait: float) -> bool:
        """The same for more of a payload."""
        if self._more_soon():
            return True
        begin = _clock.now()
        ready = self._ready(wait)
        self._gaps.waited(_clock.now() - begin, ready)
        return ready

    def _read(self, wait: float) -> bool:
        """One receive call; True if it brought bytes."""
        target = self._target
        if target is not None and not target.dropped:
            if self._in_c:
                return self._pull_payload(target, wait)
            # Never waits inside the receive call, which has the lent memory: see discard().
            return self._read_payload(target) or (
                wait > 0 and self._wait_on(wait) and self._read_payload(target)
            )
        flags = NOW
        if wait > 0 and not (self._channels and self._more_soon()):
            if wait >= 0.5 and self._blocking:
                flags = 0
            elif not self._ready(wait):
                return False
        if self._large is not None:
            into = self._large[self._end :]
        elif self._start != self._end:
            into = self._rest_of_frame()
        else:
            self._start = self._end = 0
            into = self._rx_idle
            if self._channels:
                # Payload is under way: what came along with the next frame would be copied.
                into = self._rx if self._chunk else self._rx_prefix
        self.stats.receives += 1
        try:
            count = self._line.recv_into(into, 0, flags)
        except BlockingIOError:
            return False
        if not count:
            raise self._ended()
        self._end += count
        self.stats.bytes_received += count
        return True

    def _rest_of_frame(self) -> memoryview:
        """Where the rest of a frame goes whose beginning is in the buffer."""
        rx, start, have = self._rx, self._start, self._end - self._start
        if start:
            rx[:have] = rx[start : self._end]
            self._start, self._end = 0, have
        room = rx.nbytes - have
        if have < _PREFIX:
            room = _PREFIX - have if self._channels else room
        elif self._channels or rx[4] == OPEN:
            # Without the payload behind it.
            room = _unpack_from(rx)[0] + 2 * _PREFIX - have
        return rx[have : have + room]

    def _read_payload(self, target: Payload) -> bool:
        """Receive right into the final place, and the next frame's first bytes behind it."""
        chunk = self._chunk
        stats = self.stats
        self._rx_touching = get_ident()
        try:
            # Under the flag: from here on a thread that discards or aborts waits for us.
            targets = target.targets(chunk)
            if targets is None or self._closed:
                return False
            room = chunk if len(targets) == 1 else sum(map(len, targets))
            if room == chunk:
                more = target.left > chunk or len(self._channels) > 1
                targets.append(self._rx_prefix if more else self._rx_idle)
            stats.receives += 1
            count = self._line.recvmsg_into(targets, 0, NOW)[0]
        except BlockingIOError:
            return False
        finally:
            self._rx_touching = 0
        if not count:
            raise self._ended()
        stats.bytes_received += count
        placed = min(count, room)
        self._start, self._end = 0, count - placed
        target.advance(placed)
        self._account(target, placed)
        return True

    def _pull_payload(self, target: Payload, wait: float) -> bool:
        """The same in C: as much as is there, chunk after chunk. While it waits it does not touch
        the memory either."""
        channel = target.channel if len(self._channels) == 1 else -1
        burst = BURST if wait == 0 else LONG_BURST
        self._rx_touching = get_ident()
        try:
            head = target.head()
            if head is None or self._closed:
                return False
            placed, chunk, calls, count = self._pull(
                *head, self._chunk, target.left, channel, burst, wait
            )
        finally:
            self._rx_touching = 0
        self.stats.receives += calls
        self.stats.bytes_received += count
        if not placed:
            return False
        target.advance(placed)
        self._chunk = chunk + placed
        self._account(target, placed)
        return True

    def _account(self, target: Payload, count: int) -> None:
        """``count`` bytes of the DATA frame under way are dealt with."""
        self.stats.payload_received += count
        self._chunk -= count
        if self._chunk:
            return
        self._target = None
        if not target.left:
            self._channels.pop(target.channel, None)
            target.report()
        if self._closed:  # then what is left of it did not count: nothing behind it makes sense
            raise self._gone()

    def _parse(self) -> Incoming | None:
        """Take in what the buffer holds, up to the next header."""
        rx = self._rx
        while True:
            start = self._start
            have = self._end - start
            if self._chunk:
                if not have:
                    return None
                self._copy(min(have, self._chunk))
                continue
            if self._large is not None:
                large = self._large
                if self._end < large.nbytes:
                    return None
                self._start = self._end = 0
                self._large = None
                found = self._message(_unpack_from(large), large[_PREFIX:])
                if found is not None:
                    return found
                continue
            if have < _PREFIX:
                return None
            frame = _unpack_from(rx, start)
            length, kind, flags, channel = frame
            if kind == DATA:
                target = self._channels.get(channel)
                if flags or target is None or not 0 < length <= min(target.left, MAX_CHUNK):
                    raise ProtocolError(f"{length} bytes of payload on channel {channel}")
                self._target = target
                self._chunk = length
                self._start = start + _PREFIX
                continue
            self._check(length, kind, flags, channel)
            size = _PREFIX + length
            if have < size:
                if size > rx.nbytes:
                    # A header larger than the buffer gets one of its own.
                    self._large = memoryview(bytearray(size))
                    self._large[:have] = rx[start : self._end]
                    self._start, self._end = 0, have
                return None
            if have == size:
                self._start = self._end = 0
            else:
                self._start = start + size
            found = self._message(frame, rx[start + _PREFIX : start + size])
            if found is not None:
                return found

    # What a transport that adds frames of its own overrides.

    def _check(self, length: int, kind: int, flags: int, channel: int) -> None:
        """Refuse a frame, other than DATA, that no sender makes."""
        check_frame(length, kind, flags, channel)

    def _copy(self, count: int) -> None:
        target = self._target
        assert target is not None
        start = self._start
        self._start = start + count
        self._rx_touching = get_ident()
        try:
            self.stats.payload_copied += target.put(self._rx[start : start + count])
        finally:
            self._rx_touching = 0
        self._account(target, count)

    def _landed(
        self, header: memoryview, view: memoryview, channel: int, placed: int, chunk: int
    ) -> Payload:
        """A message that was expected, of whose payload so much is in ``view``."""
        payload = Payload(header, (view.nbytes,), channel, self._wait_untouched)
        payload.landed(view, placed)
        self.stats.payload_received += placed
        if payload.left:
            self._channels[channel] = payload
            self._chunk = chunk
            self._target = payload if chunk else None
            self._question = payload
        self._rest()
        return payload

    def _whole(self, end: int) -> Message:
        return Message(self._rx[_PREFIX:end])

    def _message(self, frame: tuple[int, int, int, int], body: memoryview) -> Incoming | None:
        """Take in a whole frame other than DATA; the message that it begins, if it does."""
        _, kind, _, channel = frame
        if kind == MESSAGE:
            self.stats.messages_received += 1
            return Message(body)
        sizes, begin = decode_sizes(body)
        check_header(len(body) - begin)
        payload = Payload(body[begin:], sizes, channel, self._wait_untouched)
        if payload.left:
            if channel in self._channels:
                raise ProtocolError(f"a payload on channel {channel}, which is in use")
            self._channels[channel] = payload
            self._question = payload
        self.stats.messages_received += 1
        return payload


class TcpConnection(Stream, StreamConnection):
    """A connection over a stream socket; sent and received in C where that part is installed."""

    _in_c = expects = native is not None

    def at_hand(self, nbytes: int) -> object:
        return self if self._in_c and self._same_host else None


def pair(blocking: bool = True) -> tuple[TcpConnection, TcpConnection]:
    """Two connections that are connected to each other, inside this process."""
    here, there = socket.socketpair()
    return TcpConnection(here, blocking=blocking), TcpConnection(there, blocking=blocking)
