"""Makes a session's core progress in the threads that wait for it: the one that waits also reads.

With several threads in one session, one of those that wait receives for all of them; when it
has what it wanted, another takes over.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Iterable
from threading import get_ident
from typing import Any, Final, Protocol

from gpuremote import _clock
from gpuremote._clock import now_ns
from gpuremote.client.core import Core
from gpuremote.client.link import MAX_PAUSE, Link
from gpuremote.client.tail import TAIL
from gpuremote.client.waits import Wait
from gpuremote.errors import ConnectionLost, DeadlineExceeded, GpuRemoteError, ProtocolError
from gpuremote.rpc.peer import Connection

__all__ = ["BlockingDriver"]

SLICE: Final = 1.0
"""Seconds of one blocking receive; deadlines are looked at in between."""
PUSH: Final = 0.005
"""Seconds that a thread waits to send on before it looks for its answer."""
MANY: Final = 1024
"""Receives without a pause on behalf of another session."""
RECEIPTS: Final = 1
"""Uploads that nothing was heard of, before a further one looks whether something was: memory is
used again as soon as the server is through with it, while it is in the caches."""
FIRST_NS: Final = 60_000
"""Nanoseconds after a wait for which the first op is kept, as others may follow: a send costs as
much as several ops."""
REST_NS: Final = 500_000
"""Nanoseconds for which a batch is overdue, before the program is taken to do something else."""
SHORT: Final = 0.01
"""Seconds for going back to a server on behalf of another session, apart from one attempt."""


class _Done(Protocol):
    @property
    def done(self) -> bool: ...


class _Credit:
    """Done when the server has granted credit (or there will be none)."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def done(self) -> bool:
        return self._core.peer.credit > 0 or self._core.dead is not None


