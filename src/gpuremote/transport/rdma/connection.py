"""An RDMA connection at work; ``rdma`` brings it up. Private."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from gpuremote import _clock
from gpuremote._types import BytesLike
from gpuremote.errors import (
    ConnectionLost,
    GpuRemoteError,
    InternalError,
    LimitExceeded,
    ProtocolError,
)
from gpuremote.memory.cuda import CudaError
from gpuremote.transport._framing import MAX_HEADER, MAX_REGIONS
from gpuremote.transport._incoming import Message
from gpuremote.transport.base import Connection, Incoming, Region, TransportStats, flat_view
from gpuremote.transport.rdma import frames
from gpuremote.transport.rdma.control import Control, Frame
from gpuremote.transport.rdma.gpu import Stages
from gpuremote.transport.rdma.inbound import Inbound
from gpuremote.transport.rdma.lanes import InLane, OutLane
from gpuremote.transport.rdma.memory import Slabs
from gpuremote.transport.rdma.outbound import Outbound
from gpuremote.transport.rdma.payload import EagerIncoming, RdmaIncoming
from gpuremote.transport.rdma.rail import Owner, Rail
from gpuremote.transport.verbs.base import Completion, VerbsError
from gpuremote.transport.verbs.explain import explain_errno, explain_status

__all__ = ["WATCH", "RdmaConnection"]

WATCH: Final = 1.0
"""Seconds after which the completion queues are looked at although no event came."""
COPYING: Final = 0.001
"""The same while a GPU copies to or from the host's memory: no descriptor tells when it is done."""
READY: Final = 64
"""Messages taken out of the ring ahead of ``receive``, so that what comes behind them (where a
payload goes) is seen by a side that only sends."""
REAPED: Final = 256
"""Completions in one step."""
ALL: Final = 1 << 30

CALLS: Final = 64
"""Rounds of callbacks after one step, each of which may send."""

_Received: TypeAlias = Message | EagerIncoming | RdmaIncoming


