"""A connection for long ways: messages over the first connection, large payloads over several more.

One TCP connection moves a window per round trip. Several together fill the way. Each payload is
cut into pieces, and each piece goes to whichever lane takes it first, so that a slow one holds up
no other. The receiver puts each piece right into its final place. Messages and small payloads stay
on the first connection, so none of them waits behind bulk.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from gpuremote import _clock
from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost, LimitExceeded, ProtocolError
from gpuremote.transport._sending import BURST
from gpuremote.transport._sockets import broken, drain, reset
from gpuremote.transport.base import Connection, Incoming, Region
from gpuremote.transport.lanes.compression import Codec, Rule, codec_named
from gpuremote.transport.lanes.control import control_over
from gpuremote.transport.lanes.frames import MAX_AHEAD
from gpuremote.transport.lanes.lane import Lane
from gpuremote.transport.lanes.payload import SpreadPayload
from gpuremote.transport.lanes.striping import Source, Striping
from gpuremote.transport.tcp import StreamConnection, TcpConnection
from gpuremote.transport.tls import TlsSocket

__all__ = ["LARGE", "LanesConnection", "pair", "tune_lane"]

LARGE: Final = 256 << 10
"""Bytes of a payload from which on it goes over the lanes."""
UNSENT: Final = 256 << 10
"""Bytes that a lane's kernel holds unsent: what waits there can't be sent by another lane."""
TURNS: Final = 16
"""Messages in a row before the lanes are looked at."""
LINGER: Final = 1.0
"""Seconds that the other connections may bring nothing after one has ended, before all of it
counts as lost: a close ends them all, and not at one moment."""
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT


def tune_lane(sock: socket.socket) -> None:
    """What a lane's socket has beyond ``tune``. Never fails."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, UNSENT)