class _Room:
    """Done when one more payload may be on its way."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def done(self) -> bool:
        return not self._core.full


class _Landed:
    """Done when none of these uploads is on its way."""

    def __init__(self, core: Core, waits: Iterable[Wait]) -> None:
        self._core = core
        self._waits = list(waits)

    @property
    def done(self) -> bool:
        return self._core.dead is not None or all(
            wait.done or wait.cancelled for wait in self._waits
        )


class BlockingDriver:
    """Makes a core progress in the threads that wait for it.

    Parameters
    ----------
    core : Core
    link : Link
    """

    def __init__(self, core: Core, link: Link) -> None:
        self.core = core
        self.link = link
        # Who receives: at most one entry, by its thread. No lock, as Ctrl-C may come between taking
        # one and the block that gives it back. Here who took it can be told; and giving it back
        # (see ``finally``) calls nothing, so that no signal's exception comes before.
        self._leader: dict[int, int] = {}
        self._receives = 0
        self._followers: set[threading.Event] = set()
        self._better_at: float | None = None
        core.wait, core.driver = self.wait, self
        core.on_stall = self._stalled
        core.on_sync = self._synced
        core.poll = self._poll
        core.idle_pause = FIRST_NS

    def begin(self) -> None:
        """From now on a thread sends what the program leaves unsent."""
        self.core.on_buffered = self.core.on_output = TAIL.add(self)

    def end(self) -> None:
        TAIL.remove(self)

    def send_rest(self) -> bool:
        """Send what the program has left, if it has stopped issuing; whether anything was left.

        Called by another thread than those of the program.
        """
        core = self.core
        connection = core.peer.connection
        sending = connection is not None and connection.pending_output
        if core.dead is not None or not (core.unsent or sending or core.peer.owing):
            return False
        if not core.lock.acquire(blocking=False):
            return True  # the program is at it
        try:
            if core.unsent and now_ns() > core.flush_after + REST_NS:
                if core.uploading:
                    return True
                core.flush()
            elif connection is not None and connection is core.peer.connection:
                connection.flush()
            if core.peer.owing:
                core.peer.acknowledge()
        except ConnectionLost as error:
            assert connection is not None
            self._lost(connection, error)
        except GpuRemoteError:
            return False  # the program finds out at its next op
        finally:
            core.lock.release()
        return True

    def wait(self, wait: Wait, timeout: float | None = None) -> Any:
        """The answer of ``wait``.

        Raises
        ------
        DeadlineExceeded
            Not within ``timeout`` seconds. The answer is dropped when it comes; on return its
            buffer is no longer written to.
        GpuRemoteError
            The answer is an error, or the session is lost.
        """
        if self._better_at is not None and _clock.now() > self._better_at:
            self._better_at = None
            self.link.leave(self.core)
        if timeout is None:
            if self.core.await_answer(self, wait):
                return wait.value
            if not wait.done:
                self._wait_simply(wait)
        if not wait.done:
            self._wait_until(wait, timeout)
        if self.core.flush_after:
            self.core.settled()
        if wait.error is not None:
            raise wait.take_error()
        return wait.value

    def wait_for_all(self, wait: Wait, timeout: float | None) -> None:
        """As :meth:`wait`, and for every upload that nobody else waits for: the answer may have
        overtaken their bytes."""
        deadline = None if timeout is None else _clock.now() + timeout
        core = self.core
        with core.lock:
            landed = _Landed(core, core.lent)
        self.wait(wait, timeout)
        self._until(landed, deadline)
        if not landed.done:
            raise DeadlineExceeded(
                f"uploads did not arrive within {timeout} s; the session goes on",
                op="synchronize",
                peer=core.peer_name,
            )

    def _wait_simply(self, wait: Wait) -> None:
        """The common case: this thread alone, the connection as it should be, one answer."""
        core, leader = self.core, self._leader
        peer = core.peer
        connection = peer.connection
        if connection is None or connection.pending_output or leader:
            return
        me, before = 0, False
        try:
            me = get_ident()
            if leader.setdefault(0, me) != me:
                return
            if wait.into is not None:
                core.expect(wait)
            while not wait.done:
                if not peer.take(connection, SLICE, 0 if peer.arriving else connection.looks):
                    if before or core.sources or core.deferred:
                        return
                    before = True  # what came may have been of the message before
        except ConnectionLost as error:
            self._lost(connection, error)
        except ProtocolError as error:
            self._violated(connection, error)
        except BaseException:
            if leader.get(0) == me:
                core.cancel(wait)
            else:
                self._cancel(wait)
            raise
        finally:
            if 0 in leader and leader[0] == me:
                self._receives += 1
                del leader[0]
            self._call_followers()

    def _caught(self, connection: Connection, wait: Wait, error: BaseException) -> None:
        """The same where the part in C receives (``native/awaiting.c``), for what it met with."""
        try:
            raise error
        except ConnectionLost as lost:
            self._lost(connection, lost)
        except ProtocolError as broken:
            self._violated(connection, broken)
        except BaseException:
            self.core.cancel(wait)
            raise
        finally:
            del error, wait  # a circle, which would hold the program's buffers

    def _wait_until(self, wait: Wait, timeout: float | None) -> None:
        deadline = None if timeout is None else _clock.now() + timeout
        try:
            self._until(wait, deadline)
        except BaseException:
            self._cancel(wait)
            raise
        if not wait.done:
            self._cancel(wait)
            raise DeadlineExceeded(
                f"no answer to {wait.kind} within {timeout} s; the session goes on",
                op=wait.kind,
                peer=self.core.peer_name,
            )

    def _call_followers(self) -> None:
        """This thread no longer receives; wake those that may take over."""
        if self._followers:
            for follower in list(self._followers):
                follower.set()

    def _until(self, what: _Done, deadline: float | None) -> None:
        leader, me = self._leader, get_ident()
        while _unfinished(what, deadline):
            if leader:
                self._follow(what, deadline)
                continue
            try:
                if leader.setdefault(0, me) == me:
                    while _unfinished(what, deadline):
                        self._step(deadline)
            finally:
                if 0 in leader and leader[0] == me:
                    del leader[0]
                self._call_followers()

    def _follow(self, what: _Done, deadline: float | None) -> None:
        """Another thread receives; sleep until it has our answer or leaves."""
        woken = threading.Event()
        self._followers.add(woken)
        try:
            if isinstance(what, Wait):
                with self.core.lock:
                    what.notify = woken.set
            # The answer may have come, or the leader left, before it could tell this thread.
            if what.done or not self._leader:
                return
            connection = self.core.peer.connection
            if connection is not None and connection.pending_output:
                self._push(connection)
                return
            remaining = SLICE if deadline is None else max(0.0, deadline - _clock.now())
            woken.wait(min(remaining, SLICE if isinstance(what, Wait) else 0.01))
        finally:
            self._followers.discard(woken)

    def _push(self, connection: Connection) -> None:
        """Send on: the thread that receives may sleep in that, and not see to it for a while."""
        try:
            poller = select.poll()
            poller.register(connection.fileno(), select.POLLOUT)
            poller.poll(1000 * PUSH)
            with self.core.lock:
                if self.core.peer.connection is connection:
                    connection.flush()
        except ConnectionLost as error:
            self._lost(connection, error)

    def _step(self, deadline: float | None) -> None:
        """Make some progress, or wait a while for it."""
        core = self.core
        connection = core.peer.connection
        if connection is None:
            self._resume(deadline)
            return
        try:
            self._receive(connection, deadline)
        except ConnectionLost as error:
            self._lost(connection, error)
        except ProtocolError as error:
            self._violated(connection, error)

    def _violated(self, connection: Connection, error: ProtocolError) -> None:
        connection.abort()
        self.core.die(error)

    def _receive(self, connection: Connection, deadline: float | None) -> None:
        core = self.core
        left = SLICE if deadline is None else min(SLICE, deadline - _clock.now())
        if connection.pending_output or left < SLICE or connection.due() is not None:
            wait = 0.0
            there = self._poll_once(connection, left)
        else:
            wait = SLICE
            there = True
        try:
            taken = there and core.peer.take(connection, wait)
        finally:
            self._receives += 1
        if not taken and (core.sources or core.deferred):
            self._tend()

    def _poll_once(self, connection: Connection, seconds: float) -> bool:
        """Wait until something can be sent or received, and send; whether to receive."""
        due = connection.due()
        if due is not None:
            seconds = min(seconds, due)
        poller = select.poll()
        wanted = select.POLLIN | (select.POLLOUT if connection.pending_output else 0)
        fd = connection.fileno()
        poller.register(fd, wanted)
        until = _clock.now() + seconds
        while True:
            found = poller.poll(max(0.0, 1000 * seconds))
            with self.core.lock:
                connection.flush()
            if due is not None or found != [(fd, select.POLLOUT)] or connection.buffered:
                return True
            if not connection.pending_output or _clock.now() > until:
                return False

    def _tend(self) -> None:
        """Look after the sessions that copies come from; nobody else may be reading them."""
        for source in list(self.core.sources):
            source.poll()
        self.core.run_deferred()

    def _poll(self, most: int = MANY) -> None:
        """Take in what has arrived (``most`` receives), without waiting; come back where the
        connection broke."""
        leader, me = self._leader, get_ident()
        if self.core.dead is not None or leader:
            return
        connection = self.core.peer.connection
        try:
            if leader.setdefault(0, me) != me:
                return
            if connection is None:
                self._resume(_clock.now() + SHORT)
                return
            for _ in range(most):
                if not self.core.peer.take(connection):
                    break
        except ConnectionLost as error:
            assert connection is not None
            self._lost(connection, error)
        except ProtocolError as error:
            assert connection is not None
            self._violated(connection, error)
        finally:
            if 0 in leader and leader[0] == me:
                del leader[0]
            self._call_followers()

    def room(self) -> None:
        """Wait until one more upload may be on its way (with many threads uploading)."""
        if self.core.full:
            self._until(_Room(self.core), None)
        elif self.core.peer.bulk_in_flight > RECEIPTS and self.core.peer.connection is not None:
            self._poll(2 * RECEIPTS)

    def _stalled(self) -> None:
        """Issuing has to wait until the server has caught up."""
        self._until(_Credit(self.core), None)

    def _synced(self, wait: Wait) -> None:
        self._until(wait, None)
        wait.result()

    def _lost(self, connection: Connection, error: BaseException) -> None:
        core = self.core
        with core.lock:
            if core.peer.connection is connection:
                core.peer.lost(error)
        self.link.lost(core)

    def _resume(self, deadline: float | None) -> None:
        """Come back to the server; returns when it worked, failed for good, or time is up."""
        core, link = self.core, self.link
        link.lost(core)
        if core.dead is not None:
            return
        pause = 0.02
        while deadline is None or _clock.now() < deadline:
            try:
                left = None if deadline is None else deadline - _clock.now()
                found = link.attempt(core, blocking=True, within=left)
            except GpuRemoteError as error:
                if link.final(error):
                    link.give_up(core, error)
                    return
                if link.remaining() <= 0:
                    link.give_up(core, None)
                    return
                threading.Event().wait(min(pause, max(0.0, link.remaining())))
                pause = min(2 * pause, MAX_PAUSE)
                continue
            link.resumed(core, found)
            self._better_at = link.better_at
            return

    def _cancel(self, wait: Wait) -> None:
        """Give up an answer, and make sure that its buffer is left alone."""
        core, leader, me = self.core, self._leader, get_ident()
        if not leader:
            try:
                if leader.setdefault(0, me) == me:
                    core.cancel(wait)
                    return
            finally:
                if 0 in leader and leader[0] == me:
                    del leader[0]
        # Another thread may be receiving into the buffer at this moment: break its connection
        # off (the session resumes) and wait until it has left the receive.
        with core.lock:
            connection = core.peer.connection
            if wait.done:
                return
            wait.cancelled = True
        before = self._receives
        if connection is not None:
            connection.abort()
        while leader and self._receives == before and connection is not None:
            if core.peer.connection is not connection:
                break
            threading.Event().wait(0.001)
        with core.lock:
            wait.cancelled = False
            core.cancel(wait)


def _unfinished(what: _Done, deadline: float | None) -> bool:
    return not what.done and (deadline is None or _clock.now() < deadline)
