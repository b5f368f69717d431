"""A connection that behaves as if the network were worse than it is.

For tests and measurements on one machine: distance, a narrow line, a line that breaks. It wraps
any connection and knows nothing of its bytes.
"""

from __future__ import annotations

import contextlib
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from gpuremote import _clock
from gpuremote._types import BytesLike
from gpuremote.errors import ConfigError, ConnectionLost
from gpuremote.transport.base import Connection, Incoming, Region

__all__ = ["EmulatedConnection"]


CLOSING_WAIT: Final = 0.02
"""Seconds after which ``close`` looks again whether more can be sent."""


class _Watch:
    """A descriptor that is readable when a step can do something.

    Where there is no epoll it is the inner one: a driver that watches it looks more often than
    it has to.

    Attributes
    ----------
    reading, writing : bool
        What is watched.
    """

    def __init__(self, descriptor: int) -> None:
        self.reading = True
        self.writing = False
        self._inner = descriptor
        if sys.platform == "linux":
            self._epoll = select.epoll()
            self._epoll.register(descriptor, select.EPOLLIN)

    def fileno(self) -> int:
        if sys.platform == "linux":
            return -1 if self._epoll.closed else self._epoll.fileno()
        return self._inner

    def update(self, reading: bool, writing: bool) -> None:
        if (reading, writing) == (self.reading, self.writing):
            return
        self.reading, self.writing = reading, writing
        if sys.platform == "linux" and not self._epoll.closed:
            mask = (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if writing else 0)
            # Another thread may be closing either of the two.
            with contextlib.suppress(OSError, ValueError):
                self._epoll.modify(self._inner, mask)

    def close(self) -> None:
        if sys.platform == "linux":
            self._epoll.close()
        self._inner = -1


class _Held(NamedTuple):
    """A message that is still under way, as far as the emulation goes."""

    due: float
    header: BytesLike
    regions: Sequence[Region]
    done: Callable[[], None] | None


class _Line:
    """One direction of a line: bytes that went through are paid for in time."""

    def __init__(self, bandwidth: float | None) -> None:
        self._bandwidth = bandwidth
        self.free = 0.0  # when the line has carried what was given to it

    def carry(self, size: int, now: float) -> None:
        if self._bandwidth is not None and size:
            self.free = max(self.free, now) + size / self._bandwidth