class LanesConnection(Connection):
    """A first connection and further ones beside it.

    Parameters
    ----------
    first : TcpConnection or TlsConnection
        Has nothing under way; its socket is this one's from now on.
    lines : sequence of socket.socket or TlsSocket
        The lanes, set up as ``tune`` and :func:`tune_lane` do; owned from now on. Their order
        means nothing.
    codecs : tuple of (Codec or None), optional
        For what is sent and for what comes in.
    rule : Rule, optional
        When to compress.
    facts : dict, optional
        What ``describe`` adds.

    Notes
    -----
    Any step also sends what the lanes take, whichever thread makes it; the descriptor is one that
    is readable, and never writable, whenever a step can do something. The end of one of the
    connections is the end of this one.
    """

    name = "tcp"

    def __init__(
        self,
        first: StreamConnection,
        lines: Sequence[socket.socket | TlsSocket],
        *,
        codecs: tuple[Codec | None, Codec | None] = (None, None),
        rule: Rule | None = None,
        reason: str = "",
        facts: dict[str, object] | None = None,
    ) -> None:
        self._sending = threading.RLock()
        self._placing = threading.RLock()
        self._control = control_over(first, self._wait_untouched)
        self.near = self._control.near
        self.stats = self._control.stats
        self.reason = f"{first.reason}; {reason}" if reason else first.reason
        self.local_address = first.local_address
        self.peer_address = first.peer_address
        self._facts = facts or {}
        self._lanes = [Lane(line, self.stats, codecs[1], self._control.find) for line in lines]
        self._ended: deque[Callable[[], None]] = deque()  # callbacks of what is out
        self._striping = Striping(
            [lane.outgoing for lane in self._lanes],
            self.stats,
            codecs[0],
            rule or Rule(),
            self._ended,
        )
        self._number = 0
        self._calling: set[int] = set()  # the threads that are in a callback of a send
        self._complete: deque[SpreadPayload] = deque()
        self._turns = 0
        self._first = 0  # the lane that is read first
        self._closed = False
        self._failure: ConnectionLost | ProtocolError | None = None
        self._tx_failure: ConnectionLost | None = None
        self._loss: ConnectionLost | None = None  # some of it has ended
        self._lingering = True  # and the rest may have something left
        self._loss_at = 0.0  # until then
        self._control_ended = False
        self._waiting = 0
        self._watching = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, _IN)
        self._control_fd = self._control.fileno()
        self._control_watched = _IN
        self._epoll.register(self._control_fd, _IN)
        for lane in self._lanes:
            lane.watched = _IN
            self._epoll.register(lane.fd, _IN)

    # -- what it tells -------------------------------------------------------------------------

    def fileno(self) -> int:
        if self._closed:
            raise self._gone()
        return self._epoll.fileno()

    @property
    def pending_output(self) -> bool:
        return not self._closed and (self._control.pending_output or self._striping.pending)

    @property
    def buffered(self) -> bool:
        if self._closed:
            return False
        announced = self._control.announced
        return self._control.buffered or any(lane.readable(announced) for lane in self._lanes)

    @property
    def closed(self) -> bool:
        return self._closed

    def due(self) -> float | None:
        if self.buffered or self._complete:
            return 0.0
        return None if self._loss is None else max(0.0, self._loss_at - _clock.now())

    def describe(self) -> dict[str, object]:
        said = {**self._control.describe(), "reason": self.reason, "lanes": len(self._lanes)}
        return said | self._facts

    def lane_bytes(self) -> list[tuple[int, int]]:
        """Bytes that each lane sent and received."""
        return [(lane.outgoing.sent, lane.incoming.received) for lane in self._lanes]

    def _gone(self) -> ConnectionLost:
        return ConnectionLost("the connection was closed on this side", peer=self.peer_address)

    def _check(self) -> None:
        if self._closed:
            raise self._gone()
        if self._failure is not None:
            raise self._failure

    # -- sending -------------------------------------------------------------------------------

    def _check_sending(self) -> None:
        self._check()
        if self._tx_failure is not None:
            raise self._tx_failure

    def send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        with self._sending:
            self._check_sending()
            waiting = self.pending_output
            if sum(region.nbytes for region in regions) < LARGE:
                # Called when no lock is held.
                told = None if done is None else partial(self._ended.append, done)
                self._control.send(header, regions, told)
            else:
                self._spread(header, regions, done)
                if not waiting and threading.get_ident() not in self._calling:
                    self._guarded(lambda: self._striping.pump(BURST))
            self._watch()
        self._call_ended()

    def _spread(
        self, header: BytesLike, regions: Sequence[Region], done: Callable[[], None] | None
    ) -> None:
        if self._striping.open >= MAX_AHEAD:
            raise LimitExceeded(f"{MAX_AHEAD} payloads wait to be sent")
        number = self._number
        source = Source(number, regions, done)
        # The frame first: whatever is wrong with it is found before anything is taken on.
        told = partial(self._striping.part_out, source)
        self._control.announce(header, regions, number, told)
        self._number = number + 1
        self._striping.add(source)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            with self._sending, self._control.together():
                yield
        finally:
            if not self._closed:
                with self._sending:
                    self._watch()
        self._call_ended()

    def flush(self) -> bool:
        with self._sending:
            self._check_sending()
            self._push()
            self._watch()
            self._check_sending()
        self._call_ended()
        return not self.pending_output

    def _push(self) -> None:
        """Send what is taken now, with the lock."""
        if self._control.pending_output:
            self._guarded(self._control.flush)
        if self._striping.pending:
            self._guarded(lambda: self._striping.pump(BURST))

    def _guarded(self, step: Callable[[], object]) -> None:
        """Make a send step; what goes wrong in it is told by the steps that follow."""
        if self._closed or self._tx_failure is not None:
            return
        try:
            step()
        except ConnectionLost as error:
            self._lose(error)
        except OSError as error:
            self._lose(broken("sending", error, self.peer_address))
        except BaseException:
            # Nobody knows how many bytes went through.
            self.abort()
            raise

    def _lose(self, error: ConnectionLost) -> None:
        self._tx_failure = error
        self._striping.clear()
        for lane in self._lanes:
            lane.outgoing.clear()
        self._end_of_one(error, lingering=True)

    def _call_ended(self) -> None:
        # Not from within such a callback: what that one sends could go on without end.
        me = threading.get_ident()
        if me in self._calling:
            return
        while self._ended and not self._closed:
            try:
                done = self._ended.popleft()
            except IndexError:  # another thread was faster
                return
            self._calling.add(me)
            try:
                done()
            finally:
                self._calling.discard(me)

    # -- receiving -----------------------------------------------------------------------------

    def receive(self, wait: float = 0.0) -> Incoming | None:
        before = self.stats.bytes_received
        found = self._step()
        if found is not None or wait <= 0 or self.stats.bytes_received != before:
            return found
        due = self.due()
        self._wait(wait if due is None else min(wait, due))
        return self._step()

    def _step(self) -> Incoming | None:
        self._check()
        if self.pending_output and self._sending.acquire(blocking=False):
            # (A thread that is sending makes this step itself.)
            try:
                self._push()
            finally:
                self._sending.release()
            self._call_ended()
        found = self._hear() if self._turns < TURNS else None
        if found is not None:
            self._turns += 1
            return found
        if self._turns:
            self._turns = 0
        self._read_lanes()
        told = self._call_complete()
        if self._loss is not None and not told:
            self._raise_if_over()
        with self._sending:
            self._watch()
        return None

    def _hear(self) -> Incoming | None:
        """The next message of the first connection."""
        if self._control_ended:
            return None
        try:
            return self._control.receive(0.0)
        except ConnectionLost as error:
            if self._closed:
                raise self._gone() from None
            self._control_ended = True
            self._unwatch(self._control_fd)
            self._end_of_one(error, lingering=True)
            return None
        except ProtocolError as error:
            self._failure = error
            raise

    def _read_lanes(self) -> None:
        budget = BURST
        announced = self._control.announced
        ready = self._wait(0.0)
        self._first = (self._first + 1) % len(self._lanes)
        for lane in (*self._lanes[self._first :], *self._lanes[: self._first]):
            incoming = lane.incoming
            if lane.fd not in ready and not lane.readable(announced):
                continue
            while budget > 0 and not incoming.ended:
                with self._placing:
                    if self._closed:
                        raise self._gone()
                    count = self._read_lane(lane)
                if not count:
                    break
                budget -= count
        if budget < BURST and self._lingering:
            self._loss_at = _clock.now() + LINGER

    def _read_lane(self, lane: Lane) -> int:
        incoming = lane.incoming
        error: ConnectionLost | None = None
        lingering = False
        count = 0
        try:
            count = incoming.read(self._arrived)
            if incoming.ended:
                error = ConnectionLost("the peer closed a lane", peer=self.peer_address)
                lingering = True
        except ConnectionLost as found:
            error = found
        except ProtocolError as found:
            self._failure = found
            raise
        except OSError as found:
            error = broken("receiving", found, self.peer_address)
        except BaseException:
            self.abort()
            raise
        if error is not None:
            incoming.ended = True
            self._unwatch(lane.fd)
            self._end_of_one(error, lingering=lingering)
        return count

    def _arrived(self, payload: SpreadPayload) -> None:
        self._control.spread.pop(payload.number, None)
        self._complete.append(payload)

    def _call_complete(self) -> bool:
        """Whether anything was told; the loss is told by a later step then."""
        told = bool(self._complete)
        while self._complete:
            self._complete.popleft().report()
            if self._closed:
                raise self._gone()
        return told

    def _end_of_one(self, error: ConnectionLost, *, lingering: bool) -> None:
        """One of the connections has ended; the others may have something left."""
        if self._loss is None:
            self._loss = error
        self._lingering = self._lingering and lingering
        self._loss_at = _clock.now() + (LINGER if self._lingering else 0.0)

    def _raise_if_over(self) -> None:
        """Nothing more can come, or nothing more came."""
        silent = all(lane.incoming.ended for lane in self._lanes)
        over = self._control_ended and (silent or not self._control.spread)
        if over or _clock.now() >= self._loss_at:
            assert self._loss is not None
            self._failure = self._loss
            raise self._failure

    # -- waiting -------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> set[int]:
        """Wait until something can be done; the descriptors that say so."""
        with self._watching:
            if self._closed:
                raise self._gone()
            self._waiting += 1
        try:
            return {descriptor for descriptor, _ in self._epoll.poll(seconds)}
        finally:
            with self._watching:
                self._waiting -= 1
                if self._closed:
                    self._close_descriptors()

    def _rouse(self) -> None:
        """Make the descriptor readable."""
        with self._watching:
            if self._wake >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._wake, 1)

    def _watch(self) -> None:
        """Watch for what a step could do something with."""
        if self._closed:
            return
        if not self._control_ended:
            wanted = _IN | (_OUT if self._control.pending_output else 0)
            if wanted != self._control_watched:
                self._control_watched = wanted
                self._modify(self._control_fd, wanted)
        waiting = self._striping.waiting
        for lane in self._lanes:
            if lane.incoming.ended:
                continue
            wanted = 0 if lane.incoming.stalled else _IN
            if waiting or lane.outgoing.pending:
                wanted |= _OUT
            if wanted != lane.watched:
                lane.watched = wanted
                self._modify(lane.fd, wanted)

    def _modify(self, descriptor: int, wanted: int) -> None:
        with self._watching:
            if not self._closed:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.modify(descriptor, wanted)

    def _unwatch(self, descriptor: int) -> None:
        with self._watching:
            if not self._closed:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(descriptor)

    def _close_descriptors(self) -> None:
        if self._waiting or self._wake < 0:
            return
        self._epoll.close()
        os.close(self._wake)
        self._wake = -1

    # -- the end -------------------------------------------------------------------------------

    def close(self, timeout: float = 1.0) -> None:
        deadline = _clock.now() + timeout
        while not self._closed:
            try:
                if self.flush():
                    break
            except (ConnectionLost, ProtocolError):
                self.abort()
                return
            left = deadline - _clock.now()
            if left <= 0:
                self.abort()
                return
            self._await_room(left)
        if not self._closed:
            self._end(lambda: self._let_go(deadline))

    def _await_room(self, seconds: float) -> None:
        """What comes in is no longer looked at, so only room for output counts."""
        poll = select.poll()
        if self._control.pending_output:
            poll.register(self._control_fd, select.POLLOUT)
        for lane in self._lanes:
            if self._striping.waiting or lane.outgoing.pending:
                poll.register(lane.fd, select.POLLOUT)
        # Another thread may have sent it meanwhile.
        poll.poll(1000 * min(seconds, 0.02))

    def _let_go(self, deadline: float) -> None:
        scratch = memoryview(bytearray(LARGE))
        for lane in self._lanes:
            with contextlib.suppress(OSError, ValueError):
                if lane.tls is not None:
                    lane.tls.say_goodbye()
                lane.sock.shutdown(socket.SHUT_WR)
        self._control.close(max(0.0, deadline - _clock.now()))
        for lane in self._lanes:
            with contextlib.suppress(OSError, ValueError):
                drain(lane.sock, scratch, deadline)
            lane.sock.close()

    def abort(self) -> None:
        self._end(self._break_off)

    def _break_off(self) -> None:
        for lane in self._lanes:
            reset(lane.sock)
        self._control.abort()
        for lane in self._lanes:
            lane.sock.close()

    def _end(self, give_back: Callable[[], None]) -> None:
        """Return when no thread uses lent memory any more; no call waits while it has such."""
        with self._watching:
            if self._closed:
                return
            self._closed = True
        self._rouse()
        with self._sending, self._placing:
            self._striping.clear()
            for lane in self._lanes:
                lane.clear()
            self._ended.clear()
            self._complete.clear()
            give_back()
        # They hold the frames that they passed.
        self._failure = self._tx_failure = self._loss = None
        with self._watching:
            self._close_descriptors()

    def _wait_untouched(self) -> None:
        """Return when no other thread is writing to lent memory."""
        with self._placing:
            pass


def pair(lanes: int = 2, codec: str = "") -> tuple[LanesConnection, LanesConnection]:
    """Two connections that are connected to each other, inside this process; with a codec each
    piece is tried."""
    firsts = socket.socketpair()
    lines = [socket.socketpair() for _ in range(lanes)]
    here, there = (
        LanesConnection(
            TcpConnection(firsts[side], blocking=False),
            [line[side] for line in lines],
            codecs=(codec_named(codec), codec_named(codec)) if codec else (None, None),
            rule=Rule(always=bool(codec)),
        )
        for side in (0, 1)
    )
    return here, there
