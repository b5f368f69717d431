"""Messages over a stream socket (TCP, or AF_UNIX).

Payload goes from the sender's memory to the kernel and from the kernel to the receiver's final
memory; only what arrives together with a header is copied once (``stats.payload_copied``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Final

from gpuremote import _clock
from gpuremote._types import BytesLike
from gpuremote.errors import (
    ConnectionFailed,
    ConnectionLost,
    InternalError,
    LimitExceeded,
    ProtocolError,
)
from gpuremote.transport import congestion
from gpuremote.transport._framing import (
    DATA,
    FRAME,
    MAX_HEADER,
    MAX_REGIONS,
    MESSAGE,
    OPEN,
    check_frame,
    decode_sizes,
    encode_sizes,
)
from gpuremote.transport._incoming import Message, Payload
from gpuremote.transport.base import Connection, Incoming, Region, TransportStats, flat_view

__all__ = ["MAX_HEADER", "MAX_REGIONS", "TcpConnection", "open_tcp", "pair", "tune"]

CHUNK: Final = 1 << 20
"""Payload bytes of one DATA frame: what a control message waits for at most."""
BURST: Final = 8 << 20
"""Bytes handed over by one step, so that a fast peer does not keep the caller in it."""
BUFFER: Final = 256 << 10
"""Bytes of the receive buffer for headers."""
IDLE: Final = 64 << 10
"""Bytes asked for when no message is under way; what of it is payload has to be copied."""
SMALL: Final = 16 << 10
"""Header bytes up to which a message goes out joined with its frame, in one plain send."""
BLOCKING_WAIT: Final = 1.0
"""Seconds that a plain blocking receive waits."""

_IOV: Final = 512
_PREFIX: Final = FRAME.size
_CHANNELS: Final = 65536
_NOW: Final = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)

_pack = FRAME.pack
_unpack_from = FRAME.unpack_from
_Buffer = bytes | bytearray | memoryview


class _Frame:
    """A MESSAGE or OPEN frame that waits to be sent."""

    __slots__ = ("done", "parts")

    def __init__(self, parts: list[_Buffer], done: Callable[[], None] | None) -> None:
        self.parts = parts
        self.done = done


class _Stream:
    """Payload that waits to be sent on its channel."""

    __slots__ = ("channel", "done", "left", "offset", "views")

    def __init__(
        self, channel: int, views: list[memoryview], left: int, done: Callable[[], None] | None
    ) -> None:
        self.channel = channel
        self.views = views  # last first
        self.left = left
        self.offset = 0
        self.done = done

    def chunk(self, out: list[_Buffer]) -> int:
        """Append a DATA frame to ``out``; returns its payload bytes."""
        head = len(out)
        out.append(b"")
        size = 0
        views, offset = self.views, self.offset
        room = _IOV - len(out)
        while views and size < CHUNK and room:
            view = views[-1]
            rest = view.nbytes - offset
            if rest <= CHUNK - size:
                out.append(view[offset:] if offset else view)
                size += rest
                offset = 0
                views.pop()
            else:
                take = CHUNK - size
                out.append(view[offset : offset + take])
                size += take
                offset += take
            room -= 1
        self.offset = offset
        self.left -= size
        out[head] = _pack(size, DATA, 0, self.channel)
        return size


class TcpConnection(Connection):
    """A connection over a connected stream socket, which it owns from now on.

    Parameters
    ----------
    sock : socket.socket
        TCP or AF_UNIX, connected; not tuned here (see :func:`tune`).
    blocking : bool
        True if a thread waits in ``receive``: the socket stays blocking, and waiting for a
        message is one system call. False for an event loop.
    reason : str
        What :func:`tune` said.
    """

    name = "tcp"

    def __init__(self, sock: socket.socket, *, blocking: bool, reason: str = "") -> None:
        self.stats = TransportStats()
        self.reason = reason
        self.local_address, self.peer_address = _addresses(sock)
        self._sock = sock
        self._blocking = blocking
        if blocking:
            sock.settimeout(None)
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(BLOCKING_WAIT), 0)
            )
        else:
            sock.setblocking(False)
        self._closed = False
        # Sending side; touched by the sending thread only.
        self._tx_thread = 0
        self._tx_failure: ConnectionLost | None = None
        self._pending = False
        self._pumping = False
        self._frames: deque[_Frame] = deque()
        self._streams: deque[_Stream] = deque()
        self._out: list[_Buffer] = []
        self._out_size = 0
        self._out_payload = 0
        self._out_done: list[Callable[[], None]] = []
        self._next_channel = 0
        self._channels_out: set[int] = set()
        # Receiving side; touched by the receiving thread only.
        self._rx_thread = 0
        self._rx_touching = False
        self._rx_failure: ConnectionLost | ProtocolError | None = None
        self._poll: select.poll | None = None
        self._rx = memoryview(bytearray(BUFFER))
        self._rx_idle = self._rx[:IDLE]
        self._rx_prefix = self._rx[:_PREFIX]
        self._start = 0
        self._end = 0
        self._large: memoryview | None = None
        self._chunk = 0
        self._target: Payload | None = None
        self._channels: dict[int, Payload] = {}
        self._question: Payload | None = None

    # -- what both sides need ------------------------------------------------------------------

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def pending_output(self) -> bool:
        return self._pending

    @property
    def closed(self) -> bool:
        return self._closed

    def describe(self) -> dict[str, object]:
        found = super().describe()
        found["congestion"] = congestion.current(self._sock)
        return found

    def close(self, timeout: float = 1.0) -> None:
        if self._closed:
            return
        if not self._flush_until(_clock.now() + timeout):
            self.abort()
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._release()

    def _flush_until(self, deadline: float) -> bool:
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLOUT)
            while not self.flush():
                left = deadline - _clock.now()
                if left <= 0 or not poll.poll(left * 1000):
                    return False
        except (OSError, ConnectionLost):
            return False
        return True

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                # Nobody is to wait for what the kernel still holds: reset instead of FIN.
                self._sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0)
                )
            with contextlib.suppress(OSError):
                # Wakes a thread that waits in receive(); close() alone would not.
                self._sock.shutdown(socket.SHUT_RDWR)
        self._release()

    def _release(self) -> None:
        """Give back what no thread is using at the moment; the user does it for the rest."""
        me = get_ident()
        self._wait_untouched()
        if self._tx_thread in (0, me):
            self._frames = deque()
            self._streams = deque()
            self._out = []
            self._out_done = []
            self._pending = False
        for payload in list(self._channels.values()):
            payload.release()
        if self._rx_thread in (0, me) and self._tx_thread in (0, me):
            # Not under the feet of a thread in a system call: the number could be in use for
            # another file before that thread reads it.
            self._sock.close()

    def _wait_untouched(self) -> None:
        """Return when no other thread reads or writes lent memory (it takes microseconds)."""
        me = get_ident()
        deadline = _clock.now() + BLOCKING_WAIT
        while (self._rx_touching and self._rx_thread not in (0, me)) or (
            self._closed and self._tx_thread not in (0, me)
        ):
            if _clock.now() > deadline:
                return
            time.sleep(0)

    def _gone(self) -> ConnectionLost:
        return ConnectionLost("the connection was closed on this side", peer=self.peer_address)

    # -- sending -------------------------------------------------------------------------------

    def send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        if self._tx_failure is not None:
            raise self._tx_failure
        if isinstance(header, memoryview):
            header = flat_view(header)
        size = len(header)
        if size > MAX_HEADER:
            raise LimitExceeded(f"a message header of {size} bytes; at most {MAX_HEADER} are sent")
        if regions:
            self._queue_payload(header, size, regions, done)
        elif self._pending or self._pumping or size > SMALL:
            self._queue([_pack(size, MESSAGE, 0, 0), header], done)
        else:
            self._send_small(header, size, done)
            return
        if not self._pumping:
            self._pump()

    def _send_small(
        self, header: BytesLike, size: int, done: Callable[[], None] | None
    ) -> None:
        frame = _pack(size, MESSAGE, 0, 0) + header
        self._tx_thread = get_ident()
        try:
            if self._closed:
                raise self._gone()
            sent = self._sock.send(frame, _NOW)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._broken(error) from error
        finally:
            self._tx_thread = 0
            if self._closed:
                self._release()
        stats = self.stats
        stats.sends += 1
        stats.messages_sent += 1
        stats.bytes_sent += sent
        if sent == size + _PREFIX:
            if done is not None:
                self._call([done])
        else:
            # Only the frame's own bytes are kept; the message stays where the caller has it.
            stats.messages_sent -= 1
            if sent < _PREFIX:
                self._queue([frame[sent:_PREFIX], header], done)
            else:
                self._queue([memoryview(header)[sent - _PREFIX :]], done)

    def _queue(self, parts: list[_Buffer], done: Callable[[], None] | None) -> None:
        self.stats.messages_sent += 1
        self._pending = True
        self._frames.append(_Frame(parts, done))

    def _queue_payload(
        self,
        header: BytesLike,
        size: int,
        regions: Sequence[Region],
        done: Callable[[], None] | None,
    ) -> None:
        if len(regions) > MAX_REGIONS:
            raise LimitExceeded(f"{len(regions)} regions; a message takes {MAX_REGIONS}")
        sizes = encode_sizes([region.nbytes for region in regions])
        views = [region.view for region in regions if region.nbytes]
        total = sum(view.nbytes for view in views)
        length = len(sizes) + size
        if not total:
            self._queue([_pack(length, OPEN, 0, 0) + sizes, header], done)
            return
        channel = self._new_channel()
        views.reverse()
        self._queue([_pack(length, OPEN, 0, channel) + sizes, header], None)
        self._streams.append(_Stream(channel, views, total, done))

    def _new_channel(self) -> int:
        used = self._channels_out
        if len(used) >= _CHANNELS:
            raise LimitExceeded(f"{_CHANNELS} payloads wait to be sent")
        channel = self._next_channel
        while channel in used:
            channel = (channel + 1) % _CHANNELS
        self._next_channel = (channel + 1) % _CHANNELS
        used.add(channel)
        return channel

    def flush(self) -> bool:
        if self._tx_failure is not None:
            raise self._tx_failure
        if not self._pending:
            if self._closed:
                raise self._gone()
            return True
        return self._pump()

    def _pump(self) -> bool:
        """Send until the kernel takes no more, nothing is left, or a burst is out."""
        stats = self.stats
        budget = BURST
        while True:
            self._tx_thread = get_ident()
            try:
                if self._closed:
                    raise self._gone()
                if not self._out and not self._fill():
                    return True
                out, size = self._out, self._out_size
                sent = (
                    self._sock.sendmsg(out, (), _NOW)
                    if len(out) > 1
                    else self._sock.send(out[0], _NOW)
                )
            except BlockingIOError:
                stats.sends += 1
                return False
            except OSError as error:
                raise self._broken(error) from error
            finally:
                self._tx_thread = 0
                if self._closed:
                    self._release()
            stats.sends += 1
            stats.bytes_sent += sent
            if sent < size:
                self._out = _rest(out, sent)
                self._out_size = size - sent
                return False
            stats.payload_sent += self._out_payload
            self._out = []
            if self._out_done:
                done, self._out_done = self._out_done, []
                self._call(done)
            budget -= sent
            if budget <= 0 and self._pending:
                return False

    def _fill(self) -> bool:
        """Take the next frames, and one chunk, out of the queues; False if they are empty."""
        frames, streams = self._frames, self._streams
        out: list[_Buffer] = []
        done = self._out_done
        payload = 0
        while frames and len(out) < _IOV - 4:
            frame = frames.popleft()
            out += frame.parts
            if frame.done is not None:
                done.append(frame.done)
        if streams and len(out) < _IOV - 4:
            stream = streams.popleft()
            payload = stream.chunk(out)
            if stream.left:
                streams.append(stream)
            else:
                self._channels_out.discard(stream.channel)
                if stream.done is not None:
                    done.append(stream.done)
        self._out = out
        self._out_payload = payload
        self._out_size = sum(map(len, out))
        self._pending = bool(out)
        return self._pending

    def _call(self, callbacks: list[Callable[[], None]]) -> None:
        # What a callback sends is queued: sending it from within could go on without end.
        outer, self._pumping = self._pumping, True
        try:
            for callback in callbacks:
                callback()
        finally:
            self._pumping = outer
        if self._pending and not outer and not self._out:
            self._pump()

    def _broken(self, error: OSError) -> ConnectionLost:
        if self._closed or isinstance(error, ConnectionLost):
            return error if isinstance(error, ConnectionLost) else self._gone()
        self._tx_failure = ConnectionLost(
            f"the connection broke while sending ({error.strerror or error})",
            peer=self.peer_address,
        )
        return self._tx_failure

    # -- receiving -----------------------------------------------------------------------------

    def receive(self, wait: float = 0.0) -> Incoming | None:
        self._rx_thread = get_ident()
        try:
            if self._closed:
                raise self._gone()
            if self._rx_failure is not None:
                raise self._rx_failure
            if self._question is not None:
                self._check_question()
            start, end = self._start, self._end
            if start != end:
                found = self._parse()
                if found is not None or self._start != start or self._end != end:
                    return found
            if not self._read(wait):
                return None
            # The common case, spelled out: one small message and nothing else.
            end = self._end
            if not self._chunk and not self._start and self._large is None and end >= _PREFIX:
                length, kind, flags, channel = _unpack_from(self._rx)
                if kind == MESSAGE and length == end - _PREFIX and not flags and not channel:
                    self._start = self._end = 0
                    self.stats.messages_received += 1
                    return Message(self._rx[_PREFIX:end])
            return self._parse()
        except OSError as error:
            raise self._lost(error) from error
        except ProtocolError as error:
            self._rx_failure = error
            raise
        finally:
            self._rx_thread = 0
            if self._closed:
                self._release()

    def _check_question(self) -> None:
        question, self._question = self._question, None
        if question is not None and question.undecided:
            self._question = question
            raise InternalError("receive() before into() or discard() of the message before")

    def _lost(self, error: OSError) -> ConnectionLost:
        if isinstance(error, ConnectionLost):
            return error
        if self._closed:
            return self._gone()
        lost = self._rx_failure = ConnectionLost(
            f"the connection broke while receiving ({error.strerror or error})",
            peer=self.peer_address,
        )
        return lost

    def _ended(self) -> ConnectionLost:
        if self._closed:
            return self._gone()
        middle = self._channels or self._start != self._end or self._large is not None
        lost = self._rx_failure = ConnectionLost(
            "the peer closed the connection" + (" in the middle of a message" if middle else ""),
            peer=self.peer_address,
        )
        return lost

    def _ready(self, wait: float) -> bool:
        """Wait until the socket is readable."""
        poll = self._poll
        if poll is None:
            poll = self._poll = select.poll()
            poll.register(self._sock.fileno(), select.POLLIN)
        return bool(poll.poll(wait * 1000))

    def _read(self, wait: float) -> bool:
        """One receive call; True if it brought bytes."""
        flags = _NOW
        target = self._target
        if self._chunk and target is not None and not target.dropped:
            if wait > 0 and not self._ready(wait):
                return False
            return self._read_payload(target)
        if wait > 0:
            if wait >= 0.5 and self._blocking:
                flags = 0
            elif not self._ready(wait):
                return False
        stats = self.stats
        stats.receives += 1
        try:
            if self._large is not None:
                count = self._sock.recv_into(self._large[self._end :], 0, flags)
            elif self._start == self._end:
                # While payload is under way only the next frame's own bytes are asked for: more
                # would bring payload along that then has to be copied.
                into = self._rx_prefix if self._channels and not self._chunk else self._rx_idle
                self._start = self._end = 0
                count = self._sock.recv_into(into, 0, flags)
            else:
                self._compact()
                count = self._sock.recv_into(self._rx[self._end :], 0, flags)
        except BlockingIOError:
            return False
        if not count:
            raise self._ended()
        self._end += count
        stats.bytes_received += count
        return True

    def _compact(self) -> None:
        start, end = self._start, self._end
        if start:
            self._rx[: end - start] = self._rx[start:end]
            self._start, self._end = 0, end - start

    def _read_payload(self, target: Payload) -> bool:
        """Receive right into the final place, and the next frame's first bytes behind it."""
        chunk = self._chunk
        stats = self.stats
        self._rx_touching = True
        try:
            targets = target.targets(chunk)
            if targets is None or self._closed:
                return False
            room = chunk if len(targets) == 1 else sum(map(len, targets))
            if room == chunk:
                more = target.left > chunk or len(self._channels) > 1
                targets.append(self._rx_prefix if more else self._rx_idle)
            count = self._sock.recvmsg_into(targets, 0, _NOW)[0]
        except BlockingIOError:
            return False
        finally:
            self._rx_touching = False
            stats.receives += 1
        if not count:
            raise self._ended()
        stats.bytes_received += count
        placed = min(count, room)
        self._start, self._end = 0, count - placed
        self._placed(target, placed)
        return True

    def _placed(self, target: Payload, count: int) -> None:
        """Account for payload that is in place."""
        target.advance(count)
        self._account(target, count)

    def _account(self, target: Payload, count: int) -> None:
        self.stats.payload_received += count
        self._chunk -= count
        if self._chunk:
            return
        self._target = None
        if not target.left:
            for channel, payload in self._channels.items():
                if payload is target:
                    del self._channels[channel]
                    break
            done = target.done
            target.release()
            if done is not None:
                done(target)
                if self._closed:
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
                return self._message(_unpack_from(large), large[_PREFIX:])
            if have < _PREFIX:
                return None
            frame = _unpack_from(rx, start)
            length, kind, flags, channel = frame
            if kind == DATA:
                target = self._channels.get(channel)
                if flags or target is None or not 0 < length <= target.left:
                    raise ProtocolError(f"{length} bytes of payload on channel {channel}")
                self._target = target
                self._chunk = length
                self._start = start + _PREFIX
                continue
            check_frame(length, kind, flags, channel)
            size = _PREFIX + length
            if have < size:
                if size > rx.nbytes:
                    self._grow(size)
                return None
            if have == size:
                self._start = self._end = 0
            else:
                self._start = start + size
            return self._message(frame, rx[start + _PREFIX : start + size])

    def _copy(self, count: int) -> None:
        target = self._target
        assert target is not None
        start = self._start
        self._start = start + count
        self._rx_touching = True
        try:
            self.stats.payload_copied += target.put(self._rx[start : start + count])
        finally:
            self._rx_touching = False
        self._account(target, count)

    def _grow(self, size: int) -> None:
        """A header larger than the buffer gets one of its own."""
        start, end = self._start, self._end
        self._large = memoryview(bytearray(size))
        self._large[: end - start] = self._rx[start:end]
        self._start, self._end = 0, end - start

    def _message(self, frame: tuple[int, int, int, int], body: memoryview) -> Incoming:
        _, kind, _, channel = frame
        if kind == MESSAGE:
            self.stats.messages_received += 1
            return Message(body)
        sizes, begin = decode_sizes(body)
        payload = Payload(body[begin:], sizes, self._wait_untouched)
        if payload.left:
            if channel in self._channels:
                raise ProtocolError(f"a payload on channel {channel}, which is in use")
            self._channels[channel] = payload
            self._question = payload
        self.stats.messages_received += 1
        return payload