class RdmaConnection(Connection):
    """A connection over reliable queue pairs that were brought up and tried.

    Parameters
    ----------
    base : Connection
        The first connection, owned from now on: its end is this one's. Nothing else travels there.
    rails : sequence of Rail
        Owned from now on.
    control : Control
        On the first rail.
    out_lanes, in_lanes : sequence
    stats : TransportStats
    blocking : bool
        Whether a thread waits in ``receive``; False for an event loop.
    piece : int
        Bytes of a payload that are asked for at a time; two pieces for each lane are under way.
    reason : str

    Notes
    -----
    Steps are made under one lock by any thread; callbacks are called without it. Every step looks
    at the completion queues first, and none waits. ``Incoming.discard`` takes memory back at once,
    by unregistering it. If the peer was writing there, the lane for that is made anew, and the
    connection goes on.
    """

    name = "rdma"
    takes_device = True

    def __init__(
        self,
        base: Connection,
        rails: Sequence[Rail],
        control: Control,
        out_lanes: Sequence[OutLane],
        in_lanes: Sequence[InLane],
        stats: TransportStats,
        *,
        blocking: bool,
        piece: int,
        reason: str,
    ) -> None:
        self.local_address = base.local_address
        self.peer_address = base.peer_address
        self.reason = reason
        self.stats = stats
        self._base = base
        self._rails = rails
        self._control = control
        self._lanes = len(out_lanes)
        self._stages = Stages(), Stages()  # of what goes out, and of what comes in
        self._out = Outbound(control, out_lanes, stats, self._stages[0])
        self._in = Inbound(
            control, in_lanes, stats, piece=piece, receiver=self, stages=self._stages[1]
        )
        self._blocking = blocking
        self._slabs = Slabs([rail.registry for rail in rails])
        self._lock = threading.RLock()
        self._closed = False
        self._closing = False  # what comes in no longer counts
        self._failure: ConnectionLost | ProtocolError | None = None
        self._verbs = True  # not given back yet
        self._calling: set[int] = set()  # the threads that are in a callback of a send
        self._ready: deque[tuple[_Received, Frame]] = deque()
        self._held: tuple[_Received, Frame] | None = None  # the program looks at its header
        # Waiting.
        self._waiting = 0
        self._looked = _clock.now()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._base_fd = base.fileno()
        self._epoll.register(self._base_fd, select.EPOLLIN)
        self._queues = {rail.queue.fileno(): rail.queue for rail in rails}
        for descriptor, queue in self._queues.items():
            self._epoll.register(descriptor, select.EPOLLIN)
            queue.arm()

    # -- what it tells -------------------------------------------------------------------------

    def fileno(self) -> int:
        if self._closed:
            raise self._gone()
        return self._epoll.fileno()

    @property
    def pending_output(self) -> bool:
        return not self._closed and (self._control.pending or self._out.pending)

    @property
    def buffered(self) -> bool:
        return bool(self._ready or self._in.arrived or self._control.unread)

    @property
    def closed(self) -> bool:
        return self._closed

    def due(self) -> float | None:
        due = self._base.due()
        if self._copying:
            left = COPYING
        elif self._blocking:
            return due  # its thread comes by itself, at least once in WATCH
        else:
            left = max(0.0, self._looked + WATCH - _clock.now())
        return left if due is None else min(left, due)

    @property
    def _copying(self) -> bool:
        return any(stages.copying for stages in self._stages)

    def allocate(self, nbytes: int) -> memoryview | None:
        with self._lock:
            return self._slabs.allocate(nbytes) if self._verbs else None

    def describe(self) -> dict[str, object]:
        return {
            **super().describe(),
            "devices": [rail.device.name for rail in self._rails],
            "lanes": self._lanes,
            "gpu_memory": [rail.registry.direct.describe() for rail in self._rails],
        }

    def _gone(self) -> ConnectionLost:
        return ConnectionLost("the connection was closed on this side", peer=self.peer_address)

    def _check(self) -> None:
        if self._closed:
            raise self._gone()
        if self._failure is not None:
            raise self._failure

    # -- sending -------------------------------------------------------------------------------

    def send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        if type(header) is memoryview:
            header = flat_view(header)
        if len(header) > MAX_HEADER:
            raise LimitExceeded(
                f"a message header of {len(header)} bytes; at most {MAX_HEADER} are sent"
            )
        if len(regions) > MAX_REGIONS:
            raise LimitExceeded(f"{len(regions)} regions; a message takes {MAX_REGIONS}")
        with self._lock:
            self._check()
            waiting = self._control.pending
            if regions:
                self._out.send(header, regions, done)
            else:
                self._control.add(frames.MESSAGE, header, done=done)
            self.stats.messages_sent += 1
            # Behind others it has to wait for room anyway.
            if not waiting and threading.get_ident() not in self._calling:
                self._guarded(self._drive)
        self._call_sent()

    def flush(self) -> bool:
        with self._lock:
            self._check()
            self._guarded(self._look)
            if self._failure is not None or self._ready or self._in.arrived:
                self._rouse()  # it is for receive() to tell
        self._call_sent()
        self._check()
        return not self.pending_output

    def _call_sent(self) -> None:
        # Not from within such a callback: what that one sends could go on without end.
        me = threading.get_ident()
        if me in self._calling:
            return
        for _ in range(CALLS):
            while self._out.ended and not self._closed:
                try:
                    done = self._out.ended.popleft()
                except IndexError:  # another thread was faster
                    return
                self._calling.add(me)
                try:
                    done()
                finally:
                    self._calling.discard(me)
            if self._closed or not self._control.pending:
                return
            with self._lock:
                self._guarded(self._drive)
            if not self._out.ended:
                return
        self._rouse()

    # -- receiving -----------------------------------------------------------------------------

    def receive(self, wait: float = 0.0) -> Incoming | None:
        with self._lock:
            if self._closed:
                raise self._gone()
            self._let_go_of_held()
            before = self.stats.bytes_received
            self._guarded(self._advance)
            if not self._ready and not self._in.arrived:
                self._guarded(self._look)
        called = self._call_arrived()
        self._call_sent()
        found = self._next(called)
        if found is not None or called or wait <= 0 or self.stats.bytes_received != before:
            return found
        self._wait(min(wait, COPYING if self._copying else WATCH))
        with self._lock:
            if self._closed:
                raise self._gone()
            self._guarded(self._look)
        called = self._call_arrived()
        self._call_sent()
        return self._next(called)

    def _let_go_of_held(self) -> None:
        if self._held is None:
            return
        incoming, frame = self._held
        if not isinstance(incoming, Message) and incoming.undecided:
            raise InternalError("receive() before into() or discard() of the message before")
        self._held = None
        self._control.let_go(frame)

    def _next(self, called: bool) -> Incoming | None:
        """The next message; a loss is told by the call after the one that told of something."""
        with self._lock:
            if self._closed:
                raise self._gone()
            if not self._ready and isinstance(self._failure, ConnectionLost):
                self._take_what_was_left()
            if self._ready:
                self._held = self._ready.popleft()
                self.stats.messages_received += 1
                return self._held[0]
            if self._failure is not None and not called:
                raise self._failure
            return None

    def _take_what_was_left(self) -> None:
        """Messages that came before the loss, and were not looked at."""
        try:
            self._take_in()
        except ProtocolError as error:
            self._failure = error

    def _call_arrived(self) -> bool:
        called = False
        while self._in.arrived and not self._closed:
            try:
                incoming = self._in.arrived.popleft()
            except IndexError:
                break
            called = True
            with self._lock:
                done, incoming.done = incoming.done, None
                incoming.reported = True
            if done is not None:
                done(incoming)
        return called

    def _wait(self, seconds: float) -> None:
        with self._lock:
            if self._closed:
                raise self._gone()
            self._waiting += 1
        try:
            self._epoll.poll(seconds)
        finally:
            with self._lock:
                self._waiting -= 1
                if self._closed:
                    self._close_descriptors()

    def _rouse(self) -> None:
        """Make the descriptor readable."""
        if self._wake >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._wake, 1)

    # -- steps, under the lock -----------------------------------------------------------------

    def _guarded(self, step: Callable[[], None]) -> None:
        """Make a step; what goes wrong in it is the end of the connection."""
        if self._failure is not None or self._closed:
            return
        try:
            step()
        except (ConnectionLost, ProtocolError) as error:
            self._lose(error)
        except VerbsError as error:
            self._lose(ConnectionLost(explain_errno(error), peer=self.peer_address))
        except CudaError as error:
            self._lose(ConnectionLost(f"a GPU's memory: {error}", peer=self.peer_address))
        except BaseException:
            # Nobody knows how far it came.
            self.abort()
            raise

    def _look(self) -> None:
        """Take in what the descriptors tell."""
        self._looked = _clock.now()
        over = False
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._base_fd:
                over = True
            elif descriptor == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                self._queues[descriptor].arm()
        self._advance()
        if over and self._failure is None:
            self._hear_base()

    def _hear_base(self) -> None:
        """The first connection has something to say: most likely that the peer is gone."""
        if (loss := self._heard()) is not None:
            # What the peer had sent before is here by now.
            self._reap(ALL)
            self._advance()
            if self._failure is None:
                raise loss

    def _heard(self) -> ConnectionLost | None:
        """What the first connection says, if that is the end."""
        try:
            incoming = self._base.receive(0.0)
        except ConnectionLost as error:
            return ConnectionLost(error.message, peer=self.peer_address)
        if incoming is None:
            return None
        text = bytes(incoming.header[:1000]).decode(errors="replace")
        return ConnectionLost(f"the peer gave RDMA up: {text}", peer=self.peer_address)

    def _advance(self) -> None:
        self._reap()
        self._take_in()
        if self._failure is None:
            self._drive()

    def _reap(self, limit: int = REAPED) -> None:
        for rail in self._rails:
            budget = limit
            while budget > 0:
                found = rail.queue.poll(32)
                if not found:
                    break
                budget -= len(found)
                for completion in found:
                    owned = rail.works.pop(completion.work)
                    if owned is None:
                        continue  # of a queue pair that was given up
                    owner, tag = owned
                    if completion.status:
                        self._refused(rail, owner, tag, completion)
                    else:
                        owner.completed(completion.work, tag, completion)
            if budget <= 0:
                self._rouse()  # there may be more

    def _refused(self, rail: Rail, owner: Owner, tag: int, completion: Completion) -> None:
        """A work request failed; the first one says why, those behind it were flushed."""
        what = owner.describe(completion.work, tag)
        if not owner.refused(completion):
            # Where the peer has given up, that is why, and its reason the better one.
            if (theirs := self._heard()) is not None:
                raise theirs
            raise ConnectionLost(
                f"{what} failed on {rail.device.name} with {explain_status(completion.status)}"
                f"{rail.trouble()} (vendor error {completion.vendor_error:#x})",
                peer=self.peer_address,
            )
        if isinstance(owner, OutLane):
            self._count("lanes_renewed")
            told = frames.encode_lane(owner.number, owner.pair.number, owner.psn)
            self._control.add(frames.LANE, told)

    def _count(self, name: str) -> None:
        self.stats.extra[name] = self.stats.extra.get(name, 0) + 1

    def _take_in(self) -> None:
        """Look at the frames that came."""
        while len(self._ready) < READY:
            frame = self._control.take()
            if frame is None:
                return
            if frame.kind in (frames.MESSAGE, frames.OPEN, frames.EAGER):
                if not self._closing:
                    self._ready.append((self._incoming_of(frame), frame))
                    continue
            elif self._failure is None:
                self._told(frame.kind, frame.body)
            self._control.let_go(frame)

    def _incoming_of(self, frame: Frame) -> _Received:
        if frame.kind == frames.MESSAGE:
            return Message(frame.body)
        if frame.kind == frames.OPEN:
            return self._in.begin(frame.body)
        sizes, header, payload = frames.decode_eager(frame.body)
        return EagerIncoming(header, sizes, payload, self.stats)

    def _told(self, kind: int, body: memoryview) -> None:
        if kind == frames.PIECE:
            self._out.asked(frames.decode_piece(body))
        elif kind == frames.DROP:
            self._out.drop(frames.decode_channel(body))
        elif kind == frames.DROPPED:
            self._in.dropped(frames.decode_channel(body))
        elif kind == frames.LANE:
            self._in.renew(frames.decode_lane(body))
        elif kind == frames.LANE_READY:
            self._out.renewed(frames.decode_lane(body))
        else:
            self._reap(ALL)  # the last pieces may be reported by another card
            self._lose(ConnectionLost("the peer closed the connection", peer=self.peer_address))

    def _drive(self) -> None:
        """Ask, write and tell what can be asked, written and told."""
        self._in.ask()
        self._out.pump()
        self._control.pump()
        if self._control.ended:
            self._out.ended.extend(self._control.ended)
            self._control.ended.clear()

    # -- for what arrives ----------------------------------------------------------------------

    def place(self, incoming: RdmaIncoming) -> None:
        with self._lock:
            if self._failure is None and not self._closed:
                self._in.place(incoming)
                self._guarded(self._drive)
                if self._failure is not None:
                    self._rouse()

    def drop(self, incoming: RdmaIncoming, done: Callable[[Incoming], None] | None) -> None:
        with self._lock:
            incoming.undecided = False
            if incoming.reported or self._failure is not None or self._closed:
                return
            incoming.done = done
            if incoming.dropped or incoming.received == incoming.total:
                return  # its end is on the way to receive() already
            incoming.dropped = True
            self._guarded(lambda: self._in.take_back(incoming))
            self._guarded(self._drive)

    # -- the end -------------------------------------------------------------------------------

    def _lose(self, error: ConnectionLost | ProtocolError) -> None:
        """The connection is of no use any more: no memory that was lent is touched again."""
        if self._failure is not None or self._closed:
            return
        self._failure = error
        self._give_back()
        with contextlib.suppress(GpuRemoteError):
            # So that the other end knows why too.
            self._base.send(error.message.encode()[:1000])
        self._base.close(0.0)
        self._rouse()

    def _give_back(self) -> None:
        if not self._verbs:
            return
        self._verbs = False
        for descriptor in self._queues:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(descriptor)
        for rail in self._rails:
            rail.close()
        self._control.close()
        self._out.clear()
        self._in.clear()
        for stages in self._stages:
            stages.close()

    def _close_descriptors(self) -> None:
        if self._waiting or self._wake < 0:
            return
        self._epoll.close()
        os.close(self._wake)
        self._wake = -1

    def close(self, timeout: float = 1.0) -> None:
        deadline = _clock.now() + timeout
        said = False
        while True:
            with self._lock:
                if self._closed:
                    return
                if not self._closing:
                    self._closing = True
                    self._drop_ready()
                self._guarded(self._look)
                open_still = self._out.busy or self.pending_output
                if self._failure is None and not said and not open_still:
                    said = True
                    self._control.add(frames.BYE)
                    self._guarded(lambda: self._control.pump(last=True))
                over = said and self._control.idle
                if over and self._failure is None:
                    self._end(self._base.close)
                    return
            self._call_sent()
            left = deadline - _clock.now()
            if self._failure is not None or left <= 0:
                self.abort()
                return
            # Another thread in receive() may take the event that this one waits for.
            self._wait(min(left, 0.02))

    def _drop_ready(self) -> None:
        while self._ready:
            self._control.let_go(self._ready.popleft()[1])

    def abort(self) -> None:
        with self._lock:
            self._end(self._base.abort)

    def _end(self, end_base: Callable[[], None]) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._give_back()
        finally:
            self._ready.clear()
            self._in.arrived.clear()
            self._held = None
            end_base()
            self._rouse()
            self._close_descriptors()
