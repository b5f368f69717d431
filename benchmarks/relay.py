"""A long way on one machine: ``python -m benchmarks.relay PORT --rtt-ms 150``.

Real sockets connect through this process to a port of this host. Each direction is a line with a
rate that all connections share and a delay of half the round trip; each connection has a bounded
number of bytes in flight, as a kernel's send buffer bounds it: bytes count until their
acknowledgement would be back. So one connection gets its window per round trip, several together
get the line.

The sender's kernel sees an acknowledgement at once, as its connection ends here: what it says of
the round trip (``TCP_INFO``) is that of loopback. Only an answer of the other end shows the delay.
"""

from __future__ import annotations

import argparse
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from benchmarks.contenders.base import end_with_parent
from benchmarks.workloads import LINE, WINDOW

__all__ = ["Flow", "Line", "Relay", "main"]

PIECE: Final = 128 << 10
"""Bytes read at once; a piece arrives as a whole."""
KERNEL: Final = 512 << 10
"""Bytes that the relay's own sockets hold, so that hardly anything waits outside the window."""
CONNECTIONS: Final = 64
"""More at a time are refused."""
IDLE: Final = 3600.0
"""Seconds to wait where nothing is due."""


class Line:
    """One direction that all connections share: a token bucket, by the moment it is free.

    Parameters
    ----------
    rate : float
        Bytes per second; infinite for no limit.
    delay : float
        Seconds from one end to the other.
    """

    def __init__(self, rate: float, delay: float) -> None:
        self.delay = delay
        self._rate = rate
        self._free = 0.0

    def pass_on(self, count: int, now: float) -> float:
        """When ``count`` bytes that are handed over now are at the other end."""
        self._free = max(now, self._free) + count / self._rate
        return self._free + self.delay


@dataclass
class Flow:
    """One direction of one connection.

    Attributes
    ----------
    in_flight, peak : int
        Bytes that are not acknowledged yet, and the most there ever were.
    """

    line: Line
    window: int
    in_flight: int = 0
    peak: int = 0
    _under_way: deque[tuple[float, memoryview]] = field(default_factory=deque)
    _acknowledgements: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def room(self) -> int:
        """Bytes that may be handed over now."""
        return self.window - self.in_flight

    @property
    def empty(self) -> bool:
        """Whether everything has been delivered."""
        return not self._under_way

    def hand_over(self, data: memoryview, now: float) -> None:
        """Send ``data``, which is the flow's from now on."""
        self.in_flight += len(data)
        self.peak = max(self.peak, self.in_flight)
        self._under_way.append((self.line.pass_on(len(data), now), data))

    def arrived(self, now: float) -> memoryview | None:
        """The next bytes to deliver, if they are at the other end by now."""
        if self._under_way and self._under_way[0][0] <= now:
            return self._under_way[0][1]
        return None

    def deliver(self, count: int, now: float) -> None:
        """The receiver took the first ``count`` of them; its acknowledgement is on its way."""
        due, data = self._under_way.popleft()
        if count < len(data):
            self._under_way.appendleft((due, data[count:]))
        self._acknowledgements.append((now + self.line.delay, count))

    def settle(self, now: float) -> None:
        """Take the acknowledgements that have come back."""
        acknowledgements = self._acknowledgements
        while acknowledgements and acknowledgements[0][0] <= now:
            self.in_flight -= acknowledgements.popleft()[1]

    def due(self, blocked: bool) -> float:
        """The next moment at which something arrives, or is acknowledged.

        Where the receiver is ``blocked``, what has arrived waits for it and for no moment.
        """
        arrives = self._under_way[0][0] if self._under_way and not blocked else float("inf")
        return min(arrives, self._acknowledgements[0][0] if self._acknowledgements else arrives)


class _Pump:
    """Moves one flow's bytes from one socket to another."""

    def __init__(self, source: socket.socket, target: socket.socket, flow: Flow) -> None:
        self.source = source
        self.target = target
        self.flow = flow
        self.ended = False  # the source sends no more
        self.done = False  # and the target knows
        self.blocked = False  # the target takes no more for now

    @property
    def reading(self) -> bool:
        return not self.ended and self.flow.room > 0

    def read(self, now: float) -> None:
        buffer = memoryview(bytearray(min(PIECE, self.flow.room)))
        try:
            count = self.source.recv_into(buffer)
        except BlockingIOError:
            return
        if count:
            self.flow.hand_over(buffer[:count], now)
        else:
            self.ended = True

    def write(self, now: float) -> None:
        flow = self.flow
        while (data := flow.arrived(now)) is not None:
            try:
                count = self.target.send(data)
            except BlockingIOError:
                self.blocked = True
                return
            flow.deliver(count, now)
        self.blocked = False
        flow.settle(now)
        if self.ended and not self.done and flow.empty:
            self.done = True
            self.target.shutdown(socket.SHUT_WR)


