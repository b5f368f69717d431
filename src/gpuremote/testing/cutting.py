"""A network that breaks on purpose: a TCP proxy on the loopback that cuts at an exact byte."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from typing import Final, Literal

from gpuremote import _clock
from gpuremote.errors import ConfigError

__all__ = ["CuttingProxy", "Direction"]

Direction = Literal["up", "down"]
"""``up``: from those who connect to the server; ``down``: from the server to them."""

_READ: Final = 256 << 10
_HELD: Final = 4 << 20
"""Bytes that wait in one direction before its source is no longer read (delay apart)."""
_SIOCOUTQNSD: Final = 0x894B
_DELIVERY: Final = 1.0
_RESET: Final = struct.pack("@ii", 1, 0)


class _Way:
    """One direction of one connection."""

    def __init__(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction: Direction = direction
        self.source = source
        self.sink = sink
        self.waiting: deque[tuple[float, memoryview]] = deque()  # with the time when it is due
        self.held = 0
        self.ended = False  # the source sent its last byte
        self.finished = False  # and the sink knows
        self.full = False  # the sink takes nothing at the moment


class _Link:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.ways = (_Way("up", client, server), _Way("down", server, client))


class CuttingProxy:
    """Forwards TCP connections to a server, and cuts them when told.

    A cut is a reset of both sides, as when a route or a machine goes away and comes back. What
    was forwarded before it has arrived; nothing else has.

    Parameters
    ----------
    host : str
    port : int
        The server.
    delay : float
        Seconds that every byte takes longer, in both directions.
    bandwidth : float, optional
        Bytes per second in each direction, for all connections together.

    Attributes
    ----------
    connections : int
        Accepted since the start.
    bytes_up, bytes_down : int
        Forwarded since the start: handed to the kernel for the other side.
    cuts : int
        Connections that were cut.
    delay, bandwidth
        May be changed while it runs.
    refusing : bool
        While True, those who connect are reset at once (the network is down).

    Examples
    --------
    >>> with CuttingProxy("127.0.0.1", port) as proxy:        # doctest: +SKIP
    ...     proxy.cut_after(1000, "up")
    ...     session = connect(f"gpu://127.0.0.1:{proxy.port}")
    """

    def __init__(
        self, host: str, port: int, *, delay: float = 0.0, bandwidth: float | None = None
    ) -> None:
        if not delay >= 0:
            raise ConfigError(f"delay={delay!r}: seconds, not negative")
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigError(f"bandwidth={bandwidth!r}: bytes per second, above 0")
        self.delay = delay
        self.bandwidth = bandwidth
        self.connections = 0
        self.cuts = 0
        self.refusing = False
        self.host = "127.0.0.1"
        self._server = (host, port)
        self._bytes: dict[Direction, int] = {"up": 0, "down": 0}
        # Number of the byte behind which to cut, and how many more bytes until the next time.
        self._marks: dict[Direction, tuple[int, int] | None] = {"up": None, "down": None}
        self._free: dict[Direction, float] = {"up": 0.0, "down": 0.0}
        self._links: list[_Link] = []
        self._cut_now = False
        self._closing = False
        self._listener = socket.create_server((self.host, 0), backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="gpuremote-cutting", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self.host, self.port

    @property
    def url(self) -> str:
        """A device server behind it, over the transport that it can cut."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"gpu://{host}:{self.port}?transport=tcp"

    @property
    def bytes_up(self) -> int:
        return self._bytes["up"]

    @property
    def bytes_down(self) -> int:
        return self._bytes["down"]

    @property
    def open_connections(self) -> int:
        """Connections that are being forwarded now."""
        return len(self._links)

    def cut_after(self, count: int, direction: Direction, *, repeat: bool = False) -> None:
        """Cut the connection that carries byte number ``count`` right behind it.

        Parameters
        ----------
        count : int
            Bytes of this direction, from the start of the proxy and over all connections.
            With 0, or what is forwarded already, the next connection that would forward a
            byte this way is cut before it does (a new one: as soon as it is accepted).
        direction : {"up", "down"}
        repeat : bool
            Cut again after another ``count`` bytes, and so on; by default only once.
        """
        if count < 0 or (repeat and not count):
            raise ConfigError(f"cut_after({count!r}): bytes, not negative (0: not repeatedly)")
        with self._lock:
            self._marks[direction] = (count, count if repeat else 0)

    def cut_never(self) -> None:
        """Take back what ``cut_after`` asked for."""
        with self._lock:
            self._marks = {"up": None, "down": None}

    def cut(self) -> None:
        """Cut every open connection, and return when that is done."""
        with self._lock:
            self._cut_now = True
        self._wake()
        deadline = _clock.now() + 5.0
        while self._cut_now and self._thread.is_alive() and _clock.now() < deadline:
            time.sleep(0.0005)

    def close(self) -> None:
        """Reset every connection and end the thread. Idempotent."""
        self._closing = True
        self._wake()
        self._thread.join()
        self._wake_in.close()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_in.send(b"x", socket.MSG_DONTWAIT)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        finally:
            for link in list(self._links):
                self._reset(link)
            self._listener.close()
            self._wake_out.close()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_out, select.POLLIN)
        now = _clock.now()
        due: float | None = None
        for link in self._links:
            wanted = dict.fromkeys(link.sockets, 0)
            for way in link.ways:
                if not way.ended and way.held < self._room():
                    wanted[way.source] |= select.POLLIN
                if way.waiting and way.full:
                    wanted[way.sink] |= select.POLLOUT
                elif way.waiting:
                    time_left = max(way.waiting[0][0], self._free[way.direction]) - now
                    due = time_left if due is None else min(due, time_left)
            for sock, events in wanted.items():
                poll.register(sock, events)
        events_of = dict(poll.poll(None if due is None else max(0.0, due * 1000)))
        if events_of.get(self._wake_out.fileno()):
            self._drain_wakes()
        if self._cut_now:
            for link in list(self._links):
                self._reset(link, cut=True)
            self._cut_now = False
        if events_of.get(self._listener.fileno()):
            self._accept()
        for link in list(self._links):
            self._forward(link, events_of)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass

    def _room(self) -> int:
        """Bytes that one direction may hold; what a long line has under way comes on top."""
        return _HELD + int(self.delay * (self.bandwidth if self.bandwidth is not None else 4e9))

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        self.connections += 1
        with self._lock:
            over = next((d for d in self._marks if self._left(d) == 0), None)
        if self.refusing or over is not None:
            if over is not None:
                self._mark_reached(over)
                self.cuts += 1
            _reset_socket(client)
            return
        try:
            server = socket.create_connection(self._server, timeout=5.0)
        except OSError:
            _reset_socket(client)
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append(_Link(client, server))

    def _forward(self, link: _Link, events_of: dict[int, int]) -> None:
        try:
            for way in link.ways:
                events = events_of.get(way.source.fileno(), 0)
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    self._read(way)
                if events_of.get(way.sink.fileno(), 0) & select.POLLOUT:
                    way.full = False
                if way.waiting and not way.full and not self._write(way):
                    self._mark_reached(way.direction)
                    _deliver(way.sink)
                    self._reset(link, cut=True)
                    return
                if way.ended and not way.waiting and not way.finished:
                    way.finished = True
                    way.sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side is gone: the other one learns it the same way.
            self._reset(link)
            return
        if all(way.finished for way in link.ways):
            self._links.remove(link)
            for sock in link.sockets:
                sock.close()

    def _read(self, way: _Way) -> None:
        if way.ended or way.held >= self._room():
            return
        try:
            data = way.source.recv(_READ)
        except BlockingIOError:
            return
        if not data:
            way.ended = True
            return
        way.held += len(data)
        way.waiting.append((_clock.now() + self.delay, memoryview(data)))

    def _write(self, way: _Way) -> bool:
        """Forward what is due; False when the mark is reached."""
        while way.waiting:
            now = _clock.now()
            due, data = way.waiting[0]
            if due > now or self._free[way.direction] > now:
                return True
            left = self._left(way.direction)
            if left == 0:
                return False
            part = data if left is None else data[:left]
            if self.bandwidth is not None:
                part = part[: max(1, int(self.bandwidth * 0.002))]
            try:
                sent = way.sink.send(part, socket.MSG_DONTWAIT)
            except BlockingIOError:
                way.full = True
                return True
            self._bytes[way.direction] += sent
            way.held -= sent
            if self.bandwidth is not None:
                busy = max(self._free[way.direction], now - 0.01)
                self._free[way.direction] = busy + sent / self.bandwidth
            if sent == len(data):
                way.waiting.popleft()
            else:
                way.waiting[0] = (due, data[sent:])
            if left is not None and sent == left:
                return False
        return True

    def _left(self, direction: Direction) -> int | None:
        """Bytes to the mark of this direction; None without one."""
        mark = self._marks[direction]
        return None if mark is None else max(0, mark[0] - self._bytes[direction])

    def _mark_reached(self, direction: Direction) -> None:
        with self._lock:
            mark = self._marks[direction]
            if mark is not None:
                at, again = mark
                self._marks[direction] = (at + again, again) if again else None

    def _reset(self, link: _Link, *, cut: bool = False) -> None:
        self._links.remove(link)
        self.cuts += cut
        for sock in link.sockets:
            _reset_socket(sock)


def _reset_socket(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def _deliver(sock: socket.socket) -> None:
    """Wait until what was sent has left this kernel's queue (on the loopback it then is in the
    receiver's), as a reset throws the rest away."""
    if sys.platform != "linux":
        return
    deadline = _clock.now() + _DELIVERY
    while _clock.now() < deadline:
        unsent = fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, b"\0" * 4)
        if not int.from_bytes(unsent, sys.byteorder):
            return
        time.sleep(0.0002)
