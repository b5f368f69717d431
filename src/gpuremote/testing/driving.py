"""Two connected ends, driven by their steps in one thread."""

from __future__ import annotations

import random
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gpuremote import _clock
from gpuremote.transport.base import Connection, Incoming

__all__ = ["Ends", "place", "random_parts"]


class Ends:
    """Drives connections until something holds, and never for longer than a limit.

    Parameters
    ----------
    *connections : Connection
    limit : float
        Seconds that all of the driving may take.

    Attributes
    ----------
    take : callable or None
        Called with a connection and each message that begins to arrive there. Without it the
        messages wait for :meth:`receive`.
    """

    def __init__(self, *connections: Connection, limit: float = 20.0) -> None:
        self._connections = connections
        self._deadline = _clock.now() + limit
        self.take: Callable[[Connection, Incoming], None] | None = None
        self._arrived: dict[int, deque[Incoming]] = {id(c): deque() for c in connections}

    def step(self, *, reading: tuple[Connection, ...] | None = None) -> bool:
        """One step of each kind on every end (receive only on ``reading``, if given).

        Returns whether anything moved.
        """
        moved = False
        for connection in self._connections:
            if connection.closed:
                continue
            before = connection.stats.bytes_sent, connection.stats.bytes_received
            if connection.pending_output:
                connection.flush()
            if reading is None or connection in reading:
                moved = self._receive(connection) or moved
            moved = moved or before != (
                connection.stats.bytes_sent,
                connection.stats.bytes_received,
            )
        return moved

    def until(
        self, condition: Callable[[], object], *, reading: tuple[Connection, ...] | None = None
    ) -> None:
        """Step until ``condition`` holds."""
        while not condition():
            assert _clock.now() < self._deadline, "the connections did not get there in time"
            if not self.step(reading=reading) and not condition():
                self._wait()

    def quiet(self, connection: Connection, seconds: float = 0.05) -> None:
        """Step ``connection`` alone until nothing has come for ``seconds``."""
        last = _clock.now()
        while _clock.now() - last < seconds:
            assert _clock.now() < self._deadline, "the connection does not get quiet"
            before = connection.stats.bytes_received
            if self._receive(connection) or connection.stats.bytes_received != before:
                last = _clock.now()

    def receive(self, connection: Connection) -> Incoming:
        """The next message that begins to arrive; where its payload goes is to be said before
        anything else is done here."""
        arrived = self._arrived[id(connection)]
        self.until(lambda: arrived)
        return arrived.popleft()

    def flush(self, connection: Connection) -> None:
        """Step until ``connection`` has nothing left to send; the others only send."""
        self.until(lambda: not connection.pending_output, reading=())

    def _receive(self, connection: Connection) -> bool:
        incoming = connection.receive()
        if incoming is None:
            return False
        if self.take is not None:
            self.take(connection, incoming)
        else:
            _keep_header(incoming)
            self._arrived[id(connection)].append(incoming)
        return True

    def _wait(self) -> None:
        poll = select.poll()
        seconds = 0.005
        for connection in self._connections:
            if connection.closed:
                continue
            wanted = select.POLLIN | (select.POLLOUT if connection.pending_output else 0)
            poll.register(connection.fileno(), wanted)
            due = connection.due()
            if due is not None:
                seconds = min(seconds, due)
        poll.poll(seconds * 1000)


def _keep_header(incoming: Any) -> None:
    """It is read when others have come."""
    incoming.header = memoryview(bytes(incoming.header))


def random_parts(sizes: Sequence[int]) -> list[bytes]:
    """Bytes of these sizes, random and always the same."""
    chance = random.Random(repr(sizes))
    return [chance.randbytes(size) for size in sizes]


def place(ends: Ends, incoming: Incoming) -> list[bytearray]:
    """Receive the payload of ``incoming`` into new memory."""
    targets = [bytearray(size) for size in incoming.sizes]
    done: list[Incoming] = []
    incoming.into([memoryview(target) for target in targets], done.append)
    ends.until(lambda: done)
    assert done == [incoming]
    return targets