def _rest(buffers: list[_Buffer], sent: int) -> list[_Buffer]:
    """The buffers without their first ``sent`` bytes; nothing is copied."""
    for index, buffer in enumerate(buffers):
        size = len(buffer)
        if sent < size:
            rest = buffers[index:]
            if sent:
                rest[0] = memoryview(buffer)[sent:]
            return rest
        sent -= size
    return []


def _addresses(sock: socket.socket) -> tuple[str, str]:
    try:
        return _text(sock.getsockname()), _text(sock.getpeername())
    except OSError as error:
        raise ConnectionLost(f"the socket is not connected ({error.strerror})") from error


def _text(address: object) -> str:
    if not isinstance(address, tuple):
        return f"unix:{os.fsdecode(address)}" if isinstance(address, (str, bytes)) and address \
            else "unix"
    return join_address(str(address[0]), int(address[1]))


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def pair(blocking: bool = True) -> tuple[TcpConnection, TcpConnection]:
    """Two connections that are connected to each other, inside this process."""
    here, there = socket.socketpair()
    return TcpConnection(here, blocking=blocking), TcpConnection(there, blocking=blocking)


def tune(sock: socket.socket) -> str:
    """Set a connected socket up for this library. Never fails.

    No Nagle, keepalive, 30 s until unacknowledged data counts as a loss, congestion control
    by distance. Buffer sizes stay: setting them turns the kernel's own tuning off.

    Returns
    -------
    str
        What was chosen and why, for people.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "Unix socket"
    for level, option, value in _OPTIONS:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
    algorithm, why = congestion.choose(sock)
    return f"congestion control {algorithm or 'unknown'}: {why}"


_OPTIONS: Final = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 30_000),
    )
    if hasattr(socket, name)
]


def open_tcp(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to a TCP address; every address that the name stands for is tried.

    Parameters
    ----------
    timeout : float
        Seconds for all of it (name resolution can't be interrupted).

    Returns
    -------
    socket.socket
        Connected, with a timeout set; not tuned.

    Raises
    ------
    ConnectionFailed
        No such host, refused, unreachable, or no answer in time.
    """
    deadline = _clock.now() + timeout
    peer = join_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise ConnectionFailed(
            f"can't find the host {host!r} ({text}); is the name right?", peer=peer
        ) from error
    failures = []
    cause: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(found):
        left = deadline - _clock.now()
        if left <= 0:
            failures.append(f"no answer within {timeout:g} s")
            break
        sock = socket.socket(family, kind, protocol)
        try:
            # An address that swallows packets leaves time for those behind it.
            sock.settimeout(left / (len(found) - number))
            sock.connect(address)
        except OSError as error:
            sock.close()
            cause = error
            text = (
                "no answer in time" if isinstance(error, TimeoutError)
                else (error.strerror or str(error))
            )
            failures.append(f"{address[0]}: {text}" if len(found) > 1 else text)
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConnectionFailed(
        f"can't connect: {'; '.join(failures)}. Is a server running there "
        "(gpuremote serve), and is the port open?",
        peer=peer,
    ) from cause