class EmulatedConnection(Connection):
    """Another connection, made worse.

    Parameters
    ----------
    inner : Connection
        Owned from now on.
    delay : float
        Seconds that each message sent from this side takes longer. Messages follow each other
        at full speed, as on a long line. What the other side sends is not delayed: wrap both
        sides, or give the whole round trip here.
    bandwidth : float, optional
        Bytes per second in each direction, on average: the line pauses after each step until
        what went through is paid for. Without it there is no limit.
    cut_after : int, optional
        The connection breaks with the step in which the bytes of both directions reach this
        number. To cut at an exact byte, see ``gpuremote.testing.cutting``.

    Notes
    -----
    Nothing here has a clock of its own: what is held back moves on when a step is made after
    :meth:`due`. ``receive`` is also a send step, so a driver that only waits in ``receive``
    keeps going. On Linux the descriptor is one that is readable, and never writable, whenever
    a step of either kind can do something now.
    """

    def __init__(
        self,
        inner: Connection,
        *,
        delay: float = 0.0,
        bandwidth: float | None = None,
        cut_after: int | None = None,
    ) -> None:
        if not delay >= 0:
            raise ConfigError(f"delay={delay!r}: seconds, not negative")
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigError(f"bandwidth={bandwidth!r}: bytes per second, above 0")
        if cut_after is not None and cut_after < 0:
            raise ConfigError(f"cut_after={cut_after!r}: bytes, not negative")
        self._inner = inner
        self._delay = delay
        self._cut_after = cut_after
        self._closing = False
        # Sending steps are made by threads that send and by those that receive.
        self._sending = threading.Lock()
        self._held: deque[_Held] = deque()
        self._done: deque[Callable[[], None]] = deque()
        self._calling = 0  # the thread that is in a callback
        self._watching = threading.Lock()
        self._out = _Line(bandwidth)
        self._in = _Line(bandwidth)
        self._watch = _Watch(inner.fileno())
        self.name = inner.name
        self.stats = inner.stats
        self.local_address = inner.local_address
        self.peer_address = inner.peer_address
        traits = [f"{delay * 1e3:g} ms"] if delay else []
        traits += [f"{bandwidth / 1e6:g} MB/s"] if bandwidth is not None else []
        traits += [f"cut after {cut_after} bytes"] if cut_after is not None else []
        emulated = "emulated: " + (", ".join(traits) or "nothing")
        self.reason = f"{inner.reason}; {emulated}" if inner.reason else emulated

    def register(self, buffer: Any) -> Region:
        return self._inner.register(buffer)

    def fileno(self) -> int:
        descriptor = self._watch.fileno()
        if descriptor < 0:
            raise ConnectionLost("the connection was closed on this side", peer=self.peer_address)
        return descriptor

    @property
    def pending_output(self) -> bool:
        return bool(self._held) or self._inner.pending_output

    @property
    def buffered(self) -> bool:
        return self._inner.buffered

    @property
    def closed(self) -> bool:
        return self._inner.closed

    def describe(self) -> dict[str, object]:
        return {**self._inner.describe(), "reason": self.reason}

    # -- sending -------------------------------------------------------------------------------

    def send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        if self._inner.closed:
            raise ConnectionLost("the connection was closed on this side", peer=self.peer_address)
        with self._sending:
            waiting = self.pending_output
            self._held.append(_Held(_clock.now() + self._delay, header, regions, done))
        if not waiting:
            self.flush()

    def flush(self) -> bool:
        with self._sending:
            self._move_on()
        self._call_done()
        return not self.pending_output

    def _move_on(self) -> None:
        """Give to the inner connection what is due; with the lock held."""
        inner = self._inner
        now = _clock.now()
        try:
            # First what is due, as a step of the inner connection may bring it before payload.
            while self._held and self._held[0].due <= now and self._out.free <= now:
                held = self._held.popleft()
                done = None if held.done is None else partial(self._done.append, held.done)
                self._pass_on(partial(inner.send, held.header, held.regions, done), now)
            if self._out.free <= now:
                # Also for what it raises if the connection is gone.
                self._pass_on(inner.flush, now)
        except ConnectionLost:
            self._held.clear()
            raise
        self._watch_what_counts(now)

    def _pass_on(self, step: Callable[[], object], now: float) -> None:
        before = self._inner.stats.bytes_sent
        step()
        self._out.carry(self._inner.stats.bytes_sent - before, now)
        self._cut()

    def _call_done(self) -> None:
        # Without the lock: what is called may wait for a lock whose owner is about to send. Not
        # from within a callback: what that one sends could go on without end.
        me = threading.get_ident()
        if self._calling == me:
            return
        while self._done:
            try:
                done = self._done.popleft()
            except IndexError:  # another thread was faster
                return
            self._calling = me
            try:
                done()
            finally:
                self._calling = 0

    # -- receiving -----------------------------------------------------------------------------

    def receive(self, wait: float = 0.0) -> Incoming | None:
        inner = self._inner
        if self.pending_output and self._sending.acquire(blocking=False):
            # (A thread that is sending makes this step itself.)
            try:
                self._move_on()
            finally:
                self._sending.release()
            self._call_done()
        due = self.due()
        if self._in.free > _clock.now() and not inner.closed:
            # The line is still busy with what came before.
            if wait > 0:
                time.sleep(wait if due is None else min(wait, due))
            self._watch_what_counts(_clock.now())
            return None
        if due is not None and due < wait:
            # Below half a second a connection waits no longer than it is told.
            wait = min(due, 0.4)
        before = self._inner.stats.bytes_received
        try:
            found = inner.receive(wait)
        finally:
            now = _clock.now()
            self._in.carry(self._inner.stats.bytes_received - before, now)
            self._cut()
            self._watch_what_counts(now)
        self._call_done()  # a step of some connections sends, whichever it is
        return found

    # -- time and faults -----------------------------------------------------------------------

    def due(self) -> float | None:
        now = _clock.now()
        times = []
        if self._held:
            times.append(max(self._held[0].due, self._out.free))
        # (What is not watched at the moment has to be looked at, even if it is time already.)
        if self._inner.pending_output and not self._watch.writing:
            times.append(self._out.free)
        if not self._watch.reading and not self._closing:
            times.append(self._in.free)
        inner = self._inner.due()
        if inner is not None:
            times.append(max(now + inner, self._in.free))
        return max(0.0, min(times) - now) if times else None

    def _watch_what_counts(self, now: float) -> None:
        with self._watching:
            if not self._inner.closed:
                self._watch.update(
                    self._in.free <= now and not self._closing,
                    self._inner.pending_output and self._out.free <= now,
                )

    def _cut(self) -> None:
        through = self._inner.stats.bytes_sent + self._inner.stats.bytes_received
        if self._cut_after is not None and through >= self._cut_after and not self.closed:
            self.abort()
            raise ConnectionLost(
                f"cut by the emulation after {through} bytes", peer=self.peer_address
            )

    def close(self, timeout: float = 1.0) -> None:
        if self._inner.closed:
            self._watch.close()
            return
        deadline = _clock.now() + timeout
        self._closing = True  # what comes in no longer counts
        poll = select.poll()
        poll.register(self._watch.fileno(), select.POLLIN)
        try:
            while not self.flush():
                left = deadline - _clock.now()
                if left <= 0:
                    self.abort()
                    return
                due = self.due()
                # A descriptor that stands for several is never writable, so not for long.
                poll.poll(1000 * min(left, CLOSING_WAIT if due is None else due))
        except ConnectionLost:
            self.abort()
            return
        self._inner.close(max(0.0, deadline - _clock.now()))
        self._watch.close()

    def abort(self) -> None:
        self._inner.abort()
        # A thread that is sending clears it itself: its step fails.
        if self._sending.acquire(blocking=False):
            self._held.clear()
            self._sending.release()
        self._watch.close()