class _Pair:
    """One connection through the relay."""

    def __init__(self, near: socket.socket, far: socket.socket, up: Flow, down: Flow) -> None:
        self.near, self.far = near, far
        self.pumps = (_Pump(near, far, up), _Pump(far, near, down))

    def step(self, readable: set[int], now: float) -> bool:
        """Whether the connection goes on."""
        try:
            for pump in self.pumps:
                pump.flow.settle(now)
                if pump.reading and pump.source.fileno() in readable:
                    pump.read(now)
                pump.write(now)
        except OSError:  # a reset of one side is one for the other
            return False
        return not all(pump.done for pump in self.pumps)

    def interest(self, sock: socket.socket) -> int:
        """What to watch a socket for."""
        events = 0
        for pump in self.pumps:
            if pump.source is sock and pump.reading:
                events |= select.EPOLLIN
            if pump.target is sock and pump.blocked:
                events |= select.EPOLLOUT
        return events

    def due(self) -> float:
        return min(pump.flow.due(pump.blocked) for pump in self.pumps)

    def close(self) -> None:
        for sock in (self.near, self.far):
            sock.close()


class Relay:
    """Connections to ``port`` go to ``target``, by a way that is longer than it is.

    Parameters
    ----------
    target : int
        Port on this host.
    rtt : float
        Seconds of round trip.
    rate : float
        Bytes per second in each direction, all connections together.
    window : int
        Bytes that each connection may have in flight in each direction.

    Attributes
    ----------
    port : int
        Where it listens, on 127.0.0.1.
    peak : int
        Most bytes that any direction of any connection had in flight.
    """

    def __init__(self, target: int, rtt: float, rate: float, window: int) -> None:
        self._target = target
        self._window = window
        self._lines = (Line(rate, rtt / 2), Line(rate, rtt / 2))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._pairs: dict[int, _Pair] = {}
        self._watched: dict[int, int] = {}
        self.peak = 0

    def close(self) -> None:
        for pair in set(self._pairs.values()):
            self._drop(pair)
        self._epoll.close()
        self._listener.close()

    def run(self) -> None:
        while True:
            self.step(IDLE)

    def step(self, wait: float) -> None:
        """Move what can be moved; waits at most ``wait`` seconds for it."""
        pairs = set(self._pairs.values())
        due = min((pair.due() for pair in pairs), default=float("inf"))
        wait = min(wait, max(0.0, due - time.monotonic()))
        # select counts in microseconds, epoll in milliseconds: too coarse for a short way.
        select.select([self._epoll], [], [], wait)
        readable = set()
        for descriptor, events in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            elif events & ~select.EPOLLOUT:
                readable.add(descriptor)
        now = time.monotonic()
        for pair in set(self._pairs.values()):
            if pair.step(readable, now):
                self._watch(pair)
            else:
                self._drop(pair)
            self.peak = max(self.peak, *(pump.flow.peak for pump in pair.pumps))

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if len(self._pairs) >= 2 * CONNECTIONS:
            near.close()
            return
        far = socket.socket()
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL)
        try:
            far.connect(("127.0.0.1", self._target))
        except OSError:
            near.close()
            far.close()
            return
        flows = [Flow(line, self._window) for line in self._lines]
        pair = _Pair(near, far, *flows)
        for sock in (near, far):
            sock.setblocking(False)
            self._pairs[sock.fileno()] = pair
            self._watched[sock.fileno()] = 0

    def _watch(self, pair: _Pair) -> None:
        for sock in (pair.near, pair.far):
            events, descriptor = pair.interest(sock), sock.fileno()
            before, self._watched[descriptor] = self._watched[descriptor], events
            # Not with nothing to watch for: a hang-up would be reported again and again.
            if not before and events:
                self._epoll.register(descriptor, events)
            elif before and not events:
                self._epoll.unregister(descriptor)
            elif before != events:
                self._epoll.modify(descriptor, events)

    def _drop(self, pair: _Pair) -> None:
        for sock in (pair.near, pair.far):
            descriptor = sock.fileno()
            del self._pairs[descriptor]
            if self._watched.pop(descriptor):
                self._epoll.unregister(descriptor)
        pair.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=int)
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=LINE)
    parser.add_argument("--window", type=int, default=WINDOW)
    options = parser.parse_args()
    end_with_parent()
    relay = Relay(options.target, options.rtt_ms / 1e3, options.rate, options.window)
    print(relay.port, flush=True)
    relay.run()


if __name__ == "__main__":
    main()
